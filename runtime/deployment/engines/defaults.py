"""What an engine is for one chip, model and layout: its description, and the defaults that are formulas.

A formula belongs to a kind of engine (`Engine.kind`), whatever file describes it. A setting that was given is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from foundation.errors import UsageError
from hw_profiles import Profile
from model.config import ModelConfig
from model.formats import KV, CacheFormats, Formats, Scheme
from model.split import Layout
from runtime.deployment.engines.loader import Circumstances, Engine, load


def engine_for(
    name: str, cfg: ModelConfig, profile: Profile, layout: Layout, overrides: Mapping[str, Any] | None = None
) -> Engine:
    """The engine's description with the settings it derives from the device and the model. name: as of `load`."""
    at, given = Circumstances.of(cfg, profile), overrides or {}
    engine = load(name, given, at)
    sparse = engine.eager_sparse_layer_host_seconds if cfg.sparse else 0.0
    launches = (engine.eager_layer_host_seconds + sparse) * cfg.num_layers / layout.pp
    derived: dict[str, Any] = {"eager_step_host_seconds": engine.eager_step_host_seconds + launches}
    if engine.kind in _FORMULAS:
        derived |= _FORMULAS[engine.kind](engine, layout, at)
    return load(name, {**derived, **given}, at)


def _sglang(engine: Engine, layout: Layout, at: Circumstances) -> dict[str, Any]:
    """SGLang 0.5.9, server_args.py: each rank of attention data parallelism gets its share of a chunk; before that
    --mem-fraction-static is all but a reserve in MiB for activations, graphs and communication: 0.897 on one H200 node;
    recipes often pass 0.85."""
    derived: dict[str, Any] = {"chunked_prefill_tokens": max(1, engine.chunked_prefill_tokens // layout.dp)}
    if at.memory_bytes:
        graphs = engine.graph_batch_sizes[-1] if engine.graph_batch_sizes else 0
        reserve = 512 + 1.5 * engine.chunked_prefill_tokens + 2 * graphs + 1024 * layout.devices / 8
        derived["memory_fraction"] = round(max(0.05, 1 - max(reserve, 10240) * 2**20 / at.memory_bytes), 3)
    return derived


_FORMULAS: Mapping[str, Callable[[Engine, Layout, Circumstances], dict[str, Any]]] = {"sglang": _sglang}


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
