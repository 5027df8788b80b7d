"""Quantizers, integer GEMM and its gradient in Triton: beside the reference, run by Triton's interpreter.

As in test_triton.py, each test runs a function `run_...` of this file in a process of its own that has
TRITON_INTERPRET=1; with `--device cuda` they run compiled as well.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreting import Done, save_time
from test_cuda_quant import FLOATS, KINDS, SIZES, assert_equal, check_hard_quotients, operands, values
from torch import Tensor

from bench import audit
from s2d_kernels import fake_quant_linear, ops, quantizers, triton_kernels
from s2d_kernels.triton_kernels import linear, quantize

ROOT = Path(__file__).parent.parent
MISSING = f"Triton is missing: {triton_kernels.INSTALL_HINT}"


def check_quantizer(x: Tensor, device: torch.device, *arguments: object) -> None:
    """(minimum, maximum, bits, symmetric, granularity, group_size); the reference's bits in every output.

    Up to 4 bits the packed codes are among these.
    """
    op = torch.ops.s2d.quantize_packed if arguments[2] <= 4 else torch.ops.s2d.quantize
    expected = op(x, *arguments, "reference")
    there = x if device.type == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if there is not x:
        there.copy_(x)
    ranges = [a if a is None else a.to(device) for a in arguments[:2]]
    got = op(there, *ranges, *arguments[2:], "triton")
    assert_equal(got, expected, (x.shape, x.stride(), x.dtype, *arguments))


def run_quantizer(device: torch.device) -> None:
    """Every granularity, width, dtype and layout; ties, subnormal and infinite numbers; given ranges."""

    @given(data=st.data())
    @settings(max_examples=100, deadline=None, derandomize=True, phases=[Phase.generate])
    def examples(data: st.DataObject) -> None:
        rows, bits = data.draw(st.sampled_from(SIZES)), data.draw(st.integers(2, 8))
        symmetric = data.draw(st.booleans())
        granularity = data.draw(st.sampled_from(("per_row", "per_tensor", "per_group")))
        group_size = 0
        K = data.draw(st.sampled_from((*SIZES, 64, 256, 264)))
        if granularity == "per_group" or data.draw(st.booleans()):
            group_size = data.draw(st.sampled_from(quantize.GROUP_SIZES))
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

    examples()


def run_lengths(device: torch.device) -> None:
    """Rows that fit a tile, longer ones that are read twice, tensors of more tiles than programs; rounding."""
    check_hard_quotients(lambda x, *arguments: check_quantizer(x, device, *arguments))
    check_boundaries(device)
    longest, partials = quantize.LONGEST, quantize.PARTIALS
    x = torch.randn(3, longest + 617, generator=torch.Generator().manual_seed(1)) * 3
    x[0, -1], x[1, 700] = 40.0, math.nan
    check_quantizer(x.bfloat16(), device, None, None, 4, False, "per_row", 0)
    check_quantizer(x[:1, :longest], device, None, None, 8, True, "per_row", 0)
    quantize.LONGEST, quantize.PARTIALS = 64, 2
    try:
        for K in (63, 64, 65, 128, 199, 640):
            x = torch.randn(70, K, generator=torch.Generator().manual_seed(K)) * 3
            x[0, -1], x[1, K // 2], x[-1, 0] = 40.0, math.nan, -55.0
            check_quantizer(x, device, None, None, 8, False, "per_row", 0)
            x[1, K // 2] = 0
            check_quantizer(x.half(), device, None, None, 4, False, "per_tensor", 0)
            check_quantizer(x, device, torch.full((70,), -1.5), torch.ones(1), 4, True, "per_row", 0)
            if K % 32 == 0:
                check_quantizer(x, device, None, None, 8, False, "per_row", 32)
                check_quantizer(x, device, None, None, 4, True, "per_group", 32)
    finally:
        quantize.LONGEST, quantize.PARTIALS = longest, partials


def check_boundaries(device: torch.device) -> None:
    """Quotients at and beside every halfway point, scales of all magnitudes: where an approximate division shows."""
    generator = torch.Generator().manual_seed(0)
    for exponent in (-126, -125, -20, 0, 40, 100):
        scale = (torch.rand(16, 1, generator=generator) + 1) * 2.0**exponent
        span = (scale * 255).clamp(max=3e38)
        half = (torch.arange(255) + 0.5) * (span / 255)
        near = torch.stack([half, half.nextafter(half.new_zeros(())), half.nextafter(half.new_full((), math.inf))], 2)
        x = torch.cat([near.flatten(1).minimum(span), span, torch.zeros_like(span)], 1)
        check_quantizer(x, device, None, None, 8, False, "per_row", 0)
        check_quantizer(-x, device, None, None, 8, True, "per_row", 0)
        check_quantizer(x, device, x.new_zeros(16), span.flatten() * 0.7, 8, False, "per_row", 0)


def check_refusals(device: torch.device) -> None:
    """What is not taken is refused by name, and left to torch where the choice is free."""
    x = torch.zeros(2, 72, device=device)
    with pytest.raises(TypeError, match=r"x has dtype torch.float64: impl='triton' quantizes fp32, bf16 and fp16"):
        torch.ops.s2d.quantize(x.double(), None, None, 4, True, "per_row", 0, "triton")
    with pytest.raises(ValueError, match=r"group_size=9: impl='triton' takes \(8, 16"):
        torch.ops.s2d.quantize(x, None, None, 4, True, "per_group", 9, "triton")
    kinds = (4, False, 4, True)
    torch.library.opcheck(torch.ops.s2d.quantize.default, (x, None, None, 4, False, "per_row", 8, "triton"))
    tensors = tuple(t.to(device) for t in operands(3, 5, 64, kinds, 32, 0, "per_row", "per_group"))
    torch.library.opcheck(torch.ops.s2d.integer_accumulator.default, (*tensors, *kinds, "triton"))
    one_scale = (*tensors[:5], tensors[5][:, :1], *tensors[6:])
    with pytest.raises(ValueError, match=r"w_scale \(5, 1\) .* 2 groups of 5 rows"):
        torch.ops.s2d.integer_linear(*one_scale, None, *kinds, torch.float32, "triton")
    supports = ops._SUPPORTS["quantize", "triton"]
    assert supports(x, None, None, 4, True, "per_group", 8)
    assert not supports(x, None, None, 4, True, "per_group", 9)
    assert not supports(x.double(), None, None, 4, True, "per_row", 0)


def run_products(device: torch.device) -> None:
    """Accumulator and output have the reference's bits: sizes, kinds, granularities, biases and dtypes."""

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
    def examples(data: st.DataObject) -> None:
        M, N = data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from((1, 37, 63, 64, 130)))
        act = data.draw(st.sampled_from(("per_row", "per_tensor")))
        weight = data.draw(st.sampled_from(("per_row", "per_tensor", "per_group")))
        kinds = tuple(data.draw(strategy) for strategy in (st.integers(2, 8), st.booleans()) * 2)
        group_size = data.draw(st.sampled_from(linear.GROUP_SIZES)) if weight == "per_group" else 0
        K = data.draw(st.sampled_from((0, 1, 16, 37, 128, 272)))
        if group_size:
            K = group_size * data.draw(st.integers(0, 3))
        bias = None
        if data.draw(st.booleans()):
            bias = torch.randn(N).to(data.draw(st.sampled_from((*FLOATS, torch.float64))))
        out_dtype = data.draw(st.sampled_from((*FLOATS, torch.float64)))
        tensors = operands(M, N, K, kinds, group_size, data.draw(st.integers(0, 2**20)), act, weight)
        check_product(tensors, kinds, device, bias, out_dtype)

    examples()


