"""`validate`: an implementation of ours, or anyone's kernel, against the definitions in `reference.py`.

Integers (codes, zero points, accumulators) must be equal, so must the outputs whose rounding is defined operation by
operation; sums in floating point are held to `c` times what their own rounding allows, with the reason beside each c.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from s2d_kernels import _native, ops, quant_ops, quantizers, reference, triton_kernels
from s2d_kernels.linear_validation import Setting, explain_codes, explain_linear, kernel_cases, spoil, ulp_distance
from s2d_kernels.penalty import add_penalty_grad_
from s2d_kernels.selection import pcdr
from s2d_kernels.svd import topk_svd

if TYPE_CHECKING:
    from rich.table import Table

# rows x K x N of the quantized products; odd sizes are where kernels break
LINEAR_SHAPES = ((1, 1, 1), (37, 199, 63), (64, 256, 128), (5, 1000, 3), (130, 384, 96), (0, 64, 5), (3, 0, 5))
MATRIX_SHAPES = ((1, 9), (37, 63), (199, 63), (120, 384))
KINDS = ((4, True, 4, False), (4, True, 4, True), (3, True, 8, False), (8, False, 8, False), (5, True, 5, False))
# given ranges that cut off many elements: what is outside has no gradient
GIVEN: dict[str, Any] = {"act_range": (-0.6, 1.1), "weight_range": (-0.9, 0.7)}


Kernel = Callable[..., Any] | None
_RAISED = object()  # instead of an answer


class Check(NamedTuple):
    """One comparison.

    Attributes:
        op: operation; case: what it was run on; what: the compared output.
        compared: number of elements (or decisions); different: how many of them differ.
        error: largest difference, relative to the largest magnitude; limit: largest allowed (0: must be equal).
        passed: whether the comparison holds.
        note: of what failed, and only of that, what is wrong; of codes and linear layers the first wrong element, its
            inputs, and the convention that explains it.
    """

    op: str
    case: str
    what: str
    compared: int
    different: int
    error: float
    limit: float
    passed: bool
    note: str = ""


def _misfit(got: object, expected: Tensor) -> str:
    """Why `got` cannot be compared with `expected` number by number; empty if it can."""
    if not isinstance(got, Tensor):
        return f"{type(got).__name__} instead of {tuple(expected.shape)}"
    mine, theirs = ((tuple(t.shape), t.dtype, t.layout, t.device.type) for t in (got, expected))
    return next((f"{a} instead of {b}" for a, b in zip(mine, theirs, strict=True) if a != b), "")


def _compare(op: str, case: str, what: str, got: Any, expected: Any, limit: float = 0.0) -> Check:
    count = expected.numel()
    if misfit := _misfit(got, expected):
        what = f"{what}: {misfit}"
        return Check(op, case, what, count, count, math.inf, limit, False, f"{case}: {what}")
    mine, expected = (t.detach().cpu().double() for t in (got, expected))
    same = (mine == expected) | (mine.isnan() & expected.isnan())
    scale = expected.nan_to_num().abs().amax().clamp(min=1e-300) if count else torch.ones(())
    # NaN where the reference has a number (or the reverse) is an infinite error.
    gap = torch.where(same, 0.0, (mine - expected).abs() / scale).nan_to_num(nan=math.inf)
    error = float(gap.amax()) if count else 0.0
    different = int((~same).sum())
    note = ""
    if error > limit:
        worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        values = f"{mine[worst].item():.9g} instead of {expected[worst].item():.9g}"
        note = (
            f"{case}: {what}: {different:,} of {count:,} differ, by up to {error:.2g} of the largest "
            f"(limit {limit:g}), most at {list(worst)}: {values}."
        )
    return Check(op, case, what, count, different, error, limit, error <= limit, note)


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _tensors(f"{name}[{number}]", part)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().reshape(-1, 1).contiguous().view(torch.uint8)


def _run(
    op: str,
    case: str,
    what: str,
    kernel: Kernel,
    ours: Callable[..., Any],
    given: dict[str, Any],
    in_place: str = "",
    **setting: Any,
) -> Generator[Check, None, Any]:
    """What `kernel`, else `ours`, returns of `given`, whose tensors are nobody else's.

    What a kernel raises (the result is then `_RAISED`) or overwrites, but for `in_place`, is a failed check.
    """
    held = [entry for name, value in given.items() if name != in_place for entry in _tensors(name, value)]
    before = [tensor.detach().clone() for _, tensor in held]
    try:
        got = (kernel or ours)(*given.values(), **setting)
    except Exception as error:
        if kernel is None:
            raise
        got = _RAISED
        note = f"{case}: {what}: the kernel raised {type(error).__name__}: {error}"
        yield Check(op, case, f"{what}: an error", 1, 1, math.inf, 0.0, False, note)
    for (name, tensor), old in zip(held, before, strict=True):
        misfit, changed, count = _misfit(tensor, old), old.numel(), old.numel()
        if not misfit:
            changed = int((_bytes(tensor) != _bytes(old)).any(1).sum())
        if misfit or changed:
            note = f"{case}: {what}: the kernel overwrote its input {name}, {changed:,} of {count:,} elements."
            yield Check(op, case, f"input {name}", count, changed, math.inf, 0.0, False, note)
    return got


def validate(
    kernel: Callable[..., Any] | None = None,
    *,
    op: str | None = None,
    impl: str = "torch",
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_ulp: int = 0,
    **setting: Any,
) -> list[Check]:
    """Compare an implementation, or a kernel of yours, with the reference.

        checks = validate(my_linear, weight_bits=4, act_bits=4)  # my_linear(x, weight, bias) -> y
        print(*(check.note for check in checks if not check.passed), sep="\\n")

    Args:
        kernel: a callable with the signature of the public function `op` (without `impl`). It is called with random
            inputs on `device`, odd sizes and special rows included, and must answer in the dtypes and on the device
            that function answers in: y in x's. What it raises is a failed check, and so is an input that it
            overwrites. None validates ours.
        op: "fake_quant_linear", "quantize_activation", "quantize_weight", "add_penalty_grad_", "topk_svd" or "pcdr".
            Required with `kernel`, unless a `setting` is given; None runs all that `impl` has.
        impl: which of our implementations.
        device: where the inputs live.
        seed: of the random inputs.
        dtype, max_ulp: with a `setting`, of the inputs, and by how many ulp an output may differ.
        setting: `weight_bits`, `act_bits`, `weight_granularity`, `act_granularity`, `weight_symmetric`,
            `act_symmetric`, `group_size`, `act_range`, `weight_range`, as in `fake_quant_linear`: `kernel(x, weight,
            bias)`, whose settings are fixed, is then compared at these. Its gradients are, if its output requires one.

    Returns:
        One `Check` per comparison. `all(check.passed for check in ...)` is the verdict; the `note` of one that failed
        says what is wrong and, of codes and layers at a `setting`, what explains it.

    Raises:
        ValueError: unknown `op` or `impl`, or one without the other; `kernel` without `op` and `setting`.
        TypeError: an unknown setting.
    """
    suites: dict[str, Callable[..., Iterator[Check]]] = {
        "quantize_activation": _check_quantize_activation,
        "quantize_weight": _check_quantize_weight,
        "integer_accumulator": _check_accumulator,
        "fake_quant_linear": _check_fake_quant_linear,
        "add_penalty_grad_": _check_penalty,
        "topk_svd": _check_svd,
        "pcdr": _check_pcdr,
    }
    if op is not None and op not in suites:
        raise ValueError(f"op={op!r} is none of {', '.join(suites)}")
    if setting:
        if kernel is None or op not in (None, "fake_quant_linear"):
            raise ValueError(
                f"{sorted(setting)} go with a linear layer: validate(my_linear, weight_bits=4, act_bits=4)"
            )
        return list(_check_linear(kernel, setting, torch.device(device), dtype, max_ulp, seed))
    if kernel is not None and (op is None or op == "integer_accumulator"):
        raise ValueError("with kernel=, name the public function it stands for: op='fake_quant_linear', for instance")
    if impl not in ops.IMPLS:
        raise ValueError(f"impl={impl!r} is none of {ops.IMPLS}")
    checks: list[Check] = []
    runs = [name for name in suites if op == name or (op is None and (kernel is not None or implemented(name, impl)))]
    for name, suite in suites.items():
        if name in runs:
            generator = torch.Generator().manual_seed(seed)
            checks += suite(kernel, impl, torch.device(device), generator)
    return checks


_OPERATIONS = {  # what each suite calls with impl=
    "quantize_activation": ("quantize",),
    "quantize_weight": ("quantize",),
    "integer_accumulator": ("integer_accumulator",),
    "fake_quant_linear": ("quantize", "integer_linear"),
    "add_penalty_grad_": ("add_penalty_grad_",),
    "topk_svd": ("topk_svd",),
    "pcdr": ("pcdr_bounds", "pcdr_exact"),
}


def implemented(op: str, impl: str) -> bool:
    """Whether this installation has `impl` of what the suite `op` calls."""
    return all(impl in ops.available(name) for name in _OPERATIONS[op])


def usable(device: torch.device, op: str | None = None) -> list[str]:
    """The implementations other than the reference that take tensors on `device` here, of `op` or of anything."""
    found = ["torch"]
    if ops.problem_of("cpu", device) is None:
        found.append("cpu")
    for impl, on_cpu in (("triton", triton_kernels.common.interpreted), ("cuda", _native.emulated)):
        if ops.problem_of(impl, device) is None and (device.type != "cpu" or on_cpu()):
            found.append(impl)
    return [impl for impl in found if op not in _OPERATIONS or implemented(op, impl)]


def _check_linear(
    kernel: Callable[..., Any],
    setting: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    max_ulp: int,
    seed: int,
) -> Iterator[Check]:
    """A linear layer of fixed settings against ours at these."""
    if unknown := set(setting) - set(Setting._fields):
        raise TypeError(f"unknown setting(s) {sorted(unknown)}: choose from {Setting._fields}")
    chosen = Setting(**setting)
    generator = torch.Generator().manual_seed(seed)
    limit = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2  # sums in any order, of that dtype

    def run(*tensors: Tensor, **_: Any) -> Any:
        return kernel(*tensors)

    def explain(y: Tensor, expected: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> str:
        distance = int(ulp_distance(y, expected).amax()) if y.numel() else 0
        if distance <= max_ulp:
            return ""
        return f"y: up to {distance:,} ulp off (limit {max_ulp}): {explain_linear(y, x, weight, bias, chosen)}"

    for case, *operands in kernel_cases(chosen, _rows, LINEAR_SHAPES, generator):
        tensors = [t.to(device, dtype) for t in operands]
        yield from _layer("linear", case, run, run, tensors, chosen._asdict(), limit, explain)


def _layer(
    op: str,
    case: str,
    kernel: Kernel,
    ours: Callable[..., Any],
    tensors: Sequence[Tensor],
    setting: dict[str, Any],
    limit: float,
    explain: Callable[..., str] | None = None,
    differentiable: bool = True,
) -> Iterator[Check]:
    """Output and gradients of a linear layer. y fails if it must be explained; without `explain` it must be equal."""
    leaves, own = ([t.detach().clone().requires_grad_(differentiable) for t in tensors] for _ in range(2))
    expected = quant_ops.fake_quant_linear(*own, **setting, impl="reference")
    given = dict(zip(("x", "weight", "bias"), leaves, strict=True))
    y = yield from _run(op, case, "y", kernel, ours, given, **setting)
    if y is _RAISED:
        return
    check = _compare(op, case, "y", y, expected)
    if _misfit(y, expected):
        if isinstance(y, Tensor) and y.dtype != expected.dtype and y.is_floating_point():
            advice = f"A kernel for {y.dtype} is fed it by validate(..., dtype={y.dtype}), at a setting."
            check = check._replace(note=f"{check.note}. {advice}")
        yield check
        return
    if explain is not None:
        note = explain(y.detach(), expected.detach(), *tensors)
        check = check._replace(passed=not note, note=note and f"{case}: {note}")
    yield check
    if y.requires_grad and expected.requires_grad:

        def gradients(*leaves: Tensor) -> tuple[Tensor | None, ...]:
            return _gradients(y, leaves)

        got = yield from _run(op, case, "gradients", kernel and gradients, gradients, given)
        if got is not _RAISED:
            for name, mine, theirs in zip(("grad_x", "grad_W", "grad_b"), got, _gradients(expected, own), strict=True):
                yield _compare(op, case, name, mine, theirs, limit)


def _gradients(y: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a weighted sum of `y`, None where there is none."""
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return torch.autograd.grad(y, tuple(leaves), weights.to(y.dtype), allow_unused=True)


