"""`topk_svd`: the leading singular triplets of many matrices at once, warm-started, with error statements.

The algorithm is block Krylov on the fused product Z = Q A^T A, one read of A a step. Blocks are kept as *rows*
(`Q [b, d]`): the thin products then run over contiguous memory on every backend. A is W, or W^T when W is wide, so
that the iteration lives on the smaller side d = min(m, n).

    Q_0 = orthonormalize(start)
    for each read j:   Y_j = Q_j A^T,   Z_j = Y_j A,   Q_{j+1} = orthonormalize(Z_j against Q_0..Q_j)
    eigh(Y Y^T) = R diag(theta^2) R^T           all blocks together, in fp64 ("right Rayleigh-Ritz")
    v_i = r_i^T K,   u_i = r_i^T Y / theta_i,   residual_i = || r_i^T Z / theta_i - theta_i v_i ||

K, Y and Z are all blocks of Q_j, Y_j and Z_j. The residual costs no read of its own: Z of every block is at hand.
`block_krylov` is this text; the implementations provide its `Primitives` (`torch_svd.py` and the kernels' modules).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from s2d_kernels import ops

CONVERGED = 0
NOT_CONVERGED = 1
NON_FINITE = 2
OVERFLOW = 4
STATUS_NAMES = {CONVERGED: "converged", NOT_CONVERGED: "not converged", NON_FINITE: "non-finite", OVERFLOW: "overflow"}

COLD_READS = 8
WARM_READS = 4
# The error of G = sum s^n u v^T stays below five times the criterion (spec, section 3), so this asks for 1e-3.
TOLERANCE = 2e-4
# Probability that `missed` is not a bound, over the draw of the random column.
FAILURE_PROBABILITY = 1e-3
# Elements from the beginning of one start to that of the next are a multiple of this.
_ALIGNED = 64


def check_start(index: int, weight: Tensor, start: Tensor, k: int, reads: int) -> None:
    """Raise for a start that no implementation of the operator can begin with."""
    d, dtype = min(weight.shape), working_dtype(weight)
    b = len(start) if start.ndim else 0
    if start.shape != (b, d) or not 1 <= k <= b <= d or start.dtype != dtype or start.device != weight.device:
        raise ValueError(
            f"starts[{index}] {tuple(start.shape)} {start.dtype} on {start.device} with k={k} does not fit "
            f"weights[{index}] {tuple(weight.shape)} on {weight.device}: it must be {dtype} [b, {d}] on the same "
            f"device, 1 <= k <= b <= {d}"
        )
    if reads < 1:
        raise ValueError(f"reads[{index}]={reads} must be at least 1")
    if k == b * reads < d:
        raise ValueError(
            f"reads[{index}]={reads} of {b} rows find k={k} triplets and nothing to bound the others by: take more"
        )


class Primitives(Protocol):
    """What `block_krylov` is made of: for one or many matrices A `[D, d]`, D >= d, with a start of b rows each.

    Which reads a matrix takes part in is the primitives' knowledge: matrices of one batch may differ in shape, in b
    and in their number of reads. A matrix with reads * b >= d is *dense*: Q_0 is the identity and one read is exact.
    """

    reads: int  # the most of any matrix

    def begin(self) -> None:
        """Scale of each A (a power of two that brings the largest |element| below 1), finiteness, Q_0."""

    def product(self, step: int) -> None:
        """Y_step = Q_step A^T and Z_step = Y_step A from one read of A."""

    def orthonormalize(self, step: int) -> None:
        """Q_(step + 1) from Z_step against all Q so far; dependent directions become zero rows."""

    def finish(self) -> list[Tensor]:
        """Rayleigh-Ritz, residuals, the bound on what was missed, status: U, S, Vh, residual, missed, status."""


def block_krylov(primitives: Primitives) -> list[Tensor]:
    """The algorithm at the head of this file."""
    primitives.begin()
    for step in range(primitives.reads):
        primitives.product(step)
        if step + 1 < primitives.reads:
            primitives.orthonormalize(step)
    return primitives.finish()


class SVDBasis(NamedTuple):
    """All `b >= k` computed triplets: the next warm start, and what the PCDR bounds are made of.

    `U [m, b]`, `S [b]` descending, `Vh [b, n]`, `residual [b]` = ||A^T u_i - s_i v_i||.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor


