"""Rayleigh-Ritz of `topk_svd`: Gram matrix of Y, its eigenvectors, singular triplets, residuals and statements."""

from __future__ import annotations

import math

from s2d_kernels.svd import CONVERGED, FAILURE_PROBABILITY, NON_FINITE, NOT_CONVERGED, OVERFLOW, TOLERANCE
from s2d_kernels.triton_kernels.blocks import EPSILON
from s2d_kernels.triton_kernels.common import constant, jit, tl
from s2d_kernels.triton_kernels.eigen import eigenvectors
from s2d_kernels.triton_kernels.matrices import (
    ALL,
    BAD,
    COLS,
    COLS_LEAD,
    DENSE,
    EXPONENT,
    FIELDS,
    FINITE,
    GRAM_FIRST,
    LEFT,
    LEFT_COL,
    LEFT_ROW,
    MAXIMA,
    PADDED,
    READS,
    RIGHT,
    RIGHT_COL,
    RIGHT_ROW,
    ROTATE_FIRST,
    ROWS,
    ROWS_LEAD,
    START,
    STATE,
    THETA,
    THIN,
    VALUES,
    VECTORS,
    B,
    H,
    K,
    Q,
    V,
    Y,
    Z,
    find,
)

EPSILON64 = constant(2.0**-52)
LARGEST_FP32 = constant(3.4028234663852886e38)
TAIL = constant(1.0 / (FAILURE_PROBABILITY * math.sqrt(math.pi / 2)))
TOLERATED = constant(TOLERANCE)
IS_CONVERGED, IS_NOT_CONVERGED = constant(CONVERGED), constant(NOT_CONVERGED)
IS_NON_FINITE, IS_OVERFLOW = constant(NON_FINITE), constant(OVERFLOW)


