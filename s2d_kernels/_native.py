"""ctypes loader of the native library (csrc/s2d.h): argument types, checks at load, a diagnosis when it is not there.

Nothing is loaded at import. `S2D_NATIVE=emulated` selects the library that runs the CUDA sources on the CPU (tests),
`S2D_LIBRARY=/path/to/libs2d.so` any file.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

ABI_VERSION = 5
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
GRANULARITIES = {"per_row": 0, "per_tensor": 1, "per_group": 2}
MAX_RANK = 64
MAX_GROUPS = 8
ROOT = Path(__file__).parent
EMULATED = "emulated on the CPU"
BUILD_HINT = "build it with `make native`, or `pip install -e .` where nvcc is found"


class PenaltyLayer(ctypes.Structure):
    """`s2d_penalty_layer` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("grad", c_void_p),
        ("U", c_void_p),
        ("Vh", c_void_p),
        ("coefficients", c_void_p),
        ("device_rank", c_void_p),
        ("device_seed", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("grad_stride", c_int64),
        ("u_row_stride", c_int64),
        ("u_col_stride", c_int64),
        ("vh_stride", c_int64),
        ("rank", c_int32),
        ("dtype", c_int32),
    )


class SvdLayer(ctypes.Structure):
    """`s2d_svd_layer` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("weight", c_void_p),
        ("start", c_void_p),
        ("U", c_void_p),
        ("S", c_void_p),
        ("Vh", c_void_p),
        ("residual", c_void_p),
        ("missed", c_void_p),
        ("status", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_stride", c_int64),
        ("col_stride", c_int64),
        ("dtype", c_int32),
        ("width", c_int32),
        ("k", c_int32),
        ("reads", c_int32),
        ("team", c_int32),
    )


class Quantization(ctypes.Structure):
    """`s2d_quantization` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("x", c_void_p),
        ("minimum", c_void_p),
        ("maximum", c_void_p),
        ("codes", c_void_p),
        ("packed", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("row_sum", c_void_p),
        ("mask", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_stride", c_int64),
        ("col_stride", c_int64),
        ("range_stride", c_int64),
        ("group_size", c_int64),
        ("dtype", c_int32),
        ("bits", c_int32),
        ("symmetric", c_int32),
        ("granularity", c_int32),
    )


class IntegerProduct(ctypes.Structure):
    """`s2d_integer_product` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("x_codes", c_void_p),
        ("w_codes", c_void_p),
        ("x_scale", c_void_p),
        ("w_scale", c_void_p),
        ("x_zero_point", c_void_p),
        ("w_zero_point", c_void_p),
        ("x_row_sum", c_void_p),
        ("w_row_sum", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("accumulator", c_void_p),
        ("M", c_int64),
        ("N", c_int64),
        ("K", c_int64),
        ("groups", c_int64),
        ("x_per_tensor", c_int32),
        ("w_per_tensor", c_int32),
        ("x_symmetric", c_int32),
        ("w_symmetric", c_int32),
        ("packed", c_int32),
        ("bias_dtype", c_int32),
        ("out_dtype", c_int32),
    )


class AdamWLayer(ctypes.Structure):
    """`s2d_adamw_layer` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("param", c_void_p),
        ("grad", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("step", c_void_p),
        ("U", c_void_p),
        ("Vh", c_void_p),
        ("coefficients", c_void_p),
        ("device_rank", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("param_stride", c_int64),
        ("grad_stride", c_int64),
        ("u_row_stride", c_int64),
        ("u_col_stride", c_int64),
        ("vh_stride", c_int64),
        ("rank", c_int32),
        ("dtype", c_int32),
        ("group", c_int32),
    )


class AdamWGroup(ctypes.Structure):
    """`s2d_adamw_group` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("device_lr", c_void_p),
        ("lr", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("eps", c_double),
        ("weight_decay", c_double),
        ("maximize", c_int32),
    )


class AdamWOptions(ctypes.Structure):
    """`s2d_adamw_options` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("clip_coef", c_void_p),
        ("grad_scale", c_void_p),
        ("found_inf", c_void_p),
        ("decoupled", c_int32),
        ("clip_penalty", c_int32),
    )


class CaptureCall(ctypes.Structure):
    """`s2d_capture_call` of csrc/s2d.h, field for field."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("enabled", c_void_p),
        ("value", c_void_p),
        ("place", c_void_p),
        ("row", c_void_p),
        ("tokens", c_int64),
        ("neurons", c_int64),
        ("features", c_int64),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("y_dtype", c_int32),
        ("x_dtype", c_int32),
    )


_SVD_TABLE = [POINTER(SvdLayer), c_int32]
_WORKSPACE_AND_STREAM = [c_void_p, c_size_t, c_void_p]
# name -> (result type, argument types); a test compares it with the header
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "s2d_abi_version": (c_int, []),
    "s2d_architectures": (c_char_p, []),
    "s2d_status_string": (c_char_p, [c_int]),
    "s2d_check_device": (c_int, []),
    "s2d_add_penalty_grad": (c_int, [POINTER(PenaltyLayer), c_int32, *_WORKSPACE_AND_STREAM]),
    "s2d_adamw": (
        c_int,
        [
            *(POINTER(AdamWLayer), c_int32, POINTER(AdamWGroup), c_int32, POINTER(AdamWOptions)),
            *_WORKSPACE_AND_STREAM,
        ],
    ),
    "s2d_capture_workspace": (c_size_t, [POINTER(CaptureCall)]),
    "s2d_capture": (c_int, [POINTER(CaptureCall), *_WORKSPACE_AND_STREAM]),
    "s2d_topk_svd_check": (c_int, _SVD_TABLE),
    "s2d_topk_svd_team": (c_int, [POINTER(SvdLayer)]),
    "s2d_topk_svd_workspace": (c_size_t, _SVD_TABLE),
    "s2d_topk_svd_begin": (c_int, [*_SVD_TABLE, *_WORKSPACE_AND_STREAM]),
    "s2d_topk_svd_resident": (c_int, [*_SVD_TABLE, c_int32, *_WORKSPACE_AND_STREAM]),
    "s2d_topk_svd_product": (c_int, [*_SVD_TABLE, c_int32, *_WORKSPACE_AND_STREAM]),
    "s2d_topk_svd_orthonormalize": (c_int, [*_SVD_TABLE, c_int32, *_WORKSPACE_AND_STREAM]),
    "s2d_topk_svd_finish": (c_int, [*_SVD_TABLE, c_float, c_double, *_WORKSPACE_AND_STREAM]),
    "s2d_quantize_check": (c_int, [POINTER(Quantization)]),
    "s2d_quantize_workspace": (c_size_t, [POINTER(Quantization)]),
    "s2d_quantize": (c_int, [POINTER(Quantization), *_WORKSPACE_AND_STREAM]),
    "s2d_integer_linear_check": (c_int, [POINTER(IntegerProduct)]),
    "s2d_integer_linear": (c_int, [POINTER(IntegerProduct), *_WORKSPACE_AND_STREAM]),
    "s2d_pack_codes": (c_int, [c_void_p, c_void_p, c_int64, c_int64, *_WORKSPACE_AND_STREAM]),
}


class NativeLibraryError(ValueError):
    """The native library is missing, of another version, or refused a call."""


def emulated() -> bool:
    """Whether the library is the CPU emulation of the CUDA sources, whose kernels take CPU tensors."""
    return architectures() == EMULATED


def library_path() -> Path:
    """Where the library is looked for.

    Raises:
        NativeLibraryError: S2D_NATIVE has an unknown value.
    """
    if os.environ.get("S2D_LIBRARY"):
        return Path(os.environ["S2D_LIBRARY"])
    wanted = os.environ.get("S2D_NATIVE", "")
    if wanted == "emulated":
        return ROOT.parent / "build" / "emulated" / "libs2d_emulated.so"
    if wanted:
        raise NativeLibraryError(f"S2D_NATIVE={wanted!r} is unknown: set it to 'emulated', or unset it")
    installed = ROOT / "lib" / "libs2d.so"
    built = ROOT.parent / "build" / "native" / "libs2d.so"  # of `make native` in a source tree
    found = [path for path in (installed, built) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=installed)


def load() -> ctypes.CDLL:
    """The library, loaded once per path.

    Raises:
        NativeLibraryError: with the path looked for and how to build it, or both ABI numbers when they differ.
    """
    return _load(library_path())


@cache
def _load(path: Path) -> ctypes.CDLL:
    hint = "build it with `make emulated`" if "emulated" in path.name else BUILD_HINT
    return open_library(path, SIGNATURES, ("s2d_abi_version", ABI_VERSION), hint)


def open_library(
    path: Path, signatures: dict[str, tuple[Any, list[Any]]], abi: tuple[str, int], hint: str
) -> ctypes.CDLL:
    """Load `path` and give its functions their types; `abi` is the entry that tells the version, and that wanted.

    Raises:
        NativeLibraryError: no such file, one that does not load, or one of another version; ends with `hint`.
    """
    if not path.is_file():
        raise NativeLibraryError(f"there is no native library at {path}: {hint}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"the native library {path} does not load: {error}") from error
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NativeLibraryError(f"the native library {path} has no {name}: {hint} again") from error
        function.restype, function.argtypes = result, arguments
    name, wanted = abi
    found = getattr(library, name)()
    if found != wanted:
        raise NativeLibraryError(
            f"the native library {path} has ABI {found}, this package needs ABI {wanted}: {hint} again"
        )
    return library


def problem() -> str | None:
    """Why the library cannot be used, or None."""
    try:
        load()
    except NativeLibraryError as error:
        return str(error)
    return None


def device_problem() -> str | None:
    """Why the kernels cannot run on the current CUDA device, or None; also loads them onto it."""
    library = load()
    status = library.s2d_check_device()
    if not status:
        return None
    return f"{library.s2d_status_string(status).decode()}; the library holds code for {architectures()}"


def architectures() -> str:
    """The GPU architectures compiled into the library, as one string."""
    return load().s2d_architectures().decode()


def _call(name: str, *arguments: Any) -> None:
    library = load()
    function: Callable[..., int] = getattr(library, name)
    status = function(*arguments)
    if status:
        message = library.s2d_status_string(status).decode()
        if emulated():
            library.s2d_emulation_error.restype = c_char_p
            message += f" ({library.s2d_emulation_error().decode()})"
        raise NativeLibraryError(f"{name}: {message}; the library holds code for {architectures()}")


def add_penalty_grad(layers: Sequence[PenaltyLayer], stream: int) -> None:
    """Enqueue grad += U diag(coefficients) Vh for all layers on `stream` (an address; 0 is the default stream)."""
    if layers:
        _call("s2d_add_penalty_grad", (PenaltyLayer * len(layers))(*layers), len(layers), None, 0, stream)


def adamw(layers: Any, groups: Sequence[AdamWGroup], options: AdamWOptions, stream: int) -> None:
    """Enqueue one step of AdamW for all layers, a sequence or an array of `AdamWLayer`, on `stream`."""
    if len(layers):
        table = layers if isinstance(layers, ctypes.Array) else (AdamWLayer * len(layers))(*layers)
        hyper = (AdamWGroup * len(groups))(*groups)
        _call("s2d_adamw", table, len(layers), hyper, len(groups), ctypes.byref(options), None, 0, stream)


def capture_workspace_bytes(call: CaptureCall) -> int:
    """Bytes of the workspace, which must be aligned to 256."""
    return int(load().s2d_capture_workspace(ctypes.byref(call)))


def capture(call: CaptureCall, workspace: int, workspace_bytes: int, stream: int) -> None:
    """Enqueue `s2d_capture` on `stream`."""
    _call("s2d_capture", ctypes.byref(call), workspace, workspace_bytes, stream)


class SvdRun:
    """The `s2d_topk_svd_*` calls of one run over the same table of matrices, on one stream."""

    def __init__(self, layers: Sequence[SvdLayer], stream: int) -> None:
        self.table = (SvdLayer * len(layers))(*layers)
        self.stream = stream
        self.workspace: tuple[int, int] = (0, 0)

    def supported(self) -> bool:
        """Whether the kernels take these matrices on the current device."""
        return load().s2d_topk_svd_check(self.table, len(self.table)) == 0

    def teams(self) -> list[int]:
        """Of each matrix, the blocks that keep it in shared memory on the current device; 0 where it is streamed."""
        team = load().s2d_topk_svd_team
        return [team(ctypes.byref(layer)) for layer in self.table]

    def workspace_bytes(self) -> int:
        """Bytes of the workspace, which must be aligned to 256; its address and size go to `workspace`."""
        return int(load().s2d_topk_svd_workspace(self.table, len(self.table)))

    def call(self, primitive: str, *arguments: float) -> None:
        """Enqueue `s2d_topk_svd_<primitive>`."""
        _call(f"s2d_topk_svd_{primitive}", self.table, len(self.table), *arguments, *self.workspace, self.stream)


def supports_quantization(quantization: Quantization) -> bool:
    """Whether `quantize` takes these sizes."""
    return load().s2d_quantize_check(quantization) == 0


def quantize_workspace(quantization: Quantization) -> int:
    """Bytes of the workspace, which must be aligned to 256."""
    return int(load().s2d_quantize_workspace(quantization))


def quantize(quantization: Quantization, workspace: tuple[int, int], stream: int) -> None:
    """Enqueue the quantization of a matrix; the workspace's address and size."""
    _call("s2d_quantize", quantization, *workspace, stream)


def supports_product(product: IntegerProduct) -> bool:
    """Whether `integer_linear` takes these sizes."""
    return load().s2d_integer_linear_check(product) == 0


def integer_linear(product: IntegerProduct, stream: int) -> None:
    """Enqueue the exact product of two quantized matrices."""
    _call("s2d_integer_linear", product, None, 0, stream)


def pack_codes(codes: int, packed: int, rows: int, cols: int, stream: int) -> None:
    """Enqueue the packing of int8 codes, two a byte; addresses."""
    _call("s2d_pack_codes", codes, packed, rows, cols, None, 0, stream)
