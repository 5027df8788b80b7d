"""What `topk_svd` is measured against, each at its best setting, all with the same threads.

A peer's `prepare` does what a user would do once, outside the clock, and returns the function that is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import RANK, SVDCase, gram_triplets
from s2d_kernels.reference import SVDTriplets
from s2d_kernels.svd import COLD_READS, WARM_READS, cold_width, topk_svd, warm_width

Triplets = Sequence[SVDTriplets]
Run = Callable[[], Triplets]
# Stacked matrices `[B, m, n]` and their positions in the case.
Blocks = Sequence[tuple[Tensor, Sequence[int]]]


@dataclass(frozen=True)
class SVDPeer:
    """One way to get the triplets of a case.

    Attributes:
        prepare: (case, width, effort) -> the function to time.
        grid: settings to search, per width the efforts from least to most work; empty: there is nothing to set.
        describe: (width, effort) -> the row's text.
        reads: (effort) -> passes over each matrix, where that number is fixed.
        variant: "warm" when it starts from factors of earlier weights.
        slow: measured once, with the call that also gives its error.
        needs: module that must be installed.
        cpu_only: works on host memory.
    """

    name: str
    prepare: Callable[[SVDCase, int, float], Run]
    describe: Callable[[int, float], str]
    grid: dict[int, Sequence[float]] = field(default_factory=dict)
    reads: Callable[[float], int | None] = lambda _: None
    variant: str = "cold"
    slow: bool = False
    needs: str | None = None
    cpu_only: bool = False

    def usable(self, device: torch.device) -> bool:
        """Whether it is installed and runs on `device`."""
        installed = self.needs is None or importlib.util.find_spec(self.needs) is not None
        return installed and (device.type == "cpu" or not self.cpu_only)


def _first(U: Tensor, S: Tensor, Vh: Tensor) -> SVDTriplets:
    return SVDTriplets(U[:, :RANK], S[:RANK], Vh[:RANK])


def _spread(count: int, blocks: Blocks, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Triplets:
    """Results of blocks of matrices in the order of the case's matrices."""
    found: dict[int, SVDTriplets] = {}
    for (_, members), (U, S, Vh) in zip(blocks, factors, strict=True):
        found.update({index: _first(U[place], S[place], Vh[place]) for place, index in enumerate(members)})
    return [found[index] for index in range(count)]


def _from_numpy(U: Any, S: Any, Vh: Any) -> SVDTriplets:
    return SVDTriplets(*(torch.from_numpy(a) for a in (U, S, Vh)))


# --- ours ---------------------------------------------------------------------------------------------------------


def _ours_cold(case: SVDCase, _width: int, _effort: float, impl: str | None = None) -> Run:
    return lambda: [_first(r.U, r.S, r.Vh) for r in topk_svd(case.weights, k=RANK, seed=3, impl=impl)]


def _ours_warm(case: SVDCase, _width: int, _effort: float, impl: str | None = None) -> Run:
    previous = case.previous
    return lambda: [_first(r.U, r.S, r.Vh) for r in topk_svd(case.weights, k=RANK, warm=previous, seed=3, impl=impl)]


# --- torch.linalg.svd, torch.svd_lowrank, Gram + eigh --------------------------------------------------------------


def _full_svd(case: SVDCase, _width: int, _effort: float) -> Run:
    return lambda: [_first(*torch.linalg.svd(W, full_matrices=False)) for W in case.single]


def _svd_lowrank(case: SVDCase, width: int, effort: float) -> Run:
    def run() -> Triplets:
        torch.manual_seed(3)
        factors = (torch.svd_lowrank(W, q=width, niter=int(effort)) for W in case.single)
        return [_first(U, S, V.mT) for U, S, V in factors]

    return run


def _svd_lowrank_batched(case: SVDCase, width: int, effort: float) -> Run:
    def run() -> Triplets:
        torch.manual_seed(3)
        factors = (torch.svd_lowrank(stack, q=width, niter=int(effort)) for stack, _ in case.buckets)
        return _spread(len(case.single), case.buckets, [(U, S, V.mT) for U, S, V in factors])

    return run


def _gram_eigh(case: SVDCase, _width: int, _effort: float) -> Run:
    return lambda: [gram_triplets(W, RANK) for W in case.single]


