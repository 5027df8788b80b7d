"""Options and fixtures of all tests: device, seed, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests: cpu or cuda")
    parser.addoption("--seed", type=int, default=0, help="added to every seed")


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
    """Uninitialized memory holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
