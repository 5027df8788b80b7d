"""topk_svd in Triton: beside impl="torch" and an fp64 SVD, run by Triton's interpreter on CPU tensors.

As in test_triton.py, each test runs a function `run_...` of this file in a process of its own that has
TRITON_INTERPRET=1; with `--device cuda` they run compiled as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import decaying_spectrum, lapack_ratios, matrix_with_spectrum, product_error
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from interpreting import Done, save_time
from test_svd_contract import LIMIT, STRUCTURAL_RATIOS
from torch import Tensor

from s2d_kernels import ops, topk_svd, triton_kernels
from s2d_kernels.svd import CONVERGED, FAILURE_PROBABILITY, NON_FINITE, OVERFLOW, SVDBasis
from s2d_kernels.torch_svd import _Bucket
from s2d_kernels.triton_kernels import matrices, svd

ROOT = Path(__file__).parent.parent
MISSING = f"Triton is missing: {triton_kernels.INSTALL_HINT}"
# Rounding, relative to s_1: both implementations sum in fp32 in different orders, Triton's with operands split into
# parts of 11 or 8 bits. The floor of the reported residuals is as high.
TINY = 3e-6
EPS = torch.finfo(torch.float32).eps


class Problem(NamedTuple):
    """Arguments of the operator; lists over matrices."""

    weights: list[Tensor]
    starts: list[Tensor]
    ks: list[int]
    reads: list[int]


class Result(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor
    missed: Tensor
    status: Tensor


def problem(
    weights: Sequence[Tensor], *, k: int | Sequence[int] = 2, b: int | Sequence[int] = 4, reads: int | Sequence[int] = 4
) -> Problem:
    """Random starts; narrow blocks keep the interpreter's eigenproblems small."""
    count = len(weights)
    lists = [list(value) if isinstance(value, Sequence) else [value] * count for value in (k, b, reads)]
    starts = []
    for index, (weight, width) in enumerate(zip(weights, lists[1], strict=True)):
        generator = torch.Generator().manual_seed(index)
        d = min(weight.shape)
        starts.append(torch.randn(min(width, d), d, generator=generator).to(weight.device))
    ks = [min(k_i, *weight.shape) for k_i, weight in zip(lists[0], weights, strict=True)]
    return Problem(list(weights), starts, ks, lists[2])


def solve(problem: Problem, impl: str = "triton") -> list[Result]:
    flat = torch.ops.s2d.topk_svd(*problem, impl)
    return [Result(*flat[6 * i : 6 * i + 6]) for i in range(len(problem.weights))]


def spectrum_matrix(m: int, n: int, device: torch.device, values: Tensor, **kwargs: Any) -> Tensor:
    return matrix_with_spectrum(m, n, values, **kwargs).to(device)


