"""Which layers of a model carry activation outliers in a few singular values: rows, table, Markdown, picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from s2d_kernels.capture import ActivationCapture
from s2d_kernels.evaluation import run_batches
from s2d_kernels.parameters import ParameterDecision, find_matrices
from s2d_kernels.selection import pcdr
from s2d_kernels.svd import STATUS_NAMES, topk_svd

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

HEALTHY, FIRED = "#4c78a8", "#d62728"


class LayerDiagnosis(NamedTuple):
    """One matrix of the model.

    Attributes:
        name, shape: the parameter (with a row range for a block of a fused projection) and (m, n).
        lower, upper: bounds on PCDR_1..k_max; equal where the exact route was taken.
        ratios: PCDR_1..k_max exactly, NaN unless asked for (`exact=True`) or needed for the decision.
        max_activation: largest |W x| over the batches, bias excluded.
        sigma_max: largest singular value.
        k_target: components S2D would decay, 0 for a healthy layer.
        route: what decided: "bounds", "exact", "non-finite", or "not called" when the model never used the layer.
        status: convergence of the singular triplets.
    """

    name: str
    shape: tuple[int, int]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    ratios: tuple[float, ...]
    max_activation: float
    sigma_max: float
    k_target: int
    route: str
    status: str


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    threshold: float = 0.95,
    k_max: int = 3,
    select: Sequence[tuple[str, bool]] = (),
    splits: Mapping[str, Sequence[int]] | None = None,
    exact: bool = False,
    impl: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[LayerDiagnosis], list[ParameterDecision]]:
    """Run `model` over `batches` without gradients and decide every layer at its largest activation.

    Args:
        model: left as it was, training mode included.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        threshold, k_max: as in `pcdr`.
        select, splits: as in `S2D`.
        exact: also compute every ratio exactly, whatever decided: one `eigh` a layer.
        impl: implementation of the operations, or None to choose.
        progress: called with 1 after every batch.

    Returns:
        One `LayerDiagnosis` per matrix in the model's order, and the decision about every parameter.

    Raises:
        ValueError: no batch was given. TypeError: a batch is something else.
    """
    matrices, decisions = find_matrices(model, k_max=k_max, select=select, splits=splits)
    capture = ActivationCapture(matrices, require_grad=False)
    capture.start()
    try:
        run_batches(model, batches, progress=progress)
    finally:
        captured = capture.stop()
    called = [matrix for matrix in matrices if matrix.name in captured]
    weights = [captured[matrix.name].weight for matrix in called]
    factors = topk_svd(
        weights, k=[min(k_max, *m.shape) for m in called], keys=[matrix.name for matrix in called], impl=impl
    )
    inputs = [captured[matrix.name].x for matrix in called]
    neurons = [captured[matrix.name].neuron for matrix in called]
    results = pcdr(weights, inputs, neurons, factors, threshold=threshold, k_max=k_max, impl=impl)
    settled = results
    if exact:
        settled = pcdr(weights, inputs, neurons, threshold=threshold, k_max=k_max, impl=impl)
    triples = zip(factors, results, settled, strict=True)
    found = {matrix.name: triple for matrix, triple in zip(called, triples, strict=True)}
    rows = []
    nan = float("nan")
    for matrix in matrices:
        if matrix.name not in found:
            nothing = (nan,) * k_max
            rows.append(LayerDiagnosis(matrix.name, matrix.shape, *(nothing,) * 3, nan, nan, 0, "not called", "-"))
            continue
        factor, result, value = found[matrix.name]
        rows.append(
            LayerDiagnosis(
                matrix.name,
                matrix.shape,
                result.lower,
                result.upper,
                value.lower if value.route == "exact" else (nan,) * k_max,
                result.activation,
                float(factor.S[0]),
                result.k_target,
                result.route,
                STATUS_NAMES[int(factor.status)],
            )
        )
    return rows, decisions


def _ratio(exact: float, low: float, high: float) -> str:
    if not math.isnan(exact):
        return f"{exact:.4f}"
    if math.isnan(low):
        return "-"
    # Bounds print rounded outwards, lest 0.950 be shown for something below the threshold.
    return f"{math.floor(low * 1000) / 1000:.3f}..{math.ceil(high * 1000) / 1000:.3f}"


def _cells(row: LayerDiagnosis) -> list[str]:
    decision = f"decay {row.k_target}" if row.k_target else "healthy"
    if row.route in ("non-finite", "not called"):
        decision = row.route
    return [
        row.name,
        "x".join(map(str, row.shape)),
        *(_ratio(*values) for values in zip(row.ratios, row.lower, row.upper, strict=True)),
        f"{row.max_activation:.1f}",
        f"{row.sigma_max:.2f}",
        decision,
        row.route,
    ]


def _header(rows: Sequence[LayerDiagnosis]) -> list[str]:
    k_max = len(rows[0].lower) if rows else 0
    ratios = [f"PCDR_{k + 1}" for k in range(k_max)]
    return ["layer", "shape", *ratios, "max |Wx|", "sigma_max", "decision", "route"]


def to_table(rows: Sequence[LayerDiagnosis], *, title: str | None = None) -> Table:
    """The rows as a `rich` table, fired layers marked."""
    from rich.table import Table

    table = Table(title=title, header_style="bold")
    for position, column in enumerate(_header(rows)):
        table.add_column(column, justify="left" if position in (0, len(_header(rows)) - 1) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), style="bold red" if row.k_target else None)
    return table


def to_markdown(rows: Sequence[LayerDiagnosis]) -> str:
    """The rows as a Markdown table."""
    header = _header(rows)
    lines = [header, ["---"] * len(header), *map(_cells, rows)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"


def draw(rows: Sequence[LayerDiagnosis], ratio_axes: Any, activation_axes: Any, *, threshold: float) -> None:
    """PCDR_1 of every layer with the threshold, and its largest activation, onto two matplotlib axes."""
    position = range(len(rows))
    colors = [FIRED if row.k_target else HEALTHY for row in rows]
    exact = [not math.isnan(row.ratios[0]) for row in rows]
    middle = [row.ratios[0] if e else (row.lower[0] + row.upper[0]) / 2 for row, e in zip(rows, exact, strict=True)]
    half = [0.0 if e else (row.upper[0] - row.lower[0]) / 2 for row, e in zip(rows, exact, strict=True)]
    ratio_axes.bar(position, middle, color=colors, yerr=half if any(half) else None, ecolor="#888888")
    ratio_axes.axhline(threshold, color="black", linestyle="--", linewidth=1)
    ratio_axes.text(len(rows) - 0.5, threshold, f"tau = {threshold:g}", ha="right", va="bottom", fontsize=8)
    ratio_axes.set(ylabel="PCDR$_1$", ylim=(0, 1.08), xticks=[])
    activation_axes.bar(position, [row.max_activation for row in rows], color=colors)
    activation_axes.set(ylabel="max |Wx|", yscale="log", xticks=[])
    for index, row in enumerate(rows):
        if row.k_target:
            label = row.name.removesuffix(".weight")
            activation_axes.annotate(
                f"{label}  |A| = {row.max_activation:.0f}",
                (index, row.max_activation),
                xytext=(8, -2),
                textcoords="offset points",
                fontsize=8,
                color=FIRED,
                va="top",
            )


def to_figure(rows: Sequence[LayerDiagnosis], *, threshold: float, title: str = "") -> Figure:
    """The rows as a picture of two panels: PCDR_1 and largest activation per layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    ratio_axes, activation_axes = figure.subplots(2, 1)
    draw(rows, ratio_axes, activation_axes, threshold=threshold)
    activation_axes.set_xlabel("matrices in the order of the model")
    figure.suptitle(title)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the picture, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
