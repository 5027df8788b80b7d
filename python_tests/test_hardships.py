"""What real loops do around `S2D`: hooks of others, other stances of the compiler, weights replaced, layers not run."""

from __future__ import annotations

import gc
import logging
import sys

import pytest
import torch
from torch import nn
from training import LR, batch, spiked_model

from s2d_kernels import S2D, SpectralAdamW, ops


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - x).square().mean().backward()
    optimizer.step()


def test_the_coupled_form_refuses_to_maximize() -> None:
    model, _ = spiked_model()
    optimizer = torch.optim.SGD(model.parameters(), LR, maximize=True)
    with pytest.raises(ValueError, match="maximize=True.*would inflate"):
        S2D(model).attach(optimizer)
    S2D(model, mode="decoupled", strength=1.0).attach(optimizer)


def test_another_hook_may_drop_the_gradients_first() -> None:
    model, v = spiked_model(bulk=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    optimizer.register_step_post_hook(lambda inner, *_: inner.zero_grad())
    reg = S2D(model, mode="decoupled", strength=1.0, interval=4, lead=1)
    reg.attach(optimizer)
    before = torch.linalg.svdvals(model[0].weight.detach())[0]
    for number in range(10):
        (0 * model(batch(v, number))).sum().backward()
        optimizer.step()
    assert reg.step == 10
    assert torch.linalg.svdvals(model[0].weight.detach())[0] < 0.9 * before


def test_a_step_after_which_a_refresh_fails_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights were changed before the failure shows: the same decay as where the previous factors stay in use."""
    results = []
    for fails in (False, True):
        torch.manual_seed(0)
        model, v = spiked_model(bulk=1e-6)
        optimizer = torch.optim.SGD(model.parameters(), LR)
        reg = S2D(model, mode="decoupled", strength=1.0, interval=5, lead=1)
        reg.attach(optimizer)
        errors = 0
        for number in range(10):
            if number == 5 and fails:
                monkeypatch.setitem(ops._TABLE["topk_svd"], "cpu", lambda *_, **__: 1 / 0)
                monkeypatch.setitem(ops._TABLE["topk_svd"], "torch", lambda *_, **__: 1 / 0)
            try:
                optimizer.zero_grad()
                (0 * model(batch(v, number))).sum().backward()
                optimizer.step()
            except RuntimeError as error:
                assert "the refresh of step 5 failed" in str(error)  # noqa: PT017
                errors += 1
        assert errors == fails
        assert reg.step == 10
        results.append(torch.linalg.svdvals(model[0].weight.detach().double())[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


def test_a_frozen_parameter_with_an_old_gradient_is_left_alone() -> None:
    for fused in (False, True):
        model, v = spiked_model()
        reg = S2D(model, interval=50, lead=0)
        kind = SpectralAdamW if fused else torch.optim.SGD
        optimizer = kind(model.parameters(), LR, **({"weight_decay": 0.0, "regularizer": reg} if fused else {}))
        if not fused:
            reg.attach(optimizer)
        step(model, optimizer, batch(v, 0))
        assert reg.layers[0].k_target
        model[0].weight.requires_grad_(False)
        model[0].weight.grad.zero_()
        if fused:
            optimizer.state[model[0].weight]["exp_avg"].zero_()
        frozen = model[0].weight.detach().clone()
        optimizer.step()
        assert torch.equal(model[0].weight, frozen)


def test_learning_rates_of_unknown_matrices_are_refused() -> None:
    model, v = spiked_model()
    reg = S2D(model)
    (model(batch(v, 0))).sum().backward()
    with pytest.raises(ValueError, match="lr names \\['nope'\\]"):
        reg.add_grad(lr={"nope": 1.0})


@pytest.mark.parametrize("form", ["coupled", "attached", "fused"])
@pytest.mark.parametrize("capture", ["hooks", "graph"])
def test_weights_loaded_after_a_forward_are_the_ones_that_count(
    form: str, capture: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sanity check of the data, then the checkpoint: the snapshot of the first weights must not stay."""
    model, v = spiked_model()
    mode = "coupled" if form == "coupled" else "decoupled"
    reg = S2D(model, mode=mode, strength=1.0 if mode == "decoupled" else None, capture=capture, interval=50, lead=0)
    if form == "fused":
        optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), LR, regularizer=reg)
    else:
        optimizer = torch.optim.SGD(model.parameters(), LR)
        reg.attach(optimizer)
    model(batch(v, 0)).sum().backward()
    with torch.no_grad():
        model.load_state_dict({name: 3 * tensor for name, tensor in model.state_dict().items()})
    expected = float(torch.linalg.svdvals(model[0].weight.detach())[0])
    with caplog.at_level(logging.WARNING):
        step(model, optimizer, batch(v, 0))
    assert reg.layers[0].sigma_max == pytest.approx(expected, rel=1e-4)
    assert ("changed between its forward" in caplog.text) == (capture == "hooks")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (spiked_model()[0][0] for _ in range(2))
        self.run_b = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + (self.b(x) if self.run_b else 0)


