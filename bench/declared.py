"""What `python -m bench audit` expects of each CUDA kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Declared(NamedTuple):
    """What is expected of a CUDA kernel.

    Attributes:
        threads: of a block.
        dynamic_shared: bytes that the launch asks for.
        instructions: that must be in the machine code -> at least how often, as `occurrences` counts them.
        shape: the benchmark's.
        traffic: mangled name -> (bytes moved at least, flops) at that shape.
    """

    threads: int
    dynamic_shared: int
    instructions: dict[str, int]
    shape: str
    traffic: Callable[[str], tuple[int, int]]


def mangled(name: str, *template: str | int) -> str:
    """The telling part of a mangled name; template arguments are "f" (float), "t" (16 bits) and integers."""
    arguments = "".join(f"Li{argument}E" if isinstance(argument, int) else argument for argument in template)
    return f"{len(name)}{name}" + (f"I{arguments}E" if template else "")


# A layer of SigLIP2-B in the middle of a warm refresh: W [D, d], b rows a block, all blocks of the four reads.
_D, _d, _B, _ALL = 3072, 768, 8, 32
_SHAPE = f"W [{_D}, {_d}], b = {_B}, 4 reads"
_SLABS = _D // 128


def _product(scalar: str, warps: int, tiles: int, n: int) -> Declared:
    """Y and Z of one read: 4 steps of the first product are unrolled, all tiles of the second."""
    bits16 = scalar == "t"
    weight_bytes = 2 if bits16 else 4
    tile = 16 * (_d + 8) * weight_bytes
    return Declared(
        threads=32 * warps,
        dynamic_shared=2 * tile if 2 * tile + 6 * 1024 <= 112 * 1024 else tile,
        # fp32 is split in two on both sides (3 products), 16 bits on the thin one alone (2)
        instructions={
            "HMMA.1688.TF32": (2 if bits16 else 3) * n * (4 + 2 * tiles),
            "LDGSTS.128": 2,  # along the rows, along the columns
        },
        shape=_SHAPE,
        traffic=lambda _: (weight_bytes * _D * _d + 4 * _B * (_d + _D) + 4 * _SLABS * _B * _d, 4 * _B * _D * _d),
    )


CUDA_KERNELS = {
    mangled("add_penalty_grad"): Declared(
        threads=256,
        dynamic_shared=0,
        # Of the aligned paths for fp32, bf16 and fp16, in a thread: 4 rows of the gradient; the factors of a word's
        # columns, 1 access in fp32 and 2 in the 16-bit dtypes; 4 rows x 4 words packed. The general path rounds a
        # single element of each of the 4 rows.
        instructions={
            "LDG.128.!CONSTANT": 3 * 4,
            "LDG.128.CONSTANT": 1 + 2 + 2,
            "STG.128": 3 * 4,
            "F2FP.BF16": 4 * 4 + 4,
            "F2FP.!BF16": 4 * 4 + 4,
        },
        shape="[4096, 4096] fp32, k=3",
        traffic=lambda _: (2 * 4 * 4096**2 + 4 * 3 * (2 * 4096 + 1), 7 * 4096**2 + 3 * 4096),
    ),
    mangled("adamw"): Declared(
        threads=128,
        dynamic_shared=0,
        # Of the aligned paths for fp32, bf16 and fp16, in a thread: 2 rows of p, g, m and v; the factors of a word's
        # columns, 1 access in fp32 and 2 in the 16-bit dtypes; 2 rows of p, m and v written, packed 4 words each. The
        # general path rounds a single element of each, two of them with one instruction.
        instructions={
            "LDG.128.!CONSTANT": 3 * 2 * 4,
            "LDG.128.CONSTANT": 1 + 2 + 2,
            "STG.128": 3 * 2 * 3,
            "F2FP.BF16": 2 * 3 * 4 + 2,
            "F2FP.!BF16": 2 * 3 * 4 + 2,
        },
        shape="[4096, 4096] fp32, k=3",
        traffic=lambda _: (7 * 4 * 4096**2 + 4 * 3 * (2 * 4096 + 1), 20 * 4096**2 + 3 * 4096),
    ),
    mangled("capture_search"): Declared(
        256, 0, {"LDG.128": 3}, "y [4096, 3072] fp32", lambda _: (4 * 4096 * 3072, 2 * 4096 * 3072)
    ),
    mangled("capture_keep"): Declared(
        256, 0, {}, "1024 blocks, x [4096, 768] fp32", lambda _: (16 * 1024 + 2 * 4 * 768, 0)
    ),
    mangled("find_largest"): Declared(256, 0, {"LDG.128": 2}, _SHAPE, lambda _: (4 * _D * _d, 0)),
    mangled("begin"): Declared(256, 0, {}, _SHAPE, lambda _: (8 * _B * _d, 8 * _B * _B * _d)),
    mangled("product", "f", 8, 8, 1): _product("f", 8, 8, 1),
    mangled("product", "f", 8, 8, 2): _product("f", 8, 8, 2),
    mangled("product", "f", 16, 8, 1): _product("f", 16, 8, 1),
    mangled("product", "t", 8, 8, 1): _product("t", 8, 8, 1),
    mangled("product", "t", 8, 8, 2): _product("t", 8, 8, 2),
    mangled("product", "t", 16, 16, 1): _product("t", 16, 16, 1),
    mangled("sum_partials"): Declared(256, 0, {}, _SHAPE, lambda _: (4 * (_SLABS + 1) * _B * _d, _SLABS * _B * _d)),
    # two rounds of projection, Gram matrix and rotation, against the blocks before the last
    mangled("orthonormalize"): Declared(
        256,
        0,
        {"DFMA": 1},
        _SHAPE,
        lambda _: (4 * _d * (2 * _B + _ALL - _B), 2 * _d * (4 * _B * (_ALL - _B) + 4 * _B * _B)),
    ),
    mangled("gram"): Declared(
        256, 0, {"LDG.128": 2, "DFMA": 4}, _SHAPE, lambda _: (4 * _ALL * _D + 8 * 12 * _ALL**2, _ALL**2 * _D)
    ),
    mangled("ritz"): Declared(
        256, 0, {"DFMA": 1}, _SHAPE, lambda _: (8 * 12 * _ALL**2 + 4 * _d * (2 * _ALL + _B), 4 * _B * _ALL * _d)
    ),
    mangled("rotate_left"): Declared(256, 0, {}, _SHAPE, lambda _: (4 * _D * (_ALL + _B), 2 * _B * _ALL * _D)),
}
