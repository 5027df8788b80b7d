"""The definitions, in plain torch and without cleverness: what every faster implementation is compared with.

Every function takes any floating dtype and computes in it (fp64 for truth), except the quantizers, whose codes are
*defined* in fp32: they compute in fp32 unless the input is fp64. Equation numbers are those of S2D, arXiv 2602.14432.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# --- Spectral penalty -------------------------------------------------------------------------------------------


class SVDTriplets(NamedTuple):
    """Leading singular triplets in `torch.linalg.svd` order: `U [m, k]`, `S [k]` descending, `Vh [k, n]`."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def topk_svd(weight: Tensor, k: int) -> SVDTriplets:
    """First `k` singular triplets of `weight [m, n]` by a full SVD."""
    if not 0 < k <= min(weight.shape):
        raise ValueError(f"k={k} must lie in 1..{min(weight.shape)} for a weight of shape {tuple(weight.shape)}")
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return SVDTriplets(U[:, :k], S[:k], Vh[:k])


def penalty(weight: Tensor, *, strength: float, power: float) -> Tensor:
    """Spectral penalty L(W) = strength/(power+1) * sum_i s_i^(power+1), a scalar (eq. 6)."""
    return strength / (power + 1) * torch.linalg.svdvals(weight).pow(power + 1).sum()


def penalty_gradient(weight: Tensor, *, rank: int, strength: float, power: float) -> Tensor:
    """Gradient of eq. 6 restricted to the top `rank` components: strength * U_k diag(s_k^power) Vh_k, `[m, n]`."""
    if rank == 0:
        return torch.zeros_like(weight)
    U, S, Vh = topk_svd(weight, rank)
    return strength * (U * S.pow(power)) @ Vh


def coupled_update(weight: Tensor, grad: Tensor, *, lr: float, rank: int, strength: float, power: float) -> Tensor:
    """One SGD step with the penalty in the gradient: W - lr * (grad + strength * G) (algorithm 1, line 20)."""
    return weight - lr * (grad + penalty_gradient(weight, rank=rank, strength=strength, power=power))


def decayed_singular_values(S: Tensor, *, lr_sum: float, strength: float, power: float) -> Tensor:
    """Exact solution of ds/dt = -strength * s^power over a time `lr_sum` (the decoupled form).

    s * (1 + (power-1) * lr_sum * strength * s^(power-1))^(-1/(power-1)); power = 1 is s * exp(-lr_sum * strength).
    """
    if power == 1:
        return S * math.exp(-strength * lr_sum)
    rate = (power - 1) * strength * lr_sum
    if rate == 0:
        return S.clone()
    # log(1 + growth) from the logarithm of growth = (power-1) * strength * lr_sum * s^(power-1), which may overflow
    log_growth = math.log(rate) + (power - 1) * S.log()
    return S * torch.exp(torch.logaddexp(log_growth, torch.zeros_like(S)) * (-1.0 / (power - 1)))


def decoupled_update(weight: Tensor, *, lr: float, rank: int, strength: float, power: float) -> Tensor:
    """One decoupled decay step on the top `rank` components: W + sum_i (s_i_new - s_i) u_i v_i^T."""
    if rank == 0:
        return weight.clone()
    U, S, Vh = topk_svd(weight, rank)
    change = decayed_singular_values(S, lr_sum=lr, strength=strength, power=power) - S
    return weight + (U * change) @ Vh


def rounding_bits(seed: int | Tensor, rows: int, cols: int) -> Tensor:
    """The random numbers 0..65535 of stochastic rounding, int64 `[rows, cols]`; `seed` is an int64.

    A function of the seed, the row i and the column j alone. In words of 32 bits, `^` being exclusive or:

        mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16     ("lowbias32")
        key    = mix(seed[0:32] ^ mix(seed[32:64] ^ 0x9e3779b9))
        pair   = mix(j / 2 ^ mix(i ^ key))
        number = the lower half of `pair` where j is even, the upper half where it is odd

    i and j / 2 count modulo 2^32. Two columns share what is mixed, since a rounding takes 16 bits.
    """
    word = 0xFFFFFFFF

    def mix(x: Tensor) -> Tensor:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & word
        return x ^ (x >> 16)

    s = torch.as_tensor(seed, dtype=torch.int64)
    i, j = (torch.arange(size, device=s.device) for size in (rows, cols))
    key = mix((s & word) ^ mix(((s >> 32) & word) ^ 0x9E3779B9))
    pair = mix(((j >> 1) & word) ^ mix((i & word) ^ key)[:, None])
    return torch.where(j % 2 == 0, pair & 0xFFFF, pair >> 16)


