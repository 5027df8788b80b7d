"""pcdr: bounds that hold, decisions equal to an fp64 full SVD, hard inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import decaying_spectrum, matrix_with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import pcdr_cases
from s2d_kernels import demo_models, pcdr, reference, selection, topk_svd
from s2d_kernels.svd import SVDBasis, TopkSVD


def planted_layer(m: int, n: int, *, spike: float, alignment: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with an inflated direction, and inputs that contain it."""
    generator = torch.Generator().manual_seed(seed)
    weight = matrix_with_spectrum(m, n, decaying_spectrum(min(m, n), rate=0.03), seed=seed)
    u, v = torch.randn(m, generator=generator), torch.randn(n, generator=generator)
    v = v / v.norm()
    weight = weight + spike * torch.outer(u / u.norm(), v)
    tokens = torch.randn(64, n, generator=generator) / n**0.5
    return weight, tokens + alignment * torch.randn(64, 1, generator=generator) * v


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 80),
    n=st.integers(2, 80),
    spike=st.sampled_from([0.0, 1.0, 3.0, 10.0, 50.0]),
    alignment=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    threshold=st.sampled_from([0.5, 0.8, 0.95]),
    seed=st.integers(0, 10_000),
)
def test_decisions_equal_those_of_a_full_svd(
    m: int, n: int, spike: float, alignment: float, threshold: float, seed: int
) -> None:
    weight, tokens = planted_layer(m, n, spike=spike, alignment=alignment, seed=seed)
    token, neuron, activation = reference.largest_activation(weight, tokens)
    factors = topk_svd([weight], k=min(3, m, n), seed=seed)
    args = ([weight], [tokens[token]], [neuron])
    truth = pcdr(*args, threshold=threshold, impl="reference")[0]
    exact = pcdr(*args, threshold=threshold)[0]
    assert exact.route == truth.route == "exact"
    assert exact.lower == pytest.approx(truth.lower, abs=2e-4)
    if min(abs(v - threshold) for v in truth.lower) < 1e-6:
        return  # a tie within the stated accuracy
    got = pcdr(*args, factors, threshold=threshold)[0]
    assert got.k_target == truth.k_target == exact.k_target
    assert got.neuron == neuron
    assert got.activation == pytest.approx(abs(activation.item()), rel=1e-4)
    if got.route == "bounds":
        for low, value, high in zip(got.lower, truth.lower, got.upper, strict=True):
            assert low <= value <= high


def test_bounds_settle_the_clear_cases() -> None:
    """Clearly dominated and clearly healthy layers need no exact route, else the bounds are for nothing."""
    routes = []
    for seed in range(20):
        for spike, alignment in ((0.0, 0.0), (50.0, 5.0)):
            weight, tokens = planted_layer(120, 100, spike=spike, alignment=alignment, seed=seed)
            token, neuron, _ = reference.largest_activation(weight, tokens)
            decision = pcdr([weight], [tokens[token]], [neuron], topk_svd([weight], k=3))[0]
            assert (decision.k_target == 1) == (spike > 0)
            routes.append(decision.route)
    assert routes.count("bounds") >= 36


def exact_factors(weight: torch.Tensor, residual: float) -> TopkSVD:
    """All triplets of an fp64 SVD, said to have this residual / s_1."""
    U, S, Vh = (t.float() for t in torch.linalg.svd(weight.double(), full_matrices=False))
    stated = torch.full_like(S, residual * float(S[0]))
    zero = torch.zeros(())
    return TopkSVD(U[:, :3], S[:3], Vh[:3], stated[:3], zero, zero.int(), SVDBasis(U, S, Vh, stated))


@pytest.mark.parametrize(("residual", "route"), [(0.009, "bounds"), (0.011, "exact")])
def test_components_with_a_large_residual_are_not_used(residual: float, route: str) -> None:
    """Nothing but the rule stands in the way: the threshold is far from what the bounds say, widened or not."""
    weight, tokens = planted_layer(120, 100, spike=50.0, alignment=5.0, seed=0)
    token, neuron, _ = reference.largest_activation(weight, tokens)
    (got,) = pcdr([weight], [tokens[token]], [neuron], [exact_factors(weight, residual)], threshold=0.8)
    assert (got.route, got.k_target) == (route, 1)


@pytest.mark.parametrize("residual", [0.0, 0.0099])
def test_bounds_are_widened(residual: float) -> None:
    """With all triplets both bounds are the ratio itself: what is left between them is the widening."""
    weight, tokens = planted_layer(80, 60, spike=3.0, alignment=0.3, seed=5)
    token, neuron, _ = reference.largest_activation(weight, tokens)
    truth = reference.pcdr(weight.double(), tokens[token].double(), neuron, 3)
    assert (truth < 0.9).all()
    for difference, route in ((0.008, "exact"), (0.013, "bounds")):
        factors = [exact_factors(weight, residual)]
        threshold = float(truth[2]) + difference
        (got,) = pcdr([weight], [tokens[token]], [neuron], factors, threshold=threshold)
        assert (got.route, got.k_target) == (route, 0)


