"""Capture of each layer's largest activation, and of the weight that made it, during one training step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_kernels.parameters import Matrix


class Captured(NamedTuple):
    """Largest |W x| seen: its `value` (0-dim fp32), the `neuron` (0-dim int64), the input row `x [n]` (fp32).

    `weight [m, n]` is a copy of W at the first forward of the step.
    """

    value: Tensor
    neuron: Tensor
    x: Tensor
    weight: Tensor


class ActivationCapture:
    """Forward hooks that keep, per matrix, the largest |W x| over all calls between `start` and `stop`.

    Only calls with gradients enabled count, so validation in between does not. Several calls (gradient accumulation,
    a module used twice) give the maximum over the calls; a repeated forward (activation checkpointing) changes
    nothing. Non-finite activations are left out. Nothing is read back to the host.
    """

    def __init__(self, matrices: Iterable[Matrix], *, require_grad: bool = True) -> None:
        self._by_module: dict[nn.Module, list[Matrix]] = {}
        for matrix in matrices:
            self._by_module.setdefault(matrix.module, []).append(matrix)
        self._require_grad = require_grad
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._captured: dict[str, Captured] = {}

    @property
    def active(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    def start(self) -> None:
        """Install the hooks and forget what was captured."""
        self.stop()
        self._captured = {}
        for module in self._by_module:
            self._handles.append(module.register_forward_hook(self._observe, with_kwargs=True))

    def stop(self) -> dict[str, Captured]:
        """Remove the hooks; returns what was captured by matrix name. Matrices that were not called are missing."""
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

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._require_grad and not torch.is_grad_enabled():
            return
        with torch.no_grad():
            for matrix in self._by_module[module]:
                self._keep_larger(matrix, *_inputs_and_outputs(matrix, args, kwargs, output))

    def _keep_larger(self, matrix: Matrix, x: Tensor, y: Tensor) -> None:
        if y.numel() == 0:
            return
        magnitude = y.float().abs()
        magnitude = torch.where(magnitude.isfinite(), magnitude, -1.0)
        value, flat = magnitude.flatten().max(0)
        row = x.index_select(0, (flat // y.shape[1]).reshape(1)).squeeze(0).float()
        neuron = flat % y.shape[1]
        old = self._captured.get(matrix.name)
        if old is None:
            weight = matrix.view(matrix.parameter.detach()).clone()
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
        return x, F.linear(x, matrix.view(matrix.parameter).to(x.dtype))
    x = args[0] if args else kwargs["input"]
    bias = module.bias
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
