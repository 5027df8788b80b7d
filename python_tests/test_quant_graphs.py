"""Quantized layers in a CUDA graph: replays on new inputs give the bits of calls. They need --device cuda."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2d_kernels import quantize_, quantizers
from s2d_kernels.quant_ops import (
    fake_quant_linear,
    integer_accumulator,
    integer_linear,
    quantize_activation,
    quantize_weight,
)

IMPLS = ("torch", "triton", "cuda")
Run = Callable[[], list[Tensor]]
M, K, N = 70, 96, 40
GROUPED: dict[str, Any] = {"granularity": "per_group", "group_size": 32}
LAYERS: dict[str, dict[str, Any]] = {
    "W4A4": {},
    "given range": {"act_range": (-1.0, 1.5), "act_symmetric": True},
    "W3A8 in groups": {
        "weight_bits": 3, "act_bits": 8, "act_granularity": "per_tensor", "weight_granularity": "per_group",
        "group_size": 32, "weight_symmetric": False,
    },
    "learned range": {"act_granularity": "per_tensor", "act_range": "learned"},
}  # fmt: skip


def captured(run: Run) -> Run:
    """`run` as a replay of its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # kernels are compiled and loaded before the capture
    torch.cuda.current_stream().wait_stream(stream)
    quantizers._bits_of_bytes_on.clear()  # a table made in the capture is the graph's
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> list[Tensor]:
        for output in outputs:
            output.fill_(99)  # what is compared was written by the replay
        graph.replay()
        return [output.clone() for output in outputs]

    return replay


def check_replays(run: Run, inputs: list[Tensor], capture: Callable[[Run], Run]) -> None:
    """A replay gives what a call gives, on three new inputs; the last has a zero and a non-finite row."""
    replay = capture(run)
    earlier: list[Tensor] = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in inputs:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 10.0**-seed)
            if seed == 2:
                inputs[0][3], inputs[0][5, 7] = 0, math.nan
        expected, got = run(), replay()  # the first call before any replay: it depends on none
        assert len(got) == len(expected)
        for mine, truth in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, truth, rtol=0, atol=0, equal_nan=True)
        assert not any(map(torch.equal, got[:1], earlier[:1]))
        earlier = got


def check_layer(
    impl: str, settings: dict[str, Any], dtype: torch.dtype, device: torch.device, capture: Callable[[Run], Run]
) -> None:
    """`fake_quant_linear` forward and backward."""
    x, weight, bias = (torch.ones(s, dtype=dtype, device=device, requires_grad=True) for s in ((M, K), (N, K), (N,)))
    grad = torch.ones(M, N, dtype=dtype, device=device)
    leaves, settings = [x, weight, bias], dict(settings)
    if settings.get("act_range") == "learned":
        ends = [torch.full((1,), end, device=device, requires_grad=True) for end in (-1.0, 1.5)]
        settings["act_range"] = tuple(ends)
        leaves += ends

    def run() -> list[Tensor]:
        y = fake_quant_linear(x, weight, bias, **settings, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    check_replays(run, [x, weight, bias, grad], capture)


def check_operators(
    impl: str, weight_kind: dict[str, Any], granularity: str, device: torch.device, capture: Callable[[Run], Run]
) -> None:
    """Quantizers, accumulator and integer layer, one after the other."""
    x, weight, bias = (torch.ones(s, device=device) for s in ((M, K), (N, K), (N,)))

    def run() -> list[Tensor]:
        qx = quantize_activation(
            x, granularity=granularity, group_size=weight_kind.get("group_size"), bits=8, impl=impl
        )
        qw = quantize_weight(weight, **weight_kind, impl=impl)
        y = integer_linear(qx, qw, bias, out_dtype=torch.bfloat16, impl=impl)
        return [y, integer_accumulator(qx, qw, impl=impl), *qx[:5], *qw[:5]]

    check_replays(run, [x, weight, bias], capture)


def check_ptq_layer(impl: str, device: torch.device, capture: Callable[[Run], Run]) -> None:
    """A mode="ptq" layer, whose weight changes between replays and whose eager forwards keep codes of it."""
    layer, x = nn.Linear(K, N, device=device), torch.ones(M, K, device=device)
    quantize_(layer, mode="ptq", impl=impl)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [layer(x)]

    check_replays(run, [x, layer.weight, layer.bias], capture)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_ptq_layer_in_a_cuda_graph(impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    check_ptq_layer(impl, device, captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_in_a_cuda_graph(impl: str, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    check_layer(impl, settings, dtype, device, captured)


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("weight_kind", [{}, GROUPED], ids=["per_channel", "per_group"])
@pytest.mark.parametrize("impl", IMPLS)
def test_operators_in_a_cuda_graph(
    impl: str, weight_kind: dict[str, Any], granularity: str, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    check_operators(impl, weight_kind, granularity, device, captured)


def called_again(run: Run) -> Run:
    return run


def frozen(run: Run) -> Run:
    """A capture gone wrong: its replays give what the capture saw."""
    kept = [t.clone() for t in run()]
    return lambda: [t.clone() for t in kept]


def test_the_checks_themselves(device: torch.device) -> None:
    """Calls in the place of replays pass; replays that do not see the new inputs do not."""
    for settings in LAYERS.values():
        check_layer("torch", settings, torch.float32, device, called_again)
    check_operators("torch", GROUPED, "per_tensor", device, called_again)
    check_ptq_layer("torch", device, called_again)
    with pytest.raises(AssertionError):
        check_layer("torch", {}, torch.bfloat16, device, frozen)
    with pytest.raises(AssertionError):
        check_operators("torch", {}, "per_token", device, frozen)
    with pytest.raises(AssertionError):
        check_ptq_layer("torch", device, frozen)
