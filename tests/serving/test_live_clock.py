"""The scheduler as a service on its clocks: when clients are told."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from runtime.serving import Deployment, Disaggregated, Request, Workload, simulate
from runtime.serving.clock import Paced, Virtual, Wall
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from tests.serving.live import (
    Client,
    OnlyMultiples,
    ask,
    assert_nothing_is_held,
    deployment,
    made_up,
    prompt,
    reference,
    service,
    simple,
    synthetic,
    toy,
)
from tests.serving.pricers import LinearPricer


def plain_and_split(drafts: int) -> list[Deployment | Disaggregated]:
    overheads: dict[str, Any] = {"request_seconds": 0.01, "response_seconds": 0.02, "request_delay_seconds": 0.03}
    first = deployment(700, drafts, "vllm", max_running_requests=5, **overheads)
    return [first, Disaggregated(deployment(700, engine="sglang", **overheads), first, 1e3, 1e5, 1e-3)]


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("split", [0, 1])
def test_clients_are_told_when_the_simulation_says(drafts: int, split: int) -> None:
    """The served schedule is the simulated one, step by step."""
    asked = plain_and_split(drafts)[split]
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(1, 120)), int(rng.integers(1, 60))) for _ in range(20)]
    report = simulate(Workload([Request(i, *each) for i, each in enumerate(lengths)]), asked, exact=True)
    served = synthetic(asked, Virtual())
    clients = ask(served, [Job(prompt(n, i), most, Sampling()) for i, (n, most) in enumerate(lengths)])
    for number, (client, request) in enumerate(zip(clients, report.requests, strict=True), 1):
        assert client.tokens == [made_up(number, place) for place in range(request.output_tokens)]
        told = client.updates[0].at_s, client.last.at_s
        assert told == pytest.approx((request.first_token_at, request.finished_at), rel=1e-12)
    assert served.counts().preemptions == report.preemptions
    assert_nothing_is_held(served)


def test_a_paced_clock_waits_and_tells_how_late_it_is() -> None:
    scale = 0.2
    asked = deployment()
    executor = toy(asked)
    clock = Paced(scale)
    told: list[tuple[float, float]] = []
    served = service(asked, [executor], clock)
    client = Client(lambda update: told.append((clock.now(), update.at_s)))
    served.submit([Job(prompt(9), 5, Sampling())], [client])
    assert client.wait().tokens == reference(Job(prompt(9), 5, Sampling()))
    assert all(now >= at for now, at in told)  # never before its time
    gaps = np.diff([at for _, at in told])
    assert gaps == pytest.approx(LinearPricer().fixed + 1e-4, rel=0.01)
    before = served.counts().most_late_s
    step = executor.step
    executor.step = lambda *given: (threading.Event().wait(0.3), step(*given))[1]  # type: ignore[method-assign]
    ask(served, [Job(prompt(9), 2, Sampling())])
    assert served.counts().most_late_s >= max(before, 0.29)  # a step of 2 ms took 300
    assert served.counts().late_s == 0.0  # nothing is to be done
    assert_nothing_is_held(served)


def test_clients_are_told_when_they_were_admitted() -> None:
    """One at a time: each is admitted when the one before it has ended, and every update says the same."""
    served, _ = simple(settings={"max_running_requests": 1})
    clients = ask(served, [Job(prompt(9, seed), 5, Sampling()) for seed in range(3)])
    for client in clients:
        admitted = {update.admitted_at_s for update in client.updates}
        assert len(admitted) == 1 and None not in admitted
        assert client.updates[0].admitted_at_s < client.updates[0].at_s
    for before, after in zip(clients, clients[1:], strict=False):
        assert after.updates[0].admitted_at_s == pytest.approx(before.last.at_s)
    assert_nothing_is_held(served)


def test_a_job_that_was_never_admitted_says_so() -> None:
    served, executor = simple(settings={"max_running_requests": 1})
    go, step = threading.Event(), executor.step
    executor.step = lambda *given: (go.wait(60), step(*given))[1]  # type: ignore[method-assign]
    first, second = Client(), Client()
    numbers = served.submit([Job(prompt(9), 5, Sampling()), Job(prompt(9, 1), 5, Sampling())], [first, second])
    served.abort(numbers[1])
    go.set()
    assert first.wait().last.admitted_at_s is not None
    assert second.wait().last.finish == "aborted" and second.last.admitted_at_s is None
    assert_nothing_is_held(served)


@pytest.mark.parametrize(("asked_s", "admitted_at_s"), [(0.0, 0.1), (0.04, 0.06), (0.1, 0.0), (5.0, 0.0)])
def test_what_a_front_end_took_is_part_of_what_an_emulated_one_takes(asked_s: float, admitted_at_s: float) -> None:
    class Shows(Virtual):
        def shown_s(self, wall_s: float) -> float:
            return wall_s

    served, _ = simple(clock=Shows(), settings={"request_delay_seconds": 0.1})
    client = Client()
    served.submit([Job(prompt(9), 2, Sampling())], [client], asked_s)
    assert client.wait().updates[0].admitted_at_s == pytest.approx(admitted_at_s)
    assert_nothing_is_held(served)


def test_a_warm_up_is_not_counted() -> None:
    served, executor = simple(clock=Paced(0.01))
    step = executor.step
    executor.step = lambda *given: (threading.Event().wait(0.05), step(*given))[1]  # type: ignore[method-assign]
    job = Job(prompt(9), 4, Sampling())
    ask(served, [job, job])
    assert served.counts().most_late_s > 0.04
    executor.step = step  # type: ignore[method-assign]
    served.warmed_up()
    found = served.counts()
    named = ("prompt_tokens", "generated_tokens", "prefix_queried", "prefix_hit", "steps", "preemptions", "drafted")
    assert [getattr(found, name) for name in named] == [0] * len(named) and found.most_late_s == 0
    ask(served, [job])
    found = served.counts()
    assert (found.prompt_tokens, found.generated_tokens, found.steps) == (9, 4, 4)
    assert served.counts().prefix_hit == 8  # what it computed is kept
    assert_nothing_is_held(served)


def test_made_up_tokens_keep_to_what_a_job_asks() -> None:
    served = synthetic(deployment(), Wall())
    stopped, held = ask(
        served,
        [
            Job(prompt(5), 30, Sampling(), frozenset({made_up(1, 10)}), min_tokens=3),
            Job(prompt(5), 30, Sampling(), constraint=OnlyMultiples(3, 12)),
        ],
    )
    assert stopped.tokens == [made_up(1, place) for place in range(11)] and stopped.last.finish == "stop"
    assert len(held.tokens) == 12 and all(token % 3 == 0 for token in held.tokens) and held.last.finish == "stop"
    assert_nothing_is_held(served)