def stochastically_rounded(x: Tensor, seed: int | Tensor) -> Tensor:
    """fp32 `x [m, n]` in bf16, each element one of its two neighbours, at random with the expectation `x`.

    (u + r) & 0xffff0000, of the element's bits u and its number r of `rounding_bits`: the larger magnitude has the
    probability (u & 0xffff) / 2^16, the element's place between the two. What bf16 has exactly stays. From the largest
    bf16 on r is 0: no finite number becomes infinite, infinities and NaN stay what they are.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    r = torch.where((bits & 0x7FFFFFFF) < 0x7F7F0000, rounding_bits(seed, *x.shape).to(x.device), 0)
    upper = (bits + r) >> 16
    return torch.where(upper < 2**15, upper, upper - 2**16).to(torch.int16).view(torch.bfloat16)


def strength_for_half_life(sigma: float, lr_sum: float, *, power: float = 2.0) -> float:
    """Decay strength that halves a singular value `sigma` while the learning rates add up to `lr_sum`.

    From 1/s_T^(power-1) = 1/s_0^(power-1) + (power-1) * strength * lr_sum; power = 2 gives 1/(sigma * lr_sum).
    """
    for name, value in (("sigma", sigma), ("lr_sum", lr_sum)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be a positive finite number")
    if power < 1:
        raise ValueError(f"power={power} must be at least 1")
    if power == 1:
        return math.log(2.0) / lr_sum
    return (2.0 ** (power - 1) - 1.0) / ((power - 1) * lr_sum * sigma ** (power - 1))


# --- Peak-contribution dominance ratio --------------------------------------------------------------------------


def largest_activation(weight: Tensor, x: Tensor) -> tuple[int, int, Tensor]:
    """Token index, output neuron and value of the largest |W x| over the rows of `x [tokens, n]`, bias excluded."""
    y = x @ weight.mT
    flat = int(y.abs().argmax())
    token, neuron = divmod(flat, weight.shape[0])
    return token, neuron, y[token, neuron]


def pcdr(weight: Tensor, x: Tensor, neuron: int, k_max: int) -> Tensor:
    """PCDR_1..k_max of one activation (eq. 2): how much of |A_ij| the leading components explain.

    Args:
        weight: `[m, n]`.
        x: the input row `[n]` that made the activation.
        neuron: the output index i of the activation.
        k_max: number of ratios to return, at most min(m, n).

    Returns:
        `[k_max]`, sum_{r<=k} |s_r u_ir (v_r . x)| over the same sum with all r; zeros where that sum is zero.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    terms = (S * U[neuron] * (Vh @ x)).abs()
    total = terms.sum()
    return torch.where(total > 0, terms.cumsum(0)[:k_max] / total, torch.zeros_like(terms[:k_max]))


def select_rank(ratios: Tensor, threshold: float) -> int:
    """Smallest k in 1..k_max with PCDR_k >= threshold, else 0: the layer is healthy (section 4.2)."""
    reached = (ratios >= threshold).nonzero()
    return int(reached[0]) + 1 if reached.numel() else 0


# --- Fake quantization ------------------------------------------------------------------------------------------

# A scale below the smallest normal fp32 number counts as zero: the row gets scale 1 and codes 0. Subnormal inputs
# themselves are honoured, not flushed. This is the one denormal rule, on every backend.
SMALLEST_SCALE = 2.0**-126


