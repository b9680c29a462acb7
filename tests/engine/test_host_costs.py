"""What an engine's description says of its own programs and host is what it does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.deployment.engines import load
from runtime.execution.batches import gear
from runtime.execution.local.engine import EngineConfig
from runtime.serving import Deployment
from runtime.serving.loop import Loop
from runtime.serving.pricing import IDLE_S, WARM_S, BatchShape, StepPrice
from runtime.serving.request import Request
from tests.serving.helpers import plain_engine


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_prompts_are_padded_as_the_executor_pads_them(pieces: list[int]) -> None:
    config = EngineConfig()
    computed = gear(len(pieces), config.least_batch) * gear(max(pieces), config.least_chunk)
    assert sum(pieces) + load("glm5").prompt_padding(pieces) == computed


@given(st.integers(1, 16))
def test_answers_are_padded_as_the_executor_pads_them(rows: int) -> None:
    assert load("glm5").decode_rows(rows) == (gear(rows, EngineConfig().least_batch), True)


def test_others_do_not_pad_prompts() -> None:
    assert all(not load(name).prompt_padding([3, 17]) for name in ("sglang", "vllm", "trtllm", "vllm-ascend"))


class PerToken:
    """A second, or so many, for each token computed, padding included."""

    def __init__(self, token_s: float = 1.0):
        self.token_s = token_s

    def price(self, shape: BatchShape) -> StepPrice:
        return StepPrice(self.seconds(shape))

    def seconds(self, shape: BatchShape) -> float:
        return self.token_s * (shape.prefill_tokens + shape.padding + shape.decode_rows)


@pytest.mark.parametrize("together", [1, 3, 4])
def test_a_steps_time_is_its_device_its_host_and_its_rows(together: int) -> None:
    """By hand: prompts of 17 tokens are rows of 32, three answers are four rows; the host adds to every step."""
    engine = plain_engine(graph_step_host_seconds=0.5, eager_step_host_seconds=0.25, row_host_seconds=0.125,
                          request_host_seconds=2.0)  # fmt: skip
    loop = Loop(Deployment(engine, PerToken(), 10_000))
    requests = [Request(number, 17, 3) for number in range(together)]
    for request in requests:
        loop.send(request)
    while loop.next_at is not None:
        loop.advance()
    rows = gear(together)
    first = rows * 32 + 0.25 + together * (0.125 + 2.0)
    step = rows + 0.5 + together * 0.125
    for request in requests:
        assert math.isclose(request.first_token_at, first) and math.isclose(request.finished_at, first + 2 * step)


@pytest.mark.parametrize("least", [0.25, 3.0])
def test_a_step_launched_ahead_takes_the_device_or_the_host(least: float) -> None:
    """By hand. The first step of answers waits for the host, behind a prompt and where a smaller program runs; others
    take what is longer. A prompt waits for the step that was launched before it came, and which it makes useless."""
    engine = plain_engine(graph_step_host_seconds=0.5, eager_step_host_seconds=0.25, row_host_seconds=0.125,
                          ahead_step_seconds=least, prompt_row_tokens=0)  # fmt: skip
    prompt, waits, follows = 8 + 0.25 + 0.125, {1: 1.625, 2: 2.75}, {n: max(n, least + n * 0.125) for n in (1, 2)}
    loop = Loop(Deployment(engine, PerToken(), 10_000))
    first, second = Request(0, 8, 6), Request(1, 8, 4)
    loop.send(first)
    joins = prompt + waits[1] + follows[1]
    loop.at(joins - 0.5, 0, loop.send, second)  # within that step
    while loop.next_at is not None:
        loop.advance()
    assert second.first_token_at == pytest.approx(joins + (1 - 0.5) + prompt)
    assert first.finished_at == second.finished_at == pytest.approx(second.first_token_at + waits[2] + 2 * follows[2])
    loop = Loop(Deployment(engine, PerToken(), 10_000))
    first, second = Request(0, 8, 3), Request(1, 8, 5)
    for request in (first, second):
        loop.send(request)
    while loop.next_at is not None:
        loop.advance()
    assert first.finished_at == pytest.approx(16 + 0.25 + 0.25 + waits[2] + follows[2])
    assert second.finished_at == pytest.approx(first.finished_at + waits[1] + follows[1])


def test_nothing_is_lost_where_a_request_waits_for_the_end_of_another() -> None:
    """A second one that is refused does not keep steps from being launched ahead, but the last before its turn."""
    engine = plain_engine(
        ahead_step_seconds=0.25, prompt_row_tokens=0, graph_step_host_seconds=0.5, max_running_requests=1
    )
    loop = Loop(Deployment(engine, PerToken(), 10_000))
    first, second = Request(0, 8, 5), Request(1, 8, 1)
    for request in (first, second):
        loop.send(request)
    while loop.next_at is not None:
        loop.advance()
    assert first.finished_at == pytest.approx(8 + 1.5 + 3 * 1.0)
    assert second.finished_at == pytest.approx(first.finished_at + 8)


def test_a_step_that_finds_the_machine_at_rest_takes_longer() -> None:
    """The first of all does, and one behind a pause; not one that follows another soon."""
    loop = Loop(Deployment(plain_engine(idle_host_seconds=0.5), PerToken(), 10_000))
    found, at = [], 0.0
    for pause, taken in ((0.0, 16.5), (IDLE_S / 2, 16.0), (IDLE_S * 2, 16.5), (60.0, 16.5), (0.0, 16.0)):
        at += pause
        found.append((Request(len(found), 16, 1), at + taken))  # an answer of one token, over as its step is
        loop.at(at, 0, loop.send, found[-1][0])
        at += taken
    while loop.next_at is not None:
        loop.advance()
    assert [request.finished_at for request, _ in found] == pytest.approx([ended for _, ended in found])


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_after_a_rest_take_less_and_less_longer(overlap: bool) -> None:
    """By hand, step for step; whether they are simulated one by one or many at once."""
    token_s, warming_s = 0.005, 0.004
    engine = plain_engine(prompt_row_tokens=0, warming_host_seconds=warming_s, overlap_scheduling=overlap)
    loop = Loop(Deployment(engine, PerToken(token_s), 10_000))
    found: list[tuple[Request, float]] = []
    for number in range(2):
        request = Request(number, 8, 64)
        woke = at = 100.0 * (1 + number)
        loop.at(at, 0, loop.send, request)
        at += 8 * token_s
        for _ in range(63):
            at += token_s + warming_s * max(0.0, 1 - (at - woke) / WARM_S)
        assert at - woke > 71 * token_s + 5 * warming_s  # it says something
        found.append((request, at))
    while loop.next_at is not None:
        loop.advance()
    for request, ended in found:
        assert request.finished_at == pytest.approx(ended)


def test_padding_is_priced_with_the_tokens() -> None:
    shape = BatchShape(prefill_chunks=[(17, 0)], padding=15)
    assert (shape.tokens, shape.rows) == (17, 1)
    assert BatchShape(np.full(3, 9), prefill_chunks=[(1, 0)]).rows == 4
