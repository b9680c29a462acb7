"""A `Service` that says what it is told to say, in any bursts, and keeps account of its jobs."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from foundation.errors import CapacityError
from runtime.serving.service import Counts, Deliver, Job, JobFault, QueueFull, TokenLogprob, Update

Script = Callable[[Job], Sequence[int]]


@dataclasses.dataclass
class _Running:
    job: Job
    deliver: Deliver
    tokens: list[int]
    at: int = 0
    admitted_at_s: float | None = None


class Scripted:
    """script: the tokens of a job's answer, its stop token included. burst: how many come at once. pace_s: between
    steps. cached: prompt tokens that are found in the cache. fails, fault: ends each job with this error. failed:
    the service has.

    A job that has a constraint is held to it: a token that it does not allow ends the job with an error.
    """

    def __init__(self, script: Script = lambda job: [], slots: int = 64, max_queue: int = 64):
        self.script, self.slots, self.max_queue = script, slots, max_queue
        self.burst, self.pace_s, self.cached, self.fails = 1, 0.0, 0, ""
        self.fault: JobFault = "server"
        self.failed = False
        self.most_prompt = 1 << 30
        self.jobs: dict[int, Job] = {}
        self.aborted: list[int] = []
        self.ended: list[int] = []
        self.closed = self.draining = False
        self.gate = threading.Event()  # steps are taken while it is set
        self.gate.set()
        self._running: dict[int, _Running] = {}
        self._waiting: list[int] = []
        self._changed = threading.Condition(threading.RLock())
        self._generated = 0
        self._began = time.monotonic()
        self.warmed = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens > self.most_prompt:
            raise CapacityError(f"{prompt_tokens} tokens have no room")

    def submit(self, jobs: Sequence[Job], deliver: Sequence[Deliver], asked_s: float = 0.0) -> list[int]:
        with self._changed:
            if len(self._waiting) >= self.max_queue:
                raise QueueFull("full")
            numbers = []
            for job, told in zip(jobs, deliver, strict=True):
                number = len(self.jobs)
                self.jobs[number] = job
                self._running[number] = _Running(job, told, list(self.script(job)))
                self._waiting.append(number)
                numbers.append(number)
            self._changed.notify_all()
            return numbers

    def abort(self, job: int) -> None:
        with self._changed:
            running = self._running.pop(job, None)
            if running is not None:
                self.aborted.append(job)
                self._waiting = [each for each in self._waiting if each != job]
                running.deliver(Update(finish="aborted"))

    def counts(self) -> Counts:
        with self._changed:
            waiting = len(self._waiting)
            prompt = sum(len(job.prompt_ids) for job in self.jobs.values())
            return Counts(
                len(self._running) - waiting,
                waiting,
                0.25,
                prompt,
                self._generated,
                prompt,
                3,
                0,
                7,
                failed=self.failed,
            )

    def warmed_up(self) -> None:
        self.warmed += 1

    def drain(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        with self._changed:
            self.draining = True
            while self._running and time.monotonic() < until:
                self._changed.wait(0.01)
            return not self._running

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self.gate.set()
        self._thread.join()
        for number in list(self._running):
            self.abort(number)

    def _run(self) -> None:
        while True:
            self.gate.wait()
            with self._changed:
                while self._waiting and len(self._running) - len(self._waiting) < self.slots:
                    self._running[self._waiting.pop(0)].admitted_at_s = self._now()
                if self.closed:
                    return
                ready = [number for number in self._running if number not in self._waiting]
                for number in ready:
                    self._step(number)
                self._changed.notify_all()
                if not ready:
                    self._changed.wait(0.05)
            if self.pace_s:
                time.sleep(self.pace_s)

    def _step(self, number: int) -> None:
        running = self._running[number]
        job, tokens, finish, error = running.job, [], None, None
        for token in running.tokens[running.at : running.at + self.burst]:
            if job.constraint is not None:
                allowed = job.constraint.allowed()
                if allowed is not None and not allowed[token]:
                    finish, error = "error", f"token {token} is not allowed"
                    break
                job.constraint.accept(token)
            tokens.append(token)
            running.at += 1
            if token in job.stop_ids and running.at > job.min_tokens:
                finish = "stop"
                break
            if running.at >= job.max_tokens:
                finish = "length"
                break
        if self.fails:
            finish, error = "error", self.fails
        if finish is None and running.at >= len(running.tokens):
            finish = "stop"
        self._generated += len(tokens)
        best = () if job.logprobs is None else ((5, -1.5), (6, -2.5), (7, -3.5), (8, -4.5), (9, -5.5))[: job.logprobs]
        logprobs = () if job.logprobs is None else tuple(TokenLogprob(-0.5, best) for _ in tokens)
        if finish is not None:
            del self._running[number]
            self.ended.append(number)
        running.deliver(
            Update(tuple(tokens), logprobs, self.cached, finish, error, self._now(), running.admitted_at_s, self.fault)
        )

    def _now(self) -> float:
        return time.monotonic() - self._began
