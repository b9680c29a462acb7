"""Attention blocks: priced whole where whole blocks were measured, and shared out over their parts.

A measured block spans the normed input to the output projection: every GEMM, the absorbed products, the
indexer, top-k, the attention kernel, and the norms, rotary embedding, quantisation and cache writes in
between. It does not span the layer's input norm or any collective. Kernels overlap inside a block, so it
is cheaper than the sum of its parts measured alone; `parts` scales them to the block, which keeps the sum
right and counts nothing twice. Elementwise ops inside the block are then already paid for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from model.formats import ROWS
from runtime.pricing import fused, own_graph
from runtime.pricing.book import BATCH_KNOTS, TOKEN_KNOTS, PriceBook, Tabulated, element_bytes
from runtime.pricing.kernel import Kernel
from runtime.pricing.price import Price, PriceError, total, weakest
from runtime.pricing.work import MEASURED_BLOCKS, MlaShape

RATED = "trtllm"
"""Whose table of the dense MLA prefill kernel agrees with the whole blocks of SGLang; SGLang's own is of a third of
that rate (see docs/validation.md, where it falls short)."""
_CACHED_AT_ONCE = 64 * 1024
"""Cached tokens that a workspace has room for, expanded: more are attended to in turns (vLLM; 128k in SGLang)."""
IndexMode = Literal["index", "skip", "dense"]
"""Sparse with its own indexer; sparse with an earlier layer's choice; or attending to everything."""


@dataclass(frozen=True, slots=True)
class MlaLayer:
    """One MLA layer on one device: `heads` are local (total / tensor parallelism); latent and index are what rows of
    its caches are stored in (names of `model.formats.ROWS`)."""

    shape: MlaShape
    heads: int
    mode: IndexMode = "index"
    latent: str = "bf16"
    weight_format: str = "fp8-block"
    index: str = "fp8_scaled"

    def __post_init__(self) -> None:
        for name in (self.latent, self.index):
            if name not in ROWS:
                raise PriceError(f"unknown row format {name!r}; known: {', '.join(ROWS)}")
        if self.mode != "dense" and not self.shape.index_heads:
            raise PriceError(f"mode {self.mode!r} needs an indexer, and this attention has none")
        if self.heads < 1:
            raise PriceError(f"{self.heads} attention heads on a device; tensor parallelism is too wide")

    @property
    def kv_format(self) -> str:
        """What kernels are told apart by: "bf16", "fp8", "int8" or "f32"."""
        return ROWS[self.latent].kind

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's latent."""
        return ROWS[self.latent].bytes(self.shape.kv_lora + self.shape.rope, self.shape.rope)

    @property
    def index_kv_bytes(self) -> int:
        """Bytes of a token's index key."""
        return ROWS[self.index].bytes(self.shape.index_dim)


@dataclass(frozen=True, slots=True)
class GqaLayer:
    """Grouped-query attention on one device: `heads` and `kv_heads` are local; row is what keys and values are stored
    in (a name of `model.formats.ROWS`)."""

    heads: int
    kv_heads: int
    head_dim: int = 128
    row: str = "bf16"


def block_kernel(book: PriceBook, layer: MlaLayer, phase: Literal["decode", "prefill"]) -> Kernel | None:
    """The measured whole-block kernel, this engine's or else SGLang's, or None when there is none.

    int8 KV has no table and is priced from parts. On chips priced by transfer there are no blocks.
    """
    name = MEASURED_BLOCKS.get(layer.shape)
    if name is None or layer.kv_format == "int8":
        return None
    for engine in (book.engine, "sglang"):
        for kv in (layer.kv_format, "bf16"):
            key = f"block_{phase}/{name}/{layer.mode}/{kv}/{layer.weight_format}/{engine}"
            if kernel := book.named(key):
                return kernel
    return None


WIDE_PROJECTIONS = "attention with its projections in 16 bits, where their 8-bit block was not measured"


