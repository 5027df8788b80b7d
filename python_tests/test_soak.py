"""The short form of `python -m bench soak`."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import soak as bench
from bench.__main__ import app
from bench.soak import soak
from s2d_kernels import SideStream


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_delays_lost_layers_and_reloads_change_no_bit_and_lose_nothing(mode: str) -> None:
    result = soak(200, mode=mode, seed=3)
    assert result.passed, result
    assert (result.refreshes, result.arrived) == (20, 20)
    assert result.late > 0
    assert (result.poisoned, result.reloads, result.reloads_in_flight) == (6, 4, 1)


@pytest.mark.parametrize("who_is_first", ["worker", "training"])
def test_what_happens_in_which_step_does_not_depend_on_timing(
    who_is_first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if who_is_first == "worker":
        submit = SideStream.submit
        monkeypatch.setattr(SideStream, "submit", lambda *arguments: (submit(*arguments), time.sleep(0.01))[0])
    else:
        run = SideStream._run
        monkeypatch.setattr(SideStream, "_run", lambda *arguments: (time.sleep(0.01), run(*arguments))[1])
    result = soak(200, mode="coupled", seed=3)
    assert result.passed, result
    assert (result.poisoned, result.reloads, result.reloads_in_flight) == (6, 4, 1)


@pytest.mark.parametrize("leak", ["copies", "objects"])
def test_a_leak_is_seen(leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    refresh = bench._Counted._refresh

    def leaking(self: Any, captured: Any, *arguments: Any) -> Any:
        kept.append([one.weight for one in captured.values()] if leak == "copies" else [object() for _ in range(300)])
        return refresh(self, captured, *arguments)

    monkeypatch.setattr(bench._Counted, "_refresh", leaking)
    result = soak(200, mode="coupled", seed=3)
    assert not result.passed
    assert result.same_bits
    assert (result.arrived, result.threads) == (20, 0)


def test_the_command_shows_the_figures() -> None:
    level = logging.getLogger("s2d_kernels").level
    done = CliRunner().invoke(app, ["soak", "--steps", "30"], env={"COLUMNS": "120"})
    assert logging.getLogger("s2d_kernels").level == level
    assert done.exit_code == 0, done.output
    assert "3 / 3 / 3" in done.output
