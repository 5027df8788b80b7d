"""csrc/cpu/rows.h with every instruction set: the loops of `add_penalty_grad_` and `adamw_` on a CPU.

A library chooses its instruction set once, so the functions that begin with `check_` run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_optim
import test_penalty_contract
import test_stochastic_rounding
import torch
from emulated import build_cpu, sanitizer_environment
from torch import Tensor, nn

from s2d_kernels import SpectralAdamW, _native, _native_cpu, ops
from s2d_kernels._native import NativeLibraryError
from s2d_kernels.optim import Penalty

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NUMBERS = [0.01, 0.9, 0.99, 1e-8, 0.1, 0.0]


def adamw(
    tensors: list[Tensor],
    factors: tuple[Tensor, Tensor, Tensor],
    *,
    decoupled: bool = False,
    clip: Tensor | None = None,
) -> list[Tensor]:
    """p, m and v after the second step, new tensors."""
    p, g, m, v = tensors
    p, m, v = (t.clone() for t in (p, m, v))
    step, (U, Vh, c) = torch.tensor(2.0), factors
    torch.ops.s2d.adamw_(
        [p], [g], [m], [v], [step], [U], [Vh], [c], None, [0], NUMBERS, None, clip, None, None, decoupled, False, "cpu"
    )
    return [p, m, v]


def problem(dtype: torch.dtype, rows: int, cols: int, rank: int) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    p, g, m, v = (torch.randn(rows, cols).to(dtype) for _ in range(4))
    return [p, g, m, v.abs()], (torch.randn(rows, rank), torch.randn(rank, cols), 0.1 * torch.rand(rank))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN being NaN."""
    bits, nan = BITS[one.dtype], one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(one[~nan].view(bits), other[~nan].view(bits))


def check_the_contracts() -> None:
    for module in (test_optim, test_penalty_contract, test_stochastic_rounding):
        for name, run in module.RUNS.items():
            if name != "run_operator_checks":  # of the schema
                run("cpu", CPU)


