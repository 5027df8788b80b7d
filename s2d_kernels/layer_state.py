"""What `S2D` holds for each of its matrices: the factors in use, the result of a refresh, and the report about both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels.penalty import penalty_coefficients
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
    prepared: tuple[float, float, Tensor] | None = None  # strength, power and their coefficients

    def coefficients(self, strength: float, power: float) -> Tensor:
        """strength * s^power `[k]`, of which the coupled form needs the same at every step between two refreshes."""
        if self.prepared is None or self.prepared[:2] != (strength, power):
            self.prepared = strength, power, penalty_coefficients([self.S], strength=strength, power=power)[0]
        return self.prepared[2]

    def factors(self) -> TopkSVD:
        """The cached components, as `add_penalty_grad_` takes them."""
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
