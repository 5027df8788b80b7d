"""Quantizers with impl="cuda": csrc/quantize.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.cuda_ops import DTYPES, current_stream
from s2d_kernels.cuda_svd import aligned_bytes


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
) -> tuple[Tensor | None, ...]:
    """Codes, packed codes, scale, zero_point, row_sum, mask; of the first two the one that is not wanted is None."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: impl='cuda' quantizes fp32, bf16 and fp16, else impl='torch'")
    if not _supports(x, minimum, maximum, bits, symmetric, granularity, group_size):
        raise ValueError(f"group_size={group_size}: impl='cuda' takes 8, 16, 32, 64, 128 and 256, else impl='torch'")
    rows, K = x.shape
    groups = K // group_size if group_size else 1
    scales = {"per_row": (rows, 1), "per_tensor": (1, 1), "per_group": (rows, groups)}[granularity]
    codes = None if pack else x.new_empty((rows, K), dtype=torch.int8)
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
        codes=_address(codes),
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
        workspace = aligned_bytes(needed, x.device) if needed else None
        _native.quantize(arguments, (0, 0) if workspace is None else (workspace.data_ptr(), needed), stream)
    return codes, packed, scale, zero_point, row_sum, mask


@ops.implements("quantize", "cuda", _supports)
def _quantize_cuda(*arguments: Any) -> tuple[Tensor | None, ...]:
    """One launch that reads `x` once (twice where a row is longer than 16 384); two launches and reads per tensor."""
    codes, _, *rest = _enqueue(*arguments, pack=False)
    return codes, *rest


def quantize_packed(*arguments: Any) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """The op `quantize` for 2..4 bits with packed codes instead: those, and its other outputs."""
    _, packed, *rest = _enqueue(*arguments, pack=True)
    return packed, tuple(rest)
