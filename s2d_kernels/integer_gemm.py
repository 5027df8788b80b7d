"""The exact integer linear layer on quantized operands: `integer_accumulator` and `integer_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.int8_product import use_int8_product
from s2d_kernels.quantizers import QuantizedOperand, block_rows, code_span, exact_chunk, row_sums

_OPERAND = "Tensor {0}_codes, Tensor {0}_scale, Tensor {0}_zero_point, Tensor {0}_row_sum"
_OPERANDS = f"{_OPERAND.format('x')}, {_OPERAND.format('w')}"
_KINDS = "int x_bits, bool x_symmetric, int w_bits, bool w_symmetric"
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


def reference_operand(codes: Tensor, scale: Tensor, zero_point: Tensor) -> reference.QuantizedTensor:
    """Stored codes as `reference.py` takes them, on the CPU and without a mask."""
    return reference.QuantizedTensor(codes.cpu().long(), scale.cpu(), zero_point.cpu().long(), torch.empty(0))


@ops.implements("integer_accumulator", "reference")
def _accumulator_reference(*arguments: Any) -> Tensor:
    xc, xs, xz, _, wc, ws, wz, *_ = arguments
    qx, qw = reference_operand(xc, xs, xz), reference_operand(wc, ws, wz)
    return reference.integer_accumulator(qx, qw).to(xc.device, torch.int32)


@ops.implements("integer_linear", "reference")
def _linear_reference(*arguments: Any) -> Tensor:
    xc, xs, xz, _, wc, ws, wz, _, bias, *_, out_dtype = arguments
    qx, qw = reference_operand(xc, xs, xz), reference_operand(wc, ws, wz)
    y, _ = reference.integer_linear(qx, qw, None if bias is None else bias.cpu(), out_dtype)
    return y.to(xc.device)


def by_group(values: Tensor, parameter: Tensor) -> Tensor:
    """View of `values [rows, K]` as `[rows, groups, size]`, against which `parameter.unsqueeze(2)` broadcasts."""
    (rows, K), groups = values.shape, parameter.shape[1]
    return values.view(rows, groups, K // groups if groups else 0)


def centred(codes: Tensor, zero_point: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """codes - zero_point `[rows, K]`, exact where `dtype` holds it; int8 symmetric codes are handed back themselves."""
    if symmetric:
        return codes.to(dtype)
    values = codes.to(dtype, memory_format=torch.contiguous_format, copy=True)
    by_group(values, zero_point).sub_(zero_point.to(dtype).unsqueeze(2))
    return values


class _ExactProducts:
    """Accumulators of row blocks of quantized operands, by the fastest exact route.

    int8: one product of codes less their zero points; 8-bit asymmetric ones do not fit int8 then and keep their zero
    points, which the rank-one terms of the definition take out afterwards.
    Otherwise an fp32 GEMM of the same integers, cut along K into chunks of which each is exact.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        xc, _, xz, x_sum, wc, _, wz, w_sum, x_bits, x_symmetric, w_bits, w_symmetric = arguments
        x_span, w_span = code_span(x_bits, x_symmetric), code_span(w_bits, w_symmetric)
        self.groups = w_sum.shape[1]
        self.size = xc.shape[1] // self.groups if self.groups else 0
        self.chunk = exact_chunk(x_span, w_span)
        self.x_offsets = self.w_offsets = None
        self.int8 = use_int8_product(xc.device, self.size, min(x_span, 128), min(w_span, 128))
        dtype = torch.int8 if self.int8 else torch.float32
        x_wide, w_wide = self.int8 and x_span > 127, self.int8 and w_span > 127
        self.x = xc if x_wide else centred(xc, xz, x_symmetric, dtype)
        self.w = wc if w_wide else centred(wc, wz, w_symmetric, dtype)
        if x_wide:  # - z_x rowsum(Qw)
            self.x_offsets = xz, (w_sum if w_wide or w_symmetric else row_sums(self.w, self.groups)).mT
        if w_wide:  # - (rowsum(Qx) - K z_x) z_w
            x_sum = x_sum - self.size * xz if x_wide else row_sums(self.x, self.groups)
            self.w_offsets = x_sum, wz.mT

    def __call__(self, rows: slice, group: int) -> Tensor:
        """`[rows, N]`, int32, or fp32 where one exact GEMM made it."""
        first, last = group * self.size, (group + 1) * self.size
        if not self.int8:
            return self._chunked(self.x[rows, first:last], self.w[:, first:last].mT)
        total = torch._int_mm(self.x[rows, first:last], self.w[:, first:last].mT)
        for offsets in (self.x_offsets, self.w_offsets):
            if offsets is not None:
                of_x, of_w = offsets
                of_x = of_x if len(of_x) == 1 else of_x[rows]
                of_x = of_x[:, group : group + 1] if of_x.shape[1] > 1 else of_x
                total.addcmul_(of_x, of_w[group] if len(of_w) > 1 else of_w[0], value=-1)
        return total

    def _chunked(self, x: Tensor, w: Tensor) -> Tensor:
        total = x[:, : self.chunk] @ w[: self.chunk]
        if self.size > self.chunk:
            total = total.to(torch.int32)
            for start in range(self.chunk, self.size, self.chunk):
                stop = start + self.chunk
                total += (x[:, start:stop] @ w[start:stop]).to(torch.int32)
        return total


