"""`fake_quant_linear`: quantizers and exact integer linear layer with straight-through gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2d_kernels import fixed_point, ops, reference
from s2d_kernels.integer_gemm import (
    by_group,
    centred,
    check_accumulator_range,
    check_bias,
    integer_accumulator,
    integer_linear,
    reference_operand,
)
from s2d_kernels.quantizers import (
    ACTIVATION_GRANULARITIES,
    WEIGHT_GRANULARITIES,
    QuantizedOperand,
    ValueRange,
    check_bits,
    check_granularity,
    check_value_range,
    check_weight_groups,
    code_span,
    full_mask,
    quantize_activation,
    quantize_and_pack,
    quantize_operand,
    quantize_weight,
    unpack_codes,
    unpack_mask,
    working_dtype,
)

__all__ = [
    "QuantizedOperand",
    "fake_quant_linear",
    "integer_accumulator",
    "integer_linear",
    "quantize_activation",
    "quantize_weight",
    "quantized_linear",
]

ops.define(
    "straight_through_grad",
    "Tensor grad, Tensor codes, Tensor scale, Tensor zero_point, Tensor mask, SymInt K, int bits, bool symmetric, "
    "ScalarType out_dtype -> Tensor",
    lambda grad, _c, _s, _z, _m, K, _b, _y, out_dtype: grad.new_empty((grad.shape[0], K), dtype=out_dtype),
)


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
    operand = reference.dequantize(reference_operand(codes, scale, zero_point))
    product = (grad.cpu().to(operand.dtype) @ operand) * unpack_mask(mask.cpu(), K)
    return product.to(grad.device, out_dtype)


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
    packed = codes
    if bits <= 4:
        codes = unpack_codes(codes, K, symmetric)
    if scale.shape[1] == 1 and fixed_point.serves(grad, len(codes), code_span(bits, symmetric)):
        values = centred(codes, zero_point, symmetric, torch.int8)
        live = fixed_point.live_scale(packed, scale, zero_point, K, bits, symmetric)
        product = fixed_point.product(
            grad, live.mT, values, mask, out_dtype, fixed_point.largest_digit(bits, symmetric)
        )
        if product is not None:
            return product
    operand = centred(codes, zero_point, symmetric, scale.dtype)
    by_group(operand, scale).mul_(scale.unsqueeze(2))
    return (grad.to(scale.dtype) @ operand).mul_(fixed_point.mask_factor(mask, K, scale.dtype)).to(out_dtype)


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


def _x_kind(s: _Settings) -> tuple[Any, ...]:
    return s.act_bits, s.act_symmetric, s.act_granularity, s.group_size, s.impl


def _w_kind(s: _Settings) -> tuple[Any, ...]:
    return s.weight_bits, s.weight_symmetric, s.weight_granularity, s.group_size, s.impl


def _product(qx: QuantizedOperand, qw: QuantizedOperand, bias: Tensor | None, s: _Settings) -> Tensor:
    kinds = (s.act_bits, s.act_symmetric, s.weight_bits, s.weight_symmetric)
    return torch.ops.s2d.integer_linear(*qx[:4], *qw[:4], bias, *kinds, s.out_dtype, s.impl)


class _FakeQuantLinear(torch.autograd.Function):
    """Straight-through: the gradient of the dequantized product, zero where a code was clamped.

    The weight is a parameter that lives on: saving it costs nothing, and its codes are made again in the backward.
    """

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
        need_x, need_w, _ = ctx.needs_input_grad[:3]
        codes = None
        if need_w:
            qx, codes = quantize_and_pack(x, (x_min, x_max), *_x_kind(settings))  # type: ignore[arg-type]
        else:
            qx = quantize_operand(x, (x_min, x_max), *_x_kind(settings))  # type: ignore[arg-type]
        qw = quantize_operand(weight, (w_min, w_max), *_w_kind(settings))  # type: ignore[arg-type]
        y = _product(qx, qw, bias, settings)
        saved: list[Tensor | None] = [None] * 7
        if need_x or need_w:
            saved[:3] = [weight, w_min, w_max]
        if need_x:  # grad_x = (g @ dq(W)) * mask_x
            saved[3] = qx.mask
        if need_w:  # grad_W = (g^T @ dq(x)) * mask_w
            saved[4:] = [codes, qx.scale, qx.zero_point]
        ctx.save_for_backward(*saved)
        ctx.settings = settings
        ctx.K = x.shape[1]
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        s, (x_dtype, w_dtype, bias_dtype) = ctx.settings, ctx.dtypes
        weight, w_min, w_max, x_mask, *x_operand = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_bias = None
        if need_w and not need_x:
            qw = quantize_operand(weight, (w_min, w_max), *_w_kind(s))
        if need_x:
            qw, codes = quantize_and_pack(weight, (w_min, w_max), *_w_kind(s))
            grad_x = torch.ops.s2d.straight_through_grad(
                grad_output, codes, qw.scale, qw.zero_point, x_mask, ctx.K, qw.bits, qw.symmetric, x_dtype, s.impl
            )
        if need_w:
            grad_w = torch.ops.s2d.straight_through_grad(
                grad_output.mT, *x_operand, qw.mask, ctx.K, s.act_bits, s.act_symmetric, w_dtype, s.impl
            )
        if need_bias:
            grad_bias = grad_output.to(working_dtype(grad_output)).sum(0).to(bias_dtype)
        return grad_x, grad_w, grad_bias, None, None, None, None, None


class _LearnedRangeLinear(torch.autograd.Function):
    """`_FakeQuantLinear` with gradients of the ranges too; these need the operands themselves, which are saved."""

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
        grad_factor: float | None,
    ) -> Tensor:
        qx, x_codes = quantize_and_pack(x, (x_min, x_max), *_x_kind(settings))  # type: ignore[arg-type]
        qw, w_codes = quantize_and_pack(weight, (w_min, w_max), *_w_kind(settings))  # type: ignore[arg-type]
        ctx.save_for_backward(
            x, x_codes, qx.scale, qx.zero_point, qx.mask, x_min, x_max,
            weight, w_codes, qw.scale, qw.zero_point, qw.mask, w_min, w_max,
        )  # fmt: skip
        ctx.settings, ctx.grad_factor = settings, grad_factor
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(qx, qw, bias, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        s: _Settings = ctx.settings
        saved_x, saved_w = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        x_kind, w_kind = (s.act_bits, s.act_symmetric), (s.weight_bits, s.weight_symmetric)
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grads: list[Tensor | None] = [None] * 9
        sides = (
            (0, need_x, grad_output, saved_x, x_kind, saved_w, w_kind),
            (1, need_w, grad_output.mT, saved_w, w_kind, saved_x, x_kind),
        )
        for place, need, grad, (x, codes, scale, zero_point, mask, low, high), kind, other, other_kind in sides:
            need_range = any(ctx.needs_input_grad[3 + 2 * place : 5 + 2 * place])
            if not need and not need_range:
                continue
            K = x.shape[1]
            everywhere = full_mask(len(x), K, x.device)
            product = torch.ops.s2d.straight_through_grad(
                grad, *other[1:4], everywhere, K, *other_kind, scale.dtype, s.impl
            )
            inside = unpack_mask(mask, K)
            if need:
                grads[place] = (product * inside).to(x.dtype)
            if need_range:
                codes = unpack_codes(codes, K, kind[1]) if kind[0] <= 4 else codes
                operand = QuantizedOperand(codes, scale, zero_point, codes, mask, *kind)
                # LSQ's N: the features of an activation, however many tokens there are; the weights of one scale
                count = K if place == 0 else x.numel() / max(scale.numel(), 1)
                grads[3 + 2 * place : 5 + 2 * place] = range_gradients(
                    product, x, operand, inside, low, high, ctx.grad_factor, count
                )
        if need_bias:
            grads[2] = grad_output.to(working_dtype(grad_output)).sum(0).to(ctx.bias_dtype)
        return tuple(grads)


def range_gradients(
    grad: Tensor,
    x: Tensor,
    q: QuantizedOperand,
    inside: Tensor,
    low: Tensor,
    high: Tensor,
    factor: float | None,
    count: float,
) -> list[Tensor]:
    """Gradients of `low` and `high` from `grad`, that of the dequantized `x`, `[rows, K]`.

    Scale and zero point get the gradients of learned step size quantization (arXiv 1902.08153), those of
    torch's `_fake_quantize_learnable_*`: d dq(x) / d scale is code - zero_point - x / scale within the bounds and
    code - zero_point where clamped, d dq(x) / d zero_point is -scale where clamped and else 0. From there to the range
    by scale = (high - low) / steps and zero_point = -low / scale, with symmetric codes scale = absmax / steps.
    They are multiplied by `factor`, or where it is None by 1 / sqrt(count * quant_max).
    """
    dtype = q.scale.dtype
    scale = q.scale.unsqueeze(2)
    values = by_group(centred(q.codes, q.zero_point, q.symmetric, dtype), q.scale)
    inside, grad = (by_group(t.contiguous(), q.scale) for t in (inside, grad))
    ratio = by_group(x.to(dtype).contiguous(), q.scale) / scale
    of_scale = (grad * (values - ratio.where(inside, 0))).sum(2)
    of_zero_point = -(grad * scale).where(~inside, 0).sum(2)
    if len(q.scale) == 1:
        of_scale, of_zero_point = (t.sum(0, keepdim=True) for t in (of_scale, of_zero_point))
    quant_min, quant_max = reference.quant_bounds(q.bits, q.symmetric)
    steps = quant_max if q.symmetric else quant_max - quant_min
    if factor is None:
        factor = 1 / math.sqrt(max(count, 1) * quant_max)
    given_low, given_high = low.view(-1, 1), high.view(-1, 1)
    if q.symmetric:
        of_high = of_scale * given_high.sign() * (given_high.abs() >= given_low.abs()) / steps
        of_low = of_scale * given_low.sign() * (given_high.abs() < given_low.abs()) / steps
        span = torch.maximum(given_low.abs(), given_high.abs())
    else:
        bottom = given_low.clamp(max=0)
        of_scale = of_scale + of_zero_point * bottom / q.scale.square()
        of_high = of_scale / steps * (given_high >= 0)
        of_low = (-of_scale / steps - of_zero_point / q.scale) * (given_low <= 0)
        span = given_high.clamp(min=0) - bottom
    moves = span / steps >= reference.SMALLEST_SCALE  # else the scale is 1, whatever the range
    return [(factor * g * moves).sum_to_size(len(r), 1).view_as(r) for g, r in ((of_low, low), (of_high, high))]


def _out_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on and `x` is not fp64, else that of `x`."""
    if x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def quantized_linear(
    x: Tensor,
    weight: QuantizedOperand,
    bias: Tensor | None = None,
    *,
    act_bits: int = 4,
    act_granularity: str = "per_token",
    act_symmetric: bool = False,
    act_range: ValueRange | None = None,
    impl: str | None = None,
) -> Tensor:
    """`fake_quant_linear` on a weight that is quantized already, for inference.

    Args:
        x: `[..., K]`, fp32, bf16 or fp16 (fp64 if the weight was fp64).
        weight: of `quantize_weight`, codes `[N, K]`.
        bias: `[N]`.
        act_bits, act_granularity, act_symmetric, act_range, impl: as in `fake_quant_linear`.

    Returns:
        `[..., N]`, bit for bit what `fake_quant_linear` returns for the weight that these codes were made from.

    Raises:
        TypeError, ValueError: as `fake_quant_linear`.
        ValueError: a gradient would be needed.
    """
    x = ops.check_tensor("x", x, device=weight.codes.device)
    N, K = weight.codes.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} but the weight {(N, K)}: the last sizes must be equal")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("quantized_linear has no gradient: call it under torch.no_grad(), or use fake_quant_linear")
    groups = weight.row_sum.shape[1]
    qx = quantize_activation(
        x.reshape(math.prod(x.shape[:-1]), K),
        bits=act_bits,
        granularity=act_granularity,
        symmetric=act_symmetric,
        value_range=act_range,
        group_size=K // groups if groups > 1 else None,
        impl=impl,
    )
    return integer_linear(qx, weight, bias, out_dtype=_out_dtype(x), impl=impl).reshape(*x.shape[:-1], N)


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
    range_grad_factor: float | None = None,
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
        act_range, weight_range: (min, max) instead of the operand's own. Tensors that require a gradient are learned:
            they get that of learned step size quantization (LSQ, arXiv 1902.08153; see `range_gradients`).
        group_size: columns a group, for "per_group".
        range_grad_factor: what the gradients of learned ranges are multiplied by; None is LSQ's
            1 / sqrt(N * quant_max), N being K for the activations and the elements of one scale for the weight; 1 gives
            those of torch's `_fake_quantize_learnable_*`.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses.

    Returns:
        `[..., N]` in x's dtype, or in autocast's dtype where autocast is on (and x is not fp64). Autocast changes
        nothing else: `x` and `weight` are quantized as they are given.

    Raises:
        TypeError: an operand is no dense floating tensor, or fp64 is mixed with another dtype.
        ValueError: shapes, devices, bits, granularities, ranges or group_size that do not fit.

    Accuracy: codes, scales, zero points, accumulator and y have the same bits on every impl. Per token a NaN or Inf
        makes its own output row NaN and no other; per tensor all of them.
        Gradients are sums in fp32; on a CPU with VNNI or AMX of exact digits instead, which count from the largest
        element of a row of grad * scale: a summand is off by at most 2^-23.4 of it beside its own roundings to fp32, by
        2^-15.6 for bf16 and fp16 gradients, by less where scales differ much (`fixed_point.digit_count`). Gradients
        that differ by more than that lose the small.
    Cost: impl="torch" on a CPU with VNNI or AMX is one int8 GEMM forward and six (of digits, see `fixed_point.py`)
        backward, plus elementwise passes; elsewhere fp32 GEMMs (of `exact_chunk` columns forward where K is larger).
        Saved for backward: packed codes and mask bits of `x`, 0.63 B an element at 4 bits or fewer, 1.13 B above, plus
        8 B a row, and `weight` itself, no copy: it is quantized again in the backward and must not be written before.
        With learned ranges `x` itself and the weight's codes too. Not differentiable twice, nor by torch.func.
    Determinism: the forward does not depend on tiling; gradients are as deterministic as torch's GEMM.
    """
    x = ops.check_tensor("x", x)
    weight = ops.check_tensor("weight", weight, ndim=2, device=x.device)
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} but weight {tuple(weight.shape)}: the last sizes must be equal")
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"x is {x.dtype} but weight {weight.dtype}: convert one, fp64 does not mix with other dtypes")
    check_bias(bias, N, x.device)
    check_bits("weight_bits", weight_bits)
    check_bits("act_bits", act_bits)
    act_kind = check_granularity("act_granularity", act_granularity, ACTIVATION_GRANULARITIES)
    groups = check_weight_groups(weight_granularity, group_size, K)
    check_accumulator_range(groups or K, (act_bits, act_symmetric), (weight_bits, weight_symmetric))
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    needs_grad = torch.is_grad_enabled()
    w_kind = WEIGHT_GRANULARITIES[weight_granularity]
    x_range = check_value_range("act_range", act_range, rows, act_kind, learned=needs_grad)
    w_range = check_value_range("weight_range", weight_range, weight, w_kind, learned=needs_grad)
    settings = _Settings(
        act_bits,
        act_symmetric,
        act_kind,
        weight_bits,
        weight_symmetric,
        w_kind,
        groups,
        _out_dtype(x),
        impl,
    )
    if needs_grad and any(t is not None and t.requires_grad for t in (*x_range, *w_range)):
        y = _LearnedRangeLinear.apply(rows, weight, bias, *x_range, *w_range, settings, range_grad_factor)
    elif needs_grad and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = _FakeQuantLinear.apply(rows, weight, bias, *x_range, *w_range, settings)
    else:
        qx = quantize_operand(rows, x_range, *_x_kind(settings))
        y = _product(qx, quantize_operand(weight, w_range, *_w_kind(settings)), bias, settings)
    return y.reshape(*x.shape[:-1], N)
