"""`add_penalty_grad_` with impl="cpu": csrc/cpu/penalty_grad.cpp, one pass over all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import _native_cpu, ops
from s2d_kernels.penalty import check_layers
from s2d_kernels.penalty_tables import penalty_tables, supports_penalty


@ops.implements("add_penalty_grad_", "cpu", supports_penalty)
def _add_cpu(
    grads: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    *,
    seeds: Tensor | None = None,
) -> None:
    """Partly overlapping gradients are not supported."""
    check_layers(grads, Us, Vhs, coefficients, ranks, seeds)
    tables, _kept = penalty_tables(grads, Us, Vhs, coefficients, ranks, seeds)
    for table in tables:
        _native_cpu.add_penalty_grad(table, torch.get_num_threads())
