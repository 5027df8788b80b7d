"""validate: our implementations pass, and kernels with typical mistakes do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2d_kernels import add_penalty_grad_, fake_quant_linear, pcdr, topk_svd, validate
from s2d_kernels.quant_ops import QuantizedOperand, quantize_activation
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
