"""Host values cut into shares along a dim: block scales that a cut would go through are repeated first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from model.quantised import shared_size
from model.weights import Quantized, Weight


def divisible(value: np.ndarray | Quantized, weight: Weight, dim: int, shares: int) -> np.ndarray | Quantized:
    """A value whose leaves can all be cut into equal `shares` along `dim`, or are the same for every share.

    Scales of blocks or groups that a cut would go through are repeated, one for as many elements as a block and a share
    have in common (as `model.split.scale_shape` counts them).
    """
    if not isinstance(value, Quantized) or shares == 1:
        return value
    scale, size = value.scale, value.values.shape[dim]
    if scale.shape[dim] in (1, size):
        return value
    block, local = shared_size(size, scale.shape[dim]), size // shares
    if local % block == 0:
        return value
    full = np.repeat(scale, block, axis=dim).take(np.arange(size), axis=dim)
    return Quantized(value.values, full.take(np.arange(0, size, math.gcd(block, local)), axis=dim))


def is_split(leaf: Any, dim: int, shares: int) -> bool:
    """Whether a leaf is cut along `dim`; a leaf with one entry there serves every share."""
    return shares > 1 and leaf.shape[dim] > 1
