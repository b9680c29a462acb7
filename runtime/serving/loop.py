"""The scheduler at work: a heap of events.

Five things happen to a request, each leading to the next:

    send      a client sends it; a front end takes it up, one at a time
    arrive    the router hands it to a rank's queue
    wake      an idle replica plans and begins a step, or a run of alike ones
    step      it ends: tokens are made, requests finish, the next one begins
    move      a cache computed by a prefill replica has reached a decode replica

Who sends (a workload, other threads), whether somebody waits for the time to pass, and whether steps are carried out is
others' business: see `simulation`, `live`, `clock` and `worker`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.serving.clock import Clock, Virtual
from runtime.serving.deployment import Deployment, Disaggregated
from runtime.serving.kv_pool import KvPool
from runtime.serving.meter import Meter
from runtime.serving.rank import Rank
from runtime.serving.replica import Observe, Replica
from runtime.serving.request import Request
from runtime.serving.routing import ReplicaRouter
from runtime.serving.tiers import LowerTiers
from runtime.serving.worker import News, Worker

if TYPE_CHECKING:
    from runtime.deployment.engines import Engine

MakeWorker = Callable[[int], Worker]
"""The hands of a new replica of a role: 0 is the first that a request passes through."""


class Loop:
    """Replicas by role (`groups`; a request passes through them in order), and what happens to them next.

    seed: draws of speculative acceptance. tolerance: as of `Replica`. block_tokens: that a prefix hash stands for;
    reuse: there are any. make_worker: carries steps out; None only prices them. meters: one a role. done: told of each
    request as its client has the last token. tell: told of news as clients hear them. failed: told of a step that
    raised and of its requests, which are gone then; by default it is raised. observe: told of each step carried out:
    role, replica within it, shapes, start and end.
    """

    def __init__(
        self,
        deployment: Deployment | Disaggregated,
        *,
        seed: int = 0,
        tolerance: float = 0.0,
        block_tokens: int = 512,
        reuse: bool = False,
        clock: Clock | None = None,
        make_worker: MakeWorker | None = None,
        meters: Sequence[Meter] = (),
        done: Callable[[Request], None] = lambda request: None,
        tell: Callable[[News], None] | None = None,
        failed: Callable[[Exception, list[Request]], None] | None = None,
        observe: Callable[[int, int, Any, float, float], None] | None = None,
    ):
        self.deployment = deployment
        self.roles = (
            [deployment.prefilling, deployment.decode] if isinstance(deployment, Disaggregated) else [deployment]
        )
        self.now = 0.0
        self.clock = clock or Virtual()
        self._done, self._tell, self._failed = done, tell, failed
        number = itertools.count()
        self.groups: list[list[Replica]] = []
        for role, each in enumerate(self.roles):
            group = []
            for within in range(each.replicas):
                worker = make_worker(role) if make_worker else None
                ranks = _ranks(each, next(number), seed, block_tokens, reuse, worker)
                group.append(
                    Replica(
                        len(group) + sum(map(len, self.groups)),
                        ranks,
                        each.pricer,
                        meters[role] if meters else None,
                        tolerance=tolerance,
                        prefill_only=len(self.roles) > 1 and role == 0,
                        worker=worker,
                        clock=self.clock,
                        observe=_observed(observe, role, within),
                    )
                )
            self.groups.append(group)
        self._routers = [
            ReplicaRouter(each.router, group, block_tokens) for each, group in zip(self.roles, self.groups, strict=True)
        ]
        first = self.roles[0]
        servers = first.replicas * (first.ranks if first.engine.front_end_per_rank else 1)
        self._front_ends = [FrontEnd(first.engine) for _ in range(servers)]
        """A heap: whoever is free soonest takes the next request."""
        self.in_front = 0
        """Requests that a front end has, or that are on their way from it."""
        self._link_free_at: dict[tuple[int, int], float] = {}
        """Of each rank that prefills (replica, rank), whose devices have ports of their own."""
        self._asleep = {id(replica) for group in self.groups for replica in group}
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    @property
    def ranks(self) -> list[Rank]:
        return [rank for group in self.groups for replica in group for rank in replica.ranks]

    @property
    def next_at(self) -> float | None:
        """When the next event is; None where nothing is to be done."""
        return self._heap[0][0] if self._heap else None

    def at(self, time: float, priority: int, handle: Callable[..., None], *arguments: Any) -> None:
        """At one time, arrivals (0) come before ends of steps (1), and those before new plans (2)."""
        heapq.heappush(self._heap, (time, priority, next(self._order), handle, arguments))

    def advance(self) -> None:
        """Lets the next event happen."""
        time, _, _, handle, arguments = heapq.heappop(self._heap)
        assert time >= self.now, "the clock ran backwards"
        self.now = time
        handle(*arguments)

    def send(self, request: Request, sent_at: float | None = None) -> None:
        """A client sends a request, now or, as is only known now, some time ago."""
        request.sent_at = self.now if sent_at is None else sent_at
        self.in_front += 1
        front_end = heapq.heappop(self._front_ends)
        front_end.take(request)
        heapq.heappush(self._front_ends, front_end)
        if not front_end.busy:
            self._front(front_end)

    def drop(self, request: Request) -> None:
        """Nobody waits for a request any more: it is out at once, or as the step that it is in ends. `done` is not
        told."""
        request.gone = True
        for group in self.groups:
            for replica in group:
                if replica.drop(request):
                    self._rouse(replica)
                    return

    # Events

    def _front(self, front_end: FrontEnd) -> None:
        """A front end begins what waits there, and goes on as long as requests wait again when it is through."""
        delay = self.roles[0].engine.request_delay_seconds
        for request, leaves_at in front_end.serve():
            self.at(max(self.now, leaves_at + delay), 0, self._arrive, request, 0)
        if front_end.busy:
            self.at(max(self.now, front_end.free_at), 0, self._fronted, front_end)

    def _fronted(self, front_end: FrontEnd) -> None:
        front_end.busy = False
        if front_end.waiting:
            self._front(front_end)

    def _arrive(self, request: Request, role: int) -> None:
        self.in_front -= not role
        if request.gone:
            return
        request.visible_at = self.now
        if not role:
            request.queued_at = self.now
        replica, rank = self._routers[role].place(request)
        rank.waiting.append(request)
        self._rouse(replica)

    def _rouse(self, replica: Replica) -> None:
        if id(replica) in self._asleep:
            self._asleep.discard(id(replica))
            self.at(self.now, 2, self._wake, replica)

    def _wake(self, replica: Replica) -> None:
        next_event = self._heap[0][0] if self._heap else math.inf
        try:
            ends_at = replica.begin(self.now, next_event)
        except Exception as error:
            if self._failed is None or replica.worker is None:
                raise
            self._failed(error, replica.give_up())
            self.at(self.now, 2, self._wake, replica)
            return
        if ends_at is None:
            self._asleep.add(id(replica))
            if (ready := replica.next_ready(self.now)) < math.inf:
                self.at(ready, 0, self._rouse, replica)
            return
        if self._tell and replica.worker and replica.worker.arrivals:
            self.at(self.now + replica.engine.response_seconds, 0, self._tell, replica.worker.arrivals)
        self.at(ends_at, 1, self._step, replica)

    def _step(self, replica: Replica) -> None:
        finished, handed_off = replica.end()
        if self._tell and replica.worker and (news := replica.worker.news(handed_off)):
            self.at(self.now + replica.engine.response_seconds, 0, self._tell, news)
        for request in finished:
            self.at(request.finished_at, 0, self._done, request)
        for request in handed_off:
            self._hand_off(replica, request)
        self.at(self.now, 2, self._wake, replica)

    def _hand_off(self, replica: Replica, request: Request) -> None:
        link = self.deployment
        assert isinstance(link, Disaggregated)
        port = replica.number, next(n for n, rank in enumerate(replica.ranks) if request in rank.handed_off)
        start = max(self.now, self._link_free_at.get(port, 0.0))
        moved = request.prompt_tokens * link.kv_bytes_per_token
        arrives = start + link.link_latency_seconds + moved / link.link_bandwidth_bytes_per_s
        self._link_free_at[port] = arrives
        self.at(arrives, 0, self._move, request, replica)

    def _move(self, request: Request, source: Replica) -> None:
        found = next(((n, rank) for n, rank in enumerate(source.ranks) if request in rank.handed_off), None)
        if found is None:  # lost with a step that failed
            return
        number, rank = found
        if source.worker and not request.gone:
            source.worker.send(number, rank, request)
        rank.release(request)
        self._rouse(source)  # its queue may have been waiting for these pages
        request.kv_ready = True
        self._arrive(request, 1)


_TOKENIZED_TOGETHER = 32
"""vllm 0.11.0 utils AsyncMicrobatchTokenizer: max_batch_size, in an executor of one thread; asked for by each request
after its chat template, and handed on batch by batch."""


class FrontEnd:
    """What requests pass before the scheduler, one process: it works on them in the order that they came. Where it
    `gathers`, all that wait as it turns to them go on together, when it is through with the last of them, to a
    tokenizer beside it.

    free_at: when it could begin another request. waiting: what it has not begun, and when each would be done. busy: it
    gathers, and has begun.
    """

    def __init__(self, engine: Engine):
        self.free_at = -math.inf
        self._tokenized_at = -math.inf
        self.waiting: list[tuple[Request, float]] = []
        self.busy = False
        self._engine = engine

    def __lt__(self, other: FrontEnd) -> bool:
        return self.free_at < other.free_at

    def take(self, request: Request) -> None:
        tokens = 0 if self._engine.front_end_gathers else request.prompt_tokens
        self.free_at = max(request.sent_at, self.free_at) + self._engine.front_seconds(tokens)
        self.waiting.append((request, self.free_at))

    def serve(self) -> list[tuple[Request, float]]:
        """Begins all that waits: (request, when it leaves)."""
        leaving, self.waiting, self.busy = self.waiting, [], self._engine.front_end_gathers
        return self._tokenized([request for request, _ in leaving]) if self.busy else leaving

    def _tokenized(self, requests: list[Request]) -> list[tuple[Request, float]]:
        """What the front end is through with at `free_at`: (request, when its batch has tokens)."""
        found: list[tuple[Request, float]] = []
        for first in range(0, len(requests), _TOKENIZED_TOGETHER):
            batch = requests[first : first + _TOKENIZED_TOGETHER]
            tokens = sum(request.prompt_tokens for request in batch)
            took = tokens * self._engine.tokenize_seconds_per_token
            self._tokenized_at = max(self._tokenized_at, self.free_at) + took
            found += [(request, self._tokenized_at) for request in batch]
        return found


def _ranks(
    role: Deployment, number: int, seed: int, block_tokens: int, reuse: bool, worker: Worker | None
) -> list[Rank]:
    engine = role.engine
    return [
        Rank(
            engine,
            KvPool(
                role.pool_tokens,
                engine.page_tokens,
                prefix_cache=engine.prefix_cache and reuse,
                block_tokens=block_tokens,
                keeps_left=engine.prefix_cache,
                numbered=worker is not None and worker.numbered,
                below=LowerTiers(role.tiers, block_tokens) if role.tiers and worker is None else None,
            ),
            role.speculation,
            np.random.default_rng([seed, number, rank]),
            worker.beyond if worker else 0,
        )
        for rank in range(role.ranks)
    ]


def _observed(observe: Callable[[int, int, Any, float, float], None] | None, role: int, within: int) -> Observe | None:
    if observe is None:
        return None
    return lambda shapes, start, end: observe(role, within, shapes, start, end)
