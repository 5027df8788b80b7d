"""What a captured CUDA graph may hold on to: memory that stays, and calls that are refused while one is captured."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from s2d_kernels import S2D, SpectralAdamW, ops
from s2d_kernels.layers import StaticFactors, empty_layer
from s2d_kernels.penalty import rows_of_a_block
from s2d_kernels.static_memory import Chosen


def model_of(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(count)))


def train(model: nn.Module, reg: S2D) -> None:
    model.zero_grad()
    model(torch.randn(8, 32)).square().mean().backward()
    reg.add_grad()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_all_that_add_grad_passes_on_stays_in_place(
    frozen: bool, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across refreshes, for all layers and where one has no gradient: tables of addresses made once stay true."""
    model = model_of()
    reg = S2D(model, interval=4, lead=1, static_factors=True, threshold=1e-3, rounding=rounding, impl="torch")
    model[1].requires_grad_(not frozen)
    seen = []
    original = ops.implementation("add_penalty_grad_", "torch")

    def recorded(grads: Any, Us: Any, Vhs: Any, coefficients: Any, ranks: Any, **options: Any) -> None:
        tensors = [*Us, *Vhs, *coefficients, ranks] + ([options["seeds"]] if rounding == "stochastic" else [])
        seen.append(tuple((t.data_ptr(), t.stride()) for t in tensors))
        original(grads, Us, Vhs, coefficients, ranks, **options)

    monkeypatch.setitem(ops._TABLE["add_penalty_grad_"], "torch", recorded)
    for _ in range(14):
        train(model, reg)
    assert len(seen) == 14
    assert len(seen[0]) == (2 if frozen else 3) * 3 + 1 + (rounding == "stochastic")
    assert len(set(seen)) == 1
    assert all(layer.k_target for layer in reg.layers)
    reg.close()


def test_chosen_elements_follow_the_tensor_and_keep_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(4, dtype=torch.int32)
    chosen = Chosen(values)
    assert chosen.at(range(4)) is values
    first = chosen.at([1, 3])
    values += 10
    assert chosen.at((1, 3)) is first
    assert first.tolist() == [11, 13]
    assert chosen.at([0]).tolist() == [10]
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    kept = chosen.at([0])  # a graph reads this one from now on
    assert chosen.at([1, 2]).tolist() == [11, 12]  # not known before: made in the graph
    monkeypatch.undo()
    other = chosen.at([2, 3])
    values += 10
    assert kept.data_ptr() not in {chosen.at([2, 3]).data_ptr(), other.data_ptr()}
    assert any(kept is tensor for tensor in chosen._captured)


def test_a_capture_with_another_strength_leaves_the_kept_coefficients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be those of whichever graph was replayed last."""
    layers = [empty_layer((4, 4), torch.zeros(()), k_max=2) for _ in range(2)]
    static = StaticFactors(layers, torch.device("cpu"))
    for layer in layers:
        layer.basis.S.fill_(2.0)
    with monkeypatch.context() as patch:  # nothing has been computed before a replay
        patch.setattr(ops, "capturing", lambda device: True)
        (early, _) = static.options([0, 1], 1.0, 2.0)["coefficients"]
    early.zero_()
    (first, _) = static.options([0, 1], 1.0, 2.0)["coefficients"]
    assert first.tolist() == [4.0, 4.0]
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    assert static.options([0, 1], 1.0, 2.0)["coefficients"][0] is first
    (other,) = static.options([1], 3.0, 2.0)["coefficients"]
    assert other.tolist() == [12.0, 12.0]
    monkeypatch.undo()
    assert static.options([0], 1.0, 2.0)["coefficients"][0] is first
    assert first.tolist() == [4.0, 4.0]
    for layer in layers:
        layer.basis.S.fill_(3.0)
    static.follow(layers)
    assert first.tolist() == [9.0, 9.0]
    assert static.options([0], 2.0, 2.0)["coefficients"][0].tolist() == [18.0, 18.0]
    assert first.tolist() == [9.0, 9.0]  # the graph's, whatever eager calls ask for


def test_the_decoupled_form_is_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would decay by factors that have been freed, and count no step."""
    model = model_of(1)
    before = model[0].weight.detach().clone()
    for snapshot, attached in itertools.product((True, False), (True, False)):
        reg = S2D(model, mode="decoupled", strength=1.0, snapshot=snapshot, interval=2, lead=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if attached:
            reg.attach(optimizer)
        elif not snapshot:
            continue
        model(torch.randn(8, 32)).sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(ops, "capturing", lambda device: True)
            with pytest.raises(ValueError, match="schedule of S2D runs on the host"):
                optimizer.step() if attached else reg.decay_(0.1)
        assert reg.step == 0
        assert torch.equal(model[0].weight, before)
        reg.close()


def test_the_clipping_coefficient_keeps_its_memory() -> None:
    model = model_of(1)
    optimizer = SpectralAdamW(model.parameters())
    found = []
    for scale in (1.0, 100.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        coefficient = optimizer._clip_coef([], False, 1.0, False, None)
        found.append((coefficient.data_ptr(), float(coefficient)))
    (one, small), (other, large) = found
    assert one == other
    assert small == pytest.approx(100 * large)


def test_blocks_of_a_gpu_are_larger() -> None:
    assert rows_of_a_block(torch.empty(4096, 4096, device="meta")) == 1024
    assert rows_of_a_block(torch.empty(4096, 4096)) == 16
