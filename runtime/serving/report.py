"""What a run says: latencies, throughput, occupancy, where the time went, and whether it was overloaded.

Symbols and formulas: docs/metrics.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from runtime.serving.meter import Meter
from runtime.serving.pricing import EVIDENCE_GRADES
from runtime.serving.replica import Replica
from runtime.serving.request import Request
from runtime.serving.steady import Watch
from runtime.serving.workload import Workload

PERCENTILES = (50.0, 90.0, 99.0)

BLOCKED_SHARE = 0.10
"""Saturated: admission was refused for at least this share of the measured time ..."""
QUEUE_SHARE = 0.25
"""... and waiting for admission makes up at least this share of the mean TTFT."""
_NARROW = 0.1
"""A closed loop's steady window is no shorter than this share of the run."""


@dataclass(frozen=True)
class Stats:
    """Mean and percentiles of one quantity over the measured requests, seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Stats:
        """NaN throughout when there are no values."""
        if not len(values):
            return cls(*[float("nan")] * 4)
        return cls(float(np.mean(values)), *(float(p) for p in np.percentile(values, PERCENTILES)))

    def in_ms(self) -> dict[str, float | None]:
        """Milliseconds by name, None for what is undefined; for JSON."""
        return {name: None if np.isnan(v) else v * 1e3 for name, v in asdict(self).items()}


@dataclass(frozen=True)
class KvUse:
    """The KV pools that requests decode in; fractions of their pages, cached idle blocks counted as free."""

    pool_tokens: int
    peak_fraction: float
    mean_fraction: float


@dataclass(frozen=True)
class Report:
    """The result of a run over its measured requests. Seconds, tokens, fractions of one.

    ttft, tpot, itl, e2e: as the client sees them. queue: from reaching the scheduler to entering a step.
    duration_s: from the first measured request sent to the last answered. steady_s: length of the window that rates and
        mean_in_system are of, ramp and drain left out; None where the load was too short for one and they are of the
        whole run. sent_per_s, sustained: of an open load, see `steady`.
    seconds_by_op, seconds_by_bound: step time over all replicas, estimated from a sample of the steps.
    saturated, saturated_by: see `saturation`. bottleneck: the bound with the most step time, or, when
        saturated, what requests wait for.
    evidence: weakest grade of the prices sampled. extrapolated: share of them outside their fit's range.
    assumed: what nobody gave, and what was taken for it, in words; the evidence is then "assumed".
    timeline: (seconds, replica, in service, waiting, used share of the KV pages) at each run of steps.
    prefix_hits: shares of the prompt tokens, by the tier they were found in; together the hit rate.
    requests: the measured ones, with their timestamps.
    """

    ttft: Stats
    tpot: Stats
    itl: Stats
    e2e: Stats
    queue: Stats
    measured_requests: int
    duration_s: float
    steady_s: float | None
    requests_per_s: float
    sent_per_s: float | None
    sustained: bool | None
    input_tokens_per_s: float
    output_tokens_per_s: float
    output_tokens_per_s_per_device: float
    output_tokens_per_s_per_user: float
    mean_in_system: float
    kv: KvUse
    seconds_by_op: dict[str, float]
    seconds_by_bound: dict[str, float]
    steps: dict[str, int]
    preemptions: int
    prefix_hit_rate: float
    prefix_hits: dict[str, float]
    saturated: bool
    saturated_by: str
    blocked_fraction: float
    bottleneck: str
    evidence: str
    extrapolated: float
    assumed: tuple[str, ...] = ()
    timeline: list[tuple[float, int, int, int, float]] = field(repr=False, default_factory=list)
    requests: list[Request] = field(repr=False, default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values: latencies as `*_ms`, times by op and bound as shares."""
        total = sum(self.seconds_by_bound.values()) or 1.0
        plain = (
            "measured_requests",
            "duration_s",
            "steady_s",
            "requests_per_s",
            "sent_per_s",
            "sustained",
            "input_tokens_per_s",
            "output_tokens_per_s",
            "output_tokens_per_s_per_device",
            "output_tokens_per_s_per_user",
            "mean_in_system",
            "steps",
            "preemptions",
            "prefix_hit_rate",
            "prefix_hits",
            "saturated",
            "saturated_by",
            "bottleneck",
            "evidence",
            "extrapolated",
            "assumed",
        )
        return {
            **{f"{name}_ms": getattr(self, name).in_ms() for name in ("ttft", "tpot", "itl", "e2e", "queue")},
            **{name: _plain(getattr(self, name)) for name in plain},
            "kv": asdict(self.kv),
            "share_by_op": {name: seconds / total for name, seconds in self.seconds_by_op.items()},
            "share_by_bound": {name: seconds / total for name, seconds in self.seconds_by_bound.items()},
        }


