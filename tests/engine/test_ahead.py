"""A device that works apart from the host: what it chooses and what is launched ahead change no token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.cpu import CpuBackend
from backends.interface import Capabilities
from model import choosing
from model.checkpoint import Checkpoint
from model.graph import Batch, Mode
from runtime.execution.batches import named
from runtime.execution.local import feed
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from runtime.execution.serve_all import serve_all
from runtime.execution.services import engine_service
from runtime.serving.executor import ChosenIds, FedRow, TokenChoice
from runtime.serving.pricing import BatchShape
from runtime.serving.sampling import Sampling, choose, log_probabilities
from runtime.serving.service import Job
from tests.engine.conftest import SMALL
from tests.engine.test_engine import Engines, assert_all_pages_are_back, prompt
from tests.serving.live import ask


class Apart(CpuBackend):
    """The host as a device that works apart."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), apart=True)


@pytest.fixture(scope="module")
def apart(checkpoints: dict[str, Path]) -> LocalEngine:
    return load_engine(Checkpoint(checkpoints["dsa"]), Apart(), EngineConfig(**vars(SMALL)))


class One:
    """A generator of one number."""

    def __init__(self, uniform: float):
        self.uniform = uniform

    def random(self) -> float:
        return self.uniform


ROWS = 16
_drawn = jax.jit(choosing.drawn)
_with_logprobs = jax.jit(choosing.with_logprobs, static_argnums=2)
settings_of = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 7, 50, 300, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)


@settings(max_examples=30)
@given(
    vocab=st.sampled_from([3, 64, 300]),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    coarse=st.booleans(),
    asked=st.lists(settings_of, min_size=ROWS, max_size=ROWS),
)
def test_what_a_device_chooses_is_what_the_host_would(
    vocab: int, seed: int, spread: float, coarse: bool, asked: list[Sampling]
) -> None:
    """Or it says that it cannot tell. coarse: logits of a bfloat16 model, of which many are alike."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((ROWS, vocab)) * spread).astype(jnp.bfloat16 if coarse else np.float32)
    logits, uniforms = logits.astype(np.float32), rng.random(ROWS)
    found = np.asarray(_drawn(logits, draws(asked, uniforms)))
    for row, one, uniform, token in zip(logits, asked, uniforms, found, strict=True):
        assert token in (-1, choose(row, one, One(uniform)))
        assert token >= 0 or one.temperature > 0


def test_each_of_a_rows_tokens_is_drawn_by_the_rows_number() -> None:
    """As steps with drafts and those that keep logits have them: one of a row's is asked for."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4, 3, 50)).astype(np.float32)
    asked = draws([Sampling(), Sampling(0.7), Sampling(1.0, top_k=5), Sampling(2.0, top_p=0.8)], rng.random(4))
    whole = np.asarray(_drawn(logits, asked))
    for at in range(3):
        assert (whole[:, at] == np.asarray(_drawn(logits[:, at], asked))).all()


def draws(asked: Sequence[Sampling], uniforms: Any) -> choosing.Draws:
    names = ("temperature", "top_p", "top_k", "min_p")
    columns = {name: [getattr(each, name) for each in asked] for name in names} | {"uniform": uniforms}
    return choosing.Draws(**{n: jnp.array(c, jnp.int32 if n == "top_k" else jnp.float32) for n, c in columns.items()})


def test_a_device_seldom_has_to_ask() -> None:
    """Of 30,000 ids with a long tail most draws are the device's; where something is not a number, the host's."""
    rng = np.random.default_rng(0)
    logits = (-2.5 * np.log(1 + rng.permutation(30_000)))[None].astype(np.float32).repeat(ROWS, 0)
    logits[-1, 5] = np.nan
    asked = [Sampling(1.0, top_p=0.95 if at % 2 else 1.0) for at in range(ROWS)]
    found = np.asarray(_drawn(logits, draws(asked, rng.random(ROWS))))
    assert found[-1] == -1 and (found[:-1] >= 0).mean() > 0.9


def test_inputs_travel_as_one_array() -> None:
    rng = np.random.default_rng(0)
    batch = Batch(*(rng.integers(0, 99, shape, np.int32) for shape in ((4, 3), 4, 4, (4, 5))))
    choices = [TokenChoice(0.7, 0.9, 40, 0.1, 0.123456), None, TokenChoice(), TokenChoice(1.0)]
    back, how = feed.unpacked(jnp.asarray(feed.packed(batch, choices[:3])), jnp.zeros(4, jnp.int32), 3, 5)
    assert all((a == b).all() for a, b in zip(batch, back, strict=True)) and how is not None
    assert [float(each[0]) for each in how] == pytest.approx([0.7, 0.9, 40, 0.1, 0.123456])
    assert float(how.temperature[1]) == 0 and how.temperature.shape == (4,)
    last = batch._replace(tokens=np.full((4, 1), feed.LAST, np.int32))
    back, how = feed.unpacked(jnp.asarray(feed.packed(last)), jnp.array([7, -1, 8, 9]), 1, 5)
    assert back.tokens[:, 0].tolist() == [7, 0, 8, 9] and how is None