@pytest.mark.parametrize(("gap", "route"), [(0.01, "bounds"), (1e-3, "exact")])
def test_a_cluster_goes_the_exact_way(gap: float, route: str) -> None:
    """Its vectors are arbitrary, and so is what one carries. Here they come out as planted, all by the first."""
    spectrum = torch.cat([torch.tensor([5.0, 5.0 * (1 - gap)]), 0.05 * decaying_spectrum(60)])
    weight = matrix_with_spectrum(90, 80, spectrum)
    U, _, Vh = torch.linalg.svd(weight.double())
    neuron = int(U[:, 0].abs().argmax())
    (got,) = pcdr([weight], [Vh[0].float()], [neuron], [exact_factors(weight, 1e-3)], threshold=0.9)
    assert (got.route, got.k_target) == (route, 1)


@pytest.mark.parametrize("spike", [0.0, 5.0, 20.0, 50.0, 1000.0])
@pytest.mark.parametrize("shape", [(150, 110), (110, 150)])
def test_the_fp32_route_knows_how_far_off_it_is(shape: tuple[int, int], spike: float) -> None:
    """The error stays within what is claimed, and the claim within a hundredth, so that it decides."""
    for seed in range(3):
        weight, tokens = planted_layer(*shape, spike=spike, alignment=0.1, seed=seed)
        token, neuron, _ = reference.largest_activation(weight, tokens)
        x = tokens[token]
        truth = reference.pcdr(weight.double(), x.double(), neuron, 3)
        A, p, q = (
            (weight, weight[neuron], x) if shape[0] > shape[1] else (weight.mT, torch.eye(110)[neuron], weight @ x)
        )
        ratios, error = selection._in_fp32(A, p.double(), q.double(), 3)
        assert (error < 1e-2).all()
        assert ((ratios - truth).abs() < error).all()
        assert ((ratios - truth).abs() < 2e-4).all()


@pytest.mark.parametrize("gap", [1e-5, 1e-6, 3e-7])
def test_the_fp32_route_knows_a_near_tie(gap: float) -> None:
    """Two leading singular values so close that fp32 turns their vectors into each other."""
    spectrum = torch.cat([torch.tensor([1.0, 1.0 - gap]), torch.linspace(0.95, 0.1, 108)])
    errors = []
    for seed in range(4):
        weight = matrix_with_spectrum(150, 110, spectrum, seed=seed)
        U, _, Vh = torch.linalg.svd(weight.double())
        generator = torch.Generator().manual_seed(seed)
        x = Vh[0] + 0.3 * Vh[1] + 0.01 * torch.randn(110, generator=generator)
        neuron = int(U[:, 0].abs().argmax())
        truth = reference.pcdr(weight.double(), x, neuron, 3)
        ratios, error = selection._in_fp32(weight, weight[neuron].double(), x, 3)
        assert ((ratios - truth).abs() < error).all()
        errors.append(float((ratios - truth).abs().max()))
        (got,) = pcdr([weight], [x], [neuron], threshold=float(truth[0]) + 2e-3)
        assert got.k_target == reference.select_rank(truth, float(truth[0]) + 2e-3)
    assert max(errors) > selection.FP32_ERROR  # so that it had to know


def test_the_fp32_route_knows_a_tail_below_its_resolution() -> None:
    spectrum = torch.cat([torch.linspace(1, 0.8, 12), torch.full((98,), 1e-5)])
    errors = []
    for seed in range(3):
        weight = matrix_with_spectrum(150, 110, spectrum, seed=seed)
        _, _, Vh = torch.linalg.svd(weight.double())
        x = Vh[12:].mT @ torch.randn(98, generator=torch.Generator().manual_seed(seed)).double() + 1e-4 * Vh[0]
        neuron = int((weight.double() @ x).abs().argmax())
        truth = reference.pcdr(weight.double(), x, neuron, 3)
        ratios, error = selection._in_fp32(weight, weight[neuron].double(), x, 3)
        assert ((ratios - truth).abs() < error).all()
        errors.append(float((ratios - truth).abs().max()))
    assert max(errors) > selection.FP32_ERROR


def test_near_the_threshold_fp64_decides() -> None:
    weight, tokens = planted_layer(150, 110, spike=5.0, alignment=1.0, seed=0)
    token, neuron, _ = reference.largest_activation(weight, tokens)
    truth = reference.pcdr(weight.double(), tokens[token].double(), neuron, 3)
    for difference, precise in ((1e-6, True), (-1e-6, True), (2e-2, False)):
        got = pcdr([weight], [tokens[token]], [neuron], threshold=float(truth[0]) + difference)[0]
        assert got.k_target == reference.select_rank(truth, float(truth[0]) + difference)
        assert (abs(got.lower[0] - float(truth[0])) < 1e-10) == precise


