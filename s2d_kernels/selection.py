"""`pcdr`: which components of which layers carry the largest activation, by bounds where they decide, else exactly.

    PCDR_k(i, j) = sum_{r<=k} |s_r u_ir (v_r . x_j)| / sum_r |s_r u_ir (v_r . x_j)|        (eq. 2, no bias)

The denominator runs over all components, of which only the b leading ones are computed. Their tail is bounded from
both sides (spec, section 2); a layer on which the bounds disagree about the threshold is settled exactly from the
eigenvectors of its smaller Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.svd import NON_FINITE, OVERFLOW, TopkSVD

# Components with a larger residual / s_1 are not used in the bounds, and the bounds are widened by at least as much:
# with both there were no wrong decisions where unwidened ones were violated by up to 0.20 (spec, section 2).
USABLE_RESIDUAL = 1e-2
WIDENING = 1e-2
# The exact route in fp32 stands where it is further than this from the threshold, 4 times the largest error seen, plus
# what near-ties at the boundary can hide.
FP32_ERROR = 1e-3
MIXING = 16.0
# Rounding of the Gram matrix must be this much smaller than the median of its eigenvalues.
TAIL_RESOLUTION = 1e3
# Components this many times larger than the eighth are taken away in fp64 before.
STICKING_OUT, BLOCK = 2.0, 8
# Below it an eigen-decomposition in fp64 costs no more.
SMALLEST_IN_FP32 = 64


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
        TypeError: an element is no dense floating tensor, the threshold no number.
        ValueError: lists of different lengths, an empty weight, an input of another length than n, a neuron outside
            0..m-1, a threshold outside (0, 1], k_max < 1.

    Accuracy: the bounds are rigorous for exact singular vectors and estimates for computed ones, hence widened by
        max(0.01, residual/s_1), and a component in a cluster (gap below 4 residual/s_1) goes the exact way, which
        is computed in fp32 after what sticks out was taken away in fp64, to 3e-4, and in fp64 where that is not clear
        about the threshold. It squares the weight: a cluster below 1e-4 s_1 that carries the activation alone comes out
        to about a hundredth.
    Cost: one product W x a layer; the exact route one Gram matrix and its `eigh`, a fifth of an fp64 SVD on a CPU.
    Streams: the decisions by bounds need no synchronization, see `pcdr_begin`; this function waits for them.
    """
    return pcdr_begin(weights, inputs, neurons, factors, threshold=threshold, k_max=k_max, impl=impl).result()


class PendingPCDR:
    """Decisions of `pcdr` on their way to the host.

    Attributes:
        k_target: int32 `[layers]` on the weights' device, ready for work on the stream that `pcdr_begin` was called on:
            what the bounds decide, 0 for a layer that is not finite, -1 for one that they leave undecided.
    """

    def __init__(self, k_target: Tensor, table: Tensor, settle: Callable[[list[list[float]]], list[PCDR]]) -> None:
        self.k_target = k_target
        self._settle = settle
        self._event: torch.cuda.Event | None = None
        self._table = table
        if table.device.type == "cuda":
            self._table = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._event = torch.cuda.current_stream(table.device).record_event()

    def done(self) -> bool:
        """Whether the bounds' decisions have reached the host, so that `result` need not wait for them."""
        return self._event is None or self._event.query()

    def result(self) -> list[PCDR]:
        """One `PCDR` per layer; the undecided ones, and only those, are settled exactly here."""
        if self._event is not None:
            self._event.synchronize()
        return self._settle(self._table.tolist())


