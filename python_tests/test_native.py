"""The native boundary without a GPU: header and argument types, exports, diagnosis, marshalling from torch and CuPy."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emulated import build_emulated, cmake

from bench import audit
from s2d_kernels import _native, add_penalty_grad_, cupy_ops, ops, topk_svd

ROOT = Path(__file__).parent.parent
HEADER = (ROOT / "csrc" / "s2d.h").read_text(encoding="utf-8")
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)

C_TYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "const char*": ctypes.c_char_p,
    "void*": ctypes.c_void_p,
    "const float*": ctypes.c_void_p,
    "const int32_t*": ctypes.c_void_p,
    "const int64_t*": ctypes.c_void_p,
    "s2d_stream": ctypes.c_void_p,
    "float*": ctypes.c_void_p,
    "int32_t*": ctypes.c_void_p,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "const void*": ctypes.c_void_p,
    "const s2d_penalty_layer*": ctypes.POINTER(_native.PenaltyLayer),
    "const s2d_svd_layer*": ctypes.POINTER(_native.SvdLayer),
    "int8_t*": ctypes.c_void_p,
    "uint8_t*": ctypes.c_void_p,
    "const int8_t*": ctypes.c_void_p,
    "const s2d_quantization*": ctypes.POINTER(_native.Quantization),
    "const s2d_integer_product*": ctypes.POINTER(_native.IntegerProduct),
    "const uint8_t*": ctypes.c_void_p,
    "int64_t*": ctypes.c_void_p,
    "const s2d_capture_call*": ctypes.POINTER(_native.CaptureCall),
    "const s2d_adamw_layer*": ctypes.POINTER(_native.AdamWLayer),
    "const s2d_adamw_group*": ctypes.POINTER(_native.AdamWGroup),
    "const s2d_adamw_options*": ctypes.POINTER(_native.AdamWOptions),
}


def test_every_function_of_the_header_has_its_argument_types() -> None:
    prototypes = re.findall(r"^([\w ]+?\*?)\s*\b(s2d_\w+)\(([^)]*)\);", CODE, re.MULTILINE)
    assert {name for _, name, _ in prototypes} == set(_native.SIGNATURES)
    for result, name, arguments in prototypes:
        names = [argument.strip() for argument in arguments.split(",") if argument.strip() not in ("", "void")]
        types = [C_TYPES[re.sub(r"\s*\w+$", "", argument).strip()] for argument in names]
        assert _native.SIGNATURES[name] == (C_TYPES[result.strip()], types), name


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("penalty_layer", _native.PenaltyLayer),
        ("svd_layer", _native.SvdLayer),
        ("quantization", _native.Quantization),
        ("integer_product", _native.IntegerProduct),
        ("adamw_layer", _native.AdamWLayer),
        ("adamw_group", _native.AdamWGroup),
        ("adamw_options", _native.AdamWOptions),
        ("capture_call", _native.CaptureCall),
    ],
)
def test_the_structs_match_field_for_field(name: str, struct: type[ctypes.Structure]) -> None:
    body = re.search(rf"typedef struct s2d_{name} \{{(.*?)\}}", CODE, re.DOTALL).group(1)
    fields = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind, names = re.match(r"((?:const )?\w+\*?)\s*(.*)", declaration, re.DOTALL).groups()
        fields += [(name.strip(), C_TYPES[kind]) for name in names.split(",")]
    assert fields == list(struct._fields_)


def test_constants() -> None:
    assert int(re.search(r"#define S2D_ABI_VERSION (\d+)", CODE).group(1)) == _native.ABI_VERSION
    assert int(re.search(r"#define S2D_MAX_RANK (\d+)", CODE).group(1)) == _native.MAX_RANK
    assert int(re.search(r"#define S2D_MAX_GROUPS (\d+)", CODE).group(1)) == _native.MAX_GROUPS
    for name, value in (_native.DTYPES | _native.GRANULARITIES).items():
        assert re.search(rf"S2D_{name.upper()} = {value}\b", CODE)


def test_without_a_library_the_diagnosis_says_where_and_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "libs2d.so"
    monkeypatch.setenv("S2D_LIBRARY", str(missing))
    with pytest.raises(
        _native.NativeLibraryError, match=rf"no native library at {re.escape(str(missing))}.*make native"
    ):
        _native.load()
    with pytest.raises(ValueError, match="impl='cuda' cannot be used: there is no native library"):
        torch.ops.s2d.add_penalty_grad_(
            [torch.zeros(2, 2)], [torch.zeros(2, 1)], [torch.zeros(1, 2)], [torch.zeros(1)], None, "cuda"
        )
    assert ops.choose("add_penalty_grad_", None, torch.device("cuda")) != "cuda"
    missing.write_bytes(b"not a library")
    _native._load.cache_clear()
    with pytest.raises(_native.NativeLibraryError, match="does not load"):
        _native.load()


def compiled(source: str, folder: Path) -> Path:
    """A shared library of a few lines of C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed: apt install gcc"
    path = folder / "libs2d.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-o", path, "-"], input=source, text=True, check=True)
    return path


