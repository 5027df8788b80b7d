"""`export` a fake-quantized model as packed codes in a safetensors file, and `load_` it for inference.

The file holds, for each fake-quantized layer NAME, with `[out, in]` the weight's shape as a matrix,

    NAME.weight_codes       uint8 `[out, ceil(in / 2)]`, two codes a byte (element 2 j in the low half of byte j), at
                            2..4 bits; int8 `[out, in]` above
    NAME.weight_scale       fp32 `[out, 1]`, `[1, 1]` or `[out, groups]`
    NAME.weight_zero_point  int32, likewise; asymmetric weights only
    NAME.bias, NAME.act_min, NAME.act_max  where the layer has them

and every other parameter and buffer of the model as it is. The metadata hold the layers' settings (`s2d_layers`) and
which names share a tensor (`s2d_shared`), as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from s2d_kernels import quant_ops
from s2d_kernels.fake_quant import (
    KEPT_CODES,
    FakeQuantLinear,
    FakeQuantPatchEmbedding,
    is_patch_embedding,
    keep_off_fused_path,
    pass_padded_tokens,
    patch_rows,
)
from s2d_kernels.integer_gemm import by_group, centred
from s2d_kernels.quantizers import QuantizedOperand, pack_codes, row_sums, unpack_codes, working_dtype

FORMAT = "s2d_kernels packed codes, version 2"
_REPLACED = ("weight", "bias", "act_min", "act_max", "weight_min", "weight_max")
_OPERAND = ("weight_codes", "weight_scale", "weight_zero_point")


class _Packed(nn.Module):
    """A layer whose weight is codes: for inference, without a gradient."""

    bias: Tensor | None
    act_min: Tensor
    act_max: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    row_sum: Tensor
    weight_like: Tensor  # `[0]`, of the dtype that the weight has where a model asks for it; casts with the model
    settings: dict[str, Any]

    @classmethod
    def _convert(
        cls,
        layer: nn.Module,
        settings: Mapping[str, Any],
        operand: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
    ) -> Self:
        """Make `layer` itself a `cls` with the weight `operand`; its hooks and places in the model stay."""
        module = cast(Self, layer)
        module.__class__ = cls
        module.settings = dict(settings)
        keep_off_fused_path(module)
        device = cast(Tensor, layer.weight).device
        module.__dict__.pop(KEPT_CODES, None)
        for name in _REPLACED:
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        for name, value in operand.items():
            module.register_buffer(name, value)
        for name in ("bias", "act_min", "act_max"):
            module.register_buffer(name, tensors[name].to(device) if name in tensors else None)
        like = torch.empty(0, dtype=getattr(torch, settings["weight_dtype"]), device=device)
        module.register_buffer("weight_like", like, persistent=False)
        return module

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the layer's dtype, made anew: models ask for its shape, dtype or device."""
        values = centred(self.codes, self.zero_point, self.settings["weight_symmetric"], self.scale.dtype)
        by_group(values, self.scale).mul_(self.scale.unsqueeze(2))
        return values.to(self.weight_like.dtype).unflatten(1, self._weight_shape())

    def _weight_shape(self) -> tuple[int, ...]:
        """Of one output channel's weights."""
        return (self.codes.shape[1],)

    def quantized_weight(self) -> QuantizedOperand:
        """The weight in codes, `[out, in]`."""
        bits, symmetric = self.settings["weight_bits"], self.settings["weight_symmetric"]
        mask = self.codes.new_empty((len(self.codes), 0), dtype=torch.uint8)  # for gradients, of which there are none
        return QuantizedOperand(self.codes, self.scale, self.zero_point, self.row_sum, mask, bits, symmetric)

    def _rows(self, rows: Tensor) -> Tensor:
        act_range = None if self.act_min is None else (self.act_min, self.act_max)
        settings = {name: value for name, value in self.settings.items() if name.startswith("act_")}
        return quant_ops.quantized_linear(rows, self.quantized_weight(), self.bias, **settings, act_range=act_range)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in ("scale", "act_min", "act_max")}
        super()._apply(fn, recurse)
        # A rounded scale would change bits: moving is allowed, casting is undone, but for fp64 inputs, which want fp64.
        dtype = working_dtype(self.weight_like)
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != dtype:
                setattr(self, name, value.to(moved.device, dtype))
        return self

    def extra_repr(self) -> str:
        """Sizes, bits and granularities."""
        s = self.settings
        return f"{'x'.join(map(str, self.codes.shape))}, W{s['weight_bits']}A{s['act_bits']}, {s['weight_granularity']}"


class PackedLinear(_Packed):
    """A linear layer on packed codes, of `load_`: `[..., in_features]` to `[..., out_features]`."""

    def forward(self, input: Tensor) -> Tensor:
        """y `[..., out_features]`, bit for bit that of the exported `FakeQuantLinear`."""
        return self._rows(input)


