"""How far to trust a simulated figure: the half-width of a band that should hold the truth nine times in ten.

Three independent parts, added in quadrature: the held-out error of the operator prices that the figure is
made of (by time; correlated within a kind of operator, independent between kinds), what the engine description cannot
know of a release and its settings, and what a run's own arrival pattern leaves open. The second and third
were set once by reasoning about what they stand for and are checked against measurements by
`glm5 validate`, not fitted row by row. A figure outside a fit's range, or on a chip without
measurements, takes the wider parts.
"""

from __future__ import annotations

import math

ENGINE_TPOT = 0.17  # release-to-release spread of one engine's decode step on one chip
ENGINE_TTFT = 0.21  # the same for host time, tokenisation and scheduling in front of the first token
UNMEASURED_CHIP = 0.10  # no operator was measured on this chip
EXTRAPOLATED = 0.10
SATURATED_TTFT = 0.40  # queueing time magnifies every error of the pool's size and of the service rate


def half_width(kind: str, price_error: float, measured_chip: bool, extrapolated: float, saturated: bool) -> float:
    """Relative half-width of the band of a "tpot", "ttft" or "step" figure.

    measured_chip: operators were measured on this chip. extrapolated: share of the steps that lie outside
    the range of a fit.
    """
    parts = [price_error, {"tpot": ENGINE_TPOT, "ttft": ENGINE_TTFT, "step": ENGINE_TPOT}[kind]]
    if not measured_chip:
        parts.append(UNMEASURED_CHIP)
    parts.append(EXTRAPOLATED * extrapolated)
    if saturated and kind == "ttft":
        parts.append(SATURATED_TTFT)
    return math.sqrt(sum(part * part for part in parts))


def band(value: float, half: float) -> list[float]:
    """Lower and upper end: the same factor down as up, since errors of times are relative."""
    return [value / (1 + half), value * (1 + half)]
