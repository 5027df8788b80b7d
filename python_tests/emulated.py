"""Builds the CPU emulation of the CUDA sources for the tests; seconds when nothing has changed."""

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
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    tool = cmake()
    if compiler is None or tool is None:
        raise RuntimeError(f"the emulated kernels need a C++ compiler and CMake: {INSTALL}")
    build = ROOT / "build" / folder
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        tool,
        "-S",
        str(ROOT),
        "-B",
        str(build),
        *(f"-D{option}" for option in ("S2D_EMULATED=ON", *options)),
    ]
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
