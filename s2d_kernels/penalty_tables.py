"""The tables of pointers that `add_penalty_grad_` hands to both native libraries."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from s2d_kernels import _native

DTYPES = {
    torch.float32: _native.DTYPES["float32"],
    torch.bfloat16: _native.DTYPES["bfloat16"],
    torch.float16: _native.DTYPES["float16"],
}


def supports_penalty(
    grads: list[Tensor], _us: list[Tensor], _vhs: list[Tensor], coefficients: list[Tensor], _ranks: Tensor | None
) -> bool:
    """Whether the kernels take these arguments of the operation."""
    return all(
        g.dtype in DTYPES and (g.stride(1) == 1 or g.shape[1] <= 1) and len(c) <= _native.MAX_RANK
        for g, c in zip(grads, coefficients, strict=True)
    )


def penalty_tables(
    grads: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    seeds: Tensor | None,
) -> tuple[list[list[_native.PenaltyLayer]], list[tuple[Tensor, ...]]]:
    """One table a launch, a second one for a gradient that is given twice; and the tensors to keep alive meanwhile."""
    kept: list[tuple[Tensor, ...]] = []
    tables: list[list[_native.PenaltyLayer]] = []
    earlier: Counter[int] = Counter()
    if ranks is not None:
        ranks = ranks.contiguous()
        kept.append((ranks,))
    if seeds is not None:
        seeds = seeds.contiguous()
        kept.append((seeds,))
    for index, (grad, U, Vh, c) in enumerate(zip(grads, Us, Vhs, coefficients, strict=True)):
        operands = U.float(), Vh.float(), c.float().contiguous()
        if operands[1].stride(1) != 1 and operands[1].shape[1] > 1:
            operands = operands[0], operands[1].contiguous(), operands[2]
        kept.append(operands)
        time = earlier[grad.data_ptr()]
        earlier[grad.data_ptr()] += 1
        if time == len(tables):
            tables.append([])
        tables[time].append(_layer(index, grad, *operands, ranks, seeds))
    return tables, kept


def _layer(
    index: int, grad: Tensor, U: Tensor, Vh: Tensor, coefficients: Tensor, ranks: Tensor | None, seeds: Tensor | None
) -> _native.PenaltyLayer:
    """One row of the pointer table; the tensors must outlive the enqueueing."""
    if grad.dtype not in DTYPES:
        raise TypeError(
            f"grads[{index}] has dtype {grad.dtype}: the kernels take fp32, bf16 and fp16, else impl='torch'"
        )
    if grad.stride(1) != 1 and grad.shape[1] > 1:
        raise ValueError(f"grads[{index}] has stride {grad.stride()}: the kernels need contiguous columns")
    if coefficients.shape[0] > _native.MAX_RANK:
        raise ValueError(f"grads[{index}] gets {coefficients.shape[0]} components: the kernels take {_native.MAX_RANK}")
    return _native.PenaltyLayer(
        grad=grad.data_ptr(),
        U=U.data_ptr(),
        Vh=Vh.data_ptr(),
        coefficients=coefficients.data_ptr(),
        device_rank=None if ranks is None else ranks.data_ptr() + 4 * index,
        device_seed=None if seeds is None else seeds.data_ptr() + 8 * index,
        rows=grad.shape[0],
        cols=grad.shape[1],
        grad_stride=grad.stride(0),
        u_row_stride=U.stride(0),
        u_col_stride=U.stride(1),
        vh_stride=Vh.stride(0),
        rank=coefficients.shape[0],
        dtype=DTYPES[grad.dtype],
    )
