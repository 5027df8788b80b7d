"""The CPU emulation of CUDA itself, its detection of errors, and s2d_add_penalty_grad through its C ABI."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_char_p, c_int, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import build_emulated, sanitizer_environment
from torch import Tensor

from s2d_kernels._native import PenaltyLayer

OK, BAD_ARGUMENT, LAUNCH_FAILED = 0, 1, 4
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "random-2": (2, 2)}
THREADS = 128
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The last tests run this file again on other builds.
BUILDS = {"emulated": (), "asan": ("S2D_ASAN=ON",), "ucontext": ("S2D_UCONTEXT=ON",)}
FOLDER = os.environ.get("S2D_EMULATED_FOLDER", "emulated")


def build() -> Path:
    return build_emulated(*BUILDS[FOLDER], folder=FOLDER)


class Emulated:
    """A library, called with tensors for pointers."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.s2d_emulation_error.restype = c_char_p
        self.library.s2d_emulation_set_order.argtypes = [c_int, c_uint64]

    def order(self, name: str) -> None:
        assert self.library.s2d_emulation_set_order(*ORDERS[name]) == OK

    def error(self) -> str:
        return self.library.s2d_emulation_error().decode()

    def call(self, name: str, *arguments: Any) -> int:
        converted = [c_void_p(a.data_ptr()) if isinstance(a, Tensor) else c_int(a) for a in arguments]
        return getattr(self.library, f"s2d_test_{name}")(*converted, c_void_p())

    def run(self, name: str, *arguments: Any) -> None:
        status = self.call(name, *arguments)
        assert status == OK, self.error()

    def refused(self, name: str, *arguments: Any) -> str:
        assert self.call(name, *arguments) == LAUNCH_FAILED
        error = self.error()
        assert error
        assert self.error() == ""
        return error


@pytest.fixture(scope="module")
def library() -> Emulated:
    return Emulated(build() / "libs2d_emulated.so")


@pytest.fixture(scope="module")
def kernels() -> Emulated:
    return Emulated(build() / "libs2d_emulated_test_kernels.so")


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, library: Emulated, kernels: Emulated) -> Iterator[str]:
    for built in (library, kernels):
        built.order(request.param)
    yield request.param
    for built in (library, kernels):
        built.order("forward")


def test_reductions(kernels: Emulated, order: str) -> None:
    x = torch.randn(3, THREADS)
    sums, maxima = torch.empty_like(x), torch.empty_like(x)
    kernels.run("reductions", x, sums, maxima, 3)
    assert torch.equal(maxima, x.amax(1, keepdim=True).expand_as(x))
    assert torch.equal(sums, sums[:, :1].expand_as(x))
    torch.testing.assert_close(sums[:, 0], x.double().sum(1).float())
    kernels.order("forward")
    again = torch.empty_like(x)
    kernels.run("reductions", x, again, maxima, 3)
    assert torch.equal(sums, again)


