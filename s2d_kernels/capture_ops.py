"""`capture_largest_`: the largest |y - bias| of a layer's output kept over calls, in one pass and without the host."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.cuda_ops import DTYPES, current_stream

ops.define(
    "capture_largest_",
    "Tensor(a!) value, Tensor(b!) place, Tensor(c!) row, Tensor y, Tensor x, Tensor? bias, Tensor? enabled -> ()",
    lambda *_: None,
)


def capture_largest_(
    value: Tensor,
    place: Tensor,
    row: Tensor,
    y: Tensor,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    enabled: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Replace what is kept by the largest |y - bias| of this call, where that is larger.

    Args:
        value: 0-dim fp32, the largest so far; -1 at first.
        place: int64 `[2]`, its neuron, and its row of `x` in the call that made it.
        row: fp32 `[n]`, that row.
        y: `[tokens, m]` fp32, bf16, fp16 or fp64.
        x: `[tokens, n]`, the input that gave y.
        bias: `[m]`, which does not count (eq. 2).
        enabled: 0-dim bool or uint8 on the device; where it is 0 nothing changes. So the operation can stay in a CUDA
            graph or a compiled model and act on some steps only.
        impl: "torch", "triton", "cuda", or None to choose.

    Raises:
        TypeError, ValueError: naming the tensor that does not fit. Nothing is written then.

    Of equal values the first in the order of rows, then of neurons, stays; an earlier call's too. NaN never counts, an
    infinity only where its row of `x` is finite.

    Cost: y read once, and one row of x; with impl="torch" y in a few passes, and all of x on a GPU.
    Determinism: same inputs give the same bits on every implementation.
    Streams: no synchronization; can be captured in a CUDA graph.
    """
    ops.check_tensor("value", value, ndim=0, dtypes=(torch.float32,))
    ops.check_tensor("place", place, ndim=1, dtypes=(torch.int64,), device=value.device)
    ops.check_tensor("row", row, ndim=1, dtypes=(torch.float32,), device=value.device)
    ops.check_tensor("y", y, ndim=2, device=value.device)
    ops.check_tensor("x", x, ndim=2, device=value.device)
    if len(place) != 2 or not (place.is_contiguous() and row.is_contiguous()):
        raise ValueError(f"place must be a contiguous [2] and row contiguous, got {tuple(place.shape)} {row.stride()}")
    if len(x) != len(y) or x.shape[1] != len(row):
        raise ValueError(f"x {tuple(x.shape)} does not fit y {tuple(y.shape)} and row {tuple(row.shape)}")
    if bias is not None and ops.check_tensor("bias", bias, ndim=1, device=value.device).shape[0] != y.shape[1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit y {tuple(y.shape)}")
    if enabled is not None:
        ops.check_tensor("enabled", enabled, ndim=0, dtypes=(torch.bool, torch.uint8), device=value.device)
    torch.ops.s2d.capture_largest_(value, place, row, y, x, bias, enabled, impl)


@ops.implements("capture_largest_", "torch")
def _capture_torch(
    value: Tensor, place: Tensor, row: Tensor, y: Tensor, x: Tensor, bias: Tensor | None, enabled: Tensor | None
) -> None:
    if y.numel() == 0:
        return
    if y.device.type == "cpu" and _capture_finite(value, place, row, y, x, bias, enabled):
        return
    magnitude = (y.float() if bias is None else y.float() - bias.float()).abs()
    usable = ~magnitude.isnan() & (magnitude.isfinite() | x.isfinite().all(1, keepdim=True))
    best, flat = torch.where(usable, magnitude, -1.0).flatten().max(0)
    token = flat // y.shape[1]
    larger = best > value
    if enabled is not None:
        larger = larger & (enabled != 0)
    found = torch.stack([flat % y.shape[1], token])
    value.copy_(torch.where(larger, best, value))
    place.copy_(torch.where(larger, found, place))
    row.copy_(torch.where(larger, x.index_select(0, token.reshape(1)).squeeze(0).float(), row))


def _capture_finite(
    value: Tensor, place: Tensor, row: Tensor, y: Tensor, x: Tensor, bias: Tensor | None, enabled: Tensor | None
) -> bool:
    """The same where the host may look at values, in a tenth of the time; False, and nothing done, at a NaN or Inf.

    A maximum with its place over all of y costs many times a maximum by rows: the place is looked for in one row.
    """
    if enabled is not None and not enabled:
        return True
    magnitude = y.abs().float() if bias is None else (y.float() - bias.float()).abs_()
    by_row = magnitude.amax(1)  # NaN where the row holds one
    token = by_row.argmax()
    best = by_row[token]
    if not best.isfinite():
        return False
    if best > value:
        value.copy_(best)
        place.copy_(torch.stack([magnitude[token].argmax(), token]))
        row.copy_(x[token])
    return True


def _supports(
    _value: Tensor, _place: Tensor, _row: Tensor, y: Tensor, x: Tensor, _bias: Tensor | None, _enabled: Tensor | None
) -> bool:
    return y.dtype in DTYPES and x.dtype in DTYPES


@ops.implements("capture_largest_", "cuda", _supports)
def _capture_cuda(
    value: Tensor, place: Tensor, row: Tensor, y: Tensor, x: Tensor, bias: Tensor | None, enabled: Tensor | None
) -> None:
    for name, tensor in (("y", y), ("x", x)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}: impl='cuda' takes fp32, bf16 and fp16")
    y, x = (t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous() for t in (y, x))
    bias = None if bias is None else bias.float().contiguous()
    context, stream = current_stream(y)
    call = _native.CaptureCall(
        y.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if enabled is None else enabled.data_ptr(),
        value.data_ptr(),
        place.data_ptr(),
        row.data_ptr(),
        *y.shape,
        x.shape[1],
        y.stride(0),
        x.stride(0),
        DTYPES[y.dtype],
        DTYPES[x.dtype],
    )
    with context:
        size = _native.capture_workspace_bytes(call)
        workspace = torch.empty(size + 256, dtype=torch.uint8, device=y.device)
        _native.capture(call, -(-workspace.data_ptr() // 256) * 256, size, stream)
