"""The captured activation is the largest |W x| of the step, by brute force."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from s2d_kernels.capture import ActivationCapture, GraphCapture
from s2d_kernels.parameters import find_matrices


def brute_force(weight: Tensor, rows: Tensor) -> tuple[float, int, Tensor]:
    y = rows.double() @ weight.double().mT
    token, neuron = divmod(int(y.abs().argmax()), weight.shape[0])
    return float(y[token, neuron].abs()), neuron, rows[token]


def check(capture: ActivationCapture, name: str, weight: Tensor, rows: Tensor) -> None:
    got = capture.stop()[name]
    value, neuron, x = brute_force(weight, rows)
    assert got.value.item() == pytest.approx(value, rel=1e-5)
    assert got.neuron == neuron
    assert torch.equal(got.x, x)
    assert torch.equal(got.weight, weight)


def started(model: nn.Module, **kwargs: object) -> ActivationCapture:
    capture = ActivationCapture(find_matrices(model, **kwargs)[0])
    capture.start()
    return capture


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
def test_linear_of_any_batch_shape(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(9, 7, bias=bias)
    if bias:
        nn.init.constant_(layer.bias, 100.0)  # must not count
    capture = started(layer)
    x = torch.randn(*shape, 9)
    layer(x)
    check(capture, "weight", layer.weight.detach(), x.reshape(-1, 9))


def test_maximum_over_calls_and_no_gradient_calls_ignored() -> None:
    layer = nn.Linear(9, 7)
    capture = started(layer)
    x = torch.randn(3, 4, 9)
    for micro_batch in x:
        layer(micro_batch)
    with torch.no_grad():
        layer(1000 * x)
    check(capture, "weight", layer.weight.detach(), x.reshape(-1, 9))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    layer = nn.Linear(9, 7)
    capture = started(layer)
    x = torch.randn(5, 9, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    check(capture, "weight", layer.weight.detach(), x.detach())


def test_fused_projection_by_blocks() -> None:
    qkv = nn.Module()
    qkv.qkv = nn.Linear(8, 24)
    capture = started(qkv)
    x = torch.randn(11, 8)
    qkv.qkv(x)
    captured = capture.stop()
    for start in (0, 8, 16):
        weight = qkv.qkv.weight.detach()[start : start + 8]
        value, neuron, row = brute_force(weight, x)
        got = captured[f"qkv.weight[{start}:{start + 8}]"]
        assert got.value.item() == pytest.approx(value, rel=1e-5)
        assert got.neuron == neuron
        assert torch.equal(got.x, row)


def test_patch_embedding_as_a_linear_layer() -> None:
    convolution = nn.Conv2d(3, 10, 4, stride=4)
    nn.init.constant_(convolution.bias, 50.0)
    images = torch.randn(2, 3, 12, 8)
    capture = started(convolution)
    convolution(images)
    corners = [(b, i, j) for b in range(2) for i in range(0, 12, 4) for j in range(0, 8, 4)]
    patches = torch.stack([images[b, :, i : i + 4, j : j + 4].reshape(-1) for b, i, j in corners])
    got = capture.stop()["weight"]
    value, neuron, x = brute_force(convolution.weight.detach().flatten(1), patches)
    assert got.value.item() == pytest.approx(value, rel=1e-5)
    assert got.neuron == neuron
    assert torch.equal(got.x, x)


@pytest.mark.parametrize("call", [lambda a, q, k: a(q, k, k), lambda a, q, k: a(query=q, key=k, value=k)])
def test_packed_attention_projection(call: Callable) -> None:
    attention = nn.MultiheadAttention(8, 2)
    query, key = torch.randn(5, 3, 8), torch.randn(6, 3, 8)
    capture = started(attention)
    call(attention, query, key)
    captured = capture.stop()
    for start, rows in ((0, query), (8, key), (16, key)):
        value, neuron, _ = brute_force(attention.in_proj_weight.detach()[start : start + 8], rows.reshape(-1, 8))
        got = captured[f"in_proj_weight[{start}:{start + 8}]"]
        assert got.value.item() == pytest.approx(value, rel=1e-5)
        assert got.neuron == neuron


def test_non_finite_activations_are_left_out() -> None:
    layer = nn.Linear(9, 7)
    x = torch.randn(5, 9)
    capture = started(layer)
    poisoned = x.clone()
    poisoned[2, 3], poisoned[4, 0] = float("nan"), float("inf")
    layer(poisoned)
    check(capture, "weight", layer.weight.detach(), x[[0, 1, 3]])


def test_weight_is_the_one_of_the_first_forward() -> None:
    layer = nn.Linear(9, 7)
    before = layer.weight.detach().clone()
    capture = started(layer)
    layer(torch.randn(2, 9))
    with torch.no_grad():
        layer.weight.mul_(2)
    layer(torch.randn(2, 9))
    assert torch.equal(capture.stop()["weight"].weight, before)
    assert not layer._forward_hooks


def test_autocast() -> None:
    layer = nn.Linear(9, 7)
    capture = started(layer)
    x = torch.randn(5, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    got = capture.stop()["weight"]
    assert got.value.item() == pytest.approx(brute_force(layer.weight.detach(), x)[0], rel=2e-2)
    assert got.x.dtype == torch.float32


def test_an_overflowing_output_is_the_largest() -> None:
    layer = nn.Linear(8, 7, bias=False)
    with torch.no_grad():
        layer.weight[3] = 1e4
    x = torch.ones(2, 8) * 3
    capture = started(layer)
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(x).isinf().any()
    assert capture.stop()["weight"].neuron == 3


def test_a_linear_that_returns_its_bias_beside_the_output() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.bias

    layer = Pair(9, 7)
    capture = started(layer)
    x = torch.randn(5, 9)
    layer(x)
    check(capture, "weight", layer.weight.detach(), x)


# --- subclasses that are called otherwise than their base ---------------------------------------------------------


class Named(nn.Linear):
    def forward(self, h: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(h) * scale


class Indexed(nn.Linear):
    def forward(self, index: object, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class InDict(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"norm": x.norm(), "out": super().forward(x)}


class Second(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.norm(), super().forward(x)


class WithBias(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.bias


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x).flatten(0, -2), self.bias


class PixelsAndSum(nn.Conv2d):
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(pixels)
        return y.sum(), y


class Pixels(nn.Conv2d):
    def forward(self, step: int, pixels: Tensor) -> Tensor:
        return super().forward(pixels)


GENERATOR = torch.Generator().manual_seed(0)
X, OTHER, IMAGE = (torch.randn(shape, generator=GENERATOR) for shape in ((5, 9), (5, 9), (2, 3, 12, 8)))
UNAMBIGUOUS = {
    "another name": (Named, (), {"h": X, "scale": 1.0}),
    "the usual name": (nn.Linear, (), {"input": X}),
    "after a number": (Indexed, (0, X), {}),
    "after integers": (Indexed, (torch.arange(9), X), {"mask": torch.ones(5, 5)}),
    "the first": (Named, (X,), {"scale": torch.ones(9)[:1]}),
    "output in a dict": (InDict, (X,), {}),
    "second output": (Second, (X,), {}),
    "its bias beside it": (WithBias, (X,), {}),
    "one row, its bias beside it": (WithBias, (X[:1],), {}),
    "tokens in one row, its bias beside it": (Flat, (X.view(5, 1, 9),), {}),
    "patches": (Pixels, (7,), {"pixels": IMAGE}),
    "patches, second output": (PixelsAndSum, (IMAGE,), {}),
}


@pytest.mark.parametrize("how", ["hooks", "graph", "compiled"])
@pytest.mark.parametrize("case", list(UNAMBIGUOUS))
def test_a_subclass_with_another_signature(case: str, how: str) -> None:
    kind, args, kwargs = UNAMBIGUOUS[case]
    patches = issubclass(kind, nn.Conv2d)
    layer = kind(3, 10, 4, stride=4) if patches else kind(9, 10)
    matrices = find_matrices(layer)[0]
    capture = ActivationCapture(matrices) if how == "hooks" else GraphCapture(matrices)
    torch.compiler.reset()  # each case is another program for the same code
    run = torch.compile(layer, backend="eager", fullgraph=True) if how == "compiled" else layer
    capture.start()
    run(*args, **kwargs)
    rows = X[:1] if case.startswith("one row") else X
    if patches:
        rows = F.unfold(IMAGE, 4, stride=4).mT.reshape(-1, 48)
    check(capture, "weight", layer.weight.detach().flatten(1), rows)


def test_attention_with_another_signature() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(h, h, h, attn_mask=mask)[0]

    attention = Own(8, 2)
    x = torch.randn(5, 3, 8)
    capture = started(attention)
    attention(x, torch.zeros(5, 5, dtype=torch.bool))
    captured = capture.stop()
    for start in (0, 8, 16):
        value, neuron, _ = brute_force(attention.in_proj_weight.detach()[start : start + 8], x.reshape(-1, 8))
        got = captured[f"in_proj_weight[{start}:{start + 8}]"]
        assert (got.value.item(), got.neuron) == (pytest.approx(value, rel=1e-5), neuron)  # fp32 sums


class Gated(nn.Linear):
    def forward(self, *, h: Tensor, gate: Tensor) -> Tensor:
        return super().forward(h * gate)


class Listed(nn.Linear):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return super().forward(sum(parts))


class Pooled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(0, keepdim=True))


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Cut(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :5]


AMBIGUOUS = {
    Gated: (
        (),
        {"h": X, "gate": OTHER},
        r"expected one input with size 9 in dimension -1 among \[\(5, 9\), \(5, 9\)\]",
    ),
    Listed: (([X, OTHER],), {}, r"expected one input with size 9 in dimension -1 among \['list'\]"),
    Pooled: ((X,), {}, "5 input rows on cpu do not fit 1 output rows on cpu"),
    Router: ((X,), {}, r"expected one output with size 27 in dimension -1 among \[\(5, 27\), \(5, 27\)\]"),
    Cut: ((X,), {}, r"expected one output with size 27 in dimension -1 among \[\(5, 5\)\]"),
}


@pytest.mark.parametrize("how", ["hooks", "graph"])
@pytest.mark.parametrize("kind", list(AMBIGUOUS))
def test_what_cannot_be_told_names_the_layer_and_the_way_out(kind: type[nn.Linear], how: str) -> None:
    args, kwargs, fault = AMBIGUOUS[kind]
    model = nn.ModuleDict({"qkv": kind(9, 27)})
    matrices = find_matrices(model)[0]
    assert len(matrices) == 3
    capture = ActivationCapture(matrices) if how == "hooks" else GraphCapture(matrices)
    capture.start()
    advice = r'Leave it out with select=\[\(r"\^qkv.weight\$", False\)\]'
    with pytest.raises(TypeError, match=rf"a call of {kind.__name__} 'qkv.weight': {fault}. {advice}"):
        model["qkv"](*args, **kwargs)
    capture.stop()
    assert find_matrices(model, select=[("^qkv.weight$", False)])[0] == []


def test_the_way_out_of_one_block_is_that_of_all() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"router2": Router(9, 10)}) for _ in range(12))})
    capture = ActivationCapture(find_matrices(model)[0])
    capture.start()
    with pytest.raises(TypeError, match=r"layers.11.router2.weight") as raised:
        model["layers"][11]["router2"](X)
    capture.stop()
    pattern = re.search(r'select=\[\(r"(.*)", False\)\]', str(raised.value))[1]
    assert find_matrices(model, select=[(pattern, False)])[0] == []


# --- the operation that stays in the graph ------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(self.patch(x).flatten(2).mT)


@pytest.mark.parametrize("compiled", [False, True])
def test_graph_capture_finds_what_hooks_find(compiled: bool) -> None:
    torch.manual_seed(0)
    model = Small()
    matrices = find_matrices(model, k_max=1)[0]
    hooks, resident = ActivationCapture(matrices), GraphCapture(matrices)
    graphs = []

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(module)
        return module

    run = torch.compile(model, backend=count, fullgraph=True) if compiled else model
    batches = torch.randn(4, 2, 3, 12, 8)
    run(1000 * batches[0])  # not enabled
    for turn in range(2):
        resident.start()
        for x in batches[2 * turn : 2 * turn + 2]:
            run(x)
        found = resident.stop()
        hooks.start()
        for x in batches[2 * turn : 2 * turn + 2]:
            model(x)
        expected = hooks.stop()
        assert found.keys() == expected.keys()
        assert len(found) == 4
        for name, one in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(found[name][:4], one[:4], strict=True)), name
            assert one.certain
            assert not found[name].certain
    assert len(graphs) == compiled
    assert not compiled or "capture_largest_" in graphs[0].code
    assert resident.stop() == {}
    resident.remove()
    assert not model.qkv._forward_hooks


def test_graph_capture_copies_the_weights_when_it_is_told() -> None:
    layer = nn.Linear(9, 7)
    before = layer.weight.detach().clone()
    for at_start in (True, False):
        capture = GraphCapture(find_matrices(layer)[0], copy_at_start=at_start)
        with torch.no_grad():
            layer.weight.copy_(before)
        capture.start()
        layer(torch.randn(2, 9))
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(capture.stop()["weight"].weight, before if at_start else 2 * before)
        capture.start()
        assert capture.stop()["weight"].x.isnan().all()
        capture.remove()
    with pytest.raises(NotImplementedError, match=r"'in_proj_weight\[0:8\]' is projected inside"):
        GraphCapture(find_matrices(nn.MultiheadAttention(8, 2))[0])
