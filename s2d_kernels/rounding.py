"""Stochastic rounding to bf16: the seeds of layers, and with torch what `reference.stochastically_rounded` defines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.static_memory import Chosen

ROUNDINGS = ("nearest", "stochastic")
# Between the seeds of two layers, modulo 2^64: the odd number nearest to 2^64 / golden ratio, as in SplitMix64.
STEP = 0x9E3779B97F4A7C15 - 2**64
LARGEST_SEED = 2**63 - 1


def check_rounding(rounding: object) -> bool:
    """Whether to round stochastically; a ValueError unless `rounding` is one of `ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is neither 'nearest' nor 'stochastic'")
    return rounding == "stochastic"


def refuse_fp16(name: str, tensor: Tensor) -> None:
    """A ValueError for an fp16 tensor, which is not rounded stochastically."""
    if tensor.dtype == torch.float16:
        raise ValueError(
            f"{name} has dtype torch.float16: stochastic rounding is for bf16 (fp32 and fp64 need none); "
            "use rounding='nearest'"
        )


def layer_seeds(seed: object, count: int, device: torch.device) -> Tensor:
    """int64 `[count]` on `device`: `seed` itself where it has one for each layer, else seed + i STEP modulo 2^64.

    Neither form waits for the device.

    Raises:
        TypeError, ValueError: `seed` is neither an int in 0..2^63 - 1 nor an int64 tensor `[1]` or `[count]` there.
    """
    if isinstance(seed, Tensor):
        ops.check_tensor("seed", seed, dtypes=(torch.int64,), device=device)
        if tuple(seed.shape) not in ((1,), (count,)):
            raise ValueError(f"seed must have shape [1] or [{count}], got {tuple(seed.shape)}")
        if len(seed) == count:
            return seed
        return torch.arange(count, device=device).mul_(STEP).add_(seed)
    number = ops.check_integer("seed", seed, low=0, high=LARGEST_SEED)
    return torch.arange(count, device=device).mul_(STEP).add_(number)


class StepSeeds:
    """Seeds for the matrices of a run, at each step others, in one memory on a device that is not waited for.

    They are functions of the run's seed, the step, the use in the step and the matrix's place alone.
    """

    def __init__(self, seed: int, count: int, device: torch.device) -> None:
        self._seed = seed
        self._offsets = torch.arange(count, device=device).mul_(STEP)
        self._seeds = self._offsets.clone()
        self._chosen = Chosen(self._seeds)

    def draw(self, step: int, use: int = 0) -> None:
        """Those of one use of random numbers in a step, in the place of the ones before."""
        words = np.random.SeedSequence(self._seed, spawn_key=(step, use)).generate_state(1, np.uint64)
        base = words[0] >> np.uint64(1)
        torch.add(self._offsets, int(base), out=self._seeds)

    def of(self, places: Sequence[int]) -> Tensor:
        """int64 `[places]`, in the same memory as long as the places are the same: captured graphs read it."""
        return self._chosen.at(places)

    def move(self, device: torch.device) -> None:
        """Go on on another device."""
        self._offsets, self._seeds = self._offsets.to(device), self._seeds.to(device)
        self._chosen = Chosen(self._seeds)


def check_seeds(grads: Sequence[Tensor], seeds: Tensor | None) -> None:
    """What the implementations of `add_penalty_grad_` take as seeds."""
    if seeds is None:
        return
    ops.check_tensor("seeds", seeds, ndim=1, dtypes=(torch.int64,), device=grads[0].device)
    ops.check_same_length(grads=grads, seeds=seeds)  # type: ignore[arg-type]
    for index, grad in enumerate(grads):
        refuse_fp16(f"grads[{index}]", grad)


def row_keys(seed: Tensor, rows: int) -> Tensor:
    """mix(i ^ key) of `reference.rounding_bits` for the rows, as int32 bits `[rows]`; `seed` is one int64."""
    lower, upper = seed.reshape(1).view(torch.int32)
    key = _mix(lower ^ _mix(upper ^ (0x9E3779B9 - 2**32)))
    return _mix(torch.arange(rows, dtype=torch.int32, device=seed.device) ^ key)


def stochastically_rounded(x: Tensor, keys: Tensor) -> Tensor:
    """fp32 `x [r, n]` in bf16 with the random numbers of its rows' `keys [r]`."""
    n = x.shape[1]
    halves = torch.arange((n + 1) // 2, dtype=torch.int32, device=x.device)
    random = _mix(keys[:, None] ^ halves).view(torch.int16)[:, :n].to(torch.int32)
    random &= 0xFFFF
    bits = x.contiguous().view(torch.int32)
    random.masked_fill_((bits & 0x7FFFFFFF) >= 0x7F7F0000, 0)
    random += bits
    random >>= 16
    return random.to(torch.int16).view(torch.bfloat16)


def _mix(x: Tensor) -> Tensor:
    """mix of `reference.rounding_bits`, in place, of int32 bits: their products wrap, their shifts repeat the sign."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
