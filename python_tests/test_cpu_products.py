"""The int8 product of a CPU: when it is chosen, that it is exact there, and what is built on it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from s2d_kernels import cpu_quant, fixed_point, int8_product
from s2d_kernels.quant_ops import fake_quant_linear, integer_accumulator, quantize_activation, quantize_weight
from s2d_kernels.quantizers import pack_codes, pack_mask


@pytest.fixture(autouse=True)
def _asked_anew():
    caches = (
        int8_product.int8_product_is_exact, int8_product._int8_product_is_faster, int8_product.int8_digits_serve,
    )  # fmt: skip
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def exact(x: Tensor, w: Tensor, **kinds: object) -> None:
    """The accumulator of quantized `x` and `w` equals the reference."""
    groups = {"granularity": "per_group", "group_size": kinds["group_size"]} if kinds.get("group_size") else {}
    qx = quantize_activation(x, bits=kinds["x_bits"], symmetric=kinds["x_symmetric"])  # type: ignore[arg-type]
    qw = quantize_weight(w, bits=kinds["w_bits"], symmetric=kinds["w_symmetric"], **groups)  # type: ignore[arg-type]
    got, expected = (integer_accumulator(qx, qw, impl=impl) for impl in ("torch", "reference"))
    assert torch.equal(got, expected), kinds


def every_kind_is_exact() -> None:
    """Sums of extreme codes of every width, beyond 2^24 at 8 bits, in groups and not, of odd and of no size."""
    for bits in (2, 4, 7, 8):
        for x_symmetric, w_symmetric in ((True, True), (False, True), (True, False), (False, False)):
            for M, K, N, group_size in ((37, 1100, 63, None), (5, 128, 33, 32), (1, 199, 1, None), (0, 64, 3, None)):
                x, w = (torch.randint(2, (rows, K)) * 2.0 - 1 for rows in (M, N))
                if M:
                    x[0], w[0] = 1, 1  # codes at one end only: the largest sums
                kinds = {"x_symmetric": x_symmetric, "w_symmetric": w_symmetric, "group_size": group_size}
                exact(x, w, x_bits=bits, w_bits=bits, **kinds)
                exact(x.abs(), w.abs().neg(), x_bits=8, w_bits=bits, **kinds)


def in_pairs(x: Tensor, w: Tensor) -> Tensor:
    """s8 x s8 as CPUs without VNNI do it: x + 128 as u8, pairs of products saturated to 16 bits, 128 taken off."""
    shifted, w = x.int() + 128, w.mT.int()
    shifted, padded = (torch.nn.functional.pad(t, (0, t.shape[1] % 2)) for t in (shifted, w))
    pairs = (shifted.unsqueeze(1) * padded).unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(2) - 128 * w.sum(1)).int()


@pytest.mark.parametrize("route", ["tried", "missing", "refuses", "saturates", "slow"])
def test_accumulators_by_every_route(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, called = torch._int_mm, []

    def counted(x: Tensor, w: Tensor) -> Tensor:
        called.append(x.shape)
        if route == "refuses":
            raise RuntimeError("not on this CPU")
        if route == "slow":
            time.sleep(0.1)  # more than an fp32 product takes beside other work
        return in_pairs(x, w) if route == "saturates" else original(x, w)

    if route == "missing":
        monkeypatch.delattr(torch, "_int_mm")
    else:
        monkeypatch.setattr(torch, "_int_mm", counted)
    if route == "slow":  # the clock is asked where the CPU has no instructions for it
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    if route == "saturates":
        monkeypatch.setattr(int8_product, "_int8_product_is_faster", lambda: True)
        assert int8_product.int8_product_serves(15)  # pairs of these do not saturate
    chosen = int8_product.int8_product_serves(127)
    if route != "tried":
        assert not chosen
    tries = len(called)
    every_kind_is_exact()
    if route in ("refuses", "slow"):
        assert len(called) < tries + 20  # the tries for other magnitudes
    if chosen:
        assert len(called) > tries + 50
    with torch.backends.mkldnn.flags(enabled=False):
        assert not int8_product.use_int8_product(torch.device("cpu"), 64, 7, 7)


def test_a_cpu_that_saturates_is_seen() -> None:
    """oneDNN held to AVX2 adds pairs of products in 16 bits: where that shows, nothing goes that way."""
    program = """
import torch
from python_tests.test_cpu_products import every_kind_is_exact
from s2d_kernels import int8_product
x, w = torch.full((64, 128), 127, dtype=torch.int8), torch.full((64, 128), 127, dtype=torch.int8)
right = bool((torch._int_mm(x, w.mT) == 127 * 127 * 128).all())
serves = int8_product.int8_product_serves(127)
assert right or not serves
every_kind_is_exact()
print(right, serves)
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("instructions", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_a_cpu_with_the_instructions_is_not_timed(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> float:
        raise AssertionError("a busy machine would decide")

    monkeypatch.setattr(int8_product.time, "perf_counter", clock)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True, "avx2": True})
    assert int8_product.int8_product_serves(127) == int8_product.int8_product_is_exact(127)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    int8_product._int8_product_is_faster.cache_clear()
    with pytest.raises(AssertionError, match="a busy machine"):
        int8_product._int8_product_is_faster()