@pytest.mark.parametrize("capture", ["hooks", "graph"])
def test_a_layer_that_did_not_run_keeps_its_factors(capture: str, caplog: pytest.LogCaptureFixture) -> None:
    model, (_, v) = Branching(), spiked_model()
    reg = S2D(model, capture=capture, interval=2, lead=0)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    reg.attach(optimizer)
    for number in range(4):
        model.run_b = number < 2
        optimizer.zero_grad()
        model(batch(v, number)).square().mean().backward()
        optimizer.step()
    assert [layer.k_target for layer in reg.layers] == [1, 1]
    assert "NaN or Inf" not in caplog.text


def test_nothing_captured_in_a_graph_leaves_the_factors_in_use(caplog: pytest.LogCaptureFixture) -> None:
    model, v = spiked_model()
    reg = S2D(model, capture="graph", interval=2, lead=0)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    reg.attach(optimizer)
    step(model, optimizer, batch(v, 0))
    before = [layer.k_target for layer in reg.layers]
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert [layer.k_target for layer in reg.layers] == before
    assert any(before)
    assert "nothing was captured" in caplog.text


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (spiked_model()[0][0] for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(100 * x)


@pytest.mark.parametrize("capture", ["hooks", "graph"])
def test_every_module_that_applies_a_matrix_is_seen(capture: str) -> None:
    model, (_, v) = Twins(), spiked_model()
    reg = S2D(model, capture=capture, interval=50, lead=0)
    x = batch(v, 0)
    model(x).square().mean().backward()
    reg.add_grad()
    largest = float((100 * x @ model.first.weight.detach().T).abs().max())
    assert [m.name for m in reg.matrices] == ["first.weight"]
    assert reg.layers[0].activation == pytest.approx(largest, rel=1e-4)


def test_splits_of_a_packed_attention_projection() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.attention(q, k, v)[0]

    model = Attention()
    with pytest.raises(ValueError, match="mixes queries, keys and values, whose rows begin at 0, 32 and 64"):
        S2D(model, splits={"in_proj": [32, 48, 16]})
    reg = S2D(model, splits={"in_proj": [16] * 6}, interval=50, lead=0)
    q, k, v = torch.randn(3, 5, 2, 32)
    model(q, k, v).sum().backward()
    reg.add_grad()
    weight = model.attention.in_proj_weight.detach()
    for position, (layer, x) in enumerate(zip(reg.layers, (q, q, k, k, v, v), strict=True)):
        largest = (x.reshape(-1, 32) @ weight[16 * position : 16 * (position + 1)].T).abs().max()
        assert layer.activation == pytest.approx(float(largest), rel=1e-4)


# --- the compiler's stance ----------------------------------------------------------------------------------------


def stance() -> str:
    return str(sys.modules["torch._dynamo"].eval_frame._stance.stance)


def test_the_users_stance_is_kept_whoever_ends_first() -> None:
    import torch._dynamo

    gc.collect()  # captures of other tests that have not ended
    model, v = spiked_model()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    assert stance() == "default"
    reg = S2D(model, interval=50)
    reg.attach(optimizer)
    assert stance() == "force_eager"
    with torch.compiler.set_stance("eager_on_recompile"):  # begins inside ours, ends after it
        step(model, optimizer, batch(v, 0))
        assert stance() == "eager_on_recompile"
    assert stance() == "default"
    reg.close()

    with torch.compiler.set_stance("eager_on_recompile"):  # begins before ours
        reg = S2D(model, interval=50)
        assert stance() == "force_eager"
        reg.close()
        assert stance() == "eager_on_recompile"
        reg = S2D(model, interval=50)
    assert stance() == "default"  # the user's end takes ours away: what is captured is what runs eagerly anyway
    reg.close()
    assert stance() == "default"
