"""`torch.set_float32_matmul_precision`, set by many training scripts, costs no result its error statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from s2d_kernels import ops, reference
from s2d_kernels.selection import pcdr
from s2d_kernels.svd import CONVERGED, topk_svd


@pytest.fixture(params=["high", "medium"])
def reduced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 products of bf16 operands, which a CPU without bf16 or TF32 matrix instructions does not make by itself."""
    for name in ("bmm", "matmul", "mm"):
        monkeypatch.setattr(torch, name, _rounded(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "__matmul__", _rounded(Tensor.__matmul__))
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


def _rounded(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype == torch.float32 and min(a.ndim, b.ndim) > 1:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return product(a, b)

    return call


@pytest.mark.usefixtures("reduced")
def test_factors_are_as_accurate_as_their_status_says() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(m, n) * 0.5 ** torch.arange(n) for m, n in ((160, 96), (96, 96), (96, 96))]
    for weight, found in zip(weights, topk_svd(weights, k=3, impl="torch"), strict=True):
        truth = torch.linalg.svd(weight.double(), full_matrices=False)
        G = (truth.U[:, :3] * truth.S[:3].square()).mm(truth.Vh[:3])
        got = (found.U.double() * found.S.double().square()).mm(found.Vh.double())
        assert int(found.status) == CONVERGED
        assert float((got - G).norm() / G.norm()) < 1e-4


@pytest.mark.usefixtures("reduced")
def test_exact_ratios_stay_exact() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(128, 96), torch.randn(96)
    weight += 8 * torch.outer(torch.randn(128), x) / 96
    truth = reference.pcdr(weight.double(), x.double(), 5, 3)
    (found,) = pcdr([weight], [x], [5])
    assert found.route == "exact"
    assert found.lower == pytest.approx(truth.tolist(), abs=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_setting_is_read(device: str) -> None:
    try:
        for precision, expected in (("high", True), ("medium", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert ops.fp32_is_reduced(torch.device(device)) == expected
    finally:
        torch.set_float32_matmul_precision("highest")
