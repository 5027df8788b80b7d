"""SpectralAdamW: the composition (clip, add_penalty_grad_, torch.optim.AdamW) in one pass, on every implementation.

Triton is interpreted in processes of their own, as in test_triton.py: the functions that begin with `run_` take an
implementation and a device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import build_emulated
from interpreting import Done, save_time
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2d_kernels import S2D, SpectralAdamW
from s2d_kernels.adamw import ADDRESS_TABLES
from s2d_kernels.optim import Penalty
from s2d_kernels.penalty import LowRank, added

ROOT = Path(__file__).parent.parent
# The learning rate and the clipping coefficient are numbers of fp32.
LR, BETAS, EPS, DECAY = 2.0**-7, (0.9, 0.99), 1e-8, 0.1
CLIP = 19 / 64
# Rows and rank of each penalty, by the parameter's position.
SHAPES = [(7,), (37, 63), (24, 128), (3, 4, 5, 6), (), (18, 200), (1, 9), (19, 5)]
PENALIZED = {1: [(0, 37, 2)], 2: [(2, 10, 3), (10, 24, 1)], 3: [(0, 3, 2)], 5: [(0, 18, 5)], 6: [(0, 1, 1)]}
# error(ours) <= 2 error(torch's composition) + a rounding of the largest element a step: the composition rounds a
# penalized gradient or weight once more, but a value where its errors cancel must not decide.
FACTOR = 2.0
CASES: dict[str, dict[str, Any]] = {
    "coupled": {"mode": "coupled"},
    "clipped gradient, maximize": {"mode": "coupled", "clip": CLIP, "maximize": True},
    "clipped sum, scaled": {"mode": "coupled", "clip": CLIP, "clip_penalty": True, "grad_scale": 1024.0},
    "decoupled, tensor lr": {"mode": "decoupled", "tensor_lr": True},
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` as a view with the strides of `layout`."""
    if layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "rows" and values.ndim == 2:
        storage = torch.full((2 * values.shape[0], values.shape[1] + 8), float("nan")).to(values)
        view = storage[::2, 4 : values.shape[1] + 4]
        view.copy_(values)
        return view
    if layout == "transposed" and values.ndim == 2:
        return values.T.contiguous().T
    if layout == "gaps" and values.ndim == 2:
        view = values.new_full((values.shape[0], 2 * values.shape[1]), float("nan"))[:, ::2]
        view.copy_(values)
        return view
    return values.clone()