def run_tiles(device: torch.device) -> None:
    """Each choice of blocks, the last ones partly outside."""
    kinds = (4, False, 4, True)
    for M, N, K, group_size in (
        (16, 70, 300, 0),
        (70, 70, 64, 0),
        (8 * 128 + 5, 8 * 128 + 3, 96, 0),
        (70, 140, 256, 64),
    ):
        granularity = "per_group" if group_size else "per_row"
        check_product(
            operands(M, N, K, kinds, group_size, M, "per_row", granularity), kinds, device, None, torch.bfloat16
        )
    # the largest sums there are
    K, ones, zero = 66000, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    x, w = torch.full((1, K), 127, dtype=torch.int8), torch.full((1, K), -127, dtype=torch.int8)
    sums = [t.sum(1, keepdim=True, dtype=torch.int32) for t in (x, w)]
    tensors = (x, ones, zero - 128, sums[0], w, ones, zero, sums[1])
    got = torch.ops.s2d.integer_accumulator(*(t.to(device) for t in tensors), 8, False, 8, True, "triton")
    assert got.item() == -255 * 127 * K


def check_product(
    tensors: tuple[Tensor, ...],
    kinds: tuple[int, bool, int, bool],
    device: torch.device,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    there = tuple(t.to(device) for t in tensors)
    y, accumulator = linear.integer_product(
        (*there, *kinds), None if bias is None else bias.to(device), out_dtype=out_dtype, with_accumulator=True
    )
    exact = torch.ops.s2d.integer_accumulator(*tensors, *kinds, "reference")
    expected = torch.ops.s2d.integer_linear(*tensors, bias, *kinds, out_dtype, "reference")
    note = (tensors[0].shape, tensors[4].shape, tensors[7].shape, kinds, out_dtype)
    assert_equal((accumulator, y), (exact, expected), note)


def run_gradient(device: torch.device) -> None:
    """Sums in fp32 of operands in the gradient's dtype: no further from fp64 than torch's product of the same."""
    generator = torch.Generator().manual_seed(0)
    for R, N, K, bits, symmetric, granularity, group_size, dtype in (
        (1, 1, 1, 4, True, "per_row", 0, torch.float32),
        (37, 63, 199, 4, True, "per_row", 0, torch.bfloat16),
        (199, 37, 63, 3, False, "per_row", 0, torch.float16),
        (130, 70, 131, 8, False, "per_row", 0, torch.bfloat16),
        (70, 130, 96, 5, False, "per_tensor", 0, torch.float32),
        (16, 37, 192, 4, True, "per_group", 64, torch.bfloat16),
        (63, 37, 96, 4, False, "per_group", 32, torch.float32),
        (20, 40, 72, 8, False, "per_group", 8, torch.float16),
        (33, 199, 256, 4, True, "per_group", 128, torch.float32),
    ):
        matrix, grad = torch.randn(N, K, generator=generator), torch.randn(N, R, generator=generator).to(dtype).mT
        codes, scale, zero_point, _, _ = torch.ops.s2d.quantize(
            matrix, None, None, bits, symmetric, granularity, group_size, "reference"
        )
        if bits <= 4:
            codes = quantizers.pack_codes(codes)
        mask = quantizers.pack_mask(torch.rand(R, K, generator=generator) < 0.8)
        for strided in (grad, grad.contiguous()):
            arguments = (strided, codes, scale, zero_point, mask, K, bits, symmetric)
            exact = torch.ops.s2d.straight_through_grad(
                strided.double(),
                codes,
                scale.double(),
                zero_point,
                mask,
                K,
                bits,
                symmetric,
                torch.float64,
                "reference",
            )
            there = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
            got = torch.ops.s2d.straight_through_grad(*there, dtype, "triton").cpu()
            assert got.dtype == dtype
            operand = dequantized(codes, scale, zero_point, K, bits, symmetric)
            plain = quantizers.unpack_mask(mask, K) * (strided.double() @ operand.to(dtype).double())
            # torch's layer of this dtype rounds the operand and the result; 1e-6 is fp32's sum of up to 199 terms.
            magnitude = strided.double().abs() @ operand.double().abs()
            rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
            assert ((got.double() - plain).abs() <= rounding * plain.abs() + 1e-6 * magnitude).all(), (R, N, K, bits)
            assert ((got.double() - exact).abs() <= (2 * rounding + 1e-6) * magnitude).all(), (R, N, K, bits)
            assert not got[~quantizers.unpack_mask(mask, K)].any()
            again = torch.ops.s2d.straight_through_grad(*there, dtype, "triton").cpu()
            assert torch.equal(got, again)
    check_fp16_range(device)
    for shape in ((0, 3, 8), (3, 0, 8), (3, 2, 0)):
        R, N, K = shape
        empty = [torch.zeros(R, N), torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1), torch.zeros(N, 1).int()]
        empty.append(torch.zeros(R, (K + 7) // 8, dtype=torch.uint8))
        got = torch.ops.s2d.straight_through_grad(*(t.to(device) for t in empty), K, 8, False, torch.float32, "triton")
        assert got.shape == (R, K)
        assert not got.any()


def check_fp16_range(device: torch.device) -> None:
    """fp16 gradients of operands that fp16 does not have, large and small: as near as within its range."""
    generator = torch.Generator().manual_seed(1)
    R, N, K = 20, 37, 96
    for granularity, group_size in (("per_row", 0), ("per_tensor", 0), ("per_group", 32), ("per_group", 8)):
        for least, most in ((4.0, 6.0), (-12.0, -8.0), (-3.0, 3.0), (37.0, 37.2), (-36.4, -36.2)):
            matrix = torch.randn(N, K, generator=generator)
            matrix *= 10 ** torch.empty(N, 1).uniform_(least, most, generator=generator)
            kind = (4, granularity == "per_tensor", granularity, group_size)
            codes, scale, zero_point, _, _ = torch.ops.s2d.quantize(matrix, None, None, *kind, "reference")
            arguments = (quantizers.pack_codes(codes), scale, zero_point, quantizers.full_mask(R, K, scale.device), K)
            # in fp32, that an infinite result does not hide an infinite operand
            grad = (torch.randn(R, N, generator=generator) / 64).half()
            there = [a.to(device) if isinstance(a, Tensor) else a for a in (grad, *arguments, *kind[:2])]
            got = torch.ops.s2d.straight_through_grad(*there, torch.float32, "triton").cpu().double()
            operand = dequantized(*arguments[:3], K, *kind[:2]).double()
            magnitude = grad.double().abs() @ operand.abs()
            # fp16's rounding of the operand, fp32's of the sum, which may be subnormal
            limit = (2.0**-11 + 1e-6) * magnitude + 2.0**-149
            assert ((got - grad.double() @ operand).abs() <= limit).all(), (kind, least)
    scale[3] = math.nan
    there[2] = scale.to(device)
    assert torch.ops.s2d.straight_through_grad(*there, torch.float32, "triton").isnan().all()


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, K: int, bits: int, symmetric: bool) -> Tensor:
    """(codes - zero_point) * scale in fp32."""
    if bits <= 4:
        codes = quantizers.unpack_codes(codes, K, symmetric)
    spread = [t.repeat_interleave(K // t.shape[1], 1) for t in (scale, zero_point)]
    return (codes - spread[1]) * spread[0]


def run_layer(device: torch.device) -> None:
    """`fake_quant_linear` forward and backward, batch dimensions, each granularity; what is refused."""
    check_refusals(device)
    for kwargs in ({}, {"weight_granularity": "per_group", "group_size": 32, "act_granularity": "per_tensor"}):
        x, w, b = torch.randn(2, 3, 64), torch.randn(21, 64), torch.randn(21)
        results = []
        for impl, place in (("triton", device), ("reference", torch.device("cpu"))):
            leaves = [t.to(place).requires_grad_() for t in (x.clone(), w.clone(), b.clone())]
            y = fake_quant_linear(*leaves, impl=impl, **kwargs)
            y.square().sum().backward()
            results.append((y.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]))
        (y, grads), (expected, truth) = results
        assert_equal((y,), (expected,))
        # fp32 sums in another order
        torch.testing.assert_close(grads, truth, rtol=1e-5, atol=1e-5 * float(truth[1].abs().max()))


RUNS: dict[str, Callable[[torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.interpreted(name)) for name in RUNS])
def test_interpreted(name: str, interpreted: Done) -> None:
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.sanitize) for name in RUNS])
def test_compiled(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("compiled Triton needs --device cuda; bench audit compiles the kernels without a GPU")
    assert triton_kernels.triton is not None, MISSING
    RUNS[name](device)


@pytest.mark.parametrize("architecture", audit.ARCHITECTURES)
@pytest.mark.parametrize("name", ["quantize_rows<bf16>", "quantize_groups<bf16>", "integer_linear<128, 128, 128>"])
def test_compiled_arithmetic_is_that_of_the_definition(name: str, architecture: str) -> None:
    """What the interpreter cannot show: no approximate division, no flushed subnormal, no fused multiply-add."""
    assert triton_kernels.triton is not None, MISSING
    (variant,) = (v for v in triton_kernels.variants() if v.name == name)
    ptx = audit.compile_triton(variant, architecture).asm["ptx"]
    assert not re.findall(r"\bdiv\.(?:full|approx)|\brcp\b|\.ftz\b|\bfma\.", ptx)
    assert ("div.rn.f32" in ptx) == name.startswith("quantize")
    if "linear" in name:
        fused = variant._replace(options={})
        assert re.search(r"\bfma\.", audit.compile_triton(fused, architecture).asm["ptx"])


if __name__ == "__main__":
    save_time()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of overflow and NaN in the interpreter
    RUNS[sys.argv[1]](torch.device("cpu"))
