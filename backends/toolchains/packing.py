"""4-bit integers as bytes, in the order that ONNX, XLA and torch_npu have them. Free of JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

INT4 = np.dtype(ml_dtypes.int4)


def packed(values: np.ndarray) -> np.ndarray:
    """int4 of any shape as bytes, two numbers to each, the first in the low half."""
    halves = np.asarray(values, order="C").reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    halves = np.pad(halves, (0, halves.size % 2))
    return halves[0::2] | (halves[1::2] << 4)


def unpacked(raw: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """`packed`, undone."""
    halves = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
    return ((halves ^ 8).astype(np.int8) - 8).astype(INT4).reshape(shape)
