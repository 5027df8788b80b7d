"""Fake quantization: quantizers, the exact integer linear layer, its straight-through gradient, `fake_quant_linear`.

The definitions are those of `reference.py`. Here they become ops over the storage formats that every backend shares:

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

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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


# --- Storage formats ----------------------------------------------------------------------------------------------


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


# --- Ops ----------------------------------------------------------------------------------------------------------


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _quantize_fake(
    x: Tensor, _min: Tensor | None, _max: Tensor | None, _bits: int, _symmetric: bool, granularity: str, group_size: int
) -> tuple[Tensor, ...]:
    rows, K = x.shape
    groups = K // group_size if group_size else 1
    shape = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    return (
        x.new_empty((rows, K), dtype=torch.int8),
        x.new_empty(shape, dtype=_working_dtype(x)),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty((rows, groups), dtype=torch.int32),
        x.new_empty((rows, (K + 7) // 8), dtype=torch.uint8),
    )


_OPERAND = "Tensor {0}_codes, Tensor {0}_scale, Tensor {0}_zero_point, Tensor {0}_row_sum"
_OPERANDS = f"{_OPERAND.format('x')}, {_OPERAND.format('w')}"
_KINDS = "int x_bits, bool x_symmetric, int w_bits, bool w_symmetric"
ops.define(
    "quantize",
    "Tensor x, Tensor? minimum, Tensor? maximum, int bits, bool symmetric, str granularity, SymInt group_size"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize_fake,
)
ops.define(
    "integer_accumulator",
    f"{_OPERANDS}, {_KINDS} -> Tensor",
    lambda x, _xs, _xz, _xr, w, _ws, _wz, w_row_sum, *_: x.new_empty(
        (w_row_sum.shape[1], x.shape[0], w.shape[0]), dtype=torch.int32
    ),
)
ops.define(
    "integer_linear",
    f"{_OPERANDS}, Tensor? bias, {_KINDS}, ScalarType out_dtype -> Tensor",
    lambda x, _xs, _xz, _xr, w, _ws, _wz, _wr, _bias, _xb, _xy, _wb, _wy, out_dtype: x.new_empty(
        (x.shape[0], w.shape[0]), dtype=out_dtype
    ),
)
ops.define(
    "straight_through_grad",
    "Tensor grad, Tensor codes, Tensor scale, Tensor zero_point, Tensor mask, SymInt K, int bits, bool symmetric, "
    "ScalarType out_dtype -> Tensor",
    lambda grad, _c, _s, _z, _m, K, _b, _y, out_dtype: grad.new_empty((grad.shape[0], K), dtype=out_dtype),
)


# --- impl="reference" ---------------------------------------------------------------------------------------------


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


def _reference_operand(codes: Tensor, scale: Tensor, zero_point: Tensor) -> reference.QuantizedTensor:
    return reference.QuantizedTensor(codes.cpu().long(), scale.cpu(), zero_point.cpu().long(), torch.empty(0))


@ops.implements("integer_accumulator", "reference")
def _accumulator_reference(*arguments: Any) -> Tensor:
    xc, xs, xz, _, wc, ws, wz, *_ = arguments
    qx, qw = _reference_operand(xc, xs, xz), _reference_operand(wc, ws, wz)
    return reference.integer_accumulator(qx, qw).to(xc.device, torch.int32)


@ops.implements("integer_linear", "reference")
def _linear_reference(*arguments: Any) -> Tensor:
    xc, xs, xz, _, wc, ws, wz, _, bias, *_, out_dtype = arguments
    qx, qw = _reference_operand(xc, xs, xz), _reference_operand(wc, ws, wz)
    y, _ = reference.integer_linear(qx, qw, None if bias is None else bias.cpu(), out_dtype)
    return y.to(xc.device)


@ops.implements("straight_through_grad", "reference")
def _grad_reference(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    mask: Tensor,
    K: int,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    if bits <= 4:
        codes = unpack_codes(codes, K, symmetric)
    operand = reference.dequantize(_reference_operand(codes, scale, zero_point))
    product = (grad.cpu().to(operand.dtype) @ operand) * unpack_mask(mask.cpu(), K)
    return product.to(grad.device, out_dtype)


# --- impl="torch" -------------------------------------------------------------------------------------------------


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
    x = x.to(_working_dtype(x))
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


def _by_group(values: Tensor, parameter: Tensor) -> Tensor:
    """View of `values [rows, K]` as `[rows, groups, size]`, against which `parameter.unsqueeze(2)` broadcasts."""
    (rows, K), groups = values.shape, parameter.shape[1]
    return values.view(rows, groups, K // groups if groups else 0)


def _centred(codes: Tensor, zero_point: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """codes - zero_point `[rows, K]` in `dtype`, exact."""
    values = codes.to(dtype, memory_format=torch.contiguous_format)  # a copy that may be written
    if symmetric:
        return values
    _by_group(values, zero_point).sub_(zero_point.unsqueeze(2))
    return values


def _exact_products(
    xc: Tensor, xz: Tensor, wc: Tensor, wz: Tensor, groups: int, kinds: Sequence[Any]
) -> Iterator[Tensor]:
    """Per group the accumulator `[M, N]`: fp32 where one exact GEMM makes it, int32 where chunks are added up.

    Zero points are taken off the operands, not off the product: |code - zero_point| has no more bits than the code.
    """
    x_bits, x_symmetric, w_bits, w_symmetric = kinds
    x = _centred(xc, xz, x_symmetric, torch.float32)
    w = _centred(wc, wz, w_symmetric, torch.float32).mT
    chunk = exact_chunk(code_span(x_bits, x_symmetric), code_span(w_bits, w_symmetric))
    size = x.shape[1] // groups if groups else 0
    for first in range(0, groups * size, size) if size else range(groups):
        last = first + size
        total = x[:, first : min(first + chunk, last)] @ w[first : min(first + chunk, last)]
        if size > chunk:
            total = total.to(torch.int32)
            for start in range(first + chunk, last, chunk):
                stop = min(start + chunk, last)
                total += (x[:, start:stop] @ w[start:stop]).to(torch.int32)
        yield total


@ops.implements("integer_accumulator", "torch")
def _accumulator_torch(*arguments: Any) -> Tensor:
    xc, _, xz, _, wc, _, wz, w_row_sum, *kinds = arguments
    out = xc.new_empty((w_row_sum.shape[1], xc.shape[0], wc.shape[0]), dtype=torch.int32)
    for group, product in enumerate(_exact_products(xc, xz, wc, wz, len(out), kinds)):
        out[group] = product
    return out


@ops.implements("integer_linear", "torch")
def _linear_torch(*arguments: Any) -> Tensor:
    xc, x_scale, xz, _, wc, w_scale, wz, w_row_sum, bias, *kinds, out_dtype = arguments
    dtype = x_scale.dtype
    y = None
    # One rounding an operation: a fused multiply-add would give other bits than the definition.
    for group, product in enumerate(_exact_products(xc, xz, wc, wz, w_row_sum.shape[1], kinds)):
        term = product.to(dtype).mul_(x_scale).mul_(w_scale[:, group])
        y = term if y is None else y.add_(term)
    if y is None:
        y = x_scale.new_zeros((xc.shape[0], wc.shape[0]))
    if bias is not None:
        y.add_(bias.to(dtype))
    return y.to(out_dtype)


@ops.implements("straight_through_grad", "torch")
def _grad_torch(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    mask: Tensor,
    K: int,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    if bits <= 4:
        codes = unpack_codes(codes, K, symmetric)
    operand = _centred(codes, zero_point, symmetric, scale.dtype)
    _by_group(operand, scale).mul_(scale.unsqueeze(2))
    return (grad.to(scale.dtype) @ operand).mul_(unpack_mask(mask, K)).to(out_dtype)


# --- Public functions ---------------------------------------------------------------------------------------------


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


def _check_group_size(group_size: int | None, K: int) -> int:
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
    return _check_group_size(group_size, K)


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
            pair.append(value.detach().reshape(-1).to(x.device, _working_dtype(x)))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a pair (min, max) of numbers or tensors, got {value_range!r}")
        else:
            pair.append(x.new_full((1,), value, dtype=_working_dtype(x)))
    readable = all(not isinstance(v, Tensor) or v.device.type == "cpu" for v in value_range)
    if readable and not torch.compiler.is_compiling():
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in value_range)
        if not bool((low <= high).all()):
            raise ValueError(f"{name}=({low.tolist()}, {high.tolist()}) must have min <= max and no NaN: calibrate it")
    return pair[0], pair[1]


def _operand(
    x: Tensor,
    value_range: tuple[Tensor, Tensor] | tuple[None, None],
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
    impl: str | None,
) -> QuantizedOperand:
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
    groups = _check_group_size(group_size, x.shape[1])
    return _operand(x, check_value_range("value_range", value_range, x, kind), bits, symmetric, kind, groups, impl)


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
    return _operand(weight, value_pair, bits, symmetric, kind, groups, impl)


def _check_operands(qx: QuantizedOperand, qw: QuantizedOperand) -> tuple[QuantizedOperand, QuantizedOperand]:
    (M, K), (N, w_K) = qx.codes.shape, qw.codes.shape
    if w_K != K:
        raise ValueError(f"qx.codes is [{M}, {K}] but qw.codes is [{N}, {w_K}]: both need the same K")
    if qx.codes.device != qw.codes.device:
        raise ValueError(f"qx is on {qx.codes.device} but qw on {qw.codes.device}: move both to one device")
    if qx.scale.dtype != qw.scale.dtype:
        raise TypeError(f"qx was quantized in {qx.scale.dtype} but qw in {qw.scale.dtype}: convert one input first")
    groups = qw.row_sum.shape[1]
    _check_accumulator_range(K // groups if groups else 0, (qx.bits, qx.symmetric), (qw.bits, qw.symmetric))
    if qx.row_sum.shape[1] != groups:
        qx = qx._replace(row_sum=row_sums(qx.codes, groups))
    return qx, qw


def _check_accumulator_range(size: int, x_kind: tuple[int, bool], w_kind: tuple[int, bool]) -> None:
    limit = (2**31 - 1) // (code_span(*x_kind) * code_span(*w_kind))
    if size > limit:
        raise ValueError(
            f"K={size} at {x_kind[0]}-bit activations and {w_kind[0]}-bit weights can overflow the int32 accumulator "
            f"(K <= {limit}): use fewer bits or weight_granularity='per_group'"
        )


def integer_accumulator(qx: QuantizedOperand, qw: QuantizedOperand, *, impl: str | None = None) -> Tensor:
    """Exact integer products with the zero points removed: sum_k (qx - z_x)(qw - z_w) per group.

    Args:
        qx: activations, codes `[M, K]`.
        qw: weight, codes `[N, K]`.
        impl: "reference", "torch", or None to choose.

    Returns:
        `[groups, M, N]` int32, one group unless the weight is quantized per group.

    Raises:
        ValueError: K or device differ, or K is so large that int32 could overflow.
        TypeError: one operand comes from fp64 and the other does not.

    Accuracy: exact, hence equal on every impl.
    """
    qx, qw = _check_operands(qx, qw)
    kinds = (qx.bits, qx.symmetric, qw.bits, qw.symmetric)
    return torch.ops.s2d.integer_accumulator(*qx[:4], *qw[:4], *kinds, impl)


def integer_linear(
    qx: QuantizedOperand,
    qw: QuantizedOperand,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = s_x s_w sum_k (qx - z_x)(qw - z_w) + bias, the sum in exact integers.

    Args:
        qx: activations, codes `[M, K]`.
        qw: weight, codes `[N, K]`.
        bias: `[N]`, floating.
        out_dtype: of the result; default the scales' dtype.
        impl: "reference", "torch", or None to choose.

    Returns:
        `[M, N]`: (acc * s_x) * s_w, summed over groups in ascending order, + bias, one rounding each, then the cast.

    Raises:
        TypeError, ValueError: as `integer_accumulator`; a bias that is not `[N]`.

    Accuracy: same bits from every impl.
    """
    qx, qw = _check_operands(qx, qw)
    _check_bias(bias, qw.codes.shape[0], qx.codes.device)
    kinds = (qx.bits, qx.symmetric, qw.bits, qw.symmetric)
    return torch.ops.s2d.integer_linear(*qx[:4], *qw[:4], bias, *kinds, out_dtype or qx.scale.dtype, impl)


