"""Answers at work on a replica, from event to event.

The scheduler of `runtime/serving` plans every step, which is more than a thousand long answers a training step can pay.
Between two events (an answer joins or ends, pages run out, weights change) a replica's answers each get a token a step,
so that one counter of steps says how far all of them are; its pace is the price of a step at the mean context, taken
again when that has grown by `_GROWTH`. The engine's rules are kept in their coarse form: prompts go before tokens
(prefill-first) or beside them (mixed), as many of their tokens a step as it takes; an answer is admitted where its
cache finds room; where growing answers fill the cache, what is kept of others goes first, then the last to come begins
again. `tests/planning/test_rl_replica.py` holds it to the scheduler.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from foundation.errors import CapacityError
from runtime.planning.rl.load import RolloutTurn

_GROWTH = 0.05
_LEAST_STRIDE = 16.0
"""Steps between two prices of a pace at least."""
_CLOSE = 1e-6
"""Of a step: closer are the same."""


class RolloutPrices(Protocol):
    """What a rank's steps take. mixed: prompts are computed beside answers. prompt_tokens: of prompts in a step."""

    @property
    def mixed(self) -> bool: ...

    @property
    def prompt_tokens(self) -> int: ...

    def decode_seconds(self, rows: int, context: float) -> float:
        """A token for each of `rows` answers, at that mean context."""
        ...

    def prompt_seconds(self, chunks: Sequence[tuple[int, int]], rows: int, context: float) -> float:
        """(new tokens, tokens before them) of prompts, beside `rows` answers where they are mixed."""
        ...


@dataclasses.dataclass(frozen=True)
class GrowthReserve:
    """What must be free, beside all that one more answer will draw, for it to be admitted: a share of what those at
    work have yet to draw, each counted up to `most` tokens. The share falls from `first` to `least` over `steps`; when
    one has had to begin again it is what was needed, `margin` steps on (SGLang's new_token_ratio)."""

    first: float
    least: float
    steps: float = 1.0
    margin: float = 0.0
    most: float = math.inf


@dataclasses.dataclass(frozen=True)
class RolloutSide:
    """What generates. ranks: of a replica, in lock-step. pool_tokens, most_running: of a rank. reuse: caches are kept
    between turns, and a question's is shared by its group. reserve: None where the prompt alone must find room."""

    replicas: int
    ranks: int
    pool_tokens: int
    most_running: int
    prices: RolloutPrices
    reuse: bool = True
    reserve: GrowthReserve | None = None


@dataclasses.dataclass(slots=True, eq=False)
class RolloutAnswer:
    """An answer of a group at work. context: tokens before the next. drawn: tokens of it by the version that drew them.

    place: (replica, rank). joined: the replica's counter when its turn began to be drawn; left: tokens of the turn
    then.
    """

    number: int
    group: int
    turns: tuple[RolloutTurn, ...]
    turn: int = 0
    context: int = 0
    left: int = 0
    place: tuple[int, int] | None = None
    joined: float = 0.0
    stamp: int = 0
    drawn: dict[int, int] = dataclasses.field(default_factory=dict)
    preemptions: int = 0

    @property
    def question(self) -> int:
        return self.turns[0].given

    @property
    def tokens(self) -> int:
        """Of all that was drawn and given."""
        return sum(turn.given + turn.drawn for turn in self.turns)


class _Rank:
    """own: tokens of running answers, questions left out, less the counter's value for each. contexts: the same with
    questions. ends: sum of where the counter stands as they end. kept: what answers between turns left. questions: by
    group, how many answers here have it; computed: those whose cache is there. fixed: tokens of kept caches, of
    questions and of prompts being computed."""

    def __init__(self) -> None:
        self.running: list[RolloutAnswer] = []
        self.waiting: deque[RolloutAnswer] = deque()
        self.kept: OrderedDict[RolloutAnswer, int] = OrderedDict()
        self.questions: dict[int, int] = {}
        self.computed: set[int] = set()
        self.fixed = 0
        self.own = self.contexts = self.ends = 0.0
        self.reserved: tuple[float, float] | None = None  # a share, and where the counter stood when it was
        self.held_back = False  # one was thrown out; nobody comes in before another has ended


