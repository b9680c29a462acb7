"""Speculative decoding: how many tokens a step yields.

With K drafts a step computes q = K + 1 tokens per sequence and yields 1 + the leading drafts accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foundation.limits import within
from model.config import MOST_DRAFTS
from runtime.serving.errors import WorkloadError


@dataclass(frozen=True)
class Speculation:
    """Acceptance of the drafts.

    acceptance: [K] chance that draft i is accepted, given that those before it were. ranges: [K] the least and the most
    that each may be, nine times in ten and all at once; empty where it is exact.
    """

    acceptance: tuple[float, ...]
    ranges: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.ranges and len(self.ranges) != len(self.acceptance):
            raise WorkloadError(f"{len(self.ranges)} ranges of {len(self.acceptance)} drafts: give one for each")
        if not all(0 <= low <= p <= high <= 1 for p, (low, high) in zip(self.acceptance, self.ranges, strict=False)):
            raise WorkloadError(f"draft acceptance {self.acceptance} lies outside its ranges {self.ranges}")
        if not self.acceptance or not all(0 <= p <= 1 for p in self.acceptance):
            raise WorkloadError(f"draft acceptance {self.acceptance}: give one or more chances from 0 to 1")

    @classmethod
    def from_mean(cls, drafts: int, mean_tokens: float) -> Speculation:
        """K drafts with one common chance p, such that a step yields `mean_tokens` (1 to K + 1) on average.

        Solves sum_{i=0..K} p^i = mean_tokens by bisection.
        """
        within("drafts a step:", drafts, MOST_DRAFTS, WorkloadError)
        if drafts < 1 or not 1 <= mean_tokens <= drafts + 1:
            raise WorkloadError(
                f"{drafts} drafts yield 1 to {drafts + 1} tokens a step, not {mean_tokens}: change either"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if sum(middle**i for i in range(drafts + 1)) < mean_tokens:
                low = middle
            else:
                high = middle
        return cls((high,) * drafts)

    @property
    def query_tokens(self) -> int:
        """q: tokens a sequence computes in a decode step."""
        return len(self.acceptance) + 1

    @property
    def mean_tokens(self) -> float:
        """Expected tokens per sequence and step, before the end of the answer cuts any off."""
        return 1.0 + float(np.cumprod(self.acceptance).sum())

    @property
    def mean_range(self) -> tuple[float, float]:
        """The least and the most that `mean_tokens` may be."""
        if not self.ranges:
            return self.mean_tokens, self.mean_tokens
        low, high = (1.0 + float(np.cumprod(ends).sum()) for ends in zip(*self.ranges, strict=True))
        return low, high

    def draw(self, rng: np.random.Generator, sequences: int) -> np.ndarray:
        """[sequences] int64 tokens yielded by a step, each from 1 to q."""
        reach = np.cumprod(self.acceptance)  # chance that drafts 0..i are all accepted
        return 1 + (rng.random(sequences)[:, None] < reach).sum(axis=1)