class Problem:
    """Parameters, their gradients of each step and penalties, in fp64, from which each run takes its own copies."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, steps: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).double().to(device)

        self.device = device
        self.start = [random(*shape) for shape in SHAPES]
        self.grads = [[random(*shape) for shape in SHAPES] for _ in range(steps)]
        self.penalties = []
        for place, blocks in PENALIZED.items():
            n = self.start[place][0].numel()
            for first, last, rank in blocks:
                U, Vh = random(rank + 1, last - first).T[:, :rank], random(rank + 1, n)[:rank]
                self.penalties.append((place, first, last, U, Vh, 0.1 * random(rank)))

    def composition(self, dtype: torch.dtype, case: dict[str, Any], *, penalized: bool = True) -> list[list[Tensor]]:
        """p, m and v of every parameter after plain AdamW with the penalties added by hand; fp64 is the truth."""
        params = [nn.Parameter(p.to(dtype, copy=True)) for p in self.start]
        optimizer = torch.optim.AdamW(params, LR, BETAS, EPS, DECAY, fused=True)
        scale, clip = case.get("grad_scale", 1.0), case.get("clip", 1.0)

        def add(tensors: list[Tensor], factor: float) -> None:
            for place, first, last, U, Vh, c in self.penalties if penalized else []:
                rows = tensors[place].view(len(tensors[place]), -1)[first:last]
                sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
                left = (U * c * factor).to(sum_dtype)
                rows.copy_(added(rows, LowRank(left, Vh.to(sum_dtype), True)))

        for grads in self.grads:
            for p, g in zip(params, grads, strict=True):
                p.grad = ((g * scale).to(dtype) / scale * (-clip if case.get("maximize") else clip)).to(dtype)
            if case["mode"] == "coupled":
                add([p.grad for p in params], clip if case.get("clip_penalty") else 1.0)
            optimizer.step()
            if case["mode"] == "decoupled":
                add([p.detach() for p in params], 1.0)
        return [[p.detach(), *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))] for p in params]

    def run(
        self,
        dtype: torch.dtype,
        case: dict[str, Any],
        impl: str,
        *,
        layout: str = "contiguous",
        coefficients: float | None = 1.0,
    ) -> list[list[Tensor]]:
        """p, m and v of every parameter after SpectralAdamW."""
        params = [nn.Parameter(laid_out(p.to(dtype), layout)) for p in self.start]
        lr = torch.tensor(LR, device=self.device) if case.get("tensor_lr") else LR
        optimizer = SpectralAdamW(
            [{"params": params[:4]}, {"params": params[4:]}],
            lr,
            BETAS,
            EPS,
            DECAY,
            maximize=case.get("maximize", False),
            impl=impl,
        )
        if coefficients is not None:
            found = [
                Penalty(params[i], first, last, *(t.to(torch.float64 if dtype == torch.float64 else torch.float32)
                        for t in (U, Vh, c * coefficients)))
                for i, first, last, U, Vh, c in self.penalties
            ]  # fmt: skip
            optimizer.set_penalties(found, mode=case["mode"])
        clip = torch.tensor(case["clip"], device=self.device) if "clip" in case else None
        for grads in self.grads:
            scale = case.get("grad_scale")
            for p, g in zip(params, grads, strict=True):
                p.grad = laid_out((g * (scale or 1.0)).to(dtype), layout)
            before = [p.grad.clone() for p in params]
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale, device=self.device)
                optimizer.found_inf = torch.tensor(0.0, device=self.device)
            optimizer.step(clip_coef=clip, clip_penalty=case.get("clip_penalty", False))
            assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True)), "a gradient was changed"
        assert all(optimizer.state[p]["step"] == len(self.grads) for p in params)
        return [[p.detach(), *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))] for p in params]


def run_composition(impl: str, device: torch.device) -> None:
    slow = impl == "triton" and device.type == "cpu"
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (impl in ("torch", "reference"))
    for dtype in dtypes:
        layouts = ["contiguous", "channels_last", "rows", "transposed", "gaps"]
        for place, (name, case) in enumerate(CASES.items()):
            if slow and dtype != torch.float32 and place != dtypes.index(dtype):
                continue  # the interpreter's minutes: all cases in fp32, one in each other dtype
            steps = (2 if place == 0 else 1) if slow else 3
            problem = Problem(dtype, device, steps=steps, seed=place)
            truth = problem.composition(torch.float64, case)
            theirs = problem.composition(dtype, case)
            layout = layouts[(place + dtypes.index(dtype)) % len(layouts)]
            ours = problem.run(dtype, case, impl, layout=layout)
            # In fp64 the truth itself is rounded, on the way to m at the size of the gradient.
            unit = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 0.5)
            for index, columns in enumerate(zip(ours, theirs, truth, strict=True)):
                for what, mine, other, exact in zip("pmv", *columns, strict=True):
                    error, limit = ((t.double() - exact).abs().max() for t in (mine, other))
                    limit = FACTOR * limit + len(problem.grads) * unit * exact.abs().max()
                    assert error <= limit, (dtype, name, layout, SHAPES[index], what, float(error), float(limit))


def run_zero_penalty_changes_no_bit(impl: str, device: torch.device) -> None:
    """Coefficients of 0, and sums that are not finite, leave the bits of plain AdamW of the same implementation."""
    for dtype, mode in ((torch.float32, "coupled"), (torch.bfloat16, "decoupled, tensor lr")):
        problem, case = Problem(dtype, device, steps=1), CASES[mode]
        for g in problem.grads[0]:
            g.view(-1)[::3] = -0.0
        plain = problem.run(dtype, case, impl, coefficients=None)
        for coefficients in (0.0, float("nan"), float("inf")):
            got = problem.run(dtype, case, impl, coefficients=coefficients)
            for ours, expected in zip(got, plain, strict=True):
                for a, b in zip(ours, expected, strict=True):
                    assert torch.equal(a, b)
                    assert torch.equal(a.signbit(), b.signbit())


def run_groups_mixed_dtypes_and_missing_gradients(impl: str, device: torch.device) -> None:
    """Ten groups of their own numbers, two dtypes, a parameter without a gradient: each as in an optimizer alone."""

    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(5, 7, device=device).to([torch.float32, torch.bfloat16][i % 2]))
                for i in range(10)]  # fmt: skip

    numbers = [{"lr": 1e-3 * (i + 1), "betas": (0.5 + 0.04 * i, 0.9), "weight_decay": 0.1 * i} for i in range(10)]
    together = parameters()
    optimizer = SpectralAdamW([{"params": [p], **n} for p, n in zip(together, numbers, strict=True)], impl=impl)
    alone = parameters()
    others = [SpectralAdamW([p], **n, impl=impl) for p, n in zip(alone, numbers, strict=True)]
    for step in range(2):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = q.grad = None if (i, step) == (3, 0) else torch.full_like(p, 0.1 * i - 0.5)
        optimizer.step()
        for other in others:
            other.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))
    assert optimizer.state[together[3]]["step"] == 1
    assert not torch.equal(together[3], parameters()[3])


def run_found_inf_changes_nothing(impl: str, device: torch.device) -> None:
    params = [nn.Parameter(torch.randn(9, 33, device=device)) for _ in range(2)]
    optimizer = SpectralAdamW(params, impl=impl)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    U, Vh, c = torch.ones(9, 1, device=device), torch.ones(1, 33, device=device), torch.ones(1, device=device)
    for mode in ("coupled", "decoupled"):
        optimizer.set_penalties([Penalty(params[0], 0, None, U, Vh, c)], mode=mode)
        kept = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        optimizer.grad_scale = torch.tensor(2.0, device=device)
        optimizer.found_inf = torch.tensor(1.0, device=device)
        optimizer.step()
        now = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
        assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
        optimizer.found_inf.zero_()
        optimizer.step()
        assert not torch.equal(params[0], kept[0])


def run_operator_checks(impl: str, device: torch.device) -> None:
    def tensors(*shape: int) -> list[Tensor]:
        return [torch.rand(shape, device=device), torch.rand(3, 2, device=device)]

    steps = [torch.ones((), device=device) for _ in range(2)]
    arguments = (
        *(tensors(6, 5) for _ in range(4)), steps,
        [torch.rand(6, 2, device=device), torch.rand(3, 0, device=device)],
        [torch.rand(2, 5, device=device), torch.rand(0, 2, device=device)],
        [torch.rand(2, device=device), torch.rand(0, device=device)],
        torch.tensor([1, 0], dtype=torch.int32, device=device), [0, 0], [1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0],
        None, None, None, None, False, False, impl,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.s2d.adamw_.default, arguments)
    kept = arguments[0][0].clone()
    torch.ops.s2d.adamw_(*arguments)
    assert not torch.equal(arguments[0][0], kept)


def run_ranks_on_the_device(impl: str, device: torch.device) -> None:
    """Of three components the first `rank` count."""

    def step(count: int, rank: int | None) -> Tensor:
        torch.manual_seed(0)
        tensors = [[torch.rand(6, 5, device=device)] for _ in range(4)]
        U, Vh, c = (torch.rand(shape, device=device) for shape in ((6, 3), (3, 5), (3,)))
        ranks = None if rank is None else torch.tensor([rank], dtype=torch.int32, device=device)
        torch.ops.s2d.adamw_(
            *tensors, [torch.ones((), device=device)], [U[:, :count]], [Vh[:count]], [c[:count]], ranks, [0],
            [1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0], None, None, None, None, True, False, impl,
        )  # fmt: skip
        return tensors[0][0]

    for rank in (0, 1, 2, 3):
        torch.testing.assert_close(step(3, rank), step(rank, None), rtol=1e-6, atol=0)
    assert not torch.equal(step(3, 1), step(3, 2))


def clip_in_both_orders(
    impl: str, device: torch.device, dtype: torch.dtype, scale: float | None, maximize: bool
) -> None:
    problem = Problem(dtype, device, steps=1)

    def steps() -> tuple[list[nn.Parameter], SpectralAdamW]:
        params = [nn.Parameter(laid_out(p.to(dtype), "channels_last")) for p in problem.start]
        optimizer = SpectralAdamW(params, LR, maximize=maximize, impl=impl)
        optimizer.set_penalties(
            [Penalty(params[i], a, b, U.float(), Vh.float(), c.float()) for i, a, b, U, Vh, c in problem.penalties]
        )
        for p, g in zip(params, problem.grads[0], strict=True):
            p.grad = laid_out((g * (scale or 1.0)).to(dtype), "channels_last")
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
        return params, optimizer

    with_penalty = [(-1 if maximize else 1) * g.clone() for g in problem.grads[0]]
    for place, first, last, U, Vh, c in problem.penalties:
        rows = with_penalty[place].view(len(with_penalty[place]), -1)[first:last]
        rows += (U * c) @ Vh
    for clip_penalty, grads in ((False, problem.grads[0]), (True, with_penalty)):
        truth = torch.stack([g.norm() for g in grads]).norm()
        for max_norm in (0.25 * float(truth), 4 * float(truth)):
            params, optimizer = steps()
            kept = [p.grad.clone() for p in params]
            optimizer.step(max_norm=max_norm, clip_penalty=clip_penalty)
            assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))
            torch.testing.assert_close(optimizer.total_norm, truth.float(), rtol=3e-6, atol=0)
            expected, by_hand = steps()
            coefficient = min(max_norm / (float(optimizer.total_norm) + 1e-6), 1.0)
            clip_coef = torch.tensor(coefficient, device=device)
            by_hand.step(clip_coef=clip_coef, clip_penalty=clip_penalty)
            for p, q in zip(params, expected, strict=True):
                torch.testing.assert_close(optimizer.state[p]["exp_avg"], by_hand.state[q]["exp_avg"])
    assert float(torch.stack([g.norm() for g in problem.grads[0]]).norm()) != float(truth)


def run_clipping_in_both_orders(impl: str, device: torch.device) -> None:
    """By a norm without the penalty and with it, of scaled gradients too, against fp64 and the same number by hand."""
    clip_in_both_orders(impl, device, torch.float32, None, maximize=False)
    if impl != "triton" or device.type != "cpu":  # the interpreter's minutes
        clip_in_both_orders(impl, device, torch.bfloat16, 64.0, maximize=True)


RUNS: dict[str, Callable[[str, torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    build_emulated()
    monkeypatch.delenv("S2D_LIBRARY", raising=False)
    monkeypatch.setenv("S2D_NATIVE", "emulated")


@pytest.mark.parametrize("impl", ["torch", "reference", "cpu"])
@pytest.mark.parametrize("name", list(RUNS))
def test_torch(name: str, impl: str, device: torch.device) -> None:
    RUNS[name](impl, device)


@pytest.mark.parametrize("name", list(RUNS))
def test_emulated(name: str, emulated: None) -> None:
    RUNS[name]("cuda", torch.device("cpu"))


def test_the_table_of_addresses_is_kept_while_no_address_changes(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marshal, launch = ADDRESS_TABLES["cuda"]
    made = []
    monkeypatch.setitem(ADDRESS_TABLES, "cuda", (lambda *lists: made.append(1) or marshal(*lists), launch))
    params = [nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(3))]
    optimizer = SpectralAdamW(params, 0.1, weight_decay=0.0, impl="cuda")
    U, Vh, c = torch.ones(6, 1), torch.ones(1, 5), torch.zeros(1)
    optimizer.set_penalties([Penalty(params[0], 0, None, U, Vh, c)])
    grads = [[torch.full_like(p, value) for p in params] for value in (1.0, -1.0)]

    def step(turn: int) -> list[float]:
        """Where the first moments are afterwards: 0.9 m + 0.1 g."""
        for p, g in zip(params, grads[turn], strict=True):
            p.grad = g
        optimizer.step()
        return [round(optimizer.state[p]["exp_avg"].unique().item(), 5) for p in params]

    assert step(0) == [0.1, 0.1]
    assert step(0) == [0.19, 0.19]
    assert len(made) == 1
    assert step(1) == [0.071, 0.071]  # other gradients
    assert len(made) == 2
    c.fill_(10.0)  # in place: read on the device
    assert step(1) == [round(0.9 * 0.071 + 0.9, 5), round(0.9 * 0.071 - 0.1, 5)]
    assert len(made) == 2
    optimizer.param_groups[0]["betas"] = (0.0, 0.999)
    optimizer.set_penalties([])
    assert step(1) == [-1.0, -1.0]
    assert len(made) == 3
    optimizer.set_penalties([Penalty(params[0], 0, None, U.double(), Vh, c)])  # to be converted at each step
    assert step(1) == [9.0, -1.0]
    assert step(1) == [9.0, -1.0]
    assert len(made) == 5


@pytest.mark.interpreted(*RUNS)
def test_interpreted(interpreted: Done) -> None:
    """All in one process: most of its time is the import."""
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.sanitize
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("name", list(RUNS))
def test_on_the_gpu(name: str, impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    RUNS[name](impl, device)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_in_a_cuda_graph(impl: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")

    def trained(replayed: bool) -> Tensor:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(70, 130, device=device))
        lr = torch.tensor(1e-2, device=device)
        optimizer = SpectralAdamW([param], lr, capturable=True, impl=impl)
        U, Vh, c = (torch.rand(shape, device=device) for shape in ((70, 2), (2, 130), (2,)))
        optimizer.set_penalties([Penalty(param, 0, None, U, Vh, c)])
        param.grad = torch.randn_like(param)
        optimizer.step()  # state, loaded kernels and tables
        step: Callable[[], Any] = optimizer.step
        if replayed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for factor in (1.0, 0.5, 0.25):
            lr.mul_(factor)
            c.mul_(factor)  # read when the graph is replayed
            step()
        return param.detach()

    assert torch.equal(trained(True), trained(False))


# --- the optimizer around it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=["default", "fused", "for loop"])
def test_state_passes_to_and_from_adamw(options: dict[str, Any]) -> None:
    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3))]

    def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int) -> None:
        for step in range(first, first + 3):
            for p in params:
                p.grad = torch.cos(step + p.detach())
            optimizer.step()

    def make(ours: bool, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return SpectralAdamW(params, LR) if ours else torch.optim.AdamW(params, LR, **options)

    expected = parameters()
    one = make(False, expected)
    steps(one, expected, 0)
    steps(one, expected, 3)
    for ours_first in (True, False):
        params = parameters()
        first = make(ours_first, params)
        steps(first, params, 0)
        second = make(not ours_first, params)
        state = first.state_dict()
        assert {frozenset(s) for s in state["state"].values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}
        second.load_state_dict(state)
        steps(second, params, 3)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)
            assert second.state[p]["step"] == 6


def test_what_is_not_supported_is_refused() -> None:
    p = nn.Parameter(torch.randn(6, 5))
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        SpectralAdamW([p], amsgrad=True)
    with pytest.raises(ValueError, match="impl='numpy' is none of"):
        SpectralAdamW([p], impl="numpy")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SpectralAdamW([p], lr=-1.0)
    other = torch.optim.AdamW([p], amsgrad=True)
    p.grad = torch.ones_like(p)
    other.step()
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        SpectralAdamW([p]).load_state_dict(other.state_dict())
    vector, number = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(()))
    optimizer = SpectralAdamW([p, vector, number])
    U, Vh, c = torch.ones(6, 2), torch.ones(2, 5), torch.ones(2)
    good = Penalty(p, 0, None, U, Vh, c)
    for wrong, message in (
        ([good._replace(parameter=nn.Parameter(torch.ones(6, 5)))], r"penalties\[0\].parameter .* is not this"),
        ([good._replace(parameter=vector)], r"penalties\[0\].parameter of shape \(5,\) is no matrix"),
        ([good._replace(parameter=number)], r"penalties\[0\].parameter of shape \(\) is no matrix"),
        ([good._replace(stop=7)], r"penalties\[0\] has rows 0:7, the parameter 6"),
        ([good._replace(U=U[:5])], r"penalties\[0\] has U \(5, 2\)"),
        ([good._replace(Vh=Vh.to("meta"))], r"penalties\[0\].Vh is on meta, expected cpu"),
        ([good, good._replace(start=5, U=U[:1])], r"penalties\[1\] has rows 5:6, of which some have"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.set_penalties(wrong)
    with pytest.raises(TypeError, match=r"penalties\[0\].coefficients has dtype torch.int64"):
        optimizer.set_penalties([good._replace(coefficients=c.long())])
    with pytest.raises(ValueError, match="mode='both'"):
        optimizer.set_penalties([good], mode="both")
    with pytest.raises(TypeError, match="clip_coef must be a torch.Tensor, got float"):
        optimizer.step(clip_coef=0.5)
    with pytest.raises(ValueError, match=r"clip_coef has shape \(2,\): pass one number"):
        optimizer.step(clip_coef=torch.ones(2))
    assert not optimizer.state
    complex_parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_parameter.grad = torch.ones_like(complex_parameter)
    with pytest.raises((TypeError, RuntimeError), match="complex|floating point"):
        SpectralAdamW([complex_parameter]).step()


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_a_penalty_of_no_rows_changes_nothing(impl: str) -> None:
    """Also behind one that begins at the same row."""
    weights = []
    for spans in ([(3, 8)], [(3, 8), (3, 3)], [(3, 3), (3, 8)], [(3, 8), (8, 8)]):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(12, 5))
        param.grad = torch.randn(12, 5)
        U, Vh, c = torch.randn(12, 2), torch.randn(2, 5), torch.rand(2)
        optimizer = SpectralAdamW([param], LR, impl=impl)
        optimizer.set_penalties([Penalty(param, start, stop, U[start:stop], Vh, c) for start, stop in spans])
        optimizer.step()
        weights.append(param.detach())
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_a_norm_to_clip_by() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = SpectralAdamW([p], 0.1)
    optimizer.step(max_norm=1.0)  # no gradient, nothing to do
    assert optimizer.total_norm is None
    p.grad = torch.full_like(p, float("inf"))
    for arguments in ({"max_norm": 0.0}, {"max_norm": float("nan")}, {"max_norm": 1.0, "clip_coef": torch.ones(())}):
        with pytest.raises(ValueError, match=r"max_norm=.* with clip_coef=.*: pass one of them"):
            optimizer.step(**arguments)
    assert not optimizer.state
    p.grad = torch.full_like(p, 2.0)
    optimizer.step(max_norm=float("inf"))
    assert optimizer.total_norm.item() == pytest.approx(2 * 12**0.5)
    assert optimizer.state[p]["exp_avg"].unique().item() == pytest.approx(0.2)  # measured, not clipped


@pytest.mark.parametrize("clip_penalty", [False, True])
def test_with_s2d_clipping_equals_the_calls_by_hand(clip_penalty: bool) -> None:
    def trained(fused: bool) -> tuple[list[Tensor], list[float]]:
        model, v = spiked()
        reg = S2D(model, mode="coupled", strength=1e-2, interval=4, lead=2, threshold=0.8)
        params = list(model.parameters())
        optimizer = (
            SpectralAdamW(params, 1e-2, regularizer=reg) if fused else torch.optim.AdamW(params, 1e-2, fused=True)
        )
        norms = []
        for step in range(7):
            x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)) + 3 * v
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            if fused:
                optimizer.step(max_norm=0.1, clip_penalty=clip_penalty)
                norms.append(float(optimizer.total_norm))
                continue
            if clip_penalty:
                reg.add_grad()
            norms.append(float(nn.utils.clip_grad_norm_(params, 0.1)))
            if not clip_penalty:
                reg.add_grad()
            optimizer.step()
        assert any(report.k_target for report in reg.layers)
        reg.close()
        return [p.detach() for p in params], norms

    (ours, norms), (theirs, expected) = trained(True), trained(False)
    assert norms == pytest.approx(expected, rel=1e-3)
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 1e-4 * 7 * 1e-2  # of what seven steps move at most


class Operations(TorchDispatchMode):
    """What ran: the operation, and the elements of its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func), args[0].numel() if args and isinstance(args[0], Tensor) else 0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_a_dense_layout_is_taken_as_it_lies(layout: str) -> None:
    """Nothing but a factor is copied, and no other implementation is asked for the whole dtype."""
    shape = (6, 5) if layout == "transposed" else (4, 3, 2, 2)
    params = [nn.Parameter(laid_out(torch.randn(shape), layout)) for _ in range(2)]
    penalized = nn.Parameter(laid_out(torch.randn(shape), layout))
    optimizer = SpectralAdamW([*params, penalized, nn.Parameter(torch.randn(7, 3))], 0.1, impl="cpu")
    factors = torch.randn(2, 1), torch.randn(1, params[0][0].numel()), torch.ones(1)
    optimizer.set_penalties([Penalty(penalized, 1, 3, *factors)])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    of_a_factor = max(factor.numel() for factor in factors)
    assert of_a_factor < params[0].numel()
    for name, count in operations.seen:
        assert "_fused" not in name
        assert count <= of_a_factor or not ("clone" in name or "copy" in name), (name, count)


