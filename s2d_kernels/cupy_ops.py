"""The native operations over CuPy arrays, on CuPy's current stream.

    import cupy
    from s2d_kernels import cupy_ops

    U, S, Vh = cupy.linalg.svd(weight, full_matrices=False)
    cupy_ops.add_penalty_grad_([grad], [U[:, :3]], [cupy.ascontiguousarray(Vh[:3])], [5e-4 * S[:3] ** 2])

Arrays are taken as they lie in memory: nothing is copied, converted or synchronized. CuPy's `svd` of a tall matrix
returns `Vh` column by column, so it has to be made contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2d_kernels import _native


def _launch(layers: list[_native.PenaltyLayer], device: int) -> None:
    import cupy

    with cupy.cuda.Device(device):
        _native.add_penalty_grad(layers, int(cupy.cuda.get_current_stream().ptr))


def _check(name: str, array: Any, shape: tuple[int | None, ...], dtypes: Sequence[str]) -> None:
    wanted = all(hasattr(array, attribute) for attribute in ("shape", "strides", "dtype", "data", "device"))
    if not wanted or not hasattr(array.data, "ptr"):
        raise TypeError(f"{name} must be a cupy.ndarray, got {type(array).__name__}")
    if str(array.dtype) not in dtypes:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {' or '.join(dtypes)}")
    if len(array.shape) != len(shape) or any(w is not None and w != s for w, s in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape}")


def add_penalty_grad_(
    grads: Sequence[Any],
    U: Sequence[Any],
    Vh: Sequence[Any],
    coefficients: Sequence[Any],
    *,
    stream: int | None = None,
) -> None:
    """grads[i] += U[i] diag(coefficients[i]) Vh[i] in place, all layers in one launch.

    Args:
        grads: `[m, n]` float32 or float16 arrays with contiguous rows.
        U: `[m, k]` float32, any strides.
        Vh: `[k, n]` float32 with contiguous rows.
        coefficients: `[k]` float32, contiguous, k <= 64.
        stream: address of a CUDA stream of the arrays' device, which must then be the current one; default CuPy's
            current stream of that device.

    Raises:
        TypeError, ValueError: naming the array and the value; nothing is written then.
        NativeLibraryError: the library is missing or refused the call.
    """
    lengths = {"grads": len(grads), "U": len(U), "Vh": len(Vh), "coefficients": len(coefficients)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lists must be equally long, got {lengths}")
    layers = []
    for i, (grad, u, vh, c) in enumerate(zip(grads, U, Vh, coefficients, strict=True)):
        _check(f"grads[{i}]", grad, (None, None), ("float32", "float16"))
        m, n = grad.shape
        _check(f"coefficients[{i}]", c, (None,), ("float32",))
        k = c.shape[0]
        if k > _native.MAX_RANK:
            raise ValueError(f"coefficients[{i}] has {k} components, at most {_native.MAX_RANK} are supported")
        _check(f"U[{i}]", u, (m, k), ("float32",))
        _check(f"Vh[{i}]", vh, (k, n), ("float32",))
        for name, array in ((f"grads[{i}]", grad), (f"U[{i}]", u), (f"Vh[{i}]", vh), (f"coefficients[{i}]", c)):
            if array.device.id != grads[0].device.id:
                raise ValueError(f"{name} is on device {array.device.id}, but grads[0] on {grads[0].device.id}")
        for name, array in ((f"grads[{i}]", grad), (f"Vh[{i}]", vh), (f"coefficients[{i}]", c)):
            if array.shape[-1] > 1 and array.strides[-1] != array.dtype.itemsize:
                raise ValueError(f"{name} has strides {array.strides} (bytes): its last dimension must be contiguous")
        layers.append(
            _native.PenaltyLayer(
                grad=grad.data.ptr,
                U=u.data.ptr,
                Vh=vh.data.ptr,
                coefficients=c.data.ptr,
                device_rank=None,
                rows=m,
                cols=n,
                grad_stride=grad.strides[0] // grad.dtype.itemsize,
                u_row_stride=u.strides[0] // 4,
                u_col_stride=u.strides[1] // 4,
                vh_stride=vh.strides[0] // 4,
                rank=k,
                dtype=_native.DTYPES[str(grad.dtype)],
            )
        )
    if not layers:
        return
    if stream is not None:
        _native.add_penalty_grad(layers, stream)
    else:
        _launch(layers, grads[0].device.id)
