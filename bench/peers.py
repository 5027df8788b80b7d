"""What `topk_svd` is measured against, each at its best setting, all with the same threads.

A peer's `prepare` does what a user would do once, outside the clock, and returns the function that is timed.
Those of a GPU need `pip install cupy-cuda13x "nvmath-python[cu13]"` beside the bench's own packages.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.cases import RANK, SVDCase, gram_triplets
from s2d_kernels import ops
from s2d_kernels.reference import SVDTriplets
from s2d_kernels.svd import COLD_READS, WARM_READS, cold_width, start_blocks, topk_svd, warm_width

Triplets = Sequence[SVDTriplets]
Run = Callable[[], Triplets]
# Stacked matrices `[B, m, n]` and their positions in the case.
Blocks = Sequence[tuple[Tensor, Sequence[int]]]
_Result = TypeVar("_Result")


class CannotRun(RuntimeError):
    """A peer that seemed to fit the machine and does not: it is left out with these words, and the others go on."""


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
        device: the only type of device it works on; None: any.
        impl: of ours the implementation that it asks for; "" for the others.
    """

    name: str
    prepare: Callable[[SVDCase, int, float], Run]
    describe: Callable[[int, float], str]
    grid: dict[int, Sequence[float]] = field(default_factory=dict)
    reads: Callable[[float], int | None] = lambda _: None
    variant: str = "cold"
    slow: bool = False
    needs: str | None = None
    device: str | None = None
    impl: str = ""

    def problem(self, device: torch.device) -> str | None:
        """Why it cannot be measured on `device`, or None."""
        if self.device not in (None, device.type):
            return "it works on host memory" if self.device == "cpu" else "it needs a CUDA device"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.impl and self.impl not in ops.available("topk_svd"):
            return "it is not part of this installation"
        return ops.problem_of(self.impl, device)


def left_out(device: torch.device) -> list[str]:
    """Which peers cannot be measured on `device`, a sentence each."""
    problems = {(peer.name, peer.variant): peer.problem(device) for peer in SVD_PEERS}
    return [f"{name}, {variant}, is left out: {why}" for (name, variant), why in problems.items() if why is not None]


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


def _ours_graph(case: SVDCase, _width: int, _effort: float, impl: str, warm: bool) -> Run:
    """A refresh as a captured training step has it: copies of all weights and the SVD, from starts that are there."""
    count, snapshot = len(case.weights), [torch.empty_like(W) for W in case.weights]
    starts = start_blocks(case.weights, [RANK] * count, case.previous if warm else [None] * count, 3, [""] * count)
    reads = [WARM_READS if warm else COLD_READS] * count

    def refresh() -> list[Tensor]:
        torch._foreach_copy_(snapshot, case.weights)
        found: list[Tensor] = torch.ops.s2d.topk_svd(snapshot, starts, [RANK] * count, reads, impl)
        return found

    graph, flat = captured(refresh)

    def run() -> Triplets:
        graph.replay()
        return [_first(*flat[6 * index : 6 * index + 3]) for index in range(count)]

    return run


# --- torch.linalg.svd, torch.svd_lowrank, Gram + eigh --------------------------------------------------------------


def _full_svd(case: SVDCase, _width: int, _effort: float) -> Run:
    return lambda: [_first(*torch.linalg.svd(W, full_matrices=False)) for W in case.single]


def _full_svd_driver(case: SVDCase, _width: int, _effort: float, driver: str, batched: bool) -> Run:
    """cuSOLVER's routine of that name, for tall matrices: of wide ones the transpose.

    `batched`: gesvda takes a stack in one call. The others would go through it matrix by matrix.
    """
    blocks = _blocks(case, batched)

    def run() -> Triplets:
        found = [torch.linalg.svd(_tall(stack), full_matrices=False, driver=driver) for stack, _ in blocks]
        factors = [_turned_back(stack, tuple(f)) for (stack, _), f in zip(blocks, found, strict=True)]
        return _spread(len(case.single), blocks, factors)

    return run


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


