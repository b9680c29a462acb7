"""Which split: what closed forms rank best is played, and then its neighbours, as long as one is better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from foundation.errors import CapacityError, first_line
from runtime.deployment.engines import load as load_engine
from runtime.deployment.errors import NoPlanError
from runtime.deployment.plan import Rejected
from runtime.planning.rl.play import Publishing, play
from runtime.planning.rl.played import Played
from runtime.planning.rl.question import RlQuestion
from runtime.planning.rl.replica import RolloutPrices
from runtime.planning.rl.sides import RolloutOption, TrainOption, TrainSide, rollout_options, sync_of
from runtime.pricing.bands import Band, PredictionKind, band
from runtime.pricing.price import PriceError
from runtime.pricing.pricer import relative_error
from runtime.pricing.training import WeightSync as PricedSync
from runtime.pricing.training import training_band
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables

_EACH = 3
"""Replicas that are played for a split."""
_BEYOND = 3
"""Splits that are still looked at after rollouts bind: estimates leave out that a side waits now and then."""
_PLAYED = 10
"""Contenders that are played at first, and as many neighbours at most."""


@dataclasses.dataclass(frozen=True)
class RlSplit:
    """A split. estimate: answers trained on a second, by closed forms."""

    train: TrainOption
    rollout: RolloutOption
    replicas: int
    train_devices: int
    spare_devices: int
    sync: Publishing
    priced_sync: PricedSync
    estimate: float

    @property
    def rollout_devices(self) -> int:
        return self.replicas * self.rollout.devices

    @property
    def name(self) -> str:
        return f"{self.train_devices} train, {self.replicas} x {self.rollout.option.name}"


@dataclasses.dataclass(frozen=True)
class RlFound:
    """What a search comes to. played: everything that was, best first. band, train_band: of a rollout step and of a
    training step. samples_per_s: the interval that follows for the best one: it is played again with either side as
    slow and as fast as its band has it, and the two sides' errors are taken as independent.
    untrainable: numbers of devices that cannot train the model, and why. rejected: replicas and splits, and why."""

    question: RlQuestion
    best: RlSplit
    figures: Played
    played: tuple[tuple[RlSplit, Played], ...]
    band: Band
    train_band: Band
    samples_per_s: tuple[float, float]
    untrainable: Mapping[int, str]
    rejected: tuple[Rejected, ...]


def search(question: RlQuestion, progress: Callable[[str], None] = lambda message: None) -> RlFound:
    """Raises `NoPlanError` where nothing fits, or `PriceError` where a figure is missing."""
    return _Search(question, progress).run()


class _Search:
    def __init__(self, question: RlQuestion, progress: Callable[[str], None]):
        self.question, self.progress = question, progress
        self.tables = PriceTables(coarse=True)
        self.book = self.tables.book(question.profile, load_engine(question.engine), "bf16")[0]
        self.train = TrainSide(question, self.book)
        self.rejected: list[Rejected] = []
        self.done: dict[str, tuple[RlSplit, Played]] = {}

    def run(self) -> RlFound:
        options, lost = rollout_options(self.question, self.tables, max(there for _, there in self.question.splits))
        self.rejected += lost
        self.progress(f"{len(options)} replicas of {self.question.rollouts_on.name} fit")
        ranked = self._ranked(options)
        if not ranked:
            raise NoPlanError(self._nothing())
        for contender in _spread(ranked)[:_PLAYED]:
            self._play(contender)
        left = _PLAYED
        while left and self.done and (following := self._neighbour(ranked)) is not None:
            self._play(following)
            left -= 1
        if not self.done:
            raise NoPlanError(f"no split could be played: {self.rejected[-1].reason}")
        played = sorted(self.done.values(), key=lambda each: (-each[1].samples_per_s, each[0].name))
        best, figures = played[0]
        sure = _band(best)
        train_sure = training_band(self.question.cfg.sparse, best.train.step.price.relative_error)
        self.progress("playing the best again, as slow and as fast as it may be")
        between = self._between(best, figures, sure, train_sure)
        lost = dict(self.train.rejected)
        return RlFound(
            self.question, best, figures, tuple(played), sure, train_sure, between, lost, tuple(self.rejected)
        )

    # --- ranking

    def _ranked(self, options: Sequence[RolloutOption]) -> list[RlSplit]:
        """All splits by their estimates, best first, from the fewest devices to train on, until `_BEYOND` of them leave
        so few for rollouts that those give no more than the best one so far, if training took no time."""
        found: list[RlSplit] = []
        beyond = 0
        for here, there in self.question.splits:
            most = max((each.estimate for each in found), default=0.0)
            hopeless = bool(found) and most >= max(self._free(option, there) for option in options)
            if hopeless and beyond == _BEYOND:
                why = f"{there} devices generate too little for a better split, however fast the others train"
                self.rejected.append(Rejected(f"{here} devices to train, or more", why))
                break
            if (train := self.train.best(here)) is None:
                continue
            beyond += hopeless
            self.progress(f"{here} devices to train: {train.layout.name}, {train.step.seconds:.3g} s a step")
            for option in options:
                if replicas := there // option.devices:
                    try:
                        found.append(self._contender(train, option, here, there, replicas))
                    except PriceError as error:
                        self.rejected.append(Rejected(option.option.name, first_line(error)))
        return sorted(found, key=lambda each: (-each.estimate, each.name))

    def _contender(self, train: TrainOption, option: RolloutOption, here: int, there: int, replicas: int) -> RlSplit:
        there_book = self.tables.book(self.question.rollouts_on, option.option.spec.engine, "bf16")[0]
        sync, priced = sync_of(self.question, train, self.book, option, there_book, replicas)
        estimate = self._estimate(option, replicas, train.step.seconds + sync.send_s, sync.load_s)
        return RlSplit(train, option, replicas, here, there - replicas * option.devices, sync, priced, estimate)

    def _free(self, option: RolloutOption, there: int) -> float:
        """The estimate of so many devices for rollouts if training and weights took no time: no split has more."""
        replicas = there // option.devices
        return self._estimate(option, replicas, 0.0, 0.0) if replicas else 0.0

    def _estimate(self, option: RolloutOption, replicas: int, learns: float, loads: float) -> float:
        """Answers trained on a second by closed forms. learns: seconds of a step and of sending weights; loads: that
        replicas stand still to take them."""
        question, answers = self.question, self.question.load.answers
        if question.schedule.staleness == 0:
            return answers / (learns + loads + option.batch_seconds(replicas))
        if question.mode == "ahead":
            return answers / max(learns, option.batch_seconds(replicas) + loads)
        under_way = (question.staleness + 0.5) * answers
        oldest = (question.staleness + 1) * answers / option.longest_seconds(replicas, under_way)
        return min(answers / max(learns, 1e-9), option.rate(replicas, under_way), oldest)

    def _neighbour(self, ranked: Sequence[RlSplit]) -> RlSplit | None:
        """Of the best one's split and the next to either side, the first that was not played."""
        best = max(self.done.values(), key=lambda each: each[1].samples_per_s)[0]
        splits = sorted({each.train_devices for each in ranked})
        place = splits.index(best.train_devices)
        near = splits[max(0, place - 1) : place + 2]
        for count in near:
            of_it = [each for each in ranked if each.train_devices == count][:_EACH]
            for each in of_it:
                if each.name not in self.done and not any(each.name == lost.name for lost in self.rejected):
                    return each
        return None

    # --- playing

    def _play(self, contender: RlSplit) -> None:
        self.progress(f"playing {contender.name}")
        try:
            self.done[contender.name] = contender, self._played(contender)
        except CapacityError as error:
            self.rejected.append(Rejected(contender.name, first_line(error)))

    def _between(self, best: RlSplit, figures: Played, rollouts: Band, train: Band) -> tuple[float, float]:
        """Samples a second, low and high. A side that waits has nothing to add."""

        def moved(**slower: float) -> float:
            return math.log(self._played(best, **slower).samples_per_s / figures.samples_per_s)

        low = [moved(slower=rollouts.around(1.0)[1]), moved(train_slower=train.around(1.0)[1])]
        high = [moved(slower=rollouts.around(1.0)[0]), moved(train_slower=train.around(1.0)[0])]
        ends = (  # what is sure adds up, what is not is independent
            sum(max(each, 0.0) for each in low) - math.hypot(*(min(each, 0.0) for each in low)),
            sum(min(each, 0.0) for each in high) + math.hypot(*(max(each, 0.0) for each in high)),
        )
        return figures.samples_per_s * math.exp(ends[0]), figures.samples_per_s * math.exp(ends[1])

    def _played(self, contender: RlSplit, slower: float = 1.0, train_slower: float = 1.0) -> Played:
        """slower, train_slower: what seconds of rollout steps and of training steps are multiplied by."""
        question, side = self.question, contender.rollout.replicated(contender.replicas)
        if slower != 1.0:
            side = dataclasses.replace(side, prices=_Slower(side.prices, slower))

        def seconds(lengths: Sequence[int]) -> float:
            return self.train.seconds(contender.train, lengths) * train_slower

        return play(
            question.load, side, seconds, contender.sync, question.schedule, question.steps, seed=question.seed
        )  # fmt: skip

    def _nothing(self) -> str:
        question = self.question
        where = f"{question.devices} x {question.profile.name}"
        why = list(dict.fromkeys(self.train.rejected.values()))
        return f"{question.cfg.name} cannot be trained and served on {where}: {why[-1] if why else 'nothing fits'}"


