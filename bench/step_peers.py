"""One optimizer step of all layers with the penalty: plain fused AdamW, with the paper's dense G, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases import RANK, PenaltyCase, PenaltyTensors
from s2d_kernels import SpectralAdamW, ops
from s2d_kernels.optim import Penalty
from s2d_kernels.penalty import add_penalty_grad_

LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.999), 1e-8, 1e-2
# One rounding, relative to the norm of what is rounded: at most eps / sqrt(12) in the root mean square.
ROUNDING = 0.3


@dataclass
class StepTensors:
    """Parameters with gradients, what both were at first, the factors of each, and the moments, m and v.

    All optimizers have the same moments: with their own, six of them would not fit beside an 8B model's layer.
    """

    params: list[nn.Parameter]
    start: list[Tensor]
    penalty: PenaltyTensors
    moments: list[tuple[Tensor, Tensor]]

    def restore(self) -> None:
        self.penalty.restore()
        for param, start in zip(self.params, self.start, strict=True):
            param.data.copy_(start)


@dataclass(frozen=True)
class StepPeer:
    """One way to make a step.

    Attributes:
        prepare: tensors -> the optimizer and the function to time.
        moved: case -> bytes read and written, as if no cache held them.
        extra: case -> bytes held beside p, g, m, v and the fp32 factors.
        penalized: whether the step has the penalty; plain AdamW is what the others are measured against.
        variant: of ours, what it is called; "" for peers.
        roundings: of the gradient to its dtype before it reaches the moments; arithmetic is in fp32.
    """

    name: str
    setting: str
    prepare: Callable[[StepTensors], tuple[torch.optim.Optimizer, Callable[[], object]]]
    moved: Callable[[PenaltyCase], int]
    extra: Callable[[PenaltyCase], int]
    penalized: bool = True
    variant: str = ""
    roundings: int = 0


def make_tensors(case: PenaltyCase, device: torch.device) -> StepTensors:
    """Weights N(0, 1/n) beside the gradients and factors of the penalty's benchmark."""
    penalty = case.tensors(device)
    generator = torch.Generator().manual_seed(1)
    start = [(torch.randn(m, n, generator=generator) * n**-0.5).to(device, case.dtype) for m, n in case.shapes]
    params = [nn.Parameter(weight.clone()) for weight in start]
    for param, grad in zip(params, penalty.grads, strict=True):
        param.grad = grad
    moments = [(torch.empty_like(weight), torch.empty_like(weight)) for weight in start]
    return StepTensors(params, start, penalty, moments)


def give_state(tensors: StepTensors, optimizer: torch.optim.Optimizer) -> None:
    """The state that a first step with gradients of +1 and -1 leaves.

    From nothing a step moves p by lr g / (|g| + eps), the sign of g: where the penalty cancels a gradient, its rounding
    decides. From this state on sqrt(v) is at least 0.7 of a unit, and p depends on g by less than lr everywhere.
    """
    generator = torch.Generator().manual_seed(2)
    for param, (m, v) in zip(tensors.params, tensors.moments, strict=True):
        sign = torch.randint(0, 2, param.shape, generator=generator, dtype=torch.int8).to(param) * 2 - 1
        m.copy_((1 - BETAS[0]) * sign)
        v.copy_((1 - BETAS[1]) * sign.square())
        optimizer.state[param] = {"step": torch.ones((), device=param.device), "exp_avg": m, "exp_avg_sq": v}


