"""What either side can be on so many devices, what its steps cost, and at which rate it can go by itself.

Rates are closed forms that rank splits; the play has the last word. A rank with n answers of L drawn tokens at work,
whose questions and tool results take p seconds of prompts and whose environments take e, answers

    n / (L d(n) + n p)  a second,   n + rate x e  of them under way

where d(n) is a token for each of n at the mean context (Little's law: as many are under way as come in a second, times
how long each is). Paced, staleness + 1 batches are all that is made in the time of the longest answer. In step
(staleness 0) a batch takes as long as its longest answers: the sum of d(n S(c)) over tokens c, S(c) the share of
answers longer than c.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from foundation.errors import CapacityError, UsageError, first_line
from runtime.deployment.demand import Demand
from runtime.deployment.errors import NoPlanError
from runtime.deployment.ledger import DeviceMemory
from runtime.deployment.plan import Rejected
from runtime.planning.estimate import ALIGNED
from runtime.planning.options import Option, Question, options
from runtime.planning.rl.engine_prices import side_of
from runtime.planning.rl.load import RolloutLoad
from runtime.planning.rl.play import Publishing
from runtime.planning.rl.question import RlQuestion
from runtime.planning.rl.replica import RolloutSide
from runtime.pricing.book import PriceBook
from runtime.pricing.price import PriceError
from runtime.pricing.pricer import GraphPricer
from runtime.pricing.training import (
    Sequences,
    TrainingMemory,
    TrainingStep,
    TrainLayout,
    best_layouts,
    training_memory,
    training_step,
)
from runtime.pricing.training import WeightSync as PricedSync
from runtime.pricing.training import weight_sync as priced_sync
from runtime.simulation.build import PriceTables, node_devices, pricer_of

_SERVERS = (4, 8, 16, 64)
"""Of one rollout replica at most: as few as hold the model."""
_SLICES = 24


class RolloutOption:
    """A replica that generates, with its prices."""

    def __init__(self, option: Option, load: RolloutLoad, tables: PriceTables):
        self.option, self.load = option, load
        spec = option.spec
        self.pricer: GraphPricer = pricer_of(spec, tables)
        self.side: RolloutSide = side_of(spec.engine, self.pricer, option.pool_tokens, 1, option.layout.dp)
        self.side.prices.decode_seconds(1, load.context)

    @property
    def devices(self) -> int:
        return self.option.devices

    def replicated(self, replicas: int) -> RolloutSide:
        return dataclasses.replace(self.side, replicas=replicas)

    @cached_property
    def holds(self) -> int:
        """Answers that a rank has at work at most, at their mean length halfway."""
        held = float(np.mean(self.load.lengths)) - self.load.drawn / 2
        return max(1, min(self.side.most_running, int(self.side.pool_tokens / held)))

    @cached_property
    def prompt_seconds(self) -> float:
        """Of an answer: its share of its group's question, and what tools say."""
        load, prices, ranks = self.load, self.side.prices, self.side.ranks
        each = max(1, round(load.question))
        seconds = prices.prompt_seconds([(each, 0)], 0, 0.0) * (1.0 if not self.side.reuse else 1 / load.group_size)
        if load.turns > 1:
            new = max(1, load.tool_tokens)
            seconds += (load.turns - 1) * prices.prompt_seconds([(new, int(load.context))], 0, 0.0)
        return seconds * ranks**ALIGNED  # prompts of ranks in lock-step hold all of them up

    def rate(self, replicas: int, under_way: float) -> float:
        """Answers a second of so many replicas with `under_way` answers in all."""
        load, places = self.load, replicas * self.side.ranks
        outside = load.turns * load.delay.mean_s
        most, low, high = under_way / places, 0.0, float(self.holds)

        def at(count: float) -> float:
            decode = self.side.prices.decode_seconds(max(1, round(count)), load.context)
            return count / (load.drawn * decode + count * self.prompt_seconds)

        if high + at(high) * outside <= most:
            return places * at(high)
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if middle + at(middle) * outside < most else (low, middle)
        return places * at(high)

    def longest_seconds(self, replicas: int, under_way: float) -> float:
        """Of the longest answer of a step, where `under_way` are so in all: paced, no more than staleness + 1 batches
        are made in that time."""
        load, places = self.load, replicas * self.side.ranks
        longest = max(load.sample[: load.answers], key=lambda turns: sum(turn.drawn for turn in turns))
        rows = max(1, round(min(self.holds, under_way / places) / 2))
        drawn = sum(turn.drawn for turn in longest)
        return drawn * self.side.prices.decode_seconds(rows, drawn / 2) + load.turns * load.delay.mean_s

    def batch_seconds(self, replicas: int) -> float:
        """Until all answers of a step have come, where none else is at work."""
        load, places = self.load, replicas * self.side.ranks
        each = load.answers / places
        drawn = np.sort([sum(turn.drawn for turn in turns) for turns in load.sample][: max(load.answers, 1)])
        edges = np.quantile(drawn, np.linspace(0, 1, _SLICES + 1))
        edges[0], seconds, question = 0.0, each * self.prompt_seconds, load.question
        for low, high in zip(edges, edges[1:], strict=False):
            left = math.ceil(each * float(np.mean(drawn > low)))
            waves = math.ceil(left / self.holds)
            decode = self.side.prices.decode_seconds(max(1, min(left, self.holds)), question + (low + high) / 2)
            seconds += waves * decode * (high - low)
        return seconds + load.turns * load.delay.mean_s