@ops.implements("integer_accumulator", "torch")
def _accumulator_torch(*arguments: Any) -> Tensor:
    product = _ExactProducts(arguments)
    out = product.x.new_empty((product.groups, len(product.x), len(product.w)), dtype=torch.int32)
    for group in range(product.groups):
        out[group] = product(slice(None), group)
    return out


@ops.implements("integer_linear", "torch")
def _linear_torch(*arguments: Any) -> Tensor:
    *operands, bias, x_bits, x_symmetric, w_bits, w_symmetric, out_dtype = arguments
    x_scale, w_scale = operands[1], operands[5]
    product = _ExactProducts((*operands, x_bits, x_symmetric, w_bits, w_symmetric))
    M, N = len(product.x), len(product.w)
    dtype = x_scale.dtype
    y = product.x.new_empty((M, N), dtype=out_dtype)
    step = block_rows(N, y.device, M)
    if product.groups == 1:
        step *= 8  # each product packs the weight anew: fewer of them gain more than a warmer epilogue
    for start in range(0, M, step):
        rows = slice(start, start + step)
        total = y[rows] if out_dtype == dtype else torch.empty_like(y[rows], dtype=dtype)
        if product.groups == 0:
            total.zero_()
        # One rounding an operation: a fused multiply-add would give other bits than the definition.
        for group in range(product.groups):
            term = total.copy_(product(rows, group)) if group == 0 else product(rows, group).to(dtype)
            term.mul_(x_scale if len(x_scale) == 1 else x_scale[rows])
            term.mul_(w_scale[:, group if w_scale.shape[1] > 1 else 0])
            if group:
                total += term
        if bias is not None:
            total += bias.to(dtype)
        if out_dtype != dtype:
            y[rows] = total
    return y


# --- Public functions -------------------------------------------------------------------------------------------------