def asked_of(seed: int, kinds: Sequence[int], stop: frozenset[int] = frozenset()) -> list[Prompt]:
    samplings = (
        Sampling(),
        Sampling(temperature=0.8, top_p=0.9, seed=seed),
        Sampling(temperature=1.2, top_k=20, min_p=0.02, seed=seed + 1),
        Sampling(temperature=1.0, seed=seed, bias=((5, 2.0),)),
    )
    return [Prompt(prompt(3 + 11 * at, seed), 5 + 7 * at % 17, samplings[k], stop) for at, k in enumerate(kinds)]


@settings(max_examples=4)
@given(
    seed=st.integers(0, 1000),
    kinds=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    stop=st.frozensets(st.integers(0, 159), max_size=12),
)
def test_tokens_are_those_of_a_host_that_waits(
    engines: Engines, apart: LocalEngine, seed: int, kinds: list[int], stop: frozenset[int]
) -> None:
    requests = asked_of(seed, kinds, stop)
    waiting, ahead = engines["dsa", 0].generate(requests), apart.generate(requests)
    assert [(c.token_ids, c.finish_reason) for c in ahead] == [(c.token_ids, c.finish_reason) for c in waiting]
    assert_all_pages_are_back(apart)


@pytest.fixture(scope="module")
def geared(checkpoints: dict[str, Path]) -> LocalEngine:
    """One whose programs take one, two or four sequences, of four at most."""
    return load_engine(Checkpoint(checkpoints["gqa"]), Apart(), dataclasses.replace(SMALL, least_batch=1))


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=9))
def test_what_is_launched_ahead_is_what_is_simulated_so(geared: LocalEngine, sizes: list[tuple[int, int]]) -> None:
    """Step for step, of requests that wait for one another and end together or not, at their limits."""
    executor = geared.executor
    engine = dataclasses.replace(geared.deployment.engine, ahead_step_seconds=1e-3)
    deployment = dataclasses.replace(geared.deployment, engine=engine)
    asked = [Prompt(prompt(length, at), most) for at, (length, most) in enumerate(sizes)]
    steps, taken = [], [executor.taken]

    def observe(role: int, replica: int, shapes: list[BatchShape], *_: float) -> None:
        (shape,) = shapes
        steps.append((shape.decode_count, shape.ahead, executor.taken - taken[-1]))
        taken.append(executor.taken)

    serve_all(asked, deployment, executor, lambda: 0.0, observe=observe)
    for answers, ahead, found in steps:
        assert found == (answers if ahead else 0), steps


@pytest.mark.slow
def test_drafts_and_draws_go_together(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Also in an answer's last steps, which guess nothing."""
    apart = load_engine(Checkpoint(checkpoints["dsa"]), Apart(), dataclasses.replace(SMALL, drafts=3))
    requests = asked_of(3, [1, 0, 2, 3, 1])
    ours, theirs = apart.generate(requests), engines["dsa", 3].generate(requests)
    assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]


