"""S2D in real trainers: the penalty acts once per optimizer step, with the bits of a plain loop on the same data."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainers import (
    BATCH,
    FORMS,
    LR,
    STEPS,
    Data,
    Net,
    assert_same,
    build,
    hugging_face,
    lightning_fit,
    lightning_module,
    optimizer_of,
    plain,
)

from s2d_kernels import S2D, integrations
from s2d_kernels.parameters import ParameterGroups


def test_the_comparison_can_fail() -> None:
    """The places and counts that the tests below tell apart give different weights."""
    base = plain("coupled", 1e-3, clip=0.3)
    for other in (plain("coupled", 1e-3, clip=0.3, clip_first=True), plain("coupled", 2e-3, clip=0.3)):
        with pytest.raises(AssertionError, match=r"body\.0\.weight differs"):
            assert_same(base, other)


# --- GradScaler ---------------------------------------------------------------------------------------------------


def by_attach(reg: S2D, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.step(optimizer)


def after_unscale(reg: S2D, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.unscale_(optimizer)
    reg.add_grad()
    scaler.step(optimizer)


def with_grad_scale(reg: S2D, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    reg.add_grad(grad_scale=scaler.get_scale())
    scaler.step(optimizer)


@pytest.mark.parametrize(
    ("mode", "strength", "step"),
    [
        ("coupled", 1e-3, by_attach),
        ("coupled", 1e-3, after_unscale),
        ("coupled", 1e-3, with_grad_scale),
        ("decoupled", 1.0, by_attach),
    ],
)
def test_grad_scaler(mode: str, strength: float, step: Callable[..., None]) -> None:
    """The scale is a power of two, so that the bits are those of the loop without it."""
    net, reg = build(mode, strength)
    optimizer = optimizer_of(net, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    if step is by_attach:
        reg.attach(optimizer)
    for batch in DataLoader(Data(STEPS), batch_size=BATCH):
        optimizer.zero_grad()
        scaler.scale(net(**batch)["loss"]).backward()
        step(reg, scaler, optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**13
    assert reg.step == STEPS
    assert_same(net, plain(mode, strength))


# --- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "strength"), FORMS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.3)])
def test_hugging_face_trainer(mode: str, strength: float, accumulate: int, clip: float, tmp_path: Path) -> None:
    net, reg = build(mode, strength)
    trainer = hugging_face(tmp_path, net, reg, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    trainer.train()
    assert reg.step == STEPS
    assert_same(net, plain(mode, strength, accumulate=accumulate, clip=clip, clip_first=True))
    assert not reg._handles  # detached at the end
    reg.close()


@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_hugging_face_trainer_resumes_with_the_same_bits(mode: str, strength: float, tmp_path: Path) -> None:
    """Checkpoint 6 is taken while the refresh of step 5 is under way."""
    net, reg = build(mode, strength)
    hugging_face(tmp_path, net, reg, save_strategy="steps", save_steps=6).train()
    assert int(torch.load(tmp_path / "checkpoint-6" / "s2d.pt", weights_only=True)["pending_step"]) == 5
    resumed, other = build(mode, strength)
    hugging_face(tmp_path, resumed, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert other.step == STEPS
    assert_same(net, resumed)
    (tmp_path / "checkpoint-6" / "s2d.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6' holds no s2d\.pt"):
        hugging_face(tmp_path, *build(mode, strength)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# --- Lightning ----------------------------------------------------------------------------------------------------


def lightning(folder: Path, mode: str, strength: float, **options: Any) -> tuple[nn.Module, S2D]:
    module = lightning_module(lambda net: optimizer_of(net, mode))
    reg = S2D(module, mode=mode, strength=strength, interval=5, lead=2)
    callbacks = [integrations.lightning_callback(reg), *options.pop("callbacks", ())]
    lightning_fit(folder, module, callbacks, **options)
    return module, reg


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and intervals
@pytest.mark.parametrize(("mode", "strength"), FORMS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.3)])
def test_lightning(mode: str, strength: float, accumulate: int, clip: float | None, tmp_path: Path) -> None:
    module, reg = lightning(
        tmp_path, mode, strength, batches=STEPS * accumulate, accumulate_grad_batches=accumulate, gradient_clip_val=clip
    )
    assert reg.step == STEPS
    assert_same(module.net, plain(mode, strength, accumulate=accumulate, clip=clip or 0.0))
    reg.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mode", "strength"), FORMS)
def test_lightning_resumes_with_the_same_bits(mode: str, strength: float, tmp_path: Path) -> None:
    """Two epochs of 6 steps; the checkpoint after the first has the refresh of step 5 under way."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    module, _ = lightning(tmp_path, mode, strength, batches=6, callbacks=[keep], enable_checkpointing=True)
    resumed, reg = lightning(tmp_path, mode, strength, batches=6, resume=tmp_path / "step=6.ckpt")
    assert reg.step == STEPS
    assert_same(module, resumed)


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_a_penalty_once_with_several_optimizers(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Two(pl.LightningModule):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net, self.other, self.shared = Net(), nn.Linear(16, 3), shared

        def training_step(self, batch: dict[str, Tensor], index: int) -> None:
            loss = self.net(**batch)["loss"] + self.other(batch["x"]).square().mean()
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            parts = (self.net.body[0], self.net.body[2]) if self.shared else (self.other, self.net)
            return [torch.optim.SGD(part.parameters(), lr=LR) for part in parts]

    def fit(shared: bool) -> S2D:
        module = Two(shared)
        reg = S2D(module.net, interval=5, lead=2)
        callback = integrations.lightning_callback(reg)
        lightning_fit(tmp_path, module, [callback], batches=STEPS, max_steps=-1, max_epochs=1)
        return reg

    assert fit(shared=False).step == STEPS
    with pytest.raises(ValueError, match="2 optimizers hold penalized matrices"):
        fit(shared=True)


# --- Accelerate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "strength"), FORMS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.3)])
def test_accelerate(mode: str, strength: float, accumulate: int, clip: float, tmp_path: Path) -> None:
    from accelerate import Accelerator

    net, reg = build(mode, strength)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    loader = DataLoader(Data(STEPS * accumulate), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(net, optimizer_of(net, mode), loader)
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer is no torch\.optim\.Optimizer with step hooks"):
        reg.attach(optimizer)
    integrations.attach_accelerate(reg, accelerator, optimizer)
    saved = None
    for index, batch in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if index == 6 * accumulate - 1:
            accelerator.save_state(str(tmp_path))
            saved = reg.state_dict()
    assert reg.step == STEPS
    assert_same(net, plain(mode, strength, accumulate=accumulate, clip=clip, clip_first=True))
    accelerator.load_state(str(tmp_path))
    assert reg.step == 6
    assert all(torch.equal(a, b) for a, b in zip(saved.values(), reg.state_dict().values(), strict=True))
    accelerator.free_memory()
    reg.close()


# --- torchtitan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_torchtitan_container(mode: str, tmp_path: Path) -> None:
    """Two optimizers stepped by the container, which has created their state by a step of its own."""
    from torch.distributed import checkpoint
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    def container(net: Net) -> OptimizersContainer:
        rates = {"lr": LR, "weight_decay": 0.01}
        groups = [
            ParamGroupConfig(pattern="body.0", optimizer_name="Adam", optimizer_kwargs={"lr": LR}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=rates),
        ]
        config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        return OptimizersContainer(config, model_parts=[net])

    def loop(attached: bool) -> tuple[Net, S2D, OptimizersContainer]:
        net, reg = build(mode, 1.0)
        optimizers = container(net)
        if attached:
            integrations.attach_torchtitan(reg, optimizers)
        optimizers.state_dict()  # as the checkpointer does: a step with zero gradients creates the state
        assert reg.step == 0
        for batch in DataLoader(Data(STEPS), batch_size=BATCH):
            optimizers.zero_grad()
            net(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            if not attached and mode == "coupled":
                reg.add_grad()
            optimizers.step()
            if not attached and mode == "decoupled":
                reg.decay_(LR)
        assert reg.step == STEPS
        return net, reg, optimizers

    net, reg, _ = loop(attached=True)
    assert_same(net, loop(attached=False)[0])
    # torchtitan's checkpointer saves its `states` with torch.distributed.checkpoint
    checkpoint.save({"s2d": reg}, checkpoint_id=tmp_path, no_dist=True)
    other = build(mode, 1.0)[1]
    checkpoint.load({"s2d": other}, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(a, b) for a, b in zip(reg.state_dict().values(), other.state_dict().values(), strict=True))


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["ds_id", "_hp_mapping"])
def test_deepspeed_zero_is_refused_also_when_it_comes_later(attribute: str) -> None:
    """The marks that deepspeed 0.19.8 was seen to leave on the parameters: stage 3, and stages 1 and 2."""
    net = Net()
    reg, explicit = S2D(net), S2D(net)
    net(torch.randn(2, 16))["loss"].backward()
    setattr(net.body[0].weight, attribute, None)
    for act in (lambda: S2D(net), lambda: reg.attach(torch.optim.SGD(net.parameters(), lr=LR)), explicit.add_grad):
        with pytest.raises(NotImplementedError, match=r"'body.0.weight' belongs to DeepSpeed ZeRO"):
            act()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_an_optimizer_in_the_backward_is_refused(mode: str) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    net, reg = build(mode, 1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    reg.attach(optimizer)
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": LR})
    with pytest.raises(NotImplementedError, match="updated by an optimizer in the backward"):
        S2D(net)
    net(torch.randn(2, 16))["loss"].backward()
    with pytest.raises(NotImplementedError, match="updated by an optimizer in the backward"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_gradients_taken_by_hooks_of_the_user_are_refused(mode: str) -> None:
    net, reg = build(mode, 1.0)
    inside = {p: torch.optim.SGD([p], lr=LR) for p in net.parameters()}

    def step(parameter: Tensor) -> None:
        inside[parameter].step()
        inside[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    reg.attach(optimizer)
    optimizer.step()  # no gradient, but nothing ran either
    net(torch.randn(2, 16))["loss"].backward()
    with pytest.raises(NotImplementedError, match=r"'body.0.weight' and 1 more have run forward.*in the backward"):
        optimizer.step()


SHARDED = """
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from s2d_kernels import S2D, topk_svd

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
S2D(model)  # one process is not several
weight = distribute_tensor(model[2].weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
model[2].weight = nn.Parameter(weight)
for act in (lambda: S2D(model), lambda: topk_svd([weight], k=3)):
    try:
        act()
    except NotImplementedError as error:
        print(error)
torch.distributed.destroy_process_group()
"""


def test_a_real_dtensor_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=120, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("parameter '2.weight' is a DTensor: sharded models")
    assert second.startswith("weights[0] is a DTensor: sharded tensors")


def test_attach_takes_optimizers_only_and_names_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    net, reg = build("coupled", 1e-3)
    with pytest.raises(TypeError, match=r"types\.SimpleNamespace is no torch\.optim\.Optimizer"):
        reg.attach(SimpleNamespace())
    reg.attach(torch.optim.SGD(net.body[0].parameters(), lr=LR))
    assert "1 of the 2 penalized matrices are not in the attached optimizer (first: body.2.weight)" in caplog.text


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _, reg = build("coupled", 1e-3)
    for name in ("transformers", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 's2d-kernels\[hf\]'"):
        integrations.trainer_callback(reg)
    with pytest.raises(ImportError, match=r"s2d-kernels\[lightning\]"):
        integrations.lightning_callback(reg)


def test_import_of_the_adapters_imports_no_trainer() -> None:
    names = ["transformers", "lightning", "pytorch_lightning", "accelerate", "torchtitan"]
    program = f"import sys, s2d_kernels.integrations\nprint([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_readme_names_the_versions_that_are_tested() -> None:
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    for package in ("transformers", "lightning", "accelerate", "torchtitan"):
        assert f"{package} {pinned[package]}" in readme
        assert version(package) == pinned[package]


def test_parameter_groups_follow_the_optimizer() -> None:
    net = Net()
    matrices = S2D(net).matrices
    optimizer = torch.optim.SGD(net.body[0].parameters(), lr=LR)
    groups = ParameterGroups(matrices, [optimizer])
    assert groups() is groups()
    assert {name: group["lr"] for name, group in groups().items()} == {"body.0.weight": LR}
    optimizer.add_param_group({"params": list(net.body[2].parameters()), "lr": 2 * LR, "momentum": 0.5})
    assert groups.effective_rates() == {"body.0.weight": LR, "body.2.weight": 4 * LR}
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    optimizer.load_state_dict(state)  # puts new dicts in the place of the groups
    assert groups()["body.0.weight"]["lr"] == 7.0
    assert ParameterGroups(matrices, [torch.optim.Adam(net.parameters())]).effective_rates() == {}
