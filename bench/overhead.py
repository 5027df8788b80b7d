"""`python -m bench overhead` and `timeline`: what S2D adds to a step of MiniLM's fine-tuning, and what runs when."""

from __future__ import annotations

import json as json_module
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from bench import timing
from s2d_kernels import S2D
from s2d_kernels.demo_models import english_batches, load_minilm
from s2d_kernels.scheduler import LABEL

LR = 2e-5
IN_STEP = "S2D in the step: start, join, decay"
LANES = {
    "forward and backward": "training thread",
    "optimizer step": "training thread",
    IN_STEP: "S2D, in that thread",
    LABEL: "side worker",
}


class FineTuning:
    """MiniLM, its AdamW and fixed batches of English: SimCSE's contrastive loss (arXiv 2104.08821) by dropout.

    Args:
        device: where to train.
        batch, tokens: paragraphs a step (each twice) and their length.
        s2d: arguments of `S2D`, or None for training without it.
    """

    def __init__(self, device: torch.device, *, batch: int, tokens: int, s2d: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        model, tokenizer = load_minilm()
        self.model = model.to(device).train()
        self.batches = [
            {key: tensor.repeat(2, 1).to(device) for key, tensor in one.items()}
            for one in english_batches(tokenizer, batches=8, batch_size=batch, max_length=tokens)
        ]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.reg = None if s2d is None else S2D(self.model, **s2d)
        if self.reg is not None:
            self.reg.attach(self.optimizer)
        self.step_number = 0

    def step(self) -> None:
        """One training step."""
        batch = self.batches[self.step_number % len(self.batches)]
        with record_function("forward and backward"):
            self.optimizer.zero_grad()
            self._loss(batch).backward()
        with record_function("optimizer step"):
            self.optimizer.step()
        self.step_number += 1

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = self.model(**batch).last_hidden_state
        first, second = F.normalize((hidden * mask).sum(1) / mask.sum(1)).chunk(2)
        similarity = first @ second.mT / 0.05
        return F.cross_entropy(similarity, torch.arange(len(first), device=similarity.device))


@dataclass
class Overhead:
    """Seconds of the steps, by position in the interval.

    Attributes:
        plain, with_s2d: [position][block], seconds.
        late, waited_seconds, snapshot_bytes: of `S2D`.
        environment: as in every row of the benchmarks.
        setting: batch, tokens, mode, interval, lead, blocks.
    """

    plain: list[list[float]]
    with_s2d: list[list[float]]
    late: int
    waited_seconds: float
    snapshot_bytes: int
    environment: dict[str, Any]
    setting: dict[str, Any]

    @property
    def exposed(self) -> float:
        """Time of an interval with S2D over that without, minus 1; each position by its median over the blocks."""
        return _interval(self.with_s2d) / _interval(self.plain) - 1

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest of the same by single pairs of blocks."""
        pairs = [
            sum(a) / sum(b) - 1
            for a, b in zip(zip(*self.with_s2d, strict=True), zip(*self.plain, strict=True), strict=True)
        ]
        return min(pairs), max(pairs)


def _interval(seconds: list[list[float]]) -> float:
    return sum(statistics.median(blocks) for blocks in seconds)


def measure(
    device: torch.device,
    *,
    batch: int,
    tokens: int,
    blocks: int,
    s2d: dict[str, Any],
    advance: Callable[[], object] = lambda: None,
) -> Overhead:
    """Blocks of one interval each with and without S2D in turn, in the order A B B A; the first refresh is not counted.

    A block ends with no refresh under way, so that the worker never runs beside the plain steps.
    """
    interval = s2d["interval"]
    runs = [FineTuning(device, batch=batch, tokens=tokens, s2d=arguments) for arguments in (None, s2d)]
    for run in runs:  # the cold refresh, allocators, caches
        _seconds(run, interval, device, advance)
    seconds: list[list[list[float]]] = [[], []]
    for block in range(blocks):
        for which in (0, 1) if block % 2 == 0 else (1, 0):
            seconds[which].append(_seconds(runs[which], interval, device, advance))
    reg = runs[1].reg
    assert reg is not None
    plain, with_s2d = ([list(position) for position in zip(*one, strict=True)] for one in seconds)
    result = Overhead(
        plain,
        with_s2d,
        reg.late,
        reg.waited_seconds,
        reg.snapshot_bytes,
        timing.environment(device),
        {"batch": batch, "tokens": tokens, "blocks": blocks, **s2d},
    )
    reg.close()
    return result


def _seconds(run: FineTuning, steps: int, device: torch.device, advance: Callable[[], object]) -> list[float]:
    """Seconds of each step; on a GPU between events of the training stream, without a synchronization in between."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            run.step()
            event.record()
            advance()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    stamps = [time.perf_counter()]
    for _ in range(steps):
        run.step()
        stamps.append(time.perf_counter())
        advance()
    return [b - a for a, b in pairwise(stamps)]


def table(result: Overhead) -> Table:
    """The figures by what happens in a step, then for the whole interval."""
    interval, lead = result.setting["interval"], result.setting["lead"]
    kinds = {
        "copies, capture, start of the refresh": range(1),
        "the refresh runs beside the step": range(1, lead),
        "factors arrive": range(lead, lead + 1),
        "ordinary": range(lead + 1, interval),
    }
    shown = Table("step of the interval", "what", "plain ms", "with S2D ms", "more")
    for what, positions in kinds.items():
        if not positions:
            continue
        plain, ours = (
            1e3 * statistics.median(s for p in positions for s in seconds[p])
            for seconds in (result.plain, result.with_s2d)
        )
        name = f"{positions[0]}..{positions[-1]}" if len(positions) > 1 else str(positions[0])
        shown.add_row(name, what, f"{plain:.1f}", f"{ours:.1f}", f"{ours / plain - 1:+.1%}")
    low, high = result.spread
    shown.add_row(
        "all",
        f"exposed cost {result.exposed:+.2%}, pairs of blocks {low:+.2%} to {high:+.2%}",
        f"{1e3 * _interval(result.plain):.0f}",
        f"{1e3 * _interval(result.with_s2d):.0f}",
        f"waited {result.late} times, {1e3 * result.waited_seconds:.0f} ms",
    )
    return shown


def overhead(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of one interval with S2D, and as many without.")] = 3,
    interval: Annotated[int, typer.Option(min=2, help="Steps between refreshes, and of a block.")] = 100,
    lead: Annotated[int, typer.Option(min=0, help="Steps from the start of a refresh to its use.")] = 3,
    mode: Annotated[str, typer.Option(help="coupled or decoupled.")] = "decoupled",
    batch: Annotated[int, typer.Option(min=2, help="Paragraphs a step; each passes twice.")] = 16,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a paragraph.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's choice.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Append the result to this file, one line.")] = None,
) -> None:
    """Step time of MiniLM's fine-tuning with S2D against without, in turn by blocks."""
    chosen = torch.device(device)
    strength = {} if mode == "coupled" else {"strength": 1.0}
    s2d = {"mode": mode, "interval": interval, "lead": min(lead, interval - 1), **strength}
    with timing.equal_threads(threads or torch.get_num_threads()), Progress(transient=True) as progress:
        task = progress.add_task("fine-tuning", total=2 * (blocks + 1) * interval)
        advance = lambda: progress.advance(task)  # noqa: E731
        result = measure(chosen, batch=batch, tokens=tokens, blocks=blocks, s2d=s2d, advance=advance)
    console = Console()
    console.print(table(result))
    console.print(f"copies of {result.snapshot_bytes / 2**20:.1f} MB per refresh; {result.environment['device_name']}")
    if json is not None:
        with json.open("a", encoding="utf-8") as file:
            file.write(json_module.dumps(asdict(result)) + "\n")


def trace(
    device: torch.device, *, steps: int, batch: int, tokens: int, interval: int = 8
) -> tuple[list[tuple[str, str, float, float]], S2D]:
    """Profile `steps` steps from one before a warm refresh on.

    Returns:
        (spans, reg): lane, name, begin and end in ms of the labelled spans, and on a GPU of every kernel by stream.
    """
    run = FineTuning(
        device, batch=batch, tokens=tokens, s2d={"mode": "decoupled", "strength": 1.0, "interval": interval}
    )
    assert run.reg is not None
    run.reg._decay = record_function(IN_STEP)(run.reg._decay)  # type: ignore[method-assign]
    for _ in range(2 * interval - 1):
        run.step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # the worker thread too
    with profile(activities=activities, experimental_config=everywhere) as profiled:
        for _ in range(steps):
            run.step()
        if on_gpu:
            torch.cuda.synchronize()
    run.reg.close()
    spans = []
    for event in profiled.events():
        span = event.time_range
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((f"stream {event.device_resource_id}", "kernel", span.start / 1e3, span.end / 1e3))
        elif event.name in LANES:
            spans.append((LANES[event.name], event.name, span.start / 1e3, span.end / 1e3))
    first = min(begin for _, _, begin, _ in spans)
    # longer spans first, so that those inside them are drawn over them
    spans.sort(key=lambda span: (span[0], span[2], -span[3]))
    return [(lane, name, begin - first, end - first) for lane, name, begin, end in spans], run.reg


def timeline(
    png: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out/timeline.png"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(min=5, help="Steps in the picture.")] = 7,
    batch: Annotated[int, typer.Option(min=2, help="Paragraphs a step; each passes twice.")] = 16,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a paragraph.")] = 64,
) -> None:
    """Picture of training and side worker around a refresh, from torch.profiler."""
    chosen = torch.device(device)
    spans, reg = trace(chosen, steps=steps, batch=batch, tokens=tokens)
    png.parent.mkdir(parents=True, exist_ok=True)
    name = timing.environment(chosen)["device_name"]
    setting = f"{batch} x 2 paragraphs of {tokens} tokens, {name}, {torch.get_num_threads()} threads"
    draw(spans, png, f"MiniLM fine-tuning under the profiler, {setting}")
    Console().print(f"{png}: {len(spans)} spans, waited {reg.late} times")


def draw(spans: list[tuple[str, str, float, float]], png: Path, title: str) -> None:
    """One bar a span, one row a lane, the steps numbered from the refresh."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    colours = {
        "forward and backward": "#4c72b0",
        "optimizer step": "#dd8452",
        IN_STEP: "#c44e52",
        LABEL: "#55a868",
        "kernel": "#8172b3",
    }
    order = list(dict.fromkeys(LANES.values()))
    found = {lane for lane, *_ in spans}
    lanes = [lane for lane in order if lane in found] + sorted(found - set(order))
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.7 * len(lanes)), layout="constrained")
    for lane, name, begin, end in spans:
        row = lanes.index(lane)
        axes.barh(row, end - begin, left=begin, height=0.6, color=colours[name])
        if name == IN_STEP:  # too short to be seen otherwise
            axes.plot([begin, begin], [row - 0.3, row + 0.3], color=colours[name], linewidth=1.5)
        if name in (IN_STEP, LABEL):
            axes.annotate(f"{end - begin:.1f}", (end, row), (3, 0), textcoords="offset points", fontsize=8, va="center")
    starts = [begin for _, name, begin, _ in spans if name == "forward and backward"]
    for number, begin in enumerate(starts):
        axes.axvline(begin, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(f"step t{number - 1:+d}" if number != 1 else "step t", (begin, -0.4), fontsize=8, va="bottom")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.5, -0.75)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=9)
    used = {name for _, name, _, _ in spans}
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items() if name in used],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.35),
        ncols=len(used),
        fontsize=8,
        frameon=False,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(png, dpi=130)
    plt.close(figure)
