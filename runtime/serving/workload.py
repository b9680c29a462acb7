"""Loads: how long requests are, and when clients send them.

A `Workload` makes all its requests up front from a seed, so a run is a pure function of its inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foundation.limits import within
from foundation.reading import Unreadable, parse_json, read_lines
from runtime.serving.errors import TraceFileError, WorkloadError
from runtime.serving.lengths import MOST_REQUEST_TOKENS, Histogram, Lengths, Uniform, lengths_drawn, whole_number
from runtime.serving.prefixes import MOONCAKE_BLOCK_TOKENS, Sharing
from runtime.serving.request import Request

MOST_TRACE_BYTES = 1 << 27
"""134 MB: a million requests of Mooncake's traces, with the blocks of their prompts."""
MOST_REQUESTS = 1_000_000
"""Of a load; each is an object, and simulated step by step."""
MOST_TRACE_MS = 1e14
"""The latest that a request of a trace is sent: as milliseconds since 1970 these are of the year 5138."""
MOST_TURNS = 10_000
"""Of a conversation."""
MOST_THINK_S = 1e7
"""Between turns: four months."""
_BLOCK = 1000
"""Requests of an endless load made at a time."""
_LEAST_RATE, _MOST_RATE = 1e-6, 1e9  # requests a second: beyond, a clock no longer tells steps apart
_MOST_BURSTINESS = 100.0  # beyond, gaps are too small for a number


@dataclass
class Workload:
    """Requests and the rule by which they are sent.

    requests: in order of sending. `sent_at` is set for open loads and left to the run for closed ones.
    concurrency: closed loop, that many clients each sending the next request when its last one ends;
        None: open loop, requests are sent at `sent_at` whatever the server does.
    warmup: leading requests that are not measured. In a closed loop they drain before the others are sent.
    goes_on: the requests after those, without end. As many as `requests` are measured, once the system is in a
        steady state, and the load goes on until they are answered and it is plain whether it is kept up with.
    block_tokens: tokens one prefix hash stands for.
    think_s: where requests are turns of conversations (`Request.session`), which stand one after another: seconds from
        a turn's answer to the next turn. In a closed loop a client holds one conversation to its end, then begins the
        next at once; in one without end the first turns are sent on time. turns: of each conversation.
    """

    requests: list[Request]
    concurrency: int | None = None
    warmup: int = 0
    goes_on: Callable[[], Iterator[Request]] | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    description: str = ""
    think_s: float = 0.0
    turns: int = 1

    def __post_init__(self) -> None:
        if not self.requests:
            raise WorkloadError("the workload is empty: ask for at least one request")
        if self.warmup >= len(self.requests):
            raise WorkloadError("every request is warm-up: ask for more requests than warm-up ones")
        ends = self.concurrency is None and self.goes_on is None
        if (self.warmup or ends) and any(each.session is not None for each in self.requests):
            raise WorkloadError("conversations are held without warm-up, by clients or at a rate without end")
        for request in self.requests[: self.warmup]:
            request.measured = False


def closed_loop(
    concurrency: int,
    requests: int,
    prompt: Lengths | Histogram,
    output: Lengths | None,
    *,
    warmup: int = 0,
    seed: int = 0,
    sharing: Sharing | None = None,
) -> Workload:
    """`concurrency` clients in a closed loop over `requests` requests, after `warmup` more that drain first.

    output: None where a histogram has both lengths. sharing: what prompts have in common. Raises WorkloadError for
    counts below one.
    """
    whole_number("concurrency", concurrency, MOST_REQUESTS)
    whole_number("the number of requests", requests, MOST_REQUESTS)
    if warmup < 0:
        raise WorkloadError(f"warm-up of {warmup} requests: give zero or more")
    made = _requests(warmup + requests, prompt, output, seed)
    for request in made[1:warmup]:  # the benchmark client repeats one prompt to warm up
        request.prompt_tokens, request.output_tokens = made[0].prompt_tokens, made[0].output_tokens
    _share(made, sharing, seed)
    return Workload(
        made, concurrency, warmup, block_tokens=_block(sharing), description=f"closed loop, {concurrency} clients"
    )


