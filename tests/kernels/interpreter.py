"""Kernels run on the CPU by Triton's interpreter, in the place of launches.

The interpreter holds bfloat16 as its bits. It multiplies those in `tl.dot` as if they were numbers, and cuts where a
chip rounds; both are put right here. Buffers that a kernel is to write are poisoned.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from backends.kernels.variants import VARIANTS
from tools.kernels import constants_for

_WIDE = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}
_BUILDER = interpreter.InterpreterBuilder
_cast, _dot = _BUILDER.cast_impl, _BUILDER.create_dot


def _floats(handle: Any) -> np.ndarray:
    held = _WIDE.get(handle.dtype.scalar)
    return handle.data if held is None else handle.data.view(held).astype(np.float32)


def _rounded(self: Any, source: Any, wanted: Any, *_: Any) -> Any:
    kinds = source.dtype.scalar, wanted.scalar
    if not any(kind in _WIDE for kind in kinds):
        return _cast(self, source, wanted)
    floats = _floats(source).astype(np.float32)
    if kinds[1] in _WIDE:
        held = floats.astype(_WIDE[kinds[1]])
        return interpreter.TensorHandle(held.view(np.dtype(f"uint{held.itemsize * 8}")), kinds[1])
    return interpreter.TensorHandle(floats.astype(interpreter._get_np_dtype(kinds[1])), kinds[1])


def _product(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    return interpreter.TensorHandle(np.matmul(_floats(a), _floats(b), dtype=np.float32) + d.data, d.dtype.scalar)


_BUILDER.cast_impl = _rounded
_BUILDER.create_fp_to_fp = _rounded
_BUILDER.create_dot = _product

launches: list[str] = []
"""The variants that were launched, in order."""


def launch(
    variant: str,
    capability: tuple[int, int],
    outs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    arrays: Sequence[Any],
    numbers: Sequence[int | float],
) -> list[jax.Array]:
    """See `backends.kernels.launch.launch`."""
    launches.append(variant)
    described = VARIANTS[variant]
    module, _, function = described.kernel.partition(".")
    kernel = getattr(importlib.import_module(f"backends.kernels.source.{module}"), function)
    held = [np.ascontiguousarray(np.asarray(array)) for array in arrays]
    for out in outs:
        made = np.empty(out.shape, out.dtype)
        made.view(np.uint8).fill(0xFF)  # NaN, or -1
        held.append(made)
    names, kinds = list(described.parameters), list(described.parameters.values())
    given: dict[str, Any] = constants_for(described, capability[0] * 10 + capability[1])
    for name, kind, value in zip(names, kinds, [*held, *numbers], strict=True):
        given[name] = _pointer(value, kind) if kind.startswith("*") else value
    kernel[grid](**given)
    return [jnp.asarray(made) for made in held[len(arrays) :]]


def _pointer(array: np.ndarray, kind: str) -> Any:
    type_ = tl.pointer_type(tl.str_to_ty(kind[1:], None))
    assert array.dtype.itemsize * 8 == type_.element_ty.primitive_bitwidth, (array.dtype, kind)
    return tl.tensor(interpreter.TensorHandle(np.array([array.ctypes.data], np.uint64), type_), type_)
