"""Whether a deployment keeps up with an open load, and over which window of a run that can be read off.

A load is kept up with where the number in the system N(t), whatever its requests wait for, stops growing once the
system has filled. So three things are needed.

*The ramp is over.* A generation ends when everyone who was in the system as it began has left. The first fills an
empty server, the next ones meet ever more of their like; after `GENERATIONS` the ramp is taken to be over. In an
overload each generation is longer than the one before, by the ratio of what is sent to what is served.

*Growth, with its error.* N at the arrivals since the ramp, averaged over `PARTS` equal parts, is fitted by a straight
line. Its slope g is the share of the arrivals that is never served. Its standard error is taken from what is left of
the parts beside the line, and is no less than sqrt(12) L / a^1.5 for a arrivals with L in the system: what a server
with room for all would show, where N swings by sqrt(L) and forgets within L arrivals. Twice that is d.

The load is kept up with where g + d < `GROWTH` after `LEAST` arrivals; or, from half as many on, where one in ten of
the later half found nobody there: who is idle is not overloaded. It is not kept up with where g exceeds `GROWTH` by 2 d
and by 3 c / sqrt(a), c the coefficient of variation of the gaps (what chance adds to a queue), and the later half grows
as well. Else it goes on: with 64 in the system some 1,000 arrivals tell, with 256 some 2,000. After `MOST` arrivals g
alone decides.

*Far beyond.* Where more than twice as many are in the system as it can have in service, and more than `FAR` of those
who came lately are still there, it is overloaded; generations would take too long to tell.

*Conversations.* What arrives is a conversation, and its further turns come because it was answered: of a load beyond
capacity they come late too, which hides it from a count by requests. N, still of requests, is therefore taken as
conversations arrive, so that g is again the share of the load that is never served; and a generation is over when its
conversations are.

The steady window begins where the ramp ends, and ends with the last request sent: what follows is the drain. Far
beyond, once as many are answered as can be in service, it is the time in which as many again are: the others wait.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.serving.request import Request

GENERATIONS = 3
PARTS = 12
GROWTH = 0.02
"""Share of the arrivals by which the number in the system grows, beyond which a load is not kept up with."""
GROWTH_GIVEN = 0.10
"""The same where the load is a given list, which may swell by itself and cannot go on until it is certain."""
FAR = 0.25
FIRST, LEAST, MOST = 8 * PARTS, 1000, 6000
"""Arrivals in the window when it is first looked at; before a load passes for kept up with; and at the most (beside
eight times what was in the system at its start)."""
_IDLE = 0.1
MOST_RAMP = 20_000
"""Arrivals, beside eight times what can be in service, after which the ramp is taken to be over."""


class Watch:
    """Follows an open load while it is played.

    holds: requests that the deployment can have in service. given: the load is a list that ends. turns: requests that
    an arrival brings, where conversations arrive: one after another, each once the one before it is answered.
    sustained: whether the load is kept up with, None while that is open. ramp_over_at: when the window began, None
    before. far: far beyond what can be served. inside: sent and not answered.
    """

    def __init__(self, holds: int, given: bool, turns: int = 1):
        self.holds, self.given, self.turns = holds, given, turns
        self.sustained: bool | None = None
        self.ramp_over_at: float | None = None
        self.far = False
        self.last_sent_at = math.nan
        self._times: list[float] = []  # of arrivals
        self._far_window = [math.nan, math.nan]
        self._done_since_far = 0
        self.inside: set[Request] = set()
        self._here: set[Request | int] = set()  # requests, or conversations, that have come and are not over
        self._older: set[Request | int] = set()  # of the present generation
        self._generations = 0
        self._counts: list[int] = []  # in the system, at each arrival
        self._ramp_arrivals = 0
        self._ramp_inside = 0
        self._next_look = FIRST
        self._next_far_look = 64

    def sent(self, request: Request, now: float, arrives: bool = True) -> None:
        """A request has been sent. arrives: of itself, not because another was answered."""
        self.inside.add(request)
        if not arrives:
            return
        self.last_sent_at = now
        self._times.append(now)
        self._counts.append(len(self.inside))
        self._here.add(_whole(request))
        if not self._older:
            self._older.add(_whole(request))
        if self.sustained is None:
            self._look(now)

    def done(self, request: Request, now: float, ends: bool = True) -> None:
        """A request has been answered. ends: no other follows it."""
        self.inside.discard(request)
        if self.far:
            self._done_since_far += 1
            if self._done_since_far in (self.holds, 2 * self.holds):
                self._far_window[self._done_since_far > self.holds] = now
        if not ends:
            return
        self._here.discard(_whole(request))
        self._older.discard(_whole(request))
        if not self._older:
            self._generations += 1
            self._older = set(self._here)
            if self._generations == GENERATIONS:
                self._end_ramp(now)

    @property
    def decided(self) -> bool:
        """What the load was followed for is known."""
        return self.sustained is not None and not (self.far and math.isnan(self._far_window[1]))

    @property
    def short_of_backlog(self) -> bool:
        """Far beyond, more has to be sent for a window in which there is always somebody waiting."""
        return self.far and len(self.inside) < 3 * self.holds

    def end(self) -> None:
        """Nothing more will be sent: decides, as far as a list allows."""
        since = len(self._counts) - self._ramp_arrivals
        if self.sustained is None and self.ramp_over_at is not None and since >= max(FIRST, 3 * self._ramp_inside):
            self.sustained = self._verdict(GROWTH_GIVEN, FIRST)

    def window(self) -> tuple[float, float] | None:
        """The steady window of the run, if it had one; of a list, where enough was sent in it."""
        if self.given and not self.far and len(self._counts) - self._ramp_arrivals < FIRST:
            return None
        start, end = self._far_window if self.far else (self.ramp_over_at or math.nan, self.last_sent_at)
        return (start, end) if end > start else None

    @property
    def sent_per_s(self) -> float:
        """Requests sent a second: in the window, or in all where there is none."""
        count, start = len(self._counts) - 1, self._times[0]
        if self.ramp_over_at is not None and self.last_sent_at > self.ramp_over_at:
            count, start = len(self._counts) - self._ramp_arrivals, self.ramp_over_at
        return self.turns * count / (self.last_sent_at - start) if self.last_sent_at > start else math.nan

    def _look(self, now: float) -> None:
        arrivals = len(self._counts)
        if self.ramp_over_at is None:
            if arrivals >= self._next_far_look:
                self._next_far_look = math.ceil(1.1 * arrivals)
                late = self._counts[arrivals // 2 :]
                if late[-1] > 2 * self.holds and late[-1] - late[0] > FAR * len(late):
                    self.far, self.sustained = True, False
                elif arrivals >= MOST_RAMP // self.turns + 8 * self.holds:
                    self._end_ramp(now)
            return
        since = arrivals - self._ramp_arrivals
        if self.given or since < self._next_look:
            return
        self._next_look = math.ceil(1.2 * since)
        self.sustained = self._verdict(GROWTH, LEAST)
        if self.sustained is None and since >= MOST + 8 * self._ramp_inside:
            self.sustained = growth(self._counts[self._ramp_arrivals :])[0] <= GROWTH

    def _verdict(self, most: float, least: int) -> bool | None:
        counts = self._counts[self._ramp_arrivals :]
        later = counts[len(counts) // 2 :]
        slope, error = growth(counts)
        idle = len(counts) >= least // 2 and later.count(1) > _IDLE * len(later)
        if idle or (len(counts) >= least and max(slope, 0.0) + error < most):
            return True
        gaps = np.diff(self._times[self._ramp_arrivals :])
        chance = 3 * float(gaps.std() / gaps.mean()) / math.sqrt(len(counts)) if gaps.any() else 0.0
        if slope - max(2 * error, chance) > most and growth(later)[0] > most:
            return False
        return None

    def _end_ramp(self, now: float) -> None:
        self.ramp_over_at = now
        self._ramp_arrivals, self._ramp_inside = len(self._counts), len(self.inside)
        self._next_look = max(FIRST, 3 * self._ramp_inside)


def _whole(request: Request) -> Request | int:
    """What arrived: a request, or the conversation whose turn it is."""
    return request if request.session is None else request.session


def growth(counts: list[int]) -> tuple[float, float]:
    """(slope of the number in the system, per arrival; twice its standard error), from its values at arrivals."""
    part = len(counts) // PARTS
    means = np.reshape(counts[len(counts) - PARTS * part :], (PARTS, part)).mean(axis=1)
    at = part * (np.arange(PARTS) - (PARTS - 1) / 2)
    slope = float(at @ means / (at @ at))
    left = means - means.mean() - slope * at
    seen = math.sqrt(float(left @ left) / (PARTS - 2) / float(at @ at))
    return slope, 2 * max(seen, math.sqrt(12) * float(means.mean()) / len(counts) ** 1.5)
