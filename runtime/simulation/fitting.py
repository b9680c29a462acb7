"""Constants of an engine, fitted to a few measurements of one deployment.

The constants are those that nobody measured for a deployment like it (`FITTABLE`): each may move within what is
physically possible, and is held to its described value by a spread that is as large as such values differ. What is
minimised, over the figures of all rows, is

    sum (ln(measured / predicted) / error)^2 + sum ((value - described) / spread)^2

by a few Gauss-Newton steps within the limits; every prediction is a simulation, the same that `glm5 simulate` makes. So
few rows move little, and five are enough to see which way. What the fit is worth is said by rows that it has not seen:
each is predicted from constants that the others give (`left_out`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import Failure, UsageError, first_line
from foundation.writing import replacing
from runtime.deployment.engines import FittedTo
from runtime.serving import simulate
from runtime.simulation import published
from runtime.simulation.build import PriceTables, build
from runtime.simulation.load_tests import MeasuredServer, rows_of
from runtime.simulation.published import PublishedRow
from runtime.simulation.validation import FIGURES, beside, read_rows

LEAST_ROWS = 5
ERRORS = {"tpot_ms": 0.10, "ttft_ms": 0.20, "output_tok_s": 0.10}
"""What is left between a server and its best description, as a share: several times the noise of two equal runs."""
_STEPS, _NUDGE = 3, 0.25
_ENOUGH = 0.01


@dataclasses.dataclass(frozen=True)
class Fittable:
    """A constant that may be fitted: a setting of `Engine`, its limits, and how far such values spread."""

    name: str
    low: float
    high: float
    spread: float


FITTABLE = (
    Fittable("kernel_time_factor", 0.8, 1.6, 0.15),
    Fittable("layer_seconds", 0.0, 60e-6, 15e-6),
    Fittable("graph_step_host_seconds", 0.0, 0.03, 0.004),
    Fittable("eager_layer_host_seconds", 0.0, 0.004, 0.0005),
    Fittable("request_seconds", 0.0, 0.05, 0.01),
    Fittable("request_delay_seconds", 0.0, 0.5, 0.1),
)
"""Kernels run at 0.8 to 1.6 times their tables' times (power limits, cold caches, versions between releases); some 20
small kernels a layer of 2 to 3 us have no price; an eager layer is launched in 0.2 to 2 ms on any host (facts of
aiconfigurator's whole-block tables); a front end passes 20 requests a second or more."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """The outcome. values, described: the constants that moved, and what they were. before, left_out: ln(measured /
    predicted) of each row that has the figure, by quantity: as described, and predicted from a fit to the others.
    """

    engine: str
    of: PublishedRow
    rows: int
    skipped: tuple[str, ...]
    values: Mapping[str, float]
    described: Mapping[str, float]
    before: Mapping[str, tuple[float, ...]]
    left_out: Mapping[str, tuple[float, ...]]
    in_flight: tuple[float, float]
    prompt_tokens: tuple[float, float]

    @property
    def errors(self) -> tuple[float, float]:
        """The mean error, over rows and then figures: as described, and of rows that the fit had not seen."""
        before, after = (
            statistics.fmean(statistics.fmean(map(abs, rows)) for rows in each.values())
            for each in (self.before, self.left_out)
        )
        return before, after

    @property
    def helps(self) -> bool:
        """Whether rows that it had not seen are predicted better."""
        return self.errors[1] < self.errors[0]


def fit(
    paths: Path | Sequence[Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
    server: MeasuredServer | None = None,
) -> Fit:
    """Fits the engine of one deployment to the rows of a CSV of published deployments, or to runs of load testers
    against `server`.

    progress: called with (simulations done, expected at most). Raises `UsageError` where rows are too few, or of
    several deployments.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    left_out: list[str] = []
    cells: list[dict[str, str]] = []
    for path in files:
        found, lost = (_of_csv(path), []) if server is None else rows_of(path, server)
        cells += found
        left_out += lost
    rows, skipped = _readable(cells, ", ".join(map(str, files)), left_out)
    return _Fitting(rows, progress).fit(rows[0], tuple(skipped))


def _of_csv(path: Path) -> list[dict[str, str]]:
    kind, cells = read_rows(path)
    if kind != "published":
        columns = ", ".join(published.COLUMNS)
        raise UsageError(f"{path}: fitting needs rows of deployments with every setting; columns: {columns}")
    return cells


