"""Finds the last cache before a device's memory: how much it holds, and how fast small matrices are read that it holds.

A model so small that its weights stay there (the embedded one on a host) decodes at the cache's rate, at several times
what memory gives. Products of one row go round over more and more matrices: while all of them fit, each is where the
round before left it; where they do not, none is. The size is the largest that is nearer to the best rate than to the
worst.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

from backends.interface import Backend
from runtime.porting.calibrate_sizes import DTYPES, Effort, Probe, loaded, matrices, product_chain

_LEAST_BYTES = 2e6  # less is a core's own
_LEAST_OPS, _MOST_OPS = 64, 512  # of one program: what a call takes is little of it, and somebody has to compile it
_TOLD_APART = 1.3
"""Times the memory's rate that a cache's is at least, to be told apart from it."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """bytes: that it holds. bytes_per_s: of products of one row with small matrices there, without launches."""

    bytes: float
    bytes_per_s: float


def measure_cache(backend: Backend, dtype: str, probe: Probe, effort: Effort) -> Cache | None:
    """None where no size of a round is told apart from memory."""
    return found([_rates(backend, width, dtype, probe, effort) for width in sorted(effort.widths)[:2]])


def found(rates: Sequence[Mapping[float, float]]) -> Cache | None:
    """The cache that bytes/s by bytes of a round tell of, for each width of the matrices."""
    held, read = [], []
    for by_bytes in rates:
        sizes = sorted(by_bytes)
        best, cold = max(by_bytes.values()), by_bytes[sizes[-1]]
        if best < _TOLD_APART * cold:
            return None
        nearer = [size for size in sizes if by_bytes[size] >= math.sqrt(best * cold)]
        held.append(max(nearer))
        read.append(statistics.median(by_bytes[size] for size in nearer))
    return Cache(statistics.geometric_mean(held), statistics.fmean(read))


def _rates(backend: Backend, width: int, dtype: str, probe: Probe, effort: Effort) -> dict[float, float]:
    """Bytes a second by bytes of a round, each twice the one before, what launches take left out."""
    size = DTYPES[dtype].itemsize
    each = float(width * width * size)
    most = min(2 * effort.cold_bytes, _MOST_OPS * each)
    counts = [count for power in range(16) if _LEAST_BYTES <= (count := 2**power) * each <= most] or [1]
    held = matrices(backend, width, max(counts), dtype)
    x = backend.zeros((1, width), dtype)
    calls = []
    for count in counts:
        again = max(math.ceil(_LEAST_OPS / count), probe.repeats(count, 1, width, size))
        args = (x, tuple(held[:count]))
        run = loaded(backend, f"calibrate cache {width} {count} x {again}", partial(product_chain, again), args)
        calls.append((count, again, lambda run=run, args=args: backend.get(run(*args)[1])))
    kept: list[list[float]] = [[] for _ in calls]
    for _ in range(effort.rounds):
        for (*_, call), times in zip(calls, kept, strict=True):
            call()  # what the other sizes left in the cache is none of this one's
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    rates = {}
    for (count, again, _), times in zip(calls, kept, strict=True):
        ops = count * again
        seconds = statistics.median(times) - probe.dispatch_s - ops * probe.launch_s
        rates[count * each] = ops * each / max(seconds, 1e-9)
    return rates
