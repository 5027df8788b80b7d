"""csrc/cpu: every instruction set, memory layout and thread count; the boundary; AddressSanitizer over it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from ctypes import POINTER, c_void_p
from pathlib import Path

import pytest
import torch
from emulated import build_cpu, sanitizer_environment
from helpers import decaying_spectrum, matrix_with_spectrum, product_error
from test_native import C_TYPES

from s2d_kernels import _native, _native_cpu, add_penalty_grad_, ops, topk_svd
from s2d_kernels._native import NativeLibraryError
from s2d_kernels.svd import CONVERGED, NON_FINITE, NOT_CONVERGED, OVERFLOW, TopkSVD

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def test_every_function_of_the_header_has_its_argument_types() -> None:
    header = (ROOT / "csrc" / "cpu" / "s2d_cpu.h").read_text(encoding="utf-8")
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    prototypes = re.findall(r"^([\w ]+?\*?)\s*\b(s2d_\w+)\(([^)]*)\);", code, re.MULTILINE)
    assert {name for _, name, _ in prototypes} == set(_native_cpu.SIGNATURES)
    types = C_TYPES | {"const s2d_cpu_straight_through*": POINTER(_native_cpu.StraightThrough)}
    for result, name, arguments in prototypes:
        names = [argument.strip() for argument in arguments.split(",") if argument.strip() not in ("", "void")]
        expected = [types[re.sub(r"\s*\w+$", "", argument).strip()] for argument in names]
        assert _native_cpu.SIGNATURES[name] == (C_TYPES[result.strip()], expected), name
    assert int(re.search(r"#define S2D_CPU_ABI_VERSION (\d+)", code).group(1)) == _native_cpu.ABI_VERSION
    body = re.search(r"typedef struct s2d_cpu_straight_through \{(.*?)\}", code, re.DOTALL).group(1)
    fields = []
    for declaration in filter(None, (line.strip() for line in body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+\*?)\s+(.+)", declaration, re.DOTALL).groups()
        fields += [(name.strip(), c_void_p if kind.endswith("*") else C_TYPES[kind]) for name in names.split(",")]
    assert fields == list(_native_cpu.StraightThrough._fields_)


def problems() -> list[torch.Tensor]:
    """Both panel forms, in place and packed: rows, columns, strides, 16-bit numbers, sizes off every multiple."""
    shapes = [(300, 200), (200, 300), (37, 199), (199, 37), (1000, 333), (1, 5), (5, 1), (1, 1), (450, 144), (16, 16)]
    weights = [matrix_with_spectrum(m, n, decaying_spectrum(min(m, n), rate=0.05), seed=m + n) for m, n in shapes]
    weights += [weight.T.contiguous().T for weight in weights[:6]]
    weights += [weights[0].repeat_interleave(2, 1)[:, ::2], weights[1][3:150:2, 5:]]
    weights += [weight.to(dtype) for weight in weights[:3] for dtype in (torch.bfloat16, torch.float16)]
    return [*weights, weights[4].T.bfloat16(), (weights[0] * 1e-6).half()]  # the last one: subnormal numbers


def large_problems() -> list[torch.Tensor]:
    """From 2^22 elements on: by rows, by columns, 16-bit numbers, a last slab that is shorter, a few columns."""
    weights = []
    for seed, (m, n) in enumerate(((2100, 2050), (2050, 2100), (2304, 1840), (80000, 53))):
        generator = torch.Generator().manual_seed(seed)
        left, right = torch.randn(m, 30, generator=generator), torch.randn(30, n, generator=generator)
        weights.append((left * decaying_spectrum(30, rate=0.1).float()) @ right)
    assert all(weight.numel() >= 1 << 22 for weight in weights)
    return [weights[0], weights[0].T.contiguous().T, weights[1], weights[2].bfloat16(), weights[3]]


def ranks(weights: list[torch.Tensor]) -> list[int]:
    return [min(3, *weight.shape) for weight in weights]


CHECK = """
import sys
import torch
import test_cpu_kernels as tests
from s2d_kernels import _native_cpu, topk_svd
weights = tests.problems() + tests.large_problems()
cold = topk_svd(weights, k=tests.ranks(weights), impl="cpu")
warm = topk_svd(weights, k=tests.ranks(weights), warm=cold, seed=1, impl="cpu")
torch.save([cold, warm, _native_cpu.capability()], sys.argv[1])
"""


def run(tmp_path: Path, **environment: str) -> tuple[list[TopkSVD], list[TopkSVD], str]:
    """The problems solved in a process of its own, since a library chooses its instruction set once."""
    path = tmp_path / "results.pt"
    command = [sys.executable, "-c", CHECK, str(path)]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python_tests")))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths} | environment
    )
    assert done.returncode == 0, done.stderr
    return tuple(torch.load(path, weights_only=False))


@functools.cache
def torch_results() -> list[tuple[torch.Tensor, TopkSVD, float | None]]:
    """Each problem with the result of impl="torch" and its error; the large ones would take a full SVD too long."""
    weights = problems() + large_problems()
    theirs = topk_svd(weights, k=ranks(weights), impl="torch")
    errors = [product_error(weight, *result[:3]) for weight, result in zip(problems(), theirs, strict=False)]
    return list(zip(weights, theirs, [*errors, *[None] * len(large_problems())], strict=True))


def assert_as_accurate_as_torch(cold: list[TopkSVD], warm: list[TopkSVD]) -> None:
    for (weight, reference, error), *results in zip(torch_results(), cold, warm, strict=True):
        for got in results:
            assert got.status == reference.status
            assert error is None or product_error(weight, *got[:3]) <= 4 * error + 1e-6
            torch.testing.assert_close(got.S, reference.S, rtol=2e-6, atol=0)
            # The stated residual is the true one.
            U, S, Vh = got.U.double(), got.S.double(), got.Vh.double()
            left, right = weight.double().T @ U - Vh.T * S, weight.double() @ Vh.T - U * S
            true = (left if weight.shape[0] >= weight.shape[1] else right).norm(dim=0)
            assert (true - got.residual.double()).abs().max() <= 3e-6 * float(S[0])


@pytest.mark.parametrize("capability", ["avx512_vnni", "avx512", "avx2", "baseline"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    cold, warm, used = run(tmp_path, S2D_CPU_CAPABILITY=capability)
    order = _native_cpu.CAPABILITIES
    assert order.index(used) <= order.index(capability)  # a machine may have less
    assert_as_accurate_as_torch(cold, warm)


def test_address_sanitizer(tmp_path: Path) -> None:
    library = build_cpu("S2D_ASAN=ON", folder="cpu-asan")
    assert_as_accurate_as_torch(*run(tmp_path, S2D_CPU_LIBRARY=str(library), **sanitizer_environment())[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_penalty_is_rounded_once(dtype: torch.dtype) -> None:
    """Every rank in its own loop, rows that share no alignment, subnormal numbers, infinity and NaN."""
    zero = torch.zeros(())
    for rank, columns in ((1, 64), (2, 63), (3, 200), (4, 17), (7, 50)):
        U, S, Vh = torch.randn(33, rank), torch.rand(rank), torch.randn(rank, columns)
        factor = TopkSVD(U, S, Vh, torch.zeros(rank), zero, zero.int(), None)
        for scale in (1.0, 1e-6, 1e-39):
            storage = (torch.randn(66, columns + 3) * scale).to(dtype)
            storage[4, 4], storage[6, 5] = float("inf"), float("nan")
            grad, kept = storage[::2, 3:], storage.clone()
            exact = grad.double() + (U.double() * (S * scale).double()) @ Vh.double()
            add_penalty_grad_([grad], [factor], coefficients=[S * scale], impl="cpu")
            rounded = exact.float().to(dtype)
            good = rounded.isfinite()
            # fp32 sums of `rank` products in another order than the exact one, in steps of 2^-149 at the least
            spacing = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            limit = 0.51 * spacing + 8 * rank * (EPS * scale + 2**-149)
            assert ((grad.double() - exact).abs() <= limit)[good].all()
            assert torch.equal(grad.isfinite(), good)
            grad.copy_(kept[::2, 3:])
            assert torch.equal(storage.nan_to_num(), kept.nan_to_num())  # nothing outside the view was written


def test_the_penalty_given_bad_layers() -> None:
    U, Vh, c = torch.randn(9, 2), torch.randn(2, 5), torch.ones(2)
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype torch.float64: the kernels take"):
        torch.ops.s2d.add_penalty_grad_([torch.zeros(9, 5).double()], [U], [Vh], [c], None, "cpu")
    with pytest.raises(ValueError, match="need contiguous columns"):
        torch.ops.s2d.add_penalty_grad_([torch.zeros(5, 9).T], [U], [Vh], [c], None, "cpu")
    assert ops.choose("add_penalty_grad_", None, CPU, ([torch.zeros(9, 5)], [U], [Vh], [c], None)) == "cpu"
    assert ops.choose("add_penalty_grad_", None, CPU, ([torch.zeros(5, 9).T], [U], [Vh], [c], None)) == "torch"
    layer = _native.PenaltyLayer(rows=3, cols=3, rank=1, grad_stride=3)
    with pytest.raises(NativeLibraryError, match="status 1"):
        _native_cpu.add_penalty_grad([layer], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    weight = torch.randn(60, 50)
    plain = topk_svd([weight], k=2, impl="cpu")[0]
    torch.set_default_dtype(dtype)
    try:
        other = topk_svd([weight], k=2, impl="cpu")[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.S.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(plain.basis, other.basis, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize(("d", "rank", "k"), [(96, 24, 3), (128, 8, 3), (120, 20, 16), (300, 4, 8)])
def test_rank_deficient_matrices_converge(impl: str, d: int, rank: int, k: int) -> None:
    """The null space of Y Y^T is rounding, which no rotation makes small beside itself."""
    weight = torch.randn(d + 10, rank) @ torch.randn(rank, d)
    got = topk_svd([weight], k=k, impl=impl)[0]
    assert got.status == CONVERGED
    torch.testing.assert_close(got.S[:rank].double(), torch.linalg.svdvals(weight.double())[: min(k, rank)])


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_at_the_edge_of_the_range_nothing_overflows(impl: str) -> None:
    """2^126 times a row of Q, times a row of A: only half of the scale may come before the product."""
    column = torch.zeros(400, 401)
    column[:, 0] = 1e-38
    cold = topk_svd([column], k=4, impl=impl)[0]
    for got in (cold, topk_svd([column], k=4, warm=[cold], seed=1, impl=impl)[0]):
        assert got.S[0].item() == pytest.approx(2e-37, rel=1e-5)
        assert all(tensor.isfinite().all() for tensor in (*got.basis, got.missed))


def test_half_precision_where_subnormal_numbers_are_flushed() -> None:
    weight = (torch.randn(80, 60) * 1e-6).half()
    plain = topk_svd([weight], k=2, impl="cpu")[0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        flushed = topk_svd([weight], k=2, impl="cpu")[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain.S, flushed.S)


def test_a_start_without_a_direction_does_not_converge() -> None:
    outputs = torch.ops.s2d.topk_svd([torch.randn(40, 50)], [torch.zeros(4, 40)], [2], [3], "cpu")
    assert outputs[5] == NOT_CONVERGED


@pytest.mark.parametrize(("given", "refused"), [("", False), ("AVX2", True), ("avx2", False)])
def test_the_capability_must_be_known(given: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2D_CPU_CAPABILITY", given)
    assert (ops.problem_of("cpu", CPU) is not None) == refused


def test_bits_depend_neither_on_threads_nor_on_neighbours() -> None:
    weights = [torch.randn(shape) for shape in ((90, 130), (2100, 2050), (130, 90), (64, 64), (257, 40), (90, 130))]
    weights.append(weights[1].T.contiguous().T)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = topk_svd(weights, k=3, impl="cpu")
        alone = [topk_svd([weight], k=3, impl="cpu")[0] for weight in weights]
        torch.set_num_threads(3)
        three = topk_svd(weights[::-1], k=3, impl="cpu")[::-1]
    finally:
        torch.set_num_threads(before)
    for results in zip(one, alone, three, strict=True):
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0].basis, other.basis, strict=True))
            assert torch.equal(results[0].missed, other.missed)


@pytest.mark.parametrize("shape", [(70, 50), (50, 70)])
def test_extremes_and_broken_matrices_in_one_call(shape: tuple[int, int]) -> None:
    fine = matrix_with_spectrum(*shape, decaying_spectrum(50, rate=0.1))
    nan, infinite = fine.clone(), fine.half()
    nan[-1, -1], infinite[3, 2] = float("nan"), float("-inf")
    huge = fine / fine.abs().max() * 3e38
    results = topk_svd([fine, nan, infinite, huge, fine * 1e-38, torch.zeros(shape)], k=3, impl="cpu", reads=3)
    assert [int(result.status) for result in results[1:4]] == [NON_FINITE, NON_FINITE, OVERFLOW]
    for broken in results[1:4]:
        assert not any(tensor.any() for tensor in (*broken.basis, broken.missed))
    torch.testing.assert_close(results[4].S * 1e38, results[0].S, rtol=1e-4, atol=0)
    assert all(not tensor.any() for tensor in results[5].basis)
    assert topk_svd([fine], k=3, impl="cpu", reads=3)[0].S.equal(results[0].S)


def test_who_takes_what_when_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 goes to torch, alone; without the library everything does, and impl="cpu" says why it cannot."""
    weights = [torch.randn(40, 30), torch.randn(40, 30).double()]
    mixed = topk_svd(weights, k=2)
    for weight, got, impl in zip(weights, mixed, ("cpu", "torch"), strict=True):
        alone = topk_svd([weight], k=2, impl=impl)[0]
        assert all(torch.equal(x, y) for x, y in zip(got.basis, alone.basis, strict=True))
    with pytest.raises(TypeError, match=r"weights\[1\] has dtype torch.float64: impl='cpu' takes fp32"):
        topk_svd(weights, k=2, impl="cpu")
    monkeypatch.setenv("S2D_CPU_LIBRARY", "/nowhere/libs2d_cpu.so")
    assert ops.choose("topk_svd", None, CPU) == "torch"
    with pytest.raises(ValueError, match=r"no native library at /nowhere/libs2d_cpu.so: .*make cpu"):
        topk_svd(weights[:1], k=2, impl="cpu")


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_bad_starts_are_refused(impl: str) -> None:
    weight = torch.randn(20, 9)
    for start, k in ((torch.randn(4, 8), 2), (torch.randn(4, 9).double(), 2), (torch.randn(4, 9), 5)):
        with pytest.raises(ValueError, match=r"starts\[0\].* does not fit weights\[0\]"):
            torch.ops.s2d.topk_svd([weight], [start], [k], [3], impl)
    with pytest.raises(ValueError, match=r"reads\[0\]=1 of 4 rows find k=4 triplets and nothing to bound"):
        torch.ops.s2d.topk_svd([weight], [torch.randn(4, 9)], [4], [1], impl)
    torch.ops.s2d.topk_svd([weight], [torch.eye(9)], [9], [1], impl)  # nothing is left that could be missed
    torch.library.opcheck(torch.ops.s2d.topk_svd.default, ([weight], [torch.randn(4, 9)], [2], [2], "cpu"))


