"""How far to trust a training step: an interval that should hold a tuned run nine times in ten.

`residuals.json` holds ln(published / predicted) of the seconds of published steps (`python -m bench.training_steps`
makes it); steps of one source, model and chip share their errors and are one group. Models with an indexer are a kind
of their own, for none of them was met yet. Where fewer than `FEW` groups are of a kind, all are asked, and the interval
is widened, as for serving (`runtime/pricing/bands.py`, which has the statistics).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from runtime.pricing.bands import FEW, Band, interval, widened

_FILE = Path(__file__).with_name("residuals.json")


@dataclass(frozen=True)
class PublishedSteps:
    """A group. sparse: the model has an indexer. rows: ln(published / predicted) of its steps' seconds. price_error:
    what their prices said of themselves, a share."""

    name: str
    sparse: bool
    rows: tuple[float, ...]
    price_error: float


@cache
def published_steps() -> tuple[PublishedSteps, ...]:
    """The groups of `residuals.json`."""
    held = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(
        PublishedSteps(each["group"], each["sparse"], tuple(each["seconds"]), each["price_error"])
        for each in held["groups"]
    )


def training_band(sparse: bool, price_error: float, groups: Sequence[PublishedSteps] | None = None) -> Band:
    """The band of a step's seconds. sparse: the model has an indexer. price_error: of the step's price, a share; what
    it has more than the groups' own widens the band. groups: what to go by instead of all that are known."""
    held = published_steps() if groups is None else groups
    own = [each for each in held if each.sparse == sparse]
    asked = own if len(own) >= FEW else held
    low, high = interval([each.rows for each in asked])
    kind = f"published training steps of models {'with' if sparse else 'without'} an indexer"
    words = f"{len(own)} groups of {kind}"
    if asked is held:
        low, high = widened(low, high)
        words = f"{words}, so the band of all {len(held)} groups, a quarter wider"
    found = Band(low, high, words)
    usual = max(each.price_error for each in asked)
    if price_error > usual:
        more = price_error - usual
        return found.wider(more, more, f"prices less certain than theirs ({price_error:.0%})")
    return found


def training_coverage(groups: Sequence[PublishedSteps] | None = None) -> tuple[int, int]:
    """(groups whose rows all lie in the band that the other groups give, groups)."""
    held = published_steps() if groups is None else groups
    inside = 0
    for group in held:
        found = training_band(group.sparse, group.price_error, [each for each in held if each is not group])
        inside += all(found.low <= row <= found.high for row in group.rows)
    return inside, len(held)
