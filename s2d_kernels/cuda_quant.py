"""Quantizers and integer GEMM with impl="cuda": csrc/quantize.cu and csrc/w4a4_gemm.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.cuda_ops import DTYPES, current_stream
from s2d_kernels.integer_gemm import check_groups
from s2d_kernels.quantizers import check_packable

# Compute capabilities whose tensor cores multiply 4-bit integers; later ones emulate it with 8-bit products.
INT4_CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9))
# Rows of x from which 4-bit products gain more than the packing of int8 codes costs.
INT4_LEAST_ROWS = 128
# Columns a group must be a multiple of: what one tensor-core instruction multiplies.
INT8_STEP, INT4_STEP = 32, 64
HOPPER = 9


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _group_size_fits(group_size: int) -> bool:
    return group_size in (0, 8, 16, 32, 64, 128, 256)


def _supports(
    x: Tensor,
    _minimum: Tensor | None,
    _maximum: Tensor | None,
    _bits: int,
    _symmetric: bool,
    _granularity: str,
    group_size: int,
) -> bool:
    return x.dtype in DTYPES and (_group_size_fits(group_size) or x.shape[1] == 0)


def _enqueue(
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
    """Codes, scale, zero_point, row_sum, mask and, with `pack`, packed codes.

    One launch that reads `x` once (twice where a row is longer than 16 384); two launches and reads per tensor.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: impl='cuda' quantizes fp32, bf16 and fp16, else impl='torch'")
    if not _supports(x, minimum, maximum, bits, symmetric, granularity, group_size):
        raise ValueError(f"group_size={group_size}: impl='cuda' takes 8, 16, 32, 64, 128 and 256, else impl='torch'")
    rows, K = x.shape
    groups = K // group_size if group_size else 1
    scales = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    codes = x.new_empty((rows, K), dtype=torch.int8)
    packed = x.new_empty((rows, (K + 1) // 2), dtype=torch.uint8) if pack else None
    scale = x.new_empty(scales, dtype=torch.float32)
    zero_point = x.new_empty(scales, dtype=torch.int32)
    row_sum = x.new_empty((rows, groups), dtype=torch.int32)
    mask = x.new_empty((rows, (K + 7) // 8), dtype=torch.uint8)
    if minimum is not None and maximum is not None:
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
        col_stride=x.stride(1),
        range_stride=int(minimum is not None and minimum.numel() > 1),
        group_size=group_size,
        dtype=DTYPES[x.dtype],
        bits=bits,
        symmetric=symmetric,
        granularity=_native.GRANULARITIES[granularity],
    )
    context, stream = current_stream(x)
    with context:
        needed = _native.quantize_workspace(arguments)
        workspace = ops.aligned_bytes(needed, x.device) if needed else None
        _native.quantize(arguments, (0, 0) if workspace is None else (workspace.data_ptr(), needed), stream)
    results = codes, scale, zero_point, row_sum, mask
    return results if packed is None else (*results, packed)


@ops.implements("quantize", "cuda", _supports)
def _quantize_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    return _enqueue(*arguments, pack=False)


@ops.implements("quantize_packed", "cuda", _supports)
def _quantize_packed_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    check_packable(arguments[3])
    return _enqueue(*arguments, pack=True)


def _product(
    arguments: tuple[Any, ...], bias: Tensor | None, y: Tensor | None, accumulator: Tensor | None, packed: bool
) -> _native.IntegerProduct:
    """The arguments of `s2d_integer_linear`; `arguments` as of the op `integer_accumulator`, codes packed or not."""
    xc, x_scale, xz, xr, wc, w_scale, wz, wr, _, x_symmetric, _, w_symmetric, K = arguments
    return _native.IntegerProduct(
        x_codes=xc.data_ptr(),
        w_codes=wc.data_ptr(),
        x_scale=x_scale.data_ptr(),
        w_scale=w_scale.data_ptr(),
        x_zero_point=xz.data_ptr(),
        w_zero_point=wz.data_ptr(),
        x_row_sum=xr.data_ptr(),
        w_row_sum=wr.data_ptr(),
        bias=_address(bias),
        y=_address(y),
        accumulator=_address(accumulator),
        M=xc.shape[0],
        N=wc.shape[0],
        K=K,
        groups=wr.shape[1],
        x_per_tensor=x_scale.numel() == 1,
        w_per_tensor=w_scale.numel() == 1,
        x_symmetric=x_symmetric,
        w_symmetric=w_symmetric,
        packed=packed,
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        out_dtype=0 if y is None else DTYPES[y.dtype],
    )


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of at most 4 bits, int8 `[rows, K]`, to two a byte, uint8 `[rows, ceil(K / 2)]`."""
    rows, K = codes.shape
    codes = codes.contiguous()
    if codes.data_ptr() % 8:
        codes = codes.clone()
    packed = codes.new_empty((rows, (K + 1) // 2), dtype=torch.uint8)
    context, stream = current_stream(codes)
    with context:
        _native.pack_codes(codes.data_ptr(), packed.data_ptr(), rows, K, stream)
    return packed


def _group_fits(K: int, groups: int, step: int) -> bool:
    return groups <= 1 or K // groups % step == 0


def packing_helps(M: int, K: int, groups: int, kinds: tuple[int, bool, int, bool], device: torch.device) -> bool:
    """Whether the product is made of 4-bit codes: where the device multiplies them and they are worth the packing."""
    x_bits, _, w_bits, w_symmetric = kinds
    if device.type != "cuda" or max(x_bits, w_bits) > 4 or not w_symmetric or M < INT4_LEAST_ROWS:
        return False
    return torch.cuda.get_device_capability(device) in INT4_CAPABILITIES and _group_fits(K, groups, INT4_STEP)


def integer_product(
    arguments: tuple[Any, ...],
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None,
    with_accumulator: bool = False,
    packed: bool | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """y `[M, N]` (None where `out_dtype` is) and the int32 accumulator `[groups, M, N]` (None unless wanted).

    `arguments` are those of the op `integer_accumulator`; `packed` None chooses between 8- and 4-bit products.
    """
    x_codes, x_scale, _, _, w_codes, w_scale, _, w_row_sum, *kinds = arguments
    (M, K), N, groups = x_codes.shape, w_codes.shape[0], w_row_sum.shape[1]
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise TypeError(f"operands quantized in {x_scale.dtype}: impl='cuda' takes fp32 scales, else impl='torch'")
    if not _group_fits(K, groups, INT8_STEP):
        raise ValueError(
            f"group_size={K // groups}: impl='cuda' multiplies groups of a multiple of {INT8_STEP}, else impl='torch'"
        )
    check_groups(w_scale, w_row_sum)
    tensors = [t.contiguous() for t in arguments[:8]]
    if packed is None:
        packed = packing_helps(M, K, groups, tuple(kinds), x_codes.device)
    if packed:
        tensors[0], tensors[4] = pack_codes(tensors[0]), pack_codes(tensors[4])
    computed = torch.float32 if out_dtype is not None and out_dtype not in DTYPES else out_dtype
    y = None if computed is None else x_codes.new_empty((M, N), dtype=computed)
    accumulator = x_codes.new_empty((groups, M, N), dtype=torch.int32) if with_accumulator else None
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    context, stream = current_stream(x_codes)
    with context:
        _native.integer_linear(_product((*tensors, *kinds, K), bias, y, accumulator, packed), stream)
    return y if y is None else y.to(out_dtype), accumulator


def _supports_product(*arguments: Any) -> bool:
    x_codes, x_scale, *_ = arguments
    (M, K), groups = x_codes.shape, arguments[7].shape[1]
    if x_scale.dtype != torch.float32 or not _group_fits(K, groups, INT8_STEP):
        return False
    # Hopper reaches its full rate through wgmma alone, which the Triton kernel uses, for the groups that it takes.
    device = x_codes.device
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
    return not (hopper and M > 32 and ops.takes("integer_linear", "triton", device, arguments))


@ops.implements("integer_accumulator", "cuda", _supports_product)
def _accumulator_cuda(*arguments: Any) -> Tensor | None:
    return integer_product(arguments, out_dtype=None, with_accumulator=True)[1]


@ops.implements("integer_linear", "cuda", _supports_product)
def _linear_cuda(*arguments: Any) -> Tensor | None:
    *operands, bias, x_bits, x_symmetric, w_bits, w_symmetric, out_dtype = arguments
    kinds = (x_bits, x_symmetric, w_bits, w_symmetric)
    return integer_product((*operands, *kinds), bias, out_dtype=out_dtype)[0]


@ops.implements("straight_through_grad", "cuda", lambda *_: False)
def _grad_without_kernel(*arguments: Any) -> Tensor:
    """There is no CUDA C++ kernel of the gradient: what impl=None would choose makes that of a layer of impl="cuda"."""
    chosen = ops.choose("straight_through_grad", None, arguments[0].device, arguments)
    return ops.implementation("straight_through_grad", chosen)(*arguments)