@pytest.mark.parametrize("threads", [32, 96])
def test_shuffles_and_votes(kernels: Emulated, order: str, threads: int) -> None:
    x = torch.randint(0, 41, (threads,), dtype=torch.int32)
    out = torch.empty(10, threads, dtype=torch.int32)
    kernels.run("shuffles", x, out, threads)
    i = torch.arange(threads)
    warp, lane, odd = i // 32 * 32, i % 32, x % 2
    ballot = [int(sum(int(odd[w + b]) << b for b in range(32))) for w in warp.tolist()]
    expected = [
        x[warp + 7],
        x[i // 8 * 8 + 3],
        x[i ^ 5],
        x[torch.where(lane >= 3, i - 3, i)],
        x[torch.where(i % 16 + 4 < 16, i + 4, i)],
        torch.tensor([b - (1 << 32) if b >> 31 else b for b in ballot], dtype=torch.int32),
        torch.stack([(x[w : w + 32] == 5).any() for w in warp.tolist()]).int(),
        torch.stack([(x[w : w + 32] < 40).all() for w in warp.tolist()]).int(),
        x[i ^ 1],
        odd.sum().int().expand(threads),
    ]
    assert torch.equal(out, torch.stack(expected))


def test_atomics(kernels: Emulated, order: str) -> None:
    x = torch.randint(-1000, 1000, (777,), dtype=torch.int32)
    histogram, extremes = torch.empty(16, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    kernels.run("atomics", x, len(x), histogram, extremes)
    assert torch.equal(histogram, torch.bincount(x % 16, minlength=16).int())
    union = int(np.bitwise_or.reduce(x.numpy()))
    assert extremes.tolist() == [int(x.max()), int(x.min()), union, 1, 1]


def test_conversions_round_as_torch_does(kernels: Emulated) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (40000,), generator=generator)
    # Every exponent with mantissas at and beside the ties of both formats.
    mantissas = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FF000, 0x7FFFFF])
    ties = (torch.arange(512)[:, None] << 23 | mantissas).flatten()
    # The bytes of an int64's lower half are those of an int32 on every machine this runs on.
    x = torch.cat([bits, ties]).view(torch.int32)[::2].contiguous().view(torch.float32)
    to_bf16, to_fp16 = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.float16)
    from_fp16 = torch.empty_like(x)
    kernels.run("conversions", x, len(x), to_bf16, to_fp16, from_fp16)
    for got, expected in ((to_bf16, x.bfloat16()), (to_fp16, x.half()), (from_fp16, x.half().float())):
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan)
        integer = torch.int32 if got.dtype == torch.float32 else torch.int16
        assert torch.equal(got.view(integer)[~nan], expected.view(integer)[~nan])


