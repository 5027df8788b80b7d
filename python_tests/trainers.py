"""A small model and its data, the plain loop that trainers are compared with, and real trainers set up on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from s2d_kernels import S2D, integrations

LR, BATCH, STEPS = 1e-2, 4, 12
FORMS = [("coupled", 1e-3), ("decoupled", 1.0)]


class Net(nn.Module):
    """Two linear layers, the first with an inflated direction of the inputs; returns the loss as Hugging Face does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            self.body[0].weight[0] += 5

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.body(x) - x).square().mean()}


class Data(Dataset):
    def __init__(self, batches: int) -> None:
        self.rows = torch.randn(batches * BATCH, 16, generator=torch.Generator().manual_seed(2)) + 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.rows[index]}


def build(mode: str, strength: float) -> tuple[Net, S2D]:
    net = Net()
    return net, S2D(net, mode=mode, strength=strength, interval=5, lead=2)


def optimizer_of(net: nn.Module, mode: str, **options: Any) -> torch.optim.Optimizer:
    if mode == "coupled":
        return torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5, **options)
    return torch.optim.AdamW(net.parameters(), lr=LR, **options)


def plain(mode: str, strength: float, *, accumulate: int = 1, clip: float = 0.0, clip_first: bool = False) -> Net:
    """The loop that the trainers are compared with: no hooks, one call a step, each at its place."""
    net, reg = build(mode, strength)
    optimizer = optimizer_of(net, mode)
    batches = iter(DataLoader(Data(STEPS * accumulate), batch_size=BATCH))
    for _ in range(STEPS):
        for _ in range(accumulate):
            (net(**next(batches))["loss"] / accumulate).backward()
        if clip and clip_first:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if mode == "coupled":
            reg.add_grad()
        if clip and not clip_first:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if mode == "decoupled":
            reg.decay_(LR)
        optimizer.zero_grad()
    assert [layer.k_target for layer in reg.layers] == [1, 0]
    reg.close()
    return net


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} differs by {(p - q).abs().max():.3g}"


def hugging_face(
    folder: Path, net: nn.Module, reg: S2D, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> Any:
    """Hugging Face's Trainer with the callback, silent, on the CPU, its batches in order."""
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {"max_grad_norm": 0.0, "save_strategy": "no", "gradient_accumulation_steps": 1}
    settings |= options
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    optimizer = optimizer_of(net, reg.mode) if optimizer is None else optimizer
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        net,
        arguments,
        train_dataset=Data(STEPS * settings["gradient_accumulation_steps"]),
        optimizers=(optimizer, constant),
        callbacks=[integrations.trainer_callback(reg)],
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.model_accepts_loss_kwargs = False
    return trainer


def lightning_module(configure: Callable[[nn.Module], torch.optim.Optimizer], net: nn.Module | None = None) -> Any:
    """A LightningModule of `net`, or of a new `Net`, trained by the optimizer that `configure` makes for the module."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net() if net is None else net

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return configure(self)

    return Module()


def lightning_fit(
    folder: Path,
    module: Any,
    callbacks: Sequence[Any],
    *,
    batches: int,
    resume: Path | None = None,
    weights_only: bool | None = None,
    **options: Any,
) -> Any:
    """Lightning's Trainer after its run, silent, on the CPU; it saves nothing unless `options` say so."""
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **({"enable_checkpointing": False, "max_steps": STEPS} | options),
    )
    trainer.fit(module, DataLoader(Data(batches), batch_size=BATCH), ckpt_path=resume, weights_only=weights_only)
    return trainer
