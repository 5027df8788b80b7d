"""What a captured CUDA graph reads at each of its replays: memory that stays, whatever is written into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2d_kernels import ops


class Chosen:
    """Elements of a tensor `[layers]` on a device, in the same memory as long as the places are the same."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._last: tuple[tuple[int, ...], Tensor, Tensor] | None = None  # places, the same on the device, the result
        self._captured: list[Tensor] = []  # graphs go on reading these, whatever places come later

    def at(self, places: Sequence[int]) -> Tensor:
        """The elements at ascending `places` as they are now; without waiting for the device."""
        if len(places) == len(self._values):
            return self._values
        device = self._values.device
        capturing = ops.capturing(device)
        if self._last is None or self._last[0] != tuple(places):
            if capturing:  # where no table can be copied
                return torch.stack([self._values[place] for place in places])
            chosen = ops.on_device(places, torch.int64, device)
            self._last = tuple(places), chosen, self._values[chosen]
        _, chosen, result = self._last
        if capturing:
            self._captured += [chosen, result]
        return torch.index_select(self._values, 0, chosen, out=result)
