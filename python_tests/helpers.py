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
