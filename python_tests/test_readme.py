"""README tells the truth: its snippet runs, its commands exist, its tables are the generated ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import s2d_kernels
from bench.__main__ import app as bench_app
from s2d_kernels.__main__ import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_tables_are_the_generated_ones(name: str) -> None:
    result = CliRunner().invoke(bench_app, ["table", "--check", "--readme", str(ROOT / name)])
    assert result.exit_code == 0, result.output


def test_snippet_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()

    snippet = blocks("python")[0]
    scope = {"model": model, "optimizer": optimizer, "train": train}
    exec(snippet, scope)
    assert scope["reg"].step == 5
    assert isinstance(model[0], s2d_kernels.FakeQuantLinear)
    scope["reg"].close()


def test_snippet_of_the_optimizer_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()

    (snippet,) = (block for block in blocks("python") if "SpectralAdamW(" in block)
    scope = {"model": model, "train": train}
    exec(snippet, scope)
    assert scope["reg"].step == 5
    assert len(scope["reg"].layers) == 2
    scope["reg"].close()


def test_commands_exist() -> None:
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 6
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
            continue
        assert words[:2] == ["python", "-m"], command
        cli = {"s2d_kernels": app, "bench": bench_app}[words[2]]
        options = {word for word in words[4:] if word.startswith("--")}
        shown = CliRunner().invoke(cli, [words[3], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, command
        assert all(option in shown.output for option in options), command


def test_names_in_the_table_are_public() -> None:
    """Every public name is in README's table and nothing else is."""
    table = README[README.index("| name | what it does |") : README.index("python -m s2d_kernels report")]
    named = {name for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)", cell)}
    assert named == set(s2d_kernels.__all__)
