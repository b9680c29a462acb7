"""What serving takes on this machine, beside what the programs take alone: seconds until a request is queued, and
then a request, a step and a row, and what a step takes longer that nothing ran before, and those after it.

The whole server is measured, with the embedded checkpoint, by a client in a process of its own on the same machine:
sockets, forms, threads that wake one another, scheduler, sampling, streams, what an executor does around its programs,
and that programs between them find colder caches and fewer cores. What the client sees is timed, and programs alone
beside it, round by round, and each round's differences are taken by themselves: a machine that others slow down for a
while slows both. Times are the wall's, and medians of single steps: what else runs on the machine does not count as
long as it leaves most steps alone.

Where the device works apart from the host, the next step of answers is launched before one has been read, so that a
step takes what the host does or what the device does, whichever is longer. The embedded checkpoint's programs being
short, from token to token it is the host's work that shows (or, if not, that work is told too long by what hides it).
That is what a step takes at least which was launched ahead, and what one that was not takes beside its programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from backends.interface import Backend
from foundation.errors import UsageError
from foundation.reading import parse_json
from model.checkpoint import Checkpoint
from runtime.api import pace_client
from runtime.api.endpoint import Endpoint
from runtime.api.server import HttpServer, bound
from runtime.api.vocabulary import Vocabulary
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.executor import LocalExecutor
from runtime.execution.local.load import embedded_checkpoint, load_engine
from runtime.execution.services import engine_service
from runtime.porting.calibrate import ServingCost
from runtime.porting.calibrate_steps import empty_of
from runtime.serving.executor import ByRank, FedRow, TokenChoice
from runtime.serving.pricing import IDLE_S, WARM_S
from runtime.serving.service import Deliver, Job, Service

_PROMPT, _ANSWER, _STREAMS = 128, 48, 8  # tokens, and requests at once
_ALONE = 6  # requests one behind the other
_RESTED = 2  # requests behind a pause each
_PAUSE_S = 50 * IDLE_S  # caches go on cooling for that long
_LEAST_S = 1e-6  # less is not told apart from nothing, which a profile does not hold


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of requests sent at once, seconds from then. came: of each, when its tokens came. queued: when the scheduler had
    them, in that order."""

    came: list[list[float]]
    queued: list[float]


Burst = Callable[[int, float], Seen]
"""So many requests at once, after a pause of seconds, the client's too: who wakes it beforehand wakes the cores."""


def serving_cost(backend: Backend, rounds: int = 12) -> ServingCost:
    """Medians over rounds of some seconds. Raises `ModuleNotFoundError` without the packages of the server, and
    `UsageError` where answers never come token by token."""
    engine = load_engine(Checkpoint(embedded_checkpoint()), backend, EngineConfig())
    found, empty, apart = [], _empty(engine), backend.capabilities().apart
    with _asked(engine) as ask:
        ask(_STREAMS, 0)  # the first of everything takes longer
        for _ in range(rounds):
            ones = [ask(1, 0) for _ in range(_ALONE)]
            alone = [one.came[0] for one in ones]
            front = statistics.median(one.queued[0] for one in ones)
            last = max(ask(_STREAMS, 0).came)  # of the answer that began last, beside which all others are at work
            if any(len(came) < 2 for came in (*alone, last)):
                continue  # the client had to wait until all was there
            first = statistics.median(came[0] for came in alone)
            one = statistics.median(_gap_s(came) for came in alone)
            together = _gap_s(last)
            prompt, token, tokens = _programs_s(engine, empty)
            rested = [ask(1, _PAUSE_S).came[0] for _ in range(_RESTED)]
            later = statistics.median(came[0] for came in rested)
            if apart:
                token = tokens = 0.0  # nothing that is launched ahead adds to the host's work
            row = ((together - tokens) - (one - token)) / (_STREAMS - 1)
            warming = statistics.median(_warming_s(came, _lasted_s(alone)) for came in rested)
            found.append(
                (front, first - front - prompt - (one - token), one - token - row, row, later - first, warming)
            )
    if not found:
        raise UsageError("this machine is too busy to measure what serving takes: end what else runs on it")
    cost = ServingCost(*(max(_LEAST_S, statistics.median(each)) for each in zip(*found, strict=True)))
    return dataclasses.replace(cost, ahead_s=cost.step_s if apart else None)


def _lasted_s(answers: list[list[float]]) -> float:
    """From an answer's first token to its last."""
    return statistics.median(came[-1] - came[0] for came in answers)


