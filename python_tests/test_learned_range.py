"""Learned ranges: torch's learnable fake quantization is the truth for the gradients of scale and zero point."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d_kernels.fake_quant import FakeQuantLinear, quantize_
from s2d_kernels.packed import export, load_
from s2d_kernels.quant_ops import fake_quant_linear

IMPLS = ("reference", "torch", "cpu")


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def qparams(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    """Scale and (real) zero point of a range, differentiable; the rounding of the zero point passes gradients."""
    if symmetric:
        quant_max = 2 ** (bits - 1) - 1
        scale = torch.maximum(low.abs(), high.abs()) / quant_max
        return scale, torch.zeros_like(scale), -quant_max, quant_max
    quant_max = 2**bits - 1
    scale = (high - low) / quant_max
    return scale, _RoundThrough.apply(-low / scale), 0, quant_max


def truth(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    scale, zero_point, quant_min, quant_max = qparams(low, high, bits, symmetric)
    if low.numel() == 1:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, quant_min, quant_max, 1.0)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, quant_min, quant_max, 1.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_against_torchs_learnable_quantizers(per_row: bool, symmetric: bool, bits: int, impl: str) -> None:
    M, N, K = 37, 40, 63
    x, w, b = torch.randn(M, K, requires_grad=True), torch.randn(N, K, requires_grad=True), torch.randn(N)
    ranges = []
    for rows in (M, N):
        count = rows if per_row else 1
        ranges += [(-0.6 - torch.rand(count)).requires_grad_(), (1.3 + torch.rand(count)).requires_grad_()]
    leaves = (x, w, *ranges)
    kinds = {"act_bits": bits, "weight_bits": bits, "act_symmetric": symmetric, "weight_symmetric": symmetric}
    granularities = {} if per_row else {"act_granularity": "per_tensor", "weight_granularity": "per_tensor"}
    y = fake_quant_linear(
        x, w, b, act_range=ranges[:2], weight_range=ranges[2:], range_grad_factor=1.0, impl=impl, **kinds,
        **granularities,
    )  # fmt: skip
    frozen = [t.detach() for t in ranges]
    plain = fake_quant_linear(
        x, w, b, act_range=frozen[:2], weight_range=frozen[2:], impl=impl, **kinds, **granularities
    )
    assert torch.equal(y, plain)
    g = torch.randn(M, N)
    got = torch.autograd.grad(y, leaves, g)
    expected_y = torch.nn.functional.linear(
        truth(x, *ranges[:2], bits, symmetric), truth(w, *ranges[2:], bits, symmetric), b
    )
    expected = torch.autograd.grad(expected_y, leaves, g)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        # torch multiplies by 1 / scale, which moves single codes at 8 bits; a wrong term would be off by its size
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_the_usual_factor_is_lsqs(granularity: str) -> None:
    """1 / sqrt(N_F Q_P) for activations, N_F the features of a token; 1 / sqrt(N_W Q_P) for the weights of a scale."""
    x, w = torch.randn(37, 63), torch.randn(5, 63)
    count = 5 if granularity == "per_channel" else 1
    gradients = []
    for factor in (None, 1.0):
        high, w_high = torch.tensor(1.0, requires_grad=True), torch.full((count,), 1.0, requires_grad=True)
        fake_quant_linear(
            x, w, act_range=(-1.0, high), act_granularity="per_tensor", weight_granularity=granularity,
            weight_range=(-torch.ones(count), w_high), weight_symmetric=False, range_grad_factor=factor,
        ).sum().backward()  # fmt: skip
        gradients.append((high.grad, w_high.grad))
    torch.testing.assert_close(gradients[0][0], gradients[1][0] / math.sqrt(63 * 15), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0][1], gradients[1][1] / math.sqrt(5 / count * 63 * 15), rtol=1e-5, atol=0)


def test_only_what_requires_a_gradient_gets_one() -> None:
    x, w = torch.randn(6, 36, requires_grad=True), torch.randn(5, 36)
    high = torch.tensor([0.5], requires_grad=True)
    low = torch.tensor([-0.5])
    y = fake_quant_linear(
        x, w, act_range=(low, high), act_granularity="per_tensor", weight_granularity="per_group", group_size=9
    )
    y.square().sum().backward()
    assert low.grad is None
    assert high.grad.shape == (1,)
    plain = x.grad.clone()
    x.grad = None
    fake_quant_linear(
        x, w, act_range=(-0.5, 0.5), act_granularity="per_tensor", weight_granularity="per_group", group_size=9
    ).square().sum().backward()
    torch.testing.assert_close(plain, x.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not fake_quant_linear(x, w, act_range=(low, high), act_granularity="per_tensor").requires_grad


def test_learning_finds_a_clipping_range() -> None:
    """From a range ten times too wide, the step shrinks until the 4-bit error of the output is near its best."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 32), torch.randn(16, 32)
    target = x @ w.mT
    low, high = (torch.tensor(v, requires_grad=True) for v in (-30.0, 30.0))
    optimizer = torch.optim.Adam([low, high], lr=0.5)
    losses = []
    for _ in range(150):
        y = fake_quant_linear(x, w, weight_bits=8, act_range=(low, high), act_granularity="per_tensor")
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert 1.5 < high.item() < 4.5
    assert -4.5 < low.item() < -1.5


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    def function(x: Tensor, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return fake_quant_linear(x, w, act_range=(low, high), act_granularity="per_tensor")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        torch.manual_seed(0)
        made = torch.randn(3, 36), torch.randn(5, 36), torch.tensor(-1.0), torch.tensor(1.0)
        leaves = [t.to(device).requires_grad_() for t in made]
        f(*leaves).square().sum().backward()
        results.append([t.grad for t in leaves])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("weight_granularity", ["per_channel", "per_tensor"])
def test_layers_with_learned_ranges(weight_granularity: str, tmp_path: Path) -> None:
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    original = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_(model, calibration=[x], learn_range=True, weight_granularity=weight_granularity)
    first = model[0]
    assert isinstance(first, FakeQuantLinear)
    names = {name for name, _ in model.named_parameters()}
    assert {"0.act_min", "0.act_max", "0.weight_max", "2.weight_max"} <= names
    assert "0.weight_min" not in names
    assert first.weight_max.shape == ((9,) if weight_granularity == "per_channel" else (1,))
    fixed = FakeQuantLinear.from_linear(
        nn.Linear(12, 9), act_range=(float(first.act_min.detach()), float(first.act_max.detach())),
        weight_granularity=weight_granularity,
    )  # fmt: skip
    fixed.load_state_dict(nn.Linear(12, 9).state_dict() | {k[2:]: v for k, v in original.items() if k[0] == "0"})
    assert torch.equal(first(x), fixed(x))  # before the first step the ranges are the weight's own
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)  # the factor makes range gradients small
    model(x).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert {"0.act_min", "0.act_max", "0.weight_max", "2.weight_max"} <= moved
    assert "learned" in repr(first)

    model.load_state_dict(original)  # the float model's: ranges stay
    assert torch.equal(first.act_max, dict(model.named_parameters())["0.act_max"])
    export(model.eval(), tmp_path / "m.safetensors")
    loaded = load_(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    model.to(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "max" in name} == {torch.float32}
    assert first.weight.dtype == torch.bfloat16


def test_a_symmetric_learned_range_is_one_number() -> None:
    layer = FakeQuantLinear(8, 4, act_range=(-0.5, 0.75), act_symmetric=True, learn_range=True)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "act_max", "weight_max"]
    assert float(layer.act_max.detach()) == 0.75
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), FakeQuantLinear.from_linear(layer, act_range=(-0.75, 0.75), act_symmetric=True)(x))
    assert "act_min" not in layer.state_dict()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_rows_of_zeros_learn(granularity: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    target = x @ torch.randn(16, 4) * 0.2
    layer = nn.Linear(16, 4)
    nn.init.zeros_(layer.weight)
    settings = {"weight_granularity": granularity, "weight_symmetric": symmetric, "weight_bits": 8, "act_bits": 8}
    quantize_(layer, calibration=[x], learn_range=True, **settings)
    start = layer.weight_max.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(100):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01 * float(target.square().mean())
    assert not (layer.weight_max.detach() == start).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_ends_that_cross_zero_count_as_on_a_device(symmetric: bool, tmp_path: Path) -> None:
    """Where a range cannot be read, the quantizer takes |end| of a symmetric one and widens others to zero."""
    kinds = {"act_symmetric": symmetric, "weight_symmetric": symmetric}
    layer = FakeQuantLinear(8, 4, act_range=(-0.5, 0.75), learn_range=True, **kinds)
    with torch.no_grad():
        if symmetric:
            layer.act_max.fill_(-0.25)
            layer.weight_max[1] = -0.125
        else:
            layer.act_min.fill_(0.25)
            layer.weight_max[1] = layer.weight_min[1] - 0.5
    x = torch.randn(5, 8)
    ends = []
    for low, high in (layer.act_range(), layer.weight_range()):
        ends.append((-high.abs(), high.abs()) if symmetric else (low.clamp(max=0), high.clamp(min=0)))
    expected = fake_quant_linear(
        x, layer.weight, layer.bias, act_granularity="per_tensor", act_range=ends[0], weight_range=ends[1], **kinds
    )
    assert torch.equal(layer(x), expected)
    expected_act = (-0.25, 0.25) if symmetric else (0.0, 0.75)
    assert tuple(float(end.detach()) for end in layer.act_range()) == expected_act
    if symmetric:
        layer(x).sum().backward()
        assert float(layer.act_max.grad) != 0
    export(layer, tmp_path / "l.safetensors")
    with torch.no_grad():
        assert torch.equal(load_(nn.Linear(8, 4), tmp_path / "l.safetensors")(x), layer(x))


def test_learned_ranges_need_a_start() -> None:
    with pytest.raises(ValueError, match=r"act_range=\(0, 0.0\) is no range to start learning from"):
        FakeQuantLinear(8, 4, learn_range=True, act_range=(0, 0.0))
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"layer '0': act_range=\(0.0, 0.0\) is no range .*or skip"):
        quantize_(model, learn_range=True, calibration=[torch.zeros(3, 8)])
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="learn_range=True needs a range"):
        FakeQuantLinear(8, 4, learn_range=True)
    with pytest.raises(ValueError, match="per_group"):
        FakeQuantLinear(8, 4, learn_range=True, act_range=(0, 1), weight_granularity="per_group", group_size=4)
