"""Parts of an attention block that a chip has one kernel for, where that was measured: the projections before absorbed
attention, and the indexer's scores with the choice among them."""

from __future__ import annotations

from typing import Literal

from model.formats import ROWS
from runtime.pricing.book import BATCH_KNOTS, TOKEN_KNOTS, PriceBook, element_bytes
from runtime.pricing.price import Price, total
from runtime.pricing.work import MlaShape


def prolog(book: PriceBook, shape: MlaShape, heads: int, weight_format: str, tokens: float) -> Price | None:
    """From hidden states of `tokens` to absorbed queries and the cache's rows, `heads` of the device."""
    kernel = book.named(f"mla_prolog/{weight_format}/any")
    if kernel is None:
        return None
    fixed = {**shape.features(), **element_bytes(weight_format), "heads": float(heads)}
    key = ("mla_prolog", shape, heads, weight_format)
    found = book.curve(key, kernel, False, weight_format, lambda t: {"tokens": t, **fixed}).price(tokens)
    return total([found, book.rounding(tokens, shape.hidden)]) if book.rounds(weight_format) else found


def indexer(
    book: PriceBook,
    shape: MlaShape,
    row: str,
    phase: Literal["decode", "prefill"],
    tokens: float,
    context: float,
    sequences: float,
) -> Price | None:
    """`tokens` queries over `context` keys each, kept as `row` (of `model.formats.ROWS`)."""
    kind = ROWS[row].kind
    kernel = book.named(f"indexer_{phase}/{kind}/any")
    if kernel is None:
        return None
    fixed = {**shape.features(), "index_kv_bytes": float(ROWS[row].bytes(shape.index_dim))}
    fmt, decode = INDEX_FORMATS.get(kind, "bf16"), phase == "decode"
    table = book.surface(
        ("indexer", phase, shape, row, None if decode else sequences), kernel, fmt,
        BATCH_KNOTS if decode else TOKEN_KNOTS,
        lambda t, c: {"tokens": t, "context": c, "sequences": t if decode else sequences, **fixed},
    )  # fmt: skip
    return table.price(tokens, context)


INDEX_FORMATS = {"int8": "w8a8-int8", "fp8": "fp8-tensor"}
"""The format that scores are computed in, by the kind of the keys."""
