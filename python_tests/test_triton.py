"""The Triton kernels, run by Triton's interpreter on CPU tensors.

Whether a kernel is interpreted is decided when it is defined, so each test here runs the functions of this file that
begin with `run_` in a process of its own that has TRITON_INTERPRET=1; with `--device cuda` they run compiled as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interpreting import Done, save_time
from torch import Tensor

from s2d_kernels import ops, triton_kernels
from s2d_kernels.triton_kernels import common, penalty

ROOT = Path(__file__).parent.parent
# Half a unit in the last place of the dtype: the one rounding that the contract allows.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
SHAPES = [(1, 1), (1, 37), (63, 1), (37, 63), (63, 37), (199, 5), (5, 199), (40, 136)]
RANKS = [1, 1, 0, 2, 3, 5, 1, 4]
MISSING = f"Triton is missing: {triton_kernels.INSTALL_HINT}"


def inputs(
    dtype: torch.dtype, device: torch.device, *, layout: str = "contiguous", ranks: list[int] = RANKS, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients, U, Vh, coefficients, and the storages that the gradients are views of."""
    generator = torch.Generator().manual_seed(seed)
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grads, Us, Vhs, cs, storages = [], [], [], [], []
    for (m, n), rank in zip(SHAPES, ranks, strict=True):
        if layout == "contiguous":
            storage = random(m, n).to(device, dtype)
            view = storage
        elif layout == "columns":
            storage = random(m + 2, 3 * n + 4).to(device, dtype)
            view = storage[1 : m + 1, 2 : 3 * n + 2 : 3]
        elif layout == "rows":
            storage = random(2 * m, n + 8).to(device, dtype)
            view = storage[::2, :n]
        else:
            storage = random(n + 1, m + 3).to(device, dtype)
            view = storage[1:, 3:].T
        assert view.shape == (m, n)
        grads.append(view)
        storages.append(storage)
        # As topk_svd leaves them: leading columns of more, a transposed U.
        Us.append(random(rank + 1, m).to(device, sum_dtype).T[:, :rank])
        Vhs.append(random(rank + 1, n).to(device, sum_dtype)[:rank])
        cs.append(random(rank).to(device, sum_dtype))
    return grads, Us, Vhs, cs, storages


def add(*arguments: object) -> None:
    torch.ops.s2d.add_penalty_grad_(*arguments, None, "triton")


def check(dtype: torch.dtype, device: torch.device, *, repeat: bool = True, **kwargs: object) -> None:
    """One rounding to the gradient's dtype, and in the sum's dtype k products and their additions."""
    grads, Us, Vhs, cs, storages = inputs(dtype, device, **kwargs)
    outside = [storage.clone() for storage in storages]
    before = [grad.double().clone() for grad in grads]
    add(grads, Us, Vhs, cs)
    again = inputs(dtype, device, **kwargs)[:4]
    if repeat:
        add(*again)
    sum_unit = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    for index, (grad, start, U, Vh, c) in enumerate(zip(grads, before, Us, Vhs, cs, strict=True)):
        exact = start + (U.double() * c.double()) @ Vh.double()
        magnitude = start.abs() + (U.double() * c.double()).abs() @ Vh.double().abs()
        bound = ROUNDING[dtype] * exact.abs() * (1 + 2**-8) + (2 * len(c) + 2) * sum_unit * magnitude
        if dtype == torch.float16:
            bound += 2.0**-25
        error = (grad.double() - exact).abs()
        assert bool((error <= bound).all()), (dtype, kwargs, index, float((error - bound).max()))
        assert not repeat or torch.equal(grad, again[0][index]), (index, "other bits the second time")
        if not len(c):
            assert torch.equal(grad.double(), start)
        grad.copy_(start)
        assert torch.equal(storages[index], outside[index]), (index, "wrote outside the view")


def run_formula(device: torch.device) -> None:
    for dtype in ROUNDING:
        for layout in ("contiguous", "columns", "rows", "transposed"):
            check(dtype, device, layout=layout, repeat=layout == "contiguous")
    check(torch.float32, device, ranks=[1, 3, 1, 8, 9, 17, 0, 2], seed=1)


def run_one_layer(device: torch.device) -> None:
    """No search to do, and a single launch whatever the number of tiles."""
    grad = torch.zeros(70, 300, device=device)
    U, Vh, c = torch.ones(70, 1, device=device), torch.ones(1, 300, device=device), torch.ones(1, device=device)
    add([grad], [U], [Vh], [c])
    assert torch.equal(grad, torch.ones_like(grad))


