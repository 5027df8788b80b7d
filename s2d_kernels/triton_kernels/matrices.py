"""The passes over the matrices of `topk_svd`: the largest element, and the fused product Y = Q A^T, Z = Y A.

What the kernels of `topk_svd` know of a matrix is a row of an int64 table, `Matrix`. It holds the address of the matrix
and for everything else offsets into workspaces, so that its content is the same from one refresh to the next.
"""

from __future__ import annotations

from typing import NamedTuple

from s2d_kernels.triton_kernels.common import constant, find_row, jit, tl, widen


class Matrix(NamedTuple):
    """One row of the table. A `[rows, cols]` is W or W^T, rows >= cols; the kernels read the fields by position.

    Attributes:
        weight, row_stride, col_stride: address of A and its strides in elements.
        path: `ALIGNED_COLS`, `ALIGNED_ROWS` or `GENERAL`.
        b: rows of the start. block: rows of a Krylov block, which is b, or cols where the matrix is dense.
        all: rows of all blocks together. padded: the next power of two, the order of the eigenproblem.
        panels: of `PANEL` rows of A.
        rows_lead, cols_lead: distance of the rows of Y, and of those of Q, Z and the partial sums.
        product_first, ...: first program of the matrix in the launch of that name.
        start, Q, ...: offsets in the fp32 workspace; `values` holds S `[b]`, residual `[b]` and missed.
        left_row, left_col, right_row, right_col: strides of the results in it.
        state, maxima, H, V, theta, vectors: offsets in the fp64 workspace.
    """

    weight: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int
    path: int
    b: int
    block: int
    all: int
    padded: int
    reads: int
    k: int
    dense: int
    panels: int
    rows_lead: int
    cols_lead: int
    product_first: int
    largest_first: int
    reduce_first: int
    gram_first: int
    rotate_first: int
    start: int
    Q: int
    Y: int
    Z: int
    partial: int
    transform: int
    left: int
    right: int
    values: int
    left_row: int
    left_col: int
    right_row: int
    right_col: int
    state: int
    maxima: int
    H: int
    V: int
    theta: int
    vectors: int


# The positions of the fields, by their names: kernels may use global names only of this type.
WEIGHT, ROWS, COLS, ROW_STRIDE, COL_STRIDE, PATH = (constant(i) for i in range(6))
B, BLOCK, ALL, PADDED, READS, K, DENSE, PANELS, ROWS_LEAD, COLS_LEAD = (constant(i) for i in range(6, 16))
PRODUCT_FIRST, LARGEST_FIRST, REDUCE_FIRST, GRAM_FIRST, ROTATE_FIRST = (constant(i) for i in range(16, 21))
START, Q, Y, Z, PARTIAL, TRANSFORM, LEFT, RIGHT, VALUES = (constant(i) for i in range(21, 30))
LEFT_ROW, LEFT_COL, RIGHT_ROW, RIGHT_COL = (constant(i) for i in range(30, 34))
STATE, MAXIMA, H, V, THETA, VECTORS = (constant(i) for i in range(34, 40))
FIELDS = constant(len(Matrix._fields))

# Values of `path`: the dimension of A that is contiguous and aligned to the widest load.
ALIGNED_COLS, ALIGNED_ROWS, GENERAL = (constant(value) for value in range(3))

# A matrix' state: 2^-exponent, whether it is finite, the exponent, whether the results are zeros.
SCALE, FINITE, EXPONENT, BAD = (constant(position) for position in range(4))
STATE_SIZE = 4

# Rows of Q that a program multiplies: the narrowest tile of the matrix instructions.
THIN = constant(16)
PARTIALS_IN_FLIGHT = constant(8)


@jit()
def find(table: tl.tensor, matrices: tl.tensor, first: tl.constexpr, program: tl.tensor) -> tl.tensor:
    """Table row of the matrix that `program` belongs to: the last one whose field `first` is not above it."""
    return find_row(table, matrices, FIELDS, first, program)


