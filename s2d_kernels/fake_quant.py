"""`FakeQuantLinear` and `FakeQuantPatchEmbedding`, and `quantize_`, which turns the layers of a model into them."""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from s2d_kernels import ops, quant_ops, quantizers
from s2d_kernels.evaluation import run_batches
from s2d_kernels.parameters import HEAD
from s2d_kernels.quantizers import QuantizedOperand
from s2d_kernels.reference import SMALLEST_SCALE

logger = logging.getLogger("s2d_kernels")

SMALLEST_RANGE = 2**8 * SMALLEST_SCALE  # of at most 2^8 - 1 steps, each a normal number
KEPT_CODES = "_weight_codes"  # attribute of a mode="ptq" layer: its weight, when that was, and its codes


class _OptimizerSteps:
    """Counts the steps of all optimizers from the first question on: fused ones change weights but no version."""

    count = 0
    handle: torch.utils.hooks.RemovableHandle | None = None

    @classmethod
    def so_far(cls) -> int:
        if cls.handle is None:
            cls.handle = register_optimizer_step_post_hook(cls._add)
        return cls.count

    @classmethod
    def _add(cls, *_: Any) -> None:
        cls.count += 1


_DEFAULTS: dict[str, Any] = {
    "weight_bits": 4,
    "act_bits": 4,
    "weight_granularity": "per_channel",
    "act_granularity": None,
    "weight_symmetric": True,
    "act_symmetric": False,
    "act_range": None,
    "group_size": None,
    "learn_range": False,
    "impl": None,
}


def _check_learnable(act_range: Any) -> None:
    """Raise for a range of zero: its scale is 1, whatever the ends, so that these get no gradient."""
    if all(abs(float(end)) < SMALLEST_RANGE for end in act_range):
        raise ValueError(f"act_range={tuple(act_range)} is no range to start learning from: calibrate on other batches")


