"""topk_svd against an fp64 SVD: accuracy contract, bounds, determinism, hard inputs."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from emulated import build_emulated
from helpers import decaying_spectrum, matrix_with_spectrum, product_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s2d_kernels import ops, topk_svd
from s2d_kernels.svd import CONVERGED, NON_FINITE, NOT_CONVERGED, OVERFLOW, TopkSVD, start_blocks

SIZES = [1, 2, 37, 63, 199, 300]


@pytest.fixture(autouse=True, params=["cpu", "torch"])
def preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What impl=None means on a CPU; every test runs with both."""
    monkeypatch.setitem(ops._PREFERENCE, "cpu", (request.param, "torch"))
    return str(request.param)


def assert_correct(weight: torch.Tensor, got: TopkSVD, k: int) -> None:
    """Converged results keep the contract: S and G to 1e-3, orthonormal factors, LAPACK-style residual ratios."""
    truth = torch.linalg.svdvals(weight.double())
    scale = float(truth[0])
    assert got.status == CONVERGED
    assert got.U.shape == (weight.shape[0], k)
    assert got.Vh.shape == (k, weight.shape[1])
    assert torch.allclose(got.S.double() / scale, truth[:k] / scale, atol=2e-4)
    assert product_error(weight, got.U, got.S, got.Vh) < 1e-3
    nonzero = got.S > 0
    for vectors in (got.U.mT[nonzero], got.Vh[nonzero]):
        gram = vectors.double() @ vectors.double().mT
        assert (gram - torch.eye(len(gram))).abs().max() < 3e-5
    # The stated residual is the true one, recomputed here from the matrix in fp64.
    U, S, Vh = got.U.double(), got.S.double(), got.Vh.double()
    left, right = weight.double().mT @ U - Vh.mT * S, weight.double() @ Vh.mT - U * S
    recomputed, other = (left, right) if weight.shape[0] >= weight.shape[1] else (right, left)
    assert torch.allclose(recomputed.norm(dim=0), got.residual.double(), atol=3e-6 * scale)
    assert (other.norm(dim=0) < 3e-5 * scale).all()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_any_mix_of_shapes_in_one_call(impl: str | None) -> None:
    shapes = [(m, n) for m in SIZES for n in SIZES]
    weights = [matrix_with_spectrum(m, n, decaying_spectrum(min(m, n)), seed=m * n) for m, n in shapes]
    ks = [min(3, *shape) for shape in shapes]
    cold = topk_svd(weights, k=ks, impl=impl)
    moved = [w + 1e-4 * torch.randn_like(w) * w.abs().mean() for w in weights]
    warm = topk_svd(moved, k=ks, warm=cold, seed=1, impl=impl)
    for weight, after, first, second, k in zip(weights, moved, cold, warm, ks, strict=True):
        assert_correct(weight, first, k)
        assert_correct(after, second, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(150, 90), (90, 150)])
def test_other_dtypes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = matrix_with_spectrum(*shape, decaying_spectrum(90, rate=0.1), dtype=dtype)
    got = topk_svd([weight], k=4)[0]
    assert got.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_correct(weight, got, 4)


def test_fp64_reaches_fp64_accuracy() -> None:
    weight = matrix_with_spectrum(200, 150, decaying_spectrum(150, rate=0.3), dtype=torch.float64)
    got = topk_svd([weight], k=3, reads=9)[0]
    assert product_error(weight, got.U, got.S, got.Vh) < 1e-12


@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_k_up_to_sixteen(k: int) -> None:
    weight = matrix_with_spectrum(400, 300, decaying_spectrum(300, rate=0.05))
    cold = topk_svd([weight], k=k)[0]
    assert_correct(weight, cold, k)
    assert_correct(weight, topk_svd([weight], k=k, warm=[cold], seed=5)[0], k)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e38, 1e-37])
@pytest.mark.parametrize("shape", [(180, 170), (20, 9)])
def test_extreme_scales(scale: float, shape: tuple[int, int]) -> None:
    weight = matrix_with_spectrum(*shape, decaying_spectrum(min(shape), rate=0.1))
    weight = (weight.double() * (scale / weight.abs().max().item())).float()
    if scale < 1e38:
        assert_correct(weight, topk_svd([weight], k=3)[0], 3)
    else:  # the largest singular value itself exceeds fp32
        got = topk_svd([weight], k=3)[0]
        assert got.status == OVERFLOW
        assert not got.S.any()
        assert not got.U.any()


