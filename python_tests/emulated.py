"""Builds csrc for the tests: the CPU's kernels, and the emulation of the CUDA sources; seconds when nothing changed.

Either with AddressSanitizer too, and what a Python process needs to load that.
"""

from __future__ import annotations

import fcntl
import os
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


def sanitizer_environment() -> dict[str, str]:
    """It must be first, and it looks for C++ exceptions in what is there when it starts. Python leaks on purpose."""
    preload = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0:exitcode=99"}


def run_sanitized(file: str) -> subprocess.CompletedProcess[str]:
    """The tests of `file` that are marked `sanitize`, on the emulation under AddressSanitizer."""
    library = build_emulated("S2D_ASAN=ON", folder="asan") / "libs2d_emulated.so"
    environment = {
        **os.environ,
        **sanitizer_environment(),
        "S2D_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-qs", "-m", "sanitize", file]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
