"""Conservation laws over random loads, engines and pools."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.deployment.engines import load, names
from runtime.serving import (
    Deployment,
    Disaggregated,
    Request,
    Speculation,
    Workload,
    simulate,
)
from runtime.serving.simulation import Simulation
from tests.serving.helpers import ranks, run_checked
from tests.serving.pricers import LinearPricer, SparsePricer


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Loads of up to 25 requests that crowd the pools, some sharing prefixes of 64-token blocks."""
    count = draw(st.integers(1, 25))
    requests = []
    for i in range(count):
        prompt = draw(st.integers(1, 300))
        blocks = draw(st.integers(0, prompt // 64))
        family = draw(st.integers(0, 2))
        hashes = tuple(1000 * family + block for block in range(blocks))
        sent_at = draw(st.floats(0, 2))
        requests.append(Request(i, prompt, draw(st.integers(1, 300)), hashes, sent_at=sent_at))
    concurrency = draw(st.one_of(st.none(), st.integers(1, 12)))
    if concurrency is None:
        requests.sort(key=lambda request: request.sent_at)
    warmup = draw(st.integers(0, count - 1))
    return Workload(requests, concurrency, warmup, block_tokens=64)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """Any engine, a pool from barely large enough to ample, one or more replicas and ranks."""
    name = draw(st.sampled_from(names()))
    overrides = {
        "max_running_requests": draw(st.integers(1, 12)),
        "page_tokens": draw(st.sampled_from([1, 16, 64])),
        "prefix_cache": draw(st.booleans()),
        "overlap_scheduling": draw(st.booleans()),
        "admission": draw(st.sampled_from(["estimate", "prompt", "chunk", "max-length"])),
        "policy": draw(st.sampled_from(["prefill-first", "mixed"])),
        "preemption_victim": draw(st.sampled_from(["least-output", "last"])),
        "preempted_go": draw(st.sampled_from(["front", "back"])),
        "chunked_prefill_tokens": draw(st.sampled_from([0, 48, 256])),
        "max_step_tokens": draw(st.sampled_from([300, 2048])),
    }
    accept = draw(st.one_of(st.none(), st.lists(st.floats(0, 1), min_size=1, max_size=3)))
    return Deployment(
        load(name, overrides),
        SparsePricer(top=300),
        pool_tokens=draw(st.sampled_from([640, 704, 1000, 3000])),  # 640 holds the longest request
        replicas=draw(st.integers(1, 2)),
        ranks=draw(st.integers(1, 2)),
        router=draw(st.sampled_from(["round-robin", "least-loaded"])),
        speculation=Speculation(tuple(accept)) if accept else None,
    )


def check_ended(workload: Workload, simulation: Simulation) -> None:
    """Every request ended once, in order, with all its tokens, and nothing is left over."""
    for asked, request in zip(workload.requests, simulation.workload.requests, strict=True):
        assert request.emitted == asked.output_tokens
        assert request.sent_at <= request.queued_at <= request.admitted_at
        assert request.admitted_at <= request.first_token_at <= request.finished_at
        assert request.pages == 0
    for rank in ranks(simulation):
        assert rank.load == 0 and rank.committed == 0 and not rank.handed_off
        assert rank.pool.available == rank.pool.total
        rank.pool.check([])


@settings(max_examples=25, deadline=None)
@given(workloads(), deployments(), st.integers(0, 3))
def test_requests_tokens_pages_and_time_are_conserved(workload: Workload, deployment: Deployment, seed: int) -> None:
    simulation = Simulation(workload, deployment, seed)
    finished: list[int] = []
    done = simulation._done
    simulation._done = lambda request: (finished.append(request.id), done(request))[1]  # type: ignore[method-assign]
    report = run_checked(simulation)
    assert sorted(finished) == list(range(len(workload.requests)))
    check_ended(workload, simulation)
    assert report.measured_requests == sum(request.measured for request in workload.requests)
    assert 0 <= report.kv.mean_fraction <= report.kv.peak_fraction + 1e-12 <= 1 + 1e-12


@settings(max_examples=15, deadline=None)
@given(workloads(), deployments(), deployments(), st.sampled_from([1e3, 1e6, 1e9]))
def test_disaggregation_conserves_them_too(
    workload: Workload, prefill: Deployment, decode: Deployment, bandwidth: float
) -> None:
    simulation = Simulation(workload, Disaggregated(prefill, decode, 100.0, bandwidth, 1e-3))
    run_checked(simulation)
    check_ended(workload, simulation)


@settings(max_examples=8, deadline=None)
@given(workloads(), deployments(), st.integers(0, 3))
def test_same_seed_same_result_and_workload_untouched(workload: Workload, deployment: Deployment, seed: int) -> None:
    before = copy.deepcopy([dataclasses.astuple(request) for request in workload.requests])
    first = simulate(workload, deployment, seed=seed)
    second = simulate(workload, deployment, seed=seed)
    assert repr(first) == repr(second)
    assert [r.finished_at for r in first.requests] == [r.finished_at for r in second.requests]
    np.testing.assert_equal([dataclasses.astuple(request) for request in workload.requests], before)


@settings(max_examples=10, deadline=None)
@given(workloads(), deployments())
def test_interpolated_runs_equal_exact_ones_for_linear_prices(workload: Workload, deployment: Deployment) -> None:
    deployment = dataclasses.replace(deployment, pricer=LinearPricer())
    fast, exact = (simulate(workload, deployment, exact=exact) for exact in (False, True))
    np.testing.assert_allclose(
        [r.finished_at for r in fast.requests], [r.finished_at for r in exact.requests], rtol=1e-9
    )
    assert fast.steps == exact.steps


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=20), st.lists(st.integers(1, 900), max_size=3), st.floats(1, 50))
def test_more_bandwidth_never_slows_a_step(contexts: list[int], prompts: list[int], speed: float) -> None:
    from runtime.serving import BatchShape

    shape = BatchShape(np.array(contexts, dtype=np.int64), 1, [(p, 0) for p in prompts], len(contexts))
    slow, quick = LinearPricer().seconds(shape), LinearPricer(speed=speed).seconds(shape)
    for overlapped in (False, True):
        engine = load("vllm", {"overlap_scheduling": overlapped, "eager_launch_seconds": 0.03})
        for mode in ((True, False), (False, True), (False, False)):
            assert engine.step_seconds(quick, *mode) <= engine.step_seconds(slow, *mode)


@settings(max_examples=30, deadline=None)
@given(workloads(), st.floats(1, 20))
def test_one_request_at_a_time_is_never_slower_on_a_faster_chip(workload: Workload, speed: float) -> None:
    alone = Workload(workload.requests, 1, 0, block_tokens=64)
    slow, quick = (
        simulate(alone, Deployment(load("sglang"), LinearPricer(speed=s), 1000)).requests for s in (1.0, speed)
    )
    for a, b in zip(quick, slow, strict=True):
        assert a.finished_at <= b.finished_at * (1 + 1e-12)