def test_interruptions_do_not_turn_the_clocks_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work takes time from ten turns of the faster route, and from none of the other's."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    now = [0.0]
    monkeypatch.setattr(int8_product.time, "perf_counter", lambda: now[0])

    def takes(name: str, seconds: float, waits: int) -> None:
        turns = iter(range(1000))

        def run(*_: Tensor) -> None:
            now[0] += seconds + 50 * (next(turns) < waits)

        monkeypatch.setattr(torch, name, run)

    for int8, fp32 in ((1.0, 2.0), (2.0, 1.0)):
        takes("_int_mm", int8, 10 if int8 < fp32 else 0)
        takes("mm", fp32, 10 if fp32 < int8 else 0)
        int8_product._int8_product_is_faster.cache_clear()
        assert int8_product._int8_product_is_faster() == (int8 < fp32)


def test_trying_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    int8_product.int8_product_serves(127)
    int8_product._int8_product_is_faster()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_clock_does_not_decide_about_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward bits are the same by either route, gradients are not: they depend on the CPU alone."""
    x, w = torch.randn(40, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    results = []
    for faster, impl in ((True, "torch"), (False, "torch"), (True, "cpu"), (False, "cpu")):
        monkeypatch.setattr(int8_product, "_int8_product_is_faster", lambda faster=faster: faster)
        int8_product.int8_digits_serve.cache_clear()
        y = fake_quant_linear(x, w, impl=impl)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))))
    for tensors_of_one_kind in zip(*results, strict=True):
        for other in tensors_of_one_kind[1:]:
            assert torch.equal(tensors_of_one_kind[0], other)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    int8_product.int8_digits_serve.cache_clear()
    assert not fixed_point.serves(x, 64, 7)


# --- fp32 times integers ------------------------------------------------------------------------------------------


def kernel_product(
    factor: Tensor, scale: Tensor, values: Tensor, mask: Tensor, dtype: torch.dtype, most: int
) -> Tensor | None:
    """`fixed_point.product` by the CPU's kernels, on codes of which digits are at most so large."""
    bits, symmetric, zero = {127: (8, True, 0), 120: (4, True, 0), 112: (4, False, 7)}[most]
    assert fixed_point.largest_digit(bits, symmetric) == most
    codes = values + zero
    zero_point = torch.full((len(values), 1), zero, dtype=torch.int32)
    if bits <= 4:
        codes = pack_codes(codes)
    return cpu_quant.digit_product(factor, codes, scale.mT, zero_point, mask, values.shape[1], bits, symmetric, dtype)


PRODUCTS = {"torch": fixed_point.product, "cpu": kernel_product}