def _gram_eigh_subset(case: SVDCase, _width: int, _effort: float) -> Run:
    """LAPACK's `syevr` for the leading pairs alone, which torch does not offer."""
    eigh = importlib.import_module("scipy.linalg").eigh

    matrices = [W.numpy() for W in case.single]

    def one(W: Any) -> SVDTriplets:
        # All in numpy: torch's threads and those of numpy's BLAS would wait for each other.
        A = W if W.shape[0] >= W.shape[1] else W.T
        d = A.shape[1]
        V = eigh(A.T @ A, subset_by_index=[d - RANK, d - 1], overwrite_a=True, check_finite=False)[1][:, ::-1]
        Y = A @ V
        S = (Y * Y).sum(0) ** 0.5
        return _from_numpy(Y / S, S, V.T.copy()) if A is W else _from_numpy(V.copy(), S, (Y / S).T)

    return lambda: [one(W) for W in matrices]


# --- numpy and scipy ----------------------------------------------------------------------------------------------


def _randomized_svd(case: SVDCase, width: int, effort: float) -> Run:
    function = importlib.import_module("sklearn.utils.extmath").randomized_svd
    matrices = [W.numpy() for W in case.single]

    def run() -> Triplets:
        found = (
            function(A, RANK, n_oversamples=width - RANK, n_iter=int(effort), flip_sign=False, random_state=3)
            for A in matrices
        )
        return [_from_numpy(*f) for f in found]

    return run


def _svds(case: SVDCase, width: int, effort: float) -> Run:
    """ARPACK's restarted Lanczos: one vector at a time, a matrix that fits the cache is read from there."""
    function = importlib.import_module("scipy.sparse.linalg").svds
    matrices = [W.numpy() for W in case.single]
    starts = [torch.randn(min(W.shape), generator=torch.Generator().manual_seed(3)).numpy() for W in case.single]

    def run() -> Triplets:
        found = (function(A, k=RANK, ncv=width, tol=effort, v0=v0) for A, v0 in zip(matrices, starts, strict=True))
        return [_from_numpy(U[:, ::-1].copy(), S[::-1].copy(), Vh[::-1].copy()) for U, S, Vh in found]

    return run


# --- the strong baseline: subspace iteration + CholeskyQR + eigh, per shape bucket --------------------------------


def _cholesky_qr(Z: Tensor) -> Tensor:
    """Orthonormal columns of `Z [B, d, b]`.

    Columns are scaled to length one and the b x b Gram matrix and its factor are in fp64: in fp32 it breaks once
    sigma_1/sigma_b > 64.
    """
    Z = Z / torch.linalg.vector_norm(Z, dim=1, keepdim=True)
    wide = Z.double()
    gram = wide.mT @ wide
    factor = torch.linalg.cholesky_ex(gram + 1e-14 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=Z.device)).L
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(gram.shape[-1], dtype=gram.dtype, device=Z.device).expand_as(gram), upper=False
    )
    return Z @ inverse.mT.to(Z.dtype)


