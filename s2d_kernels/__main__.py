"""Command line: python -m s2d_kernels {demo, report, validate, env}."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError:
    sys.exit("the command line needs typer and rich: pip install 's2d-kernels[cli]'")

app = typer.Typer(help="Selective Spectral Decay: diagnose, condition, validate.", no_args_is_help=True)
console = Console(width=None if sys.stdout.isatty() else 160)


def _fail(error: Exception) -> typer.Exit:
    console.print(f"[bold red]{type(error).__name__}[/bold red]: {error}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for demo.png and demo.md")] = Path("out"),
    seeds: Annotated[int, typer.Option(min=1, help="repetitions of the digits experiment")] = 3,
    batches: Annotated[int, typer.Option(min=1, help="batches of 16 texts for MiniLM")] = 12,
) -> None:
    """Diagnose MiniLM, condition and quantize a small ViT, time one refresh; ends in tables and a picture."""
    try:
        from s2d_kernels.demo import run

        run(out, seeds=seeds, batches=batches, console=console)
    except (ImportError, OSError, ValueError) as error:
        raise _fail(error) from error


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a Hugging Face model folder: config.json, *.safetensors, tokenizer")],
    text: Annotated[
        Path | None, typer.Option(help="text file to run; default: docstrings of installed packages")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="batches of 16 texts")] = 12,
    threshold: Annotated[float, typer.Option(help="PCDR from which a layer is decayed")] = 0.95,
    bounds_only: Annotated[bool, typer.Option(help="skip the exact ratios where bounds decide")] = False,
    png: Annotated[Path | None, typer.Option(help="write a picture")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write a Markdown table")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows as JSON lines")] = None,
) -> None:
    """PCDR, largest activation and largest singular value of every layer of a model, with the decision on each."""
    from s2d_kernels import demo_models, diagnostics

    try:
        model, tokenizer = demo_models.load_transformer(folder)
        texts = demo_models.english_batches(tokenizer, batches=batches, text_file=text)
        tracked = track(texts, description="running the model on text", console=console)
        rows, decisions = diagnostics.diagnose(model, tracked, threshold=threshold, exact=not bounds_only)
        console.print(diagnostics.to_table(rows, title=f"{folder.name}, tau = {threshold}"))
        for decision in decisions:
            if decision.decision == "skip" and len(decision.shape) > 1:
                console.print(f"[dim]skipped {decision.name} {list(decision.shape)}: {decision.reason}[/dim]")
        if png is not None:
            diagnostics.save_png(diagnostics.to_figure(rows, threshold=threshold, title=folder.name), png)
        if markdown is not None:
            markdown.write_text(diagnostics.to_markdown(rows))
        if json_file is not None:
            json_file.write_text("".join(json.dumps(_finite(row._asdict())) + "\n" for row in rows))
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise _fail(error) from error


def _finite(value: object) -> object:
    """JSON has no NaN: null stands for what was not computed."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def validate(
    impl: Annotated[str, typer.Option(help="implementation to compare with the reference; default all usable")] = "all",
    op: Annotated[str | None, typer.Option(help="one operation; default all")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seed: Annotated[int, typer.Option(help="seed of the inputs")] = 0,
    details: Annotated[bool, typer.Option(help="one row per case instead of a summary")] = False,
) -> None:
    """Compare implementations with the reference: codes and accumulators must be equal. Exit code 1 on failure."""
    import torch

    from s2d_kernels import linear_validation, validation

    failed = compared = count = 0
    try:
        chosen = validation.usable(torch.device(device), op) if impl == "all" else [impl]
        for one in chosen:
            checks = validation.validate(op=op, impl=one, device=device, seed=seed)
            shown = checks if details else validation.summarize(checks)
            console.print(validation.to_table(shown, title=f"impl={one} against reference on {device}, seed {seed}"))
            for check in checks:
                if check.note:
                    console.print(check.note, soft_wrap=True, highlight=False)
            count += len(checks)
            failed += sum(not check.passed for check in checks)
            compared += sum(check.compared for check in checks)
        if op in (None, "fake_quant_linear"):
            with_linear = [i for i in chosen if validation.implemented("fake_quant_linear", i)]
            rows = list(linear_validation.linear_rows(with_linear, device=device, seed=seed))
            console.print(linear_validation.rows_table(rows, title="quantized linear layers against the reference"))
            others = linear_validation.convention_rows(bits=4, seed=seed)
            title = "4-bit codes that other conventions make differently, of normal numbers in bf16"
            console.print(linear_validation.conventions_table(others, title=title))
            count += len(rows)
            failed += sum(not row.passed for row in rows)
            compared += sum(row.codes + row.accumulators for row in rows)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch's own, for a device that is not there
        raise _fail(error) from error
    console.print(f"{count} checks, {compared:,} numbers compared, {failed} failed")
    raise typer.Exit(1 if failed else 0)


@app.command()
def env() -> None:
    """Versions, devices, which implementations are usable here and would be chosen: paste it into a bug report."""
    import numpy
    import torch

    import s2d_kernels
    from s2d_kernels import _native, _native_cpu, ops, validation

    table = Table(title="s2d_kernels environment", show_header=False)
    table.add_row("s2d_kernels", f"{s2d_kernels.__version__} ({Path(s2d_kernels.__file__).parent})")
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}")
    table.add_row("numpy", numpy.__version__)
    for package in ("triton", "cupy", "transformers"):
        table.add_row(package, _version(package))
    capability = torch.backends.cpu.get_cpu_capability()
    table.add_row("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            table.add_row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        table.add_row("GPU", "none")
    table.add_row("driver", _driver())
    problem = _native.problem()
    if problem is None:
        table.add_row("native library", str(_native.library_path()))
        table.add_row("  holds", f"ABI {_native.ABI_VERSION}, {_native.architectures()}")
    else:
        table.add_row("native library", f"{problem} (this package needs ABI {_native.ABI_VERSION})")
    cpu_problem = _native_cpu.problem()
    table.add_row("CPU library", cpu_problem or f"{_native_cpu.library_path()}, {_native_cpu.capability()}")
    devices = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    usable = {device: ("reference", *validation.usable(device)) for device in devices}
    for device in devices:
        for impl in ops.IMPLS:
            if impl not in usable[device]:
                reason = ops.problem_of(impl, device) or "it takes CUDA tensors"
                table.add_row(f"impl={impl}", f"not usable on {device}: {reason}")
    table.add_section()
    for op in ops.names():
        cells = []
        for device in devices:
            here = ", ".join(impl for impl in ops.available(op) if impl in usable[device])
            cells.append(f"{device}: {ops.choose(op, None, device)} (usable: {here})")
        table.add_row(op, "; ".join(cells))
    console.print(table)


def _driver() -> str:
    """The NVIDIA driver's version; a CUDA 13 runtime needs 580 or newer."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.is_file() else "none (a CUDA 13 library needs 580 or newer)"


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    from importlib.metadata import packages_distributions, version

    return ", ".join(f"{name} {version(name)}" for name in set(packages_distributions().get(package, [package])))


if __name__ == "__main__":
    app(prog_name="python -m s2d_kernels")