class _Slower:
    """Prices times a factor."""

    def __init__(self, prices: RolloutPrices, factor: float):
        self._prices, self._factor = prices, factor
        self.mixed, self.prompt_tokens = prices.mixed, prices.prompt_tokens

    def decode_seconds(self, rows: int, context: float) -> float:
        return self._prices.decode_seconds(rows, context) * self._factor

    def prompt_seconds(self, chunks: Sequence[tuple[int, int]], rows: int, context: float) -> float:
        return self._prices.prompt_seconds(chunks, rows, context) * self._factor


def _spread(ranked: Sequence[RlSplit]) -> list[RlSplit]:
    """The best of each split first, then the second of each."""
    seen: dict[int, int] = {}
    turned = []
    for each in ranked:
        place = seen.get(each.train_devices, 0)
        seen[each.train_devices] = place + 1
        turned.append((place, each))
    return [each for place, each in sorted(turned, key=lambda both: both[0]) if place < _EACH]


def _band(contender: RlSplit) -> Band:
    """Of a rollout step: measured over predicted, as published deployments of this kind of prediction have it."""
    option = contender.rollout
    spec = option.option.spec
    kind = PredictionKind(spec.engine.kind, "measured" if option.pricer.book.measured else "carried", "steady")
    rows, _ = spec.engine.decode_rows(option.holds)
    shape = BatchShape(np.full(rows, option.load.context), decode_rows=rows, graphed=True)
    return band("tpot", kind, relative_error(option.pricer.price(shape)))
