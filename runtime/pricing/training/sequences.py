"""What one training step learns from: the lengths of its sequences, and what they come to for attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from foundation.errors import UsageError
from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Attended:
    """Sequences that attend alike, in one micro-batch or all together.

    tokens: of all of them. sequences: their number. keys: mean of the keys before a query and its own. selected: mean
    of those that it attends to.
    """

    tokens: float
    sequences: float
    keys: float
    selected: float

    def part(self, share: float) -> Attended:
        """A share of them, of at least one sequence."""
        return dataclasses.replace(self, tokens=self.tokens * share, sequences=max(self.sequences * share, 1.0))


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of a step, by their lengths in tokens, prompts and answers together. Raises `UsageError`."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise UsageError("a training step needs sequences of at least one token each")

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Sequences:
        return cls(tuple(int(length) for length in lengths))

    @classmethod
    def equal(cls, count: int, tokens: int) -> Sequences:
        return cls((tokens,) * count)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.asarray(self.lengths, float)

    @cached_property
    def tokens(self) -> int:
        return int(self._lengths.sum())

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    def attended(self, cfg: ModelConfig) -> tuple[Attended | None, Attended | None]:
        """(those whose every token attends to all before it, those whose tokens select), as the graph does: a model
        with an indexer selects where a sequence is longer than the selection."""
        topk = cfg.indexer.topk if cfg.indexer else None
        long = self._lengths > topk if topk else np.zeros(len(self.lengths), bool)
        return self._group(~long, None), self._group(long, topk)

    def _group(self, mask: np.ndarray, topk: int | None) -> Attended | None:
        found = self._lengths[mask]
        if not found.size:
            return None
        tokens = float(found.sum())
        keys = float((found * (found + 1) / 2).sum()) / tokens
        chosen = keys if topk is None else float((topk * (topk + 1) / 2 + (found - topk) * topk).sum()) / tokens
        return Attended(tokens, float(found.size), keys, chosen)
