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
import logging
from pathlib import Path
from typing import Any

import torch

from s2d_kernels.parameters import ParameterGroups
from s2d_kernels.regularizer import S2D

logger = logging.getLogger("s2d_kernels")

STATE_FILE = "s2d.pt"


def trainer_callback(reg: S2D, *, resume_from: str | Path | None = None) -> Any:
    """Callback for Hugging Face's `Trainer(..., callbacks=[trainer_callback(reg)])`.

    Args:
        reg: built on the model that is given to the Trainer.
        resume_from: the checkpoint folder that `Trainer.train(resume_from_checkpoint=)` is given, where it is not
            `output_dir/checkpoint-N` of the step N that is resumed.

    Returns:
        A `transformers.TrainerCallback`. It writes `s2d.pt` into every checkpoint and reads it on resuming; in a
        hyperparameter search only where `hyperparameter_search(hp_name=)` names the trials' folders.

        `train()` after one that an exception ended goes on with S2D as it is, as with the weights and the optimizer;
        only what the last, incomplete step captured is forgotten. With `auto_find_batch_size` each further try begins
        with the state that S2D had at the first one (kept on the host meanwhile), as the Trainer begins its steps
        anew, so that an out-of-memory error before the first step has ended leaves no trace. It leaves the weights as
        they are, though.

    Raises:
        ImportError: transformers is not installed.
        ValueError, NotImplementedError: later, from `Trainer.train`: as `S2D.attach`; `nn.DataParallel`; a checkpoint
            without `s2d.pt`.
    """
    transformers = _imported("transformers", extra="hf")

    class S2DCallback(transformers.TrainerCallback):  # type: ignore[name-defined]
        run = _Run(reg)
        batch_size = 0
        first: dict[str, torch.Tensor] | None = None  # the state that a search for the batch size began with

        def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if args.n_gpu > 1:
                raise NotImplementedError("S2D under nn.DataParallel is not supported: show the Trainer one GPU")
            # Only a search goes on with smaller batches than a run that did not end.
            again = args.auto_find_batch_size and self.run.under_way and state.train_batch_size < self.batch_size
            if state.global_step:
                folder = Path(resume_from) if resume_from else _checkpoint(args, state)
                if folder is None or not (folder / STATE_FILE).is_file():
                    where = str(folder or args.output_dir)
                    raise ValueError(f"{where!r} holds no {STATE_FILE}: give trainer_callback(reg, resume_from=)")
                reg.load_state_dict(torch.load(folder / STATE_FILE, weights_only=True))
            elif again and self.first is not None:
                reg.load_state_dict(self.first)
            self.run.begin(_inner(objects["optimizer"]))
            self.batch_size = state.train_batch_size
            if args.auto_find_batch_size and not again:
                self.first = {key: tensor.cpu() for key, tensor in reg.state_dict().items()}

        def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if state.is_world_process_zero:
                folder = _checkpoint(args, state)
                if folder is None:
                    logger.warning(
                        "S2D: checkpoint %d of this trial is without %s, for its folder has no name that a callback "
                        "knows: give hyperparameter_search(hp_name=)",
                        state.global_step,
                        STATE_FILE,
                    )
                else:
                    torch.save(reg.state_dict(), folder / STATE_FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            self.run.end()
            self.first = None

    return S2DCallback()


def lightning_callback(reg: S2D) -> Any:
    """Callback for `lightning.pytorch.Trainer(..., callbacks=[lightning_callback(reg)])`, or `pytorch_lightning`'s.

    A step that a GradScaler skips is counted by the coupled form, since Lightning tells only afterwards. A `fit` after
    one that an exception ended goes on with S2D as it is; only what the last, incomplete step captured is forgotten.

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
        run = _Run(reg)
        optimizer: torch.optim.Optimizer

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            holding = [o for o in trainer.optimizers if ParameterGroups(reg.matrices, [_inner(o)])()]
            if len(holding) > 1:
                raise ValueError(f"{len(holding)} optimizers hold penalized matrices: build one S2D each, with select=")
            self.optimizer = _inner((holding or trainer.optimizers)[0])
            self.adds = self.run.begin(self.optimizer) and reg.mode == "coupled"  # refuses what it cannot do
            if self.adds:
                self.run.detach()
                self.groups = ParameterGroups(reg.matrices, [self.optimizer])
                if getattr(trainer.precision_plugin, "scaler", None) is not None and getattr(
                    self.optimizer, "_step_supports_amp_scaling", False
                ):
                    raise ValueError("a fused optimizer takes gradients still scaled: give it fused=False")

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if self.adds and _inner(optimizer) is self.optimizer:
                reg.add_grad(lr=self.groups.effective_rates())

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.run.end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.run.detach()

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


class _Run:
    """One training run of a trainer, which an exception may end without a word.

    Attributes:
        under_way: whether it has begun and not ended; at the next `begin` this says that it was aborted.
    """

    def __init__(self, reg: S2D) -> None:
        self.under_way = False
        self._reg = reg
        self._handles: object = None

    def begin(self, optimizer: Any) -> bool:
        """Attach as `_attach` does, after what an aborted run left behind is removed."""
        self.detach()
        aborted, self.under_way = self.under_way, True
        attached = _attach(self._reg, optimizer)
        self._handles = self._reg._handles if attached else None
        if aborted:
            self._reg._arm()  # forgets what the step that was not completed has captured
        return attached

    def detach(self) -> None:
        """Remove the hooks of `begin`, and nobody else's."""
        if self._handles is not None and self._reg._handles is self._handles:
            self._reg.detach()
        self._handles = None

    def end(self) -> None:
        """The run ended as it should."""
        self.detach()
        self.under_way = False


def _checkpoint(args: Any, state: Any) -> Path | None:
    """The folder of the Trainer's checkpoint at this step; None in a search whose trials have no name."""
    folder = Path(args.output_dir)
    if state.trial_params is not None:
        if state.trial_name is None:
            return None
        folder = folder / state.trial_name
    return folder / f"checkpoint-{state.global_step}"


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