def check(problem: Problem, results: list[Result] | None = None) -> None:
    """No further from the truth than impl="torch", up to rounding; what is reported is true."""
    results = solve(problem) if results is None else results
    for index, (weight, k, got, expected) in enumerate(
        zip(problem.weights, problem.ks, results, solve(problem, "torch"), strict=True)
    ):
        wide = weight.double().cpu()
        got, expected = (Result(*(t.cpu() for t in result)) for result in (got, expected))
        truth = torch.linalg.svdvals(wide)
        top = max(float(truth[0]), 1e-300)
        label = f"matrix {index} {tuple(weight.shape)} {weight.dtype}"
        assert all(
            g.shape == e.shape and g.dtype == e.dtype and g.is_contiguous() for g, e in zip(got, expected, strict=True)
        )
        assert got.status == expected.status, label
        errors = [float((r.S.double()[:k] - truth[:k]).abs().max()) / top for r in (got, expected)]
        assert errors[0] <= 1.5 * errors[1] + TINY, (label, errors)
        errors = [product_error(wide, r.U[:, :k], r.S[:k], r.Vh[:k]) for r in (got, expected)]
        assert errors[0] <= 1.5 * errors[1] + 2 * TINY, (label, errors)
        U, S, Vh = got.U.double(), got.S.double(), got.Vh.double()
        for vectors in (U.mT[S > 1e-3 * top], Vh[S > 1e-3 * top]):
            gram = vectors @ vectors.mT
            assert (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max() < 1e-5 if len(gram) else True, label
        left, right = wide.mT @ U - Vh.mT * S, wide @ Vh.mT - U * S
        recomputed, other = (left, right) if weight.shape[0] >= weight.shape[1] else (right, left)
        kept = S > 0
        difference = (recomputed.norm(dim=0) - got.residual.double())[kept].abs()
        # Rounding of the products, s_1 eps, is divided by s where a left vector is made of it.
        rounding = TINY * top * (1 + top / S[kept])
        assert (difference <= rounding).all(), (label, difference / rounding)
        assert (other.norm(dim=0)[kept] <= rounding).all(), label
        assert not U[:, ~kept].any(), label
        assert not Vh[~kept].any(), label
        # Where nothing was missed, rounding is what remains of the random row: eps s_1 of a row of Z, under the root.
        missed, bound = (float(r.missed) / top for r in (got, expected))
        reads, d = problem.reads[index], len(truth)
        rounding = 0.0
        if reads * len(problem.starts[index]) < d:
            rounding = EPS * d**0.5 * (float(truth[k]) / top) ** (2 * reads - 2) / FAILURE_PROBABILITY
        under_the_root = missed ** (2 * reads) - bound ** (2 * reads)
        assert missed == pytest.approx(bound, rel=1e-3, abs=1e-5) or abs(under_the_root) <= rounding, label


def run_spectra(device: torch.device) -> None:
    """Mixed shapes, ranks, widths and reads in one call."""
    fast = decaying_spectrum(40, rate=0.4)
    equal = torch.cat([torch.full((3,), 2.0), 0.2 * fast])
    near = torch.cat([torch.tensor([2.0, 1.998, 1.5]), 0.2 * fast])
    outlier = torch.cat([torch.tensor([1e4]), fast])
    weights = [
        spectrum_matrix(60, 44, device, fast),
        spectrum_matrix(300, 141, device, fast, seed=1),
        spectrum_matrix(131, 260, device, fast, seed=2),
        spectrum_matrix(70, 64, device, equal, seed=3),
        spectrum_matrix(64, 72, device, near, seed=4),
        spectrum_matrix(50, 48, device, outlier, seed=5),
        spectrum_matrix(40, 60, device, fast[:2], seed=6),
        torch.zeros(48, 32, device=device),
        spectrum_matrix(48, 40, device, fast[:40], seed=7) * 1e30,
        spectrum_matrix(40, 48, device, fast[:40], seed=8) * 1e-30,
        spectrum_matrix(36, 35, device, fast[:35], seed=9) * 3e-38,
        torch.randn(1, 37, device=device),
        torch.randn(199, 1, device=device),
        spectrum_matrix(24, 5, device, fast[:5], seed=10),
        torch.randn(45, 40, device=device),
    ]
    ks = [2, 3, 3, 3, 2, 1, 3, 2, 2, 2, 2, 1, 1, 5, 2]
    check(problem(weights, k=ks, b=[4] * 8 + [3, 2, 2, 4, 1, 8, 4], reads=[4, 4, 3, 4, 4, 4, 3] + [2] * 8))


def run_layouts(device: torch.device) -> None:
    """The three ways to the elements; the values are those of the copy, the bits too."""
    spectrum = decaying_spectrum(48, rate=0.4)
    for dtype in svd.DTYPES:
        base = spectrum_matrix(144, 72, device, spectrum, dtype=dtype)
        storage = torch.zeros(146, 160, device=device, dtype=dtype)
        storage[1:145, 3:147:2] = base
        aligned = torch.zeros(144, 80, device=device, dtype=dtype)
        aligned[:, :72] = base
        views = [base, base.T, base.T.contiguous(), storage[1:145, 3:147:2], storage[1:145, 3:147:2].T, aligned[:, :72]]
        if dtype != torch.float32:
            views = views[::3]
        paths = [svd._path(A if A.shape[0] >= A.shape[1] else A.T) for A in views]
        assert paths == ([0, 0, 1, 2, 2, 0] if dtype == torch.float32 else [0, 2])
        given = problem(views, b=2, reads=2)
        given.starts[1:] = [given.starts[0]] * (len(views) - 1)
        results = solve(given)
        # On a GPU each way has its own instructions, with another order of the sums.
        compared = results[1:] if device.type == "cpu" else []
        for view, result in zip(views[1:], compared, strict=False):
            left, right = (result.U, result.Vh) if view.shape[0] > view.shape[1] else (result.Vh.mT, result.U.mT)
            assert torch.equal(left, results[0].U)
            assert torch.equal(right, results[0].Vh)
        check(given, results)


def run_non_finite(device: torch.device) -> None:
    """Zeros and a flag for the bad ones; their neighbours keep their bits, alone or not, the second time too."""
    spectrum = decaying_spectrum(40, rate=0.4)
    good = [spectrum_matrix(150, 40, device, spectrum), spectrum_matrix(44, 132, device, spectrum, seed=1)]
    bad = []
    for value in (float("nan"), float("inf"), -float("inf")):
        bad.append(good[0].clone())
        bad[-1][140, 3] = value
    huge = torch.full((40, 36), 3e38, device=device)
    given = problem([bad[0], good[0], bad[1], huge, good[1], bad[2]], b=3, reads=2)
    results = solve(given)
    for index, status in ((0, NON_FINITE), (2, NON_FINITE), (3, OVERFLOW), (5, NON_FINITE)):
        assert results[index].status == status
        assert not any(t.any() for t in results[index][:5])
    for members in ([1], [4, 1]):
        alone = solve(Problem(*([values[i] for i in members] for values in given)))
        for index, result in zip(members, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, results[index], strict=True)), index
    check(Problem(*([values[i] for i in (1, 4)] for values in given)), [results[1], results[4]])