def _readable(
    cells: Sequence[Mapping[str, str]], path: str, left_out: Sequence[str]
) -> tuple[list[PublishedRow], list[str]]:
    """The rows that can be predicted, all of one deployment, and why the others cannot."""
    rows, skipped = [], list(left_out)
    for number, row in enumerate(cells, start=1):
        try:
            found = published.read(row)
            if found.apart:
                raise UsageError(found.apart)
            rows.append(found)
        except (Failure, ValueError, KeyError) as error:
            skipped.append(f"row {number}: {first_line(error)}")
    names = list(dict.fromkeys(_deployment(row) for row in rows))
    if len(names) > 1:
        raise UsageError(f"{path}: rows of {len(names)} deployments ({'; '.join(names[:3])}): keep the rows of one")
    if len(rows) < LEAST_ROWS:
        lost = f" ({skipped[0]})" if skipped else ""
        raise UsageError(f"{path}: {len(rows)} rows can be used{lost}: measure {LEAST_ROWS} or more, at several loads")
    return rows, skipped


def _deployment(row: PublishedRow) -> str:
    kept = f", KV {row.kv}" if row.kv else ""
    drafts = f", {row.drafts} drafts" if row.drafts else ""
    return f"{row.cfg.name} {row.scheme}{kept} on {row.profile.name}, {row.layout.name}, {row.engine}{drafts}"


