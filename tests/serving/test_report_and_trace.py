"""The report's figures against the requests' own clocks, and the trace file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runtime.deployment.engines import load
from runtime.serving import (
    BatchShape,
    Deployment,
    Request,
    StepPrice,
    Trace,
    Uniform,
    Workload,
    closed_loop,
    simulate,
)
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer


def test_latencies_are_what_the_client_sees() -> None:
    """One request: sent, tokenized, prefilled in 35 ms, then 9 steps of 10 ms."""
    engine = load(
        "sglang",
        {"request_seconds": 0.06, "request_delay_seconds": 0.04, "tokenize_seconds_per_token": 1e-5,
         "response_seconds": 0.02,
         "eager_step_host_seconds": 0.0, "graph_step_host_seconds": 0.0},
    )  # fmt: skip
    pricer = LinearPricer(per_decode=0.0, per_context=0.0)
    report = simulate(Workload([Request(0, 1000, 10)]), Deployment(engine, pricer, 10_000))
    assert report.ttft.mean == pytest.approx(0.1 + 0.01 + 0.035 + 0.02)
    assert report.tpot.mean == pytest.approx(0.010)
    assert report.e2e.mean == pytest.approx(0.165 + 0.09)
    assert report.itl.mean == pytest.approx(0.010) and report.itl.p50 == pytest.approx(0.010, rel=0.005)
    assert report.steps == {"prefill": 1, "decode": 9}


def test_a_burst_is_tokenized_one_by_one() -> None:
    engine = plain_engine("sglang", tokenize_seconds_per_token=1e-4)
    requests = simulate(Workload([Request(i, 100, 1) for i in range(3)]), Deployment(engine, LinearPricer(), 5000))
    assert [r.queued_at for r in requests.requests] == pytest.approx([0.01, 0.02, 0.03])


def test_time_by_op_and_bound_adds_up_and_evidence_is_the_weakest() -> None:
    class Graded(LinearPricer):
        def price(self, shape: BatchShape) -> StepPrice:
            price = super().price(shape)
            price.evidence = "datasheet" if shape.prefill_chunks else "measured"
            price.extrapolated = bool(shape.prefill_chunks)
            return price

    report = simulate(closed_loop(8, 100, Uniform(500), Uniform(50)), Deployment(load("vllm"), Graded(), 50_000))
    stepped = sum(report.seconds_by_bound.values())
    assert stepped == pytest.approx(sum(report.seconds_by_op.values()))
    assert 0 < stepped <= report.duration_s * 1.001
    assert report.evidence == "datasheet" and 0 < report.extrapolated < 1
    assert set(report.seconds_by_bound) <= {"compute", "memory", "network", "overhead"}


def test_json_has_the_promised_keys_and_no_nan() -> None:
    report = simulate(Workload([Request(0, 10, 1)]), Deployment(plain_engine(), LinearPricer(), 1000, devices=8))
    text = json.dumps(report.to_json(), allow_nan=False)
    document = json.loads(text)
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms"):
        assert set(document[key]) == {"mean", "p50", "p90", "p99"}
    assert {"pool_tokens", "peak_fraction", "mean_fraction"} == set(document["kv"])
    assert document["tpot_ms"]["mean"] is None  # one token has no time per further token
    for key in (
        "output_tokens_per_s",
        "output_tokens_per_s_per_device",
        "saturated",
        "evidence",
        "bottleneck",
    ):
        assert key in document


def test_trace_has_steps_counters_and_requests(tmp_path: Path) -> None:
    trace = Trace()
    workload = closed_loop(4, 20, Uniform(300), Uniform(30))
    report = simulate(workload, Deployment(load("sglang"), LinearPricer(), 50_000, replicas=2), trace=trace)
    path = tmp_path / "trace.json"
    trace.write(path)
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert len(steps) == sum(report.steps.values())
    for replica in (0, 1):
        ends = [(e["ts"], e["ts"] + e["dur"]) for e in steps if e["pid"] == replica]
        assert all(later[0] >= earlier[1] - 1e-3 for earlier, later in zip(ends, ends[1:], strict=False))
    assert {event["name"] for event in events if event["ph"] == "C"} == {"waiting", "in service", "KV used"}
    begins = [e for e in events if e["ph"] == "b" and e["name"] == "request"]
    assert len(begins) == sum(1 for e in events if e["ph"] == "e" and e["name"] == "request") == 20
    assert np.isfinite([event.get("ts", 0.0) for event in events]).all()


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    simulate(
        closed_loop(2, 9, Uniform(30), Uniform(5)),
        Deployment(plain_engine(), LinearPricer(), 1000),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 9) for done in range(1, 10)]


def test_the_simulator_does_not_import_jax() -> None:
    import subprocess
    import sys

    program = "import sys, runtime.serving, runtime.deployment.engines; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