def tf32(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kind", ["tf32", "bf16", "s8", "s4"])
def test_tensor_core_products(kernels: Emulated, order: str, kind: str) -> None:
    index = ["tf32", "bf16", "s8", "s4"].index(kind)
    K = 8 << index
    if kind in ("tf32", "bf16"):
        A, B, D = torch.randn(16, K), torch.randn(K, 8), torch.randn(16, 8)
        operands = (A, B) if kind == "tf32" else (A.bfloat16(), B.bfloat16())
        rounded = (tf32(A), tf32(B)) if kind == "tf32" else operands
        expected = (D.double() + rounded[0].double() @ rounded[1].double()).float()
        got = D.clone()
        kernels.run("mma", index, *operands, got)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    else:
        limit = 128 if kind == "s8" else 8
        A, B = (torch.randint(-limit, limit, shape, dtype=torch.int8) for shape in ((16, K), (K, 8)))
        got = torch.randint(-(2**31), 2**31, (16, 8)).int()
        got[0, 0] = 2**31 - 1
        exact = got.long() + A.long() @ B.long()
        kernels.run("mma", index, A, B, got)
        assert torch.equal(got, exact.int())  # wraps


def test_async_copies(kernels: Emulated, order: str) -> None:
    x = torch.randn(8 * THREADS - 12)
    out = torch.empty(8 * THREADS)
    kernels.run("staged_copy", x, out, len(x), 1)
    stages = torch.cat([x, torch.zeros(12)]).view(2, -1)
    assert torch.equal(out, stages.flip(1).flatten())
    kernels.run("staged_copy", x, out, len(x), 0)
    assert out.isnan().all(), "a copy that is not waited for must not have arrived"


def test_grid_sync(kernels: Emulated, order: str) -> None:
    blocks = 7
    x = torch.randn(blocks, THREADS)
    parts, totals, barrier = torch.empty(blocks), torch.empty(blocks), torch.zeros(1, dtype=torch.int32)
    kernels.run("grid_totals", x, parts, totals, barrier, blocks, 1)
    torch.testing.assert_close(totals, x.double().sum().float().expand(blocks))
    assert torch.equal(totals, totals[:1].expand(blocks))
    assert "not cooperative" in kernels.refused("grid_totals", x, parts, totals, barrier, blocks, 0)


def test_team_sync(kernels: Emulated, order: str) -> None:
    """Teams of 3, 3 and 1 block, over and over; without the barrier, sums of what is not there yet."""
    blocks, size, rounds = 7, 3, 4
    x = torch.randn(blocks, THREADS)
    parts, totals = torch.full((blocks,), float("nan")), torch.empty(blocks)
    kernels.run("team_totals", x, parts, totals, torch.zeros(3, dtype=torch.int32), blocks, size, rounds, 1)
    for first in range(0, blocks, size):
        team = x[first : first + size]
        truth = team.double().sum() + len(team) * (rounds - 1)
        torch.testing.assert_close(totals[first : first + size], truth.float().expand(len(team)))
    wrong = torch.full((blocks,), float("nan"))
    kernels.run("team_totals", x, wrong, totals, torch.zeros(3, dtype=torch.int32), blocks, size, 1, 0)
    if not order.startswith("random"):
        assert totals.isnan().sum() == 4  # two of each team of three: only the last to run finds all parts
    error = kernels.refused("team_waits", torch.zeros(1, dtype=torch.int32), 3)
    assert "no running block" in error


def test_a_cooperative_launch_must_fit_the_device(kernels: Emulated) -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    set_multiprocessors = kernels.library.s2d_emulation_set_multiprocessors
    before = set_multiprocessors(3)
    try:
        kernels.run("cooperative", counter, 3, 200 * 1024)  # one on each
        kernels.run("cooperative", counter, 6, 100 * 1024)
        for blocks, shared in ((4, 200 * 1024), (7, 100 * 1024), (49, 0)):
            assert f"a cooperative grid of {blocks} blocks" in kernels.refused("cooperative", counter, blocks, shared)
    finally:
        assert set_multiprocessors(before) == 3


def test_a_missing_barrier_is_seen(kernels: Emulated) -> None:
    x = torch.randn(THREADS)
    for name in ("reversed", "rotated"):
        good: list[Tensor] = []
        bad: list[Tensor] = []
        for order in ORDERS:
            kernels.order(order)
            for barrier, results in ((1, good), (0, bad)):
                out = torch.empty(THREADS)
                kernels.run(name, x, out, barrier)
                results.append(out)
        assert all(torch.equal(out, good[0]) for out in good)
        assert all(not torch.equal(out, good[0]) for out in bad)
        if name == "reversed":
            assert torch.equal(good[0], x.flip(0))
            assert all(out.isnan().any() for out in bad)
    kernels.order("forward")


@pytest.mark.parametrize("dynamic", [0, 1])
@pytest.mark.parametrize("index", [THREADS, THREADS + 900, -1])
def test_an_out_of_bounds_shared_write_is_reported(kernels: Emulated, order: str, dynamic: int, index: int) -> None:
    out = torch.empty(THREADS)
    kernels.run("shared_write", THREADS - 1, dynamic, out)
    assert out[-1] == 2
    error = kernels.refused("shared_write", index, dynamic, out)
    assert f"out-of-bounds write to {'dynamic' if dynamic else 'static'} shared memory in block (0,0,0)" in error
    assert f"byte {4 * index} of {4 * THREADS}" in error


def test_an_out_of_bounds_shared_read_gives_nan(kernels: Emulated) -> None:
    out = torch.empty(THREADS)
    kernels.run("shared_read", 1, out)
    assert out[-1].isnan()
    assert not out[:-1].isnan().any()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, r"127 wait at __syncthreads \(.*kernels.cu:\d+\), 1 have exited"),
        (1, "divergent threads: waits at __syncthreads"),
        (2, "wait for different operations"),
        (3, "no bit of the caller"),
        (4, "misaligned"),
    ],
)
def test_divergence_is_reported(kernels: Emulated, order: str, kind: int, message: str) -> None:
    assert re.search(message, kernels.refused("divergent", kind, torch.empty(THREADS)))
    test_reductions(kernels, order)


def test_waiting_for_a_block_that_never_runs_is_reported(kernels: Emulated, order: str) -> None:
    kernels.run("spinning", torch.zeros(1, dtype=torch.int32), 3, 1)
    kernels.order("forward")
    assert "no running block" in kernels.refused("spinning", torch.zeros(1, dtype=torch.int32), 3, 0)


def test_launch_limits(kernels: Emulated) -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    kernels.run("launch", counter, 32, 32, 2, 227 * 1024)
    assert counter.item() == 2 * 1024 * 1025 // 2
    assert "block of (33,32,1)" in kernels.refused("launch", counter, 33, 32, 1, 0)
    assert "grid of (0,1,1)" in kernels.refused("launch", counter, 32, 1, 0, 0)
    assert "dynamic shared memory" in kernels.refused("launch", counter, 32, 1, 1, 227 * 1024 + 1)
    assert kernels.library.s2d_emulation_set_order(3, 0) == BAD_ARGUMENT


