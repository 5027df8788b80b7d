"""`pcdr`: which components of which layers carry the largest activation, by bounds where they decide, else exactly.

    PCDR_k(i, j) = sum_{r<=k} |s_r u_ir (v_r . x_j)| / sum_r |s_r u_ir (v_r . x_j)|        (eq. 2, no bias)

The denominator runs over all components, of which only the b leading ones are computed. Their tail is bounded from
both sides (spec, section 2); a layer on which the bounds disagree about the threshold is settled exactly from the
eigenvectors of its smaller Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.svd import NON_FINITE, OVERFLOW, TopkSVD

# Components with a larger residual / s_1 are not used in the bounds, and the bounds are widened by at least as much:
# with both there were no wrong decisions where unwidened ones were violated by up to 0.20 (spec, section 2).
USABLE_RESIDUAL = 1e-2
WIDENING = 1e-2


class PCDR(NamedTuple):
    """Decision about one layer.

    Attributes:
        k_target: components to penalize, 0 for a healthy layer.
        route: what decided: "bounds", "exact", or "non-finite" (weight or input holds NaN or Inf; k_target 0).
        lower, upper: bounds on PCDR_1..k_max; equal where the exact route was taken.
        activation: |W x| of the neuron, recomputed in fp32 from the weight.
        neuron: its output index.
    """

    k_target: int
    route: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    activation: float
    neuron: int


@torch.no_grad()
def pcdr(
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    neurons: Sequence[Tensor | int],
    factors: Sequence[TopkSVD] | None = None,
    *,
    threshold: float = 0.95,
    k_max: int = 3,
    impl: str | None = None,
) -> list[PCDR]:
    """Decide for each layer how many leading components dominate its largest activation (section 4.2).

    Args:
        weights: list of `[m, n]` floating tensors on one device.
        inputs: per layer the input row `[n]` that made the largest |W x| of the batch.
        neurons: per layer the output index of it.
        factors: per layer a `TopkSVD` of the weight. Without, every layer is settled exactly.
        threshold: tau in (0, 1].
        k_max: most components considered; clamped per layer to min(m, n).
        impl: "reference" (full SVD, always exact), "torch", or None to choose.

    Returns:
        One `PCDR` per layer. k_target is the smallest k with PCDR_k >= threshold.

    Raises:
        TypeError: an element is no dense floating tensor.
        ValueError: lists of different lengths, an input of another length than n, a neuron outside 0..m-1, a
            threshold outside (0, 1], k_max < 1.

    Accuracy: the bounds are rigorous for exact singular vectors and estimates for computed ones, hence widened by
        max(0.01, residual/s_1), and a component in a cluster (gap below 4 residual/s_1) goes the exact way, which
        is computed in fp64.
    Cost: one product W x a layer; the exact route one Gram matrix and its `eigh`.
    """
    weights = ops.check_tensor_list("weights", weights, ndim=2)
    inputs = ops.check_tensor_list("inputs", inputs, ndim=1)
    ops.check_same_length(weights=weights, inputs=inputs, neurons=neurons)
    if factors is not None:
        ops.check_same_length(weights=weights, factors=factors)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in (0, 1]")
    k_max = ops.check_integer("k_max", k_max, low=1)
    indices: list[Tensor] = []
    finite: list[int] = []
    for index, (weight, x) in enumerate(zip(weights, inputs, strict=True)):
        if x.shape[0] != weight.shape[1]:
            raise ValueError(f"inputs[{index}] has {x.shape[0]} elements, weights[{index}] is {tuple(weight.shape)}")
        neuron = neurons[index]
        if isinstance(neuron, Tensor) and not neuron.is_floating_point() and neuron.numel() == 1:
            neuron = int(neuron)
        neuron = ops.check_integer(f"neurons[{index}]", neuron, low=-(2**63))
        if not 0 <= neuron < weight.shape[0]:
            raise ValueError(f"neurons[{index}]={neuron} must lie in 0..{weight.shape[0] - 1}")
        indices.append(torch.tensor(neuron, device=weight.device))
        if factors is not None:
            _check_factors(index, weight, factors[index])
        bad = factors is not None and int(factors[index].status) in (NON_FINITE, OVERFLOW)
        if not bad and bool(x.isfinite().all()) and (factors is not None or bool(weight.isfinite().all())):
            finite.append(index)

    results: list[PCDR | None] = [None] * len(weights)
    undecided = finite
    if factors is not None and impl != "reference" and finite:
        bases = [factors[i].basis for i in finite]
        bounds = torch.ops.s2d.pcdr_bounds(
            [weights[i] for i in finite],
            [inputs[i] for i in finite],
            [indices[i] for i in finite],
            [basis.U for basis in bases],
            [basis.S for basis in bases],
            [basis.Vh for basis in bases],
            [basis.residual for basis in bases],
            k_max,
            impl,
        ).tolist()
        undecided = []
        for index, (lower, upper) in zip(finite, bounds, strict=True):
            k_target = _decide(lower, upper, threshold)
            if k_target is None:
                undecided.append(index)
            else:
                results[index] = _result(
                    weights[index], inputs[index], indices[index], k_target, "bounds", lower, upper
                )
    if undecided:
        ratios = torch.ops.s2d.pcdr_exact(
            [weights[i] for i in undecided],
            [inputs[i] for i in undecided],
            [indices[i] for i in undecided],
            k_max,
            impl,
        )
        for index, row in zip(undecided, ratios, strict=True):
            k_target, values = reference.select_rank(row, threshold), row.tolist()
            results[index] = _result(weights[index], inputs[index], indices[index], k_target, "exact", values, values)
    nothing = (float("nan"),) * k_max
    return [
        PCDR(0, "non-finite", nothing, nothing, float("nan"), int(indices[i])) if result is None else result
        for i, result in enumerate(results)
    ]


def _check_factors(index: int, weight: Tensor, factor: object) -> None:
    if not isinstance(factor, TopkSVD):
        raise TypeError(f"factors[{index}] must be a TopkSVD, got {type(factor).__name__}")
    basis, (m, n) = factor.basis, weight.shape
    b = basis.S.shape[0]
    if basis.U.shape != (m, b) or basis.Vh.shape != (b, n):
        raise ValueError(
            f"factors[{index}] has a basis of U {tuple(basis.U.shape)} and Vh {tuple(basis.Vh.shape)}, which do not "
            f"fit weights[{index}] of shape {tuple(weight.shape)}"
        )


def _result(
    weight: Tensor, x: Tensor, neuron: Tensor, k_target: int, route: str, lower: list[float], upper: list[float]
) -> PCDR:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with ops.exact_arithmetic(weight.device):
        activation = float((weight[int(neuron)].to(dtype) @ x.to(dtype)).abs())
    return PCDR(k_target, route, tuple(lower), tuple(upper), activation, int(neuron))


def _decide(lower: list[float], upper: list[float], threshold: float) -> int | None:
    """Smallest k that surely reaches the threshold while all before it surely do not; None if the bounds can't tell."""
    for k, (low, high) in enumerate(zip(lower, upper, strict=True), start=1):
        if low >= threshold:
            return k
        if high >= threshold:
            return None
    return 0


