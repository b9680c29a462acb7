"""Number formats, plans and pools from few words, for tests."""

from __future__ import annotations

from typing import Any

from hw_profiles import Profile
from model.config import ModelConfig
from model.formats import CacheFormats, Formats, scheme
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool
from runtime.planning import assign
from runtime.simulation.build import Spec, spec_for

_CACHES = {
    "bf16": CacheFormats("bf16", "fp8_scaled", "bf16"),
    "fp8": CacheFormats("fp8_ds_mla", "fp8_scaled", "fp8"),
    "int8": CacheFormats("int8_packed", "int8_scaled", "int8"),
}


def formats(name: str, kv: str = "bf16") -> Formats:
    """A scheme, with the cache as engines keep it on Hopper ("int8": on Ascend)."""
    found = scheme(name)
    if found.wide == "f32":
        return Formats(found.dense, found.experts, "f32", CacheFormats.plain("f32"))
    return Formats(found.dense, found.experts, kv, _CACHES[kv])


def spec(
    cfg: ModelConfig, layout: Layout, profile: Profile, held: Formats, engine: str = "sglang", **more: Any
) -> Spec:
    """With the cache as the engine keeps it on the chip."""
    return spec_for(cfg, profile, layout, held.scheme, held.kv, engine, **more)


def plan_for(
    cfg: ModelConfig,
    layout: Layout,
    profile: Profile,
    held: Formats,
    *,
    replicas: int = 1,
    demand: Demand | None = None,
    **more: Any,
) -> Plan:
    """more: `engine`, and fields of `Spec`."""
    return assign.plan_for(spec(cfg, layout, profile, held, **more), replicas, demand)


def pool_of(
    cfg: ModelConfig, layout: Layout, profile: Profile, held: Formats, *, replicas: int = 1, **more: Any
) -> Pool:
    """more: `engine`, fields of `Spec`, and what `runtime.planning.assign.pool_of` takes beside it."""
    own = {key: more.pop(key) for key in ("role", "experts", "first_device", "first_node") if key in more}
    return assign.pool_of(spec(cfg, layout, profile, held, **more), replicas, **own)
