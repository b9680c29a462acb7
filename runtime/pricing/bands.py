"""How far to trust a simulated figure: an interval that should hold the truth nine times in ten, and what it rests on.

The unit is a deployment group: rows of one source, model, chip, engine release and layout share their errors, so that
ten rows of one server teach as much as one. A row's residual is r = ln(measured / predicted) = bias + group + row.
`residuals.json` holds those of every published deployment that was predicted, with what kind of prediction it was;
`python -m bench.fit_bands` makes it. A band is the interval of one more row of one more group of the same kind:

- a kind is the engine, how its operators are priced on the chip (tables of its own, or carried over) and the regime
  that the run was in. Where fewer than `FEW` groups are of that kind, the next wider kind that has as many is asked
  (its engine, its regime, all), the interval is widened by a quarter, and the answer says so;
- the middle is the mean of the groups' medians, drawn towards zero as it is uncertain: a bias of few groups is mostly
  chance;
- to either side, Student's t at 95 % over the groups' medians times sqrt(between^2 (1 + 1/G) + within^2);
- operator prices that are less certain than those of the groups were, and steps outside a fit's range, add to it.

Sources of the form: Dunn et al., arXiv 1809.07441 and Lee et al., arXiv 2306.06342 (one row a group; hierarchical
data); with so few groups the t interval is taken where theirs would be the largest residual seen.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FEW = 4
"""Groups from which a kind has an interval of its own."""
WIDENED = 1.25
USUAL_PRICE_ERROR = 0.08
"""Held-out error of the operator prices that the groups' predictions were made of, by time: the median of them."""
EXTRAPOLATED = 0.10
"""What steps outside the range of a fit add, by their share."""
NOISE = 0.044
"""Least spread of a deployment's own residuals: two runs of one configuration differ by so much in TPOT."""
_FILE = Path(__file__).with_name("residuals.json")
_T95 = (
    6.31,
    2.92,
    2.35,
    2.13,
    2.02,
    1.94,
    1.89,
    1.86,
    1.83,
    1.81,
    1.80,
    1.78,
    1.77,
    1.76,
    1.75,
    1.75,
    1.74,
    1.73,
    1.73,
)
"""Student's t, 95 %, one-sided, for 1, 2, .. degrees of freedom; 1.65 beyond."""
_MAD = 0.6745
"""Median absolute deviation of a normal distribution over its standard deviation."""


@dataclass(frozen=True)
class PredictionKind:
    """engine: its kind. priced: "measured" (operator tables of the chip) or "carried" (from other chips). regime:
    "steady", "saturated", or "burst" (a run that is all ramp and drain)."""

    engine: str
    priced: str
    regime: str

    def wider(self) -> tuple[tuple[str, dict[str, str]], ...]:
        """Kinds that hold this one, narrowest first: their names, and what they ask of a group."""
        return (
            (f"{self.engine} on chips with {self.priced} prices, {self.regime}", vars(self)),
            (f"{self.engine}, {self.regime}", {"engine": self.engine, "regime": self.regime}),
            (f"{self.priced} prices, {self.regime}", {"priced": self.priced, "regime": self.regime}),
            (self.regime, {"regime": self.regime}),
            ("all", {}),
        )


@dataclass(frozen=True)
class GroupResiduals:
    """ln(measured / predicted) of a group's rows in one regime, by figure: "tpot", "ttft", "throughput", "step"."""

    name: str
    kind: PredictionKind
    figures: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Band:
    """low, high: of ln(measured / predicted). basis: in words, what it rests on."""

    low: float
    high: float
    basis: str

    def wider(self, below: float, above: float, why: str) -> Band:
        """The band where something else moves the figure, too, by so much of its logarithm to either side."""
        middle = (self.low + self.high) / 2
        return Band(
            middle - math.hypot(middle - self.low, below),
            middle + math.hypot(self.high - middle, above),
            f"{self.basis}; {why}",
        )

    def around(self, value: float) -> list[float]:
        """The interval of a predicted value."""
        return [value * math.exp(self.low), value * math.exp(self.high)]


@cache
def known_groups() -> tuple[GroupResiduals, ...]:
    """The groups of `residuals.json`."""
    held = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(
        GroupResiduals(
            each["group"],
            PredictionKind(each["engine"], each["priced"], each["regime"]),
            {name: tuple(rows) for name, rows in each["figures"].items()},
        )
        for each in held["groups"]
    )


