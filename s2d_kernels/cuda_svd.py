"""`topk_svd` with impl="cuda": the primitives of csrc/topk_svd.cu, all matrices of a call in each launch."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.cuda_ops import DTYPES, current_stream
from s2d_kernels.svd import FAILURE_PROBABILITY, TOLERANCE, block_krylov, check_start

# What s2d_topk_svd_check refuses on any device (csrc/s2d.h).
MAX_COLUMNS = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 4096}
MAX_WIDTH = 32
MAX_ROWS = 256
# `team` of s2d_svd_layer, of every matrix: 0 lets the library choose, -1 streams all, a number is that of blocks.
TEAM = 0


def _layer(weight: Tensor, start: Tensor, k: int, reads: int, outputs: list[Tensor]) -> _native.SvdLayer:
    """A row of the table; `outputs` in the order of the op's results."""
    return _native.SvdLayer(
        weight.data_ptr(),
        start.data_ptr(),
        *(tensor.data_ptr() for tensor in outputs),
        rows=weight.shape[0],
        cols=weight.shape[1],
        row_stride=weight.stride(0),
        col_stride=weight.stride(1),
        dtype=DTYPES[weight.dtype],
        width=start.shape[0],
        k=k,
        reads=reads,
        team=TEAM,
    )


class _Table:
    """`Primitives` over a table of matrices of any shapes."""

    def __init__(
        self, weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], max_sms: int | None = None
    ) -> None:
        self.max_blocks = max_sms or 0  # to the library 0 is no limit
        self.weights = weights  # alive until everything is enqueued
        self.starts = [start.contiguous() for start in starts]
        self.reads = max(reads)
        self.outputs: list[Tensor] = []
        layers = []
        for weight, start, k, passes in zip(weights, self.starts, ks, reads, strict=True):
            (m, n), b = weight.shape, start.shape[0]
            outputs = [start.new_empty(shape) for shape in ((m, b), (b,), (b, n), (b,), ())]
            outputs.append(start.new_empty((), dtype=torch.int32))
            self.outputs += outputs
            layers.append(_layer(weight, start, k, passes, outputs))
        self.context, stream = current_stream(weights[0])
        self.run = _native.SvdRun(layers, stream)

    def begin(self) -> None:
        self.workspace = ops.aligned_bytes(self.run.workspace_bytes(), self.weights[0].device)
        self.run.workspace = self.workspace.data_ptr(), self.workspace.numel()
        self.run.call("begin")
        self.run.call("resident", self.max_blocks)

    def product(self, step: int) -> None:
        self.run.call("product", step)

    def orthonormalize(self, step: int) -> None:
        self.run.call("orthonormalize", step)

    def finish(self) -> list[Tensor]:
        self.run.call("finish", TOLERANCE, FAILURE_PROBABILITY)
        return self.outputs


def _refuse(index: int, weight: Tensor, start: Tensor, reads: int) -> None:
    """Say of a matrix that the library does not take which of its limits it exceeds."""
    d, b = min(weight.shape), len(start)
    rows = min(d, reads * b)
    if d > MAX_COLUMNS[weight.dtype]:
        problem = f"min(m, n)={d} exceeds {MAX_COLUMNS[weight.dtype]}, the most in {weight.dtype}"
    elif b > MAX_WIDTH:
        problem = f"{b} rows of its start exceed {MAX_WIDTH}: take a smaller k"
    elif rows > MAX_ROWS:
        problem = f"min(m, n, reads * rows of a start)={rows} exceeds {MAX_ROWS}: take fewer reads than {reads}"
    else:
        problem = "it does not fit the shared memory of this device's blocks"
    raise ValueError(
        f"weights[{index}] of shape {tuple(weight.shape)} is too large for impl='cuda': {problem}; or use "
        "impl='torch', or None to choose"
    )


def _supports(weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int]) -> bool:
    if any(weight.dtype not in DTYPES for weight in weights):
        return False
    context, stream = current_stream(weights[0])
    # what is supported depends on shapes and alignment alone: any pointer does for the outputs
    layers = [_layer(W, start, k, n, [start] * 6) for W, start, k, n in zip(weights, starts, ks, reads, strict=True)]
    with context:
        return _native.SvdRun(layers, stream).supported()


@ops.implements("topk_svd", "cuda", _supports)
def _topk_svd_cuda(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], *, max_sms: int | None = None
) -> list[Tensor]:
    for index, weight in enumerate(weights):
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"weights[{index}] has dtype {weight.dtype}: impl='cuda' takes fp32, bf16 and fp16, else impl='torch'"
            )
        check_start(index, weight, starts[index], ks[index], reads[index])
        if weight.device != weights[0].device:
            raise ValueError(f"weights[{index}] is on {weight.device}, but weights[0] on {weights[0].device}")
    table = _Table(weights, starts, ks, reads, max_sms)
    with table.context:
        if not table.run.supported():
            for index, layer in enumerate(table.run.table):
                if not _native.SvdRun([layer], table.run.stream).supported():
                    _refuse(index, weights[index], starts[index], reads[index])
        return block_krylov(table)
