"""The bench: complete rows, an honest search of settings, gates that hold their tongue, README that cannot drift."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable

import pytest
import torch
from typer.testing import CliRunner

from bench import accuracy, cases, linear_peers, linear_table, peers, penalty_peers, runs, step_peers, tables, timing
from bench.__main__ import app
from bench.search import Trial, cheapest_setting
from s2d_kernels import add_penalty_grad_, demo_models, ops, penalty, topk_svd
from s2d_kernels.svd import COLD_READS

CPU = torch.device("cpu")
ENVIRONMENT = {
    "device_name": "a CPU",
    "cores": 2,
    "threads": 1,
    "driver": None,
    "python": "3.11",
    "versions": {"torch": "2.13.0", "cupy": None},
    "commit": "0123abc",
    "date": "2026-01-01",
    "copy_bytes_per_second": 1e10,
    "fp32_flops_per_second": 1e11,
    "instructions": "CPU nothing special",
}
CONTEXT = runs.Context("2026-01-01T00:00:00+00:00", CPU, ENVIRONMENT, repeats=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick() -> cases.SVDCase:
    return cases.SVD_CASES["quick"]()


def make_row(**changes: object) -> timing.Row:
    row = CONTEXT.row(
        op="topk_svd",
        case="c",
        variant="cold",
        dtype="float32",
        impl="ours",
        setting="s",
        seconds=0.01,
        seconds_min=0.009,
        seconds_max=0.011,
        repeats=3,
        error_p90=1e-4,
        error_max=2e-4,
        error_limit=1e-3,
        error_of="G, relative Frobenius",
        gate=True,
        reads=9,
        bytes=10**8,
        problem="p",
    )
    return dataclasses.replace(row, **changes)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_survives_json_and_refuses_unknown_fields():
    row = make_row(speedup={"cold": 2.5})
    assert timing.Row.from_json(row.to_json()) == row
    assert row.floor_seconds == pytest.approx(0.01)
    with pytest.raises(ValueError, match="unknown fields.*'surprise'"):
        timing.Row.from_json(row.to_json()[:-1] + ', "surprise": 1}')


def test_rows_from_before_traffic_was_recorded_are_read():
    values = json.loads(make_row().to_json())
    del values["traffic"]
    assert timing.Row.from_json(json.dumps(values)) == make_row()
    del values["gate"]
    with pytest.raises(ValueError, match="missing.*'gate'"):
        timing.Row.from_json(json.dumps(values))


def test_speedups_only_within_a_run_and_where_both_gates_passed():
    ours, warm = make_row(), make_row(variant="warm", seconds=0.002)
    peer = make_row(impl="peer", seconds=0.04)
    wrong = make_row(impl="wrong", seconds=0.5, gate=False, error_p90=0.1)
    warm_peer = make_row(impl="warm peer", variant="warm", seconds=0.006)
    elsewhere = make_row(impl="other run", run="2025", seconds=1.0)
    rows = [ours, warm, peer, wrong, warm_peer, elsewhere]
    timing.fill_speedups(rows)
    assert peer.speedup == pytest.approx({"cold": 4.0, "warm": 20.0})
    assert warm_peer.speedup == pytest.approx({"warm": 3.0})  # never against ours cold
    assert ours.speedup == wrong.speedup == elsewhere.speedup == {}
    assert tables.speedups(peer) == "4x cold, 20x warm"
    assert "FAILED" in tables.cells(wrong)[5]
    wrong.speedup = {"cold": 50.0}
    assert tables.speedups(wrong) == ""  # not even if a hand-edited file claims it

    ours.gate = False
    timing.fill_speedups(rows)
    assert peer.speedup == pytest.approx({"warm": 20.0})


def test_the_environment_says_what_the_numbers_depend_on():
    found = timing.environment(CPU)
    assert found.keys() == ENVIRONMENT.keys()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == 1
    assert found["copy_bytes_per_second"] > 1e8
    assert found["commit"]


# --- the search -----------------------------------------------------------------------------------------------------


def fake_peer(passes_from: dict[int, int], price: Callable[[int, float], float]) -> Callable[[int, float], Trial]:
    return lambda width, effort: Trial(price(width, effort), 1e-4 if effort >= passes_from[width] else 1e-2)


@pytest.mark.parametrize("shift", [-2, 0, 2])
def test_search_chooses_the_cheapest_passing_setting(shift):
    grid = {4: range(1, 31), 8: range(1, 31), 16: range(1, 31)}
    needed = {4: 24, 8: 8, 16: 6}

    def price(width, effort):
        return width * effort + 3 * width

    passing = [(price(w, e), w, e) for w in grid for e in grid[w] if e >= needed[w]]
    # the sample needs fewer, as many or more iterations than the whole
    screen = fake_peer({w: e + shift for w, e in needed.items()}, price)
    found = cheapest_setting(grid, screen, fake_peer(needed, price), 1e-3)
    assert (found.width, found.effort) == min(passing)[1:] == (8, 8)
    assert found.passed


def test_search_says_when_nothing_passes():
    def trial(width, effort):
        return Trial(1.0, 1.0 / (width * effort))

    found = cheapest_setting({2: (1, 2), 4: (1, 3)}, trial, trial, 1e-3)
    assert (found.width, found.effort, found.passed) == (4, 3, False)


def test_a_peer_that_misses_the_error_gets_a_row_without_a_speedup(quick):
    def inaccurate(case, width, effort):
        return lambda: [t._replace(S=t.S * 1.01) for t in case.truth]

    peer = peers.SVDPeer("1 % off", inaccurate, lambda w, e: f"{w}, {e}", grid={4: (1, 2)})
    row = runs.run_svd(quick, CONTEXT, peers=[peer])[-1]
    assert (row.impl, row.gate, row.speedup) == ("1 % off", False, {})
    assert row.error_p90 == pytest.approx(0.0201, rel=1e-3)
    assert row.note == "none of 2 settings reaches 0.001"
    assert row.note in " ".join(tables.cells(row))


# --- cases and errors -----------------------------------------------------------------------------------------------


def test_siglip2_has_the_76_matrices():
    shapes = cases.siglip2_shapes()
    assert len(shapes) == len({name for name, _, _ in shapes}) == 76
    assert sum(m * n for _, m, n in shapes) == 92_012_544


def test_stretching_keeps_the_leading_gaps_and_the_range():
    spectrum = torch.linspace(10, 0, 384) ** 2
    stretched = cases.stretched_spectrum(spectrum, 768) / 2**0.5
    assert len(stretched) == 768
    torch.testing.assert_close(stretched[:32].float(), spectrum[:32])
    assert stretched[-1] == 0
    assert (stretched.diff() <= 0).all()


def test_truth_and_error_agree_with_the_full_svd(quick):
    for weight, exact in zip(quick.weights, quick.truth, strict=True):
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        G = (U[:, :3] * S[:3] ** 2) @ Vh[:3]
        assert ((exact.U * exact.S**2) @ exact.Vh - G).norm() < 1e-12 * G.norm()
        other = exact._replace(S=exact.S * torch.tensor([1.0, 1.1, 0.9]), U=-exact.U, Vh=-exact.Vh)
        expected = float(((other.U * other.S**2) @ other.Vh - G).norm() / G.norm())
        assert cases.product_errors([exact], [other]) == pytest.approx([expected], rel=1e-9)


def test_quantile_counts_a_nan_as_wrong():
    errors = [i / 100 for i in range(1, 11)]
    assert cases.quantile(errors) == 0.09
    assert cases.quantile([0.0, float("nan")]) == float("inf")
    assert cases.quantile([0.3], 1.0) == 0.3


def test_quick_svd_end_to_end(quick):
    chosen = [peer for peer in peers.SVD_PEERS if peer.name in ("torch.linalg.svd", "torch.svd_lowrank")]
    rows = runs.run_svd(quick, CONTEXT, peers=chosen)
    assert [(row.impl, row.variant) for row in rows[:2]] == [("ours", "cold"), ("ours", "warm")]
    for row in rows:
        assert row.gate
        assert 0 < row.seconds_min <= row.seconds <= row.seconds_max
        assert row.bytes == quick.bytes == 4 * quick.parameters
        assert all(getattr(row, field.name) is not None for field in dataclasses.fields(row) if field.name != "reads")
    assert rows[2].speedup.keys() == rows[3].speedup.keys() == {"cold", "warm"}
    assert rows[3].note.startswith("cheapest of")
    assert "N(0,1)" in rows[1].problem


@pytest.mark.parametrize("case", cases.QUICK_LINEAR_CASES, ids=lambda c: str(c.dtype))
def test_quick_linear_end_to_end(case):
    rows = runs.run_linear(case, CONTEXT)
    assert [row.impl for row in rows] == 2 * [peer.name for peer in linear_peers.LINEAR_PEERS]
    assert all(row.gate for row in rows)
    assert [set(row.speedup) for row in rows[1:4]] == 3 * [{"forward"}]


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_linear_gate_is_its_dtypes(dtype, off):
    """An fp32 layer as far off as bf16 rounds does not pass."""
    ours = linear_peers.LINEAR_PEERS[0]
    wrong = dataclasses.replace(ours, name="wrong", layer=lambda *tensors: ours.layer(*tensors) * (1 + off))
    rows = runs.run_linear(cases.LinearCase("c", 64, 48, 256, dtype), CONTEXT, peers=[ours, wrong])
    assert [row.gate for row in rows] == [True, False, True, False]
    assert all(row.error_limit == linear_peers.linear_error_limit(dtype) for row in rows)


def test_saved_bytes_by_hand():
    """F.linear keeps x; ours its codes, mask bits and parameters."""
    case = cases.LinearCase("c", 64, 48, 256)
    tensors = case.tensors(CPU)
    assert linear_peers.saved_bytes(torch.nn.functional.linear, tensors) == 64 * 256 * 4
    ours = linear_peers.saved_bytes(linear_peers.LINEAR_PEERS[0].layer, tensors)
    assert ours == 64 * (256 // 2 + 256 // 8 + 4 + 4)
    rows = runs.run_linear(case, CONTEXT)
    assert [row.traffic.get("saved_bytes") for row in rows[:5]] == 4 * [None] + [ours]
    assert all(len(tables.cells(row)) == len(tables.headings(row)) == 8 for row in rows)
    assert f"{ours / (64 * 256):.2f} B" in tables.markdown(rows)
    plain = [row.traffic.get("saved_bytes") for row in rows if row.impl == "F.linear"]
    assert plain == [None, 64 * 256 * 4]


def test_linear_layers_of_a_block_together(monkeypatch):
    """Two layers have the first shape; a peer that fails its gate on one of them fails on all. Runs are not mixed."""
    shapes = [cases.LinearCase(name, 8, 1, 1) for name in ("m.q, o, 8 tokens", "m.down, 8 tokens")]
    monkeypatch.setitem(cases.LINEAR_GROUPS, "vit-b", shapes)
    times = {
        "m.q, o, 8 tokens": (1.0, 2.0, 3.0),
        "m.down, 8 tokens": (2.0, 6.0, 9.0),
        "m.down, 1 tokens": (1.0, 0.5, 1.0),
    }
    rows = [
        make_row(
            op="fake_quant_linear",
            case=case,
            variant="forward",
            impl=impl,
            setting="s",
            seconds=seconds / 1e3,
            gate=(impl, case) != ("bad", "m.down, 8 tokens"),
        )
        for case, of_case in times.items()
        for impl, seconds in zip(("ours", "good", "bad"), of_case, strict=True)
    ]
    rows.append(dataclasses.replace(rows[3], run="another", seconds=5.0))
    rows.append(dataclasses.replace(rows[0], case="alone", gate=False))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in linear_table.lines(rows)]
    assert lines[0][3:] == ["ours", "kept", "good, s", "bad, s"]
    assert [[line[0], *line[3:]] for line in lines[2:]] == [
        ["m.q, o, 8 tokens", "1 ms", "", "2.00x", "3.00x"],
        ["m.down, 8 tokens", "2 ms", "", "3.00x", "failed"],
        ["**vit-b, all of a block**", "4 ms", "", "2.50x", "failed"],  # (2 * 2 + 6) / (2 * 1 + 2)
        ["m.down, 1 tokens", "1 ms", "", "0.50x", "1.00x"],
        ["alone", "1 ms failed", "", "", ""],
        ["m.down, 8 tokens", "5000 ms", "", "", ""],
    ]


def test_forward_only_and_optional_linear_peers():
    (product,) = [peer for peer in linear_peers.MORE_PEERS if not peer.backward]
    eager = dataclasses.replace(product, compiled=False)
    case = cases.LinearCase("c", 64, 48, 256)
    rows = runs.run_linear(case, CONTEXT, peers=[linear_peers.LINEAR_PEERS[0], eager])
    assert [(row.impl, row.variant) for row in rows] == [
        ("ours", "forward"), (eager.name, "forward"), ("ours", "forward+backward"),
    ]  # fmt: skip
    assert all(row.gate for row in rows)
    missing = dataclasses.replace(eager, needs="no_such_package")
    assert missing.problem() == "no_such_package is not installed"
    assert eager.problem() is None


@pytest.mark.parametrize("name", ["torchao QAT linear", "torchao int8 training"])
def test_torchao_is_judged_by_its_own_codes(name):
    pytest.importorskip("torchao")
    (peer,) = [p for p in linear_peers.MORE_PEERS if p.name == name and not p.compiled]
    assert peer.problem() is None
    for dtype in (torch.float32, torch.bfloat16):
        case = cases.LinearCase("c", 64, 48, 256, dtype)
        rows = runs.run_linear(case, CONTEXT, peers=[peer])
        assert [row.variant for row in rows] == ["forward", "forward+backward"]
        assert all(row.gate for row in rows)
        # what it means to compute is not the plain product
        plain = linear_peers.LINEAR_PEERS[1]
        assert all(
            error > 1e-3
            for error in runs.judge_linear(case, dataclasses.replace(peer, layer=plain.layer), True, CPU)[1][:3]
        )


def test_int8_training_is_left_out_by_name_where_it_cannot_run(monkeypatch):
    (peer,) = [p for p in linear_peers.MORE_PEERS if p.name == "torchao int8 training" and not p.compiled]
    assert dataclasses.replace(peer, needs="no_such_package").problem() == "no_such_package is not installed"
    pytest.importorskip("torchao")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert "takes no CPU tensors" in peer.problem("cpu")
    assert peer.problem("cuda") is None

    def moved() -> None:
        raise ImportError("No module named 'torchao.prototype.quantized_training'")

    monkeypatch.setattr(linear_peers, "_torchao_int8", moved)
    assert "elsewhere or not at all: No module named" in peer.problem("cuda")


def test_groups_of_linear_cases():
    tokens = [case.tokens for case in cases.LINEAR_GROUPS["tokens"]]
    assert min(tokens) == 1
    assert max(tokens) == 16384
    names = [(case.name, case.dtype) for group in cases.LINEAR_GROUPS.values() for case in group]
    assert len(names) == len(set(names))
    assert {"vit-b", "qwen2.5-0.5b", "llama3-8b"} < cases.LINEAR_GROUPS.keys()


# --- the penalty ----------------------------------------------------------------------------------------------------

LAYERS = cases.PenaltyCase("layers", "twelve layers", 12 * ((24, 16),))


@pytest.mark.parametrize("case", cases.PENALTY_CASES["quick"], ids=lambda c: str(c.dtype))
def test_quick_penalty_end_to_end(case):
    rows = runs.run_penalty(case, CONTEXT)
    variants = ["cpu", "torch"]
    if case.dtype == torch.bfloat16:
        variants += ["cpu, stochastic", "torch, stochastic"]
    names = [*(("ours", variant) for variant in variants), ("grad.addmm_(U c, Vh)", "")]
    assert [(row.impl, row.variant) for row in rows[: len(names)]] == names
    assert len(rows) == len(variants) + len(penalty_peers.PENALTY_PEERS)
    for row in rows:
        assert row.gate
        assert 0 < row.seconds_min <= row.seconds <= row.seconds_max
        assert row.error_p90 <= row.error_max <= row.error_limit == torch.finfo(case.dtype).eps
        assert row.traffic["bytes_per_second"] == row.traffic["moved_bytes"] / row.seconds
        assert row.traffic["copy_fraction"] == row.traffic["bytes_per_second"] / 1e10
        assert set(row.speedup) == (set() if row.impl == "ours" else set(variants))
        assert timing.Row.from_json(row.to_json()) == row
        assert len(tables.cells(row)) == len(tables.headings(row)) == 10
        assert f"{row.error_max:.1e} <= {row.error_limit:.1e}" in tables.cells(row)
    assert "0.3 MB" in tables.markdown(rows) or case.dtype != torch.bfloat16  # G


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_penalty_by_hand(dtype):
    case = cases.PenaltyCase("two layers", "", ((8, 16), (4, 2)), dtype)
    size = dtype.itemsize
    elements, m_and_n = 8 * 16 + 4 * 2, 8 + 16 + 4 + 2
    assert case.bytes == 2 * size * elements + 4 * 3 * (m_and_n + 2)
    ours = penalty_peers.ours(CPU, dtype)
    moved, extra = ([getattr(peer, name)(case) for peer in [*ours, *penalty_peers.PENALTY_PEERS]]
                    for name in ("moved", "extra"))  # fmt: skip
    widened = dtype != torch.float32
    factors = 3 * size * m_and_n
    scaled = 3 * size * (m_and_n if widened else 8 + 4)
    assert moved == [
        case.bytes,
        case.bytes + 2 * 3 * factors * widened,
        *2 * widened * [case.bytes],
        2 * size * elements + factors,
        4 * size * elements + factors,
        3 * size * elements,
    ]
    ours_extra = (1 + widened) * [0, 4 * 3 * (12 + 18)]
    assert extra == [*ours_extra, scaled, scaled + size * 128, size * elements]


def allocations(function: Callable[[], object]) -> tuple[object, int, int]:
    """What the function returns, the bytes it leaves allocated and the most it held."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    held, most = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, held, most


