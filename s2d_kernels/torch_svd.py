"""`topk_svd` in plain torch: impl="torch", equal matrices in one batch, and impl="reference", the full SVD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.svd import (
    CONVERGED,
    FAILURE_PROBABILITY,
    NON_FINITE,
    NOT_CONVERGED,
    OVERFLOW,
    TOLERANCE,
    block_krylov,
    check_start,
    working_dtype,
)

# Matrices processed together on a CPU: a share of its last-level cache.
CACHE_BYTES = 16 << 20


@ops.implements("topk_svd", "reference")
def _topk_svd_reference(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], *, max_sms: int | None = None
) -> list[Tensor]:
    """Full SVD of each matrix; `starts` only sets how many triplets are returned."""
    flat: list[Tensor] = []
    for weight, start, k in zip(weights, starts, ks, strict=True):
        A = weight.to(working_dtype(weight))
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
def _topk_svd_torch(
    weights: list[Tensor], starts: list[Tensor], ks: list[int], reads: list[int], *, max_sms: int | None = None
) -> list[Tensor]:
    buckets: dict[tuple[object, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        check_start(index, weight, starts[index], ks[index], reads[index])
        kind: tuple[object, ...] = (tuple(weight.shape), weight.dtype, starts[index].shape[0], ks[index], reads[index])
        if weight.device.type == "cpu" and (weight.shape[0] % 16 or weight.shape[1] % 16 or starts[index].shape[0] % 4):
            # MKL's bits depend on the alignment of each slice of a batch, and these slices would not be aligned.
            kind = (index,)
        buckets.setdefault(kind, []).append(index)
    flat: list[Tensor] = [weights[0]] * (6 * len(weights))
    stacks: dict[torch.dtype, Tensor] = {}
    for members in (wave for equal in buckets.values() for wave in _waves(equal, weights)):
        first = members[0]
        wide = weights[first].shape[0] < weights[first].shape[1]
        largest = torch.stack([_largest_element(weights[i]) for i in members])
        matrices = _stacked([weights[i] for i in members], stacks).to(starts[first].dtype)
        start = torch.stack([starts[i] for i in members])
        bucket = _Bucket(matrices.mT if wide else matrices, largest, start, ks[first], reads[first])
        results = block_krylov(bucket)
        for index, left, S, right, residual, missed, status in zip(
            members, *(stacked.unbind() for stacked in results), strict=True
        ):
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


def _stacked(matrices: list[Tensor], scratch: dict[torch.dtype, Tensor]) -> Tensor:
    """The matrices in one tensor; on a CPU in memory that the waves share: fresh pages cost more than a copy."""
    first = matrices[0]
    if first.device.type != "cpu":
        return torch.stack(matrices)
    needed = len(matrices) * first.numel()
    if first.dtype not in scratch or scratch[first.dtype].numel() < needed:
        scratch[first.dtype] = first.new_empty(needed)
    return torch.stack(matrices, out=scratch[first.dtype][:needed].view(len(matrices), *first.shape))


def _bmm(A: Tensor, B: Tensor) -> Tensor:
    """torch.bmm whose bits do not depend on the size of the batch.

    MKL gives each matrix of a batch to one thread, but splits a single one among all, sums included: so a single one
    goes twice. Where torch may reduce fp32 products, they are made in fp64: the residuals would not see the loss.
    """
    if A.dtype == torch.float32 and ops.fp32_is_reduced(A.device):
        return _bmm(A.double(), B.double()).float()
    if A.shape[0] == 1 and A.device.type == "cpu":
        return torch.bmm(A.expand(2, -1, -1), B.expand(2, -1, -1))[:1]
    return torch.bmm(A, B)


def _eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of each matrix; odd ones one by one, since LAPACK's bits depend on how a slice is aligned."""
    if H.device.type != "cpu" or H.shape[0] == 1 or H.shape[1] % 4 == 0:
        return torch.linalg.eigh(H)
    values, vectors = zip(*(torch.linalg.eigh(h) for h in H), strict=True)
    return torch.stack(values), torch.stack(vectors)


def _largest_element(weight: Tensor) -> Tensor:
    """max |W|, 0-dim; NaN if W holds one."""
    low, high = torch.aminmax(weight)  # passes NaN on, and makes no copy
    return torch.maximum(high, -low)