def conversations(
    clients: int,
    requests: int,
    turns: int,
    think_s: float,
    prompt: Lengths | Histogram,
    output: Lengths | None,
    *,
    seed: int = 0,
    sharing: Sharing | None = None,
) -> Workload:
    """`clients` that each hold conversations of `turns` turns, one after another, over `requests` requests in all
    (rounded up to whole conversations).

    A turn's prompt is the conversation so far, prompts and answers, and `prompt` new tokens. The next turn is sent
    `think_s` seconds after the answer. sharing: what the first prompts have in common; its blocks are also those by
    which a turn finds what the ones before it left. Raises WorkloadError.
    """
    whole_number("concurrency", clients, MOST_REQUESTS)
    whole_number("the number of requests", requests, MOST_REQUESTS)
    _check_turns(turns, think_s)
    sharing = sharing or Sharing()
    count = -(-requests // turns)
    made = _requests(count * turns, prompt, output, seed)
    groups = sharing.groups_of(count, seed)
    for number in range(count):
        _converse(made[number * turns : (number + 1) * turns], number, int(groups[number]), sharing)
    words = f"{clients} clients, conversations of {turns} turns, {think_s:g} s between"
    return Workload(made, clients, block_tokens=sharing.block_tokens, description=words, think_s=think_s, turns=turns)


def open_conversations(
    rate: float,
    requests: int,
    turns: int,
    think_s: float,
    prompt: Lengths | Histogram,
    output: Lengths | None,
    *,
    cv: float = 1.0,
    seed: int = 0,
    sharing: Sharing | None = None,
) -> Workload:
    """Conversations as of `conversations` that begin whatever the server does, as requests of `open_loop` are sent: so
    many a second that all their turns are `rate` requests a second where they are kept up with. `requests` are measured
    (rounded up to whole conversations). Raises WorkloadError.
    """
    _check_rate(rate, cv)
    whole_number("the number of requests", requests, MOST_REQUESTS)
    _check_turns(turns, think_s)
    within("a load of requests:", requests + turns, MOST_REQUESTS, WorkloadError)
    count, held = -(-requests // turns) * turns, sharing or Sharing()

    def stream() -> Iterator[Request]:
        for block in itertools.count():
            groups = held.groups_of(_BLOCK, seed, block).tolist()
            for within_block, (sent_at, group) in enumerate(
                zip(_times(rate / turns, cv, seed, block), groups, strict=True)
            ):
                number = block * _BLOCK + within_block
                made = _requests(turns, prompt, output, seed, block, within_block)
                for request in made:
                    request.id += number * turns
                _converse(made, number, group, held)
                made[0].sent_at = sent_at
                yield from made

    words = f"open loop, {rate:g}/s, cv {cv:g}, conversations of {turns} turns, {think_s:g} s between"
    return Workload(
        list(itertools.islice(stream(), count)), goes_on=lambda: itertools.islice(stream(), count, None),
        block_tokens=held.block_tokens, description=words, think_s=think_s, turns=turns,
    )  # fmt: skip


def _check_turns(turns: int, think_s: float) -> None:
    whole_number("the number of turns", turns, MOST_TURNS)
    if not 0 <= think_s <= MOST_THINK_S:
        raise WorkloadError(f"think time {think_s:g} s: give a number from 0 to {MOST_THINK_S:g}")


def _converse(turns: list[Request], number: int, group: int, sharing: Sharing) -> None:
    """Makes requests the turns of a conversation: each prompt all before it and its own new tokens."""
    held = shared = 0  # tokens of the conversation so far, and of those that others have too
    for request in turns:
        request.session = number
        shared = shared or sharing.shared_tokens(request.prompt_tokens)
        request.prompt_tokens += held
        held = request.prompt_tokens + request.output_tokens
        within("a conversation's tokens:", held, MOST_REQUEST_TOKENS, WorkloadError)
        request.prefix_hashes = sharing.blocks(group, number, shared, held)


def bench_serving(
    concurrency: int, input_tokens: int, output_tokens: int, *, ratio: float = 0.8, seed: int = 0
) -> Workload:
    """The load of InferenceX's `bench_serving`: 10 x concurrency prompts, lengths uniform in [ratio L, L].

    All clients send at once at the start. The real client also runs 2 x concurrency warm-up requests; they
    drain before it starts and share no prefix with what follows, so they change nothing and are left out.
    Source: SemiAnalysisAI/InferenceX utils/bench_serving/benchmark_serving.py.
    """
    prompt, output = Uniform(input_tokens, ratio), Uniform(output_tokens, ratio)
    return closed_loop(concurrency, 10 * max(concurrency, 1), prompt, output, seed=seed)


def open_loop(
    rate: float,
    requests: int,
    prompt: Lengths | Histogram,
    output: Lengths | None,
    *,
    cv: float = 1.0,
    warmup: int = 0,
    seed: int = 0,
    sharing: Sharing | None = None,
) -> Workload:
    """Requests sent at `rate` per second without end, gaps gamma-distributed with coefficient of variation `cv`;
    `requests` of them are measured, see `Workload.goes_on`.

    cv = 1 is a Poisson process, above 1 is bursty, 0 is a metronome. output: None where a histogram has both lengths.
    sharing: what prompts have in common. Raises WorkloadError for a rate that is
    not positive and finite, a negative cv, or no requests.
    """
    _check_rate(rate, cv)
    whole_number("the number of requests", requests, MOST_REQUESTS)
    count = warmup + requests
    within("a load of requests:", count, MOST_REQUESTS, WorkloadError)
    made = list(itertools.islice(_stream(rate, cv, prompt, output, seed, sharing), count))

    def goes_on() -> Iterator[Request]:
        return itertools.islice(_stream(rate, cv, prompt, output, seed, sharing), count, None)

    words = f"open loop, {rate:g}/s, cv {cv:g}"
    return Workload(made, None, warmup, goes_on, block_tokens=_block(sharing), description=words)


def _check_rate(rate: float, cv: float) -> None:
    if not (rate > 0 and math.isfinite(rate)):
        raise WorkloadError(f"request rate {rate} per second: give a finite rate above zero")
    if not _LEAST_RATE <= rate <= _MOST_RATE:
        raise WorkloadError(f"request rate {rate:g} per second: give one from {_LEAST_RATE:g} to {_MOST_RATE:g}")
    if not 0 <= cv <= _MOST_BURSTINESS:
        most = f"{_MOST_BURSTINESS:g} at most"
        raise WorkloadError(f"burstiness cv {cv}: give zero (even), 1 (Poisson) or more (bursty), {most}")


def _times(rate: float, cv: float, seed: int, block: int) -> list[float]:
    """When the arrivals of a block come. Each thousand comes in the time that the rate gives it: bursts are as asked,
    but no run has more or less to do in the long term by chance."""
    rng = np.random.default_rng([seed, 1, block])
    gaps = rng.gamma(1 / cv**2, cv**2, size=_BLOCK) if cv else np.ones(_BLOCK)
    return ((block + np.cumsum(gaps) / gaps.sum()) * (_BLOCK / rate)).tolist()


def _stream(
    rate: float, cv: float, prompt: Lengths | Histogram, output: Lengths | None, seed: int, sharing: Sharing | None
) -> Iterator[Request]:
    """Requests of an open loop, without end."""
    for block in itertools.count():
        made = _requests(_BLOCK, prompt, output, seed, block)
        for request, sent_at in zip(made, _times(rate, cv, seed, block), strict=True):
            request.id, request.sent_at = block * _BLOCK + request.id, sent_at
        _share(made, sharing, seed, block)
        yield from made


def mooncake_trace(path: str | Path, *, limit: int | None = None, speed: float = 1.0) -> Workload:
    """An open load from a Mooncake JSONL file: timestamp (ms), input_length, output_length, hash_ids.

    hash_ids: one per started block of 512 prompt tokens, standing for it and what precedes it.
    limit: read that many requests at most. speed: 2.0 plays the trace twice as fast.
    Raises TraceFileError with the line number for anything malformed.
    Source of the format: Qin et al., Mooncake, FAST '25.
    """
    if not (speed > 0 and math.isfinite(speed)):
        raise WorkloadError(f"trace speed {speed}: give a finite factor above zero")
    path = Path(path)
    try:
        lines = read_lines(path, MOST_TRACE_BYTES)
    except Unreadable as error:
        raise TraceFileError(f"cannot read the trace {path}: {error}") from None
    made: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and len(made) >= limit:
            break
        within(f"{path}, line {number}: request", len(made) + 1, MOST_REQUESTS, TraceFileError)
        made.append(_trace_request(line, f"{path}, line {number}", speed))
    if not made:
        raise TraceFileError(f"the trace {path} holds no requests")
    made.sort(key=lambda request: request.sent_at)
    for position, request in enumerate(made):
        request.id = position
    return Workload(made, None, description=f"trace {path.name}")


def _trace_request(line: str, where: str, speed: float) -> Request:
    """One request from one line of JSON; raises TraceFileError that starts with `where`."""
    try:
        row = parse_json(line)
    except Unreadable as error:
        raise TraceFileError(f"{where}: not JSON ({error.what})") from None
    if not isinstance(row, dict):
        raise TraceFileError(f"{where}: expected an object with timestamp, input_length and output_length")
    for key, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1)):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TraceFileError(f"{where}: {key} must be a number, not {value!r}")
        if value < least or (key != "timestamp" and value != int(value)):
            raise TraceFileError(f"{where}: {key} = {value} must be a whole number of at least {least}")
        most = MOST_TRACE_MS if key == "timestamp" else MOST_REQUEST_TOKENS
        within(f"{where}: {key}", value, most, TraceFileError)
    hashes = row.get("hash_ids", [])
    if not isinstance(hashes, list) or not all(isinstance(each, int) for each in hashes):
        raise TraceFileError(f"{where}: hash_ids must be a list of whole numbers")
    if len(hashes) > -(-int(row["input_length"]) // MOONCAKE_BLOCK_TOKENS):
        raise TraceFileError(f"{where}: {len(hashes)} hash_ids are too many for {row['input_length']} tokens")
    sent_at = row["timestamp"] / 1000 / speed
    return Request(0, int(row["input_length"]), int(row["output_length"]), tuple(hashes), sent_at=sent_at)


def _requests(count: int, prompt: Lengths | Histogram, output: Lengths | None, *seed: int) -> list[Request]:
    within("a load of requests:", count, MOST_REQUESTS, WorkloadError)
    rng = np.random.default_rng([seed[0], 0, *seed[1:]])
    prompts, outputs = lengths_drawn(prompt, output, rng, count)
    return [Request(i, p, o) for i, (p, o) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True))]


def _block(sharing: Sharing | None) -> int:
    return sharing.block_tokens if sharing else MOONCAKE_BLOCK_TOKENS


def _share(requests: list[Request], sharing: Sharing | None, *seed: int) -> None:
    """Gives prompts what they have in common; nothing at all where that is nothing."""
    if sharing is None or not sharing.share:
        return
    for request, group in zip(requests, sharing.groups_of(len(requests), *seed).tolist(), strict=True):
        shared = sharing.shared_tokens(request.prompt_tokens)
        request.prefix_hashes = sharing.blocks(group, request.id, shared, request.prompt_tokens)
