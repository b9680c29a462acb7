"""What `glm5 simulate` prints: the JSON object, the table, and a progress bar on the way."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.serving import Report
    from runtime.simulation.build import Built, Spec


def result_of(spec: Spec, built: Built, report: Report, devices: int, replicas: int) -> dict[str, Any]:
    """The JSON object: what was simulated, the report, and the bands."""
    from runtime.pricing.bands import band
    from runtime.simulation.validation import report_half_widths

    halves = report_half_widths(built, report, replicas)
    figures = report.to_json()
    return {
        "model": spec.cfg.name,
        "profile": spec.profile.name,
        "devices": devices,
        "layout": dataclasses.asdict(spec.layout),
        "formats": dataclasses.asdict(spec.formats),
        "engine": spec.engine.name,
        **figures,
        "band": {
            f"{name}_ms": band(figures[f"{name}_ms"]["mean"], halves[name])
            for name in ("ttft", "tpot")
            if figures[f"{name}_ms"]["mean"] is not None
        },
        "ledger": dataclasses.asdict(built.ledger) | {"free_bytes": built.ledger.free_bytes} if built.ledger else None,
    }


class progress_bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, wanted: bool):
        self._bar: Any = None
        self._task: Any = None
        if wanted and sys.stderr.isatty():
            from rich.progress import Progress

            from runtime.cli.terminal import Terminal

            self._bar = Progress(console=Terminal(stderr=True), transient=True)

    def __enter__(self) -> Any:
        if self._bar is None:
            return None
        self._bar.start()
        self._task = self._bar.add_task("requests")
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def show(result: dict[str, Any], report: Report) -> None:
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    console = Terminal()
    for name, count in result.get("pools", {}).items():
        console.print(f"{count} devices, {name}")
    narrow = dict.fromkeys(result["formats"][name] for name in ("weights", "experts"))
    layout = " ".join(f"{k}{v}" for k, v in result["layout"].items() if v > 1) or "one device"
    console.print(
        f"[bold]{result['model']}[/] on {result['devices']} x {result['profile']}, {layout}, {result['engine']}, "
        f"weights {' and '.join(narrow)}, KV {result['formats']['kv']}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for heading in ("mean", "p50", "p90", "p99", "9 in 10 expected within"):
        table.add_column(heading, justify="right")
    for name in ("ttft", "tpot", "itl", "e2e", "queue"):
        stats, key = result[f"{name}_ms"], f"{name}_ms"
        inside = result["band"].get(key)
        cells = [f"{stats[k]:,.1f}" if stats[k] is not None else "-" for k in ("mean", "p50", "p90", "p99")]
        table.add_row(name.upper(), *cells, f"{inside[0]:,.1f} to {inside[1]:,.1f}" if inside else "")
    console.print(table)
    console.print(
        f"{report.output_tokens_per_s:,.0f} output tok/s, {report.output_tokens_per_s_per_device:,.1f} a device, "
        f"{report.output_tokens_per_s_per_user:,.1f} a user; {report.requests_per_s:.2f} requests/s"
    )
    console.print(
        f"KV pool {report.kv.pool_tokens:,} tokens, {report.kv.peak_fraction:.0%} at the peak; "
        f"{report.preemptions} preemptions; bound by {report.bottleneck}"
    )
    shares = sorted(result["share_by_op"].items(), key=lambda item: -item[1])[:6]
    console.print("time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    outside = f", {report.extrapolated:.0%} of steps outside the fits' range" if report.extrapolated else ""
    console.print(f"evidence: {report.evidence}{outside}")
    if report.saturated:
        console.print(f"[bold red]SATURATED[/] by {report.saturated_by}: requests wait for admission")
