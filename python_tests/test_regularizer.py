"""S2D in real training loops: schedule, laws of decay, failures, misuse."""

from __future__ import annotations

import copy
import gc
import io
import logging
import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training import LR, MODES, batch, same_bits, spiked_model, train

from s2d_kernels import S2D, reference, refresh
from s2d_kernels.svd import topk_svd

EPS = torch.finfo(torch.float32).eps

# --- the law of decay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "strength", "lr", "interval", "lead"),
    [
        ("coupled", 0.01, 1e-2, 20, 3),  # interval * lr * strength * s_1 = 0.04
        ("coupled", 0.1, 1e-3, 20, 0),
        ("decoupled", 0.01, 1e-2, 20, 3),
        ("decoupled", 1.0, 1e-2, 20, 3),
        ("decoupled", 5.0, 1e-1, 100, 3),
        ("decoupled", 50.0, 1e-1, 30, 10),
    ],
)
def test_without_a_task_gradient_the_top_singular_value_follows_its_law(
    mode: str, strength: float, lr: float, interval: int, lead: int
) -> None:
    """1/s_T = 1/s_0 + strength * sum(lr), within 3 %.

    The coupled form acts from its first arrival at step `lead` on; the decoupled one makes up for the steps before.
    The rest of the spectrum is tiny, so that the decaying value stays the top one.
    """
    model, v = spiked_model(bulk=1e-6)
    steps = 200
    reg = S2D(model, mode=mode, strength=strength, interval=interval, lead=lead, select=[("2", False)])
    start = torch.linalg.svdvals(model[0].weight.detach())[0].item()
    train(model, reg, torch.optim.SGD(model.parameters(), lr=lr), v, range(steps), task=0.0, lr=lr)
    end = torch.linalg.svdvals(model[0].weight.detach().double())[0].item()
    effective = steps - lead if mode == "coupled" else steps
    predicted = 1 / (1 / start + strength * lr * effective)
    assert end == pytest.approx(predicted, rel=0.03)
    assert predicted < 0.999 * start
    reg.close()


def test_decoupled_equals_its_definition_applied_every_step() -> None:
    model, v = spiked_model(dtype=torch.float64)
    reg = S2D(model, mode="decoupled", strength=1.0, interval=10, lead=0, threshold=1e-6, select=[("2", False)])
    expected = model[0].weight.detach().clone()
    for step in range(30):
        train(model, reg, torch.optim.SGD(model.parameters(), lr=0.0), v, range(step, step + 1))
        expected = reference.decoupled_update(expected, lr=LR, rank=1, strength=1.0, power=2.0)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-6, atol=1e-9)
    reg.close()


def test_coupled_adds_exactly_the_reference_gradient_of_the_snapshot() -> None:
    model, v = spiked_model(dtype=torch.float64)
    reg = S2D(model, interval=50, lead=3, strength=1e-3)
    snapshot = model[0].weight.detach().clone()
    for step in range(6):
        x = batch(v, step)
        model.zero_grad()
        (model(x) - x).square().mean().backward()
        plain = [p.grad.clone() for p in model.parameters()]
        reg.add_grad()
        expected = reference.penalty_gradient(snapshot, rank=1, strength=1e-3, power=2.0) if step >= 3 else 0
        difference = model[0].weight.grad - plain[0]
        torch.testing.assert_close(difference, torch.zeros_like(difference) + expected, rtol=1e-12, atol=1e-14)
        assert all(torch.equal(p.grad, g) for p, g in zip(list(model.parameters())[1:], plain[1:], strict=True))
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
    assert [layer.k_target for layer in reg.layers] == [1, 0]
    reg.close()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_penalty_is_the_reference_of_the_decided_components(mode: str) -> None:
    model, v = spiked_model()
    reg = S2D(model, mode=mode, strength=1e-3, interval=50, lead=0)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=0.0), v, range(1), lr=0.0)
    sigma = torch.linalg.svdvals(model[0].weight.detach().double())[0]
    assert isinstance(reg.penalty, Tensor)
    assert reg.penalty.item() == pytest.approx((1e-3 / 3 * sigma**3).item(), rel=1e-4)
    reg.close()


# --- schedule ---------------------------------------------------------------------------------------------------


