"""A small model with an outlier direction, and the loop that trains it with S2D."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2d_kernels import S2D

LR = 1e-2


def spiked_model(*, bulk: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    """Two linear layers with Gaussian elements of size `bulk`, the first with an inflated direction v of the inputs."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    v = torch.randn(32, generator=generator)
    v = v / v.norm()
    u = torch.zeros(64)
    u[:2] = 0.5**0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * bulk)
        model[0].weight += 20 * torch.outer(u, v)
    return model.to(dtype), v.to(dtype)


def batch(v: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 32, generator=generator).to(v.dtype) + 3 * v


def train(
    model: nn.Module,
    reg: S2D,
    optimizer: torch.optim.Optimizer,
    v: Tensor,
    steps: range,
    *,
    task: float = 1.0,
    lr: float = LR,
) -> None:
    for step in steps:
        x = batch(v, step)
        loss = task * (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if reg.mode == "coupled":
            reg.add_grad(lr=lr)
            optimizer.step()
        else:
            optimizer.step()
            reg.decay_(lr)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


MODES = [("coupled", 5e-4), ("decoupled", 1.0)]
