"""`python -m bench soak`: thousands of steps with a disturbed worker, lost layers and reloads, against a quiet twin."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import io
import logging
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from s2d_kernels import S2D

WORKER = "s2d-side-stream"  # in the name of its thread
UNTIL_WAITED_FOR = -1.0  # a delay
INTERVAL, LEAD, LR = 10, 3, 1e-3
HANG_SECONDS = 300
# Allocated megabytes and Python objects that the second half may add: one refresh's copies are 0.04 MB.
MOST_MEGABYTES, MOST_OBJECTS = 0.25, 2000


@dataclass
class Soak:
    """What a run did and held.

    Attributes:
        steps, refreshes, arrived: of training; refreshes started, and factors taken over.
        expected: refreshes that must have arrived by the last step.
        late, waited_seconds: how often and how long a step waited for the worker.
        poisoned: refreshes that saw a layer with a NaN.
        reloads, reloads_in_flight: from a checkpoint in memory; of these with a refresh under way.
        same_bits: whether the weights equal those of the twin: no delay, no worker, no reload.
        resident: MB of memory in use after each tenth of the steps, as the system counts it.
        allocated, objects: MB that malloc has given out, and Python's blocks of memory, after each tenth. The system's
            count also moves with what an allocator keeps and with pages of libraries.
        threads: of S2D's workers, alive at the end and not at the start.
        seconds: both runs together.
    """

    steps: int
    refreshes: int = 0
    arrived: int = 0
    expected: int = 0
    late: int = 0
    waited_seconds: float = 0.0
    poisoned: int = 0
    reloads: int = 0
    reloads_in_flight: int = 0
    same_bits: bool = False
    resident: list[float] = field(default_factory=list)
    allocated: list[float] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    threads: int = 0
    seconds: float = 0.0

    @property
    def growth(self) -> tuple[float, int]:
        """Allocated MB and Python objects between the end of the first half and the end."""
        half = len(self.allocated) // 2
        return self.allocated[-1] - self.allocated[half], self.objects[-1] - self.objects[half]

    @property
    def passed(self) -> bool:
        """Nothing lost, nothing changed, nothing leaked."""
        megabytes, objects = self.growth
        flat = megabytes < MOST_MEGABYTES and objects < MOST_OBJECTS
        return self.same_bits and self.arrived == self.expected and self.threads == 0 and flat


class Model(nn.Module):
    """A trained path, and a layer beside it that may be lost without hurting the loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        first = nn.Linear(32, 64)
        self.path = nn.Sequential(first, nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
        self.beside = nn.Linear(32, 48)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            first.weight[:2] += 3
            self.beside.weight[0] += 5

    def forward(self, x: Tensor) -> Tensor:
        self.beside(x)
        return (self.path(x) - x).square().mean()


class _Counted(S2D):
    taken: int = 0
    started: int = 0
    late_before: int = 0  # no refresh is waited for between its start and what this counts

    def _launch_if_due(self) -> bool:
        self.late_before = self.late
        return super()._launch_if_due()

    def _take_over(self) -> None:
        super()._take_over()
        self.taken += 1

    def _refresh(self, *arguments: Any) -> Any:
        self.started += 1
        return super()._refresh(*arguments)


def soak(
    steps: int = 5000, *, mode: str = "decoupled", seed: int = 0, advance: Callable[[], object] | None = None
) -> Soak:
    """Train twice, disturbed and quietly, and compare.

    Args:
        steps: of each run.
        mode: of `S2D`.
        seed: of the delays, the lost layers and the reloads. The lost layers are the same in both runs.
        advance: called after each step of either run.
    """
    begin = time.perf_counter()
    before = set(threading.enumerate())
    faulthandler.dump_traceback_later(HANG_SECONDS, repeat=True, file=2)
    try:
        result = Soak(steps, expected=math.ceil(max(steps - LEAD, 0) / INTERVAL))
        disturbed = _run(result, mode, seed, advance, disturb=True)
        quiet = _run(Soak(steps), mode, seed, advance, disturb=False)
    finally:
        faulthandler.cancel_dump_traceback_later()
    pairs = zip(disturbed.path.parameters(), quiet.path.parameters(), strict=True)
    result.same_bits = all(torch.equal(a, b) for a, b in pairs)
    result.threads = sum(WORKER in thread.name for thread in set(threading.enumerate()) - before)
    result.seconds = time.perf_counter() - begin
    return result


def _run(result: Soak, mode: str, seed: int, advance: Callable[[], object] | None, *, disturb: bool) -> Model:
    # One generator for each thread: what they draw must not depend on who comes first.
    losses, events, delays = (random.Random(seed + number) for number in range(3))
    model = Model()

    def build() -> tuple[_Counted, torch.optim.Optimizer]:
        strength = 5e-4 if mode == "coupled" else 0.1
        reg = _Counted(model, mode=mode, strength=strength, interval=INTERVAL, lead=LEAD, asynchronous=disturb)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        reg.attach(optimizer)
        if disturb:
            refresh = reg._refresh

            def delayed(*arguments: Any) -> Any:
                delay = delays.choice((0.0, 0.0, 0.002, 0.01, UNTIL_WAITED_FOR))
                while delay == UNTIL_WAITED_FOR and reg.late == reg.late_before and not reg._closed:
                    time.sleep(0.001)
                time.sleep(max(delay, 0.0))
                return refresh(*arguments)

            reg._refresh = delayed  # type: ignore[method-assign]
        return reg, optimizer

    reg, optimizer = build()
    beside = model.beside.weight.detach().clone()
    for step in range(result.steps):
        if step % INTERVAL == 0:
            lost = losses.random() < 0.3
            with torch.no_grad():
                model.beside.weight.copy_(beside)
                if lost:
                    model.beside.weight[losses.randrange(48), losses.randrange(32)] = float("nan")
            result.poisoned += lost
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)) + 1
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
        if disturb and events.random() < 0.02:
            result.reloads += 1
            result.reloads_in_flight += reg._pending is not None
            file = io.BytesIO()
            torch.save({"s2d": reg.state_dict(), "optimizer": optimizer.state_dict()}, file)
            _count(result, reg)
            file.seek(0)
            stored = torch.load(file, weights_only=True)
            reg, optimizer = build()
            optimizer.load_state_dict(stored["optimizer"])
            reg.load_state_dict(stored["s2d"])
        if disturb and (step + 1) % max(result.steps // 10, 1) == 0:
            gc.collect()
            result.resident.append(_resident_megabytes())
            result.allocated.append(_allocated_megabytes())
            result.objects.append(sys.getallocatedblocks())
        if advance is not None:
            advance()
    _count(result, reg)
    return model


def _count(result: Soak, reg: _Counted) -> None:
    result.refreshes += reg.started
    result.arrived += reg.taken
    result.late += reg.late
    result.waited_seconds += reg.waited_seconds
    reg.close()


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _allocated_megabytes() -> float:
    """What malloc has given out and not got back; with another C library than glibc the resident memory."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return _resident_megabytes()
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return float(info.uordblks + info.hblkhd) / 2**20


def table(result: Soak) -> Table:
    """The figures of a run."""
    rows = {
        "steps": f"{result.steps} disturbed, {result.steps} quiet, {result.seconds:.0f} s",
        "refreshes started / arrived / expected": f"{result.refreshes} / {result.arrived} / {result.expected}",
        "waited for": f"{result.late} times, {result.waited_seconds:.1f} s",
        "refreshes with a lost layer": str(result.poisoned),
        "reloads / with a refresh under way": f"{result.reloads} / {result.reloads_in_flight}",
        "same bits as the quiet run": "yes" if result.same_bits else "NO",
        "resident MB at each tenth": " ".join(f"{value:.1f}" for value in result.resident),
        "allocated MB at each tenth": " ".join(f"{value:.2f}" for value in result.allocated),
        "the second half adds": f"{result.growth[0]:+.3f} MB allocated, {result.growth[1]:+d} Python objects",
        "threads left over": str(result.threads),
    }
    shown = Table("what", "figure")
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def command(
    steps: Annotated[int, typer.Option(min=20, help="Training steps, run twice.")] = 5000,
    mode: Annotated[str, typer.Option(help="coupled or decoupled.")] = "decoupled",
    seed: Annotated[int, typer.Option(help="Of the delays, the lost layers and the reloads.")] = 0,
) -> None:
    """Thousands of steps with a disturbed worker, lost layers and reloads; fails unless the bits are a quiet run's."""
    logger = logging.getLogger("s2d_kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)  # every lost layer is reported, as it should be
    try:
        with Progress(*Progress.get_default_columns(), transient=True) as progress:
            task = progress.add_task("soak", total=2 * steps)
            result = soak(steps, mode=mode, seed=seed, advance=lambda: progress.advance(task))
    finally:
        logger.setLevel(level)
    Console().print(table(result))
    if not result.passed:
        raise typer.Exit(1)