def step_errors(
    tensors: StepTensors, optimizer: torch.optim.Optimizer, function: Callable[[], object], penalized: bool
) -> list[float]:
    """Of p, m and v of each layer after a step from `give_state`: Frobenius distance from fp64, over the truth's."""
    give_state(tensors, optimizer)
    before = [
        tuple(optimizer.state[param][key].clone() for key in ("exp_avg", "exp_avg_sq")) for param in tensors.params
    ]
    function()
    errors = []
    beta1, beta2 = BETAS
    t = tensors.penalty
    for param, first, (m, v), grad, factor, c in zip(
        tensors.params, tensors.start, before, t.start, t.factors, t.coefficients, strict=True
    ):
        left, right = factor.U.double() * c.double(), factor.Vh.double()
        state = optimizer.state[param]
        squares = torch.zeros(3, 2, dtype=torch.float64, device=param.device)  # of p, m, v: error, truth
        size = max(1, 2**20 // param.shape[1])
        for rows in (slice(start, start + size) for start in range(0, len(param), size)):
            g = grad[rows].double()
            if penalized:
                g = g + left[rows] @ right
            true_m = beta1 * m[rows].double() + (1 - beta1) * g
            true_v = beta2 * v[rows].double() + (1 - beta2) * g * g
            move = true_m / (1 - beta1**2) / ((true_v / (1 - beta2**2)).sqrt() + EPS)
            true_p = first[rows].double() * (1 - LR * WEIGHT_DECAY) - LR * move
            results = ((param, true_p), (state["exp_avg"], true_m), (state["exp_avg_sq"], true_v))
            for place, (got, truth) in enumerate(results):
                squares[place, 0] += (got[rows].detach().double() - truth).square().sum()
                squares[place, 1] += truth.square().sum()
        errors += (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    return errors


def error_limit(peer: StepPeer, dtype: torch.dtype) -> float:
    """The rounding of the result, and those of the gradient, which v doubles; in fp32 its sum has two at least."""
    roundings = max(peer.roundings, 2) if dtype == torch.float32 else peer.roundings
    return ROUNDING * (1 + 4 * roundings) ** 0.5 * torch.finfo(dtype).eps


def floor_bytes(case: PenaltyCase) -> int:
    """p, g, m, v read and p, m, v written."""
    return 7 * case.grad_bytes


def _factor_bytes(case: PenaltyCase) -> int:
    return case.bytes - 2 * case.grad_bytes


def _adamw(t: StepTensors) -> torch.optim.AdamW:
    return torch.optim.AdamW(t.params, LR, BETAS, EPS, WEIGHT_DECAY, fused=True)


def _plain(t: StepTensors) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    optimizer = _adamw(t)
    return optimizer, optimizer.step


def _dense(t: StepTensors) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    optimizer, p = _adamw(t), t.penalty
    pairs = zip(p.grads, p.factors, p.coefficients, strict=True)
    dense = [((f.U * c) @ f.Vh).to(grad.dtype) for grad, f, c in pairs]

    def step() -> None:
        torch._foreach_add_(p.grads, dense)
        optimizer.step()

    return optimizer, step


def _coupled(impl: str) -> Callable[[StepTensors], tuple[torch.optim.Optimizer, Callable[[], object]]]:
    def prepare(t: StepTensors) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
        optimizer, p = _adamw(t), t.penalty

        def step() -> None:
            add_penalty_grad_(p.grads, p.factors, coefficients=p.coefficients, impl=impl)
            optimizer.step()

        return optimizer, step

    return prepare


def _fused(impl: str) -> Callable[[StepTensors], tuple[torch.optim.Optimizer, Callable[[], object]]]:
    def prepare(t: StepTensors) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
        optimizer = SpectralAdamW(t.params, LR, BETAS, EPS, WEIGHT_DECAY, impl=impl)
        layers = zip(t.params, t.penalty.factors, t.penalty.coefficients, strict=True)
        optimizer.set_penalties([Penalty(param, 0, None, f.U, f.Vh, c) for param, f, c in layers])
        return optimizer, optimizer.step

    return prepare


PLAIN = StepPeer("AdamW(fused=True)", "no penalty at all", _plain, floor_bytes, lambda _: 0, penalized=False)
DENSE = StepPeer(
    "_foreach_add_ of dense G, AdamW",
    "G kept in the gradient's dtype, as in the paper",
    _dense,
    lambda case: floor_bytes(case) + 3 * case.grad_bytes,
    lambda case: case.grad_bytes,
    roundings=2,  # of G and of the sum
)


def usable(device: torch.device) -> list[str]:
    """Implementations of ours that can be measured on `device`."""
    candidates = ("cuda", "triton", "torch") if device.type == "cuda" else ("cpu", "torch")
    return [impl for impl in candidates if impl in ops.available("adamw_") and ops.problem_of(impl, device) is None]


def ours(device: torch.device) -> list[StepPeer]:
    """Both forms, with each implementation that is usable on `device`."""
    found = []
    for impl in usable(device):
        # Without a kernel of its own the fused form sums into a copy of one gradient at a time.
        copies = impl == "torch"
        found.append(
            StepPeer(
                "ours",
                "SpectralAdamW" + (", a layer's gradient copied" if copies else ", one pass"),
                _fused(impl),
                lambda case, copies=copies: (
                    floor_bytes(case)  # type: ignore[misc]
                    + _factor_bytes(case)
                    + (2 * case.grad_bytes if copies else 0)
                ),
                lambda case, copies=copies: (  # type: ignore[misc]
                    4 * RANK * sum(m for m, _ in case.shapes) + 4 * case.largest if copies else 0
                ),
                variant=f"fused, {impl}",
                roundings=1 if copies else 0,
            )
        )
        found.append(
            StepPeer(
                "ours",
                "add_penalty_grad_, AdamW(fused=True)",
                _coupled(impl),
                lambda case: floor_bytes(case) + case.bytes,
                lambda case, copies=copies: (  # type: ignore[misc]
                    4 * RANK * sum(m for m, _ in case.shapes) if copies else 0
                ),
                variant=f"coupled, {impl}",
                roundings=1,
            )
        )
    return found
