"""How long an environment takes over an answer: seconds to draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Delay:
    """Pareto with this mean, in seconds, and tail (above 1; the lower, the heavier)."""

    mean_s: float = 0.0
    tail: float = 1.5

    def problem(self) -> str | None:
        if not 0 <= self.mean_s <= 3600:
            return f"`mean_s` must lie between 0 and 3600, not {self.mean_s}"
        return None if 1 < self.tail <= 100 else f"`tail` must lie above 1 and at most 100, not {self.tail}"

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count] seconds."""
        if not self.mean_s:
            return np.zeros(count)
        return self.mean_s * (self.tail - 1) / self.tail * (1 + rng.pareto(self.tail, count))
