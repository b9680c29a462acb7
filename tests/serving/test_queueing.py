"""Against queueing theory, and the flag for overload."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.deployment.engines import load
from runtime.serving import Deployment, Fixed, Uniform, bench_serving, closed_loop, open_loop, simulate
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer


@pytest.mark.parametrize("load_factor", [0.6, *(pytest.param(rho, marks=pytest.mark.slow) for rho in (0.3, 0.8))])
def test_one_slot_and_one_token_answers_are_an_m_d_1_queue(load_factor: float) -> None:
    """Wait in an M/D/1 queue: W = rho D / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    service = 0.010 + 100 * 25e-6
    engine = plain_engine(max_running_requests=1)
    workload = open_loop(load_factor / service, 20_000, Fixed(100), Fixed(1), seed=1)
    report = simulate(workload, Deployment(engine, LinearPricer(), 1000))
    expected = load_factor * service / (2 * (1 - load_factor))
    assert report.queue.mean == pytest.approx(expected, rel=0.06)
    assert report.ttft.mean == pytest.approx(expected + service, rel=0.06)


def test_littles_law_holds_at_every_station() -> None:
    """L = lambda W, with L integrated over the timeline and W from the requests' own clocks."""
    workload = open_loop(6.0, 3000, Uniform(400), Uniform(100), seed=2)
    report = simulate(workload, Deployment(plain_engine(), LinearPricer(), 200_000))
    sent = np.array([request.sent_at for request in report.requests])
    ended = np.array([request.finished_at for request in report.requests])
    times = np.linspace(sent[300], sent[-300], 4000)
    in_system = np.searchsorted(np.sort(sent), times) - np.searchsorted(np.sort(ended), times)
    inside = (sent >= times[0]) & (sent < times[-1])
    rate = inside.sum() / (times[-1] - times[0])
    assert in_system.mean() == pytest.approx(rate * (ended - sent)[inside].mean(), rel=0.03)
    assert report.mean_in_system == pytest.approx(in_system.mean(), rel=0.05)


def test_closed_loop_keeps_its_concurrency() -> None:
    report = simulate(bench_serving(16, 1024, 256), Deployment(load("sglang"), LinearPricer(), 500_000, devices=8))
    assert 14 < report.mean_in_system <= 16 * (1 + 1e-12)
    assert report.output_tokens_per_s == pytest.approx(8 * report.output_tokens_per_s_per_device)
    assert report.output_tokens_per_s_per_user == pytest.approx(1 / report.tpot.mean)


def test_a_full_pool_saturates_a_closed_loop_and_a_busy_prefill_does_not() -> None:
    engine = load("sglang")
    roomy = simulate(bench_serving(32, 8192, 512), Deployment(engine, LinearPricer(), 500_000))
    tight = simulate(bench_serving(64, 8192, 512), Deployment(engine, LinearPricer(), 200_000))
    assert not roomy.saturated and roomy.saturated_by == ""
    assert tight.saturated and tight.saturated_by == tight.bottleneck == "kv-pool"
    assert tight.kv.peak_fraction > 0.95
    assert tight.queue.mean > 0.5 * tight.ttft.mean
    # Little's law, as for the measured 8192/1024 deployments: what is in service is what the pool holds.
    in_service = 64 * (1 - tight.queue.mean / tight.e2e.mean)
    assert in_service * (0.9 * 8192 + 0.45 * 512) == pytest.approx(200_000, rel=0.2)


def test_too_few_slots_saturate_by_max_running() -> None:
    report = simulate(
        closed_loop(32, 200, Fixed(100), Fixed(100)),
        Deployment(load("sglang", {"max_running_requests": 8}), LinearPricer(), 500_000),
    )
    assert report.saturated_by == "max-running"


@pytest.mark.parametrize(("rate", "saturated"), [(0.5, False), (50.0, True)])
def test_an_open_loop_saturates_when_arrivals_outrun_service(rate: float, saturated: bool) -> None:
    """About 35 prompts of 1000 tokens a second can be computed at all."""
    report = simulate(
        open_loop(rate, 400, Fixed(1000), Fixed(50), seed=3),
        Deployment(load("vllm"), LinearPricer(), 500_000),
    )
    assert report.saturated is saturated


def test_the_opening_burst_shapes_the_mean_but_not_the_median() -> None:
    report = simulate(bench_serving(32, 8192, 1024), Deployment(load("sglang"), LinearPricer(), 900_000))
    ttft = np.array([request.first_token_at - request.sent_at for request in report.requests])
    assert ttft[:32].mean() > 3 * np.median(ttft[32:])
    assert report.ttft.mean > 1.3 * report.ttft.p50
