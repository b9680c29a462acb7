"""What a serving step costs: the traced op lists, priced. The `StepPricer` of the serving simulator.

Built once a deployment: everything outside attention depends on the step's tokens alone and is tabulated
over them; attention is a surface over (sequences, context). A step is then a few interpolations (tens of
microseconds). Free of JAX: it takes the op lists as data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from model.config import LayerType, Mla, ModelConfig
from model.formats import Formats
from model.split import Layout
from model.weights import layer_weights, outer_weights
from runtime.pricing import attention, context_parallel
from runtime.pricing.attention import GqaLayer, MlaLayer
from runtime.pricing.book import BATCH_KNOTS, CONTEXT_KNOTS, PriceBook
from runtime.pricing.grid import Surface
from runtime.pricing.load import ExpertLoad
from runtime.pricing.oplist import OpList, Sizes, TracedOp
from runtime.pricing.price import Price, total, weakest
from runtime.pricing.prices import Context, label, outside_attention, price
from runtime.pricing.work import MlaShape
from runtime.serving.pricing import BatchShape, PricedPart, StepPrice

_SPARSE = "engine.sparse_layer_seconds"
_MODES = {"full": "index", "shared": "skip", "none": "dense"}
_GRADE = {"measured": "measured", "fitted": "fitted", "transferred": "datasheet", "datasheet": "datasheet"}


def token_grid() -> np.ndarray:
    """Token counts at which tables are filled: every count to 16, then eight to the octave, to 131,072."""
    coarse = np.unique(np.round(16 * 2 ** (np.arange(1, 8 * 13 + 1) / 8)).astype(int))
    return np.concatenate([np.arange(1, 17), coarse])


def coarse_grid() -> np.ndarray:
    """A quarter of `token_grid`'s knots, for comparing many layouts: 1, 2, 3, 4, then two to the octave."""
    return np.unique(np.round(np.concatenate([np.arange(1, 4), 4 * 2 ** (np.arange(0, 31) / 2)])).astype(int))


@dataclasses.dataclass(frozen=True)
class OpLists:
    """The op lists a pricer needs, from `runtime.pricing.trace.trace` (any regime: only token-wise ops are read)."""

    layers: dict[LayerType, OpList]
    embed: OpList
    head: OpList
    mtp: OpList | None


class TokenTable:
    """Prices of a set of ops over `token_grid`: per label, and what bounds them."""

    def __init__(self, grid: np.ndarray, columns: list[dict[str, Price]]):
        self._grid = grid.astype(float)
        self._knots: list[float] = self._grid.tolist()
        self.labels = tuple(columns[0])
        self._seconds = np.array([[column[name].seconds for name in self.labels] for column in columns])
        self._total: list[float] = self._seconds.sum(axis=1).tolist()
        self._columns = columns

    def seconds(self, tokens: float) -> float:
        """As `np.interp`, which takes ten times as long for one point."""
        if tokens <= 0:
            return 0.0
        knots, filled = self._knots, self._total
        i = bisect_right(knots, tokens) - 1
        if i < 0 or i == len(knots) - 1:
            return filled[max(i, 0)]
        return (filled[i + 1] - filled[i]) / (knots[i + 1] - knots[i]) * (tokens - knots[i]) + filled[i]

    def prices(self, tokens: float) -> dict[str, Price]:
        """Per label: interpolated seconds, with grade and bound of the nearest filled count."""
        if tokens <= 0:
            return {}
        near = self._columns[int(np.argmin(np.abs(self._grid - tokens)))]
        return {
            name: near[name].lasting(float(np.interp(tokens, self._grid, self._seconds[:, i])))
            for i, name in enumerate(self.labels)
        }


def main_kinds(cfg: ModelConfig) -> list[tuple[LayerType, int]]:
    """The layer types of the main stack, with how often each runs."""
    return [(kind, n) for kind, n in cfg.layer_counts.items() if not kind.mtp]


def _without_head(program: OpList) -> OpList:
    """An MTP step up to its head, which runs on fewer tokens than the rest and is priced apart."""
    body = itertools.takewhile(lambda op: "head" not in op.weights, program.ops)
    return dataclasses.replace(program, ops=tuple(body))