def test_launches_from_several_threads_take_turns(kernels: Emulated) -> None:
    inputs = [torch.randn(5, THREADS) for _ in range(8)]

    def totals(x: Tensor) -> Tensor:
        sums, maxima = torch.empty_like(x), torch.empty_like(x)
        for _ in range(5):
            kernels.run("reductions", x, sums, maxima, 5)
        return sums

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(totals, inputs))
    assert all(torch.equal(got, totals(x)) for got, x in zip(together, inputs, strict=True))


def test_a_missing_compiler_is_an_error_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"need a C\+\+ compiler and CMake: apt install g\+\+.*pip install cmake"):
        build_emulated("S2D_NEVER=ON", folder="never")


class Case:
    """One layer in memory that shows every write outside the gradient."""

    def __init__(
        self,
        rows: int,
        cols: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        *,
        pad: int = 0,
        offset: int = 0,
        vh_offset: int = 0,
        column_major: bool = False,
        device_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.cols, self.rank, self.dtype, self.stride = rows, cols, rank, dtype, cols + pad
        # Fresh allocations are aligned to 64 bytes, so `offset` elements decide the alignment.
        self.memory = torch.randn(rows * self.stride + offset + 8, generator=generator).to(dtype)
        self.before = self.memory.clone()
        self.offset = offset
        shape = (rank + 1, rows) if column_major else (rows, rank + 1)
        U = torch.randn(shape, generator=generator)
        self.U = U.T if column_major else U
        # A start off alignment only counts where the stride is aligned.
        vh_stride = cols + pad if vh_offset == 0 else (cols + vh_offset + 3) // 4 * 4
        padded = torch.randn(rank + 1, vh_stride, generator=generator)
        self.Vh = padded[:, vh_offset : vh_offset + cols]
        self.coefficients = torch.randn(rank + 1, generator=generator)
        # What must not count: the component after the last, and what lies around Vh.
        for operand in (
            self.U[:, rank:],
            padded[rank:],
            padded[:, :vh_offset],
            padded[:, vh_offset + cols :],
            self.coefficients[rank:],
        ):
            operand.fill_(float("nan"))
        self.device_rank = None if device_rank is None else torch.tensor([device_rank], dtype=torch.int32)

    def view(self, memory: Tensor) -> Tensor:
        return memory[self.offset :].as_strided((self.rows, self.cols), (self.stride, 1), self.offset)

    def layer(self) -> PenaltyLayer:
        return PenaltyLayer(
            grad=self.memory.data_ptr() + self.offset * self.memory.element_size(),
            U=self.U.data_ptr(),
            Vh=self.Vh.data_ptr(),
            coefficients=self.coefficients.data_ptr(),
            device_rank=None if self.device_rank is None else self.device_rank.data_ptr(),
            rows=self.rows,
            cols=self.cols,
            grad_stride=self.stride,
            u_row_stride=self.U.stride(0),
            u_col_stride=self.U.stride(1),
            vh_stride=self.Vh.stride(0),
            rank=self.rank,
            dtype=DTYPES.index(self.dtype),
        )

    def check(self) -> None:
        rank = self.rank if self.device_rank is None else max(0, min(self.rank, int(self.device_rank)))
        U, Vh = self.U[:, :rank].double().numpy(), self.Vh[:rank].double().numpy()
        c = self.coefficients[:rank].double().numpy()
        grad = self.view(self.before).double().numpy()
        truth = grad + (U * c) @ Vh
        # fp32 sums of `rank` products and the last addition, then half a unit in the last place of the gradient's type.
        magnitude = np.abs(grad) + (np.abs(U) * np.abs(c)) @ np.abs(Vh)
        bound = (rank + 2) * 2**-24 * magnitude + torch.finfo(self.dtype).eps / 2 * np.abs(truth) + 1e-7
        got = self.view(self.memory).double().numpy()
        assert (np.abs(got - truth) <= bound).all()
        if rank == 0:
            assert torch.equal(self.memory, self.before)
        outside = self.memory.clone()
        self.view(outside).copy_(self.view(self.before))
        assert torch.equal(outside, self.before), "written outside the gradient"


def add(library: Emulated, cases: list[Case]) -> int:
    layers = (PenaltyLayer * len(cases))(*(case.layer() for case in cases))
    return library.library.s2d_add_penalty_grad(layers, len(cases), None, ctypes.c_size_t(0), None)


def make_cases() -> list[Case]:
    shapes = [(1, 1, 1), (1, 199, 3), (37, 1, 1), (37, 63, 5), (63, 199, 3), (199, 37, 16), (63, 264, 17), (5, 272, 64)]
    cases: list[Case] = []
    for dtype in DTYPES:
        for i, (rows, cols, rank) in enumerate(shapes):
            for pad, offset, vh_offset in (
                (0, 0, 0),
                (-cols % 8, 0, 0),
                (-cols % 8, 0, 1),
                (3, 1, 1),
                (-cols % 8, 4, 2),
            ):
                case = Case(
                    rows,
                    cols,
                    rank,
                    dtype,
                    pad=pad,
                    offset=offset,
                    vh_offset=vh_offset,
                    column_major=i % 2 == 1,
                    seed=len(cases),
                )
                cases.append(case)
    for device_rank in (-1, 0, 2, 9):
        cases.append(Case(37, 64, 3, torch.bfloat16, device_rank=device_rank))
    cases += [Case(37, 63, 0), Case(0, 63, 3), Case(37, 0, 3)]
    return cases


def test_penalty_grad(library: Emulated, order: str) -> None:
    cases = make_cases()
    assert add(library, cases) == OK, library.error()
    for case in cases:
        case.check()


def test_penalty_grad_has_the_same_bits_in_every_order_alone_and_aligned_or_not(library: Emulated) -> None:
    results = []
    for order in (*ORDERS, "forward"):
        library.order(order)
        cases = make_cases()
        assert add(library, cases) == OK, library.error()
        results.append(cases)
    library.order("forward")
    alone = make_cases()
    for case in alone:
        assert add(library, [case]) == OK, library.error()
    for cases in (*results[1:], alone):
        for case, first in zip(cases, results[0], strict=True):
            assert torch.equal(case.memory, first.memory)

    aligned, shifted = Case(63, 200, 5, torch.bfloat16), Case(63, 200, 5, torch.bfloat16, pad=3, offset=1)
    shifted.view(shifted.memory).copy_(aligned.view(aligned.memory))
    shifted.U, shifted.Vh, shifted.coefficients = aligned.U, aligned.Vh, aligned.coefficients
    assert add(library, [aligned, shifted]) == OK
    assert torch.equal(aligned.view(aligned.memory), shifted.view(shifted.memory))


def test_penalty_grad_of_more_layers_than_one_launch_takes(library: Emulated) -> None:
    cases = [Case(3, 5 + i % 7, 1 + i % 3, DTYPES[i % 3], seed=i) for i in range(650)]
    assert add(library, cases) == OK, library.error()
    for case in cases:
        case.check()


def test_penalty_grad_keeps_a_nan_layer_to_itself(library: Emulated) -> None:
    cases = [Case(37, 63, 2, seed=i) for i in range(3)]
    cases[1].U.fill_(float("nan"))
    assert add(library, cases) == OK
    assert torch.equal(cases[1].memory, cases[1].before)  # not one number of it is usable
    cases[0].check()
    cases[2].check()


@pytest.mark.parametrize("far", ["grad", "U", "Vh"])
def test_penalty_grad_with_offsets_beyond_32_bits(library: Emulated, far: str) -> None:
    """Rows so far apart that the last tiles begin beyond 2^31 elements; of the address space only those are touched."""
    case = Case(70, 40, 3, torch.float32)
    layer = case.layer()
    matrix = {"grad": case.view(case.memory), "U": case.U, "Vh": case.Vh}[far]
    stride = 2**31 // (len(matrix) - 1) // 8 * 8 + 8
    memory = np.memmap("/dev/zero", dtype=np.float32, mode="c", shape=(stride * (len(matrix) - 1) + 64,))
    view = torch.from_numpy(memory).as_strided(matrix.shape, (stride, 1))
    view.copy_(matrix)
    setattr(layer, far, memory.ctypes.data)
    setattr(layer, {"grad": "grad_stride", "U": "u_row_stride", "Vh": "vh_stride"}[far], stride)
    if far == "U":
        layer.u_col_stride = 1
    assert library.library.s2d_add_penalty_grad(ctypes.byref(layer), 1, None, ctypes.c_size_t(0), None) == OK
    if far == "grad":
        matrix.copy_(view)
    case.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, -1) for name in ("rows", "cols", "rank", "dtype")],
        *[(name, None) for name in ("grad", "U", "Vh", "coefficients")],
        *[(name, 1) for name in ("grad", "U", "Vh", "coefficients", "device_rank")],
        ("rank", 65),
        ("dtype", 3),
        ("grad_stride", 62),
        ("grad_stride", -62),
        ("rows", 2**62),
    ],
)
def test_penalty_grad_refuses_bad_arguments_before_writing(library: Emulated, name: str, value: Any) -> None:
    good, bad = Case(37, 63, 2), Case(37, 63, 2)
    layers = (PenaltyLayer * 2)(good.layer(), bad.layer())
    setattr(layers[1], name, value)
    assert library.library.s2d_add_penalty_grad(layers, 2, None, ctypes.c_size_t(0), None) == BAD_ARGUMENT
    for case in (good, bad):
        assert torch.equal(case.memory, case.before)


