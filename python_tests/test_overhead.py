"""`python -m bench overhead` and `timeline`: what they count, and that they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import overhead, tables, timing
from bench.__main__ import app
from s2d_kernels.scheduler import LABEL


def result_of(plain: list[list[float]], with_s2d: list[list[float]], *, refreshes: int = 3) -> overhead.Overhead:
    own = [[0.25] * len(one) for one in plain]
    environment = {"threads": 2, "device_name": "a CPU", "versions": {}, "commit": "abc", "date": "today"}
    environment |= {"copy_bytes_per_second": 1e9, "fp32_flops_per_second": 1e9}
    setting = {"interval": len(plain), "lead": 1}
    return overhead.Overhead(plain, with_s2d, own, [0.5] * refreshes, 3, 1, 0.125, 2**20, environment, setting)


PLAIN = [[1.0, 1.0, 9.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
WITH_S2D = [[1.5, 1.5, 1.5], [1.0, 7.0, 1.0], [1.0, 1.0, 1.0]]  # half a second more in one of three steps


def test_exposed_cost_is_of_the_interval_and_forgives_one_disturbed_step() -> None:
    result = result_of(PLAIN, WITH_S2D)
    assert result.exposed == pytest.approx(0.5 / 3)
    assert result.spread == pytest.approx((3.5 / 11 - 1, 9.5 / 3 - 1))


def test_rows_say_what_happens_in_which_step() -> None:
    rows = overhead.rows_of(result_of(PLAIN, WITH_S2D), "now", torch.device("cpu"))
    shown = [tables.cells(row)[1:] for row in rows]
    assert [cells[0] for cells in shown] == ["0", "1", "2", "0..2"]
    assert [cells[1] for cells in shown] == [row.variant for row in rows]
    assert shown[0][2:] == ("1000 ms", "1500 ms (1500-1500)", "+50.00%", "250 ms")
    assert shown[-1][2:] == ("3000 ms", "3500 ms (3500-9500)", "+16.67% (-68.18% to +216.67%)", "750 ms")
    assert "3 refreshes, each 500 ms of the worker (median), waited for 1 times, 125 ms in all; 1.0 MiB" in (
        tables.caption(rows[0])
    )
    assert len({tables.caption(row) for row in rows}) == 1
    lost = overhead.rows_of(result_of(PLAIN, WITH_S2D, refreshes=2), "now", torch.device("cpu"))
    assert tables.cells(lost[-1])[5].endswith("FAILED")


@pytest.mark.parametrize(("first", "interval", "lead"), [(4, 100, 3), (1, 10, 0), (12, 12, 11), (8, 8, 7), (2, 2, 1)])
def test_no_refresh_is_under_way_where_the_turn_changes(first: int, interval: int, lead: int) -> None:
    cut = overhead.segments(first, 3 * interval, interval=interval, lead=lead, length=10)
    assert sum(cut) == 3 * interval
    assert min(cut[:-1], default=10) >= 10
    step = first
    for length in cut:
        step += length
        assert (step - 1) % interval >= lead  # the last step that was made has taken the refresh over


@pytest.mark.minilm
def test_overhead_command(tmp_path: Path) -> None:
    arguments = ["--interval", "3", "--lead", "1", "--intervals", "2", "--batch", "2", "--tokens", "8"]
    file = tmp_path / "overhead.jsonl"
    done = CliRunner().invoke(app, ["overhead", *arguments, "--json", str(file)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    rows = timing.read_rows(file)
    assert [row.repeats for row in rows] == [2, 2, 2, 2]
    for row in rows:
        assert 0 < row.traffic["own_seconds"] < row.seconds
        assert row.traffic["plain_seconds"] > 0
        assert row.traffic["refreshes"] == 2
        assert row.traffic["snapshot_bytes"] == 43057152  # 36 matrices of the encoder and the pooler, fp32
        assert "mode decoupled, interval 3, lead 1" in row.setting
    # copies and the capture happen in the step that starts a refresh
    assert rows[0].traffic["own_seconds"] > 2 * rows[2].traffic["own_seconds"]
    (tmp_path / "page.md").write_text("<!-- bench:overhead -->\n<!-- /bench:overhead -->\n")
    made = CliRunner().invoke(app, ["table", "--readme", str(tmp_path / "page.md"), "--results", str(tmp_path)])
    assert made.exit_code == 0, made.output
    assert "| steps of the interval |" in (tmp_path / "page.md").read_text()


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
    ours = lanes["S2D, in that thread"]
    assert ours == [overhead.IN_STEP] + [overhead.IN_FORWARD] * 37 + [overhead.IN_STEP] * 5  # the matrices of step t
    (refresh,) = [(begin, end) for _, name, begin, end in spans if name == LABEL]
    calls = [(begin, end) for _, name, begin, end in spans if name == overhead.IN_STEP]
    # submitted in step t, the second one, and joined in step t + 3; when the worker gets a core is the system's choice
    assert calls[1][0] < refresh[0] < refresh[1] < calls[4][1]
    overhead.draw(spans, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
