"""`validate` for quantized linear layers: ours over all settings, anyone's kernel, and what explains a difference."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d_kernels import quant_ops, reference
from s2d_kernels.conventions import OTHERS, OURS, Convention
from s2d_kernels.quantizers import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES, ValueRange, code_shift

if TYPE_CHECKING:
    from rich.table import Table

BITS = ((3, 4), (4, 4), (5, 5), (6, 6), (8, 8))  # weight, activation: the paper's
WEIGHTS = (("per_channel", None), ("per_tensor", None), ("per_group", 32), ("per_group", 64), ("per_group", 128))
_ENOUGH = 8  # fewer numbers than these agree with some convention by chance
_ROUNDING = 1e-5  # relative to the largest output: what sums in another order or epilogue may differ by


def ulp_distance(got: Tensor, expected: Tensor) -> Tensor:
    """Representable numbers between two tensors of one floating dtype, int64; NaN is 2^31 away from a number."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    bits = [t.contiguous().view(integer).long() for t in (got, expected)]
    lowest = -(2 ** (8 * got.element_size() - 1))
    ordered = [torch.where(b < 0, lowest - b, b) for b in bits]
    distance = (ordered[0] - ordered[1]).abs()
    nan = got.isnan(), expected.isnan()
    return distance.masked_fill(nan[0] != nan[1], 2**31).masked_fill(nan[0] & nan[1], 0)


def sqnr(signal: Tensor, got: Tensor) -> float:
    """Signal to quantization noise ratio, 10 log10(|signal|^2 / |got - signal|^2), in dB."""
    noise = float((got.double() - signal.double()).square().sum())
    return 10 * math.log10(float(signal.double().square().sum()) / noise) if noise else math.inf


class LinearRow(NamedTuple):
    """One impl at one number of bits and granularity, over both signs of each operand, given and own ranges.

    Attributes:
        impl: implementation; bits: "W4A4"; act_granularity, weight_granularity: as `fake_quant_linear`.
        codes, codes_different: of both operands, against the reference.
        accumulators, accumulators_different: int32 accumulators.
        max_ulp: largest distance of the fp32 output.
        sqnr_bf16: lowest SQNR in dB of bf16 `F.linear` on dequantized operands, with our output as the signal.
        sqnr_fp32: lowest SQNR of our output with the unquantized fp32 `F.linear` as the signal.
    """

    impl: str
    bits: str
    act_granularity: str
    weight_granularity: str
    codes: int
    codes_different: int
    accumulators: int
    accumulators_different: int
    max_ulp: int
    sqnr_bf16: float
    sqnr_fp32: float

    @property
    def passed(self) -> bool:
        """Codes, accumulators and outputs are all equal."""
        return self.codes_different == self.accumulators_different == self.max_ulp == 0


def linear_rows(
    impls: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    shape: tuple[int, int, int] = (37, 256, 63),
) -> Iterator[LinearRow]:
    """Rows of each impl for W3A4, W4A4, W5A5, W6A6 and W8A8 and every granularity; `shape` is tokens, in, out."""
    M, K, N = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=generator).to(device) for s in ((M, K), (N, K), (N,)))
    x[0] *= 30  # a token with an outlier scale
    x[1] = x[1].abs()
    for impl, (weight_bits, act_bits) in itertools.product(impls, BITS):
        for act, (granularity, group_size) in itertools.product(ACTIVATION_GRANULARITIES, WEIGHTS):
            found = []
            for act_symmetric, weight_symmetric, given in itertools.product((False, True), repeat=3):
                settings = {
                    "weight_bits": weight_bits, "act_bits": act_bits, "weight_symmetric": weight_symmetric,
                    "act_symmetric": act_symmetric, "act_granularity": act, "weight_granularity": granularity,
                    "group_size": group_size, "act_range": (-2.0, 2.5) if given else None,
                }  # fmt: skip
                one = _one(x, weight, bias, settings, impl)
                # a range that cuts off a row says nothing about precision
                found.append(one._replace(sqnr_bf16=math.inf, sqnr_fp32=math.inf) if given else one)
            name = granularity if group_size is None else f"{granularity} {group_size}"
            yield LinearRow(
                impl,
                f"W{weight_bits}A{act_bits}",
                act,
                name,
                codes=sum(one.codes for one in found),
                codes_different=sum(one.codes_different for one in found),
                accumulators=sum(one.accumulators for one in found),
                accumulators_different=sum(one.accumulators_different for one in found),
                max_ulp=max(one.max_ulp for one in found),
                sqnr_bf16=min(one.sqnr_bf16 for one in found),
                sqnr_fp32=min(one.sqnr_fp32 for one in found),
            )


