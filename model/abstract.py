"""The graph without its weights: the shapes a step takes, and the trace of one layer of any type.

Nothing is allocated: weights, caches and batches are `jax.ShapeDtypeStruct`s in the layout that
`model.checkpoint` loads, so a layer of a 744-billion-parameter model is traced in milliseconds. The unit
is the layer type (`ModelConfig.layer_counts`): a whole model is `embed`, a trace a type, and `head`.

The variables of a trace are named: `trace.jaxpr.debug_info.arg_names` holds "w['q_a']", "cache['latent']",
"x", .. in the order of `trace.jaxpr.invars`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
from jax.extend.core import ClosedJaxpr

from model import graph, ops
from model.cache import CacheRow, cache_rows
from model.config import LayerType, ModelConfig
from model.parallel import SINGLE, Parallel
from model.weights import Quantized, Weight, layer_weights, outer_weights

Abstract = jax.ShapeDtypeStruct
LocalShape = Callable[[Any], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The size of a step: `tokens` new ones of each of `sequences`, over page tables of `context_pages`
    pages of `page_size` tokens. The pool has `pool_pages` (default: one for each table entry, and page 0)."""

    sequences: int
    tokens: int
    context_pages: int
    page_size: int = 64
    pool_pages: int | None = None

    @property
    def context(self) -> int:
        """Context tokens a query may see, the new ones included."""
        return self.context_pages * self.page_size

    @property
    def pages(self) -> int:
        return 1 + self.sequences * self.context_pages if self.pool_pages is None else self.pool_pages


def _whole(described: Weight | CacheRow) -> tuple[int, ...]:
    return described.shape


def abstract_weights(
    cfg: ModelConfig,
    kind: LayerType | None,
    dtype: Any = jnp.bfloat16,
    keep_fp8: bool = False,
    local: LocalShape = _whole,
) -> dict[str, Any]:
    """The weights of a layer of type `kind`, or with None the outer ones (embedding, final norm, head).

    keep_fp8: matrices that a block-FP8 checkpoint quantises are `Quantized`, values and block scales.
    `local(weight)` is the shape of one device's share of a weight (default: all of it).
    """

    def spec(weight: Weight) -> Any:
        shape = local(weight)
        if keep_fp8 and weight.stays_narrow:
            scale = dataclasses.replace(weight, shape=shape).scale_shape
            return Quantized(Abstract(shape, ml_dtypes.float8_e4m3fn), Abstract(scale, jnp.float32))
        return Abstract(shape, jnp.float32 if weight.float32 else dtype)

    weights = outer_weights(cfg) if kind is None else layer_weights(cfg, kind)
    return {weight.name: spec(weight) for weight in weights}


def abstract_cache(
    cfg: ModelConfig,
    kind: LayerType,
    pages: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    local: LocalShape = _whole,
) -> graph.LayerCache:
    """The caches a layer of type `kind` owns, `[pages, page_size, ..]` each; `local(row)` as for weights."""
    return {row.name: Abstract((pages, page_size, *local(row)), dtype) for row in cache_rows(cfg, kind)}  # type: ignore[misc]


def abstract_batch(shape: StepShape) -> graph.Batch:
    """What a step is given."""
    rows = (shape.sequences,)
    return graph.Batch(
        tokens=_ints(shape.sequences, shape.tokens),
        start=_ints(*rows),
        length=_ints(*rows),
        page_table=_ints(shape.sequences, shape.context_pages),
    )


def _ints(*shape: int) -> Any:
    return Abstract(shape, jnp.int32)


