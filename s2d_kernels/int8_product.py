"""The int8 product of a CPU, `torch._int_mm`: whether it is exact here, and worth it."""

from __future__ import annotations

import functools
import math
import time

import torch


@functools.cache
def int8_product_is_exact(span: int) -> bool:
    """Whether this CPU's `torch._int_mm` is exact for operands of magnitude <= `span`.

    It is oneDNN's s8 x s8 product with an s32 result. CPUs without VNNI (or AMX) add pairs of 8-bit products in 16 bits
    and saturate, which shows with extreme operands only. So it is tried, once a process, on nothing but extremes.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    extremes = torch.tensor([-min(span, 128), 0, min(span, 127)], device="cpu")
    try:
        for M, K, N in ((1, 64, 16), (37, 199, 63), (128, 256, 128)):
            x, w = (extremes[torch.randint(3, (rows, K), generator=generator, device="cpu")] for rows in (M, N))
            x[0], w[0], w[-1] = extremes[2], extremes[2], extremes[0]
            got = torch._int_mm(x.to(torch.int8), w.to(torch.int8).mT)
            if got.dtype != torch.int32 or not torch.equal(got.double(), x.double() @ w.double().mT):
                return False
    except RuntimeError:
        return False
    return True


def _has_instructions() -> bool:
    """Whether the CPU adds four 8-bit products to 32 bits at once, and torch has the library that does it with them."""
    has = torch.cpu.get_capabilities()
    instructions = any(has.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return instructions and torch.backends.mkldnn.is_available()


@functools.cache
def _int8_product_is_faster() -> bool:
    """Than an fp32 GEMM: always with the instructions, elsewhere by the clock, once a process.

    Without them it may be a plain loop. The best of many turns of both, so that other work on the machine, which takes
    time from some of them, does not turn the answer.
    """
    if _has_instructions():
        return True
    generator = torch.Generator("cpu").manual_seed(0)
    x, w = (
        torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator, device="cpu")
        for shape in ((128, 512), (256, 512))
    )
    as_fp32 = x.float(), w.float().mT
    seconds = [math.inf, math.inf]
    for _ in range(15):
        for route, (function, operands) in enumerate(((torch._int_mm, (x, w.mT)), (torch.mm, as_fp32))):
            begin = time.perf_counter()
            function(*operands)
            seconds[route] = min(seconds[route], time.perf_counter() - begin)
    return seconds[0] < seconds[1]


def int8_product_serves(span: int) -> bool:
    """Whether the int8 product is exact for operands of magnitude <= `span`, and faster than an fp32 GEMM.

    Either route gives the same integers, so where the clock is asked it decides about nothing but time.
    """
    return int8_product_is_exact(span) and _int8_product_is_faster()


@functools.cache
def int8_digits_serve() -> bool:
    """Whether products of digits (`fixed_point.py`) are exact and pay.

    They round unlike an fp32 GEMM, so this must not depend on the clock: the CPU has to have the instructions.
    """
    return _has_instructions() and int8_product_is_exact(127)


def use_int8_product(device: torch.device, depth: int, x_span: int, w_span: int) -> bool:
    """Whether sums of `depth` products of integers of these magnitudes on `device` go through `torch._int_mm`.

    Not for the shallowest: they gain nothing, and torch 2.11 to 2.13 return garbage for a depth of 1.
    """
    if device.type != "cpu" or depth < 16 or not bool(torch.backends.mkldnn.enabled):
        return False
    return int8_product_serves(max(x_span, w_span))
