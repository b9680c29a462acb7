"""Recomputes a plan from the model and the profiles, and says what does not add up.

The ledgers, pages, ranks and layers that a plan states are compared with those that the same layout gives today:
from the model's list of weights, the cache rows and the chip's profile. Sums are checked by themselves, so that a
wrong plan is found even where both sides would be wrong alike.
"""

from __future__ import annotations

import dataclasses
import math

from foundation.errors import Failure, first_line
from hw_profiles import Profile
from model.config import ModelConfig
from model.split import moe_layers
from runtime.deployment.ledger import Ledger
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Device, Pool, profile_of
from runtime.planning.assign import first_nodes, pool_of
from runtime.planning.kv_tiers import check_kv
from runtime.simulation.planned import spec_of

_TOLERANCE = 1e-9


def check(plan: Plan, cfg: ModelConfig) -> list[str]:
    """What does not add up, a line each; empty for a sound plan. Raises `ProfileError` for a profile that is gone."""
    wrong: list[str] = []
    device = 0
    roles = [pool.role for pool in plan.pools]
    if roles not in (["serve"], ["prefill", "decode"]):
        wrong.append(f"pools {', '.join(roles)}: a plan has one that serves, or one that prefills and one that decodes")
    if (plan.transfer is None) != (len(plan.pools) == 1):
        wrong.append("two pools and a transfer between them go together")
    profiles = [profile_of(pool) for pool in plan.pools]
    nodes = first_nodes([(profile, len(pool.devices)) for profile, pool in zip(profiles, plan.pools, strict=True)])
    for number, (pool, profile, node) in enumerate(zip(plan.pools, profiles, nodes, strict=True)):
        wrong += _pool(pool, cfg, profile, f"pools[{number}]", device, node)
        device += len(pool.devices)
    return wrong or check_kv(plan, cfg)


def _pool(pool: Pool, cfg: ModelConfig, profile: Profile, where: str, device: int, node: int) -> list[str]:
    try:
        spec = dataclasses.replace(spec_of(cfg, pool, profile), pool_tokens=None)
        again = pool_of(spec, pool.replicas, role=pool.role, experts=pool.experts, first_device=device, first_node=node)
    except Failure as error:
        return [f"{where}: {first_line(error)}"]
    wrong: list[str] = []
    if again.page_tokens != pool.page_tokens:
        wrong.append(f"{where}: {pool.page_tokens} tokens a page, {pool.engine} has {again.page_tokens}")
    if len(again.devices) != len(pool.devices):
        expected = f"{pool.replicas} x {pool.layout.devices} = {len(again.devices)}"
        return [*wrong, f"{where}: {len(pool.devices)} devices, the layout has {expected}"]
    for place, (stated, found) in enumerate(zip(pool.devices, again.devices, strict=True)):
        wrong += _device(stated, found, pool, f"{where}.devices[{place}]")
    return wrong + _experts(pool, cfg, where)


def _device(stated: Device, found: Device, pool: Pool, where: str) -> list[str]:
    wrong = []
    for field in ("index", "node", "replica", "stage", "layers", "kv_pages"):
        if getattr(stated, field) != getattr(found, field):
            wrong.append(f"{where}.{field}: {getattr(stated, field)}, recomputed {getattr(found, field)}")
    if dict(stated.ranks) != dict(found.ranks):
        wrong.append(f"{where}.ranks: {dict(stated.ranks)}, recomputed {dict(found.ranks)}")
    pages = stated.kv_pages * sum(stated.kv_page_bytes.values())
    if not _same(pages, stated.ledger.kv_bytes):
        wrong.append(
            f"{where}: {stated.kv_pages} pages take {pages:,.0f} bytes, kv_bytes is {stated.ledger.kv_bytes:,.0f}"
        )
    wrong += _numbers(dict(stated.kv_page_bytes), dict(found.kv_page_bytes), f"{where}.kv_page_bytes")
    return wrong + _ledger(stated.ledger, found.ledger, f"{where}.ledger")


def _ledger(stated: Ledger, found: Ledger, where: str) -> list[str]:
    wrong = _numbers(dict(stated.weights_bytes), dict(found.weights_bytes), f"{where}.weights_bytes")
    names = ("capacity_bytes", "usable_bytes", "kv_bytes", "activation_bytes", "communication_bytes", "runtime_bytes",
             "workspace_bytes")  # fmt: skip
    for name in names:
        if not _same(getattr(stated, name), getattr(found, name)):
            wrong.append(f"{where}.{name}: {getattr(stated, name):,.0f}, recomputed {getattr(found, name):,.0f}")
        if getattr(stated, name) < 0:
            wrong.append(f"{where}.{name}: {getattr(stated, name):,.0f} is below zero")
    if stated.free_bytes < -1:
        wrong.append(f"{where}: {-stated.free_bytes:,.0f} bytes more than the {stated.usable_bytes:,.0f} usable")
    if stated.usable_bytes > stated.capacity_bytes:
        wrong.append(f"{where}: {stated.usable_bytes:,.0f} bytes usable of {stated.capacity_bytes:,.0f}")
    return wrong


def _experts(pool: Pool, cfg: ModelConfig, where: str) -> list[str]:
    experts, moe = pool.experts, cfg.moe
    if moe is None or not pool.layout.by_expert:
        return [f"{where}.experts: experts are not split by expert"] if experts else []
    if experts is None:
        return [f"{where}.experts: missing, the layout splits by expert"]
    wrong = []
    if len(experts.slot_expert) != len(moe_layers(cfg)):
        wrong.append(
            f"{where}.experts: {len(experts.slot_expert)} layers, the model has {len(moe_layers(cfg))} with experts"
        )
    layout = pool.layout
    slots, parts = experts.slots_per_device * layout.ep, "groups" if layout.grouped else "devices"
    everyone = set(range(moe.experts))
    for layer, row in enumerate(experts.slot_expert):
        if len(row) != slots:
            wrong.append(f"{where}.experts layer {layer}: {len(row)} slots, {layout.ep} {parts} have {slots}")
        if set(row) != everyone:
            gone = sorted(everyone - set(row)) or sorted(set(row) - everyone)
            wrong.append(f"{where}.experts layer {layer}: expert {gone[0]} is on no device or does not exist")
    if pool.slot_load and len(pool.slot_load) != slots:
        wrong.append(f"{where}.slot_load: {len(pool.slot_load)} loads for {slots} slots")
    return wrong


def _numbers(stated: dict[str, float], found: dict[str, float], where: str) -> list[str]:
    wrong = [f"{where}: no {name}" for name in found.keys() - stated.keys()]
    wrong += [f"{where}: {name} is not held here" for name in stated.keys() - found.keys()]
    for name in sorted(stated.keys() & found.keys()):
        if not _same(stated[name], found[name]):
            wrong.append(f"{where}.{name}: {stated[name]:,.0f}, recomputed {found[name]:,.0f}")
    return sorted(wrong)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=0.5)
