"""Matrices with known spectra and the error measures of the accuracy contract, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_with_spectrum(
    m: int, n: int, spectrum: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[m, n]` with the given singular values and Haar-distributed vectors."""
    generator = torch.Generator().manual_seed(seed)
    d = len(spectrum)
    U = torch.linalg.qr(torch.randn(m, d, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64))[0]
    return ((U * spectrum.double()) @ V.mT).to(dtype)


def decaying_spectrum(d: int, *, rate: float = 0.02, scale: float = 1.0) -> Tensor:
    """exp(-rate i) with the first value doubled, as a spike has it."""
    spectrum = torch.exp(-rate * torch.arange(d, dtype=torch.float64)) * scale
    spectrum[0] *= 2
    return spectrum


def product_error(weight: Tensor, U: Tensor, S: Tensor, Vh: Tensor, *, power: float = 2.0) -> float:
    """Relative error of G = sum s^power u v^T against an fp64 SVD; sign- and rotation-invariant within a cluster."""
    k = S.shape[0]
    left, s, right = torch.linalg.svd(weight.double(), full_matrices=False)
    unit = 1.0 / float(s[0]) if float(s[0]) > 0 else 1.0
    truth = (left[:, :k] * (s[:k] * unit) ** power) @ right[:k]
    got = (U.double() * (S.double() * unit) ** power) @ Vh.double()
    return float((got - truth).norm() / truth.norm().clamp(min=1e-300))


def lapack_ratios(weight: Tensor, U: Tensor, S: Tensor, Vh: Tensor, residual: Tensor) -> dict[str, float]:
    """What LAPACK's tests look at, in units of the rounding s_1 max(m, n) eps of fp32, or max(m, n) eps; 30 is much.

    Vectors count that belong to values above 1e-3 s_1: U is W V / S, and V is made by the same products.
    """
    A = weight.double().cpu()
    U, S, Vh, residual = (tensor.double().cpu() for tensor in (U, S, Vh, residual))
    truth = torch.linalg.svdvals(A)
    eps = max(A.shape) * torch.finfo(torch.float32).eps
    unit = float(truth[0]) * eps or 1.0
    kept = S > 1e-3 * float(truth[0])
    left, right = (A.mT @ U - Vh.mT * S).norm(dim=0), (A @ Vh.mT - U * S).norm(dim=0)
    stated, other = (left, right) if A.shape[0] >= A.shape[1] else (right, left)
    eye = torch.eye(int(kept.sum()), dtype=torch.float64)

    def worst(values: Tensor) -> float:
        return float(values.max()) if values.numel() else 0.0

    return {
        "above the truth": worst(S - truth[: len(S)]) / unit,
        "off the truth": worst((S - truth[: len(S)]).abs()) / unit,
        "orthogonality of U": float((U.mT[kept] @ U[:, kept] - eye).norm()) / eps,
        "orthogonality of V": float((Vh[kept] @ Vh[kept].mT - eye).norm()) / eps,
        "residual": worst(stated[kept]) / unit,
        "residual of the other side": worst(other[kept]) / unit,
        "stated residual": worst((stated - residual).abs()[kept]) / unit,
    }
