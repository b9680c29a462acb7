"""What is measured while the simulation runs, at a cost per step that does not grow.

Only the window after warm-up counts (`restart`). Times by op are estimated from a sample of the steps, since
a full price costs more than a number: within each kind of step (prefill, decode, mixed) the sampled shares
are scaled to the kind's exact total.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from runtime.serving.pricing import EVIDENCE_GRADES, BatchShape, StepPricer
from runtime.serving.rank import Rank
from runtime.serving.trace import Trace

SAMPLE_FIRST, SAMPLE_EVERY = 16, 64
_LEAST_GAP, _BINS_PER_E = 1e-7, 200  # token gaps are binned to 0.5 %


@dataclass
class _Sampled:
    """Sampled prices of one kind of step: seconds by op and bound, and the step time they stand for."""

    seconds: float = 0.0
    by_op: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_bound: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Meter:
    """Totals over the measured window of a group of replicas.

    step_seconds, step_counts: by kind of step. kv_seconds: integral of the used share of the pools.
    blocked_seconds: by reason, time that some rank refused its queue's head. timeline: (seconds, replica,
    in service, waiting, used share of the pages) at the start of each run.
    """

    def __init__(self, trace: Trace | None = None):
        self.trace = trace
        self.restart(0.0)

    def restart(self, now: float) -> None:
        """Forgets everything measured before `now`."""
        self.started_at = now
        self.step_seconds: dict[str, float] = defaultdict(float)
        self.step_counts: Counter[str] = Counter()
        self.blocked_seconds: dict[str, float] = defaultdict(float)
        self.kv_seconds = 0.0
        self.kv_peak = 0.0
        self.timeline: list[tuple[float, int, int, int, float]] = []
        self.evidence = EVIDENCE_GRADES[0]
        self.assumed: frozenset[str] = frozenset()
        self.sampled_steps = 0
        self.extrapolated_steps = 0
        self._runs: Counter[str] = Counter()
        self._samples: dict[str, _Sampled] = {}
        self._largest = 0.0
        self._gaps: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._buffered = 0
        self._bins = np.zeros(0)
        self._gap_seconds = 0.0

    def steps(
        self,
        replica: int,
        ranks: list[Rank],
        shape: BatchShape,
        pricer: StepPricer,
        durations: np.ndarray,
        now: float,
        used_before: int,
    ) -> None:
        """A run of steps starts at `now`.

        shape: its middle step on the busiest rank. used_before: pages in use before the run took its own.
        """
        chunks = bool(shape.prefill_chunks)
        kind = "decode" if not chunks else "mixed" if shape.decode_count else "prefill"
        seconds = float(durations.sum())
        self.step_seconds[kind] += seconds
        self.step_counts[kind] += len(durations)
        pages = sum(rank.pool.total for rank in ranks)
        used = sum(rank.pool.used for rank in ranks) / pages
        self.kv_seconds += (used_before / pages + used) / 2 * seconds
        self.kv_peak = max(self.kv_peak, used)
        waiting = sum(len(rank.waiting) for rank in ranks)
        in_service = sum(rank.in_service for rank in ranks)
        for reason in {rank.blocked for rank in ranks if rank.blocked and rank.waiting}:
            self.blocked_seconds[reason] += seconds
        self.timeline.append((now, replica, in_service, waiting, used))
        size = float(shape.decode_contexts.sum()) + 100.0 * shape.prefill_tokens
        run = self._runs[kind]
        self._runs[kind] += 1
        if run < SAMPLE_FIRST or run % SAMPLE_EVERY == 0 or size > 1.25 * self._largest:
            self._largest = max(self._largest, size)
            self._sample(kind, shape, pricer, float(durations[len(durations) // 2]), seconds)
        if self.trace is not None:
            self.trace.run(replica, kind, now, durations, shape, in_service, waiting, used)
            self.trace.note(ranks, pricer, durations, shape)

    def tokens(self, gaps: np.ndarray, ends: np.ndarray) -> None:
        """Token gaps of a run: `gaps` per slot for its first step, step times for the rest."""
        self._gaps += [gaps, np.diff(ends)]
        self._weights += [np.ones(len(gaps)), np.full(len(ends) - 1, float(len(gaps)))]
        self._buffered += len(gaps) + len(ends)
        if self._buffered > 1 << 16:
            self._flush()

    def gap_statistics(self, percentiles: tuple[float, ...]) -> tuple[float, list[float]]:
        """(mean, percentiles) of the gaps between consecutive output tokens, seconds, to 0.5 %."""
        self._flush()
        total = self._bins.sum()
        if not total:
            return float("nan"), [float("nan")] * len(percentiles)
        reached = np.cumsum(self._bins) / total
        bins = [int(np.searchsorted(reached, percent / 100)) for percent in percentiles]
        return self._gap_seconds / total, [_LEAST_GAP * float(np.exp((b + 0.5) / _BINS_PER_E)) for b in bins]

    def by_op(self) -> dict[str, float]:
        """Step time by op, seconds; "host" is the engine's own, where the device waits for it."""
        return self._scaled("by_op")

    def by_bound(self) -> dict[str, float]:
        """Step time by what bounds it, seconds."""
        return self._scaled("by_bound")

    def _scaled(self, what: str) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for kind, sampled in self._samples.items():
            scale = self.step_seconds[kind] / sampled.seconds if sampled.seconds else 0.0
            for name, seconds in getattr(sampled, what).items():
                total[name] += seconds * scale
        return dict(total)

    def _sample(self, kind: str, shape: BatchShape, pricer: StepPricer, step: float, run: float) -> None:
        """Adds the run's full price, that of one step of `step` seconds scaled to the run's `run` seconds."""
        price = pricer.price(shape)
        sampled = self._samples.setdefault(kind, _Sampled())
        steps = run / step if step else 1.0
        sampled.seconds += run
        for totals, part in ((sampled.by_op, price.by_op), (sampled.by_bound, price.by_bound)):
            for name, seconds in part.items():
                totals[name] += seconds * steps
        host = max(0.0, step - price.seconds) * steps
        sampled.by_op["host"] += host
        sampled.by_bound["overhead"] += host
        self.sampled_steps += 1
        self.extrapolated_steps += price.extrapolated
        self.evidence = max(self.evidence, price.evidence, key=EVIDENCE_GRADES.index)
        self.assumed |= price.assumed

    def _flush(self) -> None:
        """Moves buffered gaps into the histogram."""
        if not self._buffered:
            return
        gaps, weights = np.concatenate(self._gaps), np.concatenate(self._weights)
        self._gap_seconds += float(gaps @ weights)
        places = (np.log(np.maximum(gaps, _LEAST_GAP) / _LEAST_GAP) * _BINS_PER_E).astype(np.int64)
        counts = np.bincount(places, weights, minlength=len(self._bins))
        counts[: len(self._bins)] += self._bins
        self._bins = counts
        self._gaps, self._weights, self._buffered = [], [], 0
