"""What the Triton kernels share: the optional import, `jit`, device tables of layers, the audit's `Variant`."""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from s2d_kernels import ops

# By name, so that type checking does not depend on whether the optional package is there.
try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None

INSTALL_HINT = "pip install 'triton>=3.6'"

# Bytes of the widest load; what starts and strides at multiples of it takes the aligned path.
VECTOR_BYTES = 16
# More than the launches of one training step over all dtypes, streams and devices of a process.
TABLES_KEPT = 64


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`; without Triton the function stays what it is, and nobody calls it."""
    return triton.jit(**options) if triton is not None else lambda function: function


def constant(value: float) -> Any:
    """A global that kernels may use; without Triton the number itself."""
    return tl.constexpr(value) if tl is not None else value


@jit()
def widen(x: tl.tensor, SUM: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """`x` in the dtype of the sum."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # Triton's interpreter gets the subnormal numbers wrong.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(SUM)


@jit()
def narrow(x: tl.tensor, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """`x` rounded to the nearest number of a dtype, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        # Triton's interpreter truncates here; the compiled conversion rounds.
        bits = x.to(tl.uint32, bitcast=True)
        nearest = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@jit()
def find_row(
    table: tl.tensor, rows: tl.tensor, FIELDS: tl.constexpr, FIRST: tl.constexpr, program: tl.tensor
) -> tl.tensor:
    """The last row `[FIELDS]` of an ascending table whose field FIRST is not above `program`."""
    at = tl.full((), 0, tl.int32)
    count = rows
    # The row lies in [at, at + count).
    while count > 1:
        half = count // 2
        later = tl.load(table + (at + half) * FIELDS + FIRST) <= program
        at = tl.where(later, at + half, at)
        count = tl.where(later, count - half, half)
    return table + at * FIELDS


@jit()
def low_rank_tile(
    zero: tl.tensor,
    left: tl.tensor,
    coefficients: tl.tensor,
    right: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    in_rows: tl.tensor,
    in_cols: tl.tensor,
    left_row: tl.tensor,
    left_rank: tl.tensor,
    coefficient_stride: tl.tensor,
    right_rank: tl.tensor,
    right_col: tl.tensor,
    rank: tl.tensor,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """zero + sum_r (left[i, r] coefficients[r]) right[r, j], r ascending.

    `zero` is made of the tile: the sum of a plain zero gets a layout of its own, and shared memory to convert it.
    """
    total = zero
    # Not a range: in Triton 3.6's interpreter one with a bound that was loaded fails with NumPy 2.4.
    component = 0
    while component < rank:
        for step in tl.static_range(UNROLL):
            r = component + step
            c = tl.load(coefficients + r * coefficient_stride, mask=r < rank, other=0.0)
            u = tl.load(left + r * left_rank + i * left_row, mask=in_rows & (r < rank), other=0.0)
            v = tl.load(right + r * right_rank + j * right_col, mask=in_cols & (r < rank), other=0.0)
            total += (u * c)[:, None] * v[None, :]
        component += UNROLL
    return total


class Tables:
    """Device tables by device, stream and content: one is copied when a pointer, shape or stride is a new one.

    Keyed by stream since only there the copy is known to come before the launch. The staging memory is pinned and given
    back at once: torch's host allocator reuses it only when the copy is done, so no copy waits and none reads a
    later table.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[int, int, bytes], Tensor] = OrderedDict()
        # Those that a CUDA graph reads whenever it is replayed; never given back.
        self._captured: dict[int, Tensor] = {}
        self.copies = 0

    def get(self, rows: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> Tensor:
        """The int64 `rows` `[layers, FIELDS]` on `device`, ready for the current stream.

        Raises:
            ValueError: the stream is being captured and this table was not used before.
        """
        if device.type != "cuda":
            return torch.from_numpy(rows)
        key = (device.index, ops.current_stream(device), rows.tobytes())
        with self._lock:
            if ops.capturing(device):
                for (index, _, content), table in self._recent.items():
                    if (index, content) == (key[0], key[2]):
                        self._captured[id(table)] = table
                        return table
                raise ValueError(
                    "impl='triton' cannot copy a new table of pointers while a CUDA graph is captured: call it once "
                    "with the same tensors before, and keep them in place"
                )
            if key not in self._recent:
                self._recent[key] = torch.from_numpy(rows).pin_memory().to(device, non_blocking=True)
                self.copies += 1
                if len(self._recent) > TABLES_KEPT:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(key)
            return self._recent[key]


TABLES = Tables()


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter, which happens once, at import."""
    return triton is not None and not isinstance(widen, triton.JITFunction)


def interpreted_steps(length: int, block: int) -> dict[str, int]:
    """The number of blocks as a constant, for the interpreter alone.

    In Triton 3.6 it cannot make a range of an argument with NumPy 2.4, and only a range is pipelined when compiled.
    """
    return {"STEPS": -(-length // block) if interpreted() else 0}


def _problem(device: torch.device) -> str | None:
    if triton is None:
        return f"Triton is not installed: {INSTALL_HINT}"
    if interpreted() and device.type == "cuda":
        return f"TRITON_INTERPRET=1 runs the kernels on CPU tensors, got one on {device}: unset it"
    return None


ops.declare_problem("triton", _problem)


def check_device(device: torch.device) -> None:
    """Raise a ValueError where the kernels cannot take tensors on `device`."""
    if not interpreted() and device.type != "cuda":
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got one on {device}: move it, leave impl=None, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow, for tests)"
        )


class Variant(NamedTuple):
    """One compilation of a kernel, as `python -m bench audit` makes it, and what is expected of it.

    Attributes:
        signature, attributes: as `triton.compiler.ASTSource` takes them.
        instructions: that must be in the machine code -> at least how often; "LDG.128.!EF" stands for an LDG with the
            modifier 128 and without EF.
        shape: the benchmark's, with the `bytes` it must move at least and its `flops`.
        options: of the launch, beside warps and stages.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    warps: int
    stages: int
    instructions: dict[str, int]
    shape: str
    bytes: int
    flops: int
    options: Mapping[str, Any] = MappingProxyType({})
