"""`SpectralAdamW(regularizer=reg)` in real trainers: they look after the state of `reg`, its step does the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import BATCH, FORMS, LR, STEPS, Data, Net, assert_same, hugging_face, lightning_fit, lightning_module

from s2d_kernels import S2D, SpectralAdamW, integrations


def build(mode: str, strength: float, net: nn.Module | None = None) -> tuple[nn.Module, S2D, SpectralAdamW]:
    net = Net() if net is None else net
    reg = S2D(net, mode=mode, strength=strength, interval=5, lead=2)
    return net, reg, SpectralAdamW(net.parameters(), LR, regularizer=reg)


def plain(mode: str, strength: float) -> nn.Module:
    net, reg, optimizer = build(mode, strength)
    for batch in DataLoader(Data(STEPS), batch_size=BATCH):
        optimizer.zero_grad()
        net(**batch)["loss"].backward()
        optimizer.step()
    assert [layer.k_target for layer in reg.layers] == [1, 0]
    return net


@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_hugging_face_resumes_with_the_same_bits(mode: str, strength: float, tmp_path: Path) -> None:
    net, reg, optimizer = build(mode, strength)
    hugging_face(tmp_path, net, reg, optimizer, save_strategy="steps", save_steps=6).train()
    assert reg.step == STEPS
    assert optimizer.regularizer is reg  # what was bound before the training stays bound
    assert_same(net, plain(mode, strength))
    resumed, other, its = build(mode, strength)
    hugging_face(tmp_path, resumed, other, its).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert other.step == STEPS
    assert_same(net, resumed)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and intervals
@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_lightning_resumes_with_the_same_bits(mode: str, strength: float, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(resume: Path | None, *callbacks: Any) -> nn.Module:
        net, reg, optimizer = build(mode, strength)
        module = lightning_module(lambda _: optimizer, net)
        both = [integrations.lightning_callback(reg), *callbacks]
        saving = {"enable_checkpointing": bool(callbacks), "weights_only": False}
        lightning_fit(tmp_path, module, both, batches=6, resume=resume, **saving)
        assert reg.step == STEPS
        assert optimizer.regularizer is reg
        return module

    through = fit(None, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1))
    assert_same(through, fit(tmp_path / "step=6.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_two_s2d_in_one_lightning_trainer(tmp_path: Path) -> None:
    """One for each optimizer, as the refusal of a shared one advises."""
    import lightning.pytorch as pl

    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = Net(), Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:
            for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(net(**batch)["loss"])
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(net.parameters(), lr=LR) for net in (self.first, self.second)]

    module = Two()
    regs = [S2D(module, select=[(other, False)], interval=5, lead=2) for other in ("second", "first")]
    callbacks = [integrations.lightning_callback(reg) for reg in regs]
    settings = {"max_steps": -1, "max_epochs": 1, "enable_checkpointing": True}
    trainer = lightning_fit(tmp_path, module, callbacks, batches=STEPS, **settings)
    assert [reg.step for reg in regs] == [STEPS, STEPS]
    stored = [
        state for key, state in trainer._checkpoint_connector.dump_checkpoint()["callbacks"].items() if "S2D" in key
    ]
    assert len(stored) == 2


@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_accelerate_saves_the_state(mode: str, strength: float, tmp_path: Path) -> None:
    from accelerate import Accelerator

    net, reg, optimizer = build(mode, strength)
    accelerator = Accelerator(cpu=True)
    model, wrapped, loader = accelerator.prepare(net, optimizer, DataLoader(Data(STEPS), batch_size=BATCH))
    integrations.attach_accelerate(reg, accelerator, wrapped)
    for batch in loader:
        wrapped.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        wrapped.step()
    assert reg.step == STEPS
    assert_same(net, plain(mode, strength))
    accelerator.save_state(str(tmp_path))
    expected = reg.state_dict()
    reg.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reg.state_dict().items())