def stub(folder: Path, *, abi: int = _native.ABI_VERSION, check_device: int = 0) -> Path:
    """A library with every function of the header, none of which does anything."""
    special = {
        "s2d_abi_version": f"int s2d_abi_version(void) {{ return {abi}; }}",
        "s2d_check_device": f"int s2d_check_device(void) {{ return {check_device}; }}",
        "s2d_architectures": 'const char* s2d_architectures(void) { return "sm_80"; }',
        "s2d_status_string": 'const char* s2d_status_string(int s) { return s == 135 ? "old driver" : "a status"; }',
    }
    return compiled("\n".join(special.get(n, f"int {n}(void) {{ return 0; }}") for n in _native.SIGNATURES), folder)


def test_another_abi_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("S2D_LIBRARY", str(stub(tmp_path, abi=999)))
    with pytest.raises(_native.NativeLibraryError, match=rf"has ABI 999, this package needs ABI {_native.ABI_VERSION}"):
        _native.load()


def test_a_library_without_a_function_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(
        "S2D_LIBRARY", str(compiled(f"int s2d_abi_version(void) {{ return {_native.ABI_VERSION}; }}", tmp_path))
    )
    with pytest.raises(_native.NativeLibraryError, match="has no s2d_"):
        _native.load()


def test_a_device_the_library_cannot_run_on_is_left_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("S2D_LIBRARY", str(stub(tmp_path, check_device=135)))
    assert _native.device_problem() == "old driver; the library holds code for sm_80"
    if not torch.cuda.is_available():
        assert ops.problem_of("cuda", torch.device("cuda")) == "this torch sees no CUDA device"
        assert ops.choose("add_penalty_grad_", None, torch.device("cuda")) != "cuda"


def test_an_unknown_kind_of_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S2D_LIBRARY", raising=False)
    monkeypatch.setenv("S2D_NATIVE", "Emulated")
    assert _native.problem() == "S2D_NATIVE='Emulated' is unknown: set it to 'emulated', or unset it"


def fake_cupy(array: np.ndarray) -> Any:
    """What cupy_ops reads of a cupy.ndarray."""
    data, device = SimpleNamespace(ptr=array.ctypes.data), SimpleNamespace(id=0)
    return SimpleNamespace(
        shape=array.shape, strides=array.strides, dtype=array.dtype, data=data, array=array, device=device
    )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[_native.PenaltyLayer], int]]:
    calls: list[tuple[list[_native.PenaltyLayer], int]] = []
    monkeypatch.setattr(_native, "add_penalty_grad", lambda layers, stream: calls.append((list(layers), stream)))
    return calls


