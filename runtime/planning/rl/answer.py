"""What `glm5 plan rl` answers, as data: the document of `--out`, which the text and the page show.

Units are in the names; docs/rl_planning.md says what fields mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from foundation.writing import replacing
from runtime.deployment.document import document_text, to_json
from runtime.deployment.plan import Rejected
from runtime.planning.rl.played import Played
from runtime.planning.rl.search import RlFound, RlSplit
from runtime.pricing.price import Price
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import assumed as assumed_of
from runtime.simulation.build import memory

SCHEMA_VERSION = 2
_LEVELS = 400
"""Points of the timeline's levels at most."""


@dataclasses.dataclass(frozen=True)
class Priced:
    """Seconds of a part, and how they are known."""

    name: str
    seconds: float
    evidence: str


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The training side, and a usual step, with where its seconds are expected nine times in ten. memory_bytes: of the
    fullest device, by part."""

    profile: str
    devices: int
    layout: Mapping[str, int]
    recompute: str
    micro_batch_tokens: int
    formats: str
    step_seconds: float
    step_band_seconds: tuple[float, float]
    band_basis: str
    tokens_per_s: float
    parts: tuple[Priced, ...]
    memory_bytes: Mapping[str, float]
    usable_bytes: float
    evidence: str


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """The rollout side. pool_tokens, most_running: of a rank. token_seconds: a step of as many answers as a rank holds,
    at their mean context; token_band_seconds: where it is expected nine times in ten."""

    profile: str
    engine: str
    replicas: int
    devices: int
    layout: Mapping[str, int]
    formats: str
    kv: str
    pool_tokens: int
    most_running: int
    token_seconds: float
    token_band_seconds: tuple[float, float]
    band_basis: str
    memory_bytes: Mapping[str, float]
    usable_bytes: float
    evidence: str


@dataclasses.dataclass(frozen=True)
class Sync:
    """How a version gets to the rollout side. bytes: of a replica's weights. load_seconds: that replicas stand
    still."""

    seconds: float
    load_seconds: float
    in_flight: bool
    bytes: float
    parts: tuple[Priced, ...]
    evidence: str


@dataclasses.dataclass(frozen=True)
class RlFigures:
    """What the play came to. Shares are of the time of either side: training is `waiting`, `training` or `sending`;
    replicas are `busy`, `loading` or `idle`. answers_drawn: at once, on average; answers_held: that replicas have room
    for at most. behind: shares of trained tokens by versions behind; groups_behind: of
    groups. samples_per_s_band: where it is expected nine times in ten, by the bands of both sides' steps."""

    samples_per_s: float
    samples_per_s_band: tuple[float, float]
    step_seconds: float
    trainer: Mapping[str, float]
    rollouts: Mapping[str, float]
    behind: Mapping[str, float]
    groups_behind: Mapping[str, float]
    mean_behind: float
    groups_in_flight: float
    answers_drawn: float
    answers_held: int
    group_seconds: Mapping[str, float]
    thrown_away_groups: int
    thrown_away_share: float
    preemptions: int
    steps: int


@dataclasses.dataclass(frozen=True)
class RlRow:
    """One split that was played."""

    train_devices: int
    train_layout: str
    rollout_devices: int
    replicas: int
    rollout_layout: str
    samples_per_s: float
    trainer_idle: float
    rollouts_idle: float
    mean_behind: float
    estimated_samples_per_s: float


@dataclasses.dataclass(frozen=True)
class RlTimeline:
    """The reported steps, seconds from their begin. spans: (what the training side did, from, to). arrivals: of
    versions. levels: (when, answers being drawn, answers with their environments)."""

    seconds: float
    spans: tuple[tuple[str, float, float], ...]
    arrivals: tuple[float, ...]
    levels: tuple[tuple[float, int, int], ...]


@dataclasses.dataclass(frozen=True)
class RlPlan:
    """The answer. asked: the load and the schedule. spare_devices: that no replica of this size can use. untrainable:
    numbers of devices that cannot train the model, and why. rejected: replicas and splits."""

    schema_version: int
    model: str
    asked: Mapping[str, str | int | float | bool]
    trainer: Trainer
    rollouts: Rollouts
    spare_devices: int
    sync: Sync
    figures: RlFigures
    assumed: tuple[str, ...]
    played: tuple[RlRow, ...]
    untrainable: Mapping[str, str]
    rejected: tuple[Rejected, ...]
    timeline: RlTimeline

    @property
    def text(self) -> str:
        """JSON, a top-level field a line."""
        return document_text(to_json(self))

    def write(self, path: str | Path) -> None:
        """Writes the file, whole or not at all. Raises `UsageError`."""
        with replacing(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")


def answer(found: RlFound) -> RlPlan:
    """What a search came to, as data."""
    question, best = found.question, found.best
    load = question.load
    asked: dict[str, str | int | float | bool] = {
        "mode": question.mode,
        "staleness": question.schedule.staleness,
        "admission": question.admission,
        "groups": load.groups,
        "group_size": load.group_size,
        "mean_question_tokens": load.question,
        "mean_drawn_tokens": load.drawn,
        "longest_tokens": load.longest,
        "turns": load.turns,
        "tool_tokens": load.tool_tokens,
        "delay_mean_s": load.delay.mean_s,
        "delay_tail": load.delay.tail,
        "scored": question.scored,
        "seed": question.seed,
    }
    return RlPlan(
        SCHEMA_VERSION,
        question.cfg.name,
        asked,
        _trainer(found),
        _rollouts(found),
        best.spare_devices,
        Sync(
            best.sync.send_s,
            best.sync.load_s,
            best.sync.in_flight,
            best.priced_sync.bytes,
            _parts(best.priced_sync.parts),
            best.priced_sync.price.evidence,
        ),
        _figures(found),
        _assumed(found),
        tuple(_row(*each) for each in found.played),
        {str(devices): reason for devices, reason in found.untrainable.items()},
        tuple(dict.fromkeys(found.rejected)),
        _timeline(found.figures),
    )


def _parts(parts: Mapping[str, Price]) -> tuple[Priced, ...]:
    return tuple(Priced(name, part.seconds, part.evidence) for name, part in parts.items() if part.seconds > 0)


def _trainer(found: RlFound) -> Trainer:
    question, train = found.question, found.best.train
    layout = train.layout
    degrees = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "dp", "ep")}
    low, high = found.train_band.around(train.step.seconds)
    return Trainer(
        question.profile.name,
        found.best.train_devices,
        degrees,
        layout.recompute,
        layout.micro_batch_tokens,
        question.train_formats,
        train.step.seconds,
        (low, high),
        found.train_band.basis,
        train.step.tokens_per_s,
        _parts(train.step.parts),
        dict(train.memory.parts),
        train.memory.usable_bytes,
        train.step.evidence,
    )


