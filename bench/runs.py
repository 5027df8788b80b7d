"""From a case to its rows: settings searched, results judged, everything timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import linear_peers, penalty_peers, step_peers
from bench.cases import (
    DRIFT,
    ERROR_LIMIT,
    RANK,
    WARM_CHAIN,
    LinearCase,
    PenaltyCase,
    PenaltyTensors,
    SVDCase,
    product_errors,
    quantile,
    relative_residuals,
)
from bench.linear_peers import LINEAR_PEERS, LinearPeer, linear_error_limit
from bench.peers import OURS, SVD_PEERS, CannotRun, Run, SVDPeer
from bench.penalty_peers import PENALTY_PEERS, PenaltyPeer
from bench.search import Trial, cheapest_setting
from bench.timing import Row, fill_speedups, measure_in_turn, summary, timed

Step = Callable[[str], None]


@dataclass(frozen=True)
class Context:
    """What all rows of one process run share."""

    run: str
    device: torch.device
    environment: dict[str, Any]
    repeats: int = 5

    def row(self, **values: Any) -> Row:
        """A row with the shared fields filled in; `bytes` gives the floor."""
        floor = values["bytes"] / self.environment["copy_bytes_per_second"]
        shared = {"run": self.run, "device": self.device.type, "threads": self.environment["threads"]}
        return Row(**shared, **values, floor_seconds=floor, environment=self.environment)


@dataclass(frozen=True)
class Prepared:
    """A peer with its setting chosen, its result judged and its function ready to be timed."""

    peer: SVDPeer
    run: Run
    width: int
    effort: float
    errors: list[float]
    residuals: list[float]
    seconds: float
    note: str


def prepare_svd(peer: SVDPeer, case: SVDCase, device: torch.device) -> Prepared:
    """Choose the cheapest passing setting of `peer` for `case` and run it once, timed, for its errors."""
    width, effort, note = 0, 0.0, ""
    if peer.grid:
        sample = case.sample()

        def trial(part: SVDCase) -> Callable[[int, float], Trial]:
            def run(width: int, effort: float) -> Trial:
                seconds, found = timed(peer.prepare(part, width, effort), device)
                return Trial(seconds, quantile(product_errors(part.truth, found)))

            return run

        found = cheapest_setting(peer.grid, trial(sample), trial(case), ERROR_LIMIT)
        width, effort = found.width, found.effort
        tried = f"{sum(map(len, peer.grid.values()))} settings"
        note = f"cheapest of {tried} that passes" if found.passed else f"none of {tried} reaches {ERROR_LIMIT:g}"
    if peer.slow:
        peer.prepare(case.take([0]), width, effort)()  # its one timed call shall not pay for loading the library
    function = peer.prepare(case, width, effort)
    seconds, triplets = timed(function, device)
    errors, residuals = product_errors(case.truth, triplets), relative_residuals(case.weights, triplets)
    return Prepared(peer, function, width, effort, errors, residuals, seconds, note)


def run_svd(
    case: SVDCase,
    context: Context,
    step: Step = lambda _: None,
    peers: Sequence[SVDPeer] | None = None,
    refused: Step = lambda _: None,
) -> list[Row]:
    """Rows of ours and of every usable peer on one case; `refused` is told of those that turn out not to be."""
    prepared = []
    for peer in [*OURS, *(SVD_PEERS if peers is None else peers)]:
        step(f"{case.name}: {peer.name}, {peer.variant}")
        if peer.problem(context.device) is None:
            # A library that is found may still not fit the driver, and has errors of its own.
            foreign = (Exception,) if peer.needs and peer.device == "cuda" else ()
            try:
                prepared.append(prepare_svd(peer, case, context.device))
            except (CannotRun, torch.linalg.LinAlgError, torch.OutOfMemoryError, *foreign) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                refused(f"{peer.name}, {peer.variant}, is left out of {case.name}: {reason}")
    step(f"{case.name}: timing")
    repeats = [0 if p.peer.slow else context.repeats for p in prepared]
    samples = measure_in_turn([p.run for p in prepared], repeats, context.device)
    rows = []
    for p, measured in zip(prepared, samples, strict=True):
        median, least, most, count = summary(measured or [p.seconds])
        rows.append(
            context.row(
                op="topk_svd",
                case=case.name,
                variant=p.peer.variant,
                dtype=str(case.weights[0].dtype).removeprefix("torch."),
                impl=p.peer.name,
                setting=p.peer.describe(p.width, p.effort),
                seconds=median,
                seconds_min=least,
                seconds_max=most,
                repeats=count,
                error_p90=quantile(p.errors),
                error_max=quantile(p.errors, 1.0),
                residual_p90=quantile(p.residuals),
                error_limit=ERROR_LIMIT,
                error_of=f"G = sum s^2 u v^T, k = {RANK}, relative Frobenius, {len(p.errors)} matrices, fp64 truth",
                gate=quantile(p.errors) <= ERROR_LIMIT,
                reads=p.peer.reads(p.effort),
                bytes=case.bytes,
                problem=f"{case.source}; {WARM_CHAIN if p.peer.variant == 'warm' else f'drifted twice, {DRIFT}'}",
                note=p.note,
            )
        )
    fill_speedups(rows)
    return rows


def judge_linear(
    case: LinearCase, peer: LinearPeer, backward: bool, device: torch.device
) -> tuple[Callable[[], linear_peers.Results], list[float]]:
    """The function to time and the errors of its results; the call that gives them is the warm-up."""
    tensors = case.tensors(device)
    make = linear_peers.forward_backward if backward else linear_peers.forward
    function = make(peer.make(), tensors)
    return function, linear_peers.relative_errors(peer.truth(*tensors), function())


def run_linear(
    case: LinearCase, context: Context, step: Step = lambda _: None, peers: Sequence[LinearPeer] = LINEAR_PEERS
) -> list[Row]:
    """Rows of ours and the peers on one layer shape and dtype, forward and forward + backward.

    Those of forward + backward carry the bytes that each keeps for the backward.
    """
    rows = []
    torch._dynamo.reset()  # it would stop compiling after a few shapes
    dtype = str(case.dtype).removeprefix("torch.")
    for variant in ("forward", "forward+backward"):
        backward = variant != "forward"
        step(f"{case.name}, {dtype}, {variant}")
        able = [peer for peer in peers if peer.backward or not backward]
        judged = [judge_linear(case, peer, backward, context.device) for peer in able]
        samples = measure_in_turn([f for f, _ in judged], [context.repeats] * len(judged), context.device)
        for peer, (_, errors), measured in zip(able, judged, samples, strict=True):
            traffic = {}
            if backward:
                kept = linear_peers.saved_bytes(peer.make(), case.tensors(context.device))
                traffic = {"saved_bytes": kept, "saved_per_element": kept / (case.tokens * case.in_features)}
            median, least, most, count = summary(measured)
            rows.append(
                context.row(
                    op="fake_quant_linear",
                    case=case.name,
                    variant=variant,
                    dtype=dtype,
                    impl=peer.name,
                    setting=peer.setting,
                    seconds=median,
                    seconds_min=least,
                    seconds_max=most,
                    repeats=count,
                    error_p90=quantile(errors),
                    error_max=quantile(errors, 1.0),
                    error_limit=linear_error_limit(case.dtype),
                    error_of=f"{'y, grad_x, grad_W, grad_b' if backward else 'y'}, relative Frobenius, {peer.held_to}",
                    gate=quantile(errors) <= linear_error_limit(case.dtype),
                    reads=None,
                    bytes=case.bytes(backward),
                    problem=f"W4A4, {case.tokens} tokens, {case.in_features} -> {case.out_features}, bias",
                    traffic=traffic,
                )
            )
    fill_speedups(rows)
    return rows


def judge_penalty(peer: PenaltyPeer, tensors: PenaltyTensors) -> tuple[penalty_peers.Run, list[float]]:
    """The function to time and the errors of one update; the call that gives them is the warm-up.

    The timed calls go on adding to the same gradients, which everybody shares.
    """
    tensors.restore()
    function = peer.prepare(tensors)
    function()
    return function, penalty_peers.penalty_errors(tensors)


def run_penalty(
    case: PenaltyCase, context: Context, step: Step = lambda _: None, peers: Sequence[PenaltyPeer] | None = None
) -> list[Row]:
    """Rows of every usable implementation of ours and of the peers on one model and dtype."""
    dtype = str(case.dtype).removeprefix("torch.")
    step(f"{case.name}, {dtype}")
    tensors = case.tensors(context.device)
    if peers is None:
        peers = [*penalty_peers.ours(context.device, case.dtype), *PENALTY_PEERS]
    judged = [judge_penalty(peer, tensors) for peer in peers]
    samples = measure_in_turn([f for f, _ in judged], [context.repeats] * len(judged), context.device)
    limit = penalty_peers.error_limit(case.dtype)
    rows = []
    for peer, (_, errors), measured in zip(peers, judged, samples, strict=True):
        median, least, most, count = summary(measured)
        moved = peer.moved(case)
        rows.append(
            context.row(
                op="add_penalty_grad_",
                case=case.name,
                variant=peer.variant,
                dtype=dtype,
                impl=peer.name,
                setting=peer.describe(case),
                seconds=median,
                seconds_min=least,
                seconds_max=most,
                repeats=count,
                error_p90=quantile(errors),
                error_max=quantile(errors, 1.0),
                error_limit=limit,
                error_of=f"gradient after one update, relative to the update, Frobenius, {len(errors)} layers, fp64",
                gate=quantile(errors, 1.0) <= limit,
                reads=None,
                bytes=case.bytes,
                problem=f"{case.source}, {len(case.shapes)} matrices, {case.parameters / 1e6:.1f} M elements, all "
                f"selected, k = {RANK}; gradients N(0, 1), updates of the same norm",
                traffic={
                    "moved_bytes": moved,
                    "bytes_per_second": moved / median,
                    "copy_fraction": moved / median / context.environment["copy_bytes_per_second"],
                    "extra_bytes": peer.extra(case),
                },
            )
        )
    fill_speedups(rows)
    return rows


def judge_step(
    peer: step_peers.StepPeer, tensors: step_peers.StepTensors, device: torch.device
) -> tuple[Callable[[], object], list[float], int | None]:
    """The function to time, the errors of one step, and on a GPU the most bytes held during a later one.

    The timed steps go on from there; gradients to which a penalty is added in place keep it.
    """
    tensors.restore()
    optimizer, function = peer.prepare(tensors)
    errors = step_peers.step_errors(tensors, optimizer, function, peer.penalized)
    if device.type != "cuda":
        return function, errors, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return function, errors, torch.cuda.max_memory_allocated(device) - before


def run_step(
    case: PenaltyCase,
    context: Context,
    step: Step = lambda _: None,
    peers: Sequence[step_peers.StepPeer] | None = None,
) -> list[Row]:
    """Rows of one optimizer step of all layers: plain fused AdamW, with the paper's dense G, and both forms of ours."""
    dtype = str(case.dtype).removeprefix("torch.")
    step(f"{case.name}, {dtype}")
    if peers is None:
        peers = [step_peers.PLAIN, step_peers.DENSE, *step_peers.ours(context.device)]
    tensors = step_peers.make_tensors(case, context.device)
    judged = [judge_step(peer, tensors, context.device) for peer in peers]
    samples = measure_in_turn([f for f, _, _ in judged], [context.repeats] * len(judged), context.device)
    rows = []
    for peer, (_, errors, held), measured in zip(peers, judged, samples, strict=True):
        median, least, most, count = summary(measured)
        moved, extra, limit = peer.moved(case), peer.extra(case), step_peers.error_limit(peer, case.dtype)
        # Kept from step to step, and taken during one: of the first only G is known to the allocator's counters.
        peak = 4 * case.grad_bytes + _factor_memory(case) + (extra if held is None else held + _kept(peer, case))
        rows.append(
            context.row(
                op="adamw step",
                case=case.name,
                variant=peer.variant,
                dtype=dtype,
                impl=peer.name,
                setting=peer.setting,
                seconds=median,
                seconds_min=least,
                seconds_max=most,
                repeats=count,
                error_p90=quantile(errors),
                error_max=quantile(errors, 1.0),
                error_limit=limit,
                error_of=f"p, m and v after the second step, relative Frobenius, {len(case.shapes)} layers, fp64 truth",
                gate=quantile(errors, 1.0) <= limit,
                reads=None,
                bytes=step_peers.floor_bytes(case),
                problem=f"{case.source}, {len(case.shapes)} matrices, {case.parameters / 1e6:.1f} M elements, all "
                f"selected, k = {RANK}, coupled",
                traffic={
                    "moved_bytes": moved,
                    "bytes_per_second": moved / median,
                    "copy_fraction": moved / median / context.environment["copy_bytes_per_second"],
                    "extra_bytes": extra,
                    "peak_bytes": peak,
                    "peak_is_measured": float(held is not None),
                },
            )
        )
    fill_speedups(rows)
    return rows


def _factor_memory(case: PenaltyCase) -> int:
    return case.bytes - 2 * case.grad_bytes


def _kept(peer: step_peers.StepPeer, case: PenaltyCase) -> int:
    return case.grad_bytes if peer is step_peers.DENSE else 0