def _check_operands(qx: QuantizedOperand, qw: QuantizedOperand) -> tuple[QuantizedOperand, QuantizedOperand]:
    (M, K), (N, w_K) = qx.codes.shape, qw.codes.shape
    if w_K != K:
        raise ValueError(f"qx.codes is [{M}, {K}] but qw.codes is [{N}, {w_K}]: both need the same K")
    if qx.codes.device != qw.codes.device:
        raise ValueError(f"qx is on {qx.codes.device} but qw on {qw.codes.device}: move both to one device")
    if qx.scale.dtype != qw.scale.dtype:
        raise TypeError(f"qx was quantized in {qx.scale.dtype} but qw in {qw.scale.dtype}: convert one input first")
    if qx.scale.shape not in ((M, 1), (1, 1)):
        raise ValueError(f"qx.scale is {tuple(qx.scale.shape)}: activations have one a token [{M}, 1], or [1, 1]")
    check_groups(qw.scale, qw.row_sum)
    qx, qw = _stored("qx", qx), _stored("qw", qw)
    groups = qw.row_sum.shape[1]
    check_accumulator_range(K // groups if groups else 0, (qx.bits, qx.symmetric), (qw.bits, qw.symmetric))
    if qx.row_sum.shape[1] != groups:
        qx = qx._replace(row_sum=row_sums(qx.codes, groups))
    return qx, qw


def _stored(name: str, q: QuantizedOperand) -> QuantizedOperand:
    """`q` in its storage dtypes, checked: the kernels read raw memory."""
    if q.codes.dtype != torch.int8:
        raise TypeError(f"{name}.codes has dtype {q.codes.dtype}: they are stored as int8, asymmetric 8-bit ones - 128")
    if q.zero_point.shape != q.scale.shape:
        raise ValueError(f"{name}.zero_point is {tuple(q.zero_point.shape)}, {name}.scale {tuple(q.scale.shape)}")
    if q.row_sum.ndim != 2 or len(q.row_sum) != len(q.codes):
        raise ValueError(f"{name}.row_sum is {tuple(q.row_sum.shape)}, expected [{len(q.codes)}, groups]")
    return q._replace(zero_point=q.zero_point.to(torch.int32), row_sum=q.row_sum.to(torch.int32))


def check_groups(scale: Tensor, row_sum: Tensor) -> None:
    """Raise unless a weight whose rows have several groups `[N, groups]` has as many scales, and others one."""
    N, groups = row_sum.shape
    if scale.shape != row_sum.shape and not (groups == 1 and scale.shape == (1, 1)):
        raise ValueError(
            f"w_scale {tuple(scale.shape)} does not fit {groups} groups of {N} rows: it must be [N, groups]"
        )


def check_accumulator_range(size: int, x_kind: tuple[int, bool], w_kind: tuple[int, bool]) -> None:
    """Raise if an accumulator over `size` columns could overflow int32."""
    limit = (2**31 - 1) // (code_span(*x_kind) * code_span(*w_kind))
    if size > limit:
        raise ValueError(
            f"K={size} at {x_kind[0]}-bit activations and {w_kind[0]}-bit weights can overflow the int32 accumulator "
            f"(K <= {limit}): use fewer bits or weight_granularity='per_group'"
        )


@torch.no_grad()
def integer_accumulator(qx: QuantizedOperand, qw: QuantizedOperand, *, impl: str | None = None) -> Tensor:
    """Exact integer products with the zero points removed: sum_k (qx - z_x)(qw - z_w) per group.

    Args:
        qx: activations, codes `[M, K]`.
        qw: weight, codes `[N, K]`.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses.

    Returns:
        `[groups, M, N]` int32, one group unless the weight is quantized per group.

    Raises:
        ValueError: K or device differ, scales do not fit, or K is so large that int32 could overflow.
        TypeError: one operand comes from fp64 and the other does not.

    Accuracy: exact, hence equal on every impl.
    """
    qx, qw = _check_operands(qx, qw)
    kinds = (qx.bits, qx.symmetric, qw.bits, qw.symmetric)
    return torch.ops.s2d.integer_accumulator(*qx[:4], *qw[:4], *kinds, impl)


@torch.no_grad()
def integer_linear(
    qx: QuantizedOperand,
    qw: QuantizedOperand,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = s_x s_w sum_k (qx - z_x)(qw - z_w) + bias, the sum in exact integers.

    Not differentiable: y requires no gradient, whatever `bias` and the operands were made from. `fake_quant_linear` is
    what trains.

    Args:
        qx: activations, codes `[M, K]`.
        qw: weight, codes `[N, K]`.
        bias: `[N]`, floating.
        out_dtype: of the result; default the scales' dtype.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses.

    Returns:
        `[M, N]`: (acc * s_x) * s_w, summed over groups in ascending order, + bias, one rounding each, then the cast.

    Raises:
        TypeError, ValueError: as `integer_accumulator`; a bias that is not `[N]`.

    Accuracy: same bits from every impl.
    """
    qx, qw = _check_operands(qx, qw)
    check_bias(bias, qw.codes.shape[0], qx.codes.device)
    kinds = (qx.bits, qx.symmetric, qw.bits, qw.symmetric)
    return torch.ops.s2d.integer_linear(*qx[:4], *qw[:4], bias, *kinds, out_dtype or qx.scale.dtype, impl)


def check_bias(bias: Tensor | None, N: int, device: torch.device) -> None:
    """Raise unless `bias` is None or a dense `[N]` tensor on `device`."""
    if bias is not None:
        ops.check_tensor("bias", bias, ndim=1, device=device)
        if bias.shape[0] != N:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, but the weight has {N} output channels: pass [{N}]")
