"""`SpectralAdamW`: AdamW that carries the spectral penalty through the one pass it makes over the parameters anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import _to_scalar
from torch.optim.adamw import AdamW
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from s2d_kernels import ops
from s2d_kernels.adamw import ADDRESS_TABLES, contiguous_columns
from s2d_kernels.clipping import PenalizedRows, total_norm

if TYPE_CHECKING:
    from s2d_kernels.regularizer import S2D


class Penalty(NamedTuple):
    """U diag(coefficients) Vh on rows `start` to `stop` of a parameter, seen as a matrix `[m, n]`.

    Attributes:
        parameter: with its first dimension as rows and all others as columns.
        start, stop: the rows; `stop` None is m.
        U, Vh, coefficients: `[stop - start, k]`, `[k, n]`, `[k]`.
    """

    parameter: nn.Parameter
    start: int
    stop: int | None
    U: Tensor
    Vh: Tensor
    coefficients: Tensor


# A parameter, its gradient, exp_avg, exp_avg_sq, step, and the place of its group.
_Entry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


class _Block(NamedTuple):
    """What `adamw_` takes of one matrix: views of param, grad, exp_avg and exp_avg_sq, its step, its penalty."""

    views: tuple[Tensor, Tensor, Tensor, Tensor]
    step: Tensor
    group: int
    U: Tensor
    Vh: Tensor
    coefficients: Tensor


class SpectralAdamW(AdamW):
    """`torch.optim.AdamW` with the penalty of an `S2D` in the same pass: no extra bytes are read or written.

    ::

        reg = S2D(model, mode="decoupled", strength=1.0)
        optimizer = SpectralAdamW(model.parameters(), lr=1e-4, regularizer=reg)
        loss.backward(); optimizer.step()  # nothing else: add_grad and decay_ refuse to act a second time

    Coupled, the penalty is added to the gradient before the moments; decoupled, to the weights after the update.
    The result is that of `reg.add_grad()` and `AdamW.step()`, or of `AdamW.step()` and `reg.decay_(lr)`, within
    rounding: fp32 arithmetic (fp64 for fp64) and one rounding to the parameter's dtype; with impl="torch" a second one
    of the penalized gradient, or of the weight.

    Args:
        params, lr, betas, eps, weight_decay, maximize, capturable: as in `torch.optim.AdamW`; `lr` may be a tensor.
            `maximize` turns the sign of the gradient, not that of the penalty.
        amsgrad: not supported.
        regularizer: `S2D` on the same model; its schedule advances with each step. None: plain AdamW, or the
            penalties of `set_penalties`.
        impl: "torch", "cpu", "triton", "cuda", "reference", or None to choose.

    Attributes:
        total_norm: the norm before clipping that the last step with a `max_norm` found, fp32 on the device; else None.

    Raises:
        ValueError: `amsgrad`; the optimizer holds none of the matrices that `regularizer` penalizes, or it is attached
            elsewhere or closed; a value that AdamW refuses.

    State: the keys, shapes and dtypes of `torch.optim.AdamW(fused=True)`; `state_dict` passes between the two in both
        directions, from other AdamW forms too. The regularizer has a `state_dict` of its own.
    GradScaler: `scaler.step(optimizer)` without `unscale_` as with torch's fused optimizers, except that `.grad` is
        left as it is; with a regularizer the host then waits to learn whether the step is skipped.
    Cost: p, g, m, v read and p, m, v written once. With impl="torch" (fp64, and where no kernel is built) torch's fused
        AdamW, and for the layers with a coupled penalty a sum in a temporary the size of one layer. Any dense layout
        of a parameter is taken as it lies; a gradient or state in another one than the parameter's, or memory with
        gaps between columns, is copied. `max_norm` reads the gradients once more.
    Determinism: same inputs give the same bits; a penalty of 0 leaves the bits of plain AdamW.
    CUDA graphs: with `capturable=True` and `set_penalties`, whose tensors may be overwritten in place between replays;
        not with a regularizer, whose schedule is the host's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        regularizer: S2D | None = None,
        impl: str | None = None,
    ) -> None:
        _refuse_amsgrad(amsgrad)
        self.impl = ops.check_impl(impl)
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, capturable=capturable, fused=True)
        self._penalties: list[Penalty] = []
        self._decoupled = False
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Any, Any]] = {}
        self._rates: dict[torch.device, Tensor] = {}
        self._clips: dict[torch.device, Tensor] = {}
        self.total_norm: Tensor | None = None
        self.regularizer: S2D | None = None
        if regularizer is not None:
            regularizer._fuse(self)
            self.regularizer = regularizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (
            *(("impl", None), ("_penalties", []), ("_decoupled", False)),
            *(("regularizer", None), ("total_norm", None), ("_tables", {}), ("_rates", {}), ("_clips", {})),
        ):
            self.__dict__.setdefault(name, value)
        for group in self.param_groups:
            _refuse_amsgrad(group["amsgrad"])
            group["fused"], group["foreach"], group["differentiable"] = True, None, False
            for param in group["params"]:
                if "step" in self.state.get(param, {}):  # the other AdamW forms keep it on the host
                    self.state[param]["step"] = self.state[param]["step"].to(param.device, torch.float32)
        self._step_supports_amp_scaling = True

    def set_penalties(self, penalties: Sequence[Penalty], *, mode: str = "coupled") -> None:
        """Penalties of the steps from now on, for a schedule of one's own; an `S2D` brings its own.

        Args:
            penalties: of distinct rows; an empty list ends them. Their tensors are read at each step.
            mode: "coupled" (the coefficients are strength * s^power) or "decoupled" (s_new - s_old).

        Raises:
            TypeError: a factor that is no tensor of floating point.
            ValueError: the optimizer has a regularizer; shapes that do not fit; rows that overlap; a parameter that is
                not this optimizer's, or has fewer than two dimensions; factors on another device.
        """
        if self.regularizer is not None:
            raise ValueError("this optimizer has a regularizer, which sets the penalties: detach it first")
        if mode not in ("coupled", "decoupled"):
            raise ValueError(f"mode={mode!r} is neither 'coupled' nor 'decoupled'")
        mine = {id(param) for group in self.param_groups for param in group["params"]}
        taken: dict[int, list[tuple[int, int]]] = {}
        for index, penalty in enumerate(penalties):
            param = penalty.parameter
            if id(param) not in mine:
                raise ValueError(f"penalties[{index}].parameter of shape {tuple(param.shape)} is not this optimizer's")
            if param.ndim < 2 or not param.numel():
                raise ValueError(f"penalties[{index}].parameter of shape {tuple(param.shape)} is no matrix")
            for name in ("U", "Vh", "coefficients"):
                ops.check_tensor(f"penalties[{index}].{name}", getattr(penalty, name), device=param.device)
            start, stop = _rows(penalty)
            k, n = len(penalty.coefficients), param[0].numel()
            if not 0 <= start <= stop <= len(param):
                raise ValueError(f"penalties[{index}] has rows {start}:{stop}, the parameter {len(param)}")
            if penalty.U.shape != (stop - start, k) or penalty.Vh.shape != (k, n):
                raise ValueError(
                    f"penalties[{index}] has U {tuple(penalty.U.shape)}, Vh {tuple(penalty.Vh.shape)} and {k} "
                    f"coefficients for rows {start}:{stop} of {n} columns"
                )
            if any(start < other_stop and other < stop for other, other_stop in taken.setdefault(id(param), [])):
                raise ValueError(f"penalties[{index}] has rows {start}:{stop}, of which some have a penalty already")
            taken[id(param)].append((start, stop))
        self._penalties, self._decoupled = list(penalties), mode == "decoupled"

    @_use_grad_for_differentiable
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip_coef: Tensor | None = None,
        clip_penalty: bool = False,
        max_norm: float | None = None,
    ) -> Any:
        """One step.

        Args:
            closure: reevaluates the model and returns the loss.
            clip_coef: one number on the device that multiplies the gradients; no `.grad` is written.
            clip_penalty: whether it multiplies a coupled penalty too: clip(grad + penalty), else clip(grad) + penalty.
            max_norm: instead of `clip_coef`, min(1, max_norm / (total_norm + 1e-6)) as in
                `torch.nn.utils.clip_grad_norm_`. The norm is that of all gradients, with `clip_penalty` of all
                gradients with their coupled penalties, which are not stored for it; `total_norm` keeps it.

        Raises:
            TypeError: `clip_coef` is no tensor of floating point.
            ValueError: both `clip_coef` and `max_norm`; a `max_norm` that is not positive; several numbers. Nothing
                has changed then.
        """
        if clip_coef is not None and ops.check_tensor("clip_coef", clip_coef).numel() != 1:
            raise ValueError(f"clip_coef has shape {tuple(clip_coef.shape)}: pass one number for all parameters")
        if max_norm is not None and (clip_coef is not None or not max_norm > 0):
            raise ValueError(
                f"max_norm={max_norm} with clip_coef={clip_coef}: pass one of them, and max_norm above 0 (inf measures)"
            )
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        regularizer = self.regularizer
        if regularizer is None:
            if max_norm is not None:
                clip_coef = self._clip_coef(self._penalties, self._decoupled, max_norm, clip_penalty, grad_scale)
            self._update(self._penalties, self._decoupled, clip_coef, clip_penalty, grad_scale, found_inf)
            return loss
        if ops.capturing(regularizer._side.device):
            raise ValueError(
                "the schedule of S2D runs on the host and cannot be captured in a CUDA graph: use set_penalties, and "
                "overwrite their tensors between the replays"
            )
        if found_inf is not None and bool(found_inf):
            return loss
        penalties = regularizer._begin_fused()
        decoupled = regularizer.mode == "decoupled"
        if max_norm is not None:
            clip_coef = self._clip_coef(penalties or [], decoupled, max_norm, clip_penalty, grad_scale)
        self._update(penalties or [], decoupled, clip_coef, clip_penalty, grad_scale, None)
        if penalties is not None:
            regularizer._end_step()
        return loss

    def _clip_coef(
        self,
        penalties: Sequence[Penalty],
        decoupled: bool,
        max_norm: float,
        clip_penalty: bool,
        grad_scale: Tensor | None,
    ) -> Tensor:
        of_parameter: dict[int, list[Penalty]] = {}
        if clip_penalty and not decoupled:
            for penalty in penalties:
                of_parameter.setdefault(id(penalty.parameter), []).append(penalty)
        plain: list[Tensor] = []
        penalized: list[PenalizedRows] = []
        signs = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if id(param) not in of_parameter:
                    plain.append(param.grad)
                    continue
                grad = param.grad.reshape(len(param), -1)
                for start, stop, part in _parts(of_parameter[id(param)], len(param)):
                    if part is None:
                        plain.append(grad[start:stop])
                        continue
                    penalized.append(PenalizedRows(grad[start:stop], part.U, part.Vh, part.coefficients))
                    signs.append(-1 if group["maximize"] else 1)
        if not plain and not penalized:
            self.total_norm = None
            return torch.ones((), device="cpu")
        first = (plain or [rows.grad for rows in penalized])[0]
        with ops.exact_arithmetic(first.device):
            self.total_norm = total_norm(plain, penalized, signs, grad_scale)
            coefficient = (max_norm / (self.total_norm + 1e-6)).clamp(max=1.0)
            kept = self._clips.get(first.device)
            if kept is None:
                kept = self._clips[first.device] = torch.zeros((), dtype=torch.float32, device=first.device)
            return kept.copy_(coefficient)  # at one address, for CUDA graphs

    def _update(
        self,
        penalties: Sequence[Penalty],
        decoupled: bool,
        clip_coef: Tensor | None,
        clip_penalty: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        entries: dict[tuple[torch.device, torch.dtype], list[_Entry]] = {}
        steps: dict[torch.device, list[Tensor]] = {}
        copied: list[tuple[Tensor, Tensor]] = []
        numbers: list[float] = []
        rates = []
        for place, group in enumerate(self.param_groups):
            lr = group["lr"]
            on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
            rates.append(lr)
            numbers += [0.0 if on_device else float(lr), *map(_to_scalar, group["betas"])]
            numbers += [group["eps"], group["weight_decay"], float(group["maximize"])]
            lists: list[list[Tensor]] = [[], [], [], [], [], []]
            if self._init_group(group, *lists):
                raise TypeError("SpectralAdamW takes no complex parameters: pass torch.view_as_real of them")
            for param, grad, exp_avg, exp_avg_sq, step in zip(*lists[:4], lists[5], strict=True):
                found = entries.setdefault((param.device, param.dtype), [])
                found.append((param, grad, exp_avg, exp_avg_sq, step, place))
                steps.setdefault(param.device, []).append(step)
        for counts in steps.values():
            torch._foreach_add_(counts, 1)
        for (device, dtype), some in entries.items():
            lrs = self._rates_on(device, rates)
            scalars = [_on(device, scalar) for scalar in (clip_coef, grad_scale, found_inf)]
            rest = (numbers, lrs, *scalars, decoupled, clip_penalty)
            self._update_alike(device, dtype, some, penalties, copied, rest)
        if found_inf is not None:
            for device, counts in steps.items():
                torch._foreach_sub_(counts, [found_inf.to(device, torch.float32).reshape(())] * len(counts))
        for target, copy in copied:
            target.copy_(copy.reshape(target.shape))

    def _rates_on(self, device: torch.device, rates: list[float | Tensor]) -> Tensor | None:
        """Learning rates `[groups]` on the device where one is a tensor there; at one address, for CUDA graphs."""
        if not any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates):
            return None
        kept = self._rates.get(device)
        if kept is None or len(kept) != len(rates):
            kept = self._rates[device] = torch.empty(len(rates), dtype=torch.float32, device=device)
        for place, lr in zip(kept, rates, strict=True):
            if isinstance(lr, Tensor):
                place.copy_(lr.reshape(()), non_blocking=True)
            else:
                place.fill_(lr)
        return kept

    def _update_alike(
        self,
        device: torch.device,
        dtype: torch.dtype,
        entries: list[_Entry],
        penalties: Sequence[Penalty],
        copied: list[tuple[Tensor, Tensor]],
        rest: tuple[Any, ...],
    ) -> None:
        """The tensors of one device and dtype. What the host prepares is kept while no address changes."""
        marshal, launch = ADDRESS_TABLES.get(ops.choose("adamw_", self.impl, device), (None, None))
        key: list[Any] | None = None
        if marshal is not None and all(tensor.is_contiguous() for entry in entries for tensor in entry[:4]):
            key = [
                *((*(tensor.data_ptr() for tensor in entry[:5]), entry[0].shape, entry[5]) for entry in entries),
                *((id(p.parameter), p.start, p.stop, *map(_where, p[3:])) for p in penalties),
            ]
        known = self._tables.get((device, dtype))
        if key is None or known is None or known[0] != key:
            of_parameter: dict[int, list[Penalty]] = {}
            for penalty in penalties:
                of_parameter.setdefault(id(penalty.parameter), []).append(penalty)
            blocks = []
            for entry in entries:
                blocks += _blocks(entry[:4], entry[4], entry[5], of_parameter.get(id(entry[0]), []), copied)
            views = [list(column) for column in zip(*(block.views for block in blocks), strict=True)]
            others: list[list[Tensor]] = [
                [block.step for block in blocks],
                [block.U for block in blocks],
                [block.Vh for block in blocks],
                [block.coefficients for block in blocks],
            ]
            groups = [block.group for block in blocks]
            table = None
            if key is not None and ops.choose("adamw_", self.impl, device, (*views, *others)) in ADDRESS_TABLES:
                table = marshal(*views, *others, groups)  # type: ignore[misc]
            if table is None:
                torch.ops.s2d.adamw_(*views, *others, None, groups, *rest, self.impl)
                return
            known = self._tables[device, dtype] = key, table
        with ops.exact_arithmetic(device):
            launch(entries[0][0], known[1], *rest)  # type: ignore[misc]
        for param, _, exp_avg, exp_avg_sq, _, _ in entries:
            torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