def _as_measured(
    book: PriceBook, layer: MlaLayer, phase: Literal["decode", "prefill"]
) -> tuple[Kernel | None, MlaLayer]:
    """The whole-block kernel of a layer, and the layer that it was measured of: one with 16-bit projections stands in
    for FP8 ones, whose parts would miss what the block has between them."""
    kernel = block_kernel(book, layer, phase)
    if kernel or layer.weight_format != "fp8-block":
        return kernel, layer
    wide = replace(layer, weight_format="bf16")
    kernel = block_kernel(book, wide, phase)
    return (kernel.resting_on(kernel.assumed | {WIDE_PROJECTIONS}), wide) if kernel else (None, layer)


def decode_block(book: PriceBook, layer: MlaLayer) -> Tabulated | None:
    """(sequences, mean context) -> seconds of one decode step's block, or None when not measured."""
    kernel, layer = _as_measured(book, layer, "decode")
    if kernel is None:
        return None
    if layer.mode == "dense" and layer.kv_format == "bf16" and (more := book.latent_decode_more_s):
        kernel = replace(kernel, constants=replace(kernel.constants, launch_s=kernel.constants.launch_s + more))

    def features(batch: Any, context: Any) -> Mapping[str, Any]:
        return {**_block_features(layer), "sequences": batch, "tokens": batch, "context": context}

    return book.surface(("decode", layer), kernel, layer.weight_format, BATCH_KNOTS, features)


def prefill_block(
    book: PriceBook, layer: MlaLayer, sequences: int = 1, *, host_launched: bool = True
) -> Tabulated | None:
    """(new tokens of the step, mean keys per query) -> seconds of one prefill block, or None.

    Prefill blocks were measured with every kernel launched from Python: below roughly 4,000 tokens that
    host time is what the table holds. `host_launched=False` leaves it out and gives device time alone, for
    an engine whose host runs ahead; `host_seconds` is the time left out.
    """
    kernel, layer = _as_measured(book, layer, "prefill")
    if kernel is None:
        return None
    if not host_launched:
        kernel = replace(kernel, constants=replace(kernel.constants, floor_s=0.0))
    bucket = float(2 ** round(np.log2(max(sequences, 1))))

    def features(tokens: Any, context: Any) -> Mapping[str, Any]:
        return {**_block_features(layer, prefill=True), "sequences": np.minimum(bucket, tokens),
                "tokens": tokens, "context": context}  # fmt: skip

    key = ("prefill", layer, bucket, host_launched)
    return book.surface(key, kernel, layer.weight_format, TOKEN_KNOTS, features)


def host_seconds(book: PriceBook, layer: MlaLayer) -> float:
    """Host time to launch one prefill block kernel by kernel; 0 when not measured."""
    kernel, _ = _as_measured(book, layer, "prefill")
    return kernel.constants.floor_s if kernel else 0.0


def _block_features(layer: MlaLayer, prefill: bool = False) -> dict[str, Any]:
    sparse = layer.mode != "dense"
    return {
        **layer.shape.features(),
        **element_bytes(layer.weight_format),
        "heads": float(layer.heads),
        "kv_bytes": float(layer.kv_bytes),
        "index_kv_bytes": float(layer.index_kv_bytes),
        "selected": float(layer.shape.index_topk) if sparse else 1e12,
        "indexer": float(layer.mode == "index"),
        "absorbed": float(sparse or not prefill),
    }


def decode(book: PriceBook, layer: MlaLayer, sequences: float, context: float) -> Price:
    """One decode step of one block: `sequences` queries over a mean of `context` cached tokens."""
    block = decode_block(book, layer)
    return block.price(sequences, context) if block else total(_decode_parts(book, layer, sequences, context).values())


