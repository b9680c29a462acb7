"""A small service over the toy model, its clients, and what they must hear."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.serving import Deployment, Disaggregated, Speculation
from runtime.serving.clock import Clock, Virtual
from runtime.serving.executor import refuse
from runtime.serving.live import LiveService, ModelLimits
from runtime.serving.sampling import choose
from runtime.serving.service import Constraint, ConstraintBroken, Job, Update
from runtime.serving.worker import ModelWorker, SyntheticWorker, Worker
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer
from tests.serving.toy import VOCAB, ToyExecutor, logits_after

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
    assert served.drain(60)
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


def made_up(number: int, place: int) -> int:
    return (7 * number + place) % VOCAB


def synthetic(asked: Deployment | Disaggregated, clock: Clock) -> LiveService:
    def hire(role: int, answers: Any, moving: Any) -> Worker:
        return SyntheticWorker(made_up, VOCAB, answers, moving)

    return LiveService(asked, hire, clock, LIMITS)