def test_decisions_by_bounds_are_made_on_the_device() -> None:
    """Before anything is waited for: a dominated, a healthy, an undecided and a layer that is not finite."""
    dominated, tokens = planted_layer(120, 100, spike=50.0, alignment=5.0, seed=0)
    healthy, others = planted_layer(120, 100, spike=0.0, alignment=0.0, seed=1)
    weights, xs, neurons = [], [], []
    for weight, rows in ((dominated, tokens), (healthy, others), (healthy, others), (healthy, others * float("inf"))):
        token, neuron, _ = reference.largest_activation(weight, rows)
        weights.append(weight)
        xs.append(rows[token])
        neurons.append(neuron)
    factors = topk_svd(weights, k=3)
    factors[2] = topk_svd(weights[2:3], k=3, reads=1)[0]._replace(
        basis=factors[2].basis._replace(residual=torch.ones(16))
    )
    pending = selection.pcdr_begin(weights, xs, neurons, factors)
    assert pending.k_target.tolist() == [1, 0, -1, 0]
    assert pending.done()
    assert [result.route for result in pending.result()] == ["bounds", "bounds", "exact", "non-finite"]


@pytest.mark.minilm
def test_on_minilm_all_decisions_equal_those_of_full_svds() -> None:
    """A part of `python -m bench pcdr`: 6 matrices, 2 batches, as they are and inflated."""
    model, tokenizer = demo_models.load_minilm()
    inputs = [pcdr_cases.layer_inputs(model, batch) for batch in demo_models.english_batches(tokenizer, batches=2)]
    names = pcdr_cases.names_of(inputs[0])
    assert len(names) == 36
    routes = set()
    for tally in pcdr_cases.tallies(inputs, names[12:18], inflations=(1.0, 20.0), widths=(8,)):
        assert tally.decided == 12
        assert tally.wrong == 0
        assert tally.error < 2e-4
        routes.add(0 < tally.by_bounds[8] < 12)
    assert True in routes  # both routes were taken


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (2, 5), (3, 3)])
def test_fewer_singular_values_than_k_max(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), torch.randn(shape[1])
    neuron = int((weight @ x).abs().argmax())
    for factors in (None, topk_svd([weight], k=min(shape))):
        got = pcdr([weight], [x], [neuron], factors, k_max=3)[0]
        assert len(got.lower) == 3
        assert got.upper[2] == pytest.approx(1.0, abs=1e-5)
        assert got.k_target == pcdr([weight], [x], [neuron], k_max=3, impl="reference")[0].k_target


def test_extreme_scales_and_silent_inputs() -> None:
    weight, tokens = planted_layer(60, 50, spike=20.0, alignment=5.0, seed=0)
    token, neuron, _ = reference.largest_activation(weight, tokens)
    for scale in (1e-30, 1e25, 1e35):
        args = ([weight * scale], [tokens[token]], [neuron])
        assert pcdr(*args, topk_svd(args[0], k=3))[0].k_target == 1
        assert pcdr(*args)[0].k_target == 1
    silent = ([weight], [torch.zeros(50)], [0])
    assert pcdr(*silent)[0].k_target == 0
    assert pcdr(*silent, topk_svd([weight], k=3))[0].k_target == 0