def _resolve(in_features: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a layer, checked as far as they can be without an input."""
    if unknown := set(given) - set(_DEFAULTS):
        raise TypeError(f"unknown argument(s) {sorted(unknown)}: choose from {sorted(_DEFAULTS)}")
    settings = _DEFAULTS | dict(given)
    static = settings["act_range"] is not None
    if settings["act_granularity"] is None:
        settings["act_granularity"] = "per_tensor" if static else "per_token"
    quantizers.check_bits("weight_bits", settings["weight_bits"])
    quantizers.check_bits("act_bits", settings["act_bits"])
    quantizers.check_granularity("act_granularity", settings["act_granularity"], quantizers.ACTIVATION_GRANULARITIES)
    quantizers.check_weight_groups(settings["weight_granularity"], settings["group_size"], in_features)
    if static and settings["act_granularity"] != "per_tensor":
        raise ValueError(
            f"act_granularity={settings['act_granularity']!r} does not go with a static activation range, which is one "
            "for the tensor: use 'per_tensor', or dynamic ranges (no calibration, act_range=None)"
        )
    if settings["learn_range"]:
        if not static:
            raise ValueError("learn_range=True needs a range to start from: give act_range, or calibration batches")
        if settings["weight_granularity"] == "per_group":
            raise ValueError("learn_range=True does not go with weight_granularity='per_group': use 'per_channel'")
    if isinstance(settings["act_range"], str):
        if settings["act_range"] != "static":
            raise ValueError(f"act_range={settings['act_range']!r} must be None, 'static' or a pair (min, max)")
    else:
        quantizers.check_value_range("act_range", settings["act_range"], torch.empty(0, 0, device="cpu"), "per_tensor")
        if settings["learn_range"]:
            _check_learnable(settings["act_range"])
    if settings["impl"] is not None and settings["impl"] not in ops.IMPLS:
        raise ValueError(f"impl={settings['impl']!r} is none of {ops.IMPLS} (or None to choose by device)")
    return settings


class _FakeQuantized(nn.Module):
    """What the fake-quantized layers share: settings, ranges, their state, and the computation on rows."""

    weight: Tensor
    bias: Any  # nn.Linear and nn.Conv2d annotate it differently
    weight_bits: int
    act_bits: int
    weight_granularity: str
    act_granularity: str
    weight_symmetric: bool
    act_symmetric: bool
    group_size: int | None
    impl: str | None
    static: bool
    learn_range: bool
    reuse_codes: bool
    act_min: Tensor
    act_max: Tensor
    weight_min: Tensor
    weight_max: Tensor

    @classmethod
    def _convert(cls, layer: nn.Module, resolved: Mapping[str, Any]) -> Self:
        """Make `layer` itself a `cls`: it keeps its identity, hooks, parameters and places in a model."""
        layer.__class__ = cls
        module = cast(Self, layer)
        module._configure(resolved)
        return module

    def _configure(self, resolved: Mapping[str, Any]) -> None:
        act_range = resolved["act_range"]
        for name in resolved.keys() - {"act_range"}:
            setattr(self, name, resolved[name])
        keep_off_fused_path(self)
        self.reuse_codes = False
        self.static = act_range is not None
        if act_range is not None:
            low, high = (math.nan, math.nan) if act_range == "static" else (float(v) for v in act_range)
            ends = [torch.tensor(v, dtype=torch.float32, device=self.weight.device) for v in (low, high)]
            self._set_range("act", ends[0], ends[1], self.act_symmetric)
        if self.learn_range:
            rows = self.weight.detach().flatten(1).float()
            dims = (1,) if self.weight_granularity == "per_channel" else (0, 1)
            lows, highs = rows.amin(dims).view(-1), rows.amax(dims).view(-1)
            # A range of zero is no scale and gets no gradient. What starts at zero, as LoRA's B, will hardly outgrow
            # what nn.Linear starts at, a range that learning can shrink.
            empty = torch.maximum(lows.abs(), highs.abs()) < SMALLEST_RANGE
            floor = rows.shape[1] ** -0.5 if rows.shape[1] else 1.0
            lows, highs = lows.masked_fill(empty, -floor), highs.masked_fill(empty, floor)
            self._set_range("weight", lows, highs, self.weight_symmetric)

    def _set_range(self, which: str, low: Tensor, high: Tensor, symmetric: bool) -> None:
        """Buffers or parameters `which`_min and `which`_max; a learned symmetric range is one number, its end."""
        values = {"min": low, "max": high}
        if self.learn_range and symmetric:
            values = {"max": torch.maximum(low.abs(), high.abs())}
        for end, value in values.items():
            value = value.to(self.weight.device)
            if self.learn_range:
                self.register_parameter(f"{which}_{end}", nn.Parameter(value))
            else:
                self.register_buffer(f"{which}_{end}", value)

    def _range_names(self) -> tuple[str, ...]:
        names = ("act_min", "act_max", "weight_min", "weight_max")
        return tuple(name for name in names if name in self._buffers or name in self._parameters)

    def act_range(self) -> tuple[Tensor, Tensor] | None:
        """(min, max) of a static range."""
        if not self.static:
            return None
        return self._range("act", self.act_symmetric)

    def _range(self, which: str, symmetric: bool) -> tuple[Tensor, Tensor]:
        """A learned end may have crossed zero: it counts as the quantizer would take it, by |end| or as zero."""
        high = getattr(self, f"{which}_max")
        if not self.learn_range:
            return getattr(self, f"{which}_min"), high
        if symmetric:
            end = high.abs()
            return -end, end
        return getattr(self, f"{which}_min").clamp(max=0), high.clamp(min=0)

    def weight_range(self) -> tuple[Tensor, Tensor] | None:
        """(min, max) of a learned range, else None: the weight's own."""
        if not self.learn_range:
            return None
        return self._range("weight", self.weight_symmetric)

    def act_settings(self) -> dict[str, Any]:
        """How the input is quantized, as `fake_quant_linear` and `quantized_linear` take it."""
        return {
            "act_bits": self.act_bits,
            "act_granularity": self.act_granularity,
            "act_symmetric": self.act_symmetric,
            "act_range": self.act_range(),
            "impl": self.impl,
        }

    def weight_settings(self) -> dict[str, Any]:
        """How the weight is quantized, as `quantize_weight` takes it."""
        return {
            "bits": self.weight_bits,
            "granularity": self.weight_granularity,
            "symmetric": self.weight_symmetric,
            "group_size": self.group_size,
        }

    def quantized_weight(self) -> QuantizedOperand:
        """The weight, as `[out, in]`, in codes."""
        rows = self.weight.detach().flatten(1)
        settings = self.weight_settings()
        return quant_ops.quantize_weight(rows, **settings, value_range=self.weight_range(), impl=self.impl)

    def _rows(self, rows: Tensor) -> Tensor:
        """The layer on `rows [..., in]`."""
        if self.reuse_codes and not self.learn_range and not torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                return quant_ops.quantized_linear(rows, self._kept_codes(), self.bias, **self.act_settings())
            if self.weight.requires_grad:  # it may be frozen again after the step
                self.__dict__.pop(KEPT_CODES, None)
        weight = {f"weight_{name}": value for name, value in self.weight_settings().items() if name != "group_size"}
        return quant_ops.fake_quant_linear(
            rows,
            self.weight.flatten(1),
            self.bias,
            **self.act_settings(),
            **weight,
            weight_range=self.weight_range(),
            group_size=self.group_size,
        )

    def _kept_codes(self) -> QuantizedOperand:
        """`quantized_weight()`, computed again only after the weight was written, moved or replaced.

        A captured CUDA graph computes them at each replay: kept ones would be freed under it when the weight changes,
        and those made in a capture are not there before its first replay. Another stream's may not be there yet.
        """
        weight = self.weight
        if weight.is_inference() or ops.capturing(weight.device):  # inference tensors do not count their changes
            return self.quantized_weight()
        steps = _OptimizerSteps.so_far() if weight.requires_grad else 0
        place = (weight.data_ptr(), weight.dtype, weight.device, ops.current_stream(weight.device))
        key = (weight._version, steps, *place, *self.weight_settings().values())
        # Another tensor may get a freed one's address and starts at the same version: the object itself must be ours.
        kept = self.__dict__.get(KEPT_CODES)
        if kept is None or kept[0]() is not weight or kept[1] != key:
            kept = self.__dict__[KEPT_CODES] = weakref.ref(weight), key, self.quantized_weight()
        return cast(QuantizedOperand, kept[2])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != KEPT_CODES}

    def extra_repr(self) -> str:
        """Sizes, bits, granularities and where the activation range comes from."""
        group = "" if self.group_size is None else f"({self.group_size})"
        return (
            f"{super().extra_repr()}, W{self.weight_bits}A{self.act_bits}, "
            f"weight={self.weight_granularity}{group} {'symmetric' if self.weight_symmetric else 'asymmetric'}, "
            f"act={self.act_granularity} {'symmetric' if self.act_symmetric else 'asymmetric'} "
            f"{'static' if self.static else 'dynamic'}{', learned' if self.learn_range else ''}"
        )

    def train(self, mode: bool = True) -> Self:
        self.__dict__.pop(KEPT_CODES, None)  # replays of a captured training step change no version and call no hook
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.__dict__.pop(KEPT_CODES, None)  # two casts can put other values at the old address
        ranges = {name: getattr(self, name).detach() for name in self._range_names()}
        super()._apply(fn, recurse)
        # A range rounded to bf16 would change codes. Moving is allowed, casting is undone.
        for name, value in ranges.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = value.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.__dict__.pop(KEPT_CODES, None)  # a parameter with a weak reference to it cannot be swapped
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        ranges = [prefix + name for name in self._range_names()]
        if not any(key in state_dict for key in ranges):  # an nn.Linear's checkpoint
            missing_keys[:] = [key for key in missing_keys if key not in ranges]


