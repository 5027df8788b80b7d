"""The Krylov blocks of `topk_svd`: the first one, and what makes the rows of each next one orthonormal."""

from __future__ import annotations

from s2d_kernels.triton_kernels.common import constant, jit, tl
from s2d_kernels.triton_kernels.eigen import eigenvectors
from s2d_kernels.triton_kernels.matrices import (
    BAD,
    COLS,
    COLS_LEAD,
    DENSE,
    EXPONENT,
    FIELDS,
    FINITE,
    MAXIMA,
    PANELS,
    PARTIAL,
    READS,
    SCALE,
    START,
    STATE,
    THIN,
    TRANSFORM,
    VECTORS,
    B,
    H,
    Q,
    V,
    Z,
)

EPSILON = constant(2.0**-23)  # of fp32
# Eigenvalue of a Gram matrix of b normalized rows, over b, below which a direction counts as dependent.
DROP = constant(1e-10)
# Below it, a square underflows in fp32; torch's norm does not see such a row either.
SHORTEST = constant(1e-19)


@jit()
def _coefficients(
    block: tl.tensor,
    block_lead: tl.tensor,
    q: tl.tensor,
    lead: tl.tensor,
    coefficients: tl.tensor,
    lengths: tl.tensor,
    b: tl.tensor,
    above: tl.tensor,
    cols: tl.tensor,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """block Q^T `[b, above]` to `coefficients`, the squared lengths of the rows to `lengths`."""
    thin = tl.arange(0, THIN)
    x = tl.arange(0, CHUNK)
    first = tl.full((), 0, tl.int32)
    while first < b:
        i = first + thin
        length = tl.zeros((THIN,), tl.float64)
        col = tl.full((), 0, tl.int32)
        while col < cols:
            inside = (i[:, None] < b) & (x[None, :] < cols - col)
            rows = tl.load(block + col + i[:, None] * block_lead + x[None, :], mask=inside, other=0.0).to(tl.float64)
            length += tl.sum(rows * rows, 1)
            col += CHUNK
        tl.store(lengths + i, length, mask=i < b)
        if not FIRST:
            second = tl.full((), 0, tl.int32)
            while second < above:
                j = second + thin
                total = tl.zeros((THIN, THIN), tl.float32)
                col = tl.full((), 0, tl.int32)
                while col < cols:
                    in_cols = x < cols - col
                    inside = (i[:, None] < b) & in_cols[None, :]
                    rows = tl.load(block + col + i[:, None] * block_lead + x[None, :], mask=inside, other=0.0)
                    inside = (j[None, :] < above) & in_cols[:, None]
                    against = tl.load(q + col + j[None, :] * lead + x[:, None], mask=inside, other=0.0)
                    total += tl.dot(rows, against, input_precision="tf32x3")
                    col += CHUNK
                tl.store(
                    coefficients + i[:, None] * above + j[None, :], total, mask=(i[:, None] < b) & (j[None, :] < above)
                )
                second += THIN
        first += THIN
    tl.debug_barrier()


@jit()
def _subtract(
    block: tl.tensor,
    block_lead: tl.tensor,
    q: tl.tensor,
    lead: tl.tensor,
    coefficients: tl.tensor,
    result: tl.tensor,
    b: tl.tensor,
    above: tl.tensor,
    cols: tl.tensor,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """result = block - coefficients Q."""
    thin = tl.arange(0, THIN)
    x = tl.arange(0, CHUNK)
    first = tl.full((), 0, tl.int32)
    while first < b:
        i = first + thin[:, None]
        col = tl.full((), 0, tl.int32)
        while col < cols:
            in_cols = x[None, :] < cols - col
            inside = (i < b) & in_cols
            rows = tl.load(block + col + i * block_lead + x[None, :], mask=inside, other=0.0)
            total = tl.zeros((THIN, CHUNK), tl.float32)
            if not FIRST:
                second = tl.full((), 0, tl.int32)
                while second < above:
                    j = second + thin
                    place = coefficients + i * above + j[None, :]
                    c = tl.load(place, mask=(i < b) & (j[None, :] < above), other=0.0)
                    against = tl.load(
                        q + col + j[:, None] * lead + x[None, :], mask=(j[:, None] < above) & in_cols, other=0.0
                    )
                    total += tl.dot(c, against, input_precision="tf32x3")
                    second += THIN
            tl.store(result + col + i * lead + x[None, :], rows - total, mask=inside)
            col += CHUNK
        first += THIN
    tl.debug_barrier()


@jit()
def _gram(
    block: tl.tensor, lead: tl.tensor, gram: tl.tensor, b: tl.tensor, cols: tl.tensor, CHUNK: tl.constexpr
) -> None:
    """gram `[b, b]` = block block^T in fp64."""
    thin = tl.arange(0, THIN)
    x = tl.arange(0, CHUNK)
    first = tl.full((), 0, tl.int32)
    while first < b:
        i = first + thin[:, None]
        second = tl.full((), 0, tl.int32)
        while second <= first:
            j = second + thin[None, :]
            total = tl.zeros((THIN, THIN), tl.float64)
            col = tl.full((), 0, tl.int32)
            while col < cols:
                in_cols = x < cols - col
                left = tl.load(block + col + i * lead + x[None, :], mask=(i < b) & in_cols[None, :], other=0.0)
                right = tl.load(block + col + j * lead + x[:, None], mask=(j < b) & in_cols[:, None], other=0.0)
                total = tl.dot(left.to(tl.float64), right.to(tl.float64), total, out_dtype=tl.float64)
                col += CHUNK
            inside = (i < b) & (j < b)
            tl.store(gram + i * b + j, total, mask=inside)
            tl.store(gram + j * b + i, total, mask=inside & (second < first))
            second += THIN
        first += THIN
    tl.debug_barrier()


@jit()
def _inverse_lengths(before: tl.tensor, gram: tl.tensor, b: tl.tensor, i: tl.tensor) -> tl.tensor:
    """1 / length of row i of the projected block; 0 for a row of which the projection left only rounding."""
    was = tl.sqrt(tl.load(before + i, mask=i < b, other=0.0))
    length = tl.sqrt(tl.load(gram + i * b + i, mask=i < b, other=0.0))
    kept = (length > was * (8.0 * EPSILON)) & (length > SHORTEST)
    return tl.where(kept, 1.0 / tl.where(kept, length, 1.0), 0.0)


@jit()
def _normalize_gram(
    gram: tl.tensor, before: tl.tensor, scaled: tl.tensor, b: tl.tensor, N: tl.tensor, TILE: tl.constexpr
) -> None:
    """scaled `[N, N]`: the Gram matrix of the rows at length one, and zeros beside it."""
    row = tl.full((), 0, tl.int32)
    while row < N:
        i = row + tl.arange(0, TILE)
        inverse_i = _inverse_lengths(before, gram, b, i)[:, None]
        i = i[:, None]
        col = tl.full((), 0, tl.int32)
        while col < N:
            j = col + tl.arange(0, TILE)
            inverse_j = _inverse_lengths(before, gram, b, j)[None, :]
            j = j[None, :]
            value = tl.load(gram + i * b + j, mask=(i < b) & (j < b), other=0.0) * inverse_i * inverse_j
            tl.store(scaled + i * N + j, value, mask=(i < N) & (j < N))
            col += TILE
        row += TILE
    tl.debug_barrier()


@jit()
def _whitening(
    H: tl.tensor,
    V: tl.tensor,
    gram: tl.tensor,
    before: tl.tensor,
    transform: tl.tensor,
    dependent: tl.tensor,
    b: tl.tensor,
    N: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """transform `[b, b]` = diag(eigenvalues^-1/2) V^T diag(1 / lengths), eigenvalues ascending.

    Rows of dependent directions are zeros, and their `dependent [b]` is 1.
    """
    row = tl.full((), 0, tl.int32)
    while row < b:
        i = row + tl.arange(0, TILE)
        value = tl.load(H + i * N + i, mask=i < b, other=0.0)
        rank = tl.zeros((TILE,), tl.int32)
        col = tl.full((), 0, tl.int32)
        while col < b:
            j = col + tl.arange(0, TILE)[None, :]
            other = tl.load(H + j * N + j, mask=j < b, other=0.0)
            equal = (other == value[:, None]) & (j < i[:, None])
            smaller = ((other < value[:, None]) | equal) & (j < b)
            rank += tl.sum(smaller.to(tl.int32), 1)
            col += TILE
        kept = value > b.to(tl.float64) * DROP
        inverse = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, value, 1.0)), 0.0)[:, None]
        tl.store(dependent + rank, tl.where(kept, 0.0, 1.0).to(tl.float64), mask=i < b)
        col = tl.full((), 0, tl.int32)
        while col < b:
            j = col + tl.arange(0, TILE)
            length = _inverse_lengths(before, gram, b, j)[None, :]
            inside = (i[:, None] < b) & (j[None, :] < b)
            vectors = tl.load(V + j[None, :] * N + i[:, None], mask=inside, other=0.0)
            place = transform + rank[:, None] * b + j[None, :]
            tl.store(place, (vectors * inverse * length).to(tl.float32), mask=inside)
            col += TILE
        row += TILE
    tl.debug_barrier()