def _refuse_amsgrad(amsgrad: bool) -> None:
    if amsgrad:
        raise ValueError("amsgrad=True is not supported here: use torch.optim.AdamW with reg.attach(optimizer)")


def _where(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    """What a kernel is told of a tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True).reshape(())


def _rows(penalty: Penalty) -> tuple[int, int]:
    return penalty.start, len(penalty.parameter) if penalty.stop is None else penalty.stop


def _parts(penalties: Sequence[Penalty], rows: int) -> Iterator[tuple[int, int, Penalty | None]]:
    """All rows of a parameter in their order: those with a penalty, and those between and after them with None."""
    end = 0
    for penalty in sorted(penalties, key=_rows):
        start, stop = _rows(penalty)
        if end < start:
            yield end, start, None
        yield start, stop, penalty
        end = stop
    if end < rows:
        yield end, rows, None


def _blocks(
    tensors: tuple[Tensor, ...],
    step: Tensor,
    group: int,
    penalties: Sequence[Penalty],
    copied: list[tuple[Tensor, Tensor]],
) -> list[_Block]:
    """The matrices of one parameter, given with its gradient and state: those with a penalty, and the rows between."""
    param = tensors[0]
    strides = param.stride()
    if not penalties:
        if all(tensor.is_contiguous() for tensor in tensors):
            views = [tensor.view(1, -1) for tensor in tensors]
        else:
            views = _matrices(tensors, sorted(range(param.ndim), key=lambda d: -strides[d]), copied)
        return [_block(views, step, group, None)]
    if param.ndim == 2 and strides[0] == 1 < strides[1]:
        return _transposed_blocks(tensors, step, group, penalties, copied)
    # Columns in the order in which they lie in memory, so that a channels_last kernel is a matrix too.
    order = sorted(range(1, param.ndim), key=lambda d: -strides[d])
    views = _matrices(tensors, [0, *order], copied)
    found = []
    for start, stop, penalty in _parts(penalties, len(param)):
        if penalty is not None and order != sorted(order):
            Vh = penalty.Vh.reshape(len(penalty.Vh), *param.shape[1:]).permute(0, *order).flatten(1)
            penalty = penalty._replace(Vh=Vh)
        found.append(_block([view[start:stop] for view in views], step, group, penalty))
    return found


def _transposed_blocks(
    tensors: tuple[Tensor, ...],
    step: Tensor,
    group: int,
    penalties: Sequence[Penalty],
    copied: list[tuple[Tensor, Tensor]],
) -> list[_Block]:
    """`_blocks` of a matrix whose columns lie one after the other: those of its transpose, Vh^T diag(c) U^T."""
    views = _matrices(tuple(tensor.mT for tensor in tensors), (0, 1), copied)
    found = []
    for start, stop, penalty in _parts(penalties, len(tensors[0])):
        if penalty is not None:
            penalty = penalty._replace(U=penalty.Vh.mT, Vh=penalty.U.mT)
        found.append(_block([view[:, start:stop] for view in views], step, group, penalty))
    return found


def _block(views: Sequence[Tensor], step: Tensor, group: int, penalty: Penalty | None) -> _Block:
    param, grad, exp_avg, exp_avg_sq = views
    if penalty is None:
        nothing = param.new_empty(0)
        factors = nothing.as_strided((len(param), 0), (1, 1)), nothing.as_strided((0, param.shape[1]), (1, 1)), nothing
    else:
        factors = penalty.U, penalty.Vh, penalty.coefficients
    return _Block((param, grad, exp_avg, exp_avg_sq), step, group, *factors)


def _matrices(tensors: tuple[Tensor, ...], order: Sequence[int], copied: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """param, grad, exp_avg and exp_avg_sq as matrices, dimensions permuted; a copy of what cannot be viewed as one.

    Columns are contiguous, the state is laid out as the parameter. Copies of what the step writes are noted in
    `copied`.
    """
    param, grad, *state = (tensor.permute(*order) for tensor in tensors)
    matrix = _merged(param)
    if matrix is None:
        matrix = param.clone(memory_format=torch.contiguous_format).view(len(param), -1)
        copied.append((param, matrix))
    strides = matrix.stride()
    grad = grad.reshape(matrix.shape)
    result = [matrix, grad if contiguous_columns(grad) else grad.contiguous()]
    for tensor in state:
        view = _merged(tensor)
        if view is None or view.stride() != strides:
            view = torch.empty_strided(matrix.shape, strides, dtype=tensor.dtype, device=tensor.device)
            view.copy_(tensor.reshape(matrix.shape))
            copied.append((tensor, view))
        result.append(view)
    return result


def _merged(tensor: Tensor) -> Tensor | None:
    """A view `[rows, columns]`: the first dimension, and all others merged; None where its columns lie apart."""
    if tensor.ndim == 0:
        return tensor.view(1, 1)
    if tensor.ndim == 1:
        return tensor.unsqueeze(1) if tensor.stride(0) != 1 and len(tensor) > 1 else tensor.unsqueeze(0)
    try:
        view = tensor.view(len(tensor), -1)
    except RuntimeError:
        return None
    return view if contiguous_columns(view) else None
