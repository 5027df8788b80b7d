"""The op `straight_through_grad` in Triton: codes become numbers on their way to the tensor cores."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BAND = 8
# Columns of a group where there is but one: a multiple of every tile's, and more than there are columns.
UNGROUPED = 2**30


@jit(do_not_specialize=["size"])
def _straight_through(
    grad: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    largest: tl.tensor,
    R: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    one: tl.tensor,
    PACKED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    ACROSS: tl.constexpr,
    GRAD: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """A tile of out[R, K] = (grad[R, N] @ ((codes - zero_point) * scale)[N, K]) * mask.

    ACROSS: a tile's columns belong to several groups of `size` columns, each with a scale of its own.
    Of an fp16 gradient, whose products would be infinite beyond 65504, the operand is multiplied by the power of two
    that takes the largest scale to 2^7..2^8 (255 of which fp16 has), and the sum is divided by it.
    """
    if GRAD == tl.float16:
        # exponents as fp32 holds them; from 8 on both powers are normal numbers
        exponent = tl.maximum(tl.load(largest).to(tl.int32, bitcast=True) >> 23, 8)
        up = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
        down_again = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    program = tl.program_id(0)
    down = tl.cdiv(R, BLOCK_R)
    in_band = BAND * tl.cdiv(K, BLOCK_K)
    first = program // in_band * BAND
    height = tl.minimum(down - first, BAND)
    i = ((first + program % in_band % height) * BLOCK_R).to(tl.int64) + tl.arange(0, BLOCK_R)
    start = (program % in_band // height * BLOCK_K).to(tl.int64)
    j = start + tl.arange(0, BLOCK_K)
    in_rows = i < R
    in_cols = j < K
    n = tl.arange(0, BLOCK_N)
    grad_place = grad + i[:, None] * row_stride + n[None, :] * col_stride
    width = K
    column = j
    if PACKED:
        width = (K + 1) // 2
        column = start // 2 + tl.arange(0, BLOCK_K // 2)
    # int64, because the offset of a row may pass 2^31
    line = n.to(tl.int64)
    code_place = codes + line[:, None] * width + column[None, :]
    if ACROSS:
        parameter = line[:, None] * groups + (j // size)[None, :]
    else:
        parameter = (line * groups + start // size)[:, None]
    step = BLOCK_N * groups
    if PER_TENSOR:
        parameter = parameter * 0
        step = 0

    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for block in range(0, STEPS if INTERPRETED else tl.cdiv(N, BLOCK_N)):
        in_block = n < N - block * BLOCK_N
        g = tl.load(grad_place, mask=in_rows[:, None] & in_block[None, :], other=0.0)
        here = tl.load(code_place, mask=in_block[:, None] & (column < width)[None, :], other=0)
        if PACKED:
            value = tl.interleave(here & 15, here >> 4).to(tl.int32)
            if SYMMETRIC:
                value = (value ^ 8) - 8
        else:
            value = here.to(tl.int32)
        inside = in_block[:, None] & (in_cols[None, :] if ACROSS else in_block[:, None])
        if not SYMMETRIC:
            value -= tl.load(zero_point + parameter, mask=inside, other=0)
        step_size = tl.load(scale + parameter, mask=inside, other=0.0)
        if GRAD == tl.float16:
            step_size *= up
        number = value.to(tl.float32) * step_size
        # Columns beyond K may hold anything: they are not stored. Rows beyond N have scale 0.
        if INTERPRETED:
            rounded = widen(narrow(number, GRAD, INTERPRETED), tl.float32, INTERPRETED)
            total = tl.dot(widen(g, tl.float32, INTERPRETED), rounded, total)
        elif GRAD == tl.float32:
            # Tensor cores truncate when they add: sums longer than a block are left to fp32's rounding addition, which
            # the compiler would put back into the matrix instruction if it knew that the factor is 1.
            total = tl.fma(tl.dot(g, number, input_precision="tf32x3"), one, total)
        else:
            total = tl.dot(g, narrow(number, GRAD, INTERPRETED), total)
        grad_place += BLOCK_N * col_stride
        code_place += BLOCK_N * width
        parameter += step

    bytes_across = (K + 7) // 8
    byte = start // 8 + tl.arange(0, BLOCK_K // 8)
    kept = tl.load(
        mask + i[:, None] * bytes_across + byte[None, :],
        mask=in_rows[:, None] & (byte < bytes_across)[None, :],
        other=0,
    )
    bits = (kept.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    total *= bits.reshape(BLOCK_R, BLOCK_K).to(tl.float32)
    if GRAD == tl.float16:
        total *= down_again
    tl.store(
        out + i[:, None] * K + j[None, :], narrow(total, OUT, INTERPRETED), mask=in_rows[:, None] & in_cols[None, :]
    )


class Tile(NamedTuple):
    """Blocks of a launch: rows and columns of the result, rows of codes; its warps, and the stages of its loads."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def tile_of(R: int, size: int, dtype: torch.dtype) -> tuple[Tile, bool]:
    """And whether its columns belong to several groups."""
    cols = 128 if dtype != torch.float32 else 64
    if size < cols and size in (32, 64):
        cols = size
    rows = 16 if R <= 16 else 64 if R <= 64 or dtype == torch.float32 else 128
    deep = 64 if dtype != torch.float32 else 32
    return Tile(rows, cols, deep, 8 if rows * cols > 64 * 64 else 4, 3), size % cols != 0


