"""Quantizers, integer GEMM and gradients with impl="cpu": csrc/cpu/quantize.cpp and integer_linear.cpp."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from s2d_kernels import _native, _native_cpu, fixed_point, ops
from s2d_kernels._native import DTYPES as DTYPE_CODES
from s2d_kernels.int8_product import use_int8_product
from s2d_kernels.integer_gemm import check_groups
from s2d_kernels.quantizers import check_packable, code_span, row_sums

# Fewer gain less than the packing of the weight costs; the second number by pairs, with half of the products.
LEAST_ROWS, LEAST_ROWS_BY_PAIRS = 512, 64
DTYPES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}


# Memory of at most so many bytes is kept from call to call, once for each thread that calls: the system clears what it
# gives anew, page by page, which takes as long as the packing that is done in it.
KEPT_BYTES = 2**24


class _Kept(threading.local):
    memory: Tensor | None = None


_kept = _Kept()


def _workspace(count: int) -> Tensor:
    """`count` bytes of this thread's until its next call."""
    if count > KEPT_BYTES:
        return ops.aligned_bytes(count, torch.device("cpu"))
    if _kept.memory is None or _kept.memory.numel() < count:
        _kept.memory = ops.aligned_bytes(count, torch.device("cpu"))
    return _kept.memory[:count]


def _call(name: str, arguments: Any) -> None:
    run = _native_cpu.Call(name, arguments, torch.get_num_threads())
    workspace = _workspace(run.workspace_bytes())
    run(workspace.data_ptr(), workspace.numel())


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What the kernels read through a raw pointer must be what they take it for."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}: impl='cpu' reads {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _supports_quantize(x: Tensor, *_: Any) -> bool:
    return x.dtype in DTYPES


