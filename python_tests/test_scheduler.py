"""SideStream: order, waits counted, exceptions kept, forks and exits survived."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

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


def test_wait_leaves_the_result_and_counts() -> None:
    side = SideStream()
    pending = side.submit(lambda: time.sleep(0.1) or 5)
    pending.wait()
    assert pending.done()
    assert (side.late, side.waited_seconds > 0.05) == (1, True)
    assert pending.join() == 5
    assert side.late == 1

    def fail() -> None:
        raise ArithmeticError("no luck")

    pending = side.submit(fail)
    pending.wait()
    with pytest.raises(ArithmeticError, match="no luck"):
        pending.join()
    side.close()


def test_arguments_live_until_the_join_and_no_longer(device: torch.device) -> None:
    """An allocator gives freed memory to whoever asks next: here a dying argument is overwritten. On a GPU the device
    still reads when the host part is done."""
    side = SideStream(device)
    side.submit(lambda: None).join()
    start, died = threading.Event(), threading.Event()
    x = torch.ones(1 << 16, device=device)
    poison = x.numpy().fill if device.type == "cpu" else None
    weakref.finalize(x, lambda: (poison and poison(float("nan")), died.set()))

    def work(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda._sleep(100_000_000)
        start.wait(10)
        return tensor.sum()

    pending = side.submit(work, x)
    del x
    gc.collect()
    assert not died.is_set()
    blocks = [torch.full((1 << 16,), float("nan"), device=device) for _ in range(64)]  # takes whatever is free
    start.set()
    while not pending.done():
        time.sleep(0.001)
    gc.collect()
    assert not died.is_set()
    assert pending.join().item() == 1 << 16
    del blocks
    side.close()
    gc.collect()
    assert died.is_set()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dataloader_workers_beside_a_running_refresh(method: str) -> None:
    """Workers start and end while the side thread is at work; neither waits for the other."""
    side = SideStream()
    release = threading.Event()
    pending = side.submit(lambda: release.wait(60))
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=method, timeout=60)
    assert sum(batch.sum().item() for (batch,) in loader) == 28
    assert not pending.done()
    release.set()
    assert pending.join()
    side.close()


@pytest.mark.parametrize("ending", ["raise ValueError('loop failed')", "os.kill(os.getpid(), 2)"])
def test_an_exit_in_the_middle_of_a_refresh_does_not_hang(ending: str) -> None:
    program = f"""
import os, signal, time, torch, torch._dynamo
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands it down ignored
from s2d_kernels import S2D, refresh
svd = refresh.topk_svd
refresh.topk_svd = lambda *a, **k: (time.sleep(0.5), svd(*a, **k))[1]
model = torch.nn.Linear(16, 16)
reg, waiting = S2D(model), S2D(model)
model(torch.randn(2, 16)).sum().backward()
reg.add_grad()
assert not reg._pending.done()
print("running", flush=True)
{ending}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "running\n"
    assert run.stderr.strip().splitlines()[-1] in ("ValueError: loop failed", "KeyboardInterrupt"), run.stderr
    assert "ignored" not in run.stderr


class Recorded:
    """A CUDA stream, or an event of one, that notes what happens to it; `end` is the event of the work's end."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> Recorded:
        event = Recorded(self.log, f"end of {self.name}" if self.name == "side" else "fork")
        self.log.append(f"{self.name} records {event.name}")
        return event

    def wait_event(self, event: Recorded) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a SideStream on a CUDA device asks of two streams, in its order, where there is no such device."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Recorded(log, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Recorded(log, "training"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return log


class Big:
    """An argument that notes when it is freed."""

    def __init__(self, log: list[str]) -> None:
        weakref.finalize(self, log.append, "argument is freed")


FORK = ["training records fork", "side waits for fork", "work", "side records end of side"]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")  # by the autocast that is turned off
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("way", ["join", "wait", "drop", "forgotten"])
def test_the_training_stream_waits_also_for_work_that_fails(
    way: str, fails: bool, asynchronous: bool, streams: list[str]
) -> None:
    """What failed has enqueued kernels before, and these still read the arguments."""

    def work(_: Big) -> int:
        streams.append("work")
        if fails:
            raise ArithmeticError("no luck")
        return 1

    side = SideStream("cuda", asynchronous=asynchronous)
    pending = side.submit(work, Big(streams))
    with pytest.raises(ArithmeticError) if fails and way == "join" else contextlib.nullcontext():
        if way != "forgotten":
            getattr(pending, way)()
    if way == "wait":
        assert streams == [*FORK, "training waits for end of side"]
        return
    del pending
    side.close()
    gc.collect()
    waiting = "host waits for end of side" if way == "forgotten" else "training waits for end of side"
    assert streams == [*FORK, waiting, "argument is freed"]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_work_under_way_that_is_forgotten_holds_its_arguments(streams: list[str]) -> None:
    release = threading.Event()
    side = SideStream("cuda")
    side.submit(lambda _: (release.wait(10), streams.append("work")), Big(streams))
    gc.collect()
    release.set()
    side.close()
    gc.collect()
    assert streams == [*FORK, "host waits for end of side", "argument is freed"]


def test_drop_waits_without_being_late() -> None:
    side = SideStream()
    done = threading.Event()
    pending = side.submit(lambda: (time.sleep(0.1), done.set()))
    pending.drop()
    assert done.is_set()
    assert (side.late, side.waited_seconds) == (0, 0.0)
    side.close()
