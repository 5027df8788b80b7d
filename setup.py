"""Builds csrc with CMake when nvcc is found and S2D_SKIP_CUDA is unset; otherwise installs pure Python and says so.
The architectures are CMakeLists.txt's fixed list: this machine's GPU is never looked at."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


NATIVE = not os.environ.get("S2D_SKIP_CUDA") and nvcc() is not None and shutil.which("cmake") is not None


class BuildNative(build_py):
    """Puts libs2d.so beside the Python files: into the source tree when editable, into the build folder otherwise."""

    def run(self) -> None:
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "s2d_kernels" / "lib"
        if not NATIVE:
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            reason = "S2D_SKIP_CUDA is set" if os.environ.get("S2D_SKIP_CUDA") else "nvcc or cmake is not found"
            print(f"s2d_kernels: {reason}, installing without the CUDA library (pure Python)", file=sys.stderr)
            return
        build = ROOT / "build" / "wheel"  # not `make native`'s, which may be for one architecture
        # for a cmake that pip installed: build isolation's PYTHONPATH would mislead its Python
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = [f"-DCMAKE_CUDA_COMPILER={nvcc()}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True, env=clean)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True, env=clean)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "libs2d.so", target / "libs2d.so")


class PlatformWheel(bdist_wheel):
    """One wheel for every Python and torch: the library is reached through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return NATIVE  # the wheel depends on the platform


commands = {"build_py": BuildNative, **({"bdist_wheel": PlatformWheel} if NATIVE else {})}
setup(cmdclass=commands, distclass=NativeDistribution)
