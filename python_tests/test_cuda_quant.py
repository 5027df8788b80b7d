"""Quantizers and integer GEMM of csrc: executed by the emulation on the CPU, or on a GPU with --device cuda."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated import build_emulated, run_sanitized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d_kernels import _native, cuda_quant, fake_quant_linear, ops, quantizers
from s2d_kernels.triton_kernels import linear as triton_linear

ROOT = Path(__file__).parent.parent
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
    op = torch.ops.s2d.quantize_packed if arguments[2] <= 4 else torch.ops.s2d.quantize
    return op(there, *ranges, *arguments[2:], "cuda")


def check_quantizer(x: Tensor, device: torch.device, *arguments: object) -> None:
    """(minimum, maximum, bits, symmetric, granularity, group_size); the reference's bits in every output.

    Up to 4 bits the packed codes are among these.
    """
    op = torch.ops.s2d.quantize_packed if arguments[2] <= 4 else torch.ops.s2d.quantize
    expected = op(x, *arguments, "reference")
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


def hard_quotients() -> tuple[Tensor, Tensor]:
    """All x and s of which x / s is within 2^-46 of halfway between k + 1/2 and the fp32 number before or after it.

    For k in 0..255, which are the codes, and up to powers of two. Only there may a quotient of that error before it is
    rounded give another code than the correctly rounded one.
    """
    found = []
    for k in range(256):
        exponent = int(math.log2(k + 0.5)) if k else -1
        for sign in (1, -1):
            middle = int((k + 0.5) * 2 ** (24 - exponent)) + sign  # 25 bits: halfway between two fp32 numbers
            for rest in (*range(-8, 0), *range(1, 9)):  # 2^-46 of a product of less than 2^49
                for shift in (24, 25):  # x 2^shift = middle s + rest, x and s of 24 bits
                    s = -rest * pow(middle, -1, 2**shift) % 2**shift
                    x = middle * s + rest >> shift
                    if 2**23 <= s < 2**24 and 2**23 <= x < 2**24:
                        found.append((x * 2.0 ** (exponent + shift - 48), s * 2.0**-24))
    x, s = torch.tensor(found, dtype=torch.float64).float().T
    return x, s


def check_hard_quotients(check: Callable[..., None]) -> None:
    """Through given ranges that make the scale `s`; and numbers far outside of one."""
    x, s = hard_quotients()
    high = torch.stack([(255 * s).nextafter((255 * s).new_full((), end)) for end in (0.0, 1e9)] + [255 * s])
    fits = high / torch.full_like(high, 255) == s
    high = high.gather(0, fits.int().argmax(0, keepdim=True))[0]
    x, s, high = x[fits.any(0)], s[fits.any(0)], high[fits.any(0)]
    assert len(x) > 2000
    check(x.unsqueeze(1), torch.zeros(1), high, 8, False, "per_row", 0)
    far = torch.tensor([3e38, -3e38, 1e20, -1e20, 4194305.0, -4194304.0, 1e6, 0.0, -0.0]) * 2.0
    far = far.clamp(-3e38, 3e38).expand(2, -1).contiguous()
    for scale in (1.0, 2.0**-55, 2.0**-90):
        for symmetric in (True, False):
            check(far, torch.full((2,), -scale), torch.full((1,), scale), 8, symmetric, "per_row", 0)


def test_hard_quotients(device: torch.device) -> None:
    check_hard_quotients(lambda x, *arguments: check_quantizer(x, device, *arguments))


def test_every_code_boundary(device: torch.device) -> None:
    """Quotients at and beside every halfway point, scales of all magnitudes."""
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
def test_packed_codes_are_optional(symmetric: bool, device: torch.device) -> None:
    for rows, K in ((5, 64), (3, 37), (2, 1), (1, 1100), (4, 8)):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(K))
        for group_size in (0, 8) if K % 8 == 0 else (0,):
            kind = (None, None, 4, symmetric, "per_group" if group_size else "per_row", group_size)
            *outputs, packed = quantize(x, device, *kind)
            assert_equal((packed.cpu(),), (quantizers.pack_codes(outputs[0].cpu()),))
            assert_equal(torch.ops.s2d.quantize(x.to(device), *kind, "cuda"), outputs)


def test_what_the_kernels_do_not_take(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"x has dtype torch.float64: impl='cuda' quantizes fp32, bf16 and fp16"):
        quantize(torch.zeros(2, 8, dtype=torch.float64), device, None, None, 4, True, "per_row", 0)
    with pytest.raises(ValueError, match=r"group_size=9: impl='cuda' takes 8, 16"):
        quantize(torch.zeros(2, 9), device, None, None, 4, True, "per_group", 9)
    with pytest.raises(ValueError, match="bits=5: codes of more than 4 bits are not packed"):
        torch.ops.s2d.quantize_packed(torch.zeros(2, 8, device=device), None, None, 5, True, "per_row", 0, "cuda")
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


# --- Integer GEMM -----------------------------------------------------------------------------------------------------


def operands(
    M: int, N: int, K: int, kinds: tuple[int, bool, int, bool], group_size: int, seed: int, act: str, weight: str
) -> tuple[Tensor, ...]:
    """The op's eight tensors, of random values with a row that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(M, K, generator=generator) + 0.4, torch.randn(N, K, generator=generator) - 0.3
    if M > 3 and K and act == "per_row":
        x[2, 0] = math.nan
    x_bits, x_symmetric, w_bits, w_symmetric = kinds
    qx = torch.ops.s2d.quantize(x, None, None, x_bits, x_symmetric, act, group_size, "reference")
    qw = torch.ops.s2d.quantize(w, None, None, w_bits, w_symmetric, weight, group_size, "reference")
    return *qx[:4], *qw[:4]