def run_primitives(device: torch.device) -> None:
    """Scale, blocks and products next to torch's, step by step, from the same start."""
    weights = [
        spectrum_matrix(300, 140, device, decaying_spectrum(100, rate=0.05)) * 2.0**70,
        spectrum_matrix(60, 144, device, decaying_spectrum(60, rate=0.05), seed=1),
    ]
    given = problem(weights, k=2, b=[4, 17], reads=[2, 1])
    given.starts[0][1] = given.starts[0][0]  # a dependent direction: a row of zeros
    batch = svd._Batch(*given)
    buckets = [
        _Bucket((w if w.shape[0] >= w.shape[1] else w.T)[None], w.abs().max()[None], start[None], k, reads)
        for w, start, k, reads in zip(*given, strict=True)
    ]

    def part(row: matrices.Matrix, offset: int, step: int, lead: int, cols: int) -> Tensor:
        return batch._part(offset + step * row.block * lead, row.block, lead)[:, :cols].double()

    def projector(rows: Tensor) -> Tensor:
        return rows.mT @ rows

    for primitives in (batch, *buckets):
        primitives.begin()
    for step in range(2):
        taking_part = [pair for pair in zip(batch.layout.rows, buckets, strict=True) if step < pair[0].reads]
        for row, bucket in taking_part:
            q, expected = part(row, row.Q, step, row.cols_lead, row.cols), bucket.K[step][0].double()
            torch.testing.assert_close(projector(q), projector(expected), rtol=0, atol=2e-5)
            assert (q != 0).any(1).sum() == (expected != 0).any(1).sum()
            above = part(row, row.Q, 0, row.cols_lead, row.cols)
            if step:
                assert (above @ q.mT).abs().max() < 1e-6
            # torch goes on from these rows, so that each product is compared by itself
            bucket.K[step] = q.float()[None]
        for primitives in (batch, *(bucket for _, bucket in taking_part)):
            primitives.product(step)
        for row, bucket in taking_part:
            y, z = part(row, row.Y, step, row.rows_lead, row.rows), part(row, row.Z, step, row.cols_lead, row.cols)
            for got, wanted in ((y, bucket.Y[step][0].double()), (z, bucket.Z[step][0].double())):
                assert (got - wanted).abs().max() <= TINY * wanted.abs().max()
            scale = batch.work64[row.state : row.state + 4].tolist()
            assert scale == [2.0 ** -bucket.exponent.item(), 1.0, bucket.exponent.item(), 0.0]
        if not step:
            for primitives in (batch, *buckets):
                primitives.orthonormalize(step)


