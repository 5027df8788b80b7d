"""`python -m bench resume`."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from bench import resume
from bench.__main__ import app


def test_the_command_prints_equal_hashes_of_each_mode() -> None:
    done = CliRunner().invoke(app, ["resume", "--steps", "30"])
    assert done.exit_code == 0, done.output
    rows = [line.split("│")[1:-1] for line in done.output.splitlines() if line.startswith("│")]
    assert len(rows) == 2 * 2 * (1 + len(resume.STOPS))
    for mode in resume.MODES:
        of_mode = [[cell.strip() for cell in row] for row in rows if row[0].strip() == mode]
        assert len({row[4] for row in of_mode}) == 1
        assert len(of_mode[0][4]) == 64
        assert [row[2] for row in of_mode if row[3] == "yes"] == ["21", "23"] * 2  # on both sides


def test_the_command_fails_where_one_run_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resume.Run("coupled", "thread", None, False, "a")
    monkeypatch.setattr(resume, "all_runs", lambda *_: [run, resume.Run("coupled", "thread", 20, False, "b")])
    assert CliRunner().invoke(app, ["resume"]).exit_code == 1


@pytest.mark.parametrize("mode", resume.MODES)
def test_the_hash_covers_parameters_and_factors(mode: str) -> None:
    model, optimizer, reg = resume.build(mode, "in place")
    resume.train(model, optimizer, range(6))
    digests = [resume.digest_of(model, reg)]
    with torch.no_grad():
        model.path[0].bias[0] += 1e-6
    digests.append(resume.digest_of(model, reg))
    reg._layers["path.0.weight"].S[0] += 1e-6
    digests.append(resume.digest_of(model, reg))
    assert len(set(digests)) == 3
    reg.close()
    assert resume.straight(mode, "in place", 16).digest != resume.straight(mode, "in place", 16, lead=4).digest
