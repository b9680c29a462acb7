"""Where the ranks of a layout sit, and so which link they talk over.

Devices are numbered replica by replica, then stage, dp rank, tp rank (as a plan numbers them), from the first device of
a server on. Neighbours share a server, `Chip.node` of them, and a scale-up domain, `Chip.domain` of them; what leaves
a domain goes over the scale-out link. Replicas are equal but for where they begin; the worst placed one counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from model.split import Axes, Layout


@dataclass(frozen=True, slots=True)
class Span:
    """A group of devices that meet in a collective.

    domains, nodes: scale-up domains and servers that they are spread over. together: the fewest of them that share a
    domain.
    """

    devices: int
    domains: int
    nodes: int
    together: int

    @classmethod
    def of(cls, devices: Iterable[int], domain: int, node: int) -> Span:
        """devices: their numbers, from the first of a domain on."""
        numbers = list(devices)
        in_domain = Counter(number // domain for number in numbers)
        nodes = {number // node for number in numbers}
        return cls(len(numbers), len(in_domain), len(nodes), min(in_domain.values()))

    @property
    def text(self) -> str:
        return f"{self.devices} devices" + (f" in {self.domains} scale-up domains" if self.domains > 1 else "")


@dataclass(frozen=True, slots=True)
class Hops:
    """The hops between a replica's pipeline stages: inside a server, between servers of one scale-up domain, and out of
    the domain."""

    inside: int = 0
    across_nodes: int = 0
    across_domains: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """The spans of a layout's collectives, by mesh axes, its hops between stages, and the span of the ranks that a
    sequence's cache is dealt out to."""

    tp: Span
    dp: Span
    stage: Span
    hops: Hops
    dcp: Span

    def span(self, axes: Axes) -> Span:
        """Of the devices that a collective over those mesh axes joins."""
        return self.stage if len(axes) > 1 else self.tp if axes == ("tp",) else self.dp

    @property
    def spans(self) -> tuple[Span, Span, Span]:
        """What prices of a stage depend on."""
        return self.tp, self.dp, self.stage


@lru_cache(maxsize=4096)
def place(layout: Layout, domain: int, node: int, replicas: int = 1) -> Placement:
    """Where `replicas` of a layout sit, one behind another, on servers of `node` devices in domains of `domain`."""
    starts = list(_starts(layout.devices, math.lcm(domain, node), replicas))
    tp, dp, stage = layout.tp, layout.groups, layout.stage_devices
    stages = [start + number * stage for start in starts for number in range(layout.pp)]

    def worst(groups: Iterable[Iterable[int]]) -> Span:
        return max((Span.of(group, domain, node) for group in groups), key=lambda s: (s.domains, -s.together, s.nodes))

    return Placement(
        worst(range(first + rank * tp, first + (rank + 1) * tp) for first in stages for rank in range(dp)),
        worst(range(first + rank, first + stage, tp) for first in stages for rank in range(tp)),
        worst(range(first, first + stage) for first in stages),
        max(
            (_hops(layout, start, domain, node) for start in starts),
            key=lambda hops: (hops.across_domains, hops.across_nodes),
        ),
        worst(range(rank, rank + layout.dcp) for first in stages for rank in range(first, first + stage, layout.dcp)),
    )


def _starts(devices: int, period: int, replicas: int) -> Iterator[int]:
    """The first devices of replicas, one for each way in which they can lie on servers."""
    for replica in range(min(replicas, period // math.gcd(devices, period))):
        yield replica * devices % period


def _hops(layout: Layout, start: int, domain: int, node: int) -> Hops:
    """Each hop by its worst rank: a stage begins when all of it has arrived."""
    counts = [0, 0, 0]
    for boundary in range(layout.pp - 1):
        first = start + boundary * layout.stage_devices
        sent = [(device, device + layout.stage_devices) for device in range(first, first + layout.stage_devices)]
        out = any(a // domain != b // domain for a, b in sent)
        counts[2 if out else 1 if any(a // node != b // node for a, b in sent) else 0] += 1
    return Hops(*counts)


def second_pool(first: int, second: int, node: int) -> int:
    """Where a pool of `second` devices begins behind one of `first` on the same kind of server: right behind it where
    the rest of the last server holds all of it, else on a server of its own."""
    used = first % node
    return first if used and used + second <= node else first + -first % node
