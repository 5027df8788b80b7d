"""Quantizers and integer GEMM of csrc: executed by the emulation on the CPU, or on a GPU with --device cuda."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from emulated import build_emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d_kernels import _native, ops, quantizers

SIZES = (0, 1, 37, 63, 199)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "ties", "subnormal", "huge", "zero rows", "non-finite", "skewed")


@pytest.fixture(autouse=True, scope="module")
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    """The emulation for CPU tensors; S2D_LIBRARY names another build of it (AddressSanitizer)."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--device") == "cpu" and not os.environ.get("S2D_LIBRARY"):
            build_emulated()
            patch.setenv("S2D_NATIVE", "emulated")
        yield
        if _native.emulated():
            _native.load().s2d_emulation_set_order(0, 0)


def values(rows: int, K: int, kind: str, layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`[rows, K]` of a kind that rounding, range or layout make hard."""
    x = torch.randn(2 * rows + 1, 2 * K + 16, generator=generator)
    if kind == "ties":
        x = (x * 4).round() / 2
    elif kind == "subnormal":
        x = x * 10.0 ** -int(torch.randint(37, 46, (), generator=generator))
    elif kind == "huge":
        x = x.double().mul(10.0 ** int(torch.randint(17, 39, (), generator=generator))).float()
    elif kind == "zero rows":
        x = x * (torch.rand(len(x), 1, generator=generator) > 0.5)
    elif kind == "non-finite":
        bad = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.01, bad, x)
    elif kind == "skewed":
        x = x.abs() + 1
    x = x.to(dtype)
    return {
        "dense": lambda: x[:rows, :K].contiguous(),
        "transposed": lambda: x[:rows, :K].mT.contiguous().mT,
        "strided": lambda: x[: 2 * rows : 2, : 2 * K : 2],
        "offset": lambda: x[1 : rows + 1, 1 : K + 1],
        "rows": lambda: x[: 2 * rows : 2, 8 : K + 8],
    }[layout]()


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], note: object = "") -> None:
    for index, (mine, truth) in enumerate(zip(got, expected, strict=True)):
        assert mine.dtype == truth.dtype
        assert mine.is_contiguous()
        torch.testing.assert_close(
            mine.cpu(), truth, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=index: f"output {i}, {note}: {text}"
        )


def quantize(x: Tensor, device: torch.device, *arguments: object) -> tuple[Tensor, ...]:
    """On `device`, with the strides of `x`."""
    there = x if device.type == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if there is not x:
        there.copy_(x)
    ranges = [a if a is None else a.to(device) for a in arguments[:2]]
    return torch.ops.s2d.quantize(there, *ranges, *arguments[2:], "cuda")


def check_quantizer(x: Tensor, device: torch.device, *arguments: object) -> None:
    """(minimum, maximum, bits, symmetric, granularity, group_size); the reference's bits in every output."""
    expected = torch.ops.s2d.quantize(x, *arguments, "reference")
    assert_equal(quantize(x, device, *arguments), expected, (x.shape, x.stride(), x.dtype, *arguments))


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_quantizer_bits_equal_the_reference(data: st.DataObject, device: torch.device) -> None:
    rows, bits = data.draw(st.sampled_from(SIZES)), data.draw(st.integers(2, 8))
    symmetric = data.draw(st.booleans())
    granularity = data.draw(st.sampled_from(("per_row", "per_tensor", "per_group")))
    group_size = 0
    K = data.draw(st.sampled_from((*SIZES, 64, 256, 264)))
    if granularity == "per_group" or data.draw(st.booleans()):
        group_size = data.draw(st.sampled_from((8, 16, 32, 64, 128, 256)))
        K = group_size * data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(FLOATS))
    layout = data.draw(st.sampled_from(("dense", "transposed", "strided", "offset", "rows")))
    x = values(rows, K, kind, layout, dtype, generator)
    minimum = maximum = None
    if data.draw(st.booleans()):
        wide = granularity == "per_row" and data.draw(st.booleans())
        scale = data.draw(st.sampled_from((1.0, 1e-3, 1e-37, 1e37)))
        minimum = -torch.rand(rows if wide else 1, generator=generator) * scale
        maximum = torch.rand(rows if wide else 1, generator=generator) * scale
        if data.draw(st.booleans()) and len(minimum):
            minimum[-1] = data.draw(st.sampled_from((math.nan, -math.inf, 0.5 * scale)))
    check_quantizer(x, device, minimum, maximum, bits, symmetric, granularity, group_size)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "K"), [(9, 1024), (3, 1032), (2, 4096), (2, 4101), (1, 16384), (2, 17001), (1, 33000)]
)
def test_rows_of_every_length(rows: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    """A warp's, a block's in registers, and longer ones that are read twice."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(K)) * 3
    x[0, K - 1], x[rows - 1, K // 2] = 40.0, -55.0  # the range's ends, in the last unit and in the middle
    for granularity, symmetric in (("per_row", False), ("per_row", True), ("per_tensor", False)):
        check_quantizer(x.to(dtype), device, None, None, 4, symmetric, granularity, 0)
    if K % 128 == 0:
        check_quantizer(x.to(dtype), device, None, None, 8, False, "per_row", 128)
    poisoned = x.clone()
    poisoned[0, K - 1] = math.nan
    check_quantizer(poisoned.to(dtype), device, None, None, 8, False, "per_row", 0)


def test_every_code_boundary(device: torch.device) -> None:
    """Quotients at and beside every halfway point, scales of all magnitudes: where an approximate division shows."""
    generator = torch.Generator().manual_seed(0)
    for exponent in (-126, -125, -61, -60, -20, 0, 40, 60, 61, 100):
        mantissa = torch.rand(16, 1, generator=generator) + 1
        scale = mantissa * 2.0**exponent
        span = (scale * 255).clamp(max=3e38)
        half = (torch.arange(255) + 0.5) * (span / 255)
        near = torch.stack([half, half.nextafter(half.new_zeros(())), half.nextafter(half.new_full((), math.inf))], 2)
        x = torch.cat([near.flatten(1).minimum(span), span, torch.zeros_like(span)], 1)
        check_quantizer(x, device, None, None, 8, False, "per_row", 0)
        check_quantizer(-x, device, None, None, 8, True, "per_row", 0)
        check_quantizer(x, device, x.new_zeros(16), span.flatten() * 0.7, 8, False, "per_row", 0)


def test_result_does_not_depend_on_thread_order(device: torch.device) -> None:
    x = torch.randn(70, 200, generator=torch.Generator().manual_seed(3))
    for granularity in ("per_row", "per_tensor"):
        before = quantize(x, device, None, None, 4, False, granularity, 0)
        for order in (1, 2):
            if _native.emulated():
                _native.load().s2d_emulation_set_order(order, 5)
            assert_equal(tuple(t.cpu() for t in quantize(x, device, None, None, 4, False, granularity, 0)), before)
    if _native.emulated():
        _native.load().s2d_emulation_set_order(0, 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_codes_of_the_c_interface(symmetric: bool, device: torch.device) -> None:
    """They come from the same pass, with or without the other optional outputs."""
    from s2d_kernels.cuda_quant import quantize_packed

    for rows, K in ((5, 64), (3, 37), (2, 1), (1, 1100), (4, 8)):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(K)).to(device)
        for group_size in (0, 8) if K % 8 == 0 else (0,):
            kind = (None, None, 4, symmetric, "per_group" if group_size else "per_row", group_size)
            packed, operand = quantize_packed(x, *kind)
            expected = torch.ops.s2d.quantize(x.cpu(), *kind, "reference")
            assert_equal((packed.cpu(),), (quantizers.pack_codes(expected[0]),))
            assert_equal(tuple(t.cpu() for t in operand), expected[1:])


def test_what_the_kernels_do_not_take(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"x has dtype torch.float64: impl='cuda' quantizes fp32, bf16 and fp16"):
        quantize(torch.zeros(2, 8, dtype=torch.float64), device, None, None, 4, True, "per_row", 0)
    with pytest.raises(ValueError, match=r"group_size=9: impl='cuda' takes 8, 16"):
        quantize(torch.zeros(2, 9), device, None, None, 4, True, "per_group", 9)
    assert "cuda" in ops.available("quantize")
    arguments = (None, None, 4, True, "per_group")
    supports = ops._SUPPORTS["quantize", "cuda"]
    assert supports(torch.zeros(2, 64), *arguments, 64)
    assert not supports(torch.zeros(2, 9), *arguments, 9)
    assert not supports(torch.zeros(2, 64, dtype=torch.float64), *arguments, 64)


def test_bad_arguments_of_the_c_interface() -> None:
    x, out = torch.zeros(2, 8), torch.zeros(64, dtype=torch.int32)
    good = {
        **{name: out.data_ptr() for name in ("scale", "zero_point", "row_sum")},
        **{"x": x.data_ptr(), "rows": 2, "cols": 8, "row_stride": 8, "col_stride": 1, "bits": 4},
    }
    assert _native.supports_quantization(_native.Quantization(**good))
    for change in (
        {"rows": -1}, {"cols": -1}, {"bits": 1}, {"bits": 9}, {"dtype": 3}, {"granularity": 3}, {"granularity": 2},
        {"group_size": 3}, {"group_size": 4}, {"scale": None}, {"zero_point": None}, {"row_sum": None}, {"x": None},
        {"x": x.data_ptr() + 1}, {"minimum": x.data_ptr()}, {"range_stride": 2}, {"packed": x.data_ptr(), "bits": 5},
    ):  # fmt: skip
        assert not _native.supports_quantization(_native.Quantization(**good | change)), change
    per_tensor = _native.Quantization(**good | {"granularity": 1})
    assert _native.quantize_workspace(per_tensor) == 12
    with pytest.raises(_native.NativeLibraryError, match="workspace"):
        _native.quantize(per_tensor, (0, 0), 0)
