"""Who sends what is simulated: a workload's clients, what of it is measured, and the report.

What happens to a request once it is sent is `loop.py`.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from runtime.serving.deployment import Deployment, Disaggregated, check_capacity
from runtime.serving.loop import Loop, MakeWorker
from runtime.serving.meter import Meter
from runtime.serving.replica import Replica
from runtime.serving.report import Report, make_report
from runtime.serving.request import Request
from runtime.serving.steady import Watch
from runtime.serving.trace import Trace
from runtime.serving.workload import Workload


def simulate(
    workload: Workload,
    deployment: Deployment | Disaggregated,
    *,
    seed: int = 0,
    exact: bool = False,
    tolerance: float = 1e-3,
    trace: Trace | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Runs the workload to its end; one that goes on without end, until what is measured is answered and it is plain
    whether it is kept up with (see `steady`). The same arguments give the same report.

    seed: draws of speculative acceptance. exact: price every step instead of interpolating to `tolerance`.
    progress: called with (requests finished, requests in all) as they finish.
    Raises CapacityError for a request that could never be served; one of the workload's list before anything runs.
    """
    return Simulation(workload, deployment, seed, 0.0 if exact else tolerance, trace, progress).run()


class Simulation:
    """One run. `simulate` is the way in; tests look inside.

    make_worker, observe: as of `Loop`, where steps are carried out.
    """

    def __init__(
        self,
        workload: Workload,
        deployment: Deployment | Disaggregated,
        seed: int = 0,
        tolerance: float = 1e-3,
        trace: Trace | None = None,
        progress: Callable[[int, int], None] | None = None,
        make_worker: MakeWorker | None = None,
        observe: Callable[[int, int, Any, float, float], None] | None = None,
    ):
        self.workload = replace(workload, requests=[copy.copy(request) for request in workload.requests])
        self.trace = trace
        self.progress = progress
        self.finished = 0
        self.meters = [Meter(trace) for _ in range(2 if isinstance(deployment, Disaggregated) else 1)]
        self.loop = Loop(
            deployment,
            seed=seed,
            tolerance=tolerance,
            block_tokens=workload.block_tokens,
            reuse=any(request.prefix_hashes for request in workload.requests),
            make_worker=make_worker,
            meters=self.meters,
            done=lambda request: self._done(request),
            observe=observe,
        )
        if trace is not None:
            trace.names = {-1: "requests"} | self._names()
        self._check(self.workload.requests)
        self.endless = workload.goes_on is not None
        """The load has no end: requests join `workload.requests` as they are sent, and are measured once the ramp is
        over."""
        self._to_measure, self._measured = len(workload.requests) - workload.warmup, 0
        self.watch = None
        if workload.concurrency is None:
            self.watch = Watch(self._holds(), not self.endless, workload.turns)
        self._to_send: Iterator[Request] = iter(())
        self._turns: dict[int, deque[Request]] = {}
        """Of each conversation, those that are not sent yet."""
        self._measuring = not (workload.warmup or self.endless)

    @property
    def groups(self) -> list[list[Replica]]:
        return self.loop.groups

    @property
    def now(self) -> float:
        return self.loop.now

    def run(self) -> Report:
        """Plays all events and reports."""
        self._start_clients()
        loop = self.loop
        while loop.next_at is not None and not self._decided():
            loop.advance()
        expected = self._to_measure if self.endless else len(self.workload.requests)
        assert self.finished == expected, "a request was lost"
        for rank in (rank for replica in self.groups[-1] for rank in replica.ranks):
            rank.note_progress()
        if self.watch is not None:
            self.watch.end()
        if self.trace is not None:
            self.trace.requests = [request for request in self.workload.requests if request.measured]
        devices = sum(role.devices for role in loop.roles)
        assumed = loop.deployment.assumed
        return make_report(self.workload, self.meters, self.groups, devices, self.watch, self.now, assumed)

    # Events

    def _send(self, request: Request, arrives: bool = True) -> None:
        """arrives: of itself, not because another was answered."""
        if self.watch is not None:
            self.watch.sent(request, self.now, arrives)
        if self.endless:
            self._go_on(request, arrives)
        if request.measured and not self._measuring:
            self._start_measuring()
        self.loop.send(request)

    def _done(self, request: Request) -> None:
        self.finished += request.measured or not self.endless
        if self.progress is not None:
            self.progress(self.finished, self._to_measure if self.endless else len(self.workload.requests))
        following = self._following(request)
        if following is not None:
            self.loop.at(self.now + self.workload.think_s, 0, self._send, following, False)
        if self.watch is not None:
            self.watch.done(request, self.now, following is None)
        elif following is not None:
            return
        elif not self._measuring and self.finished == self.workload.warmup:
            self._start_measuring()
            self._start_clients()
        else:
            self._send_next()

    # Sending

    def _start_clients(self) -> None:
        """Sends what can be sent: everything in an open loop, one request per client in a closed one."""
        requests, warmup = self.workload.requests, self.workload.warmup
        if self.workload.goes_on is not None:
            self._to_send = self._openers(itertools.chain(requests, self.workload.goes_on()))
            self.workload.requests = []
            self._send_on_time()
            return
        if self.workload.concurrency is None:
            for request in requests:
                self.loop.at(request.sent_at, 0, self._send, request)
            return
        self._to_send = self._openers(requests[warmup:] if self._measuring else requests[:warmup])
        for _ in range(self.workload.concurrency):
            self._send_next()

    def _openers(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Those that are sent of themselves; what follows an answer is kept for later. The turns of a conversation
        stand one after another."""
        for session, turns in itertools.groupby(requests, lambda each: each.session):
            if session is None:
                yield from turns
            else:
                opener, *rest = turns
                self._turns[session] = deque(rest)
                yield opener

    def _following(self, request: Request) -> Request | None:
        """The next turn of its conversation."""
        if request.session is None:
            return None
        left = self._turns[request.session]
        if left:
            return left.popleft()
        del self._turns[request.session]
        return None

    def _send_next(self) -> None:
        request = next(self._to_send, None)
        if request is not None:
            self.loop.at(self.now, 0, self._send, request)

    def _go_on(self, request: Request, arrives: bool) -> None:
        """A request of an endless load is sent: measured once the ramp is over, or where it never will be. The next
        one follows, unless the load is too much and there is enough to measure."""
        watch, sent, warmup = self.watch, self.workload.requests, self.workload.warmup
        assert watch is not None
        sent.append(request)
        if watch.far and not self._measured:  # the ramp will not end: who came first is as good as any
            self._measuring = True
            for each in sent[warmup : warmup + self._to_measure]:
                each.measured = True
                self._measured += 1
                self.finished += each not in watch.inside
        elif (watch.ramp_over_at is not None or watch.far) and self._measured < self._to_measure:
            request.measured = len(sent) > warmup
            self._measured += request.measured
        if arrives and (watch.sustained is not False or watch.short_of_backlog or self._measured < self._to_measure):
            self._send_on_time()

    def _send_on_time(self) -> None:
        request = next(self._to_send)
        turns = [request] if request.session is None else [request, *self._turns[request.session]]
        for each in turns:
            each.measured = False
        if request.id >= self._to_measure + self.workload.warmup:
            self._check(turns)
        self.loop.at(request.sent_at, 0, self._send, request)

    def _decided(self) -> bool:
        """Nothing more is to be learnt from an endless load."""
        return self.endless and self.finished == self._to_measure and self.watch is not None and self.watch.decided

    def _start_measuring(self) -> None:
        self._measuring = True
        for meter in self.meters:
            meter.restart(self.now)

    # Set-up

    def _check(self, requests: list[Request]) -> None:
        check_capacity(requests, self.loop.roles, [group[0].ranks[0] for group in self.groups])

    def _holds(self) -> int:
        """Requests that can be in service, at their mean length."""
        requests = self.workload.requests
        mean = sum(each.prompt_tokens + each.output_tokens for each in requests) / len(requests)
        ranks = self.loop.ranks
        return sum(max(1, min(rank.engine.max_running_requests, int(rank.pool.tokens / mean))) for rank in ranks)

    def _names(self) -> dict[int, str]:
        kinds = ["replica"] if len(self.groups) == 1 else ["prefill replica", "decode replica"]
        return {
            replica.number: f"{kind} {replica.number}"
            for kind, group in zip(kinds, self.groups, strict=True)
            for replica in group
        }
