"""Attention over a cache whose tokens are dealt out to `across` ranks of a tp group (decode context parallelism).

As vLLM does it (v1/attention/backends/mla/common.py, ops/common.py `cp_lse_ag_out_rs`; docs,
serving/context_parallel_deployment.md), a layer and decode step:

    all-gather      the queries of all heads of the group, in the latent, 16 bits
    attention       all of those heads over 1/n of the context: the same products, 1/n of the reads
    all-gather      the softmax's log-sum of each head and rank, 32 bits
    reduce-scatter  the outputs in the latent, each rank its own heads, 16 bits

With an indexer each rank scores the keys that it holds, and candidates (scores and positions) are gathered for one
global choice (vllm #46178). A prompt's chunk attends to all heads' keys on every rank, as without: the cached latents
before it are gathered first.
"""

from __future__ import annotations

from dataclasses import replace

from runtime.pricing import attention
from runtime.pricing.attention import MlaLayer
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
    heads = sequences * layer.heads * ranks
    exchanged = [
        book.network.collective("all_gather", _HALF * heads * (shape.kv_lora + shape.rope), across),
        book.network.collective("all_gather", _SINGLE * heads * ranks, across),
        book.network.collective("reduce_scatter", _HALF * heads * shape.kv_lora, across),
    ]
    if layer.mode == "index":
        candidates = min(share, float(shape.index_topk)) * ranks
        exchanged.append(book.network.collective("all_gather", 2 * _SINGLE * sequences * candidates, across))
    evidence = weakest((block.evidence, "transferred"))
    return total([replace(block, seconds=block.seconds + more, evidence=evidence), *exchanged])


def gathered(book: PriceBook, layer: MlaLayer, cached_tokens: float, across: Span) -> Price:
    """Bringing the latents of cached tokens together before a chunk of a prompt attends to them."""
    return book.network.collective("all_gather", float(layer.kv_bytes) * cached_tokens, across)
