"""A plan for a terminal: its pools, a bar of memory for each kind of device, what it promises, what else there was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.cli.simulated import NO_PREFIX_CACHE, prefix_words, show_assumed
from runtime.deployment.engines import load as load_engine

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.deployment.plan import Plan
    from runtime.deployment.pool import Device, Pool

_BAR = 40
_ALTERNATIVES = 12
_PARTS = (  # name, colour, and what tells it apart without one
    ("weights", "blue", "█"),
    ("KV", "green", "▓"),
    ("activations", "yellow", "▒"),
    ("other", "magenta", "░"),
    ("free", "bright_black", "·"),
)


def show(plan: Plan) -> None:
    """Prints the plan."""
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    console = Terminal(highlight=False)
    idle = f", {plan.idle_devices} idle" if plan.idle_devices else ""
    console.print(f"[bold]{plan.model.name}[/] on {len(plan.devices)} devices{idle}, requests of {plan.demand.lengths}")
    for pool in plan.pools:
        _pool(console, pool)
    if plan.transfer:
        moved = plan.transfer
        console.print(
            f"a prompt of {plan.demand.longest[0]:,} tokens moves {moved.bytes / 1e9:.2f} GB from prefill to decode "
            f"over {len(moved.routes)} link{'s' * (len(moved.routes) > 1)} in {moved.seconds * 1e3:,.1f} ms"
        )
    if plan.predicted:
        _predicted(console, plan)
    if plan.alternatives:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("tok/s/device", "tok/s/user", "TTFT ms", "TPOT ms", "in flight"):
            table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
        table.add_column("", no_wrap=True, min_width=9)
        table.add_column("plan", overflow="fold")
        chips = {pool.profile for pool in plan.pools}
        for row in plan.alternatives[:_ALTERNATIVES]:
            how = "chosen" if row.chosen else "simulated" if row.simulated else "estimate"
            figures = (row.output_tokens_per_s_per_device, row.output_tokens_per_s_per_user, row.ttft_ms, row.tpot_ms)
            name = row.name.replace(f" on {next(iter(chips))}", "") if len(chips) == 1 else row.name
            cells = ("-" if value is None else f"{value:,.1f}" for value in figures)
            table.add_row(*cells, f"{row.concurrency:,}", how, name)
        console.print(table)
        if len(plan.alternatives) > _ALTERNATIVES:
            console.print(f"{len(plan.alternatives) - _ALTERNATIVES} more alternatives in the plan file (--out)")
    if plan.rejected:
        console.print(f"{len(plan.rejected)} candidates rejected; the plan file (--out) has the reasons")


def _pool(console: object, pool: Pool) -> None:
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    assert isinstance(console, Terminal)
    settings = "".join(f", {key} {value}" for key, value in pool.settings.items())
    console.print(f"{pool.role}: {pool.name}, {pool.engine}{settings}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("devices", "layers"):
        table.add_column(heading)
    table.add_column("memory", no_wrap=True, min_width=_BAR)
    for heading in ("weights", "KV", "free GB", "KV pages", "tokens"):
        table.add_column(heading, justify="right")
    for devices in _alike(pool):
        first, held = devices[0], devices[0].ledger
        parts = _parts(first)
        table.add_row(
            _ranges([device.index for device in devices]),
            f"{first.layers[0]}-{first.layers[1] - 1}",
            _bar(parts, held.usable_bytes),
            *(f"{parts[name] / 1e9:.1f}" for name in ("weights", "KV", "free")),
            f"{first.kv_pages:,}",
            f"{first.kv_pages * pool.page_tokens:,}",
        )
    console.print(table)
    console.print("  ".join(f"[{colour}]{mark}[/] {name}" for name, colour, mark in _PARTS))
    if pool.experts and pool.experts.max_over_mean is not None:
        extra = f"{pool.redundant_slots} redundant slots a device, " if pool.redundant_slots else ""
        console.print(
            f"experts: {extra}busiest device at {pool.experts.max_over_mean:.3f} x the mean (worst layer "
            f"{pool.experts.worst_max_over_mean:.3f}); no placement in these slots is below {pool.experts.bound:.3f}"
        )


def _predicted(console: object, plan: Plan) -> None:
    from runtime.cli.terminal import Terminal

    assert isinstance(console, Terminal)
    got = plan.predicted
    assert got
    load = plan.demand.load
    user = got.output_tokens_per_s_per_user
    console.print(
        f"predicted with {load}: [bold]{got.output_tokens_per_s:,.0f} output tok/s[/], "
        f"{got.output_tokens_per_s_per_device:,.1f} a device{f', {user:,.1f} a user' if user else ''}; "
        f"{got.requests_per_s:.3g} requests/s"
    )
    for name, stats in (("ttft_ms", got.ttft_ms), ("tpot_ms", got.tpot_ms)):
        if stats["mean"] is None:
            continue
        low, high = got.band.get(name, (stats["mean"], stats["mean"]))
        target = getattr(plan.demand, name)
        bound = plan.demand.statistic
        wanted = f", target {target:,.1f}" if target is not None else ""
        if wanted and bound != "mean":
            wanted = f"; {bound} {stats[bound] or 0.0:,.1f}{wanted}"
        title = name.removesuffix("_ms").upper()
        console.print(f"{title} {stats['mean']:,.1f} ms (9 in 10 expected within {low:,.1f} to {high:,.1f}){wanted}")
    if plan.demand.shares:
        console.print(prefix_words(got.prefix_hit_rate, got.prefix_hits))
        first = plan.pools[0]
        if not first.settings.get("prefix_cache", load_engine(first.engine).prefix_cache):
            console.print(f"note: {NO_PREFIX_CACHE}")
    _verdict(console, plan)
    outside = f", {got.extrapolated:.0%} of steps outside the fits' range" if got.extrapolated else ""
    limit = f"; limited by {_limit(plan)}" if got.saturated_by else f"; bound by {got.bottleneck}"
    console.print(f"evidence: {got.evidence}{outside}{limit}")
    if got.band_basis:
        console.print(f"bands: {got.band_basis}")
    show_assumed(console, got.assumed)


def _limit(plan: Plan) -> str:
    """What holds a plan back. A limit of running requests that the plan sets is the plan's, not the hardware's: it is
    there because more of them would take longer a token, or do not fit."""
    got = plan.predicted
    assert got
    limit = plan.serving.settings.get("max_running_requests")
    if got.saturated_by == "max-running" and limit is not None:
        why = "beyond it a token takes longer" if plan.demand.tpot_ms is not None else "as engine.max_running_requests"
        return f"max-running, {limit} requests a rank that the plan admits ({why})"
    return got.saturated_by if got.saturated_by not in ("", "arrivals") else got.bottleneck or "arrivals"


def _verdict(console: Console, plan: Plan) -> None:
    """What of the targets is missed and why, and what other numbers of devices came to."""
    got = plan.predicted
    assert got
    played = sum(row.simulated for row in plan.alternatives)
    if missed := got.missed(plan.demand):
        console.print(f"[bold red]misses its targets[/]: {'; '.join(missed)}")
        console.print(f"limited by {_limit(plan)}; the nearest of {played} simulated plans of this size")
    if plan.demand.objective == "min-devices":
        sizes = {f"{n} x {plan.serving.profile}": n for n in range(1, len(plan.devices) + plan.idle_devices)}
        below = [each for each in plan.rejected if each.name in sizes]
        if below and not missed:
            nearest = max(below, key=lambda each: sizes[each.name])
            console.print(f"the fewest devices found; tried below: {nearest.name}: {nearest.reason}")


def _alike(pool: Pool) -> list[list[Device]]:
    """Devices that hold the same amounts, together."""
    groups: dict[tuple[int, int, int], list[Device]] = {}
    for device in pool.devices:
        groups.setdefault((*device.layers, device.kv_pages), []).append(device)
    return list(groups.values())


def _parts(device: Device) -> dict[str, float]:
    held = device.ledger
    return {
        "weights": held.weights_total_bytes,
        "KV": held.kv_bytes,
        "activations": held.activation_bytes,
        "other": held.communication_bytes + held.runtime_bytes + held.workspace_bytes,
        "free": held.free_bytes,
    }


def _bar(parts: dict[str, float], usable_bytes: float) -> str:
    ends, total = [], 0.0
    for size in parts.values():
        total += size
        ends.append(round(_BAR * total / usable_bytes))
    widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return "".join(f"[{colour}]{mark * width}[/]" for (_, colour, mark), width in zip(_PARTS, widths, strict=True))


def _ranges(numbers: list[int]) -> str:
    """0-7, 16-23, ... (the first few)."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [f"{a}-{b}" if b > a else str(a) for a, b in spans[:3]]
    return ", ".join(shown) + (", …" if len(spans) > 3 else "")
