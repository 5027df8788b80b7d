"""`S2D` in other people's trainers: one call each, and the framework is imported by that call alone.

Where a trainer steps a torch optimizer after everything else has been done to the gradients, the hooks of
`S2D.attach` on that very optimizer are the place: they run once per real step, not per micro-batch, with gradients
that a GradScaler has unscaled, and not at all in a step it skips. Lightning computes the gradients inside
`optimizer.step(closure)`, after such a hook, and so needs its own callback.

    trainer                  coupled: the penalty is added   clipping sees it   state is stored in
    HF Trainer               in the optimizer's step         no                 checkpoint-N/s2d.pt
    Lightning                on_before_optimizer_step        yes                the checkpoint's callback states
    Accelerate               in the optimizer's step         no                 accelerator.save_state
    torchtitan               in the container's step         no                 the checkpointer's `states`

The decoupled form acts after the step everywhere, so clipping does not concern it. Where the optimizer is a
`SpectralAdamW(regularizer=reg)`, its step applies the penalty itself, and only the state is looked after here. Not so
under torchtitan, whose container steps its optimizers once with zero gradients to create their state.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from s2d_kernels.parameters import ParameterGroups
from s2d_kernels.regularizer import S2D

STATE_FILE = "s2d.pt"


def trainer_callback(reg: S2D, *, resume_from: str | Path | None = None) -> Any:
    """Callback for Hugging Face's `Trainer(..., callbacks=[trainer_callback(reg)])`.

    Args:
        reg: built on the model that is given to the Trainer.
        resume_from: the checkpoint folder that `Trainer.train(resume_from_checkpoint=)` is given, where it is not
            `output_dir/checkpoint-N` of the step N that is resumed.

    Returns:
        A `transformers.TrainerCallback`. It writes `s2d.pt` into every checkpoint and reads it on resuming.

    Raises:
        ImportError: transformers is not installed.
        ValueError, NotImplementedError: later, from `Trainer.train`: as `S2D.attach`; `nn.DataParallel`; a checkpoint
            without `s2d.pt`.
    """
    transformers = _imported("transformers", extra="hf")

    class S2DCallback(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if args.n_gpu > 1:
                raise NotImplementedError("S2D under nn.DataParallel is not supported: show the Trainer one GPU")
            if state.global_step:
                folder = Path(resume_from or f"{args.output_dir}/checkpoint-{state.global_step}")
                if not (folder / STATE_FILE).is_file():
                    raise ValueError(f"{str(folder)!r} holds no {STATE_FILE}: give trainer_callback(reg, resume_from=)")
                reg.load_state_dict(torch.load(folder / STATE_FILE, weights_only=True))
            self.attached = _attach(reg, _inner(objects["optimizer"]))

        def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if state.is_world_process_zero:
                torch.save(reg.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if self.attached:
                reg.detach()

    return S2DCallback()


def lightning_callback(reg: S2D) -> Any:
    """Callback for `lightning.pytorch.Trainer(..., callbacks=[lightning_callback(reg)])`, or `pytorch_lightning`'s.

    A step that a GradScaler skips is counted by the coupled form, since Lightning tells only afterwards.

    Args:
        reg: built on the LightningModule, or on a module inside it.

    Returns:
        A `Callback`, whose state is part of Lightning's checkpoints.

    Raises:
        ImportError: neither package is installed.
        ValueError, NotImplementedError: later, from `Trainer.fit`: as `S2D.attach`; none or several of the module's
            optimizers hold penalized matrices; coupled with a fused optimizer under a GradScaler.
    """
    try:
        pytorch = importlib.import_module("lightning.pytorch")
    except ImportError:
        pytorch = _imported("pytorch_lightning", extra="lightning")

    class S2DCallback(pytorch.Callback):  # type: ignore[name-defined]
        optimizer: torch.optim.Optimizer

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            holding = [o for o in trainer.optimizers if ParameterGroups(reg.matrices, [_inner(o)])()]
            if len(holding) > 1:
                raise ValueError(f"{len(holding)} optimizers hold penalized matrices: build one S2D each, with select=")
            self.optimizer = _inner((holding or trainer.optimizers)[0])
            self.attached = _attach(reg, self.optimizer)  # refuses what it cannot do
            self.adds = self.attached and reg.mode == "coupled"
            if self.adds:
                reg.detach()
                self.groups = ParameterGroups(reg.matrices, [self.optimizer])
                if getattr(trainer.precision_plugin, "scaler", None) is not None and getattr(
                    self.optimizer, "_step_supports_amp_scaling", False
                ):
                    raise ValueError("a fused optimizer takes gradients still scaled: give it fused=False")

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if self.adds and _inner(optimizer) is self.optimizer:
                reg.add_grad(lr=self.groups.effective_rates())

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.attached:
                reg.detach()

        @property
        def state_key(self) -> str:
            """Another one for each S2D of a Trainer."""
            return self._generate_state_key(first=reg.matrices[0].name if reg.matrices else None)

        def state_dict(self) -> dict[str, torch.Tensor]:
            return reg.state_dict()

        def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
            reg.load_state_dict(state_dict)

    return S2DCallback()


def attach_accelerate(reg: S2D, accelerator: Any, optimizer: Any) -> None:
    """`reg.attach` for a loop with Accelerate, whose `save_state` and `load_state` then include `reg`.

    Args:
        reg: built on the model.
        accelerator: the `accelerate.Accelerator`.
        optimizer: what `accelerator.prepare` made of the optimizer. It steps the one inside only where gradients are
            complete, so that accumulation counts once.

    Raises:
        TypeError, ValueError, NotImplementedError: as `S2D.attach`.
    """
    _attach(reg, _inner(optimizer))
    accelerator.register_for_checkpointing(reg)


def attach_torchtitan(reg: S2D, optimizers: Any) -> None:
    """`reg.attach` for torchtitan's `OptimizersContainer`: on its step, not on those of the optimizers inside.

    The zero-gradient step by which torchtitan creates optimizer state goes to these and so is not taken for a step of
    training. For checkpoints put `reg` into the checkpointer: `trainer.checkpointer.states["s2d"] = reg`.

    Args:
        reg: built on the model part, `S2D(trainer.model_parts[0])`.
        optimizers: the container, `trainer.optimizers`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `S2D.attach`.
    """
    reg.attach(optimizers, parts=list(optimizers.optimizers))


def _attach(reg: S2D, optimizer: Any) -> bool:
    """`reg.attach`, unless the optimizer's step applies the penalties of `reg` itself; whether it was needed."""
    if getattr(optimizer, "regularizer", None) is reg:
        return False
    reg.attach(optimizer)
    return True


def _inner(optimizer: Any) -> Any:
    """The torch optimizer inside a trainer's wrapper."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _imported(name: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 's2d-kernels[{extra}]'") from error
