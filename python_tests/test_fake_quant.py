"""FakeQuantLinear and quantize_: state, ties, selection, calibration, training."""

from __future__ import annotations

import copy
import io
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from s2d_kernels import fake_quant, ops
from s2d_kernels.fake_quant import FakeQuantLinear, quantize_
from s2d_kernels.packed import export, load_
from s2d_kernels.quant_ops import fake_quant_linear


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(input=F.scaled_dot_product_attention(q, k, v))  # by keyword: hooks must find it


class Transformer(nn.Module):
    """Two blocks that share one attention module, with tied and untied heads."""

    def __init__(self, dim: int = 16, tokens: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, dim)
        shared = Attention(dim)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": shared, "up": nn.Linear(dim, 40), "down": nn.Linear(40, dim)}) for _ in range(2)
        )
        self.dropout = nn.Dropout(0.5)
        self.lm_head = nn.Linear(dim, 3)
        self.decoder = nn.Linear(dim, tokens, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor, shift: float = 0.0) -> Tensor:
        x = self.embed(tokens) + shift
        for block in self.blocks:
            x = x + block["attention"](x)
            x = x + block["down"](self.dropout(F.gelu(block["up"](x))))
        return self.decoder(x) + self.lm_head(x).sum()


def inputs(count: int = 3) -> list[Tensor]:
    return [torch.randint(11, (2, 5 + i)) for i in range(count)]


# --- FakeQuantLinear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [None, "reference"])
def test_forward_is_fake_quant_linear(impl: str | None) -> None:
    x = torch.randn(2, 5, 36)
    kwargs = {"weight_bits": 3, "act_bits": 6, "weight_granularity": "per_group", "group_size": 9,
              "weight_symmetric": False, "act_symmetric": True}  # fmt: skip
    layer = FakeQuantLinear(36, 7, impl=impl, **kwargs)
    expected = fake_quant_linear(x, layer.weight, layer.bias, act_granularity="per_token", **kwargs)
    assert torch.equal(layer(x), expected)
    static = FakeQuantLinear.from_linear(layer, act_range=(-0.5, 0.75), act_bits=5)
    expected = fake_quant_linear(
        x, layer.weight, layer.bias, act_bits=5, act_granularity="per_tensor", act_range=(-0.5, 0.75)
    )
    assert torch.equal(static(x), expected)
    assert not torch.equal(static(x), FakeQuantLinear.from_linear(layer, act_bits=5)(x))


def test_impl_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("impl='torch' was called")

    for op in ("quantize", "integer_linear", "straight_through_grad"):
        monkeypatch.setitem(ops._TABLE[op], "torch", refuse)
    FakeQuantLinear(8, 4, impl="reference")(torch.randn(3, 8, requires_grad=True)).sum().backward()
    with pytest.raises(RuntimeError, match="was called"):
        FakeQuantLinear(8, 4, impl="torch")(torch.randn(3, 8))


def test_state_dict_keys_and_loading() -> None:
    linear = nn.Linear(8, 4)
    dynamic, static = FakeQuantLinear(8, 4), FakeQuantLinear(8, 4, act_range=(-1, 2))
    assert dynamic.state_dict().keys() == linear.state_dict().keys()
    assert static.state_dict().keys() == linear.state_dict().keys() | {"act_min", "act_max"}
    dynamic.load_state_dict(linear.state_dict())
    model = nn.Sequential(static)
    model.load_state_dict(nn.Sequential(linear).state_dict())  # strict: no missing key may be reported
    assert torch.equal(static.weight, linear.weight)
    assert (float(static.act_min), float(static.act_max)) == (-1.0, 2.0)

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    uncalibrated = nn.Sequential(FakeQuantLinear(8, 4, act_range="static"))
    with pytest.raises(ValueError, match=r"nan.*calibrate"):
        uncalibrated(torch.randn(2, 8))
    uncalibrated.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 8)
    assert torch.equal(uncalibrated(x), model(x))

    half = {k: v for k, v in static.state_dict().items() if k != "act_max"}
    with pytest.raises(RuntimeError, match="act_max"):
        static.load_state_dict(half)
    with pytest.raises(RuntimeError, match="weight"):
        static.load_state_dict({})