def test_hooks_are_installed_on_refresh_steps_only() -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=10, lead=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(25):
        assert bool(model[0]._forward_hooks) == (step % 10 == 0)
        train(model, reg, optimizer, v, range(step, step + 1))
    reg.close()


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("mode", "strength"), [("coupled", 5e-4), ("decoupled", 0.01)])
def test_an_exception_in_the_worker_surfaces_and_training_can_go_on(
    mode: str, strength: float, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, v = spiked_model()
    reg = S2D(model, mode=mode, strength=strength, interval=10, lead=3, asynchronous=asynchronous)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    train(model, reg, optimizer, v, range(5))
    assert reg.layers[0].k_target == 1

    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("did not converge")

    train(model, reg, optimizer, v, range(5, 10))
    with monkeypatch.context() as patch:
        patch.setattr(refresh, "topk_svd", fail)
        train(model, reg, optimizer, v, range(10, 11))
        while not reg._pending.done():
            time.sleep(0.001)
    with pytest.raises(RuntimeError, match=r"refresh of step 10 failed: did not converge"):
        train(model, reg, optimizer, v, range(11, 12))
    train(model, reg, optimizer, v, range(11, 30))
    assert reg.layers[0].k_target == 1
    reg.close()


def test_a_non_finite_layer_is_skipped_reported_and_leaves_the_others_untouched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    results = []
    for poison in (False, True):
        model, v = spiked_model()
        lost = nn.Linear(32, 32)
        both = nn.ModuleDict({"good": model, "lost": lost})
        if poison:
            with torch.no_grad():
                lost.weight[3, 3] = float("nan")
        reg = S2D(both, interval=10, lead=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for step in range(8):
            x = batch(v, step)
            lost(x)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            reg.add_grad()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
        results.append(model)
        if poison:
            report = {layer.name: layer for layer in reg.layers}["lost.weight"]
            assert (report.k_target, report.route, report.status) == (0, "non-finite", "non-finite")
            assert "lost.weight holds NaN or Inf" in caplog.text
            assert caplog.text.count("holds NaN") == 1
        reg.close()
    assert same_bits(*results)


def test_a_model_with_nothing_to_select_warns_and_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4))
    reg = S2D(model)
    assert "nothing to penalize" in caplog.text
    model[0](torch.randn(2, 4)).sum().backward()
    reg.add_grad()
    assert reg.step == 1
    assert reg.penalty == 0
    assert reg.layers == []


def test_one_row_layers_by_explicit_selection() -> None:
    """k is clamped to min(m, n); PCDR_1 of a 1 x n layer is 1, so asking for it means decaying it."""
    layer = nn.Linear(12, 1)
    assert S2D(layer).decisions[0].reason.startswith("only 1 singular value")
    reg = S2D(layer, select=[("weight", True)], lead=0, strength=0.1)
    layer(torch.randn(5, 12)).sum().backward()
    plain = layer.weight.grad.clone()
    reg.add_grad()
    expected = reference.penalty_gradient(layer.weight.detach(), rank=1, strength=0.1, power=2.0)
    # the difference of two fp32 numbers of the size of `plain`
    torch.testing.assert_close(layer.weight.grad - plain, expected, atol=EPS * float(plain.abs().max()), rtol=0)


def test_tied_fused_and_convolutional_parameters_train() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 2, stride=2)
            self.qkv = nn.Linear(16, 48)
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.patch(x).flatten(2).mT).chunk(3, -1)
            return self.b(self.a(nn.functional.scaled_dot_product_attention(q, k, v)))

    model = Model()
    with torch.no_grad():
        model.qkv.weight[20] *= 100  # row 4 of k
        model.patch.weight[3] *= 100
    reg = S2D(model, lead=0, strength=1e-3)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    reg.add_grad()
    targets = {layer.name: layer.k_target for layer in reg.layers}
    assert set(targets) == {"patch.weight", "qkv.weight[0:16]", "qkv.weight[16:32]", "qkv.weight[32:48]", "a.weight"}
    assert targets["patch.weight"] == targets["qkv.weight[16:32]"] == 1
    for name, parameter in model.named_parameters():
        difference = parameter.grad - plain[name]
        expected = torch.zeros_like(parameter).flatten(1) if parameter.ndim > 1 else torch.zeros_like(parameter)
        for matrix in reg._matrices:
            if matrix.parameter is parameter:
                expected[matrix.start : matrix.stop] = reference.penalty_gradient(
                    matrix.rows(parameter.detach()), rank=targets[matrix.name], strength=1e-3, power=2.0
                )
        # triplets of 16 x 16 matrices are exact up to the roundings of their products
        limit = 16 * EPS * max(float(expected.abs().max()), float(plain[name].abs().max()))
        torch.testing.assert_close(difference, expected.view_as(difference), atol=limit, rtol=0)


