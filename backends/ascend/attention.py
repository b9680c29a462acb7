"""The indexer, sparse attention and the caches as torch_npu's operators. See `target.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend import caches, constraints
from backends.ascend.caches import Halves, KeptCache, Packed, Scaled
from backends.ascend.check import type_name
from backends.ascend.constraints import LATENT, ROPE
from backends.ascend.dense import int8_rows
from backends.ascend.target import NotTaken, NpuTarget, Unscored, accept, require
from backends.emulation.rounding import hadamard
from backends.toolchains.walker import OpCall

_SELECTED = 2048  # GLM's selection, and as much of a context as is read as one
_CAUSAL, _ABSORBED = 3, 2  # sparse_mode: a query sees keys up to its own; attention_mode: MLA, the only one
_BY_TILE, _IN_THE_ROW, _BY_TOKEN_AND_HEAD = 2, 1, 0  # where scales are, of latents and of index keys


def cache_write(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    accept(constraints.undocumented("npu_scatter_nd_update_", t.options.series))
    return written(t, call)


def written(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Rows of a cache as it is kept, by the operator where packages have it."""
    pages, rows, slots = call.operands
    if isinstance(pages, Tensor) and not t.options.fused:
        return t.decomposed(call, call.operands)
    if isinstance(pages, Halves):
        nope, rope = rows[..., :LATENT], rows[..., LATENT:]
        return [Halves(_write(t, pages.nope, nope, slots), _write(t, pages.rope, rope, slots))]
    if isinstance(pages, Packed):
        flat = rows.reshape(-1, pages.lora + pages.rope)
        values, scale = int8_rows(t, caches.tiles(flat[:, : pages.lora]))
        made = caches.packed_rows(values, scale, flat[:, pages.lora :], pages.lora)
        return [Packed(_write(t, pages.rows, made, slots), pages.lora, pages.rope, pages.wide)]
    if isinstance(pages, Scaled):
        values, scale = _index_rows(t, rows)
        return [Scaled(_write(t, pages.values, values, slots), _write(t, pages.scale, scale, slots), pages.wide)]
    return [_write(t, pages, rows, slots)]