def check_product(
    tensors: tuple[Tensor, ...],
    kinds: tuple[int, bool, int, bool],
    device: torch.device,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    packed: bool | None = None,
) -> None:
    """Accumulator and output have the reference's bits."""
    there = tuple(t.to(device) for t in tensors)
    y, accumulator = cuda_quant.integer_product(
        (*there, *kinds), None if bias is None else bias.to(device), out_dtype=out_dtype, with_accumulator=True,
        packed=packed,
    )  # fmt: skip
    exact = torch.ops.s2d.integer_accumulator(*tensors, *kinds, "reference")
    expected = torch.ops.s2d.integer_linear(*tensors, bias, *kinds, out_dtype, "reference")
    note = (tensors[0].shape, tensors[4].shape, tensors[7].shape, kinds, out_dtype, packed)
    assert_equal((accumulator, y), (exact, expected), note)


@pytest.mark.sanitize
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_product_bits_equal_the_reference(data: st.DataObject, device: torch.device) -> None:
    M, N = data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from((1, 37, 63, 64, 130)))
    act, weight = data.draw(st.sampled_from(("per_row", "per_tensor"))), data.draw(
        st.sampled_from(("per_row", "per_tensor", "per_group"))
    )  # fmt: skip
    packed = data.draw(st.booleans())
    widest = 4 if packed else 8
    kinds = (
        data.draw(st.integers(2, widest)),
        data.draw(st.booleans()),
        data.draw(st.integers(2, widest)),
        packed or data.draw(st.booleans()),
    )
    group_size = data.draw(st.sampled_from((64, 128) if packed else (32, 64, 128))) if weight == "per_group" else 0
    K = group_size * data.draw(st.integers(0, 3)) if group_size else data.draw(st.sampled_from((0, 1, 16, 37, 64, 272)))
    bias = None
    if data.draw(st.booleans()):
        bias = torch.randn(N).to(data.draw(st.sampled_from((*FLOATS, torch.float64))))
    out_dtype = data.draw(st.sampled_from((*FLOATS, torch.float64)))
    tensors = operands(M, N, K, kinds, group_size, data.draw(st.integers(0, 2**20)), act, weight)
    check_product(tensors, kinds, device, bias=bias, out_dtype=out_dtype, packed=packed)


