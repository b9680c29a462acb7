"""What one micro-batch costs each pipeline stage: its layers forward, backward and again, and their exchanges."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from model.config import Gqa, LayerType, ModelConfig
from model.formats import Formats
from model.split import Layout
from model.weights import layer_weights, outer_weights
from runtime.pricing.book import PriceBook
from runtime.pricing.load import ExpertLoad
from runtime.pricing.oplist import OpList, TracedOp
from runtime.pricing.price import Price, total
from runtime.pricing.prices import Context
from runtime.pricing.training.layout import Spans, TrainLayout, spans_on
from runtime.pricing.training.ops import NOT_TRAINED, OpPrices, part_of
from runtime.pricing.training.sequences import Attended

HALF = 2.0
"""Bytes of an activation or its gradient."""
ATTENDING = ("indexer", "attention")
"""Stages of a layer whose program depends on whether a sequence selects."""
FREE = Price(0.0, "overhead", "measured", 0.0)


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """The op lists of a step: layers by type where a sequence attends to all before it, and where it selects."""

    dense: Mapping[LayerType, OpList]
    sparse: Mapping[LayerType, OpList]
    embed: OpList
    head: OpList


@lru_cache(maxsize=64)
def programs(cfg: ModelConfig, shard: Layout) -> StepPrograms:
    """Traced for the `shard` of a layout, whatever its stages. Imports the tracer, and with it JAX."""
    from runtime.pricing.trace import trace

    dense = trace(cfg, shard, "prefill", mtp=False)
    sparse = trace(cfg, shard, "prefill", sparse=True, mtp=False) if cfg.indexer else dense
    return StepPrograms(dense.layers, sparse.layers, dense.embed, dense.head)


Parts = dict[str, Price]
"""By name: "forward", "backward", "recompute" (computing), "tensor", "exchange", "context" (talking)."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What meets on one device: sequences that attend to all before them, and those that select; either may be none."""

    dense: Attended | None
    sparse: Attended | None

    @property
    def tokens(self) -> float:
        return sum(seen.tokens for seen in self.groups)

    @property
    def groups(self) -> list[Attended]:
        return [seen for seen in (self.dense, self.sparse) if seen]

    @property
    def all(self) -> Attended:
        """Both together, for what does not attend."""
        return Attended(self.tokens, sum(seen.sequences for seen in self.groups), 0.0, 0.0)


def layer_ops(of: StepPrograms, kind: LayerType, batch: MicroBatch) -> Iterator[tuple[TracedOp, Attended]]:
    """The ops of a layer, each with the sequences that it is over."""
    either = of.dense[kind] if batch.dense else of.sparse[kind]
    yield from ((op, batch.all) for op in either.ops if op.stage not in ATTENDING)
    for seen, programs in ((batch.dense, of.dense), (batch.sparse, of.sparse)):
        if seen:
            yield from ((op, seen) for op in programs[kind].ops if op.stage in ATTENDING)


