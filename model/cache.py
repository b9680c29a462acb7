"""What a sequence leaves behind per token: the paged caches, by layer type and cache format.

MLA layers keep one row a token (the normalised latent and the rotated shared key), layers that own an
indexer one more row (the rotated index key), GQA layers a key and a value per KV head. A layer that
shares a selection owns no index pages. Free of JAX.
"""

from __future__ import annotations

import dataclasses
import math

from model.config import LayerType, Mla, ModelConfig
from model.formats import CacheFormats


@dataclasses.dataclass(frozen=True)
class CacheRow:
    """One cache of a layer: `name` ("latent", "index", "key", "value") and the shape of a token's row."""

    name: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        return math.prod(self.shape)


def cache_rows(cfg: ModelConfig, kind: LayerType) -> tuple[CacheRow, ...]:
    """The caches a layer of this type owns."""
    if isinstance(cfg.attention, Mla):
        rows = (CacheRow("latent", (cfg.attention.latent_dim,)),)
        if kind.indexer == "full" and cfg.indexer:
            rows += (CacheRow("index", (cfg.indexer.head_dim,)),)
        return rows
    shape = (cfg.attention.kv_heads, cfg.attention.head_dim)
    return (CacheRow("key", shape), CacheRow("value", shape))


def row_bytes(cfg: ModelConfig, row: CacheRow, formats: CacheFormats) -> int:
    """Bytes of one token's row."""
    rope = cfg.attention.rope_dim if row.name == "latent" and isinstance(cfg.attention, Mla) else 0
    return formats.of(row.name).bytes(row.width, rope)


def held_row(cfg: ModelConfig, row: CacheRow, formats: CacheFormats, dtype: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of what a program keeps of a token's row: a record of bytes where the format has scales
    (`model.narrow_rows`), e4m3 where it is that throughout, else the row as it was computed, in `dtype`."""
    fmt = formats.of(row.name)
    if fmt.scale is not None:
        return (row_bytes(cfg, row, formats),), "uint8"
    return row.shape, fmt.values.name if fmt.narrow else dtype


def narrow_formats(cfg: ModelConfig, formats: CacheFormats) -> frozenset[str]:
    """The row formats narrower than activations that this model's caches are kept in, by name."""
    kept = {formats.of(row.name) for kind in cfg.layers for row in cache_rows(cfg, kind)}
    return frozenset(each.name for each in kept if each.narrow)


def layer_bytes_per_token(cfg: ModelConfig, kind: LayerType, formats: CacheFormats) -> dict[str, int]:
    """Bytes a token takes in each cache of a layer of this type."""
    return {row.name: row_bytes(cfg, row, formats) for row in cache_rows(cfg, kind)}


def bytes_per_token(cfg: ModelConfig, formats: CacheFormats, mtp: bool = False) -> dict[str, int]:
    """Bytes a token takes over all main layers (with `mtp`: over the MTP layers instead), by cache."""
    total: dict[str, int] = {}
    for kind, count in cfg.layer_counts.items():
        if kind.mtp == mtp:
            for name, size in layer_bytes_per_token(cfg, kind, formats).items():
                total[name] = total.get(name, 0) + size * count
    return total


def known_forms(cfg: ModelConfig) -> dict[str, CacheFormats]:
    """The forms in which engines keep this model's cache, by name; which one does, its engine and chip decide.

    fp8: with an indexer, FlashMLA's 656-byte record for sparse attention on Hopper; fp8_uniform: FP8 throughout, as
    dense attention has it everywhere, and sparse attention on Blackwell.
    """
    scaled = {"index": "fp8_scaled"}
    forms = {
        "bf16": CacheFormats.plain("bf16"),
        "bf16_kv_fp8_index": CacheFormats("bf16", heads="bf16", **scaled),
        "fp8": CacheFormats("fp8_ds_mla" if cfg.indexer else "fp8", heads="fp8", **scaled),
    }
    return forms | ({"fp8_uniform": CacheFormats("fp8", heads="fp8", **scaled)} if cfg.indexer else {})
