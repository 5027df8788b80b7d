"""impl="triton": the kernels in Triton, for CUDA tensors, or for CPU tensors under TRITON_INTERPRET=1 (tests).

Triton is optional: without it this package imports, and impl="triton" says what to install.
"""

from s2d_kernels.triton_kernels import adamw, capture, gradient, linear, penalty, quantize, svd
from s2d_kernels.triton_kernels.common import INSTALL_HINT, Variant, interpreted, triton

__all__ = ["INSTALL_HINT", "Variant", "interpreted", "triton", "variants"]


def variants() -> list[Variant]:
    """What `python -m bench audit` compiles."""
    modules = (penalty, svd, adamw, capture, quantize, linear, gradient)
    return [variant for module in modules for variant in module.variants()]
