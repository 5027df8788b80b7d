"""`python -m bench audit`: no kernel spills or lacks an instruction, and the audit would notice if one did."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import audit
from s2d_kernels import triton_kernels
from s2d_kernels.triton_kernels import penalty

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fastPf' for 'sm_80'
ptxas info    : Function properties for _Z4fastPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 33 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 5.012 ms
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_80'
ptxas info    : Function properties for _Z4slowPf
    64 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 64 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 7.003 ms
ptxas info    : Function properties for _Z6helperPf
    8 bytes stack frame, 100 bytes spill stores, 200 bytes spill loads
ptxas info    : Function properties for _Z5otherPf
    0 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Compiling entry function '_Z4lastPf' for 'sm_80'
ptxas info    : Function properties for _Z4lastPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 360 bytes cmem[0]
"""
SASS = """\
//--------------------- .text._Z4fastPf         --------------------------
	.section	.text._Z4fastPf,"ax",@progbits
.text._Z4fastPf:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.EF.128 R4, [R2.64] ;
        /*0020*/               @P1 LDG.E.64 R6, [R2.64] ;
        /*0030*/                   LDG.E.U16.CONSTANT R8, [R2.64+0x2] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64] ;
.L_x_1:
        /*0050*/              @!PT HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   LDS.128 R4, [R9] ;
        /*0080*/              @!P2 STG.E desc[UR4][R2.64], R8 ;
        /*0090*/                   EXIT ;
.text._Z4slowPf:
        /*0000*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0010*/                   STG.E.U8 [R2.64], R8 ;
"""
SPILLING_CUDA = """
extern "C" __global__ void spilling(const float* in, float* out, int index) {
  float values[128];
  for (int i = 0; i < 128; ++i) values[i] = in[i * 32 + threadIdx.x];
  out[threadIdx.x] = values[index];
}
"""


# Compiled for 32 registers: the function that is called spills, the kernels themselves do not.
CALLING_CUDA = """
__device__ __noinline__ float chain(const float* in, int rounds) {
  float v[64], sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = in[i * 32 + threadIdx.x];
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = fmaf(v[i], v[(i + 7) % 64], v[(i * 5 + 1) % 64]);
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) sum += v[i];
  return sum;
}
extern "C" __global__ void calling(const float* in, float* out, int n) { out[threadIdx.x] = chain(in, n); }
extern "C" __global__ void alone(const float* in, float* out, int n) { out[threadIdx.x] = 2 * in[n]; }
"""


@pytest.fixture(scope="module")
def audits() -> list[audit.KernelAudit]:
    return audit.run()


def test_ptxas_report() -> None:
    assert audit.parse_ptxas(PTXAS) == {
        "_Z4fastPf": audit.Resources(33, 0, 0, 0, 1024),
        "_Z4slowPf": audit.Resources(24, 72, 113, 222, 0),
        "_Z4lastPf": audit.Resources(10, 0, 0, 0, 0),
    }


def test_machine_code() -> None:
    found = audit.parse_sass(SASS)
    assert list(found) == ["_Z4fastPf", "_Z4slowPf"]
    fast = found["_Z4fastPf"]
    assert fast["HMMA.16816.F32.BF16"] == 2
    assert audit.tensor_core(fast) == {"HMMA.16816.F32.BF16": 2}
    assert audit.widths(fast, ("LDG", "LDGSTS")) == {16: 1, 64: 1, 128: 2}
    assert audit.widths(fast, ("STG",)) == {32: 1}
    assert audit.occurrences(fast, "LDG") == 3
    assert audit.occurrences(fast, "LDG.128") == 1
    assert audit.occurrences(fast, "LDG.!CONSTANT") == 2
    assert audit.occurrences(fast, "LDG.!CONSTANT.!128") == 1
    assert audit.occurrences(fast, "LDG.E.CONSTANT.!U16") == 0
    assert audit.occurrences(fast, "HMMA.BF16") == 2
    assert audit.occurrences(fast, "STG.128") == 0
    assert audit.occurrences(fast, "IMMA") == 0
    slow = found["_Z4slowPf"]
    assert audit.widths(slow, ("STG",)) == {8: 1}
    assert slow["UIADD3"] == 1
    assert audit.tensor_core(slow) == {}
    names = Counter(["HGMMA.64x128x16.F32", "IMMA.16832.S8.S8", "IGMMA.64x8x32", "DMMA.884", "IMAD", "FFMA"])
    assert list(audit.tensor_core(names)) == ["DMMA.884", "HGMMA.64x128x16.F32", "IGMMA.64x8x32", "IMMA.16832.S8.S8"]


