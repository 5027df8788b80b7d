"""Rows of the quantized linear layer as one Markdown line a case, and one for all linear layers of a block together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.cases import LINEAR_GROUPS
from bench.timing import Row, milliseconds

OURS = "ours"
BLOCKS = ("vit-b", "qwen2.5-0.5b", "llama3-8b")
LEGEND = (
    "Time of ours: median; of the others: how many times as long. Kept: for the backward beside the parameters, by "
    "element of the input. All of a block: each of its linear layers once. Failed: wrong by more than the gate allows. "
    "Empty: not run. Errors and ranges are in the rows."
)
Found = dict[str, Row]  # of one case, by implementation and setting
Counted = Sequence[tuple[int, Found]]


def _count(case: str) -> int:
    """How many layers of a block have this shape: two of "llama3-8b.q, o, 2048 tokens"."""
    return max(case.count(", "), 1)


def _blocks() -> dict[str, frozenset[str]]:
    """By model the names of its cases, which together are all linear layers of a block."""
    return {name: frozenset(case.name for case in LINEAR_GROUPS[name]) for name in BLOCKS}


def _seconds(cases: Counted, name: str) -> float:
    return sum(count * found[name].seconds for count, found in cases)


def _ratio(cases: Counted, peer: str) -> str:
    """The time of all cases over that of ours."""
    if not all(peer in found for _, found in cases):
        return ""
    if not all(found[name].gate for _, found in cases for name in (peer, OURS)):
        return "failed"
    return f"{_seconds(cases, peer) / _seconds(cases, OURS):.2f}x"


def lines(rows: Iterable[Row]) -> list[str]:
    """The table: ours in ms, what it keeps for the backward, and how many times longer each peer takes."""
    runs: dict[tuple[str, ...], dict[str, Found]] = {}  # what may be added up: of one run, device, dtype and pass
    for row in rows:
        name = OURS if row.impl == OURS else f"{row.impl}, {row.setting}"
        run = runs.setdefault((row.dtype, row.variant, row.device, row.run), {})
        run.setdefault(row.case, {})[name] = row
    peers = list(dict.fromkeys(n for run in runs.values() for found in run.values() for n in found if n != OURS))
    table = [["case", "dtype", "pass", "ours", "kept", *peers]]

    def line(title: str, kind: Sequence[str], cases: Counted, kept: str) -> None:
        ours = f"{milliseconds(_seconds(cases, OURS))} ms" + " failed" * (not all(f[OURS].gate for _, f in cases))
        table.append([title, *kind, ours, kept, *(_ratio(cases, peer) for peer in peers)])

    kinds = dict.fromkeys(key[:2] for key in runs)
    for kind, run in ((kind, run) for kind in kinds for key, run in runs.items() if key[:2] == kind):
        cases = {case: found for case, found in run.items() if OURS in found}
        for case, found in cases.items():
            bytes_kept = found[OURS].traffic.get("saved_per_element")
            line(case, kind, [(1, found)], "" if bytes_kept is None else f"{bytes_kept:.2f} B")
            for model, names in _blocks().items():
                if names <= cases.keys() and case == [name for name in cases if name in names][-1]:
                    block = [(_count(name), cases[name]) for name in names]
                    line(f"**{model}, all of a block**", kind, block, "")
    table.insert(1, ["---"] * len(table[0]))
    return ["| " + " | ".join(cells) + " |" for cells in table]
