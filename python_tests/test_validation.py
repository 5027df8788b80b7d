"""validate: our implementations pass, and kernels with typical mistakes do not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import linear_peers
from s2d_kernels import add_penalty_grad_, fake_quant_linear, ops, pcdr, reference, topk_svd, validate
from s2d_kernels.conventions import OTHERS, OURS, Convention
from s2d_kernels.linear_validation import Setting, convention_rows, explain_linear, linear_rows, ulp_distance
from s2d_kernels.quant_ops import QuantizedOperand, quantize_activation, quantize_weight
from s2d_kernels.quantizers import full_mask
from s2d_kernels.validation import summarize, to_table


def failed(checks: list) -> set[str]:
    return {check.what for check in checks if not check.passed}


def test_ours_against_the_reference() -> None:
    checks = validate()
    assert failed(checks) == set()
    total = {(c.op, c.what): c for c in summarize(checks)}
    for op in ("quantize_activation", "quantize_weight"):
        assert total[op, "codes"].different == 0
        assert total[op, "codes"].compared > 100_000
    assert total["integer_accumulator", "accumulator"].different == 0
    assert total["fake_quant_linear", "y"].different == 0


def reciprocal(x: torch.Tensor, **kinds: Any) -> QuantizedOperand:
    """Multiplies by 1/scale instead of dividing, as some kernels do."""
    q = quantize_activation(x, **kinds)
    low = -(2 ** (kinds["bits"] - 1) - 1) if kinds["symmetric"] else 0
    high = 2 ** (kinds["bits"] - 1) - 1 if kinds["symmetric"] else 2 ** kinds["bits"] - 1
    shift = 128 if kinds["bits"] == 8 and not kinds["symmetric"] else 0
    codes = ((x * (1 / q.scale)).round() + q.zero_point + shift).clamp(low, high) - shift
    return q._replace(codes=codes.to(torch.int8))


@pytest.mark.parametrize(
    ("op", "kernel", "outputs"),
    [
        ("quantize_activation", quantize_activation, set()),
        ("quantize_activation", reciprocal, {"codes"}),
        ("fake_quant_linear", fake_quant_linear, set()),
        ("fake_quant_linear", lambda x, w, b, **k: fake_quant_linear(x, w, b, **k) + 1e-6, {"y"}),
        ("fake_quant_linear", lambda x, w, b, **_: torch.nn.functional.linear(x, w, b), {"y", "grad_x", "grad_W"}),
        ("add_penalty_grad_", add_penalty_grad_, set()),
        ("add_penalty_grad_", lambda g, f, *, ranks, **k: add_penalty_grad_(g, f, **k), {"grad"}),
        ("topk_svd", topk_svd, set()),
        ("topk_svd", lambda w, k: topk_svd(w, k=k, reads=1), {"S", "U S^2 Vh"}),
        ("topk_svd", lambda w, k: [topk_svd([m.nan_to_num()], k=k)[0] for m in w], {"S", "U S^2 Vh"}),
        ("pcdr", pcdr, set()),
        ("pcdr", lambda w, x, n, f, **k: [d._replace(k_target=0) for d in pcdr(w, x, n, f, **k)], {"k_target"}),
    ],
)
def test_kernels_of_others(op: str, kernel: Callable, outputs: set[str]) -> None:
    assert failed(validate(kernel, op=op)) == outputs


def test_wrong_shape_and_nan_are_failures() -> None:
    truncated = validate(lambda x, w, b, **k: fake_quant_linear(x, w, b, **k)[:, :1], op="fake_quant_linear")
    assert any("instead of" in what for what in failed(truncated))
    poisoned = validate(lambda x, w, b, **k: fake_quant_linear(x, w, b, **k) * float("nan"), op="fake_quant_linear")
    assert "y" in failed(poisoned)


def test_a_wrong_mask_or_one_poisoned_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops._TABLE["quantize"]["torch"]

    def nothing_clamped(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        return *original(x, *rest)[:4], full_mask(*x.shape, x.device)

    def everything_poisoned(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        codes, scale, *others = original(x, *rest)
        return codes, scale if x.isfinite().all() else torch.full_like(scale, float("nan")), *others

    for mutant, outputs in ((nothing_clamped, {"mask", "grad_x", "grad_W"}), (everything_poisoned, {"scale", "y"})):
        monkeypatch.setitem(ops._TABLE["quantize"], "torch", mutant)
        found = [validate(impl="torch", op=op) for op in ("quantize_activation", "quantize_weight")]
        assert all(failed(checks) == outputs & {"mask", "scale"} for checks in found)
        assert outputs - {"mask", "scale"} <= failed(validate(impl="torch", op="fake_quant_linear"))


class NoMask(torch.autograd.Function):
    """W4A4 whose backward forgets which codes were clamped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, given: dict) -> torch.Tensor:
        ctx.operands = Setting(**given).operands(x, w)
        return fake_quant_linear(x, w, b, **given)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = (reference.dequantize(q) for q in ctx.operands)
        return grads[0] @ w, grads[0].mT @ x, grads[0].sum(0), None


