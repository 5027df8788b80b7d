"""`add_penalty_grad_` with impl="cpu": csrc/cpu/penalty_grad.cpp, one pass over all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import _native_cpu, ops
from s2d_kernels.penalty import check_layers
from s2d_kernels.penalty_tables import penalty_tables, supports_penalty


def _supports(
    grads: list[Tensor], Us: list[Tensor], Vhs: list[Tensor], coefficients: list[Tensor], ranks: Tensor | None
) -> bool:
    # In bf16 torch's product of factors in two parts is the faster one, on CPUs that multiply bf16.
    return supports_penalty(grads, Us, Vhs, coefficients, ranks) and all(g.dtype != torch.bfloat16 for g in grads)


@ops.implements("add_penalty_grad_", "cpu", _supports)
def _add_cpu(
    grads: list[Tensor], Us: list[Tensor], Vhs: list[Tensor], coefficients: list[Tensor], ranks: Tensor | None
) -> None:
    """Partly overlapping gradients are not supported."""
    check_layers(grads, Us, Vhs, coefficients, ranks)
    tables, _kept = penalty_tables(grads, Us, Vhs, coefficients, ranks)
    for table in tables:
        _native_cpu.add_penalty_grad(table, torch.get_num_threads())