def test_cupy_arrays_are_passed_as_they_lie_in_memory(recorded: list) -> None:
    grad = np.zeros((6, 12), np.float32)[::2, 3:]
    U, Vh, c = np.zeros((4, 3), np.float32).T, np.zeros((8, 9), np.float32)[::2], np.zeros(4, np.float32)
    cupy_ops.add_penalty_grad_(*([fake_cupy(a)] for a in (grad, U, Vh, c)), stream=1234)
    ((layer,), stream) = recorded[0]
    assert stream == 1234
    assert (layer.grad, layer.U, layer.Vh, layer.coefficients) == tuple(a.ctypes.data for a in (grad, U, Vh, c))
    assert (layer.rows, layer.cols, layer.rank, layer.dtype) == (3, 9, 4, 0)
    assert (layer.grad_stride, layer.u_row_stride, layer.u_col_stride, layer.vh_stride) == (24, 1, 3, 18)
    cupy_ops.add_penalty_grad_([], [], [], [], stream=0)
    assert len(recorded) == 1


def test_cupy_mistakes_are_named(recorded: list) -> None:
    def call(grad: object = None, U: object = None, Vh: object = None, c: object = None) -> None:
        standard = [np.zeros(shape, np.float32) for shape in ((3, 5), (3, 2), (2, 5), (2,))]
        arrays = [fake_cupy(s) if given is None else given for s, given in zip(standard, (grad, U, Vh, c), strict=True)]
        cupy_ops.add_penalty_grad_(*([a] for a in arrays), stream=0)

    call()
    with pytest.raises(TypeError, match=r"grads\[0\] has dtype float64"):
        call(grad=fake_cupy(np.zeros((3, 5))))
    with pytest.raises(TypeError, match=r"U\[0\] must be a cupy.ndarray, got list"):
        call(U=[1.0])
    with pytest.raises(TypeError, match=r"U\[0\] must be a cupy.ndarray, got ndarray"):
        call(U=np.zeros((3, 2), np.float32))
    other = fake_cupy(np.zeros((3, 2), np.float32))
    other.device = SimpleNamespace(id=1)
    with pytest.raises(ValueError, match=r"U\[0\] is on device 1, but grads\[0\] on 0"):
        call(U=other)
    with pytest.raises(ValueError, match=r"U\[0\] has shape \(4, 2\), expected \(3, 2\)"):
        call(U=fake_cupy(np.zeros((4, 2), np.float32)))
    with pytest.raises(ValueError, match=r"grads\[0\] has strides .* must be contiguous"):
        call(grad=fake_cupy(np.zeros((5, 3), np.float32).T))
    with pytest.raises(ValueError, match="equally long"):
        cupy_ops.add_penalty_grad_([], [], [], [1], stream=0)
    assert len(recorded) == 1


def test_env_shows_the_library(tmp_path: Path) -> None:
    environment = os.environ | {"S2D_LIBRARY": str(tmp_path / "none.so"), "COLUMNS": "200"}
    run = subprocess.run(
        [sys.executable, "-m", "s2d_kernels", "env"], capture_output=True, text=True, check=True, env=environment
    )
    assert "none.so" in run.stdout
    assert f"this package needs ABI {_native.ABI_VERSION}" in run.stdout
    build_emulated()
    environment = os.environ | {"S2D_NATIVE": "emulated", "COLUMNS": "200"}
    run = subprocess.run(
        [sys.executable, "-m", "s2d_kernels", "env"], capture_output=True, text=True, check=True, env=environment
    )
    assert f"ABI {_native.ABI_VERSION}, emulated on the CPU" in run.stdout


