"""`python -m bench audit`: what the compilers made of every Triton and CUDA kernel. Needs no GPU.

Triton's PTX and the CUDA sources go through ptxas for each architecture; its report gives registers, stack and spills,
the disassembled machine code the instructions. Static counts: an instruction in a loop counts once.
"""

from __future__ import annotations

import importlib
import importlib.util
import json as jsonlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from bench.declared import CUDA_KERNELS, Declared
from s2d_kernels import triton_kernels

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# As CMakeLists.txt compiles them.
NVCC_FLAGS = ("-std=c++17", "-O3", f"-I{CSRC}")


class Limits(NamedTuple):
    """Of one multiprocessor: CUDA programming guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int


# Both: registers are given to a warp 256 at a time in each of 4 partitions, shared memory 128 bytes at a time, and of
# each block 1 KiB of shared memory belongs to the system.
LIMITS = {"sm_80": Limits(64, 32, 65536, 164 * 1024), "sm_90a": Limits(64, 32, 65536, 228 * 1024)}
ARCHITECTURES = tuple(LIMITS)


@dataclass
class KernelAudit:
    """One kernel on one architecture; sizes in bytes, `loads` and `stores` as width in bits -> instructions.

    `declared` and `found`: least and actual occurrences of the declared instructions.
    """

    kernel: str
    language: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    dynamic_shared: int
    threads: int
    occupancy: float
    occupancy_limit: str
    tensor_core: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    declared: dict[str, int]
    found: dict[str, int]
    shape: str
    bytes: int
    flops: int
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.spill_stores or self.spill_loads:
            self.problems.append(f"spills {self.spill_stores} bytes out, {self.spill_loads} in")
        if self.stack:
            self.problems.append(f"has a stack frame of {self.stack} bytes")
        for instruction, least in self.declared.items():
            if (count := self.found[instruction]) < least:
                self.problems.append(f"has {count or 'no'} {instruction}, but declares at least {least}")


# --- the tools ----------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit: PATH, CUDA_HOME, or Triton's wheel, which ships some of them."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


def _run(command: Sequence[object]) -> str:
    """Output and errors together; a RuntimeError with both when the tool fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _required(name: str) -> str:
    tool = find_tool(name)
    if tool is None:
        raise RuntimeError(f"{name} is not found: install Triton ({triton_kernels.INSTALL_HINT}), whose wheel ships it")
    return tool


# --- reading their reports ----------------------------------------------------------------------------------------


