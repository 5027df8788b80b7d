"""csrc/cpu's quantizer, integer GEMM and gradients: instruction sets, threads, layouts, bad calls, AddressSanitizer."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulated import build_cpu, sanitizer_environment
from torch import Tensor

from s2d_kernels import _native, _native_cpu, cpu_quant, fixed_point, ops, reference
from s2d_kernels._native import NativeLibraryError
from s2d_kernels.quant_ops import (
    fake_quant_linear,
    integer_accumulator,
    integer_linear,
    quantize_activation,
    quantize_weight,
)
from s2d_kernels.quantizers import QuantizedOperand, code_span, pack_codes, unpack_codes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def assert_same(got: object, expected: object, note: object = "") -> None:
    for index, (mine, truth) in enumerate(zip(got, expected, strict=True)):
        assert (mine.dtype, mine.is_contiguous()) == (truth.dtype, True)
        torch.testing.assert_close(
            mine, truth, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=index: f"output {i}, {note}: {text}"
        )


def layouts(x: Tensor) -> list[Tensor]:
    """`x` dense, transposed, as every other row and column of something, and off the allocator's alignment."""
    rows, K = x.shape
    offset = x.new_empty(rows * K + 1)[1:].view(rows, K).copy_(x)
    return [x, x.mT.contiguous().mT, x.repeat_interleave(2, 0)[::2], x.repeat_interleave(2, 1)[:, ::2], offset]


