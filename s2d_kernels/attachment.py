"""How an `S2D` acts inside an optimizer's step: by hooks of any optimizer, or because the optimizer asks it."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from s2d_kernels.parameters import Matrix, ParameterGroups

if TYPE_CHECKING:
    from s2d_kernels.regularizer import S2D

logger = logging.getLogger("s2d_kernels")


_attached: weakref.WeakKeyDictionary[S2D, int] = weakref.WeakKeyDictionary()  # in the order of these numbers
_count = itertools.count()


class RefreshError(RuntimeError):
    """A refresh failed in the worker. It is forgotten: the next call goes on with the previous factors."""


class Fused:
    """The bond with an optimizer that applies the penalties itself, in the place of a hook's handle."""

    def __init__(self, optimizer: Any, groups: ParameterGroups) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.groups = groups

    def remove(self) -> None:
        """Part from the optimizer, which goes on without penalties."""
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.regularizer = None


def fuse(reg: S2D, optimizer: torch.optim.Optimizer) -> Fused:
    """Bind `reg` to an optimizer that applies the penalties itself; a ValueError where it holds no matrix."""
    groups = _groups_of(reg.matrices, [optimizer])
    if reg.mode == "coupled":
        _warn_adaptive(optimizer)
    _register(reg)
    return Fused(optimizer, groups)


def hook(reg: S2D, optimizer: torch.optim.Optimizer, parts: Sequence[torch.optim.Optimizer]) -> list[RemovableHandle]:
    """The hooks of `S2D.attach` on an optimizer whose step steps `parts`; errors as there."""
    _check_optimizers([optimizer, *parts])
    groups = _groups_of(reg.matrices, parts)
    if reg.mode == "decoupled":
        _register(reg)
        return _hook_decoupled(reg, optimizer, groups)
    for part in parts:
        if isinstance(part, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates the gradient several times a step: the coupled penalty belongs to each of them, "
                "but its schedule counts steps. Use mode='decoupled' or another optimizer"
            )
        if any(group.get("maximize") for group in part.param_groups):
            raise ValueError(
                "maximize=True: the optimizer goes up the gradient, and would inflate what the coupled penalty is to "
                "decay. Minimize the negative, or use mode='decoupled'"
            )
    if groups.adaptive:
        _warn_adaptive(parts[0])
    _register(reg)
    return _hook_coupled(reg, optimizer, groups)


def _register(reg: S2D) -> None:
    _attached[reg] = next(_count)
    reg._unchecked = True


def warn_of_others(reg: S2D) -> None:
    """Log where an S2D that was attached before penalizes some of the same parameters, for both then apply.

    At the first step, and not when it is attached: what a notebook's cell is about to replace has gone by then.
    """
    mine = {id(matrix.parameter): matrix.name for matrix in reg.matrices}
    until = _attached[reg] if reg._handles else next(_count)

    def found() -> list[tuple[S2D, list[str]]]:
        before = [other for other, number in _attached.items() if number < until and other._handles]
        shared = [
            (other, [mine[id(m.parameter)] for m in other.matrices if id(m.parameter) in mine]) for other in before
        ]
        return [(other, names) for other, names in shared if names]

    if not found():
        return
    gc.collect()  # an S2D and its optimizer that nobody uses any more hold each other
    for other, names in found():
        logger.warning(
            "S2D: another one (mode=%r, strength=%g, step %d) is attached and penalizes %d of the same matrices "
            "(first: %s): both apply. detach() the one that shall not, or give them different parameters by select=",
            other.mode,
            other.strength,
            other.step,
            len(names),
            names[0],
        )


def _check_optimizers(optimizers: Sequence[object]) -> None:
    """Raise a TypeError where one is no torch optimizer with step hooks."""
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer) or not hasattr(one, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"{type(one).__module__}.{type(one).__name__} is no torch.optim.Optimizer with step hooks: attach "
                "the optimizer inside it, or use s2d_kernels.integrations"
            )


def _groups_of(matrices: Sequence[Matrix], optimizers: Sequence[torch.optim.Optimizer]) -> ParameterGroups:
    """Their groups; a ValueError where they hold none of the matrices, a warning where some are missing."""
    groups = ParameterGroups(matrices, optimizers)
    held = groups()
    if matrices and not held:
        raise ValueError(
            f"the optimizer holds none of the {len(matrices)} penalized matrices "
            f"(first: {matrices[0].name!r}): attach the optimizer that trains this model"
        )
    missing = [matrix.name for matrix in matrices if matrix.name not in held]
    if missing:
        logger.warning(
            "S2D: %d of the %d penalized matrices are not in the attached optimizer (first: %s)",
            len(missing),
            len(matrices),
            missing[0],
        )
    return groups


def _warn_adaptive(optimizer: torch.optim.Optimizer) -> None:
    """Log that the coupled form hardly depends on its strength here."""
    logger.warning(
        "S2D coupled with %s: it divides the penalty by the gradient's own size, so that strength hardly "
        "matters. mode='decoupled' acts on the weights instead",
        type(optimizer).__name__,
    )


def _hook_decoupled(reg: S2D, optimizer: torch.optim.Optimizer, groups: ParameterGroups) -> list[RemovableHandle]:
    """Decay after each step; where the weights are not copied, their refresh is made before it."""
    trained: set[str] | None = None  # of this step, before other hooks may have set the gradients to None

    def before(inner: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal trained
        closure = _has_closure(inner, args, kwargs)  # which computes the gradients after this hook
        trained = None if closure else groups.trained()
        if reg.snapshot:
            if not closure:
                reg._capture.before_change()
            return
        if closure:
            raise ValueError(
                "optimizer.step(closure) runs the model after the hook that reads the weights: snapshot=False cannot "
                "be attached to it. Use snapshot=True"
            )
        if not _skips(inner):
            reg._begin_in_place()

    def after(inner: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if _skips(inner) or (not trained and reg._no_gradients()):
            return
        rates = groups.rates(trained)
        try:
            reg._decay(rates)
        except RefreshError:
            # The weights have been changed, so that calling step() again would be another step: this one is completed
            # with the previous factors.
            reg._decay(rates)
            raise

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _hook_coupled(reg: S2D, optimizer: torch.optim.Optimizer, groups: ParameterGroups) -> list[RemovableHandle]:
    """Add the penalty's gradient before each step."""

    def before(inner: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(inner, args, kwargs):
            raise ValueError(
                "optimizer.step(closure) computes the gradients after the hook: S2D cannot be attached to it. "
                "Call reg.add_grad() inside the closure, after backward(); the optimizer must evaluate it once a step"
            )
        if getattr(inner, "grad_scale", None) is not None:
            raise ValueError(
                "the fused optimizer takes gradients still scaled by the GradScaler: call "
                "scaler.unscale_(optimizer) and reg.add_grad() yourself instead of attach"
            )
        if not _skips(inner) and not reg._no_gradients():
            reg._add_grad(1.0, groups.effective_rates())

    return [optimizer.register_step_pre_hook(before)]


def _has_closure(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    positional = [a for a in args if a is not optimizer]  # torch passes the optimizer itself among the arguments
    return any(a is not None for a in positional) or kwargs.get("closure") is not None


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is a step that a GradScaler has found infinite: a fused optimizer is called and skips it itself."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
