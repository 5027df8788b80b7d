"""Decisions of `pcdr` on MiniLM's real weights and text, its top singular values inflated or not, against full SVDs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.cases import minilm_weights, siglip2_shapes
from s2d_kernels import pcdr, reference, topk_svd
from s2d_kernels.parameters import find_matrices
from s2d_kernels.selection import PCDR
from s2d_kernels.svd import SVDBasis, TopkSVD

INFLATIONS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
WIDTHS = (8, 16, 32)
K_MAX = 3
THRESHOLD = 0.95
# A decision closer to the threshold than fp64 SVDs agree among themselves is not one.
TIE = 1e-9


@dataclass
class Tally:
    """Decisions of one inflation: how many, how many differ from the full SVD's, and by width how many bounds settled.

    `error`: largest difference of an exactly settled PCDR from the full SVD's.
    """

    inflation: float
    decided: int = 0  # cases, each with every width and without factors
    decayed: int = 0
    wrong: int = 0
    by_bounds: dict[int, int] = field(default_factory=dict)
    error: float = 0.0


def layer_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By matrix name its weight and all its input rows `[tokens, n]` of one batch."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for matrix in find_matrices(model, k_max=K_MAX)[0]:

        def keep(_module: nn.Module, args: tuple[Any, ...], name: str = matrix.name, m: Any = matrix) -> None:
            found[name] = m.rows(m.parameter.detach()), args[0].detach().reshape(-1, args[0].shape[-1]).float()

        handles.append(matrix.module.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def inflated(weight: Tensor, triplets: reference.SVDTriplets, factor: float) -> Tensor:
    """`weight` with its largest singular value times `factor`."""
    if factor == 1.0:
        return weight
    U, S, Vh = (t.double() for t in triplets)
    return (weight.double() + (factor - 1) * S[0] * torch.outer(U[:, 0], Vh[0])).float()


def with_width(factor: TopkSVD, width: int) -> TopkSVD:
    """The factors as a run with this many columns would have them, of the same accuracy."""
    U, S, Vh, residual = factor.basis
    return factor._replace(basis=SVDBasis(U[:, :width], S[:width], Vh[:width], residual[:width]))


def full_svd(weight: Tensor, xs: Tensor, neurons: Tensor) -> Tensor:
    """PCDR_1..K_MAX `[cases, K_MAX]` of inputs `xs [cases, n]` from one fp64 SVD of the weight (eq. 2)."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    terms = (S * U[neurons] * (xs.double() @ Vh.mT)).abs()
    return terms.cumsum(1)[:, :K_MAX] / terms.sum(1, keepdim=True)