def test_closure_hooks_and_scheduler() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = SpectralAdamW([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 16.0
    schedule.step()
    assert called == [1]
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert (p < 1).all()


# --- with S2D -----------------------------------------------------------------------------------------------------


def spiked(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    v = torch.randn(24)
    v /= v.norm()
    with torch.no_grad():
        u = torch.randn(40)
        model[0].weight += 20 * torch.outer(u / u.norm(), v)
    return model, v


def trained(
    mode: str, *, fused: bool, steps: int = 9, clip: float | None = None, **options: Any
) -> tuple[nn.Module, S2D]:
    model, v = spiked()
    strength = {"coupled": 1e-2, "decoupled": 0.5}[mode]
    reg = S2D(model, mode=mode, strength=strength, interval=4, lead=2, threshold=0.8, **options)
    if fused:
        optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), 1e-2, regularizer=reg)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 24, generator=generator) + 3 * v
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        coefficient = None if clip is None else torch.tensor(clip)
        if fused:
            optimizer.step(clip_coef=coefficient)
            continue
        if coefficient is not None:
            for p in model.parameters():
                p.grad.mul_(coefficient)
        if mode == "coupled":
            reg.add_grad()
        optimizer.step()
        if mode == "decoupled":
            reg.decay_(1e-2)
    return model, reg


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_with_s2d_it_equals_the_calls_by_hand(mode: str, clip: float | None) -> None:
    apart, by_hand = trained(mode, fused=False, clip=clip)
    together, reg = trained(mode, fused=True, clip=clip)
    assert reg.step == by_hand.step == 9
    assert [r.k_target for r in reg.layers] == [r.k_target for r in by_hand.layers]
    assert reg.layers[0].k_target > 0
    plain, other = trained(mode, fused=False, steps=9)[0], spiked()[0]
    for ours, expected, start in zip(together.parameters(), apart.parameters(), other.parameters(), strict=True):
        assert (expected - start).abs().max() > 0.01 * expected.abs().max()
        # 9 steps round p, some numbers before it in another order
        assert (ours - expected).abs().max() <= 9 * torch.finfo(torch.float32).eps * expected.abs().max()
    if clip is not None:
        assert not torch.allclose(plain[0].weight, together[0].weight, rtol=1e-5)
    reg.close()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_with_s2d_no_bit_depends_on_timing(mode: str) -> None:
    one, other = (trained(mode, fused=True, asynchronous=asynchronous)[0] for asynchronous in (True, False))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_with_s2d_a_capture_that_stays_in_the_graph_changes_no_bit(mode: str, fused: bool) -> None:
    (one, reg), (other, graph_reg) = (trained(mode, fused=fused, capture=kind) for kind in ("hooks", "graph"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert reg.layers == graph_reg.layers
    assert other[0]._forward_hooks
    graph_reg.close()
    assert not other[0]._forward_hooks


def test_the_penalty_is_applied_exactly_once(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = spiked()
    reg = S2D(model, mode="coupled")
    optimizer = SpectralAdamW(model.parameters(), regularizer=reg)
    assert "divides the penalty by the gradient's own size" in caplog.text
    with pytest.raises(ValueError, match="add_grad: attached to an optimizer"):
        reg.add_grad()
    with pytest.raises(ValueError, match="attach: attached"):
        reg.attach(optimizer)
    with pytest.raises(ValueError, match="SpectralAdamW: attached"):
        SpectralAdamW(model.parameters(), regularizer=reg)
    with pytest.raises(ValueError, match="has a regularizer"):
        optimizer.set_penalties([])
    with pytest.raises(ValueError, match="holds none of the 2 penalized matrices"):
        SpectralAdamW([nn.Parameter(torch.ones(2))], regularizer=S2D(model))
    reg.detach()
    assert optimizer.regularizer is None
    model(torch.randn(2, 24)).sum().backward()
    optimizer.step()
    assert reg.step == 0
    reg.add_grad()
    assert reg.step == 1


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_that_the_scaler_skips_does_not_count(mode: str) -> None:
    model, v = spiked()
    reg = S2D(model, mode=mode, strength=0.5, interval=4, lead=0)
    optimizer = SpectralAdamW(model.parameters(), 1e-2, regularizer=reg)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 24) + 3 * v).square().mean()).backward()
        kept = [p.detach().clone() for p in model.parameters()]
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True)]
        assert changed == [step != 1] * 4
    assert reg.step == 2
    assert optimizer.state[model[0].weight]["step"] == 2
    reg.close()


if __name__ == "__main__":
    save_time()
    for run in sys.argv[1:]:
        torch.manual_seed(0)
        print(run, flush=True)
        RUNS[run]("triton", torch.device("cpu"))