def tensors(rows: int, depth: int, K: int, span: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor = torch.randn(rows, depth) * torch.logspace(-6, 6, rows).unsqueeze(1)
    scale = torch.rand(1, depth) + 0.1
    values = torch.randint(-span, span + 1, (depth, K), dtype=torch.int8)
    return factor, scale, values, torch.ones(rows, K, dtype=torch.bool)


@pytest.mark.parametrize("impl", PRODUCTS)
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize(("rows", "depth", "K", "most"), [(1, 37, 1, 127), (300, 1000, 9, 127),
                                                          (63, 199, 37, 120), (90, 70, 130, 112)])  # fmt: skip
def test_product_is_as_exact_as_its_digits(rows: int, depth: int, K: int, most: int, layout: str, impl: str) -> None:
    span = 127 if most == 127 else 7
    factor, scale, values, mask = tensors(rows, depth, K, span)
    factor[rows // 2, depth // 2] = 1e5  # an outlier takes bits from its row, not more than the bound says
    mask[:, ::3] = False
    given = {"rows": factor, "columns": factor.mT.contiguous().mT, "strided": factor.repeat(1, 2)[:, :depth]}[layout]
    exact_product = (factor.double() * scale) @ values.double()
    weight = values.double().abs().sum(0)
    largest = (factor * scale).abs().amax(1, keepdim=True)
    for dtype, last_digit in ((torch.float32, 1 / (8 * most**3)), (torch.bfloat16, 1 / (4 * most**2))):
        got = PRODUCTS[impl](given, scale, values, pack_mask(mask), dtype, most)
        assert got is not None
        assert got.dtype == dtype
        assert not got[~mask].any()
        # the digits' end, then the roundings of the product with the scale, the quotient, the sums and the result
        rounding = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}[dtype]
        bound = last_digit * largest * weight + rounding * ((factor * scale).double().abs() @ values.double().abs())
        assert bool(((got.double() - exact_product).abs() <= bound)[mask].all())
    again = PRODUCTS[impl](given, scale, values, pack_mask(mask), torch.float32, most)
    alone = PRODUCTS[impl](given[-1:], scale, values, pack_mask(mask[-1:]), torch.float32, most)
    assert again is not None
    assert alone is not None
    assert torch.equal(again[-1:], alone)


@pytest.mark.parametrize("impl", PRODUCTS)
def test_precision_follows_torchs_setting(impl: str) -> None:
    factor, scale, values, mask = tensors(8, 512, 64, 7)
    truth = (factor.double() * scale) @ values.double()
    errors = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            got = PRODUCTS[impl](factor, scale, values, pack_mask(mask), torch.float32, 127)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert got is not None
        errors.append(float(((got - truth).norm(dim=1) / truth.norm(dim=1)).max()))
    assert errors[0] < 5e-7
    assert 2e-6 < errors[1] < 1e-4


@pytest.mark.parametrize("impl", PRODUCTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_gradients_that_are_not_finite_stay_so(value: float, impl: str) -> None:
    """A loss scaler finds overflow by them."""
    factor, scale, values, mask = tensors(40, 64, 48, 7)
    factor[3, 5] = value
    assert PRODUCTS[impl](factor, scale + 1, values, pack_mask(mask), torch.float32, 127) is None
    x, w = torch.randn(40, 48, requires_grad=True), torch.randn(64, 48, requires_grad=True)
    y = fake_quant_linear(x, w, impl=impl)
    g = torch.randn(40, 64)
    g[3, 5] = value
    grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
    if abs(value) > 3e38:
        assert not grad_x[3].isfinite().all()
        assert not grad_w[5].isfinite().all()
    assert grad_x[:3].isfinite().all()
    assert grad_w[:5].isfinite().all()


@pytest.mark.parametrize("impl", PRODUCTS)
def test_zero_and_subnormal_rows(impl: str) -> None:
    _, scale, values, mask = tensors(3, 64, 16, 7)
    factor = torch.stack((torch.zeros(64), torch.full((64,), 1e-42), torch.full((64,), 1e-37)))
    got = PRODUCTS[impl](factor, scale, values, pack_mask(mask), torch.float32, 127)
    assert got is not None
    assert not got[0].any()
    truth = (factor.double() * scale) @ values.double()
    weight = values.double().abs().sum(0)
    # no unit is below 2^-126, and a product with the scale is a multiple of 2^-149
    assert bool(((got - truth).abs() <= (2.0**-126 / 254**2 + 2.0**-149) * weight + 2.0**-23 * truth.abs())[1:].all())


def test_sums_that_could_overflow_take_the_other_route() -> None:
    assert not fixed_point.serves(torch.zeros(1), 2**31 // (127 * 127) + 1, 127)
    assert not fixed_point.serves(torch.zeros(1), 64, 255)
    assert not fixed_point.serves(torch.zeros(1, dtype=torch.float64), 64, 7)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_a_sink_token_does_not_cost_the_others_their_digits(size: float, dtype: torch.dtype, impl: str) -> None:
    """One token with a scale that much larger; weights of channels in which its codes are 0 see only the rest."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(256, 64), torch.randn(48, 64) * 0.1, torch.randn(256, 48)
    x[17, 1:], x[17, 0] = 0, size
    x, grad = x.to(dtype), grad.to(dtype)
    weight = weight.to(dtype).requires_grad_()
    fake_quant_linear(x, weight, act_symmetric=True, impl=impl).backward(grad)
    q = quantize_activation(x, symmetric=True)
    dequantized = q.codes.double() * q.scale.double()
    truth = (grad.double().mT @ dequantized)[:, 1:]
    plain = (grad.mT @ dequantized.to(dtype))[:, 1:]  # as a layer in this dtype would
    error, theirs = (float((g.double() - truth).norm() / truth.norm()) for g in (weight.grad[:, 1:], plain))
    assert error <= 2 * theirs


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e-8)])
@pytest.mark.parametrize("zeros", [1, 150])
def test_tokens_of_zeros_do_not_either(zeros: int, dtype: torch.dtype, size: float, symmetric: bool, impl: str) -> None:
    """Padding: its scale is 1 by definition, its product 0."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(256, 64) * size, torch.randn(48, 64) * 0.1, torch.randn(256, 48)
    x[:zeros] = 0
    x, grad = x.to(dtype), grad.to(dtype)
    weight = weight.to(dtype).requires_grad_()
    fake_quant_linear(x, weight, act_symmetric=symmetric, impl=impl).backward(grad)
    q = quantize_activation(x, symmetric=symmetric)
    dequantized = (q.codes.double() - q.zero_point) * q.scale.double()
    truth = grad.double().mT @ dequantized
    plain = grad.mT @ dequantized.to(dtype)
    error, theirs = (float((g.double() - truth).norm() / truth.norm()) for g in (weight.grad, plain))
    assert error <= 2 * theirs


def test_a_channel_of_the_weight_may_be_as_large() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(48, 64), torch.randn(256, 48)
    weight[5] *= 1e4
    weight[5, 1:] = 0
    x = torch.randn(256, 64, requires_grad=True)
    fake_quant_linear(x, weight).backward(grad)
    q = quantize_weight(weight)
    truth = (grad.double() @ (q.codes.double() * q.scale.double()))[:, 1:]
    plain = (grad @ (q.codes.float() * q.scale))[:, 1:]
    error, theirs = (float((g.double() - truth).norm() / truth.norm()) for g in (x.grad[:, 1:], plain))
    assert error <= 2 * theirs
