"""A plan's experts: how much each device carries, which experts have copies, and how far from the best possible."""

from __future__ import annotations

from collections import Counter
from html import escape

from model.config import ModelConfig
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Experts, Pool
from runtime.reports.page import gb

_BARS = 64  # devices drawn apart
_CELL = 5  # of the map of copies, in units of its picture


def experts_section(plan: Plan, cfg: ModelConfig) -> str:
    if cfg.moe is None:
        return ""
    return "".join(_of(pool, cfg) for pool in plan.pools)


def _of(pool: Pool, cfg: ModelConfig) -> str:
    assert cfg.moe
    head = f"<h3>{escape(pool.role)}</h3>"
    experts = pool.experts
    if experts is None:
        spread = pool.layout.stage_devices
        text = (
            f"Each of the {cfg.moe.experts} experts is cut over {spread} devices: all carry alike, whatever the load."
            if spread > 1
            else f"The device holds all {cfg.moe.experts} experts."
        )
        return f"{head}<p>{text}</p>"
    slots, holder = experts.slots_per_device, "group" if pool.layout.grouped else "device"
    text = (
        f"{cfg.moe.experts} experts in {slots * pool.layout.ep} slots a layer, {slots} a {holder}, in "
        f"{len(experts.slot_expert)} layers."
    )
    if pool.redundant_slots:
        size = pool.devices[0].ledger.weights_bytes.get("redundant_experts", 0.0)
        text += (
            f" {pool.redundant_slots} slot{'s' if pool.redundant_slots > 1 else ''} a device hold copies of busy "
            f"experts; they take {gb(size)}, in which "
            f"{size / pool.devices[0].ledger.kv_bytes_per_token:,.0f} more tokens of KV cache would find room."
        )
    return f"{head}<p>{text}</p>{_balance(experts)}{_load(pool, experts)}{_copies(experts, cfg)}"


def _balance(experts: Experts) -> str:
    if experts.max_over_mean is None:
        return (
            '<p class="quiet">No load of the experts was given: they are in order, and nothing is known of how evenly '
            "they will be used. Plan with --expert-load to place them by it.</p>"
        )
    bound = experts.bound or 1.0
    rows = [
        ("busiest device over the mean device, mean of the layers", f"{experts.max_over_mean:.4f}"),
        ("the same, worst layer", f"{experts.worst_max_over_mean:.4f}" if experts.worst_max_over_mean else "–"),
        ("no placement in these slots can beat", f"{bound:.4f}"),
        ("gap to that", f"{max(experts.max_over_mean / bound - 1, 0.0):.2%}"),
    ]
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="figures narrow"><tbody>{body}</tbody></table>'


def _load(pool: Pool, experts: Experts) -> str:
    """Each device's load over the mean, busiest first: heat by length and depth of colour."""
    share, count = experts.slots_per_device, pool.layout.ep
    if len(pool.slot_load) != share * count:
        return ""
    devices = [sum(pool.slot_load[i * share : (i + 1) * share]) * count for i in range(count)]
    total = sum(devices) / count
    devices = [load / total for load in devices]
    most = max(devices)
    step = -(-count // _BARS)
    rows = "".join(
        f'<i style="height:{100 * load / most:.1f}%;opacity:{0.35 + 0.65 * load / most:.2f}" '
        f'title="device {i + 1} by load: {load:.3f} of the mean"></i>'
        for i, load in enumerate(devices[::step])
    )
    note = f" Every {step}th device is drawn." if step > 1 else ""
    return (
        f"<figure><figcaption>Load of each device over the mean, busiest first (layers averaged): "
        f"{devices[0]:.3f} to {devices[-1]:.3f}</figcaption>"
        f'<div class="heat">{rows}<s style="bottom:{100 / most:.1f}%"></s></div>'
        f'<p class="quiet">The line is the mean.{note}</p></figure>'
    )


def _copies(experts: Experts, cfg: ModelConfig) -> str:
    """A map of layers and experts: those with more than one copy, darker with more."""
    assert cfg.moe
    number, rows = cfg.moe.experts, experts.slot_expert
    levels: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        for expert, copies in Counter(row).items():
            if copies > 1:
                levels.setdefault(min(copies, 5), []).append(f"M{expert * _CELL} {y * _CELL}h{_CELL}v{_CELL}h-{_CELL}z")
    if not levels:
        return ""
    paths = "".join(
        f'<path class="copies" style="opacity:{min(1.0, 0.25 * (level - 1)):.2f}" d="{"".join(cells)}"/>'
        for level, cells in sorted(levels.items())
    )
    width, height = number * _CELL, len(rows) * _CELL
    most = max(max(Counter(row).values()) for row in rows)
    picture = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="experts with copies, by layer">'
        f'<rect class="field" width="{width}" height="{height}"/>{paths}</svg>'
    )
    return (
        f"<figure><figcaption>Experts with copies: {len(rows)} MoE layers down, {number} experts across, up to {most} "
        f"copies (darker)</figcaption>{picture}</figure>"
    )
