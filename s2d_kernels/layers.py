"""What `S2D` keeps of each matrix, and what a refresh hands over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels.selection import PCDR
from s2d_kernels.svd import CONVERGED, SVDBasis, TopkSVD


class LayerReport(NamedTuple):
    """What the last refresh that has arrived said about one matrix."""

    name: str
    shape: tuple[int, int]
    k_target: int
    route: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    activation: float
    sigma_max: float
    status: str


@dataclass
class LayerState:
    """Factors in use on one matrix, all on the parameter's device. Zero tensors until a refresh has arrived."""

    basis: SVDBasis  # as the refresh delivered it: the next warm start
    S: Tensor  # [k], the cached singular values, which the decoupled form decays
    S_at_snapshot: Tensor  # [k], S when the weights of the refresh under way were copied
    rank: int = 0
    status: int = CONVERGED
    arrived: bool = False
    missed_lr: float = 0.0  # sum of the learning rates since that copy
    sigma: float = 0.0  # the largest singular value at the snapshot, on the host
    pcdr: PCDR | None = None

    def factors(self) -> TopkSVD:
        """The `k` components in use, with the cached singular values."""
        k = self.S.shape[0]
        basis, zero = self.basis, self.S.new_zeros(())
        return TopkSVD(basis.U[:, :k], self.S, basis.Vh[:k], basis.residual[:k], zero, zero.to(torch.int32), basis)


class Refreshed(NamedTuple):
    """Result of a refresh for one matrix, on the host's side of the decision."""

    basis: SVDBasis
    rank: int
    status: int
    sigma: float
    pcdr: PCDR | None