@torch.no_grad()
def pcdr_begin(
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    neurons: Sequence[Tensor | int],
    factors: Sequence[TopkSVD] | None = None,
    *,
    threshold: float = 0.95,
    k_max: int = 3,
    impl: str | None = None,
) -> PendingPCDR:
    """`pcdr` without waiting for the device: the decisions by bounds are made on it, and one copy brings them over.

    Arguments and errors as there, except that a neuron given as a tensor on a GPU is looked at by `result`.
    """
    weights = ops.check_tensor_list("weights", weights, ndim=2)
    inputs = ops.check_tensor_list("inputs", inputs, ndim=1)
    ops.check_same_length(weights=weights, inputs=inputs, neurons=neurons)
    if factors is not None:
        ops.check_same_length(weights=weights, factors=factors)
    threshold = ops.check_number("threshold", threshold)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in (0, 1]")
    k_max = ops.check_integer("k_max", k_max, low=1)
    if not weights:
        empty = torch.zeros(0, dtype=torch.int32, device="cpu")
        return PendingPCDR(empty, empty, lambda _: [])
    on_device: dict[int, Tensor] = {}
    on_host: dict[int, int] = {}
    usable = []
    for index, (weight, x, neuron) in enumerate(zip(weights, inputs, neurons, strict=True)):
        if weight.numel() == 0:
            raise ValueError(f"weights[{index}] is empty, shape {tuple(weight.shape)}: leave it out of the list")
        if x.shape[0] != weight.shape[1]:
            raise ValueError(f"inputs[{index}] has {x.shape[0]} elements, weights[{index}] is {tuple(weight.shape)}")
        number = isinstance(neuron, Tensor) and not neuron.is_floating_point() and neuron.numel() == 1
        if isinstance(neuron, Tensor) and number and neuron.device.type != "cpu":
            on_device[index] = neuron.to(weight.device, torch.int64).reshape(())
        else:
            on_host[index] = _check_neuron(index, int(neuron) if number else neuron, len(weight))
        if factors is not None:
            _check_factors(index, weight, factors[index])
            status = factors[index].status.to(weight.device)
            usable.append((status != NON_FINITE) & (status != OVERFLOW) & x.isfinite().all())
        else:
            usable.append(x.isfinite().all() & weight.isfinite().all())
    finite = torch.stack(usable)
    # One copy, and none that waits for the device as that of each number would.
    device = weights[0].device
    on_device |= zip(on_host, ops.on_device(list(on_host.values()), torch.int64, device).unbind(), strict=True)
    indices = [on_device[index] for index in range(len(weights))]
    # An index that result() will refuse must not be read with.
    inside = [i.clamp(0, len(weight) - 1) for i, weight in zip(indices, weights, strict=True)]
    if factors is not None and impl != "reference":
        bases = [factor.basis for factor in factors]
        bounds = torch.ops.s2d.pcdr_bounds(
            weights,
            inputs,
            inside,
            [basis.U for basis in bases],
            [basis.S for basis in bases],
            [basis.Vh for basis in bases],
            [basis.residual for basis in bases],
            k_max,
            impl,
        )
    else:
        bounds = torch.zeros(len(weights), 2, k_max, dtype=torch.float64, device=weights[0].device)
        bounds[:, 1] = 1.0
    k_target = torch.where(finite, _decided(bounds, threshold), 0)
    with ops.exact_arithmetic(weights[0].device):
        peaks = torch.stack([_activation(*layer) for layer in zip(weights, inside, inputs, strict=True)])
    heads = [k_target.double(), finite.double(), peaks.double(), torch.stack(indices).double()]
    table = torch.cat([torch.stack(heads, 1), bounds.flatten(1)], 1)

    def settle(rows: list[list[float]]) -> list[PCDR]:
        for index, row in enumerate(rows):
            _check_neuron(index, int(row[3]), len(weights[index]))
        undecided = [index for index, row in enumerate(rows) if row[1] and row[0] < 0]
        exact: dict[int, Tensor] = {}
        if undecided:
            lists = [[column[i] for i in undecided] for column in (weights, inputs, inside)]
            ratios = torch.ops.s2d.pcdr_exact(*lists, k_max, threshold, impl).cpu()
            exact = dict(zip(undecided, ratios, strict=True))
        results = []
        for index, (k, known, peak, neuron, *pairs) in enumerate(rows):
            if not known:
                nothing = (float("nan"),) * k_max
                results.append(PCDR(0, "non-finite", nothing, nothing, float("nan"), int(neuron)))
            elif index in exact:
                values = tuple(exact[index].tolist())
                k_target = reference.select_rank(exact[index], threshold)
                results.append(PCDR(k_target, "exact", values, values, peak, int(neuron)))
            else:
                results.append(PCDR(int(k), "bounds", tuple(pairs[:k_max]), tuple(pairs[k_max:]), peak, int(neuron)))
        return results

    return PendingPCDR(k_target, table, settle)


def _check_neuron(index: int, neuron: object, rows: int) -> int:
    neuron = ops.check_integer(f"neurons[{index}]", neuron, low=-(2**63))
    if not 0 <= neuron < rows:
        raise ValueError(f"neurons[{index}]={neuron} must lie in 0..{rows - 1}")
    return neuron


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


def _activation(weight: Tensor, neuron: Tensor, x: Tensor) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight.index_select(0, neuron.reshape(1)).squeeze(0).to(dtype) @ x.to(dtype)).abs().double()