def prefill(book: PriceBook, layer: MlaLayer, tokens: float, prefix: float = 0.0, sequences: int = 1,
            *, host_launched: bool = True, beside: float = 0.0) -> Price:  # fmt: skip
    """One prefill step of one block: `tokens` new tokens over `sequences`, each after `prefix` cached ones.

    beside: tokens of the same chunks that other devices compute, in pieces from both ends, so that all have as many
    keys. A sparse layer whose sequences stay within `index_topk` keys attends densely where the engine's release does
    and that path was measured.
    """
    asked = layer.mode
    layer, keys = _prefill_path(book, layer, tokens + beside, prefix, sequences)
    absorbed = _absorbed(book, layer, prefix * sequences)
    block = prefill_block(book, layer, sequences, host_launched=host_launched)
    if block is None:
        price = total(_prefill_parts(book, layer, tokens, keys, sequences, absorbed).values())
    else:
        price = block.price(tokens, keys)
    if layer.mode == "dense" and absorbed and block:  # what was measured expands the heads
        more = _absorbing(book, layer, tokens, keys, sequences)
        return replace(price, seconds=price.seconds + more, evidence=weakest((price.evidence, "transferred")))
    if layer.mode == "dense" and not absorbed and block is None and book.own("expanded_prefill"):
        return (
            total([price, own_graph.index_key(book, layer.shape, layer.weight_format, tokens)])
            if asked == "index"
            else price
        )
    if layer.mode == "dense" and not absorbed and prefix * sequences + beside > 0:
        return total([price, _expanding_cached(book, layer, tokens, prefix * sequences + beside)])
    return price


def _expanding_cached(book: PriceBook, layer: MlaLayer, tokens: float, cached: float) -> Price:
    """What `cached` tokens before the new ones of a step add to a dense block with expanded heads, beside being
    attended to: no table has prompts with them. Their latents are gathered and go through the up-projection again,
    their keys are put together from two halves, and what attends to them is merged with the rest (vllm 0.11.0
    v1/attention/backends/mla/common.py _compute_prefill_context; sglang 0.5.3 models/deepseek_v2.py
    _chunked_prefix_attn_mha)."""
    s, h = layer.shape, layer.heads
    wide = book.wide_bytes
    gathered = cached * (layer.kv_bytes + wide * (s.kv_lora + s.rope))
    joined = cached * wide * (h * s.nope + s.rope + h * (s.nope + s.rope))
    merged = math.ceil(cached / _CACHED_AT_ONCE) * 3 * tokens * h * s.v * wide
    expanded = book.gemm(cached, h * (s.nope + s.v), s.kv_lora, layer.weight_format)
    return total([expanded, *(book.memory(moved) for moved in (gathered, joined, merged))])


def _absorbing(book: PriceBook, layer: MlaLayer, tokens: float, keys: float, sequences: int) -> float:
    """Seconds that staying in the latent adds to a block that was measured with expanded heads: its products at the
    rate that dense MLA prefill reaches, and absorbing instead of expanding."""
    ways = []
    for absorbed in (True, False):
        parts = _projections(book, layer, tokens, absorbed)
        ways.append(total([*parts.values(), mla_prefill(book, layer, tokens, keys, sequences, absorbed, RATED)]))
    return max(0.0, ways[0].seconds - ways[1].seconds)


def _absorbed(book: PriceBook, layer: MlaLayer, cached_tokens: float) -> bool:
    """Whether a prefill stays in the latent: sparse layers do, dense ones where the engine chooses it."""
    if layer.mode != "dense":
        return True
    return not layer.shape.index_heads and not book.own("expanded_prefill") and book.absorbs_prefill(cached_tokens)


def _prefill_path(
    book: PriceBook, layer: MlaLayer, tokens: float, prefix: float, sequences: int
) -> tuple[MlaLayer, float]:
    """The layer as it attends in this step, and the mean number of keys per query."""
    new = tokens / max(sequences, 1)
    keys = max(prefix + new / 2.0, 1.0)
    if layer.mode != "dense" and prefix + new <= layer.shape.index_topk:
        dense = replace(layer, mode="dense")
        if (book.prefills_densely and block_kernel(book, dense, "prefill")) or book.own("expanded_prefill"):
            return dense, keys
    return layer, keys


def decode_parts(book: PriceBook, layer: MlaLayer, sequences: float, context: float) -> dict[str, Price]:
    """Part -> price, scaled to the measured block where there is one."""
    return _scaled(_decode_parts(book, layer, sequences, context), decode(book, layer, sequences, context))


def prefill_parts(book: PriceBook, layer: MlaLayer, tokens: float, prefix: float = 0.0, sequences: int = 1,
                  *, host_launched: bool = True) -> dict[str, Price]:  # fmt: skip
    """Part -> price, scaled to the measured block where there is one."""
    whole = prefill(book, layer, tokens, prefix, sequences, host_launched=host_launched)
    path, keys = _prefill_path(book, layer, tokens, prefix, sequences)
    absorbed = _absorbed(book, path, prefix * sequences)
    return _scaled(_prefill_parts(book, path, tokens, keys, sequences, absorbed), whole)