# --- CuPy and cuSOLVER --------------------------------------------------------------------------------------------


def _cupy_svd(case: SVDCase, _width: int, _effort: float) -> Run:
    """A stack of one shape in each call; CuPy's and torch's current streams are both the default one."""
    cupy = importlib.import_module("cupy")
    stacks = [cupy.from_dlpack(stack) for stack, _ in case.buckets]

    def run() -> Triplets:
        found = (cupy.linalg.svd(stack, full_matrices=False) for stack in stacks)
        factors = [(torch.from_dlpack(U), torch.from_dlpack(S), torch.from_dlpack(Vh)) for U, S, Vh in found]
        return _spread(len(case.single), case.buckets, factors)

    return run


def _cupy_svds(case: SVDCase, width: int, effort: float) -> Run:
    """Thick-restart Lanczos, whose tolerance is absolute: so the number of restarts is what is set."""
    cupy = importlib.import_module("cupy")
    function = importlib.import_module("cupyx.scipy.sparse.linalg").svds
    matrices = [cupy.from_dlpack(W) for W in case.single]
    cupy.random.seed(3)  # of the starting vectors
    steps = width + int(effort) * (width - RANK)

    def run() -> Triplets:
        found = (function(A, k=RANK, ncv=width, maxiter=steps) for A in matrices)
        tensors = ([torch.from_dlpack(t) for t in factors] for factors in found)
        return [SVDTriplets(U.flip(1), S.flip(0), Vh.flip(0)) for U, S, Vh in tensors]

    return run


@cache
def _cusolver() -> tuple[Any, int, int]:
    """nvmath's bindings, a handle and parameters."""
    solver = importlib.import_module("nvmath.bindings.cusolverDn")
    return solver, solver.create(), solver.create_params()


