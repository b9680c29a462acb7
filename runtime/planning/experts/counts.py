"""How many replicas each expert gets."""

from __future__ import annotations

import numpy as np

from runtime.planning.experts.packing import Floats, Ints

RECEIVERS, DONORS = 3, 3  # candidates per climbing step of `pair_counts`


def replica_counts(
    load: Floats, slots: int, devices: int, bias: float | Floats = 0.0, heavy: Ints | None = None
) -> Ints:
    """Hand out `slots` replicas one at a time to the expert with the largest load / (replicas + bias).

    bias 0 (Adams' divisor method) makes the largest share of a replica as small as it can be: the expert
    that gets the next replica has the largest share, so in any assignment with a smaller maximum it would
    have at least that many replicas, and the sum would not fit. A larger bias leaves more spare
    replicas to the heavy experts, which can pack better. Nobody gets more than `devices`.

    Args:
        load: [L, E] >= 0. bias: one, or [L].
        heavy: [L] spare replicas handed out so; the lightest experts get the others, one each, and again
            from the start. Those hardly weigh anything, so nothing large gets smaller than it need be.
    Returns [L, E], rows summing to `slots` (E <= slots <= E * devices).
    """
    layers, experts = load.shape
    replicas = np.ones((layers, experts), np.int64)
    row = np.arange(layers)
    bias = np.broadcast_to(np.asarray(bias, np.float64), layers)
    spare = slots - experts
    steps = np.full(layers, spare) if heavy is None else heavy
    claim = load / (1.0 + bias[:, None])
    if devices == 1:
        claim[:] = -1.0
    for step in range(int(steps.max(initial=0))):
        e = claim.argmax(axis=1)
        replicas[row, e] += step < steps
        n = replicas[row, e]
        claim[row, e] = np.where(n < devices, load[row, e] / (n + bias), -1.0)
    rest = spare - steps
    rank = np.argsort(np.argsort(load, axis=1, kind="stable"), axis=1)
    while rest.any():
        open_ = replicas < devices
        order = np.where(open_, rank, experts).argsort(axis=1).argsort(axis=1)
        more = open_ & (order < rest[:, None])
        replicas += more
        rest = rest - more.sum(axis=1)
    return replicas


def folded(load: Floats, replicas: Ints) -> Floats:
    """[K] the largest pair when the heaviest replica is paired with the lightest, and so on.

    That is the best a device count of half the replicas can do. Args: load, replicas [K, E].
    """
    share = np.sort(np.repeat((load / replicas).ravel(), replicas.ravel()).reshape(len(load), -1), axis=1)
    half = share.shape[1] // 2
    return (share[:, :half] + share[:, : half - 1 : -1]).max(axis=1)


def _largest_pair(load: Floats, replicas: Ints) -> tuple[Ints, Ints]:
    """[K] the heavy and [K] the light expert of the largest pair of `folded`."""
    rows, experts = load.shape
    item = np.repeat(np.tile(np.arange(experts), rows), replicas.ravel()).reshape(rows, -1)
    share = np.take_along_axis(load / replicas, item, axis=1)
    order = np.argsort(share, axis=1)
    ranked = np.take_along_axis(share, order, axis=1)
    half = ranked.shape[1] // 2
    row, worst = np.arange(rows), (ranked[:, :half] + ranked[:, : half - 1 : -1]).argmax(axis=1)
    return item[row, order[row, -1 - worst]], item[row, order[row, worst]]


def pair_counts(load: Floats, slots: int, devices: int, biases: tuple[float, ...], rounds: float) -> Ints:
    """Replica counts for two slots a device: the best of `biases`, then climbed by single replicas.

    A climbing step hands a replica from one expert to another where the largest pair does not grow. The
    receivers tried are the two experts of the largest pair and a random one, the donors are random; the
    random numbers are the same in every call.

    Args: load [L, E]. Returns [L, E].
    """
    # step 1: the best divisor method, layer by layer
    options = np.stack([replica_counts(load, slots, devices, bias) for bias in biases])
    values = np.stack([folded(load, counts) for counts in options])
    row, pick = np.arange(len(load)), values.argmin(axis=0)
    best, value = options[pick, row], values[pick, row]

    # step 2: climb
    rng = np.random.default_rng(0)
    loads = np.repeat(load, RECEIVERS * DONORS, axis=0)
    for _ in range(int(rounds)):
        counts, legal = _exchanges(load, best, devices, rng)
        values = np.where(legal, folded(loads, counts.reshape(len(loads), -1)).reshape(legal.shape), np.inf)
        pick = values.argmin(axis=1)
        good = values[row, pick] <= value
        best[good], value[good] = counts[row, pick][good], values[row, pick][good]
    return best


def _exchanges(load: Floats, replicas: Ints, devices: int, rng: np.random.Generator) -> tuple[Ints, np.ndarray]:
    """Counts [L, K, E] with one replica handed over, and whether each is legal [L, K]."""
    layers, experts = load.shape
    tries = RECEIVERS * DONORS
    draw = np.where(replicas > 1, rng.random(replicas.shape), 2.0)
    donors = np.argsort(draw, axis=1)[:, np.arange(DONORS) % experts]
    givers = np.tile(donors, (1, RECEIVERS))
    takers = np.stack([*_largest_pair(load, replicas), rng.integers(experts, size=layers)], axis=1)
    takers = np.repeat(takers, DONORS, axis=1)
    row = np.arange(layers)[:, None]
    legal = (replicas[row, givers] > 1) & (replicas[row, takers] < devices)
    counts = np.repeat(replicas[:, None], tries, axis=1)
    counts[row, np.arange(tries), givers] -= legal
    counts[row, np.arange(tries), takers] += legal
    return counts, legal