# --- impl="cuda" executed: the CUDA sources, compiled for the CPU --------------------------------------------------


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    build_emulated()
    monkeypatch.delenv("S2D_LIBRARY", raising=False)
    monkeypatch.setenv("S2D_NATIVE", "emulated")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_through_the_dispatcher(dtype: torch.dtype) -> None:
    shapes = [(1, 1), (37, 199), (63, 64), (199, 37), (130, 256)]
    ranks = [1, 3, 0, 2, 5]
    weights = [torch.randn(s) for s in shapes]
    factors = topk_svd(weights, k=[min(5, *s) for s in shapes])
    storage = [torch.randn(m, n + 5).to(dtype) for m, n in shapes]
    expected = [s.clone() for s in storage]
    for impl, buffers in (("cuda", storage), ("reference", expected)):
        views = [b[:, 3 : n + 3] for b, (_, n) in zip(buffers, shapes, strict=True)]
        add_penalty_grad_(views, factors, strength=0.05, ranks=ranks, impl=impl)
    for got, truth in zip(storage, expected, strict=True):
        # one rounding of the sum to the gradient's dtype, and fp32 products of five terms
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(got.float(), truth.float(), rtol=tolerance, atol=tolerance)
    # nothing outside the views was written, and rank 0 left its gradient alone
    for got, truth, (_, n) in zip(storage, expected, shapes, strict=True):
        assert torch.equal(got[:, :3], truth[:, :3])
        assert torch.equal(got[:, n + 3 :], truth[:, n + 3 :])


@pytest.mark.usefixtures("emulated")
def test_operator_checks() -> None:
    arguments = ([torch.randn(6, 5)], [torch.randn(6, 2)], [torch.randn(2, 5)], [torch.rand(2)], None, "cuda")
    torch.library.opcheck(torch.ops.s2d.add_penalty_grad_.default, arguments)