def test_penalty_grad_without_layers(library: Emulated) -> None:
    native = library.library.s2d_add_penalty_grad
    assert native(None, 0, None, ctypes.c_size_t(0), None) == OK
    assert native(None, 1, None, ctypes.c_size_t(0), None) == BAD_ARGUMENT
    assert native((PenaltyLayer * 1)(), -1, None, ctypes.c_size_t(0), None) == BAD_ARGUMENT


def run_python(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}", **environment},
    )


def test_address_sanitizer_finds_nothing_in_these_tests() -> None:
    build_emulated(*BUILDS["asan"], folder="asan")
    done = run_python(
        # -s: the report goes to stderr as the process ends. Out-of-bounds accesses end it and have the test below.
        ["-m", "pytest", "-qs", "-k", "not sanitizer and not ucontext and not out_of_bounds", "test_emulation.py"],
        S2D_EMULATED_FOLDER="asan",
        **sanitizer_environment(),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


SHARED_ACCESS = """
from test_emulation import *
kernels = Emulated(build() / "libs2d_emulated_test_kernels.so")
for dynamic in (0, 1):
    kernels.run("shared_write", 127, dynamic, torch.empty(128))
print("in bounds", flush=True)
kernels.call({arguments}, torch.empty(128))
"""

GRADIENT_ACCESS = """
from test_emulation import *
library = Emulated(build() / "libs2d_emulated.so")
case = Case(5, 40, 1)
layer = case.layer()
print("in bounds", flush=True)
layer.rows = 64
library.library.s2d_add_penalty_grad(ctypes.byref(layer), 1, None, ctypes.c_size_t(0), None)
"""


@pytest.mark.parametrize(
    ("code", "report"),
    [
        (SHARED_ACCESS.format(arguments="'shared_write', 128, 0"), "use-after-poison"),
        (SHARED_ACCESS.format(arguments="'shared_write', -1, 1"), "use-after-poison"),
        (SHARED_ACCESS.format(arguments="'shared_read', 1"), "use-after-poison"),
        (GRADIENT_ACCESS, "heap-buffer-overflow"),
    ],
)
def test_address_sanitizer_reports_the_line(code: str, report: str) -> None:
    build_emulated(*BUILDS["asan"], folder="asan")
    done = run_python(["-c", code], S2D_EMULATED_FOLDER="asan", **sanitizer_environment())
    assert done.stdout == "in bounds\n", done.stderr
    assert f"AddressSanitizer: {report}" in done.stderr
    assert ".cu:" in done.stderr


def test_ucontext_does_the_same() -> None:
    build_emulated(*BUILDS["ucontext"], folder="ucontext")
    tests = "reductions or shuffles or missing_barrier or divergence or (penalty_grad and order)"
    done = run_python(
        ["-m", "pytest", "-q", "-k", f"({tests}) and not ucontext and not sanitizer", "test_emulation.py"],
        S2D_EMULATED_FOLDER="ucontext",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