def run_eigenvectors(device: torch.device) -> None:
    """H = V diag V^T to fp64, orthogonal V; clustered, graded, and of an order that is no power of two."""
    generator = torch.Generator().manual_seed(0)
    # The narrow tile: several to a matrix, as larger orders have it, at what an interpreter can be asked for.
    cases = [(13, 8), (2, 32), (1, 32)] + [(512, 32), (128, 32), (37, 32)] * (device.type == "cuda")
    for order, tile in cases:
        Q = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))[0]
        values = 10.0 ** -torch.linspace(0, 12, order, dtype=torch.float64)
        values[: order // 3] = 1.0
        matrix = (Q * values) @ Q.mT
        padded = 1 << (order - 1).bit_length()
        H, V = (torch.zeros(2, padded, padded, dtype=torch.float64) for _ in range(2))
        H[0, :order, :order] = matrix
        H, V = H.to(device), V.to(device)
        place = torch.zeros(1, dtype=torch.int32, device=device)
        _solve[(1,)](H, V, padded, place, TILE=tile, num_warps=svd.WARPS)
        copy = place.item() // padded**2
        diagonal, vectors = H[copy].diagonal().cpu(), V[copy].cpu()
        error = (diagonal[:order].sort().values - values.sort().values).abs().max()
        assert error < 2e-15 * padded, (order, error)
        eye = torch.eye(padded, dtype=torch.float64)
        assert (vectors.mT @ vectors - eye).abs().max() < 2e-15 * padded
        rebuilt = (vectors * diagonal) @ vectors.mT
        assert (rebuilt[:order, :order] - matrix).abs().max() < 2e-15 * padded


def run_public(device: torch.device) -> None:
    """Cold beside warm in one call, two dtypes, as a user calls it."""
    weights = [
        spectrum_matrix(50, 36, device, decaying_spectrum(36, rate=0.1)),
        spectrum_matrix(20, 30, device, decaying_spectrum(20, rate=0.1), dtype=torch.bfloat16),
    ]
    cold = topk_svd(weights, k=3, impl="torch")
    moved = [weight * 1.01 for weight in weights]
    got = topk_svd([moved[0], moved[1]], k=[3, 2], warm=[cold[0], None], seed=1, impl="triton")
    for weight, result, k in zip(moved, got, (3, 2), strict=True):
        assert result.status == CONVERGED
        assert result.U.shape == (weight.shape[0], k)
        assert product_error(weight.cpu(), *(t.cpu() for t in result[:3])) < 1e-3


def run_changed_while_queued(device: torch.device) -> None:
    """What comes after the call on the same stream changes nothing about it, and it changes nothing in the weight."""
    given = problem([torch.randn(30, 12, device=device), torch.randn(12, 30, device=device).mT], k=1, b=2, reads=2)
    expected = solve(given._replace(weights=[weight.clone() for weight in given.weights]))
    versions = [weight._version for weight in given.weights]
    if device.type == "cuda":
        torch.cuda._sleep(100_000_000)  # the call surely is in the queue when the weights are overwritten
    got = solve(given)
    assert [weight._version for weight in given.weights] == versions
    for weight in given.weights:
        weight.zero_()
    for result, wanted in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(result, wanted, strict=True))
    assert topk_svd([], k=3, impl="triton") == []


def run_spike(device: torch.device) -> None:
    """Orthogonal to all that is known, 1.5 s_1 high: found within one warm refresh, in 100 of 100 seeds.

    The library's own warm start and reads, at the least width there is: one known direction and one random one.
    """
    shapes = [(16, 12), (12, 16)] * 50
    weights = [matrix_with_spectrum(*s, decaying_spectrum(12, rate=0.03), seed=i) for i, s in enumerate(shapes)]
    names = [str(seed) for seed in range(100)]
    known, spiked = [], []
    for weight, exact in zip(weights, topk_svd(weights, k=1, keys=names, impl="torch"), strict=True):
        U, S, Vh, residual = exact.basis
        known.append(SVDBasis(U[:, :2], S[:2], Vh[:2], residual[:2]))
        u, v = torch.randn(weight.shape[0]), torch.randn(weight.shape[1])
        u, v = u - U[:, :2] @ (U[:, :2].mT @ u), v - Vh[:2].mT @ (Vh[:2] @ v)
        spiked.append((weight + 1.5 * S[0] * torch.outer(u / u.norm(), v / v.norm())).to(device))
    with mock.patch("s2d_kernels.svd.warm_width", return_value=2):
        got = topk_svd(spiked, k=1, warm=known, seed=1, keys=names, impl="triton")
    found = torch.stack([result.S[0] for result in got]).double().cpu()
    truth = torch.stack([torch.linalg.svdvals(weight.double().cpu())[0] for weight in spiked])
    assert all(len(result.basis.S) == 2 for result in got)
    assert ((found / truth - 1).abs() < 1e-3).all(), (found / truth - 1).abs().max()


