"""Tokens without a model: text of the asked length, which keeps to what was asked for and ends in time.

An emulated endpoint whose model does not fit on this machine still has to say something. Each answer is as long as it
may be (`max_tokens`): words, behind a short thought where the template opens one; JSON of its schema, or a call of a
tool, where that is asked for, with its free strings as long as there is room for and all of it closed at the end.
"""

from __future__ import annotations

import numpy as np

from runtime.api.guide import Guide
from runtime.api.vocabulary import Vocabulary

_MOST_THOUGHTS = 8  # tokens, and a quarter of the answer at most
_FREE = 0.5  # share of all words that may come: there is text to be had


class Inventor:
    """Makes up tokens of one vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        pieces = vocabulary.pieces
        usable = [token for token, piece in enumerate(pieces) if piece and token not in vocabulary.apart]
        self._words = [token for token in usable if pieces[token][:1] == b" " and pieces[token][1:].isalpha()] or usable
        closing = [token for token in usable if not pieces[token].strip(b'"}]')]
        self._closing = np.array(sorted(closing, key=lambda token: -len(pieces[token])), dtype=np.int64)
        self._lengths = np.array([len(piece) for piece in pieces])
        self._words_array = np.array(self._words, dtype=np.int64)

    def next_token(self, job: int, position: int) -> int:
        """A word: the `position`-th token of a job's answer, where nothing else is asked for."""
        return self._words[(job * 7919 + position * 104_729) % len(self._words)]

    def free(self, mask: np.ndarray) -> bool:
        """Whether a mask allows text."""
        return bool(mask[self._words_array].mean() > _FREE)

    def word(self, position: int, mask: np.ndarray) -> int:
        """A word that a mask allows; one at least it does."""
        for step in range(len(self._words)):
            token = self.next_token(step, position)
            if mask[token]:
                return token
        return int(np.argmax(mask))

    def last(self, mask: np.ndarray, ends: frozenset[int]) -> int:
        """Of what a mask allows, what brings an answer to its end soonest."""
        markup = self.vocabulary.markup
        marks = (markup.think_end, markup.value_end, markup.call_end, markup.key_end, markup.value, markup.call)
        for token in (*ends, *marks):
            if token is not None and mask[token]:
                return token
        closing = self._closing[mask[self._closing]]
        if len(closing):
            return int(closing[0])
        allowed = np.flatnonzero(mask)
        if len(allowed) > len(self._words) // 2:
            return self.word(0, mask)
        return int(allowed[np.argmax(self._lengths[allowed])])


class Invented:
    """A `Constraint` that allows one token: the next of an answer of `most` tokens that a guide allows."""

    def __init__(self, inventor: Inventor, guide: Guide, most: int, ends: frozenset[int], number: int = 0):
        self._inventor, self._guide, self._most, self._ends, self._number = inventor, guide, most, ends, number
        self._position = 0
        self._filled_until: int | None = None

    def copy(self) -> Invented:
        made = object.__new__(Invented)
        made.__dict__.update(self.__dict__)
        made._guide = self._guide.copy()
        return made

    def allowed(self) -> np.ndarray:
        token = self._next()
        return self._inventor.vocabulary.mask(() if token is None else (token,))

    def accept(self, token: int) -> None:
        self._guide.accept(token)
        self._position += 1

    def _next(self) -> int | None:
        inventor, guide = self._inventor, self._guide
        think_end = inventor.vocabulary.markup.think_end
        mask = guide.allowed()
        if guide.thinking and think_end is not None and self._position >= min(_MOST_THOUGHTS, self._most // 4):
            return think_end
        if mask is None or not guide.closes:
            word = inventor.next_token(self._number, self._position)
            return word if mask is None or mask[word] else inventor.word(self._position, mask)
        if not mask.any():
            return None
        if not guide.thinking and inventor.free(mask):
            if self._filled_until is None:
                self._filled_until = self._most - self._to_close() - 1
            if self._position < self._filled_until:
                return inventor.word(self._position + self._number, mask)
        return inventor.last(mask, self._ends)

    def _to_close(self) -> int:
        """How many tokens bring the answer to its end from here."""
        guide = self._guide.copy()
        for count in range(self._most - self._position):
            mask = guide.allowed()
            if mask is None or not mask.any():
                return count
            token = self._inventor.last(mask, self._ends)
            if token in self._ends:
                return count + 1
            guide.accept(token)
        return self._most