def test_the_library_refuses_what_it_cannot_work_with() -> None:
    good = torch.randn(20, 9)
    outputs = [torch.empty(20, 4), torch.empty(4), torch.empty(4, 9), torch.empty(4), torch.empty(()), torch.empty(())]
    start = torch.randn(4, 9)
    fields = [good.data_ptr(), start.data_ptr(), *(tensor.data_ptr() for tensor in outputs), 20, 9, 9, 1, 0, 4, 2, 2]
    layer = _native_cpu.SvdLayer(*fields)
    run = _native_cpu.SvdRun([layer], 1)
    memory = ops.aligned_bytes(run.workspace_bytes(), CPU)
    run(2e-4, 1e-3, memory.data_ptr(), memory.numel())
    start_of, bytes_of = memory.data_ptr(), memory.numel()
    for address, size in ((start_of + 8, bytes_of), (start_of, bytes_of - 1), (0, bytes_of)):
        with pytest.raises(NativeLibraryError, match="status 2"):
            run(2e-4, 1e-3, address, size)
    for name, value in (("width", 10), ("k", 5), ("k", 0), ("reads", 0), ("dtype", 3), ("rows", 0), ("weight", None)):
        broken = _native_cpu.SvdLayer(*fields)
        setattr(broken, name, value)
        run = _native_cpu.SvdRun([broken], 1)
        assert run.workspace_bytes() == 0
        with pytest.raises(NativeLibraryError, match="status 1"):
            run(2e-4, 1e-3, memory.data_ptr(), memory.numel())


