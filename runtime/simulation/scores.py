"""Predictions beside measurements, and what they come to over rows and over groups of rows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.pricing.bands import PredictionKind


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """One scored row: `measured`, `predicted` and `bands` by quantity, "ttft_ms", "tpot_ms", "output_tok_s" or
    "step_s".

    group: rows of one deployment, which share their errors. apart: why it is not scored with the others, or "".
    kind: of the prediction; None where there is none.
    """

    name: str
    measured: Mapping[str, float]
    predicted: Mapping[str, float]
    bands: Mapping[str, list[float]]
    saturated: bool
    evidence: str
    skipped: str | None = None
    group: str = ""
    apart: str = ""
    kind: PredictionKind | None = None

    def error(self, quantity: str) -> float:
        return abs(self.predicted[quantity] / self.measured[quantity] - 1)

    def inside(self, quantity: str) -> bool:
        low, high = self.bands[quantity]
        return low <= self.measured[quantity] <= high


def by_group(rows: Iterable[ScoredRow]) -> dict[str, dict[str, Any]]:
    """Of each deployment group: its `summary`, why it is scored apart, and the median of ln(measured / predicted) by
    quantity."""
    groups: dict[str, list[ScoredRow]] = {}
    for row in rows:
        if row.group and row.predicted:
            groups.setdefault(row.group, []).append(row)
    return {
        name: {**summary(group), "apart": next((row.apart for row in group if row.apart), ""), **_residuals(group)}
        for name, group in groups.items()
    }


def _residuals(group: list[ScoredRow]) -> dict[str, float]:
    """ln(measured / predicted), the median row's, by quantity."""
    found = {}
    for quantity in dict.fromkeys(key for row in group for key in row.predicted):
        logs = [
            math.log(row.measured[quantity] / row.predicted[quantity]) for row in group if quantity in row.predicted
        ]
        found[f"{quantity.removesuffix('_ms')}_residual"] = statistics.median(logs)
    return found


def over_groups(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How far off the groups are that are scored together: of |median ln(measured / predicted)| the median and mean
    over groups, and of the signed one the median."""
    found: dict[str, float] = {}
    together = [group for group in groups.values() if not group.get("apart")]
    for name in ("tpot", "ttft", "output_tok_s"):
        if errors := [group[f"{name}_residual"] for group in together if f"{name}_residual" in group]:
            found[f"{name}_groups"] = len(errors)
            found[f"{name}_median_error"] = statistics.median(map(abs, errors))
            found[f"{name}_mean_error"] = statistics.fmean(map(abs, errors))
            found[f"{name}_signed_median"] = statistics.median(errors)
    return found


def summary(rows: Iterable[ScoredRow]) -> dict[str, Any]:
    """Errors over the scored rows; TTFT errors leave saturated rows out, which are given apart."""
    rows = list(rows)
    priced = [row for row in rows if row.skipped is None]
    result: dict[str, Any] = {"rows": len(priced), "skipped": sum(row.skipped is not None for row in rows)}
    for quantity, name in (("tpot_ms", "tpot"), ("ttft_ms", "ttft"), ("step_s", "step")):
        held = [row for row in priced if quantity in row.predicted]
        plain = [row for row in held if name != "ttft" or not row.saturated]
        if not plain:
            continue
        errors = [row.error(quantity) for row in plain]
        result[f"{name}_mape"] = statistics.fmean(errors)
        result[f"{name}_median_error"] = statistics.median(errors)
        result[f"{name}_inside_band"] = statistics.fmean(row.inside(quantity) for row in held)
        widths = [row.bands[quantity][1] / row.predicted[quantity] - 1 for row in held]
        result[f"{name}_median_half_width"] = statistics.median(widths)
    held = [row.inside(quantity) for row in priced for quantity in row.predicted]
    if held:
        result["inside_band"] = statistics.fmean(held)
    if saturated := [row for row in priced if row.saturated]:
        result["saturated_rows"] = len(saturated)
        if late := [row.error("ttft_ms") for row in saturated if "ttft_ms" in row.predicted]:
            result["saturated_ttft_mape"] = statistics.fmean(late)
    return result