class PackedPatchEmbedding(_Packed):
    """A patch embedding on packed codes, of `load_`: `[batch, channels, height, width]` to `[batch, out, ...]`."""

    kernel_size: tuple[int, int]
    in_channels: int

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """y as the exported `FakeQuantPatchEmbedding` computes it, bit for bit."""
        return patch_rows(self, input, self._rows)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("packed files need safetensors: pip install 's2d-kernels[cli]'") from error
    return safetensors


def export(model: nn.Module, path: str | Path) -> None:
    """Write a fake-quantized model to a safetensors file, its weights rounded to nearest and packed.

    Args:
        model: after `quantize_`. It is not changed.
        path: the file; an existing one is replaced.

    Raises:
        ValueError: `model` holds no fake-quantized layer, one without calibrated ranges or with a weight that is not
            finite, or a module with `get_extra_state`.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    layers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    inside: set[str] = set()
    seen: set[nn.Module] = set()
    packed: dict[tuple[Any, ...], QuantizedOperand] = {}  # of a weight that several layers have, once
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, FakeQuantLinear | FakeQuantPatchEmbedding):
            continue
        prefix = f"{name}." if name else ""
        inside |= {prefix + key for key in _REPLACED}
        if module in seen:
            continue
        seen.add(module)
        key = (id(module.weight), *module.weight_settings().values(), id(module) if module.learn_range else None)
        if key not in packed:
            q = module.quantized_weight()
            packed[key] = q._replace(codes=pack_codes(q.codes)) if q.bits <= 4 else q
        settings, values = _pack(name, module, packed[key])
        layers[name] = settings
        tensors |= {prefix + key: value for key, value in values.items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no fake-quantized layer: run quantize_ on it first")
    state = model.state_dict()
    if extra := [name for name in state if name.endswith("_extra_state")]:
        raise ValueError(f"{extra[:5]}: a file of tensors cannot hold extra state, export the part without it")
    tensors |= {name: value for name, value in state.items() if name not in inside}

    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in list(tensors.items()):
        where = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and first.setdefault(where, name) != name:
            shared[name] = first[where]
            del tensors[name]
    metadata = {"format": FORMAT, "s2d_layers": json.dumps(layers), "s2d_shared": json.dumps(shared)}
    contents = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    safetensors.torch.save_file(contents, str(path), metadata)


def _pack(
    name: str, module: FakeQuantLinear | FakeQuantPatchEmbedding, q: QuantizedOperand
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a layer whose weight is `q`, its codes packed."""
    if not q.scale.isfinite().all():
        raise ValueError(f"the weight of layer {name!r} holds NaN or Inf: it has no codes")
    values = {
        "weight_codes": q.codes,
        "weight_scale": q.scale,
    }
    if not q.symmetric:
        values["weight_zero_point"] = q.zero_point
    if module.bias is not None:
        values["bias"] = module.bias
    act_range = module.act_range()
    if act_range is not None:
        if not all(end.isfinite() for end in act_range):
            raise ValueError(f"layer {name!r} has no activation range yet: calibrate it, or load its state_dict")
        values |= dict(zip(("act_min", "act_max"), act_range, strict=True))
    settings = {
        "kind": "linear" if isinstance(module, FakeQuantLinear) else "patch",
        "in_features": math.prod(module.weight.shape[1:]),
        "out_features": module.weight.shape[0],
        "weight_dtype": str(module.weight.dtype).removeprefix("torch."),
        "weight_bits": module.weight_bits,
        "weight_granularity": module.weight_granularity,
        "weight_symmetric": module.weight_symmetric,
        "group_size": module.group_size,
        "act_bits": module.act_bits,
        "act_granularity": module.act_granularity,
        "act_symmetric": module.act_symmetric,
    }
    return settings, values