def _check_bias(bias: Tensor | None, N: int, device: torch.device) -> None:
    if bias is not None:
        ops.check_tensor("bias", bias, ndim=1, device=device)
        if bias.shape[0] != N:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, but the weight has {N} output channels: pass [{N}]")


class _Settings(NamedTuple):
    act_bits: int
    act_symmetric: bool
    act_granularity: str
    weight_bits: int
    weight_symmetric: bool
    weight_granularity: str
    group_size: int
    out_dtype: torch.dtype
    impl: str | None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_range: tuple[Tensor, Tensor] | tuple[None, None],
    w_range: tuple[Tensor, Tensor] | tuple[None, None],
    s: _Settings,
) -> tuple[Tensor, QuantizedOperand, QuantizedOperand]:
    qx = _operand(x, x_range, s.act_bits, s.act_symmetric, s.act_granularity, s.group_size, s.impl)
    qw = _operand(weight, w_range, s.weight_bits, s.weight_symmetric, s.weight_granularity, s.group_size, s.impl)
    kinds = (s.act_bits, s.act_symmetric, s.weight_bits, s.weight_symmetric)
    y = torch.ops.s2d.integer_linear(*qx[:4], *qw[:4], bias, *kinds, s.out_dtype, s.impl)
    return y, qx, qw


