"""The solver on one pool: replica counts, packing and local search, for all layers at once."""

from __future__ import annotations

import numpy as np

from runtime.planning.experts.bound import sharpen, simple_bound
from runtime.planning.experts.counts import pair_counts, replica_counts
from runtime.planning.experts.packing import Floats, Ints, Packing, longest_first, one_each
from runtime.planning.experts.search import even_out, search

CLOSE, FINE = 5e-4, 3e-5  # gaps to the bound at which the search, and the cheap sweeps, leave a layer alone
LEAST = 600  # rounds times layers of search that a small problem gets anyway
BIASES = (0.0, 0.1, 0.35, 0.75)  # see replica_counts


def solve(load: Floats, device_slots: Ints) -> tuple[Packing, Floats]:
    """Place experts so that the most loaded device carries as little as we can find.

    The first candidate is the greedy one (largest share replicated, heaviest first onto the least loaded
    device); every later one is kept only where it is better. Copies of an expert are on different devices,
    save in a layer where the greedy packing that ignores this is the best.

    Args: load [L, E] >= 0; device_slots [D], E <= sum, each <= E.
    Returns: the packing, and a lower bound [L] on the load of the most loaded device.
    """
    # step 1: greedy
    slots, devices = int(device_slots.sum()), len(device_slots)
    counts = replica_counts(load, slots, devices)
    bound = simple_bound(load, device_slots, counts)
    target = bound * (1.0 + CLOSE)
    width = int(device_slots.max())
    if width == 1:
        return one_each(load, counts), bound
    packing = longest_first(load, counts, device_slots)
    even_out(packing, bound * (1.0 + FINE), sweeps=24)

    # step 2: other replica counts and a search, where there is something to gain
    open_ = np.flatnonzero(packing.peak > target)
    spare = slots > load.shape[1]
    if len(open_) and spare and bool((device_slots == 2).all()):
        counts = pair_counts(load[open_], slots, devices, BIASES, rounds=_rounds(slots, devices, 2))
        _keep_better(packing, open_, longest_first(load[open_], counts, device_slots))
    elif len(open_):
        for bias in BIASES[1:] if spare and width == 3 else ():
            counts = replica_counts(load[open_], slots, devices, bias)
            _keep_better(packing, open_, longest_first(load[open_], counts, device_slots))
        part = Packing.of(load[open_], packing.expert[open_])
        search(part, target[open_], budget=max(len(load) * _rounds(slots, devices, width), LEAST))
        _keep_better(packing, open_, part)

    # step 3: the greedy packing that may put an expert on a device twice: a second copy there shifts the even
    # split between devices, which under extreme skew can beat everything found so far
    open_ = np.flatnonzero(packing.peak > target)
    if len(open_) and spare:
        counts = replica_counts(load[open_], slots, slots)
        _keep_better(packing, open_, longest_first(load[open_], counts, device_slots, apart=False))

    # step 4: a sharper bound where the gap is still open
    return packing, sharpen(load, device_slots, bound, packing.peak, CLOSE)


def _keep_better(packing: Packing, layers: Ints, part: Packing) -> None:
    """Put the layers of `part` (numbered by `layers`) into `packing` where their peak is lower."""
    better = part.peak < packing.peak[layers]
    to = layers[better]
    for name, whole in vars(packing).items():
        whole[to] = getattr(part, name)[better]


def _rounds(slots: int, devices: int, width: int) -> float:
    """Rounds of search a layer: a small part of what placing slots one by one would take, in its time."""
    return min(60.0, slots * (10 + 0.6 * devices) / (900 if width < 4 else 600))