def check_every_16_bit_number_is_read_and_rounded_as_torch_does() -> None:
    """As a gradient, and as what a sum is rounded to; 23 columns are a vector and a rest with each instruction set."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = torch.cat([every, every[: -(-len(every) // 23) * 23 - len(every)]]).view(-1, 23)
    rows, columns = every.shape
    one = torch.ones(1)
    for dtype in (torch.bfloat16, torch.float16):
        number = every.view(dtype)
        grad = number.clone()
        torch.ops.s2d.add_penalty_grad_([grad], [torch.ones(rows, 1)], [torch.zeros(1, columns)], [one], None, "cpu")
        assert torch.equal(grad.view(torch.int16), every)  # a sum of 0: also the bits of NaN stay
        for value in (1.0, -3e-6):
            U, Vh = torch.full((rows, 1), value), torch.ones(1, columns)
            torch.ops.s2d.add_penalty_grad_([grad], [U], [Vh], [one], None, "cpu")
            assert same_bits(grad, (number.float() + value).to(dtype)), (dtype, value)
            grad.copy_(number)
        # Sums at, below and above the middle of two neighbours, to the largest, and of every sign.
        wide = number.float().nan_to_num(0.0)
        above = torch.nextafter(number.view(torch.int16).add(1).view(dtype).float(), torch.tensor(0.0)).nan_to_num(0.0)
        for sums in (wide, (wide + above) / 2, torch.nextafter((wide + above) / 2, wide), above, wide * 1.0001):
            sums = sums.reshape(-1, 1)
            grad = torch.zeros(len(sums), 17, dtype=dtype)
            torch.ops.s2d.add_penalty_grad_([grad], [sums], [torch.ones(1, 17)], [one], None, "cpu")
            usable = sums.isfinite() & (sums != 0)
            expected = torch.where(usable, sums, 0.0).to(dtype).repeat(1, 17)
            assert same_bits(grad, expected), dtype
        # Read and rounded by a step that changes nothing but the moments: m = 0.9 m + 0.1 g.
        zero = torch.zeros_like(number)
        nothing = torch.ones(rows, 0), torch.ones(0, columns), torch.ones(0)
        m = adamw([zero, number, zero, zero], nothing)[1]
        assert same_bits(m, (torch.tensor(1 - 0.9) * number.float() + 0.0).to(dtype)), dtype


def check_the_bits_of_a_row_depend_on_nothing_else() -> None:
    """Not on threads, on rows beside it, on what lies between rows, nor on how a tensor without a penalty is cut."""
    for dtype in BITS:
        for rank in (0, 1, 2, 3, 4, 7):
            tensors, (U, Vh, c) = problem(dtype, 70, 1003, rank)
            for decoupled in (False, True):
                torch.set_num_threads(1)
                whole = adamw(tensors, (U, Vh, c), decoupled=decoupled)
                torch.set_num_threads(3)
                assert all(map(same_bits, whole, adamw(tensors, (U, Vh, c), decoupled=decoupled)))
                torch.set_num_threads(1)
                part = [t[5:9, 100:217] for t in tensors]
                strided = adamw(
                    [t.repeat(1, 2)[:, :117] for t in part], (U[5:9], Vh[:, 100:217], c), decoupled=decoupled
                )
                for got, expected in zip(strided, whole, strict=True):
                    assert same_bits(got.contiguous(), expected[5:9, 100:217].contiguous()), (dtype, rank)


def check_accuracy_for_many_components() -> None:
    for dtype, decoupled in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        for rank in (5, 64):
            (p, g, m, v), (U, Vh, c) = problem(dtype, 9, 131, rank)
            got = adamw([p, g, m, v], (U, Vh, c), decoupled=decoupled)
            p, g, m, v = (t.double() for t in (p, g, m, v))
            penalty = (U.double() * c.double()) @ Vh.double()
            if not decoupled:
                g = g + penalty
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            p = p * (1 - 0.01 * 0.1) - 0.01 / (1 - 0.9**2) * m / ((v / (1 - 0.99**2)).sqrt() + 1e-8)
            for mine, truth in zip(got, (p + penalty if decoupled else p, m, v), strict=True):
                # sums of `rank` products in fp32, and the one rounding
                limit = (torch.finfo(dtype).eps / 2 + rank * 6e-8) * truth.abs().max()
                assert (mine.double() - truth).abs().max() <= limit, (dtype, rank)


def check_a_gradient_that_is_nan_or_infinite_stays_alone() -> None:
    for dtype in BITS:
        tensors, factors = problem(dtype, 3, 70, 2)
        for decoupled in (False, True):
            expected = adamw(tensors, factors, decoupled=decoupled)
            for place in ((0, 5), (1, 69)):
                for value in (float("nan"), float("inf")):
                    g = tensors[1].clone()
                    g[place] = value
                    got = adamw([tensors[0], g, *tensors[2:]], factors, decoupled=decoupled)
                    assert not got[1][place].isfinite()
                    for mine, other in zip(got, expected, strict=True):
                        mine[place] = other[place]
                        assert same_bits(mine, other), (dtype, place)


def check_nan_of_any_payload_stays_nan() -> None:
    """All of whose bits are set: a rounding would carry into the sign."""
    clip = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for dtype in BITS:
        tensors, factors = problem(dtype, 2, 37, 1)
        assert all(t.isnan().all() for t in adamw(tensors, factors, clip=clip)), dtype


CHECKS = {name: value for name, value in dict(globals()).items() if name.startswith("check_")}


def run_checks(**environment: str) -> str:
    """All of them in one process; the instruction set that it used."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, __file__], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("capability", _native_cpu.CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    used = run_checks(S2D_CPU_CAPABILITY=capability)
    order = _native_cpu.CAPABILITIES
    assert order.index(used) <= order.index(capability)  # a machine may have less


def test_address_sanitizer() -> None:
    library = build_cpu("S2D_ASAN=ON", folder="cpu-asan")
    run_checks(S2D_CPU_LIBRARY=str(library), **sanitizer_environment())


