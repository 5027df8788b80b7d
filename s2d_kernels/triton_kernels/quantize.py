"""The op `quantize` in Triton: codes, scale, zero point, row sums and mask in one pass over a row."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.quantizers import check_packable, code_shift
from s2d_kernels.triton_kernels.common import (
    Variant,
    check_device,
    constant,
    interpreted,
    jit,
    tl,
    triton,
    widen,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_SIZES = (8, 16, 32, 64, 128, 256)
# A row of up to so many elements is held in registers; a longer one is read twice.
LONGEST = 16384
# Elements of a tile at least, so that short rows share a program; and of a thread.
SMALLEST_TILE, PER_THREAD = 2048, 32
# Programs that look for the range of a whole tensor; each program of the next launch reads what they found.
PARTIALS = 1024

# No multiplication and addition become one with a single rounding.
OPTIONS = {"enable_fp_fusion": False}
LAUNCH: dict[str, Any] = {"num_stages": 1, **OPTIONS}

SMALLEST_SCALE = constant(reference.SMALLEST_SCALE)
# Adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even; |x| <= 2^20 comes out exact.
ROUNDING = constant(12582912.0)
FAR = constant(1048576.0)
INFINITE_BITS = constant(0x7F800000)


@jit()
def _load(
    x: tl.tensor,
    i: tl.tensor,
    col: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Columns col .. col + COLS of rows `i` in fp32; zeros outside, which no range that holds zero shows."""
    j = col + tl.arange(0, COLS)
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    place = x + i[:, None] * row_stride + j[None, :] * col_stride
    return widen(tl.load(place, mask=inside, other=0.0), tl.float32, INTERPRETED)