def test_share_of_wide_accesses() -> None:
    assert audit.wide_share({128: 4, 32: 2}) == "4 x 128 + 2 x 32: 89 %"
    assert audit.wide_share({}) == "none"


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "share", "limit"),
    [
        ("sm_80", 32, 0, 256, 1.0, "warps"),
        ("sm_80", 64, 0, 256, 0.5, "registers"),
        ("sm_80", 65, 0, 256, 0.375, "registers"),
        ("sm_80", 255, 0, 256, 0.125, "registers"),
        ("sm_80", 32, 0, 32, 0.5, "blocks"),
        ("sm_80", 32, 81 * 1024, 256, 0.25, "shared memory"),
        ("sm_80", 32, 82 * 1024, 256, 0.125, "shared memory"),
        ("sm_90a", 32, 113 * 1024, 256, 0.25, "shared memory"),
        ("sm_90a", 168, 200 * 1024, 384, 0.1875, "registers"),
    ],
)
def test_occupancy(architecture: str, registers: int, shared: int, threads: int, share: float, limit: str) -> None:
    assert audit.occupancy(architecture, registers, shared, threads) == (share, limit)


def test_no_triton_kernel_has_a_problem(audits: list[audit.KernelAudit]) -> None:
    assert triton_kernels.triton is not None, f"Triton is missing: {triton_kernels.INSTALL_HINT}"
    ours = [a for a in audits if a.language == "triton"]
    assert len(ours) == len(triton_kernels.variants()) * len(audit.ARCHITECTURES)
    assert not [(a.kernel, a.architecture, a.problems) for a in ours if a.problems]


@pytest.mark.parametrize(("architecture", "instruction"), [("sm_80", "HMMA"), ("sm_90a", "HGMMA")])
def test_svd_products_run_on_tensor_cores(audits: list[audit.KernelAudit], architecture: str, instruction: str) -> None:
    ours = [a for a in audits if a.kernel.startswith("svd_product") and a.architecture == architecture]
    assert len(ours) == 3
    for found in ours:
        assert {opcode.split(".")[0] for opcode in found.tensor_core} == {instruction}, found.kernel


@pytest.mark.parametrize(("architecture", "wide"), [("sm_80", "IMMA"), ("sm_90a", "IGMMA")])
def test_quantized_layer_of_triton_runs_on_tensor_cores(
    audits: list[audit.KernelAudit], architecture: str, wide: str
) -> None:
    ours = {a.kernel: a for a in audits if a.language == "triton" and a.architecture == architecture}
    products = {name: a.tensor_core for name, a in ours.items() if name.startswith("integer_linear")}
    assert len(products) == 4
    for name, found in products.items():
        # sixteen rows are too few for the instruction of a warp group
        assert {opcode.split(".")[0] for opcode in found} == {"IMMA" if "narrow" in name else wide}, name
    gradients = {name: a.tensor_core for name, a in ours.items() if name.startswith("straight_through")}
    assert len(gradients) == 5
    for name, found in gradients.items():
        assert {opcode.split(".")[0] for opcode in found} == {"HMMA" if architecture == "sm_80" else "HGMMA"}, name


