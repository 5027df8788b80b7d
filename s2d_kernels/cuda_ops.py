"""impl="cuda": tensors to the C ABI of csrc/s2d.h, on the current stream of their device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.penalty import check_layers
from s2d_kernels.penalty_tables import DTYPES as DTYPES
from s2d_kernels.penalty_tables import penalty_tables, supports_penalty


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


@ops.implements("add_penalty_grad_", "cuda", supports_penalty)
def _add_cuda(
    grads: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    *,
    seeds: Tensor | None = None,
) -> None:
    """One launch; a second one for a gradient that is given twice. Partly overlapping gradients are not supported."""
    check_layers(grads, Us, Vhs, coefficients, ranks, seeds)
    context, stream = current_stream(grads[0])
    # What was converted lives until the launch is enqueued; its memory is reused on the same stream only.
    launches, _kept = penalty_tables(grads, Us, Vhs, coefficients, ranks, seeds)
    with context:
        for layers in launches:
            _native.add_penalty_grad(layers, stream)