class Resources(NamedTuple):
    """Of one entry function, as ptxas -v prints them."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


# Of the entry functions by mangled name: resources, and how often each opcode occurs.
Reports = tuple[dict[str, Resources], dict[str, Counter[str]]]

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def parse_ptxas(report: str) -> dict[str, Resources]:
    """Mangled name -> resources. What functions that were not inlined spill counts for the entry that calls them.

    ptxas prints them after the registers of that entry, once for each entry that calls them.
    """
    found: dict[str, Resources] = {}
    entry = ""
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            entry = match[1]
            found[entry] = Resources(0, 0, 0, 0, 0)
        elif entry and (match := _FRAME.search(line)):
            stack, stores, loads = map(int, match.groups())
            r = found[entry]
            found[entry] = r._replace(
                stack=r.stack + stack, spill_stores=r.spill_stores + stores, spill_loads=r.spill_loads + loads
            )
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry] = found[entry]._replace(registers=int(match[1]), static_shared=int(shared[1]) if shared else 0)
    return found


_FUNCTION = re.compile(r"^\.text\.([^\s:]+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def parse_sass(listing: str) -> dict[str, Counter[str]]:
    """Mangled name -> how often each opcode with its modifiers occurs, of what `nvdisasm --print-code` prints."""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            counts = found.setdefault(match[1], Counter())
        elif match := _INSTRUCTION.match(line):
            counts[match[1]] += 1
    return found


def occurrences(opcodes: Counter[str], wanted: str) -> int:
    """How often `wanted` occurs: the same instruction with at least its modifiers, and without those after a "!".

    "LDG.128.!CONSTANT" stands for "LDG.E.128", not for "LDG.E.128.CONSTANT".
    """
    name, *modifiers = wanted.split(".")
    needed = {m for m in modifiers if not m.startswith("!")}
    refused = {m[1:] for m in modifiers if m.startswith("!")}
    total = 0
    for opcode, count in opcodes.items():
        kind, *present = opcode.split(".")
        if kind == name and needed <= set(present) and not refused & set(present):
            total += count
    return total


def widths(opcodes: Counter[str], names: Sequence[str]) -> dict[int, int]:
    """Width in bits -> instructions among `names` that move so much a thread."""
    found: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        name, *modifiers = opcode.split(".")
        if name in names:
            sized = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16)|64|128", m)]
            found[sized[-1] if sized else 32] += count
    return dict(sorted(found.items()))


_TENSOR_CORE = re.compile(r"[HIDBQF]G?MMA|UTC[HIQOM]+MMA")


def tensor_core(opcodes: Counter[str]) -> dict[str, int]:
    """Matrix instructions and how often they occur."""
    return {opcode: count for opcode, count in sorted(opcodes.items()) if _TENSOR_CORE.fullmatch(opcode.split(".")[0])}


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> tuple[float, str]:
    """Share of a multiprocessor's warps that can be resident, and what limits it."""
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    register_unit = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = limits.registers // 4 // register_unit * 4 // warps
    by_shared = limits.shared_bytes // (-(-shared // 128) * 128 + 1024)
    blocks, limit = min(
        (limits.warps // warps, "warps"),
        (limits.blocks, "blocks"),
        (by_registers, "registers"),
        (by_shared, "shared memory"),
        key=lambda pair: pair[0],
    )
    return blocks * warps / limits.warps, limit


# --- compiling ----------------------------------------------------------------------------------------------------


def _disassemble(cubin: Path) -> dict[str, Counter[str]]:
    return parse_sass(_run([_required("nvdisasm"), "--print-code", cubin]))


def assemble(ptx: str, architecture: str) -> Reports:
    """Resources and opcodes of the entry functions of PTX text, by the ptxas that Triton itself uses."""
    bundled = Path(triton_kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = bundled if bundled.is_file() else _required("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        report = _run([ptxas, "-v", f"--gpu-name={architecture}", source, "-o", cubin])
        return parse_ptxas(report), _disassemble(cubin)


def compile_triton(variant: triton_kernels.Variant, architecture: str, **options: Any) -> Any:
    """Triton's compilation of the variant, for which there need be no GPU; its PTX is `.asm["ptx"]`."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget(
        "cuda", int(re.sub(r"\D", "", architecture)), 32
    )
    source = compiler.ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, **variant.options, **options}
    return triton_kernels.triton.compile(source, target=target, options=options)


def audit_triton(variant: triton_kernels.Variant, architecture: str, **options: Any) -> KernelAudit:
    """Audit one variant; `options` are Triton's, such as maxnreg."""
    compiled = compile_triton(variant, architecture, **options)
    resources, opcodes = assemble(compiled.asm["ptx"], architecture)
    (name,) = resources
    declared = Declared(
        variant.warps * 32,
        compiled.metadata.shared,
        variant.instructions,
        variant.shape,
        lambda _: (variant.bytes, variant.flops),
    )
    return _audit(variant.name, name, "triton", architecture, resources[name], opcodes[name], declared)


def compile_cuda(source: Path, architecture: str, flags: Sequence[str] = ()) -> Reports:
    """Resources and opcodes of the kernels of one .cu file, by mangled name."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError(f"nvcc is not found, so {source.name} cannot be compiled: install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-cubin", f"-arch={architecture}", *NVCC_FLAGS, "-Xptxas", "-v", *flags, source, "-o", cubin]
        return parse_ptxas(_run(command)), _disassemble(cubin)


def audit_cuda(source: Path, architecture: str, flags: Sequence[str] = ()) -> list[KernelAudit]:
    """Audit the kernels of one .cu file; one that `CUDA_KERNELS` does not name has that as a problem."""
    resources, opcodes = compile_cuda(source, architecture, flags)
    audits = []
    for mangled, used in sorted(resources.items()):
        names = [name for name in CUDA_KERNELS if name in mangled]
        declared = CUDA_KERNELS[names[0]] if names else Declared(256, 0, {}, "", lambda _: (0, 0))
        audit = _audit(demangled(mangled), mangled, "cuda", architecture, used, opcodes[mangled], declared)
        if not names:
            audit.problems.append("is not declared in CUDA_KERNELS of bench/declared.py")
        audits.append(audit)
    return audits


def demangled(name: str) -> str:
    """Name with template arguments, without namespaces and parameters; as it is where c++filt is not installed."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = _run([tool, name]).strip().replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\b\w+::(?=\w)", "", re.sub(r"\((?!int\)|bool\)|unsigned).*\)$", "", text))


def _audit(
    kernel: str,
    mangled: str,
    language: str,
    architecture: str,
    used: Resources,
    opcodes: Counter[str],
    declared: Declared,
) -> KernelAudit:
    shared = used.static_shared + declared.dynamic_shared
    share, limit = occupancy(architecture, used.registers, shared, declared.threads)
    moved, flops = declared.traffic(mangled)
    return KernelAudit(
        kernel=kernel,
        language=language,
        architecture=architecture,
        registers=used.registers,
        spill_stores=used.spill_stores,
        spill_loads=used.spill_loads,
        stack=used.stack,
        static_shared=used.static_shared,
        dynamic_shared=declared.dynamic_shared,
        threads=declared.threads,
        occupancy=share,
        occupancy_limit=limit,
        tensor_core=tensor_core(opcodes),
        loads=widths(opcodes, ("LDG", "LDGSTS", "LD")),
        stores=widths(opcodes, ("STG", "ST")),
        declared=declared.instructions,
        found={wanted: occurrences(opcodes, wanted) for wanted in declared.instructions},
        shape=declared.shape,
        bytes=moved,
        flops=flops,
    )


def run(architectures: Sequence[str] = ARCHITECTURES, *, sources: Iterable[Path] | None = None) -> list[KernelAudit]:
    """Audit all kernels: Triton's variants where Triton is installed, the CUDA sources where nvcc is found.

    Args:
        architectures: of `ARCHITECTURES`.
        sources: .cu files; default all of csrc/.
    """
    tasks: list[Callable[[], list[KernelAudit]]] = []
    if _triton_problem() is None:
        for variant in triton_kernels.variants():
            tasks += [lambda v=variant, a=a: [audit_triton(v, a)] for a in architectures]  # type: ignore[misc]
    if find_tool("nvcc") is not None:
        for source in sorted(CSRC.glob("*.cu")) if sources is None else sources:
            tasks += [lambda s=source, a=a: audit_cuda(s, a) for a in architectures]  # type: ignore[misc]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [audit for audits in pool.map(lambda task: task(), tasks) for audit in audits]


def _triton_problem() -> str | None:
    if triton_kernels.triton is None:
        return f"Triton is not installed ({triton_kernels.INSTALL_HINT})"
    return "they are interpreted, unset TRITON_INTERPRET" if triton_kernels.interpreted() else None


def left_out() -> list[str]:
    """What `run` cannot audit on this machine, a sentence each."""
    sentences = []
    if (problem := _triton_problem()) is not None:
        sentences.append(f"Triton kernels are left out: {problem}")
    if find_tool("nvcc") is None:
        sentences.append("CUDA kernels are left out: nvcc is not found (PATH, CUDA_HOME)")
    return sentences


# --- showing ------------------------------------------------------------------------------------------------------


def wide_share(counts: dict[int, int]) -> str:
    """Bytes that 128-bit instructions move of all, by instruction count: "4 x 128 + 2 x 32: 89 %"."""
    total = sum(width * count for width, count in counts.items())
    if not total:
        return "none"
    parts = " + ".join(f"{counts[width]} x {width}" for width in sorted(counts, reverse=True))
    return f"{parts}: {100 * 128 * counts.get(128, 0) / total:.0f} %"


def rich_table(audits: Sequence[KernelAudit]) -> Table:
    """All audits, those with problems red."""
    table = Table(
        title="kernels as compiled", caption="loads, stores: instructions x bits, share of 128-bit ones in bytes"
    )
    left = ("kernel", "tensor core", "global loads", "global stores", "benchmark shape", "problems")
    for heading in (
        *("kernel", "arch", "registers", "spills", "stack", "shared", "occupancy", "tensor core"),
        *("global loads", "global stores", "benchmark shape", "MB", "MFLOP", "problems"),
    ):
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for a in audits:
        table.add_row(
            f"{a.kernel} ({a.language})",
            a.architecture,
            str(a.registers),
            str(a.spill_stores + a.spill_loads),
            str(a.stack),
            f"{a.static_shared} + {a.dynamic_shared}",
            f"{a.occupancy:.0%} ({a.occupancy_limit})",
            ", ".join(f"{count} x {opcode}" for opcode, count in a.tensor_core.items()) or "none",
            wide_share(a.loads),
            wide_share(a.stores),
            a.shape,
            f"{a.bytes / 1e6:.0f}",
            f"{a.flops / 1e6:.0f}",
            "; ".join(a.problems),
            style="red" if a.problems else "",
        )
    return table


def audit(
    arch: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(ARCHITECTURES)}; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the audits to this file.")] = None,
) -> None:
    """Registers, spills, shared memory, occupancy, instructions of every kernel, without a GPU; fails on a problem."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    unknown = sorted(set(arch or ()) - set(ARCHITECTURES))
    if unknown:
        raise typer.BadParameter(f"{unknown} not among {list(ARCHITECTURES)}", param_hint="--arch")
    audits = run(arch or ARCHITECTURES)
    console.print(rich_table(audits))
    for sentence in left_out():
        console.print(f"[yellow]{sentence}")
    if json is not None:
        content = {"left_out": left_out(), "kernels": [asdict(a) for a in audits]}
        json.write_text(jsonlib.dumps(content, indent=1) + "\n", encoding="utf-8")
        console.print(f"{len(audits)} audits written to {json}")
    if any(a.problems for a in audits):
        raise typer.Exit(1)
