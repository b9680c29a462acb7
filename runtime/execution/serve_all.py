"""A list of prompts through the scheduler, by the wall clock, on the caller's thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from runtime.deployment.engines import Engine
from runtime.execution.local.request import (
    Completion,
    OnToken,
    Prompt,
    answers_of,
    completion_of,
    requests_of,
)
from runtime.serving import Deployment, Request
from runtime.serving.clock import Wall
from runtime.serving.deployment import check_capacity
from runtime.serving.executor import StepExecutor, refuse
from runtime.serving.loop import Loop
from runtime.serving.worker import ModelWorker


def without_times(engine: Engine) -> Engine:
    """An engine's policy, where steps and requests take what they take."""
    return dataclasses.replace(
        engine,
        overlap_scheduling=False,
        request_seconds=0.0,
        tokenize_seconds_per_token=0.0,
        request_delay_seconds=0.0,
        response_seconds=0.0,
    )


def serve_all(
    prompts: Sequence[Prompt],
    deployment: Deployment,
    executor: StepExecutor,
    paused_s: Callable[[], float],
    on_token: OnToken = lambda number, token: None,
    observe: Callable[..., None] | None = None,
) -> tuple[list[Completion], list[Request], Loop]:
    """Completions in the order of the prompts, the requests behind them, and the loop that has ended.

    paused_s: seconds that do not count, so far. observe: as of `Loop`. Raises `UsageError` for what the executor cannot
    do, and `CapacityError` for a prompt that its pages can never hold.
    """
    refuse(deployment, executor)
    engine, speculation = deployment.engine, deployment.speculation
    reuse = engine.prefix_cache and executor.can.reuse
    requests = requests_of(prompts, engine.page_tokens if reuse else None)
    answers = dict(zip(requests, answers_of(prompts), strict=True))
    drafts = speculation.query_tokens - 1 if speculation else 0
    loop = Loop(
        deployment,
        block_tokens=engine.page_tokens,
        reuse=reuse,
        clock=Wall(paused_s),
        make_worker=lambda role: ModelWorker(executor, answers, {}, drafts, on_token),
        observe=observe,
    )
    check_capacity(requests, loop.roles, loop.ranks[:1])
    for request in requests:
        loop.send(request)
    while loop.next_at is not None:
        loop.advance()
    return [completion_of(answers[request], request) for request in requests], requests, loop
