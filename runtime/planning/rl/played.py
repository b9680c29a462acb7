"""What came of a play: steps, what the training side did, groups, levels, and the shares that follow."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal

Doing = Literal["waiting", "training", "sending"]


@dataclasses.dataclass(frozen=True)
class RlStep:
    """A training step. began_at: its groups were there, after `waited_s`. behind: tokens by the versions between the
    one that drew them and the step; groups_behind: groups by those since they began."""

    began_at: float
    waited_s: float
    trained_s: float
    groups: tuple[int, ...]
    behind: Mapping[int, int]
    groups_behind: Mapping[int, int]
    sequence_tokens: int


@dataclasses.dataclass(frozen=True)
class TrainerSpan:
    """What the training side did, in seconds of the play."""

    doing: Doing
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Life:
    """A group: when it began, and when its last answer was done."""

    group: int
    began_at: float
    done_at: float


@dataclasses.dataclass(frozen=True)
class Played:
    """What came of it, from `begin` to `end` in seconds; what went before was a run-up.

    steps: those that ended in it. spans: of the training side, and arrivals of versions, from the first on. levels:
    (time, answers being drawn, answers with their environments), at each change. rollout_busy_s, rollout_paused_s:
    means over replicas. in_flight: groups that have begun and not ended, on average. thrown_away: groups, and tokens
    drawn for them, since the first. preemptions: since the first.
    """

    begin: float
    end: float
    answers_per_step: int
    steps: tuple[RlStep, ...]
    spans: tuple[TrainerSpan, ...]
    arrivals: tuple[float, ...]
    levels: tuple[tuple[float, int, int], ...]
    lives: tuple[Life, ...]
    rollout_busy_s: float
    rollout_paused_s: float
    in_flight: float
    thrown_away: int
    thrown_tokens: int
    trained_tokens: int
    preemptions: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def samples_per_s(self) -> float:
        """Answers trained on a second."""
        return len(self.steps) * self.answers_per_step / self.seconds

    @property
    def step_seconds(self) -> float:
        return self.seconds / len(self.steps)

    def share(self, doing: Doing) -> float:
        """Of the training side's time."""
        inside = (min(s.end, self.end) - max(s.begin, self.begin) for s in self.spans if s.doing == doing)
        return sum(max(0.0, each) for each in inside) / self.seconds

    @property
    def trainer_idle(self) -> float:
        return self.share("waiting")

    @property
    def rollout_idle(self) -> float:
        """Share of the replicas' time in which no answer was at work and no weights were loaded."""
        return max(0.0, 1 - (self.rollout_busy_s + self.rollout_paused_s) / self.seconds)

    @cached_property
    def behind(self) -> dict[int, float]:
        """Shares of trained tokens by versions behind."""
        return _shares(step.behind for step in self.steps)

    @cached_property
    def groups_behind(self) -> dict[int, float]:
        return _shares(step.groups_behind for step in self.steps)

    @cached_property
    def drawing(self) -> float:
        """Answers being drawn, or waiting for room, on average."""
        inside = [(max(time, self.begin), drawing) for time, drawing, _ in self.levels if time < self.end]
        ends = [*(time for time, _ in inside[1:]), self.end]
        area = sum(drawing * (end - time) for (time, drawing), end in zip(inside, ends, strict=True))
        return area / self.seconds

    @property
    def mean_behind(self) -> float:
        return sum(versions * share for versions, share in self.behind.items())

    @property
    def thrown_share(self) -> float:
        """Of all drawn tokens that were trained on or thrown away."""
        total = self.thrown_tokens + self.trained_tokens
        return self.thrown_tokens / total if total else 0.0


def _shares(counted: Iterable[Mapping[int, int]]) -> dict[int, float]:
    found: Counter[int] = Counter()
    for each in counted:
        found.update(each)
    total = sum(found.values())
    return {versions: found[versions] / total for versions in sorted(found)}
