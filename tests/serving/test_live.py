"""The scheduler as a service: what clients are told, whatever is decided for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import CapacityError, UsageError
from runtime.serving import Deployment, Disaggregated, Request, Speculation, Workload, simulate
from runtime.serving.clock import Clock, Paced, Virtual, Wall
from runtime.serving.executor import refuse
from runtime.serving.live import LiveService, ModelLimits
from runtime.serving.sampling import Sampling, choose
from runtime.serving.service import Constraint, ConstraintBroken, Job, QueueFull, ServiceClosed, Update
from runtime.serving.worker import ModelWorker, SyntheticWorker, Worker
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer
from tests.serving.toy import VOCAB, ToyExecutor, greedy_after, logits_after

LIMITS = ModelLimits(VOCAB, 400)


class Client:
    """What came of a job."""

    def __init__(self, then: Callable[[Update], None] = lambda update: None) -> None:
        self.updates: list[Update] = []
        self.ended = threading.Event()
        self._then = then

    def __call__(self, update: Update) -> None:
        assert not self.ended.is_set(), "news after the last"
        assert update.tokens or update.finish
        self.updates.append(update)
        self._then(update)
        if update.finish:
            self.ended.set()

    def wait(self) -> Client:
        assert self.ended.wait(60), "no answer"
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for token in update.tokens]

    @property
    def last(self) -> Update:
        return self.updates[-1]


def deployment(pool_tokens: int = 2000, drafts: int = 0, engine: str = "glm5", **settings: Any) -> Deployment:
    described = plain_engine(engine, **{"page_tokens": 4, "prefix_cache": True, **settings})
    speculation = Speculation((0.5,) * drafts) if drafts else None
    return Deployment(described, LinearPricer(), pool_tokens, speculation=speculation)


def service(
    asked: Deployment | Disaggregated, executors: list[ToyExecutor], clock: Clock | None = None, max_queue: int = 1000
) -> LiveService:
    """executors: by role; each serves all replicas of it, of which there is one."""
    roles = [asked.prefill, asked.decode] if isinstance(asked, Disaggregated) else [asked]

    def hire(role: int, answers: Any, moving: Any) -> Worker:
        refuse(roles[role], executors[role], moves=len(roles) > 1)
        return ModelWorker(executors[role], answers, moving, executors[role].can.drafts)

    return LiveService(asked, hire, clock or Virtual(), LIMITS, max_queue)


def toy(asked: Deployment, drafts: int = 0) -> ToyExecutor:
    page = asked.engine.page_tokens
    return ToyExecutor(asked.pool_tokens // page, page, asked.ranks, drafts)


def simple(pool_tokens: int = 2000, drafts: int = 0, **more: Any) -> tuple[LiveService, ToyExecutor]:
    asked = deployment(pool_tokens, drafts, **more.pop("settings", {}))
    made = toy(asked, drafts)
    return service(asked, [made], **more), made


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng([seed, length]).integers(0, VOCAB, length))


def ask(served: LiveService, jobs: Sequence[Job]) -> list[Client]:
    clients = [Client() for _ in jobs]
    served.submit(jobs, clients)
    return [client.wait() for client in clients]


def assert_nothing_is_held(served: LiveService) -> None:
    assert served.drain(30)
    served.close()
    counts = served.counts()
    assert (counts.running, counts.waiting, counts.kv_share) == (0, 0, 0.0)
    for rank in served._loop.ranks:
        rank.pool.check([])
    assert not served._answers and not served._entries and not served._requests


def reference(job: Job) -> list[int]:
    """One token after another, without any scheduling."""
    known, rng = list(job.prompt_ids), np.random.default_rng([job.sampling.seed, 0])
    while len(known) < len(job.prompt_ids) + job.max_tokens:
        known.append(choose(logits_after(known), job.sampling, rng))
        if known[-1] in job.stop_ids:
            break
    return known[len(job.prompt_ids) :]


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


class OnlyMultiples(Constraint):
    """Tokens divisible by a number, so many of them; breaks at one token."""

    vocab = VOCAB

    def __init__(self, of: int, most: int = 1000, breaks_at: int | None = None):
        self.of, self.left, self.breaks_at = of, most, breaks_at

    def allowed(self) -> np.ndarray | None:
        return (np.arange(self.vocab) % self.of == 0) & (self.left > 0)

    def accept(self, token: int) -> None:
        assert token % self.of == 0 and self.left > 0
        self.left -= 1
        if self.breaks_at is not None and self.left == self.breaks_at:
            raise ConstraintBroken("too large a pattern")

    def copy(self) -> OnlyMultiples:
        return OnlyMultiples(self.of, self.left, self.breaks_at)


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


def test_a_step_that_fails_ends_its_jobs_and_no_others() -> None:
    served, executor = simple(settings={"max_running_requests": 2})
    executor.fails_at = 4
    job = Job(prompt(9), 8, Sampling())
    failed, too, after = ask(served, [job, Job(prompt(11), 8, Sampling()), Job(prompt(10), 8, Sampling())])
    for client in (failed, too):
        assert client.last.finish == "error" and client.last.error is not None
        assert "the toy broke" in client.last.error and "\n" not in client.last.error
    assert after.tokens == reference(Job(prompt(10), 8, Sampling()))
    again = ask(served, [job])[0]
    assert again.tokens == reference(job) and again.last.cached_tokens == 0  # what was cached is lost
    assert_nothing_is_held(served)


def test_a_fault_of_the_scheduler_ends_what_is_there_and_the_service_goes_on() -> None:
    served, _ = simple()
    job = Job(prompt(9), 8, Sampling())

    def end() -> Any:
        raise AssertionError("a bug")

    served._loop.groups[0][0].end = end  # type: ignore[method-assign]
    failed = ask(served, [job, job])
    assert all(client.last.finish == "error" and "a bug" in str(client.last.error) for client in failed)
    assert ask(served, [job])[0].tokens == reference(job)
    assert_nothing_is_held(served)


def test_a_service_that_is_beyond_repair_says_so_to_everybody() -> None:
    """No empty scheduler can be made in the place of one that failed: nobody is left waiting for it."""
    served, _ = simple()
    job = Job(prompt(9), 8, Sampling())

    def end() -> Any:
        raise AssertionError("a bug")

    served._loop.groups[0][0].end = end  # type: ignore[method-assign]
    served._new_loop = end  # type: ignore[method-assign]
    assert not served.counts().failed
    failed = ask(served, [job, job])
    assert all((client.last.finish, client.last.fault) == ("error", "server") for client in failed)
    served._thread.join(20)
    assert served.counts().failed and served.counts().running == served.counts().waiting == 0
    with pytest.raises(ServiceClosed):
        served.submit([job], [Client()])
    assert served.drain(0)
    served.warmed_up()
    served.close()


@pytest.mark.parametrize(
    "raised, fault", [(RuntimeError, "server"), (MemoryError, "memory"), (CapacityError, "memory")]
)
def test_a_step_that_has_no_memory_is_another_fault(raised: type[Exception], fault: str) -> None:
    served, executor = simple()
    step = executor.step

    def fails(*rows: Any) -> Any:
        executor.step = step  # type: ignore[method-assign]
        raise raised

    executor.step = fails  # type: ignore[method-assign]
    client = ask(served, [Job(prompt(9), 8, Sampling())])[0]
    assert (client.last.finish, client.last.fault) == ("error", fault) and client.last.error
    assert_nothing_is_held(served)


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_one_job_brings_along_ends_no_other(drafts: int) -> None:
    """A mask of fewer tokens than the model has, and one that is no mask."""
    served, _ = simple(drafts=drafts)

    class Short(OnlyMultiples):
        vocab = 20

    class Wrong(OnlyMultiples):
        def allowed(self) -> np.ndarray | None:
            return np.ones((2, 3))

    job = Job(prompt(9), 8, Sampling())
    fine, short, wrong = ask(
        served,
        [
            job,
            Job(prompt(9), 8, Sampling(), constraint=Short(1)),
            Job(prompt(9), 8, Sampling(), constraint=Wrong(1)),
        ],
    )
    assert fine.tokens == reference(job)
    assert len(short.tokens) == 8 and max(short.tokens) < 20
    assert wrong.last.finish == "error" and "no token could be chosen" in str(wrong.last.error)
    assert_nothing_is_held(served)


def test_a_client_that_cannot_be_told_is_dropped() -> None:
    served, _ = simple()
    job = Job(prompt(9), 8, Sampling())

    def raises(update: Update) -> None:
        raise BrokenPipeError("gone")

    other = Client()
    served.submit([job, job], [raises, other])
    assert other.wait().tokens == reference(job)
    assert_nothing_is_held(served)


def test_close_ends_what_is_left() -> None:
    asked = deployment(max_running_requests=1)
    served = service(asked, [toy(asked)], Paced(1000.0))  # steps that would take minutes
    clients = [Client(), Client()]
    served.submit([Job(prompt(9), 8, Sampling())] * 2, clients)
    assert not served.drain(0.01)
    served.close()
    assert [client.wait().last.finish for client in clients] == ["aborted", "aborted"]
    assert served.counts().kv_share == 0.0


# --- clocks


def made_up(number: int, place: int) -> int:
    return (7 * number + place) % VOCAB


def synthetic(asked: Deployment | Disaggregated, clock: Clock) -> LiveService:
    def hire(role: int, answers: Any, moving: Any) -> Worker:
        return SyntheticWorker(made_up, VOCAB, answers, moving)

    return LiveService(asked, hire, clock, LIMITS)


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
