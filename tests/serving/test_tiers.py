"""Prompts that stay cached in host memory and on disk: what is found where, and what fetching it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving import CacheTier, Deployment, Fixed, Request, Sharing, Uniform, Workload, closed_loop, simulate
from runtime.serving.simulation import Simulation
from tests.serving.helpers import plain_engine, run_checked
from tests.serving.pricers import LinearPricer
from tests.serving.test_conservation import check_ended, deployments, workloads

PAGE = 16
HOST = CacheTier("host", 10**9, 1e-7, 1e-5)


def served(pool_tokens: int, *tiers: CacheTier, engine: str = "sglang", **more: Any) -> Deployment:
    made = plain_engine(engine, page_tokens=PAGE, **more)
    return Deployment(made, LinearPricer(), pool_tokens, tiers=tiers)


def groups(count: int, clients: int = 2, requests: int = 120) -> Workload:
    return closed_loop(clients, requests, Fixed(1000), Fixed(5), sharing=Sharing(0.8, count, PAGE))


@settings(max_examples=15, deadline=None)
@given(
    workloads(), deployments(), st.integers(0, 3000), st.integers(0, 3000), st.sampled_from([0.0, 1e-5, 1e-2]),
)  # fmt: skip
def test_every_token_found_was_in_some_tier(
    load: Workload, made: Deployment, host: int, disk: int, seconds: float
) -> None:
    """And requests, pages and time stay conserved, whatever the tiers hold and however slow they are."""
    tiers = CacheTier("host", host, seconds), CacheTier("disk", disk, 3 * seconds, 1e-3)
    simulation = Simulation(load, dataclasses.replace(made, tiers=tiers))
    report = run_checked(simulation)
    check_ended(load, simulation)
    assert sum(report.prefix_hits.values()) == pytest.approx(report.prefix_hit_rate)
    for request in report.requests:
        assert 0 <= sum(request.fetched) <= request.cached < request.prompt_tokens
    if not made.engine.prefix_cache or host + disk < 128:
        assert all(not any(request.fetched) for request in report.requests)


@given(workloads(), deployments())
@settings(max_examples=8, deadline=None)
def test_tiers_without_room_change_nothing(load: Workload, made: Deployment) -> None:
    none = CacheTier("host", 0, 1e-6), CacheTier("disk", 0, 1e-6)
    before, after = simulate(load, made), simulate(load, dataclasses.replace(made, tiers=none))
    assert {**before.to_json(), "prefix_hits": 0} == {**after.to_json(), "prefix_hits": 0}
    assert before.timeline == after.timeline


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_what_fell_out_of_the_devices_is_fetched(engine: str) -> None:
    """Forty prefixes of 800 tokens where the pool holds about eight: the host has them all, so that all but each
    group's first is found, and begins sooner."""
    load = groups(40)
    small, host = simulate(load, served(8_000, engine=engine)), simulate(load, served(8_000, HOST, engine=engine))
    assert small.prefix_hit_rate < 0.4
    found = len({request.prefix_hashes[0] for request in host.requests})
    assert host.prefix_hit_rate == pytest.approx(0.8 * (1 - found / len(load.requests)), abs=0.03)
    assert host.prefix_hits["host"] > host.prefix_hits["device"] > 0
    assert host.ttft.mean < small.ttft.mean


def test_fetching_takes_what_the_link_says() -> None:
    """The second request finds 2,000 tokens that 60 others have driven out; one after another over one link."""
    shared = tuple(range(125))
    others = [Request(1 + i, 1600, 2, tuple(1000 * (i + 1) + b for b in range(100)), sent_at=10 + i) for i in range(6)]
    late = [Request(7 + i, 2016, 2, shared, sent_at=100.0) for i in range(2)]
    load = Workload([Request(0, 2016, 2, shared), *others, *late], block_tokens=PAGE)
    slow = CacheTier("host", 10**6, 1e-3, 0.25)
    prices = LinearPricer(fixed=0.0, per_context=0.0)
    made = dataclasses.replace(served(4200, slow, chunked_prefill_tokens=0), pricer=prices)
    first, second = simulate(load, made).requests[-2:]
    assert first.fetched == (2000,) and first.cached == 2000
    step = 16 * 25e-6
    assert first.first_token_at - first.sent_at == pytest.approx(0.25 + 2000 * 1e-3 + step, rel=1e-6)
    assert second.first_token_at - second.sent_at <= 2 * (0.25 + 2000 * 1e-3) + 3 * step


def test_the_nearest_tier_is_asked_and_disk_has_what_the_host_forgot() -> None:
    load = groups(40)
    both = simulate(load, served(4_000, CacheTier("host", 8_000, 1e-7), CacheTier("disk", 10**9, 1e-6)))
    assert all(both.prefix_hits[name] > 0.01 for name in ("device", "host", "disk"))
    alone = simulate(load, served(4_000, CacheTier("disk", 10**9, 1e-6)))
    assert alone.prefix_hit_rate == pytest.approx(both.prefix_hit_rate, abs=0.02)
    assert alone.prefix_hits["disk"] > both.prefix_hits["disk"]


@given(
    count=st.integers(1, 30), pool=st.integers(1200, 9000), seed=st.integers(0, 5),
    room=st.lists(st.integers(0, 20_000), min_size=2, max_size=2),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_more_room_that_costs_nothing_finds_no_less(count: int, pool: int, seed: int, room: list[int]) -> None:
    """One client, so that the order of requests is the same."""
    load = closed_loop(1, 40, Uniform(1000, 0.5), Fixed(3), sharing=Sharing(0.7, count, PAGE), seed=seed)
    less, more = sorted(room)
    found = [simulate(load, served(pool, CacheTier("host", tokens, 0.0))) for tokens in (0, less, more)]
    rates = [report.prefix_hit_rate for report in found]
    assert rates == sorted(rates)
    assert [report.ttft.mean for report in found] == sorted((r.ttft.mean for r in found), reverse=True)
