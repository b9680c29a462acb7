"""Which number format each weight, op and cache of the graph gets under each scheme. Free of JAX.

A scheme names the format of dense matrices and the format of routed experts; a weight's *role* decides which of the
two it gets, and some roles stay in 16 bits whatever the scheme, because the published checkpoints leave them so:

    role            weights                         left in 16 bits by
    attention       q, k, v, q_a, q_b, kv_a, o
    indexer         index_q
    index_key       index_k                         INT8, INT4 and MX (msModelSlim's GLM-5 recipes: `*wk`)
    kv_up           k_up, v_up (kv_b_proj)          all but fp8-block, which stores it in FP8 and widens it when loaded
    dense_ffn       gate_up, down
    shared_experts  shared_gate_up, shared_down
    experts         experts_gate_up, experts_down
    wide            embedding, head, router, norms, biases, index_w, eh_proj: never quantised

The MTP layer is left in 16 bits by the INT8 and INT4 recipes (`model.layers.78*`). Sources: msModelSlim 26.1
`lab_practice/glm_5/*.yaml`, the config of GLM-5-FP8, the card of nvidia/GLM-5-NVFP4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from backends.errors import Unsupported
from hw_profiles import Profile
from model.config import ModelConfig
from model.quantised import FORMATS
from model.weights import Arrangement, Weight

CacheFormat = Literal["f32", "bf16", "fp8", "int8"]
Role = Literal["attention", "indexer", "index_key", "kv_up", "dense_ffn", "shared_experts", "experts", "wide"]

_LEFT_WIDE: Mapping[str, frozenset[str]] = {
    "fp8-block": frozenset(),
    "fp8-tensor": frozenset({"kv_up"}),
    "w8a8-int8": frozenset({"kv_up", "index_key", "mtp"}),
    "w4a8": frozenset({"mtp"}),
    "w4a16": frozenset({"mtp"}),
    "mxfp8": frozenset({"kv_up", "index_key"}),
    "mxfp4": frozenset({"kv_up", "index_key"}),
    "nvfp4": frozenset({"mtp"}),
}

ACTIVATIONS: Mapping[str, str] = {
    "f32": "float32",
    "bf16": "bfloat16",
    "fp8-block": "e4m3, a scale for each token and 128 channels",
    "fp8-tensor": "e4m3, a scale a token",
    "w8a8-int8": "int8, a scale a token",
    "w4a8": "int8, a scale a token",
    "w4a16": "bfloat16",
    "mxfp8": "e4m3, a power-of-two scale for each token and 32 channels",
    "mxfp4": "e2m1, a power-of-two scale for each token and 32 channels",
    "nvfp4": "e2m1, an e4m3 scale for each token and 16 channels",
}
"""What the activations are rounded to before a product with a matrix of that format; scales are found as the
program runs."""

OPS: Mapping[str, Literal["weights", "cache", "index", "float32", "wide"]] = {
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


def role(weight: Weight) -> Role:
    """What a weight is for, as far as number formats care."""
    if not weight.quantised:
        return "wide"
    if weight.arrangement in (Arrangement.HEAD_KEYS, Arrangement.HEAD_VALUES):
        return "kv_up"
    if weight.name == "index_k":
        return "index_key"
    return weight.component  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Formats of dense matrices and of routed experts (names of `model.quantised.FORMATS`, "bf16" or "f32")."""

    name: str
    dense: str
    experts: str

    @property
    def wide(self) -> str:
        """The format of what is not quantised."""
        return "f32" if self.dense == "f32" else "bf16"

    def format_of(self, weight: Weight, mtp: bool = False) -> str | None:
        """The format a weight is kept in; None where it stays wide. `mtp`: it belongs to the MTP layer."""
        kind = role(weight)
        fmt = self.experts if kind == "experts" else self.dense
        if kind == "wide" or fmt not in FORMATS:
            return None
        left = _LEFT_WIDE[fmt]
        return None if kind in left or (mtp and "mtp" in left) else fmt

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats it needs units for."""
        return tuple(dict.fromkeys((self.dense, self.experts)))


SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("f32", "f32", "f32"),
        Scheme("bf16", "bf16", "bf16"),
        Scheme("fp8", "fp8-block", "fp8-block"),
        Scheme("fp8-tensor", "fp8-tensor", "fp8-tensor"),
        Scheme("w8a8", "w8a8-int8", "w8a8-int8"),
        Scheme("w4a8", "w8a8-int8", "w4a8"),
        Scheme("w4a16", "bf16", "w4a16"),
        Scheme("mxfp8", "mxfp8", "mxfp8"),
        Scheme("mxfp4", "mxfp8", "mxfp4"),
        Scheme("nvfp4", "bf16", "nvfp4"),
    )
}
_PREFERRED = ("fp8", "mxfp8", "w8a8", "fp8-tensor", "bf16")  # a profile's own, the first it has units for


def named(name: str) -> Scheme:
    """A scheme by name. Raises `Unsupported`."""
    if name not in SCHEMES:
        raise Unsupported(f"unknown formats {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def offered(profile: Profile) -> tuple[str, ...]:
    """The schemes that a profile has units for (float32, the reference, runs anywhere)."""
    units = {*profile.formats.weights, "f32"}
    return tuple(name for name, scheme in SCHEMES.items() if units.issuperset(scheme.formats))


def of_profile(profile: Profile, name: str | None = None) -> Scheme:
    """The scheme of that name, or the profile's own. Raises `Unsupported` where the chip has no units for it."""
    available = offered(profile)
    if name is None:
        return SCHEMES[next((own for own in _PREFERRED if own in available), "f32")]
    scheme = named(name)
    if name not in available:
        missing = [fmt for fmt in scheme.formats if fmt not in profile.formats.weights]
        raise Unsupported(
            f"profile {profile.name} has no {' or '.join(missing)}: formats {name} cannot run on it; "
            f"it runs {', '.join(available)}"
        )
    return scheme