@jit()
def _bad(x: tl.tensor) -> tl.tensor:
    """1 where an element is NaN or Inf, else 0."""
    return ((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= INFINITE_BITS).to(tl.int32)


@jit()
def _nearest(x: tl.tensor) -> tl.tensor:
    """`x` rounded to an integer, ties to even; beyond 2^20 that, with its sign."""
    return (tl.minimum(tl.maximum(x, -FAR), FAR) + ROUNDING) - ROUNDING


@jit()
def _parameters(
    low: tl.tensor,
    high: tl.tensor,
    bad: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    SYMMETRIC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Scale to divide by, its zero point as float, and whether they count; low <= 0 <= high."""
    if SYMMETRIC:
        span = tl.maximum(tl.abs(low), tl.abs(high))
        levels = quant_max
    else:
        span = high - low
        levels = quant_max - quant_min
    levels = levels.to(tl.float32) + tl.zeros_like(span)
    scale = tl.div_rn(span, levels)
    scale = tl.where(scale < SMALLEST_SCALE, 1.0, scale)
    good = (bad == 0) & (_bad(scale) == 0)
    scale = tl.where(good, scale, 1.0)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        nearest = _nearest(tl.div_rn(tl.where(good, low, 0.0), scale))
        zero = tl.minimum(
            tl.maximum(quant_min.to(tl.float32) - nearest, quant_min.to(tl.float32)), quant_max.to(tl.float32)
        )
    return scale, zero, good


@jit()
def _given(
    minimum: tl.tensor,
    maximum: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    bad: tl.tensor,
    SYMMETRIC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The given range, which counts as bad where it is not finite."""
    low = tl.load(minimum + place, mask=inside, other=0.0)
    high = tl.load(maximum + place, mask=inside, other=0.0)
    bad = bad | _bad(low) | _bad(high)
    if not SYMMETRIC:
        low = tl.minimum(low, 0.0)
        high = tl.maximum(high, 0.0)
    return low, high, bad


@jit()
def _encode(
    x: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    good: tl.tensor,
    i: tl.tensor,
    col: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    shift: tl.tensor,
    codes: tl.tensor,
    mask: tl.tensor,
    packed: tl.tensor,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Stores the codes and mask bits of a tile; returns the stored codes, 0 outside. Parameters broadcast to `x`.

    With PACK the codes also two a byte, the first in the low half.
    """
    q = _nearest(tl.div_rn(tl.where(good, x, 0.0), scale + tl.zeros_like(x))) + zero
    code = tl.minimum(tl.maximum(q, quant_min.to(tl.float32)), quant_max.to(tl.float32))
    kept = (code == q) & good
    stored = tl.where(good, code, 0.0).to(tl.int32) - shift
    j = col + tl.arange(0, COLS)
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    stored = tl.where(inside, stored, 0)
    tl.store(codes + i[:, None] * cols + j[None, :], stored.to(tl.int8), mask=inside)
    bits = (kept & inside).to(tl.int32).reshape(ROWS, COLS // 8, 8) << tl.arange(0, 8)[None, None, :]
    byte = tl.sum(bits, 2)
    places = tl.arange(0, COLS // 8)
    width = (cols + 7) // 8
    here = (i < rows)[:, None] & (col // 8 + places < width)[None, :]
    tl.store(mask + i[:, None] * width + col // 8 + places[None, :], byte.to(tl.uint8), mask=here)
    if PACK:
        halves = (stored & 15).reshape(ROWS, COLS // 2, 2) << (4 * tl.arange(0, 2))[None, None, :]
        pairs = tl.sum(halves, 2)
        places = col // 2 + tl.arange(0, COLS // 2)
        width = (cols + 1) // 2
        here = (i < rows)[:, None] & (places < width)[None, :]
        tl.store(packed + i[:, None] * width + places[None, :], pairs.to(tl.uint8), mask=here)
    return stored


@jit()
def _store_group_sums(
    stored: tl.tensor,
    row_sum: tl.tensor,
    i: tl.tensor,
    col: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    sums = tl.sum(stored.reshape(ROWS, COLS // GROUP, GROUP), 2)
    g = col // GROUP + tl.arange(0, COLS // GROUP)
    count = cols // GROUP
    tl.store(row_sum + i[:, None] * count + g[None, :], sums, mask=(i < rows)[:, None] & (g < count)[None, :])


@jit(do_not_specialize=["quant_min", "quant_max", "shift", "range_stride", "parts"])
def _quantize_rows(
    x: tl.tensor,
    minimum: tl.tensor,
    maximum: tl.tensor,
    partials: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    row_sum: tl.tensor,
    mask: tl.tensor,
    packed: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    range_stride: tl.tensor,
    parts: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    shift: tl.tensor,
    SYMMETRIC: tl.constexpr,
    GIVEN: tl.constexpr,
    PACK: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONCE: tl.constexpr,
    PARTIALS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """One scale a row, or one for all; GROUP columns share an element of `row_sum` (0: the row)."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.full((), 0, tl.int64)
    tile = _load(x, i, start, rows, cols, row_stride, col_stride, COLS, INTERPRETED)
    if PER_TENSOR:
        p = tl.arange(0, PARTIALS)
        low = tl.min(tl.load(partials + p, mask=p < parts, other=0.0), 0) + tl.zeros((ROWS,), tl.float32)
        high = tl.max(tl.load(partials + PARTIALS + p, mask=p < parts, other=0.0), 0) + tl.zeros((ROWS,), tl.float32)
        found = tl.max((tl.load(partials + 2 * PARTIALS + p, mask=p < parts, other=0.0) != 0.0).to(tl.int32), 0)
        bad = found + tl.zeros((ROWS,), tl.int32)
    else:
        low = tl.minimum(tl.min(tile, 1), 0.0)
        high = tl.maximum(tl.max(tile, 1), 0.0)
        bad = tl.max(_bad(tile), 1)
        if not ONCE:
            col = start + COLS
            while col < cols:
                more = _load(x, i, col, rows, cols, row_stride, col_stride, COLS, INTERPRETED)
                low = tl.minimum(low, tl.min(more, 1))
                high = tl.maximum(high, tl.max(more, 1))
                bad = bad | tl.max(_bad(more), 1)
                col += COLS
    if GIVEN:
        # one range there is also for no rows
        low, high, bad = _given(minimum, maximum, i * range_stride, i < tl.maximum(rows, 1), bad, SYMMETRIC)
    divisor, zero, good = _parameters(low, high, bad, quant_min, quant_max, SYMMETRIC)
    stored_scale = tl.where(good, divisor, float("nan"))
    stored_zero = tl.where(good, zero, 0.0).to(tl.int32) - shift
    owned = i < rows
    if PER_TENSOR:
        owned = i == 0
    tl.store(scale + i, stored_scale, mask=owned)
    tl.store(zero_point + i, stored_zero, mask=owned)

    divisor, zero, good = divisor[:, None], zero[:, None], good[:, None]
    total = tl.zeros((ROWS,), tl.int32)
    stored = _encode(
        tile, divisor, zero, good, i, start, rows, cols, quant_min, quant_max, shift,
        codes, mask, packed, PACK, ROWS, COLS,
    )  # fmt: skip
    if GROUP > 0:
        _store_group_sums(stored, row_sum, i, start, rows, cols, GROUP, ROWS, COLS)
    else:
        total += tl.sum(stored, 1)
    if not ONCE:
        col = start + COLS
        while col < cols:
            more = _load(x, i, col, rows, cols, row_stride, col_stride, COLS, INTERPRETED)
            stored = _encode(
                more, divisor, zero, good, i, col, rows, cols, quant_min, quant_max, shift,
                codes, mask, packed, PACK, ROWS, COLS,
            )  # fmt: skip
            if GROUP > 0:
                _store_group_sums(stored, row_sum, i, col, rows, cols, GROUP, ROWS, COLS)
            else:
                total += tl.sum(stored, 1)
            col += COLS
    if GROUP == 0:
        tl.store(row_sum + i, total, mask=i < rows)


@jit(do_not_specialize=["quant_min", "quant_max", "shift", "range_stride"])
def _quantize_groups(
    x: tl.tensor,
    minimum: tl.tensor,
    maximum: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    row_sum: tl.tensor,
    mask: tl.tensor,
    packed: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    range_stride: tl.tensor,
    across: tl.tensor,
    quant_min: tl.tensor,
    quant_max: tl.tensor,
    shift: tl.tensor,
    SYMMETRIC: tl.constexpr,
    GIVEN: tl.constexpr,
    PACK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """One scale for GROUP columns of a row, tile by tile of [ROWS, COLS]; `across` of them make a row."""
    program = tl.program_id(0).to(tl.int64)
    i = program // across * ROWS + tl.arange(0, ROWS)
    col = program % across * COLS
    tile = _load(x, i, col, rows, cols, row_stride, col_stride, COLS, INTERPRETED)
    GROUPS: tl.constexpr = COLS // GROUP
    grouped = tile.reshape(ROWS, GROUPS, GROUP)
    low = tl.minimum(tl.min(grouped, 2), 0.0)
    high = tl.maximum(tl.max(grouped, 2), 0.0)
    bad = tl.max(_bad(grouped), 2)
    g = col // GROUP + tl.arange(0, GROUPS)
    count = cols // GROUP
    inside = (i < rows)[:, None] & (g < count)[None, :]
    if GIVEN:
        place = i[:, None] * range_stride + tl.zeros_like(g)[None, :]
        low, high, bad = _given(minimum, maximum, place, inside, bad, SYMMETRIC)
    divisor, zero, good = _parameters(low, high, bad, quant_min, quant_max, SYMMETRIC)
    place = i[:, None] * count + g[None, :]
    tl.store(scale + place, tl.where(good, divisor, float("nan")), mask=inside)
    tl.store(zero_point + place, tl.where(good, zero, 0.0).to(tl.int32) - shift, mask=inside)
    spread = tl.zeros((ROWS, GROUPS, GROUP), tl.float32)
    divisor = (divisor[:, :, None] + spread).reshape(ROWS, COLS)
    zero = (zero[:, :, None] + spread).reshape(ROWS, COLS)
    good = (good[:, :, None].to(tl.float32) + spread).reshape(ROWS, COLS) != 0.0
    stored = _encode(
        tile, divisor, zero, good, i, col, rows, cols, quant_min, quant_max, shift,
        codes, mask, packed, PACK, ROWS, COLS,
    )  # fmt: skip
    _store_group_sums(stored, row_sum, i, col, rows, cols, GROUP, ROWS, COLS)


@jit()
def _tensor_range(
    x: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    across: tl.tensor,
    tiles: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PARTIALS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """partials[:, program]: minimum, maximum, whether not finite, over every PARTIALS-th tile and zero."""
    program = tl.program_id(0).to(tl.int64)
    low = tl.zeros((ROWS,), tl.float32)
    high = tl.zeros((ROWS,), tl.float32)
    bad = tl.zeros((ROWS,), tl.int32)
    tile = program
    while tile < tiles:
        i = tile // across * ROWS + tl.arange(0, ROWS)
        value = _load(x, i, tile % across * COLS, rows, cols, row_stride, col_stride, COLS, INTERPRETED)
        low = tl.minimum(low, tl.min(value, 1))
        high = tl.maximum(high, tl.max(value, 1))
        bad = bad | tl.max(_bad(value), 1)
        tile += PARTIALS
    tl.store(partials + program, tl.min(low, 0))
    tl.store(partials + PARTIALS + program, tl.max(high, 0))
    tl.store(partials + 2 * PARTIALS + program, tl.max(bad, 0).to(tl.float32))


def _tile(cols: int, group_size: int = 0) -> tuple[int, int, int]:
    """Rows and columns of a tile for rows of `cols` elements, and its warps."""
    across = max(min(triton.next_power_of_2(max(cols, 1)), LONGEST), group_size, 8)
    rows = max(SMALLEST_TILE // across, 1)
    return rows, across, min(max(rows * across // (32 * PER_THREAD), 2), 16)


def _supports(
    x: Tensor,
    _minimum: Tensor | None,
    _maximum: Tensor | None,
    _bits: int,
    _symmetric: bool,
    _granularity: str,
    group_size: int,
) -> bool:
    return x.dtype in DTYPES and (group_size in (0, *GROUP_SIZES) or x.shape[1] == 0)


def _quantize(
    x: Tensor,
    minimum: Tensor | None,
    maximum: Tensor | None,
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
    *,
    pack: bool,
) -> tuple[Tensor, ...]:
    """One launch that reads `x` once, twice where a row is longer than `LONGEST`; per tensor two launches and reads."""
    check_device(x.device)
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: impl='triton' quantizes fp32, bf16 and fp16, else impl='torch'")
    if not _supports(x, minimum, maximum, bits, symmetric, granularity, group_size):
        raise ValueError(f"group_size={group_size}: impl='triton' takes {GROUP_SIZES}, else impl='torch'")
    rows, K = x.shape
    groups = K // group_size if group_size else 1
    scales = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    codes = x.new_empty((rows, K), dtype=torch.int8)
    scale = x.new_empty(scales, dtype=torch.float32)
    zero_point = x.new_empty(scales, dtype=torch.int32)
    row_sum = x.new_empty((rows, groups), dtype=torch.int32)
    mask = x.new_empty((rows, (K + 7) // 8), dtype=torch.uint8)
    packed = x.new_empty((rows, (K + 1) // 2), dtype=torch.uint8) if pack else mask
    results = (codes, scale, zero_point, row_sum, mask) + ((packed,) if pack else ())
    per_tensor = granularity == "per_tensor"
    if (rows == 0 and not per_tensor) or (K == 0 and granularity == "per_group"):
        return results
    given = minimum is not None and maximum is not None
    if minimum is not None and maximum is not None:
        minimum, maximum = (t.contiguous() for t in torch.broadcast_tensors(minimum, maximum))
    quant_min, quant_max = reference.quant_bounds(bits, symmetric)
    shift = code_shift(bits, symmetric)
    range_stride = int(minimum is not None and minimum.numel() > 1)
    layout = (rows, K, x.stride(0), x.stride(1))
    limits = (quant_min, quant_max, shift)
    # A pointer that nobody reads stands where there is no range and there are no partial ones.
    ends = (minimum, maximum) if given else (scale, scale)
    # A whole row's sum is written also where K = 0 leaves no group that could hold it.
    outputs = codes, scale, zero_point, row_sum if groups else row_sum.new_empty(rows), mask, packed
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        if granularity == "per_group":
            tile_rows, tile_cols, warps = _tile(min(K, SMALLEST_TILE), group_size)
            across = -(-K // tile_cols)
            _quantize_groups[(across * -(-rows // tile_rows),)](
                x, *ends, *outputs, *layout, range_stride, across, *limits, SYMMETRIC=symmetric, GIVEN=given,
                PACK=pack, GROUP=group_size, ROWS=tile_rows, COLS=tile_cols, INTERPRETED=interpreted(), num_warps=warps,
                **LAUNCH,
            )  # fmt: skip
            return results
        tile_rows, tile_cols, warps = _tile(K, group_size)
        partials, parts = scale, 0
        if per_tensor:
            range_rows, range_cols, range_warps = _tile(min(K, SMALLEST_TILE))
            across = -(-K // range_cols)
            tiles = across * -(-rows // range_rows)
            partials, parts = x.new_empty((3, PARTIALS), dtype=torch.float32), min(tiles, PARTIALS)
            if parts:
                _tensor_range[(parts,)](
                    x, partials, *layout, across, tiles, ROWS=range_rows, COLS=range_cols, PARTIALS=PARTIALS,
                    INTERPRETED=interpreted(), num_warps=range_warps, **LAUNCH,
                )  # fmt: skip
        _quantize_rows[(max(-(-rows // tile_rows), 1),)](
            x, *ends, partials, *outputs, *layout, range_stride, parts, *limits, SYMMETRIC=symmetric, GIVEN=given,
            PACK=pack, PER_TENSOR=per_tensor, GROUP=group_size if K else 0, ROWS=tile_rows, COLS=tile_cols,
            ONCE=tile_cols >= K, PARTIALS=PARTIALS, INTERPRETED=interpreted(), num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return results


@ops.implements("quantize", "triton", _supports)
def _quantize_triton(*arguments: Any) -> tuple[Tensor, ...]:
    return _quantize(*arguments, pack=False)


@ops.implements("quantize_packed", "triton", _supports)
def _quantize_packed_triton(*arguments: Any) -> tuple[Tensor, ...]:
    check_packable(arguments[3])
    return _quantize(*arguments, pack=True)


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles: dynamic asymmetric ranges of dense rows, columns next to one another."""
    rows, cols, group = 4096, 4096, 128
    found = []
    for dtype in DTYPES:
        element = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        types = {
            **{"x": f"*{element}", "minimum": "*fp32", "maximum": "*fp32", "partials": "*fp32", "codes": "*i8"},
            **{"scale": "*fp32", "zero_point": "*i32", "row_sum": "*i32", "mask": "*u8", "packed": "*u8"},
            **dict.fromkeys(("rows", "cols", "row_stride", "range_stride", "parts", "across", "tiles"), "i32"),
            **dict.fromkeys(("quant_min", "quant_max", "shift"), "i32"),
        }
        tile_rows, tile_cols, warps = _tile(cols)
        small_rows, small_cols, small_warps = _tile(SMALLEST_TILE, group)
        flags = {"SYMMETRIC": False, "GIVEN": False, "PACK": False}
        tall = {
            "ROWS": tile_rows,
            "COLS": tile_cols,
            "ONCE": True,
            "PARTIALS": PARTIALS,
            "PER_TENSOR": False,
            "GROUP": 0,
        }
        small = {"ROWS": small_rows, "COLS": small_cols}
        read, written = dtype.itemsize * rows * cols, rows * cols + rows * cols // 8
        for kernel, constants, kernel_warps, elements, moved in (
            (_quantize_rows, flags | tall, warps, tile_rows * tile_cols, read + written),
            (_quantize_groups, flags | small | {"GROUP": group}, small_warps, small_rows * small_cols, read + written),
            (_tensor_range, small | {"PARTIALS": PARTIALS}, small_warps, small_rows * small_cols, read),
            (
                _quantize_rows,
                flags | tall | {"PACK": True},
                warps,
                tile_rows * tile_cols,
                read + written + rows * cols // 2,
            ),
        ):
            names = kernel.arg_names
            constants = constants | {"col_stride": 1, "INTERPRETED": False}
            wide = [n for n, kind in types.items() if kind.startswith("*") or n in ("cols", "row_stride")]
            per_thread = elements // (32 * kernel_warps)
            found.append(
                Variant(
                    name=f"{kernel.__name__.lstrip('_')}<{element}{', packed' if constants.get('PACK') else ''}>",
                    kernel=kernel,
                    signature={name: "constexpr" if name in constants else types[name] for name in names},
                    constants=constants,
                    attributes={(names.index(n),): [["tt.divisibility", 16]] for n in wide if n in names},
                    warps=kernel_warps,
                    stages=1,
                    instructions={
                        "LDG.128": per_thread * dtype.itemsize // 16,
                        **({"STG.128": per_thread // 16} if kernel is not _tensor_range else {}),
                    },
                    shape=f"[{rows}, {cols}]" + (f", groups of {group}" if kernel is _quantize_groups else ""),
                    bytes=moved,
                    flops=9 * rows * cols,
                    options=OPTIONS,
                )
            )
    return found