@ops.implements("pcdr_bounds", "torch")
def _bounds_torch(
    weights: list[Tensor],
    inputs: list[Tensor],
    neurons: list[Tensor],
    Us: list[Tensor],
    Ss: list[Tensor],
    Vhs: list[Tensor],
    residuals: list[Tensor],
    k_max: int,
) -> Tensor:
    layers = zip(weights, inputs, neurons, Us, Ss, Vhs, residuals, strict=True)
    return torch.stack([_bounds_of_layer(*layer, k_max=k_max) for layer in layers])


def _bounds_of_layer(
    weight: Tensor, x: Tensor, neuron: Tensor, U: Tensor, S: Tensor, Vh: Tensor, residual: Tensor, *, k_max: int
) -> Tensor:
    """Lower and upper bounds `[2, k_max]` in fp64; (0, 1) where the factors do not allow a statement."""
    W, x = weight.to(S.dtype), x.to(S.dtype)
    relative = residual / S[0].clamp(min=torch.finfo(S.dtype).tiny)
    usable = (relative <= USABLE_RESIDUAL).to(S.dtype).cumprod(0)  # the leading run of converged components
    U, Vh, S_used = U * usable, Vh * usable.unsqueeze(1), S * usable

    row, y = W.index_select(0, neuron.reshape(1)).squeeze(0), W @ x
    u, projection = U.index_select(0, neuron.reshape(1)).squeeze(0), Vh @ x
    terms = S_used * u * projection
    # Cauchy-Schwarz on the tail, once over the input side and once over the output side; `tail` is its signed sum.
    tail = (y.index_select(0, neuron.reshape(1)).squeeze(0) - terms.sum()).abs()
    input_side = torch.linalg.vector_norm(row - (u * S_used) @ Vh) * torch.linalg.vector_norm(x - projection @ Vh)
    output_side = (1 - u.square().sum()).clamp(min=0).sqrt() * torch.linalg.vector_norm(y - U @ (S_used * projection))
    P = terms.abs().sum().double()
    T = terms.abs().double().cumsum(0)

    b, d = S.shape[0], min(weight.shape)
    width = torch.maximum(relative * usable, torch.full_like(relative, WIDENING)).amax().double()
    nonzero = (P + tail) > 0  # an activation of exactly 0 is dominated by nothing
    lower = torch.where(nonzero, T / (P + torch.minimum(input_side, output_side)) - width, 0.0).clamp(0, 1)
    upper = torch.where(nonzero, T / (P + tail) + width, 0.0).clamp(0, 1)
    # Cutting inside a cluster means nothing: the gap behind k must exceed what the residual can hide.
    following = torch.cat([S[1:], S.new_zeros(1)])
    gap = (S - following) / S.clamp(min=torch.finfo(S.dtype).tiny)
    clear = (usable > 0) & (gap >= 4 * relative.cummax(0).values)
    if b < d:
        clear[-1] = False  # what follows the last computed component is not known
    lower, upper = torch.where(clear, lower, 0.0)[:k_max], torch.where(clear, upper, 1.0)[:k_max]
    if b < k_max:  # min(m, n) < k_max: further components add nothing
        lower, upper = (torch.cat([t, t[-1:].expand(k_max - b)]) for t in (lower, upper))
    return torch.stack([lower, upper])


