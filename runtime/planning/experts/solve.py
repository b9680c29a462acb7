"""The solver on one pool: replica counts, packing and local search, for all layers at once."""

from __future__ import annotations

import numpy as np

from runtime.planning.experts.bound import sharpen, simple_bound
from runtime.planning.experts.counts import pair_counts, replica_counts
from runtime.planning.experts.packing import Floats, Ints, Packing, longest_first, one_each, pull_apart
from runtime.planning.experts.search import even_out, search
from runtime.planning.experts.starts import affordable, climb, starts

CLOSE, FINE = 5e-4, 3e-5  # gaps to the bound at which the search, and the cheap sweeps, leave a layer alone
WIDE = 1e-2  # gap from which other starts are tried
SMALL, EXACT = 500, 1e-9  # layers x slots x devices up to which every gap above EXACT counts as wide
LEAST = 600  # rounds times layers of search that a small problem gets anyway
BIASES = (0.0, 0.1, 0.35, 0.75)  # see replica_counts
ROUNDS, SEARCHED = 15, 32  # starts of a layer that are searched: none for fewer rounds, and at most so many


def solve(load: Floats, device_slots: Ints, enough: Floats | None = None) -> tuple[Packing, Floats]:
    """Place experts so that the most loaded device carries as little as we can find.

    The first candidate is the greedy one (largest share replicated, heaviest first onto the least loaded
    device); every later one is kept only where it is better. No device has an expert twice.

    Args: load [L, E] >= 0; device_slots [D], E <= sum, each <= E; enough [L]: peaks that need no improving.
    Returns: the packing, and a lower bound [L] on the load of the most loaded device.
    """
    # step 1: greedy
    slots, devices, layers = int(device_slots.sum()), len(device_slots), len(load)
    spare = slots - load.shape[1]
    counts = replica_counts(load, slots, devices)
    bound = simple_bound(load, device_slots, counts)
    width = int(device_slots.max())
    if width == 1:
        return one_each(load, counts), bound
    packing, greedy = _greedy(load, counts, device_slots)
    small = layers * slots * devices <= SMALL
    target = np.clip(greedy, bound * (1.0 + EXACT), bound * (1.0 + (EXACT if small else CLOSE)))
    if enough is not None:
        target = np.maximum(target, enough)
    even_out(packing, np.minimum(target, bound * (1.0 + FINE)), sweeps=24)

    # step 2: other replica counts, where there is something to gain
    open_ = np.flatnonzero(packing.peak > target)
    pairs = spare > 0 and bool((device_slots == 2).all())
    if len(open_) and pairs:
        counts = pair_counts(load[open_], slots, devices, BIASES, rounds=_rounds(slots, devices))
        packing.take_better(open_, longest_first(load[open_], counts, device_slots))
    least = np.maximum(target, bound * (1.0 + (EXACT if small else WIDE)))
    wide = np.flatnonzero(packing.peak > least)
    tries = affordable(len(wide), device_slots, least=4 if pairs else 1)
    others = packing.part(wide[:0])
    if tries and len(wide):
        others = starts(load[wide], device_slots, bound[wide], target[wide], tries)
        packing.take_better(wide, others.best(tries, 1))

    # step 3: search from the best of them
    open_ = np.flatnonzero(packing.peak > target)
    if len(open_) and (tries or not pairs):
        budget = LEAST if pairs else max(layers * _rounds(slots, devices), LEAST)
        kept = int(np.clip(budget // (len(open_) * ROUNDS), 1, min(tries, SEARCHED) + 1)) - 1
        others = others.best(max(tries, 1), kept)
        both = packing.part(open_).joined(others)
        search(both, np.concatenate([target[open_], np.repeat(target[wide], kept)]), budget)
        packing.take_better(open_, both.part(np.arange(len(open_))))
        for k in range(kept):
            packing.take_better(wide, both.part(len(open_) + k + kept * np.arange(len(wide))))

    # step 4: other replica counts again, from what was found so far
    open_ = np.flatnonzero(packing.peak > least)
    if len(open_) and spare:
        some = packing.part(open_)
        if climb(some, device_slots, least[open_]):
            search(some, target[open_], LEAST)
            packing.take_better(open_, some)

    # step 5: a sharper bound where the gap is still open
    return packing, sharpen(load, device_slots, bound, packing.peak, CLOSE)


def _greedy(load: Floats, counts: Ints, device_slots: Ints) -> tuple[Packing, Floats]:
    """The greedy packing of `counts` with copies of an expert apart, and the peak [L] of the greedy one that cares
    for neither that nor a limit on copies: what there is to beat."""
    slots, devices = int(device_slots.sum()), len(device_slots)
    free = counts
    if counts.max() == devices:
        many = (counts == devices).any(axis=1)
        free = counts.copy()
        free[many] = replica_counts(load[many], slots, slots)
    packing = longest_first(load, free, device_slots, apart=False)
    peak = packing.peak
    twice = np.flatnonzero(packing.twice.any(axis=1))
    if len(twice):
        pull_apart(packing)
        packing.take_better(twice, longest_first(load[twice], counts[twice], device_slots))
    return packing, peak


def _rounds(slots: int, devices: int) -> float:
    """Rounds of search a layer: a small part of what placing slots one by one would take, in its time."""
    return min(60.0, slots * (10 + 0.6 * devices) / 900)
