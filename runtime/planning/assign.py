"""From a layout to devices: who holds which stage, ranks, experts and pages, and each device's ledger.

Devices are numbered replica by replica, then stage, dp rank, tp rank, so that a tp group sits on neighbours of
one node. The KV pool of a replica is as long as its fullest stage allows; the others leave the rest free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import hw_profiles
from hw_profiles import Profile
from model.config import ModelConfig
from runtime.deployment.ledger import Ledger, fullest, stage_kv_bytes_by_cache
from runtime.deployment.plan import Demand, Device, Experts, ModelRef, Plan, Pool, Role, config_hash
from runtime.layout import SCHEMES, Formats, Layout
from runtime.simulation.build import Spec, default_expert_load, make_engine, memories


def pool_of(
    cfg: ModelConfig,
    layout: Layout,
    profile: Profile,
    formats: Formats,
    *,
    scheme: str | None = None,
    engine: str = "sglang",
    replicas: int = 1,
    settings: Mapping[str, Any] | None = None,
    drafts: int = 0,
    role: Role = "serve",
    experts: Experts | None = None,
    redundant_slots: int = 0,
    slot_load: tuple[float, ...] = (),
    expert_load: str | None = None,
    first_device: int = 0,
    first_node: int = 0,
) -> Pool:
    """A pool of replicas of one layout, with every device.

    experts: the placement, by default expert e in slot e. redundant_slots: a device, where `experts` has them.
    first_device, first_node: numbers of the pool's first ones. Raises `UsageError` or `CapacityError`.
    """
    layout.check(cfg)
    described = make_engine(engine, cfg, profile, layout, settings)
    spec = Spec(cfg, profile, layout, formats, described, drafts=drafts, redundant_slots=redundant_slots)
    ledgers, pages = stage_pages(spec)
    stages = layout.stage_layers(cfg.num_layers)
    page_bytes = [
        {name: size * described.page_tokens for name, size in held.items()}
        for held in (stage_kv_bytes_by_cache(cfg, layout, formats, stage, drafts > 0) for stage in range(layout.pp))
    ]
    per_node = node_devices(profile)
    devices = []
    for index in range(replicas * layout.devices):
        replica, within = divmod(index, layout.devices)
        stage, rank = divmod(within, layout.stage_devices)
        dp, tp = divmod(rank, layout.tp)
        ranks = {"tp": tp, "dp": dp, "ep": rank if layout.by_expert else 0}
        layers = (stages[stage].start, stages[stage].stop)
        node = first_node + index // per_node
        devices.append(
            Device(first_device + index, node, replica, stage, ranks, layers, ledgers[stage], pages, page_bytes[stage])
        )
    return Pool(
        role=role,
        profile=profile.name if profile.name in hw_profiles.names() else str(profile.path),
        profile_settings={path: f.value for path, f in sorted(profile.figures.items()) if f.source == "--set"},
        layout=layout,
        scheme=scheme or scheme_of(formats),
        formats=formats,
        engine=engine,
        settings=dict(settings or {}),
        drafts=drafts,
        replicas=replicas,
        page_tokens=described.page_tokens,
        devices=tuple(devices),
        experts=experts or in_order(cfg, layout),
        expert_load=expert_load or default_expert_load(cfg),
        slot_load=slot_load,
    )


def scheme_of(formats: Formats) -> str:
    """The name of the weight formats; both, where no scheme has this pair."""
    pair = (formats.weights, formats.experts)
    return next((name for name, parts in SCHEMES.items() if parts == pair), "/".join(pair))


def stage_pages(spec: Spec) -> tuple[list[Ledger], int]:
    """Each stage's ledger, holding whole pages, and the pages of a rank: as many as the fullest stage holds.

    An engine that plans no memory for activations (see `Engine.kv_bytes`) is held to what is there. Raises
    `CapacityError` where not one page fits.
    """
    page_tokens, found = spec.engine.page_tokens, memories(spec)
    held = [
        dataclasses.replace(stage, kv_bytes=max(0.0, stage.kv_bytes + min(0.0, stage.free_bytes))) for stage in found
    ]
    fullest(held, spec.cfg, spec.layout, page_tokens)
    pages = min(int(stage.kv_bytes // (stage.kv_bytes_per_token * page_tokens)) for stage in held)
    return [
        dataclasses.replace(stage, kv_bytes=pages * page_tokens * stage.kv_bytes_per_token) for stage in held
    ], pages


def node_devices(profile: Profile) -> int:
    """Devices in one node of this chip; 8 where the profile does not say."""
    return int(profile.number("node.devices") or profile.number("link.scale_up.domain_devices") or 8)


def moe_layers(cfg: ModelConfig) -> list[int]:
    return [number for number, kind in enumerate(cfg.layers) if kind.ffn == "moe"]


def in_order(cfg: ModelConfig, layout: Layout) -> Experts | None:
    """Expert e in slot e of every MoE layer; None where experts are split by tensor or there are none."""
    if not layout.by_expert or cfg.moe is None:
        return None
    row = tuple(range(cfg.moe.experts))
    return Experts(cfg.moe.experts // layout.ep, (row,) * len(moe_layers(cfg)))


def plan_for(
    cfg: ModelConfig,
    layout: Layout,
    profile: Profile,
    formats: Formats,
    *,
    engine: str = "sglang",
    replicas: int = 1,
    settings: Mapping[str, Any] | None = None,
    drafts: int = 0,
    demand: Demand | None = None,
) -> Plan:
    """A plan for a layout that is given: every device with its ledger and pages, no search and no prediction.

    Raises `UsageError` where the model does not divide by the layout, `CapacityError` with the ledger where it
    does not fit.
    """
    pool = pool_of(
        cfg, layout, profile, formats, engine=engine, replicas=replicas, settings=settings or {}, drafts=drafts
    )
    return Plan(ModelRef(cfg.name, config_hash(cfg)), demand or Demand(), (pool,))
