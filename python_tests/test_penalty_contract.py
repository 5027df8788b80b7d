"""What `add_penalty_grad_` promises on every implementation: a derivative, no needless change, no NaN passed on.

The functions that begin with `run_` take an implementation and a device; Triton is interpreted in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated import build_emulated
from interpreting import Done, save_time
from torch import Tensor

from s2d_kernels import S2D, add_penalty_grad_, reference
from s2d_kernels.penalty import penalty_status
from s2d_kernels.svd import CONVERGED, NON_FINITE, OVERFLOW, TopkSVD

ROOT = Path(__file__).parent.parent
POWERS = (1.0, 1.5, 2.0, 2.7, 3.0, 4.0)


def exact_factors(weight: Tensor, k: int) -> TopkSVD:
    """Of an fp64 SVD, rounded to the weight's dtype."""
    U, S, Vh = (t.to(weight.dtype) for t in reference.topk_svd(weight.double(), k))
    zero = S.new_zeros(())
    return TopkSVD(U, S, Vh, torch.zeros_like(S), zero, zero.int(), None)


def run_it_is_the_derivative(impl: str, device: torch.device) -> None:
    """Of strength/(power+1) sum s^(power+1), by autograd through an fp64 SVD, and along a direction by differences."""
    dtype = torch.float64 if impl in ("torch", "reference") else torch.float32
    for m, n in ((9, 6), (5, 11)):
        weight = torch.randn(m, n, dtype=dtype, device=device)
        factors = exact_factors(weight, min(m, n))
        for power in POWERS:
            W = weight.double().requires_grad_()
            loss = reference.penalty(W, strength=0.3, power=power)
            (truth,) = torch.autograd.grad(loss, W)
            grad = torch.zeros_like(weight)
            add_penalty_grad_([grad], [factors], strength=0.3, power=power, impl=impl)
            limit = 1e-12 if dtype == torch.float64 else 4e-6  # products of up to six fp32 terms, and rounded factors
            assert (grad.double() - truth).norm() <= limit * truth.norm(), (impl, power)
            direction, h = torch.randn(m, n, dtype=torch.float64, device=device), 1e-4
            ends = [reference.penalty(W.detach() + t * direction, strength=0.3, power=power) for t in (h, -h)]
            slope = (ends[0] - ends[1]) / (2 * h)
            assert abs(slope - (grad.double() * direction).sum()) <= 1e-5 * truth.norm() * direction.norm()