@jit()
def _panel_maximum(
    row: tl.tensor,
    work64: tl.tensor,
    local: tl.tensor,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WAY: tl.constexpr,
) -> None:
    matrix = tl.load(row + WEIGHT).to(tl.pointer_type(ELEMENT))
    rows = tl.load(row + ROWS)
    cols = tl.load(row + COLS).to(tl.int32)
    row_stride = tl.load(row + ROW_STRIDE)
    col_stride = tl.load(row + COL_STRIDE)
    if WAY == ALIGNED_COLS:
        matrix = tl.multiple_of(matrix, 16)
        row_stride = tl.multiple_of(row_stride, VECTOR)
        cols = tl.multiple_of(cols, VECTOR)
        col_stride = 1
    if WAY == ALIGNED_ROWS:
        matrix = tl.multiple_of(matrix, 16)
        col_stride = tl.multiple_of(col_stride, VECTOR)
        rows = tl.multiple_of(rows, VECTOR)
        row_stride = 1
    panel = matrix + local * PANEL * row_stride
    i = tl.arange(0, PANEL)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    rows_left = tl.minimum(rows - local * PANEL, PANEL).to(tl.int32)
    largest = tl.zeros((PANEL, CHUNK), tl.int32)
    col = tl.full((), 0, tl.int32)
    while col < cols:
        tile = panel + col.to(tl.int64) * col_stride + (i * row_stride + j * col_stride)
        elements = tl.load(tile, mask=(i < rows_left) & (j < cols - col), other=0.0)
        # On the bits without the sign: the largest number of floats drops NaN.
        bits = widen(elements, tl.float32, INTERPRETED).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, bits)
        col += CHUNK
    # An int32 is exact in fp64.
    tl.store(work64 + tl.load(row + MAXIMA) + local, tl.max(tl.max(largest, 1), 0).to(tl.float64))