def _quantize(
    x: Tensor,
    minimum: Tensor | None,
    maximum: Tensor | None,
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int,
    *,
    pack: bool,
) -> tuple[Tensor, ...]:
    """One pass: a row is read from memory once (twice per tensor). Rows may be strided; columns are made contiguous."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: impl='cpu' quantizes fp32, bf16 and fp16, else impl='torch'")
    rows, K = x.shape
    if x.stride(1) != 1 and K > 1:
        x = x.contiguous()
    groups = K // group_size if group_size else 1
    scales = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    codes = x.new_empty((rows, K), dtype=torch.int8)
    scale = x.new_empty(scales, dtype=torch.float32)
    zero_point = x.new_empty(scales, dtype=torch.int32)
    row_sum = x.new_empty((rows, groups), dtype=torch.int32)
    mask = x.new_empty((rows, (K + 7) // 8), dtype=torch.uint8)
    packed = x.new_empty((rows, (K + 1) // 2), dtype=torch.uint8) if pack else None
    if minimum is not None and maximum is not None:
        for name, end in (("minimum", minimum), ("maximum", maximum)):
            _expect(name, end, (rows if granularity == "per_row" and end.numel() != 1 else 1,), torch.float32)
        minimum, maximum = (t.contiguous() for t in torch.broadcast_tensors(minimum, maximum))
    arguments = _native.Quantization(
        x=x.data_ptr(),
        minimum=_address(minimum),
        maximum=_address(maximum),
        codes=codes.data_ptr(),
        packed=_address(packed),
        scale=scale.data_ptr(),
        zero_point=zero_point.data_ptr(),
        row_sum=row_sum.data_ptr(),
        mask=mask.data_ptr(),
        rows=rows,
        cols=K,
        row_stride=x.stride(0),
        col_stride=1,
        range_stride=int(minimum is not None and minimum.numel() > 1),
        group_size=group_size,
        dtype=DTYPES[x.dtype],
        bits=bits,
        symmetric=symmetric,
        granularity=_native.GRANULARITIES[granularity],
    )
    _call("s2d_cpu_quantize", arguments)
    results = codes, scale, zero_point, row_sum, mask
    return results if packed is None else (*results, packed)


@ops.implements("quantize", "cpu", _supports_quantize)
def _quantize_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    return _quantize(*arguments, pack=False)


@ops.implements("quantize_packed", "cpu", _supports_quantize)
def _quantize_packed_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    check_packable(arguments[3])
    return _quantize(*arguments, pack=True)


def _multiplies_bytes() -> bool:
    """Whether the kernels here multiply bytes by fours, and AMX, which `torch._int_mm` uses, is not there."""
    return _native_cpu.capability().startswith("avx512_vnni") and not torch.cpu.get_capabilities().get("amx_int8")


def _product(
    arguments: tuple[Any, ...], bias: Tensor | None, *, out_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """y `[M, N]` or, where `out_dtype` is None, the int32 accumulator `[groups, M, N]`."""
    x_codes, x_scale, _, x_row_sum, w_codes, w_scale, _, w_row_sum, _, x_symmetric, _, w_symmetric = arguments
    (M, K), N, groups = x_codes.shape, w_codes.shape[0], w_row_sum.shape[1]
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise TypeError(f"operands quantized in {x_scale.dtype}: impl='cpu' takes fp32 scales, else impl='torch'")
    check_groups(w_scale, w_row_sum)
    for name, operand, count in (("x", arguments[:4], groups), ("w", arguments[4:8], groups)):
        codes, scale, zero_point, row_sum = operand
        _expect(f"{name}_codes", codes, (len(codes), K), torch.int8)
        _expect(f"{name}_zero_point", zero_point, tuple(scale.shape), torch.int32)
        _expect(f"{name}_row_sum", row_sum, (len(codes), row_sum.shape[1] if name == "x" else count), torch.int32)
    if x_scale.shape not in ((M, 1), (1, 1)):
        raise ValueError(f"x_scale has shape {tuple(x_scale.shape)}, expected {(M, 1)} or (1, 1)")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(N,)}")
    tensors = [t.contiguous() for t in arguments[:8]]
    if x_row_sum.shape[1] != groups:
        tensors[3] = row_sums(tensors[0], groups)
    computed = out_dtype if out_dtype in DTYPES else torch.float32
    y = None if out_dtype is None else x_codes.new_empty((M, N), dtype=computed)
    accumulator = x_codes.new_empty((groups, M, N), dtype=torch.int32) if out_dtype is None else None
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    product = _native.IntegerProduct(
        x_codes=tensors[0].data_ptr(),
        w_codes=tensors[4].data_ptr(),
        x_scale=tensors[1].data_ptr(),
        w_scale=tensors[5].data_ptr(),
        x_zero_point=tensors[2].data_ptr(),
        w_zero_point=tensors[6].data_ptr(),
        x_row_sum=tensors[3].data_ptr(),
        w_row_sum=tensors[7].data_ptr(),
        bias=_address(bias),
        y=_address(y),
        accumulator=_address(accumulator),
        M=M,
        N=N,
        K=K,
        groups=groups,
        x_per_tensor=x_scale.numel() == 1,
        w_per_tensor=w_scale.numel() == 1,
        x_symmetric=x_symmetric,
        w_symmetric=w_symmetric,
        out_dtype=0 if y is None else DTYPES[computed],
    )
    _call("s2d_cpu_integer_linear", product)
    return y if y is None or out_dtype is None else y.to(out_dtype), accumulator


def _supports_product(*arguments: Any) -> bool:
    """Where it is no slower than impl="torch", which has the same bits; rows from which on, on a Zen 4."""
    x_codes, x_scale, _, _, _, _, _, w_row_sum, x_bits, x_symmetric, w_bits, w_symmetric = arguments
    if x_scale.dtype != torch.float32 or len(x_codes) < LEAST_ROWS_BY_PAIRS:
        return False
    spans = code_span(x_bits, x_symmetric), code_span(w_bits, w_symmetric)
    by_pairs = sum(spans) <= 127 and _native_cpu.capability() == "avx512_vnni_pairs"
    if not by_pairs and len(x_codes) < LEAST_ROWS:
        return False
    if _multiplies_bytes():
        return True
    if _native_cpu.capability() not in ("avx2", "avx512"):
        return False
    depth = x_codes.shape[1] // max(w_row_sum.shape[1], 1)
    return not use_int8_product(x_codes.device, depth, min(spans[0], 128), min(spans[1], 128))


def _supports_linear(*arguments: Any) -> bool:
    *operands, _bias, x_bits, x_symmetric, w_bits, w_symmetric, _out_dtype = arguments
    return _supports_product(*operands, x_bits, x_symmetric, w_bits, w_symmetric)


@ops.implements("integer_accumulator", "cpu", _supports_product)
def _accumulator_cpu(*arguments: Any) -> Tensor | None:
    return _product(arguments, None, out_dtype=None)[1]


@ops.implements("integer_linear", "cpu", _supports_linear)
def _linear_cpu(*arguments: Any) -> Tensor | None:
    *operands, bias, x_bits, x_symmetric, w_bits, w_symmetric, out_dtype = arguments
    kinds = (x_bits, x_symmetric, w_bits, w_symmetric)
    return _product((*operands, *kinds), bias, out_dtype=out_dtype)[0]


def _takes_digits(grad: Tensor, codes: Tensor, scale: Tensor, bits: int, symmetric: bool) -> bool:
    """Where impl="torch" takes digits too: both have the same bits, whichever is chosen."""
    of_one_scale = scale.shape[1] == 1 and grad.dtype in DTYPES and scale.dtype == torch.float32
    return of_one_scale and fixed_point.serves(grad, len(codes), code_span(bits, symmetric))


def _supports_grad(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    _zero_point: Tensor,
    _mask: Tensor,
    _K: int,
    bits: int,
    symmetric: bool,
    _out_dtype: torch.dtype,
) -> bool:
    return _multiplies_bytes() and _takes_digits(grad, codes, scale, bits, symmetric)


@ops.implements("straight_through_grad", "cpu", _supports_grad)
def _grad_cpu(
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
    """`fixed_point.product`; what that does not take or is not finite goes to impl="torch"."""
    if _takes_digits(grad, codes, scale, bits, symmetric):
        out = digit_product(grad, codes, scale, zero_point, mask, K, bits, symmetric, out_dtype)
        if out is not None:
            return out
    fallback = ops.implementation("straight_through_grad", "torch")
    return fallback(grad, codes, scale, zero_point, mask, K, bits, symmetric, out_dtype)


def digit_product(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    mask: Tensor,
    K: int,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor | None:
    """The arguments of the op `straight_through_grad`; None where grad * scale is not finite."""
    rows, depth = grad.shape
    _expect("codes", codes, (depth, (K + 1) // 2 if bits <= 4 else K), torch.uint8 if bits <= 4 else torch.int8)
    _expect("scale", scale, (depth if scale.numel() != 1 else 1, 1), torch.float32)
    _expect("zero_point", zero_point, tuple(scale.shape), torch.int32)
    _expect("mask", mask, (rows, (K + 7) // 8), torch.uint8)
    scale = fixed_point.live_scale(codes, scale, zero_point, K, bits, symmetric)
    codes, scale, zero_point, mask = (t.contiguous() for t in (codes, scale, zero_point, mask))
    computed = out_dtype if out_dtype in DTYPES else torch.float32
    out = grad.new_empty((rows, K), dtype=computed)
    finite = torch.zeros((), dtype=torch.int32, device="cpu")
    arguments = _native_cpu.StraightThrough(
        grad=grad.data_ptr(),
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        zero_point=zero_point.data_ptr(),
        mask=mask.data_ptr(),
        out=out.data_ptr(),
        finite=finite.data_ptr(),
        rows=rows,
        depth=depth,
        cols=K,
        row_stride=grad.stride(0),
        depth_stride=grad.stride(1),
        dtype=DTYPES[grad.dtype],
        out_dtype=DTYPES[computed],
        bits=bits,
        symmetric=symmetric,
        per_tensor=scale.numel() == 1,
        places=fixed_point.digit_count(scale, out_dtype),
        largest_digit=fixed_point.largest_digit(bits, symmetric),
    )
    _call("s2d_cpu_straight_through_grad", arguments)
    return out.to(out_dtype) if finite else None
