"""`topk_svd` with impl="cuda": the primitives of csrc/topk_svd.cu, all matrices of a call in each launch."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.cuda_ops import DTYPES, current_stream
from s2d_kernels.svd import FAILURE_PROBABILITY, TOLERANCE, block_krylov


class _Table:
    """`Primitives` over a table of matrices of any shapes."""

    def __init__(self, weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int]) -> None:
        self.outputs: list[Tensor] = []
        layers = []
        self.starts = [start.contiguous() for start in starts]
        for weight, start, k, passes in zip(weights, self.starts, ks, reads, strict=True):
            (m, n), b = weight.shape, start.shape[0]
            outputs = [start.new_empty(shape) for shape in ((m, b), (b,), (b, n), (b,), ())]
            outputs.append(start.new_empty((), dtype=torch.int32))
            self.outputs += outputs
            layers.append(
                _native.SvdLayer(
                    weight.data_ptr(),
                    start.data_ptr(),
                    *(tensor.data_ptr() for tensor in outputs),
                    rows=m,
                    cols=n,
                    row_stride=weight.stride(0),
                    col_stride=weight.stride(1),
                    dtype=DTYPES[weight.dtype],
                    width=b,
                    k=k,
                    reads=passes,
                )
            )
        self.context, stream = current_stream(weights[0])
        self.run = _native.SvdRun(layers, stream)
        self.weights = weights  # alive until everything is enqueued
        self.reads = max(reads)

    def begin(self) -> None:
        self.workspace = _aligned_bytes(self.run.workspace_bytes(), self.weights[0].device)
        self.run.workspace = self.workspace.data_ptr(), self.workspace.numel()
        self.run.call("begin")

    def product(self, step: int) -> None:
        self.run.call("product", step)

    def orthonormalize(self, step: int) -> None:
        self.run.call("orthonormalize", step)

    def finish(self) -> list[Tensor]:
        self.run.call("finish", TOLERANCE, FAILURE_PROBABILITY)
        return self.outputs


def _aligned_bytes(count: int, device: torch.device) -> Tensor:
    """Uninitialized bytes that start at a multiple of 256; torch's CPU allocator promises only 64."""
    alignment = 256
    memory = torch.empty(count + alignment, dtype=torch.uint8, device=device)
    offset = -memory.data_ptr() % alignment
    return memory[offset : offset + count]


def _supports(weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int]) -> bool:
    if any(weight.dtype not in DTYPES for weight in weights):
        return False
    table = _Table(weights, starts, ks, reads)
    with table.context:
        return table.run.supported()


@ops.implements("topk_svd", "cuda", _supports)
def _topk_svd_cuda(weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int]) -> list[Tensor]:
    for index, weight in enumerate(weights):
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"weights[{index}] has dtype {weight.dtype}: impl='cuda' takes fp32, bf16 and fp16, else impl='torch'"
            )
    table = _Table(weights, starts, ks, reads)
    with table.context:
        return block_krylov(table)
