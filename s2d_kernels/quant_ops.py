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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d_kernels import ops, reference

ACTIVATION_GRANULARITIES = {"per_token": "per_row", "per_tensor": "per_tensor"}
WEIGHT_GRANULARITIES = {"per_channel": "per_row", "per_tensor": "per_tensor", "per_group": "per_group"}

ValueRange = tuple[float | Tensor, float | Tensor]
_TAGS = (torch.Tag.pt2_compliant_tag,)


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


def pack_mask(mask: Tensor) -> Tensor:
    """Bool `[rows, K]` to bits, uint8 `[rows, ceil(K / 8)]`."""
    padded = F.pad(mask, (0, -mask.shape[1] % 8)).contiguous()
    # Eight 0/1 bytes as one little-endian int64: this product moves byte i to bit 56 + i, without carries.
    words = padded.view(torch.int64) * 0x0102040810204080 >> 56
    return words.to(torch.uint8)


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

ops.library.define(
    "quantize(Tensor x, Tensor? minimum, Tensor? maximum, int bits, bool symmetric, str granularity, "
    "SymInt group_size, str? impl=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_OPERAND = "Tensor {0}_codes, Tensor {0}_scale, Tensor {0}_zero_point, Tensor {0}_row_sum"
_OPERANDS = f"{_OPERAND.format('x')}, {_OPERAND.format('w')}"
_KINDS = "int x_bits, bool x_symmetric, int w_bits, bool w_symmetric"
ops.library.define(f"integer_accumulator({_OPERANDS}, {_KINDS}, str? impl=None) -> Tensor", tags=_TAGS)
ops.library.define(
    f"integer_linear({_OPERANDS}, Tensor? bias, {_KINDS}, ScalarType out_dtype, str? impl=None) -> Tensor", tags=_TAGS
)
ops.library.define(
    "straight_through_grad(Tensor grad, Tensor codes, Tensor scale, Tensor zero_point, Tensor mask, SymInt K, "
    "int bits, bool symmetric, ScalarType out_dtype, str? impl=None) -> Tensor",
    tags=_TAGS,
)


def _exactly(op: str, x: Tensor, impl: str | None, *arguments: Any) -> Any:
    """Run the chosen implementation with autocast off: it would turn an exact GEMM into a bf16 one."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return ops.resolve(op, impl, x.device)(x, *arguments)


def _quantize(x: Tensor, *arguments: Any, impl: str | None = None) -> tuple[Tensor, ...]:
    if len(arguments) == 7:
        *arguments, impl = arguments
    return _exactly("quantize", x, impl, *arguments)


def _quantize_fake(
    x: Tensor,
    _minimum: Tensor | None,
    _maximum: Tensor | None,
    _bits: int,
    _symmetric: bool,
    granularity: str,
    group_size: int,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    rows, K = x.shape
    groups = K // group_size if group_size else 1
    shape = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((rows, K), dtype=torch.int8),
        x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty((rows, groups), dtype=torch.int32),
        x.new_empty((rows, (K + 7) // 8), dtype=torch.uint8),
    )