def _warming_s(came: list[float], lasts_s: float) -> float:
    """What the second step after a rest takes longer, as `Replica` has it: of an answer that lasts so long without."""
    weights = sum(max(0.0, 1.0 - at / WARM_S) for at in came[:-1])
    return (_lasted_s([came]) - lasts_s) / max(weights, 1.0)


def _gap_s(came: list[float]) -> float:
    """From token to token."""
    return statistics.median(after - before for before, after in itertools.pairwise(came))


def _programs_s(engine: LocalEngine, empty: LocalExecutor) -> tuple[float, float, float]:
    """Of a step with a prompt, of one with an answer's next token, and of one with those of all streams; one behind the
    other alike. What the executor itself takes is no program's: it takes that with empty ones, too."""
    prompt, token = _rows(engine, 1)
    found = []
    for rows in (prompt, token, _rows(engine, _STREAMS)[1]):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_ANSWER):
            for executor, kept in zip((engine.executor, empty), times, strict=True):
                before = time.perf_counter()
                executor.step(*rows, False)
                kept.append(time.perf_counter() - before)
        whole, own = map(statistics.median, times)
        found.append(whole - own)
    return found[0], found[1], found[2]


def _empty(engine: LocalEngine) -> LocalExecutor:
    """An engine's executor, with empty programs."""
    config = engine.config
    return LocalExecutor(empty_of(engine.programs), config.least_batch, config.least_chunk, config.least_context)


def _rows(engine: LocalEngine, count: int) -> tuple[tuple[ByRank, ByRank], tuple[ByRank, ByRank]]:
    """A step with so many prompts, and one with as many answers' next tokens."""
    pages = -(-(_PROMPT + _ANSWER) // engine.config.described.page_tokens)
    held = [range(1 + pages * at, 1 + pages * (at + 1)) for at in range(count)]
    choice = TokenChoice(temperature=1.0, uniform=0.5) if engine.executor.can.chooses == "drawn" else None
    prompts = [FedRow(range(300, 300 + _PROMPT), 0, each, choice) for each in held]
    tokens = [FedRow([300 + at], _PROMPT + _ANSWER // 2, each, choice) for at, each in enumerate(held)]
    return ([prompts], [[]]), ([[]], [tokens])


@contextmanager
def _asked(engine: LocalEngine) -> Iterator[Burst]:
    """Asks a server of an engine, from another process."""
    for count in (1, 2, 4, _STREAMS):  # the requests of a burst may come together, or some of them
        for rows in _rows(engine, count):
            engine.executor.step(*rows, False)  # compiles
    rng = np.random.default_rng(time.time_ns())
    command = [sys.executable, "-I", str(Path(pace_client.__file__))]
    queued: list[float] = []
    with _served(engine, queued) as port, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as client:  # fmt: skip
        asked, told = client.stdin, client.stdout
        assert asked is not None and told is not None

        def ask(streams: int, pause_s: float) -> Seen:
            bodies = [_request(rng) for _ in range(streams)]
            print(json.dumps({"port": port, "bodies": bodies, "pause_s": pause_s}), file=asked, flush=True)
            answer = parse_json(told.readline())
            found, queued[:] = [at - answer["began_s"] for at in queued], []
            return Seen(answer["came"], found)

        yield ask
        asked.close()


def _request(rng: np.random.Generator) -> str:
    """Of a prompt that none before began like."""
    prompt = rng.integers(300, 900, _PROMPT).tolist()  # of the embedded tokenizer, none of them apart
    return json.dumps({"prompt": prompt, "stream": True, "max_tokens": _ANSWER, "ignore_eos": True})


@contextmanager
def _served(engine: LocalEngine, queued: list[float]) -> Iterator[int]:
    """The port of a server of an engine, which notes in `queued` when it has a request."""

    def service() -> Service:
        made = engine_service(engine)
        submit = made.submit

        def noted(jobs: Sequence[Job], deliver: Sequence[Deliver], asked_s: float = 0.0) -> list[int]:
            numbers = submit(jobs, deliver, asked_s)
            queued.append(time.perf_counter())
            return numbers

        made.submit = noted  # type: ignore[method-assign]
        return made

    config = engine.cfg
    vocabulary = Vocabulary.load(embedded_checkpoint(), config.vocab_size, config.eos_token_ids)
    endpoint = Endpoint(("calibrated",), vocabulary, config.max_positions)
    ready, listening = threading.Event(), bound("127.0.0.1", 0)
    server = HttpServer(endpoint, service, ready.set)
    thread = threading.Thread(target=server.serve_on, args=(listening,), name="glm5-pace")
    thread.start()
    try:
        ready.wait()
        yield listening.getsockname()[1]
    finally:
        server.leave(at_once=True)
        thread.join()