def hard_rows(rows: int, K: int) -> Tensor:
    """Rows of all magnitudes, with ties, zeros, subnormal and huge numbers, and one sign alone."""
    x = torch.randn(rows, K) * torch.logspace(-44, 37, rows).unsqueeze(1)
    x[0] = (torch.randn(K) * 8).round() / 2
    x[rows // 2] = 0
    x[rows // 3] = x[rows // 3].abs()
    x[2 * rows // 3] = torch.randn(K).clamp(max=0)
    return x


def check_quantizer() -> None:
    for K, group_size in ((1, 0), (7, 0), (64, 16), (199, 0), (300, 3), (1000, 125)):
        plain = hard_rows(24, K)
        broken = torch.randn(24, K)
        broken[3, K // 2], broken[7, K - 1], broken[11, 0] = math.nan, math.inf, -math.inf
        for number, (bits, symmetric) in enumerate(((4, False), (8, False), (2, True), (8, True), (5, False))):
            x = (broken if number % 2 else plain).to(FLOATS[number % 3])
            x = layouts(x)[number]
            low, high = -torch.rand(24), torch.rand(24)
            for granularity, given in (("per_row", (low, high)), ("per_row", None), ("per_tensor", None)):
                arguments = (*(given or (None, None)), bits, symmetric, granularity, group_size)
                op = torch.ops.s2d.quantize_packed if arguments[2] <= 4 else torch.ops.s2d.quantize
                expected = op(x, *arguments, "reference")
                assert_same(op(x, *arguments, "cpu"), expected, (x.shape, arguments))
            if group_size:
                arguments = (None, None, bits, symmetric, "per_group", group_size)
                op = torch.ops.s2d.quantize_packed if arguments[2] <= 4 else torch.ops.s2d.quantize
                expected = op(x, *arguments, "reference")
                assert_same(op(x, *arguments, "cpu"), expected, (x.shape, arguments))


def check_products() -> None:
    """Codes at both ends of every width, which overflow sums of pairs in 16 bits, and tiles cut at every edge."""
    for M, N, K, group_size in (
        (1, 1, 1, None),
        (2, 17, 63, 9),
        (3, 33, 64, 32),
        (5, 49, 130, 65),
        (23, 97, 1100, None),
    ):
        for number, (x_bits, x_symmetric, w_bits, w_symmetric) in enumerate(
            ((8, False, 8, True), (8, True, 8, True), (8, False, 8, False), (4, False, 4, True), (2, True, 7, False))
        ):
            x, w = (torch.randint(2, (rows, K)) * 2.0 - 1 + torch.rand(rows, K) * (number % 2) for rows in (M, N))
            x[0], w[0] = 1, -1
            qx = quantize_activation(x, bits=x_bits, symmetric=x_symmetric, group_size=group_size, impl="reference")
            granularity = "per_group" if group_size else ("per_tensor" if number == 1 else "per_channel")
            qw = quantize_weight(
                w, bits=w_bits, symmetric=w_symmetric, granularity=granularity, group_size=group_size, impl="reference"
            )
            bias = torch.randn(N) if number % 2 else None
            dtype = (*FLOATS, torch.float64)[number % 4]
            results = [
                (integer_accumulator(qx, qw, impl=impl), integer_linear(qx, qw, bias, out_dtype=dtype, impl=impl))
                for impl in ("cpu", "reference")
            ]
            assert_same(*results, (M, N, K, group_size, number))


def of_digits(
    grad: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | int, mask: Tensor | int, places: int, most: int
) -> Tensor:
    """The digits' product in plain torch: fp32 as `fixed_point.product` has it, sums in int64."""
    rest = grad.float() * scale.mT
    unit = (rest.abs().amax(1, keepdim=True) / most).clamp_(min=2.0**-126)
    rest = rest / unit
    sums = []
    for _ in range(places):
        digit = rest.round()
        sums.append((digit.long() @ (codes.long() - zero_point)).float())
        rest = (rest - digit) * (2 * most)
    total = sums.pop()
    while sums:
        total = total * (1 / (2 * most)) + sums.pop()
    return total * unit * mask


def check_gradients() -> None:
    for rows, depth, K in ((1, 16, 1), (2, 17, 47), (9, 64, 48), (50, 199, 97), (200, 33, 130)):
        for number, (bits, symmetric) in enumerate(((4, False), (4, True), (7, False), (8, True), (3, False))):
            q = quantize_weight(torch.randn(depth, K) + 0.3, bits=bits, symmetric=symmetric, granularity="per_channel")
            if number == 2:
                q = quantize_weight(torch.randn(depth, K), bits=bits, symmetric=symmetric, granularity="per_tensor")
            grad = torch.randn(rows, depth) * torch.logspace(-41, 30, rows).unsqueeze(1)
            grad[rows // 2] = 0
            dtype, out_dtype = FLOATS[number % 3], (torch.float32, torch.bfloat16)[number % 2]
            grad = layouts(grad.to(dtype).nan_to_num())[number]
            mask = torch.randint(256, (rows, (K + 7) // 8), dtype=torch.uint8)
            inside = (mask.unsqueeze(2) >> torch.arange(8) & 1).flatten(1)[:, :K]
            codes = pack_codes(q.codes) if bits <= 4 else q.codes
            if not (grad.float() * q.scale.mT).isfinite().all():
                continue
            got = cpu_quant.digit_product(grad, codes, q.scale, q.zero_point, mask, K, bits, symmetric, out_dtype)
            places = fixed_point.digit_count(q.scale, out_dtype)
            most = fixed_point.largest_digit(bits, symmetric)
            expected = of_digits(grad, q.codes, q.scale, q.zero_point, inside, places, most).to(out_dtype)
            assert_same([got], [expected], (rows, depth, K, number))


def check_sums_of_bytes() -> None:
    """Kernels may add a code of x and one of w, or a digit and a code, in a byte: exact where they just fit or not."""
    for x_ends, w_ends in (
        ((-120, 120), (-8, 7)), ((-121, 120), (-8, 7)), ((-120, 121), (-8, 7)), ((-8, 7), (-120, 121)),
        ((0, 15), (-128, 112)), ((0, 15), (-128, 113)), ((-64, 64), (-64, 63)), ((-128, 127), (-128, 127)),
        ((-128, -120), (0, 0)), ((120, 127), (0, 1)),
    ):  # fmt: skip
        for M, N, K in ((5, 50, 64), (9, 16, 61), (8, 48, 35), (3, 3, 36)):
            operands = []
            for rows, ends in ((M, x_ends), (N, w_ends)):
                codes = torch.tensor(ends, dtype=torch.int8)[torch.randint(2, (rows, K))]
                codes[0, :2] = torch.tensor(ends)
                zero_point = torch.randint(-9, 9, (rows, 1), dtype=torch.int32)
                row_sum = codes.sum(1, keepdim=True, dtype=torch.int32)
                operands.append(QuantizedOperand(codes, torch.rand(rows, 1), zero_point, row_sum, codes, 8, True))
            qx, qw = operands
            expected = (qx.codes.long() - qx.zero_point) @ (qw.codes.long() - qw.zero_point).mT
            assert_same(integer_accumulator(qx, qw, impl="cpu"), expected.int().unsqueeze(0), (x_ends, w_ends, M))
            results = (integer_linear(qx, qw, impl=impl) for impl in ("cpu", "reference"))
            assert_same([next(results)], [next(results)], (x_ends, w_ends, M))
    for M in (1, 2, 4, 8):  # every tile that there is
        for N in (16, 32, 48):
            qx, qw = quantize_activation(torch.randn(M, 65)), quantize_weight(torch.randn(N, 65))
            results = [
                (integer_accumulator(qx, qw, impl=i), integer_linear(qx, qw, impl=i)) for i in ("cpu", "reference")
            ]
            assert_same(*results, (M, N))
    x, w = torch.zeros(300, 1001, dtype=torch.int8), torch.randint(-8, 8, (9, 1001), dtype=torch.int8)
    for place in ((299, 1000), (150, 7), (0, 5)):  # one code that does not fit, wherever it is looked for
        x[place] = 127
        expected = x.long() @ w.long().mT
        none, ones = torch.zeros(300, 1, dtype=torch.int32), torch.ones(300, 1)
        qx, qw = (
            QuantizedOperand(c, ones[: len(c)], none[: len(c)], c.sum(1, keepdim=True, dtype=torch.int32), c, 8, True)
            for c in (x, w)
        )
        assert_same(integer_accumulator(qx, qw, impl="cpu"), expected.int().unsqueeze(0), place)
    for symmetric, zero_points in ((True, (0, 1)), (False, (0, 16)), (False, (-3, 1)), (False, (14, 20))):
        for rows, depth, K in ((9, 64, 50), (70, 61, 48), (8, 36, 97), (3, 35, 9)):
            grad = torch.randint(2, (rows, depth)) * 2.0 - 1
            ends = torch.tensor((-8, 7) if symmetric else (0, 15), dtype=torch.int8)
            codes = ends[torch.randint(2, (depth, K))]
            zero_point = torch.randint(*zero_points, (depth, 1), dtype=torch.int32)
            mask = torch.full((rows, (K + 7) // 8), 255, dtype=torch.uint8)
            scale, places = torch.ones(depth, 1), fixed_point.digit_count(torch.ones(depth, 1), torch.float32)
            most = fixed_point.largest_digit(4, symmetric)
            expected = of_digits(grad, codes, scale, 0 if symmetric else zero_point, 1, places, most)
            for given in (grad, grad.mT.contiguous().mT):
                got = cpu_quant.digit_product(
                    given, pack_codes(codes), scale, zero_point, mask, K, 4, symmetric, torch.float32
                )
                assert_same([got], [expected], (symmetric, zero_points, rows))


def check_everything() -> None:
    cpu_quant.KEPT_BYTES = 0  # a sanitizer sees a write beyond memory of the size that was asked for
    torch.manual_seed(0)
    check_quantizer()
    check_products()
    check_gradients()
    check_sums_of_bytes()


def in_a_process(**environment: str) -> str:
    """What the instruction set was; a library chooses it once."""
    program = "import test_cpu_quant as t; t.check_everything(); print(t._native_cpu.capability())"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("capability", _native_cpu.CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    order = _native_cpu.CAPABILITIES
    assert order.index(in_a_process(S2D_CPU_CAPABILITY=capability)) <= order.index(capability)


def test_pairs_are_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the environment says otherwise; others add on the units that multiply."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    if not re.search(r"^flags.*\bavx512_vnni\b", about, re.MULTILINE):
        pytest.skip("this CPU has no AVX-512 VNNI")
    expected = "avx512_vnni_pairs" if "AuthenticAMD" in about else "avx512_vnni"
    monkeypatch.delenv("S2D_CPU_CAPABILITY", raising=False)
    program = "from s2d_kernels import _native_cpu; print(_native_cpu.capability())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.strip() == expected, done.stderr


def test_address_sanitizer() -> None:
    library = build_cpu("S2D_ASAN=ON", folder="cpu-asan")
    in_a_process(S2D_CPU_LIBRARY=str(library), OMP_NUM_THREADS="3", **sanitizer_environment())


def test_subnormal_numbers_are_kept_where_the_process_flushes_them() -> None:
    x, w = hard_rows(24, 200), torch.randn(30, 200) * 1e-36
    g = torch.randn(24, 30) * 1e-38

    def results() -> list[Tensor]:
        qx, qw = (quantize_activation(t, bits=8, impl="cpu") for t in (x, w))
        y = integer_linear(qx, qw, impl="cpu")
        codes = pack_codes(quantize_weight(w, impl="cpu").codes)
        qw = quantize_weight(w, impl="cpu")
        grad = cpu_quant.digit_product(g, codes, qw.scale, qw.zero_point, qx.mask, 200, 4, True, torch.float32)
        return [*qx[:5], *qw[:5], y, grad]

    plain = results()
    assert ((plain[10] != 0) & (plain[10].abs() < 2.0**-126)).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        flushed = results()
        assert torch.tensor(1e-39) + torch.tensor(1e-39) == 0  # the thread's setting is as it was
    finally:
        torch.set_flush_denormal(False)
    for mine, theirs in zip(flushed, plain, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_bits_do_not_depend_on_threads() -> None:
    """Sizes that are worth several threads: few rows, many columns, many rows (the last in portions)."""
    before = torch.get_num_threads()
    for M, N, K in ((3, 1100, 700), (700, 60, 70), (130, 1900, 300)):
        x, w, g = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                qx = quantize_activation(x, granularity="per_tensor", impl="cpu")
                qw = quantize_weight(w, impl="cpu")
                kinds = (qw.scale, qw.zero_point, qx.mask, K, 4, True, torch.float32)
                of_x = cpu_quant.digit_product(g, pack_codes(qw.codes), *kinds)
                kinds = (qx.scale, qx.zero_point, qw.mask, K, 4, False, torch.float32)
                of_w = cpu_quant.digit_product(g.mT, pack_codes(qx.codes), *kinds)
                results.append([*qx[:5], *qw[:5], integer_linear(qx, qw, impl="cpu"), of_x, of_w])
        finally:
            torch.set_num_threads(before)
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


def test_calls_at_the_same_time_do_not_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's memory is kept for its next call, unless it is much."""
    monkeypatch.setattr(cpu_quant, "KEPT_BYTES", 2**24)
    operands = [(torch.randn(700, 160), torch.randn(96, 160)) for _ in range(4)]

    def products(x: Tensor, w: Tensor) -> list[Tensor]:
        qx, qw = quantize_activation(x, impl="cpu"), quantize_weight(w, impl="cpu")
        return [integer_linear(qx, qw, impl="cpu") for _ in range(20)]

    expected = [products(*pair)[0] for pair in operands]
    with ThreadPoolExecutor(len(operands)) as pool:
        for found, y in zip(pool.map(lambda pair: products(*pair), operands), expected, strict=True):
            assert all(torch.equal(f, y) for f in found)
    before = cpu_quant._workspace(100).data_ptr()
    assert cpu_quant._workspace(50).data_ptr() == before
    assert cpu_quant._workspace(cpu_quant.KEPT_BYTES + 1).data_ptr() != before
    assert cpu_quant._workspace(50).data_ptr() == before


def test_gradients_have_the_bits_of_the_torch_route() -> None:
    """Where that takes digits, so that a layer's gradients do not depend on whether the library is there."""
    if not fixed_point.serves(torch.zeros(1), 64, 15):
        pytest.skip("this CPU's torch makes gradients by fp32 products")
    for bits in (4, 6):
        x, w = torch.randn(70, 130, requires_grad=True), torch.randn(90, 130, requires_grad=True)
        results = []
        for impl in ("cpu", "torch", None):
            y = fake_quant_linear(x, w, act_bits=bits, weight_bits=bits, act_range=(-1.0, 1.5), impl=impl)
            results.append(torch.autograd.grad(y.square().sum(), (x, w)))
        assert_same(results[0], results[1])
        assert_same(results[2], results[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_digit_and_a_code_of_4_bits_fit_a_byte(symmetric: bool) -> None:
    """As large as they can be; else the kernels fall back to twice the products."""
    low, high = (-8, 7) if symmetric else (-15, 15)
    for bits in (2, 3, 4):
        fit = [
            low - digit >= -128 and high + digit <= 127
            for digit in (fixed_point.largest_digit(bits, symmetric), fixed_point.largest_digit(bits, symmetric) + 1)
        ]
        assert fit == [True, False]
    assert fixed_point.largest_digit(5, symmetric) == 127


def test_who_takes_what_when_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 goes to torch; products of few rows do, and where torch's int8 product or AMX's is the faster one."""

    def chosen(rows: int, dtype: torch.dtype = torch.float32, bits: int = 8) -> list[str]:
        x = torch.randn(rows, 32, dtype=dtype)
        q = quantize_weight(x, bits=bits)
        kinds = (bits, True, bits, True)
        grad = (x.mT, q.codes, q.scale, q.zero_point, q.mask, 32, bits, True, dtype)
        return [
            ops.choose("quantize", None, CPU, (x, None, None, 4, True, "per_row", 0)),
            ops.choose("integer_accumulator", None, CPU, (*q[:4], *q[:4], *kinds)),
            ops.choose("integer_linear", None, CPU, (*q[:4], *q[:4], None, *kinds, dtype)),
            ops.choose("straight_through_grad", None, CPU, grad),
        ]

    assert chosen(512, torch.float64) == ["torch"] * 4
    monkeypatch.setattr(fixed_point, "serves", lambda *_: True)
    for capability, has_amx, int8_serves, products, gradient in (
        ("avx512_vnni_pairs", False, True, "cpu", "cpu"), ("avx512_vnni", False, True, "cpu", "cpu"),
        ("avx512_vnni", True, True, "torch", "torch"), ("avx512", False, True, "torch", "torch"),
        ("avx2", False, False, "cpu", "torch"), ("baseline", False, False, "torch", "torch"),
    ):  # fmt: skip
        monkeypatch.setattr(_native_cpu, "capability", lambda name=capability: name)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has_amx: {"amx_int8": has})
        monkeypatch.setattr(cpu_quant, "use_int8_product", lambda *_, serves=int8_serves: serves)
        by_pairs = capability == "avx512_vnni_pairs"
        few = cpu_quant.LEAST_ROWS_BY_PAIRS if by_pairs else cpu_quant.LEAST_ROWS
        for bits, least in ((8, cpu_quant.LEAST_ROWS), (7, few), (4, few)):  # 63 + 63 fit a byte
            assert chosen(least, bits=bits) == ["cpu", products, products, gradient], capability
            assert chosen(least - 1, bits=bits) == ["cpu", "torch", "torch", gradient]
    monkeypatch.setenv("S2D_CPU_LIBRARY", "/nowhere/libs2d_cpu.so")
    assert chosen(512) == ["torch"] * 4
    with pytest.raises(ValueError, match=r"no native library at /nowhere/libs2d_cpu.so: .*make cpu"):
        quantize_activation(torch.randn(2, 3), impl="cpu")


def test_what_the_kernels_do_not_take() -> None:
    x = torch.randn(20, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match="x has dtype torch.float64: impl='cpu' quantizes"):
        quantize_activation(x, impl="cpu")
    q = quantize_activation(x)
    with pytest.raises(TypeError, match="quantized in torch.float64: impl='cpu' takes fp32 scales"):
        integer_linear(q, q, impl="cpu")
    q = quantize_activation(x.float(), group_size=8)
    w = quantize_weight(torch.randn(5, 32), granularity="per_group", group_size=8)
    with pytest.raises(ValueError, match=r"w_scale \(5, 1\) does not fit 4 groups of 5 rows"):
        torch.ops.s2d.integer_accumulator(*q[:4], w.codes, w.scale[:, :1], *w[2:4], 4, False, 4, True, "cpu")


def test_the_library_refuses_what_it_cannot_work_with() -> None:
    x = torch.randn(6, 8)
    q = quantize_activation(x, impl="cpu")
    y, finite = torch.empty(6, 6), torch.zeros((), dtype=torch.int32)
    pointers = {"x": x, "codes": q.codes, "scale": q.scale, "zero_point": q.zero_point, "row_sum": q.row_sum}
    quantization = {name: t.data_ptr() for name, t in (pointers | {"mask": q.mask}).items()} | {
        "rows": 6, "cols": 8, "row_stride": 8, "col_stride": 1, "bits": 4,
    }  # fmt: skip
    product = {
        f"{side}_{name}": quantization[name] for side in "xw" for name in ("codes", "scale", "zero_point", "row_sum")
    }
    product |= {"y": y.data_ptr(), "M": 6, "N": 6, "K": 8, "groups": 1}
    gradient = {name: quantization[name] for name in ("codes", "scale", "zero_point", "mask")} | {
        "grad": x.data_ptr(), "out": y.data_ptr(), "finite": finite.data_ptr(), "rows": 6, "depth": 6, "cols": 6,
        "row_stride": 8, "depth_stride": 1, "bits": 8, "places": 3,
        "largest_digit": 127,
    }  # fmt: skip
    calls = (
        ("s2d_cpu_quantize", _native.Quantization, quantization,
         {"rows": -1, "cols": -1, "bits": 9, "dtype": 3, "group_size": 3, "granularity": 2, "codes": None,
          "scale": None, "minimum": x.data_ptr()}),
        ("s2d_cpu_integer_linear", _native.IntegerProduct, product,
         {"M": -1, "groups": 3, "packed": 1, "out_dtype": 3, "bias_dtype": 1, "w_codes": None, "x_row_sum": None,
          "w_scale": None}),
        ("s2d_cpu_straight_through_grad", _native_cpu.StraightThrough, gradient,
         {"rows": -1, "places": 6, "largest_digit": 128, "bits": 1, "dtype": 3, "out_dtype": -1, "finite": None,
          "mask": None, "grad": None}),
    )  # fmt: skip
    for name, struct, good, wrong in calls:
        run = _native_cpu.Call(name, struct(**good), 1)
        memory = ops.aligned_bytes(run.workspace_bytes() + 256, CPU)
        start, size = memory.data_ptr(), run.workspace_bytes()
        run(start, size)
        for address, count in ((start + 8, size), (start, 255), (0, size)):
            with pytest.raises(NativeLibraryError, match="status 2"):
                run(address, count)
        for field, value in wrong.items():
            run = _native_cpu.Call(name, struct(**(good | {field: value})), 1)
            assert run.workspace_bytes() == 0, (name, field)
            with pytest.raises(NativeLibraryError, match="status 1"):
                run(start, size)
    kinds = {name: gradient[name] for name in ("bits", "places", "largest_digit", "finite")}
    for name, empty in (  # nothing to compute, and nothing is read
        ("s2d_cpu_integer_linear", _native.IntegerProduct(M=6, K=8, groups=1)),
        ("s2d_cpu_straight_through_grad", _native_cpu.StraightThrough(rows=6, depth=8, **kinds)),
    ):
        _native_cpu.Call(name, empty, 1)(start, size)


def test_a_library_that_is_built_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is not repeated, but for as long as it finds nothing."""
    monkeypatch.delenv("S2D_CPU_LIBRARY")
    monkeypatch.setattr(_native_cpu, "ROOT", tmp_path / "s2d_kernels")
    _native_cpu._newest.cache_clear()
    try:
        assert _native_cpu.library_path() == tmp_path / "s2d_kernels" / "lib" / "libs2d_cpu.so"
        built = tmp_path / "build" / "cpu" / "libs2d_cpu.so"
        built.parent.mkdir(parents=True)
        built.touch()
        assert _native_cpu.library_path() == built
        assert _native_cpu._newest.cache_info().currsize == 1
    finally:
        _native_cpu._newest.cache_clear()


def test_codes_in_the_layer_are_the_definitions() -> None:
    """Rows of several items, each with its own scale, against the reference: none takes another's."""
    x = torch.randn(900, 80) * torch.logspace(-3, 3, 900).unsqueeze(1)
    q = quantize_activation(x, bits=4)
    r = reference.quantize(x, bits=4, symmetric=False, granularity="per_row")
    assert torch.equal(q.codes, r.codes.to(torch.int8))
    assert torch.equal(unpack_codes(pack_codes(q.codes), 80, False), q.codes)
    assert int(q.codes.max()) <= code_span(4, False)


def test_operands_of_other_quantizers_are_converted_or_refused() -> None:
    """From as many rows on as the kernels take by themselves; nothing is read that is not there."""
    x, w = torch.randn(600, 64), torch.randn(48, 64)
    qx, qw = quantize_activation(x), quantize_weight(w, symmetric=False)
    expected = integer_linear(qx, qw, impl="torch")
    wide = [q._replace(zero_point=q.zero_point.long(), row_sum=q.row_sum.long()) for q in (qx, qw)]
    assert torch.equal(integer_linear(*wide), expected)
    for wrong, error, message in (
        ((qx._replace(codes=qx.codes.int()), qw), TypeError, "qx.codes has dtype torch.int32"),
        ((qx._replace(zero_point=qx.zero_point[:2]), qw), ValueError, "qx.zero_point is"),
        ((qx, qw._replace(zero_point=qw.zero_point[:2])), ValueError, "qw.zero_point is"),
        ((qx._replace(row_sum=qx.row_sum[:2]), qw), ValueError, "qx.row_sum is"),
    ):
        with pytest.raises(error, match=message):
            integer_linear(*wrong)


def test_operations_called_directly_check_what_they_read() -> None:
    x, w, grad = torch.randn(20, 64), torch.randn(48, 64), torch.randn(20, 48)
    qx, qw = quantize_activation(x), quantize_weight(w, symmetric=False)

    def linear(bias: Tensor | None = None, of_x: dict[str, Tensor] | None = None, **of_w: Tensor) -> Tensor:
        a, b = qx._replace(**(of_x or {})), qw._replace(**of_w)
        return torch.ops.s2d.integer_linear(*a[:4], *b[:4], bias, 4, False, 4, False, torch.float32, "cpu")

    def gradient(codes: Tensor, mask: Tensor) -> Tensor:
        arguments = (grad, codes, qw.scale, qw.zero_point, mask, 64, 4, False, torch.float32, "cpu")
        return torch.ops.s2d.straight_through_grad(*arguments)

    def quantized(end: Tensor) -> object:
        return torch.ops.s2d.quantize(x, end, end + 1, 4, False, "per_row", 0, "cpu")

    for wrong, message in (
        (lambda: linear(torch.zeros(3)), "bias"),
        (lambda: linear(of_x={"scale": qx.scale[:3]}), "x_"),
        (lambda: linear(of_x={"row_sum": qx.row_sum[:3]}), "x_row_sum"),
        (lambda: linear(zero_point=qw.zero_point[:3]), "w_zero_point"),
        (lambda: linear(codes=qw.codes[:, :8].contiguous()), "w_codes"),
        (lambda: gradient(pack_codes(qw.codes)[:, :8], qx.mask), "codes"),
        (lambda: gradient(pack_codes(qw.codes), qx.mask[:3]), "mask"),
        (lambda: quantized(torch.zeros(3)), "minimum"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