class PassPrices:
    """Prices of micro-batches under one layout. load: how tokens fall on experts."""

    def __init__(self, cfg: ModelConfig, book: PriceBook, layout: TrainLayout, formats: Formats, load: ExpertLoad):
        layout.check(cfg)
        self.cfg, self.book, self.layout = cfg, book, layout
        self.spans: Spans = spans_on(layout, book.chip)
        self.programs = programs(cfg, dataclasses.replace(layout.shard, pp=1))
        weights = {w.name: w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)}
        weights |= {w.name: w for w in outer_weights(cfg)}
        shard = dataclasses.replace(layout.shard, pp=1)
        self.ops = OpPrices(Context(cfg, shard, formats, book, load, weights))
        self.kinds = [
            Counter(cfg.layers[layer] for layer in stage) for stage in layout.shard.stage_layers(cfg.num_layers)
        ]

    def stages(self, batch: MicroBatch) -> list[Parts]:
        """Of each stage, by part: one micro-batch forward and backward."""
        layers = {kind: self.layer(kind, batch) for kind in {kind for kinds in self.kinds for kind in kinds}}
        found = []
        for number, kinds in enumerate(self.kinds):
            sums: dict[str, list[Price]] = {}
            for kind, count in kinds.items():
                for name, part in layers[kind].items():
                    sums.setdefault(name, []).append(part.times(count))
            ends = [*([self.embed(batch)] if number == 0 else [])]
            ends += [self.head(batch)] if number == len(self.kinds) - 1 else []
            for end in ends:
                for name, part in end.items():
                    sums.setdefault(name, []).append(part)
            if len(self.kinds) > 1:
                sums["stages"] = [self.hop(batch).times(2.0 * self.layout.interleave)]
            found.append({name: total(parts) for name, parts in sums.items()})
        return found

    def layer(self, kind: LayerType, batch: MicroBatch) -> Parts:
        """One layer, its recompute included."""
        return self._parts(layer_ops(self.programs, kind, batch), again=True) | self._context(batch, kind)

    def embed(self, batch: MicroBatch) -> Parts:
        return self._parts(((op, batch.all) for op in self.programs.embed.ops), again=False)

    def head(self, batch: MicroBatch) -> Parts:
        """The final norm, the head over all tokens, and the loss over each tp rank's share of the vocabulary, which is
        not gathered: float32 logits are read for the loss, read again and written as gradients; a probability a token
        is what goes around."""
        ops = [op for op in self.programs.head.ops if not op.axes]
        parts = self._parts(((op, batch.all) for op in ops), again=False)
        logits = 4.0 * batch.tokens * self.cfg.vocab_size / self.layout.tp
        parts["forward"] = total([parts["forward"], self.book.memory(2 * logits)])
        parts["backward"] = total([parts["backward"], self.book.memory(2 * logits)])
        return parts

    def hop(self, batch: MicroBatch) -> Price:
        """Hidden states of a micro-batch to the next stage, of each tp rank its share of the tokens."""
        size = HALF * batch.tokens * self.cfg.hidden_size / self.layout.tp
        return self.book.network.point_to_point(
            size, across_domains=self.spans.stages_across_domains, across_nodes=self.spans.stages_across_nodes
        )

    def _parts(self, ops: Iterable[tuple[TracedOp, Attended]], again: bool) -> Parts:
        found: dict[str, list[Price | None]] = {"forward": [], "backward": [], "recompute": []}
        recompute = self.layout.recompute if again else "none"
        for op, seen in ops:
            if op.name in NOT_TRAINED:
                continue
            forward, back = self.ops.forward(op, seen), self.ops.backward(op, seen)
            part = part_of(op)
            repeated = forward if recompute == "full" else None
            if part != "compute":
                found.setdefault(part, []).extend((forward, back, repeated))
                continue
            if recompute == "selective":
                repeated = self.ops.recomputed(op, seen)
            found["forward"].append(forward)
            found["backward"].append(back)
            found["recompute"].append(repeated)
        return {name: total(each for each in prices if each) for name, prices in found.items()}

    def _context(self, batch: MicroBatch, kind: LayerType) -> Parts:
        """Between cp ranks: keys and values of all of a sequence are gathered before attention, in the form that it
        reads them in, and their gradients summed and scattered after it; where tokens are selected, the indexer's keys
        too."""
        cfg, layout, network = self.cfg, self.layout, self.book.network
        if layout.cp == 1:
            return {}
        parts = []
        for seen in batch.groups:
            if isinstance(cfg.attention, Gqa):
                width = 2 * cfg.attention.kv_heads // layout.tp * cfg.attention.head_dim
            elif seen is batch.sparse:
                width = cfg.attention.latent_dim
            else:
                width = cfg.heads // layout.tp * (cfg.attention.qk_dim + cfg.attention.v_dim)
            size = HALF * seen.tokens * layout.cp * width
            gather = network.collective("all_gather", size, self.spans.cp)
            parts += [gather, network.collective("reduce_scatter", size, self.spans.cp)]
            if seen is batch.sparse and kind.indexer == "full" and cfg.indexer:
                keys = HALF * seen.tokens * layout.cp * cfg.indexer.head_dim
                index = network.collective("all_gather", keys, self.spans.cp)
                parts.append(index)
                gather = total([gather, index])
            if layout.recompute == "full":
                parts.append(gather)
        return {"context": total(parts)}
