"""The page of one plan: `glm5 plan --html FILE`.

The answer first, then what it promises, what each device holds, where experts and cache go, what else was looked at
and why it was left, and the commands that start it. Works from the plan alone: nothing is priced or simulated here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from foundation.writing import replacing
from hw_profiles.errors import ProfileError
from model.config import ModelConfig
from runtime.deployment.errors import PlanError
from runtime.deployment.plan import Alternative, Plan, Predicted
from runtime.deployment.pool import Pool
from runtime.planning.launch import LAUNCHED_ENGINES, launch
from runtime.reports import svg
from runtime.reports.page import EVIDENCE, SATURATED, SCREEN, assumed_list, cards, count, document, ms, section
from runtime.reports.plan_devices import devices_section, layout_section
from runtime.reports.plan_experts import experts_section
from runtime.reports.plan_kv import kv_section
from runtime.reports.svg import Series

_ROWS = 12  # of a table before the rest folds away
_NODES = 2  # whose commands are shown
_ROLE = {"serve": "Serve", "prefill": "Prefill", "decode": "Decode"}


def write_page(path: Path, plan: Plan, cfg: ModelConfig) -> None:
    """Writes the page, whole or not at all. Raises `UsageError` where the file cannot be written."""
    text = page(plan, cfg)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(plan: Plan, cfg: ModelConfig) -> str:
    """The page's HTML."""
    chips = " + ".join(f"{len(pool.devices)} x {pool.profile}" for pool in plan.pools)
    nodes = 1 + max(device.node for device in plan.devices)
    idle = f" · {plan.idle_devices} devices given stay idle" if plan.idle_devices else ""
    subtitle = f"{_demand(plan)} · {nodes} node{'s' if nodes > 1 else ''}{idle} · plan {plan.hash[:12]}"
    sections = [
        _answer(plan),
        _cards(plan),
        section("Predicted", _predicted(plan)),
        section("Memory of the devices", devices_section(plan)),
        section("Which device holds what", layout_section(plan, cfg)),
        section("Experts", experts_section(plan, cfg)),
        section("KV cache", kv_section(plan, cfg)),
        section("What else was looked at", _alternatives(plan)),
        section("Left out, and why", _rejected(plan)),
        section("Start it", _launch(plan, cfg)),
    ]
    return document("Deployment plan", f"{plan.model.name} on {chips}", subtitle, sections)


def _demand(plan: Plan) -> str:
    demand = plan.demand
    return f"{demand.lengths} · {demand.load} · best {demand.objective}"


# --- the answer ------------------------------------------------------------------------------------------


def _answer(plan: Plan) -> str:
    """In words: what to run, and whether it does what was asked."""
    steps = []
    for pool in plan.pools:
        what = "replica" if pool.replicas == 1 else "replicas"
        steps.append(
            f"<b>{_ROLE[pool.role]}</b> with {pool.replicas} {what} of {_degrees(pool)}: {escape(_split(pool))}, "
            f"weights {escape(pool.scheme)}, KV cache {escape(pool.formats.kv)}, under {escape(pool.engine)}"
            f"{_settings(pool)}"
        )
    return "".join(f'<p class="answer">{step}.</p>' for step in steps) + _verdict(plan)


def _degrees(pool: Pool) -> str:
    layout = pool.layout
    count_ = layout.devices
    return f"{count_} device{'s' if count_ > 1 else ''} ({escape(layout.name)})"


def _settings(pool: Pool) -> str:
    """The engine's settings that the plan sets."""
    found = ", ".join(f"{name} {value}" for name, value in pool.settings.items())
    return f" with {escape(found)}" if found else ""


def _split(pool: Pool) -> str:
    """The layout in words."""
    layout = pool.layout
    parts = []
    if layout.tp > 1:
        parts.append(f"attention heads over {layout.tp} devices")
    if layout.dp > 1:
        parts.append(f"requests over {layout.dp} groups")
    if layout.grouped:
        parts.append(f"experts over {layout.ep} groups, in a group each cut over {layout.expert_tensor_parts} devices")
    elif layout.by_expert:
        parts.append(f"experts over {layout.ep} devices")
    elif layout.stage_devices > 1:
        parts.append(f"each expert cut over {layout.stage_devices}")
    if layout.pp > 1:
        parts.append(f"layers over {layout.pp} stages")
    if pool.drafts:
        parts.append(f"{pool.drafts} drafts a step")
    return ", ".join(parts) or "the whole model on each device"