def test_ranges_stay_fp32_when_the_model_is_cast() -> None:
    layer = FakeQuantLinear(8, 4, act_range=(-0.1, 0.3))
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.act_min.dtype == torch.float32
    assert float(layer.act_max) == np.float32(0.3)
    assert layer.state_dict()["act_min"].dtype == torch.float32
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta")
    assert layer.act_min.is_meta


def test_from_linear_shares_parameters() -> None:
    linear = nn.Linear(8, 4).eval()
    linear.weight.requires_grad_(False)
    layer = FakeQuantLinear.from_linear(linear, weight_bits=5)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert type(linear) is nn.Linear
    assert not layer.training
    assert layer.weight_bits == 5
    assert FakeQuantLinear.from_linear(nn.Linear(8, 4, bias=False)).bias is None
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), layer(x))


def test_extra_repr_tells_the_settings() -> None:
    text = repr(FakeQuantLinear(8, 4, weight_bits=3, weight_granularity="per_group", group_size=4, act_range=(0, 1)))
    for part in ("in_features=8", "W3A4", "per_group(4) symmetric", "per_tensor asymmetric static"):
        assert part in text


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "weight_bits=9", {"weight_bits": 9}),
        (TypeError, "act_bits must be an int", {"act_bits": "4"}),
        (ValueError, "group_size=3 must divide K=8", {"weight_granularity": "per_group", "group_size": 3}),
        (ValueError, "group_size=None", {"weight_granularity": "per_group"}),
        (ValueError, "act_granularity='per_channel'", {"act_granularity": "per_channel"}),
        (ValueError, "weight_granularity='x'", {"weight_granularity": "x"}),
        (ValueError, "static activation range", {"act_granularity": "per_token", "act_range": (0, 1)}),
        (ValueError, "act_range='learned'", {"act_range": "learned"}),
        (ValueError, "min <= max", {"act_range": (1.0, -1.0)}),
        (ValueError, "NaN", {"act_range": (math.nan, 1.0)}),
        (TypeError, "pair", {"act_range": 3}),
        (ValueError, "impl='fast'", {"impl": "fast"}),
    ],
)
def test_settings_are_checked_early(error: type[Exception], match: str, kwargs: dict) -> None:
    with pytest.raises(error, match=match):
        FakeQuantLinear(8, 4, **kwargs)
    linear = nn.Linear(8, 4)
    with pytest.raises(error, match=match):
        FakeQuantLinear.from_linear(linear, **kwargs)
    assert type(linear) is nn.Linear


