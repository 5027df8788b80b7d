"""What `S2D` keeps of each matrix, and what a refresh hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels import reference
from s2d_kernels.penalty import penalty_coefficients
from s2d_kernels.selection import PCDR
from s2d_kernels.svd import CONVERGED, SVDBasis, TopkSVD, warm_width


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

    def decay(self, lr: float, *, strength: float, power: float) -> Tensor:
        """Decay the cached singular values by one step of the decoupled form; returns their change `[k]`."""
        S = reference.decayed_singular_values(self.S, lr_sum=lr, strength=strength, power=power)
        S = torch.where(torch.arange(len(S), device=S.device) < self.rank, S, self.S)
        change, self.S = S - self.S, S
        return change

    def catch_up(self, old: LayerState, *, strength: float, power: float) -> Tensor:
        """Decay these fresh singular values by `missed_lr`; returns `[k]`, the change that the weight still needs.

        A component that went on being decayed by the previous factors `old` has it already: along the new u_i, v_i they
        took sum_j change_j (u_i . u_j)(v_j . v_i). The rest is the change of the weight.
        """
        k = self.S.shape[0]
        target = reference.decayed_singular_values(self.S, lr_sum=self.missed_lr, strength=strength, power=power)
        overlap = (self.basis.U[:, :k].mT @ old.basis.U[:, :k]) * (self.basis.Vh[:k] @ old.basis.Vh[:k].mT)
        actual = self.S + overlap @ (old.S - old.S_at_snapshot)
        inside = torch.arange(k, device=target.device) < self.rank
        self.S = torch.where(inside, target, self.S)
        return torch.where(inside, target - actual, 0.0)

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


def empty_layer(shape: tuple[int, int], like: Tensor, *, k_max: int) -> LayerState:
    """The state of a matrix of `shape` before its first refresh, on the device of `like`; fp64 for fp64, else fp32."""
    m, n = shape
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    k = min(k_max, m, n)
    b = min(warm_width(k), m, n)

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=like.device)

    return LayerState(SVDBasis(zeros(m, b), zeros(b), zeros(b, n), zeros(b)), S=zeros(k), S_at_snapshot=zeros(k))


KEYS = (
    *(f"{part}.{name}" for part in ("basis", "pending") for name in SVDBasis._fields),
    *("S", "S_at_snapshot", "missed_lr", "flags"),
)


def pack(layer: LayerState, pending: Refreshed | None, empty: LayerState) -> dict[str, Tensor]:
    """Copies of everything about a layer and its part of a refresh under way, as tensors under `KEYS`."""
    basis = empty.basis if pending is None else pending.basis
    flags = [layer.arrived, layer.rank, layer.status]
    flags += [0, 0, 0] if pending is None else [1, pending.rank, pending.status]
    tensors = [*layer.basis, *basis, layer.S, layer.S_at_snapshot]
    numbers = [torch.tensor(layer.missed_lr, dtype=torch.float64), torch.tensor([int(flag) for flag in flags])]
    return dict(zip(KEYS, [*(tensor.clone() for tensor in tensors), *numbers], strict=True))


def unpack(state: Mapping[str, Tensor], empty: LayerState) -> tuple[LayerState, Refreshed | None]:
    """The reverse of `pack`: copies with the devices and dtypes of `empty`."""

    def basis(part: str) -> SVDBasis:
        fields = empty.basis._asdict().items()
        return SVDBasis(*(state[f"{part}.{k}"].to(like.device, like.dtype, copy=True) for k, like in fields))

    flags = [int(flag) for flag in state["flags"]]
    layer = LayerState(
        basis=basis("basis"),
        S=state["S"].to(empty.S.device, empty.S.dtype, copy=True),
        S_at_snapshot=state["S_at_snapshot"].to(empty.S.device, empty.S.dtype, copy=True),
        rank=flags[1],
        status=flags[2],
        arrived=bool(flags[0]),
        missed_lr=float(state["missed_lr"]),
        sigma=float(state["basis.S"][0]),
    )
    if not flags[3]:
        return layer, None
    fresh = basis("pending")
    return layer, Refreshed(fresh, flags[4], flags[5], float(fresh.S[0]), None)


def check_state(state: Mapping[str, object], like: Mapping[str, Tensor]) -> None:
    """Raise a TypeError or ValueError where `state` has not the keys and shapes of `like`."""
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise TypeError(f"state {strange[0]!r} is a {type(state[strange[0]]).__name__}, expected a tensor")
    missing, unexpected = like.keys() - state.keys(), state.keys() - like.keys()
    if missing or unexpected:
        raise ValueError(
            f"state does not fit this S2D: missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]} "
            "(first five each). It must be built on the same model with the same selection"
        )
    for key, expected in like.items():
        found = state[key]
        if isinstance(found, Tensor) and found.shape != expected.shape:
            raise ValueError(f"state {key!r} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")


def copied(target: SVDBasis, source: SVDBasis) -> SVDBasis:
    """`target` with the values of `source`, in its own memory."""
    return SVDBasis(*(into.copy_(tensor) for into, tensor in zip(target, source, strict=True)))


def moved(basis: SVDBasis, like: Tensor) -> SVDBasis:
    """`basis` on the device and in the dtype of `like`."""
    return SVDBasis(*(tensor.to(like) for tensor in basis))
