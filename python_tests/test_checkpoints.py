"""S2D saved, loaded and resumed at any step, with or without a refresh under way: no bit changes."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import LR, MODES, same_bits, spiked_model, train

from s2d_kernels import S2D, regularizer


@pytest.mark.parametrize(("mode", "strength"), MODES)
def test_resume_and_asynchrony_change_no_bit(mode: str, strength: float, tmp_path: Path) -> None:
    """200 steps = 98 + save + load + 102 = 100 + ...; at 98 the refresh of step 96 is in flight."""

    def run(save_at: int | None, asynchronous: bool = True, slow: bool = False) -> tuple[nn.Module, int]:
        model, v = spiked_model()

        def build(m: nn.Module) -> tuple[S2D, torch.optim.Optimizer]:
            reg = S2D(m, mode=mode, strength=strength, interval=24, lead=3, asynchronous=asynchronous)
            return reg, torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9)

        reg, optimizer = build(model)
        if slow:  # every refresh waits until somebody waits for it
            waited_for = threading.Event()
            refresh, join = reg._refresh, reg._join_pending
            reg._refresh = lambda *a: (waited_for.wait(60), waited_for.clear(), refresh(*a))[2]
            reg._join_pending = lambda: (threading.Timer(0.02, waited_for.set).start(), join())[1]
        if save_at is None:
            train(model, reg, optimizer, v, range(200))
        else:
            train(model, reg, optimizer, v, range(save_at))
            in_flight = reg._pending is not None
            assert in_flight == (save_at in (98, 99))  # joined within step 99
            stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "s2d": reg.state_dict()}
            if in_flight:  # saving does not disturb the run that goes on
                assert stored["s2d"]["pending_step"] == 96
            torch.save(stored, tmp_path / "checkpoint.pt")
            loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            reg.close()
            model, _ = spiked_model()
            reg, optimizer = build(model)
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
            reg.load_state_dict(loaded["s2d"])
            train(model, reg, optimizer, v, range(save_at, 200))
        late = reg.late
        reg.close()
        return model, late

    straight, _ = run(None)
    for save_at in (98, 100, 96, 99):
        assert same_bits(straight, run(save_at)[0]), save_at
    synchronous, late = run(None, asynchronous=False)
    assert late == 0
    assert same_bits(straight, synchronous)
    slow, late = run(None, slow=True)
    assert late == 9  # the refreshes of steps 0, 24, ..., 192: each is waited for
    assert same_bits(straight, slow)
    other, v = spiked_model()
    reg = S2D(other, mode=mode, strength=strength, interval=24, lead=4)
    train(other, reg, torch.optim.SGD(other.parameters(), lr=LR, momentum=0.9), v, range(200))
    assert not same_bits(straight, other)  # the comparison can fail: another lead gives other bits
    reg.close()


@pytest.mark.parametrize(("mode", "strength"), MODES)
def test_resume_at_every_step_of_an_interval(mode: str, strength: float) -> None:
    """Every step from before a refresh until after its arrival, with momentum, through a checkpoint in memory."""

    def run(save_at: int | None) -> nn.Module:
        model, v = spiked_model()
        reg = S2D(model, mode=mode, strength=strength, interval=6, lead=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        if save_at is not None:
            train(model, reg, optimizer, v, range(save_at))
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), reg.state_dict()], file)
            reg.close()
            file.seek(0)
            states = torch.load(file, weights_only=True)
            model, _ = spiked_model()
            reg = S2D(model, mode=mode, strength=strength, interval=6, lead=3)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
            for target, state in zip((model, optimizer, reg), states, strict=True):
                target.load_state_dict(state)
        train(model, reg, optimizer, v, range(save_at or 0, 20))
        reg.close()
        return model

    straight = run(None)
    assert [save_at for save_at in range(14) if not same_bits(straight, run(save_at))] == []


def test_saving_does_not_disturb_the_run_that_goes_on() -> None:
    results = []
    for save in (False, True):
        model, v = spiked_model()
        reg = S2D(model, mode="decoupled", strength=1.0, interval=24, lead=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        train(model, reg, optimizer, v, range(26))
        if save:
            reg.state_dict()
        train(model, reg, optimizer, v, range(26, 60))
        results.append(model)
        reg.close()
    assert same_bits(*results)


def test_state_keys_and_shapes_do_not_change_over_time() -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=10, lead=3)
    first = {k: t.shape for k, t in reg.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(15):
        train(model, reg, optimizer, v, range(step, step + 1))
        assert {k: t.shape for k, t in reg.state_dict().items()} == first
    assert all(isinstance(t, Tensor) for t in reg.state_dict().values())
    reg.close()


def test_load_refuses_a_state_of_another_model_and_changes_nothing() -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=10, lead=3)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(12))
    state = reg.state_dict()
    other = S2D(nn.Sequential(nn.Linear(32, 64)), interval=10, lead=3)
    with pytest.raises(ValueError, match=r"unexpected \['2.weight"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="missing"):
        reg.load_state_dict({})
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(3,\)"):
        reg.load_state_dict(state | {"0.weight.S": torch.zeros(1)})
    assert reg.step == 12
    assert all(torch.equal(a, b) for a, b in zip(state.values(), reg.state_dict().values(), strict=True))


def test_a_state_loaded_with_another_interval_keeps_its_pending_refresh() -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=100, lead=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    train(model, reg, optimizer, v, range(5))
    state = reg.state_dict()
    reg.close()
    other = S2D(model, interval=5, lead=4)
    other.load_state_dict(state)
    train(model, other, optimizer, v, range(5, 6))
    assert other.layers[0].k_target == 1
    other.close()


def test_a_pending_refresh_loaded_into_a_shorter_interval_is_caught_up() -> None:
    """Taken over at step 5, where the next refresh starts: the decay of steps 0 to 4 is not lost, nor counted twice."""
    model, v = spiked_model(bulk=1e-6)
    start = torch.linalg.svdvals(model[0].weight.detach())[0].item()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def build(interval: int, lead: int) -> S2D:
        return S2D(model, mode="decoupled", strength=1.0, interval=interval, lead=lead, select=[("2", False)])

    reg, other = build(100, 10), build(5, 4)
    train(model, reg, optimizer, v, range(5), task=0.0)
    other.load_state_dict(reg.state_dict())
    reg.close()
    for last in (6, 12, 60):  # after the take-over, after the arrival of the refresh begun then, and long after
        train(model, other, optimizer, v, range(other.step, last), task=0.0)
        end = torch.linalg.svdvals(model[0].weight.detach().double())[0].item()
        assert end == pytest.approx(1 / (1 / start + LR * last), rel=1e-3)
    other.close()


class Slow:
    """A refresh that goes on once `release` is set, then looks whether it is the first to see its factors change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.release, self.log, self.fails = threading.Event(), list[str](), fails
        self.look: Callable[[], bool] = lambda: True
        self._refresh = regularizer.compute_refresh
        monkeypatch.setattr(regularizer, "compute_refresh", self)

    def __call__(self, captured: Any, bases: Any, **options: Any) -> Any:
        before = [tensor.clone() for basis in bases.values() if basis is not None for tensor in basis]
        assert self.release.wait(60)
        after = [tensor for basis in bases.values() if basis is not None for tensor in basis]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        self.log.append("refreshed" if before and self.look() else "factors are gone")
        if self.fails:
            raise ArithmeticError("no luck")
        return self._refresh(captured, bases, **options)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("mode", "strength", "static"), [("coupled", 5e-4, False), ("coupled", 5e-4, True), ("decoupled", 1.0, False)]
)
def test_a_state_is_loaded_when_the_refresh_under_way_has_ended(
    mode: str, strength: float, static: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before: it reads the factors in use, and on a GPU their memory could become its own while a step needs it."""
    model, v = spiked_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    options = {"mode": mode, "strength": strength, "interval": 6, "lead": 3, "static_factors": static}
    reg = S2D(model, **options)
    fresh = reg.state_dict()
    train(model, reg, optimizer, v, range(6))
    with monkeypatch.context() as patch:
        slow = Slow(patch, fails=fails)
        layers = dict(reg._layers)
        slow.look = lambda: all(reg._layers[name] is layer for name, layer in layers.items())
        train(model, reg, optimizer, v, range(6, 7))
        assert not reg._pending.done()
        late = reg.late
        threading.Timer(0.1, slow.release.set).start()
        reg.load_state_dict(fresh)
        assert slow.log == ["refreshed"]
        assert reg.late == late  # nobody needed its result
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for loaded in (True, False):
        model.load_state_dict(weights)
        one = reg if loaded else S2D(model, **options)
        train(model, one, optimizer, v, range(8))
        results.append([parameter.clone() for parameter in model.parameters()])
        one.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("closed", [False, True])
def test_an_s2d_that_is_let_go_keeps_its_factors_while_a_refresh_runs(
    closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=6, lead=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    train(model, reg, optimizer, v, range(6))
    slow = Slow(monkeypatch)
    train(model, reg, optimizer, v, range(6, 7))
    factors = weakref.ref(reg._layers["0.weight"].basis.U)
    slow.look = lambda: factors() is not None
    worker = reg._side._executor
    timer = threading.Timer(0.1, slow.release.set)
    timer.start()
    if closed:
        reg.close()
        assert slow.log == ["refreshed"]
    del reg
    gc.collect()
    timer.join()
    worker.shutdown(wait=True)
    gc.collect()
    assert slow.log == ["refreshed"]
    assert factors() is None
