"""What a plan says of its KV cache: who holds copies, on which tiers, and from which prefix on fetching pays.

Worked out by `runtime.planning.kv_tiers`, whose text has the definitions. Plain data, part of the plan's file.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Share:
    """One kind of cache over a replica.

    bytes_per_token: of one copy, over all layers. copies: devices of a stage that hold the same row.
    """

    cache: str
    bytes_per_token: float
    copies: int


@dataclasses.dataclass(frozen=True)
class Offload:
    """Memory below the devices' in which prompts are kept: bytes of host memory and of disk a device, 0 for none.
    disk_bandwidth_bytes_per_s: from disk to a device; None where nobody said."""

    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    disk_bandwidth_bytes_per_s: float | None = None

    @property
    def asked(self) -> bool:
        return self.host_bytes > 0 or self.disk_bytes > 0


@dataclasses.dataclass(frozen=True)
class Tier:
    """One level of the cache.

    bytes_per_device: on the fullest device. pages, tokens: of one rank. replica_tokens: distinct tokens over the dp
    ranks of a replica. bandwidth_bytes_per_s: of the device's memory, or from this tier to a device.
    """

    name: Literal["device", "host", "disk"]
    bytes_per_device: float
    pages: int
    tokens: int
    replica_tokens: int
    bandwidth_bytes_per_s: float
    latency_seconds: float
    evidence: str


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A replica's cache with `degree`-way context parallelism inside each tp group; degree 1 is the plan.

    resident_requests: requests of the demand's longest lengths that a replica holds at once.
    """

    degree: int
    copies: int
    rank_tokens: int
    replica_tokens: int
    resident_requests: int


@dataclasses.dataclass(frozen=True)
class Point:
    """A cached prefix of `tokens`: computing it again against fetching it from the host."""

    tokens: int
    recompute_seconds: float
    fetch_seconds: float


@dataclasses.dataclass(frozen=True)
class PoolKv:
    """The KV cache of one pool.

    request_tokens: cache of one request of the demand's longest lengths. tiers: the device, and below it what the pool
    is asked to keep prompts in; where nothing is, the host, if the profile has a link to it, as large as it might be.
    break_even_tokens: prefix from which on fetching from the host is no slower than
    computing again; None where it never is, up to the curve's end, or where `curve` is empty: nothing was priced.
    evidence: the weakest grade of what went into the curve.
    """

    role: Literal["serve", "prefill", "decode"]
    page_tokens: int
    request_tokens: int
    shares: tuple[Share, ...]
    tiers: tuple[Tier, ...]
    sharding: tuple[Sharding, ...]
    break_even_tokens: int | None
    curve: tuple[Point, ...]
    evidence: str