def _one(x: Tensor, weight: Tensor, bias: Tensor, settings: dict[str, Any], impl: str) -> LinearRow:
    operands = []
    for side in (impl, "reference"):
        qx = quant_ops.quantize_activation(
            x, bits=settings["act_bits"], symmetric=settings["act_symmetric"], granularity=settings["act_granularity"],
            value_range=settings["act_range"], group_size=settings["group_size"], impl=side,
        )  # fmt: skip
        qw = quant_ops.quantize_weight(
            weight, bits=settings["weight_bits"], symmetric=settings["weight_symmetric"],
            granularity=settings["weight_granularity"], group_size=settings["group_size"], impl=side,
        )  # fmt: skip
        operands.append((qx, qw))
    (qx, qw), (rx, rw) = operands
    codes = sum(int((a.codes != b.codes).sum()) for a, b in ((qx, rx), (qw, rw)))
    accumulator = quant_ops.integer_accumulator(qx, qw, impl=impl)
    truth = quant_ops.integer_accumulator(rx, rw, impl="reference")
    y = quant_ops.fake_quant_linear(x, weight, bias, **settings, impl=impl)
    expected = quant_ops.integer_linear(rx, rw, bias, impl="reference")
    dx, dw = (_dequantized(q).to(torch.bfloat16) for q in (rx, rw))
    in_bf16 = F.linear(dx, dw, bias.to(torch.bfloat16))
    return LinearRow(
        impl,
        "",
        "",
        "",
        qx.codes.numel() + qw.codes.numel(),
        codes,
        truth.numel(),
        int((accumulator != truth).sum()),
        int(ulp_distance(y, expected).max()),
        sqnr(expected, in_bf16),
        sqnr(F.linear(x, weight, bias), y),
    )


def _dequantized(q: quant_ops.QuantizedOperand) -> Tensor:
    groups = q.scale.shape[1]
    codes = q.codes.unflatten(1, (groups, -1)) - q.zero_point.unsqueeze(2)
    return (codes * q.scale.unsqueeze(2)).flatten(1)


def rows_table(rows: Iterable[LinearRow], *, title: str) -> Table:
    """The rows as a `rich` table, failures marked."""
    from rich.table import Table

    table = Table(title=title, header_style="bold")
    for column in ("impl", "bits", "activation", "weight"):
        table.add_column(column, no_wrap=True)
    for column in ("codes", "differ", "accumulators", "differ", "max ulp", "SQNR of bf16", "SQNR to fp32"):
        table.add_column(column, justify="right")
    for r in rows:
        numbers = (r.codes, r.codes_different, r.accumulators, r.accumulators_different, r.max_ulp)
        decibels = (f"{value:.1f} dB" for value in (r.sqnr_bf16, r.sqnr_fp32))
        style = None if r.passed else "bold red"
        table.add_row(*r[:4], *(f"{n:,}" for n in numbers), *decibels, style=style)
    return table


class ConventionRow(NamedTuple):
    """What share of the codes another convention makes differently; None where it cannot differ."""

    name: str
    symmetric: float | None
    asymmetric: float | None


def convention_rows(*, bits: int, seed: int = 0) -> list[ConventionRow]:
    """Each named convention against ours, on `[256, 768]` normal numbers rounded to bf16, one scale a row."""
    x = torch.randn(256, 768, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).float()
    rows = []
    for other in OTHERS:
        shares: list[float | None] = []
        for symmetric in (True, False):
            codes = [c.quantize(x, bits=bits, symmetric=symmetric, granularity="per_row").codes for c in (OURS, other)]
            differ = float((codes[0] != codes[1]).double().mean())
            shares.append(differ if other.applies(symmetric) else None)
        rows.append(ConventionRow(other.name, *shares))
    return rows


def conventions_table(rows: Iterable[ConventionRow], *, title: str) -> Table:
    """The rows as a `rich` table."""
    from rich.table import Table

    table = Table("convention", title=title, header_style="bold")
    for column in ("symmetric codes", "asymmetric codes"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, *("-" if share is None else f"{share:.4%}" for share in row[1:]))
    return table


