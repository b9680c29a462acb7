"""Matrices in narrow formats: rounding to them and back, on the host. Free of JAX; the formats are `model.formats`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from foundation.errors import UsageError
from model.formats import (
    E2M1,
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    E8M0,
    FORMATS,
    FP8_BLOCK,
    INT4,
    INT8,
    Described,
    MatrixFormat,
    matrix_format,
    scheme,
)  # fmt: skip

E5M2 = np.dtype(ml_dtypes.float8_e5m2)
CARRIER: Mapping[np.dtype, np.dtype] = {INT4: INT8, E2M1: E5M2}
"""What holds 4-bit values on a device: XLA's buffers of types below a byte differ in layout from program to program.
Every int4 number is an int8 number, and every e2m1 number an e5m2 number."""


class Matrix(NamedTuple):
    """A quantised matrix: values [.., out, in], scale [.., out or its blocks or 1, in's groups or 1], and for
    nvfp4 the float32 factor [..] that the scales are multiplied by."""

    values: np.ndarray
    scale: np.ndarray
    factor: np.ndarray | None = None


def carried(values: np.ndarray) -> np.ndarray:
    """Values in the type that a device holds them in."""
    return values.astype(CARRIER.get(values.dtype, values.dtype), copy=False)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 to a narrow type: nearest, ties to even, saturating."""
    if dtype in (INT8, INT4):
        low, high = (-128.0, 127.0) if dtype == INT8 else (-8.0, 7.0)
        return np.clip(np.rint(x), low, high).astype(np.int8).astype(dtype, copy=False)
    largest = E4M3_MAX if dtype == E4M3 else E2M1_MAX
    return np.clip(x, -largest, largest).astype(dtype)


def _groups(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[.., out, in] as [.., out/rows, rows, in/columns, columns], padded with zeros."""
    *lead, out, width = matrix.shape
    blocks = (-(-out // rows), -(-width // columns))
    padded = np.zeros((*lead, blocks[0] * rows, blocks[1] * columns), np.float32)
    padded[..., :out, :width] = matrix
    return padded.reshape(*lead, blocks[0], rows, blocks[1], columns)


def power_of_two_scale(largest: np.ndarray, emax: int) -> np.ndarray:
    """2^(floor(log2 largest) - emax) as float32, within what e8m0 holds; `emax` is the exponent of the element
    type's largest value (8 for e4m3, 2 for e2m1)."""
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1 - emax, -127)
    return np.ldexp(np.float32(1.0), np.clip(exponent, -127, 127)).astype(np.float32)


def _shared_shape(shared: str | int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    match shared:
        case "block":
            return FP8_BLOCK, FP8_BLOCK
        case "tensor":
            return shape[-2], shape[-1]
        case "row":
            return 1, shape[-1]
        case _:
            return 1, int(shared)


def quantise(fmt: MatrixFormat, matrix: np.ndarray) -> Matrix:
    """float32 or bfloat16 `[.., out, in]` in a narrow format. A last group may be shorter than the others.

    Raises ValueError for groups that `shared_size` would not find again, and for formats with zero points.
    """
    assert fmt.shared is not None and fmt.scale is not None
    if fmt.zero is not None:
        raise ValueError("zero points are read where a checkpoint has them, and not made")
    if isinstance(fmt.shared, int):
        width = matrix.shape[-1]
        if shared_size(width, -(-width // fmt.shared)) != min(fmt.shared, width):
            raise ValueError(f"rows of {width} do not divide into groups of {fmt.shared}")
    groups = _groups(matrix.astype(np.float32, copy=False), *_shared_shape(fmt.shared, matrix.shape))
    largest = np.abs(groups).max(axis=(-3, -1))
    factor = None
    if fmt.scale == E8M0:
        scale = power_of_two_scale(largest, 8 if fmt.values == E4M3 else 2)
        divisor = scale
    elif fmt.factor is not None:
        whole = np.abs(matrix.astype(np.float32)).max(axis=(-2, -1))
        inverse = np.float32(E4M3_MAX * E2M1_MAX) / np.where(whole > 0, whole, np.float32(1.0))
        inverse = inverse.astype(np.float32)
        scale = cast(inverse[..., None, None] * (largest / np.float32(fmt.bound)), E4M3).astype(np.float32)
        scale = np.where(scale == 0, np.float32(0.125), scale)  # e4m3's epsilon, as compressed-tensors has it
        divisor, factor = scale / inverse[..., None, None], np.float32(1.0) / inverse
    else:
        divisor = scale = group_scale(HOST, fmt, largest)
    *lead, out, width = matrix.shape
    *_, above, rows, across, columns = groups.shape
    with np.errstate(over="ignore", under="ignore"):
        scaled = groups / divisor[..., :, None, :, None].astype(np.float32)
    values = cast(scaled.reshape(*lead, above * rows, across * columns)[..., :out, :width], fmt.values)
    return Matrix(values, scale.astype(fmt.scale), factor)


class Arithmetic(NamedTuple):
    """How a quantiser computes, so that it is one for the host and inside a compiled program.

    xp: NumPy, or what has its functions. divided: float32 arrays, or one by a number; not one times the other's
    inverse. kept: float32 rounded as a type keeps it.
    """

    xp: Any
    divided: Callable[[Any, Any], Any]
    kept: Callable[[Any, np.dtype], Any]


HOST = Arithmetic(np, lambda x, by: x / np.asarray(by, np.float32), lambda x, dtype: x.astype(dtype).astype(np.float32))


def group_scale(how: Arithmetic, fmt: MatrixFormat, largest: Any) -> Any:
    """The float32 scale of groups with these largest magnitudes: of integers, and of FP8 with float scales."""
    assert fmt.scale is not None
    scale = how.kept(how.divided(largest, fmt.bound), fmt.scale)
    return how.xp.where(scale > 0, scale, np.float32(1.0))


def integer_rounded(how: Arithmetic, fmt: MatrixFormat, matrix: Any) -> Any:
    """A float32 matrix [.., out, in] as `dequantise` gives it back from an integer format: rounded to codes, and back.
    The same to the bit for every `how`. Raises ValueError for another format, and for groups that do not divide rows.
    """
    if fmt.values not in (INT4, INT8) or fmt.factor is not None or fmt.zero is not None or fmt.shared == "block":
        raise ValueError(f"{fmt.name} is no integer format with scales of groups, rows or tensors")
    xp, (rows, columns) = how.xp, _shared_shape(fmt.shared, matrix.shape)  # type: ignore[arg-type]
    *lead, out, width = matrix.shape
    if out % rows or width % columns:
        raise ValueError(f"rows of {width} do not divide into groups of {columns}")
    groups = xp.reshape(matrix, (*lead, out // rows, rows, width // columns, columns))
    scale = group_scale(how, fmt, xp.max(xp.abs(groups), axis=(-3, -1)))[..., :, None, :, None]
    low, high = (-128.0, 127.0) if fmt.values == INT8 else (-8.0, 7.0)
    codes = xp.clip(xp.rint(how.divided(groups, scale)), np.float32(low), np.float32(high))
    return xp.reshape(codes * scale, matrix.shape)


FEW_BITS: Mapping[str, MatrixFormat] = {
    name: dataclasses.replace(FORMATS["w4a8"], name=name, label=f"INT{bits}, a scale an output channel", bound=bound)
    for name, bits, bound in (("int3", 3, 3.0), ("int2", 2, 1.0))
}
"""Of no chip and no checkpoint: where a small model has something to lose."""
INTEGERS_HELP = "w4a16, w4a16-gN, w4a8, w8a8, DENSE/EXPERTS of these and bf16, int3 or int2"


@cache
def integer_formats(name: str) -> Callable[[Described], MatrixFormat]:
    """Which format a weight is rounded to in a scheme of integers, or in one of `FEW_BITS`: a narrow one, or the plain
    one that it is left in. Raises `UsageError` for another scheme."""
    if name in FEW_BITS:
        return lambda weight: FORMATS["bf16"] if weight.role == "wide" else FEW_BITS[name]
    chosen = scheme(name)
    narrow = [fmt for fmt in map(matrix_format, chosen.formats) if fmt.narrow]
    if not narrow or any(fmt.values not in (INT4, INT8) or fmt.zero is not None for fmt in narrow):
        raise UsageError(f"formats {name} are not of integers: give {INTEGERS_HELP}")
    return chosen.stored


def shared_size(size: int, parts: int) -> int:
    """How many of a dim's `size` entries share one of its `parts` scales: a power of two, the last group shorter where
    it does not divide (no two powers fit the same `parts`), or else equal groups. Raises ValueError where neither is
    so."""
    each = 1
    while -(-size // each) > parts:
        each *= 2
    if -(-size // each) == parts:
        return min(each, size)
    if size % parts == 0:
        return size // parts
    raise ValueError(f"{parts} scales for {size} entries: neither equal groups nor groups of a power of two")


def spread(scale: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Scales repeated along `axis` to the matrix's own `size`."""
    each = shared_size(size, scale.shape[axis])
    return scale if each == 1 else np.take(np.repeat(scale, each, axis), range(size), axis)


def dequantise(held: Matrix) -> np.ndarray:
    """float32 `[.., out, in]`."""
    values = held.values.astype(np.float32)
    scale = held.scale.astype(np.float32)
    for axis in (values.ndim - 2, values.ndim - 1):
        scale = spread(scale, values.shape[axis], axis)
    return values * (scale if held.factor is None else scale * held.factor[..., None, None])
