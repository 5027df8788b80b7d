"""S2D in training steps that are captured in a CUDA graph. Needs a GPU; what a CPU can show of it is in
test_regularizer_options.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from training import LR, batch, spiked_model

from s2d_kernels import S2D

STEPS, FIRST = 40, 5  # steps in all, and eager ones before the capture: the first factors arrive at step 3


def trained(device: torch.device, *, strength: float, graph: bool, impl: str) -> tuple[list[Tensor], int]:
    """The weights after training with S2D, and how often the captured step was replayed."""
    model, v = spiked_model()
    model = model.to(device)
    x = torch.zeros(16, 32, device=device)
    reg = S2D(model, strength=strength, interval=10, lead=3, static_factors=True, impl=impl)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step_in_graph, replays = torch.cuda.CUDAGraph(), 0

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)  # a graph's gradients keep their memory
        (model(x) - x).square().mean().backward()
        reg.add_grad()
        optimizer.step()

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for number in range(STEPS):
            x.copy_(batch(v, number))
            if not graph or reg.refresh_due or number < FIRST:
                step()
                continue
            if replays == 0:
                assert reg._pending is None  # a refresh beside it would end the capture with an error
                with torch.cuda.graph(step_in_graph, stream=stream):
                    step()  # neither trains nor counts
            reg.advance()
            step_in_graph.replay()
            replays += 1
    torch.cuda.synchronize(device)
    assert reg.step == STEPS
    assert reg.layers[0].k_target == 1
    reg.close()
    return [parameter.detach().cpu() for parameter in model.parameters()], replays


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_captured_step_trains_as_eager_ones_do_across_refreshes(impl: str, device: torch.device) -> None:
    """Steps 10, 20 and 30 are refresh steps and run eagerly; the graph then takes their factors without a new capture.

    A library may choose another algorithm for a product in a captured step, so that the last bits may differ.
    """
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    eager, none = trained(device, strength=2e-3, graph=False, impl=impl)
    captured, replays = trained(device, strength=2e-3, graph=True, impl=impl)
    without, _ = trained(device, strength=0.0, graph=True, impl=impl)
    assert (none, replays) == (0, STEPS - FIRST - 3)
    for one, other in zip(eager, captured, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert float((eager[0] - without[0]).abs().max()) > 1e-2  # what the penalty does is far above the tolerance