# --- What explains a difference -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """How a linear layer quantizes; the defaults are `fake_quant_linear`'s."""

    weight_bits: int = 4
    act_bits: int = 4
    weight_granularity: str = "per_channel"
    act_granularity: str = "per_token"
    weight_symmetric: bool = True
    act_symmetric: bool = False
    group_size: int | None = None
    act_range: ValueRange | None = None
    weight_range: ValueRange | None = None

    def quantize_x(self, x: Tensor, convention: Convention) -> reference.QuantizedTensor:
        """Activations in codes."""
        return convention.quantize(
            x, bits=self.act_bits, symmetric=self.act_symmetric,
            granularity=ACTIVATION_GRANULARITIES[self.act_granularity], value_range=self.act_range,
        )  # fmt: skip

    def quantize_weight(self, weight: Tensor, convention: Convention) -> reference.QuantizedTensor:
        """The weight in codes."""
        return convention.quantize(
            weight, bits=self.weight_bits, symmetric=self.weight_symmetric,
            granularity=WEIGHT_GRANULARITIES[self.weight_granularity], group_size=self.group_size,
            value_range=self.weight_range,
        )  # fmt: skip

    def operands(
        self, x: Tensor, weight: Tensor, of_x: Convention = OURS, of_weight: Convention = OURS
    ) -> tuple[reference.QuantizedTensor, reference.QuantizedTensor]:
        """Activations and weight in codes, each in its convention."""
        return self.quantize_x(x, of_x), self.quantize_weight(weight, of_weight)


class _Candidate(NamedTuple):
    """What may explain an output: how many elements it leaves off by more than rounding, and by bits; its operands."""

    unlike: tuple[int, int]
    name: str
    of_x: Convention = OURS
    of_weight: Convention = OURS


def _nearest(candidates: Iterable[_Candidate]) -> _Candidate:
    return min(candidates, key=lambda c: c.unlike)  # the first of equals


class _Conventions:
    """Pairs of conventions for the operands of a linear layer, and how far each is from a kernel's output.

    Conventions that agree on an operand are multiplied once.
    """

    def __init__(self, setting: Setting, x: Tensor, weight: Tensor, unlike: Callable[..., tuple[int, int]]) -> None:
        self._quantize = (
            functools.cache(lambda convention: setting.quantize_x(x, convention)),
            functools.cache(lambda convention: setting.quantize_weight(weight, convention)),
        )
        self._unlike = unlike
        self._different: tuple[list[reference.QuantizedTensor], list[reference.QuantizedTensor]] = [], []
        self._known: dict[tuple[int, int], tuple[int, int]] = {}
        self.of_x = [c for c in OTHERS if c.applies(setting.act_symmetric)]
        self.of_weight = [c for c in OTHERS if c.applies(setting.weight_symmetric)]

    def _number(self, side: int, convention: Convention) -> int:
        """Of the operand in this convention among those of this side that differ."""
        q = self._quantize[side](convention)
        for number, other in enumerate(self._different[side]):
            if all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(q[:3], other[:3], strict=True)):
                return number
        self._different[side].append(q)
        return len(self._different[side]) - 1

    def candidate(self, of_x: Convention, of_weight: Convention) -> _Candidate:
        """The pair, compared."""
        key = self._number(0, of_x), self._number(1, of_weight)
        if key not in self._known:
            self._known[key] = self._unlike(*(operands[n] for operands, n in zip(self._different, key, strict=True)))
        if of_x == of_weight:
            name = f"{of_x.name}, in both operands"
        else:
            sides = (of_x, "activations"), (of_weight, "weight")
            name = "; ".join(f"{c.name}, in the {where}" for c, where in sides if c != OURS)
        return _Candidate(self._known[key], name, of_x, of_weight)

    def alike(self) -> Iterator[_Candidate]:
        """One convention in both operands, or in one."""
        for other in OTHERS:
            in_x, in_weight = other in self.of_x, other in self.of_weight
            if in_x and in_weight:
                yield self.candidate(other, other)
            if in_x:
                yield self.candidate(other, OURS)
            if in_weight:
                yield self.candidate(OURS, other)

    def mixed(self) -> Iterator[_Candidate]:
        """One in each operand; then the nearest pair with more of them, one at a time, while that brings it nearer."""
        pairs = [self.candidate(*pair) for pair in itertools.product(self.of_x, self.of_weight)]
        yield from pairs
        best = _nearest([*self.alike(), *pairs])
        while best.unlike[0]:
            more = [self.candidate(best.of_x.combined(c), best.of_weight) for c in self.of_x]
            more += [self.candidate(best.of_x, best.of_weight.combined(c)) for c in self.of_weight]
            yield from more
            if _nearest(more).unlike >= best.unlike:
                return
            best = _nearest(more)


