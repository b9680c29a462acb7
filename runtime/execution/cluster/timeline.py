"""What every emulated device did when, as a Chrome/Perfetto trace: open it in ui.perfetto.dev or chrome://tracing.

One process a server, one row a device. A step's time is the pricer's; within it, an op's seconds (`StepPrice.by_op`)
are shared evenly among its occurrences, in the order of the traced program. Ranks wait for each other at collectives
over `dp`; what a step takes beyond its ops is the host's. With pipeline stages the row shows one micro-batch on its
way through them, as it is priced. Format: "Trace Event Format", Google; times in microseconds.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundation.writing import replacing
from model.config import Mla, ModelConfig
from model.split import Layout
from model.weights import layer_weights, outer_weights
from runtime.pricing.load import uniform
from runtime.pricing.oplist import OpList
from runtime.pricing.pricer import GraphPricer, OpLists
from runtime.pricing.prices import ATTENTION_STAGES, PRICERS, Context, label
from runtime.serving.pricing import BatchShape

HOP = "pipeline"
DRAFTS = "mtp"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a device's program: its op, as the pricer labels it, and the axes it meets others over."""

    stage: int
    name: str
    axes: tuple[str, ...] = ()


def segments(cfg: ModelConfig, layout: Layout, programs: OpLists, pricer: GraphPricer) -> list[Segment]:
    """The priced ops of a model's program in order, neighbours of one label taken together."""
    weights = {w.name: w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)}
    weights |= {w.name: w for w in outer_weights(cfg)}
    load = uniform(cfg.moe.experts if cfg.moe else 1)
    context = Context(cfg, layout, pricer.formats, pricer.book, load, weights)

    def of(program: OpList, stage: int) -> Iterator[Segment]:
        for op in program.ops:
            if op.stage in ATTENTION_STAGES and isinstance(cfg.attention, Mla) and not op.axes:
                yield Segment(stage, "attention")
            elif op.axes or op.name in PRICERS:
                yield Segment(stage, label(op, context), op.axes)

    found = list(of(programs.embed, 0))
    for stage, layers in enumerate(layout.stage_layers(cfg.num_layers)):
        if stage:
            found.append(Segment(stage, HOP, ("pp",)))
        for layer in layers:
            found += of(programs.layers[cfg.layers[layer]], stage)
    found += of(programs.head, layout.pp - 1)
    if programs.mtp:
        found.append(Segment(layout.pp - 1, DRAFTS))
    return [new for before, new in zip([None, *found], found, strict=False) if new != before]


@dataclasses.dataclass(frozen=True)
class _Step:
    replica: int
    shapes: list[BatchShape]
    start: float
    end: float


class Timeline:
    """The steps of the servers of one pool. `first_device` numbers its devices, `process` its first server."""

    def __init__(
        self,
        layout: Layout,
        pricer: GraphPricer,
        program: Sequence[Segment],
        role: str = "serve",
        first_device: int = 0,
        process: int = 0,
    ):
        self.layout, self.pricer, self.program, self.role = layout, pricer, list(program), role
        self.first_device, self.process = first_device, process
        self.replicas = 0
        self._steps: list[_Step] = []
        self._shared = Counter(segment.name for segment in self.program)

    def step(self, replica: int, shapes: list[BatchShape], start: float, end: float) -> None:
        """A step of a server from `start` to `end`; a shape for each rank."""
        self.replicas = max(self.replicas, replica + 1)
        self._steps.append(_Step(replica, shapes, start, end))

    def events(self) -> Iterator[dict[str, Any]]:
        """The trace's events, each one JSON object."""
        layout = self.layout
        for replica in range(self.replicas):
            pid = self.process + replica
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{self.role} {replica}"}}
            for stage in range(layout.pp):
                for rank in range(layout.stage_devices):
                    dp, tp = divmod(rank, layout.tp)
                    device = self._device(replica, stage, dp, tp)
                    name = f"device {device}: stage {stage}, dp {dp}, tp {tp}"
                    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": device, "args": {"name": name}}
        for step in self._steps:
            yield from self._step_events(step)

    def _device(self, replica: int, stage: int, dp: int, tp: int) -> int:
        layout = self.layout
        within = (stage * layout.dp + dp) * layout.tp + tp
        return self.first_device + replica * layout.devices + within

    def _step_events(self, step: _Step) -> Iterator[dict[str, Any]]:
        spans = self._spans(step)
        last = max((end for rank in spans for _, end in rank), default=0.0)
        seconds = step.end - step.start
        scale = min(1.0, seconds / last) if last else 1.0
        host = seconds - last * scale
        pid, begin = self.process + step.replica, step.start + host
        for dp, (shape, rank) in enumerate(zip(step.shapes, spans, strict=True)):
            args = {"prompt tokens": shape.prefill_tokens, "decoding": shape.decode_count}
            for tp in range(self.layout.tp):
                for stage in range(self.layout.pp if host > 0 else 0):
                    yield _event("host", "host", pid, self._device(step.replica, stage, dp, tp), step.start, host, args)
                for segment, (start, end) in zip(self.program, rank, strict=True):
                    if end > start:
                        device = self._device(step.replica, segment.stage, dp, tp)
                        kind = "collective" if segment.axes else "op"
                        at = begin + start * scale
                        yield _event(segment.name, kind, pid, device, at, (end - start) * scale, args)

    def _spans(self, step: _Step) -> list[list[tuple[float, float]]]:
        """For each rank, from when to when each segment runs, in device seconds from the step's start."""
        by_op = [self.pricer.price(shape).by_op if shape.tokens else {} for shape in step.shapes]
        now = np.zeros(len(by_op))
        spans: list[list[tuple[float, float]]] = [[] for _ in by_op]
        for segment in self.program:
            took = np.array([prices.get(segment.name, 0.0) for prices in by_op]) / self._shared[segment.name]
            if "dp" in segment.axes:
                now[:], took[:] = now.max(), took.max()
            for rank, span in enumerate(spans):
                span.append((float(now[rank]), float(now[rank] + took[rank])))
            now += took
        return spans


def _event(
    name: str, category: str, pid: int, tid: int, start: float, seconds: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": pid,
        "tid": tid,
        "ts": start * 1e6,
        "dur": seconds * 1e6,
        "args": args,
    }


def write(path: str | Path, timelines: Sequence[Timeline]) -> None:
    """Writes the pools' timelines as one JSON file, whole or not at all. Raises `UsageError`."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        lines = (json.dumps(event) for timeline in timelines for event in timeline.events())
        for number, line in enumerate(lines):
            file.write((",\n" if number else "") + line)
        file.write("\n]}\n")
