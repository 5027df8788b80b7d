"""Quantizers, exact integer linear, straight-through gradients: against numpy, the reference, and fp64 autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from s2d_kernels import integer_gemm, ops, quantizers, reference
from s2d_kernels.quant_ops import (
    fake_quant_linear,
    integer_accumulator,
    integer_linear,
    quantize_activation,
    quantize_weight,
)
from s2d_kernels.quantizers import (
    code_span,
    exact_chunk,
    pack_codes,
    pack_mask,
    unpack_codes,
    unpack_mask,
)

IMPLS = ("reference", "torch", "cpu")
SIZES = (1, 37, 63, 199)
GRANULARITIES = {"per_token": "per_row", "per_channel": "per_row", "per_tensor": "per_tensor", "per_group": "per_group"}


def impls(dtype: torch.dtype) -> tuple[str, ...]:
    """Those that take operands of `dtype`."""
    return IMPLS[:2] if dtype == torch.float64 else IMPLS


def quantize(x: Tensor, granularity: str, impl: str, **kwargs: object) -> quantizers.QuantizedOperand:
    function = quantize_weight if granularity in ("per_channel", "per_group") else quantize_activation
    return function(x, granularity=granularity, impl=impl, **kwargs)


def numpy_quantize(
    x: np.ndarray, bits: int, symmetric: bool, granularity: str, group_size: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale, zero point and mask of finite `x [rows, K]`, written from the formula, in fp32, group by group."""
    f = np.float32
    x = x.astype(f)
    rows, K = x.shape
    if granularity == "per_tensor":
        blocks = [(slice(None), slice(None))]
        shape = (1, 1)
    else:
        size = group_size if granularity == "per_group" else K
        shape = (rows, K // size)
        blocks = [(slice(r, r + 1), slice(g, g + size)) for r in range(rows) for g in range(0, K, size)]
    codes, mask = np.zeros(x.shape, np.int64), np.zeros(x.shape, bool)
    scales, zeros = [], []
    for block in blocks:
        low, high = x[block].min(), x[block].max()
        if symmetric:
            q_min, q_max = -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
            scale = f(max(abs(low), abs(high))) / f(q_max)
        else:
            q_min, q_max = 0, 2**bits - 1
            low, high = min(low, f(0)), max(high, f(0))
            scale = f(high - low) / f(q_max)
        if scale < f(2.0**-126):
            scale = f(1)
        zero = 0 if symmetric else int(np.clip(-np.rint(f(low / scale)), q_min, q_max))
        raw = np.rint(x[block] / scale) + zero
        codes[block] = np.clip(raw, q_min, q_max)
        mask[block] = (raw >= q_min) & (raw <= q_max)
        scales.append(scale)
        zeros.append(zero)
    return codes, np.array(scales, f).reshape(shape), np.array(zeros).reshape(shape), mask


def stored(q: reference.QuantizedTensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    shift = 128 if bits == 8 and not symmetric else 0
    return (q.codes - shift).to(torch.int8), q.scale, (q.zero_point - shift).to(torch.int32)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_same_operand(a: quantizers.QuantizedOperand, b: quantizers.QuantizedOperand) -> None:
    for left, right in zip(a[:5], b[:5], strict=True):
        assert_same(left, right)


# --- Quantizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizer_against_numpy(bits: int, symmetric: bool, granularity: str, impl: str) -> None:
    group_size = 9 if granularity == "per_group" else None
    x = torch.randn(37, 63) * torch.logspace(-3, 3, 37).unsqueeze(1) + 0.3
    x[3] = x[3].abs()  # no negative value: the range is widened to 0
    x[4] = 0
    x[5] = torch.arange(63) / 2 - 15.5  # ties
    extra = {} if group_size is None else {"group_size": group_size}
    got = quantize(x, granularity, impl, bits=bits, symmetric=symmetric, **extra)
    codes, scale, zero_point, mask = numpy_quantize(x.numpy(), bits, symmetric, granularity, group_size)
    shift = 128 if bits == 8 and not symmetric else 0
    np.testing.assert_array_equal(got.codes.numpy().astype(int) + shift, codes)
    np.testing.assert_array_equal(got.scale.numpy(), scale)
    np.testing.assert_array_equal(got.zero_point.numpy() + shift, zero_point)
    np.testing.assert_array_equal(unpack_mask(got.mask, 63).numpy(), mask)
    sums = got.codes.numpy().astype(np.int32).reshape(37, -1, group_size or 63).sum(2)
    np.testing.assert_array_equal(got.row_sum.numpy(), sums)
    assert [t.dtype for t in got[:5]] == [torch.int8, torch.float32, torch.int32, torch.int32, torch.uint8]
    if granularity != "per_tensor":
        assert not got.codes[4].add(shift).sub(got.zero_point[4, 0] + shift).any()
        assert bool((got.scale[4] == 1).all())


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_quantizer_bits_equal_the_reference(data: st.DataObject) -> None:
    rows, K = data.draw(st.sampled_from((0, *SIZES))), data.draw(st.sampled_from((0, *SIZES)))
    bits, symmetric = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    granularity = data.draw(st.sampled_from(list(GRANULARITIES)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    layout = data.draw(st.sampled_from(("dense", "transposed", "strided", "offset")))
    x = torch.randn(2 * rows + 1, 2 * K + 1, generator=generator, dtype=torch.float64)
    kind = data.draw(st.sampled_from(("normal", "ties", "subnormal", "huge", "zero rows", "non-finite", "skewed")))
    if kind == "ties":
        x = (x * 4).round() / 2
    elif kind == "subnormal":
        x = x * data.draw(st.sampled_from((1e-37, 1e-38, 1e-40, 1e-44)))
    elif kind == "huge":
        x = x * data.draw(st.sampled_from((1e4, 1e30, 8e37, 1e38)))
    elif kind == "zero rows":
        x = x * (torch.rand(len(x), 1, generator=generator) > 0.5)
    elif kind == "non-finite":
        bad = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.01, bad.double(), x)
    elif kind == "skewed":
        x = x.abs() + 1
    x = x.to(dtype)
    x = {
        "dense": lambda: x[:rows, :K].contiguous(),
        "transposed": lambda: x[:rows, :K].mT.contiguous().mT,
        "strided": lambda: x[: 2 * rows : 2, : 2 * K : 2],
        "offset": lambda: x[1 : rows + 1, 1 : K + 1],
    }[layout]()
    kwargs: dict[str, object] = {"bits": bits, "symmetric": symmetric}
    ranged = granularity != "per_group" and data.draw(st.booleans())
    value_range = (-0.75, 1.5) if ranged else None
    if granularity == "per_group":
        kwargs["group_size"] = data.draw(st.sampled_from([d for d in range(1, K + 1) if K % d == 0] or [4]))
    definition = reference.quantize(
        x,
        granularity=GRANULARITIES[granularity],
        value_range=value_range,
        **kwargs,  # type: ignore[arg-type]
    )
    for impl in impls(dtype):
        got = quantize(x, granularity, impl, value_range=value_range, **kwargs)
        for mine, theirs in zip(got[:3], stored(definition, bits, symmetric), strict=True):
            assert_same(mine, theirs)
        assert_same(unpack_mask(got.mask, K), definition.mask)
        assert_same_operand(got, quantize(x, granularity, "reference", value_range=value_range, **kwargs))
        assert got.codes.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_non_finite_rows_poison_only_themselves(impl: str) -> None:
    x = torch.randn(6, 37)
    clean = quantize_activation(x, bits=8, impl=impl)
    x[1, 3], x[2, 5], x[4, 0] = math.nan, math.inf, -math.inf
    q = quantize_activation(x, bits=8, impl=impl)
    bad = torch.tensor([False, True, True, False, True, False])
    assert_same(q.scale.isnan().squeeze(1), bad)
    for mine, before in zip(q[:5], clean[:5], strict=True):
        assert_same(mine[~bad], before[~bad])
    assert bool((q.codes[bad] == -128).all())  # code 0, shifted
    assert not unpack_mask(q.mask, 37)[bad].any()
    y = fake_quant_linear(x, torch.randn(5, 37), impl=impl)
    assert_same(y.isnan(), bad.unsqueeze(1).expand(6, 5))
    assert bool(quantize_activation(x, granularity="per_tensor", impl=impl).scale.isnan().all())
    assert bool(quantize_activation(x, granularity="per_tensor", value_range=(-1, 1), impl=impl).scale.isnan().all())
    static = quantize_activation(x, value_range=(-1.0, 1.0), impl=impl).scale
    assert_same(static.isnan().squeeze(1), bad)


def test_smallest_scale_is_the_smallest_normal_number() -> None:
    for impl in IMPLS:
        x = torch.tensor([[7 * 2.0**-126], [7 * 2.0**-127]])
        q = quantize_activation(x, symmetric=True, impl=impl)
        assert q.scale.flatten().tolist() == [2.0**-126, 1.0]
        assert q.codes.flatten().tolist() == [7, 0]


def test_scale_division_is_correctly_rounded() -> None:
    x = torch.rand(4000, 1, dtype=torch.float32) + 1  # 1 / 7 is inexact: a reciprocal product would often differ
    exact = (x.double() / 7).float()
    for impl in IMPLS:
        assert_same(quantize_activation(x, symmetric=True, impl=impl).scale, exact)
    assert not torch.equal(x * torch.tensor(1 / 7), exact)


@pytest.mark.parametrize("K", [0, 1, 7, 8, 9, 63, 64, 199])
def test_packing_round_trips(K: int) -> None:
    mask = torch.rand(5, K) < 0.5
    packed = pack_mask(mask)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert_same(unpack_mask(packed, K), mask)
    for symmetric, low, high in ((True, -7, 8), (False, 0, 16)):
        codes = torch.randint(low, high, (5, K), dtype=torch.int8)
        packed = pack_codes(codes)
        assert packed.shape == (5, (K + 1) // 2)
        assert_same(unpack_codes(packed, K, symmetric), codes)
        if K > 1:
            assert int(packed[0, 0]) == (int(codes[0, 0]) & 15) + 16 * (int(codes[0, 1]) & 15)


def test_packing_takes_what_starts_anywhere_in_its_storage() -> None:
    mask, codes = torch.rand(5, 64) < 0.5, torch.randint(-7, 8, (5, 64), dtype=torch.int8)
    packed_mask, packed = pack_mask(mask), pack_codes(codes)
    for offset in range(1, 9):

        def moved(t: Tensor, offset: int = offset) -> Tensor:
            return torch.cat((t.new_zeros(offset), t.flatten()))[offset:].view(t.shape)

        assert_same(pack_mask(moved(mask)), packed_mask)
        assert_same(pack_codes(moved(codes)), packed)
        assert_same(unpack_mask(moved(packed_mask), 64), mask)
        assert_same(unpack_codes(moved(packed), 64, True), codes)


# --- Integer linear -----------------------------------------------------------------------------------------------


def operand(codes: Tensor, bits: int, symmetric: bool, zero_point: int = 0) -> quantizers.QuantizedOperand:
    """Per-tensor operand with given (unshifted) codes."""
    shift = quantizers.code_shift(bits, symmetric)
    stored_codes = (codes - shift).to(torch.int8)
    zero = torch.full((1, 1), zero_point - shift, dtype=torch.int32)
    row_sum = stored_codes.sum(1, keepdim=True, dtype=torch.int32)
    mask = pack_mask(torch.ones(codes.shape, dtype=torch.bool))
    return quantizers.QuantizedOperand(stored_codes, torch.ones(1, 1), zero, row_sum, mask, bits, symmetric)


@pytest.mark.parametrize(
    ("x_bits", "w_bits", "w_symmetric"), [(4, 4, True), (6, 6, True), (8, 8, True), (8, 8, False), (4, 4, False)]
)
def test_exact_chunk_at_extreme_codes(x_bits: int, w_bits: int, w_symmetric: bool) -> None:
    x_span, w_span = code_span(x_bits, False), code_span(w_bits, w_symmetric)
    bound = exact_chunk(x_span, w_span)
    assert bound * x_span * w_span <= 2**24 < (bound + 1) * x_span * w_span
    for K in (bound, bound + 1, bound + 2):
        x = torch.full((2, K), 2**x_bits - 1)
        w = torch.full((2, K), code_span(w_bits, True) if w_symmetric else 2**w_bits - 1)
        w[1] = w[1].neg() if w_symmetric else 0
        x[1, -1] -= 1  # an odd difference at the end of the largest sum
        expected = x @ w.mT
        qx, qw = operand(x, x_bits, False), operand(w, w_bits, w_symmetric)
        for impl in IMPLS:
            assert_same(integer_accumulator(qx, qw, impl=impl)[0], expected.int())
            assert_same(integer_linear(qx, qw, impl=impl), expected.float())
        # Zero points at the other end: all differences are -span.
        if not w_symmetric:
            qx, qw = operand(x * 0, x_bits, False, 2**x_bits - 1), operand(w * 0, w_bits, False, 2**w_bits - 1)
            for impl in IMPLS:
                assert int(integer_accumulator(qx, qw, impl=impl)[0, 0, 0]) == K * x_span * w_span


def test_one_fp32_product_is_wrong_beyond_the_bound() -> None:
    """Without the split the accumulator would be wrong: an odd sum above 2^24 is no fp32 number."""
    K = exact_chunk(255, 127) + 1  # 519
    x, w = torch.full((1, K), 255), torch.full((1, K), 127)
    exact = int((x @ w.mT).item())
    assert exact > 2**24
    assert exact % 2 == 1
    assert int((x.float() @ w.float().mT).item()) != exact
    for impl in IMPLS:
        assert int(integer_accumulator(operand(x, 8, False), operand(w, 8, True), impl=impl)) == exact


@given(data=st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_integer_linear_bits_equal_the_reference(data: st.DataObject) -> None:
    M, N = data.draw(st.sampled_from((0, *SIZES))), data.draw(st.sampled_from((0, *SIZES)))
    K = data.draw(st.sampled_from((0, 1, 36, 63, 198, 1100)))
    x_bits, w_bits = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))
    x_symmetric, w_symmetric = data.draw(st.booleans()), data.draw(st.booleans())
    act = data.draw(st.sampled_from(("per_token", "per_tensor")))
    weight = data.draw(st.sampled_from(("per_channel", "per_tensor", "per_group")))
    group_size = (
        data.draw(st.sampled_from([d for d in (1, 9, 11, 18, 550) if K % d == 0])) if weight == "per_group" else None
    )
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    out_dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    x = torch.randn(M, K, generator=generator, dtype=dtype) + 0.5
    w = torch.randn(N, K, generator=generator, dtype=dtype) - 0.2
    bias = torch.randn(N, generator=generator) if data.draw(st.booleans()) else None
    if M > 3 and K and data.draw(st.booleans()):
        x[2, 0] = math.nan

    qx = quantize_activation(x, bits=x_bits, symmetric=x_symmetric, granularity=act)
    qw = quantize_weight(w, bits=w_bits, symmetric=w_symmetric, granularity=weight, group_size=group_size)
    rx = reference.quantize(x, bits=x_bits, symmetric=x_symmetric, granularity=GRANULARITIES[act])
    rw = reference.quantize(
        w, bits=w_bits, symmetric=w_symmetric, granularity=GRANULARITIES[weight], group_size=group_size
    )
    y, accumulator = reference.integer_linear(rx, rw, bias, out_dtype)
    for impl in impls(dtype):
        assert_same(integer_accumulator(qx, qw, impl=impl), accumulator.int())
        assert_same(integer_linear(qx, qw, bias, out_dtype=out_dtype, impl=impl), y)


@pytest.mark.parametrize("group_size", [None, 9])
def test_epilogue_against_numpy(group_size: int | None) -> None:
    """Each operation rounded once, in fp32, groups in ascending order: a fused multiply-add would show."""
    x, w, b = torch.randn(37, 63), torch.randn(19, 63), torch.randn(19)
    granularity = "per_channel" if group_size is None else "per_group"
    xc, xs, xz, _ = numpy_quantize(x.numpy(), 4, False, "per_token")
    wc, ws, _, _ = numpy_quantize(w.numpy(), 4, True, granularity, group_size)
    y = None
    for g, start in enumerate(range(0, 63, group_size or 63)):
        part = slice(start, start + (group_size or 63))
        acc = (xc - xz)[:, part] @ wc[:, part].T
        term = (acc.astype(np.float32) * xs) * ws[:, g]
        y = term if y is None else y + term
    assert y is not None
    y = y + b.numpy()
    assert y.dtype == np.float32
    for impl in IMPLS:
        got = fake_quant_linear(x, w, b, weight_granularity=granularity, group_size=group_size, impl=impl)
        np.testing.assert_array_equal(got.numpy(), y)


def test_row_sums_per_group_are_made_when_missing() -> None:
    x, w = torch.randn(3, 36), torch.randn(4, 36)
    qw = quantize_weight(w, granularity="per_group", group_size=9)
    with_sums, without = quantize_activation(x, group_size=9), quantize_activation(x)
    assert with_sums.row_sum.shape == (3, 4)
    assert_same(with_sums.row_sum.sum(1, keepdim=True, dtype=torch.int32), without.row_sum)
    assert_same(integer_gemm._check_operands(without, qw)[0].row_sum, with_sums.row_sum)
    assert_same(integer_accumulator(without, qw), integer_accumulator(with_sums, qw))


# --- fake_quant_linear ----------------------------------------------------------------------------------------------


def straight_through(x: Tensor, q: reference.QuantizedTensor) -> Tensor:
    """dq(x) whose gradient is the mask, in x's dtype."""
    masked = x * q.mask
    return masked + (reference.dequantize(q).to(x.dtype) - masked).detach()


def relative_error(a: Tensor, truth: Tensor) -> float:
    return float((a.detach().double().reshape(truth.shape) - truth.detach()).norm() / truth.detach().norm())


CASES = [
    {"weight_bits": w, "act_bits": a, "act_granularity": act, "weight_granularity": weight, "group_size": group,
     "weight_symmetric": ws, "act_symmetric": xs}
    for (w, a), (act, weight, group), (ws, xs) in zip(
        itertools.cycle([(4, 4), (3, 4), (5, 5), (6, 6), (8, 8), (2, 7)]),
        itertools.product(("per_token", "per_tensor"), ("per_channel", "per_tensor", "per_group"), (9,)),
        itertools.cycle([(True, False), (False, True), (True, True), (False, False)]), strict=False,
    )
    for group in [group if weight == "per_group" else None]
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "impl"), [(t, impl) for t in (torch.float32, torch.bfloat16, torch.float64) for impl in impls(t)]
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"W{c['weight_bits']}A{c['act_bits']}")
def test_forward_and_backward_against_the_reference(case: dict, dtype: torch.dtype, impl: str) -> None:
    x = (torch.randn(2, 19, 63).to(dtype) + 0.3).requires_grad_()
    w, b = torch.randn(37, 63).to(dtype).requires_grad_(), torch.randn(37).to(dtype).requires_grad_()
    act_range = (-0.8, 1.1)  # clamps: the masks matter
    y = fake_quant_linear(x, w, b, act_range=act_range, weight_range=(-1.0, 1.0), impl=impl, **case)
    g = torch.randn(2, 19, 37).to(dtype)
    y.backward(g)

    rows = x.detach().reshape(-1, 63)
    qx = reference.quantize(
        rows, bits=case["act_bits"], symmetric=case["act_symmetric"],
        granularity=GRANULARITIES[case["act_granularity"]], value_range=act_range,
    )  # fmt: skip
    qw = reference.quantize(
        w.detach(), bits=case["weight_bits"], symmetric=case["weight_symmetric"], value_range=(-1.0, 1.0),
        granularity=GRANULARITIES[case["weight_granularity"]], group_size=case["group_size"],
    )  # fmt: skip
    assert not qx.mask.all()
    assert not qw.mask.all()
    assert_same(y.detach(), reference.integer_linear(qx, qw, b.detach(), dtype)[0].reshape(2, 19, 37))
    expected = reference.fake_quant_linear_backward(g.reshape(-1, 37), qx, qw)
    plain = [t.reshape(leaf.shape).to(dtype) for t, leaf in zip(expected, (x, w, b), strict=True)]
    if impl == "reference" or dtype == torch.float64:
        for mine, theirs in zip((x.grad, w.grad, b.grad), plain, strict=True):
            assert_same(mine, theirs)

    # Independently: fp64 autograd through x + (dq(x) - x).detach() where not clamped.
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (rows, w, b))
    y64 = straight_through(x64, qx) @ straight_through(w64, qw).mT + b64
    y64.backward(g.reshape(-1, 37).double())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float64: 1e-14}[dtype]
    assert relative_error(y, y64) <= tolerance
    for mine, theirs, truth in zip((x.grad, w.grad, b.grad), plain, (x64.grad, w64.grad, b64.grad), strict=True):
        # c = 2: fixed point rounds to 2^-23.4 of a row's largest element, fp32 to 2^-24 of each; then a few more sums
        allowed = 2 * relative_error(theirs, truth) + 1e-7
        assert relative_error(mine, truth) <= min(allowed, tolerance)


