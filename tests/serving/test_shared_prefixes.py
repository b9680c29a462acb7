"""What prompts have in common: how much of it the prefix cache finds, and what that is worth."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving import (
    Deployment,
    Fixed,
    Request,
    Sharing,
    Uniform,
    Workload,
    WorkloadError,
    block_of,
    closed_loop,
    conversations,
    open_conversations,
    open_loop,
    simulate,
)
from runtime.serving.simulation import Simulation
from tests.serving.helpers import plain_engine, ranks, run_checked
from tests.serving.pricers import LinearPricer

PAGE = 16
TIMES = (
    "ttft",
    "tpot",
    "itl",
    "e2e",
    "queue",
    "steps",
    "duration_s",
    "requests_per_s",
    "prefix_hit_rate",
    "preemptions",
)


def served(pool_tokens: int = 400_000, engine: str = "sglang", **more: Any) -> Deployment:
    settings = more.pop("settings", {})
    return Deployment(plain_engine(engine, page_tokens=PAGE, **settings), LinearPricer(), pool_tokens, **more)


def test_nothing_shared_is_the_load_without_the_option() -> None:
    for make in (lambda **k: closed_loop(4, 40, Uniform(900), Uniform(40), **k), _open):
        plain, none = simulate(make(), served()), simulate(make(sharing=Sharing(0.0, 3, PAGE)), served())
        assert [getattr(plain, name) for name in TIMES] == [getattr(none, name) for name in TIMES]


def _open(**more: Any) -> Workload:
    return open_loop(3.0, 60, Uniform(900), Uniform(40), **more)


@pytest.mark.parametrize("engine", ["sglang", "vllm", "glm5"])
def test_all_but_the_first_find_what_is_shared(engine: str) -> None:
    """One at a time, with room for everything: whole blocks of what is common are found, by all but each group's
    first."""
    sharing = Sharing(0.8, 3, PAGE)
    load = closed_loop(1, 30, Fixed(1000), Fixed(5), sharing=sharing)
    found = [request.cached for request in simulate(load, served(engine=engine)).requests]
    groups = sharing.groups_of(30, 0).tolist()
    firsts = {groups.index(group) for group in set(groups)}
    assert found == [0 if number in firsts else 800 // PAGE * PAGE for number in range(30)]


def test_prompts_of_different_lengths_share_as_far_as_the_shorter_goes() -> None:
    sharing = Sharing(0.5, 1, 10)
    one, two = sharing.blocks(0, 7, sharing.shared_tokens(400), 400), sharing.blocks(0, 8, 100, 200)
    assert one[:10] == two[:10] and not set(one[10:]) & set(two[10:])
    assert (len(one), len(two)) == (40, 20)


@given(common=st.integers(0, 9), own=st.integers(0, 9), start=st.integers(-3, 20), stop=st.integers(-3, 20))
def test_blocks_are_a_sequence(common: int, own: int, start: int, stop: int) -> None:
    blocks = Sharing(0.5, 2, 1).blocks(1, 5, common, common + own)
    listed = tuple(blocks)
    assert len(blocks) == common + own == len(set(listed)) and bool(blocks) is bool(listed)
    assert blocks[start:stop] == listed[start:stop] and blocks[stop:] == listed[stop:]


@given(
    share=st.floats(0, 1), groups=st.integers(1, 5), room=st.integers(2, 60), clients=st.integers(1, 6),
    engine=st.sampled_from(["sglang", "vllm", "trtllm"]),
)  # fmt: skip
def test_hits_are_what_the_pool_says(share: float, groups: int, room: int, clients: int, engine: str) -> None:
    """Whatever is evicted meanwhile; and the books of the pages stay right."""
    load = closed_loop(clients, 24, Uniform(300, 0.5), Uniform(20), sharing=Sharing(share, groups, PAGE))
    simulation = Simulation(load, served(320 + room * 40, engine, ranks=2))
    counted: dict[Request, int] = {}
    for rank in ranks(simulation):
        _count(rank.pool, counted)
    report = run_checked(simulation)
    prompts = sum(request.prompt_tokens for request in report.requests)
    assert report.prefix_hit_rate == pytest.approx(sum(counted.values()) / prompts)
    assert report.prefix_hit_rate <= share + 1e-9


def _count(pool: Any, counted: dict[Request, int]) -> None:
    admit = pool.admit

    def admitted(request: Request, new_tokens: int | None = None) -> int:
        found = admit(request, new_tokens)
        counted.setdefault(request, found)
        return found

    pool.admit = admitted


def test_the_more_is_shared_the_sooner_answers_begin_under_light_load() -> None:
    means = [
        simulate(closed_loop(1, 20, Fixed(2000), Fixed(10), sharing=Sharing(share, 1, PAGE)), served()).ttft.mean
        for share in (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
    ]
    assert means == sorted(means, reverse=True) and means[-1] < means[0] / 2


def test_more_groups_than_the_pool_holds_find_less() -> None:
    def rate(groups: int) -> float:
        load = closed_loop(2, 200, Fixed(1000), Fixed(5), sharing=Sharing(0.8, groups, PAGE))
        return simulate(load, served(8_000)).prefix_hit_rate

    few, many = rate(2), rate(40)
    assert few > 0.75 and many < few / 2


def test_an_engine_without_a_prefix_cache_finds_nothing() -> None:
    load = closed_loop(2, 20, Fixed(500), Fixed(5), sharing=Sharing(0.9, 1, PAGE))
    without = simulate(load, served(settings={"prefix_cache": False}))
    assert without.prefix_hit_rate == 0


@given(pages=st.lists(st.sampled_from([1, 16, 32, 64, 128]), min_size=1, max_size=2), usual=st.floats(1, 2e6))
def test_blocks_are_whole_pages_and_few(pages: list[int], usual: float) -> None:
    block = block_of(usual, *pages)
    assert all(block % page == 0 for page in pages) and usual / block <= 256
    assert block == max(pages) or usual / (block / 2) > 256


@given(turns=st.integers(2, 6), new=st.integers(1, 400), answer=st.integers(1, 80), think=st.floats(0, 100))
def test_a_turn_finds_the_conversation_before_it(turns: int, new: int, answer: int, think: float) -> None:
    load = conversations(1, 2 * turns, turns, think, Fixed(new), Fixed(answer), sharing=Sharing(block_tokens=PAGE))
    report = simulate(load, served())
    for number, request in enumerate(report.requests):
        turn = number % turns
        held = turn * (new + answer)
        assert (request.prompt_tokens, request.output_tokens) == (held + new, answer)
        # The last token of an answer is never fed, so it is not in the cache.
        assert request.cached == (min((held - 1) // PAGE * PAGE, held + new - 1) if turn else 0)
        if turn:
            assert request.sent_at == pytest.approx(report.requests[number - 1].finished_at + think)
    thinking = 2 * (turns - 1) * think
    assert report.duration_s == pytest.approx(thinking + sum(r.finished_at - r.sent_at for r in report.requests))


@settings(max_examples=8)
@given(
    replicas=st.integers(1, 3), width=st.integers(1, 3), clients=st.integers(1, 9),
    router=st.sampled_from(["round-robin", "least-loaded"]),
)  # fmt: skip
def test_a_conversation_stays_where_its_cache_is(replicas: int, width: int, clients: int, router: Any) -> None:
    """With room for all, each turn finds as much as a lone client's does, wherever the others are served."""

    def found(clients: int, **where: Any) -> dict[int, int]:
        load = conversations(clients, 24, 4, 2.0, Uniform(200), Uniform(20), sharing=Sharing(block_tokens=PAGE))
        return {r.id: r.cached for r in run_checked(Simulation(load, served(**where))).requests}

    many = found(clients, replicas=replicas, ranks=width, devices=replicas * width, router=router)
    assert many == found(1)
    assert sum(many.values()) > 0