def tallies(
    inputs: Sequence[dict[str, tuple[Tensor, Tensor]]],
    names: Sequence[str],
    *,
    inflations: Sequence[float] = INFLATIONS,
    widths: Sequence[int] = WIDTHS,
    step: Callable[[str], None] = lambda _: None,
) -> Iterator[Tally]:
    """One `Tally` an inflation, over the batches' largest activations of the named layers."""
    original = {name: inputs[0][name][0] for name in names}
    triplets = {name: reference.topk_svd(weight.double(), 1) for name, weight in original.items()}
    for inflation in inflations:
        step(f"inflated {inflation:g}x")
        tally = Tally(inflation)
        for name in names:
            weight = inflated(original[name], triplets[name], inflation)
            peaks = [reference.largest_activation(weight, batch[name][1])[:2] for batch in inputs]
            xs = [batch[name][1][token] for batch, (token, _) in zip(inputs, peaks, strict=True)]
            neurons = [neuron for _, neuron in peaks]
            truth = full_svd(weight, torch.stack(xs), torch.tensor(neurons))
            wide = topk_svd([weight], k=max(widths) // 2)[0]
            settled = [settle([weight] * len(xs), xs, neurons, [with_width(wide, b)] * len(xs)) for b in widths]
            settled.append(settle([weight] * len(xs), xs, neurons, None))
            for width, results in zip((*widths, 0), settled, strict=True):
                for result, ratios in zip(results, truth, strict=True):
                    exact = result.route == "exact"
                    tie = bool(((ratios - THRESHOLD).abs() < TIE).any())
                    tally.wrong += result.k_target != reference.select_rank(ratios, THRESHOLD) and not tie
                    if exact:
                        tally.error = max(tally.error, float((torch.tensor(result.lower) - ratios).abs().max()))
                    if width:
                        tally.by_bounds[width] = tally.by_bounds.get(width, 0) + (not exact)
            tally.decided += len(truth)
            tally.decayed += sum(reference.select_rank(ratios, THRESHOLD) > 0 for ratios in truth)
        yield tally


def settle(weights: list[Tensor], xs: list[Tensor], neurons: list[int], factors: list[TopkSVD] | None) -> list[PCDR]:
    return pcdr(weights, xs, neurons, factors, threshold=THRESHOLD, k_max=K_MAX)


@dataclass
class Cost:
    """CPU seconds for every matrix of SigLIP2-B: settled exactly, and decomposed by full SVDs in fp32 and fp64."""

    exact: float
    svd_fp32: float
    svd_fp64: float


def siglip2_cost(step: Callable[[str], None] = lambda _: None) -> Cost:
    """Each distinct shape timed once (best of two) and counted as often as it occurs."""
    shapes = [(m, n) for _, m, n in siglip2_shapes()]
    generator = torch.Generator().manual_seed(0)
    total = Cost(0.0, 0.0, 0.0)
    for m, n in sorted(set(shapes)):
        step(f"{m}x{n}: exact route and full SVDs")
        W = torch.randn(m, n, generator=generator) * n**-0.5
        x = torch.randn(n, generator=generator)
        neuron = int((W @ x).abs().argmax())
        double, count = W.double(), shapes.count((m, n))
        # CPU time counts every thread: the caller's choice of threads does not change the ratio.
        total.exact += count * _best(lambda W=W, x=x, i=neuron: settle([W], [x], [i], None))  # type: ignore[misc]
        total.svd_fp32 += count * _best(lambda W=W: torch.linalg.svd(W, full_matrices=False))  # type: ignore[misc]
        total.svd_fp64 += count * _best(lambda D=double: torch.linalg.svd(D, full_matrices=False))  # type: ignore[misc]
    return total


def _best(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def names_of(model_inputs: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """The encoder's matrices, of which `minilm_weights` has all."""
    return [name for name in model_inputs if name in minilm_weights()]


def table(tallies: Sequence[Tally]) -> Table:
    """A row an inflation: decisions, those that differ from the full SVD's, the share that bounds settled by width."""
    shown = Table(
        title="pcdr on MiniLM's weights and English text",
        caption=f"Each decision with {', '.join(map(str, WIDTHS))} factors and without, tau = {THRESHOLD}, "
        f"K_max = {K_MAX}, against an fp64 full SVD. By bounds: the share that needed no exact route with so many "
        "factors. Error: largest difference of an exactly settled PCDR from the full SVD's.",
    )
    widths = [f"by bounds, b = {width}" for width in WIDTHS]
    for heading in ("s_1 times", "decisions", "decayed", "wrong", *widths, "error"):
        shown.add_column(heading, justify="right")
    for tally in tallies:
        shares = [f"{tally.by_bounds[width] / tally.decided:.1%}" for width in WIDTHS]
        counts = (tally.decided, tally.decayed, tally.wrong)
        shown.add_row(f"{tally.inflation:g}", *map(str, counts), *shares, f"{tally.error:.1e}")
    return shown


def cost_line(cost: Cost) -> str:
    return (
        f"All 76 matrices of SigLIP2-B, CPU seconds of all threads together: settled exactly {cost.exact:.1f}; full "
        f"SVDs in fp32 {cost.svd_fp32:.1f} ({cost.exact / cost.svd_fp32:.2f} of that), in fp64 {cost.svd_fp64:.1f} "
        f"({cost.exact / cost.svd_fp64:.2f})"
    )


def rows(
    tallies: Sequence[Tally], cost: Cost | None, *, run: str, batches: int, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """One JSON object an inflation, and one of the exact route's cost.

    `wrong` counts among `decisions`, each case with every width and without factors; `by_bounds` is the share of cases
    that needed no exact route, by width; `exact_of_fp64` and `exact_of_fp32` are CPU seconds of the exact route over
    those of the full SVDs.
    """
    shared = {"run": run, "environment": environment}
    found: list[dict[str, Any]] = [
        {
            **shared,
            "op": "decisions",
            "batches": batches,
            "threshold": THRESHOLD,
            "k_max": K_MAX,
            "inflation": tally.inflation,
            "cases": tally.decided,
            "decayed": tally.decayed,
            "wrong": tally.wrong,
            "decisions": tally.decided * (len(tally.by_bounds) + 1),
            "by_bounds": {str(width): count / tally.decided for width, count in tally.by_bounds.items()},
            "error": tally.error,
        }
        for tally in tallies
    ]
    if cost is not None:
        found.append(
            {
                **shared,
                "op": "cost",
                "exact_seconds": cost.exact,
                "svd_fp64_seconds": cost.svd_fp64,
                "svd_fp32_seconds": cost.svd_fp32,
                "exact_of_fp64": cost.exact / cost.svd_fp64,
                "exact_of_fp32": cost.exact / cost.svd_fp32,
            }
        )
    return found


def markdown(path: Path) -> str:
    """The tables of the last run in a file of `rows`."""
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    last = max(row["run"] for row in written)
    decided, costs = ([row for row in written if (row["run"], row["op"]) == (last, op)] for op in ("decisions", "cost"))
    widths = list(decided[0]["by_bounds"])
    headings = ["s_1 times", "cases", "decayed", "wrong decisions", *(f"by bounds, b = {b}" for b in widths), "error"]
    table = [
        [
            f"{row['inflation']:g}",
            *(str(row[name]) for name in ("cases", "decayed")),
            f"{row['wrong']} of {row['decisions']}",
            *(f"{row['by_bounds'][width]:.1%}" for width in widths),
            f"{row['error']:.1e}",
        ]
        for row in decided
    ]
    lines = [headings, ["---:"] * len(headings), *table]
    if costs:
        cost, titles = costs[-1], ["all 76 matrices of SigLIP2-B", "CPU seconds", "exact route over it"]
        lines += [[], titles, ["---", "---:", "---:"]]
        lines.append(["settled exactly", f"{cost['exact_seconds']:.1f}", ""])
        for dtype in ("fp64", "fp32"):
            ratio = f"{cost[f'exact_of_{dtype}']:.2f}"
            lines.append([f"full SVDs in {dtype}", f"{cost[f'svd_{dtype}_seconds']:.1f}", ratio])
    e, first = decided[0]["environment"], decided[0]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    caption = (
        f"<sub>{e['device_name']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, {versions}, commit {e['commit']}, "
        f"{e['date']}. MiniLM's 36 encoder matrices and {first['batches']} batch{'es' * (first['batches'] > 1)} of "
        f"English text, tau = {first['threshold']}, K_max = {first['k_max']}. Each case is decided with "
        f"{', '.join(widths)} factors and without, against an fp64 full SVD. Error: largest difference of an exactly "
        "settled PCDR from the full SVD's. By bounds: share of cases that needed no exact route."
        f"{' CPU seconds: of all threads together, best of two.' if costs else ' Its cost: not measured in this run.'}"
        "</sub>"
    )
    return "\n".join([*("| " + " | ".join(line) + " |" if line else "" for line in lines), "", caption, ""])