def _supports(
    grad: Tensor,
    _codes: Tensor,
    scale: Tensor,
    _zero_point: Tensor,
    _mask: Tensor,
    _K: int,
    _bits: int,
    _symmetric: bool,
    out_dtype: torch.dtype,
) -> bool:
    return grad.dtype in DTYPES and scale.dtype == torch.float32 and out_dtype in DTYPES


def _constants(
    tile: Tile, across: bool, grad: torch.dtype, out: torch.dtype, bits: int, symmetric: bool
) -> dict[str, Any]:
    return {
        "PACKED": bits <= 4,
        "SYMMETRIC": symmetric,
        "ACROSS": across,
        "GRAD": getattr(tl, str(grad).removeprefix("torch.")),
        "OUT": getattr(tl, str(out).removeprefix("torch.")),
        "BLOCK_R": tile.rows,
        "BLOCK_N": tile.depth,
        "BLOCK_K": tile.cols,
        "BAND": BAND,
        "STEPS": 0,
        "INTERPRETED": interpreted(),
    }


@ops.implements("straight_through_grad", "triton", _supports)
def _grad_triton(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    mask: Tensor,
    K: int,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """One launch. The operand has the gradient's precision, as in a layer of that dtype; sums are in fp32.

    With an fp16 gradient (a small reduction before the launch) operands may have any magnitude. Those whose scale is
    below 2^-21 of the largest (a row of zeros has 1) lose precision: an error of 2^-32 of the largest scale is left.
    """
    device = grad.device
    check_device(device)
    if not _supports(grad, codes, scale, zero_point, mask, K, bits, symmetric, out_dtype):
        raise TypeError(
            f"grad is {grad.dtype}, scale {scale.dtype} and the result {out_dtype}: impl='triton' takes fp32, bf16 and "
            "fp16 gradients of fp32 scales, else impl='torch'"
        )
    R, N = grad.shape
    out = grad.new_empty((R, K), dtype=out_dtype)
    if not R or not K:
        return out
    if not N:
        return out.zero_()
    groups = scale.shape[1]
    codes, scale, zero_point, mask = (t.contiguous() for t in (codes, scale, zero_point, mask))
    size = K // groups if groups > 1 else UNGROUPED
    tile, across = tile_of(R, size, grad.dtype)
    # NaN scales make NaN whatever they are multiplied by
    largest = scale.nan_to_num(nan=0.0).amax() if grad.dtype == torch.float16 else scale
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _straight_through[(triton.cdiv(R, tile.rows) * triton.cdiv(K, tile.cols),)](
            grad, codes, scale, zero_point, mask, out, largest, R, N, K, grad.stride(0), grad.stride(1), groups,
            size, 1.0, PER_TENSOR=scale.numel() == 1,
            **_constants(tile, across, grad.dtype, out_dtype, bits, symmetric) | interpreted_steps(N, tile.depth),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles: grad_x of a 4-bit weight, grad_W of 4-bit activations."""
    R = N = K = 4096
    found = []
    for name, dtype, symmetric, transposed, size in (
        ("x", torch.bfloat16, True, False, UNGROUPED),
        ("x_grouped", torch.bfloat16, True, False, 128),
        ("w", torch.bfloat16, False, True, UNGROUPED),
        ("x", torch.float32, True, False, UNGROUPED),
        ("x", torch.float16, True, False, UNGROUPED),
    ):
        element = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]
        tile, across = tile_of(R, size, dtype)
        unit = {"row_stride": 1} if transposed else {"col_stride": 1}
        constants = _constants(tile, across, dtype, dtype, 4, symmetric) | {"PER_TENSOR": False, "INTERPRETED": False}
        constants |= unit | ({"groups": 1} if size > K else {})
        types = {
            **{"grad": f"*{element}", "codes": "*u8", "scale": "*fp32", "zero_point": "*i32", "mask": "*u8"},
            **{"out": f"*{element}", "largest": "*fp32", "one": "fp32"},
            **dict.fromkeys(("R", "N", "K", "row_stride", "col_stride", "groups", "size"), "i32"),
        }
        names = _straight_through.arg_names
        plain = [n for n in types if n not in constants and n not in ("size", "one")]
        found.append(
            Variant(
                name=f"straight_through_{name}<{element}>",
                kernel=_straight_through,
                signature={n: "constexpr" if n in constants else types[n] for n in names},
                constants=constants,
                attributes={(names.index(n),): [["tt.divisibility", 16]] for n in plain},
                warps=tile.warps,
                stages=tile.stages,
                instructions={"LDGSTS.128": 1},
                shape=f"R = N = K = {K}",
                bytes=R * N * dtype.itemsize + N * K // 2 + R * K // 8 + R * K * dtype.itemsize,
                flops=2 * R * N * K,
            )
        )
    return found