def test_gradient_scale() -> None:
    gradients = []
    for scale in (1.0, 1024.0):
        model, v = spiked_model()
        reg = S2D(model, lead=0)
        (scale * model(batch(v, 0)).square().mean()).backward()
        reg.add_grad(grad_scale=scale)
        gradients.append(model[0].weight.grad / scale)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_overshooting_settings_are_warned_about_and_refused(caplog: pytest.LogCaptureFixture) -> None:
    for strength, fails in ((0.1 * 0.99 / 20, False), (0.5 / 20, False), (1.1 / 20, True)):
        model, v = spiked_model()
        sigma = torch.linalg.svdvals(model[0].weight.detach())[0].item()
        reg = S2D(model, interval=100, lead=0, strength=strength * 20 / sigma)
        caplog.clear()
        if fails:
            with pytest.raises(ValueError, match=r"on '0.weight'.*mode='decoupled'"):
                train(model, reg, torch.optim.SGD(model.parameters(), lr=0.01), v, range(1))
        else:
            train(model, reg, torch.optim.SGD(model.parameters(), lr=0.01), v, range(1))
            assert ("overshoot" in caplog.text) == (strength > 0.3 / 20)


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "mode='both'"),
        ({"mode": "decoupled"}, "needs strength="),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"power": 0.5}, "power=0.5"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"k_max": 0}, "k_max=0"),
        ({"interval": 0}, "interval=0"),
        ({"lead": 100}, "lead=100"),
        ({"lead": -1}, "lead=-1"),
        ({"select": [("nowhere", True)]}, "nowhere"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S2D(nn.Linear(8, 8), **arguments)


def test_calls_of_the_other_mode_and_out_of_place() -> None:
    model, _ = spiked_model()
    coupled, decoupled = S2D(model), S2D(model, mode="decoupled", strength=1.0)
    with pytest.raises(TypeError, match="nn.Module"):
        S2D([model])
    with pytest.raises(ValueError, match="call add_grad"):
        coupled.decay_(0.1)
    with pytest.raises(ValueError, match="call decay_"):
        decoupled.add_grad()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        coupled.add_grad()
    with pytest.raises(ValueError, match="lr of '0.weight'=nan"):
        decoupled.decay_(float("nan"))
    assert coupled.step == decoupled.step == 0


def test_a_refresh_step_without_forward_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    model, v = spiked_model()
    reg = S2D(model, interval=5, lead=1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reg.add_grad()
    reg.add_grad()
    assert caplog.text.count("no penalized layer has run forward") == 1
    assert reg.step == 0
    assert reg.layers == []
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(1, 8))
    assert reg.layers[0].k_target == 1
    reg.close()


def test_a_layer_that_did_not_converge_starts_cold_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[bool]] = []
    original: Callable = topk_svd

    def recorded(weights: list[Tensor], **kwargs: object) -> list:
        calls.append([w is None for w in kwargs["warm"]])
        factors = original(weights, **kwargs)
        if len(calls) == 2:
            factors[0] = factors[0]._replace(status=torch.tensor(1, dtype=torch.int32))
        return factors

    monkeypatch.setattr(refresh, "topk_svd", recorded)
    model, v = spiked_model()
    reg = S2D(model, interval=5, lead=1)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(20))
    reg.close()
    assert calls == [[True, True], [False, False], [True, False], [False, False]]


def test_decisions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="s2d_kernels"):
        model, v = spiked_model()
        reg = S2D(model, interval=10, lead=1)
        train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(2))
        reg.close()
    assert "S2D penalize: 0.weight [64, 32]: linear layer" in caplog.text
    assert "S2D skip: 0.bias" in caplog.text
    assert "refresh of step 0: 1 of 2 matrices decayed: 0.weight (1)" in caplog.text


