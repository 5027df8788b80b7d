"""The cheapest setting of a peer that reaches the wanted error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

Width = TypeVar("Width")


class Trial(NamedTuple):
    """What one run of a setting took and how far off it was."""

    seconds: float
    error: float


class Found(NamedTuple, Generic[Width]):
    """A setting; `passed` False says that none reached the limit and this one came closest."""

    width: Width
    effort: float
    passed: bool


def cheapest_setting(
    grid: Mapping[Width, Sequence[float]],
    screen: Callable[[Width, float], Trial],
    full: Callable[[Width, float], Trial],
    limit: float,
    *,
    finalists: int = 2,
) -> Found[Width]:
    """Search over (width, effort) for the fewest seconds with error <= limit.

    Args:
        grid: per width the efforts (iterations, or a tolerance) from the least to the most work; a width's error is
            taken to fall along them.
        screen: runs a setting on a sample of the matrices; decides which widths come first.
        full: runs it on all of them. Only these trials decide about passing and about the final choice.
        limit: largest error that passes.
        finalists: how many passing widths are compared in full.
    """
    screened = []
    for width, efforts in grid.items():
        low, high, seconds = 0, len(efforts), float("inf")
        while low < high:  # least effort that passes on the sample; len(efforts) if none does
            middle = (low + high) // 2
            trial = screen(width, efforts[middle])
            if trial.error <= limit:
                high, seconds = middle, trial.seconds
            else:
                low = middle + 1
        screened.append((seconds, width, min(low, len(efforts) - 1)))
    screened.sort(key=lambda entry: entry[0])

    passing: list[tuple[float, Width, float]] = []
    failing: list[tuple[float, Width, float]] = []

    def passes(width: Width, place: int) -> bool:
        trial = full(width, grid[width][place])
        passed = trial.error <= limit
        entry = (trial.seconds if passed else trial.error, width, grid[width][place])
        (passing if passed else failing).append(entry)
        return passed

    finished = 0
    for _, width, place in screened:
        if finished == finalists:
            break
        # The sample may be luckier or unluckier than the whole: look for the least passing effort both ways.
        passed = passes(width, place)
        if passed:
            while place > 0 and passes(width, place - 1):
                place -= 1
        while not passed and place + 1 < len(grid[width]):
            place += 1
            passed = passes(width, place)
        finished += passed
    if not passing and not failing:
        raise ValueError("the grid of settings is empty")
    _, width, effort = min(passing or failing, key=lambda entry: entry[0])
    return Found(width, effort, bool(passing))