def test_from_linear_refuses_other_things() -> None:
    with pytest.raises(TypeError, match="Conv1d"):
        FakeQuantLinear.from_linear(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown argument.*bits"):
        FakeQuantLinear.from_linear(nn.Linear(2, 2), bits=4)


def test_compiles_without_graph_breaks() -> None:
    model = nn.Sequential(FakeQuantLinear(12, 9), nn.ReLU(), FakeQuantLinear(9, 5, act_range=(0.0, 1.0), act_bits=8))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 12)
    for m in (model, compiled):
        m(x).square().sum().backward()
    assert torch.equal(model(x), compiled(x))
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_training_lowers_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    target = torch.tanh(x @ torch.randn(16, 4, generator=generator))
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    quantize_(model, weight_bits=4, act_bits=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


# --- quantize_: selection -----------------------------------------------------------------------------------------


def test_report_and_selection() -> None:
    model = Transformer()
    parameters = dict(model.named_parameters())
    down = model.blocks[1]["down"]
    report = quantize_(model, weight_bits=3, act_bits=5, skip=(r"blocks\.0\.up", r"1\.attention\.out$"))
    rows = {row.name: row for row in report}
    assert rows.keys() == {
        "blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.up", "blocks.0.down", "blocks.1.up",
        "blocks.1.down", "lm_head", "decoder", "embed",
    }  # fmt: skip
    assert rows["embed"] == ("embed", (11, 16), "skip", "embedding: a look-up, no product")
    del rows["embed"]
    assert {name for name, row in rows.items() if row.decision == "quantize"} == {
        "blocks.0.attention.qkv", "blocks.0.down", "blocks.1.up", "blocks.1.down",
    }  # fmt: skip
    assert rows["blocks.0.up"].reason == r"skipped by pattern 'blocks\\.0\\.up'"
    assert "pattern" in rows["blocks.0.attention.out"].reason  # matched by its second name
    assert "tied to the embedding embed" in rows["decoder"].reason
    assert rows["lm_head"].reason == "output head"
    assert rows["lm_head"].shape == (3, 16)
    assert rows["blocks.0.attention.qkv"].reason == "W3A5, dynamic range, also at blocks.1.attention.qkv"

    for name, row in rows.items():
        expected = FakeQuantLinear if row.decision == "quantize" else nn.Linear
        assert type(model.get_submodule(name)) is expected
    assert model.blocks[0]["attention"].qkv is model.blocks[1]["attention"].qkv
    assert model.blocks[1]["down"] is down
    assert (down.weight_bits, down.act_bits, down.act_granularity) == (3, 5, "per_token")
    assert model.decoder.weight is model.embed.weight
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    model(inputs()[0]).sum().backward()
    assert down.weight.grad is not None

    again = {row.name: row.reason for row in quantize_(model)}
    assert "already fake-quantized" in again["blocks.1.down"]
    assert again["blocks.0.up"] == "W4A4, dynamic range"


@pytest.mark.parametrize("head", ["lm_head", "head", "classifier", "score", "output_projection"])
def test_output_heads_are_skipped_by_their_last_name(head: str) -> None:
    model = nn.ModuleDict({head: nn.Linear(4, 2), f"{head}_mlp": nn.Linear(4, 4), "a": nn.ModuleDict()})
    model["a"][head] = nn.Linear(4, 2)
    decisions = {row.name: row.decision for row in quantize_(model)}
    assert decisions == {head: "skip", f"{head}_mlp": "quantize", f"a.{head}": "skip"}


def test_only_exact_linears_are_converted() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    wrapped = nn.Linear(4, 4)
    wrapped.forward = wrapped.forward  # as accelerate's hooks do
    model = nn.ModuleDict(
        {"scaled": Scaled(4, 4), "attention": nn.MultiheadAttention(4, 2), "wrapped": wrapped, "plain": nn.Linear(4, 4)}
    )
    rows = {row.name: row for row in quantize_(model)}
    assert "Scaled, a subclass" in rows["scaled"].reason
    assert "MultiheadAttention" in rows["attention.out_proj"].reason
    assert "is no module" in rows["attention.in_proj_weight"].reason
    assert "replaced" in rows["wrapped"].reason
    assert [name for name, row in rows.items() if row.decision == "quantize"] == ["plain"]


def test_a_linear_itself_and_its_hooks() -> None:
    linear = nn.Linear(8, 4)
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    (row,) = quantize_(linear, act_bits=8)
    assert row == ("", (4, 8), "quantize", "W4A8, dynamic range")
    linear(torch.randn(2, 8))
    assert calls == [1]
    handle.remove()
    assert isinstance(linear, FakeQuantLinear)


def test_fused_encoder_path_does_not_bypass_the_layers() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.tensor([[False] * (5 - i) + [True] * i for i in range(3)])
    before = model(x, src_key_padding_mask=padding)
    rows = quantize_(model, weight_bits=2, act_bits=2, calibration=[{"src": x, "src_key_padding_mask": padding}])
    assert {r.name for r in rows if r.decision == "quantize"} == {
        f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)
    }
    with_grad = model(x, src_key_padding_mask=padding)
    assert (with_grad - before)[~padding].abs().max() > 0.01
    with torch.no_grad():  # the fused path needs grad mode off
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), with_grad)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_placed_by_hand_is_not_bypassed_either(packed: bool, tmp_path: Path) -> None:
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(3, 5, 16)
    layer = FakeQuantLinear.from_linear(encoder.linear1, weight_bits=2, act_bits=2)
    encoder.linear1 = layer
    if packed:
        export(layer, tmp_path / "l.safetensors")
        encoder.linear1 = load_(nn.Linear(16, 32), tmp_path / "l.safetensors")
    calls = []
    original = fake_quant.quant_ops.quantize_activation if packed else fake_quant.quant_ops.fake_quant_linear
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_quant.quant_ops, original.__name__, lambda *a, **k: calls.append(1) or original(*a, **k))
        for one in (encoder, copy.deepcopy(encoder)):
            one(x)
    assert calls == [1, 1]


