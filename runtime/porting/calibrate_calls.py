"""The ops of a named model as one of its ranks has them: every shape and attribute read off the traced graph.

A layer of each type is traced as the engine runs it (`model.abstract`), at a step of one size, with one device's shares
of weights and caches. So nothing here knows a shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import abstract
from model.cache import CacheRow
from model.config import LayerType, ModelConfig
from model.graph import Mode
from model.ops import attributes_of
from model.parallel import Parallel
from model.split import Layout
from model.weights import Weight
from runtime.execution.batches import gear
from runtime.porting.calibrate_sizes import PAGE

_CONTEXTS = (32, 128, 512, 2048, 8192, 32768)
FILLED = 0.75  # of the pages of a context, on average: pages come in powers of two


@dataclasses.dataclass(frozen=True)
class ModelRank:
    """A model, and how it is split over devices, of which one is measured. Raises `UsageError` where it does not
    divide."""

    cfg: ModelConfig
    layout: Layout = Layout()

    def __post_init__(self) -> None:
        self.layout.check(self.cfg)

    @property
    def stored_fp8(self) -> bool:
        """Whether its checkpoint has matrices in FP8 blocks."""
        return "fp8-block" in (self.cfg.stored_scheme.dense, self.cfg.stored_scheme.experts)

    def weight_bytes(self, dtype: str, keep_fp8: bool) -> int:
        """Of what one rank holds of the main stack."""
        return sum(
            count * _tree_bytes(self.weights(kind, dtype, keep_fp8))
            for kind, count in self.cfg.layer_counts.items()
            if not kind.mtp
        )

    def outer_bytes(self, dtype: str) -> int:
        """Of what one rank holds of embedding, final norm and head."""
        return _tree_bytes(self.weights(None, dtype, False))

    def weights(self, what: LayerType | None, dtype: str, keep_fp8: bool) -> dict[str, Any]:
        """A rank's share of the weights of a layer, or with None of the outer ones."""
        return abstract.abstract_weights(self.cfg, what, jnp.dtype(dtype), keep_fp8, self.local)

    def local(self, described: Weight | CacheRow) -> tuple[int, ...]:
        """The shape of a rank's share."""
        if isinstance(described, Weight):
            return self.layout.local_shape(described)
        return self.layout.local_row(described)

    @property
    def kinds(self) -> list[LayerType]:
        """Its layer types; the MTP layer's ops are those of the others."""
        return [kind for kind in self.cfg.layer_counts if not kind.mtp]


@dataclasses.dataclass(frozen=True)
class RankCall:
    """An op as a layer has it: operands as the contract names them, by shape and type alone."""

    name: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    attributes: Mapping[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        shapes = tuple((operand.shape, str(operand.dtype)) for operand in self.operands)
        return self.name, shapes, tuple(sorted(self.attributes.items()))


@dataclasses.dataclass(frozen=True)
class RankStep:
    """One device's step: `tokens` new ones of each of `sequences`, the last of them at `end` in pages that hold
    `context`."""

    sequences: int
    tokens: int
    context: int
    end: int

    @property
    def positions(self) -> np.ndarray:
        """int32 [sequences, tokens]."""
        return np.tile(np.arange(self.end - self.tokens, self.end, dtype=np.int32), (self.sequences, 1))

    @property
    def keys(self) -> float:
        """What a query sees on average."""
        return float(self.end) if self.tokens == 1 else max(self.end - self.tokens / 2, 1.0)


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def token_steps(cfg: ModelConfig, counts: Sequence[int]) -> list[RankStep]:
    """Of so many tokens, for ops that see nothing else: over a short context, and one that an indexer selects from."""
    contexts = [PAGE, gear(cfg.indexer.topk + 1, PAGE)] if cfg.indexer else [PAGE]
    return [RankStep(count, 1, context, context) for context in contexts for count in counts]


def answer_steps(cfg: ModelConfig, sequences: Sequence[int]) -> list[RankStep]:
    """Steps of answers, in pages that are filled to three quarters: pages come in powers of two, and contexts between
    two of them are that long on average. And those with the shortest context that an indexer selects from."""
    ends = [(context, round(FILLED * context)) for context in _contexts(cfg)]
    if cfg.indexer and cfg.indexer.topk < cfg.max_positions:
        ends.append((gear(cfg.indexer.topk + 1, PAGE), cfg.indexer.topk + 1))
    return [RankStep(count, 1, context, end) for context, end in ends for count in sequences]


def chunk_steps(cfg: ModelConfig, chunks: Sequence[int]) -> list[RankStep]:
    """A prompt's first piece, and pieces that come after others."""
    first = [RankStep(1, count, max(PAGE, count), count) for count in chunks]
    later = [
        RankStep(1, count, context, round(FILLED * context))
        for context in _contexts(cfg)
        for count in chunks
        if count <= context / 2
    ]
    return [step for step in (*first, *later) if step.context <= cfg.max_positions]


def _contexts(cfg: ModelConfig) -> list[int]:
    """Powers of two, with those around what an indexer selects."""
    about = (cfg.indexer.topk, cfg.indexer.topk + 1) if cfg.indexer else ()
    wanted = {*_CONTEXTS, *(gear(size, PAGE) for size in about)}
    return sorted(size for size in wanted if size <= cfg.max_positions) or [PAGE]


def calls(rank: ModelRank, what: LayerType | None, step: RankStep, dtype: str, keep_fp8: bool) -> list[RankCall]:
    """The ops of a layer of a type, or with None of the head, on one device of the layout."""
    cfg, layout, computed = rank.cfg, rank.layout, jnp.dtype(dtype)
    shape = abstract.StepShape(step.sequences, step.tokens, -(-step.context // PAGE), PAGE)
    spread: dict[str, Any] = {"par": Parallel.of(layout), "axes": layout.axes}
    held = rank.weights(what, dtype, keep_fp8)
    if what is None:
        traced = abstract.trace_ends(cfg, "head", shape, computed, outer=held, **spread)
    else:
        mode = Mode("absorbed" if step.tokens == 1 else "expanded")
        cache = abstract.abstract_cache(cfg, what, shape.pages, PAGE, computed, rank.local)
        traced = abstract.trace_layer(cfg, what, shape, computed, mode, held, cache, **spread)
    return list(_composites(traced.jaxpr))


def _composites(jaxpr: Any) -> Iterator[RankCall]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            yield from _composites(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive.name == "composite":
            operands = tuple(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars)
            yield RankCall(eqn.params["name"], operands, attributes_of(eqn))