@jit(do_not_specialize=["matrices"])
def gram(
    table: tl.tensor,
    matrices: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """H = Y Y^T in fp64, a tile a program; zeros beside it up to the order of the eigenproblem."""
    program = tl.program_id(0).to(tl.int64)
    row = find(table, matrices, GRAM_FIRST, program)
    local = (program - tl.load(row + GRAM_FIRST)).to(tl.int32)
    N = tl.load(row + PADDED).to(tl.int32)
    across = tl.cdiv(N, THIN)
    first = local // across * THIN
    second = local % across * THIN
    if second <= first:
        rows = tl.load(row + ROWS).to(tl.int32)
        all_rows = tl.load(row + ALL).to(tl.int32)
        lead = tl.multiple_of(tl.load(row + ROWS_LEAD), 16)
        y = work32 + tl.multiple_of(tl.load(row + Y), 16)
        thin = tl.arange(0, THIN)
        x = tl.arange(0, CHUNK)
        i = first + thin[:, None]
        j = second + thin[None, :]
        total = tl.zeros((THIN, THIN), tl.float64)
        col = tl.full((), 0, tl.int32)
        while col < rows:
            in_cols = x < rows - col
            left = tl.load(y + col + i * lead + x[None, :], mask=(i < all_rows) & in_cols[None, :], other=0.0)
            right = tl.load(y + col + j * lead + x[:, None], mask=(j < all_rows) & in_cols[:, None], other=0.0)
            total = tl.dot(left.to(tl.float64), right.to(tl.float64), total, out_dtype=tl.float64)
            col += CHUNK
        h = work64 + tl.load(row + H)
        inside = (i < N) & (j < N)
        tl.store(h + i * N + j, total, mask=inside)
        tl.store(h + j * N + i, total, mask=inside & (second < first))


@jit()
def _sort(
    H: tl.tensor,
    V: tl.tensor,
    theta: tl.tensor,
    rotation: tl.tensor,
    count: tl.tensor,
    N: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """theta `[count]`: descending square roots of H's diagonal; rotation `[count, count]`: V's columns, as rows."""
    first = tl.full((), 0, tl.int32)
    while first < count:
        i = first + tl.arange(0, TILE)
        value = tl.load(H + i * N + i, mask=i < count, other=0.0)
        rank = tl.zeros((TILE,), tl.int32)
        second = tl.full((), 0, tl.int32)
        while second < count:
            j = second + tl.arange(0, TILE)
            other = tl.load(H + j * N + j, mask=j < count, other=0.0)
            equal = (other[None, :] == value[:, None]) & (j[None, :] < i[:, None])
            before = ((other[None, :] > value[:, None]) | equal) & (j[None, :] < count)
            rank += tl.sum(before.to(tl.int32), 1)
            second += TILE
        tl.store(theta + rank, tl.sqrt(tl.maximum(value, 0.0)), mask=i < count)
        col = tl.full((), 0, tl.int32)
        while col < count:
            j = col + tl.arange(0, TILE)
            inside = (i[:, None] < count) & (j[None, :] < count)
            vectors = tl.load(V + j[None, :] * N + i[:, None], mask=inside, other=0.0)
            tl.store(rotation + rank[:, None] * count + j[None, :], vectors, mask=inside)
            col += TILE
        first += TILE
    tl.debug_barrier()


@jit()
def _missed(
    row: tl.tensor,
    work32: tl.tensor,
    theta: tl.tensor,
    rotation: tl.tensor,
    vectors: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The bound on a missed singular value, before the scale; `torch_svd._missed_bound` has the derivation."""
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    count = tl.load(row + ALL).to(tl.int32)
    reads = tl.load(row + READS).to(tl.int32)
    cols = tl.load(row + COLS).to(tl.int32)
    lead = tl.load(row + COLS_LEAD)
    gaussian = work32 + tl.load(row + START) + (b - 1) * cols
    q = work32 + tl.load(row + Q)
    z = work32 + tl.load(row + Z)
    x = tl.arange(0, CHUNK)
    # What the gaussian row has of each row of Q.
    first = tl.full((), 0, tl.int32)
    while first < count:
        i = first + tl.arange(0, THIN)
        total = tl.zeros((THIN,), tl.float64)
        col = tl.full((), 0, tl.int32)
        while col < cols:
            in_cols = x < cols - col
            g = tl.load(gaussian + col + x, mask=in_cols, other=0.0).to(tl.float64)
            inside = (i[:, None] < count) & in_cols[None, :]
            rows = tl.load(q + col + i[:, None] * lead + x[None, :], mask=inside, other=0.0).to(tl.float64)
            total += tl.sum(rows * g[None, :], 1)
            col += CHUNK
        tl.store(vectors + i, total, mask=i < count)
        first += THIN
    tl.debug_barrier()
    # Relative to the first Ritz value that stays, lest a power of a small one underflow.
    top = tl.load(theta + k)
    top = tl.where(top > 0.0, top, 1.0)
    coordinates = vectors + count
    first = tl.full((), 0, tl.int32)
    while first < count:
        i = first + tl.arange(0, TILE)
        total = tl.zeros((TILE,), tl.float64)
        col = tl.full((), 0, tl.int32)
        while col < count:
            j = col + tl.arange(0, TILE)
            inside = (i[:, None] < count) & (j[None, :] < count)
            r = tl.load(rotation + i[:, None] * count + j[None, :], mask=inside, other=0.0)
            total += tl.sum(r * tl.load(vectors + j, mask=j < count, other=0.0)[None, :], 1)
            col += TILE
        # Those above k first: their powers may overflow, and they are dropped.
        kept = (i >= k) & (i < count)
        ratio = tl.load(theta + i, mask=kept, other=0.0) / top
        step = tl.full((), 1, tl.int32)
        while step < reads:
            total *= ratio * ratio
            step += 1
        tl.store(coordinates + i, tl.where(kept, total, 0.0), mask=i < count)
        first += TILE
    tl.debug_barrier()
    # Back to rows of Q.
    first = tl.full((), 0, tl.int32)
    while first < count:
        i = first + tl.arange(0, TILE)
        total = tl.zeros((TILE,), tl.float64)
        col = tl.full((), 0, tl.int32)
        while col < count:
            j = col + tl.arange(0, TILE)
            inside = (i[None, :] < count) & (j[:, None] < count)
            r = tl.load(rotation + j[:, None] * count + i[None, :], mask=inside, other=0.0)
            total += tl.sum(r * tl.load(coordinates + j, mask=j < count, other=0.0)[:, None], 0)
            col += TILE
        tl.store(vectors + i, total, mask=i < count)
        first += TILE
    tl.debug_barrier()
    square = tl.full((), 0.0, tl.float64)
    col = tl.full((), 0, tl.int32)
    while col < cols:
        in_cols = x < cols - col
        total = tl.zeros((CHUNK,), tl.float64)
        first = tl.full((), 0, tl.int32)
        while first < count:
            i = first + tl.arange(0, THIN)
            inside = (i[:, None] < count) & in_cols[None, :]
            rows = tl.load(z + col + i[:, None] * lead + x[None, :], mask=inside, other=0.0).to(tl.float64)
            total += tl.sum(rows * tl.load(vectors + i, mask=i < count, other=0.0)[:, None], 0)
            first += THIN
        square += tl.sum(total * total, 0)
        col += CHUNK
    ratio = tl.sqrt(square) / (top * top) * TAIL
    root = tl.exp(tl.log(tl.where(ratio > 0.0, ratio, 1.0)) / (2 * reads).to(tl.float64)) * top
    return tl.where(ratio > 0.0, root, 0.0)


@jit()
def ritz(
    table: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Eigenvectors of H; from them the Ritz values, S, the rotation, the bound on what was missed."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    N = tl.load(row + PADDED).to(tl.int32)
    count = tl.load(row + ALL).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    h = work64 + tl.load(row + H)
    v = work64 + tl.load(row + V)
    theta = work64 + tl.load(row + THETA)
    state = work64 + tl.load(row + STATE)
    values = work32 + tl.load(row + VALUES)
    place = eigenvectors(h, v, N, TILE)
    rotation = v + 2 * N * N
    _sort(h + place, v + place, theta, rotation, count, N, TILE)

    # A Ritz value below the rounding of the products, or of their fp64 Gram matrix, is noise: it counts as zero.
    noise = tl.maximum(4.0 * EPSILON, tl.sqrt(count.to(tl.float64) * EPSILON64))
    largest = tl.load(theta)
    floor = largest * noise
    exponent = tl.load(state + EXPONENT).to(tl.int32)
    unit = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    finite = tl.load(state + FINITE) != 0.0
    first_value = tl.where(largest > floor, largest, 0.0).to(tl.float32) * unit
    overflow = first_value > LARGEST_FP32
    bad = overflow | (finite == 0)
    tl.store(state + BAD, tl.where(bad, 1.0, 0.0).to(tl.float64))
    first = tl.full((), 0, tl.int32)
    while first < b:
        i = first + tl.arange(0, TILE)
        s = tl.load(theta + i, mask=i < b, other=0.0)
        s = tl.where(s > floor, s, 0.0).to(tl.float32)
        tl.store(values + i, tl.where(bad, 0.0, s * unit), mask=i < b)
        first += TILE

    bound = tl.full((), 0.0, tl.float64)
    if k < count:
        if tl.load(row + DENSE) != 0:
            bound = tl.load(theta + k)
        else:
            bound = _missed(row, work32, theta, rotation, work64 + tl.load(row + VECTORS), CHUNK, TILE)
    tl.store(values + 2 * b, tl.where(bad, 0.0, bound.to(tl.float32) * unit))
    tl.store(theta + count, floor)


@jit()
def _rotated(
    rotation: tl.tensor,
    source: tl.tensor,
    lead: tl.tensor,
    first: tl.tensor,
    col: tl.tensor,
    b: tl.tensor,
    count: tl.tensor,
    cols: tl.tensor,
    XT: tl.constexpr,
) -> tl.tensor:
    """Rows [first, first + THIN) and columns [col, col + XT) of (the first b rows of the rotation) source.

    In fp64, or the rounding of a row would leave eps s_1 of the leading vectors in those behind them.
    """
    thin = tl.arange(0, THIN)
    i = first + thin[:, None]
    in_cols = tl.arange(0, XT)[None, :] < cols - col
    total = tl.zeros((THIN, XT), tl.float64)
    second = tl.full((), 0, tl.int32)
    while second < count:
        j = second + thin
        r = tl.load(rotation + i * count + j[None, :], mask=(i < b) & (j[None, :] < count), other=0.0)
        place = source + col + j[:, None] * lead + tl.arange(0, XT)[None, :]
        rows = tl.load(place, mask=(j[:, None] < count) & in_cols, other=0.0)
        total = tl.dot(r, rows.to(tl.float64), total, out_dtype=tl.float64)
        second += THIN
    return total


@jit(do_not_specialize=["matrices"])
def rotate(
    table: tl.tensor,
    matrices: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    XT: tl.constexpr,
) -> None:
    """A tile of the left or of the right vectors; with the right ones their share of the residuals."""
    program = tl.program_id(0).to(tl.int64)
    row = find(table, matrices, ROTATE_FIRST, program)
    local = (program - tl.load(row + ROTATE_FIRST)).to(tl.int32)
    rows = tl.load(row + ROWS).to(tl.int32)
    cols = tl.load(row + COLS).to(tl.int32)
    b = tl.load(row + B).to(tl.int32)
    count = tl.load(row + ALL).to(tl.int32)
    N = tl.load(row + PADDED)
    rotation = work64 + tl.load(row + V) + 2 * N * N
    theta = work64 + tl.load(row + THETA)
    bad = tl.load(work64 + tl.load(row + STATE) + BAD) != 0.0
    heights = tl.cdiv(b, THIN)
    lefts = tl.cdiv(rows, XT) * heights
    x = tl.arange(0, XT)[None, :]
    is_left = local < lefts
    local = tl.where(is_left, local, local - lefts)
    first = local % heights * THIN
    tile = local // heights
    col = tile * XT
    i = first + tl.arange(0, THIN)
    s = tl.load(theta + i, mask=i < b, other=0.0)
    kept = s > tl.load(theta + count)
    inverse = tl.where(kept, 1.0 / tl.where(kept, s, 1.0), 0.0)[:, None]
    s = tl.where(kept, s, 0.0)[:, None]
    i = i[:, None]
    if is_left:
        lead = tl.multiple_of(tl.load(row + ROWS_LEAD), 16)
        y = work32 + tl.multiple_of(tl.load(row + Y), 16)
        vectors = _rotated(rotation, y, lead, first, col, b, count, rows, XT) * inverse
        place = work32 + tl.load(row + LEFT) + i * tl.load(row + LEFT_ROW) + (col + x) * tl.load(row + LEFT_COL)
        tl.store(place, tl.where(bad, 0.0, vectors).to(tl.float32), mask=(i < b) & (x < rows - col))
    else:
        lead = tl.multiple_of(tl.load(row + COLS_LEAD), 16)
        q = work32 + tl.multiple_of(tl.load(row + Q), 16)
        z = work32 + tl.multiple_of(tl.load(row + Z), 16)
        right = _rotated(rotation, q, lead, first, col, b, count, cols, XT)
        residual = _rotated(rotation, z, lead, first, col, b, count, cols, XT) * inverse - s * right
        residual = tl.where(x < cols - col, residual, 0.0)
        # Over the largest elements, which are spent.
        share = work64 + tl.load(row + MAXIMA) + tile * b + first + tl.arange(0, THIN)
        tl.store(share, tl.sum(residual * residual, 1), mask=first + tl.arange(0, THIN) < b)
        place = work32 + tl.load(row + RIGHT) + i * tl.load(row + RIGHT_ROW) + (col + x) * tl.load(row + RIGHT_COL)
        right = tl.where(s > 0.0, right, 0.0)
        tl.store(place, tl.where(bad, 0.0, right).to(tl.float32), mask=(i < b) & (x < cols - col))


@jit()
def conclude(
    table: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    statuses: tl.tensor,
    XT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Residuals from their shares, and the status."""
    matrix = tl.program_id(0)
    row = table + matrix.to(tl.int64) * FIELDS
    b = tl.load(row + B).to(tl.int32)
    k = tl.load(row + K).to(tl.int32)
    tiles = tl.cdiv(tl.load(row + COLS).to(tl.int32), XT)
    values = work32 + tl.load(row + VALUES)
    theta = work64 + tl.load(row + THETA)
    state = work64 + tl.load(row + STATE)
    shares = work64 + tl.load(row + MAXIMA)
    floor = tl.load(theta + tl.load(row + ALL))
    bad = tl.load(state + BAD) != 0.0
    unit = ((tl.load(state + EXPONENT).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    criterion = tl.full((), 0.0, tl.float64)
    first = tl.full((), 0, tl.int32)
    while first < b:
        i = first + tl.arange(0, TILE)
        square = tl.zeros((TILE,), tl.float64)
        tile = tl.full((), 0, tl.int32)
        while tile < tiles:
            square += tl.load(shares + tile * b + i, mask=i < b, other=0.0)
            tile += 1
        residual = tl.sqrt(square)
        s = tl.load(theta + i, mask=i < b, other=0.0)
        s = tl.where(s > floor, s, 0.0)
        criterion = tl.maximum(criterion, tl.max(tl.where(i < k, s * residual, 0.0), 0))
        tl.store(values + b + i, tl.where(bad, 0.0, residual.to(tl.float32) * unit), mask=i < b)
        first += TILE
    largest = tl.load(theta)
    status = tl.where(criterion <= largest * largest * TOLERATED, IS_CONVERGED, IS_NOT_CONVERGED)
    status = tl.where(bad, IS_OVERFLOW, status)
    status = tl.where(tl.load(state + FINITE) == 0.0, IS_NON_FINITE, status)
    tl.store(statuses + matrix, status.to(tl.int32))
