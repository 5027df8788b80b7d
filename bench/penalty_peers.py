"""Adding the penalty gradient of all layers once: every implementation of ours, and what one would write in torch.

What does not change from step to step is prepared outside the clock for everybody: coefficients, factors scaled or
rounded, the dense matrices of the paper's form. The memory that this takes is part of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import RANK, PenaltyCase, PenaltyTensors
from s2d_kernels import ops
from s2d_kernels.penalty import add_penalty_grad_
from s2d_kernels.rounding import ROUNDINGS, layer_seeds

Run = Callable[[], object]
FACTOR_BYTES = torch.float32.itemsize
# Relative to an update as large as the gradient, the one rounding of a correct sum is 0.3 eps in the root mean square,
# a stochastic one 0.4; fp32 products of rank 3 make it 0.5, factors rounded to bf16 0.5 as well.
EPS_ALLOWED = 1.0


@dataclass(frozen=True)
class PenaltyPeer:
    """One way to do grad += U diag(c) Vh for every layer of a case.

    Attributes:
        prepare: tensors -> the function to time.
        describe: case -> the row's text.
        moved: case -> bytes read and written, large temporaries included, as if no cache held them.
        extra: case -> bytes held beside gradients and fp32 factors, all the time or while one layer is updated; a
            layer's scaled factors, blocks of rows that stay in the cache, tables of pointers and the workspaces of a
            BLAS aside.
        variant: of ours the impl and how it rounds unless to the nearest; "" for the peers, compared with each of ours.
    """

    name: str
    prepare: Callable[[PenaltyTensors], Run]
    describe: Callable[[PenaltyCase], str]
    moved: Callable[[PenaltyCase], int]
    extra: Callable[[PenaltyCase], int]
    variant: str = ""


def error_limit(dtype: torch.dtype) -> float:
    return EPS_ALLOWED * torch.finfo(dtype).eps


def penalty_errors(tensors: PenaltyTensors) -> list[float]:
    """Of each gradient after one update: Frobenius distance from the fp64 sum over the norm of the update."""
    errors = []
    for start, grad, factor, c in zip(tensors.start, tensors.grads, tensors.factors, tensors.coefficients, strict=True):
        update = (factor.U.double() * c.double()) @ factor.Vh.double()
        errors.append(float((grad.double() - (start.double() + update)).norm() / update.norm()))
    return errors


# --- ours ---------------------------------------------------------------------------------------------------------


def _candidates(device: torch.device) -> tuple[str, ...]:
    return ("cuda", "triton", "torch") if device.type == "cuda" else ("cpu", "torch")


def _problem(impl: str, device: torch.device) -> str | None:
    if impl not in ops.available("add_penalty_grad_"):
        return "it is not part of this installation"
    return ops.problem_of(impl, device)


def left_out(device: torch.device) -> list[str]:
    """Which implementations of ours cannot be measured on `device`, a sentence each."""
    problems = {impl: _problem(impl, device) for impl in _candidates(device)}
    return [f"impl={impl!r} is left out: {problem}" for impl, problem in problems.items() if problem is not None]


def ours(device: torch.device, dtype: torch.dtype) -> list[PenaltyPeer]:
    """Each implementation that is usable on `device`, for bf16 with both roundings."""
    usable = [impl for impl in _candidates(device) if _problem(impl, device) is None]
    roundings = ROUNDINGS if dtype == torch.bfloat16 else ROUNDINGS[:1]
    return [_ours(impl, rounding) for rounding in roundings for impl in usable]


def _ours(impl: str, rounding: str) -> PenaltyPeer:
    stochastic = rounding == "stochastic"

    def prepare(t: PenaltyTensors) -> Run:
        seed = layer_seeds(0, len(t.grads), t.grads[0].device) if stochastic else None
        return lambda: add_penalty_grad_(
            t.grads, t.factors, coefficients=t.coefficients, rounding=rounding, seed=seed, impl=impl
        )

    def splits(case: PenaltyCase) -> bool:
        return impl == "torch" and not stochastic and case.dtype != torch.float32

    def describe(case: PenaltyCase) -> str:
        if stochastic:
            return "fp32 sum, rounded up or down at random"
        return "bf16 factors in two parts, fp32 sum" if splits(case) else "fp32 sum"

    def extra(case: PenaltyCase) -> int:
        if impl != "torch":
            return 0
        rows, columns = (sum(shape[side] for shape in case.shapes) for side in (0, 1))
        return FACTOR_BYTES * RANK * (rows + max(rows, columns))

    return PenaltyPeer(
        "ours",
        prepare,
        describe,
        # Three products of rank k, whose factors are written and read.
        lambda case: case.bytes + (2 * 3 * _factor_reads(case) if splits(case) else 0),
        # Scaled U of all layers, and once in a row what is looked at for NaN.
        extra,
        variant=f"{impl}, {rounding}" if stochastic else impl,
    )


# --- torch --------------------------------------------------------------------------------------------------------


def _scaled_factors(t: PenaltyTensors) -> list[tuple[Tensor, Tensor]]:
    """U diag(c) and Vh in the gradient's dtype."""
    pairs = zip(t.grads, t.factors, t.coefficients, strict=True)
    return [((f.U * c).to(grad.dtype), f.Vh.to(grad.dtype)) for grad, f, c in pairs]


def _scaled_bytes(case: PenaltyCase) -> int:
    """Memory of `_scaled_factors`: Vh in fp32 is there anyway."""
    rounded = case.dtype != torch.float32
    return RANK * case.dtype.itemsize * sum(m + (n if rounded else 0) for m, n in case.shapes)


def _factor_reads(case: PenaltyCase) -> int:
    return RANK * case.dtype.itemsize * sum(m + n for m, n in case.shapes)


def _addmm(t: PenaltyTensors) -> Run:
    factors = _scaled_factors(t)

    def run() -> None:
        for grad, (scaled, Vh) in zip(t.grads, factors, strict=True):
            grad.addmm_(scaled, Vh)

    return run


def _add_product(t: PenaltyTensors) -> Run:
    factors = _scaled_factors(t)

    def run() -> None:
        for grad, (scaled, Vh) in zip(t.grads, factors, strict=True):
            grad.add_(scaled @ Vh)

    return run


def _foreach_add(t: PenaltyTensors) -> Run:
    pairs = zip(t.grads, t.factors, t.coefficients, strict=True)
    dense = [((f.U * c) @ f.Vh).to(grad.dtype) for grad, f, c in pairs]
    return lambda: torch._foreach_add_(t.grads, dense)


def _dtype_name(case: PenaltyCase) -> str:
    return str(case.dtype).removeprefix("torch.")


PENALTY_PEERS = [
    PenaltyPeer(
        "grad.addmm_(U c, Vh)",
        _addmm,
        lambda case: f"layer by layer, {_dtype_name(case)} factors",
        lambda case: 2 * case.grad_bytes + _factor_reads(case),
        _scaled_bytes,
    ),
    PenaltyPeer(
        "grad.add_(U c @ Vh)",
        _add_product,
        lambda case: f"layer by layer, {_dtype_name(case)} factors and product",
        lambda case: 4 * case.grad_bytes + _factor_reads(case),
        lambda case: _scaled_bytes(case) + case.largest * case.dtype.itemsize,
    ),
    PenaltyPeer(
        "_foreach_add_ of dense G",
        _foreach_add,
        lambda case: f"G kept in {_dtype_name(case)}, as in the paper",
        lambda case: 3 * case.grad_bytes,
        lambda case: case.grad_bytes,
    ),
]
