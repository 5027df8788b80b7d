"""impl="cuda" of `adamw_`: tensors to `s2d_adamw` of csrc/s2d.h, on the current stream of their device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from s2d_kernels import _native, ops
from s2d_kernels.adamw import ADDRESS_TABLES
from s2d_kernels.adamw_tables import address, address_table, group_rows, step_tables, supports_step
from s2d_kernels.cuda_ops import current_stream


@ops.implements("adamw_", "cuda", supports_step)
def _adamw_cuda(
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
    """One launch for up to `MAX_GROUPS` parameter groups and 208 tensors. No two tensors may share memory."""
    scalars = (clip_coef, grad_scale, found_inf)
    if lrs is not None:
        lrs = lrs.contiguous()
    # The converted copies live until the launch is enqueued; the allocator reuses their memory on the same stream only.
    layers, _kept = step_tables(
        params, grads, exp_avgs, exp_avg_sqs, steps, Us, Vhs, coefficients, ranks, groups, numbers, lrs, scalars
    )
    _launch(params[0], layers, numbers, lrs, *scalars, decoupled, clip_penalty)


def _launch(
    param: Tensor,
    layers: list[_native.AdamWLayer],
    numbers: Sequence[float],
    lrs: Tensor | None,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decoupled: bool,
    clip_penalty: bool,
) -> None:
    context, stream = current_stream(param)
    hyper = group_rows(numbers, lrs)
    options = _native.AdamWOptions(*map(address, (clip_coef, grad_scale, found_inf)), decoupled, clip_penalty)
    most = _native.MAX_GROUPS
    with context:
        if len(hyper) <= most:
            _native.adamw(layers, hyper, options, stream)
            return
        for first in range(0, len(hyper), most):
            part = []
            for layer in layers:
                if first <= layer.group < first + most:
                    part.append(_native.AdamWLayer.from_buffer_copy(layer))
                    part[-1].group -= first
            _native.adamw(part, hyper[first : first + most], options, stream)


ADDRESS_TABLES["cuda"] = address_table, _launch
