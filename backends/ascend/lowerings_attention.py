"""The indexer, sparse attention and the latent cache as CANN operators. See `lowerings.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from backends.ascend import constraints
from backends.ascend.catalog import cann_operators
from backends.ascend.constraints import LATENT, ROPE
from backends.ascend.lowerings import CannLowerings, Declined, accept, require
from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import OpCall, walk

_SELECTED = 2048  # GLM's selection, and as much of a context as is read as one


def cache_write(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    pages, rows, slots = call.operands
    if pages.name not in lower.halves:
        return [_write(lower, t, pages, rows, slots)]
    halves = [cut_last(t, rows, 0, LATENT), cut_last(t, rows, LATENT, LATENT + ROPE)]
    nope, rope = (
        _write(lower, t, half, part, slots) for half, part in zip(lower.halves[pages.name], halves, strict=True)
    )
    return [joined(lower, nope, rope, pages)]


def joined(lower: CannLowerings, nope: Ref, rope: Ref, like: Ref) -> Ref:
    """A latent cache that exists as its two parts only."""
    ref = Ref(f"{nope.name}+{rope.name}", like.shape, like.dtype, like.shape)
    lower.halves[ref.name] = nope, rope
    return ref


def _write(lower: CannLowerings, t: OnnxTarget, pages: Ref, rows: Ref, slots: Ref) -> Ref:
    operator = lower.operator("ScatterNdUpdate", pages.dtype)
    width, count = pages.shape[2:], math.prod(slots.shape)
    flat = t.reshape(pages, (pages.shape[0] * pages.shape[1], *width))
    given = {
        "var": flat,
        "indices": t.reshape(slots, (count, 1)),
        "updates": t.cast(t.reshape(rows, (count, *width)), pages.dtype),
    }
    (out,) = lower.emit(t, operator, given, [(flat.shape, flat.dtype)], use_locking=0)
    return t.reshape(out, pages.shape)


def cut_last(t: OnnxTarget, x: Ref, low: int, high: int) -> Ref:
    """x[.., low:high]."""
    x = t.whole(x)
    shape = (*x.shape[:-1], high - low)
    axis = len(shape) - 1
    return t.node("Slice", x, t.ints([low]), t.ints([high]), t.ints([axis]), shape=shape, dtype=x.dtype)


def index_scores(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    """Nothing yet: LightningIndexer scores and selects at once, and `select_topk` has the operands from here."""
    query, _, pages, *_ = call.operands
    lower.operator("LightningIndexer", query.dtype)
    accept(constraints.lightning_indexer(query.shape, pages.shape, None, lower.options.family))
    scores = Ref(f"scores of {query.name}", tuple(call.outputs[0].shape), "float32", tuple(call.outputs[0].shape))
    lower.scores[scores.name] = call
    return [scores]


def select_topk(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    """Scales are left out: the order of the scores does not depend on them."""
    scored = lower.scores.get(call.operands[0].name)
    if scored is None:
        raise Declined
    query, head_weights, pages, page_table, positions = scored.operands
    count = call.attributes["k"]
    if refusal := constraints.lightning_indexer(query.shape, pages.shape, count, lower.options.family):
        scores = walk(t, scored.body.jaxpr, scored.body.consts, scored.operands)
        lower.declined["glm.index_scores", refusal] += 1
        return walk(t, call.body.jaxpr, call.body.consts, scores)
    b, tokens, k = call.outputs[0].shape
    given = {
        "query": query,
        "key": _one_head(t, t.cast(pages, query.dtype)),
        "weights": t.cast(head_weights, query.dtype),
        "actual_seq_lengths_key": _context_lengths(t, positions),
        "block_table": page_table,
    }
    attributes = {"layout_query": "BSND", "layout_key": "PA_BSND", "sparse_count": count, "sparse_mode": 3}
    results = [((b, tokens, 1, k), "int32"), ((b, tokens, 1, k), query.dtype)]
    chosen = lower.emit(t, lower.operator("LightningIndexer", query.dtype), given, results, **attributes)[0]
    out = t.reshape(chosen, (b, tokens, k))
    lower.selections.add(out.name)
    return [out]


def _one_head(t: OnnxTarget, pages: Ref) -> Ref:
    """pages [P,s,w] -> [P,s,1,w]."""
    return t.reshape(pages, (*pages.shape[:2], 1, pages.shape[2]))


def _context_lengths(t: OnnxTarget, positions: Ref) -> Ref:
    """positions [b,t] -> int32 [b]: the tokens of the context once the last query is in it."""
    b, tokens = positions.shape
    last = cut_last(t, positions, tokens - 1, tokens)
    return t.elementwise("Add", t.reshape(last, (b,)), t.constant(np.ones(b, np.int32)))


def sparse_attention(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    query, pages, page_table, selected, positions = call.operands
    try:
        _takes(lower, query, pages)
    except Declined as reason:
        context = page_table.shape[1] * pages.shape[1]
        everything = [query, _whole_pool(lower, t, pages), page_table, _in_context(t, selected, context), positions]
        if str(reason):
            lower.declined[call.name, str(reason)] += 1
        return walk(t, call.body.jaxpr, call.body.consts, everything)
    if selected.name not in lower.selections:
        selected = _seen(t, selected, positions)
    return [_flash(lower, t, call, query, pages, page_table, selected, positions)]


def latent_attention(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    """The selection of the whole context, where that is no more than CANN selects."""
    query, pages, page_table, positions = call.operands
    b, tokens = positions.shape
    context = page_table.shape[1] * pages.shape[1]
    try:
        _takes(lower, query, pages)
        require(context <= _SELECTED, f"a dense context of {context} tokens is more than SparseFlashAttention selects")
    except Declined as reason:
        return _of_context(lower, t, call, pages, page_table, reason)
    every = t.constant(np.arange(context, dtype=np.int32).reshape(1, 1, context))
    every = Ref(every.name, (b, tokens, context), "int32", every.held)
    return [_flash(lower, t, call, query, pages, page_table, _seen(t, every, positions), positions)]


def expanded_attention(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    pages, page_table = call.operands[1:3]
    return _of_context(lower, t, call, pages, page_table, Declined())


def _takes(lower: CannLowerings, query: Ref, pages: Ref) -> None:
    """Raises `Declined` for what SparseFlashAttention does not take."""
    lower.operator("SparseFlashAttention", query.dtype)
    page, width = pages.shape[1:]
    accept(constraints.sparse_flash_attention(query.shape[2], LATENT, width - LATENT, page))
    require(pages.name in lower.halves and pages.dtype == query.dtype, f"the cache is kept in {pages.dtype}")


def _flash(
    lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref], query: Ref, pages: Ref, table: Ref, selected: Ref, at: Ref
) -> Ref:
    b, tokens, heads, _ = query.shape
    nope, rope = lower.halves[pages.name]
    latents = _one_head(t, nope)
    given = {
        "query": cut_last(t, query, 0, LATENT),
        "key": latents,
        "value": latents,
        "sparse_indices": t.reshape(selected, (b, tokens, 1, selected.shape[2])),
        "block_table": table,
        "actual_seq_lengths_kv": _context_lengths(t, at),
        "query_rope": cut_last(t, query, LATENT, LATENT + ROPE),
        "key_rope": _one_head(t, rope),
    }
    attributes = {
        "scale_value": float(call.attributes["scale"]),
        "sparse_block_size": 1,
        "layout_query": "BSND",
        "layout_kv": "PA_BSND",
        "sparse_mode": 3,
        "attention_mode": 2,  # absorbed MLA, the only one
    }
    results = [((b, tokens, heads, LATENT), query.dtype), *[((b, 1, tokens, heads), "float32")] * 2]
    return lower.emit(t, cann_operators()["SparseFlashAttention"], given, results, **attributes)[0]


def _seen(t: OnnxTarget, selected: Ref, positions: Ref) -> Ref:
    """A selection that our own top-k made: -1 in place of what a query may not see, all of which comes last."""
    b, tokens = positions.shape
    at = t.reshape(positions, (b, tokens, 1))
    at = Ref(at.name, selected.shape, at.dtype, at.held)
    hidden = t.elementwise("Greater", selected, at, dtype="bool")
    none = t.constant(np.full((1, 1, 1), -1, np.int32))
    return t.elementwise("Where", hidden, Ref(none.name, selected.shape, "int32", none.held), selected, dtype="int32")


def _in_context(t: OnnxTarget, selected: Ref, context: int) -> Ref:
    """A selection that may hold -1: the context's last place instead, which such a query does not see."""
    zero, last = (
        Ref(ref.name, selected.shape, "int32", ref.held)
        for ref in (t.constant(np.full((1, 1, 1), value, np.int32)) for value in (0, context - 1))
    )
    none = t.elementwise("Less", selected, zero, dtype="bool")
    return t.elementwise("Where", none, last, selected, dtype="int32")


