"""Rows as a rich table on the terminal and as Markdown between the markers of README."""

from __future__ import annotations

import json as jsonlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.table import Table

from bench import linear_table, pcdr_cases
from bench.timing import Row, milliseconds, read_rows

HEADINGS = ("case", "variant", "implementation", "setting", "time", "error p90", "ours is faster by")
TRAFFIC_HEADINGS = (
    *("case", "variant", "implementation", "setting", "time", "error max"),
    *("GB/s", "of copy", "extra memory", "ours is faster by"),
)
STEP_HEADINGS = (
    *("case", "variant", "implementation", "setting", "time", "error max"),
    *("GB/s", "of copy", "of floor", "peak memory", "ours is faster by"),
)
SVD_HEADINGS = (
    *("case", "variant", "implementation", "setting", "time", "error p90"),
    *("residual", "reads, of copy", "ours is faster by"),
)
LINEAR_HEADINGS = ("case", "variant", "implementation", "setting", "time", "error p90", "saved", "ours is faster by")
TRAINING_HEADINGS = (
    "case",
    "steps of the interval",
    "what happens",
    "without S2D",
    "with S2D",
    "more",
    "in S2D's calls",
)
PAPER = Path(__file__).parent / "baselines" / "paper_a100.json"
_NUMBERS = (
    *("time", "saved", "residual", "reads, of copy", "error p90", "error max", "GB/s"),
    *("of copy", "of floor", "extra memory", "peak memory", "without S2D", "with S2D", "more", "in S2D's calls"),
)
_INCLUDED = re.compile(r"(<!-- include:([\w./-]+) -->\n)(.*?)(<!-- /include -->)", re.DOTALL)
_MARKED = re.compile(r"(<!-- bench:([\w.-]+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)


def speedups(row: Row) -> str:
    """What the row may claim; empty where a gate failed or there is nothing to compare."""
    if not row.gate:
        return ""
    return ", ".join(f"{ratio:.2g}x {variant}" if ratio < 10 else f"{ratio:.0f}x {variant}"
                     for variant, ratio in row.speedup.items())  # fmt: skip


def headings(row: Row) -> tuple[str, ...]:
    if row.op == "topk_svd":
        return SVD_HEADINGS
    if row.op == "fake_quant_linear":
        return LINEAR_HEADINGS
    if row.op == "adamw step":
        return STEP_HEADINGS
    if row.op == "training step":
        return TRAINING_HEADINGS
    return TRAFFIC_HEADINGS if row.traffic else HEADINGS


def _svd_cells(row: Row) -> tuple[str, ...]:
    """Error, residual, and the passes over the weights with the bandwidth they amount to."""
    share = (row.reads or 0) * row.floor_seconds / row.seconds
    return (
        f"{row.error_p90:.1e}" + ("" if row.gate else " FAILED"),
        "" if row.residual_p90 is None else f"{row.residual_p90:.1e}",
        f"{row.reads}, {share:.0%}" if row.reads else "",
    )


def _judged_cells(row: Row) -> tuple[str, ...]:
    if row.op == "topk_svd":
        return _svd_cells(row)
    if row.op == "fake_quant_linear":
        return _linear_cells(row)
    return _traffic_cells(row) if row.traffic else (f"{row.error_p90:.1e}" + ("" if row.gate else " FAILED"),)


def _linear_cells(row: Row) -> tuple[str, ...]:
    """Error, and what is kept for the backward, in all and by element of the input."""
    kept = row.traffic.get("saved_bytes")
    saved = "" if kept is None else f"{kept / 1e6:.3g} MB, {row.traffic['saved_per_element']:.2f} B"
    return f"{row.error_p90:.1e}" + ("" if row.gate else " FAILED"), saved


def _traffic_cells(row: Row) -> tuple[str, ...]:
    """What fills the columns from the error to the extra memory, the error with its limit."""
    t = row.traffic
    memory: tuple[str, ...] = (f"{t['extra_bytes'] / 1e6:.3g} MB" if t["extra_bytes"] else "none",)
    if row.op == "adamw step":
        memory = f"{row.seconds / row.floor_seconds:.2f}x", f"{t['peak_bytes'] / 1e6:.4g} MB"
    return (
        f"{row.error_max:.1e} " + (f"<= {row.error_limit:.1e}" if row.gate else f"> {row.error_limit:.1e} FAILED"),
        f"{t['bytes_per_second'] / 1e9:.3g}",
        f"{t['copy_fraction']:.0%}",
        *memory,
    )


def _training_cells(row: Row) -> tuple[str, ...]:
    """A kind of step, or the interval: its time without and with S2D and the difference, and what S2D itself took."""
    t = row.traffic
    first, last = int(t["first"]), int(t["last"])
    more = f"{t['more']:+.2%}" + (f" ({t['more_min']:+.2%} to {t['more_max']:+.2%})" if "more_min" in t else "")
    return (
        row.case,
        f"{first}..{last}" if last > first else str(first),
        row.variant,
        f"{milliseconds(t['plain_seconds'])} ms",
        f"{milliseconds(row.seconds)} ms ({milliseconds(row.seconds_min)}-{milliseconds(row.seconds_max)})",
        more if row.gate else f"{more} FAILED",
        f"{milliseconds(t['own_seconds'])} ms",
    )


def cells(row: Row) -> tuple[str, ...]:
    if row.op == "training step":
        return _training_cells(row)
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return (
        row.case + dtype,
        row.variant,
        row.impl,
        row.setting if row.gate or not row.note else f"{row.setting}; {row.note}",
        f"{milliseconds(row.seconds)} ms ({milliseconds(row.seconds_min)}-{milliseconds(row.seconds_max)})",
        *_judged_cells(row),
        speedups(row),
    )


def _machine(row: Row) -> str:
    """What ran: device, threads, versions, commit and date, and its measured speeds."""
    e = row.environment
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    return (
        f"{e['device_name']}, {row.threads} thread{'s' * (row.threads > 1)}, {versions}, commit {e['commit']}, "
        f"{e['date']}; measured copy {e['copy_bytes_per_second'] / 1e9:.1f} GB/s, fp32 product "
        f"{e['fp32_flops_per_second'] / 1e9:.0f} GFLOP/s. "
        f"{e.get('instructions') or ''}{'. ' * bool(e.get('instructions'))}"
    )


def caption(row: Row) -> str:
    """One line on the machine, the versions and what the columns are."""
    common = f"{_machine(row)}Time: median (min-max). "
    if row.op == "training step":
        t = row.traffic
        return common + (
            f"{row.problem}; {row.setting}. With and without S2D in turn by ten steps. Interval: the sum of its "
            "positions' medians, and in brackets single intervals. In S2D's calls: of the training thread's time, with "
            f"copies and capture in the forward. {t['refreshes']:.0f} refreshes, each "
            f"{milliseconds(t['refresh_seconds'])} ms of the "
            f"worker (median), waited for {t['late']:.0f} times, {milliseconds(t['waited_seconds'])} ms in all; "
            f"{t['snapshot_bytes'] / 2**20:.1f} MiB of copies a refresh."
        )
    if row.op == "adamw step":
        measured = "measured" if row.traffic["peak_is_measured"] else "counted, not measured"
        return (
            f"{common}Error: {row.error_of}, and the gate's limit. GB/s: read and written by this method, no cache "
            "assumed; of floor: time over that of reading p, g, m, v and writing p, m, v at the measured copy's "
            f"bandwidth. Peak memory: p, g, m, v, factors and what the step holds beside them, {measured}."
        )
    if row.op == "fake_quant_linear":
        common += "Saved: kept for the backward beside the parameters, in all and by element of the input. "
    elif row.traffic:
        return (
            f"{common}Error: {row.error_of}, and the gate's limit, eps of the gradient's dtype. GB/s: read and written "
            "by this method, temporaries included and no cache assumed; of copy: over the measured copy, which on a "
            "CPU also reads what it overwrites. Extra memory: beside gradients and fp32 factors."
        )
    text = (
        f"{common}Error: {row.error_of.split(', relative')[0]}, gate at {row.error_limit:g}. "
        "Settings with a choice: the cheapest that passes the gate."
    )
    if row.op == "topk_svd":
        text += (
            " Residual: p90 of max_i ||W^T u_i - s_i v_i|| / s_1. Of copy: bytes of all reads by the time, over the "
            f"measured copy, which counts bytes read and written. {paper()}"
        )
    return text


def paper() -> str:
    """What the paper says its refresh cost; nothing here was measured on that machine."""
    p = jsonlib.loads(PAPER.read_text(encoding="utf-8"))
    return (
        f"The paper ({p['source']}, {p['device']}, {p['model']}): {p['full_svd_pass_seconds']} s for one full-SVD pass "
        f"over all layers, {p['gradient_pass_seconds']} s for the corresponding gradient pass, about {p['passes']} "
        f"passes in {p['steps']} steps; ours has not been measured on an A100."
    )


def rich_table(rows: Sequence[Row]) -> Table:
    table = Table(title=rows[0].op, caption=caption(rows[0]))
    for heading in headings(rows[0]):
        table.add_column(heading, overflow="fold", justify="right" if heading in _NUMBERS else "left")
    before = None
    for row in rows:
        if before is not None and before != (row.case, row.dtype):
            table.add_section()
        before = (row.case, row.dtype)
        style = "bold" if row.impl == "ours" else ("" if row.gate else "red")
        table.add_row(*cells(row), style=style)
    return table


def ratio_table(rows: Sequence[Row]) -> Table:
    """How much faster ours is than each peer over the cases of a run: geometric mean and least."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for ratio in row.speedup.values():
            ratios.setdefault((row.variant, row.dtype, f"{row.impl}, {row.setting}"), []).append(ratio)
    table = Table(title="ours is faster by")
    for heading in ("variant", "dtype", "than", "geometric mean", "least", "cases"):
        table.add_column(heading, justify="right" if heading in ("geometric mean", "least", "cases") else "left")
    for key, found in ratios.items():
        table.add_row(*key, f"{statistics.geometric_mean(found):.2f}x", f"{min(found):.2f}x", str(len(found)))
    return table


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each case only the rows of its last run: numbers of different runs are not comparable."""
    rows = list(rows)
    last: dict[tuple[str, str, str], str] = {}
    for row in rows:
        key = (row.device, row.op, row.case)
        last[key] = max(row.run, last.get(key, ""))
    return [row for row in rows if row.run == last[(row.device, row.op, row.case)]]


def markdown(rows: Sequence[Row]) -> str:
    if rows[0].op == "fake_quant_linear":
        lines = linear_table.lines(rows)
        captions = dict.fromkeys([*(_machine(row) for row in rows), linear_table.LEGEND])
    else:
        titles = headings(rows[0])
        lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
        captions = dict.fromkeys(caption(row) for row in rows)
    return "\n".join([*lines, "", *(f"<sub>{text}</sub>" for text in captions), ""])


def rendered(readme: str, results: Path, folder: Path = Path()) -> str:
    """`readme` with every marked table made anew from `results`/NAME.jsonl and every included file of `folder`.

    Raises:
        ValueError: a marker without its results or file, or without its closing twin.
    """
    if readme.count("<!-- include:") != readme.count("<!-- /include -->"):
        raise ValueError("include markers do not pair up")

    def include(match: re.Match[str]) -> str:
        path = folder / match[2]
        if not path.is_file():
            raise ValueError(f"an include marker names {match[2]!r}, but there is no {path}")
        return f"{match[1]}{path.read_text(encoding='utf-8').rstrip()}\n{match[4]}"

    readme = _INCLUDED.sub(include, readme)
    opened, closed = (re.findall(rf"<!-- {slash}bench:([\w.-]+) -->", readme) for slash in ("", "/"))
    if opened != closed:
        raise ValueError(f"markers do not pair up: opened {opened}, closed {closed}")

    def table(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.jsonl"
        if not path.is_file():
            raise ValueError(f"README has a marker for {match[2]!r}, but there is no {path}: run the bench with --json")
        text = pcdr_cases.markdown(path) if match[2].startswith("pcdr") else markdown(latest(read_rows(path)))
        return match[1] + text + match[4]

    return _MARKED.sub(table, readme)


def test_table(reports: Iterable[Path]) -> Table:
    """Outcomes by report and test file, of pytest's JUnit XML files."""
    table = Table(title="tests")
    for heading in ("report", "file", "passed", "failed", "skipped", "seconds"):
        table.add_column(heading, justify="left" if heading in ("report", "file") else "right")
    for path in reports:
        outcomes: dict[str, Counter[str]] = {}
        seconds: Counter[str] = Counter()
        for case in ElementTree.parse(path).iter("testcase"):
            file = case.get("classname", "").rsplit(".", 1)[-1]
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            outcomes.setdefault(file, Counter())[outcome] += 1
            seconds[file] += float(case.get("time", 0))  # type: ignore[assignment]
        for file, counts in sorted(outcomes.items()):
            numbers = (str(counts[outcome]) for outcome in ("passed", "failed", "skipped"))
            table.add_row(path.stem, file, *numbers, f"{seconds[file]:.1f}", style="red" if counts["failed"] else "")
    return table