def _verdict(plan: Plan) -> str:
    found, demand = plan.predicted, plan.demand
    if found is None:
        return '<p class="quiet">A plan made for a given layout: nothing was searched, priced or simulated.</p>'
    wants = [f"{demand.rate:g} requests/s"] if demand.rate is not None else []
    wants += demand.wants()
    out = ""
    if wants and found.meets_targets:
        out += f'<p class="good">Meets what was asked: {" and ".join(wants)}.</p>'
    elif wants:
        why = "; ".join(found.missed(demand))
        said = " and ".join(wants) + (f" ({why})" if why else "")
        out += f'<p class="banner"><strong>Misses what was asked</strong>: {said}.</p>'
    if found.saturated_by:
        why = SATURATED.get(found.saturated_by, found.saturated_by)
        out += f'<p class="banner"><strong>Saturated</strong>: {escape(why)}. More load only lengthens the queue.</p>'
    return out


def _within(found: Predicted, name: str) -> str:
    inside = found.band.get(f"{name}_ms")
    return f"expected {ms(inside[0])} to {ms(inside[1])}" if inside else ""


def _cards(plan: Plan) -> str:
    pool, found = plan.serving, plan.predicted
    ranks = pool.layout.dp * pool.replicas
    pages = f"{pool.kv_pages:,} pages a rank, {ranks} ranks"
    holds = ("KV cache in all", f"{pool.pool_tokens * ranks:,} tokens", pages)
    if found is None:
        fullest = min(plan.devices, key=lambda device: device.ledger.free_bytes)
        free = ("Least left free", f"{fullest.ledger.free_bytes / 1e9:.1f} GB", f"device {fullest.index}")
        return cards([holds, free])
    flying = found.concurrency or math.ceil(found.requests_per_s * (found.e2e_ms["mean"] or 0.0) / 1e3)
    load = f"{flying:,} in flight" + ("" if found.concurrency else " on average")
    return cards(
        [
            ("Time to first token", ms(found.ttft_ms["mean"]), _within(found, "ttft")),
            ("Time per output token", ms(found.tpot_ms["mean"]), _within(found, "tpot")),
            ("Output", count(found.output_tokens_per_s, " tok/s"), f"{count(found.requests_per_s)} requests/s"),
            ("A device", count(found.output_tokens_per_s_per_device, " tok/s"), f"bound by {found.bottleneck or '–'}"),
            ("A user", count(found.output_tokens_per_s_per_user or math.nan, " tok/s"), load),
            (*holds[:2], f"{found.kv_peak_fraction:.0%} of it in use at the peak"),
        ]
    )


def _predicted(plan: Plan) -> str:
    found = plan.predicted
    if found is None:
        return ""
    rows = []
    for name, stats, meaning in (
        ("ttft", found.ttft_ms, "time to the first token"),
        ("tpot", found.tpot_ms, "time per output token after it"),
        ("e2e", found.e2e_ms, "from sending to the last token"),
    ):
        cells = "".join(f"<td>{ms(stats.get(key))}</td>" for key in ("mean", "p50", "p90", "p99"))
        inside = _within(found, name).removeprefix("expected ")
        rows.append(f'<tr><th>{name.upper()} <span class="quiet">{meaning}</span></th>{cells}<td>{inside}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in ("mean", "p50", "p90", "p99", "mean expected within"))
    table = f'<table class="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    far = (
        f"{found.extrapolated:.0%} of the steps lie outside the sizes that prices were fitted on."
        if found.extrapolated
        else "No step lies outside the sizes that prices were fitted on."
    )
    sure = (
        f'<p class="quiet">By the serving simulator, {found.requests_simulated:,} requests. Evidence: '
        f"<b>{escape(found.evidence)}</b>. {escape(EVIDENCE.get(found.evidence, ''))} {far} The band should hold the "
        "measured mean nine times in ten.</p>"
    )
    return table + _found(plan, found) + sure + assumed_list(found.assumed)


def _found(plan: Plan, found: Predicted) -> str:
    """What the prefix cache found, and where, of a load whose prompts begin alike."""
    if not plan.demand.shares:
        return ""
    hits = found.prefix_hits
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{share:.1%}</td></tr>" for name, share in hits.items())
    head = "<tr><th>found in</th><th>prompt tokens</th></tr>"
    tiers = f'<table class="figures"><thead>{head}</thead><tbody>{rows}</tbody></table>' if len(hits) > 1 else ""
    return f"<p>Prefix cache: <b>{found.prefix_hit_rate:.1%}</b> of the prompt tokens are found in it.</p>{tiers}"


