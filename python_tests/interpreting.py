"""Triton's interpreter without the work that has no effect, which is half of its time with small kernels."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


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
