"""What a front end asks of a scheduler while it runs: jobs in, tokens out, from any thread.

A front end (HTTP, a command, a test) makes a `Job` of token ids and hands it to a `Service`, with a function that is
told of every `Update`. Text, templates, tools and schemas are the front end's; requests, pages, steps and clocks are
the service's. Nothing here knows who is on the other side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from foundation.errors import CapacityError
from runtime.serving.sampling import Sampling

Finish = Literal["stop", "length", "aborted", "error"]
"""stop: a stop token, or a constraint that allows nothing more. length: the limit. aborted: `Service.abort`, or a
service that closed. error: see `Update.error`."""

JobFault = Literal["server", "memory", "constraint"]
"""Whose an error is. server: a bug, or a device that failed; the same again may do. memory: the device had none left;
later it may. constraint: it cannot go on, and would not the next time."""


class Constraint(Protocol):
    """Which token may come next, given those so far: a grammar at work. One a job; asked by one thread at a time."""

    def allowed(self) -> np.ndarray | None:
        """bool `[vocab]`; None where every token is. All False: the answer ends here."""
        ...

    def accept(self, token: int) -> None:
        """The answer goes on with this token. Raises `ConstraintBroken` where that could not be told any more."""
        ...

    def copy(self) -> Constraint:
        """An independent one at the same place, to look ahead over drafts."""
        ...


class ConstraintBroken(RuntimeError):
    """A constraint that cannot go on (a pattern too large to follow, say). Ends its job with `error`, nobody else's."""


class QueueFull(CapacityError):
    """As many jobs wait as may. Try again later."""


class ServiceClosed(CapacityError):
    """The service takes no more jobs."""


MOST_LOGPROBS = 20
"""Of the likeliest tokens that clients may have named beside each; what programs make is as large."""


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability before temperature and truncation, and the `top` best: (id, log
    probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """News of a job: at least one new token, or its end, or both.

    tokens: new token ids, a stop token included. logprobs: one a token where the job asked. cached_tokens: prompt
    tokens whose cache was found, known from the first update on. finish: set on the last update. error, fault: what
    went wrong, where finish is `error`, and whose that is. at_s: seconds since the service began, on its clock (virtual
    in an emulation). admitted_at_s: when the job first entered a step, on the same clock; None for one that ended
    before it did.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    finish: Finish | None = None
    error: str | None = None
    at_s: float = 0.0
    admitted_at_s: float | None = None
    fault: JobFault = "server"


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a service holds and has done since it began; gauges first, then counters. Tokens unless named otherwise.

    late_s: how far behind its clock a paced service is now (0 elsewhere); most_late_s: and was at worst.
    kv_share: of the pages, the share that is held by running jobs. failed: the service has ended by a fault of its own.
    """

    running: int
    waiting: int
    kv_share: float
    prompt_tokens: int
    generated_tokens: int
    prefix_queried: int
    prefix_hit: int
    preemptions: int
    steps: int
    drafted: int = 0
    accepted: int = 0
    late_s: float = 0.0
    most_late_s: float = 0.0
    failed: bool = False


Deliver = Callable[[Update], None]
"""Called on the service's own thread: it must return at once and raise nothing (hand over to a queue)."""


class Service(Protocol):
    """A scheduler that runs on a thread of its own. All methods may be called from any thread."""

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises `UsageError` or `CapacityError` for what could never be served, before anything is rendered."""
        ...

    def submit(self, jobs: Sequence[Job], deliver: Sequence[Deliver], asked_s: float = 0.0) -> list[int]:
        """Takes all of the jobs or none, and gives their numbers. asked_s: seconds of the wall since the client asked,
        which are the front end's; where one is emulated, they are part of what that takes, and not beside it. Raises
        `QueueFull`, `ServiceClosed`, `UsageError` or `CapacityError` at once."""
        ...

    def abort(self, job: int) -> None:
        """Ends a job at the next step boundary, and frees what it holds. Nothing happens where it has ended."""
        ...

    def counts(self) -> Counts: ...

    def warmed_up(self) -> None:
        """Counters and the worst lateness begin here: what was asked so far was no client's. Waits until it is over."""
        ...

    def drain(self, seconds: float) -> bool:
        """Takes nothing more, and waits for what is there; False where some was left at the limit."""
        ...

    def close(self) -> None:
        """Aborts what is left, and ends the thread. Twice is as good as once."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt to continue. Errors are raised by `Service.submit`.

    max_tokens: answer tokens at most. stop_ids: a token among them ends the answer (and is part of it). min_tokens:
    no stop token before so many. logprobs: None for none, else how many of the best to name beside each token.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    constraint: Constraint | None = None