def test_lazy_layers_and_the_meta_device() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    lazy, ready = quantize_(model)
    assert lazy == ("0", (), "skip", "LazyLinear without a shape: call the model once before")
    assert ready.decision == "quantize"
    model(torch.randn(3, 8))
    assert [row.decision for row in quantize_(model)] == ["quantize", "skip"]
    on_meta = FakeQuantLinear(8, 4, device="meta", dtype=torch.bfloat16)(torch.zeros(2, 8, device="meta"))
    assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == ("meta", (2, 4), torch.float32)


def test_nothing_to_quantize_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="s2d_kernels"):
        assert quantize_(nn.Sequential(nn.ReLU())) == []
        (row,) = quantize_(nn.ModuleDict({"head": nn.Linear(2, 2)}))
    assert row.decision == "skip"
    assert "no linear layer" in caplog.messages[0]
    assert "head: output head" in caplog.messages[1]


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, r"'blocks\\\\.9'.*match no linear", {"skip": (r"blocks\.9",)}),
        (ValueError, "no regular expression", {"skip": ("(",)}),
        (TypeError, "skip must be a sequence", {"skip": "lm_head"}),
        (ValueError, r"layer 'blocks.0.down' \(16, 40\): group_size=16 must divide K=40",
         {"weight_granularity": "per_group", "group_size": 16}),
        (ValueError, r"layer .*weight_bits=1", {"weight_bits": 1}),
        (ValueError, r"percentile=99 needs calibration", {"percentile": 99}),
        (ValueError, r"percentile=0.999 must lie above 50", {"percentile": 0.999, "calibration": inputs()}),
        (ValueError, r"percentile=nan", {"percentile": math.nan, "calibration": inputs()}),
        (ValueError, r"holds no batch", {"calibration": iter(())}),
        (TypeError, r"got one Tensor", {"calibration": inputs()[0]}),
        (TypeError, r"got one dict", {"calibration": {"tokens": inputs()[0]}}),
        (TypeError, r"calibration\[1\] is a int", {"calibration": [inputs()[0], 3]}),
        (ValueError, r"does not go with a static", {"calibration": inputs(), "act_granularity": "per_token"}),
        (ValueError, r"'blocks.0.attention.qkv' held NaN or Inf",
         {"calibration": [*inputs(), {"tokens": inputs()[0], "shift": math.inf}]}),
    ],
)  # fmt: skip
def test_quantize_refuses_and_leaves_the_model_alone(error: type[Exception], match: str, kwargs: dict) -> None:
    model = Transformer().train()
    x = inputs()[0]
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        quantize_(model, **kwargs)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(x).requires_grad


def test_only_and_what_the_log_says(caplog: pytest.LogCaptureFixture) -> None:
    model = Transformer()
    with caplog.at_level(logging.INFO, logger="s2d_kernels"):
        rows = {row.name: row for row in quantize_(model, only=(r"\.up$|lm_head",), skip=(r"blocks\.0",))}
    assert [name for name, row in rows.items() if row.decision == "quantize"] == ["blocks.1.up"]
    assert "matches none of only=" in rows["blocks.1.down"].reason
    assert rows["lm_head"].reason == "output head"
    for name in ("embed", "lm_head", "decoder", "blocks.0.up", "blocks.1.down"):
        assert any(f"{name} " in message and rows[name].reason in message for message in caplog.messages)