@jit()
def _transform(
    transform: tl.tensor,
    block: tl.tensor,
    result: tl.tensor,
    lead: tl.tensor,
    dependent: tl.tensor,
    gaussian: tl.tensor,
    above: tl.tensor,
    turn: tl.tensor,
    b: tl.tensor,
    cols: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """result = transform block; in the first turn fresh random directions in the place of dependent ones."""
    thin = tl.arange(0, THIN)
    x = tl.arange(0, CHUNK)
    first = tl.full((), 0, tl.int32)
    while first < b:
        i = first + thin[:, None]
        col = tl.full((), 0, tl.int32)
        while col < cols:
            in_cols = x[None, :] < cols - col
            total = tl.zeros((THIN, CHUNK), tl.float32)
            second = tl.full((), 0, tl.int32)
            while second < b:
                j = second + thin
                t = tl.load(transform + i * b + j[None, :], mask=(i < b) & (j[None, :] < b), other=0.0)
                rows = tl.load(block + col + j[:, None] * lead + x[None, :], mask=(j[:, None] < b) & in_cols, other=0.0)
                total += tl.dot(t, rows, input_precision="tf32x3")
                second += THIN
            # `gaussian [cols]`, shifted by another distance for each row of Q. A shift is less than cols.
            place = col + x[None, :] - (above + i + 1)
            place = tl.where(place < 0, place + cols, place)
            fresh = (tl.load(dependent + i, mask=i < b, other=0.0) != 0.0) & (turn == 0)
            random = tl.load(gaussian + place, mask=fresh & in_cols & (i < b), other=0.0)
            total = tl.where(fresh, random, total)
            tl.store(result + col + i * lead + x[None, :], total, mask=(i < b) & in_cols)
            col += CHUNK
        first += THIN
    tl.debug_barrier()


@jit()
def _orthonormalize(
    row: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    source: tl.tensor,
    source_lead: tl.tensor,
    above: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """Rows [above, above + b) of Q from the rows at `source`, orthonormal and orthogonal to those above them.

    Projection and Gram-eigen orthonormalization (SVQB, fp64 Gram matrix), twice; after the first round fresh random
    directions replace dependent ones, as `torch_svd._orthonormalize` explains. Rows are brought to length one within
    the transformation, not by a pass of their own. FIRST: there are none above, told as a constant because Triton 3.6
    fails to compile a loop that the compiler finds to be empty.
    """
    b = tl.load(row + B).to(tl.int32)
    cols = tl.load(row + COLS).to(tl.int32)
    lead = tl.multiple_of(tl.load(row + COLS_LEAD), 16)
    q = work32 + tl.multiple_of(tl.load(row + Q), 16)
    # The partial sums are spent by now.
    scratch = work32 + tl.multiple_of(tl.load(row + PARTIAL), 16)
    small = work32 + tl.load(row + TRANSFORM)
    gram = work64 + tl.load(row + V)
    scaled = work64 + tl.load(row + H)
    before = work64 + tl.load(row + VECTORS)
    dependent = before + b
    gaussian = work32 + tl.load(row + START) + (b - 1) * cols
    N = tl.full((), 1, tl.int32)
    while N < b:
        N *= 2
    vectors = gram + N * N
    result = q + above * lead
    turn = tl.full((), 0, tl.int32)
    while turn < 2:
        _coefficients(source, source_lead, q, lead, small, before, b, above, cols, CHUNK // 2, FIRST)
        _subtract(source, source_lead, q, lead, small, scratch, b, above, cols, CHUNK, FIRST)
        _gram(scratch, lead, gram, b, cols, CHUNK // 4)
        _normalize_gram(gram, before, scaled, b, N, TILE)
        place = eigenvectors(scaled, vectors, N, TILE)
        _whitening(scaled + place, vectors + place, gram, before, small, dependent, b, N, TILE)
        _transform(small, scratch, result, lead, dependent, gaussian, above, turn, b, cols, CHUNK)
        source = result
        source_lead = lead
        turn += 1


@jit()
def begin(
    table: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Scale and finiteness of each matrix, and Q_0: the orthonormalized start, or the identity."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    state = work64 + tl.load(row + STATE)
    maxima = work64 + tl.load(row + MAXIMA)
    panels = tl.load(row + PANELS).to(tl.int32)
    largest = tl.full((), 0.0, tl.float64)
    panel = tl.full((), 0, tl.int32)
    i = tl.arange(0, CHUNK)
    while panel < panels:
        some = tl.load(maxima + panel + i, mask=panel + i < panels, other=0.0)
        largest = tl.maximum(largest, tl.max(some, 0))
        panel += CHUNK
    bits = largest.to(tl.int32)
    finite = bits < 0x7F800000
    # 2^exponent > largest, kept to exponents of which both 2^e and 2^-e are normal numbers.
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126, -126), 126)
    exponent = tl.where(finite & (bits > 0), exponent, 0)
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(state + SCALE, scale.to(tl.float64))
    tl.store(state + FINITE, tl.where(finite, 1.0, 0.0).to(tl.float64))
    tl.store(state + EXPONENT, exponent.to(tl.float64))
    tl.store(state + BAD, tl.where(finite, 0.0, 1.0).to(tl.float64))
    cols = tl.load(row + COLS).to(tl.int32)
    if tl.load(row + DENSE) != 0:
        lead = tl.load(row + COLS_LEAD)
        q = work32 + tl.load(row + Q)
        j = tl.arange(0, CHUNK)
        at = tl.full((), 0, tl.int32)
        while at < cols:
            col = tl.full((), 0, tl.int32)
            while col < cols:
                value = tl.where(col + j == at, 1.0, 0.0)
                tl.store(q + at * lead + col + j, value, mask=col + j < cols)
                col += CHUNK
            at += 1
    else:
        _orthonormalize(
            row,
            work32,
            work64,
            work32 + tl.load(row + START),
            tl.load(row + COLS),
            tl.full((), 0, tl.int32),
            CHUNK,
            TILE,
            True,
        )


@jit(do_not_specialize=["step"])
def orthonormalize(
    table: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    step: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Q_(step + 1) from Z_step."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    if step + 1 < tl.load(row + READS):
        lead = tl.load(row + COLS_LEAD)
        above = (step + 1) * tl.load(row + B).to(tl.int32)
        z = work32 + tl.load(row + Z) + step * tl.load(row + B) * lead
        _orthonormalize(row, work32, work64, z, lead, above, CHUNK, TILE, False)