def _rollouts(found: RlFound) -> Rollouts:
    best = found.best
    option = best.rollout
    spec = option.option.spec
    held = memory(spec)
    token = option.side.prices.decode_seconds(option.holds, option.load.context)
    low, high = found.band.around(token)
    return Rollouts(
        spec.profile.name,
        spec.engine.name,
        best.replicas,
        best.rollout_devices,
        {name: getattr(spec.layout, name) for name in ("tp", "dp", "ep", "pp")},
        spec.formats.scheme.name,
        spec.formats.kv,
        option.side.pool_tokens,
        option.side.most_running,
        token,
        (low, high),
        found.band.basis,
        {
            "weights": held.weights_total_bytes,
            "KV cache": held.kv_bytes,
            "activations": held.activation_bytes,
            "other": held.communication_bytes + held.runtime_bytes + held.workspace_bytes,
        },
        held.usable_bytes,
        _step_price(found)[0],
    )


def _step_price(found: RlFound) -> tuple[str, frozenset[str]]:
    """The grade of a rollout step, and what was taken for it."""
    option = found.best.rollout
    engine = option.option.spec.engine
    rows, _ = engine.decode_rows(option.holds)
    price = option.pricer.price(BatchShape(np.full(rows, option.load.context), decode_rows=rows, graphed=True))
    return price.evidence, price.assumed


def _assumed(found: RlFound) -> tuple[str, ...]:
    taken = assumed_of(found.best.rollout.option.spec) | _step_price(found)[1]
    for part in (*found.best.train.step.parts.values(), *found.best.priced_sync.parts.values()):
        taken |= part.assumed
    return (*sorted(taken), "lengths of a group's answers are drawn apart from one another")


def _figures(found: RlFound) -> RlFigures:
    got = found.figures
    lives = sorted(life.done_at - life.began_at for life in got.lives if got.begin <= life.done_at <= got.end)
    return RlFigures(
        got.samples_per_s,
        found.samples_per_s,
        got.step_seconds,
        {doing: got.share(doing) for doing in ("training", "waiting", "sending")},
        {
            "busy": got.rollout_busy_s / got.seconds,
            "loading": got.rollout_paused_s / got.seconds,
            "idle": got.rollout_idle,
        },
        {str(versions): share for versions, share in got.behind.items()},
        {str(versions): share for versions, share in got.groups_behind.items()},
        got.mean_behind,
        got.in_flight,
        got.drawing,
        found.best.replicas * found.best.rollout.side.ranks * found.best.rollout.holds,
        {name: float(np.quantile(lives, q)) for name, q in (("median", 0.5), ("p90", 0.9), ("longest", 1.0))},
        got.thrown_away,
        got.thrown_share,
        got.preemptions,
        len(got.steps),
    )


def _row(contender: RlSplit, got: Played) -> RlRow:
    return RlRow(
        contender.train_devices,
        contender.train.layout.name,
        contender.rollout_devices,
        contender.replicas,
        f"{contender.rollout.option.layout.name}, {contender.rollout.option.spec.formats.scheme.name}, "
        f"KV {contender.rollout.option.spec.formats.kv}",
        got.samples_per_s,
        got.trainer_idle,
        got.rollout_idle,
        got.mean_behind,
        contender.estimate,
    )


def _timeline(got: Played) -> RlTimeline:
    def at(time: float) -> float:
        return round(min(max(time, got.begin), got.end) - got.begin, 3)

    spans = [(s.doing, at(s.begin), at(s.end)) for s in got.spans if s.end > got.begin and s.begin < got.end]
    before = [each for each in got.levels if each[0] <= got.begin][-1:]
    levels = [*before, *(each for each in got.levels if got.begin < each[0] <= got.end)]
    return RlTimeline(
        got.seconds,
        tuple(spans),
        tuple(at(each) for each in got.arrivals if got.begin <= each <= got.end),
        tuple((at(time), drawing, outside) for time, drawing, outside in _thinned(levels)),
    )


def _thinned(levels: Sequence[tuple[float, int, int]]) -> Sequence[tuple[float, int, int]]:
    """At most `_LEVELS` of them, evenly over time."""
    if len(levels) <= _LEVELS:
        return levels
    times = np.array([each[0] for each in levels])
    wanted = np.linspace(times[0], times[-1], _LEVELS)
    return [levels[place] for place in sorted(set((np.searchsorted(times, wanted, side="right") - 1).tolist()))]
