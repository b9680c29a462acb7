"""The page of one simulated run: `glm5 simulate --html FILE`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from foundation.writing import replacing
from runtime.reports import svg
from runtime.reports.page import EVIDENCE, SATURATED, assumed_list, cards, count, document, gb, ms, section
from runtime.reports.svg import Mark, Series
from runtime.serving import Report
from runtime.serving.pricing import BOUNDS

_POINTS = 500  # of a curve: more than a screen shows apart
_DOTS = 1500
_LATENCIES = (
    ("ttft", "TTFT", "time to the first token"),
    ("tpot", "TPOT", "time per output token after it"),
    ("itl", "ITL", "gap between two steps of one request"),
    ("e2e", "E2E", "from sending to the last token"),
    ("queue", "Queue", "waiting for admission, a part of TTFT"),
)


def write_page(path: Path, result: Mapping[str, Any], report: Report) -> None:
    """Writes the page, whole or not at all.

    result: the JSON object of `glm5 simulate`. Raises `UsageError` where the file cannot be written.
    """
    text = page(result, report)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(result: Mapping[str, Any], report: Report) -> str:
    """The page's HTML."""
    title = f"{result['model']} on {result['devices'] or ''} x {result['profile']}".replace("  ", " ")
    pools = list(result.get("pools", ()))
    if len(pools) > 1:
        what = " · ".join([*pools, f"engine {result['engine']}"])
    else:
        degrees = " ".join(f"{name}{degree}" for name, degree in result["layout"].items() if degree > 1)
        formats = result["formats"]
        what = (
            f"{degrees or 'one device'} · engine {result['engine']} · weights {formats['weights']}, experts "
            f"{formats['experts']}, KV {formats['kv']}"
        )
    subtitle = f"{what} · {_load(result)}{report.measured_requests:,} requests measured"
    sections = [
        _banner(result, report),
        _cards(result, report),
        section("Latency", _latency_table(result) + _distributions(report)),
        section("Over time", _timeline(report)),
        section("Where the time goes", _time(report)),
        section("Memory of a device", _memory(result)),
        section("Requests", _scatter(report)),
        section("How sure", _sure(result, report)),
        section("All figures", f"<details><summary>JSON</summary><pre>{_json(result)}</pre></details>"),
    ]
    return document("Simulated serving", title, subtitle, sections)


def _load(result: Mapping[str, Any]) -> str:
    load = result.get("load")
    if not load:
        return ""
    ranges = (load["prompt_tokens"], load["output_tokens"])
    lengths = (f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in ranges)
    habits = "".join(f"; {habit}" for habit in load.get("habits", ()))
    return f"{load['name']}, {' tokens in and '.join(lengths)} out{habits} · "


def _json(result: Mapping[str, Any]) -> str:
    return escape(json.dumps(result, indent=2, default=str))


# --- sections --------------------------------------------------------------------------------------------


def _banner(result: Mapping[str, Any], report: Report) -> str:
    missed = "; ".join(result.get("missed", ()))
    out = f'<p class="banner"><strong>Misses what was asked</strong>: {escape(missed)}.</p>' if missed else ""
    out += "".join(f'<p class="quiet">{escape(note.capitalize())}.</p>' for note in result.get("notes", ()))
    if not report.saturated:
        return out
    why = SATURATED.get(report.saturated_by, report.saturated_by)
    return out + (
        f'<p class="banner"><strong>Saturated</strong> ({escape(report.saturated_by)}): {escape(why)}. More load only '
        "lengthens the queue, and waiting times depend on how long the run lasts.</p>"
    )


def _cards(result: Mapping[str, Any], report: Report) -> str:
    band = result.get("band", {})

    def within(name: str) -> str:
        inside = band.get(f"{name}_ms")
        return f"expected {ms(inside[0])} to {ms(inside[1])}" if inside else ""

    return cards(
        [
            ("Time to first token", ms(result["ttft_ms"]["mean"]), within("ttft")),
            ("Time per output token", ms(result["tpot_ms"]["mean"]), within("tpot")),
            ("Output", count(report.output_tokens_per_s, " tok/s"), f"{count(report.requests_per_s)} requests/s"),
            ("A device", count(report.output_tokens_per_s_per_device, " tok/s"),
             f"bound by {report.bottleneck or '–'}"),
            ("A user", count(report.output_tokens_per_s_per_user, " tok/s"),
             f"{count(report.mean_in_system)} in the system on average"),
            ("KV pool at its peak", f"{report.kv.peak_fraction:.0%}", f"of {report.kv.pool_tokens:,} tokens"),
        ]
    )  # fmt: skip


