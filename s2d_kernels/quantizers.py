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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d_kernels import ops, reference
from s2d_kernels.int8_product import use_int8_product

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
    size = K // groups if groups else 0
    if use_int8_product(codes.device, size, 128, 1):
        ones = torch.ones((size, 1), dtype=torch.int8, device=codes.device)
        return torch._int_mm(codes.reshape(rows * groups, size), ones).view(rows, groups)
    return codes.reshape(rows, groups, size).sum(2, dtype=torch.int32)


def block_rows(width: int, device: torch.device, rows: int) -> int:
    """How many rows of `width` numbers to work on at a time: about 1 MB a thread on a CPU, else all of them."""
    if device.type != "cpu":
        return max(rows, 1)
    return max(64, 2**18 // max(width, 1)) * torch.get_num_threads()


def _in_words(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """`flat [count]` of bytes as numbers of `dtype`; a copy where it starts between two of them."""
    unknown = torch.compiler.is_compiling()  # where it starts
    return (flat.clone() if unknown or flat.storage_offset() % dtype.itemsize else flat).view(dtype)


def pack_mask(mask: Tensor) -> Tensor:
    """Bool `[rows, K]` to bits, uint8 `[rows, ceil(K / 8)]`."""
    rows, K = mask.shape
    flat = (F.pad(mask, (0, -K % 8)) if K % 8 else mask.contiguous()).view(-1)
    # Eight 0/1 bytes as one little-endian int64: this product moves byte i to bit 56 + i, without carries.
    words = _in_words(flat, torch.int64) * 0x0102040810204080
    return words.view(torch.uint8)[7::8].contiguous().view(rows, (K + 7) // 8)


def _bits_of_bytes(device: torch.device) -> Tensor:
    """The eight bits of each byte as eight 0/1 bytes in an int64, `[256]`."""
    byte = torch.arange(256, device=device)
    return torch.stack([byte >> bit & 1 for bit in range(8)], dim=1).to(torch.uint8).view(torch.int64).squeeze(1)


_bits_of_bytes_on: dict[tuple[torch.device, int], Tensor] = {}  # by device and the stream that made it


def _table(mask: Tensor) -> Tensor:
    """`_bits_of_bytes`, kept. Not a FakeTensor's, nor one made in a capture, whose memory the graph writes again.

    Another stream's may not be there yet; in a capture each is, since torch.cuda.graph waits for the device first.
    """
    device = mask.device
    if torch.compiler.is_compiling() or type(mask) is not Tensor:
        return _bits_of_bytes(device)
    if ops.capturing(device):
        kept = [table for (place, _), table in _bits_of_bytes_on.items() if place == device]
        return kept[0] if kept else _bits_of_bytes(device)
    stream = ops.current_stream(device)
    if (device, stream) not in _bits_of_bytes_on:
        _bits_of_bytes_on[device, stream] = _bits_of_bytes(device)
    return _bits_of_bytes_on[device, stream]


def unpack_mask(mask: Tensor, K: int) -> Tensor:
    """Bits, uint8 `[rows, ceil(K / 8)]`, to bool `[rows, K]`."""
    words = _table(mask).index_select(0, mask.reshape(-1).int())
    return words.view(torch.bool).view(mask.shape[0], 8 * mask.shape[1])[:, :K]


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of at most 4 bits, int8 `[rows, K]`, to two a byte, uint8 `[rows, ceil(K / 2)]`."""
    rows, K = codes.shape
    codes = F.pad(codes, (0, 1)) if K % 2 else codes.contiguous()
    pairs = _in_words(codes.view(-1), torch.int16) & 0x0F0F  # little-endian: the even element is the low byte
    return (pairs >> 4 | pairs).to(torch.uint8).view(rows, (K + 1) // 2)


def unpack_codes(packed: Tensor, K: int, symmetric: bool) -> Tensor:
    """Two codes a byte, uint8 `[rows, ceil(K / 2)]`, to int8 `[rows, K]`; symmetric codes are sign-extended."""
    pairs = packed.reshape(-1).to(torch.int16)
    codes = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.int8)
    if symmetric:
        codes.bitwise_xor_(8).sub_(8)
    return codes.view(packed.shape[0], 2 * packed.shape[1])[:, :K]


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
ops.define(
    "quantize_packed",
    "Tensor x, Tensor? minimum, Tensor? maximum, int bits, bool symmetric, str granularity, SymInt group_size"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *kind: (*_quantize_fake(x, *kind), x.new_empty((x.shape[0], (x.shape[1] + 1) // 2), dtype=torch.uint8)),
)


def check_packable(bits: int) -> None:
    """Raise unless two codes fit a byte."""
    if bits > 4:
        raise ValueError(f"bits={bits}: codes of more than 4 bits are not packed two a byte")


def _quantize_packed(impl: str) -> Callable[..., tuple[Tensor, ...]]:
    def quantize_and_pack(x: Tensor, *kind: Any) -> tuple[Tensor, ...]:
        """The outputs of the op `quantize`, and `pack_codes` of the first."""
        check_packable(kind[2])
        outputs = ops.implementation("quantize", impl)(x, *kind)
        return *outputs, pack_codes(outputs[0])

    return quantize_and_pack


for _impl in ("reference", "torch"):
    ops.implements("quantize_packed", _impl)(_quantize_packed(_impl))


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
    groups = K // group_size if group_size else 1
    row_sum = codes.reshape(len(codes), groups, group_size or K).sum(2).to(torch.int32)
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
    groups = K // group_size if group_size else 1
    parameters = groups if granularity == "per_group" else 1
    parts = x.reshape(rows * parameters, K // parameters if parameters else group_size)  # one row a scale
    scale, zero_point = _choose_qparams(parts, minimum, maximum, bits, symmetric, granularity == "per_tensor")
    # Only a CPU may be asked without waiting for a device.
    clean = x.device.type == "cpu" and bool(scale.isfinite().all())

    codes = torch.empty(parts.shape, dtype=torch.int8, device=x.device)
    never_clamped = symmetric and minimum is None and clean  # |x| / scale rounds to at most quant_max
    unclamped = None if never_clamped else torch.empty(parts.shape, dtype=torch.bool, device=x.device)
    step = min(block_rows(parts.shape[1], x.device, len(parts)), len(parts))
    buffer = torch.empty((step, parts.shape[1]), dtype=x.dtype, device=x.device)  # one, that stays in the cache
    for start in range(0, len(parts), step or 1):
        block = slice(start, start + step)
        own = slice(None) if len(scale) == 1 else block
        q = torch.div(parts[block], scale[own], out=buffer[: len(parts) - start]).round_()
        if minimum is not None:
            q.clamp_(-(2**bits), 2**bits)  # what integers can hold; clamped codes stay clamped, q + zero_point too
        _write_codes(q, zero_point[own], bits, symmetric, codes[block], None if unclamped is None else unclamped[block])
    shift = code_shift(bits, symmetric)
    if not clean:
        bad = scale.isnan()
        codes.masked_fill_(bad, -shift)
        if unclamped is not None:
            unclamped.masked_fill_(bad, False)
    codes = codes.view(rows, K)
    mask = full_mask(rows, K, x.device) if unclamped is None else pack_mask(unclamped.view(rows, K))
    shape = (1, 1) if granularity == "per_tensor" else (rows, parameters)
    stored_zero_point = (zero_point - shift).to(torch.int32).view(shape)
    return codes, scale.view(shape), stored_zero_point, row_sums(codes, groups), mask


def _choose_qparams(
    parts: Tensor, minimum: Tensor | None, maximum: Tensor | None, bits: int, symmetric: bool, per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """Scale (NaN where `parts` holds NaN or Inf) and zero point, both `[len(parts), 1]` or `[1, 1]`, in its dtype."""
    if parts.numel() == 0:
        low = high = parts.new_zeros((1 if per_tensor else len(parts), 1))
    elif per_tensor:
        low, high = (v.reshape(1, 1) for v in torch.aminmax(parts))
    else:
        low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)  # 20 times aminmax's speed on a CPU
    finite = low.isfinite() & high.isfinite()  # they hand on NaN
    if minimum is not None and maximum is not None:
        low, high = minimum.view(-1, 1), maximum.view(-1, 1)
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
        return scale, torch.zeros_like(scale)
    return scale, (quant_min - (low / scale).round()).clamp(quant_min, quant_max).nan_to_num(nan=0.0)


def _write_codes(
    q: Tensor, zero_point: Tensor, bits: int, symmetric: bool, codes: Tensor, unclamped: Tensor | None
) -> None:
    """Stored codes of integers `q`, |q| <= 2^bits, and which of them were within the bounds.

    Integer arithmetic on 1 or 2 bytes costs a CPU a fraction of the same on fp32.
    """
    quant_min, quant_max = reference.quant_bounds(bits, symmetric)
    if unclamped is None:
        codes.copy_(q)
    elif bits <= 6:  # q + zero_point lies in -64..127
        raw = q.to(torch.int8)
        if not symmetric:
            raw += zero_point.to(torch.int8)
        torch.clamp(raw, quant_min, quant_max, out=codes)
        torch.eq(codes, raw, out=unclamped)
    else:
        raw = q.to(torch.int16)
        if not symmetric:
            raw += zero_point.to(torch.int16)
        inside = raw.clamp(quant_min, quant_max)
        torch.eq(raw.sub_(inside).clamp_(-1, 1).to(torch.int8), 0, out=unclamped)  # bytes compare ten times as fast
        codes.copy_(inside.sub_(code_shift(bits, symmetric)))


def full_mask(rows: int, K: int, device: torch.device) -> Tensor:
    """`pack_mask` of `[rows, K]` ones."""
    mask = torch.full((rows, (K + 7) // 8), 255, dtype=torch.uint8, device=device)
    if K % 8:
        mask[:, -1] = 2 ** (K % 8) - 1
    return mask


# --- Arguments --------------------------------------------------------------------------------------------------------


def check_bits(name: str, bits: object) -> None:
    """Raise unless `bits` is an int in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int, got {type(bits).__name__} {bits!r}: choose 2..8")
    if not 2 <= bits <= 8:
        raise ValueError(f"{name}={bits} is not supported: choose 2..8")


def check_granularity(name: str, value: str, known: dict[str, str]) -> str:
    """The op's name of a granularity, `known[value]`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}: choose one of {tuple(known)}")
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
    name: str, value_range: ValueRange | None, x: Tensor, granularity: str, *, learned: bool = False
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(min, max) as `[1]` or `[rows]` tensors in the dtype and on the device in which `x` is quantized.

    They are detached unless `learned`.

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
            pair.append((value if learned else value.detach()).reshape(-1).to(x.device, working_dtype(x)))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a pair (min, max) of numbers or tensors, got {value_range!r}")
        else:
            pair.append(x.new_full((1,), value, dtype=working_dtype(x)))
    readable = all(not isinstance(v, Tensor) or v.device.type == "cpu" for v in value_range)
    if readable and not torch.compiler.is_compiling():
        low, high = (torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in value_range)
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
    outputs = torch.ops.s2d.quantize(x, *value_range, bits, symmetric, granularity, group_size, impl)
    return QuantizedOperand._make((*outputs, bits, symmetric))


def quantize_and_pack(
    x: Tensor,
    value_range: tuple[Tensor, Tensor] | tuple[None, None],
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
    impl: str | None,
) -> tuple[QuantizedOperand, Tensor]:
    """`quantize_operand`, and its codes as they are saved: two a byte where 4 bits hold them, else themselves."""
    arguments = (x, *value_range, bits, symmetric, granularity, group_size, impl)
    if bits > 4:
        operand = QuantizedOperand._make((*torch.ops.s2d.quantize(*arguments), bits, symmetric))
        return operand, operand.codes
    *outputs, packed = torch.ops.s2d.quantize_packed(*arguments)
    return QuantizedOperand._make((*outputs, bits, symmetric)), packed


@torch.no_grad()
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

    Not differentiable: no output requires a gradient. `fake_quant_linear` is what trains.

    Args:
        x: `[rows, K]`, fp32, bf16, fp16 (computed in fp32) or fp64 (computed in fp64); any strides.
        bits: 2..8.
        symmetric: codes -(2^(b-1)-1)..2^(b-1)-1 and scale = absmax / quant_max; otherwise codes 0..2^b-1 and
            scale = (max - min) / (2^b - 1) with min <= 0 <= max and a zero point within the codes.
        granularity: "per_token" (one scale a row) or "per_tensor".
        value_range: (min, max) to use instead of those of `x`, numbers or tensors of one value (per token also
            `[rows]`). No gradient flows to them.
        group_size: makes `row_sum` `[rows, K / group_size]`, for weights quantized per group; scales are unaffected.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses.

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


@torch.no_grad()
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
    """Quantize a weight, by the formula of `quantize_activation`, and not differentiable either.

    Args:
        weight: `[N, K]` (out x in), fp32, bf16, fp16 or fp64; any strides.
        bits: 2..8.
        symmetric: see `quantize_activation`.
        granularity: "per_channel" (one scale a row), "per_tensor", or "per_group" (`group_size` columns of a row).
        group_size: for "per_group" only; divides K.
        value_range: (min, max) instead of those of the weight; per channel also `[N]` tensors.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses.

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
