"""impl="triton" of `topk_svd`: all matrices of a dtype in each launch, whatever their shapes, widths and reads.

Host code only: the workspaces, the table and the launches. The kernels, in the order of use, are in `matrices.py`
(largest element, products), `blocks.py` (Krylov blocks), `eigen.py` and `ritz.py` (Rayleigh-Ritz).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.svd import block_krylov, check_start
from s2d_kernels.triton_kernels import blocks, matrices, ritz
from s2d_kernels.triton_kernels.common import TABLES, VECTOR_BYTES, Variant, check_device, interpreted, tl
from s2d_kernels.triton_kernels.matrices import Matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of A of a program of `product`, and how many elements of each it holds at a time. Half precision is widened, so
# it takes the registers of fp32; bf16 goes to the tensor cores as it is.
PANEL = 128
PRODUCT_CHUNK = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 32}
STAGES = 3  # of the software pipeline through the matrix
# Elements that a program of `reduce` sums, columns that one of `rotate` makes.
SUMMED, ROTATED = 1024, 128
# Columns at a time, and the sides of a tile of a small matrix, of the programs that have a matrix each: more spill
# registers on one architecture or the other.
BLOCK_CHUNK, BLOCK_TILE, WARPS = 64, 16, 8
RITZ_CHUNK, RITZ_TILE = 128, 32
GRAM_CHUNK = 64
THIN = 16
# Order of the largest eigenproblem: its time grows with the third power.
LARGEST_ORDER = 512


def _dense(weight: Tensor, start: Tensor, reads: int) -> bool:
    return reads * start.shape[0] >= min(weight.shape)


def _order(weight: Tensor, start: Tensor, reads: int) -> int:
    return min(weight.shape) if _dense(weight, start, reads) else reads * start.shape[0]


def _supports(weights: Sequence[Tensor], starts: Sequence[Tensor], _ks: Sequence[int], reads: Sequence[int]) -> bool:
    return all(
        weight.dtype in DTYPES and _order(weight, start, count) <= LARGEST_ORDER
        for weight, start, count in zip(weights, starts, reads, strict=True)
    )


class _Kernel(NamedTuple):
    """A kernel and how it is launched: `arguments` in the order of its parameters, the constants after them."""

    name: str
    function: Any
    arguments: tuple[str, ...]
    warps: int
    constants: Callable[[torch.dtype], dict[str, Any]]


def _element(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "ELEMENT": getattr(tl, str(dtype).removeprefix("torch.")),
        "VECTOR": VECTOR_BYTES // dtype.itemsize,
        "PANEL": PANEL,
        "CHUNK": PRODUCT_CHUNK[dtype],
        "INTERPRETED": interpreted(),
    }


LARGEST = _Kernel("largest", matrices.largest, ("table", "matrices", "work64"), 8, _element)
BEGIN = _Kernel(
    "begin",
    blocks.begin,
    ("table", "work32", "work64"),
    WARPS,
    lambda _: {"CHUNK": BLOCK_CHUNK, "TILE": BLOCK_TILE},
)
PRODUCT = _Kernel(
    "product",
    matrices.product,
    ("table", "matrices", "work32", "work64", "step"),
    8,
    lambda dtype: {**_element(dtype), "STAGES": STAGES},
)
REDUCE = _Kernel(
    "reduce", matrices.reduce, ("table", "matrices", "work32", "step"), WARPS, lambda _: {"SUMMED": SUMMED}
)
ORTHONORMALIZE = _Kernel(
    "orthonormalize",
    blocks.orthonormalize,
    ("table", "work32", "work64", "step"),
    WARPS,
    lambda _: {"CHUNK": BLOCK_CHUNK, "TILE": BLOCK_TILE},
)
GRAM = _Kernel("gram", ritz.gram, ("table", "matrices", "work32", "work64"), 4, lambda _: {"CHUNK": GRAM_CHUNK})
RITZ = _Kernel(
    "ritz", ritz.ritz, ("table", "work32", "work64"), WARPS, lambda _: {"CHUNK": RITZ_CHUNK, "TILE": RITZ_TILE}
)
ROTATE = _Kernel("rotate", ritz.rotate, ("table", "matrices", "work32", "work64"), 4, lambda _: {"XT": ROTATED})
CONCLUDE = _Kernel(
    "conclude",
    ritz.conclude,
    ("table", "work32", "work64", "statuses"),
    4,
    lambda _: {"XT": ROTATED, "TILE": RITZ_TILE},
)


class _Layout:
    """Rows of the table and the sizes they add up to; `count` programs of each launch."""

    def __init__(self) -> None:
        self.rows: list[Matrix] = []
        self.work32 = self.work64 = 0
        self.count = dict.fromkeys(("product", "largest", "reduce", "gram", "rotate"), 0)
        self.count |= dict.fromkeys(("begin", "orthonormalize", "ritz", "conclude"), 0)

    def _take32(self, elements: int) -> int:
        offset = self.work32
        self.work32 += -(-elements // 16) * 16  # aligned to the widest load, and to a cache line
        return offset

    def _take64(self, elements: int) -> int:
        offset = self.work64
        self.work64 += -(-elements // 16) * 16
        return offset

    def _take_programs(self, launch: str, programs: int) -> int:
        first = self.count[launch]
        self.count[launch] += programs
        return first

    def add(self, weight: Tensor, b: int, k: int, reads: int) -> None:
        for launch in ("begin", "orthonormalize", "ritz", "conclude"):  # one program a matrix
            self._take_programs(launch, 1)
        A = weight if weight.shape[0] >= weight.shape[1] else weight.T
        rows, cols = A.shape
        dense = reads * b >= cols
        block, reads = (cols, 1) if dense else (b, reads)
        every = block * reads
        padded = 1 << (every - 1).bit_length()
        panels = -(-rows // PANEL)
        rows_lead, cols_lead = -(-rows // 16) * 16, -(-cols // 16) * 16
        tall = A is weight
        across = -(-padded // THIN)
        tiles = -(-cols // ROTATED)
        self.rows.append(
            Matrix(
                weight=A.data_ptr(),
                rows=rows,
                cols=cols,
                row_stride=A.stride(0),
                col_stride=A.stride(1),
                path=_path(A),
                b=b,
                block=block,
                all=every,
                padded=padded,
                reads=reads,
                k=k,
                dense=int(dense),
                panels=panels,
                rows_lead=rows_lead,
                cols_lead=cols_lead,
                product_first=self._take_programs("product", panels * -(-block // THIN)),
                largest_first=self._take_programs("largest", panels),
                reduce_first=self._take_programs("reduce", -(-block * cols_lead // SUMMED)),
                gram_first=self._take_programs("gram", across * across),
                rotate_first=self._take_programs("rotate", (-(-rows // ROTATED) + tiles) * -(-b // THIN)),
                start=self._take32(b * cols),
                Q=self._take32(every * cols_lead),
                Y=self._take32(every * rows_lead),
                Z=self._take32(every * cols_lead),
                partial=self._take32(panels * block * cols_lead),
                transform=self._take32(b * every),
                left=self._take32(b * rows),
                right=self._take32(b * cols),
                values=self._take32(2 * b + 1),
                left_row=1 if tall else rows,
                left_col=b if tall else 1,
                right_row=cols if tall else 1,
                right_col=1 if tall else b,
                state=self._take64(matrices.STATE_SIZE),
                maxima=self._take64(max(panels, tiles * b)),
                H=self._take64(2 * padded * padded),
                V=self._take64(3 * padded * padded),
                theta=self._take64(every + 1),
                vectors=self._take64(2 * every),
            )
        )


def _path(A: Tensor) -> int:
    """Which dimension takes the widest loads: contiguous, and every line of it at a multiple of their size."""
    elements = VECTOR_BYTES // A.element_size()
    if A.data_ptr() % VECTOR_BYTES == 0:
        for dim, path in ((1, 0), (0, 1)):
            across = A.stride(1 - dim) if A.shape[1 - dim] > 1 else 0
            if A.stride(dim) == 1 and across % elements == 0 and A.shape[dim] % elements == 0:
                return path
    return 2


class _Batch:
    """`Primitives` of matrices of one dtype."""

    def __init__(
        self, weights: Sequence[Tensor], starts: Sequence[Tensor], ks: Sequence[int], reads: Sequence[int]
    ) -> None:
        self.layout = layout = _Layout()
        for weight, start, k, count in zip(weights, starts, ks, reads, strict=True):
            layout.add(weight, start.shape[0], k, count)
        self.weights = weights
        self.dtype = weights[0].dtype
        self.reads = max(row.reads for row in layout.rows)
        device = weights[0].device
        self.table = TABLES.get(np.array(layout.rows, dtype=np.int64), device)
        self.work32 = torch.empty(layout.work32, dtype=torch.float32, device=device)
        self.work64 = torch.empty(layout.work64, dtype=torch.float64, device=device)
        self.statuses = torch.empty(len(weights), dtype=torch.int32, device=device)
        places = [self._part(row.start, row.b, row.cols) for row in layout.rows]
        torch._foreach_copy_(places, [start.contiguous() for start in starts])

    def _part(self, offset: int, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        return self.work32[offset : offset + count].view(shape)

    def _launch(self, kernel: _Kernel, step: int = 0) -> None:
        programs = self.layout.count[kernel.name]
        offered = {
            "table": self.table,
            "matrices": len(self.weights),
            "work32": self.work32,
            "work64": self.work64,
            "statuses": self.statuses,
            "step": step,
        }
        arguments = {name: offered[name] for name in kernel.arguments}
        kernel.function[(programs,)](**arguments, **kernel.constants(self.dtype), num_warps=kernel.warps, num_stages=1)

    def begin(self) -> None:
        self._launch(LARGEST)
        self._launch(BEGIN)

    def product(self, step: int) -> None:
        self._launch(PRODUCT, step)
        self._launch(REDUCE, step)

    def orthonormalize(self, step: int) -> None:
        self._launch(ORTHONORMALIZE, step)

    def finish(self) -> list[Tensor]:
        for kernel in (GRAM, RITZ, ROTATE, CONCLUDE):
            self._launch(kernel)
        found = []
        for row, weight in zip(self.layout.rows, self.weights, strict=True):
            m, n = weight.shape
            left, right = (row.left, row.right) if m >= n else (row.right, row.left)
            b = row.b
            places = ((left, m, b), (row.values, b), (right, b, n), (row.values + b, b), (row.values + 2 * b,))
            found += [self._part(*place) for place in places]
        # Outputs must not share storage; few launches for all of them.
        outputs = [torch.empty_like(part) for part in found]
        torch._foreach_copy_(outputs, found)
        parts = list(self.statuses.unbind())
        statuses = [torch.empty_like(part) for part in parts]
        torch._foreach_copy_(statuses, parts)
        flat = []
        for index, status in enumerate(statuses):
            flat += [*outputs[5 * index : 5 * index + 5], status]
        return flat


@ops.implements("topk_svd", "triton", _supports)
def _topk_svd_triton(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], *, max_sms: int | None = None
) -> list[Tensor]:
    device = weights[0].device
    check_device(device)
    groups: dict[torch.dtype, list[int]] = {}
    for index, (weight, start, count) in enumerate(zip(weights, starts, reads, strict=True)):
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"impl='triton' takes fp32, bf16 and fp16 matrices, weights[{index}] is {weight.dtype}: "
                "use impl='torch'"
            )
        if (order := _order(weight, start, count)) > LARGEST_ORDER:
            raise ValueError(
                f"impl='triton' solves eigenproblems up to order {LARGEST_ORDER}, {count} reads with {start.shape[0]} "
                f"columns make one of order {order} for weights[{index}]: use fewer reads or impl='torch'"
            )
        check_start(index, weight, start, ks[index], count)
        groups.setdefault(weight.dtype, []).append(index)
    flat: list[Tensor] = [torch.empty(0)] * (6 * len(weights))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for members in groups.values():
            picked = [[values[i] for i in members] for values in (weights, starts, ks, reads)]
            results = block_krylov(_Batch(*picked))  # type: ignore[arg-type]
            for position, index in enumerate(members):
                flat[6 * index : 6 * index + 6] = results[6 * position : 6 * position + 6]
    return flat


# Wide loads of the matrix, and matrix instructions where their name is the same on every architecture.
INSTRUCTIONS: dict[str, dict[str, int]] = {
    "largest": {"LDG.128": 1},
    "begin": {"DMMA": 1, "HMMA": 1},
    "product": {"LDGSTS.128": 1, "STG.128": 1},
    "reduce": {"LDG.128": 1, "STG.128": 1},
    "orthonormalize": {"DMMA": 1, "HMMA": 1},
    "gram": {"DMMA": 1},
    "ritz": {},
    "rotate": {"DMMA": 1},
    "conclude": {},
}
_TYPES = {"table": "*i64", "matrices": "i32", "work32": "*fp32", "work64": "*fp64", "statuses": "*i32", "step": "i32"}


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles: figures are those of a SigLIP2-B fc1, warm, in one launch of each."""
    m, n, b, reads = 3072, 768, 8, 4
    every = b * reads
    panels = -(-m // PANEL)
    # What a launch moves at least, in bytes beside the reads of the matrix, and its flops.
    blocks_bytes, z_bytes, y_bytes = 4 * b * n, 4 * every * n, 4 * every * m
    small: dict[str, tuple[int, int]] = {
        "begin": (2 * blocks_bytes, 2 * 2 * 2 * b * b * n),
        "reduce": ((panels + 1) * blocks_bytes, panels * b * n),
        "orthonormalize": ((every + b) * 4 * n, 2 * (4 * every + 4 * b) * b * n),
        "gram": (y_bytes, every * every * m),
        "ritz": (8 * 4 * every * every + 2 * z_bytes, 8 * every**3 + 4 * every * n),
        "rotate": (y_bytes + 2 * z_bytes + 4 * b * (m + n), 2 * b * every * (m + 2 * n)),
        "conclude": (8 * b * (n // ROTATED), 2 * b * (n // ROTATED)),
    }
    kernels = [(LARGEST, dtype) for dtype in DTYPES] + [(PRODUCT, dtype) for dtype in DTYPES]
    kernels += [(kernel, torch.float32) for kernel in (BEGIN, REDUCE, ORTHONORMALIZE, GRAM, RITZ, ROTATE, CONCLUDE)]
    found = []
    for kernel, dtype in kernels:
        constants = kernel.constants(dtype)
        matrix = m * n * dtype.itemsize
        if kernel is LARGEST:
            moved, flops = matrix, m * n
        elif kernel is PRODUCT:
            moved, flops = matrix + blocks_bytes + 4 * b * m + panels * blocks_bytes, 2 * 2 * b * m * n
        else:
            moved, flops = small[kernel.name]
        found.append(
            Variant(
                name=f"svd_{kernel.name}" + (f"<{constants['ELEMENT']}>" if "ELEMENT" in constants else ""),
                kernel=kernel.function,
                signature={
                    **{name: _TYPES[name] for name in kernel.arguments},
                    **dict.fromkeys(constants, "constexpr"),
                },
                constants=constants,
                attributes={
                    (place,): [["tt.divisibility", 16]]
                    for place, name in enumerate(kernel.arguments)
                    if _TYPES[name].startswith("*")
                },
                warps=kernel.warps,
                stages=1,
                instructions=INSTRUCTIONS[kernel.name],
                shape=f"[{m}, {n}], b={b}, {reads} reads",
                bytes=moved,
                flops=flops,
            )
        )
    return found
