"""`topk_svd`: the leading singular triplets of many matrices at once, warm-started, with error statements.

The algorithm is block Krylov on the fused product Z = Q A^T A, one read of A a step. Blocks are kept as *rows*
(`Q [b, d]`): the thin products then run over contiguous memory on every backend. A is W, or W^T when W is wide, so
that the iteration lives on the smaller side d = min(m, n).

    Q_0 = orthonormalize(start)
    for each read j:   Y_j = Q_j A^T,   Z_j = Y_j A,   Q_{j+1} = orthonormalize(Z_j against Q_0..Q_j)
    eigh(Y Y^T) = R diag(theta^2) R^T           all blocks together, in fp64 ("right Rayleigh-Ritz")
    v_i = r_i^T K,   u_i = r_i^T Y / theta_i,   residual_i = || r_i^T Z / theta_i - theta_i v_i ||

The residual costs no read of its own: Z of every block is at hand.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2d_kernels import ops, reference

CONVERGED = 0
NOT_CONVERGED = 1
NON_FINITE = 2
OVERFLOW = 4
STATUS_NAMES = {CONVERGED: "converged", NOT_CONVERGED: "not converged", NON_FINITE: "non-finite", OVERFLOW: "overflow"}

COLD_READS = 8
WARM_READS = 4
# The error of G = sum s^n u v^T stays below five times the criterion (spec, section 3), so this asks for 1e-3.
TOLERANCE = 2e-4
# Matrices processed together on a CPU: a share of its last-level cache.
CACHE_BYTES = 16 << 20
# Probability that `missed` is not a bound, over the draw of the random column.
FAILURE_PROBABILITY = 1e-3


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
    impl: str | None = None,
) -> list[TopkSVD]:
    """Top-k singular triplets of every matrix in one call, any mix of shapes and dtypes.

    Args:
        weights: list of `[m, n]` fp32, bf16, fp16 or fp64 tensors on one device; strided views are fine.
        k: number of triplets, one int or one per matrix, each in 1..min(m, n).
        warm: per matrix the previous result (or its basis) or None. A warm start makes half the passes of a cold one
            with half the columns (k = 3); a fresh random column is always added, so that a newly grown direction is
            found.
        seed: seed of the random columns. Give another one to each refresh.
        keys: per matrix a name; with `seed` it determines the random columns. Default: the shape. Results never
            depend on a matrix's position in the list; on a CPU, not on its neighbours either.
        reads: passes over each matrix; default 8 cold and 4 warm.
        impl: "reference" (full SVD), "torch", or None to choose.

    Returns:
        One `TopkSVD` per matrix, fp32 (fp64 for fp64 input), on the device of the weights. `status` and `missed`
        are tensors: reading them is the caller's synchronization, none happens here.

    Raises:
        TypeError: an element is no dense floating tensor.
        ValueError: k outside 1..min(m, n), lists of different lengths, an empty matrix, a warm start of another
            shape, reads < 1.

    Accuracy: `status` is CONVERGED when max_{i<=k} (s_i/s_1) residual_i / s_1 <= 2e-4; the relative error of
        G = sum s^2 u v^T then stays below 1e-3 unless a component was missed, against which `missed` speaks.
        Judge S and G, never single vectors: within a cluster they are arbitrary.
    Cost: `reads` passes over the weights and one for the largest |element| (prescale: 1e30- and 1e-30-scaled
        matrices work).
    Determinism: same inputs, seed and keys give the same bits.
    """
    weights = ops.check_tensor_list("weights", weights, ndim=2)
    ks = list(k) if isinstance(k, Sequence) else [k] * len(weights)
    previous = [None] * len(weights) if warm is None else list(warm)
    names = [""] * len(weights) if keys is None else list(keys)
    ops.check_same_length(weights=weights, k=ks, warm=previous, keys=names)
    if reads is not None:
        reads = ops.check_integer("reads", reads, low=1)
    if not weights:
        return []
    starts, schedule = [], []
    for index, (weight, k_i, before, name) in enumerate(zip(weights, ks, previous, names, strict=True)):
        if weight.numel() == 0:
            raise ValueError(f"weights[{index}] is empty, shape {tuple(weight.shape)}: leave it out of the list")
        k_i = ks[index] = ops.check_integer(f"k of weights[{index}]", k_i, low=-(2**63))
        if not 1 <= k_i <= min(weight.shape):
            raise ValueError(
                f"k={k_i} for weights[{index}] must lie in 1..{min(weight.shape)}, its shape is {tuple(weight.shape)}"
            )
        if before is not None and not isinstance(before, TopkSVD | SVDBasis):
            raise TypeError(f"warm[{index}] must be a TopkSVD, its basis, or None, got {type(before).__name__}")
        starts.append(_start_block(index, weight, k_i, before, seed, name))
        schedule.append(reads or (COLD_READS if before is None else WARM_READS))
    flat = torch.ops.s2d.topk_svd(weights, starts, ks, schedule, impl)
    results = []
    for index, k_i in enumerate(ks):
        U, S, Vh, residual, missed, status = flat[6 * index : 6 * index + 6]
        basis = SVDBasis(U, S, Vh, residual)
        results.append(TopkSVD(U[:, :k_i], S[:k_i], Vh[:k_i], residual[:k_i], missed, status, basis))
    return results


def _start_block(index: int, weight: Tensor, k: int, before: TopkSVD | SVDBasis | None, seed: int, name: str) -> Tensor:
    """First block `[b, d]`: the previous leading vectors on the smaller side, then Gaussian rows (at least one)."""
    m, n = weight.shape
    d = min(m, n)
    dtype = _working_dtype(weight)
    width = min(d, cold_width(k) if before is None else warm_width(k))
    digest = hashlib.blake2b(f"{seed}|{name}|{m}x{n}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    block = torch.randn(width, d, generator=generator, dtype=torch.float32).to(weight.device, dtype)
    if before is None:
        return block
    basis = before.basis if isinstance(before, TopkSVD) else before
    vectors = basis.Vh if m >= n else basis.U.mT
    if vectors.ndim != 2 or vectors.shape[1] != d:
        raise ValueError(
            f"warm[{index}] has U {tuple(basis.U.shape)} and Vh {tuple(basis.Vh.shape)}, which do not fit "
            f"weights[{index}] of shape {tuple(weight.shape)}: pass the previous result of the same matrix, or None"
        )
    vectors = vectors[: width - 1].to(weight.device, dtype)
    usable = vectors.isfinite().all(1, keepdim=True) & (vectors != 0).any(1, keepdim=True)
    # A zero row (rank-deficient or non-finite last time) carries nothing: its place goes to a random one.
    block[: len(vectors)] = torch.where(usable, vectors, block[: len(vectors)])
    return block


def _working_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@ops.implements("topk_svd", "reference")
def _topk_svd_reference(weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int]) -> list[Tensor]:
    """Full SVD of each matrix; `starts` only sets how many triplets are returned."""
    flat: list[Tensor] = []
    for weight, start, k in zip(weights, starts, ks, strict=True):
        A = weight.to(_working_dtype(weight))
        b = start.shape[0]
        finite = A.isfinite().all()
        A = torch.where(finite, A, torch.zeros_like(A))
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        missed = S[k] if k < len(S) else torch.zeros_like(S[0])
        U, S, Vh = reference.SVDTriplets(U[:, :b], S[:b], Vh[:b])
        residual = torch.linalg.vector_norm(A.mT @ U - Vh.mT * S, dim=0)
        status = torch.where(finite, CONVERGED, NON_FINITE).to(torch.int32)
        # contiguous() alone would return a view of the full factors where the slice happens to be contiguous
        flat += [(U * finite).contiguous(), S.clone(), (Vh * finite).contiguous(), residual, missed.clone(), status]
    return flat


@ops.implements("topk_svd", "torch")
def _topk_svd_torch(weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int]) -> list[Tensor]:
    buckets: dict[tuple[object, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        kind: tuple[object, ...] = (tuple(weight.shape), weight.dtype, starts[index].shape[0], ks[index], reads[index])
        if weight.device.type == "cpu" and (weight.shape[0] % 16 or weight.shape[1] % 16 or starts[index].shape[0] % 4):
            # MKL's bits depend on the alignment of each slice of a batch, and these slices would not be aligned.
            kind = (index,)
        buckets.setdefault(kind, []).append(index)
    flat: list[Tensor] = [torch.empty(0)] * (6 * len(weights))
    for members in (wave for bucket in buckets.values() for wave in _waves(bucket, weights)):
        first = members[0]
        wide = weights[first].shape[0] < weights[first].shape[1]
        largest = torch.stack([_largest_element(weights[i]) for i in members])
        matrices = torch.stack([weights[i] for i in members])
        matrices = matrices.to(starts[first].dtype)
        start = torch.stack([starts[i] for i in members])
        results = _block_krylov(matrices.mT if wide else matrices, largest, start, ks[first], reads[first])
        for position, index in enumerate(members):
            left, S, right, residual, missed, status = (r[position] for r in results)
            U, Vh = (right.mT, left) if wide else (left.mT, right)
            outputs = (U, S, Vh, residual, missed, status)
            # Copies: operator outputs must not share the bucket's storage.
            flat[6 * index : 6 * index + 6] = [t.clone(memory_format=torch.contiguous_format) for t in outputs]
    return flat


def _waves(bucket: list[int], weights: list[Tensor]) -> list[list[int]]:
    """Cut a bucket of equal matrices so that a wave stays in a CPU's cache through all its reads."""
    if weights[bucket[0]].device.type != "cpu":
        return [bucket]
    count = -(-len(bucket) * weights[bucket[0]].numel() * 4 // CACHE_BYTES)
    count = min(count, max(1, len(bucket) // 2))  # a lone matrix leaves threads idle
    return [bucket[len(bucket) * i // count : len(bucket) * (i + 1) // count] for i in range(count)]


def _bmm(A: Tensor, B: Tensor) -> Tensor:
    """torch.bmm whose bits do not depend on the size of the batch.

    MKL gives each matrix of a batch to one thread, but splits a single one among all, sums included: so a single one
    goes twice.
    """
    if A.shape[0] == 1 and A.device.type == "cpu":
        return torch.bmm(A.expand(2, -1, -1), B.expand(2, -1, -1))[:1]
    return torch.bmm(A, B)


def _eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of each matrix. On a CPU one by one: LAPACK's bits depend on how a slice is aligned."""
    if H.device.type != "cpu" or H.shape[0] == 1:
        return torch.linalg.eigh(H)
    values, vectors = zip(*(torch.linalg.eigh(h) for h in H), strict=True)
    return torch.stack(values), torch.stack(vectors)


def _largest_element(weight: Tensor) -> Tensor:
    """max |W|, 0-dim; NaN if W holds one."""
    low, high = torch.aminmax(weight)  # passes NaN on, and makes no copy
    return torch.maximum(high, -low)


def _block_krylov(matrices: Tensor, largest: Tensor, start: Tensor, k: int, reads: int) -> tuple[Tensor, ...]:
    """Triplets of the matrices A `[B, D, d]`, D >= d, with `largest [B]` elements, from `start [B, b, d]`.

    Returns left vectors as rows `[B, b, D]`, S `[B, b]`, right vectors as rows `[B, b, d]`, residual `[B, b]`,
    missed `[B]`, status `[B]`.
    """
    _, b, d = start.shape
    dtype = start.dtype
    largest = largest.to(dtype)
    finite = largest.isfinite()
    # the exponents of which both 2^e and 2^-e are normal numbers
    bound = 1022 if dtype == torch.float64 else 126
    exponent = torch.frexp(torch.where(finite, largest, 1.0)).exponent.clamp(-bound, bound)
    scale = torch.ldexp(torch.ones_like(largest), -exponent)  # power of two: A * scale is exact, |A * scale| < 1

    dense = reads * b >= d  # the Krylov space would be everything: one read with Q = identity is exact
    gaussian = start[:, -1]
    if dense:
        Q = torch.eye(d, dtype=dtype, device=start.device).expand(matrices.shape[0], d, d)
        reads = 1
    else:
        Q = _orthonormalize(start, None)
    blocks_K, blocks_Y, blocks_Z = [], [], []
    for step in range(reads):
        Y, Z = _fused_product(matrices, Q, scale, finite)
        blocks_K.append(Q)
        blocks_Y.append(Y)
        blocks_Z.append(Z)
        if step + 1 < reads:
            Q = _orthonormalize(Z, torch.cat(blocks_K, 1))
    K, Y, Z = torch.cat(blocks_K, 1), torch.cat(blocks_Y, 1), torch.cat(blocks_Z, 1)

    Y64 = Y.double()
    eigenvalues, R = _eigh(_bmm(Y64, Y64.mT))
    theta = eigenvalues.clamp(min=0).sqrt().flip(1)  # [B, all], descending
    R = R.flip(2)
    rows = R[:, :, :b].mT.to(dtype)
    S = theta[:, :b]
    # A Ritz value below the rounding of the products, or of their fp64 Gram matrix, is noise: it counts as zero.
    noise = max(4 * torch.finfo(dtype).eps, math.sqrt(Y.shape[1] * torch.finfo(torch.float64).eps))
    floor = theta[:, :1] * noise
    inverse = torch.where(S > floor, 1.0 / S, 0.0).to(dtype).unsqueeze(2)
    S = torch.where(S > floor, S, 0.0).to(dtype)
    right = _bmm(rows, K)
    left = _bmm(rows, Y) * inverse
    residual = torch.linalg.vector_norm(_bmm(rows, Z) * inverse - S.unsqueeze(2) * right, dim=2)
    right = right * (S > 0).unsqueeze(2)

    if dense:
        missed = theta[:, k] if k < theta.shape[1] else torch.zeros_like(theta[:, 0])
    else:
        missed = _missed_bound(gaussian, K, Z, theta, R, k, reads)
    criterion = ((S * residual)[:, :k]).amax(1)
    converged = criterion <= TOLERANCE * S[:, 0].square()

    S, residual, missed = (
        torch.ldexp(t, e)
        for t, e in zip(
            (S, residual, missed.to(dtype)), (exponent.unsqueeze(1), exponent.unsqueeze(1), exponent), strict=True
        )
    )
    overflow = ~S[:, 0].isfinite()
    bad = ~finite | overflow
    status = torch.where(converged, CONVERGED, NOT_CONVERGED)
    status = torch.where(overflow, OVERFLOW, status)
    status = torch.where(finite, status, NON_FINITE).to(torch.int32)
    zero = bad.view(-1, 1, 1)
    return (
        left.masked_fill(zero, 0),
        S.masked_fill(zero[:, 0], 0),
        right.masked_fill(zero, 0),
        residual.masked_fill(zero[:, 0], 0),
        missed.masked_fill(bad, 0),
        status,
    )


def _fused_product(A: Tensor, Q: Tensor, scale: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Y = Q (sA)^T `[B, b, D]` and Z = Y (sA) `[B, b, d]`; zeros for a matrix that is not finite."""
    scale, keep = scale.view(-1, 1, 1), finite.view(-1, 1, 1)
    Y = _bmm(Q * scale, A.mT)
    Z = _bmm(Y * scale, A)
    return torch.where(keep, Y, 0.0), torch.where(keep, Z, 0.0)


def _orthonormalize(block: Tensor, against: Tensor | None) -> Tensor:
    """Orthonormal rows spanning `block [B, b, d]` after projecting out the orthonormal rows `against [B, p, d]`.

    Projection and Gram-eigen orthonormalization (SVQB, fp64 Gram matrix), twice. Dependent directions come out as
    zero rows instead of noise blown up to length one.
    """
    eps = torch.finfo(block.dtype).eps
    drop = 1e-10 if block.dtype == torch.float32 else 1e-13
    for _ in range(2):
        before = torch.linalg.vector_norm(block, dim=2, keepdim=True)
        if against is not None:
            block = block - _bmm(_bmm(block, against.mT), against)
        length = torch.linalg.vector_norm(block, dim=2, keepdim=True)
        block = torch.where(length > 8 * eps * before, block / length, 0.0)
        wide = block.double()
        eigenvalues, E = _eigh(_bmm(wide, wide.mT))
        inverse = torch.where(eigenvalues > drop * block.shape[1], eigenvalues.clamp(min=drop).rsqrt(), 0.0)
        block = _bmm((E * inverse.unsqueeze(1)).mT.to(block.dtype), block)
    return block


def _missed_bound(gaussian: Tensor, K: Tensor, Z: Tensor, theta: Tensor, R: Tensor, k: int, reads: int) -> Tensor:
    """Bound `[B]` on a singular value beyond the k found, from the random row that went through q = `reads` products.

    s_missed <= (||(A^T A)^q w|| / (d sqrt(pi/2)))^(1/(2q)) with A deflated by the found vectors: the component of a
    Gaussian w along the missed vector is below d sqrt(pi/2) only with probability d. The Krylov space holds
    (A^T A)^(q-1) w, whose Ritz coordinates are theta^(2(q-1)) times those of w; dropping the first k deflates it,
    and Z = (A^T A) K takes the last step. No product of its own, and no cancellation.
    """
    coordinates = _bmm(_bmm(gaussian.unsqueeze(1), K.mT).double(), R)  # [B, 1, all]
    # relative to the first Ritz value that stays, lest a power of a small one underflow
    top = torch.where(theta[:, k : k + 1] > 0, theta[:, k : k + 1], 1.0)
    coordinates = coordinates * (theta / top).square().pow(reads - 1).unsqueeze(1)
    coordinates[:, :, :k] = 0
    last = _bmm(_bmm(coordinates, R.mT), Z.double()).squeeze(1) / top.square()
    ratio = torch.linalg.vector_norm(last, dim=1) / (FAILURE_PROBABILITY * math.sqrt(math.pi / 2))
    return ratio.pow(1 / (2 * reads)) * top.squeeze(1)