class GraphPricer:
    """Prices steps of one rank (a copy of the attention weights) of a deployment.

    shared: tables of earlier pricers of the same book and load, which are used and added to: layouts that differ
    in pp, and formats that differ in the cache's, have most of theirs in common. coarse: fewer knots. replicas: how
    many of the layout sit one behind another (see `placement`). sparse_layer_seconds, layer_seconds: of small kernels,
    a layer with sparse attention or any. time_factor: of what the rest takes. captured_tokens, rings: as of `Context`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        formats: Formats,
        programs: OpLists,
        book: PriceBook,
        load: ExpertLoad,
        sparse_layer_seconds: float = 0.0,
        shared: dict[Any, Any] | None = None,
        coarse: bool = False,
        replicas: int = 1,
        layer_seconds: float = 0.0,
        time_factor: float = 1.0,
        captured_tokens: float = math.inf,
        rings: bool = False,
    ):
        self._shared = {} if shared is None else shared
        self._coarse = coarse
        self._grid = coarse_grid() if coarse else token_grid()
        if 0 < captured_tokens < self._grid[-1]:  # collectives take longer from there on
            self._grid = np.union1d(self._grid, [captured_tokens, captured_tokens + 1]).astype(int)
        self.cfg, self.layout, self.formats, self.book = cfg, layout, formats, book
        weights = {w.name: w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)}
        weights |= {w.name: w for w in outer_weights(cfg)}
        self._context = Context(
            cfg,
            layout.by_groups,
            formats,
            book,
            load,
            weights,
            replicas=replicas,
            captured_tokens=captured_tokens,
            rings=rings,
        )
        main = [(programs.layers[kind], n) for kind, n in main_kinds(cfg)]
        self._layers = self._table("layers", [*main, (programs.embed, 1)])
        # where prompts are cut, groups decode the same tokens: a table of its own, as they meet in experts once
        self._alike = self._table("alike", [*main, (programs.embed, 1)]) if layout.pcp > 1 else self._layers
        self._head = self._table("head", [(programs.head, 1)])
        self._mtp = self._table("mtp", [(_without_head(programs.mtp), 1)]) if programs.mtp else None
        # an engine's small kernels around sparse attention, once a step for each layer that has it
        self._sparse_layer_seconds = sparse_layer_seconds
        self._around_sparse = sparse_layer_seconds * sum(n for kind, n in main_kinds(cfg) if kind.indexer != "none")
        self._layer_seconds, self._time_factor = layer_seconds, time_factor
        self._kinds = main_kinds(cfg)
        self._depth = sum(n for _, n in self._kinds)
        self._small = layer_seconds * self._depth
        self._steps = book.steps if book.steps and book.steps.of(cfg, layout, formats) else None
        self._decode_surfaces = {kind: self._decode_surface(kind) for kind in cfg.layer_counts}
        self._prefill = lru_cache(maxsize=65536)(self._prefill_price)
        self._hops = lru_cache(maxsize=65536)(self._hop_price)

    # --- tables

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, from the shared tables where it is there."""
        key = (self.cfg, self._coarse, self.formats.weights, self.formats.experts, *key)
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _table(self, name: str, programs: Iterable[tuple[OpList, int]]) -> TokenTable:
        layout, load = self._context.layout, self._context.load
        captured = self._context.captured_tokens, self._context.rings
        key = (name, layout.tp, layout.dp, layout.ep, self._context.placement.spans, captured, id(load))
        context = dataclasses.replace(self._context, mtp=name == "mtp")
        groups = self.layout.pcp if name == "alike" else 1
        return self._once((*key, groups), lambda: (load, self._tabulate(programs, context, groups)))[
            1
        ]  # held, so that its id stays its own

    def _tabulate(self, programs: Iterable[tuple[OpList, int]], context: Context, groups: int = 1) -> TokenTable:
        """groups: of devices that have the same tokens, a share of which each brings where they meet."""
        chosen: list[tuple[TracedOp, int]] = [
            (op, n) for program, n in programs for op in program.ops if outside_attention(op, self.cfg)
        ]
        ops = [op for op, _ in chosen]
        alike = [ops.index(op) for op in ops]  # layer types have most of their ops in common
        labels = [label(op, context) for op in ops]
        columns = []
        for tokens in self._grid:
            parts: dict[str, list[Price]] = {}
            priced: dict[int, Price | None] = {}
            for (op, n), first, name in zip(chosen, alike, labels, strict=True):
                if first not in priced:
                    meet = op.name == "glm.expert_ffn" or "dp" in op.axes
                    mine = math.ceil(tokens / groups) if meet else int(tokens)
                    priced[first] = price(op, Sizes(mine, 1, 1), context)
                if (found := priced[first]) is not None:
                    parts.setdefault(name, []).append(found.times(n))
            columns.append({name: total(prices) for name, prices in parts.items()})
        return TokenTable(self._grid, columns)

    def _mla_layer(self, kind: LayerType) -> MlaLayer:
        mla, index = self.cfg.attention, self.cfg.indexer
        assert isinstance(mla, Mla)
        shape = MlaShape(
            self.cfg.hidden_size, mla.q_lora_rank or 0, mla.kv_lora_rank, mla.rope_dim, mla.nope_dim, mla.v_dim,
            *((index.heads, index.head_dim, index.topk) if index else ()),
        )  # fmt: skip
        heads = self.cfg.heads // self.layout.tp
        weights = self._attention_format(kind)
        rows = self.formats.cache
        return MlaLayer(shape, heads, _MODES[kind.indexer], rows.latent, weights, rows.index)  # type: ignore[arg-type]

    def _attention_format(self, kind: LayerType) -> str:
        """What the projections of a layer's attention are multiplied in."""
        (out,) = (weight for weight in layer_weights(self.cfg, kind) if weight.name == "o")
        return self.formats.held(out, kind.mtp).name

    @property
    def _gqa_layer(self) -> GqaLayer:
        gqa, tp = self.cfg.attention, self.layout.tp
        assert not isinstance(gqa, Mla)
        return GqaLayer(self.cfg.heads // tp, max(1, gqa.kv_heads // tp), gqa.head_dim, self.formats.cache.heads)

    def _decode_price(self, kind: LayerType, sequences: float, context: float) -> Price:
        across = self._context.placement.dcp if self.layout.dcp > 1 else None
        if not isinstance(self.cfg.attention, Mla):
            if across:
                return context_parallel.gqa_decode(self.book, self._gqa_layer, sequences, context, across)
            return attention.gqa(self.book, "decode", self._gqa_layer, sequences, context)
        if across:
            return context_parallel.decode(self.book, self._mla_layer(kind), sequences, context, across)
        return attention.decode(self.book, self._mla_layer(kind), sequences, context)

    def _decode(self, kind: LayerType, sequences: float, context: float) -> Price:
        """The price at a point of the decode surface, in the seconds that the surface gives."""
        found = self._decode_price(kind, sequences, context)
        return found.lasting(self._decode_surfaces[kind](sequences, context))

    def _decode_beside(self, kind: LayerType, rows: int, queries: int, context: float, prompts: int) -> Price:
        """The price of decoding in a step with so many prompt tokens."""
        alone, tile = self._decode(kind, rows * queries, context), self.book.unpacked_tile
        if not (prompts and tile) or isinstance(self.cfg.attention, Mla) or self.layout.dcp > 1:
            return alone
        apart = attention.gqa_unpacked(self.book, self._gqa_layer, rows, context, tile)
        return max(alone, apart, key=lambda price: price.seconds)

    def _decode_surface(self, kind: LayerType) -> Callable[[float, float], float]:
        if self.layout.dcp > 1:
            key = ("dealt", kind, self.layout.tp, self.formats.cache, self._context.placement.dcp)
            return self._once(key, lambda: self._filled_surface(kind))
        if isinstance(self.cfg.attention, Mla):
            block = attention.decode_block(self.book, self._mla_layer(kind))
            if block:
                return block.seconds
        return self._once(("decode", kind, self.layout.tp, self.formats.cache), lambda: self._filled_surface(kind))

    def _filled_surface(self, kind: LayerType) -> Surface:
        step = 4 if self._coarse else 2
        rows, contexts = BATCH_KNOTS[::step], CONTEXT_KNOTS[::step]
        filled = np.array([[self._decode_price(kind, r, c).seconds for c in contexts] for r in rows])
        return Surface(rows, contexts, filled)

    def _prefill_price(self, kind: LayerType, tokens: int, prefix: float, sequences: int) -> Price:
        across = self._context.placement.dcp if self.layout.dcp > 1 else None
        if not isinstance(self.cfg.attention, Mla):
            if across:
                return context_parallel.gqa_prefill(self.book, self._gqa_layer, tokens, prefix, sequences, across)
            keys = prefix + tokens / sequences / 2
            return attention.gqa(self.book, "prefill", self._gqa_layer, tokens, keys, sequences)
        layer = self._mla_layer(kind)
        if self.layout.pcp > 1:
            mine, groups = self._own(tokens), self._context.placement.dp
            return context_parallel.cut_prefill(self.book, layer, tokens, prefix, sequences, mine, groups)
        found = attention.prefill(self.book, layer, tokens, prefix, sequences, host_launched=False)
        if across:
            return total([found, context_parallel.gathered(self.book, layer, prefix * sequences, across)])
        return found

    # --- steps

    def _own(self, prompt_tokens: int) -> int:
        """Those of a step's prompt tokens that one tp group computes."""
        return math.ceil(prompt_tokens / self.layout.pcp)

    def _outside(self, rows: int, own: int) -> tuple[TokenTable, int]:
        """What all but attention is read from, and at how many tokens: rows that decode, and own tokens of prompts."""
        return (self._layers if own else self._alike), rows + own

    def _sizes(self, shape: BatchShape) -> tuple[int, float, int, float, int]:
        """(decode rows, mean context, prefill tokens, mean prefix, prefill chunks) that meet in a kernel.

        With pipeline stages a step's sequences go in `pp` micro-batches (or one each, when they are fewer) that
        follow one another. In the steady state the step takes as long as one of them from the first stage to
        the last; filling and draining the pipeline are left out.
        """
        rows, chunks = max(shape.decode_rows, shape.decode_count), shape.prefill_chunks
        context = float(shape.decode_contexts.sum()) / shape.decode_count if shape.decode_count else 0.0
        prefix = sum(before for _, before in chunks) / len(chunks) if chunks else 0.0
        parts = min(self.layout.pp, rows + len(chunks)) or 1
        tokens, count = math.ceil((shape.prefill_tokens + shape.padding) / parts), math.ceil(len(chunks) / parts)
        return math.ceil(rows / parts), context, tokens, prefix, count

    def _hop_price(self, tokens: int) -> Price:
        """Hidden states from stage to stage."""
        size = 2.0 * tokens * self.cfg.hidden_size
        return self.book.network.hops(size, self._context.placement.hops)

    def seconds(self, shape: BatchShape) -> float:
        """Device seconds of a step."""
        rows, context, tokens, prefix, chunks = self._sizes(shape)
        q, own = shape.query_tokens, self._own(tokens)
        out = self.layers_seconds(shape)
        if self._steps:
            out *= self._steps.share(out, self._depth, tokens > 0)
        out += self._head.seconds(rows * q + chunks)
        if q > 1 and self._mtp:
            kind = self.cfg.mtp_type
            out += self._mtp.seconds(rows * q + own) + (q - 2) * self._mtp.seconds(rows)
            out += self._head.seconds(rows + chunks) + (q - 2) * self._head.seconds(rows)
            if rows:
                out += self._decode_beside(kind, rows, q, context, tokens).seconds
                out += (q - 2) * self._decode_surfaces[kind](rows, context)
            if tokens:
                out += self._prefill(kind, tokens, round(prefix), chunks).seconds
        if self.layout.pp > 1:
            out += self._hops(rows * q + own).seconds
        return self._time_factor * out + self._small

    def layers_seconds(self, shape: BatchShape) -> float:
        """Device seconds of the layers' ops in a step, one by one: without head, drafts, and what pipelines send."""
        rows, context, tokens, prefix, chunks = self._sizes(shape)
        q = shape.query_tokens
        outside, here = self._outside(rows * q, self._own(tokens))
        out = outside.seconds(here) + self._around_sparse
        for kind, count in self._kinds:
            if rows and tokens and self.book.unpacked_tile:
                out += count * self._decode_beside(kind, rows, q, context, tokens).seconds
            elif rows:
                out += count * self._decode_surfaces[kind](rows * q, context)
            if tokens:
                out += count * self._prefill(kind, tokens, round(prefix), chunks).seconds
        return out

    def price(self, shape: BatchShape) -> StepPrice:
        """The full price: by op, by what bounds it, and how it is known."""
        rows, context, tokens, prefix, chunks = self._sizes(shape)
        q, own = shape.query_tokens, self._own(tokens)
        outside, here = self._outside(rows * q, own)
        parts: list[tuple[str, Price]] = list(outside.prices(here).items())
        if self._around_sparse:
            each = f"{_SPARSE} {self._sparse_layer_seconds * 1e6:g} us"
            named = frozenset({each})
            small = Price(self._around_sparse, "overhead", "assumed", 0.5, assumed=named, sources=named)
            parts.append(("attention", small))
        for kind, count in self._kinds:
            if rows:
                parts.append(("attention", self._decode_beside(kind, rows, q, context, tokens).times(count)))
            if tokens:
                found = self._prefill(kind, tokens, round(prefix), chunks)
                parts.append(("attention", found.times(count)))
        if self._steps:
            share = self._steps.share(sum(part.seconds for _, part in parts), self._depth, tokens > 0)
            parts = _all_times(parts, share, f"whole steps, {share:.3g} of their ops")
        parts += self._head.prices(rows * q + chunks).items()
        if q > 1 and self._mtp:
            kind = self.cfg.mtp_type
            drafting = [*self._mtp.prices(rows * q + own).values(), *self._head.prices(rows + chunks).values()]
            again = [*self._mtp.prices(rows).values(), *self._head.prices(rows).values()]
            if rows:
                drafting.append(self._decode_beside(kind, rows, q, context, tokens))
                again.append(self._decode(kind, rows, context))
            if tokens:
                drafting.append(self._prefill(kind, tokens, round(prefix), chunks))
            drafting += [p.times(q - 2) for p in again]
            parts.append(("mtp", total(drafting)))
        if self.layout.pp > 1:
            parts.append(("pipeline", self._hops(rows * q + own)))
        if self._time_factor != 1:
            parts = _all_times(parts, self._time_factor, f"engine.kernel_time_factor {self._time_factor:g}")
        if self._small:
            each = frozenset({f"engine.layer_seconds {self._layer_seconds * 1e6:g} us"})
            parts.append(("small kernels", Price(self._small, "overhead", "assumed", 0.5, sources=each)))
        return _step_price(parts)


def _all_times(parts: list[tuple[str, Price]], factor: float, why: str) -> list[tuple[str, Price]]:
    scaled = ((name, part.times(factor)) for name, part in parts)
    return [(name, dataclasses.replace(part, sources=part.sources | {why})) for name, part in scaled]


def _step_price(parts: list[tuple[str, Price]]) -> StepPrice:
    by_op: dict[str, float] = {}
    by_bound: dict[str, float] = {}
    weighted: dict[str, float] = {}
    for name, part in parts:
        by_op[name] = by_op.get(name, 0.0) + part.seconds
        weighted[name] = weighted.get(name, 0.0) + part.seconds * part.relative_error
        by_bound[part.bound] = by_bound.get(part.bound, 0.0) + part.seconds
    return StepPrice(
        seconds=sum(by_op.values()),
        by_op=by_op,
        by_bound=by_bound,
        extrapolated=any(part.extrapolated for _, part in parts if part.seconds > 0),
        evidence=_GRADE.get(weakest(part.evidence for _, part in parts if part.seconds > 0), "assumed"),
        assumed=frozenset[str]().union(*(part.assumed for _, part in parts if part.seconds > 0)),
        errors=[weighted[name] / max(seconds, 1e-30) for name, seconds in by_op.items()],
        parts=[
            PricedPart(name, part.bound, part.seconds, _GRADE.get(part.evidence, "assumed"), part.sources)
            for name, part in parts
            if part.seconds > 0
        ],
    )


def relative_error(price: StepPrice) -> float:
    """Held-out error (90th percentile, as a share) of a step's price: each op's error by its share of the
    time, independent between ops."""
    shares = [seconds / price.seconds for seconds in price.by_op.values()]
    return float(np.sqrt(sum((share * error) ** 2 for share, error in zip(shares, price.errors, strict=True))))
