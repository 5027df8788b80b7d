"""`add_penalty_grad_` with rounding="stochastic": the bits of the definition on every implementation, and no bias.

The functions that begin with `run_` take an implementation and a device; Triton is interpreted in a process of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import build_emulated
from interpreting import Done, save_time
from torch import Tensor

from s2d_kernels import _native, _native_cpu, add_penalty_grad_, reference
from s2d_kernels._native import NativeLibraryError
from s2d_kernels.rounding import STEP
from s2d_kernels.svd import TopkSVD

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHAPES = [(1, 1), (1, 37), (37, 1), (37, 63), (33, 264), (35, 99), (70, 24)]
# Deviations that a right result exceeds once in 1.7 million trials (of a normal distribution).
Z = 5.0
LARGEST = torch.finfo(torch.bfloat16).max


def factors_of(U: Tensor, Vh: Tensor, device: torch.device = CPU) -> TopkSVD:
    k = U.shape[1]
    zero = torch.zeros((), device=device)
    S = torch.ones(k, device=device)
    return TopkSVD(U.to(device), S, Vh.to(device), torch.zeros_like(S), zero, zero.int(), None)


def exact_problem(m: int, n: int, rank: int, generator: torch.Generator) -> tuple[Tensor, TopkSVD, Tensor]:
    """Gradient, factors and coefficients whose products and sums are exact in fp32, in whatever order.

    Multiples of 2^-20 below 8 in magnitude, so that rounding to bf16 drops up to 15 bits that are not 0.
    """

    def integers(*shape: int, high: int) -> Tensor:
        return torch.randint(-high, high + 1, shape, generator=generator).float()

    grad = (2.0 * torch.randn(m, n, generator=generator)).clamp(-4, 4).bfloat16().float()
    grad = (grad * 2**20).round() / 2**20
    U, Vh = integers(m, rank, high=31) / 2**8, integers(rank, n, high=31) / 2**6
    c = integers(rank, high=15) / 2**6
    return grad.bfloat16(), factors_of(U, Vh), c


def layouts(grad: Tensor, device: torch.device, *, all_of_them: bool) -> list[Tensor]:
    """Views with the values of `grad` and other strides."""
    m, n = grad.shape
    padded = torch.zeros(m, n + 11, dtype=grad.dtype, device=device)
    views = [
        torch.zeros(m, n, dtype=grad.dtype, device=device),
        torch.zeros(2 * m, n + 8, dtype=grad.dtype, device=device)[::2, :n],
        padded[:, 3 : n + 3],
    ]
    if all_of_them:
        views.append(torch.zeros(n, m, dtype=grad.dtype, device=device).T)
        views.append(torch.zeros(n + 2, m + 5, dtype=grad.dtype, device=device)[1 : n + 1, 3 : m + 3].T)
        views.append(torch.zeros(m, 3 * n, dtype=grad.dtype, device=device)[:, ::3])
    for view in views:
        view.copy_(grad)
    return views


def bits(tensor: Tensor) -> Tensor:
    """A copy, as integers."""
    kind = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.cpu().clone(memory_format=torch.contiguous_format).view(kind)


def on(device: torch.device, factors: TopkSVD) -> TopkSVD:
    return factors._replace(U=factors.U.to(device), S=factors.S.to(device), Vh=factors.Vh.to(device))


def run_the_bits_of_the_definition(impl: str, device: torch.device) -> None:
    """Many layers in one call, of which some are fp32 and some of rank 0: sums by hand, rounded by the reference."""
    generator = torch.Generator().manual_seed(1)
    grads, factors, coefficients, ranks, expected, seeds = [], [], [], [], [], []
    for index, (m, n) in enumerate(SHAPES):
        grad, some, c = exact_problem(m, n, 3, generator)
        rank = (3, 2, 1, 3, 0, 3, 2)[index]
        exact = grad.double() + (some.U[:, :rank].double() * c[:rank].double()) @ some.Vh[:rank].double()
        total = exact.float()
        assert torch.equal(total.double(), exact)
        for view in layouts(grad, device, all_of_them=impl in ("torch", "reference", "triton")):
            seed = (-1, 2**63 - 1, 5, -(2**40), 0, 2**32 + 7, 77)[index] - 1000 * len(grads)
            seed = (seed + 2**63) % 2**64 - 2**63
            seeds.append(seed)
            grads.append(view)
            expected.append(reference.stochastically_rounded(total, torch.tensor(seed)) if rank else grad)
            factors.append(on(device, some))
            coefficients.append(c.to(device))
            ranks.append(rank)
        wide = grad.float().to(device)
        seeds.append(index)
        grads.append(wide)
        expected.append(total)
        factors.append(on(device, some))
        coefficients.append(c.to(device))
        ranks.append(rank)
    given = torch.tensor(seeds, device=device)
    changed = 0
    slow = impl == "triton" and device.type == "cpu"
    for form in (torch.tensor(ranks, device=device), *([] if slow else [ranks])):
        saved = [grad.clone() for grad in grads]
        add_penalty_grad_(
            grads, factors, coefficients=coefficients, ranks=form, rounding="stochastic", seed=given, impl=impl
        )
        for index, (grad, truth) in enumerate(zip(grads, expected, strict=True)):
            assert torch.equal(bits(grad), bits(truth)), (impl, index, tuple(grad.shape), grad.stride())
            changed += int((bits(grad) != bits(saved[index])).sum())
            grad.copy_(saved[index])
    assert changed > 5_000


def run_every_kind_of_number(impl: str, device: torch.device) -> None:
    """Sums of every exponent and both signs: subnormal, exact in bf16, the largest, against the bits by hand."""
    generator = torch.Generator().manual_seed(2)
    every = torch.arange(0, 2**16, 67 if impl in ("cuda", "triton") and device.type == "cpu" else 3)
    upper = torch.cat([torch.tensor([0x7F7F, 0xFF7F, 0x7F7E]).repeat(20), every])
    lower = torch.randint(0, 2**16, upper.shape, generator=generator)
    lower[::5], lower[1::5] = 0, 0xFFFF
    u = (upper << 16 | lower).numpy().astype(np.uint32)
    x = torch.from_numpy(u.view(np.float32).copy())
    usable = x.isfinite() & (x != 0)
    x, u = x[usable], u[usable.numpy()]
    n = 17
    grad = torch.zeros(len(x), n, dtype=torch.bfloat16, device=device)
    add_penalty_grad_(
        [grad], [factors_of(x[:, None], torch.ones(1, n), device)], coefficients=[torch.ones(1, device=device)],
        rounding="stochastic", seed=3, impl=impl,
    )  # fmt: skip
    r = reference.rounding_bits(3, len(x), n).numpy().astype(np.uint64)
    wide = u.astype(np.uint64)[:, None] + r
    finite = (wide & 0x7FFFFFFF) < 0x7F800000
    expected = np.where(finite, wide, u[:, None]) >> 16
    assert np.array_equal(bits(grad).numpy().view(np.uint16), expected.astype(np.uint16)), impl
    assert bool(grad.isfinite().all())
    assert int((~finite).sum()) > 0  # there are some that would have become infinite
    exact = torch.from_numpy(u & 0xFFFF == 0)
    assert torch.equal(grad[exact].float().cpu(), x[exact][:, None].expand(-1, n))


def run_beyond_the_largest(impl: str, device: torch.device) -> None:
    """No finite sum becomes infinite; infinities, NaN and sums that overflow fp32 are what they are to the nearest."""
    n = 40
    values = torch.tensor([LARGEST, -LARGEST, LARGEST, -LARGEST, math.inf, -math.inf, math.nan, LARGEST, -LARGEST])
    added = torch.tensor([1.3e36, -1.3e36, -1e30, 1e30, 1.0, 1.0, 1.0, 3e38, -3e38])
    assert float(np.float32(LARGEST) + np.float32(1.3e36)) > LARGEST
    grad = values[:, None].repeat(1, n).bfloat16().to(device)
    nearest = grad.clone()
    factors = factors_of(added[:, None], torch.ones(1, n), device)
    one = [torch.ones(1, device=device)]
    add_penalty_grad_([grad], [factors], coefficients=one, rounding="stochastic", seed=9, impl=impl)
    add_penalty_grad_([nearest], [factors], coefficients=one, impl=impl)
    assert bool((grad[0].float() == LARGEST).all())
    assert bool((grad[1].float() == -LARGEST).all())
    assert bool(grad[2:4].isfinite().all())
    assert torch.equal(grad[4:6], nearest[4:6])
    assert bool(grad[6].isnan().all())
    assert torch.equal(grad[7:], nearest[7:])


def run_nothing_to_add_changes_no_bit(impl: str, device: torch.device) -> None:
    """Coefficients 0, rank 0, factors that are not finite; -0, NaN and Inf in the gradient stay as they are."""
    start = torch.randn(37, 64).bfloat16().to(device)
    start[::2] = -0.0
    start[5, 5], start[7, 7] = float("nan"), float("inf")
    factors = factors_of(torch.randn(37, 3), torch.randn(3, 64), device)
    bad = factors._replace(U=torch.full_like(factors.U, float("nan")))
    ones, zeros = torch.ones(3, device=device), torch.zeros(3, device=device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    cases: list[tuple[TopkSVD, dict[str, Any]]] = [
        (factors, {"coefficients": [zeros]}), (factors, {"strength": 0.0}), (factors, {"ranks": none}),
        (bad, {"coefficients": [ones]}), (factors, {"coefficients": [ones * math.inf]}),
    ]  # fmt: skip
    for some, arguments in cases:
        for columns in (64, 63):
            grad = start[:, :columns].clone()
            part = some._replace(Vh=some.Vh[:, :columns])
            add_penalty_grad_([grad], [part], rounding="stochastic", seed=4, impl=impl, **arguments)
            kept = ~start[:, :columns].isnan().cpu()
            assert torch.equal(bits(grad)[kept], bits(start[:, :columns])[kept]), (impl, arguments)
            assert bool(grad[5, 5].isnan())


def run_what_bf16_has_exactly_stays(impl: str, device: torch.device) -> None:
    """Whatever the seed; and real sums only ever go to the two neighbours."""
    generator = torch.Generator().manual_seed(5)
    grad = torch.randint(-64, 65, (23, 50), generator=generator).bfloat16().to(device)
    U = torch.randint(-3, 4, (23, 1), generator=generator).float()
    Vh = torch.randint(-8, 9, (1, 50), generator=generator).float()
    exact = grad.cpu().float() + U @ Vh
    factors, c = factors_of(U, Vh, device), torch.ones(1, device=device)
    copies = [grad.clone() for _ in range(30)]
    add_penalty_grad_(
        copies, [factors] * 30, coefficients=[c] * 30, rounding="stochastic", seed=int(torch.randint(99, ())), impl=impl
    )
    assert all(torch.equal(copy.cpu().float(), exact) for copy in copies)
    smooth = factors_of(torch.randn(23, 3, generator=generator), torch.randn(3, 50, generator=generator), device)
    total = grad.cpu().double() + smooth.U.cpu().double() @ smooth.Vh.cpu().double()
    add_penalty_grad_(
        [grad], [smooth], coefficients=[torch.ones(3, device=device)], rounding="stochastic", seed=6, impl=impl
    )
    unit = 2.0 ** (torch.frexp(total.abs()).exponent.double() - 8)
    assert bool(((grad.cpu().double() - total).abs() < unit * (1 + 2**-12)).all())  # the sum's own error in fp32


def run_a_layer_depends_on_its_own_seed_alone(impl: str, device: torch.device) -> None:
    """Not on its place among others, which an int or a tensor of one gives it, nor on those; tensors are read anew."""
    generator = torch.Generator().manual_seed(7)
    problems = [exact_problem(m, n, 2, generator) for m, n in ((9, 40), (33, 17), (5, 8), (40, 40))]

    def add(chosen: list[int], **arguments: Any) -> list[Tensor]:
        grads = [problems[i][0].to(device, copy=True) for i in chosen]
        parts = [on(device, problems[i][1]) for i in chosen]
        cs = [problems[i][2].to(device) for i in chosen]
        add_penalty_grad_(grads, parts, coefficients=cs, rounding="stochastic", impl=impl, **arguments)
        return [bits(grad) for grad in grads]

    def int64(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    together = add([0, 1, 2, 3], seed=11)
    single = add([0, 1, 2, 3], seed=torch.tensor([11], device=device))
    skipping = add([0, 1, 2, 3], seed=11, ranks=[2, 0, 2, 2])
    for i in range(4):
        seed = torch.tensor([int64(11 + i * STEP)], device=device)
        (alone,) = add([i], seed=seed)
        assert torch.equal(together[i], alone)
        assert torch.equal(single[i], alone)
        if i != 1:
            assert torch.equal(skipping[i], alone)
    own = torch.tensor([5, 6, 7], device=device)
    for i, got in zip([3, 0, 1], add([3, 0, 1], seed=own), strict=True):
        assert torch.equal(got, add([i], seed=5 + [3, 0, 1].index(i))[0])
    before = add([3, 0], seed=own[:2])
    own += 1
    after = add([3, 0], seed=own[:2])
    assert torch.equal(after[0], add([3], seed=6)[0])
    assert not torch.equal(before[0], after[0])


RUNS: dict[str, Callable[[str, torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}


@pytest.mark.parametrize("impl", ["torch", "reference", "cpu"])
@pytest.mark.parametrize("name", list(RUNS))
def test_on_a_cpu(name: str, impl: str) -> None:
    RUNS[name](impl, CPU)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    build_emulated()
    monkeypatch.delenv("S2D_LIBRARY", raising=False)
    monkeypatch.setenv("S2D_NATIVE", "emulated")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", list(RUNS))
def test_emulated(name: str) -> None:
    RUNS[name]("cuda", CPU)


@pytest.mark.interpreted(*RUNS)
def test_interpreted(interpreted: Done) -> None:
    """All in one process: most of its time is the import."""
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.sanitize
@pytest.mark.parametrize("impl", ["cuda", "triton", "torch"])
@pytest.mark.parametrize("name", list(RUNS))
def test_on_the_gpu(name: str, impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    RUNS[name](impl, device)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_captured_graph_reads_the_seeds_at_each_replay(impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    grad, factors, c = exact_problem(64, 96, 2, torch.Generator().manual_seed(8))
    static, part, c, seeds = grad.to(device), on(device, factors), c.to(device), torch.tensor([5], device=device)

    def add(target: Tensor, seed: int | Tensor) -> None:
        add_penalty_grad_([target], [part], coefficients=[c], rounding="stochastic", seed=seed, impl=impl)

    add(static, seeds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(static, seeds)
    for seed in (5, 6, 5):
        static.copy_(grad)
        seeds.fill_(seed)
        graph.replay()
        expected = grad.to(device, copy=True)
        add(expected, seed)
        assert torch.equal(static, expected), seed


# --- the random numbers --------------------------------------------------------------------------------------------


def number_by_hand(seed: int, i: int, j: int) -> int:
    """The definition in Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    seed %= 2**64
    key = mix(seed % 2**32 ^ mix(seed // 2**32 ^ 0x9E3779B9))
    pair = mix(j // 2 ^ mix(i ^ key))
    return pair >> 16 if j % 2 else pair & 0xFFFF


def test_the_definition_in_integers() -> None:
    for seed in (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789123456789):
        got = reference.rounding_bits(seed, 40, 33)
        assert got.tolist() == [[number_by_hand(seed, i, j) for j in range(33)] for i in range(40)]


def test_the_random_numbers_are_uniform_and_those_of_neighbours_independent() -> None:
    """Counts of each of the 256 upper and lower bytes by chi-square; products of neighbours, of which the mean is 0."""
    m, n = 600, 800
    numbers = reference.rounding_bits(1, m, n)
    for byte in (numbers >> 8, numbers & 0xFF):
        counts = torch.bincount(byte.flatten(), minlength=256).double()
        chi = float(((counts - m * n / 256) ** 2 / (m * n / 256)).sum())
        # Laurent and Massart: beyond 2 sqrt(d x) + 2 x above d with probability exp(-x); below likewise; x = 14
        assert 255 - 2 * math.sqrt(255 * 14) < chi < 255 + 2 * math.sqrt(255 * 14) + 28
    centred = (numbers.double() + 0.5) / 2**16 - 0.5
    others = {
        "next column": torch.roll(centred, 1, 1), "second column": torch.roll(centred, 2, 1),
        "next row": torch.roll(centred, 1, 0),
    }  # fmt: skip
    for name, seed in (("next seed", 2), ("next layer", 1 + STEP), ("other word", 1 + 2**32)):
        others[name] = (reference.rounding_bits(seed, m, n).double() + 0.5) / 2**16 - 0.5
    for name, other in others.items():
        z = float((centred * other).sum()) * 12 / math.sqrt(m * n)  # each product has the variance 1 / 144
        assert abs(z) < Z, name


# --- what they are for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_how_often_it_rounds_up_follows_the_fraction(impl: str) -> None:
    """1 + f 2^-7 becomes 1 + 2^-7 in a binomial number of places, of f each; -1 - f 2^-7 alike."""
    m, n, trials = 128, 300, 8
    for sign in (1.0, -1.0):
        for f in (2**-10, 0.03, 0.25, 0.5, 0.71875, 1 - 2**-8):
            fraction = round(f * 2**16) / 2**16
            grads = [torch.full((m, n), sign).bfloat16() for _ in range(trials)]
            factors = factors_of(torch.full((m, 1), sign * fraction * 2**-7), torch.ones(1, n))
            add_penalty_grad_(
                grads, [factors] * trials, coefficients=[torch.ones(1)] * trials, rounding="stochastic", seed=1,
                impl=impl,
            )  # fmt: skip
            away = torch.stack(grads).float() == sign * (1 + 2**-7)
            assert bool((away | (torch.stack(grads).float() == sign)).all())
            count, total = int(away.sum()), m * n * trials
            assert abs(count - total * fraction) < Z * math.sqrt(total * fraction * (1 - fraction)), (sign, f)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_the_mean_over_many_seeds_is_the_fp32_sum(impl: str) -> None:
    """Element by element: the mean's distance from the sum in standard deviations, and the squares of all of them."""
    seeds = 600
    generator = torch.Generator().manual_seed(0)
    grad, factors, c = exact_problem(30, 41, 3, generator)
    total = grad.double() + (factors.U.double() * c.double()) @ factors.Vh.double()
    copies = [grad.clone() for _ in range(seeds)]
    add_penalty_grad_(copies, [factors] * seeds, coefficients=[c] * seeds, rounding="stochastic", seed=12, impl=impl)
    below = torch.from_numpy((total.float().numpy().view(np.uint32) & 0xFFFF0000).view(np.float32)).double()
    unit = torch.from_numpy(((total.float().numpy().view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)) - below
    fraction = ((total - below) / unit).double()
    among = (fraction > 0.05) & (fraction < 0.95)  # enough of either, for a normal distribution of the mean
    assert int(among.sum()) > 700
    mean = torch.stack(copies).double().mean(0)
    z = ((mean - total) / (unit.abs() * (fraction * (1 - fraction) / seeds).sqrt()))[among]
    d = len(z)
    assert float(z.abs().max()) < Z
    assert abs(float(z.sum())) / math.sqrt(d) < Z
    assert d - 2 * math.sqrt(14 * d) < float((z * z).sum()) < d + 2 * math.sqrt(14 * d) + 28  # as above
    nearest = grad.clone()
    add_penalty_grad_([nearest], [factors], coefficients=[c], impl=impl)
    off = ((nearest.double() - total) / (unit.abs() * (fraction * (1 - fraction) / seeds).sqrt()))[among]
    assert float((off * off).sum()) > 100 * d  # a test that the nearest would not pass


def test_threads_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    problems = [exact_problem(m, n, 3, generator) for m, n in ((300, 1003), (70, 64))]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        for impl in ("cpu", "torch"):
            grads = [grad.clone() for grad, _, _ in problems]
            add_penalty_grad_(
                grads, [f for _, f, _ in problems], coefficients=[c for _, _, c in problems],
                rounding="stochastic", seed=8, impl=impl,
            )  # fmt: skip
            results.append(grads)
    torch.set_num_threads(threads)
    assert all(torch.equal(bits(a), bits(b)) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_fp32_and_fp64_are_as_to_the_nearest() -> None:
    for dtype in (torch.float32, torch.float64):
        for impl in ("torch", "reference", *(("cpu",) if dtype == torch.float32 else ())):
            grads = [torch.randn(9, 20).to(dtype)] * 2
            grads = [grad.clone() for grad in grads]
            factors = factors_of(torch.randn(9, 2).to(dtype), torch.randn(2, 20).to(dtype))
            add_penalty_grad_(grads[:1], [factors], impl=impl)
            add_penalty_grad_(grads[1:], [factors], rounding="stochastic", seed=1, impl=impl)
            assert torch.equal(*grads)


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_mistakes_are_named_and_nothing_is_written() -> None:
    factors = factors_of(torch.ones(6, 1), torch.ones(1, 4))
    grads = [torch.zeros(6, 4).bfloat16(), torch.zeros(6, 4).bfloat16()]

    def add(rounding: Any = "stochastic", **arguments: Any) -> None:
        add_penalty_grad_(grads, [factors] * 2, rounding=rounding, **arguments)

    with pytest.raises(ValueError, match="rounding='up' is neither 'nearest' nor 'stochastic'"):
        add("up", seed=1)
    with pytest.raises(ValueError, match="rounding=None is neither"):
        add(None)
    with pytest.raises(ValueError, match="rounding='stochastic' needs seed=, another one at each call"):
        add()
    with pytest.raises(ValueError, match="seed=7 belongs to rounding='stochastic'"):
        add("nearest", seed=7)
    with pytest.raises(ValueError, match=r"seed=-1 must be in 0\.\.9223372036854775807"):
        add(seed=-1)
    with pytest.raises(ValueError, match=r"seed=-5 must be in"):
        add_penalty_grad_([], [], rounding="stochastic", seed=-5)
    with pytest.raises(ValueError, match=r"seed=9223372036854775808 must be in"):
        add(seed=2**63)
    with pytest.raises(TypeError, match=r"seed=1\.5 must be an integer, got float"):
        add(seed=1.5)
    with pytest.raises(TypeError, match=r"seed has dtype torch\.int32, expected one of torch\.int64"):
        add(seed=torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"seed must have shape \[1\] or \[2\], got \(3,\)"):
        add(seed=torch.arange(3))
    with pytest.raises(ValueError, match=r"seed must have shape \[1\] or \[2\], got \(\)"):
        add(seed=torch.tensor(3))
    with pytest.raises(ValueError, match="seed is on meta, expected cpu"):
        add(seed=torch.ones(2, dtype=torch.int64, device="meta"))
    grads[1] = grads[1].half()
    with pytest.raises(ValueError, match=r"grads\[1\] has dtype torch\.float16: stochastic rounding is for bf16"):
        add(seed=1, ranks=[0, 1])
    assert not any(bool(grad.any()) for grad in grads)
    add_penalty_grad_([], [], rounding="stochastic", seed=1)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("impl", ["torch", "reference", "cpu", "cuda"])
def test_the_operation_checks_its_seeds(impl: str) -> None:
    U, Vh, c = torch.ones(6, 1), torch.ones(1, 4), torch.ones(1)

    def call(dtype: torch.dtype, seeds: Tensor) -> None:
        torch.ops.s2d.add_penalty_grad_([torch.zeros(6, 4, dtype=dtype)], [U], [Vh], [c], None, impl, seeds=seeds)

    with pytest.raises(ValueError, match=r"grads\[0\] has dtype torch\.float16"):
        call(torch.float16, torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"equally long, got grads: 1, seeds: 2"):
        call(torch.bfloat16, torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="seeds has dtype"):
        call(torch.bfloat16, torch.ones(1, dtype=torch.int32))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("impl", ["torch", "cpu", "cuda"])
def test_operator_checks(impl: str) -> None:
    grad, factors, c = exact_problem(6, 5, 2, torch.Generator().manual_seed(0))
    arguments = ([grad], [factors.U], [factors.Vh], [c], None, impl)
    torch.library.opcheck(torch.ops.s2d.add_penalty_grad_.default, arguments, {"seeds": torch.tensor([3])})


def test_in_a_compiled_function() -> None:
    grad, factors, c = exact_problem(6, 5, 2, torch.Generator().manual_seed(0))
    seeds = torch.tensor([3])

    def step(grad: Tensor) -> Tensor:
        torch.ops.s2d.add_penalty_grad_([grad], [factors.U], [factors.Vh], [c], None, None, seeds=seeds)
        return grad * 2

    expected = step(grad.clone())
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(grad.clone()), expected)


def c_layer(grad: Tensor, seed: Tensor, **changes: Any) -> _native.PenaltyLayer:
    U, Vh, c = (torch.ones(size) for size in (len(grad), grad.shape[1], 1))
    kept.extend((U, Vh, c, seed))
    fields = {
        "grad": grad.data_ptr(), "U": U.data_ptr(), "Vh": Vh.data_ptr(), "coefficients": c.data_ptr(),
        "device_seed": seed.data_ptr(), "rows": len(grad), "cols": grad.shape[1], "grad_stride": grad.stride(0),
        "u_row_stride": 1, "u_col_stride": 1, "vh_stride": grad.shape[1], "rank": 1, "dtype": 1,
    }  # fmt: skip
    return _native.PenaltyLayer(**fields | changes)


kept: list[Tensor] = []  # what the tables above point to


@pytest.mark.usefixtures("emulated")
def test_the_libraries_refuse_a_seed_for_fp16_and_one_off_alignment() -> None:
    grad, seed = torch.zeros(5, 8, dtype=torch.bfloat16), torch.tensor([1])
    for change in ({"dtype": 2}, {"device_seed": seed.data_ptr() + 4}):
        with pytest.raises(NativeLibraryError, match="s2d_add_penalty_grad"):
            _native.add_penalty_grad([c_layer(grad, seed, **change)], 0)
    with pytest.raises(NativeLibraryError, match="status 1"):
        _native_cpu.add_penalty_grad([c_layer(grad, seed, dtype=2)], 1)
    assert not grad.any()
    _native.add_penalty_grad([c_layer(grad, seed)], 0)
    assert bool((grad == 1).all())


@pytest.mark.usefixtures("emulated")
def test_more_layers_than_one_launch_takes() -> None:
    """Of both kinds in turn, so that each has more than one table."""
    generator = torch.Generator().manual_seed(2)
    problems = [exact_problem(3, 5 + i % 7, 1 + i % 2, generator) for i in range(650)]
    results = []
    for impl in ("cuda", "reference"):
        grads = [grad.clone() if i % 2 else grad.float() for i, (grad, _, _) in enumerate(problems)]
        add_penalty_grad_(
            grads, [f for _, f, _ in problems], coefficients=[c for _, _, c in problems],
            rounding="stochastic", seed=5, impl=impl,
        )  # fmt: skip
        results.append(grads)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*results, strict=True))


if __name__ == "__main__":
    save_time()
    for run in sys.argv[1:]:
        torch.manual_seed(0)
        print(run, flush=True)
        RUNS[run]("triton", CPU)
