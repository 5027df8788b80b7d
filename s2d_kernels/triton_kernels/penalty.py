"""`add_penalty_grad_` in Triton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.penalty import check_layers
from s2d_kernels.triton_kernels.common import (
    TABLES,
    VECTOR_BYTES,
    Variant,
    check_device,
    find_row,
    interpreted,
    jit,
    low_rank_tile,
    narrow,
    tl,
    widen,
)

BLOCK_COLS, WARPS = 128, 8
# Components whose loads are issued together; the last round of an odd rank loads half of them.
UNROLL = 2
# Widest loads that a thread has in flight of the gradient: more cost the registers of a second block's threads.
VECTORS = 2


class Layer(NamedTuple):
    """One row of the device table, all int64; the kernels read the fields by their position.

    grad `[rows, cols]` += left `[rows, rank]` diag(coefficients `[rank]`) right `[rank, cols]`; strides in elements.
    `transposed` tells that rows and columns have changed places.
    """

    first_tile: int
    grad: int
    left: int
    right: int
    coefficients: int
    rows: int
    cols: int
    grad_row: int
    grad_col: int
    left_row: int
    left_rank: int
    right_rank: int
    right_col: int
    coefficient_stride: int
    rank: int
    aligned: int
    device_rank: int
    device_seed: int
    transposed: int


FIELDS = len(Layer._fields)


@jit()
def _mixed(x: tl.tensor) -> tl.tensor:
    """mix of `reference.rounding_bits`, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit()
def _random(row: tl.tensor, i: tl.tensor, j: tl.tensor) -> tl.tensor:
    """`reference.rounding_bits` of rows i and columns j, in the lower halves of uint32, of a layer's table row."""
    seed = tl.load(tl.load(row + 17).to(tl.pointer_type(tl.int64)))
    transposed = tl.load(row + 18) != 0
    key = _mixed(seed.to(tl.uint32) ^ _mixed((seed >> 32).to(tl.uint32) ^ 0x9E3779B9))
    # What each dimension has of the word that is mixed for an element, and of the place of its half.
    of_rows = tl.where(transposed, i >> 1, _mixed(i ^ key))
    of_cols = tl.where(transposed, _mixed(j ^ key), j >> 1)
    half = tl.where(transposed, i & 1, 0)[:, None] + tl.where(transposed, 0, j & 1)[None, :]
    return _mixed(of_rows[:, None] ^ of_cols[None, :]) >> (half * 16)


