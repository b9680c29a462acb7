"""A plan's schedule, carried out: every step that the serving simulation prices is run on the plan's devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from runtime.execution.cluster.timeline import Timeline
from runtime.execution.local.request import Completion, OnToken, Prompt, answers_of, completion_of, requests_of
from runtime.serving import Deployment, Disaggregated, Report, Request, Workload
from runtime.serving.answer import Answer
from runtime.serving.executor import StepExecutor, refuse
from runtime.serving.pricing import BatchShape
from runtime.serving.simulation import Simulation
from runtime.serving.worker import ModelWorker, Worker

MakeExecutor = Callable[[int], StepExecutor]
"""What carries out the steps of a new server of a role: 0 is the first pool of the plan."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Completions in the order of the prompts, their times virtual, and the simulation's report."""

    completions: list[Completion]
    report: Report
    steps: int


def workload(prompts: Sequence[Prompt], page_tokens: int | None = None) -> Workload:
    """All prompts sent at once, as the simulator sees them. page_tokens: of pages that may be reused."""
    return Workload(requests_of(prompts, page_tokens), block_tokens=page_tokens or 512)


def emulate(
    prompts: Sequence[Prompt],
    deployment: Deployment | Disaggregated,
    make_executor: MakeExecutor,
    on_token: OnToken = lambda index, token: None,
    timelines: Sequence[Timeline] = (),
    drafts: int = 0,
) -> Outcome:
    """Serves all prompts. timelines: one for each role, to record its steps on. drafts: guessed a step, by servers that
    only prefill, too: their guesses and the MTP layer's rows go along with a cache.

    Raises `CapacityError` of the simulator for a request that a pool can never hold.
    """
    roles = [deployment.prefill, deployment.decode] if isinstance(deployment, Disaggregated) else [deployment]
    reuse = any(role.engine.prefix_cache for role in roles)
    answers: dict[Request, Answer] = {}
    moving: dict[Request, Any] = {}
    steps = 0

    def worker(role: int) -> Worker:
        executor = make_executor(role)
        refuse(roles[role], executor, moves=len(roles) > 1)
        return ModelWorker(executor, answers, moving, drafts, on_token)

    def observe(role: int, within: int, shapes: list[BatchShape], start: float, end: float) -> None:
        nonlocal steps
        steps += 1
        if timelines:
            timelines[role].step(within, shapes, start, end)

    load = workload(prompts, roles[0].engine.page_tokens if reuse else None)
    simulation = Simulation(load, deployment, tolerance=0.0, make_worker=worker, observe=observe)
    requests = simulation.workload.requests
    answers.update(zip(requests, answers_of(prompts), strict=True))
    report = simulation.run()
    return Outcome([completion_of(answers[request], request) for request in requests], report, steps)