class FakeQuantLinear(_FakeQuantized, nn.Linear):
    """`nn.Linear` that computes with fake-quantized weight and activations (`fake_quant_linear`).

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        weight_bits, act_bits: 2..8 each.
        weight_granularity: "per_channel", "per_tensor" or "per_group" (with `group_size`).
        act_granularity: "per_token" or "per_tensor"; None means "per_token" for dynamic ranges and "per_tensor" for
            static ones, which allow no other.
        weight_symmetric, act_symmetric: symmetric codes, or unsigned codes with a zero point.
        act_range: None: dynamic, from each input. (min, max): static, in the fp32 buffers `act_min` and `act_max`.
            "static": the same buffers, NaN until a state_dict fills them.
        group_size: columns a group, for "per_group"; divides `in_features`.
        learn_range: make `act_min`, `act_max` parameters, and `weight_min`, `weight_max` `[out_features]` (`[1]` per
            tensor), which start at the weight's own range, and rows of zeros at +-1 / sqrt(in_features), `nn.Linear`'s
            usual one: learned step size quantization. Symmetric ranges have the maximum only. Needs `act_range`.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses.

    Raises:
        TypeError, ValueError: an argument that `fake_quant_linear` would refuse.

    In an `nn.TransformerEncoder` that you fill by hand, pass enable_nested_tensor=False if you give it a padding mask.

    State: with dynamic ranges exactly `nn.Linear`'s keys; static ones add `act_min` and `act_max`, which stay fp32
    under `.to(dtype)`, learned ones also `weight_min` and `weight_max`. An `nn.Linear`'s state_dict loads into any and
    leaves the ranges as they are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: int = 4,
        act_bits: int = 4,
        weight_granularity: str = "per_channel",
        act_granularity: str | None = None,
        weight_symmetric: bool = True,
        act_symmetric: bool = False,
        act_range: tuple[float, float] | str | None = None,
        group_size: int | None = None,
        learn_range: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given = {
            "weight_bits": weight_bits,
            "act_bits": act_bits,
            "weight_granularity": weight_granularity,
            "act_granularity": act_granularity,
            "weight_symmetric": weight_symmetric,
            "act_symmetric": act_symmetric,
            "act_range": act_range,
            "group_size": group_size,
            "learn_range": learn_range,
            "impl": impl,
        }
        settings = _resolve(in_features, given)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._configure(settings)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Self:
        """A `FakeQuantLinear` with the same Parameter objects as `linear`, so that ties stay tied.

        Args:
            linear: an `nn.Linear`; it is not changed, and its hooks are not taken over.
            settings: keyword arguments of the constructor, `weight_bits` to `impl`.

        Raises:
            TypeError, ValueError: `linear` is no `nn.Linear`, or as the constructor.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        resolved = _resolve(linear.in_features, settings)
        module = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        module.weight = linear.weight
        if linear.bias is not None:
            module.bias = linear.bias
        return cls._convert(module.train(linear.training), resolved)

    def forward(self, input: Tensor) -> Tensor:
        """y `[..., out_features]` of `input [..., in_features]`, see `fake_quant_linear`."""
        return self._rows(input)