class RolloutReplica:
    """Of a `RolloutSide`. `next_at`: when something happens here next; `advance` then says whose turns have ended.

    busy_s: seconds with an answer at work. paused_s: that it stood still for new weights.
    """

    def __init__(self, number: int, side: RolloutSide):
        self.number, self.side = number, side
        self.ranks = [_Rank() for _ in range(side.ranks)]
        self.now = self.busy_s = self.paused_s = 0.0
        self.next_at = math.inf
        self.preemptions = 0
        self._counter = 0.0
        self._marks: list[tuple[float, int]] = [(0.0, 0)]
        self._ends: list[tuple[float, int, int, RolloutAnswer]] = []
        self._order = itertools.count()
        self._pace = self._target = 0.0
        self._doing = "nothing"
        self._until = math.inf
        self._joining: list[tuple[_Rank, RolloutAnswer]] = []
        self._gained = 0.0

    @property
    def running(self) -> int:
        """Answers at work."""
        return sum(len(rank.running) for rank in self.ranks) + len(self._joining)

    def send(self, answer: RolloutAnswer, rank: int, now: float) -> None:
        """A turn of an answer begins: what is given is in its context, and `left` tokens are to be drawn."""
        self._move(now)
        self.ranks[rank].waiting.append(answer)
        if self._doing in ("nothing", "drawing"):
            self._plan()

    def catch_up(self, now: float) -> None:
        """Brings the figures up to a time before the next event."""
        self._move(now)

    def load_weights(self, version: int | None, pause_s: float, now: float) -> None:
        """Stands still for `pause_s`, once a step of prompts has ended; what is drawn from now on is `version`'s."""
        self._move(now)
        if version is not None:
            self._marks.append((self._counter, version))
        if not pause_s:
            return
        if self._doing == "prompts":
            self.paused_s += pause_s
            self.busy_s -= pause_s
            self._until += pause_s
        else:
            self._until = pause_s + (self._until if self._doing == "paused" else now)
            self._doing = "paused"
        self.next_at = self._until

    def advance(self, now: float) -> list[RolloutAnswer]:
        """What happens at `now`; the answers whose turns have ended."""
        self._move(now)
        ended: list[RolloutAnswer] = []
        if self._doing == "prompts" and now >= self._until:
            self._counter += self._gained
            joining, self._joining = self._joining, []
            for rank, answer in joining:
                self._join(rank, answer)
        elif self._doing == "drawing" and now >= self._until:
            self._counter = self._target  # whatever time rounds to
        elif self._doing == "paused" and now < self._until:
            return ended
        while self._ends and self._ends[0][0] <= self._counter + _CLOSE:
            _, _, stamp, answer = heapq.heappop(self._ends)
            if stamp == answer.stamp:
                self._end(answer)
                ended.append(answer)
        self._plan()
        return ended

    # --- time

    def _move(self, now: float) -> None:
        passed, self.now = now - self.now, now
        if self._doing == "paused":
            self.paused_s += passed
        elif self._doing != "nothing":
            self.busy_s += passed
            if self._doing == "drawing":
                self._counter += self._pace * passed

    def _plan(self) -> None:
        """What is done from now on."""
        seconds = self._admit()
        if seconds is not None:
            self._doing, self._until = "prompts", self.now + seconds
        elif any(rank.running for rank in self.ranks):
            self._draw()
        else:
            self._doing, self._until = "nothing", math.inf
        self.next_at = self._until

    def _draw(self) -> None:
        for rank in self.ranks:
            self._make_room(rank)
        steps = self._soonest() - self._counter
        busy = [rank for rank in self.ranks if rank.running]
        for rank in busy:
            steps = min(steps, self._free(rank) / len(rank.running))
        most = max(busy, key=lambda rank: (len(rank.running), rank.contexts))
        furthest = max(busy, key=lambda rank: rank.contexts + self._counter * len(rank.running))
        steps = min(steps, max(_LEAST_STRIDE, _GROWTH * self._mean_context(furthest)))
        decode = self.side.prices.decode_seconds
        slow = [decode(len(rank.running), self._mean_context(rank) + steps / 2) for rank in {most, furthest}]
        self._pace = 1.0 / max(slow)
        steps = max(steps, _CLOSE)
        self._target = self._counter + steps
        self._doing, self._until = "drawing", self.now + steps / self._pace

    # --- who comes and goes

    def _admit(self) -> float | None:
        """Takes up who waits, as far as there is room; the seconds that their prompts take, None where nobody came."""
        prices = self.side.prices
        longest, steps = None, 0
        for rank in self.ranks:
            chunks = self._chunks(rank) if rank.waiting else []
            if not chunks:
                continue
            rows = len(rank.running) if prices.mixed else 0
            seconds = prices.prompt_seconds(chunks, rows, self._mean_context(rank) if rows else 0.0)
            longest = max(longest or 0.0, seconds)
            steps = max(steps, math.ceil(sum(new for new, _ in chunks) / prices.prompt_tokens))
        soonest = self._soonest() - self._counter  # nobody is drawn past the end of an answer
        self._gained = min(float(steps), max(0.0, soonest)) if prices.mixed and self._ends else 0.0
        return longest

    def _chunks(self, rank: _Rank) -> list[tuple[int, int]]:
        """Of those that a rank takes up now: new tokens, and tokens before them."""
        chunks: list[tuple[int, int]] = []
        budget, here = self.side.prices.prompt_tokens, 0
        while rank.waiting and budget > 0:
            answer = rank.waiting[0]
            if not self._fits(rank, answer, len(rank.running) + here):
                break
            rank.waiting.popleft()
            new = max(1, answer.context - self._take_up(rank, answer))
            chunks.append((new, answer.context - new))
            self._joining.append((rank, answer))
            budget, here = budget - new, here + 1
        return chunks

    def _fits(self, rank: _Rank, answer: RolloutAnswer, busy: int) -> bool:
        if busy >= self.side.most_running or (rank.held_back and busy):
            return False
        need = answer.context - answer.question + 1 - rank.kept.get(answer, 0)
        if self.side.reserve:
            need += self._reserved(rank, answer, self.side.reserve)
        if answer not in rank.kept and not rank.questions.get(self._key(answer)):
            need += answer.question
        while need + busy > self._free(rank):
            other = next((each for each in rank.kept if each is not answer), None)
            if other is None:
                return not busy  # alone, it fits
            self._forget(rank, other)
        return True

    def _reserved(self, rank: _Rank, answer: RolloutAnswer, reserve: GrowthReserve) -> int:
        """Tokens that are kept free for those at work, and this one, to grow."""
        most, count = reserve.most, len(rank.running)
        growth = min(answer.left, most) + sum(min(each.left, most) for where, each in self._joining if where is rank)
        if count:
            if rank.reserved is None:
                rank.reserved = reserve.first, self._counter
            share, since = rank.reserved
            share -= (reserve.first - reserve.least) / reserve.steps * (self._counter - since)
            growth += max(reserve.least, share) * count * min(rank.ends / count - self._counter, most)
        return int(growth)

    def _take_up(self, rank: _Rank, answer: RolloutAnswer) -> int:
        """Counts its cache; the tokens of it that are there already."""
        kept, own = rank.kept.pop(answer, None), answer.context - answer.question
        found = answer.question + kept if kept is not None else 0
        rank.fixed += own - (kept or 0)
        if kept is None:
            key = self._key(answer)
            if rank.questions.get(key):
                found = answer.question if key in rank.computed else 0
            else:
                rank.fixed += answer.question
            rank.questions[key] = rank.questions.get(key, 0) + 1
        return found

    def _join(self, rank: _Rank, answer: RolloutAnswer) -> None:
        """Its prompt is computed, and its first token with it."""
        rank.computed.add(self._key(answer))
        rank.fixed -= answer.context - answer.question
        answer.context += 1
        answer.left -= 1
        answer.joined = self._counter
        self._note(answer, 1, self._counter)
        self._count(rank, answer, 1)
        rank.running.append(answer)
        heapq.heappush(self._ends, (self._counter + answer.left, next(self._order), answer.stamp, answer))

    def _count(self, rank: _Rank, answer: RolloutAnswer, sign: int) -> None:
        at = answer.context - answer.joined
        rank.contexts += sign * at
        rank.own += sign * (at - answer.question)
        rank.ends += sign * (answer.joined + answer.left)

    def _leave(self, rank: _Rank, answer: RolloutAnswer, made: int) -> None:
        """It stops being drawn, `made` tokens after it joined."""
        self._count(rank, answer, -1)
        rank.running.remove(answer)
        answer.stamp += 1
        self._note(answer, made, answer.joined)
        answer.context += made
        answer.left -= made

    def _end(self, answer: RolloutAnswer) -> None:
        assert answer.place is not None
        rank = self.ranks[answer.place[1]]
        self._leave(rank, answer, answer.left)
        rank.held_back = False
        if not rank.running:
            rank.reserved = None
        if self.side.reuse and answer.turn + 1 < len(answer.turns):
            rank.kept[answer] = answer.context - answer.question
            rank.fixed += rank.kept[answer]
        else:
            self._release(rank, answer)

    def _release(self, rank: _Rank, answer: RolloutAnswer) -> None:
        """Its share of its group's question."""
        key = self._key(answer)
        rank.questions[key] -= 1
        if not rank.questions[key]:
            del rank.questions[key]
            rank.computed.discard(key)
            rank.fixed -= answer.question

    def _forget(self, rank: _Rank, answer: RolloutAnswer) -> None:
        rank.fixed -= rank.kept.pop(answer)
        self._release(rank, answer)

    def _make_room(self, rank: _Rank) -> None:
        """For a token of each."""
        while rank.running and self._free(rank) < len(rank.running):
            if rank.kept:
                self._forget(rank, next(iter(rank.kept)))
            elif len(rank.running) > 1:
                answer = rank.running[-1]
                self._leave(rank, answer, int(self._counter - answer.joined + _CLOSE))
                self._release(rank, answer)
                answer.preemptions += 1
                self.preemptions += 1
                rank.waiting.appendleft(answer)
                rank.held_back = True
                if reserve := self.side.reserve:
                    at_work = rank.running
                    asked = sum(each.turns[each.turn].drawn for each in at_work)
                    made = asked - (rank.ends - len(at_work) * self._counter)
                    rank.reserved = min(1.0, (made + reserve.margin * len(at_work)) / (asked + 1)), self._counter
            else:
                raise CapacityError(
                    f"an answer of {rank.running[0].tokens:,} tokens does not fit a rank's cache of "
                    f"{self.side.pool_tokens:,}: shorten it"
                )

    def _free(self, rank: _Rank) -> float:
        return self.side.pool_tokens - rank.fixed - rank.own - len(rank.running) * self._counter

    def _mean_context(self, rank: _Rank) -> float:
        return rank.contexts / len(rank.running) + self._counter

    def _soonest(self) -> float:
        """Where the counter stands when the next answer ends."""
        while self._ends and self._ends[0][2] != self._ends[0][3].stamp:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def _key(self, answer: RolloutAnswer) -> int:
        """Of the question's cache."""
        return answer.group if self.side.reuse else -1 - answer.number

    def _note(self, answer: RolloutAnswer, tokens: int, since: float) -> None:
        """So many tokens of an answer were drawn, one a step of the counter from `since` on."""
        place = bisect.bisect_right(self._marks, (since, math.inf)) - 1
        while tokens > 0:
            version = self._marks[place][1]
            until = self._marks[place + 1][0] if place + 1 < len(self._marks) else math.inf
            here = tokens if until - since >= tokens else round(until - since)
            answer.drawn[version] = answer.drawn.get(version, 0) + here
            tokens, since, place = tokens - here, until, place + 1