def _scaled(parts: dict[str, Price], whole: Price) -> dict[str, Price]:
    factor = whole.seconds / sum(p.seconds for p in parts.values())
    return {name: replace(whole, seconds=p.seconds * factor, bound=p.bound) for name, p in parts.items()}


def _projections(book: PriceBook, layer: MlaLayer, tokens: float, absorbed: bool) -> dict[str, Price]:
    s, h, fmt = layer.shape, layer.heads, layer.weight_format
    parts = {"output_projection": book.gemm(tokens, s.hidden, h * s.v, fmt)}
    prolog = fused.prolog(book, s, h, fmt, tokens) if absorbed else None
    if prolog:
        parts["prolog"] = prolog
    else:
        kv = s.kv_lora + s.rope
        down = (s.q_lora, kv) if book.of_own_graph else (s.q_lora + kv,)
        parts["down_projection"] = total(book.gemm(tokens, width, s.hidden, fmt) for width in down if width)
        parts["query_projection"] = book.gemm(tokens, h * (s.nope + s.rope), s.q_lora or s.hidden, fmt)
    if book.of_own_graph:
        parts["between"] = own_graph.between(book, s, h, tokens, layer.mode == "index")
    if absorbed:
        if not prolog:
            parts["absorb_key"] = book.bmm(tokens, h, s.kv_lora, s.nope)
        parts["absorb_value"] = book.bmm(tokens, h, s.v, s.kv_lora)
    else:
        parts["expand_kv"] = book.gemm(tokens, h * (s.nope + s.v), s.kv_lora, fmt)
    if layer.mode == "index":
        width = s.index_heads * s.index_dim
        # the one kernel before it gives rounded rows
        queries = (
            book.gemm_curve(width, s.q_lora, fmt).price(tokens) if prolog else book.gemm(tokens, width, s.q_lora, fmt)
        )
        if book.of_own_graph:
            small = [
                book.gemm(tokens, s.index_dim, s.hidden, fmt),
                book.gemm(tokens, s.index_heads, s.hidden, book.wide),
            ]
        else:
            small = [book.gemm(tokens, s.index_dim + s.index_heads, s.hidden, book.wide)]
        parts["index_projection"] = total([queries, *small])
    return parts


def _decode_parts(book: PriceBook, layer: MlaLayer, sequences: float, context: float) -> dict[str, Price]:
    key = {}
    if layer.mode != "dense" and context <= layer.shape.index_topk and book.own("latent_decode"):
        # this project's graph attends to all that a selection would take whole
        if layer.mode == "index":
            key = {"index_key": own_graph.index_key(book, layer.shape, layer.weight_format, sequences)}
        layer = replace(layer, mode="dense")
    parts = {**_projections(book, layer, sequences, absorbed=True), **key}
    keys = min(context, layer.shape.index_topk) if layer.mode != "dense" else context
    parts["attention"] = mla_decode(book, layer, sequences, keys)
    if layer.mode == "index":
        parts |= _indexing(book, layer, sequences, context, sequences, decode=True)
    return parts


def _indexing(
    book: PriceBook, layer: MlaLayer, tokens: float, keys: float, sequences: float, *, decode: bool = False
) -> dict[str, Price]:
    """Scores of `tokens` queries over `keys` keys each, and the choice: one kernel where that was measured."""
    phase = "decode" if decode else "prefill"
    if own := fused.indexer(book, layer.shape, layer.index, phase, tokens, keys, sequences):
        return {"indexer": own}
    return {
        "index_scores": index_scores(book, layer, tokens, keys, sequences, decode=decode),
        "select_topk": select_topk(book, layer.shape, tokens, keys),
    }


