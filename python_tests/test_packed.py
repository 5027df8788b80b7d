"""export and load_: packed files give the exported model's bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_kernels import fake_quant
from s2d_kernels.fake_quant import FakeQuantLinear, quantize_
from s2d_kernels.packed import PackedLinear, PackedPatchEmbedding, export, load_


class Vision(nn.Module):
    """A patch embedding, a shared block, tied layers, an odd width, a float head."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        block = nn.ModuleDict({"up": nn.Linear(dim, 37), "down": nn.Linear(37, dim, bias=False)})
        self.blocks = nn.ModuleList([block, block])
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm2.weight = self.norm.weight
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT + self.shift
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](self.norm(x))))
        return self.head(self.second(self.norm2(self.first(x))).mean(1))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_bits": 3, "act_bits": 4, "act_granularity": "per_tensor", "act_symmetric": True},
    {"weight_bits": 8, "act_bits": 8, "weight_symmetric": False},
    {"weight_symmetric": False, "weight_granularity": "per_tensor"},
    {"weight_granularity": "per_group", "group_size": 8, "skip": (r"down",)},
]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_round_trip_bit_for_bit(settings: dict[str, Any], static: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 8)
    if static and settings.get("act_granularity") is None:
        settings = settings | {"calibration": [x], "percentile": 99.0}
    model = Vision().eval()
    skeleton = Vision().eval()  # other random weights
    quantize_(model, **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "m.safetensors")
    loaded = load_(skeleton, tmp_path / "m.safetensors")
    assert loaded is skeleton
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loaded(x), model(x))
    assert type(loaded.patch) is PackedPatchEmbedding
    assert type(loaded.first) is PackedLinear
    assert loaded.blocks[0]["up"] is loaded.blocks[1]["up"]
    assert loaded.norm.weight is loaded.norm2.weight
    assert type(loaded.head) is nn.Linear
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    # into a quantized model, and again into one on another copy, which had kept its codes
    quantized = copy.deepcopy(model)
    for module in quantized.modules():
        module.reuse_codes = True
    with torch.no_grad():
        quantized(x)
    assert fake_quant.KEPT_CODES in quantized.first.__dict__
    again = load_(quantized, tmp_path / "m.safetensors")
    assert again is quantized
    assert fake_quant.KEPT_CODES not in again.first.__dict__
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_what_the_file_holds(tmp_path: Path) -> None:
    model = Vision()
    quantize_(model)
    export(model, tmp_path / "m.safetensors")
    with safetensors.safe_open(str(tmp_path / "m.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert tensors["first.weight_codes"].dtype == torch.uint8
    assert tensors["first.weight_codes"].shape == (24, 12)
    assert tensors["blocks.0.down.weight_codes"].shape == (24, 19)
    assert tensors["first.weight_scale"].shape == (24, 1)
    assert "first.weight" not in tensors
    assert "first.weight_zero_point" not in tensors
    assert not any(name.startswith("blocks.1.") for name in tensors)
    shared = {f"second.weight_{part}": f"first.weight_{part}" for part in ("codes", "scale")}
    assert json.loads(metadata["s2d_shared"]) == shared | {"norm2.weight": "norm.weight"}
    assert "second.weight_codes" not in tensors
    loaded = load_(Vision(), tmp_path / "m.safetensors")
    for part in ("codes", "scale", "row_sum"):
        assert getattr(loaded.first, part) is getattr(loaded.second, part)
    assert loaded.patch.codes is not loaded.first.codes
    assert json.loads(metadata["s2d_layers"])["patch"]["kind"] == "patch"
    large = nn.Sequential(nn.Linear(512, 512, bias=False))
    quantize_(large)
    export(large, tmp_path / "large.safetensors")
    assert (tmp_path / "large.safetensors").stat().st_size < 512 * 512 * 0.52


def test_compiles_without_graph_breaks(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Vision().eval()
    quantize_(model, calibration=[x], mode="ptq")
    export(model, tmp_path / "m.safetensors")
    loaded = load_(Vision().eval(), tmp_path / "m.safetensors")
    with torch.no_grad():
        for one in (model, loaded):
            compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), one(x))


def test_half_precision_and_casting(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    model = Vision().to(torch.bfloat16).eval()
    quantize_(model, calibration=[x])
    export(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"bfloat16 in the file: build and cast"):
        load_(Vision(), tmp_path / "m.safetensors")
    loaded = load_(Vision().to(torch.bfloat16).eval(), tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        loaded.to(torch.bfloat16)  # scales and ranges keep their bits
        assert torch.equal(loaded(x), model(x))
    assert loaded.first.scale.dtype == torch.float32
    assert loaded.first.act_min.dtype == torch.float32


class AsksItsWeights(nn.Module):
    """Casts its input to its layers' weight dtypes, as transformers' SigLIP and T5 do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 8, (4, 2), stride=(4, 2)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.to(dtype=self.patch.weight.dtype)).flatten(2).mT
        return self.out(x.to(self.out.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_packed_weight_has_the_exported_dtype_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = AsksItsWeights().to(dtype).eval()
    original = {name: module.weight for name, module in model.named_children()}
    quantize_(model)
    export(model, tmp_path / "m.safetensors")
    loaded = load_(AsksItsWeights().to(dtype).eval(), tmp_path / "m.safetensors")
    with torch.no_grad():
        y = model(x)
        assert y.dtype == dtype
        assert torch.equal(loaded(x), y)
    for name, weight in original.items():
        packed = loaded.get_submodule(name).weight
        assert (packed.shape, packed.dtype) == (weight.shape, dtype)
        torch.testing.assert_close(packed, weight.detach(), rtol=0, atol=float(weight.detach().abs().max()) / 7)
    if dtype != torch.float64:  # then codes of fp32 or less, whatever the layer is cast to
        wide = loaded.double()
        assert wide.out.scale.dtype == wide.out.weight.dtype == wide(x).dtype == torch.float64
    loaded.to(dtype)
    with torch.no_grad():
        assert torch.equal(loaded(x), y)
    assert loaded.to(torch.float32).out.weight.dtype == torch.float32
    assert loaded(x).dtype == loaded.out.scale.dtype == torch.float32
    assert not any("like" in name for name in loaded.state_dict())


def test_fused_encoder_path_is_left(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()

    model, x = encoder(), torch.randn(3, 5, 16)
    quantize_(model)
    export(model, tmp_path / "m.safetensors")
    loaded = load_(encoder(), tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    q = model.layers[0].linear1.quantized_weight()
    assert torch.equal(loaded.layers[0].linear1.weight, q.codes * q.scale)


def test_a_layer_alone_and_gradients(tmp_path: Path) -> None:
    layer = FakeQuantLinear(8, 4)
    export(layer, tmp_path / "l.safetensors")
    loaded = load_(nn.Linear(8, 4), tmp_path / "l.safetensors")
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), layer(x))
    assert "W4A4" in repr(loaded)
    with pytest.raises(ValueError, match="no gradient.*no_grad"):
        loaded(x.requires_grad_())


def test_refusals_leave_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="run quantize_"):
        export(Vision(), path)
    with pytest.raises(ValueError, match="'' has no activation range"):
        export(FakeQuantLinear(4, 4, act_range="static"), path)
    bad = FakeQuantLinear(4, 4)
    with torch.no_grad():
        bad.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="'' holds NaN or Inf"):
        export(bad, path)

    class Stateful(Vision):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    stateful = Stateful()
    quantize_(stateful)
    with pytest.raises(ValueError, match=r"\['_extra_state'\]: a file of tensors cannot hold extra state"):
        export(stateful, path)
    assert not path.exists()
    safetensors.torch.save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="no file of export"):
        load_(Vision(), path)
    model = Vision()
    quantize_(model)
    export(model, path)

    class Longer(Vision):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    class Overlapping(Vision):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 24, 4, stride=2)

    one_block = Vision()
    one_block.second = one_block.first
    for other, match in (
        (one_block, "'first' and 'second' are two layers in the file but one in the model"),
        (Longer(), "'extra.bias' is only in the model"),
        (Overlapping(), "overlapping"),
        (Vision(dim=16), r"'patch' is \(16, 48\) in the model but \(24, 48\)"),
        (nn.Sequential(nn.Linear(2, 2)), "a Conv2d at 'patch', the model has nothing"),
        (Vision().to("meta"), "meta device"),
    ):
        types = {name: type(module) for name, module in other.named_modules()}
        with pytest.raises(ValueError, match=match):
            load_(other, path)
        assert {name: type(module) for name, module in other.named_modules()} == types
    assert fake_quant.is_patch_embedding(Vision().patch)


def test_tensors_of_a_file_are_not_trusted(tmp_path: Path) -> None:
    """They are read through raw pointers. The model stays as it was."""
    path, changed = tmp_path / "model.safetensors", tmp_path / "changed.safetensors"
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    quantize_(model, weight_symmetric=False)
    export(model, path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, wrong in (
        ("1.weight_zero_point", tensors["1.weight_zero_point"][:2]),
        ("1.weight_zero_point", tensors["1.weight_zero_point"].long()),
        ("1.weight_scale", tensors["1.weight_scale"].half()),
        ("1.weight_codes", tensors["1.weight_codes"][:, :3].contiguous()),
    ):
        safetensors.torch.save_file(tensors | {name: wrong.clone()}, str(changed), metadata)
        other = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
        with pytest.raises(ValueError, match=rf"the file has .* as {name[2:]} of '1', expected"):
            load_(other, changed)
        assert all(type(layer) is nn.Linear for layer in other)
