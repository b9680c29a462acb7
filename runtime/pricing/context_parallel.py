"""Attention over a cache whose tokens are dealt out to `across` ranks of a tp group (decode context parallelism), and
of prompts that are cut over tp groups (`cut_prefill`).

As vLLM does it (v1/attention/backends/mla/common.py, ops/common.py `cp_lse_ag_out_rs`; docs,
serving/context_parallel_deployment.md), a layer and decode step:

    all-gather      the queries of all heads of the group, in the latent, 16 bits
    attention       all of those heads over 1/n of the context: the same products, 1/n of the reads
    all-gather      the softmax's log-sum of each head and rank, 32 bits
    reduce-scatter  the outputs in the latent, each rank its own heads, 16 bits

With an indexer each rank scores the keys that it holds, and candidates (scores and positions) are gathered for one
global choice (vllm #46178). A prompt's chunk attends to all heads' keys on every rank, as without: the cached latents
before it are gathered first.

Grouped queries (v1/attention/backends/flash_attn.py `_forward_with_dcp`, PR 24864) go the same way with whole heads:
the query heads of the ranks that share KV heads are gathered, attend to each rank's share of the context, and are put
together by their log-sums; what a step adds itself each rank has of its own heads, and attends to apart. A prompt's
chunk too, whose cached tokens stay where they are.
"""

from __future__ import annotations

from dataclasses import replace

from runtime.pricing import attention
from runtime.pricing.attention import GqaLayer, MlaLayer
from runtime.pricing.book import PriceBook
from runtime.pricing.placement import Span
from runtime.pricing.price import Price, total, weakest

_HALF, _SINGLE = 2.0, 4.0  # bytes


def decode(book: PriceBook, layer: MlaLayer, sequences: float, context: float, across: Span) -> Price:
    """One decode step of one block: `sequences` queries over a mean of `context` tokens, of which each rank holds
    its share. The block measured over the share, what the group's heads add to its kernel, and what is exchanged."""
    ranks, shape = across.devices, layer.shape
    share = max(context / ranks, 1.0)
    block = attention.decode(book, layer, sequences, share)
    keys = share if layer.mode == "dense" else min(share, float(shape.index_topk))
    mine = attention.mla_decode(book, layer, sequences, keys)
    group = attention.mla_decode(book, replace(layer, heads=layer.heads * ranks), sequences, keys)
    more = max(0.0, group.seconds - mine.seconds)
    exchanged = _exchanged(book, sequences * layer.heads, shape.kv_lora + shape.rope, shape.kv_lora, across)
    if layer.mode == "index":
        candidates = min(share, float(shape.index_topk)) * ranks
        exchanged.append(book.network.collective("all_gather", 2 * _SINGLE * sequences * candidates, across))
    evidence = weakest((block.evidence, "transferred"))
    return total([replace(block, seconds=block.seconds + more, evidence=evidence), *exchanged])


def gqa_decode(book: PriceBook, layer: GqaLayer, sequences: float, context: float, across: Span) -> Price:
    """Attention of one decode step: `sequences` queries over a mean of `context` tokens, of which each rank holds its
    share, and over their own."""
    if across.devices == 1:
        return attention.gqa(book, "decode", layer, sequences, context)
    group, share = replace(layer, heads=layer.heads * across.devices), max(context / across.devices, 1.0)
    dealt, own = (
        attention.gqa(book, "decode", group, sequences, share),
        attention.gqa(book, "decode", layer, sequences, 1.0),
    )
    return _together(dealt, own, _exchanged(book, sequences * layer.heads, layer.head_dim, layer.head_dim, across))


def gqa_prefill(book: PriceBook, layer: GqaLayer, tokens: float, prefix: float, sequences: int, across: Span) -> Price:
    """Attention of a step's chunks: `tokens` over `sequences`, to one another and to `prefix` cached tokens before
    each, of which each rank holds its share."""
    own = attention.gqa(book, "prefill", layer, tokens, max(tokens / sequences / 2, 1.0), sequences)
    if prefix <= 0:
        return own
    group, share = replace(layer, heads=layer.heads * across.devices), max(prefix / across.devices, 1.0)
    dealt = attention.gqa(book, "prefill", group, tokens, share, sequences)
    return _together(dealt, own, _exchanged(book, tokens * layer.heads, layer.head_dim, layer.head_dim, across))


def _together(dealt: Price, own: Price, exchanged: list[Price]) -> Price:
    return total([replace(dealt, evidence=weakest((dealt.evidence, "transferred"))), own, *exchanged])


def _exchanged(book: PriceBook, heads: float, query: int, output: int, across: Span) -> list[Price]:
    """What the ranks tell each other of `heads` rows on each of them: queries, log-sums and outputs."""
    of_all = heads * across.devices
    return [
        book.network.collective("all_gather", _HALF * of_all * query, across),
        book.network.collective("all_gather", _SINGLE * of_all * across.devices, across),
        book.network.collective("reduce_scatter", _HALF * of_all * output, across),
    ]


def cut_prefill(
    book: PriceBook, layer: MlaLayer, tokens: int, prefix: float, sequences: int, mine: int, across: Span
) -> Price:
    """One prefill step of one block whose `tokens` new tokens are cut over the tp groups of `across`, `mine` on each
    (prefill context parallelism), in 2n pieces of which each group has one from either end. Each attends with all heads
    of its tp rank to all keys, whose rows the groups gather before they write them: every one keeps a whole cache.

    vllm PR 46570 (MLA and sparse MLA, 0.28); sglang 0.5.14 layers/cp/zigzag.py and interleave.py gather_kv_cache.
    """
    own = attention.prefill(
        book, layer, mine, prefix, sequences, host_launched=False, beside=float(max(0, tokens - mine))
    )
    row = layer.kv_bytes + (layer.index_kv_bytes if layer.mode == "index" else 0)
    rows = book.network.collective("all_gather", float(row) * tokens, across)
    return total([replace(own, evidence=weakest((own.evidence, "transferred"))), rows])


def gathered(book: PriceBook, layer: MlaLayer, cached_tokens: float, across: Span) -> Price:
    """Bringing the latents of cached tokens together before a chunk of a prompt attends to them."""
    return book.network.collective("all_gather", float(layer.kv_bytes) * cached_tokens, across)