def _prefill_parts(
    book: PriceBook, layer: MlaLayer, tokens: float, keys: float, sequences: int, absorbed: bool
) -> dict[str, Price]:
    parts = _projections(book, layer, tokens, absorbed)
    if layer.mode != "dense":
        parts["attention"] = sparse_prefill(book, layer, tokens, keys, sequences)
    elif not absorbed and (own := book.own("expanded_prefill")):
        del parts["expand_kv"]
        end = keys + tokens / max(sequences, 1) / 2
        parts["attention"] = own_graph.expanded(
            book, own, layer.shape, layer.heads, float(layer.kv_bytes), tokens, end, sequences
        )
    else:
        parts["attention"] = mla_prefill(book, layer, tokens, keys, sequences, absorbed)
    if layer.mode == "index":
        parts |= _indexing(book, layer, tokens, keys, sequences)
    return parts


def mla_decode(book: PriceBook, layer: MlaLayer, sequences: float, context: float) -> Price:
    """The absorbed attention kernel alone, in the latent, over `context` keys a sequence."""
    s = layer.shape
    own = book.own("latent_decode") if layer.mode == "dense" else None
    kernel = own or book.kernel("mla_decode", layer.kv_format)[0]
    fixed = {"heads": float(layer.heads), "kv_bytes": float(layer.kv_bytes),
             "qk": float(s.kv_lora + s.rope), "v": float(s.kv_lora)}  # fmt: skip
    return book.surface(("mla_decode", layer.heads, s, layer.latent, own is None), kernel, "bf16", BATCH_KNOTS,
                        lambda b, c: {"sequences": b, "tokens": b, "context": c, **fixed}
                        ).price(sequences, context)  # fmt: skip


def mla_prefill(
    book: PriceBook, layer: MlaLayer, tokens: float, keys: float, sequences: int = 1, absorbed: bool = False,
    tables: str | None = None,
) -> Price:  # fmt: skip
    """The dense attention kernel alone: `tokens` queries over a mean of `keys` keys, with expanded heads or absorbed
    ones (all over one latent, which nobody measured: at the rate of the expanded kernel, graded 'transferred').
    tables: the engine whose table to take, by default the book's."""
    s = layer.shape
    kernel, _ = book.kernel("mla_prefill", "bf16", engine=tables)
    qk, v = (s.kv_lora + s.rope, s.kv_lora) if absorbed else (s.nope + s.rope, s.v)
    kv_bytes = float(layer.kv_bytes) if absorbed else layer.heads * 2.0 * (qk + v)
    if absorbed:
        kernel = replace(kernel, grid=None, low={}, high={}, evidence="transferred")
    dims = {"heads": float(layer.heads), "qk": float(qk), "v": float(v), "sequences": float(sequences),
            "kv_bytes": kv_bytes}  # fmt: skip
    return book.surface(("mla_prefill", layer.heads, s, sequences, absorbed, tables), kernel, "bf16", TOKEN_KNOTS,
                        lambda t, c: {"tokens": t, "context": c, **dims}).price(tokens, keys)  # fmt: skip


def sparse_prefill(book: PriceBook, layer: MlaLayer, tokens: float, keys: float, sequences: int = 1) -> Price:
    """Attention over each query's own `index_topk` chosen latents, or over all keys with a mask, where that is what
    was measured. GPU kernels pad to 64 heads."""
    s = layer.shape
    masked = book.own("masked_prefill")
    own = masked or book.own("sparse_prefill")
    kernel = own or book.kernel("sparse_prefill", "fp8")[0]
    heads = float(layer.heads if own else max(layer.heads, 64))
    dims = {"heads": heads, "qk": float(s.kv_lora + s.rope), "v": float(s.kv_lora),
            "kv_bytes": (s.kv_lora + s.rope) * 2.0, "sequences": float(sequences)}  # fmt: skip
    table = book.surface(("sparse_prefill", layer.heads, s, sequences), kernel, "fp8-block", TOKEN_KNOTS,
                         lambda t, c: {"tokens": t, "context": c, **dims})  # fmt: skip
    if masked:  # every query, over the last one's keys
        return table.price(tokens, keys + tokens / max(sequences, 1) / 2)
    return table.price(tokens, min(keys, s.index_topk))


