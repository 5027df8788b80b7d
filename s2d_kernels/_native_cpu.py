"""ctypes loader of libs2d_cpu.so (csrc/cpu/s2d_cpu.h), the CPU's kernels. Nothing is loaded at import.

`S2D_CPU_LIBRARY=/path/to/libs2d_cpu.so` selects any file, `S2D_CPU_CAPABILITY=...` an instruction set of
`CAPABILITIES` that the machine has.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from s2d_kernels._native import (
    ROOT,
    AdamWGroup,
    AdamWLayer,
    AdamWOptions,
    IntegerProduct,
    NativeLibraryError,
    PenaltyLayer,
    Quantization,
    SvdLayer,
    open_library,
)

ABI_VERSION = 4
MAX_THREADS = 256
CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_vnni_pairs")
BUILD_HINT = "build it with `make cpu`, or `pip install -e .` where CMake and GCC >= 11 or Clang are found"


class StraightThrough(ctypes.Structure):
    """`s2d_cpu_straight_through` of csrc/cpu/s2d_cpu.h, field for field."""

    _fields_ = (
        ("grad", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("mask", c_void_p),
        ("out", c_void_p),
        ("finite", c_void_p),
        ("rows", c_int64),
        ("depth", c_int64),
        ("cols", c_int64),
        ("row_stride", c_int64),
        ("depth_stride", c_int64),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
        ("bits", c_int32),
        ("symmetric", c_int32),
        ("per_tensor", c_int32),
        ("places", c_int32),
        ("largest_digit", c_int32),
    )


_TABLE = [POINTER(SvdLayer), c_int32, c_int32]
# name -> (result type, argument types); a test compares it with the header
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "s2d_cpu_abi_version": (c_int, []),
    "s2d_cpu_capability": (c_char_p, []),
    "s2d_cpu_topk_svd_workspace": (c_size_t, _TABLE),
    "s2d_cpu_add_penalty_grad": (c_int, [POINTER(PenaltyLayer), c_int32, c_int32]),
    "s2d_cpu_adamw": (
        c_int,
        [POINTER(AdamWLayer), c_int32, POINTER(AdamWGroup), c_int32, POINTER(AdamWOptions), c_int32],
    ),
    "s2d_cpu_topk_svd": (c_int, [*_TABLE, c_float, c_double, c_void_p, c_size_t]),
    "s2d_cpu_quantize_workspace": (c_size_t, [POINTER(Quantization), c_int32]),
    "s2d_cpu_quantize": (c_int, [POINTER(Quantization), c_int32, c_void_p, c_size_t]),
    "s2d_cpu_integer_linear_workspace": (c_size_t, [POINTER(IntegerProduct), c_int32]),
    "s2d_cpu_integer_linear": (c_int, [POINTER(IntegerProduct), c_int32, c_void_p, c_size_t]),
    "s2d_cpu_straight_through_grad_workspace": (c_size_t, [POINTER(StraightThrough), c_int32]),
    "s2d_cpu_straight_through_grad": (c_int, [POINTER(StraightThrough), c_int32, c_void_p, c_size_t]),
}


@cache
def _newest() -> tuple[Path, bool]:
    """The newest build, or where one belongs, and whether there is one."""
    installed = ROOT / "lib" / "libs2d_cpu.so"
    built = [ROOT.parent / "build" / folder / "libs2d_cpu.so" for folder in ("cpu", "native")]  # in a source tree
    found = [path for path in (installed, *built) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=installed), bool(found)


def library_path() -> Path:
    """Where the library is looked for: the newest build that was there at the first call."""
    if os.environ.get("S2D_CPU_LIBRARY"):
        return Path(os.environ["S2D_CPU_LIBRARY"])
    path, there = _newest()
    if not there:
        _newest.cache_clear()  # it may be built yet
    return path


@cache
def _load(path: Path) -> ctypes.CDLL:
    return open_library(path, SIGNATURES, ("s2d_cpu_abi_version", ABI_VERSION), BUILD_HINT)


def load() -> ctypes.CDLL:
    """The library, loaded once per path.

    Raises:
        NativeLibraryError: with the path looked for and how to build it, or both ABI numbers when they differ.
    """
    return _load(library_path())


def problem() -> str | None:
    """Why the library cannot be used, or None."""
    wanted = os.environ.get("S2D_CPU_CAPABILITY", "")
    if wanted not in ("", *CAPABILITIES):
        return f"S2D_CPU_CAPABILITY={wanted!r} is none of {CAPABILITIES}"
    try:
        load()
    except NativeLibraryError as error:
        return str(error)
    return None


def capability() -> str:
    """The instruction set whose kernels run here, one of `CAPABILITIES`."""
    return str(load().s2d_cpu_capability().decode())


def add_penalty_grad(layers: Sequence[PenaltyLayer], threads: int) -> None:
    """grad += U diag(coefficients) Vh of all layers, whose gradients must not share elements."""
    table = (PenaltyLayer * len(layers))(*layers)
    status = load().s2d_cpu_add_penalty_grad(table, len(layers), max(1, min(threads, MAX_THREADS)))
    if status:
        raise NativeLibraryError(f"s2d_cpu_add_penalty_grad refused its arguments with status {status} (csrc/s2d.h)")


def adamw(layers: Any, groups: Sequence[AdamWGroup], options: AdamWOptions, threads: int) -> None:
    """One step of AdamW for all layers, a sequence or an array of `AdamWLayer`."""
    table = layers if isinstance(layers, ctypes.Array) else (AdamWLayer * len(layers))(*layers)
    hyper = (AdamWGroup * len(groups))(*groups)
    threads = max(1, min(threads, MAX_THREADS))
    status = load().s2d_cpu_adamw(table, len(layers), hyper, len(groups), ctypes.byref(options), threads)
    if status:
        raise NativeLibraryError(f"s2d_cpu_adamw refused its arguments with status {status} (csrc/s2d.h)")


class Call:
    """The entry `name` over one structure, which it works on with at most `threads` threads."""

    def __init__(self, name: str, arguments: ctypes.Structure, threads: int) -> None:
        self.library, self.name = load(), name
        self.arguments = byref(arguments), max(1, min(threads, MAX_THREADS))

    def workspace_bytes(self) -> int:
        """Bytes of the workspace, which must be aligned to 256."""
        return int(getattr(self.library, f"{self.name}_workspace")(*self.arguments))

    def __call__(self, address: int, size: int) -> None:
        """Do the work, with a workspace of `size` bytes at `address`."""
        status = getattr(self.library, self.name)(*self.arguments, address, size)
        if status:
            raise NativeLibraryError(f"{self.name} refused its arguments with status {status} (csrc/s2d.h)")


class SvdRun:
    """`s2d_cpu_topk_svd` over a table of matrices."""

    def __init__(self, layers: Sequence[SvdLayer], threads: int) -> None:
        self.library = load()
        self.table = (SvdLayer * len(layers))(*layers), len(layers), max(1, min(threads, MAX_THREADS))

    def workspace_bytes(self) -> int:
        """Bytes of the workspace, which must be aligned to 256."""
        return int(self.library.s2d_cpu_topk_svd_workspace(*self.table))

    def __call__(self, tolerance: float, failure_probability: float, address: int, size: int) -> None:
        """Do the work, with a workspace of `size` bytes at `address`."""
        status = self.library.s2d_cpu_topk_svd(*self.table, tolerance, failure_probability, address, size)
        if status:
            raise NativeLibraryError(f"s2d_cpu_topk_svd refused its arguments with status {status} (csrc/s2d.h)")