@pytest.mark.sanitize
@pytest.mark.parametrize("packed", [False, True])
def test_large_tiles(packed: bool, device: torch.device) -> None:
    """Enough of them for the kernel of wide blocks; the last ones partly outside; more slices than stages."""
    M, N, kinds = 8 * 128 - 5, 8 * 128 - 3, (4, False, 4, True)
    tensors = operands(M, N, 96, kinds, 0, 0, "per_row", "per_row")
    check_product(tensors, kinds, device, packed=packed, out_dtype=torch.bfloat16)
    tensors = operands(40, 70, 64 * 18 + 7, kinds, 0, 1, "per_row", "per_row")
    check_product(tensors, kinds, device, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_extreme_codes(packed: bool, device: torch.device) -> None:
    """The largest sums there are, up to the last bit of int32."""
    bits, K = (4, 2048) if packed else (8, 66000)
    high = 2**bits - 1
    codes_x = torch.tensor([[high], [0]]).expand(2, K)
    codes_w = torch.tensor([[-(high // 2)], [high // 2]]).expand(2, K)
    shift = 128 if bits == 8 else 0
    stored_x, stored_w = (codes_x - shift).to(torch.int8), codes_w.to(torch.int8)
    zero = torch.tensor([[high - shift], [-shift]], dtype=torch.int32).flip(0)
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    sums = [t.sum(1, keepdim=True, dtype=torch.int32) for t in (stored_x, stored_w)]
    tensors = (stored_x, ones, zero, sums[0], stored_w, ones, zeros, sums[1])
    kinds = (bits, False, bits, True)
    exact = (codes_x - torch.tensor([[0], [high]])) @ codes_w.mT
    got = cuda_quant.integer_product(
        (*(t.to(device) for t in tensors), *kinds), out_dtype=None, with_accumulator=True, packed=packed
    )[1]
    assert abs(int(exact.max())) > (2**30 if not packed else 2**17)
    assert torch.equal(got[0].cpu().long(), exact)


def test_packing(device: torch.device) -> None:
    for rows, K in ((5, 64), (3, 37), (1, 1), (2, 2056), (0, 8), (4, 0)):
        codes = torch.randint(-8, 16, (rows, K), dtype=torch.int8)
        assert_equal((cuda_quant.pack_codes(codes.to(device)).cpu(),), (quantizers.pack_codes(codes),))
    view = torch.randint(-8, 8, (9, 16), dtype=torch.int8).flatten()[3:131].view(8, 16)
    assert_equal((cuda_quant.pack_codes(view.to(device)).cpu(),), (quantizers.pack_codes(view.clone()),))


def test_which_products_the_kernels_take(device: torch.device) -> None:
    kinds = (4, False, 4, True)
    tensors = tuple(t.to(device) for t in operands(3, 5, 72, kinds, 8, 0, "per_row", "per_group"))
    with pytest.raises(ValueError, match="group_size=8: impl='cuda' multiplies groups of a multiple of 32"):
        torch.ops.s2d.integer_linear(*tensors, None, *kinds, torch.float32, "cuda")
    supports = ops._SUPPORTS["integer_linear", "cuda"]
    assert not supports(*tensors, None, *kinds, torch.float32)
    wide = tuple(t.double() if t.dtype == torch.float32 else t for t in tensors)
    with pytest.raises(TypeError, match=r"operands quantized in torch.float64"):
        torch.ops.s2d.integer_accumulator(*wide, *kinds, "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, 512])
def test_no_group_size_falls_back_to_fp32_products(
    group_size: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Hopper's own kernel is Triton's, sizes that this does not take are CUDA C++'s as elsewhere."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ops, "problem_of", lambda impl, device: None)
    gpu, kinds = torch.device("cuda", 0), (4, False, 4, True)
    groups = 6
    for M in (1, 4096):
        x_shapes = (M, groups * group_size), (M, 1), (M, 1), (M, groups)
        shapes = (*x_shapes, (512, groups * group_size), *((512, groups),) * 3)
        dtypes = (torch.int8, torch.float32, torch.int32, torch.int32) * 2
        tensors = [
            SimpleNamespace(shape=torch.Size(s), dtype=d, device=gpu) for s, d in zip(shapes, dtypes, strict=True)
        ]
        for op, rest in (("integer_linear", (None, *kinds, torch.bfloat16)), ("integer_accumulator", kinds)):
            wgmma = capability == (9, 0) and M == 4096 and group_size in triton_linear.GROUP_SIZES
            assert ops.choose(op, None, gpu, (*tensors, *rest)) == ("triton" if wgmma else "cuda")


@pytest.mark.parametrize(("capability", "helps"), [((8, 0), True), ((8, 9), True), ((9, 0), False), ((12, 0), False)])
def test_where_4_bit_products_are_chosen(
    capability: tuple[int, int], helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert cuda_quant.packing_helps(4096, 4096, 1, (4, False, 4, True), gpu) is helps
    assert cuda_quant.packing_helps(4096, 4096, 32, (4, True, 3, True), gpu) is helps  # groups of 128
    for M, groups, kinds in (
        (4096, 128, (4, False, 4, True)),  # groups of 32
        (4096, 1, (5, False, 4, True)),
        (4096, 1, (4, False, 4, False)),
        (16, 1, (4, False, 4, True)),
    ):
        assert not cuda_quant.packing_helps(M, 4096, groups, kinds, gpu)


def test_operators_and_parameters_that_do_not_fit(device: torch.device) -> None:
    kinds = (4, False, 4, True)
    x = torch.randn(5, 64, device=device)
    torch.library.opcheck(torch.ops.s2d.quantize.default, (x, None, None, 4, False, "per_row", 32, "cuda"))
    tensors = tuple(t.to(device) for t in operands(3, 5, 64, kinds, 32, 0, "per_row", "per_group"))
    torch.library.opcheck(torch.ops.s2d.integer_accumulator.default, (*tensors, *kinds, "cuda"))
    torch.library.opcheck(torch.ops.s2d.integer_linear.default, (*tensors, None, *kinds, torch.bfloat16, "cuda"))
    one_scale = (*tensors[:5], tensors[5][:, :1], *tensors[6:])
    with pytest.raises(ValueError, match=r"w_scale \(5, 1\) .* 2 groups of 5 rows"):
        torch.ops.s2d.integer_linear(*one_scale, None, *kinds, torch.float32, "cuda")


def test_address_sanitizer_finds_nothing(device: torch.device) -> None:
    if device.type != "cpu" or os.environ.get("S2D_LIBRARY"):
        pytest.skip("AddressSanitizer is for the emulation; compute-sanitizer is its counterpart on a GPU")
    done = run_sanitized(__file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_public_layer(device: torch.device) -> None:
    """`fake_quant_linear` with batch dimensions and each granularity; its gradient is another implementation's."""
    for kwargs in ({}, {"weight_granularity": "per_group", "group_size": 32, "act_granularity": "per_tensor"}):
        x, w, b = torch.randn(2, 3, 64), torch.randn(21, 64), torch.randn(21)
        results = []
        for impl, place in (("cuda", device), ("reference", torch.device("cpu"))):
            leaves = [t.to(place).requires_grad_() for t in (x.clone(), w.clone(), b.clone())]
            y = fake_quant_linear(*leaves, impl=impl, **kwargs)
            y.square().sum().backward()
            results.append((y.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]))
        (y, grads), (expected, truth) = results
        assert_equal((y,), (expected,))
        # fp32 sums in another order
        torch.testing.assert_close(grads, truth, rtol=1e-5, atol=1e-5 * float(truth[1].abs().max()))