def _decided(bounds: Tensor, threshold: float) -> Tensor:
    """int32 `[layers]` from `bounds [layers, 2, k_max]`, on their device.

    The smallest k that surely reaches the threshold while all before it surely do not; 0 if surely none does; -1 if the
    bounds cannot tell.
    """
    may = bounds[:, 1] >= threshold
    first = may.to(torch.int32).argmax(1, keepdim=True)
    surely = bounds[:, 0].gather(1, first).squeeze(1) >= threshold
    k = torch.where(surely, first.squeeze(1) + 1, -1)
    return torch.where(may.any(1), k, 0).to(torch.int32)


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
    W, x = weight.to(S.dtype), _scaled(x.to(S.dtype))
    relative = residual / S[0].clamp(min=torch.finfo(S.dtype).tiny)
    usable = (relative <= USABLE_RESIDUAL).to(S.dtype).cumprod(0)  # the leading run of converged components
    # In units of a power of two near s_1: squares would leave the range. W x takes half of it before the product.
    exponent = torch.frexp(S[0]).exponent
    half = exponent // 2
    row = torch.ldexp(W.index_select(0, neuron.reshape(1)).squeeze(0), -exponent)
    y = torch.ldexp(W @ torch.ldexp(x, -half), half - exponent)
    S = torch.ldexp(S, -exponent)
    U, Vh, S_used = U * usable, Vh * usable.unsqueeze(1), S * usable

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
        # What follows the last computed component is not known. Not [-1], which would wait for a GPU.
        clear[-1:] = False
    clear &= lower <= upper  # not so where one is NaN
    lower, upper = torch.where(clear, lower, 0.0)[:k_max], torch.where(clear, upper, 1.0)[:k_max]
    if b < k_max:  # min(m, n) < k_max: further components add nothing
        lower, upper = (torch.cat([t, t[-1:].expand(k_max - b)]) for t in (lower, upper))
    return torch.stack([lower, upper])


@ops.implements("pcdr_exact", "torch")
def _exact_torch(
    weights: list[Tensor], inputs: list[Tensor], neurons: list[Tensor], k_max: int, threshold: float | None
) -> Tensor:
    layers = zip(weights, inputs, neurons, strict=True)
    return torch.stack([_exact_of_layer(*layer, k_max, threshold) for layer in layers])


def _exact_of_layer(weight: Tensor, x: Tensor, neuron: Tensor, k_max: int, threshold: float | None) -> Tensor:
    """PCDR_1..k_max `[k_max]` in fp64 from the eigenvectors of the smaller Gram matrix; singular values cancel out.

    With a threshold in fp32 first, at half the cost, which stands where it is clear about the threshold.
    """
    fast = threshold is not None and min(weight.shape) >= SMALLEST_IN_FP32 and weight.dtype != torch.float64
    fast = fast and not ops.fp32_is_reduced(weight.device)
    for dtype in (torch.float32, torch.float64) if fast else (torch.float64,):
        W, row = _scaled(weight.to(dtype)), x.double()
        row = _scaled(row)
        if W.shape[1] <= W.shape[0]:
            A, p, q = W, W.index_select(0, neuron.reshape(1)).squeeze(0).double(), row
        else:
            p = torch.zeros(len(W), dtype=torch.float64, device=W.device).index_fill(0, neuron.reshape(1), 1.0)
            A, q = W.mT, (W @ row.to(dtype)).double()
        # s_r u_ir (v_r . x) = (W_i . v_r)(v_r . x) = u_ir (u_r . y): with v_r on the smaller side (p . v_r)(v_r . q).
        if dtype == torch.float64:
            break
        ratios, error = _in_fp32(A, p, q, k_max)
        if bool(((ratios - threshold).abs() > error).all()):  # type: ignore[operator]
            return ratios
    vectors = torch.linalg.eigh(_lower_gram(A)).eigenvectors.flip(1)
    return _ratios((p @ vectors) * (q @ vectors), k_max)


def _scaled(tensor: Tensor) -> Tensor:
    """`tensor` times a power of two that brings its largest element near 1."""
    low, high = torch.aminmax(tensor)
    largest = torch.maximum(-low, high).clamp(min=torch.finfo(tensor.dtype).tiny)
    return torch.ldexp(tensor, -torch.frexp(largest).exponent)


