"""`FakeQuantLinear`, and `quantize_`, which turns the linear layers of a model into it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from s2d_kernels import ops, quant_ops, quantizers
from s2d_kernels.evaluation import run_batches
from s2d_kernels.parameters import HEAD

logger = logging.getLogger("s2d_kernels")

_DEFAULTS: dict[str, Any] = {
    "weight_bits": 4,
    "act_bits": 4,
    "weight_granularity": "per_channel",
    "act_granularity": None,
    "weight_symmetric": True,
    "act_symmetric": False,
    "act_range": None,
    "group_size": None,
    "impl": None,
}


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
    if isinstance(settings["act_range"], str):
        if settings["act_range"] != "static":
            raise ValueError(f"act_range={settings['act_range']!r} must be None, 'static' or a pair (min, max)")
    else:
        quantizers.check_value_range("act_range", settings["act_range"], torch.empty(0, 0), "per_tensor")
    if settings["impl"] is not None and settings["impl"] not in ops.IMPLS:
        raise ValueError(f"impl={settings['impl']!r} is none of {ops.IMPLS} (or None to choose by device)")
    return settings


class FakeQuantLinear(nn.Linear):
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
        impl: "reference", "torch", or None to choose.

    Raises:
        TypeError, ValueError: an argument that `fake_quant_linear` would refuse.

    State: with dynamic ranges exactly `nn.Linear`'s keys; static ones add `act_min` and `act_max`, which stay fp32
    under `.to(dtype)`. An `nn.Linear`'s state_dict loads into either and leaves the ranges as they are.
    """

    weight_bits: int
    act_bits: int
    weight_granularity: str
    act_granularity: str
    weight_symmetric: bool
    act_symmetric: bool
    group_size: int | None
    impl: str | None
    static: bool
    act_min: Tensor
    act_max: Tensor

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

    @classmethod
    def _convert(cls, linear: nn.Linear, resolved: Mapping[str, Any]) -> Self:
        """Make `linear` itself a `FakeQuantLinear`: it keeps its identity, hooks, parameters and places in a model."""
        linear.__class__ = cls
        module = cast(Self, linear)
        module._configure(resolved)
        return module

    def _configure(self, resolved: Mapping[str, Any]) -> None:
        act_range = resolved["act_range"]
        for name in resolved.keys() - {"act_range"}:
            setattr(self, name, resolved[name])
        self.static = act_range is not None
        if act_range is not None:
            values = (math.nan, math.nan) if act_range == "static" else act_range
            for name, value in zip(("act_min", "act_max"), values, strict=True):
                self.register_buffer(name, torch.full((), float(value), device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """y `[..., out_features]` of `input [..., in_features]`, see `fake_quant_linear`."""
        return quant_ops.fake_quant_linear(
            input,
            self.weight,
            self.bias,
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            weight_granularity=self.weight_granularity,
            act_granularity=self.act_granularity,
            weight_symmetric=self.weight_symmetric,
            act_symmetric=self.act_symmetric,
            act_range=(self.act_min, self.act_max) if self.static else None,
            group_size=self.group_size,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Sizes, bits, granularities and where the activation range comes from."""
        group = "" if self.group_size is None else f"({self.group_size})"
        return (
            f"{super().extra_repr()}, W{self.weight_bits}A{self.act_bits}, "
            f"weight={self.weight_granularity}{group} {'symmetric' if self.weight_symmetric else 'asymmetric'}, "
            f"act={self.act_granularity} {'symmetric' if self.act_symmetric else 'asymmetric'} "
            f"{'static' if self.static else 'dynamic'}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        ranges = (self.act_min, self.act_max) if self.static else ()
        super()._apply(fn, recurse)
        # A range rounded to bf16 would change codes. Moving is allowed, casting is undone.
        for name, value in zip(("act_min", "act_max"), ranges, strict=False):
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, value.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing_keys = args[2]
        ranges = [prefix + "act_min", prefix + "act_max"]
        if self.static and not any(key in state_dict for key in ranges):  # an nn.Linear's checkpoint
            missing_keys[:] = [key for key in missing_keys if key not in ranges]


class LayerDecision(NamedTuple):
    """One row of `quantize_`'s report: name and shape of the layer, "quantize" or "skip", and the reason."""

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
    skip: Sequence[str] = (),
    impl: str | None = None,
    show_progress: bool = False,
) -> list[LayerDecision]:
    """Turn every `nn.Linear` of `model` into a `FakeQuantLinear`, in place.

    The module objects stay the same ones: their hooks, ties, shared places and references from elsewhere go on working.
    Converted are modules of exactly the class `nn.Linear`. Subclasses are not, since their forward may differ, nor are
    output heads (last component of the name lm_head, head, classifier, score, output_projection or embed_out; convert
    one with `FakeQuantLinear.from_linear`), layers tied to an embedding, or projections of `nn.MultiheadAttention`,
    which uses their weights without calling them.

    Args:
        model: any module; an `nn.Linear` itself is converted too.
        weight_bits, act_bits, weight_granularity, act_granularity, weight_symmetric, act_symmetric, group_size, impl:
            as `FakeQuantLinear`.
        calibration: batches for static per-tensor activation ranges: a tensor for `model(batch)`, a tuple or list for
            `model(*batch)`, a dict for `model(**batch)`. The float model runs on them in eval mode without gradients.
            Without it, ranges are dynamic.
        percentile: 50 < percentile <= 100: the range is the mean over batches of each batch's quantiles at
            1 - percentile/100 and percentile/100 (linear interpolation), instead of the minimum and maximum of all.
        skip: regular expressions searched in the layers' names; matching layers are left alone.
        show_progress: show a progress bar of the calibration; needs rich.

    Returns:
        One `LayerDecision` per linear layer, in the order of `named_modules`. The model is unchanged if this raises.

    Raises:
        TypeError: an argument of the wrong type, such as one batch in place of an iterable of batches.
        ValueError: settings that do not fit a layer, a pattern that matches no layer, an empty calibration, or an
            activation with NaN or Inf in it.
    """
    given = {
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "weight_granularity": weight_granularity,
        "act_granularity": act_granularity,
        "weight_symmetric": weight_symmetric,
        "act_symmetric": act_symmetric,
        "act_range": None if calibration is None else "static",
        "group_size": group_size,
        "impl": impl,
    }
    if percentile is not None:
        if calibration is None:
            raise ValueError(f"percentile={percentile} needs calibration batches: pass calibration=[...]")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile} must lie above 50 and at most at 100, such as 99.9")
    if isinstance(calibration, Tensor | Mapping | str):
        raise TypeError(f"calibration must be an iterable of batches, got one {type(calibration).__name__}: wrap it")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a sequence of regular expressions, got the string {skip!r}: write ({skip!r},)")

    layers, report = _decide(model, skip)
    resolved: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        try:
            resolved[name] = _resolve(layer.in_features, given)
        except ValueError as error:
            raise ValueError(f"layer {name!r} {tuple(layer.weight.shape)}: {error}, or skip the layer") from error

    if calibration is not None and layers:
        ranges = _calibrate(model, layers, calibration, percentile, show_progress)
        for name in list(layers):
            if name in ranges:
                resolved[name]["act_range"] = ranges[name]
            else:
                del layers[name]
                logger.warning("quantize_: layer %r was not called by any calibration batch and stays float", name)
    for name, layer in layers.items():
        FakeQuantLinear._convert(layer, resolved[name])
    _leave_fused_path(model)

    for index, row in enumerate(report):
        if row.decision == "quantize" and row.name not in layers:
            report[index] = row._replace(decision="skip", reason="no calibration batch called it")
        elif row.decision == "quantize":
            static = resolved[row.name]["act_range"]
            source = "dynamic range" if static is None else f"static range [{static[0]:.6g}, {static[1]:.6g}]"
            report[index] = row._replace(reason=f"W{weight_bits}A{act_bits}, {source}{row.reason}")
    if layers:
        logger.info("quantize_: %d of %d linear layers are fake-quantized", len(layers), len(report))
    else:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in report[:5]) or "it has no linear layer"
        logger.warning("quantize_ found nothing to quantize in %s (%s)", type(model).__name__, reasons)
    return report


