"""Rows of the quantized linear layer as one Markdown line a case, and one for all linear layers of a block together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.timing import Row, milliseconds

OURS = "ours"
LEGEND = (
    "Time of ours: median; of the others: how many times as long. Kept: for the backward beside the parameters, by "
    "element of the input. All of a block: each of its linear layers once. Empty: not run, or wrong by more than the "
    "gate allows; errors and ranges are in the rows."
)


def _block(case: str) -> tuple[str, str, int]:
    """Model, tokens and how many layers of a block have this shape: "llama3-8b.q, o, 2048 tokens" is two."""
    model, rest = case.rsplit(".", 1) if "." in case else (case, "")
    *layers, tokens = rest.split(", ")
    return model, tokens, max(len(layers), 1)


def _of_all(cases: Sequence[dict[str, Row]], peer: str) -> float | None:
    """The time of all over that of ours, each layer of a block once; None where a row lacks or its gate failed."""
    ours = total = 0.0
    for rows in cases:
        if not (peer in rows and rows[peer].gate and rows[OURS].gate):
            return None
        count = _block(rows[OURS].case)[2]
        ours += count * rows[OURS].seconds
        total += count * rows[peer].seconds
    return total / ours


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def lines(rows: Iterable[Row]) -> list[str]:
    """The table: ours in ms, what it keeps for the backward, and how many times longer each peer takes."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        name = OURS if row.impl == OURS else f"{row.impl}, {row.setting}"
        cases.setdefault((row.dtype, row.variant, row.case), {})[name] = row
    peers = list(dict.fromkeys(name for found in cases.values() for name in found if name != OURS))
    blocks: dict[tuple[str, ...], list[dict[str, Row]]] = {}
    for (dtype, variant, case), found in cases.items():
        if OURS in found:
            blocks.setdefault((dtype, variant, *_block(case)[:2]), []).append(found)
    table = [["case", "dtype", "pass", "ours", "kept", *peers]]
    passes = dict.fromkeys(key[:2] for key in cases)
    for dtype, variant, key in ((*kind, key) for kind in passes for key in blocks if key[:2] == kind):
        block, (model, tokens) = blocks[key], key[2:]
        for found in block:
            ours = found[OURS]
            kept = ours.traffic.get("saved_per_element")
            table.append([
                *(ours.case, dtype, variant, f"{milliseconds(ours.seconds)} ms" + ("" if ours.gate else " FAILED")),
                "" if kept is None else f"{kept:.2f} B",
                *(_ratio(_of_all([found], peer)) for peer in peers),
            ])  # fmt: skip
        if len(block) > 1:
            seconds = sum(_block(found[OURS].case)[2] * found[OURS].seconds for found in block)
            together = [f"**{model}, all of a block, {tokens}**", dtype, variant, f"{milliseconds(seconds)} ms", ""]
            table.append([*together, *(_ratio(_of_all(block, peer)) for peer in peers)])
    table.insert(1, ["---"] * len(table[0]))
    return ["| " + " | ".join(cells) + " |" for cells in table]
