"""Choosing tokens from logits, on the host and reproducibly.

Temperature 0 is greedy (the lowest id among equals). Otherwise: scale by temperature, keep the `top_k`
best, keep the smallest set whose probability reaches `top_p`, drop what is below `min_p` of the best,
renormalise, draw. Each request draws from its own generator, so its tokens do not depend on what else is
in the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from foundation.errors import UsageError


class Uniforms(Protocol):
    """A source of numbers from [0,1), as numpy's generators are."""

    def random(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. top_k 0, top_p 1 and min_p 0 keep everything.

    min_p: tokens less likely than this share of the likeliest are not drawn. bias: added to the logits of some
    tokens, before anything else.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (off) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p must be from 0 (off) to 1, not {self.min_p}")
        if bad := [value for _, value in self.bias if not -float("inf") < value < float("inf")]:
            raise UsageError(f"a bias must be a finite number, not {bad[0]}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def adjusted(logits: np.ndarray, sampling: Sampling, allowed: np.ndarray | None = None) -> np.ndarray:
    """Logits `[vocab]` with the biases added, and minus infinity where `allowed` (bool `[vocab]`) says no."""
    if sampling.bias:
        logits = logits.copy()
        ids, values = zip(*sampling.bias, strict=True)
        np.add.at(logits, np.array(ids), np.array(values, logits.dtype))
    return logits if allowed is None else np.where(allowed, logits, -np.inf)


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from: float64 `[vocab]`, for a temperature above 0. logits: `adjusted` ones."""
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max()) / sampling.temperature)
    if sampling.top_k and sampling.top_k < len(weights):
        weights = _only(weights, _best(weights, sampling.top_k))
    if sampling.top_p < 1:
        weights = _only(weights, _nucleus(weights, sampling.top_p))
    if sampling.min_p:
        weights = np.where(weights >= sampling.min_p * weights.max(), weights, 0.0)
    return weights / weights.sum()


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest, best first; the lowest place first among equals."""
    if count < len(values):  # a whole sort of a large vocabulary takes longer than a step of a small model
        least = np.partition(values, -count)[-count]
        above = np.flatnonzero(values > least)
        places = np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]])
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The places of the fewest that reach this share of all, best first."""
    total, count = weights.sum(), 64
    while True:
        places = _best(weights, count)
        reached = np.cumsum(weights[places])
        if reached[-1] >= top_p * total or count >= len(weights):
            return places[: int(np.searchsorted(reached, top_p * total)) + 1]
        count *= 8


def _only(weights: np.ndarray, places: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(weights)
    kept[places] = weights[places]
    return kept


def choose(logits: np.ndarray, sampling: Sampling, rng: Uniforms, allowed: np.ndarray | None = None) -> int:
    """The next token id from logits `[vocab]`, among those `allowed` (bool `[vocab]`, one at least)."""
    logits = adjusted(logits, sampling, allowed)
    if sampling.greedy:
        return int(np.argmax(logits))
    return _draw(probabilities(logits, sampling), rng)


def _draw(weights: np.ndarray, rng: Uniforms) -> int:
    reached = np.cumsum(weights)
    index = int(np.searchsorted(reached, rng.random() * reached[-1], side="right"))
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])  # rounded up to all of it


def settle(
    logits: np.ndarray,
    draft: int | None,
    sampling: Sampling,
    rng: Uniforms,
    allowed: np.ndarray | None = None,
) -> int:
    """The token that follows, where `draft` was guessed for it: the guess was right where that is what comes.

    Greedy takes the model's own choice. Otherwise a draft is accepted with its probability, and a refused one replaced
    by a draw from the rest of the distribution (speculative sampling, arXiv 2211.17192, for a proposal that is
    certain), which leaves the distribution of tokens unchanged.
    """
    if draft is None or sampling.greedy:
        return choose(logits, sampling, rng, allowed)
    weights = probabilities(adjusted(logits, sampling, allowed), sampling)
    if rng.random() < weights[draft]:
        return draft
    weights[draft] = 0.0
    return _draw(weights, rng) if weights.any() else draft


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of what the model says itself, float64 `[vocab]`: before biases, masks and temperature."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())
