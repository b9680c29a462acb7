"""Local search on a `Packing`: exchanges of two slots, and spare replicas handed to another expert.

Every step taken lowers the sorted device loads, so the search ends; kicks (see `search`) may raise them,
and the best state is kept aside.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.planning.experts.packing import Floats, Ints, Packing

LEAST_GAIN = 1.0 - 1e-6  # a step counts only if it lowers the peak by more than this factor
ROUND_LAYERS = 6  # what a round costs whatever the number of layers, in layers
LOCK = 8  # rounds for which an expert keeps a replica it was given
PAIR_WORK = 1600  # slot pairs looked at per layer in a sweep of `even_out`


def even_out(packing: Packing, target: Floats, sweeps: int, layers: Ints | None = None) -> NDArray[np.bool_]:
    """Pair the most with the least loaded devices and let each pair make its best exchange.

    Args: target [L]: a peak at which a layer is left alone. sweeps: at most so many. layers: only these.
    Returns [L]: whether the last sweep lowered the peak of the layer.
    """
    devices, width = packing.expert.shape[1:]
    pairs = int(np.clip(PAIR_WORK // width**2, 1, devices // 2)) if devices > 1 else 0
    open_ = np.arange(len(target)) if layers is None else layers
    lowered = np.zeros(len(target), bool)
    for _ in range(sweeps if pairs else 0):
        lowered[:] = False
        peak = packing.device_load[open_].max(axis=1)
        open_, peak = open_[peak > target[open_]], peak[peak > target[open_]]
        if not len(open_):
            break
        # step 1: devices by load; hottest i with coldest i
        row = open_[:, None]
        order = np.argsort(packing.device_load[open_], axis=1, kind="stable")
        hot, cold = order[:, : -pairs - 1 : -1], order[:, :pairs]
        load_hot, load_cold = packing.device_load[row, hot], packing.device_load[row, cold]
        a, b = packing.expert[row, hot], packing.expert[row, cold]

        # step 2: the larger of the two loads after exchanging slot i of hot with slot j of cold
        gap = packing.share[row, hot][:, :, :, None] - packing.share[row, cold][:, :, None, :]
        after = np.abs(gap - ((load_hot - load_cold) / 2)[:, :, None, None])
        clash_a = packing.held[row[:, :, None], cold[:, :, None], a]
        clash_b = packing.held[row[:, :, None], hot[:, :, None], b]
        after[clash_a[:, :, :, None] | clash_b[:, :, None, :]] = np.inf
        flat = after.reshape(len(open_), pairs, -1)
        pick = flat.argmin(axis=2)
        best = np.take_along_axis(flat, pick[:, :, None], axis=2)[:, :, 0]

        # step 3: exchange where the pair's larger load falls; layers without any are done
        ok = best + (load_hot + load_cold) / 2 < load_hot * LEAST_GAIN
        at = np.nonzero(ok)
        packing.swap(open_[at[0]], hot[at], pick[at] // width, cold[at], pick[at] % width)
        lowered[open_] = packing.device_load[open_].max(axis=1) < peak * LEAST_GAIN
        open_ = open_[ok.any(axis=1)]
    return lowered


def best_swap(
    packing: Packing, layers: Ints, hot: Ints, reach: NDArray[np.bool_] | None = None
) -> tuple[Floats, Ints, Ints, Ints]:
    """The exchange of a slot of device `hot` [n] after which the larger of the two devices' loads is least.

    Args: layers [n]; reach [D, D]: which devices may exchange (all). Returns that larger load [n] (inf:
    no legal exchange), slot, other device, its slot.
    """
    n, (_, devices, width) = len(layers), packing.expert.shape
    row = np.arange(n)
    mine, share = packing.expert[layers, hot], packing.share[layers, hot]
    loads = packing.device_load[layers]
    change = share[:, :, None, None] - packing.share[layers][:, None]
    load_hot = loads[row, hot][:, None, None, None]
    after = np.maximum(load_hot - change, loads[:, None, :, None] + change)
    clash_mine = packing.held[layers[:, None, None], np.arange(devices), mine[:, :, None]]
    theirs = packing.expert[layers].reshape(n, devices * width)
    clash_theirs = packing.held[layers[:, None], hot[:, None], theirs].reshape(n, 1, devices, width)
    after[clash_mine[:, :, :, None] | clash_theirs] = np.inf
    if reach is not None:
        after = np.where(reach[hot][:, None, :, None], after, np.inf)
    flat = after.reshape(n, width * devices * width)
    pick = flat.argmin(axis=1)
    slot, rest = np.divmod(pick, devices * width)
    return flat[row, pick], slot, rest // width, rest % width


def best_replace(
    packing: Packing,
    layers: Ints,
    hot: Ints,
    locked: NDArray[np.bool_] | None = None,
    reach: NDArray[np.bool_] | None = None,
) -> tuple[Floats, Ints, Ints, Ints]:
    """The best way to give an expert of device `hot` [n] one more replica, in a slot of a spare one.

    Args:
        layers: [n]. locked: [n, E+1] experts that may not give up a replica (none).
        reach: [D, D] to which devices an expert may spread (all).
    Returns: the largest load among the devices touched [n] (inf: none legal), the expert, and the device
    and slot it takes over.
    """
    n, (_, devices, width) = len(layers), packing.expert.shape
    row = np.arange(n)
    load, replicas, loads = packing.load[layers], packing.replicas[layers], packing.device_load[layers]
    each = load / np.maximum(replicas, 1)

    # step 1: giving up a replica raises the other holders of that expert
    theirs = packing.expert[layers].reshape(n, devices * width)
    slot_load = np.repeat(loads, width, axis=1)
    holder = np.zeros(load.shape)
    np.maximum.at(holder, (row[:, None], theirs), slot_load)
    spare = replicas > 1 if locked is None else (replicas > 1) & ~locked
    raised = np.where(spare, holder + load / np.maximum(replicas - 1, 1) - each, np.inf)

    # step 2: the taker's share falls on `hot` and appears in the slot taken over
    mine = packing.expert[layers, hot]
    smaller = np.take_along_axis(load / (replicas + 1), mine, axis=1)
    left = loads[row, hot][:, None] - packing.share[layers, hot] + smaller
    gained = (slot_load - packing.share[layers].reshape(n, devices * width))[:, None] + smaller[:, :, None]
    others = np.take_along_axis(raised, theirs, axis=1)[:, None]
    after = np.maximum(np.maximum(gained, left[:, :, None]), others)
    clash = packing.held[layers[:, None, None], np.arange(devices), mine[:, :, None]]
    if reach is not None:
        clash = clash | ~reach[hot][:, None]
    after[np.repeat(clash, width, axis=2)] = np.inf

    # step 3: the best of them
    flat = after.reshape(n, width * devices * width)
    pick = flat.argmin(axis=1)
    which, rest = np.divmod(pick, devices * width)
    return flat[row, pick], mine[row, which], rest // width, rest % width


def search(packing: Packing, target: Floats, budget: float) -> None:
    """Rounds of `even_out`; where that stalls, the best exchange or replacement at the most loaded device.

    A layer where neither improves is kicked: it takes the least bad replacement, and goes on from there;
    what an expert was given it keeps for `LOCK` rounds, so that a kick is not undone at once.
    On return every layer is in the best state it ever had.

    Args: target [L]: a peak at which a layer is left alone. budget: rounds times layers to spend; the
    fewer layers are left, the more rounds each gets.
    """
    best, keep = packing.peak, packing.expert.copy()
    unlock, clock = np.zeros(packing.load.shape, np.int64), 0
    open_ = np.flatnonzero(best > target)
    while len(open_) and budget > 0:
        budget, clock = budget - len(open_) - ROUND_LAYERS, clock + 1
        # step 1: candidates, where pairing alone no longer helps
        stalled = ~even_out(packing, target, 1, open_)[open_]
        layers = open_[stalled]
        hot = packing.device_load[layers].argmax(axis=1)
        peak = packing.device_load[layers, hot]
        swapped, slot, other, other_slot = best_swap(packing, layers, hot)
        replaced, taker, device, taken = best_replace(packing, layers, hot, unlock[layers] > clock)

        # step 2: take the better one; where none improves, the replacement is a kick
        swaps = (swapped <= replaced) & (swapped < peak * LEAST_GAIN)
        gives = ~swaps & np.isfinite(replaced)
        packing.swap(layers[swaps], hot[swaps], slot[swaps], other[swaps], other_slot[swaps])
        packing.replace(layers[gives], device[gives], taken[gives], taker[gives])
        unlock[layers[gives], taker[gives]] = clock + LOCK

        # step 3: remember the best state; drop layers that are good enough or have no move
        now = packing.device_load[open_].max(axis=1)
        better = open_[now < best[open_]]
        best[better], keep[better] = packing.peak[better], packing.expert[better]
        stuck = np.zeros(len(open_), bool)
        stuck[stalled] = ~(swaps | gives)
        open_ = open_[(now > target[open_]) & ~stuck]
    fresh = Packing.of(packing.load[:, :-1], keep)
    vars(packing).update(vars(fresh))
