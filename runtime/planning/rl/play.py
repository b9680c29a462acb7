"""Generation and training beside one another, on a virtual clock: the loop of `glm5 rl` with priced steps.

The same `Pacer` says which groups may begin and what a step trains on, and things come in the same order: a step takes
its groups once they are there, trains, sends the next version, and only then do groups begin that this allows. What
reaches the rollout side does so in order: groups that begin behind a version wait for it.

    train     a step's groups are there; it lasts what training on their lengths does
    send      the next version goes out, which the training side waits for
    arrive    it is there: replicas stand still to load it, and groups behind it begin
    turn      an answer's turn is drawn; its environment goes to work
    due       the environment is through: the next turn, or the answer is done
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from runtime.planning.rl.load import RolloutLoad
from runtime.planning.rl.played import Doing, Life, Played, RlStep, TrainerSpan
from runtime.planning.rl.replica import RolloutAnswer, RolloutReplica, RolloutSide
from runtime.serving.pacing import Pacer, RolloutAdmission


@dataclasses.dataclass(frozen=True)
class Publishing:
    """How a version reaches the rollout side. send_s: until it is there, during which the training side does nothing
    else. load_s: that a replica then stands still for it. in_flight: replicas go on while it is sent; else they stand
    still then, too."""

    send_s: float = 0.0
    load_s: float = 0.0
    in_flight: bool = True


@dataclasses.dataclass(frozen=True)
class RlSchedule:
    """Who waits for whom. staleness: versions that a group may be behind (0: in step). admission: see
    `runtime.serving.pacing`. drains: a version is loaded only when no answer is at work (one step ahead)."""

    staleness: int = 1
    admission: RolloutAdmission = "paced"
    drains: bool = False


def play(
    load: RolloutLoad,
    rollouts: RolloutSide,
    train_seconds: Callable[[Sequence[int]], float],
    sync: Publishing,
    schedule: RlSchedule,
    steps: int = 8,
    run_up: int | None = None,
    seed: int = 0,
    drain: bool = False,
) -> Played:
    """Plays `run_up` training steps (by default until staleness has its full effect) and then `steps` that are
    reported.

    train_seconds: of a step on sequences of these tokens, a question and its answer each. drain: no more groups begin
    than are trained on. The same arguments give the same play. Raises `CapacityError` for an answer that no rank holds.
    """
    before = schedule.staleness + 1 if run_up is None else run_up
    return _Play(load, rollouts, train_seconds, sync, schedule, before, steps, seed, drain).run()


class _Play:
    def __init__(
        self,
        load: RolloutLoad,
        rollouts: RolloutSide,
        train_seconds: Callable[[Sequence[int]], float],
        sync: Publishing,
        schedule: RlSchedule,
        run_up: int,
        steps: int,
        seed: int,
        drain: bool,
    ):
        self.load, self.side, self.train_seconds = load, rollouts, train_seconds
        self.sync, self.schedule, self.run_up, self.steps, self.seed = sync, schedule, run_up, steps, seed
        total = (run_up + steps + (0 if drain else 2 * schedule.staleness + 2)) * load.groups
        self.pacer = Pacer(load.groups, total, schedule.staleness, schedule.admission)
        self.replicas = [RolloutReplica(number, rollouts) for number in range(rollouts.replicas)]
        self.places = [0] * (rollouts.replicas * rollouts.ranks)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.numbered = itertools.count()
        self.commands: deque[tuple[str, Any]] = deque()
        self.sending: dict[int, float] = {}
        """Versions on their way, and when each is there."""
        self.groups: dict[int, list[RolloutAnswer]] = {}
        """Of those under way, the answers that are done."""
        self.whole: dict[int, list[RolloutAnswer]] = {}
        self.told: deque[int] = deque()
        """Groups that are whole and of which the training side has not heard."""
        self.began: dict[int, float] = {}
        self.waiting_since: float | None = None
        self.done: list[RlStep] = []
        self.spans: list[TrainerSpan] = []
        self.arrivals: list[float] = []
        self.levels: list[tuple[float, int, int]] = []
        self.lives: list[Life] = []
        self.drawing = self.outside = 0
        self.area, self.area_at = 0.0, 0.0
        self.whole_tokens = self.trained_tokens = 0
        self.scheduled = [math.inf] * rollouts.replicas

    def run(self) -> Played:
        at_begin = self._figures() if not self.run_up else None
        self._ready()
        while len(self.done) < self.run_up + self.steps:
            assert self.heap, "nothing happens any more"
            time, _, handle, arguments = heapq.heappop(self.heap)
            assert time >= self.now, "the clock ran backwards"
            self.now = time
            handle(*arguments)
            if at_begin is None and len(self.done) == self.run_up:
                at_begin = self._figures()
        assert at_begin is not None
        begin, busy, paused, area = at_begin
        end, busy_end, paused_end, area_end = self._figures()
        held = sum(self._tokens(group) for group in self.pacer.finished)
        held += sum(self._tokens(group) for group in self.told)
        return Played(
            begin, end, self.load.answers, tuple(self.done[self.run_up :]), tuple(self.spans), tuple(self.arrivals),
            tuple(self.levels), tuple(self.lives), busy_end - busy, paused_end - paused,
            (area_end - area) / (end - begin) if end > begin else 0.0, self.pacer.thrown_away,
            self.whole_tokens - self.trained_tokens - held, self.trained_tokens,
            sum(replica.preemptions for replica in self.replicas),
        )  # fmt: skip

    def _figures(self) -> tuple[float, float, float, float]:
        """(now, seconds that replicas were busy, paused, both on average, groups x seconds under way) so far."""
        for replica in self.replicas:
            replica.catch_up(self.now)
        count = len(self.replicas)
        self._under_way()
        return (
            self.now,
            sum(replica.busy_s for replica in self.replicas) / count,
            sum(replica.paused_s for replica in self.replicas) / count,
            self.area,
        )

    def _at(self, time: float, handle: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.heap, (time, next(self.order), handle, arguments))

    # --- training

    def _ready(self) -> None:
        """The training side looks for its next step."""
        self.waiting_since = self.now
        self._begin()
        self._collect()

    def _collect(self) -> None:
        """Takes a step's groups if they are there, else one group more that is whole, as long as there are any."""
        while self.waiting_since is not None:
            if (taken := self.pacer.take()) is not None:
                self._train(taken.groups, taken.versions)
            elif self.told:
                self.pacer.finish(self.told.popleft())
                self._begin()
            else:
                return

    def _begin(self) -> None:
        if fresh := self.pacer.begin():
            self.commands.append(("begin", fresh))
            self._obey()

    def _train(self, groups: tuple[int, ...], versions: tuple[int, ...]) -> None:
        assert self.waiting_since is not None
        waited, version = self.now - self.waiting_since, self.pacer.version - 1
        self._span("waiting", self.waiting_since, self.now)
        self.waiting_since = None
        answers = [answer for group in groups for answer in self.whole.pop(group)]
        behind: Counter[int] = Counter()
        for answer in answers:
            for drew, tokens in answer.drawn.items():
                behind[version - drew] += tokens
        self.trained_tokens += sum(behind.values())
        lengths = [answer.tokens for answer in answers]
        seconds = self.train_seconds(lengths)
        step = RlStep(
            self.now, waited, seconds, groups, dict(behind), dict(Counter(version - each for each in versions)),
            sum(lengths),
        )  # fmt: skip
        self._at(self.now + seconds, self._trained, step)

    def _trained(self, step: RlStep) -> None:
        self._span("training", step.began_at, self.now)
        version, sync = self.pacer.version, self.sync
        self.sending[version] = self.now + sync.send_s
        self.commands.append(("policy", version))
        if not sync.in_flight and not self.schedule.drains:
            for replica in self.replicas:
                self._stop(replica, None, sync.send_s)
        self._at(self.now + sync.send_s, self._sent, step, self.now)

    def _sent(self, step: RlStep, since: float) -> None:
        self._span("sending", since, self.now)
        self.done.append(step)
        self._obey()
        self._ready()

    def _span(self, doing: Doing, begin: float, end: float) -> None:
        if end > begin:
            self.spans.append(TrainerSpan(doing, begin, end))

    # --- generation

    def _obey(self) -> None:
        """What the rollout side was told, in order, as far as it can be done by now."""
        while self.commands:
            what, said = self.commands[0]
            if what == "policy":
                if self.sending[said] > self.now or (self.schedule.drains and self.groups):
                    return
                self.arrivals.append(self.now)
                for replica in self.replicas:
                    self._stop(replica, said, self.sync.load_s)
                self.commands.popleft()
            else:
                self.commands.popleft()
                for group in said:
                    self._open(group)

    def _stop(self, replica: RolloutReplica, version: int | None, seconds: float) -> None:
        replica.load_weights(version, seconds, self.now)
        self._schedule(replica)

    def _open(self, group: int) -> None:
        self._under_way()
        self.groups[group], self.began[group] = [], self.now
        for turns in self.load.group(group, self.seed):
            self._send(RolloutAnswer(next(self.numbered), group, turns))

    def _send(self, answer: RolloutAnswer) -> None:
        """The next turn of an answer, to the rank that had it before, or else to the one with the fewest."""
        if answer.place is None:
            number = min(range(len(self.places)), key=self.places.__getitem__)
            answer.place = divmod(number, self.side.ranks)
        replica, rank = answer.place
        self.places[replica * self.side.ranks + rank] += 1
        turn = answer.turns[answer.turn]
        answer.context, answer.left = answer.context + turn.given, turn.drawn
        self.drawing += 1
        self._level()
        self.replicas[replica].send(answer, rank, self.now)
        self._schedule(self.replicas[replica])

    def _schedule(self, replica: RolloutReplica) -> None:
        if replica.next_at < math.inf and self.scheduled[replica.number] != replica.next_at:
            self.scheduled[replica.number] = replica.next_at
            self._at(max(self.now, replica.next_at), self._step, replica, replica.next_at)

    def _step(self, replica: RolloutReplica, due: float) -> None:
        if replica.next_at != due:
            return
        self.scheduled[replica.number] = math.inf
        for answer in replica.advance(self.now):
            self._turn(answer)
        self._schedule(replica)

    def _turn(self, answer: RolloutAnswer) -> None:
        assert answer.place is not None
        replica, rank = answer.place
        self.places[replica * self.side.ranks + rank] -= 1
        turn = answer.turns[answer.turn]
        self.drawing -= 1
        self.outside += 1
        self._level()
        self._at(self.now + turn.delay_s, self._due, answer)

    def _due(self, answer: RolloutAnswer) -> None:
        self.outside -= 1
        self._level()
        if answer.turn + 1 < len(answer.turns):
            answer.turn += 1
            self._send(answer)
            return
        done = self.groups[answer.group]
        done.append(answer)
        if len(done) < self.load.group_size:
            return
        self._under_way()
        self.whole[answer.group] = self.groups.pop(answer.group)
        self.whole_tokens += self._tokens(answer.group)
        self.lives.append(Life(answer.group, self.began[answer.group], self.now))
        self.told.append(answer.group)
        self._collect()
        self._obey()

    # --- records

    def _under_way(self) -> None:
        """Brings groups x seconds up to now, before their number changes."""
        self.area += len(self.groups) * (self.now - self.area_at)
        self.area_at = self.now

    def _level(self) -> None:
        found = self.now, self.drawing, self.outside
        if self.levels and self.levels[-1][0] == self.now:
            self.levels[-1] = found
        else:
            self.levels.append(found)

    def _tokens(self, group: int) -> int:
        return sum(sum(answer.drawn.values()) for answer in self.whole[group])
