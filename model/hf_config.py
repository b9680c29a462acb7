"""Reads a `ModelConfig` from a Hugging Face `config.json`, a checkpoint directory or a preset.

`from_hf` is the only place with Hugging Face spellings.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from foundation.limits import within
from foundation.paths import Outside, inside
from foundation.reading import Unreadable, read_json
from model.config import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_VOCAB,
    MOST_WIDTH,
    Gqa,
    Indexer,
    IndexerKind,
    LayerType,
    Mla,
    ModelConfig,
    Moe,
    Rope,
    Yarn,
)
from model.errors import ConfigError
from model.quantization_config import UnknownQuantization, modelslim_scheme_name, scheme_name
from model.stored_tensors import stores_own_head

_ALIASES = {"kimi_k2": "deepseek_v3"}
MODEL_TYPES = ("glm_moe_dsa", "glm4_moe_lite", "glm4_moe", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25")


_LARGEST = 1e12  # of a float and its inverse, so that squares and quotients of them are numbers


class _Fields:
    """Typed access to a config.json that names the field in every complaint."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {message}")

    def get(self, key: str, kind: type, default: Any = ..., check: Callable[[Any], bool] | None = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is ...:
                raise self.fail(f"missing field `{key}`")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"field `{key}` must be {kind.__name__}, not {value!r}")
        if kind is float and not math.isfinite(value):
            raise self.fail(f"field `{key}` must be finite, not {value!r}")
        if kind is float and value and not 1 / _LARGEST <= abs(value) <= _LARGEST:
            raise self.fail(f"field `{key}` must lie between {1 / _LARGEST:g} and {_LARGEST:g}, not {value!r}")
        if check and not check(value):
            raise self.fail(f"field `{key}` has the impossible value {value!r}")
        return value

    def size(self, key: str, default: Any = ..., most: int = MOST_WIDTH) -> int:
        return self.count(key, default, most, least=1)

    def count(self, key: str, default: Any = ..., most: int = MOST_WIDTH, least: int = 0) -> int:
        value = self.get(key, int, default, lambda v: v >= least)
        within(f"{self.where}: field `{key}`", value, most, ConfigError)
        return value

    def names(self, key: str, default: list[str]) -> list[str]:
        value = self.get(key, list, default)
        if not all(isinstance(name, str) for name in value):
            raise self.fail(f"field `{key}` must be a list of names")
        return list(value)

    def only(self, key: str, *allowed: Any) -> None:
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            raise self.fail(f"`{key}`={value!r} is not supported (only {', '.join(map(repr, allowed))})")


