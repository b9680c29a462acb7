"""Kernels of a price file from measurements of them. Free of JAX.

The constants of the cost model's formula (launch, share of the peak, share of the bandwidth) are fitted to the relative
errors; ratios have what is left at the measured sizes, and the error beside them is that of points left out of the fit.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.pricing.grid import RatioGrid
from runtime.pricing.kernel import Constants, formula


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Seconds of one op at one size, with the features its formula reads."""

    features: Mapping[str, float]
    seconds: float


_AXES = {
    "moe": ("inter", "rows"),
    "attention": ("qk", "sequences", "context"),
    "index_scores": ("tokens", "context"),
    "indexer": ("tokens", "context"),
}
_LINE = {"moe": "rows", "memory": "bytes"}
"""What a family's ratios go by where its sizes make no grid: tokens, but for these."""
_FOLLOWS = ("rows_per_expert", "spread")
"""Quotients of other features, which have ranges of their own."""
_UNIT = 0.001
FEW_ERROR = 0.5  # of few sizes, which say nothing of those between
_FOLDS, _MOST_POINTS, _MOST_KNOTS = 20, 400, 32
_TRIALS = {
    "launch_s": np.geomspace(1e-7, 1e-2, 101),
    "compute_efficiency": np.geomspace(1e-3, 1.0, 61),
    "memory_efficiency": np.geomspace(1e-2, 1.0, 61),
}


@dataclasses.dataclass(frozen=True)
class FitBasis:
    """What a kernel's shares are of: FLOP/s and bytes/s. start: where its constants are looked for from. hold: what
    leaving them costs, as an error of the logarithm for each factor of e: few points then move what they say something
    of, and no more."""

    flops_per_s: float
    bytes_per_s: float
    start: Constants = Constants(1e-5, 0.3, 0.5)
    hold: float = 0.0


def fitted(
    family: str, points: Sequence[Measurement], basis: FitBasis, source: str, axes: Sequence[str] = ()
) -> dict[str, Any]:
    """One entry of the `kernels` table. Of very many points some are taken, spread over their times. axes: what the
    ratios go by, whether or not each combination of sizes was measured; by default as the family has it, where all
    were."""
    names = [n for n in points[0].features if n not in _FOLLOWS and len({p.features[n] for p in points}) > 1]
    limits = {n: [min(p.features[n] for p in points), max(p.features[n] for p in points)] for n in names}
    points = _spread(points)
    folds = min(len(points), _FOLDS)
    errors: list[float] = []
    for i in range(folds):
        others = [p for j, p in enumerate(points) if j % folds != i] or list(points)
        fit = _fit(family, others, basis)
        ratio = _ratio(family, others, fit, basis, axes) if axes else {}
        for point in points[i::folds]:
            error = _errors(family, [point], fit, basis)[0]
            if axes:
                error += _read(ratio, point)
            elif family == "moe":  # the ratios at its neighbours carry over to it
                near = [p for p in others if p.features["inter"] == point.features["inter"]]
                near.sort(key=lambda p: p.features["rows"])
                at = [math.log(p.features["rows"]) for p in near]
                if at and at[0] < math.log(point.features["rows"]) < at[-1]:
                    error -= np.interp(math.log(point.features["rows"]), at, _errors(family, near, fit, basis))
            errors.append(abs(error))
    errors = np.expm1(errors).tolist()
    found = _fit(family, points, basis)
    constants = {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(found).items()}
    return {
        "family": family,
        "constants": constants,
        **_ratio(family, points, found, basis, axes),
        "range": limits,
        "error": {"held_out_shapes": [round(float(np.median(errors)), 4), round(float(np.quantile(errors, 0.9)), 4)]},
        "evidence": "fitted",
        "source": source,
    }


def curve(points: Sequence[tuple[float, float]], source: str) -> dict[str, Any]:
    """One entry of the `collectives` table, of (bytes, seconds): and how far each size is from the line between its
    neighbours."""
    by_size: dict[float, list[float]] = defaultdict(list)
    for size, taken in points:
        by_size[size].append(taken)
    found = [(size, statistics.median(each)) for size, each in sorted(by_size.items())]
    errors = []
    for (low, first), (size, taken), (high, last) in zip(found, found[1:], found[2:], strict=False):
        share = math.log(size / low) / math.log(high / low)
        errors.append(abs(math.expm1((1 - share) * math.log(first) + share * math.log(last) - math.log(taken))))
    error = [round(statistics.median(errors), 4), round(max(errors), 4)] if errors else [FEW_ERROR, FEW_ERROR]
    return {
        "bytes": [size for size, _ in found],
        "seconds": [float(f"{taken:.4g}") for _, taken in found],
        "error": {"left_out": error},
        "source": source,
    }


