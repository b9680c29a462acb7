"""A replica: ranks that step together, at the pace of the slowest.

One rank is an ordinary tensor-parallel server. More are attention-data-parallel ranks that meet in every
MoE layer, so that a step takes as long as on the rank with the most to do.

Steps between two scheduling events differ only by contexts that grow by a token each. Such a run of decode
steps is simulated at once: it is priced at a few points and interpolated where the price is straight to
within a tolerance (`curve`). Where steps are carried out they are so one at a time, as each begins; what came of it is
there when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from runtime.serving import scheduler
from runtime.serving.clock import Clock, Virtual
from runtime.serving.meter import Meter
from runtime.serving.pricing import IDLE_S, WARM_S, BatchShape, StepPricer, step_seconds
from runtime.serving.rank import Rank, StepPlan
from runtime.serving.request import Request
from runtime.serving.worker import Worker

LONGEST_RUN = 4096
"""Decode steps simulated at once at most; bounds what one event holds in memory."""

Observe = Callable[[list[BatchShape], float, float], None]
"""Told of a step carried out: what each rank computes, start and end in seconds."""


@dataclass(slots=True)
class Run:
    """Equal-looking steps in flight: one, or several that only decode. `ends`: [steps] seconds. made: what the slots of
    each rank got, where the step was carried out."""

    plans: list[StepPlan]
    ends: np.ndarray
    made: list[np.ndarray] | None = None


class Replica:
    """Steps its ranks. `begin` starts a run and says when it ends; `end` takes it to the books.

    tolerance: relative error allowed to interpolated step times; 0 prices every step.
    prefill_only: prompts leave for another replica when computed (`handed_off` of `end`).
    worker: carries steps out; `clock` says whether they take what they are priced at.
    """

    def __init__(
        self,
        number: int,
        ranks: list[Rank],
        pricer: StepPricer,
        meter: Meter | None,
        *,
        tolerance: float,
        prefill_only: bool = False,
        worker: Worker | None = None,
        clock: Clock | None = None,
        observe: Observe | None = None,
    ):
        self.number = number
        self.ranks = ranks
        self.engine = ranks[0].engine
        self.pricer = pricer
        self.meter = meter
        self.tolerance = tolerance
        self.prefill_only = prefill_only
        self.worker, self._clock, self._observe = worker, clock or Virtual(), observe
        self.run: Run | None = None
        self._plans: list[StepPlan] = []
        self._leaving: list[tuple[Rank, Request]] = []
        self._last_start = self._last_end = self._woke = -math.inf

    def begin(self, now: float, next_event: float) -> float | None:
        """Starts what is to be done next; when it will end, or None when there is nothing to do.

        next_event: when something that may bring a request happens at the earliest; a run does not go on
        past the first step at which such a request could join.
        """
        plans = self._plan(now)
        if not any(plans):
            return None
        next_event = min(next_event, self.next_ready(now))
        if self.worker:
            return self._carry_out(self.worker, plans, now)
        if any(plan.chunks for plan in plans):
            durations = self._one_step(plans, now)
            steps = 1
        else:
            durations = self._decode_run(plans, now, next_event)
            steps = len(durations)
        used_before = sum(rank.pool.used for rank in self.ranks)
        for rank, plan in zip(self.ranks, plans, strict=True):
            if plan.decode:
                rank.grow(steps)
        ends = now + np.cumsum(durations)
        self.run = Run(plans, ends)
        self._last_end = float(ends[-1])
        self._last_start = float(ends[-2]) if steps > 1 else now
        self._record(plans, durations, now, used_before)
        return self._last_end

    def next_ready(self, now: float) -> float:
        """When the next cache that a prompt waits for will have come from below."""
        return min(rank.next_ready(now) for rank in self.ranks)

    def end(self) -> tuple[list[Request], list[Request]]:
        """Carries out the run that has ended: (requests finished, requests handed off)."""
        assert self.run is not None
        run, self.run = self.run, None
        now = float(run.ends[-1])
        finished: list[Request] = []
        handed_off: list[Request] = []
        for number, (rank, plan) in enumerate(zip(self.ranks, run.plans, strict=True)):
            if plan.decode:
                done, gaps = rank.decode(run.ends, run.made[number] if run.made else None)
                finished += done
                if self.meter:
                    self.meter.tokens(gaps, run.ends)
            if plan.chunks or not plan.decode:
                rank.follows = False
            for request, tokens, before in plan.chunks:
                request.computed = before + tokens
                if request.computed < request.target:
                    continue
                if self.prefill_only and request.output_tokens > request.emitted + 1:
                    rank.hand_off(request)
                    handed_off.append(request)
                else:
                    rank.end_prefill(request, now)
                    if request.finished:
                        finished.append(request)
        leaving, self._leaving = self._leaving, []
        for rank, request in leaving:
            if request in rank.prefilling or request in rank.running:
                rank.drop(request)
        return finished, handed_off

    def drop(self, request: Request) -> bool:
        """Takes a request out, as soon as no step has it; False where it is not here."""
        for rank in self.ranks:
            if request in rank.waiting:
                rank.drop(request)
                if self.worker:
                    self.worker.moving.pop(request, None)
                return True
            if request in rank.prefilling or request in rank.running:
                if self.run is None:
                    rank.drop(request)
                else:
                    self._leaving.append((rank, request))
                return True
        return False

    def give_up(self) -> list[Request]:
        """After a step that could not be carried out: its requests, which are gone; all others here start again, and
        nothing is kept for reuse, for what caches hold is not known any more."""
        assert self.worker is not None
        lost: list[Request] = []
        for rank, plan in zip(self.ranks, self._plans, strict=True):
            concerned = [request for request, *_ in plan.chunks] + (rank.running if plan.decode else [])
            for request in concerned:
                rank.drop(request)
            for request in list(rank.handed_off):
                rank.release(request)
                concerned.append(request)
            for request in [*rank.running, *rank.prefilling]:
                rank.preempt(request)
            rank.pool.flush()
            lost += concerned
        for request in lost:
            request.gone = True
        self.worker.reset()
        return lost

    def _carry_out(self, worker: Worker, plans: list[StepPlan], now: float) -> float:
        """Has one step carried out, and says when it ends."""
        self._plans = plans
        used_before = sum(rank.pool.used for rank in self.ranks)
        shapes = [rank.shape(plan) for rank, plan in zip(self.ranks, plans, strict=True)] if self._observe else []
        for rank, plan in zip(self.ranks, plans, strict=True):
            if plan.decode:
                rank.grow(1)
        made = worker.run(plans, self.ranks)
        end = max(now, self._clock.now()) if self._clock.measures else now + float(self._one_step(plans, now)[0])
        self.run = Run(plans, np.array([end]), made)
        self._last_start, self._last_end = now, end
        self._record(plans, np.array([end - now]), now, used_before)
        if self._observe:
            self._observe(shapes, now, end)
        return end

    def _plan(self, now: float) -> list[StepPlan]:
        """With overlap scheduling a step that follows another was planned as that one started."""
        overlapped = self.engine.overlap_scheduling and self._last_end == now
        plans = [scheduler.plan(rank, self._last_start if overlapped else now, now) for rank in self.ranks]
        if overlapped and not any(plans):
            plans = [scheduler.plan(rank, now, now) for rank in self.ranks]
        return plans

    def _busy(self, plans: list[StepPlan]) -> list[tuple[Rank, StepPlan]]:
        return [(rank, plan) for rank, plan in zip(self.ranks, plans, strict=True) if plan]

    def _seconds(self, rank: Rank, plan: StepPlan, step: int) -> float:
        """Step time on one rank, `step` decode steps from now."""
        shape = rank.shape(plan, step)
        return step_seconds(self.engine, self.pricer.seconds(shape), shape) + self._lost_seconds(rank, plan)

    def _lost_seconds(self, rank: Rank, plan: StepPlan) -> float:
        """What a step of prompts waits for the step of answers that was launched ahead of it, for nothing, beyond the
        host's work meanwhile."""
        if not (self.engine.ahead_step_seconds and rank.follows and plan.chunks) or plan.decode:
            return 0.0
        lost = rank.shape(StepPlan(decode=True))
        host = self.engine.step_seconds(0.0, lost.graphed, lost.pieces)
        return max(0.0, self.pricer.seconds(lost) - host) if lost.ahead else 0.0

    def _one_step(self, plans: list[StepPlan], now: float) -> np.ndarray:
        """[1] seconds of the step that begins now: its slowest rank's."""
        return self._from_rest(now, np.array([max(self._seconds(rank, plan, 0) for rank, plan in self._busy(plans))]))

    def _from_rest(self, now: float, durations: np.ndarray) -> np.ndarray:
        """Seconds of steps that follow one another from now on, with what they take longer because nothing ran before
        the first of them, or did not for long."""
        engine = self.engine
        if now - self._last_end >= IDLE_S:
            self._woke = now
            durations[0] += engine.idle_host_seconds
        awake = now - self._woke
        for step in range(len(durations) if engine.warming_host_seconds else 0):
            if awake >= WARM_S:
                break
            if awake > 0:
                durations[step] += engine.warming_host_seconds * (1.0 - awake / WARM_S)
            awake += durations[step]
        return durations

    def _decode_run(self, plans: list[StepPlan], now: float, next_event: float) -> np.ndarray:
        """[steps] seconds of the decode steps up to the next scheduling event."""
        busy = self._busy(plans)
        steps = min(rank.steps_possible(LONGEST_RUN) for rank, _ in busy)
        if any(rank.waiting and not rank.blocked for rank in self.ranks):
            steps = 1  # a request is there that the next plan will see
        extra = 1 if self.engine.overlap_scheduling else 0
        if steps > 1 and next_event < math.inf:
            later = 1 if self.engine.ahead_step_seconds else 0  # the first may have to wait for the host
            first = max(self._seconds(rank, plan, later) for rank, plan in busy)
            most = max(0.0, next_event - now) / first + 1 if first > 0 else steps
            steps = int(min(steps, most + extra + 1))
        curves = [curve(partial(self._seconds, rank, plan), steps, self.tolerance) for rank, plan in busy]
        durations = curves[0] if len(curves) == 1 else np.max(curves, axis=0)
        durations = self._from_rest(now, durations)
        until = int(np.searchsorted(now + np.cumsum(durations), next_event)) + 1 + extra
        return durations[:until]

    def _record(self, plans: list[StepPlan], durations: np.ndarray, now: float, used_before: int) -> None:
        """Tells the meter about the run, as seen by the rank that computes the most tokens."""
        if self.meter is None:
            return
        rank, plan = max(self._busy(plans), key=lambda busy: len(busy[0].kv) + sum(new for _, new, _ in busy[1].chunks))
        shape = rank.shape(plan, len(durations) // 2)
        self.meter.steps(self.number, self.ranks, shape, self.pricer, durations, now, used_before)


def curve(seconds: Callable[[int], float], steps: int, tolerance: float) -> np.ndarray:
    """[steps] values of `seconds(0..steps-1)`, interpolated where that is good to `tolerance`.

    An interval is halved until the price at its middle lies within `tolerance` (relative) of the straight
    line between its ends. Exact for prices linear in the context; for concave or convex ones the error
    between the points tested is below that tested. tolerance 0: every step is priced.
    """
    if not tolerance or steps <= 3:
        return np.array([seconds(step) for step in range(steps)])
    known = {0: seconds(0), steps - 1: seconds(steps - 1)}
    intervals = [(0, steps - 1)]
    while intervals:
        first, last = intervals.pop()
        if last - first < 2:
            continue
        middle = (first + last) // 2
        known[middle] = seconds(middle)
        share = (middle - first) / (last - first)
        straight = known[first] * (1 - share) + known[last] * share
        if abs(known[middle] - straight) > tolerance * known[middle]:
            intervals += [(first, middle), (middle, last)]
    points = sorted(known)
    return np.interp(np.arange(steps), points, [known[point] for point in points])
