"""What rollouts are: groups of answers to one question, in turns, with an environment's time after each turn."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from foundation.errors import UsageError
from foundation.limits import within
from runtime.serving.delays import Delay
from runtime.serving.lengths import Fixed, Histogram, Lognormal, Uniform, lengths_drawn

TokenLengths = Fixed | Uniform | Lognormal
MOST_ANSWERS = 65_536
"""Of a step: thousands in the largest runs."""
_SAMPLED = 4096
"""Answers that means are taken over."""


@dataclasses.dataclass(frozen=True)
class RolloutTurn:
    """given: tokens that come from outside before it (of the first turn, the question). drawn: by the policy. delay_s:
    of the environment, once it has been drawn."""

    given: int
    drawn: int
    delay_s: float


@dataclasses.dataclass(frozen=True)
class RolloutLoad:
    """What a training step takes: `groups` questions, each answered `group_size` times. Raises `UsageError`.

    prompt, answer: tokens of a question, and of what is drawn in a turn (`answer` None where `prompt` is a histogram of
    both; the question is then that of the group's first answer). Answers of a group are drawn apart from one another:
    real ones are as long as their question is hard, together. turns: of an answer. tool_tokens: that come back after
    each turn but the last. delay: after each turn, the verifier's after the last. most: tokens of a whole answer, its
    question among them; it is cut there.
    """

    groups: int
    group_size: int
    prompt: TokenLengths | Histogram
    answer: TokenLengths | None
    turns: int = 1
    tool_tokens: int = 0
    delay: Delay = Delay()
    most: int = 131_072

    def __post_init__(self) -> None:
        if self.groups < 1 or self.group_size < 1 or self.turns < 1:
            raise UsageError("rollouts need at least one group a step, one answer a group and one turn an answer")
        if self.tool_tokens < 0 or (self.tool_tokens and self.turns == 1):
            raise UsageError("tool results are between turns: give two turns or more, or no tokens of tools")
        if said := self.delay.problem():
            raise UsageError(said.replace("`", ""))
        within("answers of a step:", self.answers, MOST_ANSWERS)

    @property
    def answers(self) -> int:
        """Of a step."""
        return self.groups * self.group_size

    def group(self, number: int, seed: int = 0) -> tuple[tuple[RolloutTurn, ...], ...]:
        """[group_size] the turns of each answer of a group; the same whatever else was drawn."""
        rng = np.random.default_rng([seed, number])
        size, turns = self.group_size, self.turns
        prompts, drawn = lengths_drawn(self.prompt, self.answer, rng, size * turns)
        delays = self.delay.draw(rng, size * turns).reshape(size, turns)
        given = np.full((size, turns), self.tool_tokens, np.int64)
        given[:, 0] = min(int(prompts[0]), self.most - 1)
        drawn = drawn.reshape(size, turns)
        return tuple(self._cut(*each) for each in zip(given.tolist(), drawn.tolist(), delays.tolist(), strict=True))

    def _cut(self, given: list[int], drawn: list[int], delays: list[float]) -> tuple[RolloutTurn, ...]:
        turns, left = [], self.most
        for told, said, delay_s in zip(given, drawn, delays, strict=True):
            if told >= left:
                break
            said = min(said, left - told)
            turns.append(RolloutTurn(told, said, delay_s))
            left -= told + said
        return tuple(turns)

    @cached_property
    def longest(self) -> int:
        """Tokens that no answer has more of, its question among them."""
        question, said = _most(self.prompt, 0), _most(self.answer or self.prompt, 1)
        return min(self.most, question + self.turns * said + (self.turns - 1) * self.tool_tokens)

    @cached_property
    def sample(self) -> tuple[tuple[RolloutTurn, ...], ...]:
        """Answers that means are taken over."""
        count = max(1, _SAMPLED // self.group_size)
        return tuple(each for number in range(count) for each in self.group(number, seed=1))

    @cached_property
    def lengths(self) -> np.ndarray:
        """[answers of the sample] tokens, questions among them."""
        return np.array([sum(turn.given + turn.drawn for turn in turns) for turns in self.sample])

    @cached_property
    def drawn(self) -> float:
        """Tokens of an answer that the policy draws, on average."""
        return float(np.mean([sum(turn.drawn for turn in turns) for turns in self.sample]))

    @cached_property
    def context(self) -> float:
        """Tokens before the one that is drawn, over all that are, on average."""
        met = total = 0.0
        for turns in self.sample:
            before = 0
            for turn in turns:
                before += turn.given
                met += turn.drawn * (before + turn.drawn / 2)
                total += turn.drawn
                before += turn.drawn
        return met / total

    @cached_property
    def question(self) -> float:
        """Tokens of a question, on average."""
        return float(np.mean([turns[0].given for turns in self.sample]))


def _most(lengths: TokenLengths | Histogram, column: int) -> int:
    """The most tokens that a distribution draws, of a question (0) or of an answer (1)."""
    if isinstance(lengths, Histogram):
        return max(int(row[column]) for row in lengths.rows)
    return int(lengths.most if isinstance(lengths, Lognormal) else lengths.tokens)
