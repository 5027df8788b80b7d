"""The peers of topk_svd in the bench: each finds the truth, and is named where it cannot run."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_bench import CONTEXT, CPU
from torch.utils._pytree import tree_leaves

from bench import cases, peers, runs
from s2d_kernels import ops, topk_svd

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def quick_on(device: torch.device) -> cases.SVDCase:
    return cases.SVD_CASES["quick"]().to(device)


@pytest.fixture
def quick() -> cases.SVDCase:
    return quick_on(CPU)


def error_of(peer: peers.SVDPeer, case: cases.SVDCase) -> float:
    """With the most work of its grid."""
    width = list(peer.grid)[-1] if peer.grid else 0
    run = peer.prepare(case, width, peer.grid[width][-1] if peer.grid else 0)
    run()
    found = run()
    assert all((t.S.diff() <= 0).all() for t in found)
    return max(cases.product_errors(case.truth, found))


@pytest.mark.parametrize("peer", peers.SVD_PEERS, ids=lambda p: f"{p.name}-{p.variant}")
def test_every_peer_converges_to_the_truth(peer, device):
    if (problem := peer.problem(device)) is not None:
        pytest.skip(problem)
    assert error_of(peer, quick_on(device)) < 1e-4  # a tenth of the benchmark's gate


class _CuSolver:
    """Xgesvdr as nvmath binds it, on host memory: it reads and writes column by column, and overwrites A."""

    def set_stream(self, handle: int, stream: int) -> None:
        pass

    def xgesvdr_buffer_size(self, *numbers: int) -> tuple[int, int]:
        assert len(numbers) == 21
        return 16, 8

    def xgesvdr(self, _handle, _params, jobu, jobv, m, n, k, p, niters, *rest: int) -> None:
        type_a, a, lda, type_s, s, type_u, u, ldu, type_v, v, ldv, compute, _work, size, _host, host_size, _info = rest
        assert (jobu, jobv, size, host_size) == (ord("S"), ord("S"), 16, 8)
        assert (type_a, type_s, type_u, type_v, compute, lda, ldu, ldv) == (0, 0, 0, 0, 0, m, m, n)
        assert m >= n >= k + p

        def matrix(pointer: int, rows: int, columns: int) -> torch.Tensor:
            array = (ctypes.c_float * (rows * columns)).from_address(pointer)
            return torch.from_numpy(np.ctypeslib.as_array(array)).view(columns, rows).mT

        A = matrix(a, m, n)
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(A, q=k + p, niter=niters)
        A.zero_()
        for pointer, rows, found in ((u, m, U), (s, 1, S[None]), (v, n, V)):
            matrix(pointer, rows, k).copy_(found[:, :k])


class _Replayed:
    """In place of a CUDA graph: a replay calls the function and writes into the results of the first call."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.results = function, function()

    def replay(self) -> None:
        for old, new in zip(tree_leaves(self.results), tree_leaves(self.function()), strict=True):
            old.copy_(new)


def _captured(function: Callable[[], object]) -> tuple[_Replayed, object]:
    graph = _Replayed(function)
    for result in tree_leaves(graph.results):
        result.fill_(float("nan") if result.is_floating_point() else -1)  # a capture runs nothing
    return graph, graph.results


def _cupy_svds(A, k, ncv, maxiter):
    """As CuPy has it: singular values ascending, more work with more steps."""
    assert maxiter >= ncv > k + 1
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :k].flip(1), S[:k].flip(0), Vh[:k].flip(0)


