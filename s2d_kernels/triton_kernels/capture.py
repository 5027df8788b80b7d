"""`capture_largest_` in Triton: one pass over y in blocks, then one program over their results (csrc/capture.cu)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from s2d_kernels import ops
from s2d_kernels.triton_kernels.common import Variant, check_device, interpreted, jit, tl, widen

ROWS, COLS, WARPS = 16, 256, 8
PARTIALS = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_INDEX = 2**62


@jit()
def _search(
    y: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    enabled: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    tokens: tl.tensor,
    neurons: tl.tensor,
    features: tl.tensor,
    y_row: tl.tensor,
    y_col: tl.tensor,
    x_row: tl.tensor,
    x_col: tl.tensor,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NO_INDEX: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """The best of one tile `[ROWS, COLS]` of y, of equal ones the first; -1 where none counts."""
    active = True
    if GATED:
        active = tl.load(enabled) != 0
    if active:
        tile = tl.program_id(0).to(tl.int64)
        across = tl.cdiv(neurons, COLS)
        i = tile // across * ROWS + tl.arange(0, ROWS).to(tl.int64)
        j = tile % across * COLS + tl.arange(0, COLS).to(tl.int64)
        inside = (i < tokens)[:, None] & (j < neurons)[None, :]
        value = tl.load(y + (i[:, None] * y_row + j[None, :] * y_col), mask=inside, other=0.0)
        value = widen(value, tl.float32, INTERPRETED)
        if HAS_BIAS:
            value = value - tl.load(bias + j, mask=j < neurons, other=0.0)[None, :]
        magnitude = tl.abs(value)
        magnitude = tl.where(inside & (magnitude == magnitude), magnitude, -1.0)
        if tl.max(magnitude) == float("inf"):
            # Rare: an infinite output counts only where its input row is finite.
            bad = tl.zeros((ROWS,), tl.int32)
            first = tl.full((), 0, tl.int64)
            while first < features:
                c = first + tl.arange(0, COLS).to(tl.int64)
                given = (i < tokens)[:, None] & (c < features)[None, :]
                part = tl.load(x + (i[:, None] * x_row + c[None, :] * x_col), mask=given, other=0.0)
                part = widen(part, tl.float32, INTERPRETED)
                finite = tl.abs(part) < float("inf")
                bad = tl.maximum(bad, tl.max(tl.where(finite, 0, 1), axis=1))
                first += COLS
            magnitude = tl.where((magnitude == float("inf")) & (bad[:, None] != 0), -1.0, magnitude)
        best = tl.max(magnitude)
        index = i[:, None] * neurons + j[None, :]
        tl.store(values + tile, best)
        tl.store(indices + tile, tl.min(tl.where(magnitude == best, index, NO_INDEX)))


@jit(do_not_specialize=["count"])
def _keep(
    value: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    x: tl.tensor,
    enabled: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    count: tl.tensor,
    neurons: tl.tensor,
    features: tl.tensor,
    x_row: tl.tensor,
    x_col: tl.tensor,
    GATED: tl.constexpr,
    PARTIALS: tl.constexpr,
    NO_INDEX: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """The best of the tiles, kept with its place and input row where it is larger than what is."""
    active = True
    if GATED:
        active = tl.load(enabled) != 0
    if active:
        k = tl.arange(0, PARTIALS)
        best = tl.full((PARTIALS,), -1.0, tl.float32)
        index = tl.full((PARTIALS,), NO_INDEX, tl.int64)
        first = tl.full((), 0, tl.int32)
        while first < count:
            other = tl.load(values + first + k, mask=first + k < count, other=-1.0)
            at = tl.load(indices + first + k, mask=first + k < count, other=NO_INDEX)
            better = (other > best) | ((other == best) & (at < index))
            best = tl.where(better, other, best)
            index = tl.where(better, at, index)
            first += PARTIALS
        largest = tl.max(best)
        at = tl.min(tl.where(best == largest, index, NO_INDEX))
        if largest > tl.load(value):
            token = at // neurons
            start = tl.full((), 0, tl.int64)
            while start < features:
                c = start + k.to(tl.int64)
                part = tl.load(x + (token * x_row + c * x_col), mask=c < features, other=0.0)
                tl.store(row + c, widen(part, tl.float32, INTERPRETED), mask=c < features)
                start += PARTIALS
            tl.store(place, at % neurons)
            tl.store(place + 1, token)
            tl.debug_barrier()  # every thread has compared with what was kept
            tl.store(value, largest)


def _supports(
    _value: Tensor, _place: Tensor, _row: Tensor, y: Tensor, x: Tensor, _bias: Tensor | None, _enabled: Tensor | None
) -> bool:
    return y.dtype in DTYPES and x.dtype in DTYPES


@ops.implements("capture_largest_", "triton", _supports)
def _capture_triton(
    value: Tensor, place: Tensor, row: Tensor, y: Tensor, x: Tensor, bias: Tensor | None, enabled: Tensor | None
) -> None:
    check_device(y.device)
    for name, tensor in (("y", y), ("x", x)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}: impl='triton' takes fp32, bf16 and fp16")
    if y.numel() == 0:
        return
    tokens, neurons = y.shape
    tiles = -(-tokens // ROWS) * -(-neurons // COLS)
    values = torch.empty(tiles, dtype=torch.float32, device=y.device)
    indices = torch.empty(tiles, dtype=torch.int64, device=y.device)
    bias = None if bias is None else bias.float().contiguous()
    flag = value if enabled is None else enabled.view(torch.uint8)
    shared = {"GATED": enabled is not None, "NO_INDEX": NO_INDEX, "INTERPRETED": interpreted()}
    with torch.cuda.device(y.device) if y.device.type == "cuda" else nullcontext():
        _search[(tiles,)](
            y, x, value if bias is None else bias, flag, values, indices, tokens, neurons, x.shape[1], *y.stride(),
            *x.stride(), HAS_BIAS=bias is not None, ROWS=ROWS, COLS=COLS, num_warps=WARPS, **shared,
        )  # fmt: skip
        _keep[(1,)](
            value, place, row, x, flag, values, indices, tiles, neurons, x.shape[1], *x.stride(), PARTIALS=PARTIALS,
            num_warps=WARPS, **shared,
        )  # fmt: skip


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles."""
    tokens, neurons = 4096, 3072
    found = []
    for dtype in DTYPES:
        name = str(getattr(tl, str(dtype).removeprefix("torch.")))
        pointer = f"*{name}"
        common: dict[str, Any] = {"GATED": True, "NO_INDEX": NO_INDEX, "INTERPRETED": interpreted()}
        constants = common | {"HAS_BIAS": True, "ROWS": ROWS, "COLS": COLS}
        signature = {
            "y": pointer, "x": pointer, "bias": "*fp32", "enabled": "*u8", "values": "*fp32", "indices": "*i64",
            **dict.fromkeys(("tokens", "neurons", "features", "y_row"), "i32"), "y_col": "constexpr", "x_row": "i32",
            "x_col": "constexpr",
        }  # fmt: skip
        divisible: dict[tuple[int, ...], list[list[Any]]] = {
            (place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 7, 8, 9, 11)
        }
        found.append(
            Variant(
                name=f"capture_search<{name}>",
                kernel=_search,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constants=constants | {"y_col": 1, "x_col": 1},
                attributes=divisible,
                warps=WARPS,
                stages=1,
                instructions={"LDG.128": ROWS * COLS // (32 * WARPS) * dtype.itemsize // 16},
                shape=f"y [{tokens}, {neurons}]",
                bytes=tokens * neurons * dtype.itemsize,
                flops=2 * tokens * neurons,
            )
        )
        found.append(
            Variant(
                name=f"capture_keep<{name}>",
                kernel=_keep,
                signature={
                    "value": "*fp32", "place": "*i64", "row": "*fp32", "x": pointer, "enabled": "*u8",
                    "values": "*fp32", "indices": "*i64", **dict.fromkeys(("count", "neurons", "features"), "i32"),
                    "x_row": "i32", "x_col": "constexpr", **dict.fromkeys((*common, "PARTIALS"), "constexpr"),
                },
                constants=common | {"PARTIALS": PARTIALS, "x_col": 1},
                attributes={(place,): [["tt.divisibility", 16]] for place in (1, 2, 3, 5, 6, 9, 10)},
                warps=WARPS,
                stages=1,
                instructions={},
                shape=f"{-(-tokens // ROWS) * -(-neurons // COLS)} tiles, x [{tokens}, 768]",
                bytes=12 * -(-tokens // ROWS) * -(-neurons // COLS) + (4 + dtype.itemsize) * 768,
                flops=0,
            )
        )  # fmt: skip
    return found
