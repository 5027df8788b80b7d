"""Selective Spectral Decay: kernels for transformers that survive 4-bit quantization (arXiv 2602.14432)."""

# these enter their implementations
from s2d_kernels import (
    capture_ops as _capture_ops,
    cpu_adamw as _cpu_adamw,
    cpu_penalty as _cpu_penalty,
    cpu_quant as _cpu_quant,
    cpu_svd as _cpu_svd,
    cuda_adamw as _cuda_adamw,
    cuda_ops as _cuda_ops,
    cuda_quant as _cuda_quant,
    cuda_svd as _cuda_svd,
    torch_svd as _torch_svd,
    triton_kernels as _triton_kernels,
)
from s2d_kernels.fake_quant import FakeQuantLinear, quantize_
from s2d_kernels.optim import SpectralAdamW
from s2d_kernels.penalty import add_penalty_grad_
from s2d_kernels.quant_ops import fake_quant_linear
from s2d_kernels.regularizer import S2D
from s2d_kernels.scheduler import SideStream
from s2d_kernels.selection import pcdr
from s2d_kernels.svd import topk_svd
from s2d_kernels.validation import validate

__version__ = "0.1.0"
__all__ = [
    "S2D",
    "FakeQuantLinear",
    "SideStream",
    "SpectralAdamW",
    "add_penalty_grad_",
    "fake_quant_linear",
    "pcdr",
    "quantize_",
    "topk_svd",
    "validate",
]