def _decide(model: nn.Module, skip: Sequence[str]) -> tuple[dict[str, nn.Linear], list[LayerDecision]]:
    """The layers to convert by their first name, and a row for each linear layer."""
    names: dict[nn.Module, list[str]] = {}
    embeddings: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            names.setdefault(module, []).append(name)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings[id(module.weight)] = name
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(f"skip pattern {error.pattern!r} is no regular expression: {error}") from error
    known = [name for module, all_names in names.items() if isinstance(module, nn.Linear) for name in all_names]
    unmatched = [p.pattern for p in patterns if not any(p.search(name) for name in known)]
    if unmatched:
        raise ValueError(f"skip pattern(s) {unmatched} match no linear layer; names look like {known[:5]}")

    layers: dict[str, nn.Linear] = {}
    report: list[LayerDecision] = []
    for module, all_names in names.items():
        name = all_names[0]
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is not None:
                packed = f"{name}.in_proj_weight".lstrip(".")
                why = "nn.MultiheadAttention's packed projection is no module"
                report.append(LayerDecision(packed, tuple(module.in_proj_weight.shape), "skip", why))
            continue
        layer = cast(nn.Linear, module)
        pattern = next((p.pattern for p in patterns for n in all_names if p.search(n)), None)
        reason: str | None = None
        if isinstance(layer, FakeQuantLinear):
            reason = "already fake-quantized"
        elif type(layer).__name__ == "NonDynamicallyQuantizableLinear":
            reason = "nn.MultiheadAttention uses its weight without calling it"
        elif type(layer) is not nn.Linear:
            reason = f"{type(layer).__name__}, a subclass of nn.Linear: its forward may differ"
        elif "forward" in layer.__dict__:
            reason = "its forward is replaced on the instance, which would bypass FakeQuantLinear's"
        elif id(layer.weight) in embeddings:
            reason = f"tied to the embedding {embeddings[id(layer.weight)]}"
        elif pattern is not None:
            reason = f"skipped by pattern {pattern!r}"
        elif any(HEAD.search(n) for n in all_names):
            reason = "output head"
        if reason is None:
            layers[name] = layer
        also = f", also at {', '.join(all_names[1:])}" if len(all_names) > 1 else ""
        decision = "quantize" if reason is None else "skip"
        report.append(LayerDecision(name, tuple(layer.weight.shape), decision, (reason or "") + also))
    return layers, report


def _leave_fused_path(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoder(Layer)` off its fused inference path, which reads the weights past our forward."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if any(isinstance(m, FakeQuantLinear) for m in module.modules()):
                module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, FakeQuantLinear) for m in module.modules()
        ):
            module.activation_relu_or_gelu = 0  # read nowhere else: 0 means "no activation that the fused path knows"


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
    layers: Mapping[str, nn.Linear],
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
