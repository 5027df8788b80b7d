"""The ops `integer_accumulator` and `integer_linear` in Triton: int8 products on tensor cores, one fp32 epilogue."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.integer_gemm import check_groups
from s2d_kernels.triton_kernels.common import (
    Variant,
    check_device,
    interpreted,
    interpreted_steps,
    jit,
    narrow,
    tl,
    triton,
    widen,
)

# What may be the columns of a group of w: a block of the tensor cores' operands is one group.
GROUP_SIZES = (32, 64, 128, 256)
# Tiles down before the next column of tiles, so that w's rows are still in L2.
BAND = 8
# (acc * x_scale) * w_scale + bias has three roundings.
OPTIONS = {"enable_fp_fusion": False}
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOPPER = 9


@jit(do_not_specialize=["groups"])
def _integer_linear(
    x: tl.tensor,
    w: tl.tensor,
    x_scale: tl.tensor,
    w_scale: tl.tensor,
    x_zero_point: tl.tensor,
    w_zero_point: tl.tensor,
    x_row_sum: tl.tensor,
    w_row_sum: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    accumulator: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    groups: tl.tensor,
    X_PER_TENSOR: tl.constexpr,
    W_PER_TENSOR: tl.constexpr,
    X_SYMMETRIC: tl.constexpr,
    W_SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    WANTS_Y: tl.constexpr,
    WANTS_ACCUMULATOR: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """One tile [BLOCK_M, BLOCK_N]; EVEN: K is a multiple of BLOCK_K. GROUPED: a group of w is BLOCK_K columns.

    Per group the accumulator is x w^T - z_x rowsum(w) - z_w rowsum(x) + size z_x z_w, in int32, in which it is exact.
    """
    program = tl.program_id(0)
    down = tl.cdiv(M, BLOCK_M)
    in_band = BAND * tl.cdiv(N, BLOCK_N)
    first = program // in_band * BAND
    height = tl.minimum(down - first, BAND)
    row = (first + program % in_band % height) * BLOCK_M
    column = program % in_band // height * BLOCK_N
    i = row.to(tl.int64) + tl.arange(0, BLOCK_M)
    j = column.to(tl.int64) + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows = i < M
    in_cols = j < N
    x_place = x + i[:, None] * K + k[None, :]
    w_place = w + j[None, :] * K + k[:, None]
    inside = in_rows[:, None] & in_cols[None, :]

    x_param = i
    if X_PER_TENSOR:
        x_param = i * 0
    sx = tl.zeros((BLOCK_M,), tl.float32)
    if WANTS_Y:
        sx = tl.load(x_scale + x_param, mask=in_rows, other=0.0)
    zx = tl.zeros((BLOCK_M,), tl.int32)
    if not X_SYMMETRIC:
        zx = tl.load(x_zero_point + x_param, mask=in_rows, other=0)

    total = tl.full((BLOCK_M, BLOCK_N), -0.0, tl.float32)  # the sum of no terms, to which the first is added exactly
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in range(0, STEPS if INTERPRETED else tl.cdiv(K, BLOCK_K)):
        if EVEN:
            a = tl.load(x_place, mask=in_rows[:, None], other=0)
            b = tl.load(w_place, mask=in_cols[None, :], other=0)
        else:
            left = K - block * BLOCK_K
            a = tl.load(x_place, mask=in_rows[:, None] & (k < left)[None, :], other=0)
            b = tl.load(w_place, mask=in_cols[None, :] & (k < left)[:, None], other=0)
        x_place += BLOCK_K
        w_place += BLOCK_K
        if GROUPED:
            exact = tl.dot(a, b, out_dtype=tl.int32)
            if not X_SYMMETRIC:
                exact -= zx[:, None] * tl.load(w_row_sum + j * groups + block, mask=in_cols, other=0)[None, :]
            if not W_SYMMETRIC:
                zw = tl.load(w_zero_point + j * groups + block, mask=in_cols, other=0)
                sum_x = tl.load(x_row_sum + i * groups + block, mask=in_rows, other=0) - BLOCK_K * zx
                exact -= sum_x[:, None] * zw[None, :]
            if WANTS_ACCUMULATOR:
                place = accumulator + ((i * 0 + block) * M + i)[:, None] * N + j[None, :]
                tl.store(place, exact, mask=inside)
            if WANTS_Y:
                sw = tl.load(w_scale + j * groups + block, mask=in_cols, other=0.0)
                total += (exact.to(tl.float32) * sx[:, None]) * sw[None, :]
        else:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    if not GROUPED:
        if not X_SYMMETRIC:
            acc -= zx[:, None] * tl.load(w_row_sum + j, mask=in_cols, other=0)[None, :]
        w_param = j
        if W_PER_TENSOR:
            w_param = j * 0
        if not W_SYMMETRIC:
            zw = tl.load(w_zero_point + w_param, mask=in_cols, other=0)
            sum_x = tl.load(x_row_sum + i, mask=in_rows, other=0) - K * zx
            acc -= sum_x[:, None] * zw[None, :]
        if WANTS_ACCUMULATOR:
            tl.store(accumulator + i[:, None] * N + j[None, :], acc, mask=inside)
        if WANTS_Y:
            sw = tl.load(w_scale + w_param, mask=in_cols, other=0.0)
            total = (acc.to(tl.float32) * sx[:, None]) * sw[None, :]
    if WANTS_Y:
        if BIAS:
            total += widen(tl.load(bias + j, mask=in_cols, other=0.0), tl.float32, INTERPRETED)[None, :]
        tl.store(y + i[:, None] * N + j[None, :], narrow(total, OUT, INTERPRETED), mask=inside)


class Tile(NamedTuple):
    """Blocks of a launch, its warps, and the stages of its loads."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_of(M: int, N: int, K: int, group_size: int, hopper: bool) -> Tile:
    """By size alone; all fit the 99 KiB of shared memory of the smallest devices but those for Hopper."""
    if group_size:
        # A second set of accumulators, in fp32.
        if M <= 16:
            return Tile(16, 64, group_size, 4, 3)
        return Tile(64, 128, group_size, 4 if hopper else 8, 3 if group_size <= 128 else 2)
    if M <= 16:
        return Tile(16, 64, 128, 4, 5)
    if M <= 64 or M * N <= 64 * 128**2:
        return Tile(64, 64, 128, 4, 4)
    if hopper and M * N >= 132 * 128 * 256:
        return Tile(128, 256, 128, 8, 3)
    return Tile(128, 128, 128, 8, 3)