def load_(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill `model` from a file of `export`: its quantized layers become `PackedLinear`s, in place.

    Args:
        model: of the exported model's architecture, quantized or not, with parameters of the exported dtypes.
        path: the file.

    Returns:
        `model`, which computes what the exported one did, bit for bit, and is for inference: the packed layers refuse
        to be differentiated. In memory their codes take a byte each.

    Raises:
        ValueError: no file of `export`, or one of another architecture or dtype; `model` is unchanged.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no file of export: its format is {metadata.get('format')!r}, not {FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    layers: dict[str, dict[str, Any]] = json.loads(metadata["s2d_layers"])
    for name, source in json.loads(metadata["s2d_shared"]).items():
        tensors[name] = tensors[source]

    modules = dict(model.named_modules(remove_duplicate=False))
    for name, settings in layers.items():
        _check_layer(name, modules.get(name), settings)
    found: dict[int, str] = {}
    for name in layers:
        if (other := found.setdefault(id(modules[name]), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are two layers in the file but one in the model")
    inside = {
        f"{name}.{key}" if name else key for name, module in modules.items() if id(module) in found for key in _REPLACED
    }
    expected = {name: value for name, value in model.state_dict().items() if name not in inside}
    packed = {f"{n}.{key}" if n else key for n in layers for key in (*_OPERAND, "bias", "act_min", "act_max")}
    rest = {name: value for name, value in tensors.items() if name not in packed}
    if wrong := sorted(rest.keys() ^ expected.keys()):
        side = "the model" if wrong[0] in expected else "the file"
        raise ValueError(f"the file and the model differ in {wrong[:5]}: {wrong[0]!r} is only in {side}")
    for name, value in rest.items():
        mine = expected[name]
        if mine.is_meta:
            raise ValueError(f"{name!r} is on the meta device: call model.to_empty(device='cpu') first")
        if (mine.shape, mine.dtype) != (value.shape, value.dtype):
            ours, theirs = (f"{tuple(t.shape)} {t.dtype}" for t in (mine, value))
            raise ValueError(f"{name!r} is {ours} in the model but {theirs} in the file: build and cast it likewise")

    of_layer = {
        name: {key: tensors[f"{name}.{key}" if name else key] for key in _keys(name, tensors)} for name in layers
    }
    for name, settings in layers.items():
        _check_tensors(name, settings, of_layer[name])
    unpacked: dict[tuple[Any, ...], dict[str, Tensor]] = {}  # what layers share in the file they share in memory
    for name, settings in layers.items():
        own = of_layer[name]
        kind = PackedLinear if settings["kind"] == "linear" else PackedPatchEmbedding
        device = cast(Tensor, modules[name].weight).device
        shared = (device, settings["group_size"], *(id(own.get(key)) for key in _OPERAND))
        if shared not in unpacked:
            unpacked[shared] = {key: value.to(device) for key, value in _unpack(settings, own).items()}
        kind._convert(modules[name], settings, unpacked[shared], own)
    with torch.no_grad():
        for name, value in rest.items():
            expected[name].copy_(value)
    pass_padded_tokens(model, PackedLinear)
    return model


def _unpack(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The operand that a file's `tensors` of a layer hold: codes, scale, zero_point, row_sum."""
    symmetric, columns = settings["weight_symmetric"], settings["in_features"]
    codes, scale = tensors["weight_codes"], tensors["weight_scale"]
    if settings["weight_bits"] <= 4:
        codes = unpack_codes(codes, columns, symmetric)
    codes = codes.contiguous()
    zero_point = torch.zeros_like(scale, dtype=torch.int32) if symmetric else tensors["weight_zero_point"]
    groups = columns // settings["group_size"] if settings["group_size"] else 1
    return {"codes": codes, "scale": scale, "zero_point": zero_point, "row_sum": row_sums(codes, groups)}


def _check_tensors(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A file is not trusted with shapes and dtypes: the kernels read raw memory."""
    rows, columns, packed = settings["out_features"], settings["in_features"], settings["weight_bits"] <= 4
    groups = columns // settings["group_size"] if settings["group_size"] else 1
    one = settings["weight_granularity"] == "per_tensor"
    dtype = torch.uint8 if packed else torch.int8
    parameter = (1, 1) if one else (rows, groups)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "weight_codes": ((rows, (columns + 1) // 2 if packed else columns), (dtype,)),
        "weight_scale": (parameter, (torch.float32, torch.float64)),
    }
    if not settings["weight_symmetric"]:
        expected["weight_zero_point"] = parameter, (torch.int32,)
    for key, (shape, dtypes) in expected.items():
        tensor = tensors.get(key)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            have = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"the file has {have} as {key} of {name!r}, expected {shape} {dtypes[0]}: export it anew")


def _keys(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    known = (*_OPERAND, "bias", "act_min", "act_max")
    return [key for key in known if (f"{name}.{key}" if name else key) in tensors]


def _check_layer(name: str, module: nn.Module | None, settings: Mapping[str, Any]) -> None:
    wanted = nn.Linear if settings["kind"] == "linear" else nn.Conv2d
    if not isinstance(module, wanted):
        have = "nothing" if module is None else type(module).__name__
        raise ValueError(
            f"the file has a {wanted.__name__} at {name!r}, the model has {have}: build the exported model"
        )
    if isinstance(module, nn.Conv2d) and not is_patch_embedding(module):
        raise ValueError(f"{name!r} was exported as a patch embedding, but the model's has overlapping windows")
    shape = (module.weight.shape[0], math.prod(module.weight.shape[1:]))
    if shape != (settings["out_features"], settings["in_features"]):
        raise ValueError(
            f"{name!r} is {shape} in the model but ({settings['out_features']}, {settings['in_features']}) in the file"
        )
