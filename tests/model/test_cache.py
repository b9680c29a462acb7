"""Bytes a token leaves behind: the figures engines report, by layer and cache format."""

from __future__ import annotations

import pytest

from model.cache import CacheRow, bytes_per_token, cache_rows, known_forms, layer_bytes_per_token
from model.config import LayerType, ModelConfig
from model.formats import CacheFormats
from model.hf_config import load_config, preset_names

FULL = LayerType("mla", "full", "moe")
SHARED = LayerType("mla", "shared", "moe")


def form(cfg: ModelConfig, name: str) -> CacheFormats:
    return known_forms(cfg)[name]


# 656 bytes a layer in vLLM's fp8_ds_mla record, 132 bytes for each indexer of its own.
# 8 x H200 ran GLM-5.3-FP8 with exactly 53,940 bytes a token (vLLM recipes, pull request 893).
@pytest.mark.parametrize(
    ("name", "fmt", "expected"),
    [
        ("glm-5", "fp8", 78 * 656 + 78 * 132),
        ("glm-5", "fp8", 61464),
        ("glm-5", "bf16_kv_fp8_index", 100152),
        ("glm-5", "bf16_kv_fp8_index", 78 * (1152 + 132)),
        ("glm-5", "bf16", 78 * (1152 + 256)),
        ("glm-5.1", "fp8", 61464),
        ("glm-5.2", "fp8", 53940),
        ("glm-5.3", "fp8", 78 * 656 + 21 * 132),
        ("deepseek-v3.2", "fp8", 48068),
        # dense MLA in FP8 is 576 bytes: a DeepSeek-R1 log has 524,288 tokens in 17.16 GiB, 35,144 a token
        ("deepseek-v3", "fp8", 35136),
        ("glm-5.2", "fp8_uniform", 47700),  # on Blackwell: sgl-project/sglang#30310
        ("deepseek-v3", "bf16", 61 * 1152),
        ("kimi-k2", "bf16", 61 * 1152),
        ("glm-4.7-flash", "bf16", 47 * 1152),
        ("glm-4.5", "bf16", 92 * 2 * 8 * 128 * 2),
        ("glm-4.5-air", "fp8", 46 * 2 * 8 * 128),
    ],
)
def test_bytes_per_token(name: str, fmt: str, expected: int) -> None:
    cfg = load_config(name)
    assert sum(bytes_per_token(cfg, form(cfg, fmt)).values()) == expected


def test_the_mtp_layer_is_counted_apart() -> None:
    """62,252 bytes a token with the MTP layer."""
    cfg = load_config("glm-5")
    fp8 = form(cfg, "fp8")
    main, mtp = bytes_per_token(cfg, fp8), bytes_per_token(cfg, fp8, mtp=True)
    assert sum(main.values()) + sum(mtp.values()) == 62252
    assert mtp == {"latent": 656, "index": 132}


def test_layers_that_share_a_selection_own_no_index_cache() -> None:
    cfg = load_config("glm-5.2")
    assert cache_rows(cfg, FULL) == (CacheRow("latent", (576,)), CacheRow("index", (128,)))
    assert cache_rows(cfg, SHARED) == (CacheRow("latent", (576,)),)
    assert layer_bytes_per_token(cfg, SHARED, form(cfg, "fp8")) == {"latent": 656}
    assert bytes_per_token(cfg, form(cfg, "fp8")) == {"latent": 78 * 656, "index": 21 * 132}


def test_dense_mla_and_gqa_caches() -> None:
    mla, gqa = load_config("deepseek-v3"), load_config("glm-4.5")
    assert cache_rows(mla, mla.layers[-1]) == (CacheRow("latent", (576,)),)
    assert cache_rows(gqa, gqa.layers[-1]) == (CacheRow("key", (8, 128)), CacheRow("value", (8, 128)))


@pytest.mark.parametrize("name", preset_names())
def test_totals_are_sums_over_the_schedule(name: str) -> None:
    cfg = load_config(name)
    for fmt in known_forms(cfg).values():
        layers = [sum(layer_bytes_per_token(cfg, kind, fmt).values()) for kind in cfg.layers]
        assert sum(bytes_per_token(cfg, fmt).values()) == sum(layers)
    sizes = [sum(bytes_per_token(cfg, form(cfg, fmt)).values()) for fmt in ("fp8", "bf16_kv_fp8_index", "bf16")]
    assert sizes == sorted(sizes)
