"""When a mode="ptq" layer quantizes its weight again: more often than the weight's version says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from s2d_kernels import fake_quant, ops, quantize_, quantizers


def quantized() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    quantize_(model, mode="ptq")
    return model


def agrees(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward without gradients, which may use kept codes, gives what one with gradients gives."""
    with torch.no_grad():
        y = model(x)
    return torch.equal(y, model(x).detach())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("between", [False, True])
def test_steps_of_fused_optimizers_are_noticed(kind: type[torch.optim.Optimizer], between: bool) -> None:
    """They write the weight and leave its version alone; also where a forward comes between backward and step."""
    model, x = quantized(), torch.randn(4, 16)
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = model(x)
    version = model[0].weight._version
    model(x).square().sum().backward()
    if between:
        with torch.no_grad():
            model(x)
    optimizer.step()
    assert model[0].weight._version == version  # else this test shows nothing
    assert agrees(model, x)
    with torch.no_grad():
        assert not torch.equal(model(x), before)


def test_steps_of_others_leave_the_codes_of_a_frozen_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantized().requires_grad_(False), torch.randn(4, 16)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    with torch.no_grad():
        model(x)
        torch.optim.SGD([other], lr=0.1).step()
        monkeypatch.setattr(fake_quant.quant_ops, "quantize_weight", lambda *_, **__: pytest.fail("quantized again"))
        model(x)


def test_a_weight_that_was_frozen_before_and_after_it_was_trained() -> None:
    model, x = quantized().requires_grad_(False), torch.randn(4, 16)
    assert agrees(model, x)
    model.requires_grad_(True)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    model.requires_grad_(False)
    assert agrees(model, x)


@pytest.mark.parametrize("mode", [False, True])
def test_train_and_eval_end_them(mode: bool) -> None:
    """What replays of a captured training step do to a weight is seen by nobody."""
    model, x = quantized(), torch.randn(4, 16)
    assert agrees(model, x)
    model[0].weight.data.mul_(3)
    model.train(mode)
    assert agrees(model, x)


def test_a_capture_neither_keeps_codes_nor_uses_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept ones would be freed under the graph; its own are there only after a replay."""
    model, x = quantized(), torch.randn(4, 16)
    capturing = False
    monkeypatch.setattr(ops, "capturing", lambda device: capturing)
    made = []
    original = fake_quant.quant_ops.quantize_weight
    monkeypatch.setattr(fake_quant.quant_ops, "quantize_weight", lambda *a, **k: made.append(1) or original(*a, **k))
    with torch.no_grad():
        capturing = True
        model(x)
        assert fake_quant.KEPT_CODES not in model[0].__dict__
        capturing = False
        model(x), model(x)
        assert len(made) == 2
        capturing = True
        model(x)
        assert len(made) == 3


def test_another_stream_neither_uses_nor_ends_what_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and tables that one stream has queued may not be there yet for another."""
    model, x = quantized(), torch.randn(4, 16)
    stream = 1
    monkeypatch.setattr(ops, "current_stream", lambda device: stream)
    made = []
    original = fake_quant.quant_ops.quantize_weight
    monkeypatch.setattr(fake_quant.quant_ops, "quantize_weight", lambda *a, **k: made.append(1) or original(*a, **k))
    mask = torch.tensor([[5]], dtype=torch.uint8)
    with torch.no_grad():
        model(x), model(x)
        here = quantizers._table(mask)
        assert quantizers._table(mask) is here
        stream = 2
        model(x)
        assert len(made) == 2
        assert quantizers._table(mask) is not here


def test_conversion_may_swap_parameters() -> None:
    model, x = quantized(), torch.randn(4, 16)
    with torch.no_grad():
        model(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(model.state_dict())
        with torch.no_grad():
            model(x)
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.bfloat16
    assert agrees(model, x.bfloat16())
