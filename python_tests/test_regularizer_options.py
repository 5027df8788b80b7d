"""Options of S2D together: weights read in place, static factors, captures in a graph, models that move."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training import LR, MODES, batch, same_bits, spiked_model, train

from s2d_kernels import S2D, SpectralAdamW, refresh, regularizer
from s2d_kernels.svd import topk_svd


@pytest.mark.parametrize(("mode", "strength"), MODES)
def test_reading_the_weights_in_place_gives_the_bits_of_the_copies(
    mode: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read is slow, and whoever changed the weights before its end would change the result."""
    slow: Callable = topk_svd
    monkeypatch.setattr(refresh, "topk_svd", lambda *a, **k: (time.sleep(0.05), slow(*a, **k))[1])
    results = []
    for snapshot in (True, False):
        model, v = spiked_model()
        reg = S2D(model, mode=mode, strength=strength, interval=6, lead=3, snapshot=snapshot)
        assert reg.snapshot_bytes == (2 * 32 * 64 * 4 if snapshot else 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
        reg.attach(optimizer)
        for step in range(20):
            x = batch(v, step)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        assert reg.layers[0].k_target == 1
        results.append((model, reg.late))
        reg.close()
    assert same_bits(results[0][0], results[1][0])
    assert results[1][1] == 4  # each refresh is waited for, at its start


def test_reading_in_place_wants_a_hook_before_the_step() -> None:
    model, _ = spiked_model()
    with pytest.raises(ValueError, match=r"snapshot=False.*use attach"):
        S2D(model, mode="decoupled", strength=1.0, snapshot=False).decay_(LR)


def test_a_graph_captured_once_sees_factors_and_ranks_swapped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph replays is the same kernels on the same memory: here the recorded arguments of the one call."""
    plain, v = spiked_model()
    reg = S2D(plain, interval=10, lead=3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    train(plain, reg, optimizer, v, range(40))
    reg.close()

    model, _ = spiked_model()
    reg = S2D(model, interval=10, lead=3, static_factors=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    add: Callable = regularizer.add_penalty_grad_
    recorded: list[tuple] = []
    monkeypatch.setattr(regularizer, "add_penalty_grad_", lambda *a, **k: (recorded.append((a, k)), add(*a, **k)))
    replayed = 0
    for step in range(40):
        x = batch(v, step)
        optimizer.zero_grad(set_to_none=False)  # a graph's gradients keep their memory
        (model(x) - x).square().mean().backward()
        if reg.refresh_due:
            with pytest.raises(ValueError, match=f"step {step} is a refresh step"):
                reg.advance()
            reg.add_grad()
        else:
            reg.advance()
            arguments, options = recorded[0]
            add(*arguments, **options)
            replayed += 1
        optimizer.step()
    assert (replayed, reg.step) == (36, 40)
    assert len(recorded) == 4
    assert same_bits(plain, model)
    state = reg.state_dict()
    train(model, reg, optimizer, v, range(40, 45))
    factors = recorded[0][0][1][0]
    reg.load_state_dict(state)  # in place as well
    assert torch.equal(factors.U, state["0.weight.basis.U"][:, :3])
    reg.close()


def test_what_is_replayed_before_a_refresh_step_is_not_looked_at() -> None:
    """The operation acts in replays too: an earlier step's larger activation must not become the refresh's."""
    model, v = spiked_model()
    reg = S2D(model, interval=4, lead=1, static_factors=True, capture="graph")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    largest = []
    for step in range(10):
        x = batch(v, step)
        if reg.refresh_due:
            largest.append(float((x @ model[0].weight.detach().T).abs().max()))
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            reg.add_grad()
        else:
            reg.advance()
            model(100 * x)  # as a replay does: the captured operations, nothing else
    assert len(largest) == 3
    found = {layer.name: layer.activation for layer in reg.layers}["0.weight"]
    assert found == pytest.approx(largest[-1], rel=1e-5)  # fp32 sums of 32 products
    reg.close()


def test_a_refresh_step_that_was_not_asked_about_waits(caplog: pytest.LogCaptureFixture) -> None:
    """Its forward could not be looked at; the next one is."""
    model, v = spiked_model()
    reg = S2D(model, interval=4, lead=1, static_factors=True, capture="graph")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(number: int) -> None:
        x = batch(v, number)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        reg.add_grad()

    step(0)
    for _ in range(3):
        reg.advance()
    step(4)
    assert reg.step == 4
    assert "S2D step 4 waits: ask refresh_due before a refresh step's forward" in caplog.text
    assert reg.refresh_due
    step(5)
    assert reg.step == 5
    largest = float((batch(v, 5) @ model[0].weight.detach().T).abs().max())
    reg.advance()
    assert {layer.name: layer.activation for layer in reg.layers}["0.weight"] == pytest.approx(largest, rel=1e-5)
    for _ in range(2):
        reg.advance()
    reg.close()
    assert not reg.refresh_due  # closing ends what `advance` left for later


def test_static_factors_belong_to_the_coupled_form() -> None:
    model, _ = spiked_model()
    with pytest.raises(ValueError, match="static_factors=True belongs to mode='coupled'"):
        S2D(model, mode="decoupled", strength=1.0, static_factors=True)
    with pytest.raises(ValueError, match=r"advance belongs to S2D\(static_factors=True\)"):
        S2D(model).advance()


@pytest.mark.parametrize(("mode", "strength"), [("coupled", 5e-4), ("decoupled", 1e-4)])
@pytest.mark.parametrize("moved_at", [0, 4, 5, 8])
def test_a_model_that_changes_its_dtype_or_device_later(
    mode: str, strength: float, moved_at: int, device: torch.device
) -> None:
    """Trainers move the model after S2D was built; on a CPU the dtype stands for it. At 5 a refresh is under way."""
    model, v = spiked_model()
    reg = S2D(model, mode=mode, strength=strength, interval=4, lead=2)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(moved_at))
    model.to(device).double()
    v = v.to(device).double()
    for step in range(moved_at, 20):
        x = batch(v.cpu(), step).to(device)
        model.zero_grad()
        (model(x) - x).square().mean().backward()
        reg.add_grad() if mode == "coupled" else reg.decay_(LR)
    assert reg.step == 20
    assert reg.layers[0].k_target == 1
    sigma = torch.linalg.svdvals(model[0].weight.detach())[0].item()
    assert reg.layers[0].sigma_max == pytest.approx(sigma, rel=1e-3)
    assert all(t.dtype == torch.float64 for key, t in reg.state_dict().items() if key.endswith(".U"))
    assert reg.penalty.device.type == device.type
    reg.close()


def test_a_moved_model_takes_prepared_coefficients_along() -> None:
    """After the move the factors in use are the same, and their sum is formed in the new dtype, on the new device."""
    model, v = spiked_model()
    reg = S2D(model, interval=50, lead=1)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(4))
    model.double()
    model.zero_grad()
    model(batch(v, 4).double()).sum().backward()
    plain = model[0].weight.grad.clone()
    reg.add_grad()
    state = reg.state_dict()
    U, S = (state[f"0.weight.{key}"][..., :1] for key in ("basis.U", "S"))
    expected = 5e-4 * (U * S.square()) @ state["0.weight.basis.Vh"][:1]
    torch.testing.assert_close(model[0].weight.grad - plain, expected, rtol=1e-12, atol=1e-12)
    reg.close()


@pytest.mark.parametrize("static", [False, True])
def test_factors_stay_in_fp32_where_the_model_goes_to_less(static: bool) -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=4, lead=2, static_factors=static)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(5))
    model.bfloat16()
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v.bfloat16(), range(5, 14))
    assert {t.dtype for key, t in reg.state_dict().items() if "basis" in key or "pending." in key} == {torch.float32}
    reg.close()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("capture", ["hooks", "graph"])
def test_static_factors_and_captures_change_no_bit_when_the_model_moves(static: bool, capture: str) -> None:
    results = []
    for options in ({}, {"static_factors": static, "capture": capture}):
        model, v = spiked_model()
        reg = S2D(model, interval=4, lead=2, **options)
        train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(5))
        model.double()
        train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v.double(), range(5, 14))
        results.append((model, reg.layers))
        reg.close()
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1][0].k_target == 1


def test_a_capture_in_a_graph_copies_the_weights_before_they_move() -> None:
    """The decoupled form's copies are those of the previous step's end: the model changes its dtype after it."""
    model, v = spiked_model()
    reg = S2D(model, mode="decoupled", strength=1e-4, interval=4, lead=2, capture="graph")
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(4))
    model.double()
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v.double(), range(4, 11))
    assert reg.layers[0].k_target == 1
    assert reg.layers[0].status == "converged"
    reg.close()


def test_a_capture_in_a_graph_does_not_follow_to_another_device() -> None:
    layer = nn.Linear(16, 16)
    reg = S2D(layer, capture="graph")
    layer.to("meta")
    with pytest.raises(ValueError, match=r"'weight' runs on meta, .* made on cpu.*move the model first"):
        layer(torch.ones(2, 16, device="meta"))
    reg.close()


def test_a_capture_in_a_graph_is_inert_in_copies_and_pickles_of_the_model() -> None:
    model, v = spiked_model()
    reg = S2D(model, capture="graph")
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for duplicate in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        duplicate(batch(v, 0))
        assert [hook._targets for hook in duplicate[0]._forward_hooks.values()] == [[]]
    assert all(captured.value == -1 for captured in reg._capture.stop().values())
    reg.close()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_pending_refresh_is_caught_up_once_however_the_weights_are_read(snapshot: bool, fused: bool) -> None:
    """Taken over at step 5, where the next refresh starts, from the weights themselves or from copies of them."""
    model, v = spiked_model(bulk=1e-6)
    start = torch.linalg.svdvals(model[0].weight.detach())[0].item()

    def steps(interval: int, lead: int, last: tuple[int, ...], state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        options = {"interval": interval, "lead": lead, "snapshot": snapshot, "select": [("2", False)]}
        reg = S2D(model, mode="decoupled", strength=1.0, **options)
        if state is not None:
            reg.load_state_dict(state)
        if fused:
            optimizer = SpectralAdamW(model.parameters(), LR, weight_decay=0.0, regularizer=reg)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            reg.attach(optimizer)
        for stop in last:
            while reg.step < stop:
                optimizer.zero_grad()
                (0 * model(batch(v, reg.step))).sum().backward()
                optimizer.step()
            if state is not None:
                end = torch.linalg.svdvals(model[0].weight.detach().double())[0].item()
                assert end == pytest.approx(1 / (1 / start + LR * stop), rel=1e-3), stop
        state = reg.state_dict()
        reg.close()
        return state

    state = steps(100, 10, (5,), None)
    assert state["pending_step"] == 0
    steps(5, 4, (6, 12, 40), state)