def _ratio(
    family: str, points: Sequence[Measurement], fit: Constants, basis: FitBasis, names: Sequence[str]
) -> dict[str, Any]:
    """ln(measured / formula) on the grid of the measured sizes, which what is left of the fit goes into."""
    left = -_errors(family, points, fit, basis)
    axes = {name: sorted({p.features[name] for p in points}) for name in names or _AXES.get(family, ())}
    cells = {tuple(p.features[name] for name in axes) for p in points}
    whole = math.prod(map(len, axes.values())) == len(cells) == len(points)
    if not axes or not (names or whole):  # no grid: a line
        line = _LINE.get(family, "tokens")
        axes = {line: _line([p.features[line] for p in points])}
    elif names:
        axes = {name: _line(knots) for name, knots in axes.items()}
    grid = np.zeros([len(knots) for knots in axes.values()])
    counts = np.zeros_like(grid)
    for point, value in zip(points, left, strict=True):
        place = tuple(
            int(np.argmin(np.abs(np.log(knots) - math.log(point.features[name])))) for name, knots in axes.items()
        )
        grid[place] += value
        counts[place] += 1
    if len(axes) == 1:  # a knot that all its sizes are nearer to another's
        ((name, knots),) = axes.items()
        axes = {name: [knot for knot, count in zip(knots, counts, strict=True) if count]}
        grid, counts = grid[counts > 0], counts[counts > 0]
    grid /= np.maximum(counts, 1)
    grid = _filled(grid, counts > 0, [np.log(knots) for knots in axes.values()])
    return {"axes": axes, "ratio": np.round(grid / _UNIT).astype(int).ravel().tolist(), "ratio_unit": _UNIT}


def _filled(grid: np.ndarray, known: np.ndarray, knots: Sequence[np.ndarray]) -> np.ndarray:
    """What was not measured, from what was: between neighbours along the last axis, else along the one before it."""
    grid, known = grid.copy(), known.copy()
    for axis in reversed(range(grid.ndim)):
        values, seen = np.moveaxis(grid, axis, -1), np.moveaxis(known, axis, -1)
        for line in np.ndindex(values.shape[:-1]):
            if seen[line].any():
                values[line] = np.interp(knots[axis], knots[axis][seen[line]], values[line][seen[line]])
                seen[line] = True
    return grid


def _read(ratio: Mapping[str, Any], point: Measurement) -> float:
    knots = tuple(np.log(np.asarray(each, float)) for each in ratio["axes"].values())
    values = np.asarray(ratio["ratio"], float).reshape([len(each) for each in knots]) * ratio["ratio_unit"]
    return float(RatioGrid(tuple(ratio["axes"]), knots, values)(point.features))


def _spread(points: Sequence[Measurement]) -> Sequence[Measurement]:
    if len(points) <= _MOST_POINTS:
        return points
    ordered = sorted(points, key=lambda point: point.seconds)
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, _MOST_POINTS)]


def _line(sizes: Sequence[float]) -> list[float]:
    """Knots: the sizes, or where they are many one to a quarter of an octave that has some."""
    distinct = sorted(set(sizes))
    if len(distinct) <= _MOST_KNOTS:
        return distinct
    near: dict[int, list[float]] = {}
    for size in distinct:
        near.setdefault(round(4 * math.log2(size)), []).append(math.log(size))
    return [float(f"{math.exp(sum(each) / len(each)):.6g}") for _, each in sorted(near.items())]


def _errors(family: str, points: Sequence[Measurement], constants: Constants, basis: FitBasis) -> np.ndarray:
    """ln(formula / measured) of each point: [points], or [.., points] where a constant is an array [.., 1]."""
    columns = {n: np.array([p.features[n] for p in points]) for n in points[0].features}
    seconds, _ = formula(columns, family, constants, basis.flops_per_s, basis.bytes_per_s)
    return np.log(seconds / np.array([p.seconds for p in points]))


def _fit(family: str, points: Sequence[Measurement], basis: FitBasis) -> Constants:
    """Coordinate descent over log-spaced constants: least absolute error of the logarithm."""
    found = basis.start
    for _ in range(4):
        for name, trials in _TRIALS.items():
            begun = getattr(basis.start, name)
            values = np.append(trials, begun)
            tried: Any = values[:, None]
            costs = np.abs(_errors(family, points, dataclasses.replace(found, **{name: tried}), basis)).sum(axis=-1)
            costs = costs + basis.hold * np.abs(np.log(values / begun))
            found = dataclasses.replace(found, **{name: float(values[int(np.argmin(costs))])})
    return found