def test_logits_stay_on_the_device_and_steps_are_under_way_before_they_are_asked(
    apart: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first step behind the prompts, and the last, was launched ahead; ids alone were fetched."""
    fetched: list[tuple[int, ...]] = []
    get = apart.programs.backend.get
    monkeypatch.setattr(apart.programs.backend, "get", lambda buffer: fetched.append(buffer.shape) or get(buffer))
    executor, steps = apart.executor, apart.steps
    guessed, taken = executor.guessed, executor.taken
    apart.generate([Prompt(prompt(9, at), max_tokens=20) for at in range(3)])
    assert apart.steps - steps == 3 + 19  # with a prompt each, and with answers
    assert (executor.guessed - guessed, executor.taken - taken) == (3 * 18, 3 * 18)
    assert fetched == [(4,)] * 22


def test_a_guess_is_of_the_next_step_and_of_its_weights_alone(apart: LocalEngine) -> None:
    """Two steps by hand: the second takes what was launched ahead only where it asks just that."""
    executor = apart.executor
    first = FedRow([9], 0, [1, 2], TokenChoice(), TokenChoice())

    def second(**other: Any) -> int:
        apart.programs.clear()
        _, [[said]] = executor.step([[]], [[first]], False)
        assert isinstance(said, ChosenIds)
        token, before = int(said.ids[0]), executor.taken
        weights = apart.programs.weights
        if other.pop("other_weights", False):
            apart.programs.weights = dict(weights)
        if other.pop("later", False):
            executor.step([[]], [[]], False)
        row = dataclasses.replace(FedRow([token], 1, [1, 2], TokenChoice()), **other)
        executor.step([[]], [[row]], False)
        apart.programs.weights = weights
        return executor.taken - before

    assert second() == 1 and second(pages=[1, 2, 3]) == 1
    for other in (
        {"tokens": [0]}, {"start": 2}, {"pages": [3, 2]}, {"choice": TokenChoice(1.0)}, {"choice": None},
        {"later": True}, {"other_weights": True},
    ):  # fmt: skip
        assert second(**other) == 0, other


def test_caches_stay_where_they_are(apart: LocalEngine) -> None:
    """A step's caches are its inputs' buffers: donated, and taken over whole."""

    def places() -> list[int]:
        return [each.unsafe_buffer_pointer() for each in jax.tree.leaves(apart.programs.caches)]

    before = places()
    ones = np.ones(4, np.int32)
    batch = Batch(ones[:, None], ones - 1, ones, np.arange(1, 9, dtype=np.int32).reshape(4, 2).repeat(8, 1))
    old = jax.tree.leaves(apart.programs.caches)
    for mode in (Mode(), Mode("expanded")):
        apart.programs.step(batch, mode)
        assert places() == before
    assert all(each.is_deleted() for each in old)


@settings(max_examples=30)
@given(
    vocab=st.sampled_from([3, 64, 300, 2000]),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    coarse=st.booleans(),
    best=st.sampled_from([0, 20]),
)
def test_what_a_device_tells_of_tokens_is_what_the_host_finds(
    vocab: int, seed: int, spread: float, coarse: bool, best: int
) -> None:
    """Names in the same order, of equal ones too; nothing of a row that is not all numbers."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((ROWS, vocab)) * spread).astype(jnp.bfloat16 if coarse else np.float32)
    logits, ids = logits.astype(np.float32), rng.integers(0, vocab, ROWS, np.int32)
    logits *= rng.choice([0, 1, 1], (ROWS, 1)) * np.where(rng.random((ROWS, vocab)) < 0.1, -0.0, 1)
    logits[0, vocab - 1] = np.nan
    rows = np.asarray(_with_logprobs(logits, ids, best))
    assert rows[0, 0] == -1 and rows[1:, 0].tolist() == ids[1:].tolist()
    for row, token, told in zip(logits[1:], ids[1:], named(rows[1:], best), strict=True):
        expected = log_probabilities(row)
        order = np.argsort(-expected, kind="stable")[:best]
        assert told.logprob == pytest.approx(expected[token], abs=1e-5, rel=1e-6)
        assert [each for each, _ in told.top] == order.tolist()
        assert [value for _, value in told.top] == pytest.approx(expected[order], abs=1e-5, rel=1e-6)
    assert [each.top for each in named(rows[1:], 2)] == [each.top[:2] for each in named(rows[1:], best)]


def test_log_probabilities_come_without_logits(
    engines: Engines, apart: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of drawn and of greedy answers, as a host finds that has the logits, and launched ahead as others are."""
    warm = Sampling(temperature=0.8, top_p=0.9, seed=3)
    jobs = [
        Job(prompt(9, at), 12, how, logprobs=best)
        for at, (how, best) in enumerate([(warm, 3), (warm, 20), (Sampling(), 0)])
    ]
    waiting = ask(engine_service(engines["dsa", 0]), jobs)
    fetched: list[tuple[int, ...]] = []
    get, taken = apart.programs.backend.get, apart.executor.taken
    monkeypatch.setattr(apart.programs.backend, "get", lambda buffer: fetched.append(buffer.shape) or get(buffer))
    ahead = ask(engine_service(apart), jobs)
    unsure = fetched.count((160,))  # draws that the device leaves to the host, which then sees the row's logits
    assert set(fetched) <= {(4, 2), (4, 2 + 2 * 20), (160,)} and unsure < 4 and apart.executor.taken > taken
    for found, expected in zip(ahead, waiting, strict=True):
        assert found.tokens == expected.tokens
        ours, theirs = ([each for update in who.updates for each in update.logprobs] for who in (found, expected))
        assert len(ours) == len(theirs) == 12
        for each, meant in zip(ours, theirs, strict=True):
            assert each.logprob == pytest.approx(meant.logprob, abs=1e-4)
            assert dict(each.top) == pytest.approx(dict(meant.top), abs=1e-4)
