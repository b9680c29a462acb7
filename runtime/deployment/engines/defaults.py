"""What an engine is for one chip, model and layout: its description, and the defaults that are formulas.

A formula belongs to a kind of engine (`Engine.kind`), whatever file describes it. A setting that was given is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from foundation.errors import UsageError
from hw_profiles import Profile
from model.config import Mla, ModelConfig
from model.formats import KV, ROWS, CacheFormats, Formats, Scheme
from model.split import Layout
from runtime.deployment.engines.engine import Circumstances, Engine
from runtime.deployment.engines.loader import expand, load

Derived = dict[str, Any]


def engine_for(
    name: str,
    cfg: ModelConfig,
    profile: Profile,
    layout: Layout,
    overrides: Mapping[str, Any] | None = None,
    drafts: int = 0,
) -> Engine:
    """The engine's description with the settings it derives from the device and the model. name: as of `load`.
    drafts: tokens drafted a step."""
    at, given = Circumstances.of(cfg, profile), overrides or {}
    engine = load(name, given, at)
    if layout.grouped and not engine.expert_groups:
        raise UsageError(
            f"{engine.name} {engine.release} splits experts over all of tp x dp = {layout.stage_devices} devices or "
            f"over none: --ep {layout.stage_devices} or --ep 1, not {layout.ep}"
        )
    if layout.dcp > 1 and not deals_cache(engine, cfg):
        kind = "sparse attention" if cfg.sparse else "KV heads"
        of = "" if engine.decode_context_parallel == "none" else f" for {kind}"
        raise UsageError(
            f"{engine.name} {engine.release} has no decode context parallelism{of}: --dcp 1, not {layout.dcp}"
        )
    if layout.pcp > 1 and (why := _cuts_no_prompts(engine, cfg, layout)):
        raise UsageError(f"{engine.name} {engine.release} {why}")
    layers = cfg.num_layers / layout.pp
    sparse = layers if cfg.sparse else 0
    derived: Derived = {
        f"{how}_launch_seconds": layers * getattr(engine, f"{how}_layer_host_seconds")
        + sparse * getattr(engine, f"{how}_sparse_layer_host_seconds")
        for how in ("eager", "piecewise")
        if f"{how}_step_host_seconds" not in given  # then all of a step's host work is given
    }
    if engine.kind in _FORMULAS:
        derived |= _FORMULAS[engine.kind](engine, EngineSite(cfg, profile, layout, drafts, at), given)
    return dataclasses.replace(engine, **{key: value for key, value in derived.items() if key not in given})


def _cuts_no_prompts(engine: Engine, cfg: ModelConfig, layout: Layout) -> str | None:
    """What an engine says of prompts that are cut over tp groups, where it has nothing of the kind."""
    held = engine.prefill_context_parallel
    if held == "none" or not isinstance(cfg.attention, Mla) or (held == "sparse" and not cfg.sparse):
        kind = (
            "sparse attention" if cfg.sparse else "latent attention" if isinstance(cfg.attention, Mla) else "KV heads"
        )
        of = "" if held == "none" else f" for {kind}"
        return f"has no prefill context parallelism{of}: --pcp 1, not {layout.pcp}"
    if layout.tp > 1 and not engine.cuts_prompts_beside_tp:
        return f"cuts prompts over devices that have all heads: --tp 1 with --pcp {layout.pcp}, not {layout.tp}"
    return None


@dataclasses.dataclass(frozen=True)
class EngineSite:
    """What a formula may ask."""

    cfg: ModelConfig
    profile: Profile
    layout: Layout
    drafts: int
    at: Circumstances


def _captured(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The sizes up to `most`, which is captured too."""
    return (*(size for size in sizes if size < most), most) if most else ()


