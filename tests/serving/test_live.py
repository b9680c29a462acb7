"""The scheduler as a service: what clients are told, whatever is decided for them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import CapacityError, UsageError
from runtime.serving import Disaggregated
from runtime.serving.sampling import Sampling
from runtime.serving.service import Constraint, Job, QueueFull, ServiceClosed, Update
from tests.serving.live import (
    Client,
    OnlyMultiples,
    ask,
    assert_nothing_is_held,
    deployment,
    prompt,
    reference,
    service,
    simple,
    toy,
)
from tests.serving.toy import VOCAB, greedy_after, logits_after


@st.composite
def jobs(draw: st.DrawFn) -> list[Job]:
    """Some begin alike, some go on with what another answered, some are sampled."""
    made: list[Job] = []
    for number in range(draw(st.integers(1, 8))):
        shared = draw(st.sampled_from([0, 5, 16, 40]))
        ids = prompt(shared, 99) + prompt(draw(st.integers(1, 30)), draw(st.integers(0, 3)))
        if made and draw(st.booleans()):
            ids = made[0].prompt_ids + tuple(greedy_after(made[0].prompt_ids, 9)) + prompt(3, number)
        warm = Sampling(temperature=draw(st.sampled_from([0.0, 0.0, 0.8])), seed=draw(st.integers(0, 2)))
        stops = frozenset(draw(st.sets(st.integers(0, VOCAB - 1), max_size=2)))
        made.append(Job(ids, draw(st.integers(1, 25)), warm, stops))
    return made


SETTINGS = st.fixed_dictionaries(
    {
        "engine": st.sampled_from(["glm5", "vllm", "sglang", "trtllm"]),
        "chunked_prefill_tokens": st.sampled_from([3, 16, 64]),
        "max_step_tokens": st.sampled_from([70, 200]),
        "max_running_requests": st.sampled_from([1, 3, 8]),
        "preempted_go": st.sampled_from(["front", "back"]),
        "preemption_victim": st.sampled_from(["last", "least-output"]),
        "prefix_cache": st.booleans(),
        "overlap_scheduling": st.booleans(),
    }
)


@settings(max_examples=40)
@given(jobs(), SETTINGS, st.sampled_from([160, 240, 2000]), st.sampled_from([0, 0, 1, 3]))
def test_tokens_are_those_of_each_alone(asked: list[Job], given_: dict[str, Any], pool: int, drafts: int) -> None:
    """Whatever the policy, the chunks, the pages there are, what is found in the cache, and the drafts."""
    if drafts:  # drafts change what is drawn, though not how it is distributed
        asked = [Job(each.prompt_ids, each.max_tokens, Sampling(), each.stop_ids) for each in asked]
    served, executor = simple(pool, drafts, settings=given_)
    clients = ask(served, asked)
    assert [client.tokens for client in clients] == [reference(job) for job in asked]
    for client, job in zip(clients, asked, strict=True):
        assert client.last.finish == ("stop" if client.tokens[-1] in job.stop_ids else "length")
    counts = served.counts()
    assert counts.generated_tokens == sum(len(client.tokens) for client in clients)
    assert counts.prompt_tokens == sum(len(job.prompt_ids) for job in asked)
    assert counts.prefix_hit == sum(client.last.cached_tokens for client in clients)
    if not counts.preemptions and not drafts:  # nothing is computed twice, and nothing that was found
        fed = counts.prompt_tokens - counts.prefix_hit + counts.generated_tokens - len(asked)
        assert executor.computed == fed
    assert_nothing_is_held(served)


@settings(max_examples=15)
@given(jobs(), st.sampled_from([0, 1]), st.booleans())
def test_caches_that_move_give_the_same_tokens(asked: list[Job], ranks: int, short: bool) -> None:
    first, second = deployment(400), deployment(200 if short else 1000, engine="vllm")
    served = service(Disaggregated(first, second, 10.0, 1e6), [toy(first), toy(second)])
    clients = ask(served, asked)
    assert [client.tokens for client in clients] == [reference(job) for job in asked]
    assert_nothing_is_held(served)


@settings(max_examples=15)
@given(jobs(), st.sets(st.integers(0, 7)), st.integers(1, 6), st.sampled_from([160, 2000]))
def test_aborted_jobs_leave_the_others_as_they_are(asked: list[Job], aborted: set[int], after: int, pool: int) -> None:
    """Each is aborted from within its own news, after some of them."""
    served, _ = simple(pool, settings={"engine": "vllm", "max_step_tokens": 64})
    numbers: list[int] = []

    def client(index: int) -> Client:
        def then(update: Update) -> None:
            if index in aborted and len(made[index].updates) == after and not update.finish:
                served.abort(numbers[index])

        return Client(then)

    made = [client(index) for index in range(len(asked))]
    numbers += served.submit(asked, made)
    for index, each in enumerate(made):
        each.wait()
        expected = reference(asked[index])
        if each.last.finish == "aborted":
            assert index in aborted and each.tokens == expected[: len(each.tokens)]
        else:
            assert each.tokens == expected
    served.abort(10**9)
    served.abort(numbers[0])
    assert_nothing_is_held(served)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    served, executor = simple()
    first = ask(served, [Job(prompt(50), 10, Sampling())])[0]
    before = executor.computed
    again, longer = prompt(50), (*prompt(50), *first.tokens, 1, 2, 3)
    assert ask(served, [Job(again, 1, Sampling())])[0].last.cached_tokens == 48
    assert executor.computed - before == 2
    assert ask(served, [Job(longer, 1, Sampling())])[0].last.cached_tokens == 56  # the answer is kept, too
    other = ask(served, [Job((5, *again[1:]), 1, Sampling())])[0]
    assert other.last.cached_tokens == 0
    counts = served.counts()
    assert (counts.prefix_queried, counts.prefix_hit) == (50 + 50 + 63 + 50, 48 + 56)
    assert_nothing_is_held(served)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constraints_hold_at_every_position(drafts: int, temperature: float) -> None:
    served, _ = simple(drafts=drafts)
    warm = Sampling(temperature, seed=3)

    def job(constraint: Constraint | None, most: int = 30) -> Job:
        return Job(prompt(20, 1), most, warm, constraint=constraint)

    class Foreign(OnlyMultiples):
        def allowed(self) -> np.ndarray | None:
            raise KeyError("a bug in somebody's grammar")

    free, held, short, broken, nothing, foreign = ask(
        served,
        [
            job(None), job(OnlyMultiples(3)), job(OnlyMultiples(5, 7)), job(OnlyMultiples(3, 10, breaks_at=6)),
            job(OnlyMultiples(3, 0)), job(Foreign(3)),
        ],
    )  # fmt: skip
    assert len(free.tokens) == 30 and free.last.finish == "length"
    assert len(held.tokens) == 30 and all(token % 3 == 0 for token in held.tokens)
    assert len(short.tokens) == 7 and short.last.finish == "stop"
    assert len(broken.tokens) == 4 and (broken.last.finish, broken.last.error) == ("error", "too large a pattern")
    assert (broken.last.fault, foreign.last.fault) == ("constraint", "server")
    assert nothing.tokens == [] and nothing.last.finish == "stop"
    assert foreign.last.finish == "error" and foreign.last.error and "somebody" in foreign.last.error
    if not temperature:
        assert free.tokens == reference(job(None))
    assert_nothing_is_held(served)


@pytest.mark.parametrize("drafts", [0, 2])
def test_biases_least_lengths_and_log_probabilities(drafts: int) -> None:
    served, _ = simple(drafts=drafts)
    ids = prompt(15)
    plain = reference(Job(ids, 12, Sampling()))
    biased, least, told = ask(
        served,
        [
            Job(ids, 12, Sampling(bias=((7, 100.0),))),
            Job(ids, 12, Sampling(), frozenset({plain[1]}), min_tokens=5),
            Job(ids, 12, Sampling(), logprobs=3),
        ],
    )
    assert biased.tokens == [7] * 12
    assert plain[1] not in least.tokens[:4] and len(least.tokens) >= 5
    assert told.tokens == plain
    found = [each for update in told.updates for each in update.logprobs]
    assert len(found) == 12
    for place, (token, each) in enumerate(zip(plain, found, strict=True)):
        row = logits_after([*ids, *plain[:place]]).astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        assert each.logprob == pytest.approx(expected[token]) and each.top[0] == (token, pytest.approx(expected[token]))
        assert [top for top, _ in each.top] == list(np.argsort(-expected)[:3])
    assert_nothing_is_held(served)


def test_a_full_queue_refuses_all_or_none() -> None:
    held = threading.Event()
    served, _ = simple(settings={"max_running_requests": 2}, max_queue=3)

    def block(update: Update) -> None:
        held.wait(60)

    blocking = Client(block)
    job = Job(prompt(5), 3, Sampling())
    served.submit([job], [blocking])
    waiting = [Client() for _ in range(3)]
    served.submit([job] * 3, waiting)
    with pytest.raises(QueueFull, match="2 jobs wait, and 3 may|jobs wait"):
        served.submit([job] * 2, [Client(), Client()])
    last = Client()
    served.submit([job], [last])
    held.set()
    for client in (blocking, *waiting, last):
        assert client.wait().tokens == reference(job)
    assert_nothing_is_held(served)
    with pytest.raises(ServiceClosed, match="shutting down"):
        served.submit([job], [Client()])
    served.close()


def test_what_can_never_be_served_is_refused_at_once() -> None:
    served, _ = simple(100)
    for job, error, says in (
        (Job((), 3, Sampling()), UsageError, "no tokens"),
        (Job((1,), 0, Sampling()), UsageError, "max-tokens"),
        (Job((1, VOCAB), 3, Sampling()), UsageError, f"token id {VOCAB} is out of range"),
        (Job((1,), 3, Sampling(bias=((-1, 1.0),))), UsageError, "token id -1 is out of range"),
        (Job((1,) * 399, 3, Sampling()), UsageError, "400 positions"),
        (Job((1,) * 90, 20, Sampling()), CapacityError, "pool holds 100"),
    ):
        with pytest.raises(error, match=says) as caught:
            served.submit([Job((1,), 1, Sampling()), job], [Client(), Client()])
        assert "\n" not in str(caught.value)
    assert served.counts().waiting == 0
    assert_nothing_is_held(served)