def run_ratios(device: torch.device) -> None:
    """Where everything is resolved, each of LAPACK's ratios is that of rounding."""
    fast = decaying_spectrum(40, rate=1.0)
    outlier = torch.cat([torch.tensor([1e4]), fast])
    near = torch.cat([torch.tensor([1.0, 1.0, 1.0 - 1e-3]), 0.1 * fast])
    weights = [
        spectrum_matrix(70, 40, device, fast),
        spectrum_matrix(35, 150, device, fast[:35], seed=1),
        spectrum_matrix(36, 30, device, outlier[:30], seed=2),
        spectrum_matrix(16, 8, device, near[:8], seed=3),
        spectrum_matrix(7, 30, device, fast[:2], seed=4),
        spectrum_matrix(40, 38, device, fast[:38], seed=5) * 1e30,
        spectrum_matrix(25, 40, device, fast[:25], seed=6, dtype=torch.bfloat16).T,
        torch.randn(3, 6, device=device).half(),
        torch.randn(1, 37, device=device),
        torch.randn(53, 1, device=device),
    ]
    ks = [2, 1, 1, 3, 3, 2, 2, 3, 1, 1]
    given = problem(weights, k=ks, b=[4, 2, 3, 8, 8, 3, 4, 3, 1, 1], reads=[4, 4, 5, 1, 1, 4, 4, 1, 2, 2])
    for index, (weight, k, got) in enumerate(zip(weights, ks, solve(given), strict=True)):
        assert got.status == CONVERGED, index
        ratios = lapack_ratios(weight, got.U[:, :k], got.S[:k], got.Vh[:k], got.residual[:k])
        assert all(value < LIMIT for value in ratios.values()), (index, ratios)
    rank_one = torch.outer(torch.arange(1.0, 18.0), torch.arange(1.0, 13.0)).to(device)
    (got,) = solve(problem([rank_one], k=1, b=2, reads=2))
    assert not got.S[1:].any(), got.S  # zeros, not what the products were rounded by


# From each singular value to the next: the same, a gap of 1e-3, slow, fast, a huge outlier, nothing more.
FALLS = (1.0, 1.0 - 1e-3, 0.95, 0.5, 1e-4, 0.0)
EXAMPLES = 12


def run_properties(device: torch.device) -> None:
    """Any shape, spectrum, scale, layout, width and number of reads."""
    # Half of the sides are large enough for blocks that do not span the space.
    sizes = st.integers(1, 24) | st.integers(16, 24)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        m=sizes,
        n=sizes,
        falls=st.lists(st.sampled_from(FALLS), min_size=23, max_size=23),
        k=st.sampled_from([1, 2, 3, 24]),
        extra=st.integers(1, 2),
        reads=st.integers(1, 4),
        dtype=st.sampled_from(svd.DTYPES),
        power=st.integers(-30, 30),
        view=st.sampled_from(["rows", "columns", "every second"]),
        seed=st.integers(0, 99),
    )
    def run(
        m: int,
        n: int,
        falls: list[float],
        k: int,
        extra: int,
        reads: int,
        dtype: torch.dtype,
        power: int,
        view: str,
        seed: int,
    ) -> None:
        d = min(m, n)
        spectrum = torch.tensor([1.0, *falls[: d - 1]], dtype=torch.float64).cumprod(0)
        k = min(k, d)
        while k < d and falls[k - 1] > 0.9:
            k += 1  # within a cluster neither vectors nor G are determined
        if dtype == torch.float16:
            power %= 5
        weight = (matrix_with_spectrum(m, n, spectrum, seed=seed, dtype=torch.float64) * 10.0**power).to(device, dtype)
        if view == "columns":
            weight = weight.T.contiguous().T
        if view == "every second":
            weight = weight.repeat_interleave(2, 1)[:, ::2]
        given = problem([weight], k=k, b=k + extra, reads=reads)
        results = solve(given)
        check(given, results)
        ratios = lapack_ratios(weight, *results[0][:4])
        assert all(ratios[name] < LIMIT for name in STRUCTURAL_RATIOS), ratios

    run()