def band(
    figure: str,
    kind: PredictionKind,
    price_error: float,
    extrapolated: float = 0.0,
    groups: Iterable[GroupResiduals] | None = None,
) -> Band:
    """The band of a figure ("tpot", "ttft", "throughput", "step") that was predicted under these circumstances.

    price_error: held-out error of the prices behind it. extrapolated: share of its steps outside a fit's range. groups:
    what to go by instead of all that are known.
    """
    held = [g for g in (known_groups() if groups is None else groups) if _rows(g, figure)]
    own = 0
    for place, (name, asked) in enumerate(kind.wider()):
        rows = _by_group(
            [g for g in held if all(getattr(g.kind, key) == value for key, value in asked.items())], figure
        )
        if place == 0:
            own = len(rows)
        if len(rows) >= FEW or name == "all":
            break
    low, high = interval(list(rows.values()))
    words = f"{len(rows)} deployment groups measured: {name}"
    if place:
        low, high = widened(low, high)
        few = f"{own} group{'s' * (own != 1)} of this kind" if own else "no measurement of this kind"
        words = f"{few}, so the band of {words}, a quarter wider"
    more = math.hypot(max(0.0, price_error - USUAL_PRICE_ERROR), EXTRAPOLATED * extrapolated)
    middle, half = (low + high) / 2, math.hypot((high - low) / 2, more)
    return Band(middle - half, middle + half, words)


def band_of_own(residuals: Sequence[float], price_error: float, beyond: bool) -> Band:
    """The band of a figure of a deployment that was itself measured: of one more row beside those of `residuals`, each
    predicted from the others. beyond: under a load unlike theirs."""
    count = len(residuals)
    spread = max(statistics.stdev(residuals), NOISE)
    bias = statistics.fmean(residuals)
    half = _T95[min(count - 2, len(_T95) - 1)] * spread * math.sqrt(1 + 1 / count)
    words = f"{count} measurements of this deployment, each predicted from the others"
    if beyond:
        half = WIDENED * math.hypot(half, EXTRAPOLATED + max(0.0, price_error - USUAL_PRICE_ERROR))
        words = f"{words}; under a load unlike theirs, so a quarter wider and more"
    return Band(bias - half, bias + half, words)


def _by_group(held: Sequence[GroupResiduals], figure: str) -> dict[str, tuple[float, ...]]:
    rows: dict[str, tuple[float, ...]] = {}
    for group in held:
        rows[group.name] = (*rows.get(group.name, ()), *_rows(group, figure))
    return rows


def _rows(group: GroupResiduals, figure: str) -> tuple[float, ...]:
    """A group's residuals of a figure; a time per output token is a step's time, too."""
    return group.figures.get(figure, ()) or (group.figures.get("tpot", ()) if figure == "step" else ())


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of one more row of one more group, nine times in ten. groups: ln(measured / predicted) of their rows; medians
    within groups, for a burst of four-token answers among a server's rows, say, has a time per output token that is a
    matter of chance."""
    means = [statistics.median(rows) for rows in groups]
    count = len(means)
    if count < 2:
        return -math.log(2), math.log(2)  # nothing to go by: a factor of two
    between = statistics.variance(means)
    inside = [
        statistics.median(abs(row - mean) for row in rows) / _MAD
        for rows, mean in zip(groups, means, strict=True)
        if len(rows) > 2
    ]
    within = statistics.fmean(spread**2 for spread in inside) if inside else 0.0
    bias = statistics.fmean(means)
    bias *= bias**2 / (bias**2 + between / count) if bias else 1.0
    half = _T95[count - 2] if count - 2 < len(_T95) else 1.65
    half *= math.sqrt(between * (1 + 1 / count) + within)
    return bias - half, bias + half


def widened(low: float, high: float) -> tuple[float, float]:
    """An interval that was made of other kinds of prediction than the one that it is for."""
    middle = (low + high) / 2
    return middle + WIDENED * (low - middle), middle + WIDENED * (high - middle)


def coverage(figure: str, groups: Sequence[GroupResiduals] | None = None) -> tuple[float, float, int]:
    """(share of the rows inside, the groups weighing alike; median half-width of the bands; groups): each group's rows
    against the band that the other groups give. Half-widths are of the upper end, as a share of the prediction."""
    groups = known_groups() if groups is None else groups
    held: dict[str, list[float]] = {}
    widths: list[float] = []
    for group in groups:
        rows = group.figures.get(figure, ())
        if not rows:
            continue
        found = band(figure, group.kind, USUAL_PRICE_ERROR, groups=[g for g in groups if g.name != group.name])
        held.setdefault(group.name, []).extend(float(found.low <= row <= found.high) for row in rows)
        widths.append(math.exp((found.high - found.low) / 2) - 1)
    if not held:
        return math.nan, math.nan, 0
    return statistics.fmean(map(statistics.fmean, held.values())), statistics.median(widths), len(held)
