"""The table of pointers that `adamw_` hands to both native libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2d_kernels import _native
from s2d_kernels.adamw import NUMBERS_PER_GROUP, check_step, contiguous_columns
from s2d_kernels.penalty_tables import DTYPES


def address(tensor: Tensor | None) -> int | None:
    """Where it begins; None stays None."""
    return None if tensor is None else tensor.data_ptr()


def _layer(
    index: int,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    U: Tensor,
    Vh: Tensor,
    coefficients: Tensor,
    ranks: Tensor | None,
    group: int,
) -> _native.AdamWLayer:
    """One row of the pointer table; the tensors must outlive the enqueueing."""
    if not (contiguous_columns(param) and contiguous_columns(grad)):
        raise ValueError(
            f"params[{index}] and grads[{index}] have strides {param.stride()} and {grad.stride()}: the kernels need "
            "contiguous columns"
        )
    rank = len(coefficients)
    if rank > _native.MAX_RANK:
        raise ValueError(f"params[{index}] gets {rank} components: the kernels take {_native.MAX_RANK}")
    return _native.AdamWLayer(
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        step.data_ptr(),
        U.data_ptr() if rank else None,
        Vh.data_ptr() if rank else None,
        coefficients.data_ptr() if rank else None,
        None if ranks is None else ranks.data_ptr() + 4 * index,
        *param.shape,
        param.stride(0),
        grad.stride(0),
        *U.stride(),
        Vh.stride(0),
        rank,
        DTYPES[param.dtype],
        group,
    )


def supports_step(
    params: list[Tensor], grads: list[Tensor], _m: Any, _v: Any, _t: Any, _us: Any, _vhs: Any, cs: list[Tensor], *_: Any
) -> bool:
    """Whether the kernels take these arguments of the operation."""
    return all(
        p.dtype in DTYPES and contiguous_columns(p) and contiguous_columns(g) and len(c) <= _native.MAX_RANK
        for p, g, c in zip(params, grads, cs, strict=True)
    )


def step_tables(
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
    scalars: tuple[Tensor | None, ...],
) -> tuple[list[_native.AdamWLayer], list[Any]]:
    """The rows of the table, and the tensors to keep alive meanwhile."""
    check_step(
        params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, ranks, groups, numbers, lrs, scalars,
        tuple(DTYPES),
    )  # fmt: skip
    if ranks is not None:
        ranks = ranks.contiguous()
    kept: list[Any] = [ranks]
    layers = []
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, groups, strict=True)
    for index, (param, grad, exp_avg, exp_avg_sq, step, U, Vh, c, group) in enumerate(tensors):
        operands = U.float(), Vh.float(), c.float().contiguous()
        if not contiguous_columns(operands[1]):
            operands = operands[0], operands[1].contiguous(), operands[2]
        kept.append(operands)
        layers.append(_layer(index, param, grad, exp_avg, exp_avg_sq, step, *operands, ranks, group))
    return layers, kept


def group_rows(numbers: Sequence[float], lrs: Tensor | None) -> list[_native.AdamWGroup]:
    """The hyperparameters of each group; `lrs`, contiguous, must outlive their use."""
    rows = []
    for group in range(len(numbers) // NUMBERS_PER_GROUP):
        *given, maximize = numbers[NUMBERS_PER_GROUP * group :][:NUMBERS_PER_GROUP]
        lr = None if lrs is None else lrs.data_ptr() + 4 * group
        rows.append(_native.AdamWGroup(lr, *given, int(maximize)))
    return rows


def address_table(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    groups: list[int],
) -> Any:
    """The table, addresses only; None where a factor would have to be converted."""
    for U, Vh, c in zip(Us, Vhs, coefficients, strict=True):
        if len(c) and not (
            U.dtype == Vh.dtype == c.dtype == torch.float32 and c.is_contiguous() and contiguous_columns(Vh)
        ):
            return None
    numbers = [0.0] * (NUMBERS_PER_GROUP * (max(groups, default=0) + 1))
    check_step(
        params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, None, groups, numbers, None,
        (None, None, None), tuple(DTYPES),
    )  # fmt: skip
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, groups, strict=True)
    rows = [_layer(index, *some, None, group) for index, (*some, group) in enumerate(tensors)]  # type: ignore[call-arg]
    return (_native.AdamWLayer * len(rows))(*rows)
