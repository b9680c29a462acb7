"""Chrome/Perfetto trace of a run: open the file in ui.perfetto.dev or chrome://tracing.

One row per replica with its steps, counters for the queue and the KV pool, and requests as async spans.
Format: "Trace Event Format", Google; times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foundation.writing import replacing
from runtime.serving.pricing import BatchShape, StepPricer
from runtime.serving.request import Request

if TYPE_CHECKING:
    from runtime.serving.rank import Rank


@dataclass
class Trace:
    """Collects a run's steps and requests. A run of decode steps is kept as one record until written."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def run(
        self,
        replica: int,
        kind: str,
        start: float,
        durations: np.ndarray,
        shape: BatchShape,
        in_service: int,
        waiting: int,
        used: float,
    ) -> None:
        """Steps of one kind, one after another from `start`."""
        self.runs.append(
            {
                "replica": replica,
                "kind": kind,
                "start": start,
                "durations": durations,
                "decode": shape.decode_count,
                "prefill_tokens": shape.prefill_tokens,
                "in_service": in_service,
                "waiting": waiting,
                "used": used,
            }
        )

    def note(self, ranks: Sequence[Rank], pricer: StepPricer, durations: np.ndarray, shape: BatchShape) -> None:
        """Who takes the steps of a run, for logs that keep it."""

    def events(self) -> Iterator[dict[str, Any]]:
        """The trace's events in order of kind; each is one JSON object."""
        for replica in sorted({run["replica"] for run in self.runs} | self.names.keys()):
            name = self.names.get(replica, f"replica {replica}")
            yield {"ph": "M", "name": "process_name", "pid": replica, "args": {"name": name}}
            if replica >= 0:
                yield {"ph": "M", "name": "thread_name", "pid": replica, "tid": 0, "args": {"name": "steps"}}
        for run in self.runs:
            yield from _step_events(run)
        for request in self.requests:
            yield from _request_events(request)

    def write(self, path: str | Path) -> None:
        """Writes the trace as one JSON file. Raises `UsageError` where it cannot be written."""
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for number, event in enumerate(self.events()):
                file.write((",\n" if number else "") + json.dumps(event))
            file.write("\n]}\n")


def _step_events(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pid, start = run["replica"], run["start"]
    args = {"decode sequences": run["decode"], "prompt tokens": run["prefill_tokens"]}
    for name, value in (
        ("waiting", run["waiting"]),
        ("in service", run["in_service"]),
        ("KV used", round(run["used"], 4)),
    ):
        yield {"ph": "C", "name": name, "pid": pid, "ts": start * 1e6, "args": {name: value}}
    for begin, duration in zip(start + np.cumsum(run["durations"]) - run["durations"], run["durations"], strict=True):
        yield {
            "ph": "X",
            "name": run["kind"],
            "cat": "step",
            "pid": pid,
            "tid": 0,
            "ts": float(begin) * 1e6,
            "dur": float(duration) * 1e6,
            "args": args,
        }


def _request_events(request: Request) -> Iterator[dict[str, Any]]:
    spans = (
        ("request", request.sent_at, request.finished_at),
        ("queue", request.queued_at, request.admitted_at),
        ("prefill", request.admitted_at, request.first_token_at),
        ("decode", request.first_token_at, request.finished_at),
    )
    args = {
        "prompt": request.prompt_tokens,
        "output": request.output_tokens,
        "preempted": request.preemptions,
    }
    for name, begin, end in spans:
        common = {"cat": "request", "id": request.id, "pid": -1, "tid": 0, "name": name}
        yield {**common, "ph": "b", "ts": begin * 1e6, "args": args}
        yield {**common, "ph": "e", "ts": end * 1e6}
