"""The fit itself: constants by robust least squares in log space, then a smooth grid of what is left."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import least_squares
from scipy.sparse.linalg import spsolve

from runtime.pricing.grid import Array, RatioGrid, _cell
from runtime.pricing.kernel import Constants, formula

RATIO_UNIT = 0.01
BOUNDS = {
    "launch_s": (5e-7, 4e-4),
    "compute_efficiency": (0.02, 1.0),
    "memory_efficiency": (0.05, 1.0),
    "step_s": (1e-9, 1e-6),
    "floor_s": (1e-6, 4e-3),
}


@dataclass
class Points:
    """Measurements of one kernel: feature columns, seconds, and a group id per unseen-shape hold-out."""

    features: dict[str, Any]
    seconds: Array
    groups: np.ndarray
    peak: float
    bandwidth: float

    def take(self, mask: np.ndarray) -> Points:
        size = len(self.seconds)
        kept = {k: v[mask] if np.ndim(v) and len(v) == size else v for k, v in self.features.items()}
        return Points(kept, self.seconds[mask], self.groups[mask], self.peak, self.bandwidth)


@dataclass
class Fit:
    family: str
    constants: Constants
    grid: RatioGrid | None

    def predict(self, points: Points) -> Array:
        seconds, _ = formula(points.features, self.family, self.constants, points.peak, points.bandwidth)
        return seconds * np.exp(self.grid(points.features)) if self.grid else seconds


def fit_constants(
    family: str, points: Points, free: tuple[str, ...], fixed: dict[str, float] | None = None, limit: int = 4000
) -> Constants:
    """Constants named in `free`; the others are `fixed` or keep their defaults (0 for chain and floor)."""
    sample = points
    if len(points.seconds) > limit:
        keep = np.zeros(len(points.seconds), bool)
        keep[np.random.default_rng(1).choice(len(points.seconds), limit, replace=False)] = True
        sample = points.take(keep)
    start = Constants(**(fixed or {}))
    low = np.log([BOUNDS[n][0] for n in free])
    high = np.log([BOUNDS[n][1] for n in free])
    guess = {"step_s": 1e-7, "floor_s": float(sample.seconds.min())}
    x0 = np.clip(np.log([guess.get(n) or getattr(start, n) for n in free]), low + 1e-3, high - 1e-3)

    def residual(x: Array) -> Array:
        constants = Constants(**{**asdict(start), **dict(zip(free, np.exp(x), strict=True))})
        predicted, _ = formula(sample.features, family, constants, sample.peak, sample.bandwidth)
        return np.log(predicted / sample.seconds)

    best = least_squares(residual, x0, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    values = {n: float(f"{v:.4g}") for n, v in zip(free, np.exp(best.x), strict=True)}
    return Constants(**{**asdict(start), **values})


def fit_grid(points: Points, logs: Array, axes: dict[str, list[float]], smooth: float) -> RatioGrid:
    """Regularised regression on hat functions: Huber loss, second differences pulled to zero."""
    names = tuple(axes)
    knots = tuple(np.log(np.asarray(axes[n], float)) for n in names)
    shape = tuple(len(k) for k in knots)
    count = int(np.prod(shape))
    rows, cols, data = [], [], []
    cells = []
    size = len(logs)
    for n, k in zip(names, knots, strict=True):
        column = np.broadcast_to(np.log(np.maximum(points.features[n], 1e-12)), (size,))
        cells.append(_cell(column, k))
    for corner in range(1 << len(names)):
        weight, index = np.ones(size), []
        for axis, (low, fraction) in enumerate(cells):
            high = corner >> axis & 1
            weight = weight * (fraction if high else 1 - fraction)
            index.append(np.minimum(low + high, shape[axis] - 1))
        rows.append(np.arange(size))
        cols.append(np.ravel_multi_index(index, shape))
        data.append(weight)
    design = sparse.csr_matrix((np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), (size, count))
    penalty = _second_differences(shape) * smooth
    anchor = sparse.identity(count) * 1e-3
    robust = np.ones(size)
    values = np.zeros(count)
    for _ in range(4):
        weighted = design.multiply(robust[:, None]).tocsr()
        normal = weighted.T @ design + penalty.T @ penalty + anchor
        values = spsolve(normal.tocsc(), weighted.T @ logs)
        left = np.abs(design @ values - logs)
        robust = np.minimum(1.0, 0.06 / np.maximum(left, 1e-9))
    rounded = np.round(values / RATIO_UNIT) * RATIO_UNIT
    return RatioGrid(names, knots, rounded.reshape(shape))


def _second_differences(shape: tuple[int, ...]) -> sparse.csr_matrix:
    blocks = []
    for axis, length in enumerate(shape):
        if length < 3:
            if length == 2:
                stencil = sparse.csr_matrix(np.array([[-0.1, 0.1]]))
            else:
                continue
        else:
            stencil = sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], (length - 2, length))
        before = sparse.identity(int(np.prod(shape[:axis])))
        after = sparse.identity(int(np.prod(shape[axis + 1 :])))
        blocks.append(sparse.kron(sparse.kron(before, stencil), after))
    return sparse.vstack(blocks).tocsr() if blocks else sparse.csr_matrix((1, int(np.prod(shape))))


def fit(
    family: str,
    points: Points,
    free: tuple[str, ...],
    axes: dict[str, list[float]],
    smooth: float = 0.5,
    fixed: dict[str, float] | None = None,
) -> Fit:
    constants = fit_constants(family, points, free, fixed)
    predicted, _ = formula(points.features, family, constants, points.peak, points.bandwidth)
    return Fit(family, constants, fit_grid(points, np.log(points.seconds / predicted), axes, smooth))


def relative_errors(predicted: Array, measured: Array) -> list[float]:
    """[median, 90th percentile] of |predicted / measured - 1|."""
    error = np.abs(predicted / measured - 1.0)
    return [round(float(np.median(error)), 4), round(float(np.quantile(error, 0.9)), 4)]


def cross_validate(
    family: str,
    points: Points,
    free: tuple[str, ...],
    axes: dict[str, list[float]],
    smooth: float,
    fixed: dict[str, float] | None = None,
) -> tuple[Fit, dict[str, list[float]]]:
    """Final fit on everything, plus errors: in sample, on a random fifth, on a fifth of the unseen shapes."""
    rng = np.random.default_rng(0)
    random_fifth = rng.random(len(points.seconds)) < 0.2
    names = np.unique(points.groups)
    picked = names[rng.random(len(names)) < 0.2]
    if len(picked) == 0:
        picked = names[: max(1, len(names) // 5)]
    unseen = np.isin(points.groups, picked) if len(names) > 1 else random_fifth
    errors = {}
    for label, mask in (("held_out_points", random_fifth), ("held_out_shapes", unseen)):
        part = fit(family, points.take(~mask), free, axes, smooth, fixed)
        held = points.take(mask)
        errors[label] = relative_errors(part.predict(held), held.seconds)
    final = fit(family, points, free, axes, smooth, fixed)
    base, _ = formula(points.features, family, final.constants, points.peak, points.bandwidth)
    errors["in_sample"] = relative_errors(final.predict(points), points.seconds)
    errors["formula_only"] = relative_errors(base, points.seconds)
    return final, errors
