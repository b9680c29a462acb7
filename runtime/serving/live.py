"""The scheduler as a service: a thread that takes jobs from other threads, and tells their clients what comes of them.

The thread lets one event of the loop happen after another, each when its clock says so; between two it takes what has
been submitted or aborted meanwhile. A job enters at the time that it was submitted, also where the thread was busy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from foundation.errors import CapacityError, first_line
from runtime.serving.answer import Answer, page_hashes
from runtime.serving.clock import Clock
from runtime.serving.deployment import Deployment, Disaggregated, check_capacity
from runtime.serving.loop import Loop
from runtime.serving.request import Request, check_asked, check_ids, check_positions
from runtime.serving.service import Counts, Deliver, Job, JobFault, QueueFull, ServiceClosed, Update
from runtime.serving.worker import News, Worker

LOG = logging.getLogger(__name__)

Hire = Callable[[int, dict[Request, Answer], dict[Request, Any]], Worker]
"""Makes the worker of a new replica of a role, which finds answers and moving caches in these."""


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """What any request must keep to: token ids below `vocab`, prompt and answer within `positions`."""

    vocab: int
    positions: int


@dataclasses.dataclass(slots=True)
class _Entry:
    number: int
    answer: Answer
    request: Request
    deliver: Deliver
    submitted_at: float
    asked_before: float
    counted: bool = False


class LiveService:
    """A `Service`. max_queue: jobs that may wait beyond those that a free slot is there for."""

    def __init__(
        self,
        deployment: Deployment | Disaggregated,
        hire: Hire,
        clock: Clock,
        limits: ModelLimits,
        max_queue: int = 1024,
        name: str = "glm5-service",
    ):
        self.deployment, self.limits = deployment, limits
        self._hire, self._clock, self._max_queue = hire, clock, max_queue
        self._answers: dict[Request, Answer] = {}
        self._entries: dict[int, _Entry] = {}
        self._requests: dict[Request, _Entry] = {}
        self._loop = self._new_loop()
        ranks = [rank for replica in self._loop.groups[-1] for rank in replica.ranks]
        self._slots = sum(rank.engine.max_running_requests for rank in ranks)
        self._condition = threading.Condition()
        self._inbox: list[_Entry] = []
        self._aborts: list[int] = []
        self._present = 0
        self._next_number = 1
        self._accepting, self._closed = True, False
        self._totals = {"prompt_tokens": 0, "generated_tokens": 0, "prefix_queried": 0, "prefix_hit": 0, "steps": 0}
        self._before = {"preemptions": 0, "drafted": 0, "accepted": 0}
        self._late_s = self._most_late_s = 0.0
        self._recount = False
        self._counts = self._count()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # --- from any thread

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        check_asked(prompt_tokens, max_tokens)
        check_positions(prompt_tokens, max_tokens, self.limits.positions)
        firsts = [group[0].ranks[0] for group in self._loop.groups]
        check_capacity([Request(0, prompt_tokens, max_tokens)], self._loop.roles, firsts)

    def submit(self, jobs: Sequence[Job], deliver: Sequence[Deliver], asked_s: float = 0.0) -> list[int]:
        now, before = self._clock.now(), self._clock.shown_s(asked_s)
        for job in jobs:
            self.check(len(job.prompt_ids), job.max_tokens)
            named = (*job.prompt_ids, *job.stop_ids, *(token for token, _ in job.sampling.bias))
            check_ids(named, self.limits.vocab)
        self._room(len(jobs))  # before anything is hashed
        made = [self._entry(job, each, now, before) for job, each in zip(jobs, deliver, strict=True)]
        with self._condition:
            self._room(len(jobs))
            for entry in made:
                entry.number = entry.answer.number = entry.request.id = self._next_number
                self._next_number += 1
            self._inbox += made
            self._present += len(made)
            self._condition.notify_all()
        return [entry.number for entry in made]

    def abort(self, job: int) -> None:
        with self._condition:
            self._aborts.append(job)
            self._condition.notify_all()

    def counts(self) -> Counts:
        found, present = self._counts, self._present
        return dataclasses.replace(found, waiting=max(0, present - found.running))

    def warmed_up(self) -> None:
        with self._condition:
            self._recount = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._closed or not self._recount)

    def drain(self, seconds: float) -> bool:
        with self._condition:
            self._accepting = False
            return self._condition.wait_for(lambda: self._present == 0, seconds)

    def close(self) -> None:
        with self._condition:
            self._accepting, self._closed = False, True
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _room(self, jobs: int) -> None:
        if not self._accepting:
            raise ServiceClosed("the service is shutting down and takes no more jobs")
        waiting = max(0, self._present - self._slots)
        if self._present + jobs > self._slots + self._max_queue:
            raise QueueFull(f"{waiting} jobs wait, and {self._max_queue} may (--max-queue): try again later")

    def _entry(self, job: Job, deliver: Deliver, now: float, before: float) -> _Entry:
        engine = self._loop.roles[0].engine
        hashes = page_hashes(job.prompt_ids, engine.page_tokens) if self._reuse else ()
        request = Request(0, len(job.prompt_ids), job.max_tokens, hashes)
        return _Entry(0, Answer(job, 0), request, deliver, now, before)

    # --- on the service's own

    @property
    def _reuse(self) -> bool:
        return any(role.engine.prefix_cache for role in self._loop.roles)

    def _new_loop(self) -> Loop:
        moving: dict[Request, Any] = {}
        first = self.deployment.prefill if isinstance(self.deployment, Disaggregated) else self.deployment
        return Loop(
            self.deployment,
            block_tokens=first.engine.page_tokens,
            reuse=True,
            clock=self._clock,
            make_worker=lambda role: self._hire(role, self._answers, moving),
            done=self._done,
            tell=self._tell,
            failed=self._failed,
            observe=self._observe,
        )

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._give_up(error)

    def _serve(self) -> None:
        while True:
            with self._condition:
                while not (self._inbox or self._aborts or self._closed or self._is_due()):
                    if self._recount and self._loop.next_at is None:
                        self._count_from_here()
                    following = self._loop.next_at
                    self._condition.wait(None if following is None else self._clock.wait_s(following))
                inbox, self._inbox = self._inbox, []
                aborts, self._aborts = self._aborts, []
                closed = self._closed
            for entry in inbox:
                self._entries[entry.number] = self._requests[entry.request] = entry
                self._answers[entry.request] = entry.answer
                # a clock that has been set back meanwhile, for what does not count, may not have come so far
                at = max(self._loop.now, min(entry.submitted_at, self._clock.now()))
                self._loop.at(at, 0, self._loop.send, entry.request, at - entry.asked_before)
            try:
                for number in [*self._entries] if closed else aborts:
                    if entry := self._entries.get(number):
                        self._end(entry, Update(cached_tokens=entry.request.cached, finish="aborted"))
                        self._loop.drop(entry.request)
                while closed and self._loop.next_at is not None:  # steps that are out give back what they hold
                    self._loop.advance()
                if self._is_due():
                    self._measure_lateness()
                    self._loop.advance()
            except Exception as error:
                self._begin_anew(error)
            self._counts = self._count()
            if closed:
                return

    def _is_due(self) -> bool:
        following = self._loop.next_at
        return following is not None and self._clock.wait_s(following) <= 0

    def _measure_lateness(self) -> None:
        assert self._loop.next_at is not None
        self._late_s = max(0.0, -self._clock.wait_s(self._loop.next_at))
        self._most_late_s = max(self._most_late_s, self._late_s)

    def _tell(self, news: News) -> None:
        for answer, update in news:
            entry = self._entries.get(answer.number)
            if entry is None:  # aborted meanwhile
                continue
            if not entry.counted:
                entry.counted = True
                self._totals["prompt_tokens"] += entry.request.prompt_tokens
                self._totals["prefix_queried"] += entry.request.prompt_tokens if self._reuse else 0
                self._totals["prefix_hit"] += update.cached_tokens
            self._totals["generated_tokens"] += len(update.tokens)
            if update.finish:
                self._end(entry, update)
            else:
                self._deliver(entry, update)

    def _deliver(self, entry: _Entry, update: Update) -> None:
        try:
            admitted = entry.request.admitted_at
            admitted_at_s = None if math.isnan(admitted) else admitted
            entry.deliver(dataclasses.replace(update, at_s=self._loop.now, admitted_at_s=admitted_at_s))
        except Exception:  # a client's fault, and no other's
            LOG.exception("job %d: its client could not be told", entry.number)
            self.abort(entry.number)

    def _end(self, entry: _Entry, update: Update) -> None:
        """The last that a client hears. What the job holds is another matter."""
        del self._entries[entry.number]
        del self._requests[entry.request]
        if update.finish in ("aborted", "error"):
            self._answers.pop(entry.request, None)
        self._deliver(entry, update)
        with self._condition:
            self._present -= 1
            self._condition.notify_all()

    def _done(self, request: Request) -> None:
        self._answers.pop(request, None)

    def _failed(self, error: Exception, requests: list[Request]) -> None:
        LOG.error("a step failed", exc_info=error)
        for request in requests:
            if entry := self._requests.get(request):
                entry.answer.fail(_said(error), _whose(error))
                self._end(entry, entry.answer.news(request.cached))

    def _give_up(self, error: BaseException) -> None:
        """Not even an empty scheduler could be made: nothing runs any more, and nobody waits for it."""
        LOG.critical("the service has ended", exc_info=error)
        with self._condition:
            self._accepting, self._closed, self._recount = False, True, False
            inbox, self._inbox = self._inbox, []
            self._entries |= {entry.number: entry for entry in inbox}
            self._requests |= {entry.request: entry for entry in inbox}
        for entry in [*self._entries.values()]:
            entry.answer.fail(_said(error))
            self._end(entry, entry.answer.news(entry.request.cached))
        self._counts = dataclasses.replace(self._counts, running=0, kv_share=0.0, failed=True)

    def _begin_anew(self, error: Exception) -> None:
        """The scheduler itself is at fault: all jobs end, and those that come find an empty one."""
        LOG.error("the scheduler failed", exc_info=error)
        old = self._loop
        for name, count in self._of_loop().items():
            self._before[name] += count
        for replica in (replica for group in old.groups for replica in group):
            if replica.worker:
                with contextlib.suppress(Exception):
                    replica.worker.reset()
        self._answers.clear()
        self._loop = self._new_loop()
        self._loop.now = old.now
        for entry in [*self._entries.values()]:
            entry.answer.fail(_said(error))
            self._end(entry, entry.answer.news(entry.request.cached))

    def _observe(self, *step: object) -> None:
        self._totals["steps"] += 1

    def _count_from_here(self) -> None:
        self._totals = dict.fromkeys(self._totals, 0)
        self._before = {name: -count for name, count in self._of_loop().items()}
        self._late_s = self._most_late_s = 0.0
        self._counts = self._count()
        self._recount = False
        self._condition.notify_all()

    def _of_loop(self) -> dict[str, int]:
        workers = [replica.worker for group in self._loop.groups for replica in group if replica.worker]
        return {
            "preemptions": sum(rank.preemptions for rank in self._loop.ranks),
            "drafted": sum(worker.drafted for worker in workers),
            "accepted": sum(worker.accepted for worker in workers),
        }

    def _count(self) -> Counts:
        ranks = self._loop.ranks
        found = {name: count + self._before[name] for name, count in self._of_loop().items()}
        running = sum(rank.in_service + len(rank.handed_off) for rank in ranks)
        idle = self._loop.next_at is None
        return Counts(
            running=running,
            waiting=max(0, self._present - running),
            kv_share=sum(rank.pool.used for rank in ranks) / sum(rank.pool.total for rank in ranks),
            late_s=0.0 if idle else self._late_s,
            most_late_s=self._most_late_s,
            failed=False,
            **self._totals,
            **found,
        )


def _whose(error: Exception) -> JobFault:
    return "memory" if isinstance(error, CapacityError | MemoryError) else "server"


def _said(error: BaseException) -> str:
    return f"the step could not be carried out: {first_line(error) or type(error).__name__}"
