"""What S2D refuses in real trainers and optimizers, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import BATCH, FORMS, LR, Data, Net, assert_same, build, lightning_fit, lightning_module, plain

from s2d_kernels import S2D, integrations

Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def fit(folder: Path, mode: str, optimizer: Optimizer, *, steps: int = 3, **options: object) -> tuple[Net, S2D]:
    """Lightning's Trainer with the callback."""
    module = lightning_module(lambda net: optimizer(net.parameters()))
    reg = S2D(module, mode=mode, strength=1e-3, interval=5, lead=2)
    callback = integrations.lightning_callback(reg)
    lightning_fit(folder, module, [callback], batches=steps, max_steps=steps, **options)
    return module.net, reg


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_lightning_refuses_the_coupled_form_where_gradients_are_evaluated_several_times(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates the gradient several times a step"):
        fit(tmp_path, "coupled", lambda p: torch.optim.LBFGS(p, lr=LR))
    _, reg = fit(tmp_path, "decoupled", lambda p: torch.optim.LBFGS(p, lr=LR))
    assert reg.step == 3
    reg.close()


@pytest.mark.filterwarnings("ignore")
def test_lightning_refuses_gradients_that_a_fused_optimizer_takes_scaled(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def precision() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))

    with pytest.raises(ValueError, match="takes gradients still scaled: give it fused=False"):
        fit(tmp_path, "coupled", lambda p: torch.optim.AdamW(p, fused=True), plugins=[precision()])
    for mode, fused in (("coupled", False), ("decoupled", True), ("decoupled", False)):
        _, reg = fit(tmp_path, mode, lambda p, fused=fused: torch.optim.AdamW(p, fused=fused), plugins=[precision()])
        assert reg.step == 3
        reg.close()


@pytest.mark.filterwarnings("ignore")
def test_lightning_refuses_an_optimizer_of_other_parameters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds none of the 2 penalized matrices"):
        fit(tmp_path, "decoupled", lambda _: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR))


def test_accelerate_refuses_a_closure() -> None:
    from accelerate import Accelerator

    net, reg = build("coupled", 1e-3)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=LR))
    integrations.attach_accelerate(reg, accelerator, optimizer)
    before = copy.deepcopy(net)

    def closure() -> Tensor:
        loss = model(torch.randn(2, 16))["loss"]
        accelerator.backward(loss)
        return loss

    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\) computes the gradients after the hook"):
        optimizer.step(closure)
    assert_same(net, before)
    assert reg.step == 0
    accelerator.free_memory()
    reg.close()


def test_accelerate_refuses_an_optimizer_of_other_parameters() -> None:
    from accelerate import Accelerator

    _, reg = build("coupled", 1e-3)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(Net().parameters(), lr=LR))
    with pytest.raises(ValueError, match="holds none of the 2 penalized matrices"):
        integrations.attach_accelerate(reg, accelerator, optimizer)
    assert reg not in accelerator._custom_objects
    accelerator.free_memory()


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_refused_where_the_optimizer_takes_them(fused: bool) -> None:
    """A fused optimizer unscales inside its step, after the hook; another one's gradients arrive unscaled."""
    net, reg = build("coupled", 1e-3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=fused)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    before = copy.deepcopy(net)
    scaler.scale(net(torch.randn(2, 16))["loss"]).backward()
    if fused:
        with pytest.raises(ValueError, match="gradients still scaled by the GradScaler"):
            scaler.step(optimizer)
        assert_same(net, before)
    else:
        scaler.step(optimizer)
    assert reg.step == (not fused)
    reg.close()


def test_lbfgs() -> None:
    """Refused when attached to the coupled form; the decoupled form acts once a step, however often it evaluates."""
    net, reg = build("coupled", 1e-3)
    with pytest.raises(ValueError, match="LBFGS evaluates the gradient several times a step"):
        reg.attach(torch.optim.LBFGS(net.parameters()))
    net, reg = build("decoupled", 1.0)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=LR, max_iter=4)
    reg.attach(optimizer)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = net(torch.randn(4, 16, generator=torch.Generator().manual_seed(3)))["loss"]
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert reg.step == 3
    assert evaluations > 6
    reg.close()


@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_a_closure_that_is_evaluated_once_may_hold_add_grad(mode: str, strength: float) -> None:
    net, reg = build(mode, strength)
    options = {"momentum": 0.5} if mode == "coupled" else {}
    optimizer = (torch.optim.SGD if mode == "coupled" else torch.optim.AdamW)(net.parameters(), lr=LR, **options)
    for batch in DataLoader(Data(12), batch_size=BATCH):

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = net(**batch)["loss"]
            loss.backward()
            if mode == "coupled":
                reg.add_grad()
            return loss

        optimizer.step(closure)
        if mode == "decoupled":
            reg.decay_(LR)
    assert_same(net, plain(mode, strength))
    reg.close()


def test_data_parallel_is_refused_where_it_makes_replicas() -> None:
    """With one device it only calls the module; what it makes for several shares the hooks."""
    net = Net()
    parallel = nn.DataParallel(net)
    reg = S2D(parallel)
    parallel(torch.randn(2, 16))["loss"].backward()
    reg.add_grad()
    assert reg.step == 1
    reg.close()
    parallel.device_ids = [0, 1]  # a machine of two GPUs fills them in
    with pytest.raises(NotImplementedError, match=r"nn\.DataParallel is not supported"):
        S2D(parallel)
    reg = S2D(net)
    replica = net.body[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = net.body[0].weight.clone(), net.body[0].bias.clone()  # as its Broadcast does
    with pytest.raises(NotImplementedError, match="a replica of a Linear ran"):
        replica(torch.randn(2, 16))
    reg.close()
