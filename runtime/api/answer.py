"""Jobs on the service as events on the event loop, by choice; and whatever ends early, aborted in one place."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Literal

from foundation.errors import CapacityError, UsageError
from runtime.api.ask import Prepared
from runtime.api.endpoint import Endpoint
from runtime.api.events import CallEnded, Event, merged
from runtime.api.reader import Reader
from runtime.api.refusal import ApiRefusal, closing, failed, full, wrong
from runtime.serving.service import QueueFull, ServiceClosed, TokenLogprob, Update

End = Literal["stop", "length", "calls", "string", "failed", "closed"]
"""stop: the model's own end. length: the limit. calls: the model's end, behind calls. string: a stop string. failed:
see `OneAnswer.refusal`. closed: the server stopped."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A token that is shown, where log probabilities were asked for."""

    token: int
    logprob: TokenLogprob


@dataclasses.dataclass(frozen=True)
class Told:
    """News of a choice: events, tokens beside them, and the end where it has come."""

    index: int
    events: list[Event]
    shown: list[Shown]
    end: End | None = None


class OneAnswer:
    """One choice: what has come of it, and what it took. Tokens unless named otherwise."""

    def __init__(self, index: int, reader: Reader, prompt_tokens: int):
        self.index, self.reader, self.prompt_tokens = index, reader, prompt_tokens
        self.job: int | None = None
        self.end: End | None = None
        self.refusal: ApiRefusal | None = None
        self.completion_tokens = self.reasoning_tokens = self.cached_tokens = 0
        self.events: list[Event] = []  # of a whole answer, and tokens beside them
        self.shown: list[Shown] = []
        self._called = False
        self.first_at: float | None = None  # seconds of the wall clock
        self.last_at = 0.0

    def take(self, update: Update) -> Told:
        """What an update tells."""
        events, shown = [], []
        self.cached_tokens = max(self.cached_tokens, update.cached_tokens)
        for at, token in enumerate(update.tokens):
            self.completion_tokens += 1
            thinking = self.reader.thinking
            if at < len(update.logprobs) and self.reader.is_text(token):
                shown.append(Shown(token, update.logprobs[at]))
            told = self.reader.put(token)
            self.reasoning_tokens += thinking and self.reader.thinking  # the mark behind thoughts is none of them
            self._called |= _calls(told)
            events += told
            if self.reader.stopped_by is not None:
                self.end = "string"
                break
        if self.end is None and update.finish is not None:
            events += self._finish(update)
        return Told(self.index, events, shown, self.end)

    def _finish(self, update: Update) -> list[Event]:
        events = self.reader.end(cut=update.finish != "stop")
        match update.finish:
            case "aborted":
                self.end, self.refusal = "closed", closing()
            case "error":
                self.end, self.refusal = "failed", failed(update.error or "the answer failed", update.fault)
            case "length":
                self.end = "length"
            case _:
                self.end = "calls" if self._called or _calls(events) else "stop"
        if self.reader.stopped_by is not None and self.refusal is None:
            self.end = "string"
        return events


def _calls(events: list[Event]) -> bool:
    return any(isinstance(event, CallEnded) for event in events)


class Answering:
    """The answers to one request. `submit`, then `steps` or `whole`, and `close` whatever happened.

    began: when the request came, by `time.monotonic`. before_waiting: called where `steps` has told all that is there.
    """

    def __init__(self, endpoint: Endpoint, prepared: Prepared, began: float):
        self._endpoint, self.prepared = endpoint, prepared
        per_prompt = len(prepared.jobs) // len(prepared.prompts)
        lengths = [len(prepared.prompts[at // per_prompt]) for at in range(len(prepared.jobs))]
        self.turns = [OneAnswer(at, reader, lengths[at]) for at, reader in enumerate(prepared.readers)]
        self._news: deque[tuple[int, Update]] = deque()
        self._arrived = asyncio.Event()
        self._began = began
        self.before_waiting: Callable[[], Awaitable[None]] | None = None

    def submit(self) -> None:
        """Raises `ApiRefusal`."""
        loop, mailbox = asyncio.get_running_loop(), self._endpoint.mailbox
        slots = [mailbox.slot(loop, self._put, turn.index) for turn in self.turns]
        try:
            asked_s = time.monotonic() - self._began
            jobs = self._endpoint.service.submit(self.prepared.jobs, slots, asked_s)
        except QueueFull:
            raise full() from None
        except ServiceClosed:
            raise closing() from None
        except (UsageError, CapacityError) as error:
            raise wrong(str(error)) from None
        for turn, job in zip(self.turns, jobs, strict=True):
            turn.job = job

    def _put(self, index: int, update: Update) -> None:
        self._news.append((index, update))
        self._arrived.set()

    async def steps(self) -> AsyncGenerator[Told, None]:
        """What is told, until all choices have ended."""
        left = {turn.index for turn in self.turns}
        while left:
            if self.before_waiting is not None and not self._arrived.is_set():
                await self.before_waiting()
            await self._arrived.wait()
            self._arrived.clear()
            while self._news:
                index, update = self._news.popleft()
                if index not in left:
                    continue  # of a choice that a stop string ended
                turn = self.turns[index]
                step = turn.take(update)
                self._time(turn, update)
                if step.end is not None:
                    left.discard(index)
                    self._ended(turn, update.finish is None)
                if step.events or step.shown or step.end:
                    yield step

    async def whole(self) -> list[OneAnswer]:
        """All of it, in `OneAnswer.events` and `OneAnswer.shown`. Raises `ApiRefusal` where a choice failed."""
        async with contextlib.aclosing(self.steps()) as steps:
            async for step in steps:
                turn = self.turns[step.index]
                if turn.refusal is not None:
                    raise turn.refusal
                turn.events += step.events
                turn.shown += step.shown
        for turn in self.turns:
            turn.events = merged(turn.events)
        return self.turns

    def close(self) -> None:
        """Nobody listens any more: what still runs is aborted."""
        for turn in self.turns:
            if turn.end is None and turn.job is not None:
                turn.end = "closed"
                self._endpoint.abort(turn.job)
                self._endpoint.metrics.ended("abort")

    def _ended(self, turn: OneAnswer, running: bool) -> None:
        if running and turn.job is not None:
            self._endpoint.abort(turn.job)
        metrics = self._endpoint.metrics
        metrics.whole_s.observe(time.monotonic() - self._began)
        if turn.first_at is not None:
            metrics.decode_s.observe(turn.last_at - turn.first_at)
        names = {"length": "length", "failed": "error", "closed": "abort"}
        metrics.ended(names.get(turn.end or "stop", "stop"))

    def _time(self, turn: OneAnswer, update: Update) -> None:
        if not (tokens := len(update.tokens)):
            return
        now, metrics = time.monotonic(), self._endpoint.metrics
        if turn.first_at is None:
            turn.first_at = now
            metrics.first_token(now - self._began, update)
        else:
            for _ in range(tokens):
                metrics.between_tokens_s.observe((now - turn.last_at) / tokens)
        turn.last_at = now

    # --- what it took ---

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prepared.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(turn.completion_tokens for turn in self.turns)

    @property
    def reasoning_tokens(self) -> int:
        return sum(turn.reasoning_tokens for turn in self.turns)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, as each was first found."""
        count = len(self.turns) // len(self.prepared.prompts)
        return sum(turn.cached_tokens for turn in self.turns[::count])
