"""Triton's interpreter: in processes of their own, beside the other tests, and without work that has no effect.

A test file has functions `run_...`, gathered in `RUNS`; called with their names as arguments it runs them. Its test
carries the names in the marker `interpreted` and takes the fixture of that name, which holds what the process said.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]
ROOT = Path(__file__).parent.parent


class Processes:
    """One at a time, in the order in which they are started: the interpreter uses one core."""

    def __init__(self) -> None:
        # Of now: tests change theirs while the processes start.
        self._environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT), self._environment.get("PYTHONPATH")]
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._thread = ThreadPoolExecutor(1)
        self._futures: dict[tuple[Path, tuple[str, ...]], Future[Done]] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self, file: Path, names: tuple[str, ...]) -> None:
        self._futures[file, names] = self._thread.submit(self._run, [sys.executable, str(file), *names])

    def result(self, file: Path, names: tuple[str, ...]) -> Done:
        """Waits for the process, and for those before it."""
        return self._futures[file, names].result()

    def close(self) -> None:
        """Nothing is left running when the session ends early."""
        for future in self._futures.values():
            future.cancel()
        if self._process is not None:
            self._process.kill()
        self._thread.shutdown()

    def _run(self, command: list[str]) -> Done:
        pipe = subprocess.PIPE
        self._process = process = subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdout=pipe, stderr=pipe, text=True
        )
        out, errors = process.communicate()
        return Done(command, process.returncode, out, errors)


class _Kept:
    """In the place of what undoes the changes of `triton.language` after a launch."""

    def restore(self) -> None:
        pass


def save_time() -> None:
    """For a process in which nothing but the interpreter uses Triton. What kernels compute stays the same."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder, language = interpreter.interpreter_builder, interpreter.tl
    # Integers are checked for overflow, and the outcome is dropped unless `debug` is set.
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # The functions of `triton.language` are replaced anew whenever one kernel's function calls another.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> _Kept:
        modules = tuple(any(value is m for value in function.__globals__.values()) for m in (language, language.core))
        if modules not in patched:
            patch(function)
            patched.add(modules)
        return _Kept()

    interpreter._patch_lang = patch_once