def test_a_step_is_taken_by_the_kernels_where_they_take_its_tensors() -> None:
    def chosen(dtype: torch.dtype = torch.float32, *, transposed: bool = False, rank: int = 1) -> str:
        p = torch.zeros(5, 9, dtype=dtype)
        some = [[p.T if transposed else p] for _ in range(4)]
        rows, cols = some[0][0].shape
        factors = [torch.zeros(rows, rank)], [torch.zeros(rank, cols)], [torch.zeros(rank)]
        return ops.choose("adamw_", None, CPU, (*some, [torch.ones(())], *factors))

    assert chosen() == chosen(torch.bfloat16) == chosen(torch.float16) == "cpu"
    assert chosen(torch.float64) == chosen(transposed=True) == chosen(rank=_native.MAX_RANK + 1) == "torch"


def test_without_the_library_torch_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(impl: str | None) -> Tensor:
        p = nn.Parameter(torch.ones(6, 5))
        optimizer = SpectralAdamW([p], 0.1, impl=impl)
        optimizer.set_penalties([Penalty(p, 0, None, torch.ones(6, 1), torch.ones(1, 5), torch.ones(1))])
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        return p.detach()

    here = trained(None)
    assert torch.equal(here, trained("cpu"))
    monkeypatch.setenv("S2D_CPU_LIBRARY", "/nowhere/libs2d_cpu.so")
    torch.testing.assert_close(trained(None), here)
    with pytest.raises(ValueError, match=r"no native library at /nowhere/libs2d_cpu.so: .*make cpu"):
        trained("cpu")


def test_what_does_not_fit_is_refused() -> None:
    tensors, factors = problem(torch.float32, 5, 9, 2)
    with pytest.raises(
        ValueError, match=r"params\[0\] and grads\[0\] have strides .* the kernels need contiguous columns"
    ):
        adamw([t.T.contiguous().T for t in tensors], factors)
    with pytest.raises(TypeError, match=r"params\[0\] has dtype torch.float64"):
        adamw([t.double() for t in tensors], factors)
    with pytest.raises(ValueError, match=r"params\[0\] gets 65 components: the kernels take 64"):
        adamw(tensors, problem(torch.float32, 5, 9, 65)[1])
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has stride"):
        adamw([tensors[0], tensors[1], tensors[2].T.contiguous().T, tensors[3]], factors)


def test_the_library_refuses_a_table_that_it_cannot_work_with() -> None:
    p, g, m, v = problem(torch.float32, 5, 9, 0)[0]
    step = torch.ones(())
    fields = {
        "param": p.data_ptr(),
        "grad": g.data_ptr(),
        "exp_avg": m.data_ptr(),
        "exp_avg_sq": v.data_ptr(),
        "step": step.data_ptr(),
        "rows": 5,
        "cols": 9,
        "param_stride": 9,
        "grad_stride": 9,
    }
    group, options = _native.AdamWGroup(None, *NUMBERS[:5], 0), _native.AdamWOptions()
    kept = p.clone()
    for wrong in (
        {"param": None}, {"grad": g.data_ptr() + 2}, {"step": None}, {"rank": 1}, {"rank": 65}, {"dtype": 3},
        {"group": 1}, {"group": -1}, {"rows": -1}, {"param_stride": 8},
    ):  # fmt: skip
        with pytest.raises(NativeLibraryError, match="status 1"):
            _native_cpu.adamw([_native.AdamWLayer(**fields | wrong)], [group], options, 1)
    assert torch.equal(p, kept)
    _native_cpu.adamw([_native.AdamWLayer(**fields | {"rows": 0, "param": None})], [group], options, 1)
    _native_cpu.adamw([_native.AdamWLayer(**fields)], [group], options, 1)
    assert not torch.equal(p, kept)


if __name__ == "__main__":
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        print(name, flush=True)
        check()
    print(_native_cpu.capability())
