"""What `S2D` keeps of each matrix, and what a refresh hands over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.penalty import penalty_coefficients
from s2d_kernels.selection import PCDR
from s2d_kernels.static_memory import Chosen
from s2d_kernels.svd import CONVERGED, SVDBasis, TopkSVD, warm_width

DEVIATION_WARNING = 0.3
DEVIATION_LIMIT = 1.0


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
    S: Tensor  # fp64 [k], the cached singular values, which the decoupled form decays in place, by less than fp32 sees
    S_at_snapshot: Tensor  # fp64 [k], S when the weights of the refresh under way were copied
    rank: int = 0
    status: int = CONVERGED
    arrived: bool = False
    missed_lr: float = 0.0  # sum of the learning rates since that copy
    sigma: float = 0.0  # the largest singular value at the snapshot, on the host
    pcdr: PCDR | None = None
    prepared: tuple[float, float, Tensor] | None = None  # strength, power and their coefficients
    kept: tuple[int, TopkSVD] | None = None  # what `factors` made last
    change: Tensor | None = None  # [rank], what the decoupled form's step takes; the same memory at each of them

    def coefficients(self, strength: float, power: float) -> Tensor:
        """strength * s^power `[k]`, of which the coupled form needs the same at every step between two refreshes."""
        if self.prepared is None or self.prepared[:2] != (strength, power):
            S = self.S.to(self.basis.S.dtype)
            self.prepared = strength, power, penalty_coefficients([S], strength=strength, power=power)[0]
        return self.prepared[2]

    def catch_up(self, old: LayerState, *, strength: float, power: float) -> Tensor:
        """Decay these fresh singular values by `missed_lr`; returns the change `[rank]` that the weight still needs.

        A component that went on being decayed by the previous factors `old` has it already: along the new u_i, v_i they
        took sum_j change_j (u_i . u_j)(v_j . v_i). The rest is the change of the weight.
        """
        k, r = self.S.shape[0], self.rank
        S = self.S[:r]
        target = reference.decayed_singular_values(S, lr_sum=self.missed_lr, strength=strength, power=power)
        U, Vh, old_U, old_Vh = (
            t.double() for t in (self.basis.U[:, :r], self.basis.Vh[:r], old.basis.U[:, :k], old.basis.Vh[:k])
        )
        actual = S + ((U.mT @ old_U) * (Vh @ old_Vh.mT)) @ (old.S - old.S_at_snapshot)
        S.copy_(target)
        return target - actual

    def factors(self, count: int) -> TopkSVD:
        """The first `count` components as the refresh delivered them."""
        if self.kept is None or self.kept[0] != count:
            U, S, Vh, residual = self.basis
            zero = S.new_zeros(())
            some = U[:, :count], S[:count], Vh[:count], residual[:count]
            self.kept = count, TopkSVD(*some, zero, zero.to(torch.int32), self.basis)
        return self.kept[1]

    def taken(self) -> Tensor:
        """The memory for the step's change, `[rank]` in the factors' dtype."""
        if self.change is None:
            self.change = self.basis.S.new_zeros(self.rank)
        return self.change


def decay(layers: Sequence[LayerState], rates: Sequence[float], *, strength: float, power: float) -> list[Tensor]:
    """Decay the cached singular values of each layer's decided components by one step of the decoupled form.

    `reference.decayed_singular_values` of all layers in a dozen launches, with the change itself accurate:

        change = s expm1(-log(1 + g) / (power - 1)),  g = (power - 1) lr strength s^(power - 1)

    Args:
        layers: with ranks of 1 and more.
        rates: the learning rate of each; 0 changes nothing.

    Returns:
        Their changes, fp64 `[rank]` each.
    """
    S = [layer.S[: layer.rank] for layer in layers]
    if power == 1:
        changes = torch._foreach_mul(S, [math.expm1(-strength * rate) for rate in rates])
    else:
        growths = [(power - 1) * strength * rate for rate in rates]
        log_growth = torch._foreach_log(S)
        torch._foreach_mul_(log_growth, power - 1)
        torch._foreach_add_(log_growth, [math.log(g) if g else -math.inf for g in growths])
        # log(1 + g) = max(log g, 0) + log1p(exp(-|log g|)), whatever the size of g
        rest = torch._foreach_abs(log_growth)
        torch._foreach_neg_(rest)
        torch._foreach_exp_(rest)
        torch._foreach_log1p_(rest)
        torch._foreach_clamp_min_(log_growth, 0.0)
        torch._foreach_add_(rest, log_growth)
        torch._foreach_mul_(rest, -1.0 / (power - 1))
        torch._foreach_expm1_(rest)
        changes = torch._foreach_mul(rest, S)
    torch._foreach_add_(S, changes)
    return list(changes)


def overshoots(
    layers: Mapping[str, LayerState], rates: Mapping[str, float], *, interval: int, strength: float, power: float
) -> dict[str, str]:
    """Of the decided layers whose stale factors overshoot by interval * lr * strength * s_1^(power-1), what to warn of.

    Raises:
        ValueError: it is `DEVIATION_LIMIT` and more.
    """
    found = {}
    for name, rate in rates.items():
        layer = layers[name]
        c = interval * rate * strength * layer.sigma ** (power - 1) if layer.rank else 0.0
        if c < DEVIATION_WARNING:
            continue
        found[name] = (
            f"interval * lr * strength * s_1^(power-1) = {c:.3g} on {name!r} (s_1 = {layer.sigma:.4g}, "
            f"lr / (1 - momentum) = {rate:.3g}): factors {interval} steps old overshoot"
        )
        if c >= DEVIATION_LIMIT:
            raise ValueError(f"{found[name]}; lower interval or strength, or use mode='decoupled', which is exact")
    return found


class StaticFactors:
    """Ranks and coefficients of S2D(static_factors=True), whose factors are written in place too.

    Attributes:
        ranks: int32 `[layers]` on the device.
    """

    def __init__(self, layers: Sequence[LayerState], device: torch.device) -> None:
        self.ranks = torch.zeros(len(layers), dtype=torch.int32, device=device)
        self._chosen = Chosen(self.ranks)
        self._S = [layer.basis.S[: len(layer.S)] for layer in layers]
        self._coefficients = [torch.zeros_like(S) for S in self._S]
        self._settings: tuple[float, float] | None = None  # strength and power of the coefficients
        self._captured = False  # a graph reads them: they stay at these settings
        self.follow(layers)

    def follow(self, layers: Sequence[LayerState]) -> None:
        """Take over the ranks and singular values that the layers have now."""
        self.ranks.copy_(ops.on_device([layer.rank for layer in layers], torch.int32, self.ranks.device))
        if self._settings is not None:
            self._compute(*self._settings)

    def options(self, places: Sequence[int], strength: float, power: float) -> dict[str, Any]:
        """Arguments of `add_penalty_grad_` for the layers at these places."""
        capturing = ops.capturing(self.ranks.device)
        if self._settings != (strength, power) and not capturing and not self._captured:
            self._compute(strength, power)
            self._settings = strength, power
        if self._settings == (strength, power):
            self._captured |= capturing
            coefficients = [self._coefficients[place] for place in places]
        else:  # graphs go on reading the kept ones; those made in a capture are there after a replay only
            S = [self._S[place] for place in places]
            coefficients = penalty_coefficients(S, strength=strength, power=power)
        return {"ranks": self._chosen.at(places), "coefficients": coefficients}

    def _compute(self, strength: float, power: float) -> None:
        if self._S:
            torch._foreach_copy_(self._coefficients, penalty_coefficients(self._S, strength=strength, power=power))


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

    basis = SVDBasis(zeros(m, b), zeros(b), zeros(b, n), zeros(b))
    return LayerState(basis, S=zeros(k).double(), S_at_snapshot=zeros(k).double())


def arrived(fresh: Refreshed, old: LayerState, *, in_place: bool) -> LayerState:
    """The state of a matrix from the arrival of `fresh` on; `in_place`: in the memory of `old`'s factors."""
    basis, S = fresh.basis, fresh.basis.S[: old.S.shape[0]].to(torch.float64, copy=True)
    if in_place:
        basis, S = copied(old.basis, basis), old.S.copy_(S)
    return LayerState(
        basis=basis,
        S=S,
        S_at_snapshot=S.clone(),
        rank=fresh.rank,
        status=fresh.status,
        arrived=True,
        missed_lr=old.missed_lr,
        sigma=fresh.sigma,
        pcdr=fresh.pcdr,
    )


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
    numbers = [
        torch.tensor(layer.missed_lr, dtype=torch.float64, device="cpu"),
        torch.tensor([int(flag) for flag in flags], device="cpu"),
    ]
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
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what S2D.state_dict() returned, got {type(state).__name__}")
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
