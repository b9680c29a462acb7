"""This project's own attention, op by op, on a machine that `glm5 calibrate --model` measured.

Engines' blocks were measured whole, or their kernels stand for it; what our graph has between its products, and that
prompts attend with latents expanded within one op, nobody else's tables say.
"""

from __future__ import annotations

from runtime.pricing.book import TOKEN_KNOTS, PriceBook
from runtime.pricing.kernel import Kernel
from runtime.pricing.price import Price, total
from runtime.pricing.work import MlaShape


def between(book: PriceBook, shape: MlaShape, heads: int, tokens: float, indexes: bool) -> Price:
    """Norms of latents, rotations, and writes to the caches of a layer. heads: of the device. indexes: it has an
    indexer of its own."""
    moved = 2.0 * book.wide_bytes * tokens
    sizes = [("rms_norm", width) for width in (shape.q_lora, shape.kv_lora) if width]
    sizes += [("rope", heads * shape.rope), ("cache_write", shape.kv_lora + shape.rope)]
    if indexes:
        sizes += [*_key_sizes(shape), ("rope", shape.index_heads * shape.index_dim)]
    return total(book.memory(moved * width, op) for op, width in sizes)


def index_key(book: PriceBook, shape: MlaShape, weight_format: str, tokens: float) -> Price:
    """An indexer's keys of `tokens`, made and written where nothing is selected yet."""
    moved = 2.0 * book.wide_bytes * tokens
    written = (book.memory(moved * width, op) for op, width in _key_sizes(shape))
    return total([book.gemm(tokens, shape.index_dim, shape.hidden, weight_format), *written])


def _key_sizes(shape: MlaShape) -> list[tuple[str, int]]:
    return [(op, shape.index_dim) for op in ("layer_norm", "rope", "cache_write")]


def expanded(
    book: PriceBook, kernel: Kernel, shape: MlaShape, heads: int, row_bytes: float, tokens: float, cached: float,
    sequences: int,
) -> Price:  # fmt: skip
    """Attention of `tokens` queries of `sequences`, the last of which sees `cached` keys: all of those are expanded
    from their latents within the op. row_bytes: of a latent."""
    fixed = {"heads": float(heads), "qk": float(shape.nope + shape.rope), "v": float(shape.v), "kv_bytes": row_bytes,
             "sequences": float(sequences)}  # fmt: skip
    table = book.surface(("expanded_prefill", heads, shape, row_bytes, sequences), kernel, "bf16", TOKEN_KNOTS,
                         lambda t, c: {"tokens": t, "context": c, **fixed})  # fmt: skip
    return table.price(tokens, cached)
