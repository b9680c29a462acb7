"""What TPOT and TTFT are made of: every second between a request's events by cause, adding up to the reported means.

A `StepLog` goes along with a run as its trace, and notes beside every run of steps who is in service; `explain` then
shares out the time. A decoding request's own part of a step is what its rank would take to decode alone, split by the
parts of that price and the host time beside them; a prompt's is the step with its chunk alone. The rest of the step it
waits, for other prompts, answers or ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.serving.deployment import Deployment, Disaggregated
from runtime.serving.pricing import NO_CONTEXTS, BatchShape, PricedPart, StepPricer, step_seconds, step_shape
from runtime.serving.rank import Rank, StepPlan
from runtime.serving.report import Report
from runtime.serving.request import Request
from runtime.serving.trace import Trace

if TYPE_CHECKING:
    from runtime.deployment.engines import Engine

TERMS = ("compute", "memory", "network", "overhead", "host", "waiting")
"""What a part is bound by; "overhead" is the fixed time of kernels too small for anything else."""
SIMULATED = "simulated"
"""Evidence of waiting: nothing is looked up for it, the scheduler's rules make it of the other parts."""
_ALIKE = 50
"""Steps whose contexts differ by less than one part in so many are priced once: for their split, not their length."""


@dataclass(frozen=True)
class ExplainedPart:
    """One cause of a figure. term: one of `TERMS`. evidence, sources: how its price is known, and from where, in words;
    constants of engines that are fitted or assumed say so."""

    term: str
    part: str
    seconds: float
    evidence: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explained:
    """A figure and its parts, largest first. seconds: the mean over requests that is reported, and the parts' sum."""

    seconds: float
    parts: tuple[ExplainedPart, ...]

    def terms(self) -> dict[str, float]:
        """Seconds by term, in the order of `TERMS`."""
        return {term: math.fsum(part.seconds for part in self.parts if part.term == term) for term in TERMS}

    def to_json(self) -> dict[str, Any]:
        return {
            "mean_ms": 1e3 * self.seconds,
            "terms_ms": {term: 1e3 * seconds for term, seconds in self.terms().items()},
            "parts": [
                {
                    "term": each.term,
                    "part": each.part,
                    "ms": 1e3 * each.seconds,
                    "share": each.seconds / self.seconds if self.seconds else 0.0,
                    "evidence": each.evidence,
                    "sources": list(each.sources),
                }
                for each in self.parts
            ],
        }


@dataclass(slots=True)
class _RankSteps:
    """A rank during a run of `count` steps of its replica, `seconds` in all. alone: the replica has no other rank.
    prompts: some are computed. decode: what it decodes, in the middle of the run; None: nothing.
    computing: prompts in service, with their tokens in the cache before. again: requests thrown out after their first
    token."""

    engine: Engine
    pricer: StepPricer
    seconds: float
    count: int
    alone: bool
    prompts: bool
    decode: BatchShape | None
    decoding: list[Request]
    computing: list[tuple[Request, int]]
    again: list[Request]


@dataclass
class StepLog(Trace):
    """A trace that notes who is in service, too."""

    steps: list[_RankSteps] = field(default_factory=list)

    def note(self, ranks: Sequence[Rank], pricer: StepPricer, durations: np.ndarray, shape: BatchShape) -> None:
        for rank in ranks:
            if rank.load:
                self.steps.append(_note(rank, pricer, durations, len(ranks) == 1, bool(shape.prefill_chunks)))


