"""What a run of reinforcement learning is: a TOML file, read strictly. Free of JAX. docs/rl.md says what keys mean."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from foundation.errors import UsageError
from model.formats import SCHEMES_HELP, scheme
from runtime.serving.delays import Delay
from runtime.serving.pacing import RolloutAdmission
from runtime.training.config import MOST_STEPS, table, tables, unknown_rounding
from runtime.training.rl.episodes import PRACTISED

FILE = "config.toml"
DEFAULT = Path(__file__).parent / "sums.toml"

MOST_ROLLOUTS = 65_536
"""Of a step: thousands in the largest runs."""
MOST_ANSWER = 1 << 20
MOST_STALENESS = 1024

Correction = Literal["none", "ppo-clip", "tis", "icepop", "double-sided"]
RlMode = Literal["sync", "ahead", "async"]
Replay = Literal["none", "experts", "all"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who waits for whom.

    mode: sync: a step generates its batch, then trains on it. ahead: the next batch is generated while a step trains,
    and the policy changes between batches. async: the policy changes while answers are made. staleness: versions that
    a group may be behind (async). lag: groups are generated with the policy of so many steps before (sync; to study
    what that does). admission: of groups, see `runtime.serving.pacing` (async).
    """

    mode: RlMode = "sync"
    staleness: int = 1
    lag: int = 0
    admission: RolloutAdmission = "paced"

    def problem(self) -> str | None:
        for key in ("staleness", "lag"):
            if not 0 <= getattr(self, key) <= MOST_STALENESS:
                return f"`{key}` must lie between 0 and {MOST_STALENESS}, not {getattr(self, key)}"
        if self.lag and self.mode != "sync":
            return f'`lag` is for mode = "sync"; in {self.mode!r} policies are behind by themselves'
        if self.admission != "paced" and self.mode != "async":
            return f'`admission` is for mode = "async", not {self.mode!r}'
        if self.mode == "ahead" and self.staleness != 1:
            return 'mode = "ahead" is one version behind: leave `staleness` out'
        return None

    @property
    def behind(self) -> int:
        """Versions that a group may be behind when it is trained on, those of `lag` left out."""
        return {"sync": 0, "ahead": 1, "async": self.staleness}[self.mode]


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are drawn, at temperature 1.

    formats: "float32", "bfloat16", or number formats to emulate (weights, activations and products as a chip has them).
    max_tokens: of one answer, or of one turn. running: answers at work at once. replay: choices of the engine that are
    recorded with the tokens and made again in training: of experts, or those and the indexers' selections.
    """

    formats: str = "float32"
    max_tokens: int = 16
    running: int = 256
    replay: Replay = "none"

    def problem(self) -> str | None:
        if not 1 <= self.max_tokens <= MOST_ANSWER:
            return f"`max_tokens` must lie between 1 and {MOST_ANSWER:,}, not {self.max_tokens}"
        if not 1 <= self.running <= MOST_ROLLOUTS:
            return f"`running` must lie between 1 and {MOST_ROLLOUTS:,}, not {self.running}"
        if self.formats not in ("float32", "bfloat16"):
            try:
                scheme(self.formats)
            except UsageError:
                return f"`formats` must be float32, bfloat16, {SCHEMES_HELP}, not {self.formats!r}"
        return None


@dataclasses.dataclass(frozen=True)
class PolicyObjective:
    """What a step minimises.

    correction: what is done about answers being another policy's than the one that learns: see `objective`.
    clip_low, clip_high: of ppo-clip and double-sided, below and above 1. cap: of tis. icepop: kept between 1/icepop
    and icepop. scale: advantages are divided by the group's deviation. distill: weight of the log ratio to the policy
    that the stage began with (0: none).
    """

    correction: Correction = "ppo-clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    cap: float = 2.0
    icepop: float = 2.0
    scale: bool = True
    distill: float = 0.0

    def problem(self) -> str | None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            return f"0 < `clip_low` < 1 and `clip_high` > 0, not {self.clip_low} and {self.clip_high}"
        if not (self.cap > 0 and self.icepop > 1):
            return f"`cap` must be above 0 and `icepop` above 1, not {self.cap} and {self.icepop}"
        return None if self.distill >= 0 else f"`distill` must be 0 or more, not {self.distill}"


@dataclasses.dataclass(frozen=True)
class RlStage:
    """So many steps on `groups` questions of `group_size` answers, tasks by their shares in `tasks`. length: tokens of
    an episode, its question among them. rate, beta2, clip: of Adam, how long it remembers squares of gradients, and the
    largest norm of one. decay: the share of `steps`, the last, over which the rate falls to 0 in a line. imitate: so
    many steps on right answers first (a cold start), at `imitate_rate`. rounding: integer formats that the learner's
    weights are seen in, "" for none."""

    steps: int
    tasks: Mapping[str, float]
    groups: int = 8
    group_size: int = 32
    length: int = 64
    rate: float = 5e-4
    clip: float = 1.0
    beta2: float = 0.999
    decay: float = 0.0
    imitate: int = 0
    imitate_rate: float = 1e-3
    rounding: str = ""
    objective: PolicyObjective = PolicyObjective()

    @property
    def all_steps(self) -> int:
        return self.imitate + self.steps

    def problem(self) -> str | None:
        if not 1 <= self.steps <= MOST_STEPS or not 0 <= self.imitate <= MOST_STEPS:
            return f"`steps` must lie between 1 and {MOST_STEPS:,}, `imitate` between 0 and that"
        if self.groups < 1 or self.group_size < 2 or self.groups * self.group_size > MOST_ROLLOUTS:
            return (
                f"`groups` must be at least 1 and `group_size` at least 2 (a group is its own baseline), both together "
                f"at most {MOST_ROLLOUTS:,} answers, not {self.groups} x {self.group_size}"
            )
        if not 2 <= self.length <= MOST_ANSWER:
            return f"`length` must lie between 2 and {MOST_ANSWER:,}, not {self.length}"
        if unknown := sorted(set(self.tasks) - set(PRACTISED)):
            return f"`tasks` has no {unknown[0]!r}; it takes {', '.join(PRACTISED)}"
        if any(share < 0 for share in self.tasks.values()) or not sum(self.tasks.values()) > 0:
            return "the shares of `tasks` must be 0 or more, and one above 0"
        if said := unknown_rounding(self.rounding):
            return said
        for key in ("rate", "clip", "imitate_rate"):
            if not getattr(self, key) > 0:
                return f"`{key}` must be above 0, not {getattr(self, key)}"
        if not 0 <= self.beta2 < 1:
            return f"`beta2` must be 0 or more and below 1, not {self.beta2}"
        if not 0 <= self.decay <= 1:
            return f"`decay`, a share of the steps, must lie between 0 and 1, not {self.decay}"
        return self.objective.problem()


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """A run. save_every, eval_every: steps between states, and between held-out questions (0: at the end only).
    questions: how many of those, a task."""

    schedule: Schedule
    generation: Generation
    delay: Delay
    stages: tuple[RlStage, ...]
    seed: int
    save_every: int
    eval_every: int
    questions: int

    @property
    def steps(self) -> int:
        return sum(stage.all_steps for stage in self.stages)

    @property
    def length(self) -> int:
        """Of the longest episode."""
        return max(stage.length for stage in self.stages)

    @property
    def running(self) -> int:
        """Answers at work at once: as many as may be, where there are so many."""
        most = max(stage.groups * stage.group_size for stage in self.stages)
        return min(self.generation.running, most * (1 + self.schedule.behind))

    def at(self, step: int) -> tuple[int, int]:
        """The stage of a step, counted from 0, and the step within it."""
        for number, stage in enumerate(self.stages):
            if step < stage.all_steps:
                return number, step
            step -= stage.all_steps
        return len(self.stages), 0

    @property
    def hash(self) -> str:
        """Of everything that decides what is learnt."""
        content = dataclasses.asdict(dataclasses.replace(self, save_every=0, eval_every=0, questions=0))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _File:
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    delay: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stage: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    save_every: int = 10
    eval_every: int = 0
    questions: int = 100

    def problem(self) -> str | None:
        for key, least in (("seed", 0), ("save_every", 1), ("eval_every", 0), ("questions", 1)):
            if not least <= getattr(self, key) < 2**31:
                return f"`{key}` must be a whole number from {least} to below 2^31, not {getattr(self, key)}"
        return None if self.stage else "needs at least one [[stage]]"


def read(path: str | Path) -> RlConfig:
    """The run that a TOML file describes. Raises `UsageError`, one line, for anything it cannot mean."""
    path = Path(path)
    file = table(str(path), _File, tables(path))
    return RlConfig(
        table(f"{path}: [schedule]", Schedule, file.schedule),
        table(f"{path}: [generation]", Generation, file.generation),
        table(f"{path}: [delay]", Delay, file.delay),
        tuple(table(f"{path}: [[stage]] {i}", RlStage, each) for i, each in enumerate(file.stage, 1)),
        file.seed,
        file.save_every,
        file.eval_every,
        file.questions,
    )