# --- loops, lifetimes and misuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "strength"), MODES)
@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_models_are_captured_at_every_refresh(mode: str, strength: float, compile_first: bool) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, v = spiked_model()
        trained = torch.compile(model, backend="aot_eager") if compiled else model
        if compiled and compile_first:
            trained(batch(v, 0)).sum().backward()
            model.zero_grad()
        reg = S2D(trained, mode=mode, strength=strength, interval=6, lead=2)
        assert [m.name for m in reg._matrices] == ["0.weight", "2.weight"]
        train(trained, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(20))
        results.append((model, [(layer.k_target, layer.activation) for layer in reg.layers]))
        reg.close()
        # the switch is back: compiled code runs again
        frames = torch._dynamo.utils.counters["frames"]["total"]
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert torch._dynamo.utils.counters["frames"]["total"] == frames + 1
    (eager, eager_layers), (other, other_layers) = results
    for a, b in zip(eager.parameters(), other.parameters(), strict=True):
        # 20 steps of products that a compiler may sum in another order
        torch.testing.assert_close(a, b, rtol=0, atol=20 * EPS * float(a.detach().abs().max()))
    assert [k for k, _ in eager_layers] == [k for k, _ in other_layers]
    assert [a for _, a in eager_layers] == pytest.approx([a for _, a in other_layers], rel=1e-4)


def _construct(rank: int, port: int, queue: object) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        S2D(nn.Linear(16, 16))
        queue.put("constructed")
    except NotImplementedError as error:
        queue.put(str(error))
    torch.distributed.destroy_process_group()


def test_several_processes_are_refused() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_construct, args=(port, queue), nprocs=2)
    assert all("S2D on 2 processes is not supported" in queue.get() for _ in range(2))


@pytest.mark.parametrize(("mode", "strength"), MODES)
def test_autocast_around_the_step_changes_no_bit(mode: str, strength: float) -> None:
    results = []
    for autocast, asynchronous in ((False, True), (True, True), (True, False)):
        model, v = spiked_model()
        reg = S2D(model, mode=mode, strength=strength, interval=6, lead=2, asynchronous=asynchronous)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for step in range(15):
            x = batch(v, step)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                if mode == "coupled":
                    reg.add_grad()
            optimizer.step()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                if mode == "decoupled":
                    reg.decay_(LR)
        results.append(model)
        reg.close()
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_channels_last_patch_embeddings() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 16, 4, stride=4)
        with torch.no_grad():
            convolution.weight[3] *= 100
        convolution = convolution.to(memory_format=memory_format)
        images = torch.randn(2, 3, 8, 8).to(memory_format=memory_format)
        for mode, strength in MODES:
            reg = S2D(convolution, mode=mode, strength=strength, lead=0)
            convolution(images).square().mean().backward()
            reg.add_grad() if mode == "coupled" else reg.decay_(LR)
            assert reg.layers[0].k_target == 1
        results.append((convolution.weight.detach().clone(), convolution.weight.grad.clone()))
    for plain, last in zip(*results, strict=True):
        # Another convolution may sum the 8 products of an element in another order.
        torch.testing.assert_close(plain, last, rtol=0, atol=8 * EPS * float(plain.abs().max()))


def test_a_dropped_s2d_and_copies_of_the_model_leave_no_live_hook() -> None:
    model, v = spiked_model()
    reg = S2D(model)
    duplicate = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    assert stored.tell() < 2.2 * sum(p.nbytes for p in model.parameters())
    duplicate(batch(v, 0))
    assert reg._capture._kept == {}  # the copy's forward was not seen
    model(batch(v, 0))
    assert set(reg._capture._kept) == {"0.weight", "2.weight"}
    del reg
    gc.collect()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k_max": 2.5}, TypeError, "k_max=2.5"),
        ({"interval": 10.5}, TypeError, "interval=10.5"),
        ({"strength": "1"}, TypeError, "strength='1'"),
        ({"select": "weight"}, TypeError, "select must hold"),
        ({"select": [("(", True)]}, ValueError, "no regular expression"),
    ],
)
def test_arguments_of_another_type(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        S2D(nn.Linear(8, 8), **arguments)


def test_layers_without_shape_or_elements() -> None:
    with pytest.raises(ValueError, match="lazy module"):
        S2D(nn.LazyLinear(4))
    empty = S2D(nn.Sequential(nn.Linear(4, 0), nn.Linear(16, 16)))
    assert [d.reason for d in empty.decisions if d.name == "0.weight"] == ["empty"]
    with pytest.raises(ValueError, match=r"no learning rate for \['1.weight'\]"):
        S2D(nn.Sequential(nn.Linear(4, 0), nn.Linear(16, 16)), mode="decoupled", strength=1.0).decay_({})
    with pytest.raises(TypeError, match="state 'step' is a int"):
        empty.load_state_dict({"step": 3})


def test_low_precision_weights_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    S2D(nn.Linear(16, 16).bfloat16(), mode="decoupled", strength=1.0)
    assert "rounds most of a small decay away" in caplog.text
