"""The serving simulation, carried out: every step that it prices is run on emulated devices as it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.execution.cluster.timeline import Timeline
from runtime.execution.cluster.worker import Live, StepServer, Worker
from runtime.execution.local.request import Completion, OnToken
from runtime.execution.local.request import Prompt as Prompt
from runtime.execution.local.request import Sequence as Tokens
from runtime.serving import Deployment, Disaggregated, Report, Request, Workload
from runtime.serving.pricing import BatchShape
from runtime.serving.replica import Replica
from runtime.serving.simulation import Simulation

MakeServer = Callable[[int], StepServer]
"""A new server of a role: 0 is the first pool of the plan."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Completions in the order of the prompts, their times virtual, and the simulation's report."""

    completions: list[Completion]
    report: Report
    steps: int


def workload(prompts: Sequence[Prompt]) -> Workload:
    """All prompts sent at once, as the simulator sees them."""
    return Workload([Request(i, len(p.prompt_ids), p.max_tokens) for i, p in enumerate(prompts)])


def emulate(
    prompts: Sequence[Prompt],
    deployment: Deployment | Disaggregated,
    make_server: MakeServer,
    on_token: OnToken = lambda index, token: None,
    timelines: Sequence[Timeline] = (),
) -> Outcome:
    """Serves all prompts. timelines: one for each role, to record its steps on.

    Raises `CapacityError` of the simulator for a request that a pool can never hold.
    """
    live = _Simulation(prompts, deployment, make_server, on_token, timelines)
    report = live.run()
    return Outcome([live.completion(request) for request in live.workload.requests], report, live.steps)


class _Replica(Replica):
    """A replica whose steps are run by a worker, one at a time."""

    worker: Worker
    record: Callable[[list[BatchShape], float, float], None]

    def begin(self, now: float, next_event: float) -> float | None:
        ends_at = super().begin(now, next_event)
        if self.run is not None and ends_at is not None:
            plans = zip(self.ranks, self.run.plans, strict=True)
            self.record([rank.shape(plan) for rank, plan in plans], now, ends_at)
        return ends_at

    def end(self) -> tuple[list[Request], list[Request]]:
        assert self.run is not None
        self.worker.run(self.run.plans, self.ranks)
        finished, handed_off = super().end()
        for request in finished:
            self.worker.free(self.worker.live[request])
        return finished, handed_off

    def _decode_run(self, plans: Any, now: float, next_event: float) -> np.ndarray:
        return super()._decode_run(plans, now, next_event)[:1]


class _Simulation(Simulation):
    def __init__(
        self,
        prompts: Sequence[Prompt],
        deployment: Deployment | Disaggregated,
        make_server: MakeServer,
        on_token: OnToken,
        timelines: Sequence[Timeline],
    ):
        self._make_server, self._on_token, self._timelines = make_server, on_token, timelines
        self._tokens: dict[Request, Live] = {}
        self._workers: dict[int, Worker] = {}
        self.steps = 0
        super().__init__(workload(prompts), deployment, tolerance=0.0)
        for request, prompt in zip(self.workload.requests, prompts, strict=True):
            rng = np.random.default_rng([prompt.sampling.seed, request.id])
            self._tokens[request] = Live(Tokens(prompt, request.id, list(prompt.prompt_ids), rng, 0.0))

    def completion(self, request: Request) -> Completion:
        """What a request came to, on the virtual clock."""
        sequence = self._tokens[request].sequence
        sequence.submitted_s = request.sent_at
        sequence.first_token_s, sequence.last_token_s = request.first_token_at, request.finished_at
        return sequence.completion()

    def _replica(self, number: int, role: int, deployment: Deployment, seed: int, tolerance: float) -> Replica:
        made = super()._replica(number, role, deployment, seed, tolerance)
        replica = _Replica(
            number, made.ranks, made.pricer, made.meter, tolerance=tolerance, prefill_only=made.prefill_only
        )
        within = number - sum(before.replicas for before in self.roles[:role])
        replica.worker = Worker(self._make_server(role), len(made.ranks), self._tokens, self._on_token)
        self._workers[number] = replica.worker

        def record(shapes: list[BatchShape], start: float, end: float) -> None:
            self.steps += 1
            if self._timelines:
                self._timelines[role].step(within, shapes, start, end)

        replica.record = record
        return replica

    def _move(self, request: Request, source: Replica) -> None:
        self._workers[source.number].send(self._tokens[request])
        super()._move(request, source)
