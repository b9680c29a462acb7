"""Loads: what is drawn, what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from foundation.errors import CapacityError, Failure
from runtime.serving import (
    Deployment,
    Disaggregated,
    Fixed,
    Lognormal,
    Request,
    Speculation,
    TraceFileError,
    Uniform,
    Workload,
    WorkloadError,
    bench_serving,
    closed_loop,
    mooncake_trace,
    open_loop,
    simulate,
)
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer


def test_bench_serving_is_ten_times_concurrency_in_the_stated_range() -> None:
    workload = bench_serving(16, 1024, 1000)
    assert (len(workload.requests), workload.concurrency, workload.warmup) == (160, 16, 0)
    prompts = [request.prompt_tokens for request in bench_serving(256, 1024, 1000).requests]
    assert (min(prompts), max(prompts)) == (819, 1024)
    assert np.mean(prompts) == pytest.approx(921.5, rel=0.01)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_open_loop_has_the_rate_and_burstiness_asked_for(cv: float) -> None:
    sent = [request.sent_at for request in open_loop(4.0, 40_000, Fixed(1), Fixed(1), cv=cv).requests]
    gaps = np.diff([0.0, *sent])
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_lognormal_lengths_have_the_mean_and_spread_asked_for() -> None:
    drawn = Lognormal(2000, 0.5).draw(np.random.default_rng(0), 100_000)
    assert drawn.mean() == pytest.approx(2000, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.03)
    assert Lognormal(2000, 2.0, most=3000).draw(np.random.default_rng(0), 10_000).max() == 3000


def test_the_same_seed_draws_the_same_load() -> None:
    one, two, other = (open_loop(1.0, 50, Uniform(100), Uniform(100), seed=s).requests for s in (1, 1, 2))
    key = [(r.prompt_tokens, r.output_tokens, r.sent_at) for r in one]
    assert key == [(r.prompt_tokens, r.output_tokens, r.sent_at) for r in two]
    assert key != [(r.prompt_tokens, r.output_tokens, r.sent_at) for r in other]


def test_warm_up_drains_before_anything_is_measured_and_changes_nothing() -> None:
    deployment = Deployment(plain_engine("sglang"), LinearPricer(), 100_000)
    warm = simulate(closed_loop(4, 40, Uniform(500), Uniform(50), warmup=8), deployment)
    assert warm.measured_requests == 40
    assert min(request.sent_at for request in warm.requests) > 0
    requests = [Request(i, r.prompt_tokens, r.output_tokens) for i, r in enumerate(warm.requests)]
    cold = simulate(Workload(requests, 4), deployment)
    assert warm.ttft.mean == pytest.approx(cold.ttft.mean)
    assert warm.steps == cold.steps
    assert warm.duration_s == pytest.approx(cold.duration_s)


def test_mooncake_traces_are_read_and_played(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 20, "hash_ids": [1, 2, 3]},
        {"timestamp": 0, "input_length": 1030, "output_length": 10, "hash_ids": [1, 2, 5]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    workload = mooncake_trace(path, speed=2.0)
    assert [(r.id, r.sent_at, r.prompt_tokens) for r in workload.requests] == [(0, 0.0, 1030), (1, 1.5, 1100)]
    engine = plain_engine("vllm", page_tokens=16)
    report = simulate(workload, Deployment(engine, LinearPricer(), 10_000))
    assert report.prefix_hit_rate == pytest.approx(1024 / 2130)
    assert mooncake_trace(path, limit=1).requests[0].output_tokens == 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"timestamp": 0, "output_length": 1}', "line 2: input_length must be a number, not None"),
        (
            '{"timestamp": 0, "input_length": 0, "output_length": 1}',
            "line 2: input_length = 0 must be a whole",
        ),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "line 2: timestamp = -1"),
        ('{"timestamp": 0, "input_length": 5.5, "output_length": 1}', "line 2: input_length = 5.5"),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}',
            "line 2: hash_ids must",
        ),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "line 2: 2 hash_ids"),
    ],
)
def test_malformed_traces_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n' + line + "\n")
    with pytest.raises(TraceFileError, match=message):
        mooncake_trace(path)


def test_missing_and_empty_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFileError, match="cannot read the trace"):
        mooncake_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TraceFileError, match="holds no requests"):
        mooncake_trace(tmp_path / "empty.jsonl")


SERVER = Deployment(plain_engine(), LinearPricer(), 1000)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: open_loop(0.0, 5, Fixed(1), Fixed(1)), "request rate 0.0 per second: give a finite rate"),
        (lambda: open_loop(-1.0, 5, Fixed(1), Fixed(1)), "request rate -1.0"),
        (lambda: open_loop(float("inf"), 5, Fixed(1), Fixed(1)), "request rate inf"),
        (lambda: open_loop(1.0, 5, Fixed(1), Fixed(1), cv=-1), "burstiness cv -1"),
        (lambda: open_loop(1.0, 0, Fixed(1), Fixed(1)), "number of requests is 0"),
        (lambda: closed_loop(0, 5, Fixed(1), Fixed(1)), "concurrency is 0"),
        (lambda: bench_serving(0, 5, 5), "concurrency is 0"),
        (lambda: closed_loop(2, 5, Fixed(1), Fixed(1), warmup=-1), "warm-up of -1"),
        (lambda: Fixed(0), "length is 0"),
        (lambda: Uniform(10, 1.5), "range ratio 1.5"),
        (lambda: Lognormal(0.0), "lognormal lengths need"),
        (lambda: Workload([]), "the workload is empty"),
        (lambda: Workload([Request(0, 1, 1)], warmup=1), "every request is warm-up"),
        (lambda: Speculation(()), "draft acceptance"),
        (lambda: Speculation.from_mean(3, 5.0), "3 drafts yield 1 to 4 tokens a step, not 5.0"),
        (lambda: Deployment(plain_engine(), LinearPricer(), 1000, replicas=0), "replicas = 0"),
        (
            lambda: Deployment(plain_engine(), LinearPricer(), 1000, router="random"),
            "unknown router 'random'",
        ),  # type: ignore[arg-type]
        (lambda: Disaggregated(SERVER, SERVER, 1.0, 0.0), "KV link bandwidth 0.0"),
        (
            lambda: simulate(Workload([Request(7, 990, 20)]), SERVER),
            "request 7 needs 1010 tokens of KV cache",
        ),
    ],
)
def test_bad_input_is_one_clear_line(attempt, message: str) -> None:
    with pytest.raises(Failure, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, WorkloadError | CapacityError)


def test_an_uncut_prompt_above_the_step_limit_is_refused() -> None:
    deployment = Deployment(plain_engine("trtllm"), LinearPricer(), 100_000)
    with pytest.raises(CapacityError, match="trtllm does not chunk: raise its max_step_tokens"):
        simulate(Workload([Request(0, 9000, 1)]), deployment)