def _sglang(engine: Engine, on: EngineSite, given: Mapping[str, Any]) -> Derived:
    """SGLang, server_args.py: each rank of attention data parallelism gets its share of a chunk and is less afraid of
    growth; before that --mem-fraction-static is all but a reserve in MiB for activations, graphs and communication;
    recipes often pass 0.85."""
    layout, gib = on.layout, (on.at.built_bytes or on.at.memory_bytes or 1e18) / 2**30
    most = engine.graph_max_batch
    if layout.stage_devices < 4 and "graph_max_batch" not in given and gib < 160:  # their tp counts both
        few = ((1e9, 64),) if on.at.family == "ascend" else ((20, 8), (35, 24), (60, 32), (1e9, 256))
        most = min(most, next(low for limit, low in few if gib < limit))
    sizes = engine.graph_batch_sizes
    if on.drafts:
        sizes = (*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8), *range(272, most + 1, 16))
    sizes = _captured(sizes, most)
    whole = engine.graph_mode != "eager" and layout.groups == layout.pp == 1 and on.profile.vendor == "NVIDIA"
    pieces = engine.piecewise_step_tokens if whole else 0
    mla = isinstance(on.cfg.attention, Mla)
    if pieces and not mla:
        pieces = max(pieces, engine.chunked_prefill_tokens)
    derived: Derived = {
        "chunked_prefill_tokens": max(1, engine.chunked_prefill_tokens // layout.dp),
        "graph_batch_sizes": sizes,
        "piecewise_step_tokens": pieces,
    }
    if layout.dp > 1:
        derived |= {name: _BRAVE * getattr(engine, name) for name in ("new_token_ratio", "new_token_ratio_min")}
    if on.at.memory_bytes:
        graphs = max(expand(given.get("graph_batch_sizes", sizes)), default=0)
        reserve = 512 + 1.5 * max(engine.chunked_prefill_tokens or engine.max_step_tokens, 2048) + 2 * graphs
        reserve += 1024 * layout.devices / 8
        if layout.dp > 1:
            reserve += (3 if graphs <= 300 else 4.5) * graphs * layout.dp
        if pieces:
            reserve += engine.piecewise_reserve_mib if mla else 8 * _prompt_sizes(pieces)
        if on.at.memory_bytes > 60 * 2**30:
            reserve = max(reserve, 10240)
        if on.drafts:
            reserve += engine.drafting_reserve_mib
        derived["memory_fraction"] = round(max(0.05, 1 - reserve * 2**20 / on.at.memory_bytes), 3)
    return derived


_BRAVE = 0.3
"""What SGLang multiplies schedule_conservativeness with under DP attention."""


def _prompt_sizes(most: int) -> int:
    """How many token counts SGLang captures for prompts (0.5.14, _generate_prefill_cuda_graph_batch_sizes)."""
    sizes = (*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64),
             *range(1280, 4097, 256), *range(4608, most + 1, 512))  # fmt: skip
    return sum(size <= most for size in sizes)


