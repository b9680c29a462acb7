"""The play of generation beside training: conservation, Little's law, and the limits where one side costs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import CapacityError
from runtime.planning.rl.load import RolloutLoad
from runtime.planning.rl.play import Publishing, RlSchedule, play
from runtime.planning.rl.played import Played
from runtime.planning.rl.replica import GrowthReserve, RolloutSide
from runtime.serving import Fixed, Lognormal, Uniform
from runtime.serving.delays import Delay


@dataclasses.dataclass(frozen=True)
class Linear:
    """fixed + per answer + per token of context; prompts by their tokens. All seconds."""

    fixed: float = 0.01
    per_row: float = 1e-4
    per_context: float = 1e-8
    per_prompt: float = 2e-5
    mixed: bool = False
    prompt_tokens: int = 2048

    def decode_seconds(self, rows: int, context: float) -> float:
        return self.fixed + rows * (self.per_row + self.per_context * context)

    def prompt_seconds(self, chunks: Sequence[tuple[int, int]], rows: int, context: float) -> float:
        steps = self.decode_seconds(rows, context) if rows else self.fixed
        return steps + self.per_prompt * sum(new for new, _ in chunks)


FREE = Linear(0.0, 0.0, 1e-15, 0.0)
LOAD = RolloutLoad(4, 4, Uniform(64), Lognormal(80, 1.0, 600), delay=Delay(1.0, 1.7))
SIDE = RolloutSide(2, 2, 20_000, 64, Linear())
SYNC = Publishing(0.3, 0.1)


def linear(lengths: Sequence[int]) -> float:
    return 1e-3 * sum(lengths)


def run(
    load: RolloutLoad = LOAD, side: RolloutSide = SIDE, sync: Publishing = SYNC, staleness: int = 1, **more: Any
) -> Played:
    schedule = RlSchedule(staleness, more.pop("admission", "paced"), more.pop("drains", False))
    return play(load, side, more.pop("train", linear), sync, schedule, **{"steps": 5, **more})


LOADS = st.builds(
    RolloutLoad,
    st.integers(1, 4),
    st.integers(1, 4),
    st.builds(Uniform, st.integers(1, 120)),
    st.builds(Lognormal, st.integers(2, 80), st.floats(0.2, 2.5), st.just(400)),
    turns=st.integers(1, 3),
    delay=st.builds(Delay, st.floats(0, 5), st.floats(1.2, 4)),
)
SIDES = st.builds(
    RolloutSide,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2_000, 6_000),
    st.integers(1, 12),
    st.builds(Linear, mixed=st.booleans(), prompt_tokens=st.sampled_from((64, 512, 8192))),
    st.booleans(),
    st.sampled_from((None, GrowthReserve(1.0, 1.0), GrowthReserve(0.7, 0.1, 60, 10, 50))),
)


@settings(max_examples=20, deadline=None)
@given(LOADS, SIDES, st.integers(0, 3), st.booleans(), st.integers(0, 3))
def test_each_group_is_trained_on_once_and_nothing_is_thrown_away(
    load: RolloutLoad, side: RolloutSide, staleness: int, in_flight: bool, seed: int
) -> None:
    got = run(load, side, Publishing(0.2, 0.1, in_flight), staleness, run_up=0, drain=True, seed=seed)
    groups = [group for step in got.steps for group in step.groups]
    assert sorted(groups) == list(range(5 * load.groups))
    assert got.thrown_away == got.thrown_tokens == 0
    drawn = sum(turn.drawn for group in groups for turns in load.group(group, seed) for turn in turns)
    assert sum(sum(step.behind.values()) for step in got.steps) == got.trained_tokens == drawn
    given = sum(turn.given for group in groups for turns in load.group(group, seed) for turn in turns)
    assert sum(step.sequence_tokens for step in got.steps) == drawn + given
    assert max(max(step.groups_behind) for step in got.steps) <= staleness
    assert min(min(step.behind) for step in got.steps) >= 0
    assert sum(got.share(doing) for doing in ("waiting", "training", "sending")) == pytest.approx(1.0)
    assert got.rollout_busy_s + got.rollout_paused_s <= got.seconds * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(LOADS, SIDES, st.integers(0, 3))
def test_littles_law(load: RolloutLoad, side: RolloutSide, staleness: int) -> None:
    """Groups under way on average = groups a second x seconds that each is, where all that began has ended."""
    got = run(load, side, staleness=staleness, run_up=0, drain=True)
    rate = len(got.lives) / got.seconds
    each = sum(life.done_at - life.began_at for life in got.lives) / len(got.lives)
    assert got.in_flight == pytest.approx(rate * each, rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(LOADS, st.integers(0, 3), st.integers(0, 5))
def test_in_step_the_times_add_up(load: RolloutLoad, send: int, loading: int) -> None:
    """At staleness 0 a step is generation, training, sending and loading, one after another."""
    sync = Publishing(float(send), float(loading))
    got = run(load, sync=sync, staleness=0, run_up=1)
    for step in got.steps:
        assert step.behind.keys() == step.groups_behind.keys() == {0}
    spent = sum(step.waited_s + step.trained_s for step in got.steps) + len(got.steps) * sync.send_s
    assert got.seconds == pytest.approx(spent)
    began, done = [life.began_at for life in got.lives], [life.done_at for life in got.lives]
    size = load.groups
    generated = sum(max(done[i : i + size]) - min(began[i : i + size]) for i in range(size, len(done), size))
    trained = sum(step.trained_s for step in got.steps)
    assert got.seconds == pytest.approx(generated + trained + len(got.steps) * sync.send_s)


def test_training_that_costs_nothing_leaves_the_rollouts_bound() -> None:
    """And the rollouts then are never idle: they go at the rate that Little's law has for so many answers."""
    load = RolloutLoad(8, 4, Fixed(32), Fixed(200))
    side = RolloutSide(1, 1, 100_000, 16, Linear())
    got = run(load, side, Publishing(), 2, train=lambda lengths: 0.0, steps=10)
    decode = side.prices.decode_seconds(16, 32 + 100)
    bound = 16 / (200 * decode + 16 * 0.0)
    assert got.rollout_idle == pytest.approx(0.0, abs=1e-6)
    assert got.samples_per_s == pytest.approx(bound, rel=0.08)
    assert got.samples_per_s < bound  # which leaves out prompts