@pytest.mark.parametrize(
    "peer", [p for p in peers.SVD_PEERS if p.device == "cuda" and not p.impl], ids=lambda p: f"{p.name}-{p.variant}"
)
def test_peers_of_a_gpu_on_stand_ins_for_their_libraries(quick, peer, monkeypatch):
    """Layouts, orders, transposes: what can be wrong without a GPU."""
    svd = torch.linalg.svd

    def of_a_driver(A, full_matrices, driver=None):
        assert driver is None or A.shape[-2] >= A.shape[-1]
        return svd(A, full_matrices=full_matrices)

    cupy = types.SimpleNamespace(
        from_dlpack=lambda t: t, linalg=types.SimpleNamespace(svd=svd), random=types.SimpleNamespace(seed=id)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse.linalg", types.SimpleNamespace(svds=_cupy_svds))
    monkeypatch.setattr(torch.linalg, "svd", of_a_driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(peers, "_cusolver", lambda: (_CuSolver(), 1, 2))
    monkeypatch.setattr(peers, "captured", _captured)
    before = [W.clone() for W in quick.weights]
    assert error_of(peer, quick) < 1e-4  # as above
    assert all(torch.equal(W, b) for W, b in zip(quick.weights, before, strict=True))


def test_what_cannot_be_captured_says_why(monkeypatch):
    """Run once before, so that nothing is set up during the capture; torch's and Triton's refusals become words."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    calls = []
    assert peers.captured(lambda: calls.append(0) or len(calls)) == (stream, 2)
    for error in (RuntimeError, ValueError):

        def refuse(error=error):
            raise error("operation not permitted\nand so on")

        with pytest.raises(peers.CannotRun, match="not be captured in a CUDA graph: operation not permitted$"):
            peers.captured(refuse)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_ours_in_a_graph_decomposes_the_weights_of_its_replay(quick, impl, warm, monkeypatch):
    """And gives the bits of `topk_svd`; the graph is a stand-in."""
    monkeypatch.setattr(peers, "captured", _captured)
    case = quick.take([0, 1])
    weights = [W.clone() for W in case.weights]
    for W in case.weights:
        W.zero_()
    run = peers._ours_graph(case, 0, 0, impl=impl, warm=warm)
    for W, given in zip(case.weights, weights, strict=True):
        W.copy_(given)
    expected = topk_svd(weights, k=3, warm=case.previous if warm else None, seed=3, impl=impl)
    for found, wanted in zip(run(), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[:3], strict=True))


def test_ours_in_a_graph_has_a_row_for_each_usable_implementation(monkeypatch):
    cuda = torch.device("cuda")
    names = [f"ours, CUDA graph, impl={impl}, {variant}" for impl in ("cuda", "triton") for variant in ("cold", "warm")]
    monkeypatch.setattr(ops, "problem_of", lambda impl, device: "no library" if impl == "cuda" else None)
    graphs = [peer for peer in peers.SVD_PEERS if peer.impl]
    assert [f"{peer.name}, {peer.variant}" for peer in graphs] == names
    assert [peer.problem(cuda) for peer in graphs] == ["no library", "no library", None, None]
    assert [sentence for sentence in peers.left_out(CPU) if "ours" in sentence] == [
        f"{name}, is left out: it needs a CUDA device" for name in names
    ]
    assert [peer.reads(0) for peer in graphs[:2]] == [10, 6]


def test_peers_that_do_not_fit_the_machine_are_named(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name in ("cupy", "sklearn") else name)
    on_cpu, on_gpu = peers.left_out(CPU), peers.left_out(cuda)
    assert "torch.linalg.svd, driver=gesvdj, cold, is left out: it needs a CUDA device" in on_cpu
    assert "subspace + CholeskyQR2, CUDA graph, warm, is left out: it needs a CUDA device" in on_cpu
    assert "sklearn randomized_svd, cold, is left out: sklearn is not installed" in on_cpu
    assert "scipy svds (ARPACK), cold, is left out: it works on host memory" in on_gpu
    assert "cupyx svds, cold, is left out: cupy is not installed" in on_gpu
    named = {sentence.split(", is left out")[0] for sentence in on_cpu}
    assert named == {f"{p.name}, {p.variant}" for p in peers.SVD_PEERS if p.device == "cuda" or p.needs == "sklearn"}


def test_a_peer_that_cannot_run_is_named_and_the_others_go_on(quick, monkeypatch):
    def refuse(case, width, effort):
        raise peers.CannotRun("no graph\nof it")

    bad = peers.SVDPeer("bad", refuse, lambda w, e: "", grid={4: (1, 2)})
    good = next(peer for peer in peers.SVD_PEERS if peer.name == "torch.linalg.svd")

    def fail(case, width, effort):
        raise KeyError

    foreign = peers.SVDPeer("foreign", fail, lambda w, e: "", needs="torch", device="cuda")
    monkeypatch.setattr(peers.SVDPeer, "problem", lambda self, device: None)
    refused = []
    rows = runs.run_svd(quick, CONTEXT, peers=[bad, foreign, good], refused=refused.append)
    assert [row.impl for row in rows] == ["ours", "ours", "torch.linalg.svd"]
    assert refused == [
        "bad, cold, is left out of quick: no graph", "foreign, cold, is left out of quick: KeyError"
    ]  # fmt: skip
    with pytest.raises(KeyError):  # a mistake of the bench's own is none of a library
        runs.run_svd(quick, CONTEXT, peers=[dataclasses.replace(foreign, needs=None)])


@pytest.mark.parametrize(("name", "reads"), [("Dion's factorization", 2), ("LDAdam's power iteration", 3)])
def test_one_step_is_the_optimizers_own(quick, name, reads):
    """By hand, and its reads."""
    (peer,) = [p for p in peers.SVD_PEERS if p.name == f"{name}, looped"]
    assert peer.reads(1) == reads
    A = quick.weights[0]
    Q = quick.earlier_vectors[0][:, :8]
    if "Dion" in name:
        P = torch.linalg.qr((A @ Q).double()).Q
        expected = P @ (P.mT @ A.double())
    else:
        P = torch.linalg.qr((A.mT @ (A @ Q)).double()).Q
        expected = A.double() @ P @ P.mT
    step = peers.dion_steps if "Dion" in name else peers.ldadam_steps
    U, S, Vh = (t[0].double() for t in step(A[None], Q[None], 1))
    assert (U.mT @ U - torch.eye(8)).abs().max() < 1e-5  # here and below: fp32 sums over at most a few hundred terms
    assert (Vh @ Vh.mT - torch.eye(8)).abs().max() < 1e-5
    assert ((U * S) @ Vh - expected).norm() < 1e-5 * expected.norm()


# --- end to end -----------------------------------------------------------------------------------------------------
