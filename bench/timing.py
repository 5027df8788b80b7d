"""The timer, what a number was measured on, and `Row`, the one record of every result."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
_L2_FLUSH_BYTES = 256 * 2**20
_flush: dict[torch.device, torch.Tensor] = {}


@dataclass
class Row:
    """One measurement. Written to and read from one line of JSON.

    Attributes:
        run: start of the process run (UTC); the rows of one run are comparable, others are not.
        op, case, variant, dtype: what was computed; variant is "cold" or "warm", "forward" or "forward+backward", or
            the impl of ours; "" for a peer that is compared with each variant of ours.
        impl: "ours" or the peer's name.
        setting: what the peer was told, and for a searched setting that it was searched.
        seconds, seconds_min, seconds_max, repeats: median and extremes over the repeats.
        error_p90, error_max, error_limit, error_of: over the case's matrices or outputs, against the truth.
        gate: error_p90 <= error_limit; where one wrong matrix must not pass, error_max.
        residual_p90: of triplets, max_i ||W^T u_i - s_i v_i|| / s_1 in fp32.
        reads: passes over the weights, where that is a fixed number.
        bytes, floor_seconds: least bytes that must be moved, and that over the copy bandwidth measured in this run.
        speedup: seconds / seconds of ours, by the variant of ours; only entries whose both gates passed.
        problem: what the case is, drift included.
        note: what a reader must know about this row.
        traffic: of operations that only move memory: `moved_bytes` by this implementation, `bytes_per_second` and its
            `copy_fraction` of the copy bandwidth measured in this run, `extra_bytes` of memory held for it;
            of an optimizer step also `peak_bytes` and whether that `peak_is_measured`.
    """

    run: str
    op: str
    case: str
    variant: str
    dtype: str
    impl: str
    setting: str
    seconds: float
    seconds_min: float
    seconds_max: float
    repeats: int
    error_p90: float
    error_max: float
    error_limit: float
    error_of: str
    gate: bool
    reads: int | None
    bytes: int
    floor_seconds: float
    threads: int
    device: str
    problem: str
    note: str = ""
    residual_p90: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read one line; a ValueError names what is missing or unknown. Older rows have no traffic and no residual."""
        values = {"traffic": {}, "residual_p90": None} | json.loads(line)
        wrong = {f.name for f in fields(cls)} ^ set(values)
        if wrong:
            raise ValueError(f"a result row has missing or unknown fields {sorted(wrong)}: {line[:200]}")
        return cls(**values)


def milliseconds(seconds: float) -> str:
    """Three significant digits, never an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def fill_speedups(rows: Sequence[Row]) -> None:
    """Enter into each peer's row how much faster ours is, where both passed their gates.

    A peer that cannot start warm is compared with ours cold and ours warm: it is what one would run instead of either.
    """
    for row in rows:
        row.speedup = {}
        if row.impl == "ours" or not row.gate:
            continue
        for ours in rows:
            same = all(getattr(ours, key) == getattr(row, key) for key in ("run", "op", "case", "dtype", "device"))
            comparable = row.variant in (ours.variant, "") or (ours.variant, row.variant) == ("warm", "cold")
            if same and comparable and ours.impl == "ours" and ours.gate:
                row.speedup[ours.variant] = row.seconds / ours.seconds


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    return [Row.from_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def timed(function: Callable[[], _Result], device: torch.device) -> tuple[float, _Result]:
    """Seconds of one call and its result. On a GPU: events around it, L2 flushed before."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result
    if device not in _flush:
        _flush[device] = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    _flush[device].zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result


def measure_in_turn(
    functions: Sequence[Callable[[], object]], repeats: Sequence[int], device: torch.device
) -> list[list[float]]:
    """Seconds of each function's calls, round robin, so that a slow minute of the machine hits all alike."""
    samples: list[list[float]] = [[] for _ in functions]
    for turn in range(max(repeats, default=0)):
        for function, count, list_ in zip(functions, repeats, samples, strict=True):
            if turn < count:
                list_.append(timed(function, device)[0])
    return samples


def summary(samples: Sequence[float]) -> tuple[float, float, float, int]:
    """Median, minimum, maximum and number."""
    return statistics.median(samples), min(samples), max(samples), len(samples)


@contextmanager
def equal_threads(threads: int) -> Iterator[None]:
    """Give torch and the BLAS behind numpy and scipy the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        try:
            limits = importlib.import_module("threadpoolctl").threadpool_limits(threads)
        except ImportError:  # it comes with scikit-learn; without that there is no numpy peer to limit
            yield
        else:
            with limits:
                yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of this run depend on, with the machine's copy bandwidth and dense peak measured now."""
    on_gpu = device.type == "cuda"
    size = 2**28 if on_gpu else 2**25
    source, target = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
    factor = torch.randn(4096 if on_gpu else 2048, 4096 if on_gpu else 2048, device=device)
    copies, products = measure_in_turn([lambda: target.copy_(source), lambda: factor @ factor], [6, 6], device)
    return {
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "instructions": None if on_gpu else cpu_instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": _driver() if on_gpu else None,
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "numpy", "scipy", "sklearn", "triton", "cupy", "nvmath")
        },
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "copy_bytes_per_second": 2 * source.nbytes / min(copies[1:]),
        "fp32_flops_per_second": 2 * len(factor) ** 3 / min(products[1:]),
    }


def run_identifier() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_instructions() -> str:
    """What an integer GEMM can use of this CPU, and what ours uses: torch's int8 product, kernels of the library."""
    from s2d_kernels import _native_cpu
    from s2d_kernels.int8_product import int8_product_serves

    has = torch.cpu.get_capabilities()
    names = (
        "avx2",
        "avx512_f",
        "avx_vnni",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
        "neon",
        "i8mm",
        "sve",
    )
    found = ", ".join(name for name in names if has.get(name)) or "none of those that matter here"
    product = "exact, used" if int8_product_serves(127) else "not used"
    library = "not there" if _native_cpu.problem() else _native_cpu.capability()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}: {found}; torch._int_mm: {product}; libs2d_cpu: {library}"


def _output(*command: str) -> str | None:
    try:
        folder = Path(__file__).resolve().parent.parent
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=folder, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str:
    """The commit, with "+changes" when the code measured is not that commit's; "unknown" outside a checkout."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", "s2d_kernels", "csrc", "bench/*.py")
    return "unknown" if commit is None else commit + ("+changes" if changed else "")
