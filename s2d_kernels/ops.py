"""The contract of every operation: argument checks, `torch.library` schemas, fakes and one dispatch table.

An operation has up to five implementations, all with the same signature over plain tensors:

    reference   the definition (`reference.py`), any device, slow
    torch       the practical path on any device
    cpu         C++ kernels for the CPU behind the C ABI
    triton      Triton kernels
    cuda        CUDA C++ kernels behind the C ABI

`implements(op, impl)` enters a function into the table, `choose(op, impl, device)` is the only place that chooses.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

IMPLS = ("reference", "torch", "cpu", "triton", "cuda")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_TABLE: dict[str, dict[str, Callable[..., Any]]] = {}
# impl -> why it cannot be used on a device of this machine, or None; impls without an entry always can
_PROBLEM: dict[str, Callable[[torch.device], str | None]] = {}
# (op, impl) -> whether it takes these arguments
_SUPPORTS: dict[tuple[str, str], Callable[..., bool]] = {}
# what impl=None tries, by device type; the first that is usable wins
_PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
_Function = TypeVar("_Function", bound=Callable[..., Any])

library = torch.library.Library("s2d", "DEF")


def implements(op: str, impl: str, supports: Callable[..., bool] | None = None) -> Callable[[_Function], _Function]:
    """Enter the decorated function into the dispatch table as implementation `impl` of `op`.

    `supports` is asked with the operation's arguments before impl=None chooses it.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is none of {IMPLS}")

    def enter(function: _Function) -> _Function:
        _TABLE.setdefault(op, {})[impl] = function
        if supports is not None:
            _SUPPORTS[op, impl] = supports
        return function

    return enter


def names() -> tuple[str, ...]:
    """All operations in the table."""
    return tuple(_TABLE)


def check_impl(impl: str | None) -> str | None:
    """`impl`, or a ValueError where no implementation is called that."""
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is none of {IMPLS} (or None to choose by device)")
    return impl


def available(op: str) -> tuple[str, ...]:
    """The implementations of `op` in this installation, in the order of `IMPLS`."""
    return tuple(impl for impl in IMPLS if impl in _TABLE[op])


def implementation(op: str, impl: str) -> Callable[..., Any]:
    """The function of `impl`, as `implements` entered it."""
    return _TABLE[op][impl]


def declare_problem(impl: str, problem: Callable[[torch.device], str | None]) -> None:
    """Let `problem` say, when asked, why `impl` cannot be used for tensors on a device (None: it can)."""
    _PROBLEM[impl] = problem


def problem_of(impl: str, device: torch.device) -> str | None:
    """Why `impl` cannot be used for tensors on `device`, or None."""
    return _PROBLEM[impl](device) if impl in _PROBLEM else None


def takes(op: str, impl: str, device: torch.device, arguments: Sequence[Any] | None = None) -> bool:
    """Whether `impl` of `op` exists, is usable for tensors on `device` of this machine and takes the `arguments`."""
    if impl not in _TABLE[op] or problem_of(impl, device) is not None:
        return False
    supports = _SUPPORTS.get((op, impl))
    return arguments is None or supports is None or supports(*arguments)


def choose(op: str, impl: str | None, device: torch.device, arguments: Sequence[Any] | None = None) -> str:
    """Name of the implementation of `op` for tensors on `device`.

    `impl` None picks the first of the device's list that exists, is usable on this machine and takes the `arguments`.
    """
    if impl is None:
        for candidate in _PREFERENCE.get(device.type, ("torch",)):
            if takes(op, candidate, device, arguments):
                return candidate
        return "torch"
    check_impl(impl)
    if impl not in _TABLE[op]:
        raise ValueError(f"{op} has no impl={impl!r} in this installation, only {available(op)} (device {device})")
    problem = problem_of(impl, device)
    if problem is not None:
        raise ValueError(f"impl={impl!r} cannot be used: {problem}")
    return impl