def _write(t: NpuTarget, pages: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    width = pages.shape[2:]
    flat = pages.reshape(pages.shape[0] * pages.shape[1], *width)
    updates = rows.reshape(-1, *width).to(pages.dtype)
    if t.options.fused:
        return t.npu("npu_scatter_nd_update_", flat, slots.reshape(-1, 1), updates).reshape(pages.shape)
    return flat.index_put((slots.reshape(-1).to(torch.int64),), updates).reshape(pages.shape)


def _index_rows(t: NpuTarget, x: Tensor) -> tuple[Tensor, Tensor]:
    """Index queries or keys [.., i] as int8, and a float16 scale [..] for each. They are multiplied by a Hadamard
    matrix first, where there is one of their width."""
    width = x.shape[-1]
    if width & (width - 1) == 0:
        x = torch.matmul(x, t.constant(hadamard(width)).to(x.dtype))
    values, scale = int8_rows(t, x.reshape(-1, width))
    return values.reshape(x.shape), scale.reshape(x.shape[:-1]).to(torch.float16)


def index_scores(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Nothing yet: the indexer scores and selects at once, and `select_topk` has the operands from here."""
    query, _, pages, *_ = call.operands
    require(t.options.takes(query), f"npu_lightning_indexer takes no {type_name(query)}")
    accept(constraints.lightning_indexer(tuple(query.shape), _page_size(pages), None, series=t.options.series))
    return [Unscored(call, lambda: scores(t, call)[0])]


def scores(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    query, head_weights, pages, *rest = call.operands
    if isinstance(pages, Scaled):
        values, scale = _index_rows(t, query)
        query = Scaled(values, scale.unsqueeze(-1), pages.wide).whole
    return t.decomposed(call, [query, head_weights, pages, *rest])


def select_topk(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """Scales of the model are left out: the order of the scores does not depend on them."""
    scored, count = call.operands[0], call.attributes["k"]
    require(isinstance(scored, Unscored), "its scores are not npu_lightning_indexer's")
    query, head_weights, pages, page_table, positions = scored.call.operands
    int8, series = isinstance(pages, Scaled), t.options.series
    accept(constraints.lightning_indexer(tuple(query.shape), _page_size(pages), count, int8, series))
    common: dict[str, Any] = {
        "actual_seq_lengths_key": _context_lengths(positions),
        "block_table": page_table,
        "layout_query": "BSND",
        "layout_key": "PA_BSND",
        "sparse_count": count,
        "sparse_mode": _CAUSAL,
    }
    if isinstance(pages, Scaled):
        values, scale = _index_rows(t, query)
        keys, modes = pages.values.unsqueeze(2), (_BY_TOKEN_AND_HEAD, _BY_TOKEN_AND_HEAD)
        narrow = torch.float32 if query.dtype == torch.float32 else torch.float16  # what the kernel takes of weights
        weights = head_weights.to(narrow).contiguous()
        chosen = t.npu("npu_quant_lightning_indexer", values, keys, weights, scale, pages.scale, *modes, **common)
    else:
        keys, weights = pages.to(query.dtype).unsqueeze(2), head_weights.to(query.dtype).contiguous()
        chosen = t.npu("npu_lightning_indexer", query.contiguous(), keys, weights, **common)[0]
    chosen = chosen.squeeze(2)
    t.selections.append(chosen)
    return [chosen]


def _context_lengths(positions: Tensor) -> Tensor:
    """positions [b,t] -> int32 [b]: the tokens of the context once the last query is in it."""
    return (positions[:, -1] + 1).to(torch.int32)


def sparse_attention(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    query, pages, page_table, selected, positions = call.operands
    _takes(t, query, pages)
    if not _from_the_indexer(t, selected):
        selected = _seen(selected, positions)
    return [_attend(t, call, query, pages, page_table, selected, positions)]


def over_selection(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    query, pages, page_table, selected, positions = call.operands
    if _from_the_indexer(t, selected):
        last = page_table.shape[1] * _page_size(pages) - 1  # a query that sees less than is selected does not see it
        selected = torch.where(selected < 0, torch.full_like(selected, last), selected)
    return t.decomposed(call, [query, pages, page_table, selected, positions])


def _from_the_indexer(t: NpuTarget, selected: Tensor) -> bool:
    return any(selected is own for own in t.selections)


def latent_attention(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """The selection of the whole context, where that is no more than is selected."""
    query, pages, page_table, positions = call.operands
    context = page_table.shape[1] * _page_size(pages)
    _takes(t, query, pages)
    require(
        context <= _SELECTED, f"a dense context of {context} tokens is more than npu_sparse_flash_attention selects"
    )
    every = torch.arange(context, dtype=torch.int32).expand(*positions.shape, context)
    return [_attend(t, call, query, pages, page_table, _seen(every, positions), positions)]


def _page_size(pages: Tensor | KeptCache) -> int:
    return pages.shape[1] if isinstance(pages, Tensor) else pages.page_size


def _takes(t: NpuTarget, query: Tensor, pages: Tensor | KeptCache) -> None:
    """Raises `NotTaken` for what the operator for sparse attention does not take."""
    name = "npu_kv_quant_sparse_flash_attention" if isinstance(pages, Packed) else "npu_sparse_flash_attention"
    require(t.options.takes(query), f"{name} takes no {type_name(query)}")
    heads, page, series = query.shape[2], _page_size(pages), t.options.series
    if isinstance(pages, Packed):
        accept(constraints.sparse_flash_attention(heads, pages.lora, pages.rope, page, True, series))
        require(pages.wide == query.dtype, f"the cache is made of {pages.wide}")
        return
    if not isinstance(pages, Halves):
        assert isinstance(pages, Tensor)
        accept(constraints.sparse_flash_attention(heads, LATENT, pages.shape[2] - LATENT, page, series=series))
        raise NotTaken(f"the cache is kept in {type_name(pages)}")
    accept(constraints.sparse_flash_attention(heads, LATENT, ROPE, page, series=series))
    require(pages.nope.dtype == query.dtype, f"the cache is kept in {type_name(pages.nope)}")


def _attend(
    t: NpuTarget,
    call: OpCall[Any],
    query: Tensor,
    pages: Halves | Packed,
    table: Tensor,
    selected: Tensor,
    positions: Tensor,
) -> Tensor:
    scale = float(call.attributes["scale"])
    common: dict[str, Any] = {
        "block_table": table,
        "actual_seq_lengths_kv": _context_lengths(positions),
        "sparse_block_size": 1,
        "layout_query": "BSND",
        "layout_kv": "PA_BSND",
        "sparse_mode": _CAUSAL,
        "attention_mode": _ABSORBED,
    }
    chosen = selected.unsqueeze(2)
    if isinstance(pages, Packed):
        rows = pages.rows.unsqueeze(2)
        return t.npu(
            "npu_kv_quant_sparse_flash_attention",
            query.contiguous(),
            rows,
            rows,
            chosen,
            scale,
            _BY_TILE,
            _BY_TILE,
            quant_scale_repo_mode=_IN_THE_ROW,
            tile_size=caches.TILE,
            rope_head_dim=pages.rope,
            **common,
        )
    latents = pages.nope.unsqueeze(2)
    return t.npu(
        "npu_sparse_flash_attention",
        query[..., :LATENT].contiguous(),
        latents,
        latents,
        chosen,
        scale,
        query_rope=query[..., LATENT:].contiguous(),
        key_rope=pages.rope.unsqueeze(2),
        **common,
    )[0]


def _seen(selected: Tensor, positions: Tensor) -> Tensor:
    """A selection that our own top-k made: -1 in place of what a query may not see, all of which comes last."""
    return torch.where(selected > positions[:, :, None], torch.full_like(selected, -1), selected)


def over_context(t: NpuTarget, call: OpCall[Any]) -> Sequence[Any]:
    """The decomposition over the context's own pages, as the graph has them and numbered anew."""
    query, pages, page_table, *rest = call.operands
    if isinstance(pages, Tensor):
        return t.decomposed(call, call.operands)
    b, count = page_table.shape
    own = pages.taken(page_table.reshape(-1))
    numbers = torch.arange(b * count, dtype=page_table.dtype).reshape(b, count)
    return t.decomposed(call, [query, own, numbers, *rest])
