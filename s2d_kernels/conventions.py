"""Named ways in which kernels make codes, ours and others', to tell by which one two kernels differ.

Only `OURS` is implemented by the operators. The others are for `validate`, which names the one that explains a
difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels import reference


def half_up(x: Tensor) -> Tensor:
    """floor(x + 1/2), the half added exactly."""
    return (x.double() + 0.5).floor().to(x.dtype)


def half_away(x: Tensor) -> Tensor:
    """Round to nearest, halves away from zero."""
    return half_up(x.abs()) * x.sign()


class Convention(NamedTuple):
    """How a quantizer makes codes; the defaults are ours (`reference.quantize`).

    Attributes:
        name: for reports.
        rounding: of x / scale.
        zero_point_rounding: of minimum / scale, which the zero point takes from quant_min.
        add_first: round(x / scale + zero_point) instead of round(x / scale) + zero_point.
        reciprocal: x * (1 / scale) instead of x / scale.
        lowest: the lowest symmetric code is -(2^(b-1)) instead of -(2^(b-1) - 1).
        steps: symmetric scale = absmax / (2^(b-1) - steps): 1 is quant_max, 1/2 gives absmax / 7.5, 0 absmax / 8.
        widened: asymmetric ranges are widened to hold 0, and the zero point is clamped to the codes.
        scale_dtype: to which the scale is rounded.
        at_least: the scale is not below this, as in torch's observers; ours is 1 where it would be below 2^-126.
    """

    name: str
    rounding: Callable[[Tensor], Tensor] = torch.round
    add_first: bool = False
    reciprocal: bool = False
    lowest: bool = False
    steps: float = 1.0
    widened: bool = True
    scale_dtype: torch.dtype | None = None
    at_least: float | None = None
    zero_point_rounding: Callable[[Tensor], Tensor] = torch.round

    def applies(self, symmetric: bool) -> bool:
        """Whether it can differ from ours for symmetric (or asymmetric) codes."""
        only_symmetric = self.lowest or self.steps != 1
        only_asymmetric = self.add_first or not self.widened or self.zero_point_rounding is not torch.round
        both = (
            self.reciprocal or self.rounding is not torch.round or self.scale_dtype is not None or bool(self.at_least)
        )
        return both or (only_symmetric if symmetric else only_asymmetric)

    def combined(self, other: Convention) -> Convention:
        """With all that `other` does unlike ours, too."""
        unlike = {
            field: value
            for field, value in other._asdict().items()
            if field != "name" and value != self._field_defaults[field]
        }
        return self._replace(**unlike, name=other.name if self == OURS else f"{self.name} with {other.name}")

    def quantize(
        self,
        x: Tensor,
        *,
        bits: int,
        symmetric: bool,
        granularity: str,
        group_size: int | None = None,
        value_range: tuple[float | Tensor, float | Tensor] | None = None,
    ) -> reference.QuantizedTensor:
        """As `reference.quantize`, in this convention."""
        ours = reference.quantize(
            x, bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size, value_range=value_range
        )
        if self == OURS or x.numel() == 0:
            return ours
        quant_min, quant_max = reference.quant_bounds(bits, symmetric)
        parts = x.to(ours.scale.dtype).unflatten(1, (ours.scale.shape[1], -1))
        dims = (0, 1, 2) if granularity == "per_tensor" else (2,)
        if value_range is None:
            low, high = parts.amin(dims, keepdim=True), parts.amax(dims, keepdim=True)
        else:
            low, high = (torch.as_tensor(end, dtype=parts.dtype).reshape(-1, 1, 1) for end in value_range)
        if symmetric:
            quant_min -= self.lowest
            scale = torch.maximum(low.abs(), high.abs()) / (quant_max + 1 - self.steps)
        else:
            if self.widened:
                low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (quant_max - quant_min)
        if self.at_least is None:
            scale = torch.where(scale < reference.SMALLEST_SCALE, 1.0, scale)
        else:
            scale = scale.clamp(min=self.at_least)
        if self.scale_dtype is not None:
            scale = scale.to(self.scale_dtype).to(ours.scale.dtype)
        scale = torch.where(ours.scale.isfinite().unsqueeze(2), scale, torch.nan)
        zero_point = torch.zeros_like(scale)
        if not symmetric:
            zero_point = quant_min - self.zero_point_rounding(low / scale)
            if self.widened:
                zero_point = zero_point.clamp(quant_min, quant_max)
            zero_point = zero_point.nan_to_num(nan=0.0)
        ratio = parts * (1 / scale) if self.reciprocal else parts / scale
        codes = self.rounding(ratio + zero_point) if self.add_first else self.rounding(ratio) + zero_point
        inside = (codes >= quant_min) & (codes <= quant_max)
        codes = codes.clamp(quant_min, quant_max).nan_to_num(nan=0.0).to(torch.int64)
        return reference.QuantizedTensor(
            codes.view(x.shape), scale.squeeze(2), zero_point.squeeze(2).to(torch.int64), inside.view(x.shape)
        )


OURS = Convention("ours")
OTHERS = (
    Convention("half-up rounding", rounding=half_up),
    Convention("halves rounded away from zero", rounding=half_away),
    Convention("half-up rounding, of the zero point too", rounding=half_up, zero_point_rounding=half_up),
    Convention(
        "half-up rounding, zero point = quant_min + half-up(-minimum / scale)",
        rounding=half_up,
        zero_point_rounding=half_away,  # of what is at most 0
    ),
    Convention(
        "halves rounded away from zero, of the zero point too", rounding=half_away, zero_point_rounding=half_away
    ),
    Convention("truncation", rounding=torch.trunc),
    Convention("the zero point added before rounding", add_first=True),
    Convention("multiplication by the reciprocal of the scale", reciprocal=True),
    Convention("reciprocal, and the zero point added before rounding", add_first=True, reciprocal=True),
    Convention("scale = absmax / (2^(b-1) - 1/2), codes from -2^(b-1)", lowest=True, steps=0.5),
    Convention("scale = absmax / 2^(b-1), codes from -2^(b-1)", lowest=True, steps=0.0),
    Convention("range not widened to 0, zero point not clamped", widened=False),
    Convention("scale rounded to bf16", scale_dtype=torch.bfloat16),
    Convention("scale rounded to fp16", scale_dtype=torch.float16),
    Convention("scale not below 2^-23", at_least=2.0**-23),
)
