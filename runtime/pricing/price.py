"""What one operator costs, and how far to trust the figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foundation.errors import Failure

Bound = Literal["compute", "memory", "network", "overhead"]
PriceEvidence = Literal["measured", "fitted", "transferred", "datasheet", "assumed"]

EVIDENCE_ORDER: tuple[PriceEvidence, ...] = ("measured", "fitted", "transferred", "datasheet", "assumed")
"""Strongest first. A result carries the weakest grade of what went into it."""


class PriceError(Failure):
    """An operator that cannot be priced; the message says what is missing and how to supply it."""


@dataclass(frozen=True, slots=True)
class Price:
    """Time of one operator on one device.

    `relative_error` is the 90th percentile of |predicted / measured - 1| on held-out measurements of
    that kernel (or of the chips it was transferred to). `extrapolated` says the inputs lie outside
    the measured range; the time then follows the roofline from the nearest measured point. assumed: figures that
    nobody gave, and what was taken for them, in words. sources: tables and formulas that it was read from, in words.
    """

    seconds: float
    bound: Bound
    evidence: PriceEvidence
    relative_error: float
    extrapolated: bool = False
    assumed: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()

    def __add__(self, other: Price) -> Price:
        return total([self, other])

    def times(self, count: float) -> Price:
        """The same operator `count` times in a row. Errors of equal kernels do not average out."""
        return self.lasting(self.seconds * count)

    def lasting(self, seconds: float) -> Price:
        """The same operator in other seconds; `dataclasses.replace` takes ten times as long, and tables ask often."""
        return Price(
            seconds, self.bound, self.evidence, self.relative_error, self.extrapolated, self.assumed, self.sources
        )


def weakest(grades: Iterable[PriceEvidence]) -> PriceEvidence:
    """The weakest grade among `grades`; 'measured' when there are none."""
    return EVIDENCE_ORDER[max((EVIDENCE_ORDER.index(g) for g in grades), default=0)]


def total(prices: Iterable[Price]) -> Price:
    """Sum of operators run one after the other: bound by its largest share, graded by its weakest part.

    Errors are weighted by time and taken as fully correlated, which over-states them rather than under.
    """
    parts = list(prices)
    if not parts:
        return Price(0.0, "overhead", "measured", 0.0)
    seconds = sum(p.seconds for p in parts)
    shares: dict[Bound, float] = {}
    for p in parts:
        shares[p.bound] = shares.get(p.bound, 0.0) + p.seconds
    bound = max(shares, key=shares.__getitem__)
    error = float(np.dot([p.seconds for p in parts], [p.relative_error for p in parts]) / max(seconds, 1e-30))
    grade, far = weakest(p.evidence for p in parts), any(p.extrapolated for p in parts)
    assumed, sources = (
        frozenset[str]().union(*each)
        for each in ((p.assumed for p in parts), (p.sources for p in parts if p.seconds > 0))
    )
    return Price(seconds, bound, grade, error, far, assumed, sources)
