"""What a training step costs: micro-batches through a pipeline (1F1B), gradients reduced, weights updated.

    step = M u + sum of the other stages' u / interleave + exposed collectives + optimizer

u: of the slowest stage, a micro-batch forward, backward and again, with its exchanges and messages. M: micro-batches of
a dp rank, filled to `micro_batch_tokens`; the last may be part-filled and then counts in proportion, for what a packer
makes of real lengths is not known here. With equal stages that is (M + pp - 1) u (Narayanan et al., arXiv 2104.04473),
and where they are not it is never less than what 1F1B takes. dp ranks get equal work, but one has the longest sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from foundation.errors import UsageError
from model.config import ModelConfig
from model.formats import CacheFormats, Formats, scheme
from runtime.pricing import load as loads
from runtime.pricing.book import PriceBook
from runtime.pricing.chip import rate_of
from runtime.pricing.load import ExpertLoad
from runtime.pricing.price import Price, PriceEvidence, total
from runtime.pricing.training.layout import TrainLayout
from runtime.pricing.training.passes import FREE, HALF, MicroBatch, Parts, PassPrices
from runtime.pricing.training.sequences import Sequences
from runtime.pricing.training.weights import stage_weights

GRADIENT_BYTES = 4.0
UPDATE_BYTES = 34.0
"""Of a weight, moved by Adam: the float32 gradient is read for its norm and again, the float32 weight and two moments
read and written, the 16-bit weight written."""
COMPUTING = ("forward", "backward", "recompute")


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """Seconds of a step, by part; they add up to `seconds`.

    parts: "forward", "backward", "recompute" (computing, of the slowest stage); "tensor", "exchange", "context",
    "stages" (talking over tp, to experts, over cp, between stages); "bubble" (waiting for the pipeline to fill and
    drain); "gradients", "weights" (what of reducing gradients and gathering weights nothing hides); "optimizer";
    "scoring" (forward passes before it). hidden: seconds of the same kinds that something else hides. micro_batches: of
    a dp rank.
    """

    parts: Mapping[str, Price]
    hidden: Mapping[str, Price]
    tokens: int
    devices: int
    micro_batches: float

    @property
    def price(self) -> Price:
        """Of the whole step, graded by its weakest part."""
        return total(part for part in self.parts.values() if part.seconds)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def evidence(self) -> PriceEvidence:
        return self.price.evidence


def training_formats(name: str) -> Formats:
    """Number formats of a training step's products: "bf16", or "fp8" or "mxfp8", forward and backward alike.

    Raises `UsageError` for formats that nobody trains in.
    """
    found = scheme(name)
    if found.wide == "f32" or found.name not in ("bf16", "fp8", "mxfp8"):
        raise UsageError(f"a training step's products are in bf16, fp8 or mxfp8, not {name}")
    return Formats(found.dense, found.experts, "bf16", CacheFormats.plain("bf16"))


class TrainingPricer:
    """Prices steps of one layout on one chip. load: how tokens fall on experts, by default evenly at random."""

    def __init__(
        self,
        cfg: ModelConfig,
        book: PriceBook,
        layout: TrainLayout,
        formats: str = "bf16",
        load: ExpertLoad | None = None,
    ):
        self.cfg, self.book, self.layout = cfg, book, layout
        held = training_formats(formats)
        for name in held.scheme.formats:
            if not book.chip.peak_flops_per_s.get(rate_of(name)):
                raise UsageError(f"{book.chip.name} multiplies nothing in {name}: train in bf16")
        load = load or loads.uniform(cfg.moe.experts if cfg.moe else 1)
        self._passes = PassPrices(cfg, book, layout, held, load)
        self._update = self._updated()

    def step(self, sequences: Sequences, scored: int = 0) -> TrainingStep:
        """One step on `sequences`. scored: forward passes over them before it, for log-probabilities that are not the
        engine's (of the policy itself, or of a reference that fits beside it).

        Raises `UsageError` where the longest sequence is longer than a micro-batch.
        """
        layout = self.layout
        if sequences.longest > layout.micro_batch_tokens:
            raise UsageError(
                f"the longest sequence has {sequences.longest} tokens, and a micro-batch {layout.micro_batch_tokens}"
            )
        longest = Sequences((sequences.longest,))
        ways = [self._step(sequences, max(1.0, sequences.tokens / layout.dp), sequences, scored)]
        if layout.dp > 1:
            ways.append(self._step(longest, float(longest.tokens), sequences, scored))
        return max(ways, key=lambda found: found.seconds)

    def _step(self, alike: Sequences, of_rank: float, learnt: Sequences, scored: int) -> TrainingStep:
        """A step in which each dp rank has `of_rank` tokens of sequences such as those."""
        layout = self.layout
        count = max(1.0, of_rank / layout.micro_batch_tokens)
        share = of_rank / count / layout.cp / alike.tokens
        dense, sparse = (group and group.part(share) for group in alike.attended(self.cfg))
        stages = self._passes.stages(MicroBatch(dense, sparse))
        parts, hidden = self._played(stages, count)
        last = max(stages, key=_unit)
        for name, price, behind in zip(
            ("gradients", "weights"), self._update[:2], ("backward", "forward"), strict=True
        ):
            spare = last[behind].seconds if layout.overlap_gradients else 0.0
            parts[name] = price.lasting(max(0.0, price.seconds - spare))
            hidden[name] = price.lasting(min(price.seconds, spare))
        parts["optimizer"] = self._update[2]
        if scored:
            parts["scoring"] = self._scored(stages, count).times(scored)
        return TrainingStep(parts, hidden, learnt.tokens, layout.devices, count)

    def _played(self, stages: list[Parts], count: float) -> tuple[Parts, Parts]:
        shown = [self._exposed(stage) for stage in stages]
        slowest, parts = pipelined(shown, count, self.layout.interleave)
        told = stages[slowest].get("exchange", FREE)
        kept = shown[slowest].get("exchange", FREE)
        return parts, {"exchange": told.lasting((told.seconds - kept.seconds) * count)}

    def _exposed(self, stage: Parts) -> Parts:
        """With what the layout hides of the exchange with experts left out."""
        if not self.layout.overlap_exchange or "exchange" not in stage:
            return stage
        beside = sum(stage[name].seconds for name in COMPUTING)
        exchange = stage["exchange"]
        return {**stage, "exchange": exchange.lasting(max(0.0, exchange.seconds - beside))}

    def _scored(self, stages: list[Parts], count: float) -> Price:
        """A forward pass of all micro-batches: of what a stage exchanges, forward and backward alike, its share."""
        ways = 3.0 if self.layout.recompute == "full" else 2.0
        units = []
        for stage in map(self._exposed, stages):
            talking = [part.times(1 / (2.0 if name == "stages" else ways)) for name, part in stage.items()
                       if name not in COMPUTING]  # fmt: skip
            units.append(total([stage["forward"], *talking]))
        longest = max(units, key=lambda unit: unit.seconds)
        others = total(units).seconds - longest.seconds
        return longest.lasting(longest.seconds * count + others / self.layout.interleave)

    def _updated(self) -> tuple[Price, Price, Price]:
        """(gradients reduced, weights gathered, optimizer) of the stage where they take longest."""
        layout, network, spans = self.layout, self.book.network, self._passes.spans
        found = []
        for held in stage_weights(self.cfg, layout):
            groups = (held.dense, spans.dense), (held.experts, spans.experts)
            kind = "reduce_scatter" if layout.zero else "all_reduce"
            reduced = total(network.collective(kind, GRADIENT_BYTES * size, span) for size, span in groups)
            gathered = total(
                network.collective("all_gather", HALF * size, span) for size, span in groups if layout.zero
            )
            update = self.book.memory(UPDATE_BYTES * held.held(layout))
            found.append((reduced, gathered, update))
        return max(found, key=lambda each: sum(price.seconds for price in each))


def pipelined(stages: Sequence[Parts], count: float, interleave: int = 1) -> tuple[int, Parts]:
    """(the slowest stage, its parts of a step and the bubble) of `count` micro-batches; stages: of one each, there
    and back."""
    slowest = max(range(len(stages)), key=lambda number: _unit(stages[number]))
    parts = {name: part.times(count) for name, part in stages[slowest].items()}
    others = [total(stage.values()) for number, stage in enumerate(stages) if number != slowest]
    parts["bubble"] = total(others).times(1 / interleave) if others else FREE
    return slowest, parts


def _unit(stage: Parts) -> float:
    return math.fsum(part.seconds for part in stage.values())


@lru_cache(maxsize=256)
def _pricer(cfg: ModelConfig, book: PriceBook, layout: TrainLayout, formats: str) -> TrainingPricer:
    return TrainingPricer(cfg, book, layout, formats)


def training_step(
    cfg: ModelConfig,
    book: PriceBook,
    layout: TrainLayout,
    sequences: Sequences,
    formats: str = "bf16",
    scored: int = 0,
) -> TrainingStep:
    """One step on `sequences`; see `TrainingPricer.step`. Prices of a layout are kept for further calls.

    Raises `UsageError` for a layout that the model does not divide by or sequences that do not fit, `PriceError` for a
    chip without a figure that is needed.
    """
    return _pricer(cfg, book, layout, formats).step(sequences, scored)
