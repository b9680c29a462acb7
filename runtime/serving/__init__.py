"""Discrete-event simulation of a serving deployment: what latency, throughput and queueing a load will see.

    engine = load("sglang")                     # runtime.deployment.engines
    deployment = Deployment(engine, pricer, pool_tokens=330_000, devices=8)
    report = simulate(bench_serving(16, 8192, 1024), deployment)

Owns: loads, KV pools, schedulers, the event loop and the report. What a step costs comes from a
`StepPricer`. numpy only: must not import JAX, the model, the backends or a chip's profile.
"""

from runtime.serving.deployment import Deployment, Disaggregated
from runtime.serving.errors import ServingError, TraceFileError, WorkloadError
from runtime.serving.explain import Explained, StepLog, explain
from runtime.serving.pricing import BOUNDS, EVIDENCE_GRADES, BatchShape, StepPrice, StepPricer
from runtime.serving.report import KvUse, Report, Stats
from runtime.serving.request import Request
from runtime.serving.simulation import simulate
from runtime.serving.speculation import Speculation
from runtime.serving.trace import Trace
from runtime.serving.workload import (
    Fixed,
    Lengths,
    Lognormal,
    Uniform,
    Workload,
    bench_serving,
    closed_loop,
    mooncake_trace,
    open_loop,
)

__all__ = [
    "BOUNDS",
    "EVIDENCE_GRADES",
    "Explained",
    "BatchShape",
    "Deployment",
    "Disaggregated",
    "Fixed",
    "KvUse",
    "Lengths",
    "Lognormal",
    "Report",
    "Request",
    "ServingError",
    "Speculation",
    "Stats",
    "StepLog",
    "StepPrice",
    "StepPricer",
    "Trace",
    "TraceFileError",
    "Uniform",
    "WorkloadError",
    "Workload",
    "bench_serving",
    "closed_loop",
    "explain",
    "mooncake_trace",
    "open_loop",
    "simulate",
]
