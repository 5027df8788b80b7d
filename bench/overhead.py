"""`python -m bench overhead` and `timeline`: what S2D adds to a step of MiniLM's fine-tuning, and what runs when."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from bench import tables, timing
from s2d_kernels import S2D
from s2d_kernels.demo_models import english_batches, load_minilm
from s2d_kernels.scheduler import LABEL

OP = "training step"
LR = 2e-5
# SimCSE's 32 tokens; of its batch of 64 what two cores do in half a second, which makes the cost of S2D look larger.
BATCH, TOKENS = 16, 32
SEGMENT = 10
IN_STEP = "S2D in the step: start, join, decay"
IN_FORWARD = "S2D in the forward: copies, capture"
LANES = {
    "forward and backward": "training thread",
    "optimizer step": "training thread",
    IN_FORWARD: "S2D, in that thread",
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
    """What was measured; seconds are by [position in the interval][interval].

    Attributes:
        plain, with_s2d: of a step without and with S2D.
        own: of them in S2D's code on the training thread: copies and capture in the forward, and the call in the step.
        refresh: of each refresh on the worker, start to end.
        expected: refreshes that must have arrived.
        late, waited_seconds, snapshot_bytes: of `S2D`.
        environment: as in every row of the benchmarks.
        setting: batch, tokens, and the arguments of `S2D`.
    """

    plain: list[list[float]]
    with_s2d: list[list[float]]
    own: list[list[float]]
    refresh: list[float]
    expected: int
    late: int
    waited_seconds: float
    snapshot_bytes: int
    environment: dict[str, Any]
    setting: dict[str, Any]

    @property
    def exposed(self) -> float:
        """Time of an interval with S2D over that without, minus 1; each position by its median over the intervals."""
        return _interval(self.with_s2d) / _interval(self.plain) - 1

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest of the same by single intervals."""
        pairs = [
            sum(a) / sum(b) - 1
            for a, b in zip(zip(*self.with_s2d, strict=True), zip(*self.plain, strict=True), strict=True)
        ]
        return min(pairs), max(pairs)


def _interval(seconds: list[list[float]]) -> float:
    return sum(statistics.median(one) for one in seconds)


def segments(first: int, steps: int, *, interval: int, lead: int, length: int) -> list[int]:
    """Lengths of what the steps from `first` on are cut into: at least `length`, and no refresh is under way between.

    So the worker never runs beside the steps without S2D. The last one may be shorter.
    """
    lengths, step, last = [], first, first + steps
    while step < last:
        end = step + length
        while (end - 1) % interval < lead:
            end += 1
        lengths.append(min(end, last) - step)
        step += lengths[-1]
    return lengths


def measure(
    device: torch.device,
    *,
    batch: int,
    tokens: int,
    intervals: int,
    s2d: dict[str, Any],
    advance: Callable[[], object] = lambda: None,
) -> Overhead:
    """Two models train in one process, with S2D and without, in turn by segments in the order A B B A.

    What a slow minute of the machine does to a segment it does to its neighbour. The steps before, with the first,
    cold refresh, are not counted.
    """
    interval, lead = s2d["interval"], s2d["lead"]
    first, steps = lead + 1, intervals * interval
    runs = [FineTuning(device, batch=batch, tokens=tokens, s2d=arguments) for arguments in (None, s2d)]
    reg = runs[1].reg
    assert reg is not None
    inside, refresh = _watch(reg)
    for run in runs:  # the cold refresh, allocators, caches
        _seconds(run, first, device, advance, inside)
    late, waited = reg.late, reg.waited_seconds
    refresh.clear()
    cut = segments(first, steps, interval=interval, lead=lead, length=SEGMENT)
    seconds: list[list[list[float]]] = [[[] for _ in range(interval)] for _ in runs]
    own: list[list[float]] = [[] for _ in range(interval)]
    for number, length in enumerate(cut):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = runs[which].step_number
            for step, (took, of_it) in enumerate(_seconds(runs[which], length, device, advance, inside), start):
                seconds[which][step % interval].append(took)
                if which == 1:
                    own[step % interval].append(of_it)
    result = Overhead(
        seconds[0],
        seconds[1],
        own,
        refresh,
        sum(step % interval == 0 for step in range(first, first + steps)),
        reg.late - late,
        reg.waited_seconds - waited,
        reg.snapshot_bytes,
        timing.environment(device),
        {"batch": batch, "tokens": tokens, **s2d},
    )
    reg.close()
    return result


