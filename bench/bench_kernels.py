"""The cases of `python -m bench` under pytest-benchmark: `make bench`, or `pytest bench/bench_kernels.py -k minilm`.

Same preparation, same search of settings and same gate; `extra_info` carries setting, error and gate. An
implementation that misses the gate fails its benchmark.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from bench.cases import (
    ERROR_LIMIT,
    LINEAR_CASES,
    PENALTY_CASES,
    SVD_CASES,
    LinearCase,
    PenaltyCase,
    PenaltyTensors,
    SVDCase,
    quantile,
)
from bench.linear_peers import LINEAR_PEERS, LinearPeer, linear_error_limit
from bench.peers import OURS, SVD_PEERS, SVDPeer
from bench.penalty_peers import PENALTY_PEERS, PenaltyPeer, error_limit, ours
from bench.runs import judge_linear, judge_penalty, prepare_svd
from bench.timing import equal_threads

CPU = torch.device("cpu")
VARIANTS = ("forward", "forward+backward")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    with equal_threads(torch.get_num_threads()):
        yield


@cache
def _case(name: str) -> SVDCase:
    return SVD_CASES[name]()


@pytest.mark.parametrize(
    "peer",
    [*OURS, *(peer for peer in SVD_PEERS if peer.device != "cuda")],
    ids=lambda p: f"{p.name}-{p.variant}",
)
@pytest.mark.parametrize("name", ["siglip2-b", "minilm"])
def test_topk_svd(benchmark: Any, name: str, peer: SVDPeer) -> None:
    assert peer.problem(CPU) is None, f"{peer.problem(CPU)}: pip install 's2d-kernels[bench]'"
    prepared = prepare_svd(peer, _case(name), CPU)
    error = quantile(prepared.errors)
    benchmark.group = f"topk_svd, {name}"
    benchmark.extra_info.update(setting=peer.describe(prepared.width, prepared.effort), error_p90=error)
    benchmark.pedantic(prepared.run, rounds=1 if peer.slow else 5)
    assert error <= ERROR_LIMIT, prepared.note


@pytest.mark.parametrize("peer", LINEAR_PEERS, ids=lambda p: p.name)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda c: f"{c.name}-{c.dtype}")
def test_fake_quant_linear(benchmark: Any, case: LinearCase, variant: str, peer: LinearPeer) -> None:
    run, errors = judge_linear(case, peer, variant != VARIANTS[0], CPU)
    benchmark.group = f"fake_quant_linear, {case.name}, {case.dtype}, {variant}"
    benchmark.extra_info.update(setting=peer.setting, error_p90=quantile(errors))
    benchmark.pedantic(run, rounds=7)
    assert quantile(errors) <= linear_error_limit(case.dtype)


@lru_cache(maxsize=1)  # a case's gradients and their copy are 0.7 GB
def _penalty_tensors(case: PenaltyCase) -> PenaltyTensors:
    return case.tensors(CPU)


@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in PENALTY_CASES["siglip2-b"] for peer in [*ours(CPU, case.dtype), *PENALTY_PEERS]],
    ids=lambda v: f"{v.name}-{v.variant if isinstance(v, PenaltyPeer) else v.dtype}",
)
def test_add_penalty_grad(benchmark: Any, case: PenaltyCase, peer: PenaltyPeer) -> None:
    run, errors = judge_penalty(peer, _penalty_tensors(case))
    benchmark.group = f"add_penalty_grad_, {case.name}, {case.dtype}"
    benchmark.extra_info.update(
        setting=peer.describe(case),
        error_max=max(errors),
        moved_bytes=peer.moved(case),
        extra_bytes=peer.extra(case),
    )
    benchmark.pedantic(run, rounds=7)
    assert quantile(errors, 1.0) <= error_limit(case.dtype)