@jit()
def _stochastic(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """fp32 to bf16 as `reference.stochastically_rounded`, with the 16 lower bits of uint32 `random`."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += tl.where((bits & 0x7FFFFFFF) < 0x7F7F0000, random & 0xFFFF, 0)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit()
def _update_tile(
    row: tl.tensor,
    tile: tl.tensor,
    GRAD: tl.constexpr,
    SUM: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One tile of the layer whose table row is given.

    The fields are loaded here, in each of the two branches of the caller, because an alignment hint belongs to the
    value it is given for: hints on values loaded before the branch would promise the same to both.
    """
    local = (tile - tl.load(row)).to(tl.int32)
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    left = tl.load(row + 2).to(tl.pointer_type(SUM))
    right = tl.load(row + 3).to(tl.pointer_type(SUM))
    coefficients = tl.load(row + 4).to(tl.pointer_type(SUM))
    rows = tl.load(row + 5)
    cols = tl.load(row + 6)
    grad_row = tl.load(row + 7)
    left_row = tl.load(row + 9)
    left_rank = tl.load(row + 10)
    right_rank = tl.load(row + 11)
    coefficient_stride = tl.load(row + 13)
    rank = tl.load(row + 14).to(tl.int32)
    device_rank = tl.load(row + 16)
    given = tl.load(device_rank.to(tl.pointer_type(tl.int32)), mask=device_rank != 0, other=2147483647)
    rank = tl.minimum(rank, given)

    across = tl.cdiv(cols, BLOCK_COLS).to(tl.int32)
    # int64 here and in all offsets: a gradient may have more than 2^31 elements.
    first_row = (local // across).to(tl.int64) * BLOCK_ROWS
    first_col = (local % across).to(tl.int64) * BLOCK_COLS
    cols_left = tl.minimum(cols - first_col, BLOCK_COLS).to(tl.int32)
    rows_left = tl.minimum(rows - first_row, BLOCK_ROWS).to(tl.int32)
    if ALIGNED:
        grad_col = 1
        right_col = 1
        grad = tl.multiple_of(grad, 16)
        right = tl.multiple_of(right, 16)
        grad_row = tl.multiple_of(grad_row, VECTOR)
        right_rank = tl.multiple_of(right_rank, VECTOR)
        cols_left = tl.multiple_of(cols_left, VECTOR)
    else:
        grad_col = tl.load(row + 8)
        right_col = tl.load(row + 12)
    grad += first_row * grad_row + first_col * grad_col
    left += first_row * left_row
    right += first_col * right_col
    j = tl.arange(0, BLOCK_COLS)
    in_cols = j < cols_left
    # Fewer rows at a time on the general path: it has an address for each element, which must not cost the other path
    # its occupancy.
    STEP: tl.constexpr = BLOCK_ROWS if ALIGNED else BLOCK_ROWS // 4
    for first in range(0, BLOCK_ROWS, STEP):
        i = first + tl.arange(0, STEP)
        in_rows = i < rows_left
        inside = in_rows[:, None] & in_cols[None, :]
        # First, so that the long way to the gradient overlaps the components'. Evicted first: each element is read
        # once, the table and the factors are read by every tile.
        place = grad + (i[:, None] * grad_row + j[None, :] * grad_col)
        value = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
        wide = widen(value, SUM, INTERPRETED)
        zero = tl.minimum(tl.abs(wide), 0.0)
        total = low_rank_tile(
            zero, left, coefficients, right, i, j, in_rows, in_cols, left_row, left_rank, coefficient_stride,
            right_rank, right_col, rank, UNROLL,
        )  # fmt: skip
        # In the place of 0 and of what is not finite -0, which changes no bit: -0 + 0 would.
        usable = (tl.abs(total) < float("inf")) & (total != 0.0)
        total = tl.where(usable, total, zero * -1.0)
        if STOCHASTIC:
            random = _random(row, (first_row + i).to(tl.uint32), (first_col + j).to(tl.uint32))
            rounded = _stochastic(wide + total, random)
        else:
            rounded = narrow(wide + total, GRAD, INTERPRETED)
        tl.store(place, rounded, mask=inside)


# Not specialized: one layer or a multiple of 16 would be a compilation of its own.
@jit(do_not_specialize=["layers"])
def _add_low_rank(
    table: tl.tensor,
    layers: tl.tensor,
    GRAD: tl.constexpr,
    SUM: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    FIELDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """All layers of one dtype: program p updates tile p - first_tile of the last layer with first_tile <= p."""
    tile = tl.program_id(0).to(tl.int64)
    row = find_row(table, layers, FIELDS, 0, tile)
    if tl.load(row + 15) != 0:
        _update_tile(row, tile, GRAD, SUM, UNROLL, BLOCK_ROWS, BLOCK_COLS, VECTOR, INTERPRETED, STOCHASTIC, True)
    else:
        _update_tile(row, tile, GRAD, SUM, UNROLL, BLOCK_ROWS, BLOCK_COLS, VECTOR, INTERPRETED, STOCHASTIC, False)


def _layer(first_tile: int, grad: Tensor, U: Tensor, Vh: Tensor, coefficients: Tensor) -> Layer:
    """The table row of a layer; the operands already have the dtype of the sum."""
    transposed = grad.shape[1] == 1 or (grad.shape[0] > 1 and grad.stride(0) < grad.stride(1))
    if transposed:
        # The transposed equation, so that neighbouring threads have neighbouring addresses.
        grad, U, Vh = grad.T, Vh.T, U.T
    rows, cols, rank = *grad.shape, len(coefficients)
    # A stride that is never taken may have any value: 0 hides no alignment.
    grad_row = grad.stride(0) if rows > 1 else 0
    right_rank = Vh.stride(0) if rank > 1 else 0
    pointers = grad.data_ptr(), Vh.data_ptr()
    elements = VECTOR_BYTES // grad.element_size()
    aligned = (
        grad.stride(1) == Vh.stride(1) == 1
        and not any(pointer % VECTOR_BYTES for pointer in pointers)
        and not any(count % elements for count in (cols, grad_row, right_rank))
    )
    return Layer(
        first_tile=first_tile,
        grad=pointers[0],
        left=U.data_ptr(),
        right=pointers[1],
        coefficients=coefficients.data_ptr(),
        rows=rows,
        cols=cols,
        grad_row=grad_row,
        grad_col=grad.stride(1),
        left_row=U.stride(0),
        left_rank=U.stride(1),
        right_rank=right_rank,
        right_col=Vh.stride(1),
        coefficient_stride=coefficients.stride(0),
        rank=rank,
        aligned=int(aligned),
        device_rank=0,
        device_seed=0,
        transposed=int(transposed),
    )


def _tiles(layer: Layer, dtype: torch.dtype) -> int:
    return -(-layer.rows // _block_rows(dtype)) * -(-layer.cols // BLOCK_COLS)


def _block_rows(dtype: torch.dtype) -> int:
    return VECTORS * 32 * WARPS * VECTOR_BYTES // dtype.itemsize // BLOCK_COLS


def _constants(dtype: torch.dtype, *, stochastic: bool = False) -> dict[str, Any]:
    """The compile-time arguments for gradients of `dtype`: one binary each, whatever the shapes and ranks."""
    return {
        "GRAD": getattr(tl, str(dtype).removeprefix("torch.")),
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "UNROLL": UNROLL,
        "BLOCK_ROWS": _block_rows(dtype),
        "BLOCK_COLS": BLOCK_COLS,
        "VECTOR": VECTOR_BYTES // dtype.itemsize,
        "FIELDS": FIELDS,
        "INTERPRETED": interpreted(),
        "STOCHASTIC": stochastic,
    }


@ops.implements("add_penalty_grad_", "triton")
def _add_triton(
    grads: Sequence[Tensor],
    Us: Sequence[Tensor],
    Vhs: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    ranks: Tensor | None,
    *,
    seeds: Tensor | None = None,
) -> None:
    """One launch a dtype.

    Gradients may be strided either way; each is a view of memory of its own (two that begin at the same address are
    updated one after the other, partly overlapping ones are not supported).
    """
    device = grads[0].device
    check_device(device)
    check_layers(grads, Us, Vhs, coefficients, ranks, seeds)
    ranks = None if ranks is None else ranks.contiguous()
    seeds = None if seeds is None else seeds.contiguous()
    earlier: Counter[int] = Counter()
    launches: dict[tuple[torch.dtype, int], list[Layer]] = {}
    # Operands that had to be converted must live until the launch is enqueued.
    kept = []
    for index, (grad, *factors) in enumerate(zip(grads, Us, Vhs, coefficients, strict=True)):
        if not grad.numel() or not len(factors[2]):
            continue
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        operands = [tensor.to(dtype) for tensor in factors]
        kept.append(operands)
        address = grad.data_ptr()
        layers = launches.setdefault((grad.dtype, earlier[address]), [])
        earlier[address] += 1
        first_tile = layers[-1].first_tile + _tiles(layers[-1], grad.dtype) if layers else 0
        rank_address = 0 if ranks is None else ranks.data_ptr() + ranks.element_size() * index
        seed_address = 0 if seeds is None else seeds.data_ptr() + seeds.element_size() * index
        row = _layer(first_tile, grad, *operands)
        layers.append(row._replace(device_rank=rank_address, device_seed=seed_address))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for (dtype, _), layers in launches.items():
            table = TABLES.get(np.array(layers, dtype=np.int64), device)
            tiles = layers[-1].first_tile + _tiles(layers[-1], dtype)
            constants = _constants(dtype, stochastic=seeds is not None and dtype == torch.bfloat16)
            _add_low_rank[(tiles,)](table, len(layers), **constants, num_warps=WARPS, num_stages=1)


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles."""
    m = n = 4096
    k = 3
    found = []
    for dtype, arithmetic in (
        (torch.float32, "FFMA"),
        (torch.bfloat16, "F2FP.BF16"),
        (torch.float16, "F2FP.!BF16"),
        (torch.float64, "DFMA"),
        (torch.bfloat16, "IMAD"),  # the products of the random numbers
    ):
        stochastic = arithmetic == "IMAD"
        constants = _constants(dtype, stochastic=stochastic)
        words, packed = VECTORS * VECTOR_BYTES // 4, arithmetic.startswith("F2FP")
        elements = VECTORS * VECTOR_BYTES // dtype.itemsize
        sum_bytes = max(4, dtype.itemsize)
        factor_bytes = sum_bytes * k * (m + n + 1)
        found.append(
            Variant(
                name=f"add_low_rank<{constants['GRAD']}{', stochastic' if stochastic else ''}>",
                kernel=_add_low_rank,
                signature={"table": "*i64", "layers": "i32", **dict.fromkeys(constants, "constexpr")},
                constants=constants,
                attributes={(0,): [["tt.divisibility", 16]]},
                warps=WARPS,
                stages=1,
                # Of the aligned path, in a thread: the gradient (evicted first), the components' factors, one rounding
                # a word, or one multiply-add an element and component, or two products of a random number an element.
                instructions={
                    "LDG.128.EF": VECTORS,
                    "LDG.128.!EF": UNROLL * sum_bytes // dtype.itemsize,
                    "STG.128": VECTORS,
                    arithmetic: words if packed else UNROLL * elements,
                },
                shape=f"[{m}, {n}], k={k}",
                bytes=2 * dtype.itemsize * m * n + factor_bytes,
                flops=(2 * k + 1) * m * n + k * m,
            )
        )
    return found