def test_matrices_outside_of_linear_layers_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Mixtures of experts and GPT-2's Conv1D hold most of a model where nothing is quantized."""
    caplog.set_level("INFO")
    model = nn.Module()
    model.up = nn.Linear(10, 10, bias=False)
    model.experts = nn.Module()
    model.experts.gate = nn.Parameter(torch.zeros(4, 10, 10))
    model.experts.scale = nn.Parameter(torch.ones(10))
    rows = quantize_(model)
    assert [(row.name, row.shape, row.decision) for row in rows] == [
        ("up", (10, 10), "quantize"),
        ("experts.gate", (4, 10, 10), "skip"),
    ]
    assert rows[1].reason == "a parameter of Module, which is no linear layer"
    assert "1 layers are fake-quantized, 19.6 % of the parameters" in caplog.text
    assert "experts.gate [4, 10, 10] stays float" in caplog.text
    caplog.clear()
    twins = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(2))
    twins[1].weight = twins[0].weight
    quantize_(twins)
    assert "2 layers are fake-quantized, 100 % of the parameters" in caplog.text
    attention = nn.MultiheadAttention(8, 2, kdim=4)
    assert [row.name for row in quantize_(attention) if row.name.startswith("k_proj")] == ["k_proj_weight"]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        quantize_([model])


def test_a_head_is_converted_where_a_pattern_names_it_alone() -> None:
    x = inputs()[0]
    for only, converted in (
        (("lm_head",), {"lm_head"}),
        (("head$",), {"lm_head"}),
        ((r"1\.up$", "lm_head"), {"blocks.1.up", "lm_head"}),
        ((r"1\.up$|lm_head",), {"blocks.1.up"}),
        ((r"1\.up$", "e"), {"blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.1.up"}),
    ):
        model = Transformer()
        rows = {row.name: row for row in quantize_(model, only=only)}
        assert {name for name, row in rows.items() if row.decision == "quantize"} == converted
        assert (type(model.lm_head) is FakeQuantLinear) == ("lm_head" in converted)
        assert model(x).isfinite().all()
    for everything in (".", ".*", ""):
        reasons = {row.name: row.reason for row in quantize_(Transformer(), only=(everything,))}
        assert reasons["lm_head"] == "output head"
    rows = {row.name: row for row in quantize_(Transformer(), only=("lm_head", "decoder", "up"), skip=("lm_head",))}
    assert rows["lm_head"].reason == "skipped by pattern 'lm_head'"
    assert "tied to the embedding" in rows["decoder"].reason


def test_ptq_gives_the_same_bits_and_follows_the_weight() -> None:
    torch.manual_seed(0)
    qat, ptq = (nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))
    ptq.load_state_dict(qat.state_dict())
    for model, mode in ((qat, "qat"), (ptq, "ptq")):
        quantize_(model, mode=mode, calibration=[torch.linspace(-2, 2, 96).view(2, 48)])
    x = torch.randn(5, 48)
    calls = []
    original = fake_quant.quant_ops.quantize_weight
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_quant.quant_ops, "quantize_weight", lambda *a, **k: calls.append(1) or original(*a, **k))
        for _ in range(3):
            assert torch.equal(ptq(x), qat(x))
        assert len(calls) == 2  # once a layer
        for model in (qat, ptq):
            model[0].weight.mul_(1.5)
        assert torch.equal(ptq(x), qat(x))
        assert len(calls) == 3
        state = {name: value * 0.5 for name, value in qat.state_dict().items()}
        for model in (qat, ptq):
            model.load_state_dict(state)
        assert torch.equal(ptq(x), qat(x))
        for model in (qat, ptq):
            model[2].weight = nn.Parameter(torch.ones(8, 32))
        assert torch.equal(ptq(x), qat(x))
        assert torch.equal(copy.deepcopy(ptq)(x), qat(x))
    with torch.inference_mode():
        assert torch.equal(ptq(x), qat(x))
    buffer = io.BytesIO()
    torch.save(ptq, buffer)
    assert len(buffer.getvalue()) < 4 * (48 * 32 + 32 * 8) + 12_000  # no codes beside the weights
    ptq(x).sum().backward()  # with gradients it is the layer that is trained
    assert ptq[0].weight.grad is not None
    with pytest.raises(ValueError, match="mode='rtn'"):
        quantize_(qat, mode="rtn")


