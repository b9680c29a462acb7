"""From a plan to what `backends.spmd` runs: the layout where none is given, memory limits, grids, the priced clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import hw_profiles
from backends.emulation.memory import Limits, Memory, OutOfMemory, account
from foundation.errors import CapacityError, UsageError, first_line
from foundation.limits import within
from hw_profiles import Profile
from model.config import ModelConfig
from model.split import Grid, Layout, Slots, slots_in_order
from runtime.deployment.engines import engine_for
from runtime.deployment.ledger import DeviceMemory
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool
from runtime.planning.assign import plan_for
from runtime.simulation.build import Spec, memories
from runtime.simulation.planned import Deployed, deployed

MOST_EMULATED = 1024
"""Devices that one host stands in for, without a plan: each has weights and caches of its own."""


def lay_out(
    cfg: ModelConfig,
    devices: int,
    tp: int | None = None,
    dp: int | None = None,
    ep: int | None = None,
    pp: int | None = None,
) -> tuple[Layout, int]:
    """A layout for that many devices, and how many servers of it; degrees that are given are kept.

    Of those that the model divides by: one server before several, experts split by expert, few stages, wide tp.
    Raises `UsageError` where there is none.
    """
    within("--devices", devices, MOST_EMULATED)
    found: list[tuple[tuple[Any, ...], Layout, int]] = []
    why = ""
    for replicas in (n for n in range(1, devices + 1) if devices % n == 0):
        for t, d, p in _degrees(devices // replicas):
            if (tp or t, dp or d, pp or p) != (t, d, p):
                continue
            for e in sorted({1, t * d}) if ep is None else (ep,):
                try:
                    layout = Layout(t, d, e, p)
                    layout.check(cfg)
                except UsageError as error:
                    why = why or str(error)
                    continue
                by_tensor = layout.stage_devices > 1 and not layout.by_expert and cfg.moe is not None
                found.append(((replicas, by_tensor, p, -t), layout, replicas))
    if not found:
        given = ", ".join(f"{k} {v}" for k, v in (("tp", tp), ("dp", dp), ("ep", ep), ("pp", pp)) if v)
        why = why or f"tp x dp x pp must divide {devices}"
        raise UsageError(f"no layout of {devices} devices{f' with {given}' if given else ''} fits {cfg.name}: {why}")
    return min(found, key=lambda each: each[0])[1:]


def _degrees(devices: int) -> list[tuple[int, int, int]]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [(t, d, devices // t // d) for t in divisors for d in divisors if devices % (t * d) == 0]


def scaled(name: str, factor: float) -> Profile:
    """A profile with that share of its memory, and of what is kept back of it."""
    profile = hw_profiles.load(name)
    if factor == 1.0:
        return profile
    held = DeviceMemory.of(profile, devices=2)
    total, each = "overhead.collective_buffer_bytes", "overhead.communicator_buffer_bytes"
    buffers = each if profile.number(total) is None and profile.number(each) else total
    values = {
        "chip.memory.capacity_bytes": held.capacity_bytes,
        "chip.memory.usable_bytes": held.usable_bytes,
        "overhead.runtime_reserved_bytes": held.runtime_bytes,
        buffers: held.communication_bytes,
    }
    return hw_profiles.load(name, {path: value * factor for path, value in values.items()})


def unscaled_settings(
    name: str, cfg: ModelConfig, profile: str, layout: Layout, memory: Profile, drafts: int = 0
) -> dict[str, Any]:
    """The engine's settings as it derives them from the whole chip, where another size of memory would change them."""
    whole = engine_for(name, cfg, hw_profiles.load(profile), layout, None, drafts)
    shrunk = engine_for(name, cfg, memory, layout, None, drafts)
    names = [field.name for field in dataclasses.fields(whole) if field.name not in ("name", "description", "evidence")]
    return {n: getattr(whole, n) for n in names if getattr(whole, n) != getattr(shrunk, n)}


def spot_plan(spec: Spec, replicas: int) -> Plan:
    """A plan for a deployment, made on the spot. Raises `OutOfMemory`, naming the tensor that does not fit."""
    try:
        return plan_for(spec, replicas)
    except CapacityError as error:
        for stage in memories(spec):
            reserved = {
                "activations": stage.activation_bytes,
                "workspaces": stage.workspace_bytes,
                "collective buffers": stage.communication_bytes,
                "the runtime": stage.runtime_bytes,
            }
            limits = Limits(spec.profile.name, stage.usable_bytes, reserved, spec.formats, 1, spec.engine.page_tokens)
            account(spec.cfg, Grid.of(spec.cfg, spec.layout), limits, mtp=spec.drafts > 0)
        raise CapacityError(first_line(error)) from None


def grid_of(cfg: ModelConfig, pool: Pool) -> Grid:
    """The devices of one server of a pool."""
    spans = {device.stage: device.layers for device in pool.devices}
    stages = tuple(range(*spans[stage]) for stage in range(pool.layout.pp))
    slots = Slots(pool.experts.slots_per_device, pool.experts.slot_expert) if pool.experts else None
    return Grid(pool.layout, stages, slots or slots_in_order(cfg, pool.layout))


def check_memory(cfg: ModelConfig, plan: Plan, factor: float = 1.0) -> list[list[Memory]]:
    """What a device of each stage of each pool holds. Raises `OutOfMemory` for the first tensor that does not fit.

    factor: share of the planned chips' memory that is there, and of what is kept back of it.
    """
    found = []
    for pool in plan.pools:
        held = pool.devices[0].ledger
        reserved = {
            "activations": held.activation_bytes,
            "workspaces": held.workspace_bytes,
            "collective buffers": held.communication_bytes * factor,
            "the runtime": held.runtime_bytes * factor,
        }
        usable = held.usable_bytes * factor
        limits = Limits(pool.profile, usable, reserved, pool.formats, pool.kv_pages, pool.page_tokens)
        found.append(account(cfg, grid_of(cfg, pool), limits, pool.devices[0].index, pool.drafts > 0))
    return found


def check_ledgers(plan: Plan, factor: float = 1.0) -> None:
    """The same by what the plan says of its devices, where nothing is put on them. Raises `OutOfMemory`."""
    for held in (device.ledger for pool in plan.pools for device in pool.devices):
        there = (held.usable_bytes - held.communication_bytes - held.runtime_bytes) * factor
        wanted = held.weights_total_bytes + held.kv_bytes + held.activation_bytes + held.workspace_bytes
        if wanted > there:
            raise OutOfMemory(
                f"the plan puts {wanted / 1e9:.2f} GB on a device that has {max(0.0, there) / 1e9:.2f} GB for it "
                f"(--scale-memory {factor:g})"
            )


def clock_of(cfg: ModelConfig, plan: Plan) -> Deployed:
    """All of a plan's servers, priced as `glm5 simulate --plan` prices them. Raises `ProfileError` or `PriceError`."""
    return deployed(plan, cfg, whole=True, stand_in=True)
