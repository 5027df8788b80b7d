"""`adamw_` in Triton: one step of AdamW of all tensors, the penalty formed on the fly (formula: csrc/adamw.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.adamw import NUMBERS_PER_GROUP, check_step
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
UNROLL = 2
# Bytes of each of the four tensors that a thread has in flight: in 16 bits they are as many elements in half of it.
THREAD_BYTES = {4: 32, 2: 16}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """One row of the device table, all int64; the kernel reads the fields by their position.

    param, exp_avg and exp_avg_sq `[rows, cols]` share strides; the penalty is left `[rows, rank]`
    diag(coefficients `[rank]`) right `[rank, cols]`. Addresses of 0 stand for what is not given.
    """

    first_tile: int
    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    step: int
    left: int
    right: int
    coefficients: int
    rows: int
    cols: int
    param_row: int
    param_col: int
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
    device_lr: int
    clip_coef: int
    grad_scale: int
    found_inf: int


FIELDS = len(Layer._fields)


@jit()
def _one_minus_power(x: tl.tensor) -> tl.tensor:
    """1 - e^x for x <= 0; the series where the difference would cancel."""
    series = 1.0 + x / 9.0
    series = 1.0 + x / 8.0 * series
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@jit()
def _number(row: tl.tensor, FIELD: tl.constexpr, default: tl.tensor) -> tl.tensor:
    """The fp32 number that a field of the table points to, or the default."""
    address = tl.load(row + FIELD)
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=default)


@jit()
def _update_tile(
    row: tl.tensor,
    tile: tl.tensor,
    lr: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    log_beta1: tl.tensor,
    log_beta2: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    sign: tl.tensor,
    clipped: tl.tensor,
    PARAM: tl.constexpr,
    DECOUPLED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One tile of the layer whose table row is given; fields are loaded in each branch of the caller for the hints."""
    local = (tile - tl.load(row)).to(tl.int32)
    param = tl.load(row + 1).to(tl.pointer_type(PARAM))
    grad = tl.load(row + 2).to(tl.pointer_type(PARAM))
    exp_avg = tl.load(row + 3).to(tl.pointer_type(PARAM))
    exp_avg_sq = tl.load(row + 4).to(tl.pointer_type(PARAM))
    count = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)))
    left = tl.load(row + 6).to(tl.pointer_type(tl.float32))
    right = tl.load(row + 7).to(tl.pointer_type(tl.float32))
    coefficients = tl.load(row + 8).to(tl.pointer_type(tl.float32))
    rows = tl.load(row + 9)
    cols = tl.load(row + 10)
    param_row = tl.load(row + 11)
    grad_row = tl.load(row + 13)
    left_row = tl.load(row + 15)
    left_rank = tl.load(row + 16)
    right_rank = tl.load(row + 17)
    coefficient_stride = tl.load(row + 19)
    rank = tl.load(row + 20).to(tl.int32)
    device_rank = tl.load(row + 22)
    given = tl.load(device_rank.to(tl.pointer_type(tl.int32)), mask=device_rank != 0, other=2147483647)
    rank = tl.minimum(rank, given)

    lr = _number(row, 23, lr)
    clip = _number(row, 24, 1.0)
    grad_factor = tl.div_rn(sign * clip, _number(row, 25, 1.0))
    penalty_factor = tl.where(clipped != 0.0, clip, 1.0)
    decay = lr * weight_decay
    step_size = tl.div_rn(lr, _one_minus_power(count * log_beta1))
    inverse_root = tl.div_rn(1.0, tl.sqrt_rn(_one_minus_power(count * log_beta2)))

    across = tl.cdiv(cols, BLOCK_COLS).to(tl.int32)
    # int64 here and in all offsets: a tensor may have more than 2^31 elements.
    first_row = (local // across).to(tl.int64) * BLOCK_ROWS
    first_col = (local % across).to(tl.int64) * BLOCK_COLS
    cols_left = tl.minimum(cols - first_col, BLOCK_COLS).to(tl.int32)
    rows_left = tl.minimum(rows - first_row, BLOCK_ROWS).to(tl.int32)
    if ALIGNED:
        param_col = 1
        grad_col = 1
        right_col = 1
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        right = tl.multiple_of(right, 16)
        param_row = tl.multiple_of(param_row, VECTOR)
        grad_row = tl.multiple_of(grad_row, VECTOR)
        right_rank = tl.multiple_of(right_rank, VECTOR)
        cols_left = tl.multiple_of(cols_left, VECTOR)
    else:
        param_col = tl.load(row + 12)
        grad_col = tl.load(row + 14)
        right_col = tl.load(row + 18)
    start = first_row * param_row + first_col * param_col
    grad += first_row * grad_row + first_col * grad_col
    left += first_row * left_row
    right += first_col * right_col
    j = tl.arange(0, BLOCK_COLS)
    in_cols = j < cols_left
    # Fewer rows at a time on the general path: its addresses must not cost the other path its occupancy.
    STEP: tl.constexpr = BLOCK_ROWS if ALIGNED else BLOCK_ROWS // 4
    for first in range(0, BLOCK_ROWS, STEP):
        i = first + tl.arange(0, STEP)
        in_rows = i < rows_left
        inside = in_rows[:, None] & in_cols[None, :]
        # First, so that the long way to them overlaps the components'. The gradient is read once and evicted first.
        place = start + (i[:, None] * param_row + j[None, :] * param_col)
        g = tl.load(
            grad + (i[:, None] * grad_row + j[None, :] * grad_col),
            mask=inside,
            other=0.0,
            eviction_policy="evict_first",
        )
        p = tl.load(param + place, mask=inside, other=0.0)
        m = tl.load(exp_avg + place, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
        g = widen(g, tl.float32, INTERPRETED)
        p = widen(p, tl.float32, INTERPRETED)
        m = widen(m, tl.float32, INTERPRETED)
        v = widen(v, tl.float32, INTERPRETED)
        zero = tl.minimum(tl.abs(p), 0.0)
        penalty = low_rank_tile(
            zero, left, coefficients, right, i, j, in_rows, in_cols, left_row, left_rank, coefficient_stride,
            right_rank, right_col, rank, UNROLL,
        )  # fmt: skip
        g = g * grad_factor
        if not DECOUPLED:
            penalty = penalty * penalty_factor
        # What is 0 or not finite changes no bit: -0 + 0 would.
        usable = (tl.abs(penalty) < float("inf")) & (penalty != 0.0)
        if not DECOUPLED:
            g = tl.where(usable, g + penalty, g)
        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        p -= decay * p
        p -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * inverse_root + eps)
        if DECOUPLED:
            p = tl.where(usable, p + penalty, p)
        tl.store(param + place, narrow(p, PARAM, INTERPRETED), mask=inside)
        tl.store(exp_avg + place, narrow(m, PARAM, INTERPRETED), mask=inside)
        tl.store(exp_avg_sq + place, narrow(v, PARAM, INTERPRETED), mask=inside)


# Not specialized: one layer or a multiple of 16 would be a compilation of its own.
@jit(do_not_specialize=["layers"])
def _adamw(
    table: tl.tensor,
    layers: tl.tensor,
    lr: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    log_beta1: tl.tensor,
    log_beta2: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    sign: tl.tensor,
    clipped: tl.tensor,
    PARAM: tl.constexpr,
    DECOUPLED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    FIELDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """All layers of one dtype and group: a program updates one tile of the last layer that begins at or before it."""
    tile = tl.program_id(0).to(tl.int64)
    row = find_row(table, layers, FIELDS, 0, tile)
    if _number(row, 26, 0.0) == 0.0:
        if tl.load(row + 21) != 0:
            _update_tile(
                row, tile, lr, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay, sign,
                clipped, PARAM, DECOUPLED, UNROLL, BLOCK_ROWS, BLOCK_COLS, VECTOR, INTERPRETED, True,
            )  # fmt: skip
        else:
            _update_tile(
                row, tile, lr, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay, sign,
                clipped, PARAM, DECOUPLED, UNROLL, BLOCK_ROWS, BLOCK_COLS, VECTOR, INTERPRETED, False,
            )  # fmt: skip


def _parts(layer: Layer, dtype: torch.dtype) -> list[Layer]:
    """A tensor without a penalty that is one block of memory, laid out in rows of a tile's width and what is left."""
    contiguous = layer.param_col == layer.grad_col == 1 and (
        layer.rows == 1 or layer.param_row == layer.grad_row == layer.cols
    )
    if layer.rank or not contiguous or layer.cols == BLOCK_COLS:
        return [layer]
    elements, itemsize = layer.rows * layer.cols, dtype.itemsize
    whole = elements // BLOCK_COLS
    parts = []
    if whole:
        parts.append(layer._replace(rows=whole, cols=BLOCK_COLS, param_row=BLOCK_COLS, grad_row=BLOCK_COLS))
    if elements % BLOCK_COLS:
        offset = whole * BLOCK_COLS * itemsize
        moved = {name: getattr(layer, name) + offset for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
        parts.append(layer._replace(rows=1, cols=elements % BLOCK_COLS, param_row=0, grad_row=0, **moved))
    return parts


def _aligned(layer: Layer, dtype: torch.dtype) -> bool:
    elements = VECTOR_BYTES // dtype.itemsize
    pointers = layer.param, layer.grad, layer.exp_avg, layer.exp_avg_sq, layer.right
    counts = layer.cols, layer.param_row, layer.grad_row, layer.right_rank
    return (
        layer.param_col == layer.grad_col == layer.right_col == 1
        and not any(pointer % VECTOR_BYTES for pointer in pointers)
        and not any(count % elements for count in counts)
    )


def _layer(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, U: Tensor, Vh: Tensor, c: Tensor
) -> Layer:
    """The table row of a tensor, its place in the table and the numbers that all share aside."""
    if param.shape[1] == 1 or (param.shape[0] > 1 and param.stride(0) < param.stride(1)):
        # The transposed equation, so that neighbouring threads have neighbouring addresses.
        param, grad, U, Vh = param.T, grad.T, Vh.T, U.T
    (rows, cols), rank = param.shape, len(c)
    return Layer(
        first_tile=0,
        param=param.data_ptr(),
        grad=grad.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        step=step.data_ptr(),
        left=U.data_ptr() if rank else 0,
        right=Vh.data_ptr() if rank else 0,
        coefficients=c.data_ptr() if rank else 0,
        rows=rows,
        cols=cols,
        # A stride that is never taken may have any value: 0 hides no alignment.
        param_row=param.stride(0) if rows > 1 else 0,
        param_col=param.stride(1) if cols > 1 else 1,
        grad_row=grad.stride(0) if rows > 1 else 0,
        grad_col=grad.stride(1) if cols > 1 else 1,
        left_row=U.stride(0),
        left_rank=U.stride(1),
        right_rank=Vh.stride(0) if rank > 1 else 0,
        right_col=Vh.stride(1) if rank else 1,
        coefficient_stride=c.stride(0),
        rank=rank,
        aligned=0,
        device_rank=0,
        device_lr=0,
        clip_coef=0,
        grad_scale=0,
        found_inf=0,
    )


def _tiles(layer: Layer, dtype: torch.dtype) -> int:
    return -(-layer.rows // _block_rows(dtype)) * -(-layer.cols // BLOCK_COLS)


def _block_rows(dtype: torch.dtype) -> int:
    return THREAD_BYTES[dtype.itemsize] * 32 * WARPS // dtype.itemsize // BLOCK_COLS


def _constants(dtype: torch.dtype, decoupled: bool) -> dict[str, Any]:
    """The compile-time arguments for tensors of `dtype`: one binary each, whatever the shapes and ranks."""
    return {
        "PARAM": getattr(tl, str(dtype).removeprefix("torch.")),
        "DECOUPLED": decoupled,
        "UNROLL": UNROLL,
        "BLOCK_ROWS": _block_rows(dtype),
        "BLOCK_COLS": BLOCK_COLS,
        "VECTOR": VECTOR_BYTES // dtype.itemsize,
        "FIELDS": FIELDS,
        "INTERPRETED": interpreted(),
    }


def _numbers(numbers: Sequence[float], clip_penalty: bool) -> dict[str, float]:
    """The run-time numbers of a group."""
    lr, beta1, beta2, eps, weight_decay, maximize = numbers
    return {
        "lr": lr,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "log_beta1": math.log(beta1) if beta1 else -math.inf,
        "log_beta2": math.log(beta2) if beta2 else -math.inf,
        "eps": eps,
        "weight_decay": weight_decay,
        "sign": -1.0 if maximize else 1.0,
        "clipped": float(clip_penalty),
    }


def _supports(params: list[Tensor], *_: Any) -> bool:
    return all(param.dtype in DTYPES for param in params)


@ops.implements("adamw_", "triton", _supports)
def _adamw_triton(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    groups: list[int],
    numbers: list[float],
    lrs: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decoupled: bool,
    clip_penalty: bool,
) -> None:
    """One launch a dtype and group. No two elements of the lists may share memory."""
    device = params[0].device
    check_device(device)
    scalars = (clip_coef, grad_scale, found_inf)
    check_step(
        params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, ranks, groups, numbers, lrs, scalars, DTYPES
    )
    ranks = None if ranks is None else ranks.contiguous()
    lrs = None if lrs is None else lrs.contiguous()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in scalars]
    shared = dict(zip(("clip_coef", "grad_scale", "found_inf"), addresses, strict=True))
    launches: dict[tuple[torch.dtype, int], list[Layer]] = {}
    # Operands that had to be converted must live until the launch is enqueued.
    kept = []
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, groups, strict=True)
    for index, (param, grad, exp_avg, exp_avg_sq, step, *factors, group) in enumerate(tensors):
        if not param.numel():
            continue
        operands = [tensor.float() for tensor in factors]
        kept.append(operands)
        row = _layer(param, grad, exp_avg, exp_avg_sq, step, *operands)._replace(
            device_rank=0 if ranks is None else ranks.data_ptr() + ranks.element_size() * index,
            device_lr=0 if lrs is None else lrs.data_ptr() + lrs.element_size() * group,
            **shared,
        )
        layers = launches.setdefault((param.dtype, group), [])
        for part in _parts(row, param.dtype):
            first_tile = layers[-1].first_tile + _tiles(layers[-1], param.dtype) if layers else 0
            layers.append(part._replace(first_tile=first_tile, aligned=int(_aligned(part, param.dtype))))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for (dtype, group), layers in launches.items():
            table = TABLES.get(np.array(layers, dtype=np.int64), device)
            tiles = layers[-1].first_tile + _tiles(layers[-1], dtype)
            first = NUMBERS_PER_GROUP * group
            given = _numbers(numbers[first : first + NUMBERS_PER_GROUP], clip_penalty)
            _adamw[(tiles,)](table, len(layers), **given, **_constants(dtype, decoupled), num_warps=WARPS, num_stages=1)


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles."""
    m = n = 4096
    k = 3
    found = []
    for dtype in DTYPES:
        for decoupled in (False, True):
            constants = _constants(dtype, decoupled)
            vectors = THREAD_BYTES[dtype.itemsize] // VECTOR_BYTES
            numbers = _numbers((1e-3, 0.9, 0.999, 1e-8, 1e-2, 0.0), False)
            found.append(
                Variant(
                    name=f"adamw<{constants['PARAM']}{', decoupled' if decoupled else ''}>",
                    kernel=_adamw,
                    signature={
                        "table": "*i64",
                        "layers": "i32",
                        **dict.fromkeys(numbers, "fp32"),
                        **dict.fromkeys(constants, "constexpr"),
                    },
                    constants=constants,
                    attributes={(0,): [["tt.divisibility", 16]]},
                    warps=WARPS,
                    stages=1,
                    # Of the aligned path, in a thread: the gradient (evicted first), p, m and v with the components'
                    # factors, and the three that are written.
                    instructions={
                        "LDG.128.EF": vectors,
                        "LDG.128.!EF": 3 * vectors + UNROLL * 4 // dtype.itemsize,
                        "STG.128": 3 * vectors,
                    },
                    shape=f"[{m}, {n}], k={k}",
                    bytes=7 * dtype.itemsize * m * n + 4 * k * (m + n + 1),
                    flops=(2 * k + 14) * m * n + k * m,
                )
            )
    return found
