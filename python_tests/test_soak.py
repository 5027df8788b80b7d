"""The short form of `python -m bench soak`."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.soak import soak


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_delays_lost_layers_and_reloads_change_no_bit_and_lose_nothing(mode: str) -> None:
    result = soak(200, mode=mode, seed=3)
    assert result.passed, result
    assert (result.refreshes, result.arrived) == (20, 20)
    assert result.late > 0
    assert result.poisoned > 0
    assert result.reloads_in_flight > 0


def test_the_command_shows_the_figures() -> None:
    done = CliRunner().invoke(app, ["soak", "--steps", "30"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "3 / 3 / 3" in done.output