class QuantizedTensor(NamedTuple):
    """Codes and row parameters; x is approximated by (codes - zero_point) * scale.

    `codes` int64 in quant_min..quant_max, `scale` fp32 (fp64 for an fp64 input) and `zero_point` int64 broadcast
    against them; `mask` bool marks the elements that were not clamped, which is where the straight-through gradient
    passes. A row (or tensor, for per-tensor scales) that holds NaN or Inf has scale NaN and codes 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    mask: Tensor


def quant_bounds(bits: int, symmetric: bool) -> tuple[int, int]:
    """(quant_min, quant_max): -(2^(b-1)-1)..2^(b-1)-1 when symmetric (narrow range), else 0..2^b-1."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not supported: choose 2..8")
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def choose_qparams(minimum: Tensor, maximum: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range.

    symmetric: scale = max(|minimum|, |maximum|) / quant_max, zero_point = 0.
    asymmetric: the range is widened to hold 0, scale = (max - min) / (2^b - 1) and
    zero_point = clamp(quant_min - round_half_even(min / scale), quant_min, quant_max).
    A scale below `SMALLEST_SCALE` becomes 1; one that is not finite becomes NaN.
    """
    quant_min, quant_max = quant_bounds(bits, symmetric)
    if symmetric:
        scale = torch.maximum(minimum.abs(), maximum.abs()) / quant_max
    else:
        minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
        scale = (maximum - minimum) / (quant_max - quant_min)
    scale = torch.where(scale < SMALLEST_SCALE, 1.0, scale)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    zero_point = (quant_min - (minimum / scale).round()).clamp(quant_min, quant_max)
    return scale, zero_point.nan_to_num(nan=0.0).to(torch.int64)


def quantize(
    x: Tensor,
    *,
    bits: int,
    symmetric: bool,
    granularity: str,
    value_range: tuple[float | Tensor, float | Tensor] | None = None,
    group_size: int | None = None,
) -> QuantizedTensor:
    """Quantize `x [rows, K]`: q = clamp(round_half_even(x / scale) + zero_point, quant_min, quant_max).

    Args:
        x: `[rows, K]`, floating.
        bits: 2..8.
        symmetric: signed codes around 0, or unsigned codes with a zero point.
        granularity: "per_row" (per token or per output channel), "per_tensor", or "per_group" along K.
        value_range: (min, max) to use instead of those of `x`: each one value, or one a row.
        group_size: elements per group, only for "per_group"; must divide K.

    Returns:
        `QuantizedTensor` with scale `[rows, 1]`, `[1, 1]` or `[rows, K / group_size]`.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [rows, K], got shape {tuple(x.shape)}")
    x = x.to(_working_dtype(x))
    rows, K = x.shape
    if granularity == "per_group":
        if not group_size or K % group_size:
            raise ValueError(f"group_size={group_size} must divide K={K}")
        groups = x.reshape(rows, K // group_size, group_size)
        dims: tuple[int, ...] = (2,)
    elif granularity in ("per_row", "per_tensor"):
        groups = x.unsqueeze(1)  # one group per row
        dims = (2,) if granularity == "per_row" else (0, 1, 2)
    else:
        raise ValueError(f"granularity={granularity!r} is none of 'per_row', 'per_tensor', 'per_group'")
    finite = groups.isfinite().all(dim=2, keepdim=True)
    if granularity == "per_tensor":
        finite = finite.all().reshape(1, 1, 1)
    if value_range is not None:
        minimum, maximum = (torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1, 1) for v in value_range)
    elif groups.numel() == 0:
        shape = [1 if d in dims else groups.shape[d] for d in range(3)]
        minimum = maximum = x.new_zeros(shape)
    else:
        minimum, maximum = groups.amin(dims, keepdim=True), groups.amax(dims, keepdim=True)
    scale, zero_point = choose_qparams(minimum, maximum, bits=bits, symmetric=symmetric)
    scale = torch.where(finite, scale, torch.nan)
    zero_point = torch.where(finite, zero_point, 0)
    quant_min, quant_max = quant_bounds(bits, symmetric)
    unclamped = (groups / scale).round() + zero_point
    mask = (unclamped >= quant_min) & (unclamped <= quant_max)
    codes = unclamped.clamp(quant_min, quant_max).nan_to_num(nan=0.0).to(torch.int64)
    return QuantizedTensor(codes.reshape(rows, K), scale.squeeze(2), zero_point.squeeze(2), mask.reshape(rows, K))


def _per_element(parameter: Tensor, K: int) -> Tensor:
    return parameter.repeat_interleave(max(K // max(parameter.shape[1], 1), 1), dim=1)[:, :K]


def dequantize(q: QuantizedTensor) -> Tensor:
    """(codes - zero_point) * scale, `[rows, K]`, in the scale's dtype."""
    K = q.codes.shape[1]
    return (q.codes - _per_element(q.zero_point, K)).to(q.scale.dtype) * _per_element(q.scale, K)


def integer_accumulator(qx: QuantizedTensor, qw: QuantizedTensor) -> Tensor:
    """Exact integer products of two quantized operands, zero points removed.

    Qx Qw^T - z_x rowsum(Qw) - z_w rowsum(Qx) + K z_x z_w per group, as int64 `[groups, M, N]` (one group unless the
    weight is quantized per group). Integer sums do not depend on their order, so every implementation must agree.
    """
    (M, K), N, groups = qx.codes.shape, qw.codes.shape[0], qw.scale.shape[1]
    size = K // groups if groups else 0
    x = qx.codes.reshape(M, groups, size).transpose(0, 1)
    w = qw.codes.reshape(N, groups, size).transpose(0, 1)
    zx = qx.zero_point.reshape(1, -1, 1)  # [1, M or 1, 1]
    zw = qw.zero_point.mT.unsqueeze(1)  # [groups, 1, N or 1]
    return x @ w.mT - zx * w.sum(2).unsqueeze(1) - x.sum(2).unsqueeze(2) * zw + size * zx * zw


def integer_linear(
    qx: QuantizedTensor, qw: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y `[M, N]` in `out_dtype` and the int64 accumulator `[groups, M, N]`.

    The epilogue is one rounding an operation, no fused multiply-add: the sum over groups in ascending order of
    (acc * s_x) * s_w, then + bias, then the cast.
    """
    accumulator = integer_accumulator(qx, qw)
    dtype = qx.scale.dtype
    y = torch.zeros(accumulator.shape[1:], dtype=dtype, device=accumulator.device)
    for group in range(accumulator.shape[0]):
        term = (accumulator[group].to(dtype) * qx.scale) * qw.scale[:, group].unsqueeze(0)
        y = term if group == 0 else y + term
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(out_dtype), accumulator


def fake_quant_linear_backward(
    grad_output: Tensor, qx: QuantizedTensor, qw: QuantizedTensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients of `integer_linear`, in the scales' dtype.

    grad_x = (g @ dq(W)) * mask_x `[M, K]`, grad_W = (g^T @ dq(x)) * mask_w `[N, K]`, grad_bias = sum_M g `[N]`.
    """
    g = grad_output.to(qx.scale.dtype)
    return (g @ dequantize(qw)) * qx.mask, (g.mT @ dequantize(qx)) * qw.mask, g.sum(0)
