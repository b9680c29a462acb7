"""What a price makes of an op's call: the kernel of a price file it belongs to, and the features its formula reads.

The other side of `runtime.pricing`, which makes the same of a step: what it asks by there, an op is filed under here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from model.formats import E4M3
from runtime.porting.calibrate_calls import RankCall, RankStep
from runtime.porting.calibrate_ops import FORMAT_OF_DTYPE
from runtime.porting.calibrate_sizes import DTYPES, PAGE
from runtime.pricing.book import element_bytes

Given = Mapping[int, np.ndarray]
Filed = tuple[str, str, dict[str, float]]
"""A kernel's key, its family, features."""


def filed(call: RankCall, step: RankStep, dtype: str, given: Given) -> Filed:
    """given: operands whose values count, by place: of the routed experts, those that tokens chose."""
    name, family, features = _FILED[call.name](call, step, float(DTYPES[dtype].itemsize), given)
    narrow = any(operand.dtype == E4M3 for operand in call.operands)
    fmt = "any" if family == "memory" else "fp8-block" if narrow else FORMAT_OF_DTYPE[dtype]
    if family in ("gemm", "moe"):
        features |= element_bytes(fmt)
    key = f"{name}/any" if family == "memory" else f"{name}/{fmt}/any"
    return key, family, {feature: float(value) for feature, value in features.items()}


def product(m: int, n: int, k: int, dtype: str) -> Filed:
    """Of [m, k] x [k, n]."""
    x, w = (jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for shape in ((m, k), (k, n)))
    return filed(RankCall("glm.linear", (x, w), {}), RankStep(m, 1, PAGE, PAGE), dtype, {})


def over_selected(step: RankStep, selected: int, masked: bool) -> dict[str, float]:
    """Features of attention over a selection. masked: over all that is cached, through a mask."""
    seen = float(step.end) if step.tokens > 1 and masked else min(step.keys, float(selected))
    return {"sequences": float(step.sequences), "tokens": float(step.sequences * step.tokens), "context": seen}


Named = tuple[str, str, dict[str, Any]]


def _linear(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    x, w = call.operands[:2]
    sizes = {"m": math.prod(x.shape[:-1]), "n": math.prod(w.shape[1:]), "k": w.shape[0], "out_bytes": size}
    return "gemm", "gemm", sizes


def _head_linear(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    x, (heads, inner, outer) = call.operands[0], call.operands[1].shape
    return "bmm", "bmm", {"m": math.prod(x.shape[:2]), "heads": heads, "n": outer, "k": inner, "out_bytes": size}


def _rms_norm(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    x, weight = call.operands
    return "memory/rms_norm", "memory", {"bytes": (2 * x.size + weight.size) * size}


def _swiglu(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    return "memory/swiglu", "memory", {"bytes": 1.5 * call.operands[0].size * size}


def _route(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    tokens, experts = call.operands[0].shape[0], call.operands[1].shape[1]
    return "memory/route", "memory", {"bytes": 4.0 * tokens * (experts + 2 * call.attributes["top_k"])}


def _experts(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    """Choices of experts elsewhere are numbers beyond those here."""
    (tokens, hidden), gate_up = call.operands[0].shape, call.operands[3].shape
    here = given[1][given[1] < gate_up[0]]
    rows, active, touched = here.size, np.unique(here).size, tokens * call.operands[1].shape[1]
    sizes = {"rows": rows, "active": active, "touched": touched, "rows_per_expert": rows / active,
             "spread": touched / rows, "hidden": hidden, "inter": gate_up[3]}  # fmt: skip
    return "moe", "moe", sizes


def _latent(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    _, _, heads, width = call.operands[0].shape
    shape = {"heads": heads, "qk": width, "v": call.attributes["value_dim"], "kv_bytes": width * size}
    return "latent_decode", "attention", {**_sizes(step), "context": step.end, **shape}


def _expanded(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    query, pages, _, _, v_up = call.operands[:5]
    shape = {"heads": query.shape[2], "qk": query.shape[3], "v": v_up.shape[2], "kv_bytes": pages.shape[2] * size}
    return "expanded_prefill", "attention", {**_sizes(step), "context": step.end, **shape}


def _paged(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    (_, _, heads, width), (_, _, kv_heads, _) = call.operands[0].shape, call.operands[1].shape
    shape = {"heads": heads, "qk": width, "v": width, "kv_bytes": 2 * kv_heads * width * size}
    phase = "decode" if step.tokens == 1 else "prefill"
    return f"gqa_{phase}", "attention", {**_sizes(step), "context": step.keys, **shape}


def _index_scores(call: RankCall, step: RankStep, size: float, given: Given) -> Named:
    _, _, heads, width = call.operands[0].shape
    shape = {"index_heads": heads, "index_dim": width, "index_kv_bytes": width * size}
    name = "index_decode" if step.tokens == 1 else "index_scores"
    return name, "index_scores", {**_sizes(step), "context": step.keys, **shape}


def _sizes(step: RankStep) -> dict[str, int]:
    return {"sequences": step.sequences, "tokens": step.sequences * step.tokens}


_FILED: Mapping[str, Callable[[RankCall, RankStep, float, Given], Named]] = {
    "glm.linear": _linear,
    "glm.head_linear": _head_linear,
    "glm.rms_norm": _rms_norm,
    "glm.swiglu": _swiglu,
    "glm.route": _route,
    "glm.expert_ffn": _experts,
    "glm.latent_attention": _latent,
    "glm.expanded_attention": _expanded,
    "glm.paged_attention": _paged,
    "glm.index_scores": _index_scores,
}
