"""What is shipped: wheels with and without native libraries, and a source distribution that builds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("s2d_kernels-*.whl")
    return wheel


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True, timeout=300)
    (archive,) = folder.glob("s2d_kernels-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return next(path for path in folder.iterdir() if path.is_dir())


def test_source_distribution_is_the_repository(source_distribution: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: nothing to compare with")
    missing = [
        name
        for name in tracked.stdout.split()
        if not (source_distribution / name).is_file() and name not in (".gitignore", ".ci/run")
    ]
    assert not missing


def libraries(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("s2d_kernels/lib/")}


def test_wheel_from_the_source_distribution(source_distribution: Path, tmp_path: Path) -> None:
    """A wheel holds the package, its license and the libraries; nothing of tests, bench or docs."""
    wheel = build_wheel(source_distribution, tmp_path, CUDAARCHS="80")  # test_native.py builds them all
    names = zipfile.ZipFile(wheel).namelist()
    assert "s2d_kernels/reference.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    cuda = {"s2d_kernels/lib/libs2d.so"} if shutil.which("nvcc") else set()
    assert libraries(wheel) == cuda | {"s2d_kernels/lib/libs2d_cpu.so"}
    assert re.search(r"-py3-none-(manylinux|linux)\w*\.whl$", wheel.name)
    assert not [name for name in names if re.match(r"(python_tests|bench|docs|csrc)/", name)]


def test_wheel_without_cuda(source_distribution: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source_distribution, tmp_path, S2D_SKIP_CUDA="1")
    assert libraries(wheel) == {"s2d_kernels/lib/libs2d_cpu.so"}


def test_wheel_without_native_code(source_distribution: Path, tmp_path: Path) -> None:
    wheel = build_wheel(source_distribution, tmp_path, S2D_SKIP_NATIVE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not libraries(wheel)