@ops.implements("pcdr_exact", "torch")
def _exact_torch(weights: list[Tensor], inputs: list[Tensor], neurons: list[Tensor], k_max: int) -> Tensor:
    return torch.stack([_exact_of_layer(*layer, k_max) for layer in zip(weights, inputs, neurons, strict=True)])


def _exact_of_layer(weight: Tensor, x: Tensor, neuron: Tensor, k_max: int) -> Tensor:
    """PCDR_1..k_max `[k_max]` in fp64 from the eigenvectors of the smaller Gram matrix; singular values cancel out.

    In fp64 because the Gram matrix squares the condition: behind a component 50 times larger an fp32 one loses the
    tail, and PCDR with it (5e-5 seen).
    """
    W, x = weight.double(), x.double()
    W = W / torch.linalg.vector_norm(W, ord=float("inf")).clamp(min=torch.finfo(W.dtype).tiny)
    x = x / torch.linalg.vector_norm(x, ord=float("inf")).clamp(min=torch.finfo(x.dtype).tiny)
    row = W.index_select(0, neuron.reshape(1)).squeeze(0)
    m, n = W.shape
    if n <= m:
        V = torch.linalg.eigh(W.mT @ W).eigenvectors.flip(1)
        terms = (row @ V) * (x @ V)  # s_r u_ir (v_r . x) = (W_i . v_r) (v_r . x)
    else:
        U = torch.linalg.eigh(W @ W.mT).eigenvectors.flip(1)
        terms = U.index_select(0, neuron.reshape(1)).squeeze(0) * ((W @ x) @ U)  # = u_ir (u_r . y)
    return _ratios(terms, k_max)


def _ratios(terms: Tensor, k_max: int) -> Tensor:
    terms = terms.abs()
    ratios = terms.cumsum(0) / terms.sum().clamp(min=torch.finfo(torch.float64).tiny)
    ratios = ratios[:k_max]
    return torch.cat([ratios, ratios[-1:].expand(k_max - len(ratios))])


@ops.implements("pcdr_exact", "reference")
def _exact_reference(weights: list[Tensor], inputs: list[Tensor], neurons: list[Tensor], k_max: int) -> Tensor:
    rows = []
    for weight, x, neuron in zip(weights, inputs, neurons, strict=True):
        ratios = reference.pcdr(weight.double(), x.double(), int(neuron), min(k_max, *weight.shape))
        rows.append(torch.cat([ratios, ratios[-1:].expand(k_max - len(ratios))]))
    return torch.stack(rows)