def _epilogues(
    x: Tensor, weight: Tensor, qx: reference.QuantizedTensor, qw: reference.QuantizedTensor, bias: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Outputs `[M, N]` from our codes by another arithmetic, and with operands that are not quantized."""
    dx, dw = reference.dequantize(qx), reference.dequantize(qw)
    offset = torch.zeros(len(weight)) if bias is None else bias
    accumulator = reference.integer_accumulator(qx, qw)
    if len(accumulator) == 1:
        total = accumulator[0].to(dx.dtype)
        yield "the scales multiplied with each other first", total * (qx.scale * qw.scale.mT) + offset.to(dx.dtype)
        fused = (total * qx.scale).double() * qw.scale.mT.double() + offset.double()
        yield "a fused multiply-add with the bias", fused.to(dx.dtype)
    for name, left, right in (
        ("the activations are not quantized", x, dw),
        ("the weight is not quantized", dx, weight),
        ("nothing is quantized", x, weight),
    ):
        yield name, F.linear(left.to(dx.dtype), right.to(dx.dtype), offset.to(dx.dtype))
    yield (
        "dequantized operands multiplied in floating point",
        F.linear(dx, dw, None if bias is None else bias.to(dx.dtype)),
    )
    low = [t if t is None else t.to(torch.bfloat16) for t in (dx, dw, bias)]
    yield "dequantized operands multiplied in bf16", F.linear(*low)  # type: ignore[arg-type]


def _other_settings(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Settings that differ in one respect: perhaps those that the kernel really has."""
    for name, values in (
        ("act_bits", range(2, 9)),
        ("weight_bits", range(2, 9)),
        ("act_symmetric", (False, True)),
        ("weight_symmetric", (False, True)),
        ("act_granularity", tuple(ACTIVATION_GRANULARITIES)),
        ("weight_granularity", ("per_channel", "per_tensor")),
    ):
        for value in values:
            if value != getattr(setting, name):
                other = setting._replace(**cast(Any, {name: value}))
                if name == "weight_granularity":
                    other = other._replace(group_size=None)
                yield f"{name}={value!r}", other


def explain_linear(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting) -> str:
    """What a kernel's output `[M, N]` has in it that ours has not: sentences on the first element that differs.

    They name its inputs and, where they are known and `_ENOUGH` numbers were compared, the conventions that give the
    kernel's numbers: one, else one of the activations and another of the weight, else several of either.
    """
    got, x, weight = got.detach().cpu(), x.detach().cpu(), weight.detach().cpu()
    bias = None if bias is None else bias.detach().cpu()
    qx, qw = setting.operands(x, weight)
    ours = reference.integer_linear(qx, qw, bias, got.dtype)[0]
    distance = ulp_distance(got, ours)
    if not distance.any():
        return ""
    row, column = divmod(int(distance.flatten().ne(0).nonzero()[0]), got.shape[1])
    parts = [
        f"y[{row}, {column}] = {got[row, column].item():.9g} instead of {ours[row, column].item():.9g} "
        f"({int(distance[row, column]):,} ulp); {int(distance.ne(0).sum()):,} of {distance.numel():,} differ.",
        _inputs("x", x, qx, row),
        _inputs("weight", weight, qw, column),
    ]
    if distance.numel() < _ENOUGH:
        return " ".join((*parts, f"Too few numbers ({distance.numel()}) to tell a convention by."))
    largest = float(ours.double().nan_to_num().abs().max())

    def unlike(y: Tensor) -> tuple[int, int]:
        """Elements off by more than rounding, and elements whose bits differ."""
        y = y.to(got.dtype)
        bits = ulp_distance(got, y).ne(0)
        close = (got.double() - y.double()).abs() <= _ROUNDING * largest + torch.finfo(got.dtype).eps * y.double().abs()
        return int((bits & ~close).sum()), int(bits.sum())

    def unlike_product(qx: reference.QuantizedTensor, qw: reference.QuantizedTensor) -> tuple[int, int]:
        return unlike(reference.integer_linear(qx, qw, bias, got.dtype)[0])

    conventions = _Conventions(setting, x, weight, unlike_product)
    candidates = [_Candidate(unlike(y), name) for name, y in _epilogues(x, weight, qx, qw, bias)]
    candidates += conventions.alike()
    if all(c.unlike[0] for c in candidates):
        for name, other in _other_settings(setting):
            candidates.append(_Candidate(unlike_product(*other.operands(x, weight)), name))
    if all(c.unlike[0] for c in candidates):
        candidates += conventions.mixed()
    as_we_do = unlike(ours)
    (off, bits), name, of_x, of_weight = _nearest(candidates)
    if off == bits == 0:
        parts.append(f"Explained by: {name} (then all bits are equal).")
    elif off == 0 and as_we_do[0] == 0:
        parts.append(f"Our codes, other rounding: nearest is {name} ({bits:,} elements still differ in bits).")
        of_x = of_weight = OURS
    elif off == 0:
        parts.append(f"Explained by: {name} (equal up to rounding, {bits:,} elements differ in bits).")
    else:
        parts.append(f"No known convention explains it: nearest is {name}, which leaves {off:,} elements off.")
        of_x = of_weight = OURS
    theirs = setting.operands(x, weight, of_x, of_weight)
    for which, values, mine, foreign in zip(("x", "weight"), (x, weight), (qx, qw), theirs, strict=True):
        parts.append(_first_code(which, values, mine, foreign.codes))
    return " ".join(part for part in parts if part)


def _inputs(name: str, values: Tensor, q: reference.QuantizedTensor, row: int) -> str:
    """The range and parameters of a row, by which its codes can be checked by hand."""
    own = 0 if len(q.scale) == 1 else row
    scale, zero_point = (t[own].tolist() for t in (q.scale, q.zero_point))
    more = f" (the first of {len(scale)} groups)" if len(scale) > 1 else ""
    low, high = (v.item() for v in values[row].aminmax()) if values.shape[1] else (0.0, 0.0)
    return f"{name}[{row}] in {low:.9g}..{high:.9g}: scale {scale[0]:.9g}, zero point {zero_point[0]}{more}."


def _first_code(name: str, values: Tensor, q: reference.QuantizedTensor, theirs: Tensor) -> str:
    different = (q.codes != theirs).nonzero()
    if not len(different):
        return ""
    row, column = different[0].tolist()
    scale = q.scale[0 if len(q.scale) == 1 else row]
    scale = scale[column * len(scale) // values.shape[1]]
    value = values[row, column].to(scale.dtype)
    return (
        f"First such code: {name}[{row}, {column}] = {value.item():.9g} is {(value / scale).item():.9g} scales: "
        f"{q.codes[row, column].item()} here, {theirs[row, column].item()} there."
    )


def explain_codes(
    got: Tensor,
    x: Tensor,
    *,
    bits: int,
    symmetric: bool,
    granularity: str,
    group_size: int | None,
    value_range: ValueRange | None = None,
) -> str:
    """The first stored code `[rows, K]` of a kernel that differs from ours, its input, and what explains it."""
    settings: dict[str, Any] = {
        "bits": bits, "symmetric": symmetric, "granularity": granularity, "group_size": group_size,
        "value_range": value_range,
    }  # fmt: skip
    x = x.detach().cpu()
    theirs = got.detach().cpu().long() + code_shift(bits, symmetric)
    ours = OURS.quantize(x, **settings)
    count = int((theirs != ours.codes).sum())
    if not count:
        return ""
    found = f"{count:,} of {theirs.numel():,} codes differ. {_first_code('x', x, ours, theirs)}"
    if theirs.numel() < _ENOUGH:
        return f"{found} Too few codes to tell a convention by."
    left = [
        (int((other.quantize(x, **settings).codes != theirs).sum()), other.name)
        for other in OTHERS
        if other.applies(symmetric)
    ]
    rest, name = min(left)
    why = f"Explained by: {name}." if rest == 0 else f"Nearest is {name}, which leaves {rest:,}."
    return f"{found} {why}"


def spoil(rows: Tensor) -> Tensor:
    """A copy of `rows [rows, K]` with a NaN in the second row and an Inf in the fourth, as far as there are any."""
    rows = rows.clone()
    rows[1:2, :1], rows[3:4, -1:] = math.nan, math.inf
    return rows


def kernel_cases(
    setting: Setting, rows: Callable[..., Tensor], shapes: Iterable[tuple[int, int, int]], generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Inputs of a linear kernel at `setting`, `rows` making operands with special rows; K fits the group size."""
    for M, K, N in shapes:
        if setting.group_size and K:
            K = max(K // setting.group_size, 1) * setting.group_size
        x = rows(M, K, setting.act_bits, setting.act_symmetric, generator)
        weight = rows(N, K, setting.weight_bits, setting.weight_symmetric, generator)
        bias = torch.randn(N, generator=generator)
        bias[N // 2 :] = 0  # it would hide a tiny row
        signs = ("u", "s")[setting.weight_symmetric], ("u", "s")[setting.act_symmetric]
        case = f"{M}x{K}x{N} W{setting.weight_bits}{signs[0]}A{setting.act_bits}{signs[1]}"
        yield case, x, weight, bias
        if M > 3 and K > 1:
            yield f"{case} NaN, Inf in x", spoil(x), weight, bias
