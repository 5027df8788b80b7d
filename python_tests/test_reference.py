"""The spectral definitions against formulas written independently in numpy (the quantizers: test_quant_ops.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s2d_kernels import reference

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)]


def numpy_svd(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(weight.double().numpy(), full_matrices=False)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_penalty_gradient_is_the_derivative_of_the_penalty(power: float) -> None:
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reference.penalty(weight, strength=0.3, power=power), weight)
    direct = reference.penalty_gradient(weight.detach(), rank=4, strength=0.3, power=power)
    torch.testing.assert_close(direct, gradient)
    assert torch.autograd.gradcheck(lambda w: reference.penalty(w, strength=0.3, power=power), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_penalty_gradient_of_the_top_components(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    rank = min(rank, *shape)
    U, s, Vh = numpy_svd(weight)
    expected = sum((0.01 * s[i] ** 2 * np.outer(U[:, i], Vh[i]) for i in range(rank)), np.zeros(shape))
    got = reference.penalty_gradient(weight, rank=rank, strength=0.01, power=2.0)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_pcdr_by_the_sum_over_all_components(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    U, s, Vh = numpy_svd(weight)
    for neuron in range(shape[0]):
        terms = [abs(s[r] * U[neuron, r] * float(Vh[r] @ x.numpy())) for r in range(len(s))]
        expected = [sum(terms[: k + 1]) / sum(terms) for k in range(min(3, len(s)))]
        np.testing.assert_allclose(reference.pcdr(weight, x, neuron, min(3, len(s))).numpy(), expected, atol=1e-12)


def test_pcdr_of_a_silent_neuron_is_zero() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    assert reference.pcdr(weight, torch.zeros(4, dtype=torch.float64), 2, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratios", "rank"), [([0.5, 0.96, 0.99], 2), ([0.95, 0.96, 0.97], 1), ([0.1, 0.2, 0.3], 0), ([0.1, 0.2, 0.95], 3)]
)
def test_selection_takes_the_smallest_rank_that_reaches_the_threshold(ratios: list[float], rank: int) -> None:
    assert reference.select_rank(torch.tensor(ratios, dtype=torch.float64), 0.95) == rank


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.5])
def test_decay_solves_its_differential_equation(power: float) -> None:
    s = np.array([5.0, 1.0, 0.1])
    steps, strength, time = 200_000, 0.7, 0.4
    for _ in range(steps):  # explicit Euler: error about 1e-5 at this step
        s = s - time / steps * strength * s**power
    got = reference.decayed_singular_values(
        torch.tensor([5.0, 1.0, 0.1]).double(), lr_sum=time, strength=strength, power=power
    )
    np.testing.assert_allclose(got.numpy(), s, rtol=1e-4)


def test_decay_of_power_two_and_one_in_closed_form() -> None:
    s = torch.tensor([3.0, 0.5]).double()
    two = reference.decayed_singular_values(s, lr_sum=0.2, strength=1.5, power=2.0)
    np.testing.assert_allclose(two.numpy(), s.numpy() / (1 + 0.3 * s.numpy()), rtol=1e-14)
    one = reference.decayed_singular_values(s, lr_sum=0.2, strength=1.5, power=1.0)
    np.testing.assert_allclose(one.numpy(), s.numpy() * np.exp(-0.3), rtol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_updates(shape: tuple[int, int]) -> None:
    weight, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    U, s, Vh = numpy_svd(weight)
    coupled = reference.coupled_update(weight, grad, lr=0.1, rank=1, strength=0.2, power=2.0)
    expected = weight.numpy() - 0.1 * (grad.numpy() + 0.2 * s[0] ** 2 * np.outer(U[:, 0], Vh[0]))
    np.testing.assert_allclose(coupled.numpy(), expected, atol=1e-12)
    decoupled = reference.decoupled_update(weight, lr=0.1, rank=1, strength=0.2, power=2.0)
    s_new = s.copy()
    s_new[0] = s[0] / (1 + 0.1 * 0.2 * s[0])
    np.testing.assert_allclose(np.linalg.svd(decoupled.numpy())[1], np.sort(s_new)[::-1], atol=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_half_life(power: float) -> None:
    strength = reference.strength_for_half_life(45.0, 0.4, power=power)
    left = reference.decayed_singular_values(torch.tensor([45.0]).double(), lr_sum=0.4, strength=strength, power=power)
    assert left.item() == pytest.approx(22.5)
    with pytest.raises(ValueError, match="lr_sum=0"):
        reference.strength_for_half_life(1.0, 0.0)


def test_top_k_refuses_more_components_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"k=4 must lie in 1\.\.3"):
        reference.topk_svd(torch.randn(3, 5), 4)


def test_decay_does_not_overflow() -> None:
    s = torch.tensor([1e30])
    got = reference.decayed_singular_values(s, lr_sum=1e-3, strength=1.0, power=3.0)
    assert got.item() == pytest.approx((2 * 1e-3) ** -0.5, rel=1e-4)
    assert reference.decayed_singular_values(torch.zeros(1), lr_sum=0.1, strength=1.0, power=2.0) == 0
    assert reference.decayed_singular_values(torch.ones(1), lr_sum=0.0, strength=1.0, power=2.0) == 1
