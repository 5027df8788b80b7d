"""Builds csrc with CMake: libs2d_cpu.so with the C++ compiler and, where nvcc is found, libs2d.so. S2D_SKIP_CUDA leaves
out the second, S2D_SKIP_NATIVE both. The architectures are CMakeLists.txt's fixed list, never this machine's."""

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
home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
NATIVE = not os.environ.get("S2D_SKIP_NATIVE") and CXX is not None and shutil.which("cmake") is not None
CUDA = NATIVE and not os.environ.get("S2D_SKIP_CUDA") and NVCC is not None


class BuildNative(build_py):
    """Puts the libraries beside the Python files: into the source tree when editable, else into the build folder."""

    def run(self) -> None:
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "s2d_kernels" / "lib"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        target.mkdir(parents=True)
        build = ROOT / "build" / ("wheel" if CUDA else "wheel-cpu")  # not `make native`'s, perhaps of one architecture
        # for a cmake that pip installed: build isolation's PYTHONPATH would mislead its Python
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        cuda = f"-DCMAKE_CUDA_COMPILER={NVCC}" if CUDA else "-DS2D_CUDA=OFF"
        configure = ["cmake", "-S", ROOT, "-B", build, cuda, *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        for command in (configure, ["cmake", "--build", build, "--parallel"]) if NATIVE else ():
            if subprocess.run(command, env=clean).returncode and CUDA:
                sys.exit("s2d_kernels: building the CUDA library failed, S2D_SKIP_CUDA=1 leaves it out")
        for name, wanted in (("libs2d_cpu.so", NATIVE), ("libs2d.so", CUDA)):
            if wanted and (build / name).is_file():
                shutil.copy2(build / name, target)
            else:
                reason = "its build failed" if wanted else "no compiler or cmake, or S2D_SKIP_CUDA or _NATIVE is set"
                print(f"s2d_kernels: installing without {name}: {reason}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python and torch: the libraries are reached through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return NATIVE  # the wheel depends on the platform


commands = {"build_py": BuildNative, **({"bdist_wheel": PlatformWheel} if NATIVE else {})}
setup(cmdclass=commands, distclass=NativeDistribution)