def from_hf(raw: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face config.

    Raises `ConfigError` for an unknown `model_type`, and for missing, contradictory or unsupported fields.
    """
    fields = _Fields(raw, name)
    model_type = raw.get("model_type")
    if model_type == "kimi_k25":
        outer = {key: raw[key] for key in ("eos_token_id", "quantization_config") if raw.get(key) is not None}
        return from_hf({**fields.get("text_config", dict), **outer}, name)
    if model_type not in MODEL_TYPES:
        raise fields.fail(f"unknown model_type {model_type!r}; known: {', '.join(MODEL_TYPES)}")
    family = _ALIASES.get(model_type, model_type)
    fields.only("hidden_act", "silu")
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_layer_freq", 1)
    fields.only("mlp_bias", False)
    heads = fields.size("num_attention_heads")
    if family == "glm4_moe":
        attention, rope, indexer = _gqa(fields, heads), None, None
    else:
        attention, rope, indexer = _mla(fields, family, heads), None, _indexer(fields, family)
    rope, moe = _rope(fields, family, attention), _moe(fields)
    schedule = _schedule(fields, family, "gqa" if isinstance(attention, Gqa) else "mla", indexer, moe)
    return ModelConfig(
        name=name,
        model_type=family,
        vocab_size=fields.size("vocab_size", most=MOST_VOCAB),
        hidden_size=fields.size("hidden_size"),
        heads=heads,
        attention=attention,
        rope=rope,
        indexer=indexer,
        moe=moe,
        dense_intermediate=fields.size("intermediate_size"),
        layers=schedule,
        # transformers 5 spells the same field `num_mtp_layers`
        mtp_layers=fields.count(
            "num_nextn_predict_layers", fields.count("num_mtp_layers", 0, MOST_LAYERS), MOST_LAYERS
        ),
        # GLM carries the hidden state after the shared-head norm from draft to draft, DeepSeek before it.
        mtp_carries_norm=family.startswith("glm"),
        norm_eps=fields.get("rms_norm_eps", float, 1e-5 if family.startswith("glm") else 1e-6, lambda v: v > 0),
        max_positions=fields.size("max_position_embeddings", most=MOST_POSITIONS),
        eos_token_ids=_eos(fields),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        weight_format=_weight_format(fields, schedule, moe.experts if moe else 0),
    )


def _eos(fields: _Fields) -> tuple[int, ...]:
    eos = fields.raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise fields.fail(f"field `eos_token_id` must be a token id or a list of them, not {eos!r}")
    return tuple(ids)


def _mla(fields: _Fields, family: str, heads: int) -> Mla:
    fields.only("attention_bias", False)
    if fields.size("num_key_value_heads", heads) != heads:
        raise fields.fail("MLA needs `num_key_value_heads` equal to `num_attention_heads`")
    q_lora = fields.raw.get("q_lora_rank")
    if q_lora is None and family in ("glm_moe_dsa", "deepseek_v32"):
        raise fields.fail("missing field `q_lora_rank` (the indexer's queries come from it)")
    mla = Mla(
        q_lora_rank=None if q_lora is None else fields.size("q_lora_rank"),
        kv_lora_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        v_dim=fields.size("v_head_dim"),
    )
    declared = fields.size("qk_head_dim", mla.qk_dim)
    if declared != mla.qk_dim:
        raise fields.fail(
            f"`qk_head_dim`={declared} contradicts qk_nope_head_dim + qk_rope_head_dim = "
            f"{mla.nope_dim} + {mla.rope_dim} = {mla.qk_dim}"
        )
    return mla


def _gqa(fields: _Fields, heads: int) -> Gqa:
    kv_heads = fields.size("num_key_value_heads")
    if heads % kv_heads:
        raise fields.fail(f"`num_attention_heads`={heads} is not a multiple of `num_key_value_heads`={kv_heads}")
    return Gqa(
        kv_heads=kv_heads,
        head_dim=fields.size("head_dim", fields.size("hidden_size") // heads),
        bias=fields.get("attention_bias", bool, False),
        qk_norm=fields.get("use_qk_norm", bool, False),
    )


def _indexer(fields: _Fields, family: str) -> Indexer | None:
    if family not in ("glm_moe_dsa", "deepseek_v32"):
        return None
    indexer = Indexer(
        heads=fields.size("index_n_heads"),
        head_dim=fields.size("index_head_dim"),
        topk=fields.size("index_topk"),
        rope_interleaved=fields.get("indexer_rope_interleave", bool, family == "glm_moe_dsa"),
    )
    if indexer.head_dim < fields.size("qk_rope_head_dim"):
        raise fields.fail(f"`index_head_dim`={indexer.head_dim} is smaller than `qk_rope_head_dim`")
    return indexer


_ROPE_FIELDS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN_FIELDS = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate",
}  # fmt: skip


def _rope(fields: _Fields, family: str, attention: Mla | Gqa) -> Rope:
    params, partial = _rope_params(fields), 0.5 if isinstance(attention, Gqa) else 1.0
    kind = params.get("rope_type", str, params.get("type", str, "default"))
    theta = params.get("rope_theta", float, check=lambda v: v > 1)
    partial = params.get("partial_rotary_factor", float, partial, lambda v: 0 < v <= 1)
    if isinstance(attention, Gqa):
        dim, interleaved = int(attention.head_dim * partial), False
    else:
        if partial != 1.0:
            raise fields.fail(f"`partial_rotary_factor`={partial} contradicts MLA, whose rotary part is all rotated")
        dim = attention.rope_dim
        interleaved = fields.get("rope_interleave", bool, True) if family in ("deepseek_v3", "glm4_moe_lite") else True
    if dim < 2 or dim % 2:
        raise fields.fail(f"the rotary width must be even and at least 2, not {dim}")
    if kind not in ("default", "yarn"):
        raise fields.fail(f"rope type {kind!r} is not supported (only 'default', 'yarn')")
    read = _ROPE_FIELDS | (_YARN_FIELDS if kind == "yarn" else set())
    if unread := sorted(key for key, value in params.raw.items() if key not in read and value is not None):
        raise fields.fail(f"rope field `{unread[0]}` is not read for rope type {kind!r}: take it out to run without it")
    return Rope(dim, theta, interleaved, _yarn(fields, params) if kind == "yarn" else None)


def _rope_params(fields: _Fields) -> _Fields:
    """One `rope_parameters`, as transformers 5 writes; older files have `rope_theta` beside `rope_scaling`."""
    outer = {key: fields.raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in fields.raw}
    older, newer = fields.get("rope_scaling", dict, {}), fields.get("rope_parameters", dict, {})
    if differing := sorted(key for key in older.keys() & newer.keys() if older[key] != newer[key]):
        raise fields.fail(f"`rope_scaling` and `rope_parameters` contradict each other in `{differing[0]}`")
    return _Fields({**outer, **older, **newer}, fields.where)


def _yarn(fields: _Fields, params: _Fields) -> Yarn:
    """With transformers' defaults: positions are the model's where it names none, and a factor of null is by how many
    times those were extended."""
    positions = fields.size("max_position_embeddings", most=MOST_POSITIONS)
    original = fields.raw.get("original_max_position_embeddings") and fields or params
    original = original.size("original_max_position_embeddings", positions, MOST_POSITIONS)
    factor = positions / original if "factor" in params.raw else ...
    return Yarn(
        factor=params.get("factor", float, factor, lambda v: v > 0),
        original_max_positions=original,
        beta_fast=params.get("beta_fast", float, 32.0, lambda v: v > 0),
        beta_slow=params.get("beta_slow", float, 1.0, lambda v: v > 0),
        mscale=params.get("mscale", float, 0.0, lambda v: v >= 0),
        mscale_all_dim=params.get("mscale_all_dim", float, 0.0, lambda v: v >= 0),
        attention_factor=params.get("attention_factor", float, None, lambda v: v > 0),
        truncate=params.get("truncate", bool, "truncate" not in params.raw),  # transformers takes null for false
    )


def _moe(fields: _Fields) -> Moe | None:
    if fields.raw.get("n_routed_experts") is None and fields.raw.get("num_experts") is not None:
        fields = _Fields({**fields.raw, "n_routed_experts": fields.raw["num_experts"]}, fields.where)
    moe = Moe(
        experts=fields.size("n_routed_experts", most=MOST_EXPERTS),
        top_k=fields.size("num_experts_per_tok"),
        shared_experts=fields.count("n_shared_experts", 1, MOST_EXPERTS),
        intermediate=fields.size("moe_intermediate_size"),
        n_group=fields.size("n_group", 1),
        topk_group=fields.size("topk_group", 1),
        normalise=fields.get("norm_topk_prob", bool, True),
        scale=fields.get("routed_scaling_factor", float, 1.0),
    )
    if moe.experts % moe.n_group:
        raise fields.fail(f"`n_routed_experts`={moe.experts} is not a multiple of `n_group`={moe.n_group}")
    reachable = moe.experts // moe.n_group * moe.topk_group
    if moe.topk_group > moe.n_group or moe.top_k > reachable:
        raise fields.fail(
            f"cannot choose `num_experts_per_tok`={moe.top_k} of {moe.experts} experts from "
            f"{moe.topk_group} of {moe.n_group} groups ({reachable} experts)"
        )
    if moe.n_group > 1 and moe.experts // moe.n_group < 2:
        raise fields.fail("group-limited routing scores a group by its best two experts: groups need two or more")
    return moe


def _schedule(
    fields: _Fields, family: str, attention: Literal["mla", "gqa"], indexer: Indexer | None, moe: Moe | None
) -> tuple[LayerType, ...]:
    depth = fields.size("num_hidden_layers", most=MOST_LAYERS)
    dense = fields.get("first_k_dense_replace", int, 1, lambda v: v >= 0)
    ffn = fields.names("mlp_layer_types", ["dense"] * min(dense, depth) + ["sparse"] * max(depth - dense, 0))
    kinds = _indexer_types(fields, depth) if family == "glm_moe_dsa" else ["full" if indexer else "none"] * depth
    for key, values, known in (
        ("mlp_layer_types", ffn, {"dense", "sparse"}),
        ("indexer_types", kinds, {"full", "shared"} if indexer else {"none"}),
    ):
        if len(values) != depth:
            raise fields.fail(f"`{key}` has {len(values)} entries but `num_hidden_layers` is {depth}")
        if unknown := set(values) - known:
            raise fields.fail(f"`{key}` holds unknown kinds {sorted(unknown)}")
    if kinds[0] == "shared":
        raise fields.fail("`indexer_types` begins with 'shared': the first layer has no selection to share")
    return tuple(
        LayerType(attention, cast(IndexerKind, kind), "moe" if f == "sparse" else "dense")
        for kind, f in zip(kinds, ffn, strict=True)
    )


def _indexer_types(fields: _Fields, depth: int) -> list[str]:
    raw = fields.raw
    if raw.get("indexer_types") is not None:
        return fields.names("indexer_types", [])
    if isinstance(pattern := raw.get("index_topk_pattern"), str):
        return [{"F": "full", "S": "shared"}.get(c, c) for c in pattern]
    if pattern is not None:
        return fields.names("index_topk_pattern", [])
    freq = fields.size("index_topk_freq", 1)
    offset = fields.get("index_skip_topk_offset", int, 2)
    return ["full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(depth)]


def _weight_format(fields: _Fields, layers: tuple[LayerType, ...], experts: int) -> str:
    quant = fields.get("quantization_config", dict, {})
    try:
        return scheme_name(quant, len(layers), [i for i, kind in enumerate(layers) if kind.ffn == "moe"], experts)
    except UnknownQuantization as error:
        raise fields.fail(f"quantization_config {error} is not supported") from None


MODELSLIM_FILE = "quant_model_description.json"
MODELOPT_FILE = "hf_quant_config.json"
GENERATION_FILE = "generation_config.json"


# --- presets -----------------------------------------------------------------------------------


def preset_names() -> tuple[str, ...]:
    """Names of the config files shipped with the project."""
    folder = resources.files("model") / "configs"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def read_config(path: Path) -> dict[str, Any]:
    """The parsed JSON object at `path`; raises `ConfigError` in one line."""
    try:
        raw = read_json(path)
    except Unreadable as error:
        if error.reason == "absent":
            raise ConfigError(f"{path}: no such file (a checkpoint directory holds a config.json)") from None
        what = f"not valid JSON ({error})" if error.reason in ("syntax", "encoding") else error
        raise ConfigError(f"{path}: {what}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, not an object")
    return raw


def read_own(folder: Path, name: str) -> dict[str, Any]:
    """`read_config` of a file of a checkpoint directory, which lies there."""
    try:
        return read_config(inside(folder, name))
    except Outside as error:
        if error.reason == "absent":
            return read_config(folder / name)  # which says so
        raise ConfigError(f"{folder / name}: {error}; a checkpoint's files lie in its own folder") from None


def load_config(name_or_path: str | Path) -> ModelConfig:
    """A preset by name (`glm-5`), a checkpoint directory, or a config.json by path."""
    path = Path(name_or_path)
    if str(name_or_path) in preset_names():
        return preset(str(name_or_path))
    if path.is_dir():
        cfg = from_hf(_with_modelopt(read_own(path, "config.json"), path), str(path / "config.json"))
        tied = cfg.tie_embeddings and not stores_own_head(path)  # which counts, whatever the config says
        cfg = dataclasses.replace(cfg, eos_token_ids=_ends(cfg, path / GENERATION_FILE), tie_embeddings=tied)
        if (described := path / MODELSLIM_FILE).exists():
            return dataclasses.replace(cfg, weight_format=_modelslim(described))
        return cfg
    if path.suffix == ".json" or path.exists():
        return from_hf(read_config(path), str(path))
    return preset(str(name_or_path))


def preset(name: str) -> ModelConfig:
    """A preset by name alone. Raises `ConfigError` for another."""
    if name not in preset_names():
        raise ConfigError(f"no model named {name!r} and no such directory; presets: {', '.join(preset_names())}")
    file = resources.files("model") / "configs" / f"{name}.json"
    return from_hf(json.loads(file.read_text()), name)


def _ends(cfg: ModelConfig, path: Path) -> tuple[int, ...]:
    """The tokens that end an answer, those that only the generation settings name included."""
    settings = _Fields(read_own(path.parent, path.name) if path.exists() else {}, str(path))
    return tuple(dict.fromkeys((*cfg.eos_token_ids, *_eos(settings))))


def _with_modelopt(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config with what modelopt says beside it, as its releases did before they said it in config.json."""
    described = folder / MODELOPT_FILE
    if raw.get("quantization_config") or not described.exists():
        return raw
    return {**raw, "quantization_config": {**read_own(folder, MODELOPT_FILE), "quant_method": "modelopt"}}


def _modelslim(path: Path) -> str:
    """The scheme of an msModelSlim checkpoint, which leaves config.json plain and describes every tensor in a file of
    its own."""
    types = {str(kind) for name, kind in read_own(path.parent, path.name).items() if name.endswith(".weight")}
    try:
        return modelslim_scheme_name(types)
    except UnknownQuantization as error:
        raise ConfigError(f"{path}: {error}") from None
