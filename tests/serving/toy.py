"""A model without weights: its next token hangs on every token before it, as its paged cache has them.

What a page holds that it should not, a token that is not there or is another request's, changes what comes next. So
tokens that equal the reference, which knows no pages, were scheduled rightly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.serving.executor import Abilities, ByRank, FedRow, Logits

VOCAB = 40


def logits_after(tokens: Sequence[int]) -> np.ndarray:
    """float32 [VOCAB]: what follows the tokens."""
    seed = hashlib.blake2b(np.asarray(tokens, "<i8").tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(VOCAB).astype(np.float32) * 3


def greedy_after(tokens: Sequence[int], count: int) -> list[int]:
    """The tokens that follow, one at a time."""
    known = list(tokens)
    for _ in range(count):
        known.append(int(np.argmax(logits_after(known))))
    return known[len(tokens) :]


class ToyExecutor:
    """fails_at: the number of the step that raises. right: how often of 10 a draft is right."""

    name = "the toy"

    def __init__(self, pages: int, page_tokens: int, ranks: int = 1, drafts: int = 0, right: int = 6):
        self.can = Abilities(pages, page_tokens, ranks, drafts=drafts, beyond=max(0, drafts - 1), moves=True)
        self.steps, self.fails_at, self.right = 0, -1, right
        self.computed = 0
        self.reset()

    def reset(self) -> None:
        self.cache = np.full((self.can.ranks, self.can.pages + 2, self.can.page_tokens), -1, np.int64)

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        self.steps += 1
        if self.steps == self.fails_at:
            self.reset()
            raise RuntimeError("the toy broke\nin two lines")
        self._rows = prompts, answers
        return self._launch(prompts, every), self._launch(answers, True)

    def _launch(self, rows: ByRank, every: bool) -> Logits:
        for rank, each in enumerate(rows):
            for row in each:
                for offset, token in enumerate(row.tokens):
                    page, place = divmod(row.start + offset, self.can.page_tokens)
                    self.cache[rank, row.pages[page], place] = token
                    self.computed += 1
        return [[self._logits(rank, row, every) for row in each] for rank, each in enumerate(rows)]

    def _logits(self, rank: int, row: FedRow, every: bool) -> np.ndarray:
        ends = range(row.start + 1, row.start + len(row.tokens) + 1)
        return np.stack([logits_after(self._context(rank, row, end)) for end in (ends if every else ends[-1:])])

    def _context(self, rank: int, row: FedRow, end: int) -> list[int]:
        size = self.can.page_tokens
        return [int(self.cache[rank, row.pages[i // size], i % size]) for i in range(end)]

    def draft(self, prompts: Any, answers: Any) -> tuple[Any, Any]:
        found = []
        for rows, following in zip(self._rows, (prompts, answers), strict=True):
            found.append(
                [
                    [self._guess(rank, row, after) for row, after in zip(each, known, strict=True)]
                    for rank, (each, known) in enumerate(zip(rows, following, strict=True))
                ]
            )
        return found[0], found[1]

    def _guess(self, rank: int, row: FedRow, after: list[int]) -> list[int]:
        known = self._context(rank, row, row.start + 1) + after
        truth = greedy_after(known, self.can.drafts)
        return [token if (sum(known) + i) % 10 < self.right else (token + 1) % VOCAB for i, token in enumerate(truth)]

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        return self.cache[rank, list(pages)].copy()

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None:
        self.cache[rank, list(pages)] = contents