class _Bucket:
    """`Primitives` of equal matrices A `[B, D, d]`, D >= d, with `largest [B]` elements, from `start [B, b, d]`.

    `finish` returns left vectors as rows `[B, b, D]`, S `[B, b]`, right vectors as rows `[B, b, d]`, residual
    `[B, b]`, missed `[B]`, status `[B]`.
    """

    def __init__(self, matrices: Tensor, largest: Tensor, start: Tensor, k: int, reads: int) -> None:
        self.A, self.start, self.k = matrices, start, k
        self.dense = reads * start.shape[1] >= start.shape[2]
        self.reads = 1 if self.dense else reads
        self.largest = largest.to(start.dtype)
        self.K: list[Tensor] = []
        self.Y: list[Tensor] = []
        self.Z: list[Tensor] = []

    def begin(self) -> None:
        dtype, d = self.start.dtype, self.start.shape[2]
        self.finite = self.largest.isfinite()
        # the exponents of which both 2^e and 2^-e are normal numbers
        bound = 1022 if dtype == torch.float64 else 126
        self.exponent = _exponent(torch.where(self.finite, self.largest, 1.0)).clamp(-bound, bound)
        # Powers of two, exact: |A * before * after| < 1. One before each product and one after it, so that nothing
        # leaves the range of the dtype.
        half = self.exponent.div(2, rounding_mode="trunc")
        one = torch.ones_like(self.largest)
        self.scales = torch.ldexp(one, -half), torch.ldexp(one, half - self.exponent)
        if self.dense:
            self.K.append(torch.eye(d, dtype=dtype, device=self.start.device).expand(self.A.shape[0], d, d))
        else:
            self.K.append(self._orthonormalize(self.start, None, 0))

    def product(self, step: int) -> None:
        before, after, keep = (t.view(-1, 1, 1) for t in (*self.scales, self.finite))
        Y = _bmm(self.K[step] * before, self.A.mT) * after
        Z = _bmm(Y * before, self.A) * after
        # on a GPU unconditionally: asking would wait for it
        if self.A.device.type != "cpu" or not bool(self.finite.all()):
            Y, Z = torch.where(keep, Y, 0.0), torch.where(keep, Z, 0.0)
        self.Y.append(Y)
        self.Z.append(Z)

    def orthonormalize(self, step: int) -> None:
        self.K.append(self._orthonormalize(self.Z[step], torch.cat(self.K, 1), step + 1))

    def _orthonormalize(self, block: Tensor, against: Tensor | None, step: int) -> Tensor:
        b, d = block.shape[1:]
        shifts = torch.arange(step * b + 1, (step + 1) * b + 1, device=block.device)
        places = (torch.arange(d, device=block.device) - shifts.unsqueeze(1)) % d
        return _orthonormalize(block, against, self.start[:, -1], places)

    def finish(self) -> list[Tensor]:
        b, k, dtype = self.start.shape[1], self.k, self.start.dtype
        K, Y, Z = torch.cat(self.K, 1), torch.cat(self.Y, 1), torch.cat(self.Z, 1)
        Y64 = Y.double()
        eigenvalues, R = _eigh(_bmm(Y64, Y64.mT))
        theta = eigenvalues.clamp(min=0).sqrt().flip(1)  # [B, all], descending
        R = R.flip(2)
        # In fp64, or the rounding of a row would leave eps s_1 of the leading vectors in those behind them.
        rows = R[:, :, :b].mT
        S = theta[:, :b]
        # A Ritz value below the rounding of the products, or of their fp64 Gram matrix, is noise: it counts as zero.
        noise = max(4 * torch.finfo(dtype).eps, math.sqrt(Y.shape[1] * torch.finfo(torch.float64).eps))
        floor = theta[:, :1] * noise
        inverse = torch.where(S > floor, 1.0 / S, 0.0).unsqueeze(2)
        S = torch.where(S > floor, S, 0.0)
        right = _bmm(rows, K.double())
        left = (_bmm(rows, Y64) * inverse).to(dtype)
        Z64 = Z.double()
        residual = torch.linalg.vector_norm(_bmm(rows, Z64) * inverse - S.unsqueeze(2) * right, dim=2).to(dtype)
        right = (right * (S > 0).unsqueeze(2)).to(dtype)
        S = S.to(dtype)

        if self.dense:
            missed = theta[:, k] if k < theta.shape[1] else torch.zeros_like(theta[:, 0])
        else:
            missed = _missed_bound(self.start[:, -1], K, Z64, theta, R, k, self.reads)
        criterion = ((S * residual)[:, :k]).amax(1)
        converged = criterion <= TOLERANCE * S[:, 0].square()

        S, residual = (torch.ldexp(t, self.exponent.unsqueeze(1)) for t in (S, residual))
        missed = torch.ldexp(missed.to(dtype), self.exponent)
        overflow = ~S[:, 0].isfinite()
        bad = ~self.finite | overflow
        status = torch.where(converged, CONVERGED, NOT_CONVERGED)
        status = torch.where(overflow, OVERFLOW, status)
        status = torch.where(self.finite, status, NON_FINITE).to(torch.int32)
        zero = bad.view(-1, 1, 1)
        return [
            left.masked_fill(zero, 0),
            S.masked_fill(zero[:, 0], 0),
            right.masked_fill(zero, 0),
            residual.masked_fill(zero[:, 0], 0),
            missed.masked_fill(bad, 0),
            status,
        ]


