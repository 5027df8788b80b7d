"""impl="cuda": tensors to the C ABI of csrc/s2d.h, on the current stream of their device."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.penalty import check_layers

DTYPES = {
    torch.float32: _native.DTYPES["float32"],
    torch.bfloat16: _native.DTYPES["bfloat16"],
    torch.float16: _native.DTYPES["float16"],
}


def current_stream(tensor: Tensor) -> tuple[AbstractContextManager[object], int]:
    """Context in which to launch for `tensor`, and its stream; ValueError where the library cannot take it."""
    if _native.emulated():
        if tensor.device.type != "cpu":
            raise ValueError(f"S2D_NATIVE=emulated runs on CPU tensors, got one on {tensor.device}: unset it")
        return nullcontext(), 0
    if tensor.device.type != "cuda":
        raise ValueError(
            f"impl='cuda' needs CUDA tensors, got one on {tensor.device}: move it, leave impl=None, or set "
            "S2D_NATIVE=emulated to run the CUDA sources on the CPU"
        )
    return torch.cuda.device(tensor.device), torch.cuda.current_stream(tensor.device).cuda_stream


def _penalty_layer(
    index: int, grad: Tensor, U: Tensor, Vh: Tensor, coefficients: Tensor, ranks: Tensor | None
) -> _native.PenaltyLayer:
    """One row of the pointer table; the tensors must outlive the enqueueing."""
    if grad.dtype not in DTYPES:
        raise TypeError(
            f"grads[{index}] has dtype {grad.dtype}: impl='cuda' takes fp32, bf16 and fp16, else impl='torch'"
        )
    if grad.stride(1) != 1 and grad.shape[1] > 1:
        raise ValueError(f"grads[{index}] has stride {grad.stride()}: impl='cuda' needs contiguous columns")
    if coefficients.shape[0] > _native.MAX_RANK:
        raise ValueError(
            f"grads[{index}] gets {coefficients.shape[0]} components: impl='cuda' takes {_native.MAX_RANK}"
        )
    return _native.PenaltyLayer(
        grad=grad.data_ptr(),
        U=U.data_ptr(),
        Vh=Vh.data_ptr(),
        coefficients=coefficients.data_ptr(),
        device_rank=None if ranks is None else ranks.data_ptr() + 4 * index,
        rows=grad.shape[0],
        cols=grad.shape[1],
        grad_stride=grad.stride(0),
        u_row_stride=U.stride(0),
        u_col_stride=U.stride(1),
        vh_stride=Vh.stride(0),
        rank=coefficients.shape[0],
        dtype=DTYPES[grad.dtype],
    )


@cache
def _device_problem(index: int, path: str) -> str | None:
    with torch.cuda.device(index):
        return _native.device_problem()


def _problem(device: torch.device) -> str | None:
    """No library, one for other devices, or a GPU or driver it cannot run on."""
    problem = _native.problem()
    if problem is not None or device.type != "cuda":
        return problem
    if _native.emulated():
        return f"the library at {_native.library_path()} is the emulation, which takes CPU tensors"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _device_problem(index, str(_native.library_path()))


ops.declare_problem("cuda", _problem)


def _supports(
    grads: list[Tensor], _us: list[Tensor], _vhs: list[Tensor], coefficients: list[Tensor], _ranks: Tensor | None
) -> bool:
    return all(
        g.dtype in DTYPES and (g.stride(1) == 1 or g.shape[1] <= 1) and len(c) <= _native.MAX_RANK
        for g, c in zip(grads, coefficients, strict=True)
    )


@ops.implements("add_penalty_grad_", "cuda", _supports)
def _add_cuda(
    grads: list[Tensor], Us: list[Tensor], Vhs: list[Tensor], coefficients: list[Tensor], ranks: Tensor | None
) -> None:
    """One launch; a second one for a gradient that is given twice. Partly overlapping gradients are not supported."""
    check_layers(grads, Us, Vhs, coefficients, ranks)
    context, stream = current_stream(grads[0])
    # The converted copies live until the launch is enqueued; the allocator reuses their memory on the same stream only.
    kept = []
    launches: dict[int, list[_native.PenaltyLayer]] = {}
    earlier: Counter[int] = Counter()
    if ranks is not None:
        ranks = ranks.contiguous()
    for index, (grad, U, Vh, c) in enumerate(zip(grads, Us, Vhs, coefficients, strict=True)):
        operands = U.float(), Vh.float(), c.float().contiguous()
        if operands[1].stride(1) != 1 and operands[1].shape[1] > 1:
            operands = operands[0], operands[1].contiguous(), operands[2]
        kept.append(operands)
        layer = _penalty_layer(index, grad, *operands, ranks)
        launches.setdefault(earlier[grad.data_ptr()], []).append(layer)
        earlier[grad.data_ptr()] += 1
    with context:
        for layers in launches.values():
            _native.add_penalty_grad(layers, stream)
