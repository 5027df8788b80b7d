"""`python -m bench COMMAND`: what the library costs and whether it holds what it promises."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import (
    accuracy,
    audit,
    cases,
    linear_peers,
    overhead,
    pcdr_cases,
    peers,
    penalty_peers,
    resume,
    runs,
    soak,
    tables,
    timing,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
# 80 columns, a pipe's default, would fold every cell
console = Console(width=None if sys.stdout.isatty() else 200)
HERE = Path(__file__).resolve().parent

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Json = Annotated[Path | None, typer.Option("--json", help="Append the rows to this file, one JSON object a line.")]
Quick = Annotated[bool, typer.Option("--quick", help="A tiny case that runs in seconds.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each implementation (slow ones: one).")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for everybody; default: torch's choice.")]


@contextmanager
def _run(device: str, repeats: int, threads: int | None) -> Iterator[runs.Context]:
    """Equal threads for everybody, and what all rows of this run share."""
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this torch sees no CUDA device: use --device cpu", param_hint="--device")
    with timing.equal_threads(threads or torch.get_num_threads()), _progress() as progress:
        progress.add_task("copy bandwidth and dense peak", total=None)
        environment = timing.environment(chosen)
        context = runs.Context(timing.run_identifier(), chosen, environment, repeats)
    with timing.equal_threads(environment["threads"]):
        yield context


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _steps(progress: Progress, total: int) -> runs.Step:
    task = progress.add_task("", total=total)
    return lambda text: progress.update(task, advance=1, description=text)


def _kept(rows: list[timing.Row], json: Path | None) -> list[timing.Row]:
    """Rows go to the file case by case: those that are measured outlive a case that does not fit into memory."""
    if json is not None:
        timing.append_rows(json, rows)
    return rows


def _finish(rows: list[timing.Row], json: Path | None) -> None:
    console.print(tables.rich_table(rows))
    if json is not None:
        console.print(f"{len(rows)} rows appended to {json}")


def _known(names: list[str], known: Iterable[str]) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown} not among {list(known)}", param_hint="--case")
    return names


@app.command()
def svd(
    device: Device = "cpu",
    case: Annotated[
        list[str] | None,
        typer.Option("--case", "--model", help=f"Any of {', '.join(cases.SVD_CASES)}; repeatable."),
    ] = None,
    quick: Quick = False,
    repeats: Repeats = 5,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Top-k SVD of all matrices of a model: ours, cold and warm, and the peers at equal error."""
    default = ["siglip2-b", "minilm", *(["llama3-8b"] if device.startswith("cuda") else [])]
    names = _known(["quick"] if quick else (case or default), cases.SVD_CASES)
    rows: list[timing.Row] = []
    left_out: list[str] = []
    with _run(device, repeats, threads) as context, _progress() as progress:
        step = _steps(progress, len(names) * (4 + len(peers.OURS) + len(peers.SVD_PEERS)))
        for name in names:
            step(f"{name}: building the matrices")
            built = cases.SVD_CASES[name]().to(context.device)
            step(f"{name}: fp64 truth")
            _ = built.truth
            step(f"{name}: factors of the earlier weights")
            _ = built.previous, built.earlier_vectors
            rows += _kept(runs.run_svd(built, context, step, refused=left_out.append), json)
    _finish(rows, json)
    for sentence in [*peers.left_out(context.device), *left_out]:
        console.print(f"[yellow]{sentence}")


@app.command()
def linear(
    device: Device = "cpu",
    case: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(cases.LINEAR_GROUPS)}; repeatable.")
    ] = None,
    quick: Quick = False,
    more: Annotated[bool, typer.Option("--more", help="Also the compiled peers and torchao's.")] = False,
    repeats: Repeats = 7,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """W4A4 fake-quantized linear layer: ours, the usual compositions and the plain layer.

    Compiled peers take half a minute of compiling for each case; peers that are not installed are named.
    """
    names = _known(case or ["mixed"], cases.LINEAR_GROUPS)
    shapes = cases.QUICK_LINEAR_CASES if quick else [shape for name in names for shape in cases.LINEAR_GROUPS[name]]
    chosen = list(linear_peers.LINEAR_PEERS)
    if more and not quick:
        chosen += [peer for peer in linear_peers.MORE_PEERS if peer.problem(device) is None]
    rows: list[timing.Row] = []
    with _run(device, repeats, threads) as context, _progress() as progress:
        step = _steps(progress, 2 * len(shapes))
        for shape in shapes:
            rows += _kept(runs.run_linear(shape, context, step, chosen), json)
    _finish(rows, json)
    console.print(tables.ratio_table(rows))
    if device == "cpu":
        console.print(timing.cpu_instructions())
    for peer in linear_peers.MORE_PEERS:
        if more and not quick and (problem := peer.problem(device)) is not None:
            console.print(f"[yellow]left out: {peer.name}, {peer.setting}: {problem}")