def trace_layer(
    cfg: ModelConfig,
    kind: LayerType,
    shape: StepShape,
    dtype: Any = jnp.bfloat16,
    mode: graph.Mode = graph.Mode(),
    weights: dict[str, Any] | None = None,
    cache: graph.LayerCache | None = None,
    par: Parallel = SINGLE,
    axes: Mapping[str, int] = {},
) -> ClosedJaxpr:
    """The trace of one main layer: (w, x, cache, view, selected) -> (x, cache, selected).

    x is [sequences, tokens, d]; view holds each token's position and cache slot, and the page tables;
    `selected` is an input only of a layer that shares a selection, where the context outgrows it.
    `weights` and `cache` default to whole, unquantised ones. With `par`, `axes` gives the size of each
    of its mesh axes, `weights` and `cache` are one device's share, and the trace is that device's program.
    Raises ValueError for an MTP type (see `trace_mtp`).
    """
    if kind.mtp:
        raise ValueError(f"{kind.name} is an MTP layer: use trace_mtp")
    weights = abstract_weights(cfg, kind, dtype) if weights is None else weights
    cache = abstract_cache(cfg, kind, shape.pages, shape.page_size, dtype) if cache is None else cache
    at = _ints(shape.sequences, shape.tokens)
    view = graph.View(at, at, _ints(shape.sequences, shape.context_pages))
    selected = None
    if kind.indexer == "shared" and cfg.indexer and shape.context > cfg.indexer.topk:
        selected = _ints(shape.sequences, shape.tokens, cfg.indexer.topk)

    def layer(w: Any, x: Any, cache: Any, view: Any, selected: Any) -> Any:
        return graph.layer(cfg, kind, w, x, cache, view, selected, mode, par)

    return _trace(layer, axes, weights, _hidden(cfg, shape, dtype), cache, view, selected)


def trace_mtp(
    cfg: ModelConfig,
    shape: StepShape,
    dtype: Any = jnp.bfloat16,
    mode: graph.Mode = graph.Mode(),
    outer: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    cache: graph.LayerCache | None = None,
    par: Parallel = SINGLE,
    axes: Mapping[str, int] = {},
) -> ClosedJaxpr:
    """The trace of an MTP layer with embedding and head: (outer, w, cache, batch, hidden) -> `StepOutput`."""
    kind = cfg.mtp_type
    outer = abstract_weights(cfg, None, dtype) if outer is None else outer
    weights = abstract_weights(cfg, kind, dtype) if weights is None else weights
    cache = abstract_cache(cfg, kind, shape.pages, shape.page_size, dtype) if cache is None else cache

    def mtp(outer: Any, w: Any, cache: Any, batch: Any, hidden: Any) -> Any:
        return graph.mtp_step(cfg, {"outer": outer, "mtp": [w]}, cache, batch, hidden, mode, par)

    return _trace(mtp, axes, outer, weights, cache, abstract_batch(shape), _hidden(cfg, shape, dtype))


def trace_ends(
    cfg: ModelConfig,
    end: Literal["embed", "head"],
    shape: StepShape,
    dtype: Any = jnp.bfloat16,
    outer: dict[str, Any] | None = None,
    par: Parallel = SINGLE,
    axes: Mapping[str, int] = {},
) -> ClosedJaxpr:
    """The trace of what surrounds the layers: "embed": (outer, tokens) -> x; "head": (outer, x) -> logits,
    final norm included, of every token of `shape`."""
    outer = abstract_weights(cfg, None, dtype) if outer is None else outer

    def embed(outer: Any, tokens: Any) -> Any:
        return par.embed(tokens, outer["embed"])

    def head(outer: Any, x: Any) -> Any:
        return graph.head(cfg, outer, ops.rms_norm(x, outer["final_norm"], eps=cfg.norm_eps), par)

    if end == "embed":
        return _trace(embed, axes, outer, _ints(shape.sequences, shape.tokens))
    return _trace(head, axes, outer, _hidden(cfg, shape, dtype))


def _hidden(cfg: ModelConfig, shape: StepShape, dtype: Any) -> Any:
    return Abstract((shape.sequences, shape.tokens, cfg.hidden_size), dtype)


def _trace(fn: Callable[..., Any], axes: Mapping[str, int], *args: Any) -> ClosedJaxpr:
    return jax.make_jaxpr(fn, axis_env=list(axes.items()) or None)(*args)
