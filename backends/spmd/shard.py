"""Weights split over the devices of a stage by their logical axes, as the cost model's shapes have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.spmd.grid import Grid
from model.weights import Quantized, Weight

_BLOCKS = (128, 64, 32, 16)  # entries of a dim that may share a scale
Axes = tuple[str, ...]
"""Mesh axes that a dim is split over, outermost first: ("tp",), ("dp", "tp") or none."""


def split_dim(weight: Weight, grid: Grid) -> tuple[int, Axes]:
    """The dim of a weight that is split, and the mesh axes it is split over; (0, ()) for one held whole."""
    stage: Axes = tuple(axis for axis in ("dp", "tp") if getattr(grid, axis) > 1)
    over: dict[str, Axes] = {name: ("tp",) if grid.tp > 1 else () for name in ("heads", "kv_heads", "vocab", "ffn")}
    if weight.expert_count:
        over |= {"expert": stage, "ffn": ()} if grid.slots else {"expert": (), "ffn": stage}
    split = [(dim, over[axis]) for dim, axis in enumerate(weight.axes) if axis and over[axis]]
    assert len(split) <= 1, f"{weight.name}: more than one dim is split"
    return split[0] if split else (0, ())


def parts(axes: Axes, grid: Grid) -> int:
    """How many shares a dim split over `axes` has."""
    return int(np.prod([getattr(grid, axis) for axis in axes], dtype=int))


def local_shape(weight: Weight, grid: Grid) -> tuple[int, ...]:
    """One device's share of a weight, redundant expert slots included."""
    shape = list(weight.shape)
    if weight.expert_count and grid.slots:
        shape[0] = grid.slots.per_device * grid.stage_devices
    dim, axes = split_dim(weight, grid)
    shape[dim] //= parts(axes, grid)
    return tuple(shape)


def divisible(value: np.ndarray | Quantized, weight: Weight, dim: int, shares: int) -> np.ndarray | Quantized:
    """A value whose leaves can all be cut into equal `shares` along `dim`, or are the same for every share.

    Block scales that a cut would go through are repeated, one for each row of values.
    """
    if not isinstance(value, Quantized) or shares == 1:
        return value
    scale, size = value.scale, weight.shape[dim]
    if scale.shape[dim] in (1, size):
        return value
    block = next(n for n in _BLOCKS if -(-size // n) == scale.shape[dim])
    if size // shares % block == 0:
        return value
    full = np.repeat(scale, block, axis=dim).take(np.arange(size), axis=dim)
    return Quantized(value.values, full)


def is_split(leaf: Any, dim: int, shares: int) -> bool:
    """Whether a leaf is cut along `dim`; a leaf with one entry there serves every share."""
    return shares > 1 and leaf.shape[dim] > 1
