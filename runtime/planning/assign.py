"""From a layout to devices: who holds which stage, ranks, experts and pages, and each device's ledger.

Devices are numbered replica by replica, then stage, dp rank, tp rank, so that a tp group sits on neighbours of
one node. The KV pool of a replica is as long as its fullest stage allows; the others leave the rest free.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from hw_profiles import Profile
from model.config import ModelConfig
from model.split import Layout, slots_in_order
from runtime.deployment.demand import Demand
from runtime.deployment.kv import Offload
from runtime.deployment.ledger import Ledger, fullest, stage_kv_bytes_by_cache
from runtime.deployment.plan import ModelRef, Plan, config_hash
from runtime.deployment.pool import Device, Experts, Pool, PoolRole
from runtime.pricing.load import ExpertLoad
from runtime.pricing.placement import second_pool
from runtime.simulation.build import Spec, default_expert_load, memories, node_devices


def pool_of(
    spec: Spec,
    replicas: int = 1,
    *,
    role: PoolRole = "serve",
    experts: Experts | None = None,
    first_device: int = 0,
    first_node: int = 0,
) -> Pool:
    """A pool of replicas of one deployment, with every device.

    experts: the placement, by default expert e in slot e (with `spec.redundant_slots` it has them). first_device,
    first_node: numbers of the pool's first ones. Raises `UsageError` or `CapacityError`.
    """
    cfg, layout, profile, page_tokens = spec.cfg, spec.layout, spec.profile, spec.engine.page_tokens
    layout.check(cfg)
    ledgers, pages = stage_pages(spec)
    stages = layout.stage_layers(cfg.num_layers)
    page_bytes = [
        {name: size * page_tokens for name, size in held.items()}
        for held in (
            stage_kv_bytes_by_cache(cfg, layout, spec.formats.cache, stage, spec.drafts > 0)
            for stage in range(layout.pp)
        )
    ]
    per_node, places = node_devices(profile), list(layout.places())
    devices = []
    for index in range(replicas * layout.devices):
        replica, within = divmod(index, layout.devices)
        place = places[within]
        ranks = {"tp": place.tp, "dp": place.dp, "ep": place.ep, **({"pcp": place.pcp} if layout.pcp > 1 else {})}
        layers = (stages[place.stage].start, stages[place.stage].stop)
        node = first_node + index // per_node
        devices.append(
            Device(
                first_device + index, node, replica, place.stage, ranks, layers, ledgers[place.stage], pages,
                page_bytes[place.stage],
            )
        )  # fmt: skip
    load = spec.expert_load
    measured = isinstance(load, ExpertLoad)
    return Pool(
        role=role,
        profile=profile.name if profile.ships else str(profile.path),
        profile_settings=profile.settings,
        layout=layout,
        scheme=spec.formats.scheme.name,
        formats=spec.formats,
        engine=spec.named or spec.engine.name,
        settings=dict(spec.settings),
        drafts=spec.drafts,
        replicas=replicas,
        page_tokens=page_tokens,
        devices=tuple(devices),
        experts=experts or in_order(cfg, layout),
        expert_load=load.name if measured else load or default_expert_load(cfg, layout),
        acceptance=spec.acceptance,
        acceptance_ranges=spec.acceptance_ranges,
        slot_load=tuple(float(share) for share in load.shares) if measured else (),
        offload=spec.offload if role != "decode" else Offload(),
    )


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


def first_nodes(pools: Sequence[tuple[Profile, int]]) -> list[int]:
    """The node that each of a plan's one or two pools begins on: profiles, and devices of each."""
    found = [0]
    for (before, first), (profile, second) in pairwise(pools):
        node = node_devices(before)
        shared = second_pool(first, second, node) // node if before.name == profile.name else -(-first // node)
        found.append(shared)
    return found


def uneven_nodes(devices: int, replicas: int, node: int) -> list[int] | None:
    """The devices on each node of the first replica that has not as many on each, where replicas of `devices` stand one
    behind the other on nodes of `node`; None where all are even."""
    for first in range(0, devices * replicas, devices):
        counts = list(Counter(index // node for index in range(first, first + devices)).values())
        if len(set(counts)) > 1:
            return counts
    return None


def in_order(cfg: ModelConfig, layout: Layout) -> Experts | None:
    """Expert e in slot e of every MoE layer; None where experts are split by tensor or there are none."""
    slots = slots_in_order(cfg, layout)
    return Experts(slots.per_device, slots.experts) if slots else None


def plan_for(spec: Spec, replicas: int = 1, demand: Demand | None = None) -> Plan:
    """A plan for a deployment that is given: every device with its ledger and pages, no search and no prediction.

    Raises `UsageError` where the model does not divide by the layout, `CapacityError` with the ledger where it
    does not fit.
    """
    pool = pool_of(spec, replicas)
    return Plan(ModelRef(spec.cfg.name, config_hash(spec.cfg)), demand or Demand(), (pool,))