def run_operator(device: torch.device) -> None:
    """Schema and fake; what is not taken is refused by name, and left to torch where the choice is free."""
    given = problem([torch.randn(20, 9, device=device), torch.randn(9, 18, device=device)], b=2, reads=2)
    torch.library.opcheck(torch.ops.s2d.topk_svd.default, (*given, "triton"))
    double = given._replace(weights=[w.double() for w in given.weights], starts=[s.double() for s in given.starts])
    assert svd._supports(*given)
    assert not svd._supports(*double)
    assert ops._SUPPORTS["topk_svd", "triton"] is svd._supports
    with pytest.raises(ValueError, match=r"weights\[0\] is torch.float64"):
        solve(double)
    with pytest.raises(ValueError, match=r"starts\[1\] \(2, 8\) .* does not fit weights\[1\] \(9, 18\)"):
        solve(given._replace(starts=[given.starts[0], given.starts[1][:, :8]]))
    with pytest.raises(ValueError, match=r"reads\[1\]=1 of 2 rows find k=2 triplets and nothing to bound"):
        solve(given._replace(reads=[2, 1]))
    large = problem([torch.zeros(900, 900, device=device)], b=32, reads=20)
    assert not svd._supports(*large)
    with pytest.raises(ValueError, match="order 640"):
        solve(large)


RUNS: dict[str, Callable[[torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}
# Every kernel and every way to the elements.
SANITIZED = ("run_layouts", "run_non_finite")

if triton_kernels.triton is not None:
    from s2d_kernels.triton_kernels.common import jit, tl
    from s2d_kernels.triton_kernels.eigen import eigenvectors

    @jit()
    def _solve(H: tl.tensor, V: tl.tensor, N: tl.tensor, place: tl.tensor, TILE: tl.constexpr) -> None:
        tl.store(place, eigenvectors(H, V, N, TILE))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.interpreted(name)) for name in RUNS])
def test_interpreted(name: str, interpreted: Done) -> None:
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.sanitize if name in ("run_non_finite", "run_layouts") else ())
        for name in RUNS
    ],
)
def test_compiled(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("compiled Triton needs --device cuda; bench audit compiles the kernels without a GPU")
    assert triton_kernels.triton is not None, MISSING
    RUNS[name](device)


def test_fields_have_their_positions() -> None:
    for position, name in enumerate(matrices.Matrix._fields):
        constant = getattr(matrices, name.upper())
        assert getattr(constant, "value", constant) == position, name
    assert [getattr(c, "value", c) for c in (matrices.FIELDS, matrices.THIN)] == [
        len(matrices.Matrix._fields),
        svd.THIN,
    ]


def test_workspaces_do_not_overlap() -> None:
    """Regions are as long as what is written to them and lie one after the other."""
    layout = svd._Layout()
    for m, n, b, k, reads in ((3072, 768, 8, 3, 4), (768, 3072, 16, 3, 8), (20, 9, 9, 2, 4), (1, 7, 1, 1, 4)):
        layout.add(torch.empty(m, n), b, k, reads)
    starts32 = [getattr(row, name) for row in layout.rows for name in ("start", "Q", "Y", "Z", "partial", "values")]
    assert starts32 == sorted(starts32)
    for row in layout.rows:
        assert row.Y - row.Q >= row.all * row.cols_lead
        assert row.Z - row.Y >= row.all * row.rows_lead
        assert row.transform - row.partial >= row.panels * row.block * row.cols_lead
        assert row.V - row.H >= 2 * row.padded**2
        assert row.theta - row.V >= 3 * row.padded**2
    rows = np.array(layout.rows, dtype=np.int64)
    assert rows.shape == (4, len(matrices.Matrix._fields))
    assert (np.diff(rows[:, matrices.Matrix._fields.index("product_first")]) > 0).all()


if __name__ == "__main__":
    save_time()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    RUNS[sys.argv[1]](torch.device("cpu"))