class _FakeQuantLinear(torch.autograd.Function):
    """Straight-through: the gradient of the dequantized product, zero where a code was clamped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_min: Tensor | None,
        x_max: Tensor | None,
        w_min: Tensor | None,
        w_max: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        y, qx, qw = _forward(x, weight, bias, (x_min, x_max), (w_min, w_max), settings)  # type: ignore[arg-type]
        need_x, need_w, _ = ctx.needs_input_grad[:3]
        saved: list[Tensor | None] = [None] * 8
        if need_x:  # grad_x = (g @ dq(W)) * mask_x
            codes = pack_codes(qw.codes) if qw.bits <= 4 else qw.codes
            saved[:4] = [codes, qw.scale, qw.zero_point, qx.mask]
        if need_w:  # grad_W = (g^T @ dq(x)) * mask_w
            codes = pack_codes(qx.codes) if qx.bits <= 4 else qx.codes
            saved[4:] = [codes, qx.scale, qx.zero_point, qw.mask]
        ctx.save_for_backward(*saved)
        ctx.settings = settings
        ctx.K = x.shape[1]
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        s, (x_dtype, w_dtype, bias_dtype) = ctx.settings, ctx.dtypes
        saved = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if need_x:
            grad_x = torch.ops.s2d.straight_through_grad(
                grad_output, *saved[:4], ctx.K, s.weight_bits, s.weight_symmetric, x_dtype, s.impl
            )
        if need_w:
            grad_w = torch.ops.s2d.straight_through_grad(
                grad_output.mT, *saved[4:], ctx.K, s.act_bits, s.act_symmetric, w_dtype, s.impl
            )
        if need_bias:
            grad_bias = grad_output.to(_working_dtype(grad_output)).sum(0).to(bias_dtype)
        return grad_x, grad_w, grad_bias, None, None, None, None, None


def fake_quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_bits: int = 4,
    act_bits: int = 4,
    weight_granularity: str = "per_channel",
    act_granularity: str = "per_token",
    weight_symmetric: bool = True,
    act_symmetric: bool = False,
    act_range: ValueRange | None = None,
    weight_range: ValueRange | None = None,
    group_size: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Linear layer on fake-quantized activations and weight, with straight-through gradients.

    y = s_x s_w (Qx Qw^T - z_x rowsum(Qw) - z_w rowsum(Qx) + K z_x z_w) + bias, the bracket in exact integers.
    Backward: grad_x = (g @ dq(W)) * mask_x, grad_W = (g^T @ dq(x)) * mask_w, grad_bias = sum g; a mask is 1 where the
    code was not clamped.

    Args:
        x: `[..., K]`, fp32, bf16, fp16 (computed in fp32) or fp64 (computed in fp64); any strides. Rows are tokens.
        weight: `[N, K]`, any of these dtypes; fp64 only together with an fp64 `x`.
        bias: `[N]`, any of these dtypes, added in fp32.
        weight_bits, act_bits: 2..8 each.
        weight_granularity: "per_channel", "per_tensor" or "per_group".
        act_granularity: "per_token" or "per_tensor".
        weight_symmetric, act_symmetric: see `quantize_activation`.
        act_range, weight_range: (min, max) instead of the operand's own; no gradient flows to them.
        group_size: columns a group, for "per_group".
        impl: "reference", "torch", or None to choose.

    Returns:
        `[..., N]` in x's dtype, or in autocast's dtype where autocast is on (and x is not fp64). Autocast changes
        nothing else: `x` and `weight` are quantized as they are given.

    Raises:
        TypeError: an operand is no dense floating tensor, or fp64 is mixed with another dtype.
        ValueError: shapes, devices, bits, granularities, ranges or group_size that do not fit.

    Accuracy: codes, scales, zero points, accumulator and y have the same bits on every impl. Per token a NaN or Inf
        makes its own output row NaN and no other; per tensor all of them.
    Cost: impl="torch" is one fp32 GEMM plus elementwise passes (GEMMs of `exact_chunk` columns where K is larger).
        Saved for backward: packed codes and mask bits of both operands, 0.63 B an element at 4 bits or fewer, 1.13 B
        above, plus 8 B a row. Not differentiable twice.
    Determinism: the forward does not depend on tiling; gradients are as deterministic as torch's GEMM.
    """
    x = ops.check_tensor("x", x)
    weight = ops.check_tensor("weight", weight, ndim=2, device=x.device)
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} but weight {tuple(weight.shape)}: the last sizes must be equal")
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"x is {x.dtype} but weight {weight.dtype}: convert one, fp64 does not mix with other dtypes")
    _check_bias(bias, N, x.device)
    check_bits("weight_bits", weight_bits)
    check_bits("act_bits", act_bits)
    act_kind = check_granularity("act_granularity", act_granularity, ACTIVATION_GRANULARITIES)
    groups = check_weight_groups(weight_granularity, group_size, K)
    _check_accumulator_range(groups or K, (act_bits, act_symmetric), (weight_bits, weight_symmetric))
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    x_range = check_value_range("act_range", act_range, rows, act_kind)
    w_range = check_value_range("weight_range", weight_range, weight, WEIGHT_GRANULARITIES[weight_granularity])
    out_dtype = x.dtype
    if out_dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        out_dtype = torch.get_autocast_dtype(x.device.type)
    settings = _Settings(
        act_bits,
        act_symmetric,
        act_kind,
        weight_bits,
        weight_symmetric,
        WEIGHT_GRANULARITIES[weight_granularity],
        groups,
        out_dtype,
        impl,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = _FakeQuantLinear.apply(rows, weight, bias, *x_range, *w_range, settings)
    else:
        y = _forward(rows, weight, bias, x_range, w_range, settings)[0]
    return y.reshape(*x.shape[:-1], N)