def _gesvdr(case: SVDCase, width: int, effort: float) -> Run:
    """cuSOLVER's randomized SVD of each matrix, column by column in memory and tall; wide ones are transposed.

    It overwrites what it decomposes, so the copy is within the clock. Workspaces are not.
    """
    solver, handle, parameters = _cusolver()
    fp32, thin, device = 0, ord("S"), case.single[0].device  # CUDA_R_32F
    calls = []
    for W in case.single:
        rows = W.mT if len(W) >= W.shape[1] else W  # as they lie in memory, [n, m] of a tall m x n matrix
        n, m = rows.shape
        A, U, V = (torch.empty(shape, device=device) for shape in ((n, m), (n, m), (n, n)))
        S, info = torch.empty(n, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        kept = (RANK, width - RANK, int(effort))
        pointers = (fp32, A.data_ptr(), m, fp32, S.data_ptr(), fp32, U.data_ptr(), m, fp32, V.data_ptr(), n, fp32)
        calls.append(((rows, A, U, S, V, info), (handle, parameters, thin, thin, m, n, *kept, *pointers)))
    sizes = [solver.xgesvdr_buffer_size(*numbers) for _, numbers in calls]
    work = torch.empty(max(1, *(on_device for on_device, _ in sizes)), dtype=torch.uint8, device=device)
    host = torch.empty(max(1, *(on_host for _, on_host in sizes)), dtype=torch.uint8)
    workspaces = (work.data_ptr(), work.numel(), host.data_ptr(), host.numel())

    def run() -> Triplets:
        solver.set_stream(handle, torch.cuda.current_stream(device).cuda_stream)
        found = []
        for W, ((rows, A, U, S, V, info), numbers) in zip(case.single, calls, strict=True):
            A.copy_(rows)
            solver.xgesvdr(*numbers, *workspaces, info.data_ptr())
            left, right = U[:RANK], V[:RANK]
            if len(W) < W.shape[1]:
                left, right = right, left
            found.append(SVDTriplets(left.mT, S[:RANK], right))
        return found

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
    Q, Y, gram = _subspace(A, Q, iterations)
    return _rotated(Q, Y, torch.linalg.eigh(gram).eigenvectors)


def _subspace(A: Tensor, Q: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal Q, Y = A Q, and Y^T Y in fp64."""
    Q = _cholesky_qr(Q)
    for _ in range(iterations):
        Q = _cholesky_qr(A.mT @ (A @ Q))
    Q = _cholesky_qr(Q)
    Y = A @ Q
    wide = Y.double()
    return Q, Y, wide.mT @ wide


def _rotated(Q: Tensor, Y: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh from the eigenvectors of Y^T Y, ascending; the norms of what Y becomes are the singular values."""
    R = vectors.flip(2).to(Q.dtype)
    V, Y = Q @ R, Y @ R
    S = torch.linalg.vector_norm(Y, dim=1)
    return Y / S.unsqueeze(1), S, V.mT


# A [B, D, d], Q [B, d, b], iterations -> U, S, Vh, D >= d
Iteration = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def _tall(stack: Tensor) -> Tensor:
    return stack if stack.shape[1] >= stack.shape[2] else stack.mT


def _turned_back(stack: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of `stack` from those of `_tall(stack)`."""
    U, S, Vh = factors
    return factors if stack.shape[1] >= stack.shape[2] else (Vh.mT, S, U.mT)


def _iterated(case: SVDCase, blocks: Blocks, starts: Sequence[Tensor], steps: int, iteration: Iteration) -> Run:
    def run() -> Triplets:
        pairs = zip(blocks, starts, strict=True)
        factors = [_turned_back(stack, iteration(_tall(stack), Q, steps)) for (stack, _), Q in pairs]
        return _spread(len(case.single), blocks, factors)

    return run


def captured(function: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A CUDA graph of what `function` launches, and its results, which each replay writes anew."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            function()  # handles and workspaces, which a capture must not create
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            results = function()
    except (RuntimeError, ValueError) as error:
        raise CannotRun(f"it could not be captured in a CUDA graph: {str(error).splitlines()[0]}") from error
    return graph, results


def _iterated_in_graphs(case: SVDCase, starts: Sequence[Tensor], steps: int) -> Run:
    """Two graphs with one `eigh` of all matrices between them, whose check on the host cannot be captured."""
    pairs = list(zip(case.buckets, starts, strict=True))

    def iterate() -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        found = [_subspace(_tall(stack), Q, steps) for (stack, _), Q in pairs]
        return found, torch.cat([gram for _, _, gram in found])

    before, (found, grams) = captured(iterate)
    rotations = torch.empty_like(grams)

    def rotate() -> list[tuple[Tensor, Tensor, Tensor]]:
        parts = rotations.split([len(Q) for Q, _, _ in found])
        factors = [_rotated(Q, Y, R) for (Q, Y, _), R in zip(found, parts, strict=True)]
        return [_turned_back(stack, f) for (stack, _), f in zip(case.buckets, factors, strict=True)]

    after, factors = captured(rotate)

    def run() -> Triplets:
        before.replay()
        rotations.copy_(torch.linalg.eigh(grams).eigenvectors)
        after.replay()
        return _spread(len(case.single), case.buckets, factors)

    return run


def _blocks(case: SVDCase, batched: bool) -> Blocks:
    """The buckets, or each matrix as a bucket of its own: in the cache for all its iterations."""
    if batched:
        return case.buckets
    return [(W.unsqueeze(0), [index]) for index, W in enumerate(case.single)]


def _random_starts(blocks: Blocks, width: int) -> list[Tensor]:
    starts = []
    for stack, _ in blocks:
        generator = torch.Generator(stack.device).manual_seed(3)
        shape = (len(stack), min(stack.shape[1:]), width)
        starts.append(torch.randn(shape, generator=generator, device=stack.device))
    return starts


def _earlier_starts(case: SVDCase, blocks: Blocks, width: int) -> list[Tensor]:
    """As many converged vectors of the earlier weights as the block is wide, without random columns.

    Better than what a chain of warm refreshes would have at hand, and blind to newly grown directions: both are in
    the peers' favour.
    """
    return [torch.stack([case.earlier_vectors[i][:, :width] for i in members]) for _, members in blocks]


def _subspace_cold(case: SVDCase, width: int, effort: float, batched: bool) -> Run:
    blocks = _blocks(case, batched)
    return _iterated(case, blocks, _random_starts(blocks, width), int(effort), subspace_iteration)


def _iterated_warm(case: SVDCase, width: int, effort: float, batched: bool, iteration: Iteration) -> Run:
    blocks = _blocks(case, batched)
    return _iterated(case, blocks, _earlier_starts(case, blocks, width), int(effort), iteration)


def _graph_cold(case: SVDCase, width: int, effort: float) -> Run:
    return _iterated_in_graphs(case, _random_starts(case.buckets, width), int(effort))


def _graph_warm(case: SVDCase, width: int, effort: float) -> Run:
    return _iterated_in_graphs(case, _earlier_starts(case, case.buckets, width), int(effort))


# --- the warm one-step factorizations of two optimizers -----------------------------------------------------------


def dion_steps(A: Tensor, V: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dion's factorization A = P R^T (Ahn et al., 2025) of `A [B, D, d]` from the earlier `V [B, d, b]`.

    P = orthonormalize(A V), R = A^T P, V = R with columns of length one: two reads a step, of which Dion makes one.
    The last R is left as it is; its singular value decomposition makes triplets of P and R.
    """
    for step in range(steps):
        P = _cholesky_qr(A @ V)
        if step + 1 == steps:
            P = _cholesky_qr(P)
        R = A.mT @ P
        V = R / torch.linalg.vector_norm(R, dim=1, keepdim=True)
    wide = R.double()
    rotation = torch.linalg.eigh(wide.mT @ wide).eigenvectors.flip(2).to(R.dtype)
    R = R @ rotation
    S = torch.linalg.vector_norm(R, dim=1)
    return P @ rotation, S, (R / S.unsqueeze(1)).mT


def ldadam_steps(A: Tensor, Q: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """LDAdam's block power iteration (Robert et al., 2024) of `A [B, D, d]` from the earlier `Q [B, d, b]`.

    Q = qr(A^T (A Q)) a step, of which LDAdam makes one, then the projection A Q, which holds the singular values.
    """
    for _ in range(steps):
        Q = torch.linalg.qr(A.mT @ (A @ Q)).Q
    Y = A @ Q
    wide = Y.double()
    return _rotated(Q, Y, torch.linalg.eigh(wide.mT @ wide).eigenvectors)


_ITERATIONS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32)
_COLD_GRID: dict[int, Sequence[float]] = dict.fromkeys((8, 16, 24, 32, 48), _ITERATIONS)
_WARM_GRID: dict[int, Sequence[float]] = dict.fromkeys((8, 16, 24, 32), _ITERATIONS[:10])
# CuPy's restarts after the first Lanczos run.
_CUPY_GRID: dict[int, Sequence[float]] = dict.fromkeys((8, 12, 20, 32), (0, 1, 2, 3, 4, 6, 8, 12, 16, 24))
# ARPACK's tolerance is relative and on the eigenvalue's residual, hence its square-root scale.
_SVDS_GRID: dict[int, Sequence[float]] = dict.fromkeys((7, 12, 20, 32), (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001))


def _oversampled(width: int, effort: float) -> str:
    return f"q={width}, {int(effort)} iterations"


def _graphed(width: int, effort: float) -> str:
    return f"{_oversampled(width, effort)}, eigh between two graphs"


def _fixed(text: str) -> Callable[[int, float], str]:
    return lambda _width, _effort: text


def _always(reads: int) -> Callable[[float], int | None]:
    return lambda _: reads


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
    *(
        SVDPeer(
            f"ours, CUDA graph, impl={impl}",
            partial(_ours_graph, impl=impl, warm=variant == "warm"),
            _fixed(f"b={width}, {reads} reads, copies of the weights included, starts prepared"),
            reads=_always(reads + 2),  # the copy reads too
            variant=variant,
            device="cuda",
            impl=impl,
        )
        for impl in ("cuda", "triton")
        for variant, width, reads in (
            ("cold", cold_width(RANK), COLD_READS),
            ("warm", warm_width(RANK), WARM_READS),
        )
    ),
    SVDPeer("ours, impl=torch", partial(_ours_cold, impl="torch"), OURS[0].describe, reads=OURS[0].reads),
    SVDPeer(
        "ours, impl=torch", partial(_ours_warm, impl="torch"), OURS[1].describe, reads=OURS[1].reads, variant="warm"
    ),
    SVDPeer("torch.linalg.svd", _full_svd, _fixed("full, fp32"), slow=True),
    SVDPeer("Gram + torch.linalg.eigh", _gram_eigh, _fixed("fp32, all pairs"), slow=True),
    SVDPeer("Gram + scipy eigh", _gram_eigh_subset, _fixed("fp32, syevr, 3 pairs"), needs="scipy", device="cpu"),
    SVDPeer("torch.svd_lowrank", _svd_lowrank, _oversampled, _COLD_GRID, _two_a_step(2)),
    SVDPeer("torch.svd_lowrank, batched", _svd_lowrank_batched, _oversampled, _COLD_GRID, _two_a_step(2)),
    SVDPeer(
        "sklearn randomized_svd",
        _randomized_svd,
        _oversampled,
        _COLD_GRID,
        _two_a_step(2),
        needs="sklearn",
        device="cpu",
    ),
    SVDPeer(
        "scipy svds (ARPACK)",
        _svds,
        lambda width, effort: f"ncv={width}, tol={effort:g}",
        _SVDS_GRID,
        needs="scipy",
        device="cpu",
    ),
    *(
        SVDPeer(
            f"torch.linalg.svd, driver={driver}",
            partial(_full_svd_driver, driver=driver, batched=driver == "gesvda"),
            _fixed("full, fp32, batched" if driver == "gesvda" else "full, fp32"),
            slow=True,
            device="cuda",
        )
        for driver in ("gesvd", "gesvdj", "gesvda")
    ),
    SVDPeer("cupy.linalg.svd, batched", _cupy_svd, _fixed("full, fp32"), slow=True, needs="cupy", device="cuda"),
    SVDPeer(
        "cupyx svds",
        _cupy_svds,
        lambda width, effort: f"ncv={width}, {int(effort)} restarts",
        _CUPY_GRID,
        needs="cupy",
        device="cuda",
    ),
    SVDPeer("cuSOLVER Xgesvdr (nvmath)", _gesvdr, _oversampled, _COLD_GRID, needs="nvmath", device="cuda"),
    *(
        SVDPeer(
            f"subspace + CholeskyQR2, {way}",
            partial(_subspace_cold, batched=way == "batched"),
            _oversampled,
            _COLD_GRID,
            _two_a_step(1),
        )
        for way in ("looped", "batched")
    ),
    SVDPeer("subspace + CholeskyQR2, CUDA graph", _graph_cold, _graphed, _COLD_GRID, _two_a_step(1), device="cuda"),
    *(
        SVDPeer(
            f"{name}, {way}",
            partial(_iterated_warm, batched=way == "batched", iteration=iteration),
            _oversampled,
            _WARM_GRID,
            _two_a_step(last),
            variant="warm",
        )
        for name, iteration, last in (
            ("subspace + CholeskyQR2", subspace_iteration, 1),
            ("Dion's factorization", dion_steps, 0),
            ("LDAdam's power iteration", ldadam_steps, 1),
        )
        for way in ("looped", "batched")
    ),
    SVDPeer(
        "subspace + CholeskyQR2, CUDA graph",
        _graph_warm,
        _graphed,
        _WARM_GRID,
        _two_a_step(1),
        variant="warm",
        device="cuda",
    ),
]