def _watch(reg: S2D) -> tuple[list[float], list[float]]:
    """Lists that grow by the seconds of each call of S2D in the training thread, and of each refresh in the worker."""
    inside: list[float] = []
    refresh: list[float] = []

    def watched(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds.append(time.perf_counter() - begin)
            return result

        return call

    name = "_add_grad" if reg.mode == "coupled" else "_decay"
    for owner, method, seconds in ((reg, name, inside), (reg._capture, "observe", inside), (reg, "_refresh", refresh)):
        setattr(owner, method, watched(getattr(owner, method), seconds))
    return inside, refresh


def _seconds(
    run: FineTuning, steps: int, device: torch.device, advance: Callable[[], object], inside: list[float]
) -> list[tuple[float, float]]:
    """Seconds of each step, and the host's in S2D's calls of it.

    On a GPU the former are between events of the training stream, without a synchronization in between.
    """
    on_gpu = device.type == "cuda"

    def stamp() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    stamps, own = [stamp()], []
    for _ in range(steps):
        inside.clear()
        run.step()
        stamps.append(stamp())
        own.append(sum(inside))
        advance()
    if on_gpu:
        stamps[-1].synchronize()
        return [(a.elapsed_time(b) / 1e3, of_it) for (a, b), of_it in zip(pairwise(stamps), own, strict=True)]
    return [(b - a, of_it) for (a, b), of_it in zip(pairwise(stamps), own, strict=True)]


def rows_of(result: Overhead, run: str, device: torch.device) -> list[timing.Row]:
    """One row for each kind of step, then one for the whole interval, as `timing.Row` with "training step" as op.

    A row passes its gate when every refresh of the run has happened.
    """
    interval, lead = result.setting["interval"], result.setting["lead"]
    kinds = {
        "copies, capture, start of the refresh": range(1),
        "the refresh runs beside the step": range(1, lead),
        "factors arrive": range(lead, lead + 1),
        "ordinary": range(lead + 1, interval),
        "interval": range(interval),
    }
    missing = float(result.expected - len(result.refresh))
    of_the_run = {
        "refreshes": float(len(result.refresh)),
        "refresh_seconds": statistics.median(result.refresh) if result.refresh else 0.0,
        "late": float(result.late),
        "waited_seconds": result.waited_seconds,
        "snapshot_bytes": float(result.snapshot_bytes),
    }
    rows = []
    for kind, positions in kinds.items():
        if not positions:
            continue
        if kind == "interval":
            plain, own = _interval(result.plain), _interval(result.own)
            ours = [sum(one) for one in zip(*result.with_s2d, strict=True)]
            middle = _interval(result.with_s2d)
        else:
            ours, of_plain, of_it = (
                [value for position in positions for value in one[position]]
                for one in (result.with_s2d, result.plain, result.own)
            )
            plain, own, middle = statistics.median(of_plain), statistics.median(of_it), statistics.median(ours)
        numbers = {"plain_seconds": plain, "own_seconds": own, "more": middle / plain - 1}
        numbers |= {"first": float(positions[0]), "last": float(positions[-1]), **of_the_run}
        if kind == "interval":
            numbers["more_min"], numbers["more_max"] = result.spread
        rows.append(
            timing.Row(
                run=run,
                op=OP,
                case="minilm",
                variant=kind,
                dtype="float32",
                impl="ours",
                setting=", ".join(f"{name} {value}" for name, value in result.setting.items()),
                seconds=middle,
                seconds_min=min(ours),
                seconds_max=max(ours),
                repeats=len(ours),
                error_p90=missing,
                error_max=missing,
                error_limit=0.0,
                error_of="refreshes that did not happen",
                gate=missing == 0,
                reads=None,
                bytes=0,
                floor_seconds=0.0,
                threads=result.environment["threads"],
                device=device.type,
                problem="MiniLM, contrastive loss of each paragraph passed twice (SimCSE), AdamW, fp32",
                environment=result.environment,
                traffic=numbers,
            )
        )
    return rows


def overhead(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    intervals: Annotated[int, typer.Option(min=1, help="Intervals with S2D, and as many without.")] = 3,
    interval: Annotated[int, typer.Option(min=2, help="Steps between refreshes.")] = 100,
    lead: Annotated[int, typer.Option(min=0, help="Steps from the start of a refresh to its use.")] = 3,
    mode: Annotated[str, typer.Option(help="coupled or decoupled.")] = "decoupled",
    batch: Annotated[int, typer.Option(min=2, help="Paragraphs a step; each passes twice.")] = BATCH,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a paragraph.")] = TOKENS,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's choice.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Append the rows to this file, one a line.")] = None,
) -> None:
    """Step time of MiniLM's fine-tuning with S2D against without, in turn by segments of ten steps."""
    chosen = torch.device(device)
    lead = min(lead, interval - 1)
    s2d: dict[str, Any] = {"mode": mode, "interval": interval, "lead": lead}
    if mode == "decoupled":
        s2d["strength"] = 1.0
    total = 2 * (intervals * interval + lead + 1)
    console = Console(width=None if sys.stdout.isatty() else 200)
    begin = time.perf_counter()
    done = 0
    run = timing.run_identifier()
    with timing.equal_threads(threads or torch.get_num_threads()), Progress(console=console, transient=True) as bar:
        task = bar.add_task("fine-tuning", total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if not console.is_terminal and done % 50 == 0:  # a pipe shows no bar
                console.print(f"{done} of {total} steps, {time.perf_counter() - begin:.0f} s")

        result = measure(chosen, batch=batch, tokens=tokens, intervals=intervals, s2d=s2d, advance=advance)
    rows = rows_of(result, run, chosen)
    console.print(tables.rich_table(rows))
    if json is not None:
        timing.append_rows(json, rows)
        console.print(f"{len(rows)} rows appended to {json}")
    if not rows[-1].gate:
        raise typer.Exit(1)


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
    for owner, method, label in ((run.reg, "_decay", IN_STEP), (run.reg._capture, "observe", IN_FORWARD)):
        setattr(owner, method, record_function(label)(getattr(owner, method)))
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
    batch: Annotated[int, typer.Option(min=2, help="Paragraphs a step; each passes twice.")] = BATCH,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a paragraph.")] = TOKENS,
) -> None:
    """Picture of training and side worker around a refresh, from torch.profiler."""
    chosen = torch.device(device)
    spans, reg = trace(chosen, steps=steps, batch=batch, tokens=tokens)
    png.parent.mkdir(parents=True, exist_ok=True)
    name = timing.environment(chosen)["device_name"]
    setting = f"{batch} x 2 paragraphs of {tokens} tokens, {name}, threads: {torch.get_num_threads()}"
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
        IN_FORWARD: "#937860",
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