@pytest.mark.parametrize("how", ["functional_call", "replaced", "parametrized", "cast"])
def test_ptq_never_uses_the_codes_of_another_weight(how: str) -> None:
    """A new tensor often lies where a freed one lay, and starts at the same version."""

    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(32, 64))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.shift

    layer, plus, x = nn.Linear(64, 32), Plus(), torch.randn(4, 64)
    quantize_(layer, mode="ptq")
    if how == "parametrized":
        parametrize.register_parametrization(layer, "weight", plus)
    for _ in range(8):
        with torch.no_grad():
            if how == "functional_call":
                weight = torch.randn(32, 64)
                y = torch.func.functional_call(layer, {"weight": weight}, (x,))
                assert torch.equal(y, fake_quant_linear(x, weight, layer.bias))
                del weight
                continue
            if how == "replaced":
                layer.weight = None
                layer.weight = nn.Parameter(torch.randn(32, 64))
            elif how == "parametrized":
                plus.shift.add_(torch.randn(32, 64))
            else:
                layer(x)
                layer.weight.normal_()
                layer(x)
                layer.half().float()
            assert torch.equal(layer(x), fake_quant_linear(x, layer.weight, layer.bias))


# --- Patch embeddings ---------------------------------------------------------------------------------------------


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 10, (4, 2), stride=(4, 2))
        self.overlapping = nn.Conv2d(10, 10, 3, padding=1)
        self.line = nn.Conv1d(10, 10, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.overlapping(self.patch(x)).flatten(2))


@pytest.mark.parametrize("static", [False, True])
def test_patch_embeddings_are_linear_layers_on_patches(static: bool) -> None:
    model = Patches()
    weight, keys = model.patch.weight, model.state_dict().keys()
    x = torch.randn(2, 3, 13, 8, requires_grad=True)  # a row is left over, as the convolution leaves it
    rows = {row.name: row for row in quantize_(model, calibration=[x.detach()] if static else None)}
    assert type(model.patch) is fake_quant.FakeQuantPatchEmbedding
    assert isinstance(model.patch, nn.Conv2d)
    assert model.patch.weight is weight
    assert rows["patch"].decision == "quantize"
    assert "overlapping" in rows["overlapping"].reason
    assert "two-dimensional" in rows["line"].reason
    assert (model.state_dict().keys() == keys) != static

    patches = F.unfold(x, (4, 2), stride=(4, 2)).mT  # [batch, patches, in]
    act_range = (model.patch.act_min, model.patch.act_max) if static else None
    granularity = "per_tensor" if static else "per_token"
    y = fake_quant_linear(
        patches, weight.flatten(1), model.patch.bias, act_range=act_range, act_granularity=granularity
    )
    expected = y.mT.unflatten(2, (3, 4))
    got = model.patch(x)
    assert torch.equal(got, expected)
    assert got.is_contiguous()
    assert model.patch(x[0]).is_contiguous()
    with pytest.raises(ValueError, match=r"\(3, 8\) pixels, fewer than a patch of 4 x 2"):
        model.patch(x[:, :, :3])
    assert torch.equal(model.patch(x[0]), expected[0])
    g = torch.randn(got.shape)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    if static:
        assert (float(model.patch.act_min), float(model.patch.act_max)) == (
            float(x.detach().min()),
            float(x.detach().max()),
        )
    with pytest.raises(ValueError, match=r"\(3, 8\), expected \[batch, 3"):
        model.patch(x[0, :, 0])


