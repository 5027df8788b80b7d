"""Capture of each layer's largest activation, and of the weight that made it, during one training step."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_kernels.capture_ops import capture_largest_
from s2d_kernels.ops import exact_arithmetic
from s2d_kernels.parameters import Matrix

logger = logging.getLogger("s2d_kernels")


class Captured(NamedTuple):
    """Largest |W x| seen: its `value` (0-dim fp32), the `neuron` (0-dim int64), the input row `x [n]` (fp32).

    `weight [m, n]` is a copy of W at the first forward of the step, or W itself. Where it is not `certain` that the
    matrix was called at all, a negative value says that it was not, or saw no finite row.
    """

    value: Tensor
    neuron: Tensor
    x: Tensor
    weight: Tensor
    certain: bool = True

    def apart(self, matrix: Matrix) -> bool:
        """Whether the weight is a copy in its own memory."""
        return self.weight.untyped_storage().data_ptr() != matrix.parameter.untyped_storage().data_ptr()


class _Kept(NamedTuple):
    """What `capture_largest_` keeps: value [], place [2] and row [n]."""

    value: Tensor
    place: Tensor
    row: Tensor

    @classmethod
    def nothing(cls, features: int, device: torch.device) -> _Kept:
        place = torch.zeros(2, dtype=torch.int64, device=device)
        value = torch.full((), -1.0, dtype=torch.float32, device=device)
        return cls(value, place, torch.full((features,), torch.nan, dtype=torch.float32, device=device))

    def clear(self) -> None:
        self.value.fill_(-1.0)
        self.place.zero_()
        self.row.fill_(torch.nan)

    def captured(self, weight: Tensor, *, certain: bool) -> Captured:
        return Captured(self.value.clone(), self.place[0].clone(), self.row.clone(), weight, certain)


class _EagerWhileCapturing:
    """Keeps compiled functions eager while any capture is active; one switch of the process, hence one count."""

    def __init__(self) -> None:
        self._count = 0
        self._stance: Any = None

    def enter(self) -> None:
        self._count += 1
        self.ensure()

    def ensure(self) -> None:
        """Once more, since Dynamo may have been imported after `enter`."""
        # Without Dynamo nothing is compiled; importing it for nothing takes seconds.
        if self._count and self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        self._count -= 1
        if self._count or self._stance is None:
            return
        ours, self._stance = self._stance, None
        if sys.modules["torch._dynamo"].eval_frame._stance is ours.stance:
            ours.__exit__(None, None, None)
        else:
            # The user's own stance holds, and may end by restoring ours: which then must mean what was before it.
            for field in dataclasses.fields(ours.stance):
                setattr(ours.stance, field.name, getattr(ours.prev, field.name))


_eager = _EagerWhileCapturing()


def ensure_eager() -> None:
    """Keep compiled functions eager while a capture is active, now that Dynamo is imported (optimizers do that)."""
    _eager.ensure()


class _Hook:
    """Forward hook that dies with its capture and is inert in a copy or a pickle of the model."""

    def __init__(self, capture: ActivationCapture | None = None) -> None:
        self._capture = weakref.ref(capture) if capture is not None else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        capture = self._capture() if self._capture is not None else None
        if capture is not None:
            capture.observe(module, args, kwargs, output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class ActivationCapture:
    """Forward hooks that keep, per matrix, the largest |W x| over all calls between `start` and `stop`.

    Only calls with gradients enabled count, so validation in between does not. Several calls (gradient accumulation,
    a module used twice) give the maximum over the calls; a repeated forward (activation checkpointing) changes
    nothing. Rows of the input that hold NaN or Inf are left out; an output that overflows to Inf from a finite row is
    the largest there is. Nothing is read back to the host. A call whose input or output cannot be told is a TypeError
    that names the layer.

    The hooks hold this object weakly: where it is dropped, or the model is copied or pickled, they do nothing.
    """

    def __init__(self, matrices: Iterable[Matrix], *, require_grad: bool = True, copy_weights: bool = True) -> None:
        self._by_module = _by_module(matrices)
        self._require_grad = require_grad
        self._copy_weights = copy_weights
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._kept: dict[str, tuple[_Kept, Tensor]] = {}
        self._versions: dict[str, int] = {}

    def __del__(self) -> None:
        if not sys.is_finalizing():  # nothing can be imported any more, and nothing will run
            self.stop()

    @property
    def active(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    @property
    def seen(self) -> bool:
        """Whether any matrix has been called since `start`."""
        return bool(self._kept)

    def start(self) -> None:
        """Install the hooks and forget what was captured. Compiled models run eagerly until `stop`.

        torch.compile does not look for hooks that were installed after it traced a module.
        """
        self.stop()
        self._kept = {}
        hook = _Hook(self)
        for module in self._by_module:
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        if self._by_module:
            _eager.enter()

    def stop(self) -> dict[str, Captured]:
        """Remove the hooks; returns what was captured by matrix name. Matrices that were not called are missing."""
        if self._handles:
            _eager.leave()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        found, self._kept = self._kept, {}
        return {name: kept.captured(weight, certain=True) for name, (kept, weight) in found.items()}

    def before_change(self) -> None:
        """The last moment before the optimizer changes the weights: copy anew what was replaced since its forward."""
        if not self._kept or not self._copy_weights:
            return
        for matrix in {matrix for some in self._by_module.values() for matrix in some}:
            version = matrix.parameter._version
            if matrix.name in self._kept and version != self._versions[matrix.name]:
                self._versions[matrix.name] = version
                self._kept[matrix.name][1].copy_(matrix.rows(matrix.parameter.detach()))
                logger.warning("S2D: %s changed between its forward and the optimizer's step", matrix.name)

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take one call of `module` into account."""
        if self._require_grad and not torch.is_grad_enabled():
            return
        if module not in self._by_module:  # a shallow copy, which shares the hooks
            raise NotImplementedError(
                f"a replica of a {type(module).__name__} ran, as nn.DataParallel makes them. S2D is not supported "
                "there: train on one GPU, without DataParallel"
            )
        matrices = self._by_module[module]
        with exact_arithmetic(matrices[0].parameter.device):
            for matrix in matrices:
                self._keep_larger(matrix, *_inputs_and_outputs(matrix, module, args, kwargs, output))

    def _keep_larger(self, matrix: Matrix, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        if y.numel() == 0:
            return
        if matrix.name not in self._kept:
            weight = matrix.rows(matrix.parameter.detach())
            weight = weight.clone() if self._copy_weights else weight
            self._kept[matrix.name] = _Kept.nothing(x.shape[1], x.device), weight
            self._versions[matrix.name] = matrix.parameter._version
        kept = self._kept[matrix.name][0]
        capture_largest_(*kept, y.detach(), x.detach(), bias=None if bias is None else bias.detach())


class GraphCapture:
    """`ActivationCapture` for CUDA graphs and compiled models: the operation is always there and acts when enabled.

    Hooks are not replayed with a CUDA graph, and installing one later recompiles. Build this before capturing or
    compiling; `start` and `stop` write one flag on the device. All else is as there, except that the weight is copied
    by `stop`, or by `start` where `copy_at_start`, as neither knows of the first forward; and that a matrix that was
    not called cannot be told from one that saw no finite row: both have a value of -1.

    Only linear layers and patch embeddings: what nn.MultiheadAttention projects inside cannot be seen without a second
    product.

    Args:
        matrices: of one model on one device.
        copy_at_start: the weights are those of `start`, for a loop that changes them before `stop`.

    Raises:
        NotImplementedError: a matrix of a packed attention projection.
    """

    def __init__(self, matrices: Iterable[Matrix], *, copy_at_start: bool = False) -> None:
        self._matrices = list(matrices)
        packed = [matrix.name for matrix in self._matrices if matrix.kind == "attention"]
        if packed:
            raise NotImplementedError(f"{packed[0]!r} is projected inside nn.MultiheadAttention: capture it with hooks")
        self._copy_at_start = copy_at_start
        self._weights: dict[str, Tensor] = {}
        self._kept: dict[str, _Kept] = {}
        self.active = False
        for matrix in self._matrices:
            self._kept[matrix.name] = _Kept.nothing(matrix.shape[1], matrix.parameter.device)
        device = self._matrices[0].parameter.device if self._matrices else torch.device("cpu")
        self._enabled = torch.zeros((), dtype=torch.bool, device=device)
        self._handles = [
            module.register_forward_hook(
                _Resident([(m, self._kept[m.name]) for m in some], self._enabled), with_kwargs=True
            )
            for module, some in _by_module(self._matrices).items()
        ]

    def start(self) -> None:
        """Forget what was captured, and let the operations act."""
        for kept in self._kept.values():
            kept.clear()
        if self._copy_at_start:
            self._copy_weights()
        self._enabled.fill_(True)
        self.active = True

    def stop(self) -> dict[str, Captured]:
        """Let the operations rest; returns what was captured by matrix name."""
        self._enabled.fill_(False)
        if not self.active:
            return {}
        self.active = False
        if not self._copy_at_start:
            self._copy_weights()
        weights, self._weights = self._weights, {}
        # copies made at the start are from before a change of dtype
        return {
            m.name: self._kept[m.name].captured(weights[m.name].to(m.parameter.dtype), certain=False)
            for m in self._matrices
        }

    def before_change(self) -> None:
        """The last moment before the optimizer changes the weights."""
        if self.active and self._copy_at_start:
            self._copy_weights()

    def remove(self) -> None:
        """Take the operations out of the model; what was compiled with them is compiled anew."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.active = [], False

    @property
    def seen(self) -> bool:
        """Unknown to the host: False."""
        return False

    def _copy_weights(self) -> None:
        self._weights = {m.name: m.rows(m.parameter.detach()).clone() for m in self._matrices}


class _Resident:
    """Forward hook of plain tensors and one operation, which Dynamo traces; inert in a copy of the model."""

    def __init__(self, targets: Sequence[tuple[Matrix, _Kept]] = (), enabled: Tensor | None = None) -> None:
        self._targets = [(matrix, *kept) for matrix, kept in targets]
        self._enabled = enabled

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for matrix, value, place, row in self._targets:
            x, y, bias = _inputs_and_outputs(matrix, module, args, kwargs, output)
            if y.device != value.device:
                raise ValueError(
                    f"{matrix.name!r} runs on {y.device}, but its capture was made on {value.device}: with "
                    "capture='graph' move the model first, then build S2D"
                )
            bias = None if bias is None else bias.detach()
            torch.ops.s2d.capture_largest_(value, place, row, y.detach(), x.detach(), bias, self._enabled, None)

    def __reduce__(self) -> tuple[type[_Resident], tuple[()]]:
        return _Resident, ()


def _by_module(matrices: Iterable[Matrix]) -> dict[nn.Module, list[Matrix]]:
    """Every module that applies a matrix, with all those it applies."""
    found: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices:
        for module in (matrix.module, *matrix.twins):
            found.setdefault(module, []).append(matrix)
    return found


def _inputs_and_outputs(
    matrix: Matrix, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input rows x `[tokens, n]`, the output y `[tokens, m]`, and the bias in it, of one call of a module.

    A subclass may be called otherwise than its base: what is not at the usual place must be the only tensor of its
    size, and of several outputs only one may have the input's rows.

    Raises:
        TypeError: naming the layer, where they cannot be told.
    """
    block = slice(matrix.start, matrix.stop)
    rows, columns = matrix.parameter.shape[:2]
    given = (*args, *kwargs.values())
    if matrix.kind == "attention":
        # The projected values stay inside the attention function: recompute this block's.
        position = matrix.start // module.embed_dim
        name = ("query", "key", "value")[position]
        x = args[position] if len(args) > position else kwargs.get(name)
        x = _pick(matrix, module, name, x, given, columns)
        x = x.reshape(-1, columns)
        return x, F.linear(x, matrix.rows(matrix.parameter).to(x.dtype)), None
    x = _pick(matrix, module, "input", args[0] if args else kwargs.get("input"), given, columns)
    if isinstance(output, tuple | list | Mapping):
        given = tuple(output.values() if isinstance(output, Mapping) else output)
        likely: Sequence[object] = given
        if matrix.kind == "linear":  # no bias beside it
            whole = [t for t in given if isinstance(t, Tensor) and t.numel() * columns == x.numel() * rows]
            likely = [t for t in whole if t.shape[:-1] == x.shape[:-1]] or whole
        y = _pick(matrix, module, "output", None, likely, rows, seen=given)
    else:
        y = _pick(matrix, module, "output", output, (output,), rows)
    if matrix.kind == "patch":
        x = x if x.ndim == 4 else x.unsqueeze(0)
        y = y if y.ndim == 4 else y.unsqueeze(0)
        x = F.unfold(x, module.kernel_size, stride=module.stride).mT.reshape(-1, matrix.shape[1])
        y = y.flatten(2).mT.reshape(-1, rows)
    else:
        x, y = x.reshape(-1, columns), y.reshape(-1, rows)
    if len(x) != len(y) or x.device != y.device:
        fault = f"{len(x)} input rows on {x.device} do not fit {len(y)} output rows on {y.device}"
        raise _refusal(matrix, module, fault)
    bias = module.bias
    return x, y[:, block], bias[block] if isinstance(bias, Tensor) else None


def _pick(
    matrix: Matrix,
    module: nn.Module,
    role: str,
    usual: object,
    given: Sequence[object],
    size: int,
    seen: Sequence[object] = (),
) -> Tensor:
    """`usual` if it is a tensor of the layer's `size`, else the only such one of those `given`."""
    axis = -3 if matrix.kind == "patch" else -1

    def fits(value: object) -> TypeGuard[Tensor]:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        return (value.ndim in (3, 4) if axis == -3 else value.ndim > 0) and value.shape[axis] == size

    if fits(usual):
        return usual
    found = [value for value in given if fits(value)]
    if len(found) != 1:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in seen or given]
        fault = f"expected one {role} with size {size} in dimension {axis} among {shapes}"
        raise _refusal(matrix, module, fault)
    return found[0]


def _refusal(matrix: Matrix, module: nn.Module, fault: str) -> TypeError:
    name = matrix.name.removesuffix(f"[{matrix.start}:{matrix.stop}]")
    alike = re.sub(r"\b[0-9]+\b", r"\\d+", name)  # that of all blocks
    return TypeError(
        f"S2D cannot follow a call of {type(module).__name__} {name!r}: {fault}. Leave it out with "
        f'select=[(r"^{alike}$", False)]'
    )
