"""Interpolated runs stay within their tolerance, and the work of a step does not grow."""

from __future__ import annotations

import sys
from typing import Any

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


def test_a_thousand_long_requests_need_fewer_prices_than_steps() -> None:
    """However often one of 64 ends and another begins."""
    pricer = LinearPricer()
    workload = closed_loop(64, 1000, Uniform(8192), Uniform(1024))
    report = simulate(workload, Deployment(load("sglang"), pricer, 900_000))
    assert sum(report.steps.values()) > 10_000 and pricer.calls < 0.6 * sum(report.steps.values())


def test_work_per_step_is_flat_in_past_requests() -> None:
    """Four times the requests, the same lines of Python per step: a scan of past requests would be hundreds more."""

    def per_step(requests: int) -> float:
        workload = closed_loop(16, requests, Uniform(200), Uniform(40))
        deployment = Deployment(load("vllm"), LinearPricer(), 900_000)
        traced, lines = sys.gettrace(), 0

        def count(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return count

        sys.settrace(count)
        try:
            report = simulate(workload, deployment, exact=True)
        finally:
            sys.settrace(traced)
        return lines / sum(report.steps.values())

    assert per_step(1000) < 1.2 * per_step(250)
