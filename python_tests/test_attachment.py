"""S2D inside an optimizer's step: hooks, parameter groups, skipped steps."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from torch import nn
from training import LR, MODES, batch, same_bits, spiked_model, train

from s2d_kernels import S2D, SpectralAdamW, reference


@pytest.mark.parametrize(("mode", "strength"), MODES)
def test_attach_equals_the_explicit_calls(mode: str, strength: float) -> None:
    results = []
    for attach in (False, True):
        model, v = spiked_model()
        reg = S2D(model, mode=mode, strength=strength, interval=10, lead=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        if attach:
            reg.attach(optimizer)
            for step in range(20):
                x = batch(v, step)
                optimizer.zero_grad()
                (model(x) - x).square().mean().backward()
                optimizer.step()
            reg.detach()
            optimizer.step()
        else:
            train(model, reg, optimizer, v, range(20))
            optimizer.step()
        assert reg.step == 20
        results.append(model)
        reg.close()
    assert same_bits(*results)


def test_attach_uses_each_groups_learning_rate() -> None:
    model, v = spiked_model()
    reg = S2D(model, mode="decoupled", strength=1.0, interval=10, lead=0, threshold=1e-6)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}], lr=LR
    )
    reg.attach(optimizer)
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    (0 * model(batch(v, 0))).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    expected = reference.decoupled_update(before[1].double(), lr=LR, rank=1, strength=1.0, power=2.0)
    torch.testing.assert_close(model[2].weight.detach(), expected.float(), atol=1e-6, rtol=1e-5)


def test_attach_refuses_what_it_cannot_do(caplog: pytest.LogCaptureFixture) -> None:
    model, v = spiked_model()
    reg = S2D(model)
    with pytest.raises(ValueError, match="holds none of the 2 penalized matrices"):
        reg.attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    reg.attach(optimizer)

    def closure() -> float:
        return 0.0

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(ValueError, match="closure"):
            step()
    model(batch(v, 0)).sum().backward()
    optimizer.grad_scale = torch.ones(1)
    with pytest.raises(ValueError, match="GradScaler"):
        optimizer.step()
    caplog.clear()
    S2D(model).attach(torch.optim.AdamW(model.parameters()))
    assert caplog.text.count("mode='decoupled' acts on the weights") == 1


def test_momentum_counts_in_the_overshoot_check() -> None:
    for momentum, refused in ((0.0, False), (0.9, True)):
        model, v = spiked_model()
        reg = S2D(model, interval=100, lead=0, strength=0.125)  # interval * lr * strength * 20 = 0.25
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
        reg.attach(optimizer)
        for _ in range(2):  # refused again, not once
            optimizer.zero_grad()
            model(batch(v, 0)).square().mean().backward()
            if refused:
                with pytest.raises(ValueError, match=r"= 2\.5\d* on '0.weight'"):
                    optimizer.step()
            else:
                optimizer.step()


def test_attached_means_attached_once_and_closed_means_closed() -> None:
    model, v = spiked_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    reg = S2D(model, mode="decoupled", strength=1.0, interval=10, lead=0)
    reg.attach(optimizer)
    with pytest.raises(ValueError, match="attached to an optimizer"):
        reg.attach(optimizer)
    with pytest.raises(ValueError, match=r"decay_: attached.*detach\(\) first"):
        reg.decay_(LR)
    reg.close()
    before = model[0].weight.detach().clone()
    model(batch(v, 0)).sum().backward()
    model[0].weight.grad.zero_()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="decay_: this S2D is closed"):
        reg.decay_(LR)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_decays_nothing(fused: bool) -> None:
    model, v = spiked_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    reg = S2D(model, mode="decoupled", strength=1.0, interval=10, lead=0)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = model[0].weight.detach().clone()
    for poison in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(batch(v, 0)).square().mean()).backward()
        if poison:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == poison
        assert reg.step == (0 if poison else 1)
    reg.close()


def test_frozen_and_unused_parameters_stay_as_they_are() -> None:
    model, v = spiked_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    reg = S2D(model, mode="decoupled", strength=1.0, interval=10, lead=0)
    reg.attach(optimizer)
    model(batch(v, 0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    for step in range(5):
        model(batch(v, step)).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    reg.close()


def test_a_step_that_the_scaler_skips_is_not_counted_by_the_coupled_form() -> None:
    """A fused optimizer is called, and skips the step itself; the gradients are unscaled, and so S2D may act."""
    model, v = spiked_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    reg = S2D(model, interval=10, lead=0)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for poison in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(batch(v, 0)).square().mean()).backward()
        if poison:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert reg.step == (0 if poison else 1)
        assert bool(reg.layers) == (not poison)
    reg.close()


@pytest.mark.parametrize("fused", ["torch", "spectral"])
def test_a_skipped_step_starts_no_refresh_from_the_weights_in_place(fused: str) -> None:
    results = []
    for snapshot in (True, False):
        model, v = spiked_model()
        reg = S2D(model, mode="decoupled", strength=1.0, interval=4, lead=2, snapshot=snapshot)
        if fused == "spectral":
            optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), LR, regularizer=reg)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
            reg.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu")
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(model(batch(v, step)).square().mean()).backward()
            if step == 0:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            assert (reg._pending is None) or step > 0
        assert reg.step == 7
        assert reg.layers[0].k_target == 1
        results.append(model)
        reg.close()
    assert same_bits(*results)


def test_a_closure_and_weights_read_in_place_are_refused_together() -> None:
    model, v = spiked_model()
    reg = S2D(model, mode="decoupled", strength=1.0, snapshot=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    reg.attach(optimizer)
    with pytest.raises(ValueError, match=r"snapshot=False cannot be attached"):
        optimizer.step(lambda: model(batch(v, 0)).sum())
    reg.close()


@pytest.mark.parametrize(("mode", "strength"), MODES)
def test_the_fused_optimizer_takes_every_way_to_read_the_weights(mode: str, strength: float) -> None:
    choices = [{}, {"snapshot": False}, {"capture": "graph"}, {"asynchronous": False, "snapshot": False}]
    if mode == "coupled":
        choices += [{"static_factors": True}, {"static_factors": True, "snapshot": False}]
    results = []
    for options in choices:
        model, v = spiked_model()
        reg = S2D(model, mode=mode, strength=strength, interval=6, lead=3, **options)
        optimizer = SpectralAdamW(model.parameters(), LR, regularizer=reg)
        for step in range(16):
            x = batch(v, step)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        assert reg.layers[0].k_target == 1
        results.append(model)
        reg.close()
    assert [same_bits(results[0], other) for other in results] == [True] * len(choices)


@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_parameter_with_a_gradient_left_is_not_decayed(fused: bool) -> None:
    model, v = spiked_model()
    reg = S2D(model, mode="decoupled", strength=1.0, interval=10, lead=0)
    if fused:
        optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), LR, weight_decay=0.0, regularizer=reg)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        reg.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        (0 * model(batch(v, step))).sum().backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert torch.equal(model[0].weight, before) == (step > 0)
        model[0].weight.requires_grad_(False)
    reg.close()


def optimizer_of(reg: S2D, model: nn.Module, how: str) -> torch.optim.Optimizer:
    """One with which `reg` acts."""
    if how == "fused":
        return SpectralAdamW(model.parameters(), LR, regularizer=reg)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if how == "attached":
        reg.attach(optimizer)
    return optimizer


def step_of(reg: S2D, model: nn.Module, optimizer: torch.optim.Optimizer, how: str) -> None:
    model(torch.randn(4, 32)).square().mean().backward()
    if how == "explicit":
        reg.add_grad()
    optimizer.step()


BOTH_APPLY = (
    r"another one \(mode='coupled', strength=0.0005, step 1\) is attached and penalizes 2 of the same matrices "
    r"\(first: 0\.weight\): both apply\. detach\(\)"
)


@pytest.mark.parametrize("how", ["attached", "fused", "explicit"])
@pytest.mark.parametrize("other", ["attached", "fused"])
def test_two_that_act_on_the_same_parameters_are_warned_of(
    other: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = spiked_model()
    first, second = S2D(model), S2D(model, strength=1e-3)
    before = optimizer_of(first, model, other)
    step_of(first, model, before, other)
    assert "both apply" not in caplog.text
    optimizer = optimizer_of(second, model, how)
    for _ in range(2):
        step_of(second, model, optimizer, how)
        step_of(first, model, before, other)
    assert len(re.findall(BOTH_APPLY, caplog.text)) == caplog.text.count("both apply") == 1
    first.close()
    second.close()


@pytest.mark.parametrize("how", ["attached", "fused", "explicit"])
def test_two_that_act_in_turn_or_on_different_parameters_are_not(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = spiked_model()
    one, other, third = (S2D(model, select=[(skipped, False)]) for skipped in "200")
    kept = []
    for reg, way in ((one, "attached"), (other, how), (third, how)):
        kept.append(optimizer_of(reg, model, way))
        step_of(reg, model, kept[-1], way)
        if reg is other:
            other.detach()
    assert "both apply" not in caplog.text
    for reg in (one, other, third):
        reg.close()


@pytest.mark.parametrize("how", ["attached", "fused"])
def test_one_that_nobody_uses_any_more_is_not_warned_of(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The cell of a notebook, run twice."""
    model, _ = spiked_model()
    gc.disable()
    try:
        for _ in range(2):
            reg = S2D(model, asynchronous=False)  # a refresh under way would hold the one before
            optimizer = optimizer_of(reg, model, how)
            step_of(reg, model, optimizer, how)
    finally:
        gc.enable()
    assert "both apply" not in caplog.text
    reg.close()
