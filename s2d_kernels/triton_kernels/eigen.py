"""The symmetric eigenproblem of `topk_svd` in fp64: parallel cyclic Jacobi by one program, in global memory.

Of order N, a power of two, the N - 1 rounds of a sweep rotate the pairs (i, i xor round): in each round all N/2 pairs
are disjoint, over a sweep every pair comes once. Matrix and vectors are each in two copies, one read and one written,
so that a round needs one barrier.
"""

from __future__ import annotations

from s2d_kernels.triton_kernels.common import constant, jit, tl

# 7 to 9 at the orders 32 to 128 for Krylov blocks; up to 25 were seen for graded matrices with clusters.
MAX_SWEEPS = constant(40)


@jit()
def _rotation(H: tl.tensor, N: tl.tensor, i: tl.tensor, turn: tl.tensor) -> tl.tensor:
    """c and s of the rotation of row i with its partner: new row i = c row i - s row partner."""
    partner = i ^ turn
    first, second = tl.minimum(i, partner), tl.maximum(i, partner)
    inside = i < N
    # The same three elements for both partners, so that their rotations are inverse to each other to the last bit.
    h11 = tl.load(H + first * N + first, mask=inside, other=0.0)
    h22 = tl.load(H + second * N + second, mask=inside, other=0.0)
    h12 = tl.load(H + first * N + second, mask=inside, other=0.0)
    # tan of the smaller angle that makes h12 zero: 2 h12 sign / (|difference| + hypotenuse); nothing to do at h12 = 0.
    difference = h22 - h11
    hypotenuse = tl.sqrt(difference * difference + 4.0 * h12 * h12)
    tangent = (
        tl.where(difference < 0.0, -2.0, 2.0) * h12 / tl.where(hypotenuse > 0.0, tl.abs(difference) + hypotenuse, 1.0)
    )
    c = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    return c, tl.where(i < partner, tangent, -tangent) * c


@jit()
def _off_diagonal(H: tl.tensor, N: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Sum of squares outside of the diagonal, and of all elements."""
    off = tl.full((), 0.0, tl.float64)
    whole = tl.full((), 0.0, tl.float64)
    row = tl.full((), 0, tl.int32)
    while row < N:
        col = tl.full((), 0, tl.int32)
        while col < N:
            i = row + tl.arange(0, TILE)[:, None]
            j = col + tl.arange(0, TILE)[None, :]
            h = tl.load(H + i * N + j, mask=(i < N) & (j < N), other=0.0)
            square = h * h
            whole += tl.sum(tl.sum(square, 1), 0)
            off += tl.sum(tl.sum(tl.where(i == j, 0.0, square), 1), 0)
            col += TILE
        row += TILE
    return off, whole


@jit()
def _round(H: tl.tensor, V: tl.tensor, here: tl.tensor, N: tl.tensor, turn: tl.tensor, TILE: tl.constexpr) -> None:
    """All rotations of a round, from the copies at `here` elements to the others."""
    there = N * N - here
    row = tl.full((), 0, tl.int32)
    while row < N:
        i = row + tl.arange(0, TILE)
        c_i, s_i = _rotation(H + here, N, i, turn)
        i, c_i, s_i = i[:, None], c_i[:, None], s_i[:, None]
        other_i = i ^ turn
        col = tl.full((), 0, tl.int32)
        while col < N:
            j = col + tl.arange(0, TILE)
            c_j, s_j = _rotation(H + here, N, j, turn)
            j, c_j, s_j = j[None, :], c_j[None, :], s_j[None, :]
            other_j = j ^ turn
            inside = (i < N) & (j < N)
            source = H + here
            above = c_j * tl.load(source + i * N + j, mask=inside, other=0.0)
            above -= s_j * tl.load(source + i * N + other_j, mask=inside, other=0.0)
            below = c_j * tl.load(source + other_i * N + j, mask=inside, other=0.0)
            below -= s_j * tl.load(source + other_i * N + other_j, mask=inside, other=0.0)
            rotated = tl.where(j == other_i, 0.0, c_i * above - s_i * below)
            tl.store(H + there + i * N + j, rotated, mask=inside)
            vectors = c_j * tl.load(V + here + i * N + j, mask=inside, other=0.0)
            vectors -= s_j * tl.load(V + here + i * N + other_j, mask=inside, other=0.0)
            tl.store(V + there + i * N + j, vectors, mask=inside)
            col += TILE
        row += TILE
    tl.debug_barrier()


@jit()
def eigenvectors(H: tl.tensor, V: tl.tensor, N: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Diagonalize the symmetric `H [N, N]`: H = V diag(eigenvalues) V^T.

    H and V are each followed by memory for a second copy. Returned is the offset in both of the copy with the result:
    the eigenvalues, in no order, on the diagonal of H, the eigenvectors in the columns of V.
    """
    row = tl.full((), 0, tl.int32)
    while row < N:
        col = tl.full((), 0, tl.int32)
        while col < N:
            i = row + tl.arange(0, TILE)[:, None]
            j = col + tl.arange(0, TILE)[None, :]
            tl.store(V + i * N + j, tl.where(i == j, 1.0, 0.0).to(tl.float64), mask=(i < N) & (j < N))
            col += TILE
        row += TILE
    tl.debug_barrier()
    here = tl.full((), 0, tl.int32)
    sweep = tl.full((), 0, tl.int32)
    off, whole = _off_diagonal(H, N, TILE)
    # Rotations with a zero are none, and the elements outside of the diagonal shrink quadratically: this is reached.
    while (sweep < MAX_SWEEPS) & (off > 1e-31 * whole):
        turn = tl.full((), 1, tl.int32)
        while turn < N:
            _round(H, V, here, N, turn, TILE)
            here = N * N - here
            turn += 1
        off, whole = _off_diagonal(H + here, N, TILE)
        sweep += 1
    return here
