"""Selective Spectral Decay: kernels for transformers that survive 4-bit quantization (arXiv 2602.14432)."""

from s2d_kernels.penalty import add_penalty_grad_
from s2d_kernels.regularizer import S2D
from s2d_kernels.scheduler import SideStream
from s2d_kernels.selection import pcdr
from s2d_kernels.svd import topk_svd

__version__ = "0.1.0"
__all__ = ["S2D", "SideStream", "add_penalty_grad_", "pcdr", "topk_svd"]
