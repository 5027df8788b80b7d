"""`bench pcdr --json`: complete rows, and the table that docs/benchmarks.md has of them."""

from __future__ import annotations

import json

import pytest
from test_bench import ENVIRONMENT
from typer.testing import CliRunner

from bench import pcdr_cases, timing
from bench.__main__ import app
from s2d_kernels import demo_models


def pcdr_command(monkeypatch, file, found, cost, *more: str) -> int:
    """The command with these tallies in the place of MiniLM's."""
    monkeypatch.setattr(timing, "environment", lambda device: ENVIRONMENT)
    monkeypatch.setattr(demo_models, "load_minilm", lambda: (None, None))
    monkeypatch.setattr(demo_models, "english_batches", lambda tokenizer, batches: [{}] * batches)
    monkeypatch.setattr(pcdr_cases, "layer_inputs", lambda model, batch: {})
    monkeypatch.setattr(pcdr_cases, "tallies", lambda inputs, names, step: found)
    monkeypatch.setattr(pcdr_cases, "siglip2_cost", lambda step: cost)
    return CliRunner().invoke(app, ["pcdr", "--batches", "2", "--json", str(file), *more]).exit_code


def test_pcdr_rows_and_their_table(tmp_path, monkeypatch):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    file = results / "pcdr-cpu.jsonl"
    readme.write_text("<!-- bench:pcdr-cpu -->\n<!-- /bench:pcdr-cpu -->\n")
    starts = map("2026-01-0{}".format, range(1, 4))
    monkeypatch.setattr(timing, "run_identifier", lambda: next(starts))
    wrong = pcdr_cases.Tally(1.0, decided=5, wrong=1, by_bounds={8: 1, 16: 2, 32: 3})
    assert pcdr_command(monkeypatch, file, [wrong], None) == 1  # what differs is written, and the command fails
    found = [
        pcdr_cases.Tally(1.0, decided=40, decayed=0, wrong=0, by_bounds={8: 10, 16: 20, 32: 30}, error=1.3e-4),
        pcdr_cases.Tally(50.0, decided=40, decayed=39, wrong=0, by_bounds={8: 38, 16: 39, 32: 40}, error=0.0),
    ]
    assert pcdr_command(monkeypatch, file, found, pcdr_cases.Cost(exact=6.0, svd_fp32=20.0, svd_fp64=30.0)) == 0
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["op"] for row in written] == ["decisions", "decisions", "decisions", "cost"]
    assert written[1]["run"] == written[3]["run"] > written[0]["run"]
    assert all(row["environment"] == ENVIRONMENT for row in written)
    assert (written[0]["wrong"], written[0]["decisions"], written[0]["cases"]) == (1, 20, 5)
    assert written[2]["by_bounds"] == {"8": 0.95, "16": 0.975, "32": 1.0}
    assert (written[3]["exact_of_fp64"], written[3]["exact_of_fp32"]) == pytest.approx((0.2, 0.3))

    arguments = ["table", "--readme", str(readme), "--results", str(results)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    text = readme.read_text()
    assert "| 1 | 40 | 0 | 0 of 160 | 25.0% | 50.0% | 75.0% | 1.3e-04 |" in text
    assert "| 50 | 40 | 39 | 0 of 160 | 95.0% | 97.5% | 100.0% | 0.0e+00 |" in text
    assert "1 of 20" not in text  # of an earlier run
    assert "| full SVDs in fp64 | 30.0 | 0.20 |" in text
    assert "| full SVDs in fp32 | 20.0 | 0.30 |" in text
    assert (
        "a CPU, 1 thread, torch 2.13.0, commit 0123abc, 2026-01-01. MiniLM's 36 encoder matrices and 2 batches" in text
    )
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 0
    readme.write_text(text.replace("0 of 160", "1 of 160"))
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 1

    assert pcdr_command(monkeypatch, file, found, None, "--no-cost") == 0
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "full SVDs in" not in readme.read_text()
    assert "no exact route. Its cost: not measured in this run" in readme.read_text()
