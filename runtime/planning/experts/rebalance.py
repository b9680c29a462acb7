"""From a placement in use to a better one, moving few experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.deployment.errors import PreviousError
from runtime.planning.experts.bound import sharpen, simple_bound
from runtime.planning.experts.packing import Floats, Ints, Packing
from runtime.planning.experts.placement import ExpertPlacement, checked_load, place_experts, placement_of
from runtime.planning.experts.search import LEAST_GAIN, best_replace, best_swap
from runtime.planning.experts.solve import CLOSE


def moves(previous: ExpertPlacement, placement: ExpertPlacement) -> Ints:
    """[L] experts that a device holds in `placement` and did not hold in `previous`: weights to be sent."""
    before, after = _copies(previous), _copies(placement)
    return np.maximum(after - before, 0).sum(axis=(1, 2), dtype=np.int64)


def rebalance(previous: ExpertPlacement, load: ArrayLike, max_moves: int) -> ExpertPlacement:
    """Adapt `previous` to a new `load`, moving at most `max_moves` experts in each layer.

    Every layer follows one fixed path of improving steps (an exchange costs two moves, handing a spare
    replica to another expert one) as far as the budget reaches, or takes the placement made afresh if that
    is better and within the budget. So a larger budget never gives a worse balance, and none changes nothing.

    Args: load [layers, experts]; layers, experts, devices and slots as in `previous`.
    Raises: LoadError; PreviousError if the shapes differ or the budget is negative.
    """
    # step 1: check
    matrix = checked_load(load)
    if matrix.shape != previous.replicas.shape:
        raise PreviousError(
            f"load {matrix.shape} != previous placement {previous.replicas.shape}, as [layers, experts]"
        )
    if max_moves < 0:
        raise PreviousError(f"max_moves = {max_moves} must be 0 or more")

    # step 2: the path
    packing = Packing.of(matrix, _padded(previous))
    _follow(packing, previous, max_moves)
    room, nodes, groups = previous.device_slots, previous.nodes, previous.groups
    bound = sharpen(matrix, room, simple_bound(matrix, room), packing.peak, CLOSE)
    walked = placement_of(packing, room, nodes, groups, bound)
    if max_moves == 0:
        return walked

    # step 3: afresh, where it is better and near enough
    fresh = place_experts(matrix, len(room), nodes, groups=groups, device_slots=room.tolist())
    if groups == 1:
        fresh = _aligned(fresh, previous)
    take = (moves(previous, fresh) <= max_moves) & (fresh.max_over_mean < walked.max_over_mean)
    return replace(
        walked,
        slot_expert=np.where(take[:, None], fresh.slot_expert, walked.slot_expert),
        replicas=np.where(take[:, None], fresh.replicas, walked.replicas),
        device_load=np.where(take[:, None], fresh.device_load, walked.device_load),
        bound=np.maximum(walked.bound, fresh.bound),
    )


def _follow(packing: Packing, previous: ExpertPlacement, max_moves: int) -> None:
    """Improving steps at the most loaded device until none is left or the next one exceeds the budget."""
    reach = None
    if previous.groups > 1:
        node = np.arange(len(previous.device_slots)) // (len(previous.device_slots) // previous.nodes)
        reach = node[:, None] == node
    left = np.full(len(packing.load), max_moves)
    open_ = np.flatnonzero(left > 0)
    while len(open_):
        hot = packing.device_load[open_].argmax(axis=1)
        peak = packing.device_load[open_, hot]
        swapped, slot, other, other_slot = best_swap(packing, open_, hot, reach)
        replaced, taker, device, taken = best_replace(packing, open_, hot, reach=reach)
        good = np.minimum(swapped, replaced) < peak * LEAST_GAIN
        cost = np.where(swapped < replaced, 2, 1)
        good &= cost <= left[open_]
        swaps, gives = good & (cost == 2), good & (cost == 1)
        packing.swap(open_[swaps], hot[swaps], slot[swaps], other[swaps], other_slot[swaps])
        packing.replace(open_[gives], device[gives], taken[gives], taker[gives])
        left[open_] -= cost
        open_ = open_[good]


def _copies(placement: ExpertPlacement) -> NDArray[np.int16]:
    """[L, D, E] copies of an expert on a device."""
    layers, experts = placement.replicas.shape
    count = np.zeros((layers, len(placement.device_slots), experts), np.int16)
    np.add.at(count, (np.arange(layers)[:, None], placement.slot_device, placement.slot_expert), 1)
    return count


def _padded(placement: ExpertPlacement) -> Ints:
    """[L, D, M] the placement as `Packing` wants it."""
    layers, experts = placement.replicas.shape
    room = placement.device_slots
    expert = np.full((layers, len(room), room.max()), experts)
    expert[:, np.arange(room.max()) < room[:, None]] = placement.slot_expert
    return expert


def _aligned(fresh: ExpertPlacement, previous: ExpertPlacement) -> ExpertPlacement:
    """`fresh` with its devices renumbered, greedily, to where most of their experts already are."""
    room = previous.device_slots
    row = np.arange(len(fresh.slot_expert))
    holders = _copies(previous).transpose(0, 2, 1)[row[:, None], fresh.slot_expert]
    common = np.add.reduceat(holders, np.cumsum(room) - room, axis=1)  # [L, new device, old device]
    common[:, room[:, None] != room] = -1
    layers, devices = common.shape[:2]
    source = np.empty((layers, devices), np.int64)
    for old in range(devices):
        source[:, old] = common[:, :, old].argmax(axis=1)
        common[row, source[:, old]] = -2
    expert = _padded(fresh)[row[:, None], source]
    real = np.arange(expert.shape[2]) < room[:, None]
    load: Floats = np.take_along_axis(fresh.device_load, source, axis=1)
    return replace(fresh, slot_expert=expert[:, real], device_load=load)
