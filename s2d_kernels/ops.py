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


def names() -> tuple[str, ...]:
    """All operations in the table."""
    return tuple(_TABLE)


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


# --- topk_svd: six outputs a matrix, U [m, b], S [b], Vh [b, n], residual [b], missed [], status [] (int32) --------

library.define(
    "topk_svd(Tensor[] weights, Tensor[] starts, SymInt[] ks, SymInt[] reads, str? impl=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _topk_svd(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], impl: str | None = None
) -> list[Tensor]:
    with torch.no_grad():
        return resolve("topk_svd", impl, weights[0].device)(weights, starts, ks, reads)


def _topk_svd_fake(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], impl: str | None = None
) -> list[Tensor]:
    flat: list[Tensor] = []
    for weight, start in zip(weights, starts, strict=True):
        (m, n), b = weight.shape, start.shape[0]
        shapes = ((m, b), (b,), (b, n), (b,), ())
        flat += [start.new_empty(shape) for shape in shapes]
        flat.append(start.new_empty((), dtype=torch.int32))
    return flat


library.impl("topk_svd", _topk_svd, "CompositeExplicitAutograd")
torch.library.register_fake("s2d::topk_svd", _topk_svd_fake)


# --- add_penalty_grad_: grads[i] += U[i] diag(coefficients[i]) Vh[i] ----------------------------------------------

library.define(
    "add_penalty_grad_(Tensor(a!)[] grads, Tensor[] U, Tensor[] Vh, Tensor[] coefficients, str? impl=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _add_penalty_grad_(
    grads: list[Tensor], U: list[Tensor], Vh: list[Tensor], coefficients: list[Tensor], impl: str | None = None
) -> None:
    with torch.no_grad():
        resolve("add_penalty_grad_", impl, grads[0].device)(grads, U, Vh, coefficients)


library.impl("add_penalty_grad_", _add_penalty_grad_, "CompositeExplicitAutograd")
torch.library.register_fake("s2d::add_penalty_grad_", lambda *_, **__: None)


# --- PCDR: bounds [layers, 2, k_max] from the factors, or the ratios themselves [layers, k_max] --------------------

library.define(
    "pcdr_bounds(Tensor[] weights, Tensor[] inputs, Tensor[] neurons, Tensor[] U, Tensor[] S, Tensor[] Vh, "
    "Tensor[] residuals, int k_max, str? impl=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "pcdr_exact(Tensor[] weights, Tensor[] inputs, Tensor[] neurons, int k_max, str? impl=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _pcdr_bounds(
    weights: list[Tensor],
    inputs: list[Tensor],
    neurons: list[Tensor],
    U: list[Tensor],
    S: list[Tensor],
    Vh: list[Tensor],
    residuals: list[Tensor],
    k_max: int,
    impl: str | None = None,
) -> Tensor:
    function = resolve("pcdr_bounds", impl, weights[0].device)
    return function(weights, inputs, neurons, U, S, Vh, residuals, k_max)


def _pcdr_exact(
    weights: list[Tensor], inputs: list[Tensor], neurons: list[Tensor], k_max: int, impl: str | None = None
) -> Tensor:
    return resolve("pcdr_exact", impl, weights[0].device)(weights, inputs, neurons, k_max)


library.impl("pcdr_bounds", _pcdr_bounds, "CompositeExplicitAutograd")
library.impl("pcdr_exact", _pcdr_exact, "CompositeExplicitAutograd")
torch.library.register_fake(
    "s2d::pcdr_bounds",
    lambda weights, _x, _i, _u, _s, _v, _r, k_max, impl=None: weights[0].new_empty(
        (len(weights), 2, k_max), dtype=torch.float64
    ),
)
torch.library.register_fake(
    "s2d::pcdr_exact",
    lambda weights, _x, _i, k_max, impl=None: weights[0].new_empty((len(weights), k_max), dtype=torch.float64),
)
