"""S2D(rounding="stochastic"): decays below the resolution of bf16 weights and gradients act as they should."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import LR, MODES, batch, same_bits, spiked_model, train

from s2d_kernels import S2D, SpectralAdamW, regularizer

BF16 = torch.bfloat16


def sigma_of(model: nn.Sequential) -> float:
    return float(torch.linalg.svdvals(model[0].weight.detach().double())[0])


def test_a_decay_below_the_resolution_of_bf16_follows_its_law(caplog: pytest.LogCaptureFixture) -> None:
    """5e-4 of the weights a step, where half a unit in their last place is 2^-10 at least; no other gradient acts."""
    strength, lr, steps = 2.5e-3, 1e-2, 400
    found = {}
    for rounding in ("nearest", "stochastic"):
        model, v = spiked_model(dtype=BF16)
        start = sigma_of(model)
        caplog.clear()
        assert strength * lr * start < 2**-10
        reg = S2D(model, mode="decoupled", strength=strength, interval=50, lead=2, rounding=rounding)
        train(model, reg, torch.optim.SGD(model.parameters(), lr=lr), v, range(steps), task=0.0, lr=lr)
        assert reg.layers[0].k_target == 1
        reg.close()
        found[rounding] = sigma_of(model)
        assert ("rounds most of a small decay away" in caplog.text) == (rounding == "nearest")
    expected = 1 / (1 / start + strength * lr * steps)
    assert expected < 0.85 * start
    assert abs(found["nearest"] / start - 1) < 1e-4
    # An element of size a that chance rounds down by d in all has the variance (unit of a) d, the unit being at most
    # 2^-7 a. So u^T W v has sum_ij u_i^2 v_j^2 2^-7 a_ij d_ij, a = s |u v|, d = (s_0 - s) |u v|; sum u^4 is 1/2.
    deviation = math.sqrt(2**-7 * start * (start - expected) * 0.5 * float(v.float().pow(4).sum()))
    assert deviation < 0.01 * start
    assert abs(found["stochastic"] - expected) < 4 * deviation, (found, expected)


def test_a_penalty_below_the_resolution_of_bf16_gradients_is_there_in_the_mean() -> None:
    """Added to gradients of 1 six hundred times, along u v^T: strength s^2 of the first component."""
    sums = {}
    for rounding in ("nearest", "stochastic"):
        model, v = spiked_model(dtype=BF16)
        reg = S2D(model, strength=5e-6, interval=700, lead=0, rounding=rounding)
        weight, total, steps = model[0].weight, torch.zeros(64, 32), 600
        for step in range(steps):
            if step == 0:
                (model(batch(v, step)) ** 2).sum().backward()
            weight.grad = torch.ones_like(weight)
            reg.add_grad()
            total += weight.grad.float() - 1
        factors = reg._layers["0.weight"].factors(1)
        assert reg.layers[0].k_target == 1
        sums[rounding] = float(factors.U[:, 0] @ (total / steps) @ factors.Vh[0])
        truth = 5e-6 * float(factors.S[0]) ** 2
        # f units (2^-7 above 1, 2^-8 below) of an element have the variance f (1 - f) < f
        weights = torch.outer(factors.U[:, 0].square(), factors.Vh[0].square())
        penalty = truth * torch.outer(factors.U[:, 0], factors.Vh[0]).abs()
        deviation = float((weights * penalty * 2**-7).sum() / steps) ** 0.5
        reg.close()
    assert sums["nearest"] == 0
    assert abs(sums["stochastic"] - truth) < 5 * deviation < 0.2 * truth


@pytest.mark.parametrize(("mode", "strength"), MODES)
@pytest.mark.parametrize("stopped", [3, 7, 12, 13, 20])
def test_resuming_draws_the_same_numbers(mode: str, strength: float, stopped: int) -> None:
    """Also within a refresh, and within the steps before the first; another seed draws others."""

    def start(seed: int = 0) -> tuple[nn.Sequential, S2D, torch.optim.Optimizer, Tensor]:
        model, v = spiked_model(dtype=BF16)
        options: dict[str, Any] = {"mode": mode, "strength": strength, "interval": 6, "lead": 3, "seed": seed}
        reg = S2D(model, rounding="stochastic", **options)
        return model, reg, torch.optim.SGD(model.parameters(), lr=LR), v

    whole, reg, optimizer, v = start()
    train(whole, reg, optimizer, v, range(24))
    reg.close()
    first, reg, optimizer, v = start()
    train(first, reg, optimizer, v, range(stopped))
    states = first.state_dict(), reg.state_dict()
    reg.close()
    second, reg, optimizer, v = start()
    second.load_state_dict(states[0])
    reg.load_state_dict(states[1])
    train(second, reg, optimizer, v, range(stopped, 24))
    reg.close()
    assert same_bits(whole, second)
    other, reg, optimizer, v = start(seed=1)
    train(other, reg, optimizer, v, range(24))
    reg.close()
    assert not same_bits(whole, other)


def test_every_step_and_every_matrix_has_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    add: Callable = regularizer.add_penalty_grad_
    seeds: list[int] = []

    def recording(*arguments: Any, **options: Any) -> None:
        seeds.extend(options["seed"].tolist())
        add(*arguments, **options)

    monkeypatch.setattr(regularizer, "add_penalty_grad_", recording)
    model, v = spiked_model(dtype=BF16)
    reg = S2D(model, mode="decoupled", strength=1.0, interval=6, lead=0, threshold=0.01, rounding="stochastic")
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(20))
    reg.close()
    assert len(seeds) >= 39
    assert len(set(seeds)) == len(seeds)


def test_a_captured_graph_draws_others_at_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph replays is the same kernels on the same memory: here the recorded arguments of the one call."""
    plain, v = spiked_model(dtype=BF16)
    reg = S2D(plain, interval=10, lead=3, rounding="stochastic")
    train(plain, reg, torch.optim.SGD(plain.parameters(), lr=LR), v, range(30))
    reg.close()

    model, _ = spiked_model(dtype=BF16)
    reg = S2D(model, interval=10, lead=3, static_factors=True, rounding="stochastic")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    add: Callable = regularizer.add_penalty_grad_
    recorded: list[tuple] = []
    monkeypatch.setattr(regularizer, "add_penalty_grad_", lambda *a, **k: (recorded.append((a, k)), add(*a, **k)))
    for step in range(30):
        x = batch(v, step)
        optimizer.zero_grad(set_to_none=False)
        (model(x) - x).square().mean().backward()
        if reg.refresh_due:
            reg.add_grad()
        else:
            reg.advance()
            arguments, options = recorded[0]
            add(*arguments, **options)
        optimizer.step()
    assert same_bits(plain, model)
    reg.close()