@pytest.mark.usefixtures("emulated")
def test_what_the_kernel_does_not_take_is_refused_and_nothing_written() -> None:
    def call(grads: list[torch.Tensor], rank: int = 2) -> None:
        Us, Vhs = [torch.randn(g.shape[0], rank) for g in grads], [torch.randn(rank, g.shape[1]) for g in grads]
        torch.ops.s2d.add_penalty_grad_(grads, Us, Vhs, [torch.ones(rank)] * len(grads), None, "cuda")

    good = torch.zeros(6, 5)
    with pytest.raises(TypeError, match=r"grads\[1\] has dtype torch.float64"):
        call([good, torch.zeros(6, 5, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"grads\[1\] has stride \(1, 6\)"):
        call([good, torch.zeros(5, 6).T])
    with pytest.raises(ValueError, match=r"grads\[0\] gets 65 components"):
        call([good, torch.zeros(80, 70)], rank=65)
    U, Vh, c = torch.ones(6, 2), torch.ones(2, 5), torch.ones(2)
    for bad, message in (
        (([U[:5]], [Vh], [c], None), r"U\[0\] has shape \(5, 2\), which does not fit grads\[0\] \(6, 5\)"),
        (([U], [Vh[:, :4]], [c], None), r"Vh\[0\] has shape \(2, 4\)"),
        (([U], [Vh], [], None), r"equally long, got grads: 1, U: 1, Vh: 1, coefficients: 0"),
        (([U], [Vh], [c], torch.ones(2, dtype=torch.int32)), r"equally long, got grads: 1, ranks: 2"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.s2d.add_penalty_grad_([good], *bad, "cuda")
    with pytest.raises(TypeError, match=r"U\[0\] has dtype torch.int64"):
        torch.ops.s2d.add_penalty_grad_([good], [U.long()], [Vh], [c], None, "cuda")
    assert not good.any()
    torch.ops.s2d.add_penalty_grad_([], [], [], [], None, "cuda")


@pytest.mark.usefixtures("emulated")
def test_ranks_are_read_on_the_device() -> None:
    grads = [torch.zeros(4, 6) for _ in range(4)]
    U, Vh, c = torch.ones(4, 3), torch.ones(3, 6), torch.tensor([1.0, 10.0, 100.0])
    ranks = torch.tensor([2, 0, 9, -1], dtype=torch.int32)
    torch.ops.s2d.add_penalty_grad_(grads, [U] * 4, [Vh] * 4, [c] * 4, ranks, "cuda")
    assert [grad.unique().tolist() for grad in grads] == [[11.0], [0.0], [111.0], [0.0]]


@pytest.mark.usefixtures("emulated")
def test_the_same_gradient_twice_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one launch that share elements would lose each other's sums."""
    launches = []
    launch = _native.add_penalty_grad
    monkeypatch.setattr(
        _native, "add_penalty_grad", lambda layers, stream: (launches.append(len(layers)), launch(layers, stream))
    )
    g, h = torch.zeros(4, 6), torch.zeros(4, 6)
    U, Vh, c = torch.ones(4, 1), torch.ones(1, 6), torch.ones(1)
    torch.ops.s2d.add_penalty_grad_([g, h, g], [U] * 3, [Vh] * 3, [c] * 3, None, "cuda")
    assert launches == [2, 1]
    assert (g == 2).all()
    assert (h == 1).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("impl", ["reference", "torch", "cuda"])
def test_autograd_notices_what_was_written(impl: str) -> None:
    w, x = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    y = (w @ x).sum()
    U, Vh = torch.ones(4, 1), torch.ones(1, 4)
    torch.ops.s2d.add_penalty_grad_([w.detach()], [U], [Vh], [torch.ones(1)], None, impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_cpu_tensor_without_the_emulation_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("S2D_NATIVE", "emulated")  # the library given by its path is the one that counts
    monkeypatch.setenv("S2D_LIBRARY", str(stub(tmp_path)))
    with pytest.raises(ValueError, match="impl='cuda' needs CUDA tensors, got one on cpu"):
        torch.ops.s2d.add_penalty_grad_(
            [torch.zeros(2, 2)], [torch.ones(2, 1)], [torch.ones(1, 2)], [torch.ones(1)], None, "cuda"
        )


@pytest.mark.usefixtures("emulated")
def test_cupy_style_arrays_are_executed() -> None:
    rng = np.random.default_rng(0)
    grad = rng.standard_normal((37, 70)).astype(np.float32)[:, 3:66]
    U, Vh = rng.standard_normal((3, 37)).astype(np.float32).T, rng.standard_normal((3, 63)).astype(np.float32)
    c = rng.standard_normal(3).astype(np.float32)
    expected = grad.astype(np.float64) + (U.astype(np.float64) * c) @ Vh.astype(np.float64)
    cupy_ops.add_penalty_grad_(*([fake_cupy(a)] for a in (grad, U, Vh, c)), stream=0)
    np.testing.assert_allclose(grad, expected, atol=2e-5)


@pytest.mark.sanitize
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_penalty_grad_on_the_gpu(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    needs_gpu(device)
    shapes = [(1, 1), (37, 199), (63, 64), (199, 37), (130, 256)]
    ranks = [min(3, *s) for s in shapes]
    Us = [torch.randn(m, k, device=device) for (m, _), k in zip(shapes, ranks, strict=True)]
    Vhs = [torch.randn(k, n, device=device) for (_, n), k in zip(shapes, ranks, strict=True)]
    cs = [torch.randn(k, device=device) for k in ranks]
    storage = [torch.randn(m, n + 8, device=device).to(dtype) for m, n in shapes]
    for offset in (0, 3, 8):  # aligned rows and others
        views = [b[:, offset : offset + n] for b, (_, n) in zip(storage, shapes, strict=True)]
        expected = [v.cpu() for v in views]
        on_host = [[t.cpu() for t in tensors] for tensors in (Us, Vhs, cs)]
        torch.ops.s2d.add_penalty_grad_(expected, *on_host, None, "reference")
        torch.ops.s2d.add_penalty_grad_(views, Us, Vhs, cs, None, impl)
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        for view, truth in zip(views, expected, strict=True):
            torch.testing.assert_close(view.cpu().float(), truth.float(), rtol=tolerance, atol=tolerance)


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_add_penalty_grad_in_a_cuda_graph(impl: str, device: torch.device) -> None:
    needs_gpu(device)
    grads = [torch.zeros(64, 96, device=device), torch.zeros(7, 5, device=device)]
    Us = [torch.ones(len(g), 2, device=device) for g in grads]
    Vhs = [torch.ones(2, g.shape[1], device=device) for g in grads]
    cs = [torch.ones(2, device=device) for _ in grads]
    ranks = torch.tensor([1, 2], dtype=torch.int32, device=device)

    def add() -> None:
        torch.ops.s2d.add_penalty_grad_(grads, Us, Vhs, cs, ranks, impl)

    add()  # a table must have been used, and kernels loaded, before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add()
    torch.cuda.synchronize()
    ranks.fill_(2)  # read when the graph is replayed
    graph.replay()
    graph.replay()
    assert [g.unique().tolist() for g in grads] == [[5.0], [6.0]]


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_add_penalty_grad_without_a_synchronization_on_a_side_stream(impl: str, device: torch.device) -> None:
    needs_gpu(device)
    grads = [torch.zeros(300, 40, device=device) for _ in range(700)]  # more than one table of 320
    U, Vh, c = torch.ones(300, 1, device=device), torch.ones(1, 40, device=device), torch.ones(1, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.ops.s2d.add_penalty_grad_(grads, [U] * 700, [Vh] * 700, [c] * 700, None, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(bool((g == 1).all()) for g in grads)


def test_cupy_on_the_gpu(device: torch.device) -> None:
    needs_gpu(device)
    cupy = pytest.importorskip("cupy")
    for shape in ((80, 30), (30, 80)):
        weight = cupy.random.standard_normal(shape, dtype=cupy.float32)
        U, S, Vh = cupy.linalg.svd(weight, full_matrices=False)
        grad = cupy.zeros(shape, cupy.float32)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            cupy_ops.add_penalty_grad_([grad], [U[:, :3]], [cupy.ascontiguousarray(Vh[:3])], [S[:3] ** 2])
            stream.synchronize()
        cupy.testing.assert_allclose(grad, (U[:, :3] * S[:3] ** 2) @ Vh[:3], rtol=1e-4, atol=1e-4)


# --- the library that is shipped -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc built by nvcc for every architecture. No GPU is needed; nvcc is."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here: the CUDA library cannot be built (the emulated one is tested above)")
    build = ROOT / "build" / "all-architectures"
    subprocess.run([cmake(), "-S", ROOT, "-B", build, "-DS2D_WERROR=ON"], check=True, capture_output=True)
    subprocess.run([cmake(), "--build", build, "--parallel"], check=True, capture_output=True)
    return build / "libs2d.so"


def test_exports_only_the_c_abi_and_needs_neither_torch_nor_python(native_library: Path) -> None:
    def names(*arguments: str) -> list[str]:
        command = ["nm", "-D", *arguments, native_library]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [line.split()[-1] for line in out.splitlines()]

    assert sorted(names("--defined-only")) == sorted(_native.SIGNATURES)
    foreign = re.compile(r"_?Py[A-Z_]|_ZN?K?(3c10|5torch|2at)|cuda[A-Z]")
    assert not [name for name in names("--undefined-only") if foreign.match(name)]


def test_holds_the_architectures_that_readme_promises(native_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2D_LIBRARY", str(native_library))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    promised = re.search(r"Architectures: `([^`]+)`", readme).group(1)
    assert _native.architectures() == promised
    cuobjdump = audit.find_tool("cuobjdump")
    assert cuobjdump, "cuobjdump is in Triton's wheel"
    command = [cuobjdump, "--list-elf", native_library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"\.(sm_\d+)\w?\.cubin", listed))
    # which of the suffixes a and f cuobjdump shows depends on its version
    assert found == {name.rstrip("af") for name in promised.split() if name.startswith("sm_")}
