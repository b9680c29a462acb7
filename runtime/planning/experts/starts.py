"""Many greedy packings of the same loads, from many replica counts: where the search starts from."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import comb

import numpy as np

from runtime.planning.experts.counts import replica_counts
from runtime.planning.experts.packing import Floats, Ints, Packing, longest_first
from runtime.planning.experts.search import PAIR_WORK, even_out

START_WORK, MOST_STARTS = 5e6, 96  # what all starts may cost, in the unit of `_cost`; starts of a layer
CLIMB_WORK, STEP = 3e7, 4e3  # what `climb` may cost; what placing one slot costs however few layers there are
HANDED, GENERATIONS = 32, 24  # tries in a generation of `climb`; generations
SWEEPS = 5  # of `even_out`, after each packing
HANDS = (1.0, 0.5, 0.3)  # chances that `climb` hands a replica over, a second and a third one
EAGER = 1.5  # log-normal spread of the factors that its takers are chosen by
BLUR = 0.4  # log-normal spread of the factors that later starts see the loads with
# the part of the spare slots beyond what the bound needs that heavy experts get, and their bias (see
# `replica_counts`); the most telling first for four slots a device and more, for fewer the second is
RECIPES = ((0.25, 0.0), (1.0, 0.1), (0.5, 0.0), (0.12, 0.0), (1.0, 0.35), (0.75, 0.0), (0.0, 0.0), (1.0, 0.75))


def starts(load: Floats, device_slots: Ints, bound: Floats, target: Floats, tries: int) -> Packing:
    """`tries` packings of every layer, as one layer each; those of a layer follow one another.

    How small the pieces of heavy experts should be no greedy rule knows: the smallest largest piece uses up
    every slot, and may leave two large ones for one device. So the starts differ in how many of the spare
    slots the heavy experts get, from what `bound` asks for to all, and in the bias of what they get. Then the
    loads are blurred, differently in each start and alike in every call. Where the ways to hand out the
    spare slots are few, all of them are there.

    Args:
        load: [L, E]. device_slots: [D].
        bound, target: [L] on the peak, at least the largest share; a peak at which a layer is left alone.
    """
    slots, devices = int(device_slots.sum()), len(device_slots)
    layers, experts = load.shape
    spare = slots - experts
    every = _every_count(experts, spare, devices, most=tries)

    # step 1: how each start sees the loads and hands out its spare slots; [tries, ...], then of all layers
    rng = np.random.default_rng(0)
    order = RECIPES if device_slots.max() > 3 else (RECIPES[1], RECIPES[0], *RECIPES[2:])
    recipes = np.array(order[:tries] if spare else []).reshape(-1, 2)
    more = tries - len(recipes)
    part = np.concatenate([recipes[:, 0], rng.random(more)])
    bias = np.concatenate([recipes[:, 1], np.zeros(more)])
    blur = np.concatenate([np.ones((len(recipes), experts)), rng.lognormal(0.0, BLUR, (more, experts))])
    blur[: len(every)] = 1.0
    each, floor = np.repeat(load, tries, axis=0), np.repeat(bound, tries)
    seen = each * np.tile(blur, (layers, 1))

    # step 2: replica counts
    needed = np.ceil(each / np.maximum(floor, 1e-300)[:, None] - 1e-9).clip(1) - 1
    least = np.minimum(needed.sum(axis=1), spare)
    heavy = (least + np.round(np.tile(part, layers) * (spare - least))).astype(np.int64)
    counts = replica_counts(seen, slots, devices, np.tile(bias, layers), heavy)
    if len(every):
        counts.reshape(layers, tries, experts)[:, : len(every)] = every

    # step 3: pack as seen, weigh as it is
    packing = longest_first(seen, counts, device_slots)
    if more:
        packing = Packing.of(each, packing.expert)
    even_out(packing, np.repeat(target, tries), sweeps=SWEEPS)
    return packing


def climb(packing: Packing, device_slots: Ints, target: Floats) -> bool:
    """Hand one to three replicas to other experts, at random, and pack anew: what is better is gone on from.

    Takers are likely to be experts with a large share; the random numbers are the same in every call.

    Args: target [L]: a peak at which a layer is left alone. Returns whether anything got better.
    """
    devices, rng = len(device_slots), np.random.default_rng(0)
    left, before = CLIMB_WORK, packing.peak
    for _ in range(GENERATIONS):
        open_ = np.flatnonzero(packing.peak > target)
        left -= HANDED * len(open_) * _cost(device_slots) + STEP * int(device_slots.sum())
        if not len(open_) or left < 0:
            break
        load = np.repeat(packing.load[open_, :-1], HANDED, axis=0)
        counts = np.repeat(packing.replicas[open_, :-1], HANDED, axis=0)
        row = np.arange(len(counts))
        for chance in HANDS:
            giver = np.where(counts > 1, rng.random(counts.shape), -1.0).argmax(axis=1)
            eager = load / counts * rng.lognormal(0.0, EAGER, counts.shape)
            taker = np.where(counts < devices, eager, -1.0).argmax(axis=1)
            moved = (rng.random(len(counts)) < chance) & (counts[row, giver] > 1) & (counts[row, taker] < devices)
            counts[row, giver] -= moved
            counts[row, taker] += moved
        anew = longest_first(load, counts, device_slots)
        even_out(anew, np.repeat(target[open_], HANDED), sweeps=SWEEPS)
        packing.take_better(open_, anew.best(HANDED, 1))
    return bool((packing.peak < before).any())


def affordable(layers: int, device_slots: Ints, least: int) -> int:
    """How many starts each of `layers` layers can have; 0 where those would be fewer than `least`."""
    tries = int(min(START_WORK / max(1.0, layers * _cost(device_slots)), MOST_STARTS))
    return tries if tries >= least else 0


def _cost(device_slots: Ints) -> float:
    """Of a packing of one layer: slots x devices for placing, and the pairs looked at by the sweeps after."""
    devices, width = len(device_slots), int(device_slots.max())
    return float(device_slots.sum() * devices + 2 * SWEEPS * max(width**2, min(PAIR_WORK, width**2 * devices // 2)))


def _every_count(experts: int, spare: int, devices: int, most: int) -> Ints:
    """[C, E] all the ways to hand out `spare` replicas; none where there are more than `most`."""
    if not spare or comb(experts + spare - 1, spare) > most:
        return np.empty((0, experts), np.int64)
    ways = combinations_with_replacement(range(experts), spare)
    counts = np.array([np.bincount(way, minlength=experts) + 1 for way in ways])
    return counts[counts.max(axis=1) <= devices]