@pytest.mark.parametrize("power", [-120, -100, -60, 60, 100, 118])
@pytest.mark.parametrize("input_power", [-100, 0, 100])
def test_bounds_do_not_depend_on_the_scale(power: int, input_power: int) -> None:
    """By powers of two, which change nothing but exponents, on layers that are neither dominated nor healthy."""
    for seed in range(5):
        weight, tokens = planted_layer(60, 50, spike=2.0, alignment=0.3, seed=seed)
        token, neuron, _ = reference.largest_activation(weight, tokens)
        basis = topk_svd([weight], k=3)[0].basis

        def bounds(power: int, input_power: int, weight=weight, x=tokens[token], neuron=neuron, basis=basis):
            scaled = [torch.ldexp(t, torch.tensor(power)) for t in (weight, basis.S, basis.residual)]
            x = torch.ldexp(x, torch.tensor(input_power))
            where = torch.tensor(neuron)
            lists = [[t] for t in (scaled[0], x, where, basis.U, scaled[1], basis.Vh, scaled[2])]
            return torch.ops.s2d.pcdr_bounds(*lists, 3)

        plain = bounds(0, 0)
        assert (plain[:, 0] > 0).any()
        torch.testing.assert_close(bounds(power, input_power), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_factors", [True, False])
def test_non_finite_layers_are_reported_and_leave_the_others_alone(with_factors: bool) -> None:
    weight, tokens = planted_layer(60, 50, spike=20.0, alignment=5.0, seed=0)
    token, neuron, _ = reference.largest_activation(weight, tokens)
    poisoned = weight.clone()
    poisoned[3, 3] = float("nan")
    weights = [weight, poisoned, weight]
    inputs = [tokens[token], tokens[token], tokens[token] * float("inf")]
    factors = topk_svd(weights, k=3) if with_factors else None
    good, bad_weight, bad_input = pcdr(weights, inputs, [neuron] * 3, factors)
    assert good == pcdr([weight], inputs[:1], [neuron], factors[:1] if factors else None)[0]
    assert bad_weight.route == bad_input.route == "non-finite"
    assert bad_weight.k_target == bad_input.k_target == 0


def test_low_precision_weights() -> None:
    weight, tokens = planted_layer(60, 50, spike=20.0, alignment=5.0, seed=0)
    for dtype in (torch.bfloat16, torch.float16):
        low = weight.to(dtype)
        token, neuron, _ = reference.largest_activation(low.float(), tokens)
        got = pcdr([low], [tokens[token]], [neuron], topk_svd([low], k=3))[0]
        assert got.k_target == pcdr([low], [tokens[token]], [neuron], impl="reference")[0].k_target == 1


def test_bad_input() -> None:
    weight, x = torch.randn(5, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"inputs\[0\] has 3 elements"):
        pcdr([weight], [x[:3]], [0])
    with pytest.raises(ValueError, match=r"neurons\[0\]=5 must lie in 0\.\.4"):
        pcdr([weight], [x], [5])
    with pytest.raises(ValueError, match="threshold=1.5"):
        pcdr([weight], [x], [0], threshold=1.5)
    with pytest.raises(TypeError, match="threshold='a' must be a number, got str"):
        pcdr([weight], [x], [0], threshold="a")
    with pytest.raises(ValueError, match="threshold=nan"):
        pcdr([weight], [x], [0], threshold=float("nan"))
    for shape in ((3, 0), (0, 4)):
        empty, nothing = torch.zeros(shape), torch.zeros(shape[1])
        with pytest.raises(ValueError, match=rf"weights\[1\] is empty, shape \({shape[0]}, {shape[1]}\): leave it out"):
            pcdr([weight, empty], [x, nothing], [0, 0])
    with pytest.raises(ValueError, match="k_max=0"):
        pcdr([weight], [x], [0], k_max=0)
    with pytest.raises(ValueError, match="equally long"):
        pcdr([weight], [x], [])
    assert pcdr([], [], []) == []


def test_operator_checks() -> None:
    weight, x, neuron = torch.randn(6, 5), torch.randn(5), torch.tensor(2)
    basis = topk_svd([weight], k=2)[0].basis
    torch.library.opcheck(torch.ops.s2d.pcdr_exact.default, ([weight], [x], [neuron], 3, 0.95, "torch"))
    args = ([weight], [x], [neuron], [basis.U], [basis.S], [basis.Vh], [basis.residual], 3, "torch")
    torch.library.opcheck(torch.ops.s2d.pcdr_bounds.default, args)


def layers_with_neurons(device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Weights, inputs and neurons of layers that the bounds settle."""
    layers = [planted_layer(m, 60, spike=50.0, alignment=5.0, seed=m) for m in (40, 90, 80, 70)]
    peaks = [reference.largest_activation(*layer)[:2] for layer in layers]
    inputs = [tokens[token].to(device) for (_, tokens), (token, _) in zip(layers, peaks, strict=True)]
    return [weight.to(device) for weight, _ in layers], inputs, [neuron for _, neuron in peaks]


def test_neurons_from_everywhere_go_to_the_device_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs, neurons = layers_with_neurons(torch.device("cpu"))
    factors = topk_svd(weights, k=3)
    mixed = [neurons[0], torch.tensor(neurons[1]), torch.tensor([neurons[2]], dtype=torch.int32), np.int64(neurons[3])]
    made = []
    create = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: made.append(args) or create(*args, **options))
    pending = selection.pcdr_begin(weights, inputs, mixed, factors)
    monkeypatch.undo()
    assert made == [(neurons,)]
    assert [decision.neuron for decision in pending.result()] == neurons
    assert pending.result() == pcdr(weights, inputs, neurons, factors)


def test_begins_without_a_synchronization(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    weights, inputs, neurons = layers_with_neurons(device)
    factors = topk_svd(weights, k=3)
    mixed = [neurons[0], torch.tensor(neurons[1]), torch.tensor(neurons[2], device=device), neurons[3]]
    expected = pcdr(weights, inputs, mixed, factors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = selection.pcdr_begin(weights, inputs, mixed, factors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.result() == expected
    assert [decision.neuron for decision in expected] == neurons
    assert [decision.route for decision in expected] == ["bounds"] * 4
