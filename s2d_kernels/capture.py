"""Capture of each layer's largest activation, and of the weight that made it, during one training step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_kernels.ops import exact_arithmetic
from s2d_kernels.parameters import Matrix


class Captured(NamedTuple):
    """Largest |W x| seen: its `value` (0-dim fp32), the `neuron` (0-dim int64), the input row `x [n]` (fp32).

    `weight [m, n]` is a copy of W at the first forward of the step, or W itself.
    """

    value: Tensor
    neuron: Tensor
    x: Tensor
    weight: Tensor


class _EagerWhileCapturing:
    """Keeps compiled functions eager while any capture is active; one global switch, hence one count."""

    def __init__(self) -> None:
        self._count = 0
        self._stance: Any = None

    def enter(self) -> None:
        self._count += 1
        # Without Dynamo nothing is compiled; importing it for nothing takes seconds.
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        self._count -= 1
        if self._count == 0 and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_eager = _EagerWhileCapturing()


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
    the largest there is. Nothing is read back to the host.

    The hooks hold this object weakly: where it is dropped, or the model is copied or pickled, they do nothing.
    """

    def __init__(self, matrices: Iterable[Matrix], *, require_grad: bool = True, copy_weights: bool = True) -> None:
        self._by_module: dict[nn.Module, list[Matrix]] = {}
        for matrix in matrices:
            self._by_module.setdefault(matrix.module, []).append(matrix)
        self._require_grad = require_grad
        self._copy_weights = copy_weights
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._captured: dict[str, Captured] = {}

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
        return bool(self._captured)

    def start(self) -> None:
        """Install the hooks and forget what was captured. Compiled models run eagerly until `stop`.

        torch.compile does not look for hooks that were installed after it traced a module.
        """
        self.stop()
        self._captured = {}
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
        captured, self._captured = self._captured, {}
        return captured

    def __enter__(self) -> dict[str, Captured]:
        self.start()
        return self._captured

    def __exit__(self, *_: object) -> None:
        self.stop()

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take one call of `module` into account."""
        if self._require_grad and not torch.is_grad_enabled():
            return
        with exact_arithmetic(output[0].device if isinstance(output, tuple | list) else output.device):
            for matrix in self._by_module[module]:
                self._keep_larger(matrix, *_inputs_and_outputs(matrix, args, kwargs, output))

    def _keep_larger(self, matrix: Matrix, x: Tensor, y: Tensor) -> None:
        if y.numel() == 0:
            return
        magnitude = y.float().abs()
        usable = x.isfinite().all(1, keepdim=True) & ~magnitude.isnan()
        magnitude = torch.where(usable, magnitude, -1.0)
        value, flat = magnitude.flatten().max(0)
        row = x.index_select(0, (flat // y.shape[1]).reshape(1)).squeeze(0).float()
        neuron = flat % y.shape[1]
        old = self._captured.get(matrix.name)
        if old is None:
            weight = matrix.rows(matrix.parameter.detach())
            weight = weight.clone() if self._copy_weights else weight
        else:
            larger = value > old.value
            value = torch.where(larger, value, old.value)
            neuron = torch.where(larger, neuron, old.neuron)
            row = torch.where(larger, row, old.x)
            weight = old.weight
        self._captured[matrix.name] = Captured(value, neuron, row, weight)


def _inputs_and_outputs(
    matrix: Matrix, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor]:
    """Input rows x `[tokens, n]` and W x `[tokens, m]`, bias excluded, of one call."""
    module: Any = matrix.module
    block = slice(matrix.start, matrix.stop)
    if matrix.kind == "attention":
        # The projected values stay inside the attention function: recompute this block's.
        position = matrix.start // max(matrix.stop - matrix.start, 1)
        names = ("query", "key", "value")
        x = args[position] if len(args) > position else kwargs[names[position]]
        x = x.reshape(-1, x.shape[-1])
        return x, F.linear(x, matrix.rows(matrix.parameter).to(x.dtype))
    x = args[0] if args else kwargs["input"]
    bias = module.bias
    output = output[0] if isinstance(output, tuple | list) else output  # some subclasses return the bias beside it
    if matrix.kind == "patch":
        x = x if x.ndim == 4 else x.unsqueeze(0)
        y = output if output.ndim == 4 else output.unsqueeze(0)
        x = F.unfold(x, module.kernel_size, stride=module.stride).mT.reshape(-1, matrix.shape[1])
        y = y.flatten(2).mT.reshape(-1, y.shape[1])
    else:
        x, y = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    y = y[:, block]
    if isinstance(bias, Tensor):
        y = y.float() - bias[block].float()
    return x, y
