"""`SideStream`: work that runs beside the training stream and is joined at a known later step.

On a CPU it is one worker thread. On a CUDA device the same thread issues the work on a low-priority stream that first
waits for the training stream, and the joining stream waits for it: an event fork and an event join.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.profiler import record_function

from s2d_kernels import ops

T = TypeVar("T")
LABEL = "s2d side stream"  # of the work, in a profile


class Pending(Generic[T]):
    """Result of `SideStream.submit`, to be joined once, or dropped."""

    def __init__(
        self, side: SideStream, future: Future[T], events: list[torch.cuda.Event], arguments: tuple[Any, ...] = ()
    ) -> None:
        self._arguments = arguments  # held until the join: the side stream may still read their memory
        self._side = side
        self._future = future
        self._events = events  # the end of the work on the side stream, once its host part has finished
        self._process = os.getpid()

    def __del__(self) -> None:
        if self._arguments and not sys.is_finalizing() and os.getpid() == self._process:
            self._future.add_done_callback(partial(_hold, self._arguments, self._events))

    def done(self) -> bool:
        """Whether the host part has finished, with a result or an exception."""
        return self._future.done()

    def failed(self) -> bool:
        """Whether it has finished with an exception, which `join` will raise."""
        return self._future.done() and self._future.exception() is not None

    def join(self) -> T:
        """Wait for the result; the current CUDA stream waits for the side stream. Re-raises the work's exception."""
        self.wait()
        self._arguments = ()
        return self._future.result()

    def drop(self) -> None:
        """Wait as `join` does, without being late, and give the result up, or the exception.

        To be called before results of earlier work are given up: their memory must not go to this work while they are
        in use. In a forked child there is nothing to wait for.
        """
        if os.getpid() == self._process:
            self._future.exception()
            self._follow()
        self._arguments = ()

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
        self._follow()

    def _follow(self) -> None:
        """What the current stream does from now on comes after the work, also after work that failed."""
        for event in self._events:
            torch.cuda.current_stream(self._side.device).wait_event(event)


def completed(side: SideStream, result: T) -> Pending[T]:
    """A `Pending` of work that is done."""
    work: Callable[[], T] = lambda: result  # noqa: E731
    return SideStream(side.device, asynchronous=False).submit(work)


def _hold(arguments: tuple[Any, ...], events: list[torch.cuda.Event], _future: Future[Any]) -> None:
    """Keep the arguments of work whose `Pending` was given up without a word until the device has read them."""
    for event in events:
        event.synchronize()


class SideStream:
    """One queue of work beside the training stream.

    Args:
        device: where the work's tensors live.
        asynchronous: False runs the work inside `submit`, which gives the same bits (for debugging and comparison).

    Attributes:
        late: how often `join` had to wait.
        waited_seconds: how long the host waited in total.

    Streams: on CUDA, work submitted on stream s sees everything enqueued on s before. The `Pending` holds the work's
        arguments until `join`, so that the allocator cannot give their memory away while the side stream reads it; this
        holds for work that fails and for a `Pending` that is dropped, too.
        Results are allocated on the side stream: their memory, once freed, goes to later work, which starts after
        everything that was enqueued before its own `submit`. So nothing enqueued after a `submit` may use a result
        that is freed before the `join` or `drop` of that `submit`'s work. CUDA knows no lower priority than that of an
        ordinary stream, and priority takes no running block off its multiprocessor: kernels of short blocks let the
        training stream in by themselves, a persistent one takes the multiprocessors that it may hold as an argument.
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
        events: list[torch.cuda.Event] = []
        if self.asynchronous:
            return Pending(self, self._thread().submit(self._run, fork, events, work, args), events, args)
        future: Future[T] = Future()
        try:
            future.set_result(self._run(fork, events, work, args))
        except Exception as error:
            future.set_exception(error)
        return Pending(self, future, events, args)

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
        self,
        fork: torch.cuda.Event | None,
        events: list[torch.cuda.Event],
        work: Callable[..., T],
        args: tuple[Any, ...],
    ) -> T:
        # Autocast belongs to the calling thread: without this, work done in place would differ from the worker's.
        with ops.exact_arithmetic(self.device), record_function(LABEL):
            if fork is None or self._stream is None:
                return work(*args)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(fork)
                try:
                    return work(*args)
                finally:  # work that fails has enqueued something before, which still reads and writes
                    events.append(self._stream.record_event())