def _in_fp32(A: Tensor, p: Tensor, q: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """PCDR_1..k_max in fp64 from an fp32 eigen-decomposition, and how far off each may be.

    A Gram matrix squares the condition: fp32 rounding moves it by delta = eps * s_1^2, and component r mixes with s by
    delta / (s_r^2 - s_s^2): behind a component 20 times larger than the rest, PCDR is off by 7e-3. So the components
    that stick out are found and taken away in fp64 first. What is left mixes at the boundary behind each k by an angle
    that is computed, and within the tail by little that averages out, as long as delta is small beside its median.
    """
    leading = _leading(A)
    left, right = [p @ leading], [q @ leading]
    p, q = p - leading @ left[0], q - leading @ right[0]
    j, d = leading.shape[1], A.shape[1]
    tail = A if j == 0 else (A.double() - (A.double() @ leading) @ leading.mT).float()
    values, vectors = torch.linalg.eigh(_lower_gram(tail))
    squares, vectors = values.flip(0)[: d - j].double(), vectors.flip(1)[:, : d - j]
    left.append((p.float() @ vectors).double())
    right.append((q.float() @ vectors).double())
    a, b = torch.cat(left), torch.cat(right)
    terms = (a * b).abs()
    tiny = torch.finfo(torch.float64).tiny
    delta = torch.finfo(torch.float32).eps * squares[0]
    places = torch.arange(min(k_max, d - 1), device=A.device)
    inner = (places - j).clamp(min=0)  # the boundary behind a component taken away in fp64 is sharp
    gaps = (squares[inner] - squares[inner + 1]).clamp(min=tiny)
    mixed = (a[places] * b[places + 1]).abs() + (a[places + 1] * b[places]).abs()
    boundary = torch.where(places < j, 0.0, MIXING * delta / gaps * mixed / terms.sum().clamp(min=tiny))
    boundary = boundary.cummax(0).values  # what two have mixed, the sum of their magnitudes has not forgotten
    boundary = torch.cat([boundary, boundary[-1:].expand(k_max - len(boundary))])
    resolved = delta * TAIL_RESOLUTION < squares[(d - j) // 2]
    return _ratios(terms, k_max), torch.where(resolved, boundary + FP32_ERROR, torch.inf)


def _leading(A: Tensor) -> Tensor:
    """The right singular vectors `[d, j]` of the components of `A [M, d]` (fp32) that stick out, j >= 0, in fp64.

    Subspace iteration finds those that are `STICKING_OUT` times the block's last one within a few steps; the others
    need not be found.
    """
    d = A.shape[1]
    generator = torch.Generator("cpu").manual_seed(0)
    Q = torch.randn(d, BLOCK, generator=generator, dtype=A.dtype, device="cpu").to(A.device)
    for step in range(6):
        Q, R = torch.linalg.qr(A.mT @ (A @ Q))
        if step == 1 and float(R[0, 0].abs()) < STICKING_OUT**2 * float(R[-1, -1].abs()):
            return torch.zeros(d, 0, dtype=torch.float64, device=A.device)
    V, A = Q.double(), A.double()
    for _ in range(2):
        V = torch.linalg.qr(A.mT @ (A @ V)).Q
    Y = A @ V
    squares, rotation = torch.linalg.eigh(Y.mT @ Y)
    V, Y, S = V @ rotation.flip(1), Y @ rotation.flip(1), squares.flip(0).clamp(min=0).sqrt()
    residual = torch.linalg.vector_norm(A.mT @ Y - V * S.square(), dim=0) / S.clamp(min=torch.finfo(S.dtype).tiny)
    found = (residual <= 1e-4 * S[-1]) & (S > STICKING_OUT * S[-1])
    return V[:, : int(found.long().cumprod(0).sum())]


def _lower_gram(A: Tensor) -> Tensor:
    """The lower triangle of A^T A, in blocks, with whatever above it: `eigh` reads no more."""
    n = A.shape[1]
    block = max(64, -(-n // 4))
    if n <= block:
        return A.mT @ A
    gram = A.new_zeros(n, n)
    for first in range(0, n, block):
        last = min(first + block, n)
        gram[first:last, :last] = A[:, first:last].mT @ A[:, :last]
    return gram


def _ratios(terms: Tensor, k_max: int) -> Tensor:
    terms = terms.abs()
    ratios = terms.cumsum(0) / terms.sum().clamp(min=torch.finfo(torch.float64).tiny)
    ratios = ratios[:k_max]
    return torch.cat([ratios, ratios[-1:].expand(k_max - len(ratios))])


@ops.implements("pcdr_exact", "reference")
def _exact_reference(
    weights: list[Tensor], inputs: list[Tensor], neurons: list[Tensor], k_max: int, _threshold: float | None
) -> Tensor:
    rows = []
    for weight, x, neuron in zip(weights, inputs, neurons, strict=True):
        ratios = reference.pcdr(weight.double(), x.double(), int(neuron), min(k_max, *weight.shape))
        rows.append(torch.cat([ratios, ratios[-1:].expand(k_max - len(ratios))]))
    return torch.stack(rows)