def test_from_conv() -> None:
    conv = nn.Conv2d(3, 10, 4, stride=4, bias=False).eval()
    layer = fake_quant.FakeQuantPatchEmbedding.from_conv(conv, weight_bits=8, act_bits=8)
    assert layer.weight is conv.weight
    assert type(conv) is nn.Conv2d
    assert not layer.training
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(layer(x), conv(x), rtol=0.1, atol=0.1)
    assert "W8A8" in repr(layer)
    with pytest.raises(TypeError, match="Linear"):
        fake_quant.FakeQuantPatchEmbedding.from_conv(nn.Linear(2, 2))  # type: ignore[arg-type]
    for bad in ({"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}, {"stride": 4, "groups": 3}):
        with pytest.raises(ValueError, match="no patch embedding"):
            fake_quant.FakeQuantPatchEmbedding.from_conv(nn.Conv2d(3, 9, 4, **bad))
    with pytest.raises(ValueError, match="weight_bits=9"):
        fake_quant.FakeQuantPatchEmbedding.from_conv(conv, weight_bits=9)


# --- quantize_: calibration ---------------------------------------------------------------------------------------


def recorded(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, list[np.ndarray]]:
    """Inputs of the layers of the float model in eval mode."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    model = copy.deepcopy(model).eval()
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, kwargs, _y, name=name: found[name].append(
                (args[0] if args else kwargs["input"]).detach().numpy()
            ),
            with_kwargs=True,
        )
    for batch in batches:
        model(batch)
    return found


@pytest.mark.parametrize("percentile", [None, 99.0, 51.0, 100])
def test_calibrated_ranges(percentile: float | None) -> None:
    model, batches = Transformer(), inputs()
    model.train()
    model.embed.eval()
    names = ["blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.up", "blocks.1.down"]
    calls = recorded(model, names, batches)
    assert len(calls["blocks.0.attention.qkv"]) == 6  # shared: two calls a batch
    forms = [batches[0], (batches[1],), {"tokens": batches[2]}]
    report = {row.name: row for row in quantize_(model, calibration=iter(forms), percentile=percentile)}
    for name in names:
        layer = model.get_submodule(name)
        if percentile is None:
            low, high = min(c.min() for c in calls[name]), max(c.max() for c in calls[name])
        else:
            low = np.mean([np.quantile(c.astype(np.float64), 1 - percentile / 100) for c in calls[name]])
            high = np.mean([np.quantile(c.astype(np.float64), percentile / 100) for c in calls[name]])
        np.testing.assert_allclose([float(layer.act_min), float(layer.act_max)], [low, high], rtol=2e-6)
        assert layer.static
        assert layer.act_granularity == "per_tensor"
        told = re.search(r"static range \[(.*), (.*?)\]", report[name].reason)
        np.testing.assert_allclose([float(v) for v in told.groups()], [low, high], rtol=1e-5)
    assert {m.training for m in model.modules() if m is not model.embed} == {True}
    assert not model.embed.training
    assert torch.backends.mha.get_fastpath_enabled()
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    assert set(hooks) == {fake_quant._nothing}  # none of the calibration's
    assert model.eval()(batches[0]).isfinite().all()


def test_layers_that_no_batch_reaches_stay_float(caplog: pytest.LogCaptureFixture) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Branch()
    rows = {row.name: row for row in quantize_(model, calibration=[torch.randn(3, 4)])}
    assert rows["used"].decision == "quantize"
    assert rows["unused"] == ("unused", (4, 4), "skip", "no calibration batch called it")
    assert type(model.unused) is nn.Linear
    assert "'unused'" in caplog.text


def test_quantile_of_more_elements_than_torch_takes() -> None:
    values = torch.linspace(-3, 5, 2**24 + 7)[torch.arange(2**24 + 7) * 7919 % (2**24 + 7)]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.999)
    low, high = fake_quant._batch_range(values, 99.9).tolist()
    assert low == pytest.approx(-3 + 0.001 * 8, rel=1e-5)
    assert high == pytest.approx(5 - 0.001 * 8, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1001])
def test_quantile_against_torch(count: int) -> None:
    values = torch.randn(count, dtype=torch.float64)
    for fraction in (0.5001, 0.9, 0.99, 0.999, 1.0):
        expected = float(torch.quantile(values, fraction))
        assert float(fake_quant._upper_quantile(values, fraction)) == pytest.approx(expected, rel=1e-9)


def test_half_precision_calibration_and_non_finite_tails() -> None:
    x = torch.randn(1000, dtype=torch.bfloat16)
    assert fake_quant._batch_range(x, 99.0).dtype == torch.float64
    x[3] = math.inf  # above the quantile, but it must not go unseen
    assert fake_quant._batch_range(x, 99.0).isnan().all()


def test_show_progress_prints_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    quantize_(Transformer(), calibration=inputs())
    assert capsys.readouterr().out == ""
    quantize_(Transformer(), calibration=inputs(), show_progress=True)
    assert "calibrating" in capsys.readouterr().out
