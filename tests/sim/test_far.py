"""Where what devices make is sent to other processes, they choose the tokens: those of a host that has the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends.emulation.backend import SimBackend
from backends.spmd.cluster import Server
from backends.spmd.stages import Mapped
from model.checkpoint import Checkpoint
from model.split import Layout
from runtime.deployment.pool import Pool
from runtime.execution.cluster.session import clusters_of, executor_of
from runtime.execution.local.request import Prompt
from runtime.serving.executor import GREEDY, ByRank, ChosenIds, FedRow, TokenChoice
from runtime.serving.sampling import Sampling, log_probabilities
from runtime.serving.service import MOST_LOGPROBS
from tests.sim.servers import emulated, plan_of, reference

WARM = Sampling(temperature=0.9, top_p=0.95, seed=5)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Emulated devices are far; shapes of what was fetched from them."""
    shapes: list[tuple[int, ...]] = []
    fetch = Server.fetch

    def noted(self: Server, made: Any) -> np.ndarray:
        found = fetch(self, made)
        shapes.append(found.shape)
        return found

    monkeypatch.setattr(Mapped, "far", True)
    monkeypatch.setattr(Server, "fetch", noted)
    return shapes


def test_tokens_are_those_of_one_device(checkpoints: dict[str, Checkpoint], fetched: list[tuple[int, ...]]) -> None:
    """Over two stages and two ranks; greedy and drawn, and one whose bias the host alone knows."""
    checkpoint = checkpoints["gqa"]
    asked = [
        Prompt((5, 6, 7), 8, WARM),
        Prompt((9, 8), 5),
        Prompt((11, 12, 13, 14), 6, Sampling(temperature=1.3, top_k=2**40, min_p=0.02, seed=1)),
        Prompt((3,), 2, Sampling(temperature=1.0, seed=2, bias=((5, 3.0),))),
    ]
    plan = plan_of(checkpoint.config, Layout(dp=2, ep=2, pp=2))
    found = emulated(checkpoint, plan, asked).outcome.completions
    assert [each.token_ids for each in found] == [each.token_ids for each in reference(checkpoint, asked)]
    logits = [shape for shape in fetched if len(shape) == 2]
    assert 2 <= len(logits) < len(fetched) / 2  # of the last alone, or where a draw was left open


def test_log_probabilities_come_with_ids(checkpoints: dict[str, Checkpoint], fetched: list[tuple[int, ...]]) -> None:
    """By hand: rows of both ranks, of which one wants the logits, beside the same rows that all want them."""
    checkpoint = checkpoints["gqa"]
    pool: Pool = plan_of(checkpoint.config, Layout(dp=2)).pools[0]
    executor = executor_of(clusters_of(checkpoint, SimBackend(True), pool)[0], 9, pool)
    assert (executor.can.chooses, executor.can.logprobs) == ("drawn", MOST_LOGPROBS)
    how = [[TokenChoice(0.7, uniform=0.3, logprobs=2), GREEDY], [TokenChoice(logprobs=0)]]

    def rows(told: bool) -> ByRank:
        return [
            [FedRow([20 + at], 0, [1 + at], choice if told else None) for at, choice in enumerate(rank)] for rank in how
        ]

    _, plain = executor.step([[], []], rows(False), False)
    fetched.clear()
    _, chosen = executor.step([[], []], rows(True), False)
    assert all(len(shape) == 2 and shape[1] == 2 + 2 * MOST_LOGPROBS for shape in fetched)
    for rank, said, logits in zip(how, chosen, plain, strict=True):
        for choice, own, row in zip(rank, said, logits, strict=True):
            assert isinstance(own, ChosenIds) and not isinstance(row, ChosenIds)
            told, (token,) = log_probabilities(row[0]), own.ids.tolist()
            assert not choice.greedy or token == row[0].argmax()
            if choice.logprobs is None:
                assert own.logprobs == ()
                continue
            assert own.logprobs[0].logprob == pytest.approx(told[token], abs=1e-5)
            best = np.argsort(-told, kind="stable")[: choice.logprobs]
            assert [each for each, _ in own.logprobs[0].top] == best.tolist()
    mixed = [[FedRow([20], 0, [1], how[0][0]), FedRow([21], 0, [2])], [FedRow([20], 0, [1], GREEDY)]]
    _, both = executor.step([[], []], mixed, False)
    assert isinstance(both[0][0], ChosenIds) and both[0][0].ids.tolist() == chosen[0][0].ids.tolist()  # type: ignore[union-attr]
    np.testing.assert_array_equal(both[0][1], plain[0][1])  # type: ignore[arg-type]
