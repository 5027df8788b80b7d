"""The cheapest setting of a peer that reaches the wanted error."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Width = TypeVar("Width")


class Trial(NamedTuple):
    """What one run of a setting took and how far off it was."""

    seconds: float
    error: float


class Found(NamedTuple):
    """A setting; `passed` False says that none reached the limit and this one came closest."""

    width: object
    effort: object
    passed: bool
    trials: int


def cheapest_setting(
    grid: Mapping[Width, Sequence[float]],
    screen: Callable[[Width, float], Trial],
    full: Callable[[Width, float], Trial],
    limit: float,
    *,
    finalists: int = 2,
) -> Found:
    """Search over (width, effort) for the fewest seconds with error <= limit.

    Args:
        grid: per width the efforts (iterations, or a tolerance) from the least to the most work; a width's error is
            taken to fall along them.
        screen: runs a setting on a sample of the matrices; decides which widths are worth a full run.
        full: runs it on all of them. Only these trials decide about passing and about the final choice.
        limit: largest error that passes.
        finalists: how many widths get full runs. Each is brought to its least passing effort, downwards too, lest
            an unlucky sample make a peer look dearer than it is.
    """
    trials = 0
    heap: list[tuple[float, int, Width, int]] = []
    for order, (width, efforts) in enumerate(grid.items()):
        low, high, seconds = 0, len(efforts), float("inf")
        while low < high:  # least effort that passes on the sample; len(efforts) if none does
            middle = (low + high) // 2
            trial = screen(width, efforts[middle])
            trials += 1
            if trial.error <= limit:
                high, seconds = middle, trial.seconds
            else:
                low = middle + 1
        heapq.heappush(heap, (seconds, order, width, min(low, len(efforts) - 1)))

    best: tuple[float, Width, float] | None = None
    closest: tuple[float, Width, float] | None = None
    passing = 0
    while heap and passing < finalists:
        _, _, width, place = heapq.heappop(heap)
        efforts = grid[width]
        went_up = False
        while True:
            trial = full(width, efforts[place])
            trials += 1
            if closest is None or trial.error < closest[0]:
                closest = (trial.error, width, efforts[place])
            if trial.error > limit:
                if passed_here := best is not None and best[1] == width:
                    break  # walked down one too far
                place, went_up = place + 1, True
                if place == len(efforts):
                    break
                continue
            if best is None or trial.seconds < best[0] or best[1] == width:
                best = (trial.seconds, width, efforts[place])
            if went_up or place == 0:
                break
            place -= 1
        passing += 1
    if best is not None:
        return Found(best[1], best[2], True, trials)
    if closest is None:
        raise ValueError("the grid of settings is empty")
    return Found(closest[1], closest[2], False, trials)