def test_rollouts_that_cost_nothing_leave_training_bound() -> None:
    got = run(dataclasses.replace(LOAD, delay=Delay()), dataclasses.replace(SIDE, prices=FREE), Publishing(0.2), 1)
    trained = sum(step.trained_s for step in got.steps)
    assert got.seconds == pytest.approx(trained + 5 * 0.2, rel=1e-6)
    assert got.trainer_idle == pytest.approx(0.0, abs=1e-6)


def test_staleness_pays_where_answers_are_late() -> None:
    """On the same draws: more of it, and more samples a second, until training binds."""
    rates = [run(staleness=staleness, steps=8).samples_per_s for staleness in (0, 1, 2, 4, 8)]
    assert rates == sorted(rates)
    assert rates[2] > 1.3 * rates[0]


def test_one_step_ahead_is_one_version_behind() -> None:
    got = run(drains=True)
    assert set(got.behind) == {1}
    assert run(staleness=0).samples_per_s < got.samples_per_s <= run(staleness=1).samples_per_s


def test_discarding_throws_away_what_is_late() -> None:
    load = dataclasses.replace(LOAD, delay=Delay(4.0, 1.2), groups=8)
    paced, discards = run(load, steps=12), run(load, steps=12, admission="discard")
    assert paced.thrown_away == 0 < discards.thrown_away
    assert 0 < discards.thrown_share < 1
    groups = [group for step in discards.steps for group in step.groups]
    assert len(groups) == len(set(groups))


def test_standing_still_for_weights_costs_what_it_takes() -> None:
    flying, still = (run(sync=Publishing(1.0, 0.5, in_flight), steps=8) for in_flight in (True, False))
    assert flying.rollout_paused_s == pytest.approx(8 * 0.5)
    assert still.rollout_paused_s == pytest.approx(8 * 1.5)
    assert still.samples_per_s < flying.samples_per_s


def test_caches_between_turns_and_in_groups_spare_prompts() -> None:
    load = RolloutLoad(4, 4, Fixed(2000), Fixed(50), turns=3, tool_tokens=100)
    sides = (dataclasses.replace(SIDE, reuse=reuse) for reuse in (True, False))
    kept, lost = (run(load, side, train=lambda lengths: 0.0) for side in sides)
    assert kept.samples_per_s > 1.2 * lost.samples_per_s


def test_an_answer_that_no_rank_holds_is_refused_in_one_line() -> None:
    with pytest.raises(CapacityError, match="does not fit a rank's cache of 300"):
        run(RolloutLoad(1, 1, Fixed(100), Fixed(400)), RolloutSide(1, 1, 300, 4, Linear()))