def _exponent(x: Tensor) -> Tensor:
    """e with 2^(e-1) <= x < 2^e for positive normal numbers, as int32; at most the least such e for the others.

    From the bits: torch.frexp is a hundred times slower on a CPU.
    """
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52) - 1022).to(torch.int32)
    return (x.view(torch.int32) >> 23) - 126


def _orthonormalize(block: Tensor, against: Tensor | None, gaussian: Tensor, places: Tensor) -> Tensor:
    """Orthonormal rows spanning `block [B, b, d]` after projecting out the orthonormal rows `against [B, p, d]`.

    Projection and Gram-eigen orthonormalization (SVQB, fp64 Gram matrix), twice. After the first round fresh random
    directions, `gaussian [B, d]` at `places [b, d]`, replace dependent ones: behind a singular value so large that
    fp32 products show nothing else, they are what finds the others. Those that depend even then (the space is
    exhausted) come out as zero rows instead of noise blown up to length one.
    """
    block = _projected(block, against)
    block, dependent = _svqb(block)
    # on a GPU unconditionally: asking would wait for it
    if block.device.type != "cpu" or bool(dependent.any()):
        block = torch.where(dependent.unsqueeze(2), gaussian[:, places], block)
    block = _projected(block, against)
    return _svqb(block)[0] if block.device.type != "cpu" else _cholesky_qr(block)


def _projected(block: Tensor, against: Tensor | None) -> Tensor:
    """Rows of length one without their part in the span of `against`; zero where nothing but rounding is left."""
    before = torch.linalg.vector_norm(block, dim=2, keepdim=True)
    if against is not None:
        block = block - _bmm(_bmm(block, against.mT), against)
    length = torch.linalg.vector_norm(block, dim=2, keepdim=True)
    inverse = torch.where(length > 8 * torch.finfo(block.dtype).eps * before, 1.0 / length, 0.0)
    return block * inverse


def _svqb(block: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span those of `block [B, b, d]`, zero where they depend; and which `[B, b]` these are."""
    drop = 1e-10 if block.dtype == torch.float32 else 1e-13
    wide = block.double()
    eigenvalues, E = _eigh(_bmm(wide, wide.mT))
    inverse = torch.where(eigenvalues > drop * block.shape[1], eigenvalues.clamp(min=drop).rsqrt(), 0.0)
    return _bmm((E * inverse.unsqueeze(1)).mT.to(block.dtype), block), inverse == 0


def _cholesky_qr(block: Tensor) -> Tensor:
    """As `_svqb`, a tenth of its cost, for rows that are nearly orthonormal or zero; others get `_svqb`."""
    wide = block.double()
    gram = _bmm(wide, wide.mT)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += (diagonal == 0).double()  # a view: a zero row stays one
    factor, info = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    result = _bmm(inverse.to(block.dtype), block)
    poor = (info != 0) | (factor.diagonal(dim1=1, dim2=2).amin(1) < 0.1)
    if bool(poor.any()):
        result = torch.where(poor.view(-1, 1, 1), _svqb(block)[0], result)
    return result


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
    last = _bmm(_bmm(coordinates, R.mT), Z).squeeze(1) / top.square()
    ratio = torch.linalg.vector_norm(last, dim=1) / (FAILURE_PROBABILITY * math.sqrt(math.pi / 2))
    return ratio.pow(1 / (2 * reads)) * top.squeeze(1)