def make_report(
    workload: Workload,
    meters: Sequence[Meter],
    groups: Sequence[Sequence[Replica]],
    devices: int,
    watch: Watch | None,
    ended_at: float,
    assumed: frozenset[str] = frozenset(),
) -> Report:
    """Sums up a finished run. `groups`: replicas by role; the last one decodes. watch: of an open load. assumed: of the
    deployment."""
    requests = [request for request in workload.requests if request.measured]
    sent = np.array([request.sent_at for request in requests])
    first = np.array([request.first_token_at for request in requests])
    last = np.array([request.finished_at for request in requests])
    queued = np.array([request.admitted_at - request.queued_at for request in requests])
    prompts = np.array([request.prompt_tokens for request in requests])
    outputs = np.array([request.output_tokens for request in requests])
    duration = float(last.max() - sent.min()) or float("nan")
    several = outputs > 1
    tpot = Stats.of((last - first)[several] / (outputs[several] - 1))
    by_op, by_bound, steps = Counter[str](), Counter[str](), Counter[str]()
    for meter in meters:
        by_op.update(meter.by_op())
        by_bound.update(meter.by_bound())
        steps.update(meter.step_counts)
    sampled = sum(meter.sampled_steps for meter in meters)
    assumed = assumed.union(*(meter.assumed for meter in meters))
    sustained = watch.sustained if watch else None
    saturated_by, blocked = saturation(sustained, requests, meters)
    steady = watch.window() if watch else _closed_window(workload, sent, last)
    rates = _rates(workload.requests, steady or (float(sent.min()), float(last.max())), ended_at)
    return Report(
        ttft=Stats.of(first - sent),
        tpot=tpot,
        itl=_itl(meters[-1]),
        e2e=Stats.of(last - sent),
        queue=Stats.of(queued),
        measured_requests=len(requests),
        duration_s=duration,
        steady_s=steady[1] - steady[0] if steady else None,
        requests_per_s=rates["served"],
        sent_per_s=watch.sent_per_s if watch else None,
        sustained=sustained,
        input_tokens_per_s=rates["input"],
        output_tokens_per_s=rates["output"],
        output_tokens_per_s_per_device=rates["output"] / devices,
        output_tokens_per_s_per_user=1 / tpot.mean if tpot.mean > 0 else float("nan"),
        mean_in_system=rates["inside"],
        kv=_kv_use(meters[-1], groups[-1]),
        seconds_by_op=dict(by_op.most_common()),
        seconds_by_bound=dict(by_bound.most_common()),
        steps=dict(steps),
        preemptions=sum(request.preemptions for request in requests),
        prefix_hit_rate=sum(request.cached for request in requests) / float(prompts.sum()),
        prefix_hits=_hits(requests, groups[0][0], float(prompts.sum())),
        saturated=bool(saturated_by),
        saturated_by=saturated_by,
        blocked_fraction=blocked,
        bottleneck=saturated_by or next(iter(dict(by_bound.most_common(1))), ""),
        evidence="assumed" if assumed else max((meter.evidence for meter in meters), key=EVIDENCE_GRADES.index),
        assumed=tuple(sorted(assumed)),
        extrapolated=sum(meter.extrapolated_steps for meter in meters) / sampled if sampled else 0.0,
        timeline=sorted(point for meter in meters for point in meter.timeline),
        requests=requests,
    )


