"""The norm that gradient clipping asks for where the penalty is not in the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels.penalty import LowRank, added, rows_of_a_block, screened


class PenalizedRows(NamedTuple):
    """Rows of a gradient `[m, n]` and the penalty `U [m, k]` diag(`coefficients [k]`) `Vh [k, n]` on them."""

    grad: Tensor
    U: Tensor
    Vh: Tensor
    coefficients: Tensor


def total_norm(
    plain: Sequence[Tensor], penalized: Sequence[PenalizedRows], signs: Sequence[int], grad_scale: Tensor | None
) -> Tensor:
    """The 2-norm of all `plain` gradients and of sign * grad / grad_scale + penalty, as one fp32 number on the device.

    The sum is formed in blocks of a few megabytes at most, and exactly as the step forms it: an element of the penalty
    that is 0 or not finite changes nothing. `signs` are those of the `penalized` gradients, -1 under `maximize`.

    Accuracy: fp32 sums (fp64 for fp64). Cost: one read of the gradients, and for `penalized` ones a block in fp32.
    """
    device = (plain[0] if plain else penalized[0].grad).device
    scale = None if grad_scale is None else grad_scale.to(device).float()
    norms = [norm.float().to(device) for norm in _norms([grad for grad in plain if grad.numel()])]
    if scale is not None:
        norms = [norm / scale for norm in norms]
    dtypes = [rows.grad.dtype for rows in penalized]
    columns = ([rows[place] for rows in penalized] for place in (1, 2, 3))
    low_ranks = screened(dtypes, *columns) if penalized else []
    for rows, low_rank, sign in zip(penalized, low_ranks, signs, strict=True):
        sums = [_sum(block, part, sign, scale) for block, part in _blocks(rows.grad, low_rank)]
        norms += [norm.float().to(device) for norm in sums]
    return (
        torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float32, device=device)
    )


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In fp32, or fp64: a norm in bf16 would have three digits."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    found: list[Tensor] = []
    for (_, dtype), some in alike.items():
        found += torch._foreach_norm(some, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return found


def _blocks(grad: Tensor, low_rank: LowRank | None) -> list[tuple[Tensor, LowRank | None]]:
    rows = rows_of_a_block(grad)
    parts = []
    for first in range(0, len(grad), rows):
        left = None if low_rank is None else low_rank._replace(left=low_rank.left[first : first + rows])
        parts.append((grad[first : first + rows], left))
    return parts


def _sum(block: Tensor, low_rank: LowRank | None, sign: int, scale: Tensor | None) -> Tensor:
    block = block if block.dtype == torch.float64 else block.float()
    if scale is not None:
        block = block / scale.to(block.device)
    if low_rank is not None:
        block = added(-block if sign < 0 else block, low_rank)
    return torch.linalg.vector_norm(block)