# Not specialized, here and below: one matrix or a multiple of 16 would be a compilation of its own.
@jit(do_not_specialize=["matrices"])
def largest(
    table: tl.tensor,
    matrices: tl.tensor,
    work64: tl.tensor,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """The bits of the largest |element| of each panel of PANEL rows."""
    program = tl.program_id(0).to(tl.int64)
    row = find(table, matrices, LARGEST_FIRST, program)
    local = program - tl.load(row + LARGEST_FIRST)
    path = tl.load(row + PATH)
    if path == ALIGNED_COLS:
        _panel_maximum(row, work64, local, ELEMENT, VECTOR, PANEL, CHUNK, INTERPRETED, ALIGNED_COLS)
    elif path == ALIGNED_ROWS:
        _panel_maximum(row, work64, local, ELEMENT, VECTOR, PANEL, CHUNK, INTERPRETED, ALIGNED_ROWS)
    else:
        _panel_maximum(row, work64, local, ELEMENT, VECTOR, PANEL, CHUNK // 2, INTERPRETED, GENERAL)


@jit()
def _scaled_dot(a: tl.tensor, thin: tl.tensor, scale: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """(scale a) thin with fp32's accuracy on tensor cores, `thin` in fp32."""
    if a.dtype == tl.bfloat16:
        # `a` is exact as it is; three bf16 hold the 24 bits of the thin operand.
        thin = thin * scale
        high = thin.to(tl.bfloat16)
        rest = thin - widen(high, tl.float32, INTERPRETED)
        middle = rest.to(tl.bfloat16)
        low = (rest - widen(middle, tl.float32, INTERPRETED)).to(tl.bfloat16)
        if INTERPRETED:
            wide = widen(a, tl.float32, INTERPRETED)
            product = tl.dot(wide, widen(low, tl.float32, INTERPRETED))
            product = tl.dot(wide, widen(middle, tl.float32, INTERPRETED), product)
            product = tl.dot(wide, widen(high, tl.float32, INTERPRETED), product)
        else:
            product = tl.dot(a, low)
            product = tl.dot(a, middle, product)
            product = tl.dot(a, high, product)
    else:
        # Scaled before it is split in two tf32: the lower part of a tiny number would be a subnormal one.
        product = tl.dot(a.to(tl.float32) * scale, thin, input_precision="tf32x3")
    return product


@jit()
def _accumulate_y(
    y: tl.tensor,
    col: tl.tensor,
    panel: tl.tensor,
    q: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    rows_left: tl.tensor,
    cols: tl.tensor,
    thin_left: tl.tensor,
    lead: tl.tensor,
    scale: tl.tensor,
    one: tl.tensor,
    PANEL: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """y `[PANEL, THIN]` += A[:, col : col + CHUNK] Q[:, col : col + CHUNK]^T."""
    i = tl.arange(0, PANEL)[:, None]
    j = tl.arange(0, CHUNK)
    thin = tl.arange(0, THIN)[None, :]
    tile = panel + col.to(tl.int64) * col_stride + (i * row_stride + j[None, :] * col_stride)
    a = tl.load(tile, mask=(i < rows_left) & (j[None, :] < cols - col), other=0.0)
    inside = (j[:, None] < cols - col) & (thin < thin_left)
    b = tl.load(q + col + (thin * lead + j[:, None]), mask=inside, other=0.0)
    # Tensor cores truncate when they add: sums longer than a tile are left to fp32's rounding addition, which the
    # compiler would put back into the matrix instruction if it knew that the factor is 1.
    return tl.fma(_scaled_dot(a, b, scale, INTERPRETED), one, y)


@jit()
def _accumulate_z(
    z: tl.tensor,
    tile_index: tl.tensor,
    panel: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    rows_left: tl.tensor,
    cols: tl.tensor,
    thin_left: tl.tensor,
    rows_lead: tl.tensor,
    cols_lead: tl.tensor,
    scale: tl.tensor,
    one: tl.tensor,
    finite: tl.tensor,
    PANEL: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """z `[PANEL, THIN]` += A[rows, cols]^T Y[:, rows]^T for CHUNK rows; stored after the last rows of the panel."""
    STEPS: tl.constexpr = PANEL // CHUNK
    col = tile_index // STEPS * PANEL
    first = tile_index % STEPS * CHUNK
    i = tl.arange(0, CHUNK)
    j = tl.arange(0, PANEL)[:, None]
    thin = tl.arange(0, THIN)[None, :]
    tile = panel + col.to(tl.int64) * col_stride + first.to(tl.int64) * row_stride
    tile += j * col_stride + i[None, :] * row_stride
    a = tl.load(tile, mask=(j < cols - col) & (i[None, :] < rows_left - first), other=0.0)
    inside = (i[:, None] < rows_left - first) & (thin < thin_left)
    b = tl.load(y + first + (thin * rows_lead + i[:, None]), mask=inside, other=0.0)
    z = tl.fma(_scaled_dot(a, b, scale, INTERPRETED), one, tl.where(first == 0, 0.0, z))
    # Up to the lead: the sum over the panels then reads nothing that was not written.
    written = (j < cols_lead - col) & (thin < thin_left) & (first == PANEL - CHUNK)
    tl.store(partial + col + (thin * cols_lead + j), tl.where(finite, z, 0.0), mask=written)
    return z


@jit()
def _panel_product(
    row: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    step: tl.tensor,
    local: tl.tensor,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WAY: tl.constexpr,
) -> None:
    # The fields are loaded here, in each branch of the caller, because an alignment hint belongs to the value that it
    # is given for.
    matrix = tl.load(row + WEIGHT).to(tl.pointer_type(ELEMENT))
    rows = tl.load(row + ROWS)
    cols = tl.load(row + COLS).to(tl.int32)
    row_stride = tl.load(row + ROW_STRIDE)
    col_stride = tl.load(row + COL_STRIDE)
    if WAY == ALIGNED_COLS:
        matrix = tl.multiple_of(matrix, 16)
        row_stride = tl.multiple_of(row_stride, VECTOR)
        cols = tl.multiple_of(cols, VECTOR)
        col_stride = 1
    if WAY == ALIGNED_ROWS:
        matrix = tl.multiple_of(matrix, 16)
        col_stride = tl.multiple_of(col_stride, VECTOR)
        rows = tl.multiple_of(rows, VECTOR)
        row_stride = 1
    block = tl.load(row + BLOCK).to(tl.int32)
    rows_lead = tl.multiple_of(tl.load(row + ROWS_LEAD), 16)
    cols_lead = tl.multiple_of(tl.load(row + COLS_LEAD), 16)
    panels = tl.load(row + PANELS)
    state = work64 + tl.load(row + STATE)
    scale = tl.load(state + SCALE).to(tl.float32)
    one = tl.load(state + FINITE).to(tl.float32)
    finite = one != 0.0

    first_row = local % panels * PANEL
    first_thin = (local // panels).to(tl.int32) * THIN
    thin_left = tl.minimum(block - first_thin, THIN)
    rows_left = tl.minimum(rows - first_row, PANEL).to(tl.int32)
    panel = matrix + first_row * row_stride
    above = step * block + first_thin
    q = work32 + tl.multiple_of(tl.load(row + Q), 16) + above * cols_lead
    y = work32 + tl.multiple_of(tl.load(row + Y), 16) + above * rows_lead + first_row
    partial = work32 + tl.multiple_of(tl.load(row + PARTIAL), 16)
    partial += (local % panels * block + first_thin) * cols_lead

    total = tl.zeros((PANEL, THIN), tl.float32)
    if INTERPRETED:
        # Not a range: in Triton 3.6's interpreter one with a bound that was loaded fails with NumPy 2.4.
        col = tl.full((), 0, tl.int32)
        while col < cols:
            total = _accumulate_y(
                *(total, col, panel, q, row_stride, col_stride, rows_left, cols, thin_left, cols_lead, scale, one),
                *(PANEL, CHUNK, INTERPRETED),
            )
            col += CHUNK
    else:
        for col in tl.range(0, cols, CHUNK, num_stages=STAGES):
            total = _accumulate_y(
                *(total, col, panel, q, row_stride, col_stride, rows_left, cols, thin_left, cols_lead, scale, one),
                *(PANEL, CHUNK, INTERPRETED),
            )
    total = tl.where(finite, total, 0.0)
    i = tl.arange(0, PANEL)[:, None]
    thin = tl.arange(0, THIN)[None, :]
    tl.store(y + (thin * rows_lead + i), total, mask=(i < rows_left) & (thin < thin_left))
    # Read back below by other threads of the program.
    tl.debug_barrier()

    total = tl.zeros((PANEL, THIN), tl.float32)
    tiles = tl.cdiv(cols, PANEL) * (PANEL // CHUNK)
    if INTERPRETED:
        tile = tl.full((), 0, tl.int32)
        while tile < tiles:
            total = _accumulate_z(
                *(total, tile, panel, y, partial, row_stride, col_stride, rows_left, cols, thin_left),
                *(rows_lead, cols_lead, scale, one, finite, PANEL, CHUNK, INTERPRETED),
            )
            tile += 1
    else:
        for tile in tl.range(0, tiles, num_stages=STAGES):
            total = _accumulate_z(
                *(total, tile, panel, y, partial, row_stride, col_stride, rows_left, cols, thin_left),
                *(rows_lead, cols_lead, scale, one, finite, PANEL, CHUNK, INTERPRETED),
            )


@jit(do_not_specialize=["matrices", "step"])
def product(
    table: tl.tensor,
    matrices: tl.tensor,
    work32: tl.tensor,
    work64: tl.tensor,
    step: tl.tensor,
    ELEMENT: tl.constexpr,
    VECTOR: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Y_step of PANEL rows of A and THIN rows of Q, and their share of Z_step.

    The panel is read twice; the second time it comes from a cache.
    """
    program = tl.program_id(0).to(tl.int64)
    row = find(table, matrices, PRODUCT_FIRST, program)
    local = program - tl.load(row + PRODUCT_FIRST)
    if step < tl.load(row + READS):
        path = tl.load(row + PATH)
        if path == ALIGNED_COLS:
            _panel_product(
                *(row, work32, work64, step, local, ELEMENT, VECTOR, PANEL, CHUNK, STAGES, INTERPRETED, ALIGNED_COLS)
            )
        elif path == ALIGNED_ROWS:
            _panel_product(
                *(row, work32, work64, step, local, ELEMENT, VECTOR, PANEL, CHUNK, STAGES, INTERPRETED, ALIGNED_ROWS)
            )
        else:
            _panel_product(*(row, work32, work64, step, local, ELEMENT, VECTOR, PANEL, CHUNK, 1, INTERPRETED, GENERAL))


@jit(do_not_specialize=["matrices", "step"])
def reduce(table: tl.tensor, matrices: tl.tensor, work32: tl.tensor, step: tl.tensor, SUMMED: tl.constexpr) -> None:
    """Z_step: the panels' shares, summed in their order."""
    program = tl.program_id(0).to(tl.int64)
    row = find(table, matrices, REDUCE_FIRST, program)
    local = program - tl.load(row + REDUCE_FIRST)
    if step < tl.load(row + READS):
        block = tl.load(row + BLOCK)
        lead = tl.multiple_of(tl.load(row + COLS_LEAD), 16)
        panels = tl.load(row + PANELS).to(tl.int32)
        size = block * lead
        element = local * SUMMED + tl.arange(0, SUMMED)
        inside = element < size
        partial = work32 + tl.multiple_of(tl.load(row + PARTIAL), 16) + element
        total = tl.zeros((SUMMED,), tl.float32)
        panel = tl.full((), 0, tl.int32)
        while panel < panels:
            for later in tl.static_range(PARTIALS_IN_FLIGHT):
                at = panel + later
                total += tl.load(partial + at * size, mask=inside & (at < panels), other=0.0)
            panel += PARTIALS_IN_FLIGHT
        tl.store(work32 + tl.multiple_of(tl.load(row + Z), 16) + step * size + element, total, mask=inside)
