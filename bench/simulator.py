"""How fast the serving simulator is, and whether it still says the same.

    python -m bench.simulator [--rounds N] [--json]

CPU seconds of a few loads, medians over rounds, each with a digest of its report: two commits that print the same
digests schedule the same. Run one after the other, or in turns, they tell what a change costs. Steps are priced by a
straight line, so that what is timed is the scheduler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from runtime.deployment.engines import load
from runtime.serving import (
    BatchShape,
    Deployment,
    Disaggregated,
    Report,
    Speculation,
    StepPrice,
    Uniform,
    Workload,
    bench_serving,
    closed_loop,
    open_loop,
    simulate,
)


class Line:
    """Seconds: fixed, a row, a prompt token, a token of context."""

    def seconds(self, shape: BatchShape) -> float:
        rows = shape.decode_rows * shape.query_tokens * 1e-4
        return 0.01 + rows + shape.prefill_tokens * 25e-6 + float(shape.decode_contexts.sum()) * 2e-9

    def price(self, shape: BatchShape) -> StepPrice:
        seconds = self.seconds(shape)
        return StepPrice(seconds, {"step": seconds}, {"memory": seconds}, False, "fitted")


def deployment(engine: str, tokens: int = 500_000, **more: object) -> Deployment:
    return Deployment(load(engine), Line(), tokens, 8, **more)  # type: ignore[arg-type]


def sharing(requests: int) -> Workload:
    """A closed loop whose prompts begin alike."""
    made = closed_loop(32, requests, Uniform(8192, 0.5), Uniform(256, 0.5), seed=3)
    for request in made.requests:
        blocks = request.prompt_tokens // made.block_tokens
        request.prefix_hashes = tuple(1000 * (request.id % 8) + block for block in range(blocks))
    return made


def apart() -> Disaggregated:
    return Disaggregated(deployment("sglang", replicas=2), deployment("sglang", ranks=4), 1e5, 1e11, 1e-5)


CASES: dict[str, Callable[[], Report]] = {
    "sglang, closed loop": lambda: simulate(bench_serving(128, 8192, 1024), deployment("sglang", ranks=4)),
    "vllm, closed loop, pages short": lambda: simulate(bench_serving(64, 2048, 512), deployment("vllm", 60_000)),
    "vllm, open loop": lambda: simulate(
        open_loop(20, 2000, Uniform(1000, 0.3), Uniform(200, 0.3)), deployment("vllm", replicas=2)
    ),
    "vllm, drafts": lambda: simulate(
        bench_serving(32, 1024, 256), replace(deployment("vllm"), speculation=Speculation((0.8, 0.6)))
    ),
    "sglang, prefix cache": lambda: simulate(sharing(1000), deployment("sglang", 200_000)),
    "disaggregated": lambda: simulate(bench_serving(64, 4096, 512), apart()),
}


def digest(report: Report) -> str:
    """Of every figure, and every request's times."""
    requests = [(r.id, r.first_token_at, r.finished_at, r.cached, r.preemptions) for r in report.requests]
    return hashlib.sha256(repr((report.to_json(), requests)).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for name, run in CASES.items():
        seconds, said = [], set()
        for _ in range(arguments.rounds):
            begin = time.process_time()
            said.add(digest(run()))
            seconds.append(time.process_time() - begin)
        found[name] = {"cpu_s": statistics.median(seconds), "digest": "/".join(sorted(said))}
        if not arguments.json:
            print(f"{name:32} {found[name]['cpu_s']:7.3f} s  {found[name]['digest']}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
