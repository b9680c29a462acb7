"""Lower bounds on the load of the most loaded device, over every placement with even splitting.

Symbols: D devices, S slots, m slots of the smallest device, w an expert's load, c its replicas (so
1 <= c <= S - E + 1), x = w / c the share a replica carries, T a peak to be refuted.

1. mean: the peak is at least the mean.
2. share: it is at least the smallest possible largest share, that of `replica_counts`.
3. fillers: every slot holds something. Let a share x >= t > T/2 be called a top. A device holds at most
   one top, and beside it m - 1 other slots that carry at most T - x. So over all n tops
       sum_tops (T - x)  >=  the n (m - 1) smallest shares  >=  n (m - 1) p - sum_others max(0, p - x)
   for every p >= 0. Rearranged, sum over experts of f(w, c) <= 0 must hold, where
       f = c ((m - 1) p - T) + w   if w / c >= t,      f = -max(0, c p - w)   otherwise,
   under sum of c = S. By weak duality T is refuted if, for some t, p and price q of a slot,
       sum_e min_c (f + q c) - q S > 0.
   Both pieces are concave in c, so the minimum sits at an end of its range of c; with q >= p the second
   piece grows with c, so its lower end is enough.
"""

from __future__ import annotations

import numpy as np

from runtime.planning.experts.counts import replica_counts
from runtime.planning.experts.packing import Floats, Ints

TOPS = np.array([0.501, 0.65, 0.75, 0.82, 0.87, 0.92, 0.96, 0.985])  # t as a part of T
PRICE_RATIOS = np.array([1.0, 2.5, 6.0])  # q as a multiple of p
FILLS = 8  # values of p tried


def simple_bound(load: Floats, device_slots: Ints, replicas: Ints | None = None) -> Floats:
    """[L] bounds 1 and 2, and bound 3 in closed form where no expert has a spare replica.

    Args: load [L, E]; device_slots [D]; replicas [L, E]: those of `replica_counts`, where at hand.
    """
    slots, devices = int(device_slots.sum()), len(device_slots)
    if replicas is None:
        replicas = replica_counts(load, slots, devices)
    bound = np.maximum(load.sum(axis=1) / devices, (load / replicas).max(axis=1))
    if slots == load.shape[1] and devices:
        # the n heaviest experts sit on n devices at most; fewer only if two of them share one
        ranked = np.sort(load, axis=1)
        beside = int(device_slots[device_slots > 0].min()) - 1
        for n in range(1, min(devices, slots // (beside + 1)) + 1):
            tops, fillers = ranked[:, slots - n :], ranked[:, : n * beside]
            apart = (tops.sum(axis=1) + fillers.sum(axis=1)) / n
            together = tops[:, :2].sum(axis=1) if n > 1 else np.inf
            bound = np.maximum(bound, np.minimum(apart, together))
    return bound


def sharpen(load: Floats, device_slots: Ints, bound: Floats, peak: Floats, gap: float) -> Floats:
    """[L] `bound`, with bound 3 added in layers whose `peak` is more than `gap` above it."""
    open_ = np.flatnonzero(peak > bound * (1.0 + gap))
    bound = bound.copy()
    if len(open_) and device_slots.sum() > load.shape[1]:
        bound[open_] = filler_bound(load[open_], device_slots, bound[open_], peak[open_])
    return bound


def filler_bound(load: Floats, device_slots: Ints, low: Floats, high: Floats) -> Floats:
    """[L] the largest T between a bound `low` and a found peak `high` that bound 3 refutes, by bisection.

    Args: load [L, E]; device_slots [D]; low, high [L].
    """
    slots, width = int(device_slots.sum()), int(device_slots.min())
    if width < 2:
        return low
    ranked = -np.sort(-load, axis=1)
    row = np.arange(len(load))
    low, ceiling = low.copy(), high * (1.0 - 1e-9)
    fills = ranked[:, load.shape[1] - np.unique(np.geomspace(1, load.shape[1], FILLS).astype(int))]
    top = np.broadcast_to(TOPS, (len(load), len(TOPS)))
    for part in (0.5, 0.5, 0.25):
        # step 1: the whole grid of p, t and q at one peak
        peak = low + part * (ceiling - low)
        excess = _excess(ranked, slots, width, peak, fills, top, PRICE_RATIOS)
        flat = excess.reshape(len(load), -1)
        p, t, q = np.unravel_index(flat.argmax(axis=1), excess.shape[1:])

        # step 2: the largest peak which its best point refutes, by bisection; any point is a proof
        under, over = low, ceiling
        for _ in range(8):
            peak = (under + over) / 2
            chosen = (fills[row, p][:, None], top[row, t][:, None], PRICE_RATIOS[q][:, None, None])
            no = _excess(ranked, slots, width, peak, *chosen)[:, 0, 0, 0] > 0
            under, over = np.where(no, peak, under), np.where(no, over, peak)
        low = under
    return low


def _excess(ranked: Floats, slots: int, width: int, peak: Floats, p: Floats, top: Floats, q: Floats) -> Floats:
    """[L, p, t, q] what bound 3 finds missing at `peak` [L]; above 0 nothing can have that peak.

    Args: ranked [L, E] sorted downwards; p [L, p]; top [L, t], t as a part of the peak; q [q] or
    [L, 1, q], a multiple of p. Axes below: [L, p, t, q, e], with e over the experts that can be tops.
    """
    experts = ranked.shape[1]
    t = top * peak[:, None]
    reach = int((ranked >= t.min(axis=1, keepdims=True)).sum(axis=1).max())
    spare = slots - experts + 1

    # step 1: experts below every t hold one replica: f + q c = q - max(0, p - w)
    short = np.maximum(0.0, p[:, :, None] - ranked[:, None, reach:]).sum(axis=2)
    price = p[:, :, None] * q
    rest = price * (experts - reach - slots) - short[:, :, None]

    # step 2: the others choose between the fewest replicas, the most that stay tops, and one more
    w = ranked[:, None, None, None, :reach]
    wide = peak[:, None, None, None, None]
    fewest = np.minimum(np.maximum(1.0, np.ceil(w / wide - 1e-9)), spare)
    most = np.minimum(np.floor(w / t[:, None, :, None, None] + 1e-9), spare)
    after = np.minimum(np.maximum(most + 1, fewest), spare)
    p, price = p[:, :, None, None, None], price[:, :, None, :, None]
    slope = (width - 1) * p - wide + price
    as_top = np.where(most >= fewest, slope * np.where(slope >= 0, fewest, most) + w, np.inf)
    as_other = np.where(most < spare, price * after - np.maximum(0.0, after * p - w), np.inf)
    total = np.minimum(as_top, as_other).sum(axis=4)

    # step 3: weak duality, with room for rounding
    return total + rest[:, :, None, :] - 1e-9 * slots * peak[:, None, None, None]
