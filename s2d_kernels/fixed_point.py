"""fp32 times small integers on a CPU, by exact int8 products of fixed-point digits."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.int8_product import int8_digits_serve
from s2d_kernels.quantizers import unpack_codes, unpack_mask


def serves(factor: Tensor, depth: int, span: int) -> bool:
    """Whether `product` takes `factor` and integers of magnitude <= `span`, added up over `depth`, and pays."""
    if span > 127 or not 16 <= depth < 2**31 / (127 * span) or factor.dtype == torch.float64:
        return False
    return factor.device.type == "cpu" and bool(torch.backends.mkldnn.enabled) and int8_digits_serve()


def largest_digit(bits: int, symmetric: bool) -> int:
    """D, of digits -D..D of base 2 D, for products with codes of `bits` less their zero points.

    127 is what a byte holds. With codes of at most 4 bits it is less: a digit and a code then add up to a byte, and the
    CPU's kernels can do with half of the multiplications (`tile_of` in csrc/cpu/integer_kernels.cpp).
    """
    if bits > 4:
        return 127
    return 120 if symmetric else 112  # 4 bits hold -8..7, or 0..15, which less a zero point in 0..15 are -15..15


def digit_count(scale: Tensor, out_dtype: torch.dtype) -> int:
    """Three, 23 to 24 bits as in fp32; two, 16 bits, for an output of at most 11 or where torch may use TF32 or bf16.

    One more, or two, where the largest `scale` is more than 2^3, 2^11 times the median: digits count from the largest
    element of a row, and a sink token's must not cost the others theirs, which are all that a channel it does not
    touch has.
    """
    digits = 3 if out_dtype == torch.float32 and not ops.fp32_is_reduced(torch.device("cpu")) else 2
    live = scale[scale > 0]
    if live.numel() < 2:
        return digits
    ratio = float(live.max() / live.median())
    return digits + (ratio > 2**3) + (ratio > 2**11)


def live_scale(codes: Tensor, scale: Tensor, zero_point: Tensor, K: int, bits: int, symmetric: bool) -> Tensor:
    """`scale` with 0 in the place of the 1 that a row of zeros has: its products are 0, its unit is not the others'.

    Codes `[depth, K]`, two a byte for `bits` <= 4, scale and zero point `[depth, 1]` or `[1, 1]`.
    """
    if scale.numel() < 2:
        return scale
    (ones,) = (scale.flatten() == 1).nonzero(as_tuple=True)
    if not len(ones):
        return scale
    rows = codes[ones]
    if bits <= 4:
        rows = unpack_codes(rows, K, symmetric)
    return scale.index_fill(0, ones[(rows == zero_point[ones]).all(1)], 0.0)


def product(
    factor: Tensor, scale: Tensor, values: Tensor, mask: Tensor, out_dtype: torch.dtype, most: int
) -> Tensor | None:
    """((factor * scale) @ values) * mask, or None where factor * scale is not finite.

    A row of factor * scale is written in units of its largest magnitude / D as digits -D..D of base 2 D, and each
    digit's product with the integers is exact. What is lost is what lies below the last digit: with three of them an
    element is off by at most 1 / (8 D^3) of its row's largest, which for D = 127, 120 and 112 is below 2^-23.9, 2^-23.7
    and 2^-23.4; a digit more or less makes that a 2 D-th or 2 D-fold. The quotient by the unit and the remainders are
    rounded in fp32, each by at most 2^-24 of the element itself. The sums do not depend on their order.

    Args:
        factor: `[rows, depth]`, fp32, bf16 or fp16, any strides.
        scale: fp32 `[1, depth]` or `[1, 1]`.
        values: int8 `[depth, K]`.
        mask: bits, uint8 `[rows, ceil(K / 8)]`.
        out_dtype: of the result.
        most: D, see `largest_digit`.

    Returns:
        `[rows, K]`.

    Cost: three int8 products (two: see `digit_count`) in place of an fp32 GEMM that costs as much as four on a CPU with
        VNNI and up to eight with AMX.
    """
    (rows, depth), K = factor.shape, values.shape[1]
    if rows == 0 or K == 0:
        return torch.zeros((rows, K), dtype=out_dtype, device="cpu")
    digits = digit_count(scale, out_dtype)
    step = min(max(64, min(256, 2**20 // depth)) * torch.get_num_threads(), rows)  # about 1 MB a thread and buffer
    column_major = factor.stride(0) == 1 and factor.stride(1) != 1

    def buffer(height: int, dtype: torch.dtype) -> Tensor:
        """In the factor's layout: a block of a transposed gradient is not transposed for its own sake."""
        shape = (depth, height) if column_major else (height, depth)
        empty = torch.empty(shape, dtype=dtype, device="cpu")
        return empty.mT if column_major else empty

    rest_of_block, digit_of_block = buffer(step, torch.float32), buffer(step, torch.float32)
    planes = buffer(digits * step, torch.int8)
    sums = torch.empty((digits * step, K), dtype=torch.int32, device="cpu")
    summand = torch.empty((step, K), dtype=torch.float32, device="cpu")
    out = torch.empty((rows, K), dtype=out_dtype, device="cpu")
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = slice(start, start + count)
        rest, digit = rest_of_block[:count], digit_of_block[:count]
        torch.mul(factor[block], scale, out=rest)
        largest = torch.maximum(rest.amax(1, keepdim=True), rest.amin(1, keepdim=True).neg_())
        if not bool(largest.isfinite().all()):
            return None
        unit = largest.div_(most).clamp_(min=reference.SMALLEST_SCALE)
        rest.div_(unit)
        for place in range(digits):
            if place:
                rest.sub_(digit).mul_(2 * most)
            torch.round(rest, out=digit)
            planes[place * count : (place + 1) * count].copy_(digit)
        torch._int_mm(planes[: digits * count], values, out=sums[: digits * count])
        by_place = sums[: digits * count].view(digits, count, K).unbind(0)
        total = by_place[-1].to(torch.float32)
        for place in reversed(range(digits - 1)):
            total.mul_(1 / (2 * most)).add_(summand[:count].copy_(by_place[place]))
        out[block] = total.mul_(unit).mul_(mask_factor(mask[block], K, torch.float32))
    return out


def mask_factor(mask: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Bits, uint8 `[rows, ceil(K / 8)]`, to 0 and 1 in `dtype`, `[rows, K]`."""
    return unpack_mask(mask, K).view(torch.uint8).to(dtype)  # bytes convert several times as fast as bools
