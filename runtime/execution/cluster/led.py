"""Steps that process 0 decides on and all processes carry out: how a plan over several processes is served.

What arrives from outside, and when, only process 0 knows, so only it has a scheduler. Before each call of an executor
it tells the others which executor, which call and with what numbers (`Leader`, `LedExecutor`); they make the same calls
in the same order on executors of their own (`follow`), and meet inside the programs. What a cache held that moves stays
in every process until it is written or given up: only its number travels.

A message is one int32 array: the verb, the executor's number, and lists of numbers, each behind its length. Where
nothing has been said for a while, that is said, since nobody waits for ever inside a collective.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from foundation.errors import Failure
from runtime.execution.batches import DRAWN_BY
from runtime.serving.executor import Abilities, ByRank, FedRow, Logits, StepExecutor, TokenChoice

_SILENCE_S = 60.0


class _Verb(enum.IntEnum):
    STEP, DRAFT, READ, WRITE, RESET, DROP, ALIVE, END = range(8)


Send = Callable[[list[np.ndarray]], list[Any]]
"""Gives every process the arrays of process 0; what the others pass is not looked at."""


class Leader:
    """Process 0's word to the others. One call at a time: what it says and what all do then are one."""

    def __init__(self, send: Send, silence_s: float = _SILENCE_S):
        self._send, self._silence_s = send, silence_s
        self._lock = threading.Lock()
        self._given_up: list[tuple[int, int]] = []  # appended to by the garbage collector, wherever that runs
        self._said_at = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._keep_alive, name="glm5-leader", daemon=True).start()

    @contextlib.contextmanager
    def saying(self, verb: _Verb, executor: int, *lists: Any) -> Iterator[None]:
        """Tells the others of a call, which is then to be made here, too."""
        with self._lock:
            while self._given_up:
                self._say(_Verb.DROP, *self._given_up.pop())
            self._say(verb, executor, *lists)
            yield

    def give_up(self, executor: int, number: int) -> None:
        """Contents that nobody asks for any more; said before the next call."""
        self._given_up.append((executor, number))

    def end(self) -> None:
        """Lets the others go. Nothing may be said after it."""
        with self._lock:
            if not self._over.is_set():
                self._over.set()
                self._say(_Verb.END, 0)

    def _say(self, verb: _Verb, executor: int, *lists: Any) -> None:
        out = [verb, executor]
        for each in lists:
            _flatten(each, out)
        self._send([np.array(out, np.int32)])
        self._said_at = time.monotonic()

    def _keep_alive(self) -> None:
        while not self._over.wait(self._silence_s / 4):
            with self._lock:
                if not self._over.is_set() and time.monotonic() - self._said_at > self._silence_s:
                    self._say(_Verb.ALIVE, 0)


class _Held:
    """Contents of pages that have been read, as process 0 knows them."""

    def __init__(self, executor: int, number: int, contents: Any):
        self.executor, self.number, self.contents = executor, number, contents


class LedExecutor:
    """An executor of process 0 whose calls the others make, too. number: of their executors, which is alike."""

    def __init__(self, leader: Leader, number: int, executor: StepExecutor):
        self._leader, self._number, self._executor = leader, number, executor
        self.name = executor.name
        self._reads = itertools.count()

    @property
    def can(self) -> Abilities:
        return self._executor.can

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        with self._leader.saying(_Verb.STEP, self._number, int(every), _rows(prompts), _rows(answers)):
            return self._executor.step(prompts, answers, every)

    def draft(self, prompts: list[list[list[int]]], answers: list[list[list[int]]]) -> tuple[Any, Any]:
        with self._leader.saying(_Verb.DRAFT, self._number, prompts, answers):
            return self._executor.draft(prompts, answers)

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        number = next(self._reads)
        with self._leader.saying(_Verb.READ, self._number, rank, number, pages):
            held = _Held(self._number, number, self._executor.read(rank, pages))
        weakref.finalize(held, self._leader.give_up, self._number, number).atexit = False
        return held

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None:
        with self._leader.saying(_Verb.WRITE, self._number, rank, contents.executor, contents.number, pages):
            self._executor.write(rank, pages, contents.contents)

    def reset(self) -> None:
        with self._leader.saying(_Verb.RESET, self._number):
            self._executor.reset()


