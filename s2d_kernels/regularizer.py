"""`S2D`: Selective Spectral Decay as an object beside the optimizer.

Schedule (section 1 of the definitions; steps count from 0, interval m):

    step t = 0, m, 2m, ...   the first forward of the step copies each weight, the largest activation is captured,
                             and the refresh starts on the side stream when the step's gradient is complete
    step t + lead            the refresh is joined; its factors and ranks apply from this step on

Whoever is late is waited for at t + lead, so the bits of training do not depend on how fast the refresh ran.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from s2d_kernels import ops, reference
from s2d_kernels.attachment import Fused, RefreshError, fuse, hook, warn_of_others
from s2d_kernels.capture import ActivationCapture, Captured, GraphCapture, ensure_eager
from s2d_kernels.layers import (
    KEYS,
    LayerReport,
    LayerState,
    Refreshed,
    StaticFactors,
    arrived,
    check_state,
    copied,
    decay,
    empty_layer,
    moved,
    overshoots,
    pack,
    unpack,
)
from s2d_kernels.optim import Penalty
from s2d_kernels.parameters import (
    Matrix,
    ParameterDecision,
    check_gradients_kept,
    check_one_device,
    check_processes,
    check_supported,
    checked_rate,
    find_matrices,
    frozen_parameters,
    log_selection,
    warn_of_unfrozen,
)
from s2d_kernels.penalty import add_penalty_grad_
from s2d_kernels.refresh import compute_refresh, log_arrival
from s2d_kernels.rounding import StepSeeds, check_rounding, refuse_fp16
from s2d_kernels.scheduler import Pending, SideStream, completed
from s2d_kernels.selection import PCDR
from s2d_kernels.svd import CONVERGED, STATUS_NAMES, SVDBasis

logger = logging.getLogger("s2d_kernels")

STRENGTH = 5e-4


class S2D:
    """Decay the few singular values that make a layer's largest activation, during fine-tuning.

    Coupled (the paper's form)::

        loss.backward(); reg.add_grad(); clip_grad_norm_(...); optimizer.step()

    Decoupled (acts on the weights, as AdamW's weight decay does)::

        loss.backward(); optimizer.step(); reg.decay_(lr)

    or `reg.attach(optimizer)` once, or `SpectralAdamW(..., regularizer=reg)`, and nothing else.

    Args:
        model: its linear layers, patch embeddings and packed attention projections are looked at; each parameter's
            decision and reason is in `decisions` and logged at INFO on the logger "s2d_kernels".
        mode: "coupled" or "decoupled".
        strength: lambda. Default 5e-4 when coupled. The decoupled form has no default: see `strength_for_half_life`.
        power: n >= 1, the exponent on the singular values.
        threshold: tau, the PCDR from which a layer is decayed.
        k_max: most components considered, clamped per layer to min(m, n).
        interval: steps between refreshes.
        lead: steps between the start of a refresh and its use, 0 <= lead < interval.
        select: (regex, penalize) pairs on parameter names, first match wins; see `parameters.find_matrices`.
        splits: regex -> row counts of fused projections.
        seed: seed of the random columns of the SVD, and of stochastic rounding.
        rounding: of decays of bf16 weights, or in the coupled form of sums with bf16 gradients: "nearest", or
            "stochastic", by which decays below the resolution of bf16 act as they should in expectation (how far below:
            see `add_penalty_grad_`). The random numbers depend on `seed`, the step and the matrix alone. Not for fp16,
            nor with `SpectralAdamW`.
        capture: "hooks", installed on refresh steps only, on which a compiled model runs eagerly; or "graph", an
            operation that stays in the model, for CUDA graphs and models that shall not leave their compiled code: move
            the model and load the weights, build S2D, then compile.
        asynchronous: False runs each refresh in place; the bits are the same.
        snapshot: True copies the weights on refresh steps, `snapshot_bytes` in all, until the refresh has arrived.
            False copies nothing: the refresh reads the weights themselves and is waited for before the optimizer
            changes them, so that none of its time is hidden, whatever `lead` says. The bits are the same. The
            decoupled form then must be attached, or belong to a `SpectralAdamW`.
        static_factors: True keeps the factors of the coupled form in the same memory for good and their ranks on the
            device, so that a captured CUDA graph can hold `add_grad`; see `advance`.
        max_sms: most multiprocessors of a GPU that a refresh may hold on to, None for all. Only the kernel that keeps
            matrices in shared memory through all reads does, and takes no fewer than its largest matrix needs; see
            `topk_svd`. Fewer make the refresh longer. The bits are the same.
        impl: implementation of the operations (of those that have it), or None to choose.

    Raises:
        TypeError: `model` is no module.
        ValueError: a value out of range, a pattern that matches nothing. Later, from `attach`, the first step or a
            refresh step: the model has other parameters than those that were found, as after
            `load_state_dict(assign=True)`.
        NotImplementedError: parameters that are DTensors, belong to DeepSpeed ZeRO or are updated in the backward; more
            than one process in torch.distributed; nn.DataParallel on several GPUs; a model on several devices, or
            without data. The same may come from a later step, where a trainer took the parameters over after this S2D
            was built.

    Attributes:
        step: completed optimizer steps.
        decisions: list of `ParameterDecision`.
        layers: list of `LayerReport`, after the first arrival.

    Under Adam-type optimizers the coupled form hardly depends on `strength`, because Adam normalizes it away: use
    mode="decoupled" there. Parameters in bf16 or fp16 round away changes below their resolution, those in bf16 not with
    rounding="stochastic".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: str = "coupled",
        strength: float | None = None,
        power: float = 2.0,
        threshold: float = 0.95,
        k_max: int = 3,
        interval: int = 100,
        lead: int = 3,
        select: Sequence[tuple[str, bool]] = (),
        splits: Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
        rounding: str = "nearest",
        capture: str = "hooks",
        asynchronous: bool = True,
        snapshot: bool = True,
        static_factors: bool = False,
        max_sms: int | None = None,
        impl: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if mode not in ("coupled", "decoupled"):
            raise ValueError(f"mode={mode!r} is neither 'coupled' nor 'decoupled'")
        if capture not in ("hooks", "graph"):
            raise ValueError(f"capture={capture!r} is neither 'hooks' nor 'graph'")
        if strength is None:
            if mode == "decoupled":
                raise ValueError(
                    "mode='decoupled' needs strength=: the coupled default does nothing there. "
                    "S2D.strength_for_half_life(sigma, lr_sum) gives the one that halves sigma"
                )
            strength = STRENGTH
        check_processes()
        self.mode = mode
        self.strength = ops.check_number("strength", strength)
        self.power = ops.check_number("power", power)
        self.threshold = ops.check_number("threshold", threshold)
        if self.strength < 0:
            raise ValueError(f"strength={strength} must not be negative")
        if self.power < 1:
            raise ValueError(f"power={power} must be at least 1")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie in (0, 1]")
        self.k_max = k_max = ops.check_integer("k_max", k_max, low=1)
        self.interval = ops.check_integer("interval", interval, low=1)
        self.lead = ops.check_integer("lead", lead, low=0, high=self.interval - 1)
        self.seed, self.impl = ops.check_integer("seed", seed, low=0), ops.check_impl(impl)
        self.rounding, stochastic = rounding, check_rounding(rounding)
        self.max_sms = None if max_sms is None else ops.check_integer("max_sms", max_sms, low=1)
        self.step = 0
        self.decisions: list[ParameterDecision]
        self._matrices, self.decisions = find_matrices(model, k_max=k_max, select=select, splits=splits)
        self._frozen = frozen_parameters(model, self.decisions)
        check_one_device(self._matrices)
        log_selection(model, self._matrices, self.decisions, warn_of_rounding=mode == "decoupled" and not stochastic)
        if static_factors and mode != "coupled":
            raise ValueError("static_factors=True belongs to mode='coupled': the decoupled form acts outside of graphs")
        if capture == "graph" and not snapshot:
            raise ValueError("snapshot=False belongs to capture='hooks': the operation in a graph copies the weights")
        self.snapshot = snapshot
        self._layers = {matrix.name: self._empty_layer(matrix) for matrix in self._matrices}
        self._built_for = device, _ = self._place()
        self._side = SideStream(device, asynchronous=asynchronous)
        self._static = StaticFactors(list(self._layers.values()), device) if static_factors else None
        self._places = {matrix.name: place for place, matrix in enumerate(self._matrices)}
        self._seeds = StepSeeds(self.seed, len(self._matrices), device) if stochastic else None
        self._check_dtypes()
        self._capture: ActivationCapture | GraphCapture
        if capture == "graph":  # the decoupled form changes the weights before it asks for the capture
            self._capture = GraphCapture(self._matrices, copy_at_start=mode == "decoupled")
        else:
            self._capture = ActivationCapture(self._matrices, copy_weights=snapshot)
        self._pending: Pending[dict[str, Refreshed]] | None = None
        self._pending_step = -1
        self._handles: list[torch.utils.hooks.RemovableHandle | Fused] = []
        self._unchecked = True  # what the parameters have become since the constructor, or since a state was loaded
        self._closed = False
        self._warned: set[str] = set()
        self._arm()

    # --- use in a training loop ---------------------------------------------------------------------------------

    def add_grad(self, *, grad_scale: float = 1.0, lr: float | Mapping[str, float] | None = None) -> None:
        """Add the penalty gradient to `.grad` of the decided layers. Once per optimizer step, after `backward()`.

        Every call adds it and counts a step: two before one optimizer step double the penalty and halve `interval`.
        A call at a refresh step in which no penalized layer ran forward with gradients does nothing and is not counted.

        Args:
            grad_scale: factor the gradients carry at this moment, for calls before `GradScaler.unscale_`.
            lr: learning rate of a plain SGD-like optimizer, or one per matrix name, to check that stale factors do not
                overshoot: interval * lr * strength * s_1^(power-1) above 0.3 is warned about, 1 and more refused. With
                momentum give lr / (1 - momentum). `attach` knows it by itself.

        Raises:
            ValueError: mode is "decoupled", or S2D is attached or closed; no gradients at all; the check above.
            RuntimeError: a refresh failed in the worker; training may go on with the previous factors.
        """
        if self.mode != "coupled":
            raise ValueError("add_grad belongs to mode='coupled'; with mode='decoupled' call decay_(lr) after the step")
        self._check_callable("add_grad")
        if not isinstance(lr, Mapping):
            lr = {} if lr is None else {m.name: ops.check_number("lr", lr) for m in self._matrices}
        self._add_grad(grad_scale, lr)

    def _add_grad(self, grad_scale: float, rates: Mapping[str, float]) -> None:
        if ops.capturing(self._side.device):
            if self._static is None:
                raise ValueError(
                    "a captured CUDA graph needs S2D(static_factors=True): other factors change their memory"
                )
            self._add_factors(grad_scale)
            return
        if not ops.check_number("grad_scale", grad_scale) > 0:
            raise ValueError(f"grad_scale={grad_scale} must be positive")
        if self._no_gradients():
            raise ValueError(
                f"no parameter has a gradient (first: {self._matrices[0].name!r}): call add_grad after backward() and "
                "before zero_grad(). Frameworks that keep .grad to themselves (DeepSpeed ZeRO, optimizer-in-backward) "
                "are not supported"
            )
        strange = rates.keys() - self._layers.keys()
        if strange:
            raise ValueError(f"lr names {sorted(strange)[:5]}, which are no penalized matrices: see S2D.matrices")
        with ops.exact_arithmetic(self._side.device):
            self._capture.before_change()
            if not self._launch_if_due():
                return
            self._arrive_if_due()
            warnings = overshoots(self._layers, rates, interval=self.interval, strength=self.strength, power=self.power)
            for name, message in warnings.items():
                self._warn_once("S2D: %s", message, key=name)
            self._draw()
            self._add_factors(grad_scale)
        self._end_step()

    def _add_factors(self, grad_scale: float) -> None:
        """The penalty of the factors in use; with static ones of every matrix, whatever its rank is at the moment."""
        grads, factors, indices, touched = [], [], [], []
        for index, matrix in enumerate(self._matrices):
            layer, grad = self._layers[matrix.name], matrix.parameter.grad
            if matrix.parameter.requires_grad and grad is not None and (layer.rank or self._static is not None):
                grads.append(matrix.rows(grad))
                factors.append(layer.factors(layer.S.shape[0]))
                indices.append(index)
                touched.append((matrix, grad))
        if not grads:
            return
        options = self._stochastic_rounding(indices)
        if self._static is not None:
            options |= self._static.options(indices, self.strength * grad_scale, self.power)
        else:
            layers = [self._layers[self._matrices[index].name] for index in indices]
            options["coefficients"] = [layer.coefficients(self.strength * grad_scale, self.power) for layer in layers]
            options["ranks"] = [layer.rank for layer in layers]
        add_penalty_grad_(grads, factors, impl=self.impl, **options)
        for (matrix, grad), rows in zip(touched, grads, strict=True):
            matrix.write_back(grad, rows)

    def _draw(self, use: int = 0) -> None:
        """The random numbers of this step's rounding."""
        if self._seeds is not None:
            self._seeds.draw(self.step, use)

    def _stochastic_rounding(self, places: Sequence[int]) -> dict[str, Any]:
        """Arguments of `add_penalty_grad_` for the matrices at these places."""
        return {} if self._seeds is None else {"rounding": self.rounding, "seed": self._seeds.of(places)}

    @property
    def refresh_due(self) -> bool:
        """Whether this step's activations are looked at, so that no captured graph may replace it.

        After `advance` with capture="graph" asking begins it: ask before the step's forward, and not between `advance`
        and its replay.
        """
        if self._unarmed:
            self._arm()
        return self._capture.active

    def advance(self) -> None:
        """Before the replay of a captured step: swap in the factors whose step has come, and count the step.

        A refresh step runs the same calls without the graph, on the same gradients::

            step_eagerly() if reg.refresh_due else (reg.advance(), graph.replay())

        Raises:
            ValueError: factors are not static; the step is a refresh step; closed.
            RuntimeError: a refresh failed in the worker.
        """
        self._check_callable("advance")
        if self._static is None:
            raise ValueError("advance belongs to S2D(static_factors=True)")
        if self.refresh_due:
            raise ValueError(f"step {self.step} is a refresh step: run it without the graph, so that hooks see it")
        self._arrive_if_due()
        self._draw()
        self.step += 1
        if isinstance(self._capture, GraphCapture):
            self._unarmed = True  # it acts in replays too, and the one that follows is not to be looked at
        else:
            self._arm()

    def decay_(self, lr: float | Mapping[str, float]) -> None:
        """Decay the weights themselves: s <- s (1 + (n-1) lr lambda s^(n-1))^(-1/(n-1)). Once per step, after it.

        Every call decays and counts a step.
        Freshly arrived factors first receive the decay of the steps since their snapshot, less what the previous
        factors have already taken along the same directions.

        Args:
            lr: learning rate of this step, or one per matrix name. Frozen parameters are left alone.

        Raises:
            ValueError: mode is "coupled", S2D is attached or closed, or a learning rate is missing, negative or not
                finite.
            RuntimeError: a refresh failed in the worker; training may go on with the previous factors.
        """
        if self.mode != "decoupled":
            raise ValueError("decay_ belongs to mode='decoupled'; with mode='coupled' call add_grad() before the step")
        self._check_callable("decay_")
        if not self.snapshot:
            raise ValueError(
                "snapshot=False: decay_ comes after the step has changed the weights; use attach(optimizer)"
            )
        if isinstance(lr, Mapping):
            missing = [m.name for m in self._matrices if m.name not in lr]
            if missing:
                raise ValueError(f"lr holds no learning rate for {missing[:5]} (first five)")
            self._decay({m.name: lr[m.name] for m in self._matrices})
        else:
            self._decay({m.name: lr for m in self._matrices})

    def _decay(self, rates: Mapping[str, float]) -> None:
        with ops.exact_arithmetic(self._side.device):
            changes = self._changes(rates)
            if changes is None:
                return
            self._change_weights(changes)
        self._end_step()

    def _begin_in_place(self) -> None:
        """Refresh from the weights themselves if one is due, before the optimizer changes them."""
        if not self._no_gradients():
            with ops.exact_arithmetic(self._side.device):
                self._launch_if_due()

    def _changes(self, given: Mapping[str, float]) -> list[tuple[Matrix, LayerState, Tensor]] | None:
        """What this step takes from the singular values of each decided layer; None where the step does not count."""
        rates = {m.name: checked_rate(m, given[m.name]) for m in self._matrices}
        if not self._launch_if_due():
            return None
        before = dict(self._layers)
        late = self._catch_up(before) if self._arrive_if_due() else {}
        decided = []
        for matrix in self._matrices:
            layer, rate = self._layers[matrix.name], rates[matrix.name]
            layer.missed_lr += rate
            if layer.rank and (rate != 0 or matrix.name in late):
                decided.append((matrix, layer))
        if not decided:
            return []
        layers = [layer for _, layer in decided]
        changes = decay(layers, [rates[m.name] for m, _ in decided], strength=self.strength, power=self.power)
        for index, (matrix, _) in enumerate(decided):
            if matrix.name in late:
                changes[index] += late[matrix.name]
        torch._foreach_copy_([layer.taken() for layer in layers], changes)
        return [(matrix, layer, layer.taken()) for matrix, layer in decided]

    def _begin_fused(self) -> list[Penalty] | None:
        """The penalties of this step for an optimizer that applies them itself; None where the step does not count."""
        (handle,) = self._handles
        if self._no_gradients() or not isinstance(handle, Fused):
            return None
        groups = handle.groups
        trained = groups.trained()
        with ops.exact_arithmetic(self._side.device):
            self._capture.before_change()
            if self.mode == "coupled":
                if not self._launch_if_due():
                    return None
                self._arrive_if_due()
                layers = [(matrix, self._layers[matrix.name]) for matrix in self._matrices]
                parts = [(m, at, at.coefficients(self.strength, self.power)[: at.rank]) for m, at in layers if at.rank]
            else:
                changes = self._changes(groups.rates())
                if changes is None:
                    return None
                # What is late on a parameter that this step leaves alone.
                self._change_weights([change for change in changes if change[0].name not in trained])
                parts = changes
        return [
            Penalty(m.parameter, m.start, m.stop, at.basis.U[:, : at.rank], at.basis.Vh[: at.rank], c)
            for m, at, c in parts
            if m.name in trained
        ]

    def _fuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the calls to the step of an optimizer that applies the penalties itself, until `detach` or `close`."""
        self._check_callable(type(optimizer).__name__)
        if self._seeds is not None:
            raise ValueError(
                f"{type(optimizer).__name__} rounds to the nearest: with S2D(rounding='stochastic') use "
                "torch.optim.AdamW and attach(optimizer)"
            )
        check_supported(self._matrices)
        ensure_eager()
        self._handles = [fuse(self, optimizer)]

    def _change_weights(self, changes: Sequence[tuple[Matrix, LayerState, Tensor]], *, use: int = 0) -> None:
        """W += U diag(change) Vh of each layer's decided components."""
        weights = [matrix.rows(matrix.parameter.detach()) for matrix, _, _ in changes]
        self._draw(use)
        self._add_changes(weights, changes)
        for (matrix, _, _), rows in zip(changes, weights, strict=True):
            matrix.write_back(matrix.parameter.detach(), rows)

    def _add_changes(self, weights: Sequence[Tensor], changes: Sequence[tuple[Matrix, LayerState, Tensor]]) -> None:
        if changes:
            add_penalty_grad_(
                weights,
                [layer.factors(layer.rank) for _, layer, _ in changes],
                coefficients=[change for _, _, change in changes],
                impl=self.impl,
                **self._stochastic_rounding([self._places[matrix.name] for matrix, _, _ in changes]),
            )

    def attach(self, optimizer: torch.optim.Optimizer, *, parts: Sequence[torch.optim.Optimizer] | None = None) -> None:
        """Let hooks of `optimizer.step()` make the call, until `detach` or `close`.

        The coupled form then acts after gradient clipping done by the loop, the decoupled form after the step with
        each parameter group's learning rate. A step without any gradient is left alone, and so is a parameter without
        one.

        Args:
            optimizer: the one whose step is called. Wrappers of trainers are for `s2d_kernels.integrations`.
            parts: where `optimizer` only steps others, those others, which hold the parameters.

        Raises:
            TypeError: not a torch optimizer, or a wrapper without hooks.
            ValueError: already attached or closed; the optimizer holds none of the penalized parameters; coupled with
                maximize=True, or with LBFGS, which evaluates the gradient several times a step. Later, from the step:
                it is called with a closure, or with gradients still scaled by a GradScaler.
            NotImplementedError: see the class.
        """
        self._check_callable("attach")
        check_supported(self._matrices)
        ensure_eager()
        self._handles = [*hook(self, optimizer, [optimizer] if parts is None else list(parts))]

    def detach(self) -> None:
        """End what `attach` or `SpectralAdamW` began."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- what one looks at --------------------------------------------------------------------------------------

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The penalized matrices."""
        return tuple(self._matrices)

    @property
    def penalty(self) -> Tensor:
        """Value of the penalty on the decided components, strength/(power+1) * sum s^(power+1): a device tensor."""
        total = torch.zeros((), dtype=torch.float32, device=self._side.device)
        for layer in self._layers.values():
            if layer.rank:
                total = total + layer.S[: layer.rank].float().pow(self.power + 1).sum()
        return self.strength / (self.power + 1) * total

    @property
    def layers(self) -> list[LayerReport]:
        """One `LayerReport` per matrix from the last refresh that has arrived; empty before the first."""
        reports = []
        for matrix in self._matrices:
            layer = self._layers[matrix.name]
            if not layer.arrived:
                continue
            nothing = (float("nan"),) * self.k_max
            decision = layer.pcdr or PCDR(layer.rank, "loaded", nothing, nothing, float("nan"), -1)
            status = STATUS_NAMES[layer.status]
            reports.append(LayerReport(matrix.name, matrix.shape, layer.rank, *decision[1:5], layer.sigma, status))
        return reports

    @property
    def snapshot_bytes(self) -> int:
        """Memory that the copies of a refresh's weights take, from its step's first forward until it has arrived."""
        if not self.snapshot:
            return 0
        return sum(m.shape[0] * m.shape[1] * m.parameter.element_size() for m in self._matrices)

    @property
    def late(self) -> int:
        """How often a refresh was not ready at its step and was waited for."""
        return self._side.late

    @property
    def waited_seconds(self) -> float:
        """Host time spent in those waits."""
        return self._side.waited_seconds

    @staticmethod
    def strength_for_half_life(sigma: float, lr_sum: float, *, power: float = 2.0) -> float:
        """Strength of the decoupled form that halves a singular value `sigma` while the learning rates sum to `lr_sum`.

        power = 2: 1 / (sigma * lr_sum). The other singular values decay more slowly, those above faster.
        """
        return reference.strength_for_half_life(sigma, lr_sum, power=power)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "S2D cannot be copied or pickled: it has a worker, and hooks on the model. Store state_dict(). If a module "
            "that holds one is to be copied (EMA, copy.deepcopy), keep it outside, or drop it in __getstate__"
        )

    def close(self) -> None:
        """Remove the hooks, `attach`'s too, and end the worker; a refresh under way is dropped. Final."""
        self._closed, self._unarmed = True, False
        self.detach()
        self._capture.stop()
        if isinstance(self._capture, GraphCapture):
            self._capture.remove()
        self._drop_pending()
        self._side.close()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Flat dict of tensors, the same keys from construction on; a refresh under way is completed and stored.

        Loadable with `torch.load(weights_only=True)` and storable as safetensors. Resuming is bit-exact at any step.
        """
        if self._pending is None:
            return self._pack(-1, {})
        pending = self._join_pending()
        self._pending = completed(self._side, pending)
        return self._pack(self._pending_step, pending)

    def _pack(self, pending_step: int, pending: Mapping[str, Refreshed]) -> dict[str, Tensor]:
        state = {k: torch.tensor(v, device="cpu") for k, v in (("step", self.step), ("pending_step", pending_step))}
        for matrix in self._matrices:
            packed = pack(self._layers[matrix.name], pending.get(matrix.name), self._empty_layer(matrix))
            state |= {f"{matrix.name}.{key}": tensor for key, tensor in packed.items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` stored; tensors move to the parameters' devices.

        Raises:
            ValueError: keys are missing or unexpected, or a shape differs (another model, k_max or selection).
                Nothing is changed then.
            TypeError: a value is no tensor.
        """
        check_state(state_dict, self._pack(-1, {}))
        self._drop_pending()  # while it runs, nothing that it reads may change, and no factors may be freed
        self._capture.stop()
        self.step = int(state_dict["step"])
        self._pending_step = int(state_dict["pending_step"])
        self._unchecked = True
        pending: dict[str, Refreshed] = {}
        for matrix in self._matrices:
            stored = {key: state_dict[f"{matrix.name}.{key}"] for key in KEYS}
            layer, fresh = unpack(stored, self._empty_layer(matrix))
            if self._static is not None:
                old = self._layers[matrix.name]
                layer.basis, layer.S = copied(old.basis, layer.basis), old.S.copy_(layer.S)
            self._layers[matrix.name] = layer
            if fresh is not None:
                pending[matrix.name] = fresh
        if self._static is not None:
            self._static.follow(list(self._layers.values()))
        self._pending = completed(self._side, pending) if self._pending_step >= 0 else None
        self._arm()

    # --- the refresh --------------------------------------------------------------------------------------------

    def _empty_layer(self, matrix: Matrix) -> LayerState:
        return empty_layer(matrix.shape, matrix.parameter, k_max=self.k_max)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        if not self._matrices:
            return torch.device("cpu"), torch.float32
        return self._matrices[0].parameter.device, self._matrices[0].parameter.dtype

    def _follow_parameters(self) -> None:
        """The model was moved, or changed its dtype, since the factors were made."""
        pending = None if self._pending is None else self._join_pending()
        for matrix in self._matrices:
            layer, like = self._layers[matrix.name], self._empty_layer(matrix)
            layer.basis = moved(layer.basis, like.basis.S)
            layer.S, layer.S_at_snapshot = layer.S.to(like.S), layer.S_at_snapshot.to(like.S)
            layer.prepared = layer.kept = layer.change = None
            if pending is not None and matrix.name in pending:
                fresh = pending[matrix.name]
                pending[matrix.name] = fresh._replace(basis=moved(fresh.basis, like.basis.S))
        self._built_for = self._place()
        self._side.move(self._built_for[0])
        self._pending = None if pending is None else completed(self._side, pending)
        if self._static is not None:
            self._static = StaticFactors(list(self._layers.values()), self._built_for[0])
        if self._seeds is not None:
            self._seeds.move(self._built_for[0])
            self._check_dtypes()

    def _arm(self) -> None:
        self._unarmed = False
        if self.step % self.interval == 0 and self._matrices:
            self._capture.start()

    def _end_step(self) -> None:
        self.step += 1
        self._arm()

    def _launch_if_due(self) -> bool:
        """Start the refresh of this step if it is one; False if it should have one but nothing was captured."""
        if ops.capturing(self._side.device):
            raise ValueError(
                "the schedule of S2D runs on the host: a captured CUDA graph can hold add_grad of "
                "S2D(static_factors=True), with advance() before each replay; call decay_ outside of it"
            )
        if self._built_for != self._place():
            self._follow_parameters()
        if self._unarmed:
            self._arm()
            if self._capture.active:
                message = "S2D step %d waits: ask refresh_due before a refresh step's forward, or it is not looked at"
                self._warn_once(message, self.step)
                return False
        if self._pending is not None and self._pending.failed():
            self._join_pending()
        if self._capture.active or self._unchecked:  # a refresh step, or the first one
            check_supported(self._matrices)
            warn_of_unfrozen(self._frozen)
            if self._unchecked:
                warn_of_others(self)
            self._unchecked = False
        if not self._capture.active:
            return True
        captured = self._capture.stop()
        if not captured:
            self._warn_once(
                "S2D step %d waits: no penalized layer has run forward with gradients enabled, so there is nothing to "
                "refresh from. Is this S2D built on the model that trains?",
                self.step,
            )
            self._capture.start()
            return False
        if self._pending is not None:  # only after loading a state of another interval or lead
            before = dict(self._layers)
            self._take_over()
            if self.mode == "decoupled":  # the copies of this step's weights are from before what is caught up here
                late = self._catch_up(before)
                changes = [(m, self._layers[m.name], late[m.name]) for m in self._matrices if m.name in late]
                self._change_weights(changes, use=1)
                copies = [m.name for m in self._matrices if m.name in captured and captured[m.name].apart(m)]
                copied_too = [change for change in changes if change[0].name in copies]
                self._add_changes([captured[m.name].weight for m, _, _ in copied_too], copied_too)
        bases: dict[str, SVDBasis | None] = {}
        for name, layer in self._layers.items():
            layer.S_at_snapshot, layer.missed_lr = layer.S.clone(), 0.0
            # a layer that did not converge, or was not finite, starts afresh with the wider cold block
            bases[name] = layer.basis if layer.arrived and layer.status == CONVERGED else None
        self._pending_step = self.step
        self._pending = self._side.submit(self._refresh, captured, bases, self.seed + self.step)
        if not self.snapshot:
            self._pending.wait()
        return True

    def _refresh(
        self, captured: dict[str, Captured], bases: dict[str, SVDBasis | None], seed: int
    ) -> dict[str, Refreshed]:
        """The work on the side stream. A method, so that an S2D that is let go keeps its factors until it ends."""
        return compute_refresh(
            captured,
            bases,
            mode=self.mode,
            strength=self.strength,
            power=self.power,
            threshold=self.threshold,
            k_max=self.k_max,
            seed=seed,
            max_sms=self.max_sms,
            impl=self.impl,
        )

    def _join_pending(self) -> dict[str, Refreshed]:
        """Wait for the pending refresh; on failure forget it, so that training can go on, and say so."""
        try:
            return self._pending.join() if self._pending is not None else {}
        except Exception as error:
            self._pending = None
            raise RefreshError(
                f"the refresh of step {self._pending_step} failed: {error}. The previous factors stay in use; "
                "calling again continues with them"
            ) from error

    def _drop_pending(self) -> None:
        if self._pending is not None:
            self._pending.drop()
        self._pending = None

    def _arrive_if_due(self) -> bool:
        """Take over the refresh whose step has come."""
        if self._pending is None or self.step < self._pending_step + self.lead:
            return False
        self._take_over()
        return True

    def _take_over(self) -> None:
        """Use the pending refresh from now on. Bad layers are reported and left without a penalty."""
        refreshed = self._join_pending()
        self._warned.clear()
        self._pending = None
        for name, fresh in refreshed.items():
            self._layers[name] = arrived(fresh, self._layers[name], in_place=self._static is not None)
        if self._static is not None:
            self._static.follow(list(self._layers.values()))
        log_arrival(self._pending_step, refreshed)

    def _catch_up(self, before: Mapping[str, LayerState]) -> dict[str, Tensor]:
        """By name what gives fresh factors the decay of the steps between their snapshot and now."""
        changes = {}
        for matrix in self._matrices:
            layer, old = self._layers[matrix.name], before[matrix.name]
            if layer is not old and layer.rank and matrix.parameter.requires_grad:
                changes[matrix.name] = layer.catch_up(old, strength=self.strength, power=self.power)
        return changes

    def _warn_once(self, message: str, *arguments: object, key: str = "") -> None:
        """Log a warning unless one with this key was logged since the last arrival."""
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message, *arguments)

    def _check_callable(self, name: str) -> None:
        if self._closed:
            raise ValueError(f"{name}: this S2D is closed, build a new one")
        if self._handles:
            raise ValueError(f"{name}: attached to an optimizer, whose step already makes the call; detach() first")

    def _no_gradients(self) -> bool:
        """Whether there is no gradient at all; a NotImplementedError where somebody took them away."""
        if not self._matrices or any(matrix.parameter.grad is not None for matrix in self._matrices):
            return False
        check_supported(self._matrices)
        if self._capture.seen:
            check_gradients_kept(self._matrices)
        return True

    def _check_dtypes(self) -> None:
        if self._seeds is not None:
            for matrix in self._matrices:
                refuse_fp16(f"parameter {matrix.name!r}", matrix.parameter)