def test_a_kernel_of_yours_without_a_mask_is_seen() -> None:
    # symmetric codes are clamped in given ranges only, but a NaN row has no gradient
    both = {"weight_range": (-0.5, 0.5), "act_symmetric": True}, {"grad_x", "grad_W"}
    for given, outputs in (({}, {"grad_x"}), both):
        setting = {"weight_bits": 4, **given}
        assert failed(validate(lambda x, w, b, s=setting: NoMask.apply(x, w, b, s), **setting)) == outputs
        assert not failed(validate(lambda x, w, b, s=setting: fake_quant_linear(x, w, b, **s), **setting))


def test_a_kernel_of_yours_that_raises_or_fails_on_nothing() -> None:
    def no_empty(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            raise IndexError("no tokens")
        return fake_quant_linear(x, w, b)

    bad = [check for check in validate(no_empty, weight_bits=4) if not check.passed]
    assert {check.case.split()[0] for check in bad} == {"0x64x5", "3x0x5"}
    assert all("raised IndexError: no tokens" in check.note for check in bad)


@pytest.mark.parametrize(
    ("op", "kernel", "what"),
    [
        ("quantize_weight", lambda w, **k: float_codes(quantize_weight(w, **k)), "codes: torch.float32 instead of"),
        ("quantize_activation", lambda x, **k: float_codes(quantize_activation(x, **k)), "codes: torch.float32"),
        ("fake_quant_linear", lambda x, w, b, **k: fake_quant_linear(x, w, b, **k).half(), "y: torch.float16"),
        ("topk_svd", lambda w, k: [f._replace(U=f.U.half()) for f in topk_svd(w, k=k)], "U: torch.float16"),
        ("topk_svd", lambda w, k: None, "S: NoneType instead of (3,)"),
        ("pcdr", lambda *a, **k: [d._replace(k_target=float(d.k_target)) for d in pcdr(*a, **k)], "k_target: list"),
        ("pcdr", lambda *a, **k: pcdr(*a, **k)[:-1], "k_target: list"),
    ],
)
def test_answers_of_a_wrong_kind_are_failures(op: str, kernel: Callable, what: str) -> None:
    bad = [check for check in validate(kernel, op=op) if not check.passed]
    assert any(check.what.startswith(what) and what in check.note for check in bad)


def float_codes(q: QuantizedOperand) -> QuantizedOperand:
    return q._replace(codes=q.codes.float())


def overwriting(function: Callable) -> Callable:
    """`function`, then whatever tensors it was given are zero."""

    def kernel(*arguments: Any, **settings: Any) -> Any:
        got = function(*arguments, **settings)
        for tensor in torch.utils._pytree.tree_leaves(arguments):
            if isinstance(tensor, torch.Tensor):
                tensor.data.zero_()
        return got

    return kernel


@pytest.mark.parametrize(
    ("op", "function", "inputs"),
    [
        ("quantize_activation", quantize_activation, {"x"}),
        ("quantize_weight", quantize_weight, {"weight"}),
        ("fake_quant_linear", fake_quant_linear, {"x", "weight", "bias"}),
        ("add_penalty_grad_", add_penalty_grad_, {"factors"}),
        ("topk_svd", topk_svd, {"weights"}),
        ("pcdr", pcdr, {"weights", "x", "factors"}),
    ],
)
def test_an_overwritten_input_is_a_failure(op: str, function: Callable, inputs: set[str]) -> None:
    bad = [check for check in validate(overwriting(function), op=op) if not check.passed]
    named = {check.what.removeprefix("input ").split("[")[0] for check in bad if check.what.startswith("input ")}
    assert named == inputs
    assert all("overwrote its input" in check.note for check in bad if check.what.startswith("input "))
    if op != "add_penalty_grad_":  # whose gradients are zero now
        assert {check.what for check in bad if "grad" not in check.what} == {
            check.what for check in bad if check.what.startswith("input ")
        }


@pytest.mark.parametrize("op", ["quantize_weight", "fake_quant_linear", "add_penalty_grad_", "topk_svd", "pcdr"])
def test_a_kernel_that_raises_is_a_failure_in_every_suite(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("no such block")

    checks = validate(broken, op=op)
    assert checks
    assert not any(check.passed for check in checks)
    assert all("raised IndexError: no such block" in check.note for check in checks)
    monkeypatch.setitem(ops._TABLE["quantize"], "torch", broken)  # ours must not
    with pytest.raises(IndexError, match="no such block"):
        validate(impl="torch", op="quantize_weight")


# --- Quantized linear layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float64])
def test_an_output_in_another_dtype_is_a_failure(dtype: torch.dtype) -> None:
    for detached in (False, True):
        checks = validate(
            lambda x, w, b, d=detached: (fake_quant_linear(x, w, b).detach() if d else fake_quant_linear(x, w, b)).to(
                dtype
            ),
            weight_bits=4,
        )
        assert not any(check.passed for check in checks)
        assert all(f"y: {dtype} instead of torch.float32" in check.note for check in checks)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_a_layer_that_overwrites_one_input_is_seen(name: str) -> None:
    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = fake_quant_linear(x, weight, bias).detach()
        {"x": x, "weight": weight, "bias": bias}[name].data.mul_(-1)  # zeros differ in the sign alone
        return y

    bad = [check for check in validate(kernel, weight_bits=4) if not check.passed]
    assert {check.what for check in bad} == {f"input {name}"}
    assert {check.case.split()[0] for check in bad} >= {"1x1x1", "37x199x63", "130x384x96"}
    assert all(f"overwrote its input {name}, {c.different:,} of {c.compared:,}" in c.note for c in bad)
    assert all(check.different == check.compared for check in bad if "NaN" not in check.case)


def zeroing(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = fake_quant_linear(x, weight, bias)
    x.zero_()
    return y


def reshaping(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = fake_quant_linear(x, weight, bias)
    x.data = x.data.half()
    return y


class Backward(torch.autograd.Function):
    """W4A4 with a backward of somebody else's."""

    @staticmethod
    def forward(ctx: Any, backward: Callable, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.backward_of, ctx.operands = backward, (x, w, b)
        return fake_quant_linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.backward_of(*grads, *ctx.operands)


def no_dequantization(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple:
    return g @ w, g.mT @ x, g.sum(0)


def scribbling(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple:
    w.data.zero_()
    return g @ w, g.mT @ x, g.sum(0)


@pytest.mark.parametrize(
    ("kernel", "outputs"),
    [
        (lambda x, w, b: None, r"y: NoneType instead of .*"),
        (lambda x, w, b: RuntimeError("an answer"), r"y: RuntimeError instead of .*"),
        (lambda x, w, b: fake_quant_linear(x, w, b)[:, :-1], r"y: \(\d+, \d+\) instead of .*"),
        (lambda x, w, b: fake_quant_linear(x, w, b).to_sparse(), r"y: torch.sparse_coo instead of torch.strided"),
        (lambda x, w, b: fake_quant_linear(x, w, b).to("meta"), r"y: meta instead of cpu"),
        (lambda x, w, b: fake_quant_linear(x, w, b) * float("nan"), r"y|grad_x|grad_W|grad_b"),
        (lambda x, w, b: fake_quant_linear(x, w, b) * float("inf"), r"y|grad_x|grad_W|grad_b"),
        (lambda x, w, b: fake_quant_linear(x, w, b.detach()), r"grad_b: NoneType instead of .*"),
        (lambda x, w, b: Backward.apply(no_dequantization, x, w, b), r"grad_x|grad_W"),
        (lambda x, w, b: Backward.apply(lambda *_: 1 / 0, x, w, b), r"gradients: an error"),
        (lambda x, w, b: Backward.apply(scribbling, x, w, b), r"input weight|grad_x|grad_W"),
        (zeroing, r"y: an error"),
        (reshaping, r"input x|grad_x: NoneType instead of .*"),
        (lambda x, w, b: fake_quant_linear(x.requires_grad_(False), w, b), r"gradients: an error"),
    ],
)
def test_whatever_a_layer_does_ends_as_checks_with_notes(kernel: Callable, outputs: str) -> None:
    bad = [check for check in validate(kernel, weight_bits=4) if not check.passed]
    assert bad
    for check in bad:
        assert re.fullmatch(outputs, check.what), check.what
        assert check.case in check.note
        assert check.what.split(":")[0] in check.note
        if check.what.startswith("grad_") and check.error < float("inf"):
            assert f"{check.different:,} of {check.compared:,} differ, by up to {check.error:.2g}" in check.note
            assert f"(limit {check.limit:g})" in check.note


def test_every_failed_check_and_no_other_has_a_note() -> None:
    for op, kernel in (
        ("quantize_activation", reciprocal),
        ("fake_quant_linear", lambda x, w, b, **_: torch.nn.functional.linear(x, w, b)),
        ("add_penalty_grad_", lambda g, f, *, ranks, **k: add_penalty_grad_(g, f, **k)),
        ("topk_svd", lambda w, k: [f._replace(S=f.S * 1.01) for f in topk_svd(w, k=k)]),
        ("pcdr", lambda w, x, n, f, **k: [d._replace(k_target=0) for d in pcdr(w, x, n, f, **k)]),
    ):
        checks = validate(kernel, op=op)
        assert any(check.note for check in checks)
        assert all(bool(check.note) != check.passed for check in checks)


def test_inputs_with_nan_share_nothing_with_the_case_before() -> None:
    seen: list[torch.Tensor] = []

    def kernel(*tensors: torch.Tensor) -> torch.Tensor:
        seen.extend(tensors)
        assert all(tensor.is_leaf and tensor.requires_grad for tensor in tensors)
        return fake_quant_linear(*tensors)

    assert not failed(validate(kernel, weight_bits=4))
    addresses = [tensor.data_ptr() for tensor in seen if tensor.numel()]
    assert len(set(addresses)) == len(addresses)


def test_one_number_names_no_convention() -> None:
    one_off = by_hand(zero_point=lambda v: 1 - torch.round(v))
    for kernel in (one_off, lambda x, w, b: (fake_quant_linear(x, w, b) + 1e-3).detach()):
        notes = {c.case: c.note for c in validate(kernel, weight_bits=4) if not c.passed}
        first = notes.pop("1x1x1 W4sA4u")
        assert "Too few numbers (1)" in first
        assert "Explained by" not in first
        assert not any("Too few" in note for note in notes.values())
        assert kernel is not one_off or not any("Explained by" in note for note in notes.values())

    def codes_off(weight: torch.Tensor, **kinds: Any) -> QuantizedOperand:
        q = quantize_weight(weight, **kinds)
        return q._replace(codes=q.codes - q.codes.sign())

    of_one = [c.note for c in validate(codes_off, op="quantize_weight") if "x1x1 " in c.case and c.what == "codes"]
    assert any("Too few codes" in note for note in of_one)
    assert not any("Explained by" in note for note in of_one)


def in_convention(of_x: Convention, of_weight: Convention, setting: Setting, floating: bool = False) -> Callable:
    """A kernel of somebody else's."""

    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x, weight, bias = x.detach(), weight.detach(), bias.detach()
        qx, qw = setting.operands(x, weight, of_x, of_weight)
        if floating:
            return torch.nn.functional.linear(reference.dequantize(qx), reference.dequantize(qw), bias)
        return reference.integer_linear(qx, qw, bias, x.dtype)[0]

    return kernel


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("other", OTHERS, ids=lambda o: o.name)
def test_the_convention_that_explains_a_kernel_is_named(other: Convention, symmetric: bool) -> None:
    if not other.applies(symmetric):
        x = torch.randn(9, 64)
        kind = {"bits": 4, "symmetric": symmetric, "granularity": "per_row"}
        assert torch.equal(other.quantize(x, **kind).codes, reference.quantize(x, **kind).codes)
        return
    setting = Setting(act_symmetric=symmetric, act_granularity="per_token")
    kernel = in_convention(other, OURS, setting)
    checks = validate(kernel, **setting._asdict())
    notes = [check.note for check in checks if not check.passed and "1x1x1" not in check.case]
    assert notes
    assert all("Explained by" in note for note in notes)
    name = other.name
    if symmetric:  # without a zero point there is nothing to add or to round
        name = {
            "reciprocal, and the zero point added before rounding": "multiplication by the reciprocal of the scale",
            "half-up rounding, of the zero point too": "half-up rounding",
            "half-up rounding, zero point = quant_min + half-up(-minimum / scale)": "half-up rounding",
            "halves rounded away from zero, of the zero point too": "halves rounded away from zero",
        }.get(name, name)
    assert any(f"Explained by: {name}, in" in note and "all bits are equal" in note for note in notes)
    assert "instead of" in notes[-1]
    assert re.search(r"x\[\d+\] in \S+: scale \S+, zero point \d+", notes[-1])


def by_hand(
    half: Callable[[torch.Tensor], torch.Tensor] = torch.round,
    zero_point: Callable[[torch.Tensor], torch.Tensor] = lambda v: -torch.round(v),
    code: Callable[..., torch.Tensor] = lambda x, s, z, half: half(x / s) + z,
    weight_max: float = 7,
) -> Callable:
    """A W4A4 kernel as somebody may write it, without a line of ours."""

    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        s, s_w = (high - low) / 15, weight.abs().amax(-1, keepdim=True) / weight_max
        s, s_w = (torch.where(scale < 2.0**-126, 1.0, scale) for scale in (s, s_w))
        z = zero_point(low / s).clamp(0, 15)
        q, q_w = code(x, s, z, half).clamp(0, 15), half(weight / s_w).clamp(-8 if weight_max > 7 else -7, 7)
        return ((q - z) @ q_w.mT * s * s_w.mT + bias).detach()

    return kernel


def explanations(kernel: Callable) -> list[str]:
    """What is said of each case in which a W4A4 kernel differs; of K = 0 and of one number there is nothing to say."""
    with torch.no_grad():
        checks = validate(kernel, weight_bits=4, act_bits=4)
    notes = [c.note for c in checks if not (c.passed or "x0x" in c.case or "1x1x1" in c.case)]
    return [re.sub(r".*?(Explained by|Our codes|No known)", r"\1", note) for note in notes]


UP = by_hand(lambda v: torch.floor(v + 0.5), lambda v: -torch.floor(v + 0.5))
UP_OF_MINUS = by_hand(lambda v: torch.floor(v + 0.5), lambda v: torch.floor(0.5 - v))
AWAY = by_hand(lambda v: v.sign() * torch.floor(v.abs() + 0.5), lambda v: torch.floor(v.abs() + 0.5))


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (UP, "half-up rounding, of the zero point too, in both operands"),
        (UP_OF_MINUS, "half-up rounding, zero point = quant_min + half-up(-minimum / scale), in both operands"),
        (AWAY, "halves rounded away from zero, of the zero point too, in both operands"),
    ],
)
def test_a_kernel_by_hand_that_rounds_halves_its_way(kernel: Callable, name: str) -> None:
    found = explanations(kernel)
    assert all("(then all bits are equal)" in note for note in found)
    assert any(note.startswith(f"Explained by: {name} (") for note in found), found


def test_other_conventions_in_either_operand() -> None:
    mixed = by_hand(code=lambda x, s, z, half: half(x * (1 / s) + z), weight_max=7.5)
    found = explanations(mixed)
    assert all("(then all bits are equal)" in note for note in found)
    act = "reciprocal, and the zero point added before rounding, in the activations"
    weight = "scale = absmax / (2^(b-1) - 1/2), codes from -2^(b-1), in the weight"
    assert any(note.startswith(f"Explained by: {act}; {weight} (") for note in found), found
    assert any(f"First such code: {side}" in note for note in found for side in ("x[", "weight["))


def test_torchaos_linear_is_explained() -> None:
    """Two conventions in one operand, a third in the other, products in floating point."""
    pytest.importorskip("torchao")
    found = [note for note in explanations(linear_peers._torchao) if note.strip()]
    assert len(found) >= 6
    assert all(note.startswith("Explained by") for note in found if "raised" not in note), found
    act = "multiplication by the reciprocal of the scale, in the activations"
    weight = "scale = absmax / (2^(b-1) - 1/2), codes from -2^(b-1) with multiplication by the reciprocal of the scale"
    assert any(f"{act}; {weight}, in the weight (equal up to rounding" in note for note in found), found


def test_a_note_shows_the_element_and_its_inputs() -> None:
    x, weight = torch.tensor([[-8.0, 2.5, 7.0]]), torch.tensor([[7.0, 1.0, 0.0]] * 8)
    setting = Setting()
    got = in_convention(OTHERS[0], OURS, setting)(x, weight, torch.zeros(8))
    note = explain_linear(got, x, weight, None, setting)
    # codes of x: -8, 2 (half to even) and 7 against -8, 3 and 7; y = -8 * 7 + 2 against + 3
    assert note.startswith("y[0, 0] = -53 instead of -54 ")
    assert "x[0] in -8..7: scale 1, zero point 8." in note
    assert "x[0, 1] = 2.5 is 2.5 scales: 10 here, 11 there." in note
    assert explain_linear(got - 1, x, weight, None, setting) == ""


def test_floating_point_kernels_are_told_from_wrong_codes() -> None:
    setting = Setting(weight_bits=5, act_bits=6)
    ours = validate(in_convention(OURS, OURS, setting, floating=True), **setting._asdict())
    notes = [check.note for check in ours if check.note and "1x1x1" not in check.note]
    assert notes
    assert all("Our codes, other rounding" in note or "in floating point (then all" in note for note in notes)
    assert not failed(validate(in_convention(OURS, OURS, setting), **setting._asdict()))
    exact = in_convention(OURS, OURS, setting)

    def one_off(*tensors: torch.Tensor) -> torch.Tensor:
        y = exact(*tensors)
        return torch.nextafter(y, y + 1)

    assert not failed(validate(one_off, max_ulp=1, **setting._asdict()))
    assert failed(validate(one_off, **setting._asdict())) == {"y"}
    both = validate(in_convention(OTHERS[1], OTHERS[1], setting, floating=True), **setting._asdict())
    assert any("away from zero, in both operands (equal up to rounding" in check.note for check in both)


@pytest.mark.parametrize(
    ("really", "explanation"),
    [
        ({"weight_bits": 5}, "weight_bits=5"),
        ({"act_symmetric": True}, "act_symmetric=True"),
        ({"act_granularity": "per_tensor"}, "act_granularity='per_tensor'"),
        ({"weight_granularity": "per_tensor"}, "weight_granularity='per_tensor'"),
    ],
)
def test_wrong_settings_are_named(really: dict, explanation: str) -> None:
    checks = validate(lambda x, w, b: fake_quant_linear(x, w, b, **really), weight_bits=4)
    notes = [check.note for check in checks if check.note]
    assert any(f"Explained by: {explanation} (then all bits are equal)" in note for note in notes)


def test_what_no_convention_explains_is_said_so() -> None:
    wrong = validate(lambda x, w, b: fake_quant_linear(x, w, b) * 1.5, weight_bits=4)
    assert any("No known convention explains it" in check.note for check in wrong)
    unquantized = validate(torch.nn.functional.linear, weight_bits=4)
    assert any("Explained by: nothing is quantized" in check.note for check in unquantized)
    assert {"y", "grad_x", "grad_W"} <= failed(unquantized)


def test_linear_kernels_in_groups_half_precision_and_of_a_wrong_shape() -> None:
    grouped = {"weight_granularity": "per_group", "group_size": 32, "weight_symmetric": False}
    checks = validate(lambda x, w, b: fake_quant_linear(x, w, b, **grouped), **grouped)
    assert {check.what for check in checks} == {"y", "grad_x", "grad_W", "grad_b"}
    assert not failed(checks)
    half = validate(lambda x, w, b: fake_quant_linear(x, w, b), weight_bits=4, dtype=torch.bfloat16)
    assert not failed(half)
    assert any("instead of" in what for what in failed(validate(lambda x, w, b: x, weight_bits=4)))
    with pytest.raises(TypeError, match=r"unknown setting\(s\) \['bits'\]"):
        validate(fake_quant_linear, bits=4)
    with pytest.raises(ValueError, match="go with a linear layer"):
        validate(weight_bits=4)
    with pytest.raises(ValueError, match=r"weight_bits=9.*2\.\.8"):
        validate(fake_quant_linear, weight_bits=9)


def test_ulp_distance() -> None:
    one = torch.tensor(1.0)
    above = torch.nextafter(one, torch.tensor(2.0))
    a = torch.stack((one, above, torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(float("nan")), one))
    b = torch.stack((one, one, torch.tensor(-0.0), torch.tensor(1e-45), torch.tensor(float("nan")), a[4]))
    assert ulp_distance(a, b).tolist() == [0, 1, 0, 1, 0, 2**31]
    assert ulp_distance(-a[:2], -b[:2]).tolist() == [0, 1]
    assert int(ulp_distance(torch.tensor([-1e-45]), torch.tensor([1e-45]))) == 2
    assert int(ulp_distance(one.bfloat16().view(1), above.bfloat16().view(1) * 1.0078125)) == 1


def test_rows_over_all_bits_and_granularities(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(linear_rows(["torch"], shape=(9, 128, 5)))
    assert len(rows) == 5 * 2 * 5
    assert all(row.passed for row in rows)
    assert {row.bits for row in rows} == {"W3A4", "W4A4", "W5A5", "W6A6", "W8A8"}
    assert {row.weight_granularity for row in rows} == {
        "per_channel", "per_tensor", "per_group 32", "per_group 64", "per_group 128",
    }  # fmt: skip
    by_bits = {row.bits: row.sqnr_fp32 for row in rows if row.weight_granularity == "per_channel"}
    assert by_bits["W3A4"] < by_bits["W4A4"] + 1 < by_bits["W6A6"] < by_bits["W8A8"]
    original = ops._TABLE["integer_linear"]["torch"]
    monkeypatch.setitem(ops._TABLE["integer_linear"], "torch", lambda *a: original(*a).mul_(1 + 2**-22))
    wrong = next(iter(linear_rows(["torch"], shape=(9, 128, 5))))
    assert not wrong.passed
    assert wrong.max_ulp >= 1
    assert wrong.accumulators_different == 0


def test_conventions_differ_where_they_say() -> None:
    rows = {row.name: row for row in convention_rows(bits=4)}
    assert rows.keys() == {other.name for other in OTHERS}
    assert rows["the zero point added before rounding"].symmetric is None
    lowest = rows["scale = absmax / 2^(b-1), codes from -2^(b-1)"]
    assert lowest.asymmetric is None
    assert lowest.symmetric > 0.05
    for name in ("multiplication by the reciprocal of the scale", "half-up rounding"):
        assert 0 <= rows[name].asymmetric < 0.01
    assert rows["truncation"].asymmetric > 0.3


def test_arguments() -> None:
    with pytest.raises(ValueError, match="op='nothing' is none of"):
        validate(op="nothing")
    with pytest.raises(ValueError, match="name the public function"):
        validate(fake_quant_linear)
    with pytest.raises(ValueError, match="impl='fast' is none of"):
        validate(impl="fast")


def test_table_marks_failures() -> None:
    from rich.console import Console

    checks = validate(reciprocal, op="quantize_activation")
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_table(summarize(checks), title="t"))
    text = console.export_text()
    assert "FAILED" in text
    assert "equal" in text
