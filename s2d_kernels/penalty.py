"""`add_penalty_grad_`: the low-rank penalty gradient added to all layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.rounding import (
    check_rounding,
    check_seeds,
    layer_seeds,
    refuse_fp16,
    row_keys,
    stochastically_rounded,
)
from s2d_kernels.svd import NON_FINITE, OVERFLOW, TopkSVD

# Below this product of the largest elements of both sides no sum over a rank overflows fp32.
SAFE_SIZE = 1e36
# Elements of a gradient that torch widens or sums at a time: so many stay in a CPU's cache; on a GPU a launch must cost
# less than the block.
BLOCK_ELEMENTS = 2**16
GPU_BLOCK_ELEMENTS = 2**22


def penalty_coefficients(S: Sequence[Tensor], *, strength: float, power: float) -> list[Tensor]:
    """strength * s^power of each component (eq. 6's gradient) for each `S [k]`; one that overflows counts as 0."""

    def of(s: Tensor) -> Tensor:
        c = strength * s.pow(power)
        return torch.where(c.isfinite(), c, 0.0)

    if S and S[0].device.type == "cuda" and len({s.dtype for s in S}) == 1:
        # One launch for all layers; not on a CPU, whose vectorized pow rounds by position.
        return list(of(torch.cat(list(S))).split([len(s) for s in S]))
    return [of(s) for s in S]


@torch.no_grad()
def penalty_status(factors: Sequence[TopkSVD], *, strength: float, power: float) -> Tensor:
    """Why `add_penalty_grad_` leaves out components of a layer: int32 `[layers]` on the factors' device.

    2 (NON_FINITE) where a factor holds NaN or Inf, or its own status says that the matrix did; else 4 (OVERFLOW) where
    strength * s^power of a component is not finite, which then counts as 0; else the status of the factors.
    """
    found = []
    for U, S, Vh, _, _, status, _ in factors:
        finite = U.isfinite().all() & S.isfinite().all() & Vh.isfinite().all() & (status != NON_FINITE)
        overflow = ~(strength * S.pow(power)).isfinite().all()
        found.append(torch.where(finite, torch.where(overflow, OVERFLOW, status), NON_FINITE).to(torch.int32))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int32, device="cpu")