def _note(rank: Rank, pricer: StepPricer, durations: np.ndarray, alone: bool, prompts: bool) -> _RankSteps:
    answers = rank.running and (rank.engine.policy == "mixed" or not (prompts and rank.prefilling))
    back = [request for request in rank.waiting if request.preemptions] if rank.preemptions else []
    again = [each for each in (*rank.prefilling, *back) if not math.isnan(each.first_token_at)]
    return _RankSteps(
        rank.engine,
        pricer,
        float(durations.sum()),
        len(durations),
        alone,
        prompts,
        rank.shape(StepPlan(decode=True), len(durations) // 2) if answers else None,
        list(rank.running),
        [(each, each.computed) for each in rank.prefilling if math.isnan(each.first_token_at)],
        again,
    )


def explain(log: StepLog, report: Report, deployment: Deployment | Disaggregated) -> dict[str, Explained]:
    """ "tpot_ms" (where answers have more than one token) and "ttft_ms" of a run, by cause."""
    found = {"ttft_ms": _first_token(log, report, deployment)}
    if any(request.output_tokens > 1 for request in report.requests):
        found = {"tpot_ms": _per_token(log, report), **found}
    return found


class _Sum:
    """Parts that grow: (term, part, evidence) -> seconds and sources."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str, str], float] = defaultdict(float)
        self.sources: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        self._splits: dict[Any, list[tuple[tuple[str, str, str], float, frozenset[str]]]] = {}
        self._times: dict[Any, float] = {}

    def add(self, term: str, part: str, seconds: float, evidence: str = SIMULATED, sources: Iterable[str] = ()) -> None:
        self.seconds[term, part, evidence] += seconds
        self.sources[term, part, evidence].update(sources)

    def step(self, steps: _RankSteps, shape: BatchShape, weight: float, others: str, whole: bool) -> None:
        """Adds a step, `weight` times: what computing `shape` alone takes by its parts, the rest as waiting for
        `others`; whole: all of it is its own."""
        key = self._priced(steps, shape)
        own = steps.seconds if whole else min(steps.seconds, steps.count * self._times[key])
        for name, share, sources in self._splits[key]:
            self.seconds[name] += weight * own * share
            self.sources[name] |= sources
        if own < steps.seconds:
            self.add("waiting", others, weight * (steps.seconds - own))

    def _priced(self, steps: _RankSteps, shape: BatchShape) -> Any:
        """The key of a shape's split and seconds; shapes alike share theirs."""
        context = float(shape.decode_contexts.mean()) if shape.decode_count else 0.0
        chunks = tuple((new, _near(before)) for new, before in shape.prefill_chunks)
        how = shape.graphed, shape.pieces, shape.ahead
        kind = (shape.decode_count, shape.decode_rows, shape.query_tokens, *how, shape.begun)
        key = (id(steps.pricer), *kind, _near(context), chunks)
        if key not in self._splits:
            self._splits[key], self._times[key] = _split(steps.engine, steps.pricer, shape)
        return key

    def total(self, seconds: float, rest: str) -> Explained:
        """The parts of a figure of so many seconds. rest: what is called what they leave over."""
        left = seconds - math.fsum(self.seconds.values())
        if abs(left) > 1e-9 * max(seconds, 1.0):
            self.add("waiting", rest, left)
        parts = (
            ExplainedPart(term, part, each, evidence, tuple(sorted(self.sources[term, part, evidence])))
            for (term, part, evidence), each in self.seconds.items()
            if each
        )
        return Explained(seconds, tuple(sorted(parts, key=lambda part: -part.seconds)))


def _near(tokens: float) -> int:
    return round(_ALIKE * math.log(max(tokens, 1.0)))


def _split(
    engine: Engine, pricer: StepPricer, shape: BatchShape
) -> tuple[list[tuple[tuple[str, str, str], float, frozenset[str]]], float]:
    """The parts of a step as shares of it, and its seconds."""
    price = pricer.price(shape)
    parts = price.parts or [
        PricedPart("step", bound, seconds, price.evidence) for bound, seconds in price.by_bound.items()
    ]
    took = step_seconds(engine, price.seconds, shape)
    shares = []
    for each in parts if took else ():
        evidence, sources = each.evidence, each.sources
        named = {text: text.split()[0].removeprefix("engine.") for text in sources if text.startswith("engine.")}
        if named and all(name in engine.evidence for name in named.values()):
            grade, words = _known(engine, *named.values())
            evidence, sources = (grade if named.keys() == sources else evidence), (sources - named.keys()) | words
        shares.append(((each.bound, each.op, evidence), each.seconds / took, sources))
    host = took - price.seconds
    if took and host > 0:
        evidence, sources = _known(engine, *engine.host_settings(shape.graphed, shape.pieces, shape.ahead))
        shares.append((("host", "scheduling and launching steps", evidence), host / took, sources))
    return shares, took


def _known(engine: Engine, *settings: str) -> tuple[str, frozenset[str]]:
    """How constants of an engine are known: the weakest of "measured", "fitted" and "assumed"; and from where."""
    order, worst, words = ("measured", "fitted", "assumed"), "measured", set()
    for name in settings:
        source = engine.evidence.get(name)
        text = source.source if source else "the caller's"
        if not getattr(engine, name):
            continue
        grade = "assumed" if text.startswith("assumed") else "fitted" if "fitted" in text else "measured"
        worst = max(worst, grade, key=order.index)
        words.add(f"engine.{name} {getattr(engine, name):g}: {text}")
    return worst, frozenset(words)


def _per_token(log: StepLog, report: Report) -> Explained:
    requests = [each for each in report.requests if each.output_tokens > 1]
    weights = {id(each): 1 / (each.output_tokens - 1) / len(requests) for each in requests}
    made = _Sum()
    for steps in log.steps:
        decoding = math.fsum(weights.get(id(each), 0.0) for each in steps.decoding)
        if decoding and steps.decode is None:
            made.add("waiting", "prompts computed between tokens", decoding * steps.seconds)
        elif decoding:
            assert steps.decode is not None
            others = "prompts computed in the same steps" if steps.prompts else "ranks that have more to do"
            made.step(steps, steps.decode, decoding, others, steps.alone and not steps.prompts)
        if again := math.fsum(weights.get(id(each), 0.0) for each in steps.again):
            made.add("waiting", "thrown out and computed again", again * steps.seconds)
    return made.total(report.tpot.mean, "between steps")


def _first_token(log: StepLog, report: Report, deployment: Deployment | Disaggregated) -> Explained:
    split = isinstance(deployment, Disaggregated)
    first, last = (deployment.prefill.engine, deployment.decode.engine) if split else (deployment.engine,) * 2
    each = 1 / len(report.requests)
    made = _Sum()
    front = math.fsum(first.front_seconds(request.prompt_tokens) for request in report.requests) * each
    made.add("host", "front end", front, *_known(first, "request_seconds", "tokenize_seconds_per_token"))
    made.add(
        "host", "on the way to the scheduler", first.request_delay_seconds, *_known(first, "request_delay_seconds")
    )
    made.add("host", "response", last.response_seconds, *_known(last, "response_seconds"))
    arrived = math.fsum(request.queued_at - request.sent_at for request in report.requests) * each
    made.add("waiting", "other requests at the front end", arrived - front - first.request_delay_seconds)
    made.add("waiting", "admission", report.queue.mean)
    wanted = {id(request) for request in report.requests}
    for steps, request, tokens, before in _chunks(log.steps):
        if id(request) not in wanted:
            continue
        if not tokens:
            made.add("waiting", "other prompts and answers", each * steps.seconds)
            continue
        begun = not request.preemptions and before == request.cached
        shape = step_shape(steps.engine, NO_CONTEXTS, chunks=[(tokens, before)], begun=int(begun))
        made.step(steps, shape, each, "other prompts and answers in the same steps", False)
    rest = "cache sent to the decode pool, and admission there" if split else "between steps"
    fetching = any(any(request.fetched) for request in report.requests)
    return made.total(report.ttft.mean, f"{rest}, and cached prompts fetched" if fetching else rest)


def _chunks(steps: Iterable[_RankSteps]) -> Iterable[tuple[_RankSteps, Request, int, int]]:
    """Of every step and prompt in service: the prompt's tokens that were computed in it, and those before them; from
    what it had when it was seen again, or from what was left."""
    open_: dict[int, tuple[_RankSteps, Request, int]] = {}
    for each in steps:
        for request, before in each.computing:
            if id(request) in open_:
                earlier, _, had = open_[id(request)]
                yield earlier, request, max(0, before - had), had
            open_[id(request)] = (each, request, before)
    for last, request, had in open_.values():
        yield last, request, max(0, request.prompt_tokens - had), had
