"""add_penalty_grad_ against the reference and against its formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_kernels import add_penalty_grad_, topk_svd
from s2d_kernels.svd import TopkSVD

# c in error(ours) <= c * (rounding of the gradient's dtype): one rounding of the sum, plus fp32 products of k terms.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}


def numpy_sum(grad: torch.Tensor, factor: TopkSVD, rank: int, strength: float, power: float) -> np.ndarray:
    U, S, Vh = (t.double().numpy() for t in factor[:3])
    return grad.double().numpy() + strength * (U[:, :rank] * S[:rank] ** power) @ Vh[:rank]


@pytest.mark.parametrize("impl", ["torch", "reference", None])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("power", [1.0, 2.0, 2.5])
def test_formula(impl: str | None, dtype: torch.dtype, power: float) -> None:
    shapes = [(1, 7), (37, 63), (63, 37), (199, 5)]
    weights = [torch.randn(s, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for s in shapes]
    factors = topk_svd(weights, k=[1, 3, 3, 3])
    grads = [torch.randn(s).to(dtype) for s in shapes]
    ranks = [1, 0, 2, 3]
    expected = [numpy_sum(g, f, r, 0.05, power) for g, f, r in zip(grads, factors, ranks, strict=True)]
    before = [g.clone() for g in grads]
    add_penalty_grad_(grads, factors, strength=0.05, power=power, ranks=ranks, impl=impl)
    for grad, truth in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad.double().numpy(), truth, atol=ROUNDING[dtype] * np.abs(truth).max())
    assert torch.equal(grads[1], before[1])


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 70), n=st.integers(1, 70), rank=st.integers(0, 4), step=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_strided_gradients_and_ranks_on_the_device(m: int, n: int, rank: int, step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(4, m, n)
    rank = min(rank, k)
    factor = topk_svd([torch.randn(m, n, generator=generator)], k=k)[0]
    storage = torch.randn(m * step, n + 3, generator=generator)
    untouched = storage.clone()
    view = storage[::step, 2 : n + 2]
    expected = numpy_sum(view, factor, rank, 5e-4, 2.0)
    add_penalty_grad_([view], [factor], ranks=torch.tensor([rank]))
    np.testing.assert_allclose(view.numpy(), expected, atol=2e-6 * max(1.0, np.abs(expected).max()))
    view.copy_(untouched[::step, 2 : n + 2])
    assert torch.equal(storage, untouched)  # nothing outside the view was written


def test_given_coefficients_replace_strength_and_power() -> None:
    factor = topk_svd([torch.randn(9, 6)], k=3)[0]
    coefficients = torch.tensor([1.0, -2.0, 0.5])
    grad = torch.zeros(9, 6)
    add_penalty_grad_([grad], [factor], coefficients=[coefficients])
    torch.testing.assert_close(grad, (factor.U * coefficients) @ factor.Vh)


def test_overflowing_coefficient_counts_as_zero() -> None:
    factor = topk_svd([torch.randn(9, 6) * 1e30], k=2)[0]
    grad = torch.ones(9, 6)
    add_penalty_grad_([grad], [factor], power=2.0)
    assert torch.equal(grad, torch.ones(9, 6))


def test_factors_of_a_non_finite_layer_add_nothing() -> None:
    weights = [torch.full((5, 5), float("nan")), torch.randn(5, 5)]
    factors = topk_svd(weights, k=2)
    grads = [torch.ones(5, 5), torch.ones(5, 5)]
    add_penalty_grad_(grads, factors)
    assert torch.equal(grads[0], torch.ones(5, 5))
    assert not torch.equal(grads[1], torch.ones(5, 5))


def test_bad_input_is_refused_and_nothing_written() -> None:
    factors = topk_svd([torch.randn(6, 4), torch.randn(6, 4)], k=2)
    grads = [torch.zeros(6, 4), torch.zeros(4, 6)]
    with pytest.raises(ValueError, match=r"factors\[1\] has U \(6, 2\).*grads\[1\] of shape \(4, 6\)"):
        add_penalty_grad_(grads, factors)
    assert not grads[0].any()
    with pytest.raises(ValueError, match="equally long"):
        add_penalty_grad_(grads[:1], factors)
    with pytest.raises(ValueError, match=r"ranks\[0\]=3 must be in 0\.\.2"):
        add_penalty_grad_(grads[:1], factors[:1], ranks=[3])
    with pytest.raises(TypeError, match=r"ranks=2 must be a list of ints, one for each layer"):
        add_penalty_grad_(grads[:1], factors[:1], ranks=2)
    with pytest.raises(TypeError, match=r"ranks='2' must be a list of ints"):
        add_penalty_grad_(grads[:1], factors[:1], ranks="2")
    with pytest.raises(ValueError, match="integer tensor"):
        add_penalty_grad_(grads[:1], factors[:1], ranks=torch.ones(1))
    with pytest.raises(ValueError, match=r"coefficients\[0\] must have shape \(2,\)"):
        add_penalty_grad_(grads[:1], factors[:1], coefficients=[torch.ones(3)])
    with pytest.raises(ValueError, match="overlaps itself"):
        add_penalty_grad_([torch.zeros(1, 4).expand(6, 4)], factors[:1])
    with pytest.raises(TypeError, match=r"grads\[0\] must be a torch.Tensor, got NoneType"):
        add_penalty_grad_([None], factors[:1])
    with pytest.raises(TypeError, match=r"coefficients\[0\] must be a torch.Tensor, got list"):
        add_penalty_grad_(grads[:1], factors[:1], coefficients=[[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"factors\[0\].U is on meta, expected cpu"):
        add_penalty_grad_(grads[:1], [factors[0]._replace(U=factors[0].U.to("meta"))])
    with pytest.raises(ValueError, match=r"coefficients\[0\] is on meta, expected cpu"):
        add_penalty_grad_(grads[:1], factors[:1], coefficients=[torch.ones(2, device="meta")])
    assert not grads[0].any()
    add_penalty_grad_([], [])


def test_operator_checks() -> None:
    args = ([torch.randn(6, 5), torch.randn(3, 2)], [torch.randn(6, 2), torch.randn(3, 1)],
            [torch.randn(2, 5), torch.randn(1, 2)], [torch.rand(2), torch.rand(1)])  # fmt: skip
    torch.library.opcheck(torch.ops.s2d.add_penalty_grad_.default, (*args, None, "torch"))


def test_in_a_compiled_function() -> None:
    factor = topk_svd([torch.randn(6, 5)], k=2)[0]

    def step(grad: torch.Tensor) -> torch.Tensor:
        torch.ops.s2d.add_penalty_grad_([grad], [factor.U], [factor.Vh], [factor.S], None, None)
        return grad * 2

    grad = torch.randn(6, 5)
    expected = step(grad.clone())
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(grad.clone()), expected)