def test_integer_products_of_cuda_run_on_tensor_cores(audits: list[audit.KernelAudit]) -> None:
    if audit.find_tool("nvcc") is None:
        pytest.skip("needs nvcc (PATH or CUDA_HOME) to compile csrc/*.cu")
    for architecture, int4 in (("sm_80", "IMMA.16864"), ("sm_90a", "IMMA.16832")):
        ours = [a for a in audits if a.kernel.startswith("integer_linear<Shape") and a.architecture == architecture]
        assert len(ours) == 9
        for a in ours:
            int8 = "Int8Codes" in a.kernel
            (opcode,) = a.tensor_core
            assert opcode.startswith("IMMA.16832.S8.S8" if int8 else int4), a.kernel
            # 4-bit products are instructions up to sm_89 and a function of 8-bit ones later.
            assert a.tensor_core[opcode] == (
                2 if not int8 and architecture == "sm_90a" else 32 if "128, 128" in a.kernel else 8
            )


def test_no_cuda_kernel_has_a_problem(audits: list[audit.KernelAudit]) -> None:
    if audit.find_tool("nvcc") is None:
        pytest.skip("needs nvcc (PATH or CUDA_HOME) to compile csrc/*.cu")
    ours = [a for a in audits if a.language == "cuda"]
    assert {a.architecture for a in ours} == set(audit.ARCHITECTURES)
    assert not [(a.kernel, a.architecture, a.problems) for a in ours if a.problems]


def test_the_resident_svd_reads_nothing_through_the_read_only_cache(audits: list[audit.KernelAudit]) -> None:
    """Blocks exchange K and partial sums through memory: that cache could return what was there before."""
    if audit.find_tool("nvcc") is None:
        pytest.skip("needs nvcc (PATH or CUDA_HOME) to compile csrc/*.cu")
    ours = [a for a in audits if a.kernel.startswith("resident")]
    assert len(ours) == 4 * len(audit.ARCHITECTURES)
    assert all(a.found["LDG.CONSTANT"] == 0 and a.found["LDG.STRONG.GPU"] > 0 for a in ours)


@pytest.mark.parametrize("architecture", audit.ARCHITECTURES)
def test_forced_spills_and_a_missing_instruction_are_problems(architecture: str) -> None:
    assert triton_kernels.triton is not None, f"Triton is missing: {triton_kernels.INSTALL_HINT}"
    variant = triton_kernels.variants()[0]._replace(instructions={"LDG.128": 1, "HMMA": 1})
    found = audit.audit_triton(variant, architecture, maxnreg=24)
    assert found.spill_stores > 0
    assert found.spill_loads > 0
    assert any("spills" in problem for problem in found.problems)
    assert any("stack frame" in problem for problem in found.problems)
    assert "has no HMMA, but declares at least 1" in found.problems


def test_a_local_array_in_cuda_is_a_problem_and_so_is_an_undeclared_kernel(tmp_path: Path) -> None:
    if audit.find_tool("nvcc") is None:
        pytest.skip("needs nvcc (PATH or CUDA_HOME)")
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING_CUDA, encoding="utf-8")
    (found,) = audit.audit_cuda(source, "sm_80")
    assert found.stack >= 512
    assert any("stack frame" in problem for problem in found.problems)
    assert any("not declared" in problem for problem in found.problems)


@pytest.mark.parametrize("architecture", audit.ARCHITECTURES)
def test_spills_of_a_called_function_are_a_problem_of_its_caller(tmp_path: Path, architecture: str) -> None:
    if audit.find_tool("nvcc") is None:
        pytest.skip("needs nvcc (PATH or CUDA_HOME)")
    source = tmp_path / "calling.cu"
    source.write_text(CALLING_CUDA, encoding="utf-8")
    found = {a.kernel: a for a in audit.audit_cuda(source, architecture, ["-maxrregcount=32"])}
    assert found.keys() == {"calling", "alone"}
    assert found["calling"].spill_stores > 100
    assert found["calling"].spill_loads > 100
    assert any("spills" in problem for problem in found["calling"].problems)
    assert (found["alone"].spill_stores, found["alone"].spill_loads, found["alone"].stack) == (0, 0, 0)


