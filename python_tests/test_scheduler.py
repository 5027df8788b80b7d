"""SideStream: order, waits counted, exceptions kept, forks and exits survived."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from s2d_kernels import SideStream


@pytest.mark.parametrize("asynchronous", [True, False])
def test_results_and_order(asynchronous: bool) -> None:
    side = SideStream(asynchronous=asynchronous)
    seen: list[int] = []
    pending = [side.submit(lambda i=i: (seen.append(i), i * i)[1]) for i in range(20)]
    assert [p.join() for p in pending] == [i * i for i in range(20)]
    assert seen == list(range(20))
    side.close()


def test_work_runs_without_gradients_beside_the_caller() -> None:
    side = SideStream()
    release = threading.Event()
    pending = side.submit(lambda: (release.wait(10), torch.is_grad_enabled(), threading.get_ident())[1:])
    assert not pending.done()
    release.set()
    grad_enabled, thread = pending.join()
    assert not grad_enabled
    assert thread != threading.get_ident()
    side.close()


def test_a_late_result_is_waited_for_and_counted() -> None:
    side = SideStream()
    assert side.submit(lambda: time.sleep(0.2) or 5).join() == 5
    assert side.late == 1
    assert 0.1 < side.waited_seconds < 5
    pending = side.submit(lambda: 6)
    while not pending.done():
        time.sleep(0.001)
    assert pending.join() == 6
    assert side.late == 1
    side.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_exception_is_kept_for_join(asynchronous: bool) -> None:
    def fail() -> None:
        raise ArithmeticError("no luck")

    side = SideStream(asynchronous=asynchronous)
    pending = side.submit(fail)
    with pytest.raises(ArithmeticError, match="no luck"):
        pending.join()
    assert pending.failed()
    assert side.submit(lambda: 1).join() == 1
    side.close()


def test_usable_after_close() -> None:
    side = SideStream()
    assert side.submit(lambda: 1).join() == 1
    side.close()
    side.close()
    assert side.submit(lambda: 2).join() == 2
    side.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform without fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_its_own_worker() -> None:
    side = SideStream()
    pending = side.submit(lambda: 1)
    pending.join()
    release = threading.Event()
    running = side.submit(release.wait, 30)
    child = os.fork()
    if child == 0:
        try:
            code = 0 if pending.join() == 1 and side.submit(lambda: 3).join() == 3 else 2
            try:
                running.join()
                code = 1
            except RuntimeError:
                pass
            side.close()
        except BaseException:
            code = 3
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    release.set()
    assert running.join()
    side.close()


def test_interpreter_exit_does_not_hang() -> None:
    program = "import time, s2d_kernels\nside = s2d_kernels.SideStream()\nside.submit(time.sleep, 0.3)\nprint('done')\n"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "done\n"
    assert run.stderr == ""
