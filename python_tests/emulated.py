"""Builds csrc for the tests: the CPU's kernels, and the emulation of the CUDA sources; seconds when nothing changed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "apt install g++ (or your system's package), pip install cmake"


def cmake() -> str | None:
    """CMake of this Python's environment, else the system's."""
    return shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


@cache
def build_emulated(*options: str, folder: str = "emulated") -> Path:
    """Folder with libs2d_emulated.so and libs2d_emulated_test_kernels.so, compiled with CMake `-D` options.

    Raises:
        RuntimeError: no C++ compiler or CMake, with the line that installs them, or the compiler's message.
    """
    return _build(folder, "S2D_EMULATED=ON", *options)


@cache
def build_cpu(*options: str, folder: str = "cpu") -> Path:
    """libs2d_cpu.so, compiled with CMake `-D` options.

    Raises:
        RuntimeError: as `build_emulated`.
    """
    return _build(folder, "S2D_CUDA=OFF", "S2D_WERROR=ON", *options) / "libs2d_cpu.so"


def _build(folder: str, *options: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    tool = cmake()
    if compiler is None or tool is None:
        raise RuntimeError(f"the kernels on the CPU need a C++ compiler and CMake: {INSTALL}")
    build = ROOT / "build" / folder
    build.mkdir(parents=True, exist_ok=True)
    configure = [tool, "-S", str(ROOT), "-B", str(build), *(f"-D{option}" for option in options)]
    if not (build / "CMakeCache.txt").is_file() and shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    # Test processes may run side by side.
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [tool, "--build", str(build), "--parallel"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return build