def subspace_iteration(A: Tensor, Q: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh with all b triplets of `A [B, D, d]`, D >= d, from the start `Q [B, d, b]`.

    One CholeskyQR a step keeps the block well conditioned; only the last one is done twice (CholeskyQR2).
    """
    Q = _cholesky_qr(Q)
    for _ in range(iterations):
        Q = _cholesky_qr(A.mT @ (A @ Q))
    Q = _cholesky_qr(Q)
    Y = A @ Q
    wide = Y.double()
    R = torch.linalg.eigh(wide.mT @ wide).eigenvectors.flip(2).to(Q.dtype)
    V, Y = Q @ R, Y @ R
    S = torch.linalg.vector_norm(Y, dim=1)
    return Y / S.unsqueeze(1), S, V.mT


def _subspace_run(case: SVDCase, blocks: Blocks, starts: Sequence[Tensor], iterations: int) -> Run:
    def run() -> Triplets:
        factors = []
        for (stack, _), Q in zip(blocks, starts, strict=True):
            tall = stack.shape[1] >= stack.shape[2]
            U, S, Vh = subspace_iteration(stack if tall else stack.mT, Q, iterations)
            factors.append((U, S, Vh) if tall else (Vh.mT, S, U.mT))
        return _spread(len(case.single), blocks, factors)

    return run


def _blocks(case: SVDCase, batched: bool) -> Blocks:
    """The buckets, or each matrix as a bucket of its own: in the cache for all its iterations."""
    if batched:
        return case.buckets
    return [(W.unsqueeze(0), [index]) for index, W in enumerate(case.single)]


def _subspace_cold(batched: bool) -> Callable[[SVDCase, int, float], Run]:
    def prepare(case: SVDCase, width: int, effort: float) -> Run:
        blocks = _blocks(case, batched)
        starts = []
        for stack, _ in blocks:
            generator = torch.Generator(stack.device).manual_seed(3)
            shape = (len(stack), min(stack.shape[1:]), width)
            starts.append(torch.randn(shape, generator=generator, device=stack.device))
        return _subspace_run(case, blocks, starts, int(effort))

    return prepare


def _subspace_warm(batched: bool) -> Callable[[SVDCase, int, float], Run]:
    """Starts from as many converged vectors of the earlier weights as the block is wide, without random columns.

    Better than what a chain of warm refreshes would have at hand, and blind to newly grown directions: both are in
    the peer's favour.
    """

    def prepare(case: SVDCase, width: int, effort: float) -> Run:
        blocks = _blocks(case, batched)
        starts = [torch.stack([case.earlier_vectors[i][:, :width] for i in members]) for _, members in blocks]
        return _subspace_run(case, blocks, starts, int(effort))

    return prepare


_ITERATIONS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32)
_COLD_GRID: dict[int, Sequence[float]] = dict.fromkeys((8, 16, 24, 32, 48), _ITERATIONS)
_WARM_GRID: dict[int, Sequence[float]] = dict.fromkeys((8, 16, 24, 32), _ITERATIONS[:10])
# ARPACK's tolerance is relative and on the eigenvalue's residual, hence its square-root scale.
_SVDS_GRID: dict[int, Sequence[float]] = dict.fromkeys((7, 12, 20, 32), (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001))


def _oversampled(width: int, effort: float) -> str:
    return f"q={width}, {int(effort)} iterations"


def _fixed(text: str) -> Callable[[int, float], str]:
    return lambda _width, _effort: text


def _two_a_step(last: int) -> Callable[[float], int | None]:
    return lambda effort: 2 * int(effort) + last


OURS = [
    SVDPeer("ours", _ours_cold, _fixed(f"b={cold_width(RANK)}, {COLD_READS} reads"), reads=lambda _: COLD_READS + 1),
    SVDPeer(
        "ours",
        _ours_warm,
        _fixed(f"b={warm_width(RANK)}, {WARM_READS} reads"),
        reads=lambda _: WARM_READS + 1,
        variant="warm",
    ),
]

SVD_PEERS = [
    SVDPeer("ours, impl=torch", partial(_ours_cold, impl="torch"), OURS[0].describe, reads=OURS[0].reads),
    SVDPeer(
        "ours, impl=torch", partial(_ours_warm, impl="torch"), OURS[1].describe, reads=OURS[1].reads, variant="warm"
    ),
    SVDPeer("torch.linalg.svd", _full_svd, _fixed("full, fp32"), slow=True),
    SVDPeer("Gram + torch.linalg.eigh", _gram_eigh, _fixed("fp32, all pairs"), slow=True),
    SVDPeer("Gram + scipy eigh", _gram_eigh_subset, _fixed("fp32, syevr, 3 pairs"), needs="scipy", cpu_only=True),
    SVDPeer("torch.svd_lowrank", _svd_lowrank, _oversampled, _COLD_GRID, _two_a_step(2)),
    SVDPeer("torch.svd_lowrank, batched", _svd_lowrank_batched, _oversampled, _COLD_GRID, _two_a_step(2)),
    SVDPeer(
        "sklearn randomized_svd",
        _randomized_svd,
        _oversampled,
        _COLD_GRID,
        _two_a_step(2),
        needs="sklearn",
        cpu_only=True,
    ),
    SVDPeer(
        "scipy svds (ARPACK)",
        _svds,
        lambda width, effort: f"ncv={width}, tol={effort:g}",
        _SVDS_GRID,
        needs="scipy",
        cpu_only=True,
    ),
    SVDPeer("subspace + CholeskyQR2, looped", _subspace_cold(False), _oversampled, _COLD_GRID, _two_a_step(1)),
    SVDPeer("subspace + CholeskyQR2, batched", _subspace_cold(True), _oversampled, _COLD_GRID, _two_a_step(1)),
    SVDPeer(
        "subspace + CholeskyQR2, looped",
        _subspace_warm(False),
        _oversampled,
        _WARM_GRID,
        _two_a_step(1),
        variant="warm",
    ),
    SVDPeer(
        "subspace + CholeskyQR2, batched",
        _subspace_warm(True),
        _oversampled,
        _WARM_GRID,
        _two_a_step(1),
        variant="warm",
    ),
]
