"""Running somebody's model over batches without training it, for calibration and diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and without fused paths that call no hooks; all restored afterwards."""
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in training.items():
            module.training = mode


def run_batches(
    model: nn.Module, batches: Iterable[Any], *, name: str = "batches", progress: Callable[[int], object] | None = None
) -> None:
    """Call `model` on each batch: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: there is no batch.
        TypeError: a batch is something else.
    """
    count = 0
    with evaluation_mode(model):
        for batch in batches:
            if isinstance(batch, Tensor):
                model(batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                raise TypeError(f"{name}[{count}] is a {type(batch).__name__}: give a tensor, tuple, list or dict")
            count += 1
            if progress is not None:
                progress(1)
    if count == 0:
        raise ValueError(f"{name} holds no batch: an iterator may have been used up before")
