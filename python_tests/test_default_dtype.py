"""torch.set_default_dtype and set_default_device of a training script change nothing here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated import build_emulated
from torch import Tensor

from s2d_kernels import S2D, SpectralAdamW, fake_quant_linear, int8_product, pcdr, topk_svd
from s2d_kernels.capture import _Kept
from s2d_kernels.capture_ops import capture_largest_
from s2d_kernels.fake_quant import FakeQuantLinear
from s2d_kernels.svd import SVDBasis


def run_layer() -> list[Tensor]:
    x, w = (torch.linspace(-2, 3, n * 64, dtype=torch.float32).sin().view(n, 64).requires_grad_() for n in (40, 48))
    y = fake_quant_linear(x, w)
    y.square().sum().backward()
    return [y, x.grad, w.grad]


def run_pcdr() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 60, generator=generator, dtype=torch.float32)
    weight[:, 0] *= 30
    x = torch.randn(60, generator=generator, dtype=torch.float32)
    neuron = torch.tensor(3)
    exact = torch.ops.s2d.pcdr_exact([weight], [x], [neuron], 3, 0.95, "torch")
    decided = pcdr([weight], [x], [neuron], topk_svd([weight], k=3), k_max=3)[0]
    return [exact, torch.tensor(decided.k_target)]


def run_capture() -> list[Tensor]:
    kept = _Kept.nothing(6, torch.device("cpu"))
    x = torch.arange(24, dtype=torch.float32).view(4, 6)
    for impl in ("torch", "cuda"):
        capture_largest_(*kept, x @ x.T - 100, x, impl=impl)
    return list(kept)


def run_factors() -> list[Tensor]:
    weight = torch.arange(35 * 50, dtype=torch.float32).sin().view(35, 50)
    results = [topk_svd([weight], k=2, impl=impl)[0].basis for impl in ("cpu", "torch", "cuda", "reference")]
    return [tensor for basis in results for tensor in SVDBasis(*basis)]


def run_ranges() -> list[Tensor]:
    weight = torch.ones(4, 6, dtype=torch.float32)
    layer = FakeQuantLinear(6, 4, bias=False, act_range=(-0.1, 0.7), act_granularity="per_tensor")
    layer.weight.data = weight
    return [layer.act_min, layer.act_max]


RUNS = (run_layer, run_pcdr, run_capture, run_factors, run_ranges)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("run", RUNS)
def test_same_bits(run: Callable[[], list[Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    build_emulated()
    monkeypatch.setenv("S2D_NATIVE", "emulated")
    expected = run()
    torch.set_default_dtype(dtype)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_default_device_is_not_the_operands() -> None:
    """Nor does what was tried under it stay in the process."""

    def run() -> list[Tensor]:
        x, w = (torch.linspace(-2, 3, n * 64, device="cpu").sin().view(n, 64) for n in (40, 48))
        layer = FakeQuantLinear(64, 48, bias=False, act_range=(-0.5, 0.7), device="cpu")
        layer.weight.data = w
        grouped = fake_quant_linear(x, w, weight_granularity="per_group", group_size=32)
        return [fake_quant_linear(x, w, act_range=(-0.5, 0.7)), grouped, layer(x), layer.act_max.detach()]

    questions = (int8_product.int8_product_is_exact, int8_product._int8_product_is_faster)
    expected, answer = run(), int8_product.int8_product_is_exact(127)  # on a CPU without it, both are False
    for question in questions:
        question.cache_clear()
    torch.set_default_device("meta")
    try:
        got = run()
        assert int8_product.int8_product_is_exact(127) == answer
        int8_product._int8_product_is_faster()
    finally:
        torch.set_default_device(None)
    for a, b in zip(expected, got, strict=True):
        assert a.device == b.device
        assert torch.equal(a, b)


def test_training_under_a_default_device() -> None:
    """Everything of S2D lies where the parameters are, and its checkpoint on the CPU."""

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for fused in (False, True):
            model = torch.nn.Sequential(torch.nn.Linear(24, 24, device="cpu"), torch.nn.Linear(24, 24, device="cpu"))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.linspace(-2, 3, parameter.numel(), device="cpu").cos().view_as(parameter))
            reg = S2D(model, mode="decoupled", strength=0.1, threshold=0.2, interval=3, lead=1)
            if fused:
                optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), 1e-3, regularizer=reg)
            else:
                optimizer = torch.optim.SGD(model.parameters(), 1e-3)
                reg.attach(optimizer)
            for step in range(5):
                x = torch.linspace(-1, 1 + step, 8 * 24, device="cpu").sin().view(8, 24)
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            results += [*(parameter.detach() for parameter in model.parameters()), *reg.state_dict().values()]
            results += [*pcdr([model[0].weight], [x[0]], [0])[0].lower]
            reg.close()
        return [torch.as_tensor(result, device="cpu") if isinstance(result, float) else result for result in results]

    expected = run()
    torch.set_default_device("meta")
    try:
        got = run()
    finally:
        torch.set_default_device(None)
    for a, b in zip(expected, got, strict=True):
        assert a.device == b.device
        assert torch.equal(a, b)
