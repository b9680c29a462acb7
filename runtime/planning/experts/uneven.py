"""What an engine gains on top if it may split an expert's tokens unevenly between its replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from runtime.planning.experts.packing import Floats, Ints
from runtime.planning.experts.placement import ExpertPlacement, checked_load

SWEEPS = 60
SETTLED = 1e-4  # a layer whose peak moves less than this in a sweep, relatively, is done


@dataclass(frozen=True, eq=False)
class UnevenSplit:
    """slot_load [L, S]: the load sent to each slot. max_over_mean [L]: of the devices, >= 1."""

    slot_load: Floats
    max_over_mean: Floats


def split_unevenly(placement: ExpertPlacement, load: ArrayLike) -> UnevenSplit:
    """Level the devices by moving load between the replicas of each expert, the placement as it is.

    One expert after the other fills its devices up to a common level, given what the others put there.
    Each such step minimises the sum of squared device loads over one expert's shares, so the sweeps
    converge to its minimum; that load vector is the most even one there is, hence has the smallest
    maximum (Fujishige 1980, lexicographically optimal bases). What is returned can be used as it stands;
    stopping early makes it at most a little too large.

    Args: load [layers, experts]. Raises: LoadError.
    """
    # step 1: start from the even split
    matrix = checked_load(load)
    layers, devices = placement.device_load.shape
    each = matrix / placement.replicas
    share = np.take_along_axis(each, placement.slot_expert, axis=1)
    carried = placement.device_load.copy()
    slot_device = placement.slot_device
    table = _replica_slots(placement, matrix)

    # step 2: sweep over the replicated experts, the heaviest first
    open_ = np.arange(layers)
    for _ in range(SWEEPS if table.shape[1] else 0):
        before = carried[open_].max(axis=1)
        for slots in table[open_].transpose(1, 0, 2):
            _fill(share, carried, slot_device, open_, slots)
        after = carried[open_].max(axis=1)
        open_ = open_[before - after > SETTLED * after]
        if not len(open_):
            break

    # step 3: never worse than the even split
    mean = matrix.sum(axis=1) / devices
    ratio = np.divide(carried.max(axis=1), mean, out=np.ones(layers), where=mean > 0)
    return UnevenSplit(share, np.minimum(ratio, placement.max_over_mean))


def _replica_slots(placement: ExpertPlacement, load: Floats) -> Ints:
    """[L, R, C] the slots of each replicated expert, heaviest expert first; -1 where there is none.

    Of two copies on one device the second is left out: nothing is to be had between them.
    """
    layers = len(load)
    rank = np.argsort(-np.where(placement.replicas > 1, load, -1.0), axis=1, kind="stable")
    most = int((placement.replicas > 1).sum(axis=1).max())
    table = np.full((layers, most, int(placement.replicas.max())), -1)
    device = placement.slot_device
    for layer in range(layers):
        row = placement.slot_expert[layer]
        order = np.argsort(row, kind="stable")
        start = np.searchsorted(row[order], np.arange(load.shape[1] + 1))
        for i, e in enumerate(rank[layer, :most]):
            slots = order[start[e] : start[e + 1]]
            if len(slots) > 1:
                slots = slots[np.unique(device[slots], return_index=True)[1]]
                table[layer, i, : len(slots)] = slots
    return table


def _fill(share: Floats, carried: Floats, slot_device: Ints, layers: Ints, slots: Ints) -> None:
    """Let one expert per layer, in `slots` [n, C] (-1: none), fill its devices up to one level."""
    row, real = layers[:, None], slots >= 0
    device = slot_device[slots]
    own = np.where(real, share[row, slots], 0.0)
    base = np.where(real, carried[row, device] - own, np.inf)
    ranked = np.sort(base, axis=1)
    count = np.arange(1, slots.shape[1] + 1)
    with np.errstate(invalid="ignore"):
        level = (np.cumsum(ranked, axis=1) + own.sum(axis=1, keepdims=True)) / count
    level = np.where(np.isfinite(level), level, np.inf).min(axis=1, keepdims=True)
    new = np.where(real, np.maximum(level - np.where(real, base, 0.0), 0.0), 0.0)
    where = np.nonzero(real)
    at = layers[where[0]]
    share[at, slots[where]] = new[where]
    np.add.at(carried, (at, device[where]), (new - own)[where])