@pytest.mark.parametrize("case", cases.PENALTY_CASES["quick"], ids=lambda c: str(c.dtype))
def test_extra_memory_is_what_is_allocated(case):
    tensors = case.tensors(CPU)
    for peer in [*penalty_peers.ours(CPU, case.dtype), *penalty_peers.PENALTY_PEERS]:
        function, kept, _ = allocations(lambda peer=peer: peer.prepare(tensors))
        _, left, most = allocations(function)
        assert left == 0
        aside = 0
        if peer.name == "ours":
            aside = 2 * 4 * 3 * max(m for m, _ in case.shapes)  # two layers' scaled factors
        if peer.variant == "torch, stochastic":
            # a block of rows in fp32 and its sum, in int32 its random numbers and bits
            aside += 16 * min(case.largest, penalty.BLOCK_ELEMENTS)
        elif case.dtype == torch.bfloat16 and peer.name != "_foreach_add_ of dense G":
            aside += 2 * case.largest  # oneDNN's workspace
        assert peer.extra(case) <= kept + most <= peer.extra(case) + aside, peer.name


def all_but_the_last(tensors):
    few = [column[:-1] for column in (tensors.grads, tensors.factors, tensors.coefficients)]
    return lambda: add_penalty_grad_(few[0], few[1], coefficients=few[2])