def test_rank_deficient_and_zero() -> None:
    rank_two = torch.randn(120, 2) @ torch.randn(2, 150)
    got, zero, small = topk_svd([rank_two, torch.zeros(130, 140), torch.zeros(3, 5)], k=3)
    truth = torch.linalg.svdvals(rank_two.double())
    assert torch.allclose(got.S[:2].double(), truth[:2], rtol=1e-5)
    assert got.S[2] < 1e-5 * got.S[0]
    assert product_error(rank_two, got.U, got.S, got.Vh) < 1e-5
    for nothing in (zero, small):
        assert nothing.status == CONVERGED
        assert all(t.isfinite().all() and not t.any() for t in (nothing.U, nothing.S, nothing.Vh, nothing.missed))


@pytest.mark.parametrize("gap", [0.0, 1e-3])
def test_clusters_are_judged_by_the_product(gap: float) -> None:
    cluster = 2.0 * (1 - gap * torch.arange(3, dtype=torch.float64))
    spectrum = torch.cat([cluster, decaying_spectrum(100, rate=0.05) * 0.5])
    weight = matrix_with_spectrum(140, 120, spectrum)
    assert_correct(weight, topk_svd([weight], k=3)[0], 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_non_finite_matrix_leaves_its_neighbours_alone(bad: float, impl: str | None) -> None:
    good = [matrix_with_spectrum(150, 140, decaying_spectrum(140), seed=s) for s in (1, 2)]
    poisoned = good[0].clone()
    poisoned[17, 3] = bad
    alone = topk_svd(good, k=3, impl=impl)
    first, broken, second = topk_svd([good[0], poisoned, good[1]], k=3, impl=impl)
    assert broken.status == NON_FINITE
    assert not any(t.any() for t in (broken.U, broken.S, broken.Vh, broken.residual))
    for a, b in ((alone[0], first), (alone[1], second)):
        assert all(torch.equal(x, y) for x, y in zip(a.basis, b.basis, strict=True))
    # A warm start from the broken result is a cold one.
    healed = topk_svd([good[0]], k=3, warm=[broken], reads=8, seed=3, impl=impl)[0]
    assert product_error(good[0], healed.U, healed.S, healed.Vh) < 1e-3


def test_strided_views_give_the_values_of_their_copies() -> None:
    big = torch.randn(400, 300)
    big[:, 0] *= 30
    views = [big.mT, big[::2, 1::3], big[5:200, 7:180]]
    for view in views:
        got = topk_svd([view], k=2, reads=10)[0]
        assert product_error(view, got.U, got.S, got.Vh) < 2e-3


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_random_shapes_beside_neighbours(m: int, n: int, k: int, seed: int) -> None:
    weight = matrix_with_spectrum(m, n, decaying_spectrum(min(m, n), rate=0.1), seed=seed)
    k = min(k, m, n)
    neighbour = torch.randn(33, 44)
    alone = topk_svd([weight], k=k, seed=seed)[0]
    beside = topk_svd([neighbour, weight, weight, neighbour], k=[2, k, k, 3], seed=seed)[2]
    assert_correct(weight, alone, k)
    assert all(torch.equal(x, y) for x, y in zip(alone.basis, beside.basis, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(384, 384), (512, 128), (128, 512), (96, 80), (48, 16), (37, 199), (600, 300)])
def test_bits_do_not_depend_on_how_many_alike_are_in_the_call(shape: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights = [torch.randn(shape) for _ in range(7)]
        cold = topk_svd(weights, k=3)
        warm = topk_svd(weights, k=3, warm=cold, seed=1)
        for i in (0, 3, 6):
            for count in (1, 2, 5):
                others = [weights[(i + j) % 7] for j in range(count)]
                alone = topk_svd(others, k=3)[0]
                again = topk_svd(others, k=3, warm=[cold[(i + j) % 7] for j in range(count)], seed=1)[0]
                assert all(torch.equal(x, y) for x, y in zip(alone.basis, cold[i].basis, strict=True))
                assert all(torch.equal(x, y) for x, y in zip(again.basis, warm[i].basis, strict=True))
    finally:
        torch.set_num_threads(before)


def test_same_bits_again_and_other_bits_from_another_seed() -> None:
    weight = torch.randn(257, 199)
    first, again, other, named = (
        topk_svd([weight], k=3, seed=seed, keys=keys)[0]
        for seed, keys in ((7, None), (7, None), (8, None), (7, ["layer.0"]))
    )
    assert all(torch.equal(x, y) for x, y in zip(first.basis, again.basis, strict=True))
    assert not torch.equal(first.basis.U, other.basis.U)
    assert not torch.equal(first.basis.U, named.basis.U)


def test_warm_start_finds_a_newly_grown_direction() -> None:
    """Without its fresh random column a warm start misses a spike orthogonal to the previous vectors."""
    weight = matrix_with_spectrum(180, 150, decaying_spectrum(150), seed=0)
    for seed in range(100):
        before = topk_svd([weight], k=3, seed=seed)[0]
        generator = torch.Generator().manual_seed(seed)
        u, v = torch.randn(180, generator=generator), torch.randn(150, generator=generator)
        u, v = u - before.basis.U @ (before.basis.U.mT @ u), v - before.basis.Vh.mT @ (before.basis.Vh @ v)
        spiked = weight + 1.5 * before.S[0] * torch.outer(u / u.norm(), v / v.norm())
        got = topk_svd([spiked], k=3, warm=[before], seed=100 + seed)[0]
        truth = torch.linalg.svdvals(spiked.double())
        assert got.S[0].item() == pytest.approx(truth[0].item(), rel=1e-3)


def test_missed_bound_holds_and_is_useful() -> None:
    ratios = []
    for seed in range(60):
        weight = matrix_with_spectrum(160, 150, decaying_spectrum(150, rate=0.02), seed=seed)
        cold = topk_svd([weight], k=3, seed=seed)[0]
        warm = topk_svd([weight], k=3, warm=[cold], seed=seed + 1000)[0]
        following = torch.linalg.svdvals(weight.double())[3].item()
        ratios += [cold.missed.item() / following, warm.missed.item() / following]
    assert min(ratios) >= 1.0  # fails with probability 1e-3 each; the seeds are fixed
    assert max(ratios) < 4.0


def test_status_tells_when_it_did_not_converge() -> None:
    """A flat spectrum cannot be resolved by two reads; the reported residual says so."""
    flat = torch.randn(500, 500)
    got = topk_svd([flat], k=3, reads=2)[0]
    assert got.status == NOT_CONVERGED
    assert got.residual.max() / got.S[0] > 2e-4


def test_more_reads_are_more_accurate() -> None:
    weight = matrix_with_spectrum(300, 300, decaying_spectrum(300, rate=0.004))
    errors = [product_error(weight, *topk_svd([weight], k=3, reads=reads)[0][:3]) for reads in (2, 4, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


def test_bad_input_is_refused_by_name() -> None:
    weight = torch.randn(6, 4)
    with pytest.raises(TypeError, match="wrap a single one in a list"):
        topk_svd(weight, k=1)
    with pytest.raises(TypeError, match=r"weights\[1\] has dtype torch.int64"):
        topk_svd([weight, torch.ones(3, 3, dtype=torch.int64)], k=1)
    with pytest.raises(ValueError, match=r"k=5 for weights\[0\] must lie in 1\.\.4"):
        topk_svd([weight], k=5)
    with pytest.raises(ValueError, match=r"k=0 for weights\[0\]"):
        topk_svd([weight], k=0)
    with pytest.raises(ValueError, match=r"weights\[0\] is empty"):
        topk_svd([torch.empty(0, 4)], k=1)
    with pytest.raises(ValueError, match="2 dimensions"):
        topk_svd([torch.randn(3)], k=1)
    with pytest.raises(ValueError, match="equally long"):
        topk_svd([weight], k=[1, 2])
    with pytest.raises(TypeError, match="seed='x' must be an integer, got str"):
        topk_svd([weight], k=1, seed="x")
    with pytest.raises(ValueError, match="seed=-5 must be at least 0"):
        topk_svd([weight], k=1, seed=-5)
    with pytest.raises(TypeError, match="keys='a' must be a list of names, one for each matrix"):
        topk_svd([weight], k=1, keys="a")
    with pytest.raises(ValueError, match="reads=0 must be at least 1"):
        topk_svd([weight], k=1, reads=0)
    with pytest.raises(ValueError, match=r"warm\[0\] has U \(6, 4\)"):
        topk_svd([torch.randn(9, 8)], k=1, warm=topk_svd([weight], k=1))
    with pytest.raises(ValueError, match="impl='fast' is none of"):
        topk_svd([weight], k=1, impl="fast")
    assert topk_svd([], k=3) == []


def test_operator_checks(preferred: str) -> None:
    weights, starts = [torch.randn(20, 9), torch.randn(9, 30)], [torch.randn(4, 9), torch.randn(4, 9)]
    torch.library.opcheck(torch.ops.s2d.topk_svd.default, (weights, starts, [2, 2], [2, 2], preferred))


def test_parameters_autocast_and_numpy_integers() -> None:
    weight = torch.nn.Parameter(matrix_with_spectrum(90, 80, decaying_spectrum(80)))
    plain = topk_svd([weight], k=3)[0]
    assert not plain.S.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = topk_svd([weight], k=np.int64(3))[0]
    assert all(torch.equal(x, y) for x, y in zip(plain.basis, inside.basis, strict=True))


@pytest.mark.parametrize("chosen", [None, "cuda"])
def test_a_weight_changed_while_the_call_is_queued(
    chosen: str | None, preferred: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after the call on the same stream changes nothing about it, and it changes nothing in the weight."""
    if chosen == "cuda" and device.type == "cpu":
        build_emulated()
        monkeypatch.setenv("S2D_NATIVE", "emulated")
    weights = [torch.randn(300, 200, device=device), torch.randn(200, 300, device=device).mT]
    copies = [weight.clone() for weight in weights]
    versions = [weight._version for weight in weights]
    impl = chosen or (None if device.type == "cuda" else preferred)
    expected = topk_svd(copies, k=3, impl=impl)
    if device.type == "cuda":
        torch.cuda._sleep(100_000_000)  # the call surely is in the queue when the weights are overwritten
    got = topk_svd(weights, k=3, impl=impl)
    assert [weight._version for weight in weights] == versions
    for weight in weights:
        weight.zero_()
    for result, wanted in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(result.basis, wanted.basis, strict=True))
        assert torch.equal(result.missed, wanted.missed)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_fp64_range(scale: float) -> None:
    weight = matrix_with_spectrum(70, 60, decaying_spectrum(60, rate=0.1), dtype=torch.float64)
    got = topk_svd([weight * scale], k=3)[0]
    assert got.status == CONVERGED
    assert torch.allclose(got.S / scale, torch.linalg.svdvals(weight)[:3], rtol=1e-6)


def test_fp64_rank_deficient_has_zeros_not_noise() -> None:
    got = topk_svd([torch.outer(torch.randn(50).double(), torch.randn(40).double())], k=3)[0]
    assert not got.S[1:].any()
    assert not got.U[:, 1:].any()


@pytest.mark.parametrize("impl", [None, "cuda"])
def test_singular_values_behind_a_huge_outlier(impl: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """(s_1/s_2)^2 = 1e8 is beyond fp32: without fresh random directions the product shows v_1 and nothing else."""
    if impl == "cuda":
        build_emulated()
        monkeypatch.setenv("S2D_NATIVE", "emulated")
    spectrum = torch.cat([torch.tensor([1e4], dtype=torch.float64), decaying_spectrum(89, rate=0.05)])
    for seed in range(3):
        weight = matrix_with_spectrum(110, 90, spectrum, seed=seed)
        cold = topk_svd([weight], k=3, reads=5, seed=seed, impl=impl)[0]
        warm = topk_svd([weight], k=3, warm=[cold], seed=seed + 1, impl=impl)[0]
        truth = torch.linalg.svdvals(weight.double())[:3]
        for got in (cold, warm):
            torch.testing.assert_close(got.S.double(), truth, rtol=1e-3, atol=0)
            residual = weight.double().T @ got.U.double() - got.Vh.double().T * got.S.double()
            assert residual.norm(dim=0).max() / (truth[0] * 110 * torch.finfo(torch.float32).eps) < 30


def test_starts_are_each_layers_own_vectors_and_random_rows() -> None:
    """As if drawn one by one, whatever else is in the call; zero and non-finite vectors give way to random ones."""
    shapes = [(40, 24), (24, 40), (40, 24), (9, 5), (40, 24), (7, 1), (90, 24)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float32, torch.float16, torch.float32]
    weights = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    ks = [3, 3, 2, 3, 1, 1, 3]
    previous: list = list(topk_svd(weights, k=ks))
    previous[4] = None
    previous[0].basis.Vh[1] = 0
    previous[0].basis.Vh[2, 5] = float("nan")
    previous[6] = previous[6].basis
    names = ["a", "a", "b", "", "", "c", "a"]
    found = start_blocks(weights, ks, previous, 7, names)
    for index, (weight, k, before, name) in enumerate(zip(weights, ks, previous, names, strict=True)):
        m, n = weight.shape
        digest = hashlib.blake2b(f"7|{name}|{m}x{n}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        width = min(m, n, 16 if before is None else 8)
        expected = torch.randn(width, min(m, n), generator=generator).to(found[index].dtype)
        if before is not None:
            basis = getattr(before, "basis", before)
            vectors = (basis.Vh if m >= n else basis.U.mT)[: width - 1]
            keep = torch.tensor([bool(v.isfinite().all() and v.any()) for v in vectors], dtype=torch.bool)
            expected[: len(vectors)][keep] = vectors[keep]
            assert keep.sum() == len(vectors) - 2 * (index == 0)
        assert found[index].dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        assert torch.equal(found[index], expected), index
        assert found[index].is_contiguous()
        assert found[index].data_ptr() % 64 == 0
        (alone,) = start_blocks([weight], [k], [before], 7, [name])
        assert torch.equal(alone, expected)


def test_a_warm_call_makes_few_calls_for_each_matrix() -> None:
    """On a GPU each costs the host some microseconds, and those that are no views a launch."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for matrices in (10, 30):
        weights = [torch.randn(24, 16) for _ in range(matrices)]
        previous = topk_svd(weights, k=3, impl="torch")
        with Count() as count:
            start_blocks(weights, [3] * matrices, previous, 1, [""] * matrices)
        counts.append(count.calls)
    assert counts[1] - counts[0] <= 20 * 3
