"""Bytes of cache rows are the memory ledger's, in every form that an engine keeps them in (see `counted`)."""

from __future__ import annotations

import pytest

from backends.emulation.number_formats import NumberFormats
from model.formats import ROWS, CacheFormats, Formats
from model.hf_config import from_hf
from model.split import Grid, Layout
from runtime.deployment.ledger import stage_kv_bytes_by_cache
from tests.deployment.counted import INDEXERS, ODD, cluster_of, raw, row_bits, server_of, token_bytes, weights_of

CACHES = {
    "bf16": CacheFormats("bf16", "bf16", "bf16"),
    "8-bit index": CacheFormats("bf16", "fp8_scaled", "bf16"),
    "fp8": CacheFormats("fp8", "fp8_scaled", "fp8"),
    "fp8 on Hopper": CacheFormats("fp8_ds_mla", "fp8_scaled", "fp8"),
    "int8": CacheFormats("int8_packed", "int8_scaled", "int8"),
}


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("dsa", form) for form in CACHES),
        *((family, form) for family in ("mla", "gqa") for form in ("bf16", "fp8", "int8")),
    ],
)
def test_cache_rows_are_the_ledgers(family: str, form: str) -> None:
    """A token's rows in the pages of each device: latents and index keys whole, KV heads split, none where a selection
    is shared."""
    cfg, weights = weights_of(family)
    for layout in (Layout(dp=2, pp=3), Layout(tp=4, dp=2, pp=2)):
        cluster = cluster_of(cfg, weights, "bf16", Grid.of(cfg, layout), rows=CACHES[form])
        server = server_of(cluster)
        for stage in range(layout.pp):
            ledger = stage_kv_bytes_by_cache(cfg, layout, CACHES[form], stage, False)
            assert token_bytes(server, stage) == ledger, (layout.name, stage)
            indexed = [layer for layer, caches in zip(cluster.grid.stages[stage], server.caches[stage], strict=True)
                       if "index" in caches]  # fmt: skip
            assert indexed == [n for n in cluster.grid.stages[stage] if family == "dsa" and INDEXERS[n] == "full"]


@pytest.mark.parametrize(
    ("name", "width", "rope", "expected"),
    [
        ("bf16", 576, 64, 1152),
        ("fp8", 576, 64, 576),
        ("fp8_ds_mla", 576, 64, 656),
        ("int8_packed", 576, 64, 656),
        ("fp8_scaled", 128, 0, 132),
        ("int8_scaled", 128, 0, 130),
    ],
)
def test_rows_of_full_size(name: str, width: int, rope: int, expected: int) -> None:
    """GLM-5's own widths: the records that engines document, made by the emulation."""
    rows = CacheFormats("bf16", name, "bf16") if width == 128 else CacheFormats(name, "bf16", "bf16")
    cfg = from_hf(raw("dsa", **{**ODD, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}))
    held = NumberFormats(cfg, Formats(cache=rows))
    assert row_bits(held, "index" if width == 128 else "latent", (width,), "bfloat16") == 8 * expected
    assert ROWS[name].bytes(width, rope) == expected
