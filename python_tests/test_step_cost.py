"""What a step asks of the device, between two refreshes and where one begins or arrives: nothing that waits for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2d_kernels import S2D, SpectralAdamW
from s2d_kernels.layers import LayerState, decay, empty_layer

# What reads a number back, or brings one from the host's memory: both wait on a GPU.
WAITING = {"aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.equal"}


class Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(f"{func.namespace}.{func._schema.name.split('::')[1]}")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(device: torch.device, *, allowed: str = "") -> Iterator[None]:
    """Fails where an operation of this thread waits for the device, on a GPU where anything of the process does."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Record() as record:
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert record.names
    assert not WAITING & set(record.names) - {allowed}


def prepared(mode: str, device: torch.device, *, fused: bool) -> tuple[S2D, torch.optim.Optimizer]:
    """A model whose layers are all decided, before a step that is no refresh and at which none arrives."""
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3))).to(device)
    x = torch.randn(6, 24, device=device)
    reg = S2D(model, mode=mode, strength=0.1, threshold=1e-3, interval=50, lead=0)
    if fused:
        optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), 1e-3, regularizer=reg)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        reg.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(layer.k_target for layer in reg.layers)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    return reg, optimizer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_an_ordinary_step_waits_for_nothing(mode: str, fused: bool, device: torch.device) -> None:
    reg, optimizer = prepared(mode, device, fused=fused)
    with nothing_waits(device):
        optimizer.step()
    reg.close()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("mode", "static"), [("coupled", False), ("coupled", True), ("decoupled", False)])
def test_a_refresh_begins_and_arrives_without_waiting(
    mode: str, static: bool, fused: bool, device: torch.device
) -> None:
    """From the forward that copies and captures to the step that takes the factors over; the worker, which reads its
    decisions back, is held while a step runs."""
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3))).to(device)
    x = torch.randn(6, 24, device=device)
    reg = S2D(model, mode=mode, strength=0.1, threshold=1e-3, interval=4, lead=2, static_factors=static)
    if fused:
        optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), 1e-3, regularizer=reg)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        reg.attach(optimizer)
    release, refresh = threading.Event(), reg._refresh
    reg._refresh = lambda *arguments: (release.wait(60), refresh(*arguments))[1]
    release.set()
    arrived: list[bool] = []
    for step in range(12):
        optimizer.zero_grad()
        before = [layer.sigma_max for layer in reg.layers]
        if step < 4:  # kernels are loaded, tables and the optimizer's state are made
            model(x).square().mean().backward()
            optimizer.step()
            continue
        release.clear()
        # static ranks are a tensor of the host first, which goes to the device from pinned memory
        with nothing_waits(device, allowed="aten.lift_fresh" if static else ""):
            model(x).square().mean().backward()
            optimizer.step()
        if step % 4 == 0:
            assert not reg._pending.done()
            release.set()
            reg._pending.wait()
        arrived.append([layer.sigma_max for layer in reg.layers] != before)
    reg.close()
    assert arrived == [False, False, True, False] * 2


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-9])
def test_small_decays_add_up(power: float, relative: float) -> None:
    """Of 1000 steps that each take a share far below fp32's resolution."""
    s = torch.tensor([7.0, 1.3, 0.02], dtype=torch.float64)
    rate = relative / 1.3 ** (power - 1)
    layer = empty_layer((9, 8), torch.zeros(1), k_max=3)
    layer.rank = 3
    layer.S.copy_(s)
    taken = sum(decay([layer], [rate], strength=1.0, power=power)[0] for _ in range(1000))
    if power == 1:
        exact = s * math.expm1(-1000 * rate)
    else:
        exact = s * torch.expm1(-torch.log1p((power - 1) * 1000 * rate * s ** (power - 1)) / (power - 1))
    torch.testing.assert_close(taken, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.S, s + exact, rtol=1e-12, atol=0)


def test_only_decided_components_decay_each_layer_at_its_rate() -> None:
    layers: list[LayerState] = []
    for rank in (1, 2):
        layer = empty_layer((9, 8), torch.zeros(1), k_max=3)
        layer.rank = rank
        layer.S.copy_(torch.tensor([3.0, 2.0, 0.0]))
        layers.append(layer)
    changes: list[Tensor] = decay(layers, [0.0, 0.5], strength=1.0, power=2.0)
    torch.testing.assert_close(changes[0], torch.zeros(1).double())
    torch.testing.assert_close(changes[1], torch.tensor([3 / 2.5 - 3, 1 - 2]).double())
    assert layers[0].S.tolist() == [3.0, 2.0, 0.0]
    assert layers[1].S.tolist() == pytest.approx([1.2, 1.0, 0.0])
