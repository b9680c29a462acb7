"""The simulation: a heap of events.

Six things happen, each leading to the next:

    send      a client sends a request; a front end takes it up, one at a time
    arrive    the router hands it to a rank's queue
    wake      an idle replica plans and begins a run of steps
    step      a run ends: tokens are made, requests finish, the next run begins
    move      a cache computed by a prefill replica has reached a decode replica
    done      a client has its last token; in a closed loop it sends the next request
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from runtime.serving.deployment import Deployment, Disaggregated, check_capacity
from runtime.serving.kv_pool import KvPool
from runtime.serving.meter import Meter
from runtime.serving.rank import Rank
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

    groups: replicas by role; a request passes through them in order.
    """

    def __init__(
        self,
        workload: Workload,
        deployment: Deployment | Disaggregated,
        seed: int = 0,
        tolerance: float = 1e-3,
        trace: Trace | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.workload = replace(workload, requests=[copy.copy(request) for request in workload.requests])
        self.deployment = deployment
        self.trace = trace
        self.progress = progress
        self.now = 0.0
        self.finished = 0
        split = isinstance(deployment, Disaggregated)
        roles = [deployment.prefilling, deployment.decode] if split else [deployment]
        self.roles = roles
        self.meters = [Meter(trace) for _ in roles]
        number = itertools.count()
        self.groups = [
            [self._replica(next(number), r, role, seed, tolerance) for _ in range(role.replicas)]
            for r, role in enumerate(roles)
        ]
        if trace is not None:
            trace.names = {-1: "requests"} | self._names()
        self._check(self.workload.requests)
        self.endless = workload.goes_on is not None
        """The load has no end: requests join `workload.requests` as they are sent, and are measured once the ramp is
        over."""
        self._to_measure, self._measured = len(workload.requests) - workload.warmup, 0
        self.watch = Watch(self._holds(), not self.endless) if workload.concurrency is None else None
        self._to_send: Iterator[Request] = iter(())
        self._measuring = not (workload.warmup or self.endless)
        self._turn = [0] * len(roles)
        first = roles[0]
        self._front_ends = [0.0] * (first.replicas * (first.ranks if first.engine.front_end_per_rank else 1))
        """When each front end is free, as a heap: whoever is free soonest takes the next request."""
        self._link_free_at: dict[int, float] = {}
        self._asleep = {id(replica) for group in self.groups for replica in group}
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def run(self) -> Report:
        """Plays all events and reports."""
        self._start_clients()
        while self._heap and not self._decided():
            time, _, _, handle, arguments = heapq.heappop(self._heap)
            assert time >= self.now, "the clock ran backwards"
            self.now = time
            handle(*arguments)
        expected = self._to_measure if self.endless else len(self.workload.requests)
        assert self.finished == expected, "a request was lost"
        for rank in (rank for replica in self.groups[-1] for rank in replica.ranks):
            rank.note_progress()
        if self.watch is not None:
            self.watch.end()
        if self.trace is not None:
            self.trace.requests = [request for request in self.workload.requests if request.measured]
        devices = sum(role.devices for role in self.roles)
        return make_report(
            self.workload, self.meters, self.groups, devices, self.watch, self.now, self.deployment.assumed
        )

    # Events

    def _send(self, request: Request) -> None:
        if self.watch is not None:
            self.watch.sent(request, self.now)
        if self.endless:
            self._go_on(request)
        if request.measured and not self._measuring:
            self._start_measuring()
        request.sent_at = self.now
        engine = self.roles[0].engine
        free_at = max(self.now, heapq.heappop(self._front_ends)) + engine.front_seconds(request.prompt_tokens)
        heapq.heappush(self._front_ends, free_at)
        self._at(free_at + engine.request_delay_seconds, 0, self._arrive, request, 0)

    def _arrive(self, request: Request, role: int) -> None:
        request.visible_at = self.now
        if not role:
            request.queued_at = self.now
        replica, rank = self._route(role)
        rank.waiting.append(request)
        if id(replica) in self._asleep:
            self._asleep.discard(id(replica))
            self._at(self.now, 2, self._wake, replica)

    def _wake(self, replica: Replica) -> None:
        next_event = self._heap[0][0] if self._heap else math.inf
        ends_at = replica.begin(self.now, next_event)
        if ends_at is None:
            self._asleep.add(id(replica))
        else:
            self._at(ends_at, 1, self._step, replica)

    def _step(self, replica: Replica) -> None:
        finished, handed_off = replica.end()
        for request in finished:
            self._at(request.finished_at, 0, self._done, request)
        for request in handed_off:
            self._hand_off(replica, request)
        self._at(self.now, 2, self._wake, replica)

    def _hand_off(self, replica: Replica, request: Request) -> None:
        link = self.deployment
        assert isinstance(link, Disaggregated)
        start = max(self.now, self._link_free_at.get(replica.number, 0.0))
        moved = request.prompt_tokens * link.kv_bytes_per_token
        arrives = start + link.link_latency_seconds + moved / link.link_bandwidth_bytes_per_s
        self._link_free_at[replica.number] = arrives
        self._at(arrives, 0, self._move, request, replica)

    def _move(self, request: Request, source: Replica) -> None:
        rank = next(rank for rank in source.ranks if request in rank.handed_off)
        rank.release(request)
        if id(source) in self._asleep:  # its queue may have been waiting for these pages
            self._asleep.discard(id(source))
            self._at(self.now, 2, self._wake, source)
        request.kv_ready = True
        self._arrive(request, 1)

    def _done(self, request: Request) -> None:
        self.finished += request.measured or not self.endless
        if self.progress is not None:
            self.progress(self.finished, self._to_measure if self.endless else len(self.workload.requests))
        if self.watch is not None:
            self.watch.done(request, self.now)
            return
        if not self._measuring and self.finished == self.workload.warmup:
            self._start_measuring()
            self._start_clients()
        else:
            self._send_next()

    # Sending

    def _start_clients(self) -> None:
        """Sends what can be sent: everything in an open loop, one request per client in a closed one."""
        requests, warmup = self.workload.requests, self.workload.warmup
        if self.workload.goes_on is not None:
            self._to_send = itertools.chain(requests, self.workload.goes_on())
            self.workload.requests = []
            self._send_on_time()
            return
        if self.workload.concurrency is None:
            for request in requests:
                self._at(request.sent_at, 0, self._send, request)
            return
        self._to_send = iter(requests[warmup:] if self._measuring else requests[:warmup])
        for _ in range(self.workload.concurrency):
            self._send_next()

    def _send_next(self) -> None:
        request = next(self._to_send, None)
        if request is not None:
            self._at(self.now, 0, self._send, request)

    def _go_on(self, request: Request) -> None:
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
        if watch.sustained is not False or watch.short_of_backlog or self._measured < self._to_measure:
            self._send_on_time()

    def _send_on_time(self) -> None:
        request = next(self._to_send)
        request.measured = False
        if request.id >= self._to_measure + self.workload.warmup:
            self._check([request])
        self._at(request.sent_at, 0, self._send, request)

    def _decided(self) -> bool:
        """Nothing more is to be learnt from an endless load."""
        return self.endless and self.finished == self._to_measure and self.watch is not None and self.watch.decided

    def _start_measuring(self) -> None:
        self._measuring = True
        for meter in self.meters:
            meter.restart(self.now)

    # Set-up

    def _at(self, time: float, priority: int, handle: Callable[..., None], *arguments: Any) -> None:
        """At one time, arrivals (0) come before ends of steps (1), and those before new plans (2)."""
        heapq.heappush(self._heap, (time, priority, next(self._order), handle, arguments))

    def _route(self, role: int) -> tuple[Replica, Rank]:
        places = [(replica, rank) for replica in self.groups[role] for rank in replica.ranks]
        if self.roles[role].router == "least-loaded":
            return min(places, key=lambda place: place[1].load)
        place = places[self._turn[role] % len(places)]
        self._turn[role] += 1
        return place

    def _replica(self, number: int, role: int, deployment: Deployment, seed: int, tolerance: float) -> Replica:
        engine, block = deployment.engine, self.workload.block_tokens
        reuse = engine.prefix_cache and any(request.prefix_hashes for request in self.workload.requests)
        ranks = [
            Rank(
                engine,
                KvPool(deployment.pool_tokens, engine.page_tokens, prefix_cache=reuse, block_tokens=block),
                deployment.speculation,
                np.random.default_rng([seed, number, rank]),
            )
            for rank in range(deployment.ranks)
        ]
        prefill_only = isinstance(self.deployment, Disaggregated) and role == 0
        return Replica(
            number,
            ranks,
            deployment.pricer,
            self.meters[role],
            tolerance=tolerance,
            prefill_only=prefill_only,
        )

    def _check(self, requests: list[Request]) -> None:
        check_capacity(requests, self.roles, [group[0].ranks[0].pool for group in self.groups])

    def _holds(self) -> int:
        """Requests that can be in service, at their mean length."""
        requests = self.workload.requests
        mean = sum(each.prompt_tokens + each.output_tokens for each in requests) / len(requests)
        ranks = [rank for group in self.groups for replica in group for rank in replica.ranks]
        return sum(max(1, min(rank.engine.max_running_requests, int(rank.pool.tokens / mean))) for rank in ranks)

    def _names(self) -> dict[int, str]:
        kinds = ["replica"] if len(self.groups) == 1 else ["prefill replica", "decode replica"]
        return {
            replica.number: f"{kind} {replica.number}"
            for kind, group in zip(kinds, self.groups, strict=True)
            for replica in group
        }
