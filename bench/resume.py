"""`python -m bench resume`: hashes of a training run, and of the same run stopped and resumed by another process."""

from __future__ import annotations

import hashlib
import multiprocessing
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.soak import INTERVAL, LEAD, LR, Model
from s2d_kernels import S2D

MODES = ("coupled", "decoupled")
SIDES = ("thread", "in place")
STOPS = (20, 21, 23, 27)  # a refresh is due; is under way; arrives; nothing


@dataclass(frozen=True)
class Run:
    """One run: `stop` is the number of steps after which it was stopped, None where it was not.

    `under_way` says whether a refresh was when it was stopped, `digest` is the SHA-256 of `digest_of` at its end.
    """

    mode: str
    side: str
    stop: int | None
    under_way: bool
    digest: str


def build(mode: str, side: str, lead: int = LEAD) -> tuple[Model, torch.optim.Optimizer, S2D]:
    """Model, an optimizer that has state of its own, and `S2D` attached to it."""
    model = Model()
    reg = S2D(
        model,
        mode=mode,
        strength=5e-4 if mode == "coupled" else 0.1,
        interval=INTERVAL,
        lead=lead,
        asynchronous=side == "thread",
    )
    coupled = mode == "coupled"
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9) if coupled else torch.optim.AdamW(model.parameters(), LR)
    reg.attach(optimizer)
    return model, optimizer, reg


def train(model: Model, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """The steps with these numbers, each with its own batch."""
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)) + 1
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


def digest_of(model: nn.Module, reg: S2D) -> str:
    """SHA-256 of every parameter and of every tensor of `S2D`: factors, ranks, counts; a refresh under way included."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *sorted(reg.state_dict().items())]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def straight(mode: str, side: str, steps: int, lead: int = LEAD) -> Run:
    """Without a stop."""
    model, optimizer, reg = build(mode, side, lead)
    train(model, optimizer, range(steps))
    digest = digest_of(model, reg)
    reg.close()
    return Run(mode, side, None, False, digest)


def stop(mode: str, side: str, at: int, file: Path) -> bool:
    """Train `at` steps and write a checkpoint; returns whether a refresh was under way."""
    model, optimizer, reg = build(mode, side)
    train(model, optimizer, range(at))
    under_way = reg._pending is not None
    torch.save([model.state_dict(), optimizer.state_dict(), reg.state_dict()], file)
    reg.close()
    return under_way


def resume(mode: str, side: str, at: int, steps: int, file: Path) -> str:
    """Go on from the checkpoint until `steps` steps are done."""
    model, optimizer, reg = build(mode, side)
    of_model, of_optimizer, of_s2d = torch.load(file, weights_only=True)
    model.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)
    reg.load_state_dict(of_s2d)
    train(model, optimizer, range(at, steps))
    digest = digest_of(model, reg)
    reg.close()
    return digest


def all_runs(steps: int, stops: Sequence[int]) -> list[Run]:
    """Of each mode and side the run without a stop, then those with one, each resumed by another process."""
    runs = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other,
    ):
        for mode in MODES:
            for side in SIDES:
                runs.append(straight(mode, side, steps))
                for at in stops:
                    file = Path(folder, f"{mode}-{side}-{at}.pt")
                    under_way = stop(mode, side, at, file)
                    digest = other.submit(resume, mode, side, at, steps, file).result()
                    runs.append(Run(mode, side, at, under_way, digest))
    return runs


def command(
    steps: Annotated[int, typer.Option(min=max(STOPS) + 1, help="Steps of every run.")] = 200,
) -> None:
    """SHA-256 of parameters and factors after a run, and after the same run stopped and resumed in another process."""
    runs = all_runs(steps, STOPS)
    table = Table("mode", "side", "stopped after", "refresh under way", f"SHA-256 after {steps} steps")
    for run in runs:
        at = "-" if run.stop is None else str(run.stop)
        table.add_row(run.mode, run.side, at, "yes" if run.under_way else "", run.digest)
    Console(width=130).print(table)
    if any(len({run.digest for run in runs if run.mode == mode}) > 1 for mode in MODES):
        Console().print("[red]the runs of one mode differ")
        raise typer.Exit(1)
