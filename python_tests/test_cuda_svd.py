"""topk_svd of csrc/topk_svd.cu: executed by the emulation on the CPU, or on a GPU with --device cuda."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from emulated import build_emulated, run_sanitized
from helpers import matrix_with_spectrum, product_error
from torch import Tensor

from s2d_kernels import S2D, _native, cuda_svd, ops, topk_svd
from s2d_kernels.svd import CONVERGED, NON_FINITE, NOT_CONVERGED, OVERFLOW, TopkSVD, block_krylov
from s2d_kernels.torch_svd import _Bucket, _largest_element

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulation for CPU tensors; S2D_LIBRARY names another build of it (AddressSanitizer)."""
    if request.config.getoption("--device") == "cpu" and not os.environ.get("S2D_LIBRARY"):
        build_emulated()
        monkeypatch.setenv("S2D_NATIVE", "emulated")
    yield
    if _native.emulated():
        _native.load().s2d_emulation_set_order(0, 0)


@pytest.fixture(params=[-1, 3], ids=["streamed", "team-of-3"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of all matrices. Tests without this fixture take the chosen form, for small ones a team of one block."""
    monkeypatch.setattr(cuda_svd, "TEAM", request.param)
    return int(request.param)


def decay(count: int, rate: float = 0.05, top: float = 10.0) -> Tensor:
    return top * torch.exp(-rate * torch.arange(count, dtype=torch.float64))


def truth_error(weight: Tensor, got: TopkSVD) -> float:
    return product_error(weight.cpu(), got.U.cpu(), got.S.cpu(), got.Vh.cpu())


def svd(weights: list[Tensor], device: torch.device, impl: str = "cuda", **kwargs: object) -> list[TopkSVD]:
    """Through the public function; `warm` moves with the weights."""
    there = [W.to(device) for W in weights] if impl == "cuda" else weights
    return topk_svd(there, impl=impl, **kwargs)


def assert_as_good_as_torch(
    weights: list[Tensor], device: torch.device, k: int | list[int], reads: int | None = None, seed: int = 0
) -> list[TopkSVD]:
    """Error of G at most 4 times that of plain torch (other rounding, same algorithm), plus 2e-6; same statements."""
    ours = svd(weights, device, k=k, reads=reads, seed=seed)
    theirs = topk_svd(weights, k=k, reads=reads, seed=seed, impl="torch")
    for index, (weight, a, b) in enumerate(zip(weights, ours, theirs, strict=True)):
        assert a.status.item() == b.status.item(), index
        assert truth_error(weight, a) <= 4 * truth_error(weight, b) + 2e-6, index
        scale = max(b.S[0].item(), 1e-38)
        torch.testing.assert_close(a.S.cpu(), b.S, rtol=1e-5, atol=2e-6 * scale)
        # u_i = W v_i / s_i carries the rounding of W v_i, eps s_1, along u_1: the least residual there is
        floor = 4e-7 * scale * (scale / b.S.clamp(min=1e-6 * scale)) + 1e-5 * scale
        assert bool(((a.residual.cpu() - b.residual).abs() <= 0.5 * b.residual + floor).all()), index
        # what rounding leaves of the leading component in the rest
        torch.testing.assert_close(a.missed.cpu(), b.missed, rtol=1e-2, atol=2e-5 * scale)
        length = a.S.cpu() > 0
        for vectors in (a.U.mT, a.Vh):
            eye = torch.diag(length.double())
            error = (vectors.cpu().double() @ vectors.cpu().double().mT - eye).abs().max()
            assert error < 2e-5 + 4e-7 * scale / max(b.S[-1].item(), 1e-4 * scale), index
    return ours


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "view", "every second column"], ids=lambda name: name.replace(" ", "-")
)
def test_layouts_and_dtypes(layout: str, dtype: torch.dtype, form: int, device: torch.device) -> None:
    """Tall, wide, odd; each way in which a tile can be copied."""
    weights = []
    shapes = [(72, 64), (64, 88), (37, 41), (131, 66), (66, 200)]
    for index, (m, n) in enumerate(shapes if form < 0 else shapes[:2]):
        W = matrix_with_spectrum(m, n, decay(min(m, n)), seed=index).to(dtype)
        if layout == "transposed":
            W = W.T.contiguous().T
        elif layout == "view":
            storage = torch.full((m + 3, n + 16), float("nan"), dtype=dtype)
            storage[2 : m + 2, 8 : n + 8] = W
            W = storage[2 : m + 2, 8 : n + 8]
        elif layout == "every second column":
            storage = torch.full((m, 2 * n), float("nan"), dtype=dtype)
            storage[:, ::2] = W
            W = storage[:, ::2]
        weights.append(W)
    ours = [topk_svd([on_device(W, device)], k=3, reads=3, impl="cuda")[0] for W in weights[1:2]]
    together = topk_svd([on_device(W, device) for W in weights], k=3, reads=3, impl="cuda")
    for weight, got in zip(weights, together, strict=True):
        expected = topk_svd([weight], k=3, reads=3, impl="torch")[0]
        assert truth_error(weight.float(), got) <= 4 * truth_error(weight.float(), expected) + 2e-6
        torch.testing.assert_close(got.missed.cpu(), expected.missed, rtol=1e-2, atol=1e-4)
    for alone, got in zip(ours, together[1:], strict=False):
        assert all(torch.equal(x, y) for x, y in zip(alone.basis, got.basis, strict=True))


def on_device(view: Tensor, device: torch.device) -> Tensor:
    """The same view of the same storage there."""
    storage = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).to(device)
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


def test_spectra(form: int, device: torch.device) -> None:
    n = 90
    cluster = torch.cat([torch.full((3,), 2.0, dtype=torch.float64), decay(n - 3, top=1.0)])
    near = torch.cat(
        [torch.tensor([2.0, 2.0 * (1 - 1e-3), 2.0 * (1 - 2e-3)], dtype=torch.float64), decay(n - 3, top=1.0)]
    )
    outlier = torch.cat([torch.tensor([1e4], dtype=torch.float64), decay(n - 1, top=1.0)])
    generator = torch.Generator().manual_seed(3)
    rank_two = torch.randn(110, 2, generator=generator) @ torch.randn(2, n, generator=generator)
    weights = [
        matrix_with_spectrum(110, n, decay(n, rate=0.4), seed=1),
        torch.randn(110, n, generator=generator),
        matrix_with_spectrum(n, 110, cluster, seed=2),
        matrix_with_spectrum(110, n, near, seed=3),
        matrix_with_spectrum(110, n, outlier, seed=4),
        rank_two,
    ]
    got = assert_as_good_as_torch(weights, device, 3, reads=4)
    assert got[5].S[2].item() < 1e-5 * got[5].S[0].item()


def test_zero_tiny_and_everything_wanted(form: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.zeros(70, 80),
        torch.zeros(3, 5),
        torch.randn(1, 37, generator=generator),
        torch.randn(41, 1, generator=generator),
        torch.randn(7, 9, generator=generator),
        torch.randn(1, 1, generator=generator),
    ]
    got = assert_as_good_as_torch(weights, device, [3, 3, 1, 1, 7, 1])
    for nothing in got[:2]:
        assert nothing.status == CONVERGED
        assert not any(t.any() for t in (nothing.U, nothing.S, nothing.Vh, nothing.missed))
    assert topk_svd([], k=3, impl="cuda") == []


@pytest.mark.parametrize("shape", [(80, 70), (20, 9)])
def test_extreme_scales(shape: tuple[int, int], form: int, device: torch.device) -> None:
    weight = matrix_with_spectrum(*shape, decay(min(shape), rate=0.1))
    weights = [(weight.double() * (scale / weight.abs().max().item())).float() for scale in (1e30, 1e-30, 1e-37, 3e38)]
    got = svd(weights, device, k=3, reads=4)
    for scaled, result in zip(weights[:3], got, strict=False):
        truth = torch.linalg.svdvals(scaled.double())[:3]
        torch.testing.assert_close(result.S.cpu().double(), truth, rtol=5e-6, atol=0)
        assert result.status == CONVERGED
    assert got[3].status == OVERFLOW  # the largest singular value itself exceeds fp32
    assert not any(t.any() for t in got[3].basis)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_matrix_leaves_its_neighbours_alone(dtype: torch.dtype, form: int, device: torch.device) -> None:
    good = matrix_with_spectrum(70, 60, decay(60), seed=1).to(dtype)
    bad = [good.clone() for _ in range(3)]
    bad[0][17, 3], bad[1][69, 59], bad[2][0, 0] = float("nan"), float("inf"), -float("inf")
    alone = svd([good], device, k=3, reads=3)[0]
    results = svd([bad[0], good, *bad[1:]], device, k=3, reads=3)
    for index in (0, 2, 3):
        assert results[index].status == NON_FINITE
        assert not any(t.any() for t in results[index].basis)
        assert results[index].missed == 0
    assert all(torch.equal(x, y) for x, y in zip(alone.basis, results[1].basis, strict=True))


def test_cold_and_warm_in_one_call(form: int, device: torch.device) -> None:
    weights = [matrix_with_spectrum(m, n, decay(min(m, n), rate=0.02), seed=n) for m, n in [(150, 140), (60, 90)]]
    cold = svd(weights, device, k=3)
    moved = [W + 1e-3 * torch.randn(W.shape) for W in weights]
    mixed = svd([*moved, weights[1]], device, k=[3, 3, 8], warm=[cold[0], cold[1], None], seed=5)
    for weight, got in zip([*moved, weights[1]], mixed, strict=True):
        assert truth_error(weight, got) < 1e-3
    alone = svd(moved[:1], device, k=3, warm=cold[:1], seed=5)[0]
    assert all(torch.equal(x, y) for x, y in zip(alone.basis, mixed[0].basis, strict=True))
    assert [result.basis.S.shape[0] for result in mixed] == [8, 8, 16]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_bits_do_not_depend_on_the_order_of_threads(order: int, form: int, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("only the emulation's threads have an order that can be chosen")
    weights = [matrix_with_spectrum(70, 50, decay(50), seed=1), matrix_with_spectrum(40, 75, decay(40), seed=2)]
    first = topk_svd(weights, k=2, reads=3, impl="cuda")
    _native.load().s2d_emulation_set_order(order, 7)
    again = topk_svd(weights, k=2, reads=3, impl="cuda")
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.basis, b.basis, strict=True))
        assert torch.equal(a.missed, b.missed)


def workspace_of(table: cuda_svd._Table, D: int, d: int, rows: int, chunks: int) -> dict[str, Tensor]:
    """Q, Y and Z of a table's one matrix, by the layout of `place` in csrc/topk_svd.cu."""
    start = -(-16 // 256) * 256 + -(-4 * chunks // 256) * 256
    parts = {}
    for name, length, pitch in (("Q", d, -(-d // 32) * 32), ("Y", D, -(-D // 128) * 128), ("Z", d, -(-d // 32) * 32)):
        memory = table.workspace[start : start + 4 * rows * pitch].view(torch.float32).view(rows, pitch)
        parts[name] = memory[:, :length]
        start += -(-4 * rows * pitch // 256) * 256
    return parts


def test_primitives_against_those_of_torch(form: int, device: torch.device) -> None:
    """After each step: Q orthonormal and spanning what torch's spans, and its products.

    The resident form does all steps in `begin`.
    """
    D, d, b, reads = 200, 70, 8, 4
    weight = matrix_with_spectrum(D, d, decay(d, rate=0.02), seed=9)
    start = torch.randn(b, d, generator=torch.Generator().manual_seed(1))
    theirs = _Bucket(weight[None], _largest_element(weight)[None], start[None], 3, reads)
    ours = cuda_svd._Table([weight.to(device)], [start.to(device)], [3], [reads])
    with ours.context:
        for primitives in (theirs, ours):
            primitives.begin()
        scale = 2.0 ** -theirs.exponent.item()
        for step in range(reads):
            for primitives in (theirs, ours):
                primitives.product(step)
                if step + 1 < reads:
                    primitives.orthonormalize(step)
            parts = workspace_of(ours, D, d, b * reads, 1)
            Q, Y, Z = (parts[name].cpu()[b * step : b * (step + 1)].double() for name in "QYZ")
            A = scale * weight.double()
            torch.testing.assert_close(Q @ Q.T, torch.eye(b, dtype=torch.float64), rtol=0, atol=2e-6)
            torch.testing.assert_close(Y, Q @ A.T, rtol=0, atol=2e-6)
            torch.testing.assert_close(Z, Y @ A, rtol=0, atol=4e-6)
            other = theirs.K[step][0].double()
            # the same space; directions that hardly differ from the blocks before it are lost to rounding in time
            torch.testing.assert_close(other.T @ other, Q.T @ Q, rtol=0, atol=1e-4 * 10**step)


@contextmanager
def emulated_device(shared_kib: int, multiprocessors: int) -> Iterator[None]:
    """Another GPU's shared memory of a block and number of multiprocessors."""
    library = _native.load()
    library.s2d_emulation_set_shared_limit.restype = ctypes.c_size_t
    library.s2d_emulation_set_shared_limit.argtypes = [ctypes.c_size_t]
    before = library.s2d_emulation_set_shared_limit(shared_kib * 1024)
    count = library.s2d_emulation_set_multiprocessors(multiprocessors)
    try:
        yield
    finally:
        library.s2d_emulation_set_shared_limit(before)
        library.s2d_emulation_set_multiprocessors(count)


@pytest.mark.parametrize("limit", [99, 163, 227])
def test_what_is_accepted_can_be_launched(limit: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory of sm_86 and sm_120, sm_80, sm_90: no shape is accepted and then refused by the driver."""
    if device.type != "cpu":
        pytest.skip("the emulation's limit can be chosen, a GPU's cannot")
    monkeypatch.setattr(cuda_svd, "TEAM", -1)
    refused = []
    with emulated_device(limit, 8):
        for d in (256, 368, 512, 768):
            for dtype in (torch.float32, torch.bfloat16):
                for transposed in (False, True):
                    W = torch.ones(d, d + 16, dtype=dtype)
                    W = W if transposed else W.T.contiguous()
                    for b in (8, 16):
                        starts = [torch.randn(b, d)]
                        if cuda_svd._supports([W], starts, [1], [1]):
                            table = cuda_svd._Table([W], starts, [1], [1])
                            table.begin()
                            table.product(0)
                        else:
                            refused.append((d, dtype, transposed, b))
    assert not refused


def teams(weights: list[Tensor], b: int = 8, reads: int = 4) -> list[int]:
    starts = [torch.empty(min(b, *W.shape), min(W.shape)) for W in weights]
    layers = [cuda_svd._layer(W, Q, 1, reads, [Q] * 6) for W, Q in zip(weights, starts, strict=True)]
    return _native.SvdRun(layers, 0).teams()


def test_teams_of_known_devices(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP2-B's matrices: on an H200 eleven teams for 768 x 768, or two for 3072 x 768, at once."""
    if device.type != "cpu":
        pytest.skip("the emulation's device can be chosen, a GPU cannot")
    shapes = [(768, 768), (3072, 768), (768, 3072), (2304, 768)]
    fp32, bf16 = ([torch.empty(shape, dtype=dtype) for shape in shapes] for dtype in (torch.float32, torch.bfloat16))
    with emulated_device(227, 132):
        assert teams(fp32) == [12, 48, 48, 36]
        assert teams(bf16) == [6, 24, 24, 18]
        too_large = torch.empty(9216, 768)  # 144 blocks
        no_form = torch.empty(1100, 1030)
        dense = torch.empty(3072, 20)
        assert teams([too_large, no_form, dense]) == [0, 0, 0]
        monkeypatch.setattr(cuda_svd, "TEAM", 11)
        assert teams(fp32[:1]) == [0]
        assert not cuda_svd._supports(fp32[:1], [torch.empty(8, 768)], [1], [4])
        monkeypatch.setattr(cuda_svd, "TEAM", 133)
        assert not cuda_svd._supports(fp32[:1], [torch.empty(8, 768)], [1], [4])
        monkeypatch.setattr(cuda_svd, "TEAM", 132)
        assert cuda_svd._supports(fp32[:1], [torch.empty(8, 768)], [1], [4])
        monkeypatch.setattr(cuda_svd, "TEAM", -1)
        assert teams(fp32) == [0] * 4
    monkeypatch.setattr(cuda_svd, "TEAM", 0)
    with emulated_device(163, 108):
        assert teams(fp32) == [16, 64, 96, 48]
    with emulated_device(99, 142):
        assert teams(fp32) == [48, 0, 0, 0]


@pytest.mark.sanitize
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("limit", "d", "dtype"), [(99, 96, torch.float32), (227, 240, torch.bfloat16)])
def test_a_slab_that_fills_shared_memory(
    limit: int, d: int, dtype: torch.dtype, transposed: bool, device: torch.device
) -> None:
    """As many rows as fit two blocks, then one panel more: three blocks."""
    if device.type != "cpu":
        pytest.skip("the emulation's limit can be chosen, a GPU's cannot")
    with emulated_device(limit, 8):
        filled = next(D for D in range(d, 9999, 16) if teams([torch.empty(D + 16, d, dtype=dtype)], 8, 2) == [3])
        for D, blocks in ((filled, 2), (filled + 16, 3)):
            generator = torch.Generator().manual_seed(1)
            W = torch.randn(D, 3, generator=generator) @ torch.randn(3, d, generator=generator)
            W = (W.T.contiguous() if transposed else W).to(dtype)
            if not transposed:
                assert teams([W], 8, 2) == [blocks]
            start = torch.randn(8, d, generator=generator)
            assert cuda_svd._supports([W], [start], [2], [2])
            got = torch.ops.s2d.topk_svd([W], [start], [2], [2], "cuda")
            torch.testing.assert_close(got[1][:2].double(), torch.linalg.svdvals(W.double())[:2], rtol=2e-5, atol=0)


@pytest.mark.parametrize("team", [1, 2, 5, 8])
def test_teams_of_any_size(team: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not divide evenly, blocks without rows (5 panels for 8 blocks), both directions, two groups."""
    weights = [
        matrix_with_spectrum(131, 66, decay(66, rate=0.1), seed=1),
        matrix_with_spectrum(80, 75, decay(75, rate=0.3), seed=2).T,
        matrix_with_spectrum(90, 97, decay(90, rate=0.2), seed=3).bfloat16(),
    ]
    ks = [3, 2, 11 if team == 2 else 3]  # 22 columns: three groups of 8 kN rows
    monkeypatch.setattr(cuda_svd, "TEAM", team)
    assert teams(weights, 16, 3) == [team] * 3
    ours = svd(weights, device, k=ks, reads=3)
    for weight, k, got in zip(weights, ks, ours, strict=True):
        expected = topk_svd([weight], k=k, reads=3, impl="torch")[0]
        assert got.status == expected.status
        assert truth_error(weight.float(), got) <= 4 * truth_error(weight.float(), expected) + 2e-6
        torch.testing.assert_close(got.missed.cpu(), expected.missed, rtol=1e-2, atol=1e-4)


def test_a_refresh_takes_no_more_multiprocessors_than_it_may(device: torch.device) -> None:
    """From S2D's argument to the grid of the kernel that holds on to its blocks; and the bits are the same."""
    if device.type != "cpu":
        pytest.skip("the emulation counts the blocks of a launch, a GPU does not")
    taken, states = [], []
    with emulated_device(99, 9):
        for max_sms in (None, 5):
            torch.manual_seed(1)
            model = torch.nn.Sequential(*(torch.nn.Linear(140, 140) for _ in range(3)))
            reg = S2D(model, interval=4, lead=1, threshold=1e-6, max_sms=max_sms)
            reg.impl = "cuda"  # of S2D's argument only the SVD is in question here
            _native.load().s2d_emulation_cooperative_blocks()
            for _ in range(2):
                model(torch.randn(5, 140, generator=torch.Generator().manual_seed(2))).sum().backward()
                reg.add_grad()
            taken.append(_native.load().s2d_emulation_cooperative_blocks())
            states.append(reg.state_dict())
            reg.close()
    assert taken == [6, 4]  # teams of two
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    with pytest.raises(ValueError, match="max_sms=0 must be at least 1"):
        S2D(model, max_sms=0)
    with pytest.raises(ValueError, match="max_sms=0 must be at least 1"):
        topk_svd([torch.ones(3, 3)], k=1, max_sms=0)


def test_neighbours_and_schedule_do_not_change_bits(device: torch.device) -> None:
    """Teams of one to four blocks in several waves, beside streamed matrices: each as if it were alone."""
    if device.type != "cpu":
        pytest.skip("the emulation's device can be chosen, a GPU cannot")
    sizes = [(90, 70), (250, 70), (60, 130), (330, 64), (85, 66), (9, 12), (1500, 70)]
    weights = [matrix_with_spectrum(m, n, decay(min(m, n), rate=0.2), seed=m) for m, n in sizes]
    weights[2] = weights[2].bfloat16()
    with emulated_device(48, 9):
        chosen = teams(weights, 16, 3)
        assert chosen == [2, 4, 1, 4, 2, 0, 0]
        alone = [topk_svd([W], k=3, reads=3, impl="cuda")[0] for W in weights]
        for most, blocks in ((None, 8), (3, 4), (5, 4), (7, 6)):  # never fewer than the largest team
            order = [3, 6, 1, 0, 5, 2, 4]
            _native.load().s2d_emulation_cooperative_blocks()
            together = topk_svd([weights[i] for i in order], k=3, reads=3, max_sms=most, impl="cuda")
            assert _native.load().s2d_emulation_cooperative_blocks() == blocks
            for index, got in zip(order, together, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(alone[index].basis, got.basis, strict=True)), index
                assert torch.equal(alone[index].missed, got.missed)


@pytest.mark.parametrize("byte", [0, 255, 63])
def test_what_the_workspace_held_does_not_matter(
    byte: int, form: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [matrix_with_spectrum(70, 50, decay(50), seed=1), torch.full((64, 60), float("nan"))]
    expected = svd(weights, device, k=3, reads=2)
    fresh = ops.aligned_bytes
    monkeypatch.setattr(ops, "aligned_bytes", lambda *arguments: fresh(*arguments).fill_(byte))
    for a, b in zip(expected, svd(weights, device, k=3, reads=2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.basis, b.basis, strict=True))
        assert torch.equal(a.missed, b.missed)
        assert torch.equal(a.status, b.status)


def test_dependent_rows_of_a_step(form: int, device: torch.device) -> None:
    """A start whose rows nearly coincide, a matrix of which nothing is left after two steps: Q stays orthonormal."""
    D, d, b, reads = 120, 60, 8, 4
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(D, 11, generator=generator) @ torch.randn(11, d, generator=generator)
    start = torch.randn(1, d, generator=generator) + 1e-4 * torch.randn(b, d, generator=generator)
    table = cuda_svd._Table([weight.to(device)], [start.to(device)], [3], [reads])
    with table.context:
        block_krylov(table)
        Q = workspace_of(table, D, d, b * reads, 1)["Q"].cpu().double()
    torch.testing.assert_close(Q @ Q.T, torch.eye(b * reads, dtype=torch.float64), rtol=0, atol=3e-6)


def test_large_sides_and_many_matrices(device: torch.device) -> None:
    """The forms for d > 1024, and more matrices than one table holds."""
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.bfloat16):
        W = (torch.randn(1100, 3, generator=generator) @ torch.randn(3, 1037, generator=generator)).to(dtype)
        got = topk_svd([W.to(device)], k=2, reads=2, impl="cuda")[0]
        truth = torch.linalg.svdvals(W.double())[:2]
        torch.testing.assert_close(got.S.cpu().double(), truth, rtol=1e-5, atol=0)
    small = [torch.randn(5, 9, generator=generator) for _ in range(270)]
    for W, got in zip(small, topk_svd([W.to(device) for W in small], k=2, impl="cuda"), strict=True):
        torch.testing.assert_close(got.S.cpu(), torch.linalg.svdvals(W)[:2], rtol=1e-5, atol=1e-6)


def test_a_newly_grown_direction_is_found(device: torch.device) -> None:
    weight = matrix_with_spectrum(90, 80, decay(80), seed=1)
    for seed in range(4):
        (before,) = svd([weight], device, k=3, seed=seed)
        U, Vh = before.basis.U.cpu(), before.basis.Vh.cpu()
        u, v = torch.randn(90), torch.randn(80)
        u, v = u - U @ (U.mT @ u), v - Vh.mT @ (Vh @ v)
        spiked = weight + 15.0 * torch.outer(u / u.norm(), v / v.norm())
        (got,) = svd([spiked], device, k=3, warm=[before], seed=100 + seed)
        assert got.S[0].item() == pytest.approx(torch.linalg.svdvals(spiked.double())[0].item(), rel=1e-3)


def test_status_and_bound_of_a_flat_spectrum(device: torch.device) -> None:
    flat = torch.randn(150, 140)
    (got,) = svd([flat], device, k=3, reads=2)
    assert got.status == NOT_CONVERGED
    assert got.residual.max() / got.S[0] > 2e-4
    assert got.missed >= torch.linalg.svdvals(flat.double())[3]


def test_large_widths_and_what_is_not_supported(form: int, device: torch.device) -> None:
    weight = matrix_with_spectrum(80, 72, decay(72, rate=0.1))
    got = svd([weight], device, k=16, reads=2)[0]  # two groups of 16 rows a read
    assert got.basis.S.shape == (32,)
    assert (
        truth_error(weight, got) <= 4 * truth_error(weight, topk_svd([weight], k=16, reads=2, impl="torch")[0]) + 2e-6
    )
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype torch.float64"):
        svd([weight.double()], device, k=1)
    with pytest.raises(ValueError, match=r"starts\[0\] \(4, 9\) .* does not fit weights\[0\] \(80, 72\)"):
        torch.ops.s2d.topk_svd([weight.to(device)], [torch.ones(4, 9, device=device)], [1], [2], "cuda")
    with pytest.raises(ValueError, match=r"reads\[0\]=1 of 4 rows find k=4 triplets"):
        torch.ops.s2d.topk_svd([weight.to(device)], [torch.ones(4, 72, device=device)], [4], [1], "cuda")
    refused = [
        (torch.zeros(2200, 2100), 1, None, r"min\(m, n\)=2100 exceeds 2048, the most in torch.float32"),
        (torch.zeros(4200, 4100).bfloat16(), 1, None, r"min\(m, n\)=4100 exceeds 4096, the most in torch.bfloat16"),
        (torch.zeros(80, 72), 17, None, "36 rows of its start exceed 32: take a smaller k"),
        (torch.zeros(400, 300), 16, 9, r"reads \* rows of a start\)=288 exceeds 256: take fewer reads than 9"),
    ]
    for large, k, reads, problem in refused:
        shape = rf"\({large.shape[0]}, {large.shape[1]}\)"
        message = rf"weights\[1\] of shape {shape} is too large for impl='cuda': .*{problem}"
        with pytest.raises(ValueError, match=message):
            svd([weight, large], device, k=[1, k], reads=reads)
    assert not cuda_svd._supports([weight.double()], [weight[:1]], [1], [1])


def test_what_a_matrix_is_computed_by_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops._PREFERENCE, "cpu", ("cuda", "torch"))
    weights = [matrix_with_spectrum(40, 30, decay(30), seed=1), torch.randn(9, 12).double(), torch.randn(12, 50)]
    mixed = topk_svd(weights, k=2)
    for weight, got, impl in zip(weights, mixed, ("cuda", "torch", "cuda"), strict=True):
        alone = topk_svd([weight], k=2, impl=impl)[0]
        assert all(torch.equal(x, y) for x, y in zip(alone.basis, got.basis, strict=True))


def test_in_the_regularizer(device: torch.device) -> None:
    """A refresh and its decay with impl="cuda" throughout, beside the same with plain torch."""
    weights = []
    for impl in ("torch", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 24)).to(device)
        with torch.no_grad():
            model[0].weight += 2 * torch.outer(torch.randn(48), torch.randn(24)).to(device) / 7
        reg = S2D(model, mode="decoupled", strength=0.5, interval=3, lead=1, threshold=0.5, impl=impl)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(16, 24, generator=generator).to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            reg.decay_(1e-3)
        assert float(reg.penalty) > 0
        reg.close()
        weights.append(model[0].weight.detach().cpu())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_operator_checks(device: torch.device) -> None:
    weights = [torch.randn(20, 9, device=device), torch.randn(9, 30, device=device)]
    starts = [torch.randn(4, 9, device=device) for _ in weights]
    torch.library.opcheck(torch.ops.s2d.topk_svd.default, (weights, starts, [2, 2], [2, 2], "cuda"))


def test_in_a_cuda_graph_without_a_synchronization(form: int, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    weights = [torch.randn(300, 200, device=device), torch.randn(64, 96, device=device)]
    cold = topk_svd(weights, k=3, impl="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_svd(weights, k=3, warm=cold, seed=1, impl="cuda")
        starts = [torch.randn(8, min(W.shape), device=device) for W in weights]
        expected = torch.ops.s2d.topk_svd(weights, starts, [3, 3], [4, 4], "cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = torch.ops.s2d.topk_svd(weights, starts, [3, 3], [4, 4], "cuda")
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert cold[0].status.device.type == "cuda"


def test_address_sanitizer_finds_nothing(device: torch.device) -> None:
    if device.type != "cpu" or os.environ.get("S2D_LIBRARY"):
        pytest.skip("AddressSanitizer is for the emulation; compute-sanitizer is its counterpart on a GPU")
    done = run_sanitized(__file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