def run_nothing_to_add_changes_no_bit(impl: str, device: torch.device) -> None:
    """Strength 0, coefficients 0, or rank 0 on the device; -0, Inf and every NaN in the gradient stay as they are."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        weight = torch.randn(37, 64, device=device)
        factors = exact_factors(weight, 3)
        start = torch.randn(37, 64, device=device).to(dtype)
        start[::2] = -0.0
        start[7, 7] = float("inf")
        # Of many NaNs: quiet and signalling, of both signs, with the payload in its first and in its last bits.
        mantissa = torch.finfo(dtype).eps.as_integer_ratio()[1]
        infinity = int(torch.tensor(float("inf"), dtype=dtype).view(bits))
        patterns = [infinity + payload for payload in (1, mantissa // 2, mantissa // 2 + 5, mantissa - 1)]
        patterns += [pattern - 2 ** (8 * dtype.itemsize - 1) for pattern in patterns]
        start.view(bits)[5, : len(patterns)] = torch.tensor(patterns, dtype=bits, device=device)
        assert start[5, : len(patterns)].isnan().all()
        zeros = torch.zeros(3, device=device)
        none = torch.zeros(1, dtype=torch.int32, device=device)
        unusable = factors._replace(U=torch.full_like(factors.U, float("nan")))
        nothing = [({"strength": 0.0}, factors), ({"coefficients": [zeros]}, factors), ({"ranks": none}, factors)]
        nothing += [({"ranks": [0]}, factors), ({}, unusable)]
        if dtype == torch.bfloat16:
            nothing += [({"rounding": "stochastic", "seed": 1, **given}, which) for given, which in nothing]
        for arguments, which in nothing:
            for columns in (64, 63):
                part = which._replace(Vh=which.Vh[:, :columns])
                grad = start[:, :columns].clone()
                add_penalty_grad_([grad], [part], impl=impl, **arguments)
                before, after = (t.contiguous().view(bits) for t in (start[:, :columns], grad))
                if impl in ("cuda", "triton"):  # an addition of -0, which may make another NaN of a NaN
                    assert torch.equal(grad.isnan(), start[:, :columns].isnan())
                    before, after = (t[~grad.isnan()] for t in (before, after))
                assert torch.equal(before, after), (dtype, arguments)


def run_nothing_that_is_not_finite_gets_in(impl: str, device: torch.device) -> None:
    """NaN or Inf in any factor, coefficients that overflow: the layer beside it is as it would be alone."""
    weight = torch.randn(37, 40, device=device)
    good = exact_factors(weight, 2)
    huge = good._replace(S=torch.tensor([1e30, 1e-3], device=device))
    alone = torch.ones(37, 40, device=device)
    add_penalty_grad_([alone], [good], impl=impl)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = []
        for name in ("U", "S", "Vh"):
            tensor = getattr(good, name).clone()
            tensor[(0,) * tensor.ndim] = value
            bad.append(good._replace(**{name: tensor}))
        for dtype in (torch.float32, torch.bfloat16):
            grads = [torch.ones(37, 40, device=device).to(dtype) for _ in range(4)]
            add_penalty_grad_(grads, [*bad, huge], impl=impl)
            assert all(bool(grad.isfinite().all()) for grad in grads), (value, dtype)
            assert all(bool((grad[1:, 1:] - 1).abs().max() < 1) for grad in grads)
        beside = torch.ones(37, 40, device=device)
        add_penalty_grad_([torch.ones(37, 40, device=device), beside], [bad[0], good], impl=impl)
        assert torch.equal(beside, alone)
        status = penalty_status([good, *bad, huge], strength=5e-4, power=2.0)
        assert status.tolist() == [CONVERGED, NON_FINITE, NON_FINITE, NON_FINITE, OVERFLOW]


RUNS: dict[str, Callable[[str, torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}


@pytest.mark.parametrize("impl", ["torch", "reference", "cpu"])
@pytest.mark.parametrize("name", list(RUNS))
def test_torch(name: str, impl: str, device: torch.device) -> None:
    RUNS[name](impl, device)


@pytest.mark.parametrize("name", list(RUNS))
def test_emulated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build_emulated()
    monkeypatch.delenv("S2D_LIBRARY", raising=False)
    monkeypatch.setenv("S2D_NATIVE", "emulated")
    RUNS[name]("cuda", torch.device("cpu"))


@pytest.mark.interpreted(*RUNS)
def test_interpreted(interpreted: Done) -> None:
    """All in one process: most of its time is the import."""
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.sanitize
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("name", list(RUNS))
def test_on_the_gpu(name: str, impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    RUNS[name](impl, device)


def test_s2d_reports_a_coefficient_that_overflows(caplog: pytest.LogCaptureFixture) -> None:
    """strength * s^power beyond fp32: no penalty on that layer, a warning, and a status in the report."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 24))
    v = torch.randn(24)
    with torch.no_grad():
        model[0].weight += 1e3 * torch.outer(torch.randn(40), v / v.norm())
    reg = S2D(model, mode="coupled", strength=1.0, power=12.0, interval=4, lead=0, threshold=0.5)
    (model(torch.randn(8, 24) + 3 * v)).sum().backward()
    kept = model[0].weight.grad.clone()
    reg.add_grad()
    assert torch.equal(model[0].weight.grad, kept)
    report = reg.layers[0]
    assert (report.k_target, report.status) == (0, "overflow")
    assert "overflows): no penalty until the next refresh" in caplog.text
    reg.close()


if __name__ == "__main__":
    save_time()
    for run in sys.argv[1:]:
        torch.manual_seed(0)
        print(run, flush=True)
        RUNS[run]("triton", torch.device("cpu"))
