"""The model report: rows agree with brute force, and can be read as table, Markdown and picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from s2d_kernels import diagnostics, reference


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 24)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.first.weight += 30 * torch.outer(nn.functional.one_hot(torch.tensor(5), 40), torch.ones(24) / 24**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.dropout(x))))


def test_rows_agree_with_brute_force() -> None:
    model = Model().train()
    batches = [torch.randn(3, 7, 24) + 1, (torch.randn(2, 24),), {"x": torch.randn(5, 24) - 1}]
    inputs = torch.cat([batches[0].flatten(0, 1), batches[1][0], batches[2]["x"]])
    rows, decisions = diagnostics.diagnose(model, batches, exact=True)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert [row.name for row in rows] == ["first.weight", "second.weight", "unused.weight"]
    assert {d.name for d in decisions if d.decision == "skip"} == {"first.bias", "second.bias", "unused.bias"}
    hidden = torch.relu(model.first(inputs)).detach()  # evaluated without dropout
    for row, layer, x in ((rows[0], model.first, inputs), (rows[1], model.second, hidden)):
        weight = layer.weight.detach().double()
        token, neuron, value = reference.largest_activation(weight, x.double())
        truth = reference.pcdr(weight, x[token].double(), neuron, 3)
        assert row.max_activation == pytest.approx(abs(value.item()), rel=1e-5)
        assert row.sigma_max == pytest.approx(torch.linalg.svdvals(weight)[0].item(), rel=1e-4)
        assert row.ratios == pytest.approx(truth.tolist(), abs=1e-5)
        assert row.k_target == reference.select_rank(truth, 0.95)
        assert all(low <= t <= high for low, t, high in zip(row.lower, truth.tolist(), row.upper, strict=True))
    assert rows[0].k_target == 1
    assert rows[2].route == "not called"


def test_a_non_finite_layer_is_reported() -> None:
    model = Model()
    with torch.no_grad():
        model.second.weight[0, 0] = float("inf")
    rows, _ = diagnostics.diagnose(model, [torch.randn(4, 24)], exact=True)
    assert (rows[1].route, rows[1].k_target, rows[1].status) == ("non-finite", 0, "non-finite")
    assert rows[0].k_target == 1
    assert "non-finite" in diagnostics.to_markdown(rows)


def test_bounds_are_shown_rounded_outwards() -> None:
    rows, _ = diagnostics.diagnose(Model(), [torch.randn(4, 24)])
    shown = diagnostics.to_markdown(rows[:1]).splitlines()[2].split(" | ")[2]
    low, high = map(float, shown.split(".."))
    assert low <= rows[0].lower[0] <= rows[0].upper[0] <= high
    assert math.isnan(rows[0].ratios[0])


def test_table_markdown_and_picture(tmp_path: Path) -> None:
    rows, _ = diagnostics.diagnose(Model(), [torch.randn(4, 24)], exact=True)
    console = Console(width=200, record=True)
    console.print(diagnostics.to_table(rows, title="title"))
    text = console.export_text()
    markdown = diagnostics.to_markdown(rows)
    for words in ("first.weight", "40x24", "decay 1", "healthy", "not called", f"{rows[0].max_activation:.1f}"):
        assert words in text
        assert words in markdown
    path = tmp_path / "made" / "report.png"
    diagnostics.save_png(diagnostics.to_figure(rows, threshold=0.95, title="title"), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="batches holds no batch"):
        diagnostics.diagnose(Model(), [])
    with pytest.raises(TypeError, match=r"batches\[0\] is a str"):
        diagnostics.diagnose(Model(), ["text"])
