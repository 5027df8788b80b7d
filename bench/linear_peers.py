"""W4A4 fake-quantized linear layers: ours, the usual compositions, and the plain layer that all of them chase.

Weights symmetric per output channel, activations asymmetric per token, 4 bits each. Ours and the composition with the
same convention are judged against the integer reference; the plain layer, torch's operator with its other rounding,
and torchao's layers, one of 8 bits, against what they mean to compute, with fp64 products.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d_kernels import reference

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
# y and the gradients of x, weight and bias.
Results = tuple[Tensor, ...]
WEIGHT_MAX = 7
ACT_MAX = 15


def linear_error_limit(dtype: torch.dtype) -> float:
    """Of a relative Frobenius error: bf16 products are 2.3e-3 off by themselves, fp32 ones a few 1e-7."""
    return 1e-5 if dtype == torch.float32 else 1e-2


class _FakeQuant(torch.autograd.Function):
    """Quantize and dequantize in fp32 with given parameters; the gradient passes where nothing was clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        unclamped = torch.round(x.float() / scale) + zero_point
        codes = unclamped.clamp(quant_min, quant_max)
        ctx.save_for_backward(codes == unclamped)
        return ((codes - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None, None, None, None


def _token_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)  # 20 times the speed of torch.aminmax on a CPU
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / ACT_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.round(-low / scale).clamp(0, ACT_MAX)


def _channel_scale(weight: Tensor) -> Tensor:
    scale = weight.detach().float().abs().amax(1, keepdim=True) / WEIGHT_MAX
    return torch.where(scale > 0, scale, 1.0)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale, zero_point = _token_parameters(x)
    channel = _channel_scale(weight)
    x = _FakeQuant.apply(x, scale, zero_point, 0, ACT_MAX)
    return F.linear(x, _FakeQuant.apply(weight, channel, torch.zeros_like(channel), -WEIGHT_MAX, WEIGHT_MAX), bias)


def _operator_arguments(x: Tensor, weight: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of torch's fake-quantize operator (fp32) for x, with tokens as its channels, and for the weight."""
    scale, zero_point = _token_parameters(x)
    channel = _channel_scale(weight).squeeze(1)
    none = torch.zeros_like(channel, dtype=torch.int32)
    return (
        (x.float(), scale.squeeze(1), zero_point.squeeze(1).int(), 0, 0, ACT_MAX),
        (weight.float(), channel, none, 0, -WEIGHT_MAX, WEIGHT_MAX),
    )


def _operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    for_x, for_weight = _operator_arguments(x, weight)
    fq_x, fq_weight = (torch.fake_quantize_per_channel_affine(*a).to(x.dtype) for a in (for_x, for_weight))
    return F.linear(fq_x, fq_weight, bias)


def _codes_and_int_mm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Codes in plain torch, torch's int8 product, one epilogue: what a compiler can fuse into three kernels."""
    scale, zero_point = _token_parameters(x)
    channel = _channel_scale(weight)
    codes = ((torch.round(x.float() / scale) + zero_point).clamp(0, ACT_MAX) - zero_point).to(torch.int8)
    weight_codes = torch.round(weight.float() / channel).clamp(-WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)
    product = torch._int_mm(codes, weight_codes.mT)
    return (product.float() * scale * channel.mT + bias.float()).to(x.dtype)


@functools.cache
def _torchao_quantizers() -> tuple[Layer, Layer]:
    """Activation and weight fake quantizers of torchao's QAT linear: int4 per token asymmetric, per channel symmetric.

    Its symmetric int4 has codes from -8 and scale = absmax / 7.5: its truth is its own codes.
    """
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    int4 = getattr(torch, "int4")  # noqa: B009 - torch's stubs do not have it
    activation = IntxFakeQuantizeConfig(int4, "per_token", is_symmetric=False)
    linear = FakeQuantizedLinear(8, 8, True, activation, IntxFakeQuantizeConfig(int4, "per_channel"))
    return linear.activation_fake_quantizer, linear.weight_fake_quantizer


def _torchao(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The forward of torchao's `FakeQuantizedLinear`, on a weight given by the caller."""
    of_x, of_weight = _torchao_quantizers()
    return F.linear(of_x(x), of_weight(weight), bias)  # type: ignore[call-arg]


@functools.cache
def _torchao_int8() -> tuple[Any, Any, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """torchao's layer of int8 training, its default configuration, and its quantizer of rows.

    Forward and both gradients are int8 products of operands that are quantized for each anew. Of one token the
    weight's gradient fails the gate on a CPU: torch's int8 product is wrong at a depth of 1.
    """
    module = importlib.import_module("torchao.prototype.quantized_training.int8_mixed_precision")
    config = module.Int8MixedPrecisionTrainingConfig()
    return module._Int8MixedPrecisionTrainingLinearFunction, config, module.quantize_int8_rowwise


def _int8_training(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The forward of torchao's `Int8MixedPrecisionTrainingLinear`, on a weight given by the caller."""
    layer, config, _ = _torchao_int8()
    return layer.apply(x, weight, bias, config)


def _no_int8_training(device: torch.device) -> str | None:
    """Why torchao's int8 training cannot run on `device`."""
    try:
        _torchao_int8()
    except (ImportError, AttributeError) as error:
        return f"this torchao has it elsewhere or not at all: {error}"
    from torch.utils._triton import has_triton

    if device.type == "cpu" and has_triton():
        return "torchao takes its Triton product wherever Triton finds a GPU, and that takes no CPU tensors"
    return None


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from s2d_kernels.quant_ops import fake_quant_linear

    return fake_quant_linear(x, weight, bias, weight_bits=4, act_bits=4, act_granularity="per_token")


def _products(g: Tensor, x: Tensor, mask_x: Tensor, w: Tensor, mask_w: Tensor, bias: Tensor) -> Results:
    """y, grad_x, grad_weight and grad_bias in fp64 from dequantized operands and where they were not clamped."""
    x, w, g = x.double(), w.double(), g.double()
    return x @ w.mT + bias.double(), (g @ w) * mask_x, (g.mT @ x) * mask_w, g.sum(0)


def _plain_truth(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    everywhere = torch.ones((), device=x.device)
    return _products(grad, x, everywhere, weight, everywhere, bias)


def _operator_truth(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    """With the operator's own codes: it multiplies by 1/scale and adds before it rounds."""
    cachemask = torch.ops.aten.fake_quantize_per_channel_affine_cachemask
    for_x, for_weight = _operator_arguments(x, weight)
    (fq_x, mask_x), (fq_weight, mask_weight) = cachemask(*for_x), cachemask(*for_weight)
    return _products(grad, fq_x, mask_x, fq_weight, mask_weight, bias)


def _torchao_truth(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    """With torchao's own dequantized operands, and its masks, which are the gradients of their sums."""
    operands: list[Tensor] = []
    for quantizer, t in zip(_torchao_quantizers(), (x, weight), strict=True):
        leaf = t.detach().requires_grad_()
        quantized = quantizer(leaf)  # type: ignore[call-arg]
        operands += [quantized.detach(), torch.autograd.grad(quantized.sum(), leaf)[0]]
    fq_x, mask_x, fq_weight, mask_weight = operands
    return _products(grad, fq_x, mask_x, fq_weight, mask_weight, bias)


def _int8_training_truth(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    """fp64 products of its own codes: of each product's operands, rows of the left and columns of the right."""
    *_, quantize = _torchao_int8()

    def rows(t: Tensor) -> Tensor:
        codes, scale = quantize(t)
        return codes.double() * scale.double().view(-1, 1)

    y = rows(x) @ rows(weight).mT + bias.double()
    return y, rows(grad) @ rows(weight.mT).mT, rows(grad.mT) @ rows(x.mT).mT, grad.double().sum(0)


def _integer_truth(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    """The integer reference, its accumulator as an fp64 product of the codes: exact far below 2^53.

    int64 matmul would take longer than all the timings together.
    """
    qx = reference.quantize(x.float(), bits=4, symmetric=False, granularity="per_row")
    qw = reference.quantize(weight.float(), bits=4, symmetric=True, granularity="per_row")
    accumulator = (qx.codes - qx.zero_point).double() @ qw.codes.double().mT
    y = accumulator * qx.scale.double() * qw.scale.double().mT + bias.double()
    backward = _products(grad, reference.dequantize(qx), qx.mask, reference.dequantize(qw), qw.mask, bias)
    return y, *backward[1:]


@dataclass(frozen=True)
class LinearPeer:
    """A layer y = layer(x, weight, bias), and the truth it is held to, from x, weight, bias and the gradient of y."""

    name: str
    layer: Layer
    setting: str
    truth: Callable[[Tensor, Tensor, Tensor, Tensor], Results]
    held_to: str
    compiled: bool = False
    backward: bool = True
    needs: str | None = None
    obstacle: Callable[[torch.device], str | None] | None = None

    def make(self) -> Layer:
        """The layer, compiled for the shapes of one case where this peer is compiled."""
        return torch.compile(self.layer, dynamic=False) if self.compiled else self.layer

    def problem(self, device: torch.device | str = "cpu") -> str | None:
        """Why it cannot run here on `device`, or None."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.compiled and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "torch.compile needs a C++ compiler"
        return None if self.obstacle is None else self.obstacle(torch.device(device))


LINEAR_PEERS = [
    LinearPeer("ours", _ours, "exact integers", _integer_truth, "integer reference"),
    LinearPeer("F.linear", F.linear, "not quantized", _plain_truth, "fp64 product"),
    LinearPeer("eager fake quant + F.linear", _eager, "plain torch", _integer_truth, "integer reference"),
    LinearPeer("torch fake_quantize op + F.linear", _operator, "fused op", _operator_truth, "own codes, fp64 product"),
]
# What needs another package, or half a minute of compiling for each case.
MORE_PEERS = [
    LinearPeer(
        "compiled fake quant + F.linear", _eager, "torch.compile", _integer_truth, "integer reference", compiled=True
    ),
    LinearPeer(
        "compiled codes + torch._int_mm", _codes_and_int_mm, "torch.compile", _integer_truth, "integer reference",
        compiled=True, backward=False,
    ),
    LinearPeer("torchao QAT linear", _torchao, "eager", _torchao_truth, "own codes, fp64 product", needs="torchao"),
    LinearPeer(
        "torchao QAT linear", _torchao, "torch.compile", _torchao_truth, "own codes, fp64 product", compiled=True,
        needs="torchao",
    ),
    LinearPeer(
        "torchao int8 training", _int8_training, "W8A8, eager", _int8_training_truth, "own codes, fp64 product",
        needs="torchao", obstacle=_no_int8_training,
    ),
    LinearPeer(
        "torchao int8 training", _int8_training, "W8A8, torch.compile", _int8_training_truth,
        "own codes, fp64 product", compiled=True, needs="torchao", obstacle=_no_int8_training,
    ),
]  # fmt: skip


def saved_bytes(layer: Layer, tensors: Results) -> int:
    """Bytes that autograd keeps from the forward for the backward, the layer's own parameters not counted."""
    x, weight, bias = (t.detach().requires_grad_() for t in tensors[:3])
    parameters = {t.untyped_storage().data_ptr() for t in (weight, bias)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, weight, bias)
    del y
    return sum(kept.values())


def relative_errors(exact: Results, got: Results) -> list[float]:
    """Relative Frobenius error of each result."""
    return [float((g.double() - e).norm() / e.norm()) for e, g in zip(exact, got, strict=False)]


def forward(layer: Layer, tensors: Results) -> Callable[[], Results]:
    """The layer as inference runs it, without a graph."""
    x, weight, bias, _ = tensors

    def run() -> Results:
        with torch.no_grad():
            return (layer(x, weight, bias),)

    return run


def forward_backward(layer: Layer, tensors: Results) -> Callable[[], Results]:
    """The layer and the gradients of its input, weight and bias."""
    leaves = tuple(t.detach().requires_grad_() for t in tensors[:3])
    grad = tensors[3]

    def run() -> Results:
        y = layer(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad))

    return run
