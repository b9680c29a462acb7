"""The indexer, sparse attention and the caches as torch_npu's operators. See `target.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend import constraints
from backends.ascend.check import type_name
from backends.ascend.constraints import LATENT, ROPE
from backends.ascend.target import Halves, NotTaken, NpuTarget, Unscored, accept, require
from backends.toolchains.walker import OpCall

_SELECTED = 2048  # GLM's selection, and as much of a context as is read as one
_CAUSAL, _ABSORBED = 3, 2  # sparse_mode: a query sees keys up to its own; attention_mode: MLA, the only one


def cache_write(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    pages, rows, slots = call.operands
    if isinstance(pages, Halves):
        nope, rope = rows[..., :LATENT], rows[..., LATENT:]
        return [Halves(_write(t, pages.nope, nope, slots), _write(t, pages.rope, rope, slots))]
    return [_write(t, pages, rows, slots)]


def _write(t: NpuTarget, pages: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    width = pages.shape[2:]
    flat = pages.reshape(pages.shape[0] * pages.shape[1], *width)
    updates = rows.reshape(-1, *width).to(pages.dtype)
    return t.npu("npu_scatter_nd_update_", flat, slots.reshape(-1, 1), updates).reshape(pages.shape)


def index_scores(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Nothing yet: the indexer scores and selects at once, and `select_topk` has the operands from here."""
    query, _, pages, *_ = call.operands
    require(t.options.takes(query), f"npu_lightning_indexer takes no {type_name(query)}")
    accept(constraints.lightning_indexer(tuple(query.shape), tuple(pages.shape), None))
    return [Unscored(call)]


def select_topk(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Scales are left out: the order of the scores does not depend on them."""
    scored, count = call.operands[0], call.attributes["k"]
    require(isinstance(scored, Unscored), "its scores are not npu_lightning_indexer's")
    query, head_weights, pages, page_table, positions = scored.call.operands
    accept(constraints.lightning_indexer(tuple(query.shape), tuple(pages.shape), count))
    chosen = t.npu(
        "npu_lightning_indexer",
        query.contiguous(),
        pages.to(query.dtype).unsqueeze(2),
        head_weights.to(query.dtype).contiguous(),
        actual_seq_lengths_key=_context_lengths(positions),
        block_table=page_table,
        layout_query="BSND",
        layout_key="PA_BSND",
        sparse_count=count,
        sparse_mode=_CAUSAL,
    )[0].squeeze(2)
    t.selections.append(chosen)
    return [chosen]


def _context_lengths(positions: Tensor) -> Tensor:
    """positions [b,t] -> int32 [b]: the tokens of the context once the last query is in it."""
    return (positions[:, -1] + 1).to(torch.int32)


def sparse_attention(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    query, pages, page_table, selected, positions = call.operands
    try:
        _takes(t, query, pages)
    except NotTaken as reason:
        t.declined[call.name, str(reason)] += 1
        last = page_table.shape[1] * _page_size(pages) - 1  # a query that sees less than is selected does not see it
        selected = torch.where(selected < 0, torch.full_like(selected, last), selected)
        return t.decomposed(call, [query, pages, page_table, selected, positions])
    if not any(selected is own for own in t.selections):
        selected = _seen(selected, positions)
    return [_attend(t, call, query, pages, page_table, selected, positions)]


def latent_attention(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """The selection of the whole context, where that is no more than is selected."""
    query, pages, page_table, positions = call.operands
    context = page_table.shape[1] * _page_size(pages)
    try:
        _takes(t, query, pages)
        require(
            context <= _SELECTED,
            f"a dense context of {context} tokens is more than npu_sparse_flash_attention selects",
        )
    except NotTaken as reason:
        t.declined[call.name, str(reason)] += 1
        return _of_context(t, call)
    every = torch.arange(context, dtype=torch.int32).expand(*positions.shape, context)
    return [_attend(t, call, query, pages, page_table, _seen(every, positions), positions)]


def expanded_attention(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Batched products over the expanded keys, whatever the chip."""
    return _of_context(t, call)


def _page_size(pages: Tensor | Halves) -> int:
    return (pages.nope if isinstance(pages, Halves) else pages).shape[1]


def _takes(t: NpuTarget, query: Tensor, pages: Tensor | Halves) -> None:
    """Raises `NotTaken` for what npu_sparse_flash_attention does not take."""
    require(t.options.takes(query), f"npu_sparse_flash_attention takes no {type_name(query)}")
    if not isinstance(pages, Halves):
        width, page = pages.shape[2], pages.shape[1]
        accept(constraints.sparse_flash_attention(query.shape[2], LATENT, width - LATENT, page))
        raise NotTaken(f"the cache is kept in {type_name(pages)}")
    accept(constraints.sparse_flash_attention(query.shape[2], LATENT, ROPE, _page_size(pages)))
    require(pages.nope.dtype == query.dtype, f"the cache is kept in {type_name(pages.nope)}")


def _attend(
    t: NpuTarget, call: OpCall[Any], query: Tensor, pages: Halves, table: Tensor, selected: Tensor, positions: Tensor
) -> Tensor:
    latents = pages.nope.unsqueeze(2)
    return t.npu(
        "npu_sparse_flash_attention",
        query[..., :LATENT].contiguous(),
        latents,
        latents,
        selected.unsqueeze(2),
        float(call.attributes["scale"]),
        block_table=table,
        actual_seq_lengths_kv=_context_lengths(positions),
        query_rope=query[..., LATENT:].contiguous(),
        key_rope=pages.rope.unsqueeze(2),
        sparse_block_size=1,
        layout_query="BSND",
        layout_kv="PA_BSND",
        sparse_mode=_CAUSAL,
        attention_mode=_ABSORBED,
    )[0]


def _seen(selected: Tensor, positions: Tensor) -> Tensor:
    """A selection that our own top-k made: -1 in place of what a query may not see, all of which comes last."""
    return torch.where(selected > positions[:, :, None], torch.full_like(selected, -1), selected)


def _of_context(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """The decomposition over the context's own pages, put together from the two caches and numbered anew."""
    query, pages, page_table, *rest = call.operands
    if not isinstance(pages, Halves):
        return t.decomposed(call, call.operands)
    b, count = page_table.shape
    index = page_table.reshape(-1)
    own = torch.cat([torch.index_select(half, 0, index) for half in (pages.nope, pages.rope)], dim=-1)
    numbers = torch.arange(b * count, dtype=page_table.dtype).reshape(b, count)
    return t.decomposed(call, [query, own, numbers, *rest])