def slightly_off(tensors):
    wrong = [c * (1 + 3 * torch.finfo(tensors.grads[0].dtype).eps) for c in tensors.coefficients]
    return lambda: add_penalty_grad_(tensors.grads, tensors.factors, coefficients=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [all_but_the_last, slightly_off])
def test_a_wrong_penalty_fails_its_gate_and_claims_nothing(prepare, dtype):
    case = dataclasses.replace(LAYERS, dtype=dtype)
    (_, ours), peer = penalty_peers.ours(CPU, torch.float32), penalty_peers.PENALTY_PEERS[0]
    wrong = dataclasses.replace(peer, name="wrong", prepare=prepare)
    right, failed, other = runs.run_penalty(case, CONTEXT, peers=[ours, wrong, peer])
    assert (right.gate, failed.gate, other.gate) == (True, False, True)
    assert (failed.speedup, set(other.speedup)) == ({}, {"torch"})
    assert "FAILED" in tables.cells(failed)[5]
    assert not tables.cells(failed)[-1]

    ours = dataclasses.replace(ours, prepare=prepare)
    rows = runs.run_penalty(case, CONTEXT, peers=[ours, peer])
    assert [(row.gate, row.speedup) for row in rows] == [(False, {}), (True, {})]


def test_factors_lie_as_a_warm_refresh_leaves_them():
    weight = torch.randn(24, 16)
    real = peers.topk_svd([weight], k=3, warm=peers.topk_svd([weight], k=3))[0]
    made = LAYERS.tensors(CPU).factors[0]
    for name in ("U", "S", "Vh", "residual"):
        assert getattr(made, name).stride() == getattr(real, name).stride(), name
        assert getattr(made, name).shape == getattr(real, name).shape, name