def follow(executors: Sequence[StepExecutor], send: Send) -> None:
    """Makes the calls of process 0 on executors of this one, until it ends.

    What fails in all processes alike, a `Failure`, is process 0's to tell; anything else is raised. Raises `ValueError`
    for a message that is none.
    """
    held: dict[tuple[int, int], Any] = {}
    while True:
        (message,) = send([])
        try:
            call = _call(iter(message.tolist()), executors, held)
        except (StopIteration, IndexError, ValueError):
            raise ValueError("process 0 sends what is no message") from None
        if call is None:
            return
        with contextlib.suppress(Failure):
            call()


def _call(
    numbers: Iterator[int], executors: Sequence[StepExecutor], held: dict[tuple[int, int], Any]
) -> Callable[[], object] | None:
    """What a message asks for; None where it is the last."""
    verb, at = _Verb(next(numbers)), next(numbers)
    executor = executors[at]
    match verb:
        case _Verb.STEP:
            every = bool(next(numbers))
            return functools.partial(executor.step, _fed(numbers), _fed(numbers), every)
        case _Verb.DRAFT:
            return functools.partial(executor.draft, _lists(numbers, 3), _lists(numbers, 3))
        case _Verb.READ:
            rank, number, pages = next(numbers), next(numbers), _lists(numbers, 1)
            return lambda: held.update({(at, number): executor.read(rank, pages)})
        case _Verb.WRITE:
            rank, source, pages = next(numbers), (next(numbers), next(numbers)), _lists(numbers, 1)
            return lambda: executor.write(rank, pages, held[source])
        case _Verb.RESET:
            return executor.reset
        case _Verb.DROP:
            return functools.partial(held.pop, (at, next(numbers)), None)
        case _Verb.ALIVE:
            return lambda: None
        case _Verb.END:
            return None


def _rows(rows: ByRank) -> list[Any]:
    return [[[row.tokens, [row.start], row.pages, _told(row.choice)] for row in rank] for rank in rows]


def _fed(numbers: Iterator[int]) -> ByRank:
    found = _lists(numbers, 4)
    return [
        [FedRow(tokens, start, pages, _choice(choice)) for tokens, (start,), pages, choice in rank] for rank in found
    ]


def _told(choice: TokenChoice | None) -> list[int]:
    """A choice as numbers, of which what is drawn by are float32 by their bits, as on the devices; empty for none."""
    if choice is None:
        return []
    floats = np.array([getattr(choice, name) for name in DRAWN_BY], np.float32)
    return [*floats.view(np.int32).tolist(), choice.top_k, -1 if choice.logprobs is None else choice.logprobs]


def _choice(numbers: list[int]) -> TokenChoice | None:
    if not numbers:
        return None
    *bits, top_k, logprobs = numbers
    floats = np.array(bits, np.int32).view(np.float32).tolist()
    if len(floats) != len(DRAWN_BY):
        raise ValueError("no choice")
    named = dict(zip(DRAWN_BY, floats, strict=True))
    return TokenChoice(**named, top_k=top_k, logprobs=None if logprobs < 0 else logprobs)


def _flatten(value: Any, out: list[int]) -> None:
    """A number, or a list of them or of lists, each behind its length."""
    if isinstance(value, int | np.integer):
        out.append(int(value))
        return
    out.append(len(value))
    for each in value:
        _flatten(each, out)


def _lists(numbers: Iterator[int], depth: int) -> list[Any]:
    """What `_flatten` made of lists so many deep."""
    count = next(numbers)
    found = []
    for _ in range(count):
        found.append(next(numbers) if depth == 1 else _lists(numbers, depth - 1))
    return found
