"""The gpu-* targets of the Makefile, with stand-ins for the tools of a machine with a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import app

ROOT = Path(__file__).parent.parent

REPORT = """<testsuites><testsuite>
<testcase classname="python_tests.test_svd" name="a" time="1.5"/>
<testcase classname="python_tests.test_svd" name="b" time="0.5">{b}</testcase>
<testcase classname="python_tests.test_penalty" name="c" time="0"><skipped message="no"/></testcase>
</testsuite></testsuites>"""

# Records how it is called; as pytest it writes a report, and `bench summary` is the real one.
PYTHON = """#!/bin/sh
echo "python $*" >> "$CALLS"
case "$*" in
  *"bench summary"*) exec {python} "$@" ;;
  *"-m bench"*) echo "rows" ;;
esac
for argument in "$@"; do
  case "$argument" in --junitxml=*) echo '{report}' > "${{argument#--junitxml=}}" ;; esac
done
exit {status}
"""


@pytest.fixture
def make(tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name: str, text: str) -> None:
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    tool("nvidia-smi", "#!/bin/sh\necho 9.0\n")
    tool("cmake", '#!/bin/sh\necho "cmake $*" >> "$CALLS"\n')
    tool("compute-sanitizer", '#!/bin/sh\necho "$1 $2" >> "$CALLS"\nshift 4\nexec "$@"\n')

    def run(target: str, *settings: str, failing: bool = False) -> tuple[subprocess.CompletedProcess, list[str]]:
        report = REPORT.format(b='<failure message="x"/>' if failing else "").replace("\n", "")
        tool("gpu-python", PYTHON.format(python=sys.executable, report=report, status=int(failing)))
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "COLUMNS": "150"}
        command = ["make", target, "PYTHON=gpu-python", f"OUT={tmp_path}/out", f"BUILD={tmp_path}/build", *settings]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines() if calls.exists() else []

    assert shutil.which("make"), "make is needed"
    return run


def test_build_is_for_the_architecture_present(make) -> None:
    done, calls = make("gpu-build")
    assert done.returncode == 0, done.stderr
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a" in calls[0]


def test_tests_end_with_a_table(make, tmp_path: Path) -> None:
    done, calls = make("gpu-test", "OPS=svd penalty")
    assert done.returncode == 0, done.stderr
    assert "--device cuda -k svd or penalty" in calls[-2]
    assert ["test_penalty", "0", "0", "1"] in [
        [cell.strip() for cell in line.split("│")[2:6]] for line in done.stdout.splitlines() if "│" in line
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu-build.log", "gpu-test.log", "gpu-test.xml"}


@pytest.mark.parametrize("target", ["gpu-test", "gpu-sanitize", "gpu-bench"])
def test_a_failure_is_the_exit_status_and_all_is_still_shown(make, target: str) -> None:
    done, calls = make(target, failing=True)
    assert done.returncode != 0
    if target == "gpu-sanitize":
        assert [call.split()[1] for call in calls if call.startswith("--tool")] == [
            "memcheck",
            "racecheck",
            "initcheck",
            "synccheck",
        ]
    if target != "gpu-bench":
        assert "test_svd" in done.stdout


def test_benchmarks_write_rows_and_logs_by_operation(make, tmp_path: Path) -> None:
    done, calls = make("gpu-bench", "OPS=linear")
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call.startswith("python")] == [
        f"python -m bench linear --device cuda --json {tmp_path}/out/linear-gpu.jsonl"
    ]
    assert (tmp_path / "out" / "gpu-bench-linear.log").read_text() == "rows\n"


def test_without_operations_every_benchmark_runs(make) -> None:
    done, calls = make("gpu-bench")
    assert done.returncode == 0, done.stderr
    ran = [call.split()[3] for call in calls if call.startswith("python -m bench")]
    assert ran == ["svd", "linear", "penalty", "step", "overhead"]
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(ran) <= commands


@pytest.mark.parametrize("operations", ["unknown", "svd unknown"])
def test_an_unknown_benchmark_is_an_error_that_names_the_known_ones(make, operations: str) -> None:
    done, calls = make("gpu-bench", f"OPS={operations}")
    assert done.returncode != 0
    assert "no benchmark is called unknown; there are svd linear penalty step overhead" in done.stderr
    assert calls == []


def test_the_tests_of_an_operation_without_a_benchmark_can_be_chosen(make) -> None:
    done, calls = make("gpu-test", "OPS=selection")
    assert done.returncode == 0, done.stderr
    assert "--device cuda -k selection" in calls[-2]