def _vllm(engine: Engine, on: EngineSite, given: Mapping[str, Any]) -> Derived:
    """vLLM, config/vllm.py _set_cudagraph_sizes: sizes are of tokens, twice those of a full batch at most; a decode
    graph holds sequences of 1 + drafts tokens."""
    queries = 1 + on.drafts
    most = min(2 * engine.max_running_requests * queries, engine.graph_max_batch or 2**30, engine.max_step_tokens)
    tokens = [size for size in engine.graph_batch_sizes if size <= most]
    sizes = sorted({size // queries for size in tokens if size >= queries})
    limit = tokens[-1] if tokens else 0
    return {"graph_batch_sizes": tuple(sizes), "piecewise_step_tokens": min(engine.piecewise_step_tokens, limit)}


def _vllm_ascend(engine: Engine, on: EngineSite, given: Mapping[str, Any]) -> Derived:
    """vllm-ascend: as vLLM, with prompts in pieces only where decode steps are (FULL_DECODE_ONLY captures those)."""
    derived = _vllm(engine, on, given)
    return derived | ({"piecewise_step_tokens": 0} if engine.graph_mode == "full" else {})


def _trtllm(engine: Engine, on: EngineSite, given: Mapping[str, Any]) -> Derived:
    """TensorRT-LLM, llm_args.py _generate_cuda_graph_batch_sizes: other sizes with padding than without."""
    most = engine.graph_max_batch
    padded = (1, 2, 4, *range(8, 129, 8), *range(192, most + 1, 64))
    return {"graph_batch_sizes": _captured(padded if engine.graph_padding else engine.graph_batch_sizes, most)}


def _glm5(engine: Engine, on: EngineSite, given: Mapping[str, Any]) -> Derived:
    """What `glm5 calibrate` measured of the server on this machine."""
    names = {
        "overhead.serving_front_s": ("request_seconds",),
        "overhead.serving_request_s": ("request_host_seconds",),
        "overhead.serving_step_s": ("graph_step_host_seconds", "eager_step_host_seconds"),
        "overhead.serving_row_s": ("row_host_seconds",),
        "overhead.serving_idle_s": ("idle_host_seconds",),
        "overhead.serving_warming_s": ("warming_host_seconds",),
    }
    if on.layout.devices == 1:  # servers of several launch nothing ahead
        names["overhead.serving_ahead_s"] = ("ahead_step_seconds",)
    found = {path: on.profile.get(path) for path in names}
    return {name: figure.value for path, figure in found.items() if figure is not None for name in names[path]}


_FORMULAS: Mapping[str, Callable[[Engine, EngineSite, Mapping[str, Any]], Derived]] = {
    "glm5": _glm5,
    "sglang": _sglang,
    "trtllm": _trtllm,
    "vllm": _vllm,
    "vllm-ascend": _vllm_ascend,
}


def with_pool(engine: Engine, cfg: ModelConfig, pool_tokens: int, given: Mapping[str, Any]) -> Engine:
    """The engine with what it derives from its KV pool: SGLang takes in min(max(pool / context x 512, 2048), 4096)
    requests at most, and no more than half the pool's tokens."""
    if engine.kind != "sglang" or "max_running_requests" in given:
        return engine
    most = max(2048, min(int(512 * pool_tokens / (engine.context_tokens or cfg.max_positions)), 4096))
    return dataclasses.replace(engine, max_running_requests=max(1, min(most, pool_tokens // 2)))


def deals_cache(engine: Engine, cfg: ModelConfig) -> bool:
    """Whether the engine deals a model's cache out to tp ranks."""
    held = engine.decode_context_parallel
    latent = isinstance(cfg.attention, Mla)
    return held == "any" or (not cfg.sparse and (held == "dense" or (held == "latent" and latent)))


def check_dealt(engine: Engine, layout: Layout, formats: Formats) -> None:
    """Raises `UsageError` for a cache in a format that the engine does not deal out to tp ranks."""
    if layout.dcp > 1 and not engine.deals_narrow_cache and ROWS[formats.cache.latent].narrow:
        raise UsageError(
            f"{engine.name} {engine.release} deals no {formats.kv} cache out to tp ranks: --kv bf16 or --dcp 1"
        )


def default_kv(engine: Engine, cfg: ModelConfig, profile: Profile) -> str:
    """What an engine keeps the KV cache in when told nothing."""
    return engine.cache.kv.under(Circumstances.of(cfg, profile))


def formats_for(engine: Engine, cfg: ModelConfig, profile: Profile, scheme: Scheme, kv: str | None = None) -> Formats:
    """The number formats of a deployment. kv: what the cache is kept in, by default what the engine picks; with a
    float32 scheme it is float32. Raises `UsageError` for an unknown one."""
    if scheme.wide == "f32":
        if kv not in (None, "f32", "bf16"):
            raise UsageError(f"formats {scheme.name} keep the cache in float32, not in {kv}")
        return Formats(scheme.dense, scheme.experts, "f32", CacheFormats.plain("f32"))
    kv = kv or default_kv(engine, cfg, profile)
    if kv not in KV:
        raise UsageError(f"unknown KV format {kv!r}; known: {', '.join(KV)}")
    at, rules = dataclasses.replace(Circumstances.of(cfg, profile), kv=kv), engine.cache
    cache = CacheFormats(rules.latent.under(at), rules.index.under(at), rules.heads.under(at))
    return Formats(scheme.dense, scheme.experts, kv, cache)


def sized_cache(engine: Engine, cfg: ModelConfig, profile: Profile, formats: Formats) -> CacheFormats:
    """The row formats that the engine sizes its pool with: those it stores, but for what `sized_latent` says."""
    rule = engine.cache.sized_latent
    if rule is None or formats.kv == "f32":
        return formats.cache
    at = dataclasses.replace(Circumstances.of(cfg, profile), kv=formats.kv)
    return dataclasses.replace(formats.cache, latent=rule.under(at))