def cache_of_profile(profile: Profile, kv: str | None, scheme: Scheme) -> tuple[CacheFormat, CacheFormat]:
    """Formats of the latent (or key/value) cache and of the index cache. Raises `Unsupported`.

    By default the cache is as wide as the activations. Index keys are kept in FP8 wherever the chip has it, as every
    engine does; on INT8 chips they are INT8 with an INT8 cache (Ascend's "c8") and 16 bits beside a 16-bit one.
    """
    if scheme.wide == "f32":
        if kv not in (None, "f32"):
            raise Unsupported(f"formats {scheme.name} keep the cache in float32, not in {kv}")
        return "f32", "f32"
    kv = kv or "bf16"
    if kv not in ("bf16", "fp8", "int8"):
        raise Unsupported(f"unknown cache format {kv!r}; known: bf16, fp8, int8")
    if kv not in profile.formats.kv:
        raise Unsupported(f"profile {profile.name} keeps caches in {', '.join(profile.formats.kv)}, not in {kv}")
    if kv == "bf16":
        return "bf16", "fp8" if "fp8" in profile.formats.kv else "bf16"
    return kv, kv  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table that says what runs in which format."""

    op: str
    role: str
    weights: tuple[str, ...]
    format: str
    activations: str


def table(cfg: ModelConfig, scheme: Scheme, cache: CacheFormat = "bf16", index: CacheFormat = "bf16") -> list[Row]:
    """Every product and cache of a model with its format, in the order of the graph."""
    from model.weights import layer_weights, outer_weights

    groups: dict[tuple[str, str, str], list[str]] = {}
    for kind in cfg.layer_counts:
        for weight in layer_weights(cfg, kind):
            if len(weight.shape) < 2 or kind.mtp:
                continue
            op = {"kv_up": "glm.head_linear", "experts": "glm.expert_ffn"}.get(role(weight), "glm.linear")
            op = "glm.route" if weight.component == "router" else op
            held = scheme.format_of(weight) or scheme.wide
            names = groups.setdefault((op, role(weight), held), [])
            if weight.name not in names:
                names.append(weight.name)
    rows = []
    for (op, kind, held), names in groups.items():
        activations = {"glm.head_linear": scheme.wide, "glm.route": "f32"}.get(op, held)
        rows.append(Row(op, kind, tuple(names), held, ACTIVATIONS[activations]))
    head = tuple(w.name for w in outer_weights(cfg) if w.name == "head")
    rows.append(Row("glm.linear", "wide", head or ("embed",), scheme.wide, ACTIVATIONS[scheme.wide]))
    rows.append(Row("glm.cache_write", "cache", (), cache, ""))
    if cfg.indexer:
        rows.append(Row("glm.index_scores", "index cache", (), index, "as the index keys"))
    return rows