def rollout_options(question: RlQuestion, tables: PriceTables, most: int) -> tuple[list[RolloutOption], list[Rejected]]:
    """Replicas of `most` devices at most that hold the longest answer, and what is out, and why. Raises
    `NoPlanError`."""
    load, profile = question.load, question.rollouts_on
    prompt = max(1, load.longest - 1)
    demand = Demand(isl=prompt, osl=1, histogram=((prompt, 1, 1.0),))
    lost: list[Rejected] = []
    node = node_devices(profile)
    for servers in _SERVERS:
        for held in ({"pp": 1}, {}):
            asked = Question(
                question.cfg,
                demand,
                question.engine,
                question.scheme,
                question.kv,
                settings=question.settings,
                held=held,
            )
            fitting, refused, rejected = options(asked, profile, min(most, servers * node))
            lost = [*rejected, *(Rejected(each.name, first_line(each.error)) for each in refused)]
            found = []
            for option in fitting:
                try:
                    found.append(RolloutOption(option, load, tables))
                except (PriceError, UsageError) as error:
                    lost.append(Rejected(option.name, str(error)))
            if found:
                return found, lost
        if servers * node >= most:
            break
    why = lost[-1].reason if lost else "nothing fits"
    raise NoPlanError(f"{question.cfg.name} has no rollout replica on {most} x {profile.name}: {why}")


@dataclasses.dataclass(frozen=True)
class TrainOption:
    """A layout that trains, and a usual step of it."""

    layout: TrainLayout
    step: TrainingStep
    memory: TrainingMemory


class TrainSide:
    """What trains on so many devices, found once each."""

    def __init__(self, question: RlQuestion, book: PriceBook):
        self.question, self.book = question, book
        load = question.load
        self.usual = Sequences.of(int(each) for each in np.resize(load.lengths, load.answers))
        self.rejected: dict[int, str] = {}
        self._found: dict[int, TrainOption | None] = {}

    def best(self, devices: int) -> TrainOption | None:
        """The fastest layout that fits; None where none does, and `rejected` says why."""
        if devices not in self._found:
            try:
                self._found[devices] = self._best(devices)
            except (CapacityError, UsageError, PriceError) as error:
                self.rejected[devices] = first_line(error)
                self._found[devices] = None
        return self._found[devices]

    def _best(self, devices: int) -> TrainOption:
        question, cfg, formats = self.question, self.question.cfg, self.question.train_formats
        ((layout, step),) = best_layouts(
            cfg, question.profile, self.book, devices, self.usual, formats, 1, question.load.longest, question.scored
        )
        memory = training_memory(cfg, layout, DeviceMemory.of(question.profile, devices), formats)
        return TrainOption(layout, step, memory)

    def seconds(self, option: TrainOption, lengths: Sequence[int]) -> float:
        question = self.question
        sequences = Sequences.of(lengths)
        formats = question.train_formats
        return training_step(question.cfg, self.book, option.layout, sequences, formats, question.scored).seconds


def sync_of(
    question: RlQuestion, train: TrainOption, train_book: PriceBook, rollout: RolloutOption, rollout_book: PriceBook,
    replicas: int,
) -> tuple[Publishing, PricedSync]:  # fmt: skip
    """What a version's way takes: as the play has it, and by part."""
    spec = rollout.option.spec
    found = priced_sync(
        question.cfg,
        train.layout,
        train_book,
        spec.layout,
        rollout_book,
        spec.formats,
        replicas,
        question.sync_schedule,
    )
    load_s = found.parts["load"].seconds
    return Publishing(found.seconds - load_s, load_s, question.in_flight), found
