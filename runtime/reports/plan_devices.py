"""A plan's devices: memory stacked to one scale, and a picture of the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from model.config import ModelConfig
from runtime.deployment.ledger import Ledger
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Device, Experts, Pool
from runtime.reports import svg
from runtime.reports.page import gb

_TILES = 64  # of a pool before the rest is told in words
_COLOURS = 8
_WEIGHTS = ("experts", "attention")  # named apart in a bar


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0–2, 5"."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def devices_section(plan: Plan) -> str:
    """A bar for each group of devices with equal ledgers; all bars of a chip have its capacity's length."""
    out = []
    for pool in plan.pools:
        groups: dict[int, list[Device]] = {}
        for device in pool.devices:
            groups.setdefault(device.stage, []).append(device)
        for stage, held in groups.items():
            first, last = held[0].layers
            where = f"stage {stage}, layers {first}–{last - 1}" if pool.layout.pp > 1 else "all layers"
            title = f"{len(held)} x {pool.profile} ({pool.role}, {where}): devices {ranges(_indices(held))}"
            out.append(f"<h3>{escape(title)}</h3>{_bar(held[0].ledger)}{_words(held[0], pool)}")
    return "".join(out)


def _indices(devices: Sequence[Device]) -> list[int]:
    return [device.index for device in devices]


def _bar(ledger: Ledger) -> str:
    """In one order for all, so that a colour means one thing."""
    named = [(name, ledger.weights_bytes.get(name, 0.0)) for name in _WEIGHTS]
    rest = ledger.weights_total_bytes - sum(size for _, size in named)
    parts = [(f"weights: {name}", size) for name, size in (*named, ("the rest", rest))] + [
        ("KV cache", ledger.kv_bytes),
        ("activations", ledger.activation_bytes),
        ("engine's workspaces", ledger.workspace_bytes),
        ("communication buffers", ledger.communication_bytes),
        ("driver and runtime", ledger.runtime_bytes),
        ("left free", ledger.free_bytes),
        ("not usable", ledger.capacity_bytes - ledger.usable_bytes),
    ]
    return svg.stacked([(name, size, gb(size)) for name, size in parts])


def _words(device: Device, pool: Pool) -> str:
    ledger = device.ledger
    used = ledger.usable_bytes - ledger.free_bytes
    parts = sorted(ledger.weights_bytes.items(), key=lambda item: -item[1])
    weights = escape(", ".join(f"{name.replace('_', ' ')} {gb(size)}" for name, size in parts))
    return (
        f'<p class="quiet">{gb(ledger.usable_bytes)} usable of {gb(ledger.capacity_bytes)}; {gb(used)} in use: weights '
        f"{gb(ledger.weights_total_bytes)} ({weights}), KV cache {gb(ledger.kv_bytes)} = {device.kv_pages:,} pages of "
        f"{pool.page_tokens} tokens at {ledger.kv_bytes_per_token:,.0f} bytes a token.</p>"
    )


# --- the mesh --------------------------------------------------------------------------------------------


def layout_section(plan: Plan, cfg: ModelConfig) -> str:
    """Nodes as boxes, devices as tiles coloured by who shares their sequences, or by stage."""
    return "".join(_mesh(pool, cfg) for pool in plan.pools)


def _mesh(pool: Pool, cfg: ModelConfig) -> str:
    layout = pool.layout
    by_stage = layout.pp > 1
    shown = pool.devices[: max(_TILES, layout.devices)][: 4 * _TILES]
    boxes = []
    for node, held in groupby(shown, key=lambda device: device.node):
        tiles = "".join(_tile(device, pool, by_stage) for device in held)
        boxes.append(f'<div class="node"><p>node {node}</p><div class="tiles">{tiles}</div></div>')
    hidden = len(pool.devices) - len(shown)
    more = f'<p class="quiet">and {hidden} more devices in the same pattern.</p>' if hidden else ""
    colour = "pipeline stage" if by_stage else "dp group, whose devices hold the same sequences"
    if (layout.pp if by_stage else layout.dp * pool.replicas) > _COLOURS:
        colour += "; colours repeat"
    return (
        f"<h3>{escape(pool.role)}: {escape(pool.name)}</h3>"
        f'<p class="quiet">Colour: {colour}. {escape(_rules(pool, cfg))}</p>'
        f'<div class="mesh">{"".join(boxes)}</div>{more}'
    )


def _tile(device: Device, pool: Pool, by_stage: bool) -> str:
    ranks = device.ranks
    colour = device.stage if by_stage else device.replica * pool.layout.dp + ranks["dp"]
    degrees = (("tp", pool.layout.tp), ("dp", pool.layout.dp))
    lines = [" ".join(f"{name}{ranks[name]}" for name, degree in degrees if degree > 1)]
    if by_stage:
        lines.append(f"layers {device.layers[0]}–{device.layers[1] - 1}")
    if pool.experts:
        lines.append(_experts_of(pool.experts, ranks["ep"]))
    tooltip = (
        f"device {device.index}, node {device.node}, replica {device.replica}, stage {device.stage}, "
        + ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        + f", layers {device.layers[0]} to {device.layers[1] - 1}, {device.kv_pages:,} KV pages, "
        f"{gb(device.ledger.weights_total_bytes)} of weights"
    )
    text = "<br>".join(escape(line) for line in lines if line)
    head = f'<div class="tile s{colour % _COLOURS}" title="{escape(tooltip, quote=True)}">'
    return f"{head}<b>{device.index}</b>{text}</div>"


def _experts_of(experts: Experts, rank: int) -> str:
    """The experts of a device in the first MoE layer."""
    share = experts.slots_per_device
    held = experts.slot_expert[0][rank * share : (rank + 1) * share]
    found = ranges(held)
    return f"e {found}" if len(found) <= 14 else f"{len(held)} experts"


def _rules(pool: Pool, cfg: ModelConfig) -> str:
    layout = pool.layout
    parts = []
    if layout.tp > 1:
        parts.append(f"the {layout.tp} tp ranks of a group split {cfg.heads} heads, {cfg.heads // layout.tp} each")
    if layout.dp > 1:
        parts.append(f"the {layout.dp} dp groups hold different sequences and meet in the experts")
    if cfg.moe:
        if layout.by_expert:
            parts.append(
                f"each device holds {pool.experts.slots_per_device if pool.experts else 0} expert slots a layer"
                + (f", 1/{layout.expert_tensor_parts} of their width" if layout.grouped else "")
            )
        elif layout.stage_devices > 1:
            width = cfg.moe.intermediate // layout.stage_devices
            parts.append(f"every device holds {width} of the {cfg.moe.intermediate} columns of each expert")
    if pool.replicas > 1:
        parts.append(f"{pool.replicas} replicas of {layout.devices} devices are alike")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
