"""Reading config.json: what the presets say, what is derived, and that nothing gets past `ConfigError`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.cache import bytes_per_token, known_forms
from model.config import Gqa, LayerType, Mla, ModelConfig
from model.errors import ConfigError
from model.hf_config import MODEL_TYPES, from_hf, load_config, preset_names, read_config
from model.weights import layer_weights, outer_weights, parameter_counts
from tests.model.oracle import CASES, Oracle

Oracles = Callable[[str], Oracle]
PRESETS = preset_names()


def raw_preset(name: str) -> dict[str, Any]:
    return json.loads((resources.files("model") / "configs" / f"{name}.json").read_text())


# --- presets -------------------------------------------------------------------------------------


def test_presets_of_every_release() -> None:
    named = {"glm-5", "glm-5-fp8", "glm-5.1", "glm-5.2", "glm-5.3", "glm-4.5", "glm-4.5-air", "glm-4.6", "glm-4.7"}
    assert named | {"glm-4.7-flash", "deepseek-v3", "deepseek-v3.2", "deepseek-r1", "kimi-k2"} <= set(PRESETS)


# facts/glm5.md 1.1 and 1.3 (transformers configuration files; arXiv 2602.15763, table 10)
@pytest.mark.parametrize(
    ("name", "layers", "dense", "experts", "top_k", "full", "attention"),
    [
        ("glm-5", 78, 3, 256, 8, 78, Mla(2048, 512, 192, 64, 256)),
        ("glm-5-fp8", 78, 3, 256, 8, 78, Mla(2048, 512, 192, 64, 256)),
        ("glm-5.1", 78, 3, 256, 8, 78, Mla(2048, 512, 192, 64, 256)),
        ("glm-5.2", 78, 3, 256, 8, 21, Mla(2048, 512, 192, 64, 256)),
        ("glm-5.3", 78, 3, 256, 8, 21, Mla(2048, 512, 192, 64, 256)),
        ("deepseek-v3.2", 61, 3, 256, 8, 61, Mla(1536, 512, 128, 64, 128)),
        ("deepseek-v3", 61, 3, 256, 8, 0, Mla(1536, 512, 128, 64, 128)),
        ("kimi-k2", 61, 1, 384, 8, 0, Mla(1536, 512, 128, 64, 128)),
        ("glm-4.7-flash", 47, 1, 64, 4, 0, Mla(768, 512, 192, 64, 256)),
        ("glm-4.5", 92, 3, 160, 8, 0, Gqa(8, 128, True, True)),
        ("glm-4.7", 92, 3, 160, 8, 0, Gqa(8, 128, True, True)),
        ("glm-4.5-air", 46, 1, 128, 8, 0, Gqa(8, 128, True, False)),
    ],
)
def test_dimensions(
    name: str, layers: int, dense: int, experts: int, top_k: int, full: int, attention: Mla | Gqa
) -> None:
    cfg = load_config(name)
    assert cfg.num_layers == layers
    assert sum(kind.ffn == "dense" for kind in cfg.layers) == dense
    assert all(kind.ffn == "dense" for kind in cfg.layers[:dense])
    assert sum(kind.indexer == "full" for kind in cfg.layers) == full
    assert cfg.moe is not None and (cfg.moe.experts, cfg.moe.top_k, cfg.moe.shared_experts) == (experts, top_k, 1)
    assert cfg.attention == attention


def test_what_tells_the_families_apart() -> None:
    """facts/glm5.md 1.5: GLM-5 against DeepSeek-V3.2."""
    glm, deepseek = load_config("glm-5"), load_config("deepseek-v3.2")
    assert glm.indexer and deepseek.indexer
    assert (glm.indexer.rope_interleaved, deepseek.indexer.rope_interleaved) == (True, False)
    assert (glm.indexer.heads, deepseek.indexer.heads) == (32, 64)
    assert glm.indexer.topk == deepseek.indexer.topk == 2048
    assert (glm.rope.theta, glm.rope.yarn, deepseek.rope.theta) == (1e6, None, 1e4)
    assert deepseek.rope.yarn and deepseek.rope.yarn.factor == 40
    assert (glm.norm_eps, deepseek.norm_eps) == (1e-5, 1e-6)
    assert (glm.mtp_carries_norm, deepseek.mtp_carries_norm) == (True, False)
    assert glm.moe and deepseek.moe
    assert (glm.moe.n_group, glm.moe.topk_group) == (1, 1)
    assert (deepseek.moe.n_group, deepseek.moe.topk_group) == (8, 4)
    assert glm.attention_scale == 256**-0.5
    assert load_config("glm-5.2").rope.theta == 8e6
    assert glm.eos_token_ids == (154820, 154827, 154829)


def test_shared_indexers_of_glm_5_2() -> None:
    """facts/glm5.md 1.3: full at layers 0, 1, 2, 6, 10, ..., 74."""
    cfg = load_config("glm-5.2")
    full = [i for i, kind in enumerate(cfg.layers) if kind.indexer == "full"]
    assert full == [0, 1, 2, *range(6, 75, 4)]
    assert [cfg.index_source(i) for i in (0, 2, 3, 5, 6, 9, 77)] == [0, 2, 2, 2, 6, 6, 74]
    assert cfg.mtp_type == LayerType("mla", "full", "moe", mtp=True)
    # the same schedule from its frequency, its pattern, and its list
    raw = raw_preset("glm-5.2")
    listed = raw.pop("indexer_types")
    assert from_hf({**raw, "index_topk_pattern": None}).layers == cfg.layers
    pattern = "".join({"full": "F", "shared": "S"}[kind] for kind in listed)
    assert from_hf({**raw, "index_topk_pattern": pattern, "index_topk_freq": 1}).layers == cfg.layers
    assert from_hf({**raw, "index_topk_freq": 1}).layers == load_config("glm-5.1").layers


def test_layer_counts_follow_the_schedule() -> None:
    counts = load_config("glm-5.2").layer_counts
    assert {kind.name: count for kind, count in counts.items()} == {
        "mla-full-indexer-dense": 3,
        "mla-full-indexer-moe": 18,
        "mla-shared-indexer-moe": 57,
        "mtp-mla-full-indexer-moe": 1,
    }
    assert list(counts)[-1].mtp


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_numbers(oracles: Oracles, name: str) -> None:
    """Rope frequencies, softmax scale and schedule against the built torch model."""
    oracle = oracles(name)
    cfg, layers = oracle.config, oracle.torch_model.model.layers
    rotary = oracle.torch_model.model.rotary_emb
    np.testing.assert_allclose(cfg.rope.inv_freq(), rotary.inv_freq.numpy(), rtol=1e-6)
    assert cfg.rope.attention_factor == pytest.approx(rotary.attention_scaling)
    assert cfg.attention_scale == pytest.approx(layers[0].self_attn.scaling)
    for kind, layer in zip(cfg.layers, layers, strict=True):
        assert (kind.ffn == "moe") == hasattr(layer.mlp, "experts")
        assert (kind.indexer == "full") == (getattr(layer.self_attn, "indexer", None) is not None)


@pytest.mark.parametrize(
    "name", ["glm-5", "glm-5.2", "deepseek-v3.2", "deepseek-v3", "kimi-k2", "glm-4.5", "glm-4.7-flash"]
)
def test_full_size_rope_against_transformers(name: str) -> None:
    """The real yarn parameters, which the tiny models do not have."""
    pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw, cfg = raw_preset(name), load_config(name)
    raw["model_type"] = cfg.model_type
    theirs = transformers.AutoConfig.for_model(**raw)
    if cfg.rope.yarn is None:
        pairs = cfg.rope.dim // 2
        expected = [cfg.rope.theta ** (-2 * i / cfg.rope.dim) for i in range(pairs)]
        assert theirs.rope_parameters["rope_theta"] == cfg.rope.theta
        assert cfg.rope.attention_factor == 1.0
    else:
        theirs.head_dim = cfg.rope.dim
        expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
        assert cfg.rope.attention_factor == pytest.approx(factor)
    np.testing.assert_allclose(cfg.rope.inv_freq(), np.asarray(expected), rtol=2e-6)


# --- where a config comes from -------------------------------------------------------------------


def test_a_config_by_name_directory_or_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_preset("glm-5")))
    named = load_config("glm-5")
    for source in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert dataclasses.replace(load_config(source), name="glm-5") == named


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    for source in ("glm-6", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="glm-5") as error:
            load_config(source)
        assert "\n" not in str(error.value) and str(source) in str(error.value)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError):
        read_config(tmp_path)  # a directory


# --- bad input -----------------------------------------------------------------------------------

MISSING = object()
JUNK: tuple[Any, ...] = (
    MISSING, None, -1, 0, 1, 3, 2.5, 100_000, True, False, "", "junk", "NaN", [], [1], ["junk"], [[]], {}, {"junk": 1},
    float("nan"), float("inf"),
)  # fmt: skip


def fields_of(raw: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every field of a parsed JSON object, one entry of each list."""
    items = raw.items() if isinstance(raw, dict) else list(enumerate(raw))[:1] if isinstance(raw, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from fields_of(value, (*at, key))


def mutated(raw: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `raw` with the field at `path` replaced, or dropped."""
    copy = raw.copy()
    if len(path) == 1:
        if value is MISSING:
            del copy[path[0]]
        else:
            copy[path[0]] = value
    else:
        copy[path[0]] = mutated(copy[path[0]], path[1:], value)
    return copy


def complaint(raw: dict[str, Any]) -> str | None:
    """What is wrong with how `raw` was taken: None if it was refused in one line, or is a usable config."""
    try:
        cfg = from_hf(raw)
    except ConfigError as error:
        return "a message of more than one line" if "\n" in str(error) else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        return unusable(cfg)
    except Exception as error:
        return f"accepted, then {type(error).__name__}: {error}"


def unusable(cfg: ModelConfig) -> str | None:
    """Uses a config as the project does."""
    hash(cfg)
    frequencies = cfg.rope.inv_freq()
    if not (np.isfinite(frequencies).all() and (frequencies >= 0).all()):
        return "rope frequencies that are not numbers"
    numbers = [cfg.rope.attention_factor, cfg.attention_scale, cfg.norm_eps, cfg.moe.scale if cfg.moe else 1.0]
    if not all(isinstance(n, float) and math.isfinite(n) for n in numbers):
        return f"scales that are not numbers: {numbers}"
    if not all(type(token) is int for token in cfg.eos_token_ids):
        return f"stop tokens that are not integers: {cfg.eos_token_ids}"
    for weights in (outer_weights(cfg), *(layer_weights(cfg, kind) for kind in cfg.layer_counts)):
        for weight in weights:
            if not all(type(n) is int and n > 0 for n in weight.shape):
                return f"weight {weight.name} of shape {weight.shape}"
    if len(cfg.layers) < 200 and any(cfg.index_source(i) < 0 for i in range(cfg.num_layers)):
        return "a shared indexer with nothing to share"
    parameter_counts(cfg)
    for fmt in known_forms(cfg).values():
        bytes_per_token(cfg, fmt)
    return None


# One preset for each set of fields that a release writes; the others differ in numbers only.
DISTINCT = {(raw_preset(name)["model_type"], *fields_of(raw_preset(name))): name for name in PRESETS}


WIDEST = ("deepseek-v3", "glm-4.7", "glm-5.3-fp8", "kimi-k2.5")  # all but three fields of the others are theirs too


@pytest.mark.parametrize(
    "preset", [name if name in WIDEST else pytest.param(name, marks=pytest.mark.slow) for name in DISTINCT.values()]
)
def test_any_field_dropped_or_corrupted(preset: str) -> None:
    """Every field of every kind of preset, replaced by every kind of junk."""
    raw = raw_preset(preset)
    assert complaint(raw) is None
    for key, value in raw.get("quantization_config", {}).items():
        if isinstance(value, list):  # of the names that stay wide a few stand for all
            raw["quantization_config"][key] = value[:20]
    found = [
        f"{'.'.join(map(str, path))} = {'(dropped)' if value is MISSING else repr(value)}: {problem}"
        for path in fields_of(raw)
        for value in JUNK
        if (problem := complaint(mutated(raw, path, value)))
    ]
    assert not found, f"{len(found)} cases:\n" + "\n".join(found[:20])


@given(data=st.data())
def test_any_two_fields_corrupted(data: st.DataObject) -> None:
    raw = raw_preset(data.draw(st.sampled_from(PRESETS)))
    for _ in range(2):
        raw = mutated(raw, data.draw(st.sampled_from(list(fields_of(raw)))), data.draw(st.sampled_from(JUNK)))
    assert complaint(raw) is None


@given(
    raw=st.dictionaries(
        st.sampled_from(["model_type", "hidden_size", "text_config"]), st.sampled_from((*JUNK[1:], *MODEL_TYPES))
    )
)
def test_arbitrary_objects(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_hf(raw)


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "`hidden_size`"),
        ({"hidden_size": "6144"}, "`hidden_size`"),
        ({"num_attention_heads": 0}, "`num_attention_heads`"),
        ({"q_lora_rank": None}, "`q_lora_rank`"),
        ({"qk_head_dim": 192}, "192 + 64 = 256"),
        ({"num_key_value_heads": 8}, "`num_key_value_heads`"),
        ({"indexer_types": ["full"] * 5}, "5 entries but `num_hidden_layers` is 78"),
        ({"indexer_types": ["shared"] + ["full"] * 77}, "nothing|first layer"),
        ({"indexer_types": ["none"] * 78}, "'none'"),
        ({"mlp_layer_types": ["dense"]}, "1 entries but `num_hidden_layers` is 78"),
        ({"num_experts_per_tok": 300}, "300 of 256"),
        ({"n_group": 8, "topk_group": 9}, "9 of 8 groups"),
        ({"n_group": 7}, "not a multiple of `n_group`=7"),
        ({"n_group": 256, "topk_group": 128}, "two"),
        ({"index_head_dim": 32}, "`index_head_dim`=32"),
        ({"scoring_func": "softmax"}, "'softmax'"),
        ({"topk_method": "greedy"}, "'greedy'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "`factor`"),
        ({"rope_parameters": None, "rope_theta": None}, "`rope_theta`"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq with None bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], mention: str) -> None:
    raw = raw_preset("glm-5.2")
    with pytest.raises(ConfigError) as error:
        from_hf({**raw, **changes}, "here/config.json")
    message = str(error.value)
    assert message.startswith("here/config.json: ") and "\n" not in message
    assert any(part in message for part in mention.split("|")), message


def test_gqa_heads_must_divide() -> None:
    with pytest.raises(ConfigError, match="`num_attention_heads`=96 is not a multiple of `num_key_value_heads`=7"):
        from_hf({**raw_preset("glm-4.5"), "num_key_value_heads": 7})