def index_scores(book: PriceBook, layer: MlaLayer, tokens: float, context: float, sequences: float,
                 *, decode: bool = False) -> Price:  # fmt: skip
    """Index scores of `tokens` queries over `context` keys each.

    Of the tables of engines only the prefill kernel was measured alone. Decode takes its formula at the streaming rate
    of decode attention and is graded 'transferred', but on a machine that measured it.
    """
    alone = book.own("index_decode") if decode else None
    own = alone or book.own("index_scores")
    kernel = own or book.kernel("index_scores", "fp8")[0]
    shape = layer.shape
    fixed = {**shape.features(), "index_kv_bytes": float(layer.index_kv_bytes)}
    if decode and not alone:
        stream, _ = book.kernel("gqa_decode", "bf16")
        launch = book.kernel("memory", "any")[0].constants.launch_s
        rate = stream.constants.memory_efficiency
        constants = replace(kernel.constants, launch_s=launch, memory_efficiency=rate)
        kernel = replace(kernel, constants=constants, grid=None, low={}, high={}, evidence="transferred")
        kernel = kernel.resting_on(kernel.assumed | stream.assumed)
    if decode:
        table = book.surface(("index_decode", shape, layer.index), kernel, "fp8-block", BATCH_KNOTS,
                             lambda b, c: {"tokens": b, "context": c, "sequences": b, **fixed})  # fmt: skip
    else:
        table = book.surface(("index_prefill", shape, layer.index, sequences), kernel, "fp8-block", TOKEN_KNOTS,
                             lambda t, c: {"tokens": t, "context": c, "sequences": sequences, **fixed})  # fmt: skip
    return table.price(tokens, context)


def select_topk(book: PriceBook, shape: MlaShape, tokens: float, context: float) -> Price:
    """Choosing `index_topk` of `context` scores per query; free while there is nothing to choose."""
    if context <= shape.index_topk:
        return book.memory(8.0 * tokens * min(context, shape.index_topk))
    kernel = book.own("select_topk") or book.kernel("select_topk", "fp8")[0]
    table = book.surface(("topk", shape), kernel, "fp8-block", TOKEN_KNOTS,
                         lambda t, c: {"tokens": t, "context": c, **shape.features()})  # fmt: skip
    return table.price(tokens, context)


def gqa(book: PriceBook, phase: Literal["decode", "prefill"], layer: GqaLayer, tokens: float, context: float,
        sequences: float | None = None) -> Price:  # fmt: skip
    """Grouped-query attention kernel alone. Decode: `tokens` sequences over `context` keys each.

    Prefill: `tokens` queries over a mean of `context` keys, in `sequences` sequences. Fitted for head size
    128 and 4 to 16 query heads a KV head.
    """
    heads, kv_heads, head_dim, row = layer.heads, layer.kv_heads, layer.head_dim, layer.row
    kept = ROWS[row]
    name = "fp8" if phase == "decode" and kept.narrow else book.wide
    kernel, _ = book.kernel(f"gqa_{phase}", name)
    fixed = {"heads": float(heads), "kv_bytes": kv_heads * 2.0 * kept.bytes(head_dim),
             "qk": float(head_dim), "v": float(head_dim)}  # fmt: skip
    rows = BATCH_KNOTS if phase == "decode" else TOKEN_KNOTS
    count = None if phase == "decode" else float(sequences or 1.0)

    def features(t: Any, c: Any) -> Mapping[str, Any]:
        return {"tokens": t, "context": c, "sequences": t if count is None else np.minimum(count, t), **fixed}

    key = (f"gqa_{phase}", heads, kv_heads, head_dim, row, count)
    return book.surface(key, kernel, "bf16", rows, features).price(tokens, context)


def gqa_unpacked(book: PriceBook, layer: GqaLayer, sequences: float, context: float, tile: int) -> Price:
    """Decoding `sequences` over `context` keys each by the prefill kernel, which computes `tile` queries of each."""
    kernel, _ = book.kernel("gqa_prefill", "bf16")
    width = float(layer.head_dim)
    fixed = {"heads": float(layer.heads), "kv_bytes": layer.kv_heads * 2.0 * ROWS[layer.row].bytes(layer.head_dim),
             "qk": width, "v": width}  # fmt: skip
    key = ("gqa_unpacked", layer, tile)
    return book.surface(key, kernel, "bf16", BATCH_KNOTS,
                        lambda b, c: {"sequences": b, "tokens": tile * b, "context": c, **fixed}
                        ).price(sequences, context)  # fmt: skip
