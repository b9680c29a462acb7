"""The one scheduler: what is computed when, of which requests, in which pages; simulated, or carried out.

    engine = load("sglang")                     # runtime.deployment.engines
    deployment = Deployment(engine, pricer, pool_tokens=330_000, devices=8)
    report = simulate(bench_serving(16, 8192, 1024), deployment)

    who asks     simulation.py   a workload's clients, and the report           live.py   other threads (`service.py`)
    what next    loop.py         events: requests to ranks, steps, caches that move
                 replica.py      ranks that step together    rank.py      one rank's books, kv_pool.py and pages.py its
                 scheduler.py    an engine's policy                       pages, by count and by number
    how long     clock.py        virtual, wall or paced      pricing.py   what a step costs, from a `StepPricer`
    by whom      worker.py       a step's rows, and the tokens that come of them (answer.py, sampling.py)
                 executor.py     what computes the rows: `runtime/execution/` has them; none in a simulation

Owns: loads, KV pools, schedulers, the event loop, answers and the report. numpy only: must not import JAX, the model,
the backends or a chip's profile.
"""

from runtime.serving.deployment import Deployment, Disaggregated
from runtime.serving.errors import ServingError, TraceFileError, WorkloadError
from runtime.serving.explain import Explained, StepLog, explain
from runtime.serving.lengths import Fixed, Histogram, Lengths, Lognormal, Uniform, read_histogram
from runtime.serving.prefixes import Sharing, block_of
from runtime.serving.pricing import BOUNDS, EVIDENCE_GRADES, BatchShape, StepPrice, StepPricer
from runtime.serving.report import KvUse, Report, Stats
from runtime.serving.request import Request
from runtime.serving.simulation import simulate
from runtime.serving.speculation import Speculation
from runtime.serving.tiers import CacheTier
from runtime.serving.trace import Trace
from runtime.serving.workload import (
    Workload,
    bench_serving,
    closed_loop,
    conversations,
    mooncake_trace,
    open_conversations,
    open_loop,
)

__all__ = [
    "BOUNDS",
    "EVIDENCE_GRADES",
    "Explained",
    "BatchShape",
    "CacheTier",
    "Deployment",
    "Disaggregated",
    "Fixed",
    "Histogram",
    "KvUse",
    "Lengths",
    "Lognormal",
    "Report",
    "Request",
    "ServingError",
    "Sharing",
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
    "block_of",
    "closed_loop",
    "conversations",
    "open_conversations",
    "explain",
    "mooncake_trace",
    "open_loop",
    "read_histogram",
    "simulate",
]
