"""The contract of every operation: argument checks, `torch.library` schemas, fakes and one dispatch table.

An operation has up to four implementations, all with the same signature over plain tensors:

    reference   the definition (`reference.py`), any device, slow
    torch       the practical path on any device, the default on CPU
    triton      Triton kernels
    cuda        CUDA C++ kernels behind the C ABI

`implements(op, impl)` enters a function into the table, `resolve(op, impl, device)` is the only place that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

IMPLS = ("reference", "torch", "triton", "cuda")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_TABLE: dict[str, dict[str, Callable[..., Any]]] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])

library = torch.library.Library("s2d", "DEF")


def implements(op: str, impl: str) -> Callable[[_Function], _Function]:
    """Enter the decorated function into the dispatch table as implementation `impl` of `op`."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is none of {IMPLS}")

    def enter(function: _Function) -> _Function:
        _TABLE.setdefault(op, {})[impl] = function
        return function

    return enter


def available(op: str) -> tuple[str, ...]:
    """The implementations of `op` in this installation, in the order of `IMPLS`."""
    return tuple(impl for impl in IMPLS if impl in _TABLE[op])


def choose(op: str, impl: str | None, device: torch.device) -> str:
    """Name of the implementation of `op` for tensors on `device`; `impl` None picks the fastest that is present."""
    if impl is None:
        return "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is none of {IMPLS} (or None to choose by device)")
    if impl not in _TABLE[op]:
        raise ValueError(f"{op} has no impl={impl!r} in this installation, only {available(op)} (device {device})")
    return impl


def resolve(op: str, impl: str | None, device: torch.device) -> Callable[..., Any]:
    """The function that `choose` names."""
    return _TABLE[op][choose(op, impl, device)]


def check_tensor(
    name: str,
    value: object,
    *,
    ndim: int | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
    device: torch.device | None = None,
) -> Tensor:
    """Return `value` as a dense tensor of the wanted kind, or raise a TypeError/ValueError that names it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise NotImplementedError(f"{name} is a DTensor: sharded tensors are not supported yet; pass full tensors")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: pass a dense (strided) tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}: move all tensors of one call to one device")
    return value


def check_tensor_list(name: str, values: object, **kwargs: Any) -> list[Tensor]:
    """Check each element with `check_tensor`; all must share the first one's device. A lone tensor is a TypeError."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of tensors, got {type(values).__name__}: wrap a single one in a list")
    device: torch.device | None = kwargs.pop("device", None)
    checked = []
    for index, value in enumerate(values):
        checked.append(check_tensor(f"{name}[{index}]", value, device=device, **kwargs))
        device = checked[0].device
    return checked


def check_same_length(**lists: Sequence[Any]) -> None:
    """Raise a ValueError unless all the named lists are equally long."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("lists must be equally long, got " + ", ".join(f"{n}: {c}" for n, c in lengths.items()))