def test_the_row_of_stochastic_rounding_rounds_at_random():
    """And every implementation alike."""
    tensors = dataclasses.replace(LAYERS, dtype=torch.bfloat16).tensors(CPU)
    grads = {}
    for peer in penalty_peers.ours(CPU, torch.bfloat16):
        runs.judge_penalty(peer, tensors)
        grads[peer.variant] = [grad.clone() for grad in tensors.grads]
    pairs = [zip(grads[impl], grads[f"{impl}, stochastic"], strict=True) for impl in ("cpu", "torch")]
    different = [sum(int((a != b).sum()) for a, b in pair) for pair in pairs]
    assert all(0.2 < count / LAYERS.parameters < 0.3 for count in different)  # a quarter are rounded the longer way
    alike = zip(grads["cpu, stochastic"], grads["torch, stochastic"], strict=True)
    assert sum(int((a != b).sum()) for a, b in alike) < 0.001 * LAYERS.parameters  # where fp32 sums differ


def test_every_usable_implementation_is_measured_and_the_others_are_named(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(ops, "problem_of", lambda impl, device: None)
    assert [peer.variant for peer in penalty_peers.ours(cuda, torch.float32)] == ["cuda", "triton", "torch"]
    assert [peer.variant for peer in penalty_peers.ours(CPU, torch.float32)] == ["cpu", "torch"]
    monkeypatch.setattr(ops, "problem_of", lambda impl, device: "no library" if impl == "cuda" else None)
    assert [peer.variant for peer in penalty_peers.ours(cuda, torch.float32)] == ["triton", "torch"]
    bf16 = penalty_peers.ours(cuda, torch.bfloat16)
    assert [peer.variant for peer in bf16] == ["triton", "torch", "triton, stochastic", "torch, stochastic"]
    assert penalty_peers.left_out(cuda) == ["impl='cuda' is left out: no library"]
    assert penalty_peers.left_out(CPU) == []


@pytest.mark.parametrize("case", cases.PENALTY_CASES["quick"], ids=lambda c: str(c.dtype))
def test_quick_step_end_to_end(case):
    """Also that a step without the penalty would not pass for one with it."""
    rows = runs.run_step(case, CONTEXT)
    ours = [f"{form}, {impl}" for impl in ("cpu", "torch") for form in ("fused", "coupled")]
    assert [row.variant for row in rows] == ["", "", *ours]
    for row in rows:
        assert row.gate
        assert row.bytes == 7 * case.grad_bytes
        assert len(tables.cells(row)) == len(tables.headings(row)) == 11
        assert timing.Row.from_json(row.to_json()) == row
    plain, dense, kernel, _, fused, coupled = (row.traffic for row in rows)
    factors = case.bytes - 2 * case.grad_bytes
    assert plain["moved_bytes"] == 7 * case.grad_bytes
    assert dense["moved_bytes"] == 10 * case.grad_bytes
    assert coupled["moved_bytes"] == 9 * case.grad_bytes + factors
    assert kernel["moved_bytes"] == 7 * case.grad_bytes + factors
    assert fused["moved_bytes"] == 9 * case.grad_bytes + factors  # its torch form copies the gradients
    assert dense["peak_bytes"] - plain["peak_bytes"] == case.grad_bytes
    forgotten = dataclasses.replace(step_peers.PLAIN, penalized=True)
    assert not runs.run_step(case, CONTEXT, peers=[forgotten])[0].gate


def _of_another_coefficient(t):
    """One per cent too much."""
    coefficients = [1.01 * c for c in t.penalty.coefficients]
    return step_peers._fused("cpu")(
        dataclasses.replace(t, penalty=t.penalty._replace(coefficients=coefficients)),
    )


def _of_another_mode(t):
    optimizer, step = step_peers._fused("cpu")(t)
    optimizer.set_penalties(optimizer._penalties, mode="decoupled")
    return optimizer, step


def _of_a_rounded_gradient(t):
    """To bf16, also where the parameters are fp32."""
    optimizer, _ = step_peers._fused("cpu")(t)
    optimizer.set_penalties([])

    def step():
        step_peers.add_penalty_grad_(t.penalty.grads, t.penalty.factors, coefficients=t.penalty.coefficients)
        for grad in t.penalty.grads:
            grad.copy_(grad.bfloat16())
        optimizer.step()

    return optimizer, step


def _of_another_bias_correction(t):
    optimizer, _ = step_peers._fused("cpu")(t)

    def step():
        for state in optimizer.state.values():
            state["step"].add_(1)
        optimizer.step()

    return optimizer, step


@pytest.mark.parametrize(
    "mutant", [_of_another_coefficient, _of_another_mode, _of_a_rounded_gradient, _of_another_bias_correction]
)
@pytest.mark.parametrize("case", cases.PENALTY_CASES["quick"], ids=lambda c: str(c.dtype))
def test_a_wrong_step_does_not_pass(case, mutant):
    fused = step_peers.ours(CPU)[0]
    assert fused.variant == "fused, cpu"
    tensors = step_peers.make_tensors(case, CPU)
    for peer, passes in ((fused, True), (dataclasses.replace(fused, prepare=mutant), False)):
        _, errors, _ = runs.judge_step(peer, tensors, CPU)
        assert (max(errors) <= step_peers.error_limit(peer, case.dtype)) == passes, max(errors)


def test_the_step_is_judged_where_a_rounding_decides_nothing():
    """A gradient that the penalty cancels but for its rounding: the first step would move p by lr either way."""
    case = cases.PENALTY_CASES["quick"][0]
    tensors = step_peers.make_tensors(case, CPU)
    for start, grad, factor, c in zip(
        tensors.penalty.start, tensors.penalty.grads, tensors.penalty.factors, tensors.penalty.coefficients, strict=True
    ):
        start.copy_(-(factor.U * c) @ factor.Vh)
        grad.copy_(start)
    for peer in step_peers.ours(CPU):
        optimizer, function = peer.prepare(tensors)
        tensors.restore()
        errors = step_peers.step_errors(tensors, optimizer, function, True)
        assert max(errors) <= step_peers.error_limit(peer, case.dtype), (peer.variant, errors)


def test_the_fused_step_has_no_extra_bytes_where_it_has_a_kernel(monkeypatch):
    monkeypatch.setattr(ops, "problem_of", lambda impl, device: None)
    case = cases.PENALTY_CASES["quick"][0]
    found = {peer.variant: peer for peer in step_peers.ours(torch.device("cuda"))}
    assert list(found) == [f"{form}, {impl}" for impl in ("cuda", "triton", "torch") for form in ("fused", "coupled")]
    for impl in ("cuda", "triton"):
        assert found[f"fused, {impl}"].moved(case) == case.bytes + 5 * case.grad_bytes
        assert found[f"fused, {impl}"].extra(case) == found[f"coupled, {impl}"].extra(case) == 0


def test_step_command(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "environment", lambda device: ENVIRONMENT)
    file = tmp_path / "rows.jsonl"
    arguments = ["step", "--quick", "--repeats", "1", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [row.dtype for row in timing.read_rows(file)] == 6 * ["float32"] + 6 * ["bfloat16"]
    assert "adamw step" in result.output


def test_penalty_command(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "environment", lambda device: ENVIRONMENT)
    file = tmp_path / "rows.jsonl"
    arguments = ["penalty", "--quick", "--repeats", "1", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = timing.read_rows(file)
    assert [row.dtype for row in rows] == 5 * ["float32"] + 7 * ["bfloat16"]
    assert {row.op for row in rows} == {"add_penalty_grad_"}
    assert CliRunner().invoke(app, ["penalty", "--case", "nonsense"]).exit_code == 2
    measured = []
    monkeypatch.setattr(runs, "run_penalty", lambda case, *_: measured.append((case.name, case.dtype)) or rows[:1])
    for more in ([], ["--case", "llama3-8b"]):
        assert CliRunner().invoke(app, ["penalty", *more]).exit_code == 0
    assert measured == [("siglip2-b", torch.float32), ("siglip2-b", torch.bfloat16), ("llama3-8b", torch.bfloat16)]


def test_rows_of_a_case_outlive_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "environment", lambda device: ENVIRONMENT)
    found = iter([[make_row()]])
    monkeypatch.setattr(runs, "run_step", lambda *_: next(found))
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["step", "--quick", "--json", str(file)])
    assert result.exception is not None  # the second of the two quick cases
    assert timing.read_rows(file) == [make_row()]


def test_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "environment", lambda device: ENVIRONMENT)
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        result = CliRunner().invoke(app, ["linear", "--quick", "--repeats", "1", "--threads", "1", "--json", str(file)])
        assert result.exit_code == 0, result.output
    assert len(timing.read_rows(file)) == 32
    assert len(tables.latest(timing.read_rows(file))) == 16
    assert re.search(r"ours is faster by\s*\n.*geometric mean", result.output, re.DOTALL)
    assert "CPU " in result.output.splitlines()[-1]
    assert "torch._int_mm" in result.output.splitlines()[-1]
    assert CliRunner().invoke(app, ["linear", "--case", "nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["svd", "--case", "nonsense"]).exit_code == 2
    assert CliRunner().invoke(app, ["svd", "--device", "tpu"]).exit_code == 2


def test_table_check_notices_a_changed_readme(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    old = make_row(run="2025-01-01T00:00:00+00:00", impl="of an old run")
    timing.append_rows(results / "svd.jsonl", [old, make_row(), make_row(impl="peer", speedup={"cold": 3.0})])
    readme.write_text("before\n<!-- bench:svd -->\n<!-- /bench:svd -->\nafter\n")
    arguments = ["table", "--readme", str(readme), "--results", str(results)]

    def exit_code(*more):
        return CliRunner().invoke(app, [*arguments, *more]).exit_code

    assert exit_code("--check") == 1
    assert exit_code() == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /bench:svd -->\nafter\n")
    assert "3x cold" in text
    assert "of an old run" not in text
    assert exit_code("--check") == 0
    readme.write_text(text.replace("3x cold", "4x cold"))
    assert exit_code("--check") == 1
    readme.write_text("<!-- bench:missing -->\n<!-- /bench:missing -->\n")
    assert exit_code("--check") == 2
    readme.write_text("<!-- bench:svd -->\n")
    assert exit_code("--check") == 2


def test_accuracy_tables_from_rows() -> None:
    """Real rows of the pretrained weights: more reads, less error; the default setting is the bold one."""
    model, _ = demo_models.load_minilm()
    weights = accuracy.encoder_weights(model)[:3]
    found = [accuracy.measure("cold", 3, reads, None, weights, None) for reads in accuracy.COLD]
    assert [row.error_p90 for row in found] == sorted((row.error_p90 for row in found), reverse=True)
    assert found[-1].error_p90 < 1e-5 < found[0].error_p90
    previous = topk_svd(weights, k=3)
    warm = [accuracy.measure("warm", 3, reads, 1e-4, weights, previous) for reads in accuracy.WARM]
    text = accuracy.markdown([*found, *warm])
    bold = f"**{found[accuracy.COLD.index(COLD_READS)].error_p90:.1e}**"
    assert text.splitlines()[2].count("**") == 2
    assert bold in text.splitlines()[2]
    assert text.splitlines()[-1].startswith("| k = 3 | 8 | 0.0001 |")
