"""`add_penalty_grad_`: the low-rank penalty gradient added to all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.svd import TopkSVD


def penalty_coefficients(factors: TopkSVD, *, strength: float, power: float) -> Tensor:
    """strength * s^power of each component `[k]` (eq. 6's gradient); one that overflows counts as 0."""
    coefficients = strength * factors.S.pow(power)
    return torch.where(coefficients.isfinite(), coefficients, 0.0)


@torch.no_grad()
def add_penalty_grad_(
    grads: Sequence[Tensor],
    factors: Sequence[TopkSVD],
    *,
    strength: float = 5e-4,
    power: float = 2.0,
    ranks: Sequence[int] | Tensor | None = None,
    coefficients: Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> None:
    """Add strength * U_r diag(s_r^power) Vh_r to each gradient, in place (gradient of eq. 6; algorithm 1, line 20).

    Args:
        grads: list of `[m, n]` fp32, bf16, fp16 or fp64 tensors, one device; strided views are fine.
        factors: one `TopkSVD` a gradient, with `U [m, k]`, `S [k]`, `Vh [k, n]`.
        strength: lambda.
        power: n, the exponent on the singular values.
        ranks: how many leading components count, per layer: ints, or an integer tensor `[layers]` that is read on
            its device. Default all. Layers of rank 0 given as ints cost nothing.
        coefficients: per layer a tensor `[k]` used instead of strength * s^power (the decoupled form passes
            s_new - s_old and the weights as `grads`).
        impl: "reference", "torch", or None to choose.

    Raises:
        TypeError: an element is no dense floating tensor.
        ValueError: lists of different lengths, shapes that do not fit, a rank outside 0..k. Nothing is written then.

    Accuracy: the sum is formed in fp32 (fp64 for fp64) and rounded once to the gradient's dtype.
    Determinism: same inputs give the same bits.
    """
    strength, power = ops.check_number("strength", strength), ops.check_number("power", power)
    grads = ops.check_tensor_list("grads", grads, ndim=2)
    ops.check_same_length(grads=grads, factors=factors)
    if isinstance(ranks, Tensor):
        if ranks.shape != (len(grads),) or ranks.is_floating_point():
            raise ValueError(f"ranks must be an integer tensor [{len(grads)}], got {ranks.dtype} {tuple(ranks.shape)}")
    elif ranks is not None:
        ops.check_same_length(grads=grads, ranks=ranks)
    if coefficients is not None:
        ops.check_same_length(grads=grads, coefficients=coefficients)

    touched: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for index, (grad, factor) in enumerate(zip(grads, factors, strict=True)):
        if not isinstance(factor, TopkSVD):
            raise TypeError(f"factors[{index}] must be a TopkSVD, got {type(factor).__name__}")
        k = factor.S.shape[0]
        if factor.U.shape != (grad.shape[0], k) or factor.Vh.shape != (k, grad.shape[1]):
            raise ValueError(
                f"factors[{index}] has U {tuple(factor.U.shape)} and Vh {tuple(factor.Vh.shape)}, "
                f"which do not fit grads[{index}] of shape {tuple(grad.shape)}"
            )
        if _overlaps(grad):
            raise ValueError(
                f"grads[{index}] overlaps itself in memory (shape {tuple(grad.shape)}, stride {grad.stride()}): pass a "
                "tensor with its own memory"
            )
        c = (
            penalty_coefficients(factor, strength=strength, power=power)
            if coefficients is None
            else coefficients[index]
        )
        if c.shape != (k,):
            raise ValueError(f"coefficients[{index}] must have shape ({k},), got {tuple(c.shape)}")
        rank = k
        if isinstance(ranks, Tensor):
            c = torch.where(torch.arange(k, device=c.device) < ranks[index], c, 0.0)
        elif ranks is not None:
            rank = ops.check_integer(f"ranks[{index}]", ranks[index], low=0, high=k)
        if rank and grad.numel():
            touched.append((grad, factor.U[:, :rank], factor.Vh[:rank], c[:rank]))
    if touched:
        gs, Us, Vhs, cs = (list(column) for column in zip(*touched, strict=True))
        torch.ops.s2d.add_penalty_grad_(gs, Us, Vhs, cs, impl)


def _overlaps(matrix: Tensor) -> bool:
    """Whether two elements of a matrix share memory."""
    (outer_stride, outer), (inner_stride, inner) = sorted(zip(matrix.stride(), matrix.shape, strict=True), reverse=True)
    return (inner > 1 and inner_stride == 0) or (outer > 1 and outer_stride < inner_stride * (inner - 1) + 1)


@ops.implements("add_penalty_grad_", "reference")
def _add_reference(grads: list[Tensor], Us: list[Tensor], Vhs: list[Tensor], coefficients: list[Tensor]) -> None:
    for grad, U, Vh, c in zip(grads, Us, Vhs, coefficients, strict=True):
        grad.copy_(grad.double() + (U.double() * c.double()) @ Vh.double())


@ops.implements("add_penalty_grad_", "torch")
def _add_torch(grads: list[Tensor], Us: list[Tensor], Vhs: list[Tensor], coefficients: list[Tensor]) -> None:
    for grad, U, Vh, c in zip(grads, Us, Vhs, coefficients, strict=True):
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        scaled, Vh = (U * c).to(dtype), Vh.to(dtype)
        if grad.dtype == dtype:
            grad.addmm_(scaled, Vh)
        else:
            grad.copy_(torch.addmm(grad.to(dtype), scaled, Vh))
