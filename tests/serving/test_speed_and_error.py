"""Interpolated runs stay within their tolerance, and the cost of a step does not grow."""

from __future__ import annotations

import time

import numpy as np
import pytest

from runtime.deployment.engines import load
from runtime.serving import Deployment, Request, Uniform, Workload, bench_serving, closed_loop, simulate
from runtime.serving.replica import curve
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer, SparsePricer


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize("kink", [37, 500, 911])
def test_a_curve_with_a_kink_is_followed_to_its_tolerance(tolerance: float, kink: int) -> None:
    calls = []

    def seconds(step: int) -> float:
        calls.append(step)
        return 0.01 + 2e-5 * min(step, kink)

    exact = np.array([seconds(step) for step in range(1000)])
    calls.clear()
    assert np.abs(curve(seconds, 1000, tolerance) / exact - 1).max() <= 2 * tolerance
    assert len(calls) < 60


def test_interpolation_agrees_with_pricing_every_step() -> None:
    """Contexts of 1024 to 2048 + answers cross the sparse-attention kink at 2048."""
    workload = bench_serving(16, 2048, 512)
    deployment = Deployment(load("sglang"), SparsePricer(), 100_000)
    fast, exact = simulate(workload, deployment), simulate(workload, deployment, exact=True)
    assert fast.tpot.mean == pytest.approx(exact.tpot.mean, rel=1e-3)
    assert fast.ttft.mean == pytest.approx(exact.ttft.mean, rel=5e-3)
    assert fast.e2e.p99 == pytest.approx(exact.e2e.p99, rel=1e-3)


def test_interpolation_saves_most_prices() -> None:
    pricer = SparsePricer()
    report = simulate(Workload([Request(0, 1000, 4000)]), Deployment(plain_engine(), pricer, 100_000))
    assert report.steps["decode"] == 3999 and pricer.calls < 120


def test_a_thousand_long_requests_take_well_under_two_seconds() -> None:
    workload = closed_loop(64, 1000, Uniform(8192), Uniform(1024))
    started = time.process_time()
    report = simulate(workload, Deployment(load("sglang"), LinearPricer(), 900_000))
    assert time.process_time() - started < 2.0
    assert sum(report.steps.values()) > 10_000


def test_cost_per_step_is_flat_in_past_requests() -> None:
    """Twenty times the requests, the same time per step (with slack for a busy machine)."""

    def per_step(requests: int) -> float:
        workload = closed_loop(16, requests, Uniform(200), Uniform(40))
        started = time.process_time()
        report = simulate(workload, Deployment(load("vllm"), LinearPricer(), 900_000), exact=True)
        return (time.process_time() - started) / sum(report.steps.values())

    per_step(100)
    few, many = min(per_step(200) for _ in range(3)), per_step(4000)
    assert many < 1.8 * few
