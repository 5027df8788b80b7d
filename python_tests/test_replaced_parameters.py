"""Parameters replaced after S2D was built: a clear error, and none where the model still trains the same ones."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from training import LR, spiked_model, train

from s2d_kernels import S2D, SpectralAdamW

REPLACED = r"parameter '0\.weight' was replaced after S2D was built.*build S2D anew.*without assign=True"
STRENGTH = {"coupled": 5e-4, "decoupled": 1.0}


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_one(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


@pytest.mark.parametrize("replace", [load_assigned, replace_one])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_the_first_step_refuses_replaced_parameters(mode: str, replace: Callable[[nn.Module], None]) -> None:
    """Also `attach`, `SpectralAdamW`, and the steps of an optimizer that was attached before."""
    model, v = spiked_model()
    reg, attached = (S2D(model, mode=mode, strength=STRENGTH[mode], interval=10, lead=0) for _ in range(2))
    before = torch.optim.SGD(model.parameters(), lr=LR)
    attached.attach(before)
    replace(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    steps = (
        lambda: train(model, reg, optimizer, v, range(1)),
        lambda: reg.attach(optimizer),
        lambda: SpectralAdamW(model.parameters(), LR, regularizer=reg),
    )
    for step in steps:
        with pytest.raises(ValueError, match=REPLACED):
            step()
    if replace is replace_one:  # what it still holds has gradients
        with pytest.raises(ValueError, match=REPLACED):
            before.step()
    assert reg.step == attached.step == 0


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_replaced_in_training_is_refused_at_the_next_refresh(mode: str) -> None:
    model, v = spiked_model()
    reg = S2D(model, mode=mode, strength=STRENGTH[mode], interval=4, lead=1)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(2))
    replace_one(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match=REPLACED):
        train(model, reg, optimizer, v, range(2, 8))
    assert reg.step == 4
    reg.close()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_resumed_run_refuses_replaced_parameters_between_two_refreshes(mode: str) -> None:
    model, v = spiked_model()
    reg = S2D(model, mode=mode, strength=STRENGTH[mode], interval=4, lead=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    train(model, reg, optimizer, v, range(2))
    weights, state = copy.deepcopy(model.state_dict()), reg.state_dict()
    model.load_state_dict(weights)
    reg.load_state_dict(state)
    train(model, reg, optimizer, v, range(2, 3))
    model.load_state_dict(weights, assign=True)
    reg.load_state_dict(state)
    with pytest.raises(ValueError, match=REPLACED):
        train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(2, 3))
    reg.close()


def test_a_twin_that_got_its_own_parameter_is_refused() -> None:
    model = nn.ModuleDict({"one": nn.Linear(16, 16), "two": nn.Linear(16, 16)})
    model["two"].weight = model["one"].weight
    reg = S2D(model, interval=3, lead=0)

    def step() -> None:
        model["two"](model["one"](torch.randn(4, 16))).square().mean().backward()
        reg.add_grad()

    step()
    model["two"].weight = nn.Parameter(torch.randn(16, 16))
    step()
    step()
    with pytest.raises(ValueError, match=r"parameter 'one\.weight' was replaced"):
        step()
    reg.close()


def test_a_parametrization_that_makes_other_parameters_is_refused() -> None:
    model, v = spiked_model()
    reg = S2D(model)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=REPLACED):
        train(model, reg, torch.optim.SGD(model.parameters(), lr=LR), v, range(1))


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 1.5 * weight


def parametrized(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrize.register_parametrization(model[0], "weight", Scaled())
    return model


def pruned(model: nn.Sequential) -> nn.Module:
    prune.l1_unstructured(model[0], "weight", amount=0.25)
    return model


def parametrized_elsewhere(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.append(nn.Linear(32, 32))[3])
    return model


def compiled(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="eager")


def loaded(model: nn.Sequential) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model.double().float()


def tied(model: nn.Sequential) -> nn.Module:
    model.append(nn.Linear(32, 64)).append(nn.Linear(64, 32))
    model[3].weight = model[0].weight
    return model


class WithExperts(nn.Module):
    """A stack of expert matrices, attention, and low-rank adapters, beside the model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.attention = body, nn.MultiheadAttention(32, 2)
        self.experts = nn.Parameter(torch.randn(4, 32, 32))
        self.lora_A, self.lora_B = nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0] + self.body(x)
        return x @ self.experts[0] + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", [parametrized, pruned, parametrized_elsewhere, compiled, loaded, tied, WithExperts])
def test_what_still_trains_the_same_parameters_is_no_false_alarm(
    wrap: Callable[[nn.Module], nn.Module], when: str
) -> None:
    """Whatever was done, before S2D is built or after it."""
    model, v = spiked_model()
    if when == "before":
        model = wrap(model)
        reg = S2D(model, interval=2, lead=0)
    else:
        reg = S2D(model, interval=2, lead=0)
        model = wrap(model)
    train(model, reg, torch.optim.SGD(model.parameters(), lr=1e-4), v, range(4), lr=1e-4)
    assert reg.step == 4
    reg.close()


FULLY_SHARDED = """
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from s2d_kernels import S2D

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
reg = S2D(model)
wrapped = nn.parallel.DistributedDataParallel(model)
wrapped(torch.randn(4, 16)).square().mean().backward()
reg.add_grad()
print(reg.step)
reg.close()
reg = S2D(model)
fully_shard(model)
model(torch.randn(4, 16)).square().mean().backward()
try:
    reg.attach(torch.optim.SGD(model.parameters(), lr=1.0))
except NotImplementedError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_wrappers_of_torch_distributed() -> None:
    """DistributedDataParallel keeps the parameters; FSDP2 replaces them by DTensors, and is named for what it is."""
    done = subprocess.run(
        [sys.executable, "-c", FULLY_SHARDED], capture_output=True, text=True, timeout=120, check=True
    )
    steps, refusal = done.stdout.splitlines()
    assert steps == "1"
    assert refusal.startswith("parameter '0.weight' is a DTensor: sharded models")
