"""`capture_largest_` on every implementation: by brute force, ties, gates, what is not finite.

The functions that begin with `run_` take an implementation and a device; Triton is interpreted in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated import build_emulated
from interpreting import Done, save_time
from torch import Tensor

from s2d_kernels.capture_ops import capture_largest_

ROOT = Path(__file__).parent.parent
Kept = tuple[Tensor, Tensor, Tensor]


def nothing(features: int, device: torch.device) -> Kept:
    value = torch.tensor(-1.0, device=device)
    return value, torch.zeros(2, dtype=torch.int64, device=device), torch.full((features,), torch.nan, device=device)


def expect(kept: Kept, value: float, neuron: int, token: int, x: Tensor) -> None:
    assert kept[0].item() == value
    assert kept[1].tolist() == [neuron, token]
    assert torch.equal(kept[2], x[token].float())


def run_brute_force(impl: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens, neurons, features in ((1, 1, 1), (5, 37, 63), (40, 8, 16), (2, 1100, 40)):
            storage = torch.randn(tokens, neurons + 8, device=device).to(dtype)
            bias = torch.randn(neurons, device=device).to(dtype)
            x = torch.randn(tokens, features + 3, device=device)[:, 3:]
            for first, b in ((0, None), (3, bias), (8, bias)):  # rows that are aligned and others
                y = storage[:, first : first + neurons]
                magnitude = (y.float() - (0.0 if b is None else b.float())).abs()
                flat = int(magnitude.flatten().argmax())
                kept = nothing(features, device)
                capture_largest_(*kept, y, x, bias=b, impl=impl)
                expect(kept, magnitude.max().item(), flat % neurons, flat // neurons, x)
    # columns of y and x with a stride
    y, x = torch.randn(40, 9, device=device).T, torch.randn(6, 9, device=device).T
    kept = nothing(6, device)
    capture_largest_(*kept, y, x, impl=impl)
    expect(kept, y.abs().max().item(), *reversed(divmod(int(y.abs().argmax()), 40)), x)


def run_maximum_over_calls_and_ties(impl: str, device: torch.device) -> None:
    """Of equal values the lowest row, then the lowest neuron, then the earlier call."""
    x = torch.arange(50.0, device=device)[:, None].expand(50, 4).contiguous()
    y = torch.zeros(50, 600, device=device)
    kept = nothing(4, device)
    for places in ([(40, 3), (20, 590), (20, 580)], [(3, 3)]):
        y.zero_()
        for token, neuron in places:
            y[token, neuron] = -7.0 if neuron == 580 else 7.0
        capture_largest_(*kept, y, x, impl=impl)
        expect(kept, 7.0, 580, 20, x)
    y[4, 5] = -8.0
    capture_largest_(*kept, y, x, impl=impl)
    expect(kept, 8.0, 5, 4, x)
    capture_largest_(*kept, 0 * y, x, impl=impl)
    expect(kept, 8.0, 5, 4, x)
    capture_largest_(*kept, y[:0], x[:0], impl=impl)
    kept = nothing(4, device)
    capture_largest_(*kept, 0 * y, x, impl=impl)
    expect(kept, 0.0, 0, 0, x)


def run_what_is_not_finite(impl: str, device: torch.device) -> None:
    """NaN does not count, nor does an infinity that a row of x with Inf or NaN made; one of a finite row does."""
    x, y = torch.randn(6, 300, device=device), torch.rand(6, 40, device=device)
    y[2, 7], y[3, 5], y[4, 6] = torch.nan, torch.inf, -torch.inf
    x[3, 299], x[4, 0] = torch.inf, torch.nan
    kept = nothing(300, device)
    capture_largest_(*kept, y, x, impl=impl)
    finite = y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    token, neuron = divmod(int(finite.argmax()), 40)
    expect(kept, finite.max().item(), neuron, token, x)
    y[5, 9] = -torch.inf
    capture_largest_(*kept, y, x, impl=impl)
    expect(kept, float("inf"), 9, 5, x)
    kept = nothing(300, device)
    capture_largest_(*kept, torch.full_like(y, torch.nan), x, impl=impl)
    assert kept[0] == -1
    assert kept[2].isnan().all()


def run_gate(impl: str, device: torch.device) -> None:
    x, y = torch.randn(6, 3, device=device), torch.randn(6, 40, device=device)
    for enabled in (torch.tensor(False, device=device), torch.tensor(0, dtype=torch.uint8, device=device)):
        kept = nothing(3, device)
        capture_largest_(*kept, y, x, enabled=enabled, impl=impl)
        assert kept[0] == -1
        enabled.fill_(1)
        capture_largest_(*kept, y, x, enabled=enabled, impl=impl)
        assert kept[0] == y.abs().max()
    torch.library.opcheck(
        torch.ops.s2d.capture_largest_.default,
        (*nothing(3, device), y, x, None, torch.ones((), device=device) > 0, impl),
    )


RUNS: dict[str, Callable[[str, torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}


@pytest.mark.parametrize("name", list(RUNS))
def test_torch(name: str, device: torch.device) -> None:
    RUNS[name]("torch", device)


@pytest.mark.parametrize("name", list(RUNS))
def test_emulated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build_emulated()
    monkeypatch.delenv("S2D_LIBRARY", raising=False)
    monkeypatch.setenv("S2D_NATIVE", "emulated")
    RUNS[name]("cuda", torch.device("cpu"))


@pytest.mark.interpreted(*RUNS)
def test_interpreted(interpreted: Done) -> None:
    """All in one process: most of its time is the import."""
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.sanitize
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("name", list(RUNS))
def test_on_the_gpu(name: str, impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    RUNS[name](impl, device)


@pytest.mark.parametrize("impl", ["cuda", "triton", "torch"])
def test_in_a_cuda_graph(impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    x, y = torch.randn(60, 30, device=device), torch.randn(60, 500, device=device)
    kept, enabled = nothing(30, device), torch.tensor(False, device=device)
    capture_largest_(*kept, y, x, enabled=enabled, impl=impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capture_largest_(*kept, y, x, enabled=enabled, impl=impl)
    graph.replay()
    assert kept[0] == -1
    enabled.fill_(True)
    graph.replay()
    assert kept[0] == y.abs().max()


def test_bad_arguments() -> None:
    kept, y, x = nothing(3, torch.device("cpu")), torch.zeros(6, 4), torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"x \(5, 3\) does not fit y \(6, 4\)"):
        capture_largest_(*kept, y, x[:5])
    with pytest.raises(ValueError, match=r"bias \(3,\) does not fit y \(6, 4\)"):
        capture_largest_(*kept, y, x, bias=torch.zeros(3))
    with pytest.raises(TypeError, match=r"enabled has dtype torch.float32"):
        capture_largest_(*kept, y, x, enabled=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"place must be a contiguous \[2\]"):
        capture_largest_(kept[0], torch.zeros(3, dtype=torch.int64), kept[2], y, x)
    assert kept[0] == -1


if __name__ == "__main__":
    save_time()
    for run in sys.argv[1:]:
        torch.manual_seed(0)
        print(run, flush=True)
        RUNS[run]("triton", torch.device("cpu"))
