"""One rank: a waiting queue, the requests in service, and their KV pages.

A rank owns one copy of the attention weights and one KV pool. Decoding requests live in slots: parallel
numpy arrays, so that a step costs a few array operations whatever has happened before.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from runtime.serving.kv_pool import KvPool
from runtime.serving.pricing import NO_CONTEXTS, BatchShape, step_shape
from runtime.serving.request import Request
from runtime.serving.speculation import Speculation

if TYPE_CHECKING:
    from runtime.deployment.engines import Engine


@dataclass(slots=True)
class StepPlan:
    """What a rank computes in its next step: prompt chunks, and whether its slots decode.

    chunks: (request, new tokens, tokens in the cache before them).
    """

    chunks: list[tuple[Request, int, int]] = field(default_factory=list)
    decode: bool = False

    def __bool__(self) -> bool:
        return self.decode or bool(self.chunks)


class Rank:
    """State of one rank. `scheduler.plan` decides, `Replica` steps; this class keeps the books.

    waiting: not in service. prefilling: admitted, prompt not yet computed. running: decoding, one a slot.
    blocked: why the head of the queue was refused: "", "kv-pool" or "max-running"; holds until something is
        released, for nothing else can change the answer.
    new_token_ratio: SGLang's estimate of how much of the rest of each answer will be generated.
    follows: a decode step that comes now is of sequences that the last one was of, and nothing else was to be done:
        what launches steps ahead has launched it.
    committed: pages of everything in service at its full length.
    writes: tokens that a sequence writes to in a decode step, and those behind them that its executor may.
    """

    def __init__(
        self,
        engine: Engine,
        pool: KvPool,
        speculation: Speculation | None,
        rng: np.random.Generator,
        beyond: int = 0,
    ):
        self.engine = engine
        self.pool = pool
        self.speculation = speculation
        self.query_tokens = speculation.query_tokens if speculation else 1
        self.writes = self.query_tokens + beyond
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.handed_off: set[Request] = set()  # prefilled here, their cache still being sent elsewhere
        self.blocked = ""
        self.follows = self._went_on = False
        self.new_token_ratio = engine.new_token_ratio
        self.committed = 0
        self.preemptions = 0
        self._rng = rng
        self.kv = np.zeros(0, dtype=np.int64)  # tokens in the cache, per slot
        self.left = np.zeros(0, dtype=np.int64)  # output tokens still to make
        self.pages = np.zeros(0, dtype=np.int64)  # pages held
        self.seen_at = np.zeros(0)  # when the slot's latest token was made

    @property
    def load(self) -> int:
        """Requests waiting and in service."""
        return len(self.waiting) + self.in_service

    @property
    def in_service(self) -> int:
        """Requests admitted and not finished."""
        return len(self.prefilling) + len(self.running)

    def shape(self, plan: StepPlan, step: int = 0) -> BatchShape:
        """What `plan` computes, `step` decode steps from now."""
        chunks = [(new, before) for _, new, before in plan.chunks]
        begun = sum(not r.emitted and not r.preemptions and before == r.cached for r, _, before in plan.chunks)
        contexts = self.kv + (self.query_tokens + step) if plan.decode else NO_CONTEXTS
        return step_shape(self.engine, contexts, self.query_tokens, chunks, begun, self.calm if step else self.follows)

    def next_ready(self, now: float) -> float:
        """When the next cache that a prompt waits for will have come."""
        if self.pool.below is None:
            return math.inf
        return min((each.ready_at for each in self.prefilling if each.ready_at > now), default=math.inf)

    @property
    def calm(self) -> bool:
        """Behind a decode step comes another, as far as is known: nobody else can be taken in."""
        return not self.prefilling and (not self.waiting or (bool(self.blocked) and not (self.left <= 1).any()))

    # Coming in

    def admit(self, request: Request, now: float, new_tokens: int | None = None) -> None:
        """Takes pages for the queue's head, up to its first `new_tokens` or for all of it; it then prefills, or decodes
        if its cache came along."""
        assert self.waiting.popleft() is request
        request.computed = self.pool.admit(request, new_tokens)
        self.committed += self._full_pages(request)
        if self.pool.below and any(request.fetching):
            request.ready_at = self.pool.below.fetch(request.fetching, now)
        if np.isnan(request.admitted_at):
            request.admitted_at = now
            request.cached, request.fetched = request.computed, request.fetching
        if request.kv_ready:
            request.computed = request.prompt_tokens
            request.first_token_at = now + self.engine.response_seconds
            self._join(request, now)
        else:
            self.prefilling.append(request)

    def end_prefill(self, request: Request, now: float) -> None:
        """The request's prompt is in the cache and its next token made: it decodes from here, or is done."""
        self.prefilling.remove(request)
        self.pool.publish(request)
        request.emitted = min(request.emitted + 1, request.output_tokens)  # none, where an answer ended before it began
        if np.isnan(request.first_token_at):
            request.first_token_at = now + self.engine.response_seconds
        if request.finished:
            request.finished_at = now + self.engine.response_seconds
            self.release(request)
        else:
            request.computed = request.target - 1
            self._join(request, now)

    def hand_off(self, request: Request) -> None:
        """The request's prompt is in the cache; it stays there until `release`, and decodes elsewhere."""
        self.prefilling.remove(request)
        self.pool.publish(request)
        request.emitted += 1
        self.handed_off.add(request)

    def _join(self, request: Request, now: float) -> None:
        self.follows = False
        self.running.append(request)
        self.kv = np.append(self.kv, request.computed)
        self.left = np.append(self.left, request.output_tokens - request.emitted)
        self.pages = np.append(self.pages, request.pages)
        self.seen_at = np.append(self.seen_at, now)

    # Decoding

    def steps_possible(self, most: int) -> int:
        """Decode steps (up to `most`, at least 1) before a slot finishes or pages run out."""
        if not self.running:
            return most
        if self.speculation:
            return 1
        most = min(most, int(self.left.min()))
        low, high = 1, most
        while low < high:  # the largest number of steps whose pages are there
            middle = (low + high + 1) // 2
            if self._missing_pages(middle) <= self.pool.available:
                low = middle
            else:
                high = middle - 1
        return low

    def lacks_pages(self) -> bool:
        """The next decode step needs more pages than there are."""
        return bool(self.running) and self._missing_pages(1) > self.pool.available

    def grow(self, steps: int) -> None:
        """Takes the pages that `steps` decode steps write to."""
        if not self.running:
            return
        self._went_on = self.calm
        self.pool.take(self._missing_pages(steps))
        np.maximum(self.pages, self._pages_after(steps), out=self.pages)
        if self.pool.numbers:
            for request, pages in zip(self.running, self.pages.tolist(), strict=True):
                self.pool.numbers.extend(request, pages)

    def decode(self, ends: np.ndarray, made: np.ndarray | None = None) -> tuple[list[Request], np.ndarray]:
        """Makes the tokens of steps that ended at `ends`. made: [slots] how many, where that is known.

        Returns the requests that finished, which are released, and the gaps between the tokens of each slot
        and those before them, for the first step.
        """
        rows, self.follows = len(self.running), self._went_on
        if made is None and self.speculation:
            made = self.draw()
        count = len(ends) if made is None else made
        self.kv += count
        self.left -= count
        gaps = ends[0] - self.seen_at
        self.seen_at[:] = ends[-1]
        engine = self.engine
        if engine.admission == "estimate":
            fall = (engine.new_token_ratio - engine.new_token_ratio_min) / engine.new_token_ratio_decay_steps
            self.new_token_ratio = max(engine.new_token_ratio_min, self.new_token_ratio - fall * len(ends))
        keep = self.left > 0
        if keep.all():
            return [], gaps
        done = [self.running[slot] for slot in np.flatnonzero(~keep)]
        for slot in np.flatnonzero(~keep):
            self._leave(int(slot))
        self._keep(keep)
        fewer = engine.decode_rows(len(self.running))[0] < engine.decode_rows(rows)[0]  # another program runs then
        self.follows &= not fewer and not self.waiting
        for request in done:
            request.finished_at = float(ends[-1]) + engine.response_seconds
            if self.pool.numbers or request.session is not None:  # what was answered may be asked about
                self.pool.publish(request, request.target - 1)
            self.release(request)
        return done, gaps

    def draw(self) -> np.ndarray:
        """[slots] tokens that a step makes, as the speculation has it."""
        if self.speculation is None:
            return np.ones(len(self.left), dtype=np.int64)
        return np.minimum(self.speculation.draw(self._rng, len(self.left)), self.left)

    # Going out

    def release(self, request: Request) -> None:
        """Gives back the request's pages; whatever was refused may be asked again."""
        self._give_back(request, 0)

    def _give_back(self, request: Request, left_tokens: int) -> None:
        self.handed_off.discard(request)
        self.pool.release(request, left_tokens)
        self.committed -= self._full_pages(request)
        self.blocked = ""
        if not self.load:
            self.new_token_ratio = self.engine.new_token_ratio

    def preempt(self, request: Request) -> None:
        """Throws a request out of service; it waits again. What it had computed stays as cached prompts do, of SGLang's
        ("estimate" admission) the prompt alone, whose answers are not in its tree of prefixes."""
        computed = int(self.kv[self.running.index(request)]) if request in self.running else request.computed
        if self.engine.admission == "estimate":
            computed = min(computed, request.prompt_tokens)
        self._throw_out(request, computed)
        request.computed = 0
        request.kv_ready = False
        request.ready_at = 0.0
        request.preemptions += 1
        self.preemptions += 1
        if self.engine.preempted_go == "front":
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def drop(self, request: Request) -> None:
        """Takes a request out for good, waiting or in service; a cache that is being sent stays until it has been."""
        if request in self.waiting:
            self.waiting.remove(request)
            self.pool.forget(request)
            self.blocked = ""
        elif request not in self.handed_off:
            self._throw_out(request)

    def _throw_out(self, request: Request, left_tokens: int = 0) -> None:
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            slot = self.running.index(request)
            self._leave(slot)
            self._keep(np.arange(len(self.left)) != slot)
        self._give_back(request, left_tokens)

    def shorten(self, request: Request, output_tokens: int) -> None:
        """The answer of a request in service turns out to end after `output_tokens`, the next token at the earliest."""
        self.committed -= self._full_pages(request)
        if request in self.running:
            self.left[self.running.index(request)] -= request.output_tokens - output_tokens
        request.output_tokens = output_tokens
        self.committed += self._full_pages(request)

    def holders(self) -> list[Request]:
        """Everyone who holds pages, their page counts brought up to date. For `KvPool.check`."""
        self.note_progress()
        return [*self.prefilling, *self.running, *self.handed_off]

    def note_progress(self) -> None:
        """Writes to every request in service how far it has come."""
        for slot in range(len(self.running)):
            self._leave(slot)

    def _leave(self, slot: int) -> None:
        """Writes a slot's progress back to its request."""
        request = self.running[slot]
        request.emitted = request.output_tokens - int(self.left[slot])
        request.pages = int(self.pages[slot])

    def _keep(self, keep: np.ndarray) -> None:
        self.running = [request for request, stays in zip(self.running, keep.tolist(), strict=True) if stays]
        self.kv, self.left = self.kv[keep], self.left[keep]
        self.pages, self.seen_at = self.pages[keep], self.seen_at[keep]

    def _pages_after(self, steps: int) -> np.ndarray:
        page = self.pool.page_tokens
        return (self.kv + (self.writes + steps - 1 + page - 1)) // page

    def _missing_pages(self, steps: int) -> int:
        return int(np.maximum(self._pages_after(steps) - self.pages, 0).sum())

    def _full_pages(self, request: Request) -> int:
        return self.pool.pages_for(request.prompt_tokens + request.output_tokens)