def _group_size(K: int, groups: int) -> int:
    return K // groups if groups > 1 else 0


def _supports(*arguments: Any) -> bool:
    x_codes, x_scale, *_ = arguments
    size = _group_size(x_codes.shape[1], arguments[7].shape[1])
    return x_scale.dtype == torch.float32 and size in (0, *GROUP_SIZES)


def integer_product(
    arguments: tuple[Any, ...],
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None,
    with_accumulator: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """y `[M, N]` (None where `out_dtype` is) and the int32 accumulator `[groups, M, N]` (None unless wanted).

    `arguments` are those of the op `integer_accumulator`; one launch.
    """
    x_codes, x_scale, x_zero, x_sum, w_codes, w_scale, w_zero, w_sum, _, x_symmetric, _, w_symmetric = arguments
    (M, K), N, groups = x_codes.shape, w_codes.shape[0], w_sum.shape[1]
    device = x_codes.device
    check_device(device)
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise TypeError(f"operands quantized in {x_scale.dtype}: impl='triton' takes fp32 scales, else impl='torch'")
    check_groups(w_scale, w_sum)
    size = _group_size(K, groups)
    if size not in (0, *GROUP_SIZES):
        raise ValueError(f"group_size={size}: impl='triton' multiplies groups of {GROUP_SIZES}, else impl='torch'")
    computed = torch.float32 if out_dtype is not None and out_dtype not in OUT_DTYPES else out_dtype
    y = None if computed is None else x_codes.new_empty((M, N), dtype=computed)
    accumulator = x_codes.new_empty((groups, M, N), dtype=torch.int32) if with_accumulator else None
    if bias is not None:
        bias = (bias if bias.dtype in OUT_DTYPES else bias.float()).contiguous()
    if groups == 0 and y is not None:
        y.zero_() if bias is None else y.copy_(bias.float().expand(M, N))
    elif M and N:
        # A tensor that nobody reads or writes stands where there is none.
        codes = x_codes.contiguous(), w_codes.contiguous()
        parameters = (t.contiguous() for t in (x_scale, w_scale, x_zero, w_zero, x_sum, w_sum))
        outputs = [t if t is not None else x_scale for t in (bias, y, accumulator)]
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
        tile = tile_of(M, N, K, size, hopper)
        constants = _constants(tile, computed, x_symmetric, w_symmetric) | {
            "X_PER_TENSOR": x_scale.numel() == 1,
            "W_PER_TENSOR": w_scale.numel() == 1,
            "BIAS": bias is not None,
            "WANTS_Y": y is not None,
            "WANTS_ACCUMULATOR": with_accumulator,
            "GROUPED": size > 0,
            "EVEN": K % tile.k == 0,
            **interpreted_steps(K, tile.k),
        }
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            _integer_linear[(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)](
                *codes, *parameters, *outputs, M, N, K, groups,
                **constants, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
    return y if y is None else y.to(out_dtype), accumulator


def _constants(tile: Tile, out_dtype: torch.dtype | None, x_symmetric: bool, w_symmetric: bool) -> dict[str, Any]:
    return {
        "X_SYMMETRIC": x_symmetric,
        "W_SYMMETRIC": w_symmetric,
        "OUT": getattr(tl, str(out_dtype or torch.float32).removeprefix("torch.")),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "BAND": BAND,
        "STEPS": 0,
        "INTERPRETED": interpreted(),
    }


@ops.implements("integer_accumulator", "triton", _supports)
def _accumulator_triton(*arguments: Any) -> Tensor | None:
    return integer_product(arguments, out_dtype=None, with_accumulator=True)[1]


@ops.implements("integer_linear", "triton", _supports)
def _linear_triton(*arguments: Any) -> Tensor | None:
    *operands, bias, x_bits, x_symmetric, w_bits, w_symmetric, out_dtype = arguments
    return integer_product((*operands, x_bits, x_symmetric, w_bits, w_symmetric), bias, out_dtype=out_dtype)[0]


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles: dense 4096^3 with bf16 output, asymmetric x and symmetric w."""
    M = N = K = 4096
    found = []
    for name, rows, size, hopper in (
        ("", M, 0, False),
        ("_wide", M, 0, True),
        ("_narrow", 16, 0, False),
        ("_grouped", M, 128, False),
    ):
        tile = tile_of(rows, N, K, size, hopper)
        types = {
            **{"x": "*i8", "w": "*i8", "x_scale": "*fp32", "w_scale": "*fp32", "bias": "*bf16", "y": "*bf16"},
            **dict.fromkeys(("x_zero_point", "w_zero_point", "x_row_sum", "w_row_sum", "accumulator"), "*i32"),
            **dict.fromkeys(("M", "N", "K", "groups"), "i32"),
        }
        constants = _constants(tile, torch.bfloat16, False, True) | {
            **{"X_PER_TENSOR": False, "W_PER_TENSOR": False, "BIAS": True, "WANTS_Y": True, "EVEN": True},
            **{"WANTS_ACCUMULATOR": False, "GROUPED": size > 0, "INTERPRETED": False},
        }
        names = _integer_linear.arg_names
        found.append(
            Variant(
                name=f"integer_linear{name}<{tile.m}, {tile.n}, {tile.k}>",
                kernel=_integer_linear,
                signature={n: "constexpr" if n in constants else types[n] for n in names},
                constants=constants,
                attributes={
                    (p,): [["tt.divisibility", 16]] for p, n in enumerate(names) if n in types and n != "groups"
                },
                warps=tile.warps,
                stages=tile.stages,
                instructions={"LDGSTS.128": 2},
                shape=f"M = {rows}, N = K = {N}" + (f", groups of {size}" if size else ""),
                bytes=(rows + N) * K + 2 * rows * N,
                flops=2 * rows * N * K,
                options=OPTIONS,
            )
        )
    return found