def test_what_is_caught_up_in_weights_and_copies_is_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of another interval, whose refresh arrives at the step of the next."""
    model, v = spiked_model(dtype=BF16)
    options: dict[str, Any] = {"mode": "decoupled", "strength": 0.5, "asynchronous": False, "rounding": "stochastic"}
    reg = S2D(model, interval=9, lead=8, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    train(model, reg, optimizer, v, range(15), task=0.0)
    state = reg.state_dict()
    reg.close()
    reg = S2D(model, interval=5, lead=4, **options)
    reg.load_state_dict(state)
    compared: list[bool] = []
    refreshed = regularizer.compute_refresh
    before = model[0].weight.detach().clone()

    def compute(captured: Any, *arguments: Any, **keywords: Any) -> Any:
        weight = model[0].weight.detach()
        compared.append(torch.equal(captured["0.weight"].weight, weight) and not torch.equal(weight, before))
        return refreshed(captured, *arguments, **keywords)

    add: Callable = regularizer.add_penalty_grad_
    seeds: list[list[int]] = []
    monkeypatch.setattr(regularizer, "compute_refresh", compute)
    monkeypatch.setattr(
        regularizer, "add_penalty_grad_", lambda *a, **k: (seeds.append(k["seed"].tolist()), add(*a, **k))
    )
    assert state["pending_step"] == 9
    train(model, reg, optimizer, v, range(15, 16), task=0.0)
    reg.close()
    assert compared == [True]
    weights, copies, decay = seeds
    assert weights == copies
    assert decay != weights  # of the same step: numbers used twice on one element would be no chance


def test_what_is_not_rounded_so_is_refused() -> None:
    model, _ = spiked_model()
    with pytest.raises(ValueError, match="rounding='up' is neither 'nearest' nor 'stochastic'"):
        S2D(model, rounding="up")
    reg = S2D(model, rounding="stochastic")
    with pytest.raises(ValueError, match=r"SpectralAdamW rounds to the nearest.*attach\(optimizer\)"):
        SpectralAdamW(model.parameters(), regularizer=reg)
    reg.attach(torch.optim.AdamW(model.parameters()))
    reg.close()
    half, v = spiked_model(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has dtype torch\.float16: stochastic rounding is for"):
        S2D(half, rounding="stochastic")
    reg = S2D(model, mode="decoupled", strength=1.0, rounding="stochastic")
    (model(batch(v.float(), 0)) ** 2).sum().backward()
    model.half()
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has dtype torch\.float16"):
        reg.decay_(LR)
    reg.close()