def test_the_workspace_of_a_large_matrix_stays_small() -> None:
    """Whatever k: the slabs' sums take 128 MB at most beside the blocks of Q, Y and Z."""
    weight = torch.empty(4096, 4096)
    outputs = [torch.empty(1)] * 6
    for width, reads in ((8, 4), (512, 7)):
        fields = [weight.data_ptr(), weight.data_ptr(), *(tensor.data_ptr() for tensor in outputs)]
        layer = _native_cpu.SvdLayer(*fields, 4096, 4096, 4096, 1, 0, width, 3, reads)
        needed = _native_cpu.SvdRun([layer], 2).workspace_bytes()
        total = width * reads
        assert 0 < needed < 3 * 4096 * total * 4 + 6 * total**2 * 8 + 8 * 4096 * width * 4 + 2**27 + 2**24


FORK = """
import os
import torch
from s2d_kernels import topk_svd
torch.set_num_threads(2)
weights = [torch.randn(300, 200), torch.randn(200, 300), torch.randn(2100, 2050)]
torch.randn(512, 512) @ torch.randn(512, 512)  # OpenMP's threads exist
before = topk_svd(weights, k=2, impl="cpu")
child = os.fork()
if child == 0:
    after = topk_svd(weights, k=2, impl="cpu")
    os._exit(not all(torch.equal(a.S, b.S) for a, b in zip(before, after)))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform without fork")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