def _rows(rows: int, K: int, bits: int, symmetric: bool, generator: torch.Generator) -> Tensor:
    """Rows `[rows, K]`: ordinary, an outlier, all zero, subnormal, one-sided, exact ties of rounding, tiny, clamped.

    The ties are (integer + 1/2) * c with a range that makes c the scale: a kernel that multiplies by 1/c or rounds
    half away from zero gets other codes there, and with an odd zero point one that adds it before it rounds.
    The last kind's own range is +-(2^bits - 1) / 2 scales: both ends are halves that round outwards to 2^bits + 1
    codes, so its largest element is clamped, and has no gradient, if the codes are asymmetric. In every other such row
    the range is one scale higher, and its lower end a half whose even neighbour is the one towards zero.
    """
    low, high = -(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1
    x = torch.randn(rows, K, generator=generator)
    for row in range(rows):
        kind = row % 8 if K else 0
        if kind == 1:
            x[row, row % K] *= 200
        elif kind == 2:
            x[row] = 0
        elif kind == 3:
            x[row] *= 1e-40
        elif kind == 4:
            x[row] = x[row].abs() + 1
        elif kind == 5:
            shift = 0 if symmetric else row // 8 % 2
            ties = torch.arange(K) % (high - low) + low + shift + 0.5
            ties[:2] = torch.tensor([low + shift, high + shift], dtype=torch.float32)[:K]
            x[row] = ties * _short_number(generator)
        elif kind == 6:
            x[row] *= 1e-8
        elif kind == 7:
            shift = 0 if symmetric else row // 8 % 2
            ends = (torch.tensor([2**bits - 1, 1 - 2**bits]) / 2 + shift) * _short_number(generator)
            x[row] = x[row].clamp(float(ends[1]) / 2, float(ends[0]) / 2)
            x[row, :2] = ends[:K]
    return x


def _short_number(generator: torch.Generator) -> float:
    """Of 11 bits, in 1..2: a row in its units has exact products, and that as its scale."""
    return (2 * int(torch.randint(512, 1024, (), generator=generator)) + 1) / 1024


def _kinds_and_shapes(
    generator: torch.Generator, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    for rows, K, N in LINEAR_SHAPES:
        for weight_bits, weight_symmetric, act_bits, act_symmetric in KINDS:
            x = _rows(rows, K, act_bits, act_symmetric, generator)
            weight = _rows(N, K, weight_bits, weight_symmetric, generator)
            signs = "s" if weight_symmetric else "u", "s" if act_symmetric else "u"
            case = f"{rows}x{K}x{N} W{weight_bits}{signs[0]}A{act_bits}{signs[1]}"
            kinds = {
                "weight_bits": weight_bits,
                "weight_symmetric": weight_symmetric,
                "act_bits": act_bits,
                "act_symmetric": act_symmetric,
            }
            yield case, x.to(device), weight.to(device), kinds
            if (rows, K) == (37, 199):  # the other rows and columns must be as without
                yield f"{case} NaN, Inf in x", spoil(x).to(device), weight.to(device), kinds
                yield f"{case} NaN, Inf in weight", x.to(device), spoil(weight).to(device), kinds


def _fields(
    op: str, case: str, got: Any, expected: quant_ops.QuantizedOperand, x: Tensor, kind: dict[str, Any]
) -> Iterator[Check]:
    fields = ("codes", "scale", "zero_point", "row_sum", "mask")
    for field in fields if hasattr(got, "mask") else fields[:-1]:  # a kernel for inference has none
        mine: Any = getattr(got, field, None)
        theirs = getattr(expected, field)
        check = _compare(op, case, field, mine, theirs)
        if field == "codes" and not check.passed and not _misfit(mine, theirs):
            check = check._replace(note=f"{case}: {explain_codes(mine, x, **kind)}")
        yield check


def _check_quantize_activation(
    kernel: Kernel, impl: str, device: torch.device, generator: torch.Generator
) -> Iterator[Check]:
    ours = functools.partial(quant_ops.quantize_activation, impl=impl)
    for case, x, _, kinds in _kinds_and_shapes(generator, device):
        for granularity, value_range in (("per_token", None), ("per_token", GIVEN["act_range"]), ("per_tensor", None)):
            arguments = {"bits": kinds["act_bits"], "symmetric": kinds["act_symmetric"], "granularity": granularity}
            if value_range is not None:
                arguments["value_range"] = value_range
            expected = quant_ops.quantize_activation(x, **arguments, impl="reference")
            kind = arguments | {"granularity": quantizers.ACTIVATION_GRANULARITIES[granularity], "group_size": None}
            name = f"{case} {granularity}{' given range' if value_range else ''}"
            got = yield from _run("quantize_activation", name, "codes", kernel, ours, {"x": x.clone()}, **arguments)
            if got is not _RAISED:
                yield from _fields("quantize_activation", name, got, expected, x, kind)


def _check_quantize_weight(
    kernel: Kernel, impl: str, device: torch.device, generator: torch.Generator
) -> Iterator[Check]:
    ours = functools.partial(quant_ops.quantize_weight, impl=impl)
    for case, _, weight, kinds in _kinds_and_shapes(generator, device):
        for granularity, value_range in (
            ("per_channel", None), ("per_channel", GIVEN["weight_range"]), ("per_tensor", None), ("per_group", None)
        ):  # fmt: skip
            if granularity == "per_group" and weight.shape[1] % 64:
                continue
            arguments = {
                "bits": kinds["weight_bits"],
                "symmetric": kinds["weight_symmetric"],
                "granularity": granularity,
            }
            if granularity == "per_group":
                arguments["group_size"] = 64
            if value_range is not None:
                arguments["value_range"] = value_range
            expected = quant_ops.quantize_weight(weight, **arguments, impl="reference")
            kind = {"group_size": None} | arguments | {"granularity": quantizers.WEIGHT_GRANULARITIES[granularity]}
            name = f"{case} {granularity}{' given range' if value_range else ''}"
            got = yield from _run(
                "quantize_weight", name, "codes", kernel, ours, {"weight": weight.clone()}, **arguments
            )
            if got is not _RAISED:
                yield from _fields("quantize_weight", name, got, expected, weight, kind)


def _check_accumulator(_: Kernel, impl: str, device: torch.device, generator: torch.Generator) -> Iterator[Check]:
    for case, x, weight, kinds in _kinds_and_shapes(generator, device):
        qx = quant_ops.quantize_activation(x, bits=kinds["act_bits"], symmetric=kinds["act_symmetric"])
        qw = quant_ops.quantize_weight(weight, bits=kinds["weight_bits"], symmetric=kinds["weight_symmetric"])
        expected = quant_ops.integer_accumulator(qx, qw, impl="reference")
        got = quant_ops.integer_accumulator(qx, qw, impl=impl)
        yield _compare("integer_accumulator", case, "accumulator", got, expected)


def _check_fake_quant_linear(
    kernel: Kernel, impl: str, device: torch.device, generator: torch.Generator
) -> Iterator[Check]:
    ours = functools.partial(quant_ops.fake_quant_linear, impl=impl)
    differentiable = kernel is not None or impl in ops.available("straight_through_grad")  # not every impl has them
    for case, x, weight, kinds in _kinds_and_shapes(generator, device):
        tensors = x, weight, torch.randn(weight.shape[0], generator=generator).to(device)
        for label, given in (("", {}), (" given ranges", GIVEN)):
            setting = kinds | given
            # fp32 sums of up to 1000 terms in any order: about sqrt(1000) roundings, far below a wrong element
            yield from _layer(
                "fake_quant_linear", case + label, kernel, ours, tensors, setting,
                limit=1e-5, differentiable=differentiable,
            )  # fmt: skip


def _spiked(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    m, n = shape
    spike = torch.outer(torch.randn(m, generator=generator), torch.randn(n, generator=generator))
    return torch.randn(shape, generator=generator) / n**0.5 + 5 * spike / (m * n) ** 0.5


def _check_penalty(kernel: Kernel, impl: str, device: torch.device, generator: torch.Generator) -> Iterator[Check]:
    ours = functools.partial(add_penalty_grad_, impl=impl)
    weights = [_spiked(shape, generator).to(device) for shape in MATRIX_SHAPES]
    ranks = [1, 0, 2, 3]
    factors = topk_svd(weights, k=[min(3, *w.shape) for w in weights], impl="reference")
    # one rounding of the sum, and for fp32 the products of k = 3 terms
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        grads = [torch.randn(w.shape, generator=generator).to(device, dtype) for w in weights]
        expected = [g.clone() for g in grads]
        add_penalty_grad_(expected, factors, strength=0.05, power=2.0, ranks=ranks, impl="reference")
        given = {"grads": list(grads), "factors": copy.deepcopy(factors)}
        setting = {"strength": 0.05, "power": 2.0, "ranks": list(ranks)}
        case = str(dtype).removeprefix("torch.")
        got = yield from _run("add_penalty_grad_", case, "grad", kernel, ours, given, in_place="grads", **setting)
        if got is _RAISED:
            continue
        for grad, truth in zip(grads, expected, strict=True):
            shape = "x".join(map(str, truth.shape))
            yield _compare("add_penalty_grad_", f"{shape} {case}", "grad", grad, truth, limit)


def _hard_matrices(generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices with k = 3 well separated leading values among the cases that break SVD kernels."""

    def matrix(m: int, n: int, scale: float = 1.0) -> Tensor:
        d = min(m, n)
        spectrum = torch.exp(-0.1 * torch.arange(d, dtype=torch.float64))
        U, V = (torch.linalg.qr(torch.randn(s, d, generator=generator, dtype=torch.float64))[0] for s in (m, n))
        return ((U * spectrum) @ V.mT * scale).float()

    poisoned = matrix(63, 37)
    poisoned[5, 5] = float("nan")
    deficient = torch.zeros(80, 60)
    deficient[:, :2] = torch.randn(80, 2, generator=generator)
    return {
        "199x63": matrix(199, 63),
        "NaN inside": poisoned,
        "63x199": matrix(63, 199),
        "zero": torch.zeros(40, 50),
        "120x384": matrix(120, 384),
        "1e30": matrix(90, 90, 1e30),
        "1e-30": matrix(90, 90, 1e-30),
        "rank 2": deficient,
        "3x5": matrix(3, 5),
    }


def _check_svd(kernel: Kernel, impl: str, device: torch.device, generator: torch.Generator) -> Iterator[Check]:
    cases = _hard_matrices(generator)
    given = {"weights": [w.to(device, copy=True) for w in cases.values()]}
    ours = functools.partial(topk_svd, impl=impl)
    found = yield from _run("topk_svd", f"{len(cases)} matrices", "factors", kernel, ours, given, k=3)
    if found is _RAISED:
        return
    for (case, weight), factor in zip(cases.items(), _listed(found, len(cases)), strict=True):
        finite = bool(weight.isfinite().all())
        # a matrix that is not finite gets zeros, and its neighbours in the call are right
        truth = reference.topk_svd(weight.double() if finite else torch.zeros_like(weight).double(), 3)
        parts: list[Any] = [getattr(factor, field, None) for field in ("U", "S", "Vh")]
        like = [t.to(device, weight.dtype) for t in truth]
        # the accuracy contract: S to 2e-4 of the largest, the product to 1e-3
        yield _compare("topk_svd", case, "S", parts[1], like[1], limit=2e-4)
        for number, name in ((0, "U"), (2, "Vh")):
            if _misfit(parts[number], like[number]):
                yield _compare("topk_svd", case, name, parts[number], like[number])
        if not any(map(_misfit, parts, like)):
            unit = 1 / float(truth.S[0].clamp(min=1e-300))
            got, expected = ((U.double().cpu() * (S.double().cpu() * unit).square()) @ Vh.double().cpu()
                             for U, S, Vh in (parts, truth))  # fmt: skip
            yield _compare("topk_svd", case, "U S^2 Vh", got, expected, limit=1e-3)


def _listed(found: object, count: int) -> Sequence[Any]:
    """`found` if these are as many as there should be, else nothing, that many times."""
    listed = list(found) if isinstance(found, Iterable) and not isinstance(found, Tensor) else []
    return listed if len(listed) == count else [None] * count


def _is_integer(t: Any) -> bool:
    if isinstance(t, Tensor):
        return t.numel() == 1 and not t.is_floating_point() and not t.is_complex()
    return isinstance(t, Integral)


def _check_pcdr(kernel: Kernel, impl: str, device: torch.device, generator: torch.Generator) -> Iterator[Check]:
    ours = functools.partial(pcdr, impl=impl)
    weights = [_spiked(shape, generator) for shape in MATRIX_SHAPES[1:] * 4]
    tokens = [torch.randn(32, w.shape[1], generator=generator) for w in weights]
    peaks = [reference.largest_activation(w, x) for w, x in zip(weights, tokens, strict=True)]
    inputs = [x[token].to(device) for x, (token, _, _) in zip(tokens, peaks, strict=True)]
    neurons = [neuron for _, neuron, _ in peaks]
    weights = [w.to(device) for w in weights]
    factors = topk_svd(weights, k=3, impl="reference")
    for threshold in (0.3, 0.5, 0.95):
        case = f"{len(weights)} layers, tau {threshold}"
        given = copy.deepcopy({"weights": weights, "x": inputs, "neurons": neurons, "factors": factors})
        found = yield from _run("pcdr", case, "k_target", kernel, ours, given, threshold=threshold)
        if found is _RAISED:
            continue
        truth = pcdr(weights, inputs, neurons, threshold=threshold, impl="reference")
        targets: list[Any] = [getattr(decision, "k_target", None) for decision in _listed(found, len(weights))]
        whole = [int(t) for t in targets if _is_integer(t)]
        expected = torch.tensor([decision.k_target for decision in truth])
        yield _compare(
            "pcdr", case, "k_target", torch.tensor(whole) if len(whole) == len(targets) else targets, expected
        )


def summarize(checks: Sequence[Check]) -> list[Check]:
    """One `Check` per op and output: counts added, the worst error, passed if all did."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.what), []).append(check)
    return [
        Check(
            op,
            f"{len(members)} cases",
            what,
            sum(c.compared for c in members),
            sum(c.different for c in members),
            max(c.error for c in members),
            max(c.limit for c in members),
            all(c.passed for c in members),
            next((c.note for c in members if c.note), ""),
        )
        for (op, what), members in groups.items()
    ]


def to_table(checks: Sequence[Check], *, title: str) -> Table:
    """The checks as a `rich` table, failures marked."""
    from rich.table import Table

    table = Table(title=title, header_style="bold")
    for column in ("op", "cases", "output", "compared", "different", "worst error", "limit", ""):
        table.add_column(column, justify="left" if column in ("op", "cases", "output") else "right", no_wrap=True)
    for c in checks:
        limit = "equal" if c.limit == 0 else f"{c.limit:.1e}"
        cells = (c.op, c.case, c.what, f"{c.compared:,}", f"{c.different:,}", f"{c.error:.1e}", limit)
        table.add_row(*cells, "ok" if c.passed else "FAILED", style=None if c.passed else "bold red")
    return table
