"""`SideStream`: work that runs beside the training stream and is joined at a known later step.

On a CPU it is one worker thread. On a CUDA device the same thread issues the work on a low-priority stream that first
waits for the training stream, and the joining stream waits for it: an event fork and an event join.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch.profiler import record_function

from s2d_kernels import ops

T = TypeVar("T")
LABEL = "s2d side stream"  # of the work, in a profile


class Pending(Generic[T]):
    """Result of `SideStream.submit`, to be joined once."""

    def __init__(
        self, side: SideStream, future: Future[tuple[T, torch.cuda.Event | None]], arguments: tuple[Any, ...] = ()
    ) -> None:
        self._side = side
        self._future = future
        self._arguments = arguments  # held until the join: the side stream may still read their memory
        self._process = os.getpid()

    def done(self) -> bool:
        """Whether the host part has finished, with a result or an exception."""
        return self._future.done()

    def failed(self) -> bool:
        """Whether it has finished with an exception, which `join` will raise."""
        return self._future.done() and self._future.exception() is not None

    def join(self) -> T:
        """Wait for the result; the current CUDA stream waits for the side stream. Re-raises the work's exception."""
        self.wait()
        value, _ = self._future.result()
        self._arguments = ()
        return value

    def wait(self) -> None:
        """Wait as `join` does, but leave the result, or the exception, to it.

        For work that reads tensors in place: what is done to them after this call comes after the reads.
        """
        if not self._future.done():
            if os.getpid() != self._process:
                raise RuntimeError(
                    "this refresh was started in another process: after a fork only the parent can join it"
                )
            self._side.late += 1
            begin = time.perf_counter()
            try:
                self._future.exception()
            finally:
                self._side.waited_seconds += time.perf_counter() - begin
        if self._future.exception() is None:
            _, event = self._future.result()
            if event is not None:
                torch.cuda.current_stream(self._side.device).wait_event(event)


class SideStream:
    """One queue of work beside the training stream.

    Args:
        device: where the work's tensors live.
        asynchronous: False runs the work inside `submit`, which gives the same bits (for debugging and comparison).

    Attributes:
        late: how often `join` had to wait.
        waited_seconds: how long the host waited in total.

    Streams: on CUDA, work submitted on stream s sees everything enqueued on s before. The `Pending` holds the work's
        arguments until `join`, so that the allocator cannot give their memory away while the side stream reads it.
        Results are allocated on the side stream: their memory, once freed, goes to later work, which starts after
        everything that was enqueued before its own `submit`. So nothing enqueued after a `submit` may use a result
        that is freed before the `join` of that `submit`'s work. CUDA knows no lower priority than that of an ordinary
        stream, and priority takes no running block off its multiprocessor: kernels of short blocks let the training
        stream in by themselves, a persistent one takes the multiprocessors that it may hold as an argument.
    """

    def __init__(self, device: torch.device | str = "cpu", *, asynchronous: bool = True) -> None:
        self.device = torch.device(device)
        self.asynchronous = asynchronous
        self.late = 0
        self.waited_seconds = 0.0
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def submit(self, work: Callable[..., T], *args: Any) -> Pending[T]:
        """Start `work(*args)` without gradients; an exception is kept for `Pending.join`."""
        fork: torch.cuda.Event | None = None
        if self.device.type == "cuda":
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device, priority=0)
            fork = torch.cuda.current_stream(self.device).record_event()
        if not self.asynchronous:
            future: Future[tuple[T, torch.cuda.Event | None]] = Future()
            try:
                future.set_result(self._run(fork, work, args))
            except Exception as error:
                future.set_exception(error)
            return Pending(self, future, args)
        return Pending(self, self._thread().submit(self._run, fork, work, args), args)

    def close(self) -> None:
        """Finish what was submitted and end the worker. A later `submit` starts a new one."""
        with self._lock:
            if self._executor is not None and self._process == os.getpid():
                self._executor.shutdown(wait=True)
            self._executor = None

    def move(self, device: torch.device) -> None:
        """Work on another device from now on; what was submitted is finished first. The counts go on."""
        self.close()
        self.device, self._stream = device, None

    def _thread(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None or self._process != os.getpid():  # a forked child has no worker thread
                self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="s2d-side-stream")
                self._process = os.getpid()
            return self._executor

    def _run(
        self, fork: torch.cuda.Event | None, work: Callable[..., T], args: tuple[Any, ...]
    ) -> tuple[T, torch.cuda.Event | None]:
        # Autocast belongs to the calling thread: without this, work done in place would differ from the worker's.
        with ops.exact_arithmetic(self.device), record_function(LABEL):
            if fork is None or self._stream is None:
                return work(*args), None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(fork)
                value = work(*args)
                return value, self._stream.record_event()
