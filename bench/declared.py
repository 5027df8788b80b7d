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
    """The telling part of a mangled name; template arguments are integers and types as mangled, "f" for float."""
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


def _resident(scalar: str, n: int) -> Declared:
    """All reads of a warm refresh from shared memory, a block's slab being what fits sm_80."""
    bits16 = scalar == "t"
    weight_bytes = 2 if bits16 else 4
    rows = 48 if n == 1 else 32
    meeting = 4 * (16 * 8 * n * 16 + 8 * n * 20)
    return Declared(
        threads=512,
        dynamic_shared=rows * (_d + 8) * weight_bytes + meeting,
        instructions={
            # Q's fragments are held in registers, and so all 8 steps of the first product unrolled, for b <= 8
            "HMMA.1688.TF32": (2 if bits16 else 3) * n * ((8 if n == 1 else 4) + 2 * 4),
            "LDGSTS.128": 2,
            "LDG.STRONG.GPU": 4,  # the team's barriers
            "LDG.CONSTANT": 0,  # none: what other blocks wrote must not come from the read-only cache
            "DFMA": 8,
        },
        shape=_SHAPE,
        traffic=lambda _: (
            weight_bytes * _D * _d + 4 * _ALL * (_D + 2 * _d) + 4 * (_D // rows) * _B * _d,
            4 * _ALL * _D * _d,
        ),
    )


_SCALARS = {"f": 4, "13__nv_bfloat16": 2, "6__half": 2}


def _quantizer(name: str, scalar: str, row_threads: int, units: int, cols: int) -> dict[str, Declared]:
    """One of csrc/quantize.cu at x [4096, cols]; `units` of eight elements in a thread."""
    width = _SCALARS[scalar]
    template = (scalar, row_threads, units) if row_threads else (scalar,)
    loads_only = name == "tensor_range"
    written = 0 if loads_only else 4096 * (cols + cols // 8 + 12)
    return {
        mangled(name, *template): Declared(
            threads=256,
            dynamic_shared=0,
            # 16 bytes a load, 8 codes a store; poison of every element, and the correction of its quotient
            instructions={
                "LDG.128.CONSTANT": units * width // 2,
                "FFMA": 8 * units * (1 if loads_only else 3),
                **({} if loads_only else {"STG.64": units}),
            },
            shape=f"[4096, {cols}]",
            traffic=lambda _: (4096 * cols * width + written, 4096 * cols * (3 if loads_only else 7)),
        )
    }


def _quantizers() -> dict[str, Declared]:
    found: dict[str, Declared] = {}
    for scalar in _SCALARS:
        for row_threads, units, cols in ((32, 4, 768), (256, 2, 4096), (256, 8, 14336)):
            found |= _quantizer("quantize_rows", scalar, row_threads, units, cols)
        found |= _quantizer("quantize_groups", scalar, 0, 1, 4096)
        found |= _quantizer("tensor_range", scalar, 0, 4, 4096)
    return found


# Tile and warp tile [M, N], stages, resident blocks, groups; of csrc/w4a4_gemm.cu
_GEMM_SHAPES = ((128, 128, 64, 32, 4, 2, 0), (32, 64, 32, 16, 6, 4, 0), (64, 128, 32, 32, 6, 1, 1))


def _products() -> dict[str, Declared]:
    """The integer GEMM at M = N = K = 4096 (M = 32 for small tiles), of int8, int4 and uint4 codes of x."""
    found = {}
    for tile_m, tile_n, warp_m, warp_n, stages, blocks, grouped in _GEMM_SHAPES:
        threads = tile_m // warp_m * (tile_n // warp_n) * 32
        M = 32 if tile_m == 32 else 4096
        # The 4-bit product of sm_90, a function of two 8-bit ones, is all that both architectures have of it.
        steps = 1 if grouped else 2  # unrolled
        products = steps * (warp_m // 16) * (warp_n // 8)
        for codes, packed in (("9Int8Codes", False), ("9Int4Codes", True), ("10UInt4Codes", True)):
            shape = f"NS0_5ShapeILi{tile_m}ELi{tile_n}ELi{warp_m}ELi{warp_n}ELi{stages}ELi{blocks}ELb{grouped}EEE"
            found[f"14integer_linearI{shape}NS0_{codes}E"] = Declared(
                threads=threads,
                dynamic_shared=stages * (tile_m + tile_n) * 64,
                instructions={
                    "IMMA": 2 if packed else products,
                    "LDSM.4": steps * (warp_m // 16 + warp_n // 16),
                    "LDGSTS.128": stages * (tile_m + tile_n) * 4 // threads,
                    "FMUL": 2 * (warp_m // 16) * (warp_n // 8) * 4,
                },
                shape=f"M = {M}, N = K = 4096" + (", groups" if grouped else ""),
                traffic=lambda _, M=M, packed=packed: (  # type: ignore[misc]
                    (M + 4096) * 4096 // (2 if packed else 1) + 2 * M * 4096,
                    2 * M * 4096**2,
                ),
            )
    found[mangled("pack_codes")] = Declared(
        256, 0, {"LDG.64": 1, "STG": 1}, "[4096, 4096]", lambda _: (4096**2 * 3 // 2, 0)
    )
    return found


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
    # The aligned path, in a thread: as above for bf16; a word's random number has two products and three shifts.
    mangled("add_penalty_grad_stochastic"): Declared(
        threads=256,
        dynamic_shared=0,
        instructions={
            "LDG.128.!CONSTANT": 4,
            "LDG.128.CONSTANT": 2,
            "STG.128": 4,
            "IMAD": 4 * 4 * 2,
            "SHF.R.U32": 4 * 4 * 3,
        },
        shape="[4096, 4096] bf16, k=3",
        traffic=lambda _: (2 * 2 * 4096**2 + 4 * 3 * (2 * 4096 + 1), 7 * 4096**2 + 3 * 4096),
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
    mangled("resident", "f", 1): _resident("f", 1),
    mangled("resident", "f", 2): _resident("f", 2),
    mangled("resident", "t", 1): _resident("t", 1),
    mangled("resident", "t", 2): _resident("t", 2),
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
    **_quantizers(),
    **_products(),
}
