"""What `glm5 simulate` prints: the JSON object, the table, and a progress bar on the way."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.deployment.demand import Demand
    from runtime.deployment.ledger import Ledger
    from runtime.deployment.plan import Transfer
    from runtime.serving import Deployment, Disaggregated, Report, Trace
    from runtime.simulation.build import Built, Spec


def result_of(spec: Spec, built: Built, report: Report, devices: int, replicas: int) -> dict[str, Any]:
    """The JSON object: what was simulated, the report, and the bands."""
    from runtime.simulation.trust import report_bands

    bands = report_bands(built, report, replicas)
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
            f"{name}_ms": bands[name].around(figures[f"{name}_ms"]["mean"])
            for name in ("ttft", "tpot")
            if figures[f"{name}_ms"]["mean"] is not None
        },
        "band_basis": {name: found.basis for name, found in bands.items()},
        "ledger": ledger_json(built.ledger),
    }


def load_of(demand: Demand, report: Report, trace: str = "", prefix_cache: bool = True) -> dict[str, Any]:
    """What of the JSON object is of the load, and whether what was asked is met: None where nothing was. trace: the
    description of one, whose requests are what they are. prefix_cache: the engine has one."""
    from runtime.planning.predict import missed

    as_drawn = bool(trace) or demand.turns > 1 or demand.length_cv is not None or bool(demand.histogram)
    if as_drawn:
        lengths = ([getattr(r, name) for r in report.requests] for name in ("prompt_tokens", "output_tokens"))
        ranges = [[min(each), max(each)] for each in lengths]
    else:
        ranges = [list(span) for span in demand.spans]
    uniform = not (trace or demand.histogram or demand.length_cv is not None)
    load = {"name": trace or demand.load, "length_ratio": demand.length_ratio if uniform else None}
    if not trace:
        load |= {"length_cv": demand.length_cv, "shared_prefix": demand.shared_prefix}
        load |= {"prefix_groups": demand.prefix_groups, "turns": demand.turns, "think_s": demand.think_s}
        load |= {"habits": demand.habits}
    load |= {"prompt_tokens": ranges[0], "output_tokens": ranges[1]}
    asked = not trace and (demand.rate is not None or demand.ttft_ms is not None or demand.tpot_ms is not None)
    notes = []
    if any(request.prefix_hashes for request in report.requests) and not prefix_cache:
        notes.append(NO_PREFIX_CACHE)
    if demand.tpot_ms is not None and demand.osl == 1:
        notes.append(f"answers have one token, hence no TPOT: the target of {demand.tpot_ms:g} ms does not count")
    if report.sustained is None and report.sent_per_s is not None:
        notes.append("the load is too short to tell whether it is kept up with")
    if report.steady_s is None:
        notes.append("the load is too short for a steady window: rates are of the whole run, ramp and drain included")
    short = missed(demand, report) if asked else []
    return {"load": load, "meets_targets": not short if asked else None, "missed": short, "notes": notes}


def pool_words(spec: Spec) -> str:
    """A pool of a deployment, in words, as a plan names its pools."""
    layout, kept = spec.layout.name, spec.formats
    return f"{spec.replicas} x {layout} on {spec.profile.name}, {kept.scheme.name}, KV {kept.kv}"


def pools_of(named: dict[str, tuple[int, Ledger | None]], moved: Transfer | None) -> dict[str, Any]:
    """What of the JSON object is of several pools: the devices and the memory of each, and what passes between them."""
    return {
        "transfer": transfer_json(moved) if moved else None,
        "pools": {name: devices for name, (devices, _) in named.items()},
        "ledgers": {name: ledger_json(held) for name, (_, held) in named.items()},
    }


def transfer_json(moved: Transfer) -> dict[str, Any]:
    """A transfer, of a token."""
    crossing = sum(route.bytes_per_token for route in moved.routes)
    seconds = moved.kv_bytes_per_token / moved.link_bandwidth_bytes_per_s + moved.conversion_seconds_per_token
    return {
        "kv_bytes_per_token": moved.kv_bytes_per_token,
        "copies": crossing / moved.kv_bytes_per_token,
        "link_bandwidth_bytes_per_s": moved.link_bandwidth_bytes_per_s,
        "link_latency_seconds": moved.link_latency_seconds,
        "seconds_per_token": seconds,
        "routes": [dataclasses.asdict(route) for route in moved.routes],
    }


def explained(recorder: Trace | None, report: Report, deployment: Deployment | Disaggregated) -> dict[str, Any]:
    """What of the JSON object says what the figures are made of, where that was asked for."""
    from runtime.serving import StepLog, explain

    if not isinstance(recorder, StepLog):
        return {}
    return {"explain": {name: each.to_json() for name, each in explain(recorder, report, deployment).items()}}


def show_explained(console: Console, parts_of: Mapping[str, Any]) -> None:
    """The parts of each figure, and below them where their prices come from."""
    from rich.table import Table

    sources: dict[str, int] = {}
    for name, figure in parts_of.items():
        title = name.removesuffix("_ms").upper()
        terms = " + ".join(f"{term} {ms:,.2f}" for term, ms in figure["terms_ms"].items() if ms)
        console.print(f"\n[bold]{title} {figure['mean_ms']:,.2f} ms[/] = {terms}")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("ms", "share"):
            table.add_column(heading, justify="right")
        for heading in ("term", "of", "evidence", "sources"):
            table.add_column(heading)
        shown = [part for part in figure["parts"] if part["share"] >= _LEAST_SHARE]
        for part in shown:
            cited = ", ".join(str(sources.setdefault(text, len(sources) + 1)) for text in part["sources"])
            cells = (f"{part['ms']:,.2f}", f"{part['share']:.1%}", part["term"], part["part"], part["evidence"], cited)
            table.add_row(*cells)
        if left := figure["mean_ms"] - sum(part["ms"] for part in shown):
            share = f"{left / figure['mean_ms']:.1%}"
            table.add_row(f"{left:,.2f}", share, "", f"{len(figure['parts']) - len(shown)} smaller parts, see --json")
        console.print(table)
    for text, number in sources.items():
        console.print(f"{number:>3}  {text}", markup=False)


def ledger_json(held: Ledger | None) -> dict[str, Any] | None:
    return dataclasses.asdict(held) | {"free_bytes": held.free_bytes} if held else None


class progress_bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, wanted: bool, what: str = "requests"):
        self._what = what
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
        self._task = self._bar.add_task(self._what)
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def show_assumed(console: Console, assumed: Sequence[str], of: str = "") -> None:
    """What nobody gave, a line each. of: which answer, where there are several."""
    if assumed:
        console.print(f"{of}: assumed for you, since nothing says it:".removeprefix(": "), markup=False)
    for line in assumed:
        console.print(f"  {line}", markup=False)


def show(result: dict[str, Any], report: Report) -> None:
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    console = Terminal()
    console.print(f"[bold]{result['model']}[/] on {deployment_words(result)}")
    for name, devices in result.get("pools", {}).items():
        console.print(f"{devices} devices, {name}")
    load = result["load"]
    if moved := result.get("transfer"):
        longest = load["prompt_tokens"][1]
        seconds = moved["link_latency_seconds"] + longest * moved["seconds_per_token"]
        size = moved["kv_bytes_per_token"] * longest / 1e9
        copies = "" if moved["copies"] < 1.001 else f" in {moved['copies']:.3g} copies"
        console.print(f"a prompt of {longest:,} tokens hands on {size:.2f} GB{copies} in {seconds * 1e3:,.1f} ms")
    lengths = (f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in (load[n] for n in _LENGTHS))
    ratio = f" (length ratio {load['length_ratio']:g})" if load["length_ratio"] not in (None, 1) else ""
    said = "".join(f"; {habit}" for habit in load.get("habits", ()))
    console.print(f"{load['name']}, {' tokens in and '.join(lengths)} out{ratio}{said}", markup=False)
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
    each = report.output_tokens_per_s_per_user
    user = "" if math.isnan(each) else f", {each:,.1f} a user"
    sent = "" if report.sent_per_s is None else f" of {report.sent_per_s:.3g} sent"
    over = "" if report.steady_s is None else f", over a steady {report.steady_s:,.0f} s"
    console.print(
        f"{report.output_tokens_per_s:,.0f} output tok/s, {report.output_tokens_per_s_per_device:,.1f} a device{user}; "
        f"{report.requests_per_s:.3g} requests/s{sent}{over}"
    )
    console.print(
        f"KV pool {report.kv.pool_tokens:,} tokens, {report.kv.peak_fraction:.0%} at the peak; "
        f"{report.preemptions} preemptions; bound by {report.bottleneck}"
    )
    if any(request.prefix_hashes for request in report.requests):  # prompts that may share a beginning
        console.print(prefix_words(report.prefix_hit_rate, report.prefix_hits))
    shares = sorted(result["share_by_op"].items(), key=lambda item: -item[1])[:6]
    console.print("time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    outside = f", {report.extrapolated:.0%} of steps outside the fits' range" if report.extrapolated else ""
    console.print(f"evidence: {report.evidence}{outside}")
    if basis := result.get("band_basis", {}).get("tpot"):
        console.print(f"bands: {basis}")
    show_assumed(console, report.assumed)
    show_explained(console, result.get("explain", {}))
    if report.saturated:
        why = "the backlog grows" if report.sustained is False else "requests wait for admission"
        console.print(f"[bold red]SATURATED[/] by {report.saturated_by}: {why}")
    if result["missed"]:
        console.print(f"[bold red]misses its targets[/]: {'; '.join(result['missed'])}")
    for note in result["notes"]:
        console.print(f"note: {note}")


def prefix_words(rate: float, hits: Mapping[str, float]) -> str:
    """What the prefix cache found, and where, if there is more than one tier."""
    tiers = ", ".join(f"{name} {share:.1%}" for name, share in hits.items()) if len(hits) > 1 else ""
    return f"prefix cache: {rate:.1%} of prompt tokens found in it{f' ({tiers})' if tiers else ''}"


NO_PREFIX_CACHE = "the engine's prefix cache is off (engine.prefix_cache): what prompts share is computed each time"
_LEAST_SHARE = 0.001
"""Of a figure, from which a part of it is printed."""
_LENGTHS = ("prompt_tokens", "output_tokens")


def deployment_words(result: Mapping[str, Any]) -> str:
    """The devices, the layout, the engine and the formats, of one pool; the devices and the engine of two."""
    devices = f"{result['devices']} x {result['profile']}"
    if len(result.get("pools", ())) > 1:
        return f"{devices}, prefill and decode apart, {result['engine']}"
    narrow = dict.fromkeys(result["formats"][name] for name in ("weights", "experts"))
    layout = " ".join(f"{k}{v}" for k, v in result["layout"].items() if v > 1) or "one device"
    weights = f"weights {' and '.join(narrow)}, KV {result['formats']['kv']}"
    return f"{devices}, {layout}, {result['engine']}, {weights}"
