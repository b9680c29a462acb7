"""Memory below the devices' in which a rank's prompts stay cached: the host's, and disk.

As engines do it by default (SGLang HiCache's write_through, vLLM's offloading connector, LMCache), a whole block of a
prompt is written to every tier as it is computed, and each tier forgets what was used longest ago. A request that
is admitted takes from them what follows on what the device still has, each tier over its own link, one request after
another; its prompt goes on when all of it has come. Writing takes no time: links carry both ways at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from foundation.errors import CapacityError


@dataclass(frozen=True)
class CacheTier:
    """A tier of one rank. tokens: that it holds. seconds_per_token, latency_seconds: of fetching from it."""

    name: Literal["host", "disk"]
    tokens: int
    seconds_per_token: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.seconds_per_token < 0 or self.latency_seconds < 0:
            raise CapacityError(f"the cache's {self.name} tier: tokens and times cannot be negative")


class LowerTiers:
    """What the tiers of a rank hold, by prefix hash, and when their links are free."""

    def __init__(self, tiers: Sequence[CacheTier], block_tokens: int):
        self.tiers = tuple(tiers)
        self.block_tokens = block_tokens
        self._held: list[OrderedDict[int, None]] = [OrderedDict() for _ in tiers]
        self._free_at = [0.0] * len(self.tiers)

    def put(self, blocks: Sequence[int]) -> None:
        """Blocks of one prompt, in their order, were computed or used: all tiers hold them, the first ones longest."""
        for tier, held in zip(self.tiers, self._held, strict=True):
            room = tier.tokens // self.block_tokens
            for block in reversed(blocks[:room]):
                held[block] = None
                held.move_to_end(block)
            while len(held) > room:
                held.popitem(last=False)

    def found(self, blocks: Iterable[int]) -> list[int]:
        """The tier of each of the leading blocks that some tier holds: the first that does."""
        tiers = []
        for block in blocks:
            tier = next((number for number, held in enumerate(self._held) if block in held), None)
            if tier is None:
                break
            tiers.append(tier)
        return tiers

    def fetch(self, tokens: Sequence[int], now: float) -> float:
        """When so many tokens of each tier are here, asked for now."""
        ready = now
        for number, (tier, count) in enumerate(zip(self.tiers, tokens, strict=True)):
            if count:
                start = max(now, self._free_at[number])
                self._free_at[number] = start + tier.latency_seconds + count * tier.seconds_per_token
                ready = max(ready, self._free_at[number])
        return ready

    def check(self) -> None:
        """Asserts that no tier holds more than it can. For tests."""
        for tier, held in zip(self.tiers, self._held, strict=True):
            assert len(held) * self.block_tokens <= tier.tokens