def run_offsets_beyond_32_bits(device: torch.device) -> None:
    """Rows 2^31 elements apart; of the 4 GiB only what is read or written is ever touched."""
    rows, far = 140, 2**31 // 130  # the last tiles begin beyond 2^31
    storage = torch.empty(rows * far + 64, dtype=torch.bfloat16, device=device)
    for cols in (3, 16):
        grad = storage.as_strided((rows, cols), (far // 8 * 8, 1), 16)
        grad.fill_(1.0)
        c, U = torch.ones(1, device=device), torch.arange(rows, dtype=torch.float32, device=device)[:, None]
        add([grad], [U], [torch.ones(1, cols, device=device)], [c])
        assert torch.equal(grad.float(), (1 + U).bfloat16().float().expand(rows, cols))
    # Factors as far apart: rows of U, and rows of Vh.
    storage = torch.empty(2**31 + 64, dtype=torch.float32, device=device)
    U = storage.as_strided((2, 1), (2**31, 1))
    U.copy_(torch.tensor([[2.0], [5.0]]))
    grad = torch.zeros(2, 8, device=device)
    add([grad], [U], [torch.ones(1, 8, device=device)], [torch.ones(1, device=device)])
    assert grad[:, 0].tolist() == [2.0, 5.0]
    Vh = storage.as_strided((2, 8), (2**31, 1), 16)
    Vh.copy_(torch.tensor([[1.0], [10.0]]).expand(2, 8))
    grad.zero_()
    add([grad], [torch.ones(2, 2, device=device)], [Vh], [torch.ones(2, device=device)])
    assert (grad == 11).all()


def run_rounding(device: torch.device) -> None:
    """bf16 to the nearest, ties to even, as torch rounds; NaN and infinity stay."""
    bits = torch.arange(0, 2**16, dtype=torch.int32)
    # Around each bf16 in fp32: below, at and above the tie with its neighbour.
    for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF):
        sums = ((bits << 16) | low).view(torch.float32).reshape(256, 256).to(device)
        sums = sums[:, :64].contiguous()
        grad = torch.zeros_like(sums, dtype=torch.bfloat16)
        # One row at a time is exact: Vh is the row itself, multiplied by 1.
        rows = list(grad)
        picked = [5, 64, 127, 128, 200, 255]
        add(
            [rows[i][None] for i in picked],
            [torch.ones(1, 1, device=device)] * len(picked),
            [sums[i][None] for i in picked],
            [torch.ones(1, device=device)] * len(picked),
        )
        for i in picked:
            torch.testing.assert_close(grad[i], sums[i].to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def run_mixed_dtypes(device: torch.device) -> None:
    """One call, one launch a dtype; a gradient given twice gets both sums."""
    grads = [torch.zeros(9, 16, dtype=dtype, device=device) for dtype in ROUNDING]
    U, Vh, c = torch.ones(9, 1, device=device), torch.ones(1, 16, device=device), torch.full((1,), 2.0, device=device)
    count = len(grads) + 1
    get, layers = common.TABLES.get, []
    common.TABLES.get = lambda rows, where: (layers.append(len(rows)), get(rows, where))[1]
    add([*grads, *grads[:1]], [U] * count, [Vh] * count, [c] * count)
    add([grads[1][:4], grads[1][4:]], [U[:4], U[4:]], [Vh] * 2, [c * 0] * 2)
    common.TABLES.get = get
    # The second sum of the first gradient waits for the first one; two parts of a gradient share a launch.
    assert layers == [1, 1, 1, 1, 1, 2]
    for index, grad in enumerate(grads):
        assert torch.equal(grad, torch.full_like(grad, 2.0 * (1 + (index == 0)))), index


def run_opcheck(device: torch.device) -> None:
    arguments = inputs(torch.float32, device)[:4]
    torch.library.opcheck(torch.ops.s2d.add_penalty_grad_.default, (*arguments, None, "triton"))


def run_through_the_public_function(device: torch.device) -> None:
    import s2d_kernels

    factors = s2d_kernels.topk_svd([torch.randn(20, 30, device=device)], k=2)
    got, expected = torch.ones(20, 30, device=device), torch.ones(20, 30, device=device)
    s2d_kernels.add_penalty_grad_([got], factors, strength=0.1, impl="triton")
    s2d_kernels.add_penalty_grad_([expected], factors, strength=0.1, impl="reference")
    torch.testing.assert_close(got, expected)


def run_refusals(device: torch.device) -> None:
    grads = [torch.zeros(4, 6, device=device), torch.zeros(4, 6, device=device)]
    U, Vh, c = torch.ones(4, 2, device=device), torch.ones(2, 6, device=device), torch.ones(2, device=device)
    for bad in (([U, U[:3]], [Vh, Vh], [c, c]), ([U, U], [Vh, Vh[:, :5]], [c, c]), ([U, U], [Vh, Vh], [c, c[:1]])):
        with pytest.raises(ValueError, match=r"\[1\] has shape .* does not fit grads\[1\] \(4, 6\)"):
            add(grads, *bad)
        assert not any(grad.any() for grad in grads)
    with pytest.raises(ValueError, match=r"equally long, got grads: 2, U: 1"):
        add(grads, [U], [Vh, Vh], [c, c])
    assert not any(grad.any() for grad in grads)


def run_ranks_on_the_device(device: torch.device) -> None:
    grads = [torch.zeros(4, 6, device=device) for _ in range(4)]
    U, Vh = torch.ones(4, 3, device=device), torch.ones(3, 6, device=device)
    c = torch.tensor([1.0, 10.0, 100.0], device=device)
    ranks = torch.tensor([2, 0, 9, -1], dtype=torch.int32, device=device)
    torch.ops.s2d.add_penalty_grad_(grads, [U] * 4, [Vh] * 4, [c] * 4, ranks, "triton")
    assert [grad.unique().tolist() for grad in grads] == [[11.0], [0.0], [111.0], [0.0]]


RUNS: dict[str, Callable[[torch.device], None]] = {
    name: value for name, value in dict(globals()).items() if name.startswith("run_")
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.interpreted(name)) for name in RUNS])
def test_interpreted(name: str, interpreted: Done) -> None:
    assert interpreted.returncode == 0, interpreted.stdout + interpreted.stderr