def _of_penalty_cases(
    measure: Callable[[cases.PenaltyCase, runs.Context, runs.Step], list[timing.Row]],
    device: str,
    names: list[str] | None,
    quick: bool,
    repeats: int,
    threads: int | None,
    json: Path | None,
) -> None:
    default = ["siglip2-b", "llama3-8b"] if device.startswith("cuda") else ["siglip2-b"]
    names = _known(["quick"] if quick else (names or default), cases.PENALTY_CASES)
    chosen = [shapes for name in names for shapes in cases.PENALTY_CASES[name]]
    rows: list[timing.Row] = []
    with _run(device, repeats, threads) as context, _progress() as progress:
        step = _steps(progress, len(chosen))
        for one in chosen:
            rows += _kept(measure(one, context, step), json)
    _finish(rows, json)
    for sentence in penalty_peers.left_out(context.device):
        console.print(f"[yellow]{sentence}")


@app.command()
def penalty(
    device: Device = "cpu",
    case: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(cases.PENALTY_CASES)}; repeatable.")
    ] = None,
    quick: Quick = False,
    repeats: Repeats = 7,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """The penalty gradient of all layers added once: ours with each impl, torch by layer, and the paper's dense G."""
    _of_penalty_cases(runs.run_penalty, device, case, quick, repeats, threads, json)


@app.command()
def step(
    device: Device = "cpu",
    case: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(cases.PENALTY_CASES)}; repeatable.")
    ] = None,
    quick: Quick = False,
    repeats: Repeats = 7,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """One optimizer step of all layers: plain fused AdamW, + the paper's dense G, + add_penalty_grad_, ours fused."""
    _of_penalty_cases(runs.run_step, device, case, quick, repeats, threads, json)


@app.command()
def pcdr(
    batches: Annotated[int, typer.Option(min=1, help="Batches of English text.")] = 12,
    threads: Threads = None,
    cost: Annotated[bool, typer.Option(help="Also the exact route against full SVDs on SigLIP2-B's shapes.")] = True,
    json: Json = None,
) -> None:
    """Decisions of pcdr on MiniLM, inflated up to 50x, against fp64 full SVDs; fails where one differs."""
    from s2d_kernels import demo_models

    with timing.equal_threads(threads or torch.get_num_threads()), _progress() as progress:
        environment = timing.environment(torch.device("cpu"))
        task = progress.add_task("MiniLM on English text", total=None)
        model, tokenizer = demo_models.load_minilm()
        inputs = [
            pcdr_cases.layer_inputs(model, batch) for batch in demo_models.english_batches(tokenizer, batches=batches)
        ]

        def step(text: str) -> None:
            progress.update(task, description=text)

        tallies = list(pcdr_cases.tallies(inputs, pcdr_cases.names_of(inputs[0]), step=step))
        seconds = pcdr_cases.siglip2_cost(step) if cost else None
    console.print(pcdr_cases.table(tallies))
    if seconds is not None:
        console.print(pcdr_cases.cost_line(seconds))
    if json is not None:
        run = timing.run_identifier()
        rows = pcdr_cases.rows(tallies, seconds, run=run, batches=batches, environment=environment)
        json.parent.mkdir(parents=True, exist_ok=True)
        with json.open("a", encoding="utf-8") as file:
            file.writelines(jsonlib.dumps(row) + "\n" for row in rows)
        console.print(f"{len(rows)} rows appended to {json}")
    if any(tally.wrong for tally in tallies):
        raise typer.Exit(1)


@app.command()
def table(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if README differs.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = HERE.parent / "README.md",
    results: Annotated[Path, typer.Option(help="Folder of the committed rows.")] = HERE / "results",
) -> None:
    """Render bench/results/NAME.jsonl between <!-- bench:NAME --> markers, and files between include markers."""
    before = readme.read_text(encoding="utf-8")
    try:
        after = tables.rendered(before, results, readme.parent)
    except ValueError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    if after == before:
        console.print(f"{readme.name} agrees with {results.name}/")
    elif check:
        console.print(f"[red]{readme.name} differs from {results.name}/: run `python -m bench table`")
        raise typer.Exit(1)
    else:
        readme.write_text(after, encoding="utf-8")
        console.print(f"{readme.name} rewritten")


app.command()(audit.audit)
app.command()(accuracy.accuracy)
app.command("soak")(soak.command)
app.command("resume")(resume.command)
app.command()(overhead.overhead)
app.command()(overhead.timeline)


@app.command()
def summary(reports: Annotated[list[Path], typer.Argument(help="JUnit XML files that pytest wrote.")]) -> None:
    """Passed, failed and skipped tests by file; fails where a report is missing."""
    console.print(tables.test_table([path for path in reports if path.is_file()]))
    missing = [str(path) for path in reports if not path.is_file()]
    if missing:
        console.print(f"[red]no report: {', '.join(missing)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