@pytest.mark.parametrize("architecture", audit.ARCHITECTURES)
@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        # of one dtype alone, while other wide loads remain
        (
            "packed[r] = load_16(grad + r * layer.grad_stride);",
            """if constexpr (std::is_same_v<T, bf16>) {
              const auto* words = reinterpret_cast<const volatile unsigned*>(grad + r * layer.grad_stride);
              packed[r] = make_uint4(words[0], words[1], words[2], words[3]);
            } else {
              packed[r] = load_16(grad + r * layer.grad_stride);
            }""",
            "has 8 LDG.128.!CONSTANT, but declares at least 12",
        ),
        ("if (layer.vector_vh) {", "if (false) {", "has no LDG.128.CONSTANT, but declares at least 5"),
        (
            "store_16(grad + r * layer.grad_stride, pack<T>(values));",
            "for (int e = 0; e < N; ++e) grad[r * layer.grad_stride + e] = from_float<T>(values[e]);",
            "has no STG.128, but declares at least 12",
        ),
        (
            "return add_tile<fp16>(layer, within, rank, scaled);",
            "return;",
            "has no F2FP.!BF16, but declares at least 20",
        ),
    ],
    ids=["gradient loads of bf16", "factor loads", "stores", "fp16"],
)
def test_fewer_wide_accesses_than_declared_are_a_problem(
    tmp_path: Path, architecture: str, before: str, after: str, problem: str
) -> None:
    if audit.find_tool("nvcc") is None:
        pytest.skip("needs nvcc (PATH or CUDA_HOME)")
    text = (audit.CSRC / "penalty_grad.cu").read_text(encoding="utf-8")
    assert text.count(before) == 1
    source = tmp_path / "penalty_grad.cu"
    source.write_text(text.replace(before, after), encoding="utf-8")
    (found,) = (a for a in audit.audit_cuda(source, architecture) if "stochastic" not in a.kernel)
    assert problem in found.problems


@pytest.mark.parametrize("architecture", audit.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_a_triton_kernel_with_fewer_wide_accesses_has_a_problem(architecture: str, dtype: str) -> None:
    assert triton_kernels.triton is not None, f"Triton is missing: {triton_kernels.INSTALL_HINT}"
    (variant,) = (v for v in penalty.variants() if v.name == f"add_low_rank<{dtype}>")
    smaller = variant._replace(constants=variant.constants | {"BLOCK_ROWS": variant.constants["BLOCK_ROWS"] // 2})
    problems = audit.audit_triton(smaller, architecture).problems
    least = penalty.VECTORS
    for instruction in ("LDG.128.EF", "STG.128"):
        assert f"has {least // 2} {instruction}, but declares at least {least}" in problems


def application() -> typer.Typer:
    app = typer.Typer()
    app.command()(audit.audit)
    return app


def test_command_writes_json_and_fails_on_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audits: list[audit.KernelAudit]
) -> None:
    clean = [a for a in audits if not a.problems]
    target = tmp_path / "audit.json"
    monkeypatch.setattr(audit, "run", lambda *_: clean)
    done = CliRunner().invoke(application(), ["--json", str(target)])
    assert done.exit_code == 0, done.output
    rows = json.loads(target.read_text(encoding="utf-8"))["kernels"]
    assert len(rows) == len(clean)
    assert {"kernel", "architecture", "registers", "spill_stores", "stack", "occupancy", "bytes", "flops"} <= set(
        rows[0]
    )
    clean[0].problems.append("made up")
    try:
        assert CliRunner().invoke(application(), []).exit_code == 1
    finally:
        clean[0].problems.clear()
    assert CliRunner().invoke(application(), ["--arch", "sm_75"]).exit_code == 2


def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "find_tool", lambda name: None)
    monkeypatch.setattr(triton_kernels, "triton", None)
    assert audit.run() == []
    assert [sentence.split(" are left out")[0] for sentence in audit.left_out()] == ["Triton kernels", "CUDA kernels"]
