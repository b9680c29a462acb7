"""Questions, what answers are worth, and what an environment says in between. Free of JAX.

An episode is one answer to one question, over one or more turns, as token ids: those that the policy drew and those
that it was given (`made` tells them apart). They are never decoded and encoded again: what an environment says is
appended to the ids that were drawn, behind the token that ended the turn, which is the policy's own and is learnt.
The reward is 1 for an episode whose every turn is right, 0 for any other.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from model.tokenizer import ChatTemplate, Tokenizer
from runtime.serving.delays import Delay
from runtime.training.data import HARDER, TASKS, TURNS, Exercise, Generator

PRACTISED = (*TASKS, *HARDER, *TURNS)
_QUESTION, _DELAY, _DRAW, _IMITATED = 1, 2, 3, 4  # streams of one seed


@dataclasses.dataclass(frozen=True)
class Choices:
    """What layers chose for each token: ids, little-endian int16 in base64, of [layers,tokens,width]; -1 where nothing
    was recorded."""

    layers: int
    width: int
    ids: str

    @classmethod
    def of(cls, ids: np.ndarray) -> Choices:
        """Of integers [layers,tokens,width]."""
        return cls(ids.shape[0], ids.shape[2], base64.b64encode(ids.astype("<i2").tobytes()).decode())

    @property
    def array(self) -> np.ndarray:
        """int16 [layers,tokens,width]"""
        return np.frombuffer(base64.b64decode(self.ids), "<i2").reshape(self.layers, -1, self.width)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A finished episode.

    ids, made, logprobs, versions: one entry a token. logprobs: natural logarithm of its probability when it was drawn;
    versions: of the policy that drew it; 0 and -1 where it was given. finish: of its last turn. choices: by name, as of
    `replay`, where they are recorded.
    """

    task: str
    ids: tuple[int, ...]
    made: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    reward: float
    finish: str
    choices: Mapping[str, Choices] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """All answers to one question. began: the version that generation began with."""

    number: int
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> np.ndarray:
        """float64 [size]"""
        return np.array([each.reward for each in self.rollouts])


class Episode:
    """One under way: feed it the tokens of a turn, and it says what to draw from next, or that it is over."""

    def __init__(self, exercise: Exercise, tokenizer: Tokenizer):
        self.exercise, self._tokenizer = exercise, tokenizer
        self._turn: Exercise = exercise
        self._stops = frozenset(tokenizer.stop_token_ids)
        self.ids: list[int] = []
        self.made: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.reward, self.finish, self.turn = 0.0, "", 0
        self._hear(tokenizer.encode(exercise.prompt))

    def copy(self) -> Episode:
        """Another at the same place."""
        made = copy.copy(self)
        made.ids, made.made = self.ids.copy(), self.made.copy()
        made.logprobs, made.versions = self.logprobs.copy(), self.versions.copy()
        return made

    def _hear(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.made += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.versions += [-1] * len(ids)

    def say(self, ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int], finish: str) -> bool:
        """A turn was drawn; whether another follows."""
        self.ids += ids
        self.made += [True] * len(ids)
        self.logprobs += logprobs
        self.versions += versions
        self.finish = finish
        said, ending = list(ids), None
        if said and said[-1] in self._stops:
            ending = said.pop()
        if ending is None or not self._turn.is_right(self._tokenizer.decode(said)):
            return False
        follows = self._turn.then
        if follows is None:
            self.reward = 1.0
            return False
        heard = self._tokenizer.encode(follows.prompt)
        if heard[0] != ending:  # it went on as somebody else
            return False
        self._hear(heard[1:])
        self._turn = follows
        self.turn += 1
        return True

    @property
    def done(self) -> Rollout:
        return Rollout(
            self.exercise.task,
            tuple(self.ids),
            tuple(self.made),
            tuple(self.logprobs),
            tuple(self.versions),
            self.reward,
            self.finish,
        )


class Questions:
    """Of a run, by stage and number of the group: a function of the seed and these alone."""

    def __init__(self, generator: Generator, seed: int):
        self.generator, self._seed = generator, seed

    @classmethod
    def load(cls, path: Path, seed: int) -> Questions:
        """In a checkpoint's tokenizer and chat template. Raises `TokenizerError` where it has none."""
        return cls(Generator(Tokenizer.load(path), ChatTemplate.load(path), seed), seed)

    def of(self, stage: int, number: int, shares: Mapping[str, float], imitated: bool = False) -> Exercise:
        """The question of a group, or of a right answer to imitate, about facts that are not held out."""
        rng = np.random.default_rng([self._seed, _IMITATED if imitated else _QUESTION, stage, number])
        tasks = [task for task in PRACTISED if shares.get(task, 0.0) > 0]
        weights = np.array([shares[task] for task in tasks])
        return self.generator.practice(rng, tasks[rng.choice(len(tasks), p=weights / weights.sum())])

    def right(self, exercise: Exercise) -> Rollout:
        """The episode of who answers every turn right."""
        tokenizer = self.generator.tokenizer
        user = tokenizer.token_id("<|user|>")
        episode = Episode(exercise, tokenizer)
        for turn in exercise.turns:
            ending = tokenizer.encode(turn.then.prompt)[0] if turn.then else user
            ids = [*tokenizer.encode(turn.answer), ending]
            episode.say(ids, [0.0] * len(ids), [0] * len(ids), "stop")
        return episode.done

    def delay_s(self, stage: int, number: int, member: int, delay: Delay) -> float:
        """What an environment takes over a member's answer."""
        if not delay.mean_s:
            return 0.0
        return float(delay.draw(np.random.default_rng([self._seed, _DELAY, stage, number, member]), 1)[0])

    def draw_seed(self, stage: int, number: int, member: int, turn: int) -> list[int]:
        """Of the generator that a turn's tokens are drawn from."""
        return [self._seed, _DRAW, stage, number, member, turn]
