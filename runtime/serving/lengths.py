"""How long prompts and answers are: distributions to draw from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from foundation.limits import within
from foundation.reading import Unreadable, read_csv
from runtime.serving.errors import WorkloadError

MOST_REQUEST_TOKENS = 100_000_000
"""Of a prompt or an answer: a hundred times the longest context served today."""
MOST_CV = 20.0
"""Of lengths: beyond, nearly all have one token and a few have all the others."""
MOST_WEIGHT = 1e12


class Lengths(Protocol):
    """A distribution of token counts."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count] int64, each one or more."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always `tokens`."""

    tokens: int

    def __post_init__(self) -> None:
        whole_number("a fixed length", self.tokens, MOST_REQUEST_TOKENS)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class Uniform:
    """Uniform over the integers from int(ratio * tokens) to tokens, as bench_serving's random-range-ratio."""

    tokens: int
    ratio: float = 0.8

    def __post_init__(self) -> None:
        whole_number("a uniform length", self.tokens, MOST_REQUEST_TOKENS)
        if not 0 <= self.ratio <= 1:
            raise WorkloadError(f"range ratio {self.ratio} must be from 0 to 1")

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        least = max(1, int(self.tokens * self.ratio))
        return rng.integers(least, self.tokens + 1, size=count)


@dataclass(frozen=True)
class Lognormal:
    """Lognormal cut to [1, most], with that mean (tokens) after the cut; cv: its coefficient of variation before it.

    A cut takes from the mean what it takes from the tail, so the rest is drawn as much longer. Raises WorkloadError
    where no such distribution has the mean: `most` must be above it.
    """

    mean: float
    cv: float = 1.0
    most: int = 131072

    def __post_init__(self) -> None:
        if not (self.mean >= 1 and 0 < self.cv <= MOST_CV and self.most >= 1):
            raise WorkloadError(f"lognormal lengths need mean >= 1, cv from 0 to {MOST_CV:g}, most >= 1, not {self}")
        within("a lognormal length", self.most, MOST_REQUEST_TOKENS, WorkloadError)
        if self.mean > self.most:
            raise WorkloadError(f"lengths of {self.mean:g} tokens on average cannot be {self.most:,} at most")

    @cached_property
    def _sigma(self) -> float:
        return math.sqrt(math.log1p(self.cv**2))

    @cached_property
    def _location(self) -> float:
        """Mean of the logarithm, by bisection: the mean after the cut grows with it. At its ends nearly all lengths are
        1, or `most`."""
        low, high = -10 * (1 + self._sigma), math.log(self.most) + 10 * (1 + self._sigma)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) < self.mean else (low, middle)
        return high

    def _mean_at(self, location: float) -> float:
        """E[min(max(X, 1), most)] = P(X < 1) + E[X; 1 < X < most] + most P(X > most)."""
        sigma, most = self._sigma, float(self.most)
        low, high = -location / sigma, (math.log(most) - location) / sigma
        between = math.exp(location + sigma**2 / 2) * _between(low - sigma, high - sigma)
        return _below(low) + between + most * _below(-high)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        drawn = rng.lognormal(self._location, self._sigma, count)
        return np.rint(np.clip(drawn, 1, self.most)).astype(np.int64)


@dataclass(frozen=True)
class Histogram:
    """Prompts and answers together, as they were counted: (input tokens, output tokens, weight) each. Raises
    WorkloadError."""

    rows: tuple[tuple[int, int, float], ...]

    def __post_init__(self) -> None:
        if not self.rows or not sum(weight for _, _, weight in self.rows) > 0:
            raise WorkloadError("a histogram of lengths holds nothing of a weight above zero")

    def draw_pairs(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[count] int64 prompts and answers."""
        weights = np.array([weight for _, _, weight in self.rows])
        chosen = rng.choice(len(self.rows), count, p=weights / weights.sum())
        pairs = np.array([row[:2] for row in self.rows], dtype=np.int64)[chosen]
        return pairs[:, 0], pairs[:, 1]


def lengths_drawn(
    prompt: Lengths | Histogram, output: Lengths | None, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """[count] int64 prompts and answers."""
    if isinstance(prompt, Histogram):
        return prompt.draw_pairs(rng, count)
    assert output is not None
    return prompt.draw(rng, count), output.draw(rng, count)


def read_histogram(path: str | Path) -> Histogram:
    """A CSV file with the columns input_tokens, output_tokens and perhaps weight (1 where there is none).

    Rows of weight 0 are left out. Raises WorkloadError with the row.
    """
    try:
        columns, lines = read_csv(path)
    except Unreadable as error:
        raise WorkloadError(f"cannot read the lengths {path}: {error}") from None
    for name in ("input_tokens", "output_tokens"):
        if name not in columns:
            raise WorkloadError(f"{path}: no column {name}; a file of lengths has input_tokens,output_tokens[,weight]")
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, row {number}"
        prompt, output = (_count(line[name], f"{where}: {name}") for name in ("input_tokens", "output_tokens"))
        weight = _weight(line["weight"], where) if "weight" in columns else 1.0
        if weight:
            rows.append((prompt, output, weight))
    if not rows:
        raise WorkloadError(f"{path}: no row with a weight above zero")
    return Histogram(tuple(rows))


def whole_number(what: str, value: float, most: int) -> None:
    """Raises WorkloadError unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or value != int(value) or value < 1:
        raise WorkloadError(f"{what} is {value}: give a whole number of at least 1")
    within(what, value, most, WorkloadError)


def _count(text: str, where: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) >= 1):
        raise WorkloadError(f"{where} is {text[:40]!r}: give a whole number of at least 1")
    within(where, int(text), MOST_REQUEST_TOKENS, WorkloadError)
    return int(text)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= MOST_WEIGHT:
        raise WorkloadError(f"{where}: weight is {text[:40]!r}: give a number from 0 to {MOST_WEIGHT:g}")
    return weight


def _below(z: float) -> float:
    """P(Z < z) of a standard normal Z."""
    return math.erfc(-z / math.sqrt(2)) / 2


def _between(low: float, high: float) -> float:
    """P(low < Z < high), from whichever tail loses no digits."""
    return _below(-low) - _below(-high) if low > 0 else _below(high) - _below(low)
