"""What runs in which number format, as a table: every product and cache of a model under a deployment's formats.
Free of JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from model.config import Mla, ModelConfig
from model.formats import FORMATS, Formats, MatrixFormat
from model.weights import layer_weights, outer_weights

DECIDES: Mapping[str, Literal["weights", "cache", "index", "float32", "wide"]] = {
    "glm.embed": "wide",
    "glm.rms_norm": "float32",
    "glm.layer_norm": "float32",
    "glm.linear": "weights",
    "glm.head_linear": "wide",
    "glm.bias": "wide",
    "glm.swiglu": "wide",
    "glm.rope": "float32",
    "glm.cache_write": "cache",
    "glm.index_scores": "index",
    "glm.select_topk": "float32",
    "glm.sparse_attention": "wide",
    "glm.latent_attention": "wide",
    "glm.expanded_attention": "wide",
    "glm.paged_attention": "wide",
    "glm.route": "float32",
    "glm.expert_ffn": "weights",
}
"""What decides the format an op computes in: its weights' format, the cache's, the index cache's, float32 inside
with 16-bit operands, or 16 bits (products of 16-bit operands summed in float32)."""


@dataclasses.dataclass(frozen=True)
class FormatRow:
    """A line of the table that says what runs in which format; kept_in: that of the weights or rows, for people."""

    op: str
    role: str
    weights: tuple[str, ...]
    format: str
    kept_in: str
    activations: str


def format_table(cfg: ModelConfig, formats: Formats) -> list[FormatRow]:
    """Every product and cache of a model with its format, in the order of the graph."""
    scheme, wide = formats.scheme, FORMATS[formats.wide]
    groups: dict[tuple[str, str, MatrixFormat], list[str]] = {}
    for kind in cfg.layer_counts:
        for weight in layer_weights(cfg, kind):
            if len(weight.shape) < 2 or kind.mtp:
                continue
            op = {"kv_up": "glm.head_linear", "experts": "glm.expert_ffn"}.get(weight.role, "glm.linear")
            op = "glm.route" if weight.component == "router" else op
            names = groups.setdefault((op, weight.role, scheme.stored(weight)), [])
            if weight.name not in names:
                names.append(weight.name)
    rows = []
    for (op, kind, stored), names in groups.items():
        computed = {"glm.head_linear": wide, "glm.route": FORMATS["f32"]}.get(op, stored)
        rows.append(FormatRow(op, kind, tuple(names), stored.name, stored.label, computed.activations.text))
    head = tuple(w.name for w in outer_weights(cfg) if w.name == "head")
    rows.append(FormatRow("glm.linear", "wide", head or ("embed",), wide.name, wide.label, wide.activations.text))
    kept = formats.cache.of("latent" if isinstance(cfg.attention, Mla) else "key")
    rows.append(FormatRow("glm.cache_write", "cache", (), kept.kind, kept.label, ""))
    if cfg.indexer:
        kept = formats.cache.of("index")
        rows.append(FormatRow("glm.index_scores", "index cache", (), kept.kind, kept.label, "as the index keys"))
    return rows
