"""Runs of real trainers that an exception ends, and what is begun after them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from trainers import (
    BATCH,
    FORMS,
    LR,
    STEPS,
    Data,
    Net,
    assert_same,
    build,
    hugging_face,
    lightning_fit,
    lightning_module,
    optimizer_of,
)

from s2d_kernels import S2D, SpectralAdamW, integrations

AGAIN = 4  # steps of the second run, after which the refresh of the step that was aborted is the last to have arrived
MEMORY = "CUDA out of memory."  # by which Accelerate knows such an error


class FailsOnce:
    """Forward hook that raises after the call of this number, with activations that are larger than all others."""

    def __init__(self, call: int, message: str = "aborted") -> None:
        self.left, self.message = call, message

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.left -= 1
        if self.left == 0:
            module.body(torch.full((1, 16), 100.0))
            raise RuntimeError(self.message)


def loop(net: Net, reg: S2D, optimizer: torch.optim.Optimizer, *, steps: int, batch: int = BATCH) -> None:
    """Steps of a plain loop from the first batch on."""
    batches = iter(DataLoader(Data(STEPS), batch_size=batch))
    for _ in range(steps):
        optimizer.zero_grad()
        net(**next(batches))["loss"].backward()
        if reg.mode == "coupled":
            reg.add_grad()
        optimizer.step()
        if reg.mode == "decoupled":
            reg.decay_(LR)


def aborted(folder: Path, net: Net, reg: S2D, call: int, **options: Any) -> Any:
    """A Hugging Face Trainer whose run an exception has ended in the forward of this number."""
    trainer = hugging_face(folder, net, reg, **options)
    net.register_forward_hook(FailsOnce(call))
    with pytest.raises(RuntimeError, match="aborted"):
        trainer.train()
    return trainer


def assert_same_runs(net: Net, reg: S2D, other: Net, other_reg: S2D) -> None:
    assert_same(net, other)
    assert reg.step == other_reg.step
    assert reg.layers == other_reg.layers  # the captured activations among them
    states = zip(reg.state_dict().values(), other_reg.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert [layer.k_target for layer in reg.layers] == [1, 0]
    assert not reg._handles
    reg.close()
    other_reg.close()


@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_hugging_face_trains_again_after_an_exception(mode: str, strength: float, tmp_path: Path) -> None:
    """In the refresh step 5, of whose forward nothing may be left."""
    net, reg = build(mode, strength)
    trainer = aborted(tmp_path, net, reg, 6)
    assert reg.step == 5
    trainer.args.max_steps = AGAIN
    trainer.train()
    other, other_reg = build(mode, strength)
    optimizer = optimizer_of(other, mode)
    loop(other, other_reg, optimizer, steps=5)
    loop(other, other_reg, optimizer, steps=AGAIN)
    assert_same_runs(net, reg, other, other_reg)


@pytest.mark.parametrize("failing", [1, 3])
@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_hugging_face_finds_its_batch_size(mode: str, strength: float, failing: int, tmp_path: Path) -> None:
    """After an error in the first step S2D is as new; after one in the third it begins anew with the Trainer's steps,
    on the weights of the second."""
    net, reg = build(mode, strength)
    fresh = reg.state_dict()
    net.register_forward_hook(FailsOnce(failing, MEMORY))
    trainer = hugging_face(tmp_path, net, reg, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.train_batch_size == 3 < BATCH
    assert reg.step == trainer.state.global_step == STEPS
    other, other_reg = build(mode, strength)
    optimizer = optimizer_of(other, mode)
    loop(other, other_reg, optimizer, steps=failing - 1)
    other_reg.load_state_dict(fresh)
    loop(other, other_reg, optimizer, steps=STEPS, batch=3)
    assert_same_runs(net, reg, other, other_reg)


def test_hugging_face_keeps_the_state_of_a_run_that_no_search_repeats(tmp_path: Path) -> None:
    """The error that ends it is another one: `train` again is the user's wish, and goes on."""
    net, reg = build("decoupled", 1.0)
    trainer = aborted(tmp_path, net, reg, 8, auto_find_batch_size=True)
    trainer.train()
    assert reg.step == 7 + STEPS
    reg.close()


def test_hooks_of_the_user_stay(tmp_path: Path) -> None:
    """Who attaches S2D between two runs is told so: the callback removes its own hooks only."""
    net, reg = build("decoupled", 1.0)
    trainer = aborted(tmp_path, net, reg, 1)
    reg.detach()
    reg.attach(optimizer_of(net, "decoupled"))
    with pytest.raises(ValueError, match="attached to an optimizer"):
        trainer.train()
    assert reg._handles
    reg.close()


def test_hugging_face_trains_a_fused_optimizer_again(tmp_path: Path) -> None:
    """SpectralAdamW keeps S2D for itself, whatever ends."""
    net, reg = build("decoupled", 1.0)
    trainer = hugging_face(tmp_path, net, reg)
    trainer.optimizer = SpectralAdamW(net.parameters(), LR, regularizer=reg)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
    net.register_forward_hook(FailsOnce(6))
    with pytest.raises(RuntimeError, match="aborted"):
        trainer.train()
    trainer.train()
    assert reg.step == 5 + STEPS
    reg.close()


@pytest.mark.parametrize("named", [True, False])
def test_hugging_face_checkpoints_of_a_hyperparameter_search(
    named: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer itself decides on the folder, here of a stand-in for optuna's trial; without a name only it knows the
    number of the trial."""
    from transformers.trainer_utils import HPSearchBackend

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    net, reg = build("decoupled", 1.0)
    trainer = hugging_face(tmp_path, net, reg, save_strategy="steps", save_steps=6)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    trainer.hp_name = (lambda trial: f"trial-{trial.number}") if named else None
    trainer.train(trial=SimpleNamespace(number=7, params={}))
    folder = tmp_path / ("trial-7" if named else "run-7") / "checkpoint-6"
    assert (folder / "trainer_state.json").is_file()
    assert (folder / "s2d.pt").is_file() == named
    assert ("give hyperparameter_search(hp_name=)" in caplog.text) != named
    if named:
        assert int(torch.load(folder / "s2d.pt", weights_only=True)["step"]) == 6
    reg.close()


# --- Lightning ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and intervals
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_lightning_fits_again_after_an_exception(mode: str, strength: float, told: bool, tmp_path: Path) -> None:
    """Also where the callback is not told of it, as by Lightning's search for a batch size."""
    module = lightning_module(lambda net: optimizer_of(net, mode))
    reg = S2D(module.net, mode=mode, strength=strength, interval=5, lead=2)
    callback = integrations.lightning_callback(reg)
    if not told:
        callback.on_exception = lambda *arguments: None

    module.net.register_forward_hook(FailsOnce(6))
    with pytest.raises(RuntimeError, match="aborted"):
        lightning_fit(tmp_path, module, [callback], batches=STEPS)
    assert bool(reg._handles) == (mode == "decoupled" and not told)
    lightning_fit(tmp_path, module, [callback], batches=STEPS, max_steps=AGAIN)
    other, other_reg = build(mode, strength)
    loop(other, other_reg, optimizer_of(other, mode), steps=5)
    loop(other, other_reg, optimizer_of(other, mode), steps=AGAIN)
    assert_same_runs(module.net, reg, other, other_reg)