def test_turns_of_conversations_share_their_beginning_too() -> None:
    sharing = Sharing(0.75, 1, PAGE)
    load = conversations(1, 8, 2, 0.0, Fixed(320), Fixed(8), sharing=sharing)
    found = [request.cached for request in simulate(load, served()).requests]
    assert found == [0, 320, 240, 320, 240, 320, 240, 320]


def test_conversations_that_come_at_a_rate() -> None:
    """They begin whatever the server does, and each then goes on as a lone client's does, its cache where it was."""
    turns, think, rate, new, answer = 3, 4.0, 1.5, 100, 10
    sharing = Sharing(block_tokens=PAGE)
    load = open_conversations(rate, 60, turns, think, Fixed(new), Fixed(answer), cv=0, sharing=sharing)
    report = simulate(load, served(replicas=2, devices=2))
    assert report.saturated is False and report.sent_per_s == pytest.approx(rate, rel=0.02)
    assert report.requests_per_s == pytest.approx(rate, rel=0.05) and report.measured_requests == 60
    parts: dict[int, list[Request]] = {}
    for request in report.requests:
        parts.setdefault(request.session or 0, []).append(request)
    openers = [held[0].sent_at for held in parts.values() if held[0].prompt_tokens == new]
    assert np.diff(openers) == pytest.approx(turns / rate)  # an even rate
    for held in parts.values():
        for before, after in itertools.pairwise(held):
            assert after.sent_at == pytest.approx(before.finished_at + think)
            assert after.prompt_tokens == before.prompt_tokens + answer + new
            assert after.cached == (before.prompt_tokens + answer - 1) // PAGE * PAGE


@pytest.mark.parametrize("turns", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_conversations_beyond_capacity_are_not_kept_up_with(turns: int) -> None:
    """Late answers hold further turns back, so that fewer requests are sent than asked for; that hides nothing."""
    where = served(settings={"max_running_requests": 4})
    full = simulate(conversations(64, 64 * turns, turns, 0.5, Fixed(60), Fixed(20)), where).requests_per_s
    kept = {
        share: simulate(open_conversations(share * full, 100, turns, 0.5, Fixed(60), Fixed(20)), where)
        for share in (0.7, 1.3)
    }
    assert [report.saturated for report in kept.values()] == [False, True]
    assert kept[0.7].requests_per_s == pytest.approx(0.7 * full, rel=0.05)


def test_conversations_are_held_by_clients_or_come_at_a_rate() -> None:
    load = conversations(2, 8, 2, 0.0, Fixed(10), Fixed(5))
    for change in ({"concurrency": None}, {"warmup": 1}):
        with pytest.raises(WorkloadError, match="without warm-up, by clients or at a rate without end"):
            dataclasses.replace(load, **change)
    for share, groups in ((-0.1, 1), (1.1, 1), (float("nan"), 1), (0.5, 0), (0.5, 10**9)):
        with pytest.raises(WorkloadError):
            Sharing(share, groups)