@pytest.mark.parametrize("name", list(RUNS))
def test_compiled(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("compiled Triton needs --device cuda; bench audit compiles the kernels without a GPU")
    assert triton_kernels.triton is not None, MISSING
    RUNS[name](device)


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    assert triton_kernels.triton is not None, MISSING
    grad = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="impl='triton' needs CUDA tensors, got one on cpu: .*TRITON_INTERPRET=1"):
        add([grad], [torch.ones(2, 1)], [torch.ones(1, 3)], [torch.ones(1)])
    assert not grad.any()
    assert ops.choose("add_penalty_grad_", None, torch.device("cpu")) != "triton"


def test_without_triton_the_package_imports_and_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from s2d_kernels import ops, triton_kernels\n"
        "try:\n"
        "    one = [torch.ones(1, 1)]\n"
        "    torch.ops.s2d.add_penalty_grad_(one, one, one, [torch.ones(1)], None, 'triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert triton_kernels.INSTALL_HINT in done.stdout, done.stdout + done.stderr


def test_table_rows_describe_the_layer() -> None:
    grad, U, Vh, c = torch.zeros(8, 16), torch.zeros(8, 2), torch.zeros(2, 16), torch.zeros(2)
    row = penalty._layer(7, grad, U, Vh, c)
    assert (row.first_tile, row.rows, row.cols, row.rank, row.aligned) == (7, 8, 16, 2, 1)
    assert (row.grad, row.grad_row, row.grad_col) == (grad.data_ptr(), 16, 1)
    # A transposed gradient: the equation is transposed with it.
    transposed = penalty._layer(0, torch.zeros(16, 8).T, U, Vh, c)
    assert (transposed.rows, transposed.cols, transposed.grad_col) == (16, 8, 1)
    assert (transposed.left, transposed.right) == (Vh.data_ptr(), U.data_ptr())
    # Not aligned: an odd start, an odd stride, an odd number of columns.
    storage = torch.zeros(8, 20)
    assert not penalty._layer(0, storage[:, 1:17], U, Vh, c).aligned
    assert penalty._layer(0, storage[:, 4:20], U, Vh, c).aligned
    assert not penalty._layer(0, torch.zeros(8, 17)[:, :16], U, Vh, c).aligned
    assert not penalty._layer(0, torch.zeros(8, 15), U, Vh[:, :15], c).aligned


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_tables_on_the_device_are_copied_only_when_their_content_is_new(count: int, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("device tables need --device cuda")
    import numpy as np

    tables = common.Tables()
    rows = np.arange(count * penalty.FIELDS, dtype=np.int64).reshape(count, -1)
    here = torch.device("cuda", torch.cuda.current_device())
    first = tables.get(rows, here)
    assert tables.get(rows.copy(), here) is first
    assert tables.copies == 1
    assert torch.equal(first.cpu(), torch.from_numpy(rows))
    rows[0, 1] += 8
    assert not torch.equal(tables.get(rows, here), first)
    assert tables.copies == 2


if __name__ == "__main__":
    save_time()
    torch.manual_seed(0)
    RUNS[sys.argv[1]](torch.device("cpu"))
