"""Quantizers: `quantize_activation` and `quantize_weight`, and the storage formats that every backend shares.

The definitions are those of `reference.py`. An operand is stored as

    codes        int8 `[rows, K]`; asymmetric 8-bit codes are stored as q - 128 and their zero points likewise, which
                 leaves code - zero_point, and so the accumulator, as it was
    scale        fp32 (fp64 for an fp64 input) `[rows, 1]`, `[1, 1]` or `[rows, groups]`
    zero_point   int32, the scale's shape
    row_sum      int32 `[rows, groups]`, sums of the stored codes
    mask         uint8 `[rows, ceil(K / 8)]`, bit i of byte j says that element 8 j + i was not clamped
    packed codes uint8 `[rows, ceil(K / 2)]` for 2..4 bits, element 2 j in the low half of byte j (saved for backward)

impl="reference" computes on the CPU whatever the device: its bits are the definition, and CUDA neither multiplies
int64 matrices nor divides by a Python number with correct rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d_kernels import ops, reference

ACTIVATION_GRANULARITIES = {"per_token": "per_row", "per_tensor": "per_tensor"}
WEIGHT_GRANULARITIES = {"per_channel": "per_row", "per_tensor": "per_tensor", "per_group": "per_group"}

ValueRange = tuple[float | Tensor, float | Tensor]


class QuantizedOperand(NamedTuple):
    """A quantized matrix `[rows, K]` in storage form (see the module's docstring); x ~ (codes - zero_point) * scale.

    `bits` and `symmetric` say how large a code can be; the defaults are the widest.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    row_sum: Tensor
    mask: Tensor
    bits: int = 8
    symmetric: bool = False


# --- Storage formats --------------------------------------------------------------------------------------------------


def code_shift(bits: int, symmetric: bool) -> int:
    """What is subtracted from codes and zero points so that they fit int8: 128 for asymmetric 8-bit ones, else 0."""
    return 128 if bits == 8 and not symmetric else 0


def code_span(bits: int, symmetric: bool) -> int:
    """Largest |code - zero_point|: 2^(b-1)-1 when symmetric, else 2^b-1."""
    quant_min, quant_max = reference.quant_bounds(bits, symmetric)
    return quant_max if symmetric else quant_max - quant_min


def exact_chunk(x_span: int, w_span: int) -> int:
    """Largest K for which an fp32 GEMM of integers |x| <= x_span, |w| <= w_span is exact: K x_span w_span <= 2^24.

    Then every partial sum, in any order, is an integer of magnitude at most 2^24, and fp32 holds all of those. The
    operands themselves are at most 255 and exact even in bf16, so reduced-precision fp32 modes (TF32) change nothing.
    """
    return 2**24 // (x_span * w_span)


def row_sums(codes: Tensor, groups: int) -> Tensor:
    """Sums of `codes [rows, K]` over each of `groups` equal parts of a row, int32 `[rows, groups]`."""
    rows, K = codes.shape
    return codes.reshape(rows, groups, K // groups if groups else 0).sum(2, dtype=torch.int32)


def pack_mask(mask: Tensor) -> Tensor:
    """Bool `[rows, K]` to bits, uint8 `[rows, ceil(K / 8)]`."""
    rows, K = mask.shape
    flat = F.pad(mask, (0, -K % 8)).reshape(-1)
    # Eight 0/1 bytes as one little-endian int64: this product moves byte i to bit 56 + i, without carries.
    words = flat.view(torch.int64) * 0x0102040810204080 >> 56
    return words.to(torch.uint8).view(rows, (K + 7) // 8)


def unpack_mask(mask: Tensor, K: int) -> Tensor:
    """Bits, uint8 `[rows, ceil(K / 8)]`, to bool `[rows, K]`."""
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(2) & bits).ne(0).flatten(1)[:, :K]


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of at most 4 bits, int8 `[rows, K]`, to two a byte, uint8 `[rows, ceil(K / 2)]`."""
    codes = F.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8)
    return codes[:, 1::2] << 4 | codes[:, ::2] & 15


def unpack_codes(packed: Tensor, K: int, symmetric: bool) -> Tensor:
    """Two codes a byte, uint8 `[rows, ceil(K / 2)]`, to int8 `[rows, K]`; symmetric codes are sign-extended."""
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :K].view(torch.int8)
    return (codes ^ 8) - 8 if symmetric else codes


# --- The op -----------------------------------------------------------------------------------------------------------


def working_dtype(x: Tensor) -> torch.dtype:
    """In which `x` is quantized: fp64 stays, everything else becomes fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _quantize_fake(
    x: Tensor, _min: Tensor | None, _max: Tensor | None, _bits: int, _symmetric: bool, granularity: str, group_size: int
) -> tuple[Tensor, ...]:
    rows, K = x.shape
    groups = K // group_size if group_size else 1
    shape = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    return (
        x.new_empty((rows, K), dtype=torch.int8),
        x.new_empty(shape, dtype=working_dtype(x)),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty((rows, groups), dtype=torch.int32),
        x.new_empty((rows, (K + 7) // 8), dtype=torch.uint8),
    )


ops.define(
    "quantize",
    "Tensor x, Tensor? minimum, Tensor? maximum, int bits, bool symmetric, str granularity, SymInt group_size"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize_fake,
)


@ops.implements("quantize", "reference")
def _quantize_reference(
    x: Tensor,
    minimum: Tensor | None,
    maximum: Tensor | None,
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
) -> tuple[Tensor, ...]:
    value_range = None if minimum is None or maximum is None else (minimum.cpu(), maximum.cpu())
    kind: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "granularity": granularity}
    q = reference.quantize(x.cpu(), **kind, value_range=value_range, group_size=group_size)
    K = x.shape[1]
    shift = code_shift(bits, symmetric)
    codes = (q.codes - shift).contiguous()
    row_sum = row_sums(codes, K // group_size if group_size else 1)
    zero_point = (q.zero_point - shift).to(torch.int32)
    out = (codes.to(torch.int8), q.scale, zero_point, row_sum, pack_mask(q.mask))
    return tuple(t.to(x.device) for t in out)


@ops.implements("quantize", "torch")
def _quantize_torch(
    x: Tensor,
    minimum: Tensor | None,
    maximum: Tensor | None,
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
) -> tuple[Tensor, ...]:
    rows, K = x.shape
    x = x.to(working_dtype(x))
    if granularity == "per_group":
        x = x.reshape(rows, K // group_size, group_size)
    elif granularity == "per_row":
        x = x.unsqueeze(1)
    else:
        x = x.reshape(1, 1, rows, K).squeeze(0)
    per_tensor = granularity == "per_tensor"
    if x.numel() == 0:
        low = high = x.new_zeros((1, 1, 1) if per_tensor else (*x.shape[:2], 1))
    elif per_tensor:
        low, high = (v.reshape(1, 1, 1) for v in torch.aminmax(x))
    else:
        low, high = torch.aminmax(x, dim=2, keepdim=True)
    finite = low.isfinite() & high.isfinite()  # aminmax hands on NaN
    if minimum is not None and maximum is not None:
        low, high = minimum.reshape(-1, 1, 1), maximum.reshape(-1, 1, 1)

    quant_min, quant_max = reference.quant_bounds(bits, symmetric)
    # The divisors are tensors: CUDA multiplies by the reciprocal of a Python number, which rounds twice.
    if symmetric:
        span = torch.maximum(low.abs(), high.abs())
        scale = span / torch.full_like(span, quant_max)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        span = high - low
        scale = span / torch.full_like(span, quant_max - quant_min)
    scale = torch.where(scale < reference.SMALLEST_SCALE, 1.0, scale)
    scale = torch.where(scale.isfinite() & finite, scale, torch.nan)
    if symmetric:
        zero_point = torch.zeros_like(scale)
    else:
        zero_point = (quant_min - (low / scale).round()).clamp(quant_min, quant_max).nan_to_num(nan=0.0)

    q = (x / scale).round_()
    if not symmetric:
        q += zero_point
    codes = q.clamp(quant_min, quant_max)
    mask = (codes == q).reshape(rows, K)  # false where q is NaN
    shift = code_shift(bits, symmetric)
    codes = codes.nan_to_num_(nan=0.0).sub_(shift).to(torch.int8).reshape(rows, K).contiguous()
    row_sum = row_sums(codes, K // group_size if group_size else 1)
    zero_point = (zero_point - shift).to(torch.int32)
    return codes, scale.squeeze(2), zero_point.squeeze(2), row_sum, pack_mask(mask)


# --- Arguments --------------------------------------------------------------------------------------------------------


def check_bits(name: str, bits: object) -> None:
    """Raise unless `bits` is an int in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int, got {type(bits).__name__} {bits!r}: choose 2..8")
    if not 2 <= bits <= 8:
        raise ValueError(f"{name}={bits} is not supported: choose 2..8")


def check_granularity(name: str, value: str, known: dict[str, str]) -> str:
    """The op's name of a granularity, `known[value]`."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is none of {tuple(known)}")
    return known[value]


def check_group_size(group_size: int | None, K: int) -> int:
    """Check that `group_size` divides `K`; 0 means no groups."""
    if group_size is None:
        return 0
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int or None, got {group_size!r}")
    if group_size < 1 or K % group_size:
        raise ValueError(f"group_size={group_size} must divide K={K}: choose a divisor, or another granularity")
    return group_size


def check_weight_groups(granularity: str, group_size: int | None, K: int) -> int:
    """Check that `group_size` goes with the weight's `granularity` and divides `K`; 0 means no groups."""
    grouped = check_granularity("weight_granularity", granularity, WEIGHT_GRANULARITIES) == "per_group"
    if grouped != (group_size is not None):
        raise ValueError(
            f"group_size={group_size} with weight granularity {granularity!r}: 'per_group' needs one, others take none"
        )
    return check_group_size(group_size, K)


def check_value_range(
    name: str, value_range: ValueRange | None, x: Tensor, granularity: str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(min, max) as `[1]` or `[rows]` tensors in the dtype and on the device in which `x` is quantized.

    Numbers and CPU tensors are checked for NaN and min > max; a device's tensors are not read (that would wait for
    the device), and NaN in them gives NaN outputs.
    """
    if value_range is None:
        return None, None
    if not isinstance(value_range, tuple | list) or len(value_range) != 2:
        raise TypeError(f"{name} must be a pair (min, max) of numbers or tensors, got {value_range!r}")
    rows = x.shape[0] if granularity == "per_row" else 1
    pair = []
    for value in value_range:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or value.numel() not in (1, rows):
                wanted = f"1 or {rows}" if granularity == "per_row" else "1"
                raise ValueError(f"{name} must hold {wanted} floating values, got {value.dtype} {tuple(value.shape)}")
            pair.append(value.detach().reshape(-1).to(x.device, working_dtype(x)))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a pair (min, max) of numbers or tensors, got {value_range!r}")
        else:
            pair.append(x.new_full((1,), value, dtype=working_dtype(x)))
    readable = all(not isinstance(v, Tensor) or v.device.type == "cpu" for v in value_range)
    if readable and not torch.compiler.is_compiling():
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in value_range)
        if not bool((low <= high).all()):
            raise ValueError(f"{name}=({low.tolist()}, {high.tolist()}) must have min <= max and no NaN: calibrate it")
    return pair[0], pair[1]


# --- Public functions -------------------------------------------------------------------------------------------------


def quantize_operand(
    x: Tensor,
    value_range: tuple[Tensor, Tensor] | tuple[None, None],
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
    impl: str | None,
) -> QuantizedOperand:
    """`torch.ops.s2d.quantize` on checked arguments."""
    codes, scale, zero_point, row_sum, mask = torch.ops.s2d.quantize(
        x, *value_range, bits, symmetric, granularity, group_size, impl
    )
    return QuantizedOperand(codes, scale, zero_point, row_sum, mask, bits, symmetric)


def quantize_activation(
    x: Tensor,
    *,
    bits: int = 4,
    symmetric: bool = False,
    granularity: str = "per_token",
    value_range: ValueRange | None = None,
    group_size: int | None = None,
    impl: str | None = None,
) -> QuantizedOperand:
    """Quantize activations: q = clamp(round_half_even(x / scale) + zero_point, quant_min, quant_max).

    Args:
        x: `[rows, K]`, fp32, bf16, fp16 (computed in fp32) or fp64 (computed in fp64); any strides.
        bits: 2..8.
        symmetric: codes -(2^(b-1)-1)..2^(b-1)-1 and scale = absmax / quant_max; otherwise codes 0..2^b-1 and
            scale = (max - min) / (2^b - 1) with min <= 0 <= max and a zero point within the codes.
        granularity: "per_token" (one scale a row) or "per_tensor".
        value_range: (min, max) to use instead of those of `x`, numbers or tensors of one value (per token also
            `[rows]`). No gradient flows to them.
        group_size: makes `row_sum` `[rows, K / group_size]`, for weights quantized per group; scales are unaffected.
        impl: "reference", "torch", or None to choose.

    Returns:
        `QuantizedOperand`; a row (per tensor: all of them) that holds NaN or Inf has scale NaN and code 0.

    Raises:
        TypeError: `x` is no dense floating tensor, or an argument has the wrong type.
        ValueError: bits outside 2..8, unknown granularity, a range with NaN or min > max, group_size not dividing K.

    Accuracy: same bits from every impl. A scale below 2^-126 counts as zero and becomes 1; subnormals are honoured.
    """
    x = ops.check_tensor("x", x, ndim=2)
    check_bits("bits", bits)
    kind = check_granularity("granularity", granularity, ACTIVATION_GRANULARITIES)
    groups = check_group_size(group_size, x.shape[1])
    return quantize_operand(
        x, check_value_range("value_range", value_range, x, kind), bits, symmetric, kind, groups, impl
    )


def quantize_weight(
    weight: Tensor,
    *,
    bits: int = 4,
    symmetric: bool = True,
    granularity: str = "per_channel",
    group_size: int | None = None,
    value_range: ValueRange | None = None,
    impl: str | None = None,
) -> QuantizedOperand:
    """Quantize a weight, by the formula of `quantize_activation`.

    Args:
        weight: `[N, K]` (out x in), fp32, bf16, fp16 or fp64; any strides.
        bits: 2..8.
        symmetric: see `quantize_activation`.
        granularity: "per_channel" (one scale a row), "per_tensor", or "per_group" (`group_size` columns of a row).
        group_size: for "per_group" only; divides K.
        value_range: (min, max) instead of those of the weight; per channel also `[N]` tensors.
        impl: "reference", "torch", or None to choose.

    Returns:
        `QuantizedOperand`.

    Raises:
        TypeError, ValueError: as `quantize_activation`.
    """
    weight = ops.check_tensor("weight", weight, ndim=2)
    check_bits("bits", bits)
    groups = check_weight_groups(granularity, group_size, weight.shape[1])
    kind = WEIGHT_GRANULARITIES[granularity]
    value_pair = check_value_range("value_range", value_range, weight, kind)
    return quantize_operand(weight, value_pair, bits, symmetric, kind, groups, impl)