class _Fitting:
    """One fit: predictions by row and constants, each simulated once."""

    def __init__(self, rows: Sequence[PublishedRow], progress: Callable[[int, int], None]):
        self.rows, self.progress = rows, progress
        self.tables = PriceTables()
        engine = rows[0].spec().engine
        self.start = np.array([getattr(engine, each.name) for each in FITTABLE])
        self.spreads = np.array([each.spread for each in FITTABLE])
        ends = np.array([(each.low, each.high) for each in FITTABLE])
        # a described value beyond the limits stays reachable
        self.low = (np.minimum(ends[:, 0], self.start) - self.start) / self.spreads
        self.high = (np.maximum(ends[:, 1], self.start) - self.start) / self.spreads
        self.done, self.expected = 0, len(rows) * (2 + (_STEPS - 1) * (len(FITTABLE) + 1) + 1)
        self._known: dict[tuple[int, bytes], dict[str, float]] = {}
        self.in_flight: list[float] = []

    def fit(self, of: PublishedRow, skipped: tuple[str, ...]) -> Fit:
        every = range(len(self.rows))
        zero = np.zeros(len(FITTABLE))
        at, slope = zero, self._slope(zero)
        for step in range(_STEPS):
            cost = self._cost(at)
            best = self._solve(at, slope, every)
            while self._cost(best) > cost and np.abs(best - at).max() > 1e-3:
                best = (best + at) / 2
            better = cost - self._cost(best)
            if better <= 0:
                break
            at = best
            if better < _ENOUGH * cost or step == _STEPS - 1:
                break
            slope = self._slope(at)
        alone = [self._solve(at, slope, [row for row in every if row != out]) for out in every]
        names = {name: FIGURES[name] for name in ERRORS if any(name in self._residuals(row, zero) for row in every)}
        moved = [number for number in range(len(FITTABLE)) if abs(at[number]) > 0.02]
        values = np.clip(self.start + at * self.spreads, 0, None)
        return Fit(
            of.engine,
            of,
            len(self.rows),
            skipped,
            {FITTABLE[n].name: float(f"{values[n]:.4g}") for n in moved},
            {FITTABLE[n].name: float(self.start[n]) for n in moved},
            self._by_quantity(names, [zero] * len(self.rows)),
            self._by_quantity(names, alone),
            (min(self.in_flight), max(self.in_flight)),
            self._prompts(),
        )

    def _by_quantity(self, names: Mapping[str, str], at: Sequence[np.ndarray]) -> dict[str, tuple[float, ...]]:
        """Residuals by quantity, each row predicted from constants of its own."""
        rows = [self._residuals(row, each) for row, each in enumerate(at)]
        return {name: tuple(round(row[name], 4) for row in rows if name in row) for name in names}

    def _residuals(self, row: int, at: np.ndarray) -> dict[str, float]:
        """ln(measured / predicted) by quantity. at: constants, as spreads from the described ones."""
        key = (row, at.tobytes())
        if key not in self._known:
            asked = self.rows[row]
            values = np.clip(self.start + at * self.spreads, 0, None)
            settings = {
                each.name: float(value) for each, value, moved in zip(FITTABLE, values, at, strict=True) if moved
            }
            spec = dataclasses.replace(asked, settings={**settings, **asked.settings}).spec()
            report = simulate(asked.load, build(spec, self.tables).deployment)
            if not at.any():
                self.in_flight.append(report.mean_in_system)
            measured, predicted = beside(asked, report)
            self._known[key] = {name: math.log(measured[name] / predicted[name]) for name in measured}
            self.done += 1
            self.progress(self.done, max(self.done, self.expected))
        return self._known[key]

    def _vector(self, row: int, at: np.ndarray) -> np.ndarray:
        return np.array([value / ERRORS[name] for name, value in self._residuals(row, at).items()])

    def _cost(self, at: np.ndarray) -> float:
        return float(sum((self._vector(row, at) ** 2).sum() for row in range(len(self.rows))) + (at**2).sum())

    def _slope(self, at: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row: its residuals there, and their slopes by each constant."""
        found = []
        for row in range(len(self.rows)):
            here = self._vector(row, at)
            slopes = []
            for number in range(len(FITTABLE)):
                nudged = at.copy()
                nudged[number] += _NUDGE if at[number] + _NUDGE <= self.high[number] else -_NUDGE
                slopes.append((self._vector(row, nudged) - here) / (nudged[number] - at[number]))
            found.append((here, np.array(slopes).T))
        return found

    def _solve(self, at: np.ndarray, slope: list[tuple[np.ndarray, np.ndarray]], rows: Sequence[int]) -> np.ndarray:
        """The best constants by the straight lines through `at`, of some rows."""
        from scipy.optimize import lsq_linear

        here = np.concatenate([slope[row][0] for row in rows])
        slopes = np.concatenate([slope[row][1] for row in rows])
        wanted = np.concatenate([slopes @ at - here, np.zeros(len(FITTABLE))])
        matrix = np.concatenate([slopes, np.eye(len(FITTABLE))])
        found = lsq_linear(matrix, wanted, bounds=(self.low - 1e-9, self.high + 1e-9)).x
        return np.clip(found, self.low, self.high)

    def _prompts(self) -> tuple[float, float]:
        means = [statistics.fmean(each.prompt_tokens for each in row.load.requests) for row in self.rows]
        return min(means), max(means)


def write_engine(path: Path, found: Fit, source: str) -> None:
    """The engine as an overlay for `--engine FILE.toml`: what moved, and what the fit is worth. source: the CSV."""
    of = found.of
    before, after = found.errors
    note = f"{found.rows} rows, each left out in turn: error {before:.1%} as described, {after:.1%} fitted"
    fitted = FittedTo(
        found.rows, of.cfg.name, of.profile.name, of.layout.name, found.in_flight, found.prompt_tokens,
        {FIGURES[name]: rows for name, rows in found.left_out.items()},
    )  # fmt: skip
    lines = [
        f"# Made by `glm5 fit {source}`: {note}.",
        f"extends = {_toml(of.engine)}",
        f"description = {_toml(f'{of.engine} fitted to {found.rows} measurements of {_deployment(of)}')}",
        "",
        "[constants]",
    ]
    for name, value in found.values.items():
        setting = {"value": value, "source": f"fitted to {source}", "date": "", "grade": "C",
                   "note": f"described as {found.described[name]:g}"}  # fmt: skip
        lines.append(f"{name} = {{{', '.join(f'{key} = {_toml(each)}' for key, each in setting.items())}}}")
    lines += ["", "[fitted]"]
    for key, value in dataclasses.asdict(fitted).items():
        if key != "residuals":
            lines.append(f"{key} = {_toml(value)}")
    lines += ["", "[fitted.residuals]", *(f"{name} = {_toml(rows)}" for name, rows in fitted.residuals.items())]
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _toml(value: Any) -> str:
    """A text, a number or numbers as TOML has them, which is as JSON does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