def partition(op: str, impl: str | None, device: torch.device, lists: Sequence[Sequence[Any]]) -> dict[str, list[int]]:
    """Which implementation takes which elements of an operation over equally long `lists`: name -> indices.

    With `impl` None an element's implementation does not depend on the other elements.
    """
    everything = list(range(len(lists[0])))
    if impl is not None:
        return {impl: everything}
    whole = choose(op, None, device, lists)
    if whole == choose(op, None, device):
        return {whole: everything}
    parts: dict[str, list[int]] = {}
    for index in everything:
        parts.setdefault(choose(op, None, device, [[column[index]] for column in lists]), []).append(index)
    return parts


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast: it would turn an exact or an fp32 product into a bf16 one."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream; never for a CPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The current CUDA stream of `device`; 0 for a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def fp32_is_reduced(device: torch.device) -> bool:
    """Whether torch may make fp32 products on `device` of TF32 or bf16 ones, as `set_float32_matmul_precision` allows.

    It is one setting for all threads, so what needs fp32 products takes fp64 ones rather than change it.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("tf32", "bf16")


def define(op: str, signature: str, fake: Callable[..., Any], *, option: str = "") -> None:
    """Register the op `s2d::<op>` with a trailing `str? impl=None`; `fake` takes the arguments before it.

    The first argument is a tensor or a list of tensors, whose device is asked for the implementation. `option` is a
    keyword-only argument of the op and of its implementations, which do without it by default.
    """
    arguments, returns = signature.split(" -> ")
    mutated = [place for place, argument in enumerate(arguments.split(",")) if "!)" in argument]
    keyword = f", *, {option}" if option else ""
    library.define(f"{op}({arguments}, str? impl=None{keyword}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    count = arguments.count(",") + 1  # the dispatcher leaves out a trailing argument that has its default value

    def call(*given: Any, **options: Any) -> Any:
        impl = given[count] if len(given) > count else None
        if not isinstance(given[0], Tensor) and not given[0]:
            return [] if "Tensor[]" in returns else None
        device = given[0].device if isinstance(given[0], Tensor) else given[0][0].device
        with exact_arithmetic(device):
            chosen = choose(op, impl, device, given[:count])
            result = _TABLE[op][chosen](*given[:count], **options)
        if chosen in ("cpu", "triton", "cuda"):
            # What a kernel writes behind autograd's back must still invalidate what autograd saved.
            for place in mutated:
                torch.autograd.graph.increment_version(given[place])
        return result

    library.impl(op, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s2d::{op}", lambda *given, **_: fake(*given[:count]))


def aligned_bytes(count: int, device: torch.device) -> Tensor:
    """Uninitialized bytes that start at a multiple of 256; torch's CPU allocator promises only 64."""
    alignment = 256
    memory = torch.empty(count + alignment, dtype=torch.uint8, device=device)
    offset = -memory.data_ptr() % alignment
    return memory[offset : offset + count]


def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on `device`, which is not waited for: from pageable memory the copy would wait."""
    staged = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return staged.to(device, non_blocking=True)


def check_integer(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """Return `value` as an int in low..high, or raise a TypeError/ValueError that names it."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}") from error
    if number < low or (high is not None and number > high):
        wanted = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}={number} must be {wanted}")
    return number


def check_number(name: str, value: object) -> float:
    """Return `value` as a finite float, or raise a TypeError/ValueError that names it."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} must be a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} must be finite")
    return number


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


def _topk_svd_fake(weights: list[Tensor], starts: list[Tensor], _ks: list[int], _reads: list[int]) -> list[Tensor]:
    flat: list[Tensor] = []
    for weight, start in zip(weights, starts, strict=True):
        (m, n), b = weight.shape, start.shape[0]
        flat += [start.new_empty(shape) for shape in ((m, b), (b,), (b, n), (b,), ())]
        flat.append(start.new_empty((), dtype=torch.int32))
    return flat


define(
    "topk_svd",
    "Tensor[] weights, Tensor[] starts, SymInt[] ks, SymInt[] reads -> Tensor[]",
    _topk_svd_fake,
    option="int? max_sms=None",
)

# --- add_penalty_grad_: grads[i] += U[i] diag(coefficients[i]) Vh[i] over the first ranks[i] (default all) components
# seeds: int64 [layers], with which bf16 gradients are rounded stochastically; None rounds all to the nearest.

define(
    "add_penalty_grad_",
    "Tensor(a!)[] grads, Tensor[] U, Tensor[] Vh, Tensor[] coefficients, Tensor? ranks -> ()",
    lambda *_: None,
    option="Tensor? seeds=None",
)

# --- PCDR: bounds [layers, 2, k_max] from the factors, or the ratios themselves [layers, k_max], fp64 ---------------

define(
    "pcdr_bounds",
    "Tensor[] weights, Tensor[] inputs, Tensor[] neurons, Tensor[] U, Tensor[] S, Tensor[] Vh, Tensor[] residuals, "
    "int k_max -> Tensor",
    lambda weights, _x, _i, _u, _s, _v, _r, k_max: weights[0].new_empty((len(weights), 2, k_max), dtype=torch.float64),
)
define(
    "pcdr_exact",
    "Tensor[] weights, Tensor[] inputs, Tensor[] neurons, int k_max, float? threshold -> Tensor",
    lambda weights, _x, _i, k_max, _threshold: weights[0].new_empty((len(weights), k_max), dtype=torch.float64),
)

# --- adamw_: one step of AdamW of all tensors, views [m, n], with the penalty of each from its factors ---------------
# steps: [] fp32, already counted; rank 0 where there is no penalty. groups: of each tensor its group, whose six
# `numbers` are lr, beta1, beta2, eps, weight_decay, maximize (0 or 1); lrs [groups] fp32 on the device, instead of lr.
# clip_coef, grad_scale, found_inf: one fp32 number each on the device.

define(
    "adamw_",
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps, "
    "Tensor[] U, Tensor[] Vh, Tensor[] coefficients, Tensor? ranks, SymInt[] groups, float[] numbers, Tensor? lrs, "
    "Tensor? clip_coef, Tensor? grad_scale, Tensor? found_inf, bool decoupled, bool clip_penalty -> ()",
    lambda *_: None,
)
