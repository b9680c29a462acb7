"""Memory below a chip's own in which its caches are kept: what it holds, and what fetching from it takes.

Each device keeps its own pages and fetches them over its own link, all at once, as engines do (every tp rank has its
own host pool). What a profile does not say of latencies, and what nobody says of disks, is assumed.
"""

from __future__ import annotations

from foundation.errors import UsageError
from hw_profiles import Profile
from runtime.deployment.kv import Offload, Tier
from runtime.serving import CacheTier

HOST_LINK = "link.host.bandwidth_bytes_per_s"
DISK_BYTES_PER_S = 1e9
"""A device's share of one NVMe drive of 7 GB/s (PCIe 4.0 x4) in a server of eight, rounded up."""
_LATENCY_SECONDS = 10e-6  # of a copy over a link whose profile has no figure
_DISK_LATENCY_SECONDS = 1e-4  # of a read of NVMe flash


def host_tier(profile: Profile, size: float, page_tokens: int, bytes_per_token: float, ranks: int) -> Tier | None:
    """`size` bytes of host memory a device; None where the chip's link to it is not known, or no page fits."""
    link, pages = profile.get(HOST_LINK), int(size / (page_tokens * bytes_per_token) + 1e-9)
    if link is None or not pages:
        return None
    latency = profile.number("link.host.latency_s") or profile.number("overhead.p2p_latency_s") or _LATENCY_SECONDS
    tokens = pages * page_tokens
    held = tokens * bytes_per_token
    return Tier("host", held, pages, tokens, tokens * ranks, link.value, latency, link.evidence)


def lower_tiers(
    offload: Offload, profile: Profile, page_tokens: int, bytes_per_token: float, ranks: int
) -> tuple[Tier, ...]:
    """The tiers that are asked for, nearest first. bytes_per_token: on the fullest device. ranks: of a replica.

    Raises `UsageError` for a host whose link is not known.
    """
    found = []
    if offload.host_bytes:
        if profile.get(HOST_LINK) is None:
            raise UsageError(
                f"{profile.name} has no {HOST_LINK}, over which a cache in host memory comes: supply it with "
                f"--set {HOST_LINK}=… in bytes/s"
            )
        found.append(host_tier(profile, offload.host_bytes, page_tokens, bytes_per_token, ranks))
    if pages := int(offload.disk_bytes / (page_tokens * bytes_per_token) + 1e-9):
        tokens, rate = pages * page_tokens, offload.disk_bandwidth_bytes_per_s or DISK_BYTES_PER_S
        size = tokens * bytes_per_token
        found.append(
            Tier("disk", size, pages, tokens, tokens * ranks, rate, _DISK_LATENCY_SECONDS, "assumed")
        )  # fmt: skip
    return tuple(tier for tier in found if tier)


def cache_tiers(
    offload: Offload, profile: Profile, page_tokens: int, bytes_per_token: float, ranks: int
) -> tuple[CacheTier, ...]:
    """The same as a rank has them."""
    return tuple(
        CacheTier(tier.name, tier.tokens, bytes_per_token / tier.bandwidth_bytes_per_s, tier.latency_seconds)
        for tier in lower_tiers(offload, profile, page_tokens, bytes_per_token, ranks)
        if tier.name != "device"
    )


def tiers_assumed(offload: Offload, profile: Profile) -> frozenset[str]:
    """What nobody said of the tiers, and what is taken for it."""
    found = set()
    if offload.host_bytes and profile.number("link.host.latency_s") is None:
        other = profile.number("overhead.p2p_latency_s")
        found.add(f"link.host.latency_s {(other or _LATENCY_SECONDS) * 1e6:g} us")
    if offload.disk_bytes and offload.disk_bandwidth_bytes_per_s is None:
        found.add(f"disk to a device {DISK_BYTES_PER_S / 1e9:g} GB/s, a share of one NVMe drive a server")
    return frozenset(found)