def _whole_pool(lower: CannLowerings, t: OnnxTarget, pages: Ref) -> Ref:
    if pages.name not in lower.halves:
        return pages
    return t.node("Concat", *lower.halves[pages.name], shape=pages.shape, dtype=pages.dtype, axis=2)


def _of_context(
    lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref], pages: Ref, page_table: Ref, reason: Declined
) -> Sequence[Ref]:
    """The decomposition over the context's own pages, put together from the two caches and numbered anew."""
    if pages.name not in lower.halves:
        raise reason
    if str(reason):
        lower.declined[call.name, str(reason)] += 1
    b, count = page_table.shape
    size = pages.shape[1]
    parts = [
        t.node("Gather", half, page_table, shape=(b, count, size, half.shape[2]), dtype=half.dtype, axis=0)
        for half in lower.halves[pages.name]
    ]
    rows = t.node("Concat", *parts, shape=(b, count, size, LATENT + ROPE), dtype=pages.dtype, axis=3)
    own = t.reshape(rows, (b * count, size, LATENT + ROPE))
    numbers = t.constant(np.arange(b * count, dtype=np.int32).reshape(b, count))
    operands = [own if ref is pages else numbers if ref is page_table else ref for ref in call.operands]
    return walk(t, call.body.jaxpr, call.body.consts, operands)
