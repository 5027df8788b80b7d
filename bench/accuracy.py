"""`python -m bench accuracy`: the error of `topk_svd` by reads, cold and warm, on MiniLM while it is fine-tuned."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.cases import gram_triplets, product_errors, quantile
from bench.timing import environment
from s2d_kernels import demo_models, topk_svd
from s2d_kernels.reference import SVDTriplets
from s2d_kernels.svd import COLD_READS, WARM_READS, TopkSVD

RANKS = (3, 8, 16)
LEARNING_RATES = (1e-5, 1e-4, 1e-3)
STEPS = 100
COLD = (4, 6, 8, 12)
WARM = (2, 3, 4, 5)


@dataclass(frozen=True)
class AccuracyRow:
    """Errors of G = sum s^2 u v^T over the 36 matrices, relative, against the fp64 truth."""

    start: str
    k: int
    width: int
    reads: int
    learning_rate: float | None
    error_p90: float
    error_max: float
    converged: int
    matrices: int


def encoder_weights(model: torch.nn.Module) -> list[Tensor]:
    """Copies of the 36 encoder matrices."""
    return [p.detach().clone() for name, p in model.named_parameters() if name.startswith("encoder.") and p.ndim == 2]


def fine_tuned(learning_rate: float, steps: int, snapshots: int) -> list[list[Tensor]]:
    """Weights after steps, 2 steps, ... of AdamW: a contrastive loss between two dropout passes over English text."""
    torch.manual_seed(0)
    model, tokenizer = demo_models.load_minilm()
    batches = demo_models.english_batches(tokenizer, batches=24, batch_size=16, max_length=32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    taken = []
    for step in track(range(1, steps * snapshots + 1), f"fine-tuning at {learning_rate:g}", transient=True):
        batch = batches[step % len(batches)]
        views = []
        for _ in range(2):
            hidden = model(**batch).last_hidden_state * batch["attention_mask"].unsqueeze(2)
            views.append(torch.nn.functional.normalize(hidden.sum(1), dim=1))
        similarity = views[0] @ views[1].mT / 0.05
        torch.nn.functional.cross_entropy(similarity, torch.arange(len(similarity))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % steps == 0:
            taken.append(encoder_weights(model))
    return taken


def measure(
    start: str, k: int, reads: int, rate: float | None, weights: Sequence[Tensor], warm: Sequence[TopkSVD] | None
) -> AccuracyRow:
    """One row of the table."""
    found = topk_svd(weights, k=k, warm=warm, reads=reads, seed=7)
    errors = product_errors(
        [gram_triplets(W.double(), k) for W in weights], [SVDTriplets(r.U, r.S, r.Vh) for r in found]
    )
    converged = sum(int(result.status) == 0 for result in found)
    width = found[0].basis.S.shape[0]
    return AccuracyRow(start, k, width, reads, rate, quantile(errors), max(errors), converged, len(errors))


def rows(
    steps: int = STEPS, rates: Sequence[float] = LEARNING_RATES, ranks: Sequence[int] = RANKS
) -> list[AccuracyRow]:
    """Cold on the pretrained weights; warm from the refresh `steps` AdamW steps before, itself a warm one."""
    found = []
    model, _ = demo_models.load_minilm()
    pretrained = encoder_weights(model)
    for k in ranks:
        found += [measure("cold", k, reads, None, pretrained, None) for reads in COLD]
    for rate in rates:
        first, second, third = fine_tuned(rate, steps, 3)
        for k in ranks:
            previous = topk_svd(second, k=k, warm=topk_svd(first, k=k, seed=1), seed=2)
            found += [measure("warm", k, reads, rate, third, previous) for reads in WARM]
    return found


def _cells(group: Sequence[AccuracyRow], reads: Sequence[int]) -> list[str]:
    by_reads = {row.reads: row for row in group}
    default = {COLD_READS if group[0].start == "cold" else WARM_READS}
    return [f"**{by_reads[n].error_p90:.1e}**" if n in default else f"{by_reads[n].error_p90:.1e}" for n in reads]


def markdown(found: Sequence[AccuracyRow]) -> str:
    """Two tables: cold by reads, warm by reads and learning rate; the defaults are bold."""
    lines = ["| cold | b | " + " | ".join(f"{n} reads" for n in COLD) + " |", "|---|---|" + "---|" * len(COLD)]
    for k in dict.fromkeys(row.k for row in found):
        group = [row for row in found if row.start == "cold" and row.k == k]
        lines.append(f"| k = {k} | {group[0].width} | " + " | ".join(_cells(group, COLD)) + " |")
    lines += [
        "",
        "| warm | b | lr | " + " | ".join(f"{n} reads" for n in WARM) + " |",
        "|---|---|---|" + "---|" * len(WARM),
    ]
    for k in dict.fromkeys(row.k for row in found):
        for rate in dict.fromkeys(row.learning_rate for row in found if row.start == "warm"):
            group = [row for row in found if (row.start, row.k, row.learning_rate) == ("warm", k, rate)]
            lines.append(f"| k = {k} | {group[0].width} | {rate:g} | " + " | ".join(_cells(group, WARM)) + " |")
    return "\n".join(lines) + "\n"


def rich_table(found: Sequence[AccuracyRow]) -> Table:
    """All rows."""
    table = Table(title="p90 error of G = sum s^2 u v^T, MiniLM's 36 matrices")
    for heading in ("start", "k", "b", "reads", "lr", "p90", "max", "converged"):
        table.add_column(heading, justify="right")
    for row in found:
        rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
        table.add_row(row.start, str(row.k), str(row.width), str(row.reads), rate, f"{row.error_p90:.1e}",
                      f"{row.error_max:.1e}", f"{row.converged}/{row.matrices}")  # fmt: skip
    return table


def accuracy(
    steps: Annotated[int, typer.Option(min=1, help="AdamW steps between refreshes.")] = STEPS,
    lr: Annotated[list[float] | None, typer.Option(help="Learning rates; repeatable.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Numbers of triplets; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the rows and the environment here.")] = None,
    out: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
) -> None:
    """Error of topk_svd by reads, cold and warm, k = 3, 8, 16, on MiniLM's weights while they are fine-tuned."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    found = rows(steps, lr or LEARNING_RATES, k or RANKS)
    console.print(rich_table(found))
    if json is not None:
        content = {"environment": environment(torch.device("cpu")), "steps": steps, "rows": [asdict(r) for r in found]}
        json.write_text(jsonlib.dumps(content, indent=1) + "\n", encoding="utf-8")
    if out is not None:
        out.write_text(markdown(found), encoding="utf-8")
