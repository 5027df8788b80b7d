"""`python -m bench overhead` and `timeline`: what they count, and that they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import overhead
from bench.__main__ import app
from s2d_kernels.scheduler import LABEL


def test_exposed_cost_is_of_the_interval_and_forgives_one_disturbed_block() -> None:
    plain = [[1.0, 1.0, 9.0], [1.0, 1.0, 1.0]]
    with_s2d = [[1.5, 1.5, 1.5], [1.0, 7.0, 1.0]]  # half a second more in one of two steps
    result = overhead.Overhead(plain, with_s2d, 0, 0.0, 0, {}, {"interval": 2, "lead": 0})
    assert result.exposed == pytest.approx(0.25)
    assert result.spread == pytest.approx((2.5 / 10 - 1, 8.5 / 2 - 1))


@pytest.mark.minilm
def test_overhead_command(tmp_path: Path) -> None:
    arguments = ["--interval", "3", "--lead", "1", "--blocks", "2", "--batch", "2", "--tokens", "8"]
    file = tmp_path / "overhead.jsonl"
    done = CliRunner().invoke(app, ["overhead", *arguments, "--json", str(file)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "exposed cost" in done.output
    (line,) = file.read_text().splitlines()
    result = json.loads(line)
    for seconds in (result["plain"], result["with_s2d"]):
        assert [len(blocks) for blocks in seconds] == [2] * 3
        assert all(value > 0 for blocks in seconds for value in blocks)
    assert result["snapshot_bytes"] == 43057152  # 36 matrices of the encoder and the pooler, fp32
    assert result["setting"] | {"mode": "decoupled", "interval": 3, "lead": 1} == result["setting"]


@pytest.mark.minilm
def test_timeline_shows_one_refresh_beside_the_training_thread(tmp_path: Path) -> None:
    spans, _ = overhead.trace(torch.device("cpu"), steps=6, batch=2, tokens=8, interval=5)
    lanes: dict[str, list[str]] = {}
    for lane, name, begin, end in spans:
        assert 0 <= begin <= end
        lanes.setdefault(lane, []).append(name)
    assert lanes["side worker"] == [LABEL]
    counted = {name: lanes["training thread"].count(name) for name in set(lanes["training thread"])}
    assert counted == {"forward and backward": 6, "optimizer step": 6}
    assert lanes["S2D, in that thread"] == [overhead.IN_STEP] * 6
    (refresh,) = [(begin, end) for _, name, begin, end in spans if name == LABEL]
    steps = [begin for _, name, begin, _ in spans if name == "forward and backward"]
    assert steps[1] < refresh[0] < steps[2]  # it starts at the end of step t, the second one
    overhead.draw(spans, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