@torch.no_grad()
def add_penalty_grad_(
    grads: Sequence[Tensor],
    factors: Sequence[TopkSVD],
    *,
    strength: float = 5e-4,
    power: float = 2.0,
    ranks: Sequence[int] | Tensor | None = None,
    coefficients: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
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
        rounding: of bf16 gradients, "nearest" or "stochastic": up or down with probabilities by which the expectation
            is the fp32 sum, so that many additions below bf16's resolution come out right, down to about 2^-22 of an
            element; below 2^-25 the fp32 sum itself loses them. fp32 and fp64 gradients have nothing to round.
        seed: of "stochastic", which needs one: an int64 tensor `[layers]` on the gradients' device, one of `[1]`, or an
            int of 0..2^63 - 1; layer i then has seed + i 0x9e3779b97f4a7c15 modulo 2^64. Give another one at each
            call. A captured CUDA graph reads a tensor at each replay: change it in place between replays, else each
            draws the same numbers, as it does from an int.
        impl: "reference", "torch", "cpu", "triton" or "cuda", as far as installed; None chooses. "triton" is captured
            in a CUDA graph only after a call with the same tensors: give `coefficients`, a contiguous seed `[layers]`
            if any, and no layer of rank 0 given as an int.

    Raises:
        TypeError: an element is no dense floating tensor, `ranks` no list.
        ValueError: lists of different lengths, shapes that do not fit, a rank outside 0..k; "stochastic" without a
            seed or with an fp16 gradient, a seed without it. Nothing is written then.

    A component whose strength * s^power is not finite counts as 0, and an element of the sum that is 0 or not finite
    changes no bit of the gradient (with impl="torch" a -0 may become 0; with "torch", "triton" and "cuda" a NaN may
    become another NaN); `penalty_status` tells which layers that concerns. Nothing to add, by strength, coefficients or
    ranks, changes no bit with "reference", "torch" and "cpu", and none but those of NaNs with "triton" and "cuda".

    Accuracy: the sum is formed in fp32 (fp64 for fp64) and rounded once to the gradient's dtype. With impl="torch" it
        is a matrix product, which `torch.set_float32_matmul_precision` may reduce. A finite sum never becomes infinite
        by "stochastic": above the largest bf16 number it becomes that.
    Determinism: same inputs give the same bits. The random numbers are functions of the layer's seed, the row and the
        column alone (`reference.rounding_bits`), on every implementation the same.
    """
    strength, power = ops.check_number("strength", strength), ops.check_number("power", power)
    stochastic = check_rounding(rounding)
    if stochastic != (seed is not None):
        raise ValueError(
            "rounding='stochastic' needs seed=, another one at each call"
            if stochastic
            else f"seed={seed!r} belongs to rounding='stochastic'"
        )
    grads = ops.check_tensor_list("grads", grads, ndim=2)
    ops.check_same_length(grads=grads, factors=factors)
    device_ranks = None
    if isinstance(ranks, Tensor):
        if ranks.shape != (len(grads),) or ranks.is_floating_point():
            raise ValueError(f"ranks must be an integer tensor [{len(grads)}], got {ranks.dtype} {tuple(ranks.shape)}")
        device_ranks = ranks
    elif ranks is not None:
        if not hasattr(ranks, "__len__") or isinstance(ranks, str | bytes):
            raise TypeError(f"ranks={ranks!r} must be a list of ints, one for each layer, or an integer tensor of them")
        ops.check_same_length(grads=grads, ranks=ranks)
    if coefficients is not None:
        ops.check_same_length(grads=grads, coefficients=coefficients)
    device = next((t.device for t in (*grads, seed) if isinstance(t, Tensor)), torch.device("cpu"))
    for index, (grad, factor) in enumerate(zip(grads, factors, strict=True)):
        if not isinstance(factor, TopkSVD):
            raise TypeError(f"factors[{index}] must be a TopkSVD, got {type(factor).__name__}")
        k = factor.S.shape[0]
        if factor.U.shape != (grad.shape[0], k) or factor.Vh.shape != (k, grad.shape[1]):
            raise ValueError(
                f"factors[{index}] has U {tuple(factor.U.shape)} and Vh {tuple(factor.Vh.shape)}, "
                f"which do not fit grads[{index}] of shape {tuple(grad.shape)}"
            )
        if not grad.is_contiguous() and _overlaps(grad):
            raise ValueError(
                f"grads[{index}] overlaps itself in memory (shape {tuple(grad.shape)}, stride {grad.stride()}): pass a "
                "tensor with its own memory"
            )
        if coefficients is not None:
            ops.check_tensor(f"coefficients[{index}]", coefficients[index], device=device)
            if coefficients[index].shape != (k,):
                raise ValueError(
                    f"coefficients[{index}] must have shape ({k},), got {tuple(coefficients[index].shape)}"
                )
        for name, tensor in (("U", factor.U), ("S", factor.S), ("Vh", factor.Vh)):
            ops.check_tensor(f"factors[{index}].{name}", tensor, device=device)
        if stochastic:
            refuse_fp16(f"grads[{index}]", grad)
    seeds = layer_seeds(seed, len(grads), device) if stochastic else None
    cs = (
        penalty_coefficients([factor.S for factor in factors], strength=strength, power=power)
        if coefficients is None
        else coefficients
    )
    touched: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    places = []
    for index, (grad, factor, c) in enumerate(zip(grads, factors, cs, strict=True)):
        rank = k = factor.S.shape[0]
        if ranks is not None and device_ranks is None:
            rank = ops.check_integer(f"ranks[{index}]", ranks[index], low=0, high=k)
        if rank and grad.numel():
            some = (factor.U, factor.Vh, c) if rank == k else (factor.U[:, :rank], factor.Vh[:rank], c[:rank])
            touched.append((grad, *some))
            places.append(index)
    if not touched:
        return
    gs, Us, Vhs, cs = (list(column) for column in zip(*touched, strict=True))
    if device_ranks is not None:
        device_ranks = device_ranks.to(gs[0].device, torch.int32)
        if len(places) < len(grads):
            device_ranks = torch.stack([device_ranks[place] for place in places])
    if seeds is not None and len(places) < len(grads):
        seeds = torch.stack([seeds[place] for place in places])
    torch.ops.s2d.add_penalty_grad_(gs, Us, Vhs, cs, device_ranks, impl, seeds=seeds)


def _overlaps(matrix: Tensor) -> bool:
    """Whether two elements of a matrix share memory."""
    (outer_stride, outer), (inner_stride, inner) = sorted(zip(matrix.stride(), matrix.shape, strict=True), reverse=True)
    return (inner > 1 and inner_stride == 0) or (outer > 1 and outer_stride < inner_stride * (inner - 1) + 1)


def check_layers(
    grads: Sequence[Tensor],
    Us: Sequence[Tensor],
    Vhs: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    ranks: Tensor | None,
    seeds: Tensor | None = None,
) -> None:
    """For the implementations that read raw pointers: what does not fit must not get that far."""
    ops.check_same_length(grads=grads, U=Us, Vh=Vhs, coefficients=coefficients)
    check_seeds(grads, seeds)
    device = grads[0].device
    for index, (grad, U, Vh, c) in enumerate(zip(grads, Us, Vhs, coefficients, strict=True)):
        ops.check_tensor(f"grads[{index}]", grad, ndim=2, device=device)
        k = len(ops.check_tensor(f"coefficients[{index}]", c, ndim=1, device=device))
        for name, tensor, shape in (("U", U, (grad.shape[0], k)), ("Vh", Vh, (k, grad.shape[1]))):
            ops.check_tensor(f"{name}[{index}]", tensor, ndim=2, device=device)
            if tensor.shape != shape:
                raise ValueError(
                    f"{name}[{index}] has shape {tuple(tensor.shape)}, which does not fit grads[{index}] "
                    f"{tuple(grad.shape)} and coefficients[{index}] {tuple(c.shape)}"
                )
    if ranks is not None:
        ops.check_tensor("ranks", ranks, ndim=1, dtypes=(torch.int32,), device=device)
        ops.check_same_length(grads=grads, ranks=ranks)  # type: ignore[arg-type]


class LowRank(NamedTuple):
    """What is added to a gradient, left `[m, r]` right `[r, n]`, in the dtype of the sum.

    `guarded`: elements of the product that are 0 or not finite must not change a bit of the gradient.
    """

    left: Tensor
    right: Tensor
    guarded: bool


def masked(coefficients: list[Tensor], ranks: Tensor | None) -> list[Tensor]:
    """Coefficients with zeros beyond each layer's rank."""
    if ranks is None:
        return coefficients
    return [
        torch.where(torch.arange(len(c), device=c.device) < rank, c, 0.0)
        for c, rank in zip(coefficients, ranks, strict=True)
    ]


def screened(
    dtypes: Sequence[torch.dtype],
    Us: Sequence[Tensor],
    Vhs: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    *,
    split: bool = False,
) -> list[LowRank | None]:
    """The sums for gradients of `dtypes`; None where there is nothing to add.

    On a CPU one look at all factors tells which layers need no guard; on a GPU it would be a synchronization. With
    `split`, unguarded ones for bf16 come as a product of three times the rank in bf16, exact to 2^-16: torch sums bf16
    products in fp32 and rounds once.
    """
    if not Us or Us[0].device.type != "cpu":
        sides = zip(Us, Vhs, coefficients, map(_sum_dtype, dtypes), strict=True)
        return [LowRank((U * c).to(dtype), Vh.to(dtype), True) for U, Vh, c, dtype in sides]
    alike: dict[tuple[int, torch.dtype, torch.dtype], list[int]] = {}
    for index, (U, dtype) in enumerate(zip(Us, dtypes, strict=True)):
        alike.setdefault((U.shape[1], dtype, U.dtype), []).append(index)
    found: list[LowRank | None] = [None] * len(Us)
    for (_, dtype, _), members in alike.items():
        of_members = ([column[i] for i in members] for column in (Us, Vhs, coefficients))
        for index, low_rank in zip(members, _of_one_rank(dtype, *of_members, split=split), strict=True):
            found[index] = low_rank
    return found


def _of_one_rank(
    dtype: torch.dtype, Us: list[Tensor], Vhs: list[Tensor], coefficients: list[Tensor], *, split: bool
) -> list[LowRank | None]:
    """`screened` for layers of one rank and dtype, in a few operations on all: the calls cost more than the sums."""
    sum_dtype, cs = _sum_dtype(dtype), torch.stack(coefficients)
    rows, columns = [U.shape[0] for U in Us], [Vh.shape[1] for Vh in Vhs]
    left = _as(torch.cat(Us), sum_dtype)
    left *= _as(cs, sum_dtype).repeat_interleave(torch.tensor(rows, device="cpu"), 0)
    right = _as(torch.cat(Vhs, 1), sum_dtype)
    nothing = (cs == 0).all(1).tolist()
    if not _largest(left) * _largest(right) < SAFE_SIZE:
        pairs = zip(nothing, left.split(rows), right.split(columns, 1), strict=True)
        return [None if zero else LowRank(a, b, not _largest(a) * _largest(b) < SAFE_SIZE) for zero, a, b in pairs]
    rights = [_as(Vh, sum_dtype) for Vh in Vhs]
    if split and dtype == torch.bfloat16:
        high, high_right = left.bfloat16(), right.bfloat16()
        low, low_right = left.sub_(high).bfloat16(), right.sub_(high_right).bfloat16()
        left = torch.cat([high, low, high], 1)
        rights = list(torch.cat([high_right, high_right, low_right]).split(columns, 1))
    sides = zip(nothing, left.split(rows), rights, strict=True)
    return [None if zero else LowRank(a, b, False) for zero, a, b in sides]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # the call alone is a microsecond a layer


def _largest(tensor: Tensor) -> float:
    """max |element|, NaN where one is NaN, on the host."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def rows_of_a_block(grad: Tensor) -> int:
    """How many rows of a gradient `[m, n]` torch works on at a time."""
    elements = BLOCK_ELEMENTS if grad.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, elements // max(grad.shape[1], 1))


def added(grad: Tensor, low_rank: LowRank) -> Tensor:
    """grad + left right, in the dtype of the sum; a new tensor."""
    return _added(grad, low_rank)[0]


def _added(grad: Tensor, low_rank: LowRank) -> tuple[Tensor, Tensor | None]:
    """`added`, and where guarded which elements are changed; None: all."""
    left, right, guarded = low_rank
    grad = grad.to(left.dtype)
    if not guarded:
        return torch.addmm(grad, left, right), None
    change = left @ right
    usable = change.isfinite() & (change != 0)
    return torch.where(usable, grad + change, grad), usable


def _write(grad: Tensor, total: Tensor, usable: Tensor | None) -> None:
    """Round to the gradient's dtype. What is not changed is not written: a NaN that is widened comes back another."""
    grad.copy_(total if usable is None else torch.where(usable, total.to(grad.dtype), grad))


@ops.implements("add_penalty_grad_", "reference")
def _add_reference(
    grads: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    *,
    seeds: Tensor | None = None,
) -> None:
    check_seeds(grads, seeds)
    for index, (grad, U, Vh, c) in enumerate(zip(grads, Us, Vhs, masked(coefficients, ranks), strict=True)):
        total, usable = _added(grad, LowRank(U.double() * c.double(), Vh.double(), True))
        if seeds is not None and grad.dtype == torch.bfloat16:
            total = reference.stochastically_rounded(total.float(), seeds[index])
        _write(grad, total, usable)


@ops.implements("add_penalty_grad_", "torch")
def _add_torch(
    grads: list[Tensor],
    Us: list[Tensor],
    Vhs: list[Tensor],
    coefficients: list[Tensor],
    ranks: Tensor | None,
    *,
    seeds: Tensor | None = None,
) -> None:
    check_seeds(grads, seeds)
    low_ranks = screened([grad.dtype for grad in grads], Us, Vhs, masked(coefficients, ranks), split=seeds is None)
    for index, (grad, low_rank) in enumerate(zip(grads, low_ranks, strict=True)):
        if low_rank is None:
            continue
        keys = None
        if seeds is not None and grad.dtype == torch.bfloat16:
            keys = row_keys(seeds[index], grad.shape[0])
        left, right, guarded = low_rank
        if not guarded and grad.dtype == left.dtype:
            grad.addmm_(left, right)
            continue
        rows = rows_of_a_block(grad)
        for first in range(0, grad.shape[0], rows):
            block = grad[first : first + rows]
            total, usable = _added(block, LowRank(left[first : first + rows], right, guarded))
            if keys is not None:
                total = stochastically_rounded(total, keys[first : first + rows])
            _write(block, total, usable)
