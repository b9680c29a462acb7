"""From a plan to what `backends.spmd` runs: the layout where none is given, memory limits, grids, the priced clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import hw_profiles
from backends.emulation.memory import Limits, Memory, account
from backends.spmd.grid import Grid, Slots
from foundation.errors import CapacityError, UsageError
from hw_profiles import Profile
from model.cache import layer_bytes_per_token
from model.config import Gqa, ModelConfig
from runtime.deployment.plan import Plan, Pool, profile_of
from runtime.layout import Formats, Layout
from runtime.planning.assign import plan_for
from runtime.planning.predict import spec_of
from runtime.serving import Deployment, Disaggregated
from runtime.simulation.build import _COMMUNICATION_BYTES as COMMUNICATION_BYTES
from runtime.simulation.build import _RUNTIME_BYTES as RUNTIME_BYTES
from runtime.simulation.build import PriceTables, Spec, make_engine, memories, pricer_of


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
    capacity = profile.require("chip.memory.capacity_bytes").value
    values = {
        "chip.memory.capacity_bytes": capacity,
        "chip.memory.usable_bytes": profile.number("chip.memory.usable_bytes") or capacity,
        "overhead.runtime_reserved_bytes": profile.number("overhead.runtime_reserved_bytes") or RUNTIME_BYTES,
        "overhead.collective_buffer_bytes": profile.number("overhead.collective_buffer_bytes") or COMMUNICATION_BYTES,
    }
    return hw_profiles.load(name, {path: value * factor for path, value in values.items()})


def unscaled_settings(
    name: str, cfg: ModelConfig, profile: str, layout: Layout, memory: Profile, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The engine's settings as it derives them from the whole chip, where another size of memory would change them."""
    whole = make_engine(name, cfg, hw_profiles.load(profile), layout, given)
    shrunk = make_engine(name, cfg, memory, layout, given)
    names = [field.name for field in dataclasses.fields(whole) if field.name not in ("name", "description", "evidence")]
    changed = {n: getattr(whole, n) for n in names if getattr(whole, n) != getattr(shrunk, n)}
    return {**given, **changed}


def spot_plan(
    cfg: ModelConfig,
    profile: Profile,
    layout: Layout,
    formats: Formats,
    replicas: int,
    engine: str,
    settings: Mapping[str, Any],
) -> Plan:
    """A plan for a layout, made on the spot. Raises `OutOfMemory`, naming the tensor that does not fit."""
    try:
        return plan_for(cfg, layout, profile, formats, engine=engine, replicas=replicas, settings=settings)
    except CapacityError as error:
        spec = Spec(cfg, profile, layout, formats, make_engine(engine, cfg, profile, layout, settings))
        for stage in memories(spec):
            reserved = {
                "activations": stage.activation_bytes,
                "collective buffers": stage.communication_bytes,
                "the runtime": stage.runtime_bytes,
            }
            page = _page_bytes(cfg, layout, formats, spec.engine.page_tokens)
            limits = Limits(profile.name, stage.usable_bytes, reserved, formats.weight_bytes, page, 1)
            account(cfg, _grid(cfg, layout, None), limits)
        raise CapacityError(str(error).splitlines()[0]) from None


def grid_of(cfg: ModelConfig, pool: Pool) -> Grid:
    """The devices of one server of a pool."""
    slots = Slots(pool.experts.slots_per_device, pool.experts.slot_expert) if pool.experts else None
    return _grid(cfg, pool.layout, slots, pool)


def _grid(cfg: ModelConfig, layout: Layout, slots: Slots | None, pool: Pool | None = None) -> Grid:
    stages = layout.stage_layers(cfg.num_layers)
    if pool is not None:
        spans = {device.stage: device.layers for device in pool.devices}
        stages = [range(*spans[stage]) for stage in range(layout.pp)]
    if slots is None and layout.by_expert and cfg.moe:
        row = tuple(range(cfg.moe.experts))
        slots = Slots(cfg.moe.experts // layout.ep, (row,) * sum(kind.ffn == "moe" for kind in cfg.layers))
    return Grid(layout.tp, layout.dp, tuple(stages), slots)


def check_memory(cfg: ModelConfig, plan: Plan, factor: float = 1.0) -> list[list[Memory]]:
    """What a device of each stage of each pool holds. Raises `OutOfMemory` for the first tensor that does not fit.

    factor: share of the planned chips' memory that is there, and of what is kept back of it.
    """
    found = []
    for pool in plan.pools:
        held = pool.devices[0].ledger
        reserved = {
            "activations": held.activation_bytes,
            "collective buffers": held.communication_bytes * factor,
            "the runtime": held.runtime_bytes * factor,
        }
        page = _page_bytes(cfg, pool.layout, pool.formats, pool.page_tokens)
        usable = held.usable_bytes * factor
        limits = Limits(pool.profile, usable, reserved, pool.formats.weight_bytes, page, pool.kv_pages)
        found.append(account(cfg, grid_of(cfg, pool), limits, pool.devices[0].index))
    return found


def _page_bytes(cfg: ModelConfig, layout: Layout, formats: Formats, page_tokens: int) -> dict[str, float]:
    """Bytes of a page of each cache, in one layer."""
    split = layout.tp if isinstance(cfg.attention, Gqa) else 1
    found: dict[str, float] = {}
    for kind in cfg.layer_counts:
        for name, size in layer_bytes_per_token(cfg, kind, formats.cache).items():
            found[name] = size / split * formats.cache_factor * page_tokens
    return found


@dataclasses.dataclass(frozen=True)
class Clock:
    """What prices a plan's steps: the simulator's deployment, and the deployment and formats of each pool."""

    deployment: Deployment | Disaggregated
    pools: tuple[Deployment, ...]
    formats: tuple[Formats, ...]


def clock_of(cfg: ModelConfig, plan: Plan) -> Clock:
    """All of a plan's servers, priced as `glm5 simulate --plan` prices them. Raises `ProfileError` or `PriceError`.

    Float32 is the reference that any chip can be asked for; where it has no rate for it, steps are priced in bf16.
    """
    tables, pools, formats = PriceTables(), [], []
    for pool in plan.pools:
        spec = spec_of(cfg, pool, profile_of(pool))
        if spec.formats.wide == "f32" and spec.profile.number("chip.peak.fp32_flops_per_s") is None:
            spec = dataclasses.replace(spec, formats=Formats())
        formats.append(spec.formats)
        pools.append(
            Deployment(
                spec.engine,
                pricer_of(spec, tables),
                pool_tokens=pool.pool_tokens,
                devices=len(pool.devices),
                replicas=pool.replicas,
                ranks=pool.layout.dp,
            )
        )
    if plan.transfer is None:
        return Clock(pools[0], tuple(pools), tuple(formats))
    link = plan.transfer
    per_token = link.kv_bytes_per_token / link.link_bandwidth_bytes_per_s + link.conversion_seconds_per_token
    rate = link.kv_bytes_per_token / per_token
    moving = Disaggregated(pools[0], pools[1], link.kv_bytes_per_token, rate, link.link_latency_seconds)
    return Clock(moving, tuple(pools), tuple(formats))
