"""A replica that jumps between events, against the scheduler that plans every step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from runtime.deployment.engines import load as engine
from runtime.planning.rl.engine_prices import side_of
from runtime.planning.rl.load import RolloutTurn
from runtime.planning.rl.replica import RolloutAnswer, RolloutReplica
from runtime.serving import Deployment, Lognormal, Request
from runtime.serving.loop import Loop
from tests.serving.pricers import LinearPricer


def of_the_scheduler(name: str, answers: list[tuple[int, int]], pool: int, ranks: int) -> tuple[float, float]:
    """(when the last ends, mean end) of answers that are all asked at once, by the scheduler."""
    ends: list[float] = []
    described = dataclasses.replace(engine(name), front_end_gathers=False)
    loop = Loop(
        Deployment(described, LinearPricer(), pool, ranks=ranks),
        tolerance=1e-3,
        done=lambda request: ends.append(request.finished_at),
    )
    for number, (prompt, output) in enumerate(answers):
        loop.at(0.0, 0, loop.send, Request(number, prompt, output))
    while loop.next_at is not None:
        loop.advance()
    return max(ends), float(np.mean(ends))


def of_the_replica(name: str, answers: list[tuple[int, int]], pool: int, ranks: int) -> tuple[float, float, int]:
    replica = RolloutReplica(
        0, dataclasses.replace(side_of(engine(name), LinearPricer(), pool, ranks=ranks), reuse=False)
    )
    for number, (prompt, output) in enumerate(answers):
        answer = RolloutAnswer(number, number, (RolloutTurn(prompt, output, 0.0),), context=prompt, left=output)
        answer.place = 0, number % ranks
        replica.send(answer, number % ranks, 0.0)
    ends = []
    while replica.next_at < float("inf"):
        for answer in replica.advance(replica.next_at):
            assert sum(answer.drawn.values()) == answer.turns[0].drawn, "as many tokens as were to be drawn"
            ends.append(replica.now)
    assert len(ends) == len(answers)
    return max(ends), float(np.mean(ends)), replica.preemptions


@pytest.mark.parametrize("name", ["sglang", "vllm"])
@pytest.mark.parametrize(("pool", "ranks"), [(400_000, 1), (60_000, 1), (100_000, 4)])
def test_it_takes_what_the_scheduler_takes(name: str, pool: int, ranks: int) -> None:
    """Makespan and mean end within a few percent: ample memory, memory that has answers wait, and ranks in step."""
    rng = np.random.default_rng(3)
    drawn = Lognormal(900, 1.0, 6000).draw(rng, 96)
    answers = [(500, int(each)) for each in drawn]
    last, mean = of_the_scheduler(name, answers, pool, ranks)
    fast_last, fast_mean, _ = of_the_replica(name, answers, pool, ranks)
    print(name, pool, ranks, fast_last / last, fast_mean / mean)
    assert fast_last == pytest.approx(last, rel=0.05)
    assert fast_mean == pytest.approx(mean, rel=0.05)