def _latency_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, short, meaning in _LATENCIES:
        stats, inside = result[f"{name}_ms"], result.get("band", {}).get(f"{name}_ms")
        cells = "".join(f"<td>{ms(stats[key])}</td>" for key in ("mean", "p50", "p90", "p99"))
        expected = f"{ms(inside[0])} to {ms(inside[1])}" if inside else ""
        rows.append(f'<tr><th>{short} <span class="quiet">{meaning}</span></th>{cells}<td>{expected}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in ("mean", "p50", "p90", "p99", "mean expected within"))
    return f'<table class="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _distributions(report: Report) -> str:
    requests = report.requests
    several = [r for r in requests if r.output_tokens > 1]
    plots = (
        ("Time to first token", [r.first_token_at - r.sent_at for r in requests]),
        ("Time per output token", [(r.finished_at - r.first_token_at) / (r.output_tokens - 1) for r in several]),
        ("End to end", [r.finished_at - r.sent_at for r in requests]),
    )
    return f'<div class="three">{"".join(_cdf(name, values) for name, values in plots)}</div>'


def _cdf(name: str, seconds: Iterable[float]) -> str:
    values = sorted(value for value in seconds if math.isfinite(value))
    scale, unit = (1.0, "s") if values and values[-1] >= 1.0 else (1e3, "ms")
    count = len(values)
    kept = sorted({round(i * (count - 1) / _POINTS) for i in range(_POINTS + 1)}) if count else []
    points = [(values[i] * scale, (i + 1) / count) for i in kept]
    marks = [Mark(values[int(share * (count - 1))] * scale, f"p{share * 100:.0f}") for share in (0.5, 0.9) if count > 1]
    points = [(points[0][0], 0.0), *points] if points else []
    drawn = svg.plot([Series(name, points)], unit, "share of requests", 380, 240, 1.0, True, marks)
    return f"<figure><figcaption>{name}</figcaption>{drawn}</figure>"


def _timeline(report: Report) -> str:
    """Sums over servers at each moment, thinned to the largest value of each slot of time."""
    running: dict[int, int] = {}
    waiting: dict[int, int] = {}
    used: dict[int, float] = {}
    rows: list[tuple[float, ...]] = []
    start = report.timeline[0][0] if report.timeline else 0.0
    for at, server, in_service, queued, share in report.timeline:
        running[server], waiting[server], used[server] = in_service, queued, share
        mean = sum(used.values()) / len(used)
        rows.append((at - start, float(sum(running.values())), float(sum(waiting.values())), mean))
    rows = _thinned(rows)
    columns = [[(row[0], row[i]) for row in rows] for i in (1, 2, 3)]
    queue = svg.plot(
        [Series("in service", columns[0], "stairs"), Series("waiting", columns[1], "stairs")], "seconds", "requests"
    )
    kv = svg.plot(
        [Series("KV pages in use", columns[2], "stairs", True)], "seconds", "share of the pool", y_max=1.0, percent=True
    )
    return (
        f'<div class="two"><figure><figcaption>Requests {svg.legend(["in service", "waiting"])}</figcaption>{queue}'
        f"</figure><figure><figcaption>KV pool in use</figcaption>{kv}</figure></div>"
    )


def _thinned(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    size = max(1, math.ceil(len(rows) / _POINTS))
    slots = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [(slot[0][0], *(max(row[c] for row in slot) for c in range(1, len(slot[0])))) for slot in slots]


def _time(report: Report) -> str:
    bound, ops = report.seconds_by_bound, report.seconds_by_op
    total = sum(bound.values()) or 1.0
    ordered = sorted(bound, key=lambda name: BOUNDS.index(name) if name in BOUNDS else len(BOUNDS))
    by_bound = svg.stacked([(name, bound[name], f"{bound[name] / total:.0%}") for name in ordered])
    whole = sum(ops.values()) or 1.0
    largest = max(ops.values(), default=0.0) or 1.0
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th>"
        f'<td class="bar"><b style="width:{100 * s / largest:.2f}%"></b></td>'
        f"<td>{s / whole:.1%}</td><td>{count(s, ' s')}</td></tr>"
        for name, s in sorted(ops.items(), key=lambda item: -item[1])
        if s > 1e-4 * whole
    )
    steps = ", ".join(f"{count:,} {kind}" for kind, count in report.steps.items()) or "none"
    return (
        f'<div class="two"><div><h3>By what limits it</h3>{by_bound}<p class="quiet">Steps: {escape(steps)}. '
        f"Preemptions: {report.preemptions:,}. Prompt tokens found in the prefix cache: "
        f"{report.prefix_hit_rate:.0%}.</p>"
        f'</div><div><h3>By operation</h3><table class="bars"><tbody>{rows}</tbody></table></div></div>'
    )


def _memory(result: Mapping[str, Any]) -> str:
    ledgers = result.get("ledgers", {})
    if len(ledgers) > 1:
        parts = (f"<h3>{escape(name)}</h3>{_memory_of(held, 0)}" for name, held in ledgers.items() if held)
        pool = f"{result['kv']['pool_tokens']:,} tokens of cache where requests decode."
        return "".join(parts) + f'<p class="quiet">{pool}</p>'
    ledger = result.get("ledger")
    return _memory_of(ledger, result["kv"]["pool_tokens"]) if ledger else ""


def _memory_of(ledger: Mapping[str, Any], pool: int) -> str:
    """A bar of one device's memory. pool: tokens of cache in all, 0 where that is said elsewhere."""
    weights = sorted(ledger["weights_bytes"].items(), key=lambda item: -item[1])
    parts = [(f"weights: {name.replace('_', ' ')}", size) for name, size in weights[:3]]
    if len(weights) > 3:
        parts.append(("weights: the rest", sum(size for _, size in weights[3:])))
    parts += [
        ("KV pool", ledger["kv_bytes"]),
        ("activations", ledger["activation_bytes"]),
        ("engine's workspaces", ledger.get("workspace_bytes", 0.0)),
        ("communication buffers", ledger["communication_bytes"]),
        ("driver and runtime", ledger["runtime_bytes"]),
        ("left free", ledger["free_bytes"]),
    ]
    bar = svg.stacked([(name, size, gb(size)) for name, size in parts])
    holds = f"; the pool holds {pool:,} tokens" if pool else ""
    return (
        f'{bar}<p class="quiet">{gb(ledger["usable_bytes"])} usable of {gb(ledger["capacity_bytes"])}. A token takes '
        f"{count(ledger['kv_bytes_per_token'])} bytes of KV cache on each device that holds its sequence{holds}.</p>"
    )


def _scatter(report: Report) -> str:
    requests = report.requests
    step = max(1, math.ceil(len(requests) / _DOTS))
    shown = requests[::step]
    prompts = [(float(r.prompt_tokens), r.first_token_at - r.sent_at) for r in shown]
    answers = [(float(r.output_tokens), r.finished_at - r.sent_at) for r in shown]
    start = min((r.sent_at for r in requests), default=0.0)
    sent = [(r.sent_at - start, r.first_token_at - r.sent_at) for r in shown]
    plots = (
        (
            "TTFT by prompt length",
            svg.plot([Series("TTFT", prompts, "dots")], "prompt tokens", "s", 380, 240, from_zero=False),
        ),
        (
            "End to end by answer length",
            svg.plot([Series("E2E", answers, "dots")], "output tokens", "s", 380, 240, from_zero=False),
        ),
        ("TTFT by time of sending", svg.plot([Series("TTFT", sent, "dots")], "seconds into the run", "s", 380, 240)),
    )
    figures = "".join(f"<figure><figcaption>{name}, seconds</figcaption>{drawn}</figure>" for name, drawn in plots)
    note = f'<p class="quiet">Every {step}th request is shown.</p>' if step > 1 else ""
    return f'<div class="three">{figures}</div>{note}'


def _sure(result: Mapping[str, Any], report: Report) -> str:
    lines = [f"<b>Evidence: {escape(report.evidence)}.</b> {EVIDENCE.get(report.evidence, '')}"]
    if report.assumed:
        lines.append(assumed_list(report.assumed))
    for name, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
        inside, mean = result.get("band", {}).get(f"{name}_ms"), result[f"{name}_ms"]["mean"]
        if inside and mean:
            lines.append(
                f"<b>{title}:</b> nine times in ten the measured mean should lie between {ms(inside[0])} and "
                f"{ms(inside[1])}, a factor of {inside[1] / mean:.2f} either way."
            )
    lines.append(
        f"<b>Outside the range of a fit:</b> {report.extrapolated:.0%} of the steps looked at."
        if report.extrapolated
        else "<b>Range:</b> no step lies outside the sizes that prices were fitted on."
    )
    lines.append(
        "The band joins the held-out error of the operator prices, what an engine's description cannot know of a "
        "release and its settings, and what is not measured on this chip. Requests are drawn at random from a seed: "
        "percentiles of few requests move with it."
    )
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"
