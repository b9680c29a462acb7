"""Whether an open load is kept up with, and over which window: against capacities that follow from arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.serving import (
    Deployment,
    Disaggregated,
    Fixed,
    Report,
    Request,
    Uniform,
    Workload,
    bench_serving,
    closed_loop,
    open_loop,
    simulate,
)
from runtime.serving.steady import growth
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer

STEP = LinearPricer(fixed=0.010, per_decode=0.0, per_prompt=0.0, per_context=0.0)
"""Every step takes 10 ms, whatever is in it."""


def first_token() -> tuple[Any, Fixed, Fixed, float]:
    """One prompt a step of 10 ms, one at a time: 100 a second, who wait for their first token."""
    engine = plain_engine(max_running_requests=1)
    return Deployment(engine, STEP, 10_000), Fixed(100), Fixed(1), 100.0


def slots() -> tuple[Any, Fixed, Fixed, float]:
    """Four slots, each kept for a prompt's step and 49 decode steps; prompts hold up all four."""
    engine = plain_engine(max_running_requests=4)
    return Deployment(engine, LinearPricer(0.010, 0.0, 0.0, 0.0), 10_000), Fixed(10), Fixed(50), 4 / 0.5


def pages() -> tuple[Any, Fixed, Fixed, float]:
    """A pool that holds eight requests."""
    engine = plain_engine(page_tokens=1, admission="max-length")
    return Deployment(engine, LinearPricer(0.010, 0.0, 0.0, 0.0), 8 * 150 + 20), Fixed(100), Fixed(50), 8 / 0.5


def transfer() -> tuple[Any, Fixed, Fixed, float]:
    """Caches of 100 kB leave over a link of 1 MB/s, one after another: ten a second."""
    side = Deployment(plain_engine(), LinearPricer(0.001, 0.0, 0.0, 0.0), 1_000_000)
    return Disaggregated(side, side, 1000.0, 1e6), Fixed(100), Fixed(20), 10.0


def played(deployment: Any, prompt: Any, output: Any, rate: float, requests: int = 200, **more: Any) -> Report:
    return simulate(open_loop(rate, requests, prompt, output, **more), deployment)


@pytest.mark.parametrize("kind", [first_token, slots, pages, transfer])
@pytest.mark.parametrize("requests", [20, 400])
def test_a_backlog_is_seen_whatever_it_is_made_of(kind: Any, requests: int) -> None:
    """Half as much again as can be served, in runs however short."""
    deployment, prompt, output, capacity = kind()
    report = played(deployment, prompt, output, 1.5 * capacity, requests)
    assert report.sustained is False and report.saturated and report.saturated_by
    assert report.measured_requests == requests
    assert report.requests_per_s <= 1.03 * capacity < report.sent_per_s
    assert report.requests_per_s >= 0.7 * capacity


@pytest.mark.parametrize("kind", [first_token, slots, pages, transfer])
def test_what_can_be_served_is_kept_up_with(kind: Any) -> None:
    deployment, prompt, output, capacity = kind()
    report = played(deployment, prompt, output, 0.6 * capacity)
    assert report.sustained is True and not report.saturated and report.saturated_by == ""
    assert report.requests_per_s == pytest.approx(report.sent_per_s, rel=0.05)


@pytest.mark.parametrize(
    ("load_factor", "kept_up"), [(0.9, True), (0.96, True), (1.08, False), (1.2, False), (30, False)]
)
def test_close_to_the_capacity_of_an_m_d_1_queue(load_factor: float, kept_up: bool) -> None:
    deployment, prompt, output, capacity = first_token()
    report = played(deployment, prompt, output, load_factor * capacity, seed=4)
    assert report.sustained is kept_up
    assert report.requests_per_s == pytest.approx(min(report.sent_per_s, capacity), rel=0.03)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("cv", [0.0, 1.0, 3.0])
def test_chance_is_not_taken_for_a_backlog(seed: int, cv: float) -> None:
    """Room for all: whatever the bursts, everyone is served in a second."""
    engine = plain_engine(max_running_requests=4096)
    report = played(Deployment(engine, STEP, 10_000_000), Fixed(10), Uniform(100), 40.0, cv=cv, seed=seed)
    assert report.sustained is True


def test_ramp_and_drain_are_left_out_of_the_rates() -> None:
    """Answers of a hundred seconds, measured for ten: over the whole run a tenth of the rate would come out."""
    engine = plain_engine(max_running_requests=4096)
    slow = Deployment(engine, LinearPricer(0.1, 0.0, 0.0, 0.0), 10_000_000)
    report = played(slow, Fixed(10), Fixed(1000), 0.5, 5, cv=0.0)
    assert report.sustained is True and report.measured_requests == 5
    assert report.requests_per_s == pytest.approx(0.5, rel=0.02)
    assert report.output_tokens_per_s == pytest.approx(500, rel=0.02)
    assert report.mean_in_system == pytest.approx(0.5 * report.e2e.mean, rel=0.03)  # Little's law
    assert report.steady_s is not None and report.steady_s > 100


def test_a_closed_loop_is_as_full_as_it_has_clients() -> None:
    deployment = Deployment(plain_engine(), LinearPricer(), 500_000)
    report = simulate(bench_serving(16, 1024, 256), deployment)
    assert report.sustained is None and report.sent_per_s is None
    assert report.mean_in_system == pytest.approx(16, rel=1e-6)
    assert report.steady_s is not None and report.steady_s < report.duration_s
    short = simulate(closed_loop(16, 16, Fixed(100), Fixed(10)), deployment)
    assert short.steady_s is None
    assert short.requests_per_s == pytest.approx(16 / short.duration_s)


def listed(count: int, gap: float) -> Workload:
    rng = np.random.default_rng(1)
    return Workload([Request(i, 100, 1, sent_at=t) for i, t in enumerate(np.cumsum(rng.exponential(gap, count)))])


@pytest.mark.parametrize(("load_factor", "kept_up"), [(0.7, True), (1.4, False), (50, False)])
def test_a_list_of_requests_is_judged_as_far_as_it_goes(load_factor: float, kept_up: bool) -> None:
    deployment, _, _, capacity = first_token()
    report = simulate(listed(600, 1 / load_factor / capacity), deployment)
    assert report.sustained is kept_up and report.measured_requests == 600
    assert simulate(listed(12, 1 / capacity), deployment).sustained is None


def test_growth_is_a_slope_with_its_error() -> None:
    rng = np.random.default_rng(0)
    for slope in (0.0, 0.1, -0.05):
        counts = 100 + slope * np.arange(1200) + rng.normal(0, 5, 1200)
        found, error = growth([round(each) for each in counts])
        assert abs(found - slope) < error < 0.06
