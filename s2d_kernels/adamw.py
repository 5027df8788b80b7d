"""`adamw_`: one AdamW step of all tensors with the low-rank penalty of each; what `optim.SpectralAdamW` is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.penalty import added, masked, screened

# lr, beta1, beta2, eps, weight_decay, maximize
NUMBERS_PER_GROUP = 6
# impl -> (marshal, launch), where the table of addresses can be kept as long as no address changes: `marshal` takes the
# lists up to `coefficients` and `groups` and gives None for tensors that would have to be converted at each step;
# `launch` takes a parameter, the table, and the operation's arguments from `numbers` on.
ADDRESS_TABLES: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def contiguous_columns(matrix: Tensor) -> bool:
    """What the kernels need of parameters and gradients."""
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    Us: Sequence[Tensor],
    Vhs: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    ranks: Tensor | None,
    groups: Sequence[int],
    numbers: Sequence[float],
    lrs: Tensor | None,
    scalars: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
) -> None:
    """For the implementations that read raw pointers: what does not fit must not get that far."""
    ops.check_same_length(
        params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps, U=Us, Vh=Vhs,
        coefficients=coefficients, groups=groups,
    )  # fmt: skip
    device, count = params[0].device, len(numbers) // NUMBERS_PER_GROUP
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, groups, strict=True)
    for index, (param, grad, m, v, step, U, Vh, c, group) in enumerate(tensors):
        ops.check_tensor(f"params[{index}]", param, ndim=2, dtypes=dtypes, device=device)
        for name, tensor in (("grads", grad), ("exp_avgs", m), ("exp_avg_sqs", v)):
            ops.check_tensor(f"{name}[{index}]", tensor, ndim=2, dtypes=(param.dtype,), device=device)
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{index}] has shape {tuple(tensor.shape)}, params[{index}] {tuple(param.shape)}"
                )
        for name, tensor in (("exp_avgs", m), ("exp_avg_sqs", v)):
            if _taken(tensor) != _taken(param):
                raise ValueError(
                    f"{name}[{index}] has stride {tensor.stride()}, params[{index}] {param.stride()}: lay the state "
                    "out as the parameter is"
                )
        ops.check_tensor(f"steps[{index}]", step, dtypes=(torch.float32,), device=device)
        k = len(ops.check_tensor(f"coefficients[{index}]", c, ndim=1, device=device))
        for name, tensor, shape in (("U", U, (param.shape[0], k)), ("Vh", Vh, (k, param.shape[1]))):
            ops.check_tensor(f"{name}[{index}]", tensor, ndim=2, device=device)
            if tensor.shape != shape:
                raise ValueError(f"{name}[{index}] has shape {tuple(tensor.shape)}, expected {shape}")
        if not 0 <= group < count:
            raise ValueError(f"groups[{index}]={group} must lie in 0..{count - 1}")
    if ranks is not None:
        ops.check_tensor("ranks", ranks, ndim=1, dtypes=(torch.int32,), device=device)
        ops.check_same_length(params=params, ranks=ranks)  # type: ignore[arg-type]
    for name, scalar in zip(("lrs", "clip_coef", "grad_scale", "found_inf"), (lrs, *scalars), strict=True):
        if scalar is not None:
            ops.check_tensor(name, scalar, dtypes=(torch.float32,), device=device)


def _taken(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _grad_factor(clip_coef: Tensor | None, grad_scale: Tensor | None) -> Tensor | None:
    if grad_scale is None:
        return clip_coef
    return grad_scale.reciprocal() if clip_coef is None else clip_coef / grad_scale


@ops.implements("adamw_", "reference")
def _adamw_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    groups: list[int],
    numbers: list[float],
    lrs: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decoupled: bool,
    clip_penalty: bool,
) -> None:
    """The formula of csrc/adamw.cu in fp64."""
    if found_inf is not None and bool(found_inf):
        return
    clip = 1.0 if clip_coef is None else clip_coef.double()
    scale = 1.0 if grad_scale is None else grad_scale.double()
    cs = masked(coefficients, ranks)
    for param, grad, exp_avg, exp_avg_sq, step, U, Vh, c, group in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, cs, groups, strict=True
    ):
        lr, beta1, beta2, eps, weight_decay, maximize = numbers[NUMBERS_PER_GROUP * group :][:NUMBERS_PER_GROUP]
        rate = lr if lrs is None else lrs[group].double()
        penalty = (U.double() * c.double()) @ Vh.double()
        penalty = torch.where(penalty.isfinite(), penalty, 0.0)
        g = grad.double() * (-clip if maximize else clip) / scale
        if not decoupled:
            g = g + penalty * (clip if clip_penalty else 1.0)
        p = param.double() * (1 - rate * weight_decay)
        m = beta1 * exp_avg.double() + (1 - beta1) * g
        v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
        t = step.double()
        p = p - rate / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t).sqrt() + eps)
        param.copy_(p + penalty if decoupled else p)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


@ops.implements("adamw_", "torch")
def _adamw_torch(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    groups: list[int],
    numbers: list[float],
    lrs: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decoupled: bool,
    clip_penalty: bool,
) -> None:
    """torch's fused AdamW; a gradient that changes on the way is a copy, one layer at a time."""
    factor = _grad_factor(clip_coef, grad_scale)
    together: dict[tuple[int, torch.dtype], list[int]] = {}
    penalized = [index for index, c in enumerate(coefficients) if len(c)]
    penalties = dict(
        zip(
            penalized,
            screened(
                [params[i].dtype for i in penalized],
                [Us[i] for i in penalized],
                [Vhs[i] for i in penalized],
                [c for i, c in enumerate(masked(coefficients, ranks)) if len(coefficients[i])],
            ),
            strict=True,
        )
    )

    def run(
        group: int, ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], vs: list[Tensor], ts: list[Tensor], sign: bool
    ) -> None:
        lr, beta1, beta2, eps, weight_decay, _ = numbers[NUMBERS_PER_GROUP * group :][:NUMBERS_PER_GROUP]
        rate: Any = lr if lrs is None else lrs[group]  # torch has an overload for each
        torch._fused_adamw_(
            ps, gs, ms, vs, [], ts, lr=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            amsgrad=False, maximize=sign, grad_scale=None, found_inf=found_inf,
        )  # fmt: skip

    for index, (param, grad, group) in enumerate(zip(params, grads, groups, strict=True)):
        low_rank = penalties.get(index)
        tensors = (param, grad, exp_avgs[index], exp_avg_sqs[index])
        if (decoupled or low_rank is None) and factor is None and _same_dense_layout(tensors):
            together.setdefault((group, param.dtype), []).append(index)
            continue
        maximize = bool(numbers[NUMBERS_PER_GROUP * group + 5])
        g = grad if factor is None else grad * factor.to(grad.dtype if grad.dtype == torch.float64 else torch.float32)
        if low_rank is not None and not decoupled:
            if clip_penalty and clip_coef is not None:
                low_rank = low_rank._replace(left=low_rank.left * clip_coef.to(low_rank.left.dtype))
            g, maximize = added(-g if maximize else g, low_rank), False
        g = g.to(param.dtype)
        if _same_dense_layout((param, g, exp_avgs[index], exp_avg_sqs[index])):
            run(group, [param], [g], [exp_avgs[index]], [exp_avg_sqs[index]], [steps[index]], maximize)
            continue
        # torch's kernel walks through memory as if there were no strides.
        p, g, m, v = (t.contiguous() for t in (param, g, exp_avgs[index], exp_avg_sqs[index]))
        run(group, [p], [g], [m], [v], [steps[index]], maximize)
        for place, copy in ((param, p), (exp_avgs[index], m), (exp_avg_sqs[index], v)):
            if copy is not place:
                place.copy_(copy)
    for (group, _), places in together.items():
        ps, gs, ms, vs, ts = ([some[i] for i in places] for some in (params, grads, exp_avgs, exp_avg_sqs, steps))
        run(group, ps, gs, ms, vs, ts, bool(numbers[NUMBERS_PER_GROUP * group + 5]))
    if decoupled:
        for index, low_rank in penalties.items():
            if low_rank is None:
                continue
            if found_inf is not None:
                left = low_rank.left * (found_inf == 0).to(low_rank.left.dtype)
                low_rank = low_rank._replace(left=left, guarded=True)
            params[index].copy_(added(params[index], low_rank))


def _same_dense_layout(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    dense = first.is_contiguous() or first.mT.is_contiguous()
    return dense and all(_taken(one) == _taken(other) for one, other in pairwise(tensors))