def saturation(sustained: bool | None, requests: Sequence[Request], meters: Sequence[Meter]) -> tuple[str, float]:
    """(why the deployment is overloaded, or "", share of the step time in which admission was refused).

    An open load that is kept up with (`Watch.sustained`) overloads nothing; one that is not, whatever its backlog is
    made of, does. "kv-pool", "max-running": for BLOCKED_SHARE of the time the head of the queue was refused for want of
        pages or of running slots. Where nothing is known of the load (a closed loop, a short list), waiting for it
        makes up QUEUE_SHARE of the mean TTFT as well: more load then only lengthens the queue. Queueing behind other
        prompts alone is not saturation.
    "arrivals": of an open load beyond what is served, where nothing was refused.
    """
    worst, blocked = "", 0.0
    for meter in meters:
        stepped = sum(meter.step_seconds.values())
        for reason, seconds in meter.blocked_seconds.items():
            if stepped and seconds / stepped > blocked:
                worst, blocked = reason, seconds / stepped
    if sustained is not None:
        return "" if sustained else worst if blocked >= BLOCKED_SHARE else "arrivals", blocked
    waits = np.mean([request.admitted_at - request.queued_at for request in requests])
    ttft = np.mean([request.first_token_at - request.sent_at for request in requests])
    return worst if blocked >= BLOCKED_SHARE and waits >= QUEUE_SHARE * ttft else "", blocked


def _closed_window(workload: Workload, sent: np.ndarray, last: np.ndarray) -> tuple[float, float] | None:
    """A closed loop's steady window: from when each client has had an answer, on average, to the last request sent."""
    clients = workload.concurrency
    assert clients is not None
    if len(last) <= clients:
        return None
    window = float(np.partition(last, clients - 1)[clients - 1]), float(sent.max())
    return window if window[1] - window[0] > _NARROW * (last.max() - sent.min()) else None


def _rates(requests: Sequence[Request], window: tuple[float, float], ended_at: float) -> dict[str, float]:
    """What happened a second of a window: "served" requests, "input" and "output" tokens; and requests "inside", on
    average. An answer counts by the share of it that was made within the window."""
    start, end = window
    seconds = end - start or float("nan")
    sent, first, last = (
        np.array([getattr(request, name) for request in requests])
        for name in ("sent_at", "first_token_at", "finished_at")
    )
    prompts, asked, made = (
        np.array([getattr(request, name) for request in requests], dtype=float)
        for name in ("prompt_tokens", "output_tokens", "emitted")
    )
    last = np.where(np.isnan(last), max(ended_at, end), last)
    first = np.where(np.isnan(first), last, first)
    at_once = np.where((first > start) & (first <= end), 1.0, 0.0)
    took = last - first
    inside = np.clip(np.minimum(last, end) - np.maximum(first, start), 0, None)
    share = np.divide(inside, took, out=at_once, where=took > 0)
    served = share * made / asked
    present = np.clip(np.minimum(last, end) - np.maximum(sent, start), 0, None)
    return {
        "served": float(served.sum()) / seconds,
        "input": float(served @ prompts) / seconds,
        "output": float(served @ asked) / seconds,
        "inside": float(present.sum()) / seconds,
    }


def _hits(requests: Sequence[Request], first: Replica, prompts: float) -> dict[str, float]:
    """Share of the prompt tokens that was found on the devices, and in each tier below; `first` computes prompts."""
    below = first.ranks[0].pool.below
    tiers = [tier.name for tier in below.tiers] if below else []
    came = [each.fetched for each in requests if each.fetched]
    fetched = {name: sum(each[number] for each in came) for number, name in enumerate(tiers)}
    here = sum(request.cached for request in requests) - sum(fetched.values())
    return {name: tokens / prompts for name, tokens in {"device": here, **fetched}.items()}


def _plain(value: Any) -> Any:
    """The value, or None for a number that is undefined; JSON has no NaN."""
    return None if isinstance(value, float) and np.isnan(value) else value


def _itl(meter: Meter) -> Stats:
    mean, percentiles = meter.gap_statistics(PERCENTILES)
    return Stats(float(mean), *percentiles)


def _kv_use(meter: Meter, group: Sequence[Replica]) -> KvUse:
    stepped = sum(meter.step_seconds.values())
    tokens = sum(rank.pool.tokens for replica in group for rank in replica.ranks)
    return KvUse(tokens, meter.kv_peak, meter.kv_seconds / stepped if stepped else 0.0)
