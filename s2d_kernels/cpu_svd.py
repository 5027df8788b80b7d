"""`topk_svd` with impl="cpu": csrc/cpu/topk_svd.cpp, one matrix per thread, large ones by all threads."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import _native_cpu, ops
from s2d_kernels._native import DTYPES, SvdLayer
from s2d_kernels.svd import FAILURE_PROBABILITY, TOLERANCE, check_start

_DTYPES = {getattr(torch, name): code for name, code in DTYPES.items()}


def _problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it takes tensors on the CPU, these are on {device}"
    return _native_cpu.problem()


def _supports(weights: list[Tensor], _starts: list[Tensor], _ks: list[int], _reads: list[int]) -> bool:
    return all(weight.dtype in _DTYPES for weight in weights)


ops.declare_problem("cpu", _problem)


@ops.implements("topk_svd", "cpu", _supports)
def _topk_svd_cpu(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], *, max_sms: int | None = None
) -> list[Tensor]:
    flat: list[Tensor] = []
    layers = []
    kept = []  # alive until the work is done
    for index, (weight, start, k, passes) in enumerate(zip(weights, starts, ks, reads, strict=True)):
        (m, n), b = weight.shape, start.shape[0]
        if weight.dtype not in _DTYPES:
            raise TypeError(
                f"weights[{index}] has dtype {weight.dtype}: impl='cpu' takes fp32, bf16 and fp16, else impl='torch'"
            )
        check_start(index, weight, start, k, passes)
        if weight.device.type != "cpu" or start.device.type != "cpu":
            raise ValueError(f"weights[{index}] is on {weight.device}, its start on {start.device}: expected the CPU")
        start = start.contiguous()
        kept.append(start)
        outputs = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((m, b), (b,), (b, n), (b,), ())]
        outputs.append(torch.empty((), dtype=torch.int32, device="cpu"))
        flat += outputs
        layers.append(
            SvdLayer(
                weight.data_ptr(),
                start.data_ptr(),
                *(tensor.data_ptr() for tensor in outputs),
                rows=m,
                cols=n,
                row_stride=weight.stride(0),
                col_stride=weight.stride(1),
                dtype=_DTYPES[weight.dtype],
                width=b,
                k=k,
                reads=min(passes, m, n),  # from d / b on, one pass is exact
            )
        )
    run = _native_cpu.SvdRun(layers, torch.get_num_threads())
    workspace = ops.aligned_bytes(run.workspace_bytes(), weights[0].device)
    run(TOLERANCE, FAILURE_PROBABILITY, workspace.data_ptr(), workspace.numel())
    return flat