class TopkSVD(NamedTuple):
    """Leading triplets of one matrix. `U`, `S`, `Vh` and `residual` are the first k of `basis`.

    Attributes:
        U: `[m, k]`. Columns of components with s_i = 0 are zero.
        S: `[k]`, descending.
        Vh: `[k, n]`.
        residual: `[k]`, ||W^T u_i - s_i v_i|| (||W v_i - s_i u_i|| for a wide W); the other side's is 0 by
            construction. Absolute, in the units of `S`.
        missed: 0-dim; with probability >= 1 - `FAILURE_PROBABILITY` no singular value beyond the k found is larger.
            It is 2-3 x s_(k+1) after four reads: it excludes a missed spike, not a near-tie.
        status: 0-dim int32: `CONVERGED`, `NOT_CONVERGED`, `NON_FINITE` (the matrix holds NaN or Inf) or `OVERFLOW`
            (a singular value exceeds the range of the dtype). The last two come with factors of zeros.
        basis: `SVDBasis`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor
    missed: Tensor
    status: Tensor
    basis: SVDBasis


def warm_width(k: int) -> int:
    """Columns of a warm start, max(8, k + 5) in whole fours: b - 1 previous ones and one fresh random one."""
    return -(-max(8, k + 5) // 4) * 4


def cold_width(k: int) -> int:
    """Columns of a cold start, max(16, 2 k) in whole fours: all random."""
    return -(-max(16, 2 * k) // 4) * 4


@torch.no_grad()
def topk_svd(
    weights: Sequence[Tensor],
    *,
    k: int | Sequence[int],
    warm: Sequence[TopkSVD | SVDBasis | None] | None = None,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    reads: int | None = None,
    max_sms: int | None = None,
    impl: str | None = None,
) -> list[TopkSVD]:
    """Top-k singular triplets of every matrix in one call, any mix of shapes and dtypes.

    Args:
        weights: list of `[m, n]` fp32, bf16, fp16 or fp64 tensors on one device; strided views are fine. On a GPU they
            are read when the stream gets there: change them on the same stream, or after it.
        k: number of triplets, one int or one per matrix, each in 1..min(m, n).
        warm: per matrix the previous result (or its basis) or None. A warm start makes half the passes of a cold one
            with half the columns (k = 3); a fresh random column is always added, so that a newly grown direction is
            found.
        seed: seed of the random columns. Give another one to each refresh.
        keys: per matrix a name; with `seed` it determines the random columns. Default: the shape. Results never
            depend on a matrix's position in the list, nor on its neighbours (impl="torch" on a GPU: cuBLAS decides).
        reads: passes over each matrix; default 8 cold and 4 warm.
        max_sms: most multiprocessors that impl="cuda" holds on to, None for all. Only its kernel that keeps matrices in
            shared memory through all reads does, whose blocks no stream's priority displaces; it takes no fewer than
            its largest matrix needs. The other implementations' blocks are short. The bits do not depend on it.
        impl: "reference" (full SVD), "torch", "cpu" (C++), "triton", "cuda", or None to choose by device, dtype and
            shape.

    Returns:
        One `TopkSVD` per matrix, fp32 (fp64 for fp64 input), on the device of the weights. `status` and `missed`
        are tensors: reading them is the caller's synchronization, none happens here. To capture a refresh in a CUDA
        graph, capture `torch.ops.s2d.topk_svd` with starts of your own: here new random rows come from the host.

    Raises:
        TypeError: an element is no dense floating tensor, a number no integer, `keys` a lone string.
        ValueError: k outside 1..min(m, n), lists of different lengths, an empty matrix, a warm start of another
            shape, seed < 0, reads < 1, max_sms < 1; a matrix too large for the `impl` asked for.

    Accuracy: `status` is CONVERGED when max_{i<=k} (s_i/s_1) residual_i / s_1 <= 2e-4; the relative error of
        G = sum s^2 u v^T then stays below 1e-3 unless a component was missed, against which `missed` speaks.
        Judge S and G, never single vectors: within a cluster they are arbitrary.
    Cost: `reads` passes over the weights and one for the largest |element| (prescale: 1e30- and 1e-30-scaled
        matrices work). With impl="cuda" a matrix that fits the shared memory of some of the GPU's blocks is read from
        memory once; which form it takes depends on the matrix and the GPU alone.
    Determinism: same inputs, seed and keys give the same bits on the same kind of machine; so they do for any number
        of threads, but for impl="torch". CPUs of several instruction sets agree under S2D_CPU_CAPABILITY=avx2. With
        impl="cpu" strides are inputs too: a transposed view and its contiguous copy may differ in bits.
    """
    weights = ops.check_tensor_list("weights", weights, ndim=2)
    ks = list(k) if isinstance(k, Sequence) else [k] * len(weights)
    previous = [None] * len(weights) if warm is None else list(warm)
    seed = ops.check_integer("seed", seed, low=0)
    if isinstance(keys, str | bytes):
        raise TypeError(f"keys={keys!r} must be a list of names, one for each matrix: wrap a single one in a list")
    names = [""] * len(weights) if keys is None else list(keys)
    ops.check_same_length(weights=weights, k=ks, warm=previous, keys=names)
    if reads is not None:
        reads = ops.check_integer("reads", reads, low=1)
    if max_sms is not None:
        max_sms = ops.check_integer("max_sms", max_sms, low=1)
    if not weights:
        return []
    schedule = []
    for index, (weight, k_i, before) in enumerate(zip(weights, ks, previous, strict=True)):
        if weight.numel() == 0:
            raise ValueError(f"weights[{index}] is empty, shape {tuple(weight.shape)}: leave it out of the list")
        k_i = ks[index] = ops.check_integer(f"k of weights[{index}]", k_i, low=-(2**63))
        if not 1 <= k_i <= min(weight.shape):
            raise ValueError(
                f"k={k_i} for weights[{index}] must lie in 1..{min(weight.shape)}, its shape is {tuple(weight.shape)}"
            )
        _check_warm(index, weight, before)
        schedule.append(reads or (COLD_READS if before is None else WARM_READS))
    arguments = (weights, start_blocks(weights, ks, previous, seed, names), ks, schedule)
    flat: list[Tensor] = [weights[0]] * (6 * len(weights))
    for chosen, members in ops.partition("topk_svd", impl, weights[0].device, arguments).items():
        parts = ([column[i] for i in members] for column in arguments)
        found = torch.ops.s2d.topk_svd(*parts, chosen, max_sms=max_sms)
        for position, index in enumerate(members):
            flat[6 * index : 6 * index + 6] = found[6 * position : 6 * position + 6]
    results = []
    for index, k_i in enumerate(ks):
        U, S, Vh, residual, missed, status = flat[6 * index : 6 * index + 6]
        basis = SVDBasis(U, S, Vh, residual)
        results.append(TopkSVD(U[:, :k_i], S[:k_i], Vh[:k_i], residual[:k_i], missed, status, basis))
    return results


def _check_warm(index: int, weight: Tensor, before: object) -> None:
    if before is None:
        return
    if not isinstance(before, TopkSVD | SVDBasis):
        raise TypeError(f"warm[{index}] must be a TopkSVD, its basis, or None, got {type(before).__name__}")
    basis = before.basis if isinstance(before, TopkSVD) else before
    if basis.U.ndim != 2 or basis.Vh.ndim != 2 or (len(basis.U), basis.Vh.shape[1]) != weight.shape:
        raise ValueError(
            f"warm[{index}] has U {tuple(basis.U.shape)} and Vh {tuple(basis.Vh.shape)}, which do not fit "
            f"weights[{index}] of shape {tuple(weight.shape)}: pass the previous result of the same matrix, or None"
        )


def start_blocks(
    weights: Sequence[Tensor],
    ks: Sequence[int],
    previous: Sequence[TopkSVD | SVDBasis | None],
    seed: int,
    names: Sequence[str],
) -> list[Tensor]:
    """First block `[b, d]` of each: the previous leading vectors on the smaller side, then Gaussian rows, at least one.

    What the rows are depends on seed, name and shape of their matrix alone. All go to the device in one copy, and equal
    blocks are put together in a handful of launches.
    """
    device = weights[0].device
    groups: dict[tuple[int, int, int, torch.dtype], list[int]] = {}
    leading: list[Tensor | None] = []
    for index, (weight, k, before) in enumerate(zip(weights, ks, previous, strict=True)):
        d, vectors = min(weight.shape), None
        width = min(d, cold_width(k) if before is None else warm_width(k))
        if before is not None:
            basis = before.basis if isinstance(before, TopkSVD) else before
            vectors = (basis.Vh if weight.shape[0] >= weight.shape[1] else basis.U.mT)[: width - 1]
        leading.append(vectors)
        kept = 0 if vectors is None else len(vectors)
        groups.setdefault((width, d, kept, working_dtype(weight)), []).append(index)
    # Blocks lie as if each had been allocated by itself: bits must not depend on an address.
    slots = {group: -(-group[0] * group[1] // _ALIGNED) * _ALIGNED for group in groups}
    count = sum(slots[group] * len(members) for group, members in groups.items())
    # From pageable memory the copy would wait for the device.
    rows = torch.empty(count, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
    place = 0
    for (width, d, kept, dtype), members in groups.items():
        for index in members:
            m, n = weights[index].shape
            digest = hashlib.blake2b(f"{seed}|{names[index]}|{m}x{n}".encode(), digest_size=8).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
            rows[place : place + width * d].normal_(generator=generator)
            place += slots[width, d, kept, dtype]
    rows = rows.to(device, non_blocking=True)
    blocks: list[Tensor] = [rows] * len(weights)
    sizes = [slots[group] * len(members) for group, members in groups.items()]
    for (group, members), part in zip(groups.items(), rows.split(sizes), strict=True):
        width, d, kept, dtype = group
        stack = part.to(dtype).view(len(members), slots[group])[:, : width * d].unflatten(1, (width, d))
        if kept:
            vectors = torch.stack([leading[index].to(device, dtype) for index in members])  # type: ignore[union-attr]
            largest = torch.linalg.vector_norm(vectors, math.inf, dim=2, keepdim=True)
            usable = (largest > 0) & (largest < math.inf)
            # A zero row (rank-deficient or non-finite last time) carries nothing: its place goes to a random one.
            stack[:, :kept] = torch.where(usable, vectors, stack[:, :kept])
        for index, block in zip(members, stack.unbind(), strict=True):
            blocks[index] = block
    return blocks


def working_dtype(weight: Tensor) -> torch.dtype:
    """Of products and results: fp64 for fp64 matrices, else fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
