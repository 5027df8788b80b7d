"""impl="cpu" of `adamw_`: csrc/cpu/adamw.cpp, one pass over parameters, gradients and moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2d_kernels import _native, _native_cpu, ops
from s2d_kernels.adamw import ADDRESS_TABLES
from s2d_kernels.adamw_tables import address, address_table, group_rows, step_tables, supports_step


@ops.implements("adamw_", "cpu", supports_step)
def _adamw_cpu(
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
    """No two tensors may share memory."""
    scalars = (clip_coef, grad_scale, found_inf)
    if lrs is not None:
        lrs = lrs.contiguous()
    layers, _kept = step_tables(
        params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, ranks, groups, numbers, lrs, scalars
    )
    _launch(params[0], layers, numbers, lrs, *scalars, decoupled, clip_penalty)


def _launch(
    _param: Tensor,
    layers: list[_native.AdamWLayer],
    numbers: Sequence[float],
    lrs: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decoupled: bool,
    clip_penalty: bool,
) -> None:
    options = _native.AdamWOptions(*map(address, (clip_coef, grad_scale, found_inf)), decoupled, clip_penalty)
    _native_cpu.adamw(layers, group_rows(numbers, lrs), options, torch.get_num_threads())


ADDRESS_TABLES["cpu"] = address_table, _launch