def is_patch_embedding(layer: nn.Conv2d) -> bool:
    """Whether a convolution's windows tile its input: stride = kernel, no padding, no dilation, one group."""
    return (
        layer.kernel_size == layer.stride
        and layer.padding in ((0, 0), "valid")
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )


def patch_rows(layer: Any, input: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` on the patches `[batch, rows, columns, in]` of an image `input`, its result as a convolution's."""
    if input.ndim not in (3, 4) or input.shape[-3] != layer.in_channels:
        wanted = f"[batch, {layer.in_channels}, height, width]"
        raise ValueError(f"input has shape {tuple(input.shape)}, expected {wanted}")
    height, width = layer.kernel_size
    batched = input if input.ndim == 4 else input.unsqueeze(0)
    rows, columns = batched.shape[2] // height, batched.shape[3] // width
    if not rows or not columns:
        raise ValueError(f"input has {tuple(input.shape[-2:])} pixels, fewer than a patch of {height} x {width}")
    patches = batched[:, :, : rows * height, : columns * width].unflatten(3, (columns, width))
    patches = patches.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    y = function(patches).permute(0, 3, 1, 2).contiguous()
    return y if input.ndim == 4 else y.squeeze(0)


class FakeQuantPatchEmbedding(_FakeQuantized, nn.Conv2d):
    """An `nn.Conv2d` whose stride is its kernel, computed as the fake-quantized linear layer on patches that it is.

    A token is a patch of in_channels * kernel height * kernel width values. The weight keeps its shape, and a
    state_dict the convolution's keys.
    """

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **settings: Any) -> Self:
        """A `FakeQuantPatchEmbedding` with the same Parameter objects as `conv`.

        Args:
            conv: an `nn.Conv2d` with stride = kernel, no padding, no dilation, one group; it is not changed, and its
                hooks are not taken over.
            settings: keyword arguments of `FakeQuantLinear`, `weight_bits` to `impl`.

        Raises:
            TypeError, ValueError: `conv` is no such convolution, or as `FakeQuantLinear`.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        if not is_patch_embedding(conv):
            raise ValueError(
                f"{conv} is no patch embedding: it needs stride = kernel, no padding, no dilation, 1 group"
            )
        resolved = _resolve(math.prod(conv.weight.shape[1:]), settings)
        kernel = cast(tuple[int, int], conv.kernel_size)
        has_bias = conv.bias is not None
        module = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, kernel, bias=has_bias, device="meta")
        module.weight = conv.weight
        if conv.bias is not None:
            module.bias = conv.bias
        return cls._convert(module.train(conv.training), resolved)

    def forward(self, input: Tensor) -> Tensor:
        """y `[batch, out_channels, height, width]` of `input [batch, in_channels, ...]`, or both without batch."""
        return patch_rows(self, input, self._rows)


class LayerDecision(NamedTuple):
    """A row of `quantize_`'s report: name and shape of a layer or parameter, "quantize" or "skip", and the reason."""

    name: str
    shape: tuple[int, ...]
    decision: str
    reason: str


def quantize_(
    model: nn.Module,
    *,
    weight_bits: int = 4,
    act_bits: int = 4,
    weight_granularity: str = "per_channel",
    act_granularity: str | None = None,
    weight_symmetric: bool = True,
    act_symmetric: bool = False,
    group_size: int | None = None,
    calibration: Iterable[Any] | None = None,
    percentile: float | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    mode: str = "qat",
    learn_range: bool = False,
    impl: str | None = None,
    show_progress: bool = False,
) -> list[LayerDecision]:
    """Turn every `nn.Linear` of `model` into a `FakeQuantLinear`, and patch embeddings likewise, in place.

    The module objects stay the same ones: their hooks, ties, shared places and references from elsewhere go on working.
    Converted are modules of exactly the class `nn.Linear`, and of `nn.Conv2d` where stride = kernel. Subclasses are
    not, since their forward may differ, nor are embeddings (a look-up, no product), output heads (by the names of
    `parameters.HEAD`, such as lm_head, classifier or head.fc, unless `only` names them), layers tied to an embedding,
    or projections of `nn.MultiheadAttention`, which uses their weights without calling them. What is skipped, and why,
    is in the result and in the log.

    Args:
        model: any module; an `nn.Linear` itself is converted too.
        weight_bits, act_bits, weight_granularity, act_granularity, weight_symmetric, act_symmetric, group_size, impl:
            as `FakeQuantLinear`.
        calibration: batches for static per-tensor activation ranges: a tensor for `model(batch)`, a tuple or list for
            `model(*batch)`, a dict for `model(**batch)`. The float model runs on them in eval mode without gradients.
            Without it, ranges are dynamic.
        percentile: 50 < percentile <= 100: the range is the mean over batches of each batch's quantiles at
            1 - percentile/100 and percentile/100 (linear interpolation), instead of the minimum and maximum of all.
        only: regular expressions searched in the layers' names; if any are given, layers that none matches are left
            alone. A pattern that matches output heads and nothing else, such as "lm_head", names them: they are
            converted. One that matches other layers too, such as ".", leaves the heads alone.
        skip: regular expressions likewise; matching layers are left alone.
        mode: "qat": the weights are trained on, and rounded in each forward. "ptq": they are finished; each weight is
            rounded to nearest once and its codes are used again in forwards without gradients until it changes or
            `train()` or `eval()` is called (only a write through `.data` goes unnoticed, and replays of a captured
            training step do until then). A captured CUDA graph rounds at each replay; a packed layer (`export`,
            `load_`) never does. Both modes give the same bits.
        learn_range: as `FakeQuantLinear`; the calibrated ranges are where learning starts. Hand the new parameters to
            the optimizer.
        show_progress: show a progress bar of the calibration; needs rich.

    Returns:
        One `LayerDecision` per linear layer, convolution and embedding, in the order of `named_modules`, then one per
        matrix that is a parameter of another module, such as a stack of experts. The model is unchanged if this raises.

    Raises:
        TypeError: an argument of the wrong type, such as one batch in place of an iterable of batches, or no module.
        ValueError: settings that do not fit a layer, a pattern that matches no layer, an empty calibration, or an
            activation with NaN or Inf in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    given = {
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "weight_granularity": weight_granularity,
        "act_granularity": act_granularity,
        "weight_symmetric": weight_symmetric,
        "act_symmetric": act_symmetric,
        "act_range": None if calibration is None else "static",
        "group_size": group_size,
        "learn_range": learn_range,
        "impl": impl,
    }
    if percentile is not None:
        if calibration is None:
            raise ValueError(f"percentile={percentile} needs calibration batches: pass calibration=[...]")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile} must lie above 50 and at most at 100, such as 99.9")
    if isinstance(calibration, Tensor | Mapping | str):
        raise TypeError(f"calibration must be an iterable of batches, got one {type(calibration).__name__}: wrap it")
    for which, patterns in (("only", only), ("skip", skip)):
        if isinstance(patterns, str):
            wanted = f"a sequence of regular expressions, got the string {patterns!r}: write ({patterns!r},)"
            raise TypeError(f"{which} must be {wanted}")
    if mode not in ("ptq", "qat"):
        raise ValueError(f"mode={mode!r} must be 'ptq' (finished weights) or 'qat' (weights are trained on)")

    layers, report = _decide(model, only, skip)
    resolved: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        try:
            resolved[name] = _resolve(math.prod(layer.weight.shape[1:]), given)
        except ValueError as error:
            raise ValueError(f"layer {name!r} {tuple(layer.weight.shape)}: {error}, or skip the layer") from error

    if calibration is not None and layers:
        ranges = _calibrate(model, layers, calibration, percentile, show_progress)
        for name in list(layers):
            if name in ranges:
                resolved[name]["act_range"] = ranges[name]
                if learn_range:
                    try:
                        _check_learnable(ranges[name])
                    except ValueError as error:
                        raise ValueError(f"layer {name!r}: {error}, or skip the layer") from error
            else:
                del layers[name]
                logger.warning("quantize_: layer %r was not called by any calibration batch and stays float", name)
    for name, layer in layers.items():
        kind = FakeQuantLinear if isinstance(layer, nn.Linear) else FakeQuantPatchEmbedding
        kind._convert(layer, resolved[name]).reuse_codes = mode == "ptq"
    pass_padded_tokens(model, FakeQuantLinear)

    for index, row in enumerate(report):
        if row.decision == "quantize" and row.name not in layers:
            report[index] = row._replace(decision="skip", reason="no calibration batch called it")
        elif row.decision == "quantize":
            static = resolved[row.name]["act_range"]
            source = "dynamic range" if static is None else f"static range [{static[0]:.6g}, {static[1]:.6g}]"
            report[index] = row._replace(reason=f"W{weight_bits}A{act_bits}, {source}{row.reason}")
    if layers:
        total = sum(p.numel() for p in model.parameters() if not is_lazy(p))
        sizes = {id(layer.weight): layer.weight.numel() for layer in layers.values()}
        share = 100 * sum(sizes.values()) / max(total, 1)
        logger.info("quantize_: %d layers are fake-quantized, %.3g %% of the parameters", len(layers), share)
        for row in report:
            if row.decision == "skip":
                logger.info("quantize_: %s %s stays float: %s", row.name, list(row.shape), row.reason)
    else:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in report[:5]) or "it has no linear layer"
        logger.warning("quantize_ found nothing to quantize in %s (%s)", type(model).__name__, reasons)
    return report


def _compiled(patterns: Sequence[str], known: Sequence[str], which: str) -> list[re.Pattern[str]]:
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"{which} pattern {error.pattern!r} is no regular expression: {error}") from error
    unmatched = [p.pattern for p in compiled if not any(p.search(name) for name in known)]
    if unmatched:
        raise ValueError(f"{which} pattern(s) {unmatched} match no linear layer; names look like {list(known[:5])}")
    return compiled


def _decide(
    model: nn.Module, only: Sequence[str], skip: Sequence[str]
) -> tuple[dict[str, nn.Linear | nn.Conv2d], list[LayerDecision]]:
    """The layers to convert by their first name, and a row for each linear layer, convolution and embedding."""
    names: dict[nn.Module, list[str]] = {}
    embeddings: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.modules.conv._ConvNd):
            names.setdefault(module, []).append(name)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            names.setdefault(module, []).append(name)
            embeddings[id(module.weight)] = name
    known = [name for module, all_names in names.items() for name in all_names if _may_be_named(module)]
    wanted, unwanted = _compiled(only, known, "only"), _compiled(skip, known, "skip")
    no_heads = [
        name
        for module, all_names in names.items()
        if _may_be_named(module) and not any(map(HEAD.search, all_names))
        for name in all_names
    ]
    for_heads = [p for p in wanted if not any(map(p.search, no_heads))]

    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    report: list[LayerDecision] = []
    for module, all_names in names.items():
        name = all_names[0]
        if isinstance(module, nn.MultiheadAttention):
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, attribute)
                if weight is not None:
                    why = "nn.MultiheadAttention's projection of its inputs is no module"
                    of_module = f"{name}.{attribute}".lstrip(".")
                    report.append(LayerDecision(of_module, tuple(weight.shape), "skip", why))
            continue
        layer = cast("nn.Linear | nn.Conv2d", module)
        reason = _why_not(layer, all_names, embeddings)
        if reason is None:
            pattern = next((p.pattern for p in unwanted for n in all_names if p.search(n)), None)
            if pattern is not None:
                reason = f"skipped by pattern {pattern!r}"
            elif wanted and not any(p.search(n) for p in wanted for n in all_names):
                reason = f"matches none of only={[p.pattern for p in wanted]}"
            elif any(map(HEAD.search, all_names)) and not any(p.search(n) for p in for_heads for n in all_names):
                reason = "output head"
        if reason is None:
            layers[name] = layer
        also = f", also at {', '.join(all_names[1:])}" if len(all_names) > 1 else ""
        decision = "quantize" if reason is None else "skip"
        shape = () if is_lazy(layer.weight) else tuple(layer.weight.shape)
        report.append(LayerDecision(name, shape, decision, (reason or "") + also))
    for name, module in model.named_modules():
        if module not in names:
            for of_module, parameter in module.named_parameters(name, recurse=False):
                if not is_lazy(parameter) and parameter.ndim >= 2:
                    why = f"a parameter of {type(module).__name__}, which is no linear layer"
                    report.append(LayerDecision(of_module, tuple(parameter.shape), "skip", why))
    return layers, report


def _may_be_named(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def _why_not(layer: nn.Module, all_names: Sequence[str], embeddings: Mapping[int, str]) -> str | None:
    """Why a layer cannot be converted, whatever it is called, or None."""
    if isinstance(layer, _FakeQuantized):
        return "already fake-quantized"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return "embedding: a look-up, no product"
    if is_lazy(cast(Tensor, layer.weight)):
        return f"{type(layer).__name__} without a shape: call the model once before"
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention uses its weight without calling it"
    base = next(c for c in (nn.Linear, nn.Conv2d, nn.modules.conv._ConvNd) if isinstance(layer, c))
    if type(layer) is not base:
        if base is nn.modules.conv._ConvNd:
            return f"{type(layer).__name__}: only two-dimensional patch embeddings are supported"
        return f"{type(layer).__name__}, a subclass of nn.{base.__name__}: its forward may differ"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance, which would bypass FakeQuantLinear's"
    if isinstance(layer, nn.Conv2d):
        return None if is_patch_embedding(layer) else "convolution with overlapping windows, dilation or groups"
    if id(layer.weight) in embeddings:
        return f"tied to the embedding {embeddings[id(layer.weight)]}"
    return None


def _nothing(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    pass


def keep_off_fused_path(layer: nn.Module) -> None:
    """Let `nn.TransformerEncoderLayer` call `layer`: its fused path, which does not, stands down where hooks are."""
    if _nothing not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_nothing)


def pass_padded_tokens(model: nn.Module, kind: type[nn.Module]) -> None:
    """Keep `nn.TransformerEncoder`s that hold a `kind` from nested tensors, which only their fused path takes."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, kind) for m in module.modules()):
            module.use_nested_tensor = False


# --- Calibration --------------------------------------------------------------------------------------------------


def _upper_quantile(values: Tensor, fraction: float) -> Tensor:
    """`torch.quantile(values, fraction)`, linear interpolation, fraction >= 0.5, for a flat tensor of any size.

    torch.quantile refuses more than 2^24 elements and sorts them all; only the upper tail is needed.
    """
    position = fraction * (values.numel() - 1)
    index = math.floor(position)
    tail = values.topk(values.numel() - index).values
    return tail[-1] + (tail[max(len(tail) - 2, 0)] - tail[-1]) * (position - index)


def _batch_range(x: Tensor, percentile: float | None) -> Tensor:
    """(min, max) or (1 - p, p) quantiles of `x` as a tensor `[2]`, fp64; NaN if `x` holds NaN or Inf."""
    values = x.detach().flatten()
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    extremes = torch.stack(torch.aminmax(values))
    if percentile is None:
        found = extremes
    else:
        fraction = percentile / 100
        found = torch.stack((-_upper_quantile(-values, fraction), _upper_quantile(values, fraction)))
    return torch.where(extremes.isfinite().all(), found.double(), torch.nan)


def _calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    percentile: float | None,
    show_progress: bool,
) -> dict[str, tuple[float, float]]:
    """(min, max) of the input of each layer that was called."""
    if show_progress:
        try:
            from rich.progress import track
        except ImportError as error:
            raise ImportError("show_progress=True needs rich: pip install 's2d-kernels[cli]'") from error
        total = len(batches) if isinstance(batches, Sized) else None
        batches = track(batches, description="calibrating", total=total)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def observe(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel():
                found[name].append(_batch_range(x, percentile))

        return hook

    handles = [layer.register_forward_pre_hook(observe(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run_batches(model, batches, name="calibration")
    finally:
        for handle in handles:
            handle.remove()

    ranges = {}
    for name, calls in found.items():
        if not calls:
            continue
        stacked = torch.stack(calls)
        low, high = stacked.mean(0) if percentile is not None else (stacked[:, 0].amin(), stacked[:, 1].amax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"the input of layer {name!r} held NaN or Inf during calibration: skip it or fix the batches"
            )
        ranges[name] = (float(low), float(high))
    return ranges