class _Surrogate(torch.autograd.Function):
    """Numerically the straight-through surrogate with residuals and masks frozen at a base point; backward is ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, frozen: tuple[Tensor, ...], kwargs: dict) -> Tensor:
        ctx.save_for_backward(x, w, b)
        ctx.kwargs = kwargs
        mask_x, rest_x, mask_w, rest_w = frozen
        return (x * mask_x + rest_x) @ (w * mask_w + rest_w).mT + b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = fake_quant_linear(*leaves, **ctx.kwargs)
        return *torch.autograd.grad(y, leaves, grads[0]), None, None


@pytest.mark.parametrize("impl", impls(torch.float64))
@pytest.mark.parametrize("bits", [3, 8])
def test_gradcheck_of_the_straight_through_surrogate(bits: int, impl: str) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 11), (7, 11), (7,)))
    kwargs = {
        "act_range": (-0.7, 0.9),
        "weight_range": (-0.8, 0.8),
        "act_bits": bits,
        "weight_bits": bits,
        "impl": impl,
    }
    qx = reference.quantize(x.detach(), bits=bits, symmetric=False, granularity="per_row", value_range=(-0.7, 0.9))
    qw = reference.quantize(w.detach(), bits=bits, symmetric=True, granularity="per_row", value_range=(-0.8, 0.8))
    frozen = []
    for t, q in ((x, qx), (w, qw)):
        assert not q.mask.all()
        frozen += [q.mask.double(), reference.dequantize(q) - t.detach() * q.mask]
    assert torch.autograd.gradcheck(_Surrogate.apply, (x, w, b, tuple(frozen), kwargs))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_sizes_and_single_rows(impl: str) -> None:
    b = torch.randn(40)
    for shape, N in itertools.product([(0, 7), (3, 0), (2, 0, 7), (7,), (0,), (0, 0), (0, 70), (1, 70)], (40, 5, 0)):
        for granularity, group in (("per_channel", None), ("per_group", 7)):
            x = torch.randn(shape, requires_grad=True)
            w = torch.randn(N, shape[-1], requires_grad=True)
            y = fake_quant_linear(x, w, b[:N], weight_granularity=granularity, group_size=group, impl=impl)
            assert y.shape == (*shape[:-1], N)
            if shape[-1] == 0:
                assert_same(y.detach(), b[:N].expand(y.shape))
            y.sum().backward()
            assert x.grad.shape == x.shape
            assert w.grad.shape == w.shape


def test_strides_do_not_matter() -> None:
    x, w = torch.randn(8, 6, 126), torch.randn(74, 126)
    views = {
        "strided": (x[::2, 1::2, ::2], w[::2, ::2]),
        "transposed": (x.transpose(0, 1)[..., :63], w.mT.contiguous().mT[:37, :63]),
        "expanded": (x[:1, :, :63].expand(4, 6, 63), w[:1, :63].expand(37, 63)),
    }
    for a, c in views.values():
        assert not a.is_contiguous()
        results = []
        for dense in (False, True):
            x_in, w_in = (t.contiguous() if dense else t for t in (a, c))
            x_in, w_in = (t.detach().requires_grad_() for t in (x_in, w_in))
            y = fake_quant_linear(x_in, w_in)
            y.mT.square().sum().backward()
            results.append((y.detach(), x_in.grad, w_in.grad))
        assert_same(results[0][0], results[1][0])
        for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)))
def test_needs_input_grad(needs: tuple[bool, bool, bool]) -> None:
    tensors = [torch.randn(s).requires_grad_(n) for s, n in zip(((9, 63), (5, 63), (5,)), needs, strict=True)]
    full = [t.detach().clone().requires_grad_() for t in tensors]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fake_quant_linear(*tensors)
    assert y.requires_grad == any(needs)
    assert len(saved) == needs[0] + 3 * needs[1] + any(needs[:2])  # mask, operand, the weight itself
    with torch.no_grad():
        assert not fake_quant_linear(*full).requires_grad
    if any(needs):
        y.square().sum().backward()
    fake_quant_linear(*full).square().sum().backward()
    for t, f, n in zip(tensors, full, needs, strict=True):
        assert (t.grad is not None) == n
        if n:
            assert_same(t.grad, f.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_quantizers_and_integer_products_have_no_gradient(impl: str) -> None:
    x, w, bias = (torch.randn(s, requires_grad=True) for s in ((9, 64), (5, 64), (5,)))

    def layer(x: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
        qx, qw = quantize_activation(x, impl=impl), quantize_weight(w, impl=impl)
        y = integer_linear(qx, qw, bias, impl=impl)
        return [*qx[:5], *qw[:5], integer_accumulator(qx, qw, impl=impl), y]

    results = layer(x, w, bias)
    assert not any(t.requires_grad for t in results)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert all(map(torch.equal, results, layer(x, w, bias)))
    with pytest.raises(RuntimeError, match="does not require grad"):
        results[-1].sum().backward()
    if impl == "torch":
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, w, bias)
        assert not any(t.requires_grad for t in compiled)
        assert all(map(torch.equal, results, compiled))


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.70), (2, 0.70), (8, 1.20)])
@pytest.mark.parametrize("rows", [(64, 96), (32, 384)])
def test_saved_for_backward(rows: tuple[int, int], bits: int, limit: float) -> None:
    """Per element of the input, whatever the size of the weight, which is there anyway."""
    x, w = (torch.randn(count, 384, requires_grad=True) for count in rows)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quant_linear(x, w, weight_bits=bits, act_bits=bits)
    assert all(t.dtype != torch.bool for t in saved)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert x.untyped_storage().data_ptr() not in storages
    assert storages.pop(w.untyped_storage().data_ptr()) == w.numel() * 4
    assert sum(storages.values()) / x.numel() <= limit


def test_a_weight_written_before_the_backward_is_refused() -> None:
    x, w = torch.randn(4, 36, requires_grad=True), torch.randn(5, 36, requires_grad=True)
    y = fake_quant_linear(x, w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_only_the_output_dtype(impl: str, autocast_dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((19, 300), (37, 300), (37,)))
    plain = fake_quant_linear(x, w, b, act_bits=8, weight_bits=8, impl=impl)
    with torch.autocast("cpu", dtype=autocast_dtype):
        y = fake_quant_linear(x, w, b, act_bits=8, weight_bits=8, impl=impl)
        in_fp64 = fake_quant_linear(x.detach().double(), w.detach().double(), impl=None if impl == "cpu" else impl)
        assert in_fp64.dtype == torch.float64
        qx, qw = quantize_activation(x, bits=8), quantize_weight(w, bits=8)
        accumulator = integer_accumulator(qx, qw, impl=impl)
    assert_same(y, plain.to(autocast_dtype))
    assert_same(accumulator, integer_accumulator(qx, qw, impl="reference"))
    g = torch.randn(y.shape).to(autocast_dtype)
    expected = torch.autograd.grad(plain, (x, w, b), g.float())
    for mine, theirs in zip(torch.autograd.grad(y, (x, w, b), g), expected, strict=True):
        assert_same(mine, theirs)  # not rounded to autocast's dtype


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = fake_quant_linear(x, w, b, act_range=(-1.0, 1.5))
        return fake_quant_linear(y, w.mT, weight_granularity="per_tensor", act_bits=8, weight_symmetric=False)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        results = []
        for f in (function, compiled):
            torch.manual_seed(rows)
            tensors = [torch.randn(s, requires_grad=True) for s in ((2, rows, 36), (19, 36), (19,))]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rows == 5):
                y = f(*tensors)
            y.float().square().sum().backward()
            results.append([y.detach(), *(t.grad for t in tensors)])
        for mine, theirs in zip(*results, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str) -> None:
    x, w, b = torch.randn(5, 36), torch.randn(7, 36), torch.randn(7)
    edge = torch.tensor([-0.5])
    for args in (
        (x, None, None, 4, False, "per_row", 9),
        (x.mT, edge, -edge, 8, False, "per_tensor", 0),
        (w, None, None, 8, True, "per_group", 9),
        (w.double(), None, None, 2, True, "per_row", 0),
    ):
        if impl not in impls(args[0].dtype):
            continue
        torch.library.opcheck(torch.ops.s2d.quantize.default, (*args, impl))
        if args[3] <= 4:
            torch.library.opcheck(torch.ops.s2d.quantize_packed.default, (*args, impl))
    for group, granularity in ((None, "per_channel"), (9, "per_group")):
        qx = quantize_activation(x, group_size=group)
        qw = quantize_weight(w, granularity=granularity, group_size=group)
        kinds = (4, False, 4, True)
        torch.library.opcheck(torch.ops.s2d.integer_accumulator.default, (*qx[:4], *qw[:4], *kinds, impl))
        for bias in (None, b):
            arguments = (*qx[:4], *qw[:4], bias, *kinds, torch.bfloat16, impl)
            torch.library.opcheck(torch.ops.s2d.integer_linear.default, arguments)
        arguments = (torch.randn(5, 7), pack_codes(qw.codes), qw.scale, qw.zero_point, qx.mask, 36, 4, True)
        torch.library.opcheck(torch.ops.s2d.straight_through_grad.default, (*arguments, torch.float32, impl))


def test_fake_tensors_leave_nothing_behind() -> None:
    quantizers._bits_of_bytes_on.clear()
    mask = torch.tensor([[5]], dtype=torch.uint8)
    with FakeTensorMode() as mode:
        assert unpack_mask(mode.from_tensor(mask), 3).shape == (1, 3)
    assert unpack_mask(mask, 3).tolist() == [[True, False, True]]


def test_a_table_made_in_a_capture_is_not_kept_but_a_kept_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[5]], dtype=torch.uint8)
    quantizers._bits_of_bytes_on.clear()
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    assert unpack_mask(mask, 3).tolist() == [[True, False, True]]
    assert not quantizers._bits_of_bytes_on
    monkeypatch.undo()
    unpack_mask(mask, 3)
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    monkeypatch.setattr(quantizers, "_bits_of_bytes", lambda device: pytest.fail("there is one"))
    assert unpack_mask(mask, 3).tolist() == [[True, False, True]]


def test_ops_take_a_default_impl() -> None:
    x = torch.randn(3, 8)
    for got, wanted in zip(
        torch.ops.s2d.quantize(x, None, None, 4, False, "per_row", 0), quantize_activation(x)[:5], strict=True
    ):
        assert_same(got, wanted)


def test_a_second_derivative_is_refused() -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(fake_quant_linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_same_bits_twice_and_in_any_batch() -> None:
    x, w, b = torch.randn(64, 199), torch.randn(37, 199), torch.randn(37)
    y = fake_quant_linear(x, w, b)
    assert_same(y, fake_quant_linear(x, w, b))
    assert_same(y[5:6], fake_quant_linear(x[5:6], w, b))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_non_finite_inputs_of_the_layer(bits: int, value: float, impl: str) -> None:
    """Per token a row poisons itself; per tensor everything; a weight's row its output channel."""
    x, w, b = torch.randn(6, 64), torch.randn(5, 64), torch.randn(5)
    kinds = {"act_bits": bits, "weight_bits": bits, "impl": impl}
    clean = fake_quant_linear(x, w, b, **kinds)
    bad_x, bad_w = x.clone(), w.clone()
    bad_x[2, 7], bad_w[3, 5] = value, value
    row, column = torch.zeros(6, 5, dtype=torch.bool), torch.zeros(6, 5, dtype=torch.bool)
    row[2], column[:, 3] = True, True
    for inputs, weight, poisoned in ((bad_x, w, row), (x, bad_w, column)):
        y = fake_quant_linear(inputs, weight, b, **kinds)
        assert_same(y.isnan(), poisoned)
        assert_same(y[~poisoned], clean[~poisoned])
    per_tensor = {"act_granularity": "per_tensor", **kinds}
    assert fake_quant_linear(bad_x, w, b, **per_tensor).isnan().all()
    assert fake_quant_linear(bad_x, w, b, act_range=(-1.0, 1.0), **per_tensor).isnan().all()
    assert fake_quant_linear(x, bad_w, b, weight_granularity="per_tensor", **kinds).isnan().all()
    leaves = [t.requires_grad_() for t in (bad_x, w)]
    grad_x, _ = torch.autograd.grad(fake_quant_linear(*leaves, b, **kinds).nan_to_num().sum(), leaves)
    assert not grad_x[2].any()  # nothing of that row was within the bounds
    assert grad_x[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize(("x_bits", "w_bits", "w_symmetric"), [(8, 8, True), (8, 8, False), (7, 8, True)])
def test_the_longest_sums_do_not_overflow(x_bits: int, w_bits: int, w_symmetric: bool) -> None:
    limit = (2**31 - 1) // (code_span(x_bits, False) * code_span(w_bits, w_symmetric))
    x = torch.full((2, limit), 2**x_bits - 1)
    w = torch.full((2, limit), 127 if w_symmetric else 255)
    w[1] = -127 if w_symmetric else 0
    qx, qw = operand(x, x_bits, False), operand(w, w_bits, w_symmetric)
    for impl in IMPLS:
        assert_same(integer_accumulator(qx, qw, impl=impl)[0], (x @ w.mT).int())
    longer = [operand(torch.cat((t, t[:, :1]), 1), *k) for t, k in ((x, (x_bits, False)), (w, (w_bits, w_symmetric)))]
    with pytest.raises(ValueError, match=rf"K={limit + 1} .*K <= {limit}.*per_group"):
        integer_accumulator(*longer)


X, W = torch.zeros(3, 8), torch.zeros(5, 8)
NAN = math.nan


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"weight_bits=9.*2\.\.8", lambda: fake_quant_linear(X, W, weight_bits=9)),
        (ValueError, r"act_bits=1.*2\.\.8", lambda: fake_quant_linear(X, W, act_bits=1)),
        (TypeError, r"act_bits must be an int, got float", lambda: fake_quant_linear(X, W, act_bits=4.0)),
        (TypeError, r"bits must be an int, got bool", lambda: quantize_weight(W, bits=True)),
        (ValueError, r"\(3, 7\).*\(5, 8\)", lambda: fake_quant_linear(X[:, 1:], W)),
        (ValueError, r"x has shape \(\)", lambda: fake_quant_linear(torch.tensor(1.0), W)),
        (ValueError, r"weight must have 2 dimensions", lambda: fake_quant_linear(X, W[0])),
        (ValueError, r"bias has shape \(3,\).*5 output", lambda: fake_quant_linear(X, W, X[:, 0])),
        (TypeError, r"x has dtype torch.int64", lambda: fake_quant_linear(X.long(), W)),
        (TypeError, r"weight must be a torch.Tensor, got list", lambda: fake_quant_linear(X, [1.0])),
        (TypeError, r"x is torch.float32 but weight torch.float64", lambda: fake_quant_linear(X, W.double())),
        (ValueError, r"weight is on meta, expected cpu", lambda: fake_quant_linear(X, W.to("meta"))),
        (ValueError, r"bias is on meta", lambda: fake_quant_linear(X, W, torch.zeros(5, device="meta"))),
        (ValueError, r"act_range=\(1\.0, -1\.0\).*min <= max", lambda: fake_quant_linear(X, W, act_range=(1, -1))),
        (ValueError, r"weight_range=\(nan", lambda: fake_quant_linear(X, W, weight_range=(NAN, 1.0))),
        (ValueError, r"act_range=", lambda: fake_quant_linear(X, W, act_range=(torch.tensor(2.0), torch.tensor(1.0)))),
        (TypeError, r"act_range must be a pair", lambda: fake_quant_linear(X, W, act_range=3.0)),
        (TypeError, r"act_range must be a pair", lambda: fake_quant_linear(X, W, act_range=("a", "b"))),
        (ValueError, r"value_range must hold 1 or 3", lambda: quantize_activation(X, value_range=(X[0], X[0]))),
        (ValueError, r"group_size=3 must divide K=8",
         lambda: fake_quant_linear(X, W, weight_granularity="per_group", group_size=3)),
        (ValueError, r"group_size=None.*per_group", lambda: fake_quant_linear(X, W, weight_granularity="per_group")),
        (ValueError, r"group_size=4 with weight granularity 'per_channel'",
         lambda: fake_quant_linear(X, W, group_size=4)),
        (TypeError, r"group_size must be an int", lambda: quantize_activation(X, group_size=2.0)),
        (ValueError, r"act_granularity='per_row'.*per_token",
         lambda: fake_quant_linear(X, W, act_granularity="per_row")),
        (ValueError, r"weight_granularity='per_token'",
         lambda: fake_quant_linear(X, W, weight_granularity="per_token")),
        (TypeError, r"act_granularity must be a string, got \['per_token'\].*'per_token', 'per_tensor'",
         lambda: fake_quant_linear(X, W, act_granularity=["per_token"])),
        (TypeError, r"weight_granularity must be a string, got None", lambda: quantize_weight(W, granularity=None)),
        (TypeError, r"granularity must be a string, got 4", lambda: quantize_activation(X, granularity=4)),
        (ValueError, r"x must have 2 dimensions", lambda: quantize_activation(X[0])),
        (ValueError, r"impl='fast' is none of", lambda: fake_quant_linear(X, W, impl="fast")),
        (ValueError, r"K=70000 .*int32.*per_group",
         lambda: fake_quant_linear(torch.zeros(1, 70000), torch.zeros(1, 70000), act_bits=8, weight_bits=8)),
        (ValueError, r"qx.codes is \[3, 8\] but qw.codes is \[5, 4\]",
         lambda: integer_accumulator(quantize_activation(X), quantize_weight(W[:, :4]))),
        (ValueError, r"w_scale \(5, 1\) does not fit 2 groups of 5 rows",
         lambda: integer_accumulator(quantize_activation(X), quantize_activation(W, group_size=4))),
        (ValueError, r"w_scale \(5, 2\) does not fit 1 groups of 5 rows",
         lambda: integer_linear(quantize_activation(X), quantize_weight(W)._replace(scale=W[:, :2]))),
        (ValueError, r"qx.scale is \(3, 2\).*\[3, 1\]",
         lambda: integer_linear(quantize_weight(X, granularity="per_group", group_size=4), quantize_weight(W))),
        (TypeError, r"float64.*float32",
         lambda: integer_linear(quantize_activation(X.double()), quantize_weight(W))),
    ],
)  # fmt: skip
def test_errors_name_the_values(error: type[Exception], match: str, call: object) -> None:
    with pytest.raises(error, match=match):
        call()  # type: ignore[operator]