# --- what else -------------------------------------------------------------------------------------------


def _alternatives(plan: Plan) -> str:
    rows = plan.alternatives
    if not rows:
        return ""

    def at(each: Sequence[Alternative]) -> list[tuple[float, float]]:
        rates = ((row.output_tokens_per_s_per_user, row.output_tokens_per_s_per_device) for row in each)
        return sorted((user, device) for user, device in rates if user is not None)

    estimated = [row for row in rows if not row.simulated]
    groups = [
        Series("estimated, the front", at([row for row in estimated if row.front]), "line"),
        Series("estimated", at(estimated), "dots"),
        Series("simulated", at([row for row in rows if row.simulated and not row.chosen]), "dots"),
        Series("this plan", at([row for row in rows if row.chosen]), "dots", radius=7.0),
    ]
    kept = [group for group in groups if group.points]
    drawn = svg.plot(kept, "tok/s a user: faster for each", "tok/s a device: cheaper", 860, 340)
    figure = (
        "<figure><figcaption>Tokens a second of a device (up) against those of a user (right) "
        f"{svg.legend([group.name for group in kept])}</figcaption>{drawn}</figure>"
    )
    return figure + _folded([_alternative(row) for row in rows], _HEAD, "alternatives", "figures named")


_HEAD = "".join(
    f"<th>{name}</th>"
    for name in ("", "load", "tok/s a device", "tok/s a user", "TTFT", "TPOT", "targets", "how known")
)


def _alternative(row: Alternative) -> str:
    name = f"<b>{escape(row.name)}</b> (this plan)" if row.chosen else escape(row.name)
    known = "simulated" if row.simulated else "estimate"
    user = row.output_tokens_per_s_per_user or math.nan
    cells = (
        count(row.concurrency), count(row.output_tokens_per_s_per_device), count(user),
        ms(row.ttft_ms), ms(row.tpot_ms), "met" if row.meets_targets else "missed", known,
    )  # fmt: skip
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _folded(rows: Sequence[str], head: str, what: str, cls: str = "figures", printed: bool = True) -> str:
    """A table whose rows past the first few open on a click; on paper they are open, or counted if not `printed`."""
    table = f'<table class="{cls}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows[:_ROWS])}</tbody></table>'
    rest = rows[_ROWS:]
    if rest:
        begin = "<details><summary>" if printed else SCREEN.format("the plan file has them")
        table += (
            f"{begin}{len(rest)} more {what}</summary>"
            f'<table class="{cls}"><tbody>{"".join(rest)}</tbody></table></details>'
        )
    return table


def _rejected(plan: Plan) -> str:
    if not plan.rejected:
        return ""
    rows = [
        f"<tr><th>{escape(each.name)}</th><td>{escape(each.reason.partition(chr(10))[0])}</td></tr>"
        for each in plan.rejected
    ]
    return _folded(rows, "<th>layout</th><th>reason</th>", "candidates", "figures reasons", printed=False)


def _launch(plan: Plan, cfg: ModelConfig) -> str:
    parts = []
    engines = list(dict.fromkeys(pool.engine for pool in plan.pools))
    own = engines[0] if len(engines) == 1 and engines[0] in LAUNCHED_ENGINES else None
    for engine in [None, *(name for name in LAUNCHED_ENGINES if name != own)]:
        label = f"{' and '.join(engines)}, as planned" if engine is None else engine
        try:
            made = launch(plan, cfg, engine)
        except (PlanError, ProfileError) as error:
            if engine is None:
                parts.append(f'<p class="quiet">{escape(label)}: {escape(str(error))}</p>')
            continue
        shown = made.nodes[:_NODES]
        text = "\n".join(f"# ---- on node {node}\n{made.script(node)}" for node in shown)
        if len(made.nodes) > len(shown):
            text += f"\n# ---- and {len(made.nodes) - len(shown)} more nodes: glm5 plan launch prints them all\n"
        if made.router:
            text += f"\n# ---- on any machine\n{made.router.text()}\n"
        notes = "".join(f"<li>{escape(remark)}</li>" for remark in made.remarks)
        body = f"<ul class='quiet'>{notes}</ul><pre>{escape(text)}</pre>"
        opened = " open" if engine is None else ""
        parts.append(f"<details{opened}><summary>{escape(label)}</summary>{body}</details>")
    return "".join(parts)
