"""A plan's KV cache: pages and tiers, who holds what, when fetching beats computing again, what a transfer takes."""

from __future__ import annotations

from html import escape

from model.config import ModelConfig
from runtime.deployment.kv import PoolKv
from runtime.deployment.plan import Plan, Transfer
from runtime.deployment.pool import Pool
from runtime.planning.kv_tiers import plan_kv
from runtime.reports import svg
from runtime.reports.page import gb, ms
from runtime.reports.svg import Mark, Series

_ROUTES = 16
"""Of a transfer, that are listed."""
_SHOWN_TOKENS = 8192  # of the break-even's curve at least
_KNOWN = {"latent": "latents", "index": "index keys", "key": "keys", "value": "values"}


def kv_section(plan: Plan, cfg: ModelConfig) -> str:
    found = plan.kv or plan_kv(plan, cfg)
    out = [_pool(pool, kv) for pool, kv in zip(plan.pools, found, strict=True)]
    return "".join(out) + _transfer(plan)


def _pool(pool: Pool, kv: PoolKv) -> str:
    now = kv.sharding[0]
    text = (
        f"A request of the longest lengths takes {kv.request_tokens:,} tokens of cache; a replica holds "
        f"<b>{now.resident_requests:,}</b> such requests at once, {now.resident_requests * pool.replicas:,} in all."
    )
    tables = f'<div class="two"><div>{_tiers(pool, kv)}</div><div>{_held(pool, kv)}</div></div>'
    return f"<h3>{escape(pool.role)}</h3><p>{text}</p>{tables}{_break_even(pool, kv)}"


def _tiers(pool: Pool, kv: PoolKv) -> str:
    rows = "".join(
        f"<tr><th>{escape(tier.name)}</th><td>{gb(tier.bytes_per_device)}</td><td>{tier.pages:,}</td><td>{tier.tokens:,}</td>"
        f"<td>{tier.replica_tokens:,}</td><td>{tier.bandwidth_bytes_per_s / 1e9:,.0f} GB/s</td></tr>"
        for tier in kv.tiers
    )
    head = "".join(f"<th>{h}</th>" for h in ("tier", "a device", "pages", "tokens a rank", "a replica", "rate"))
    note = (
        "Prompts are kept in all of them, and fetched over each device's own link."
        if pool.offload.asked
        else "The host tier is no part of the plan (--kv-host-gb): twice the device's pool, over its own host link."
        if len(kv.tiers) > 1
        else "No host tier: the profile has no link.host.bandwidth_bytes_per_s; supply it with --set."
    )
    return (
        f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="quiet">Pages of {kv.page_tokens} tokens. {note}</p>'
    )


def _held(pool: Pool, kv: PoolKv) -> str:
    """Who holds what, and what context parallelism would change."""
    kinds = "; ".join(
        f"{_KNOWN.get(share.cache, share.cache)} {share.bytes_per_token:,.0f} bytes a token, "
        + (f"whole on each of {share.copies} tp ranks" if share.copies > 1 else "one copy")
        for share in kv.shares
    )
    rows = "".join(
        f"<tr><th>{'as planned' if each.degree == 1 else f'{each.degree}-way context parallel'}</th>"
        f"<td>{each.copies}</td><td>{each.replica_tokens:,}</td><td>{each.resident_requests:,}</td></tr>"
        for each in kv.sharding
    )
    head = "".join(f"<th>{h}</th>" for h in ("over a tp group", "copies", "tokens a replica", "requests at once"))
    if len(kv.sharding) > 1:
        kinds += (
            ". Context parallelism, no part of the plan, deals pages out instead of copying them: "
            "--decode-context-parallel-size of vLLM and vllm-ascend"
        )
    groups = f" The {pool.layout.dp} dp groups hold different sequences." if pool.layout.dp > 1 else ""
    return (
        f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="quiet">{escape(kinds[:1].upper() + kinds[1:])}.{groups}</p>'
    )


def _break_even(pool: Pool, kv: PoolKv) -> str:
    if not kv.curve:
        return ""
    if kv.break_even_tokens is None:
        answer = f"Computing a prefix again is faster than fetching it, up to {kv.curve[-1].tokens:,} tokens."
    elif kv.break_even_tokens <= kv.page_tokens:
        answer = "Fetching a prefix from host memory is no slower than computing it again, from one page on."
    else:
        answer = (
            f"From a prefix of <b>{kv.break_even_tokens:,} tokens</b> on, fetching it from host memory is no slower "
            "than computing it again; shorter ones hide under what a prefill step takes anyway."
        )
    limit = max(4 * kv.break_even_tokens, _SHOWN_TOKENS) if kv.break_even_tokens else kv.curve[-1].tokens
    points = [point for point in kv.curve if point.tokens <= limit] or list(kv.curve)
    series = [
        Series("compute again", [(p.tokens, p.recompute_seconds * 1e3) for p in points]),
        Series("fetch", [(p.tokens, p.fetch_seconds * 1e3) for p in points]),
    ]
    marks = [Mark(float(kv.break_even_tokens), f"{kv.break_even_tokens:,} tokens")] if kv.break_even_tokens else []
    drawn = svg.plot(series, "tokens of the prefix", "ms", 860, 260, marks=marks)
    longest = kv.curve[-1]
    return (
        "<figure><figcaption>A cached prefix: ms to the first token that it costs to compute it again or to fetch it "
        f"{svg.legend([s.name for s in series])}</figcaption>"
        f"{drawn}<p>{answer}</p><p class='quiet'>At {longest.tokens:,} tokens: {ms(longest.recompute_seconds * 1e3)} "
        f"against {ms(longest.fetch_seconds * 1e3)}. Evidence: {escape(kv.evidence)}.</p></figure>"
    )


def _transfer(plan: Plan) -> str:
    moved = plan.transfer
    if moved is None:
        return ""
    rate = moved.link_bandwidth_bytes_per_s / 1e9
    convert = moved.conversion_seconds_per_token * plan.demand.longest[0] * 1e3
    return (
        f"<h3>from prefill to decode</h3><p>A prompt of {plan.demand.longest[0]:,} tokens moves "
        f"<b>{moved.bytes / 1e6:,.0f} MB</b> in <b>{ms(moved.seconds * 1e3)}</b>: {moved.kv_bytes_per_token:,.0f} "
        f"bytes a copy and token at {rate:,.0f} GB/s, as the busiest port lets it, {convert:,.2f} ms to convert it.</p>"
        f"{_routes(moved)}"
    )


def _routes(moved: Transfer) -> str:
    """Which rank sends to which, as a table."""
    rows = "".join(
        f"<tr><td>{route.source}</td><td>{route.target}</td><td>{route.bytes_per_token:,.0f}</td></tr>"
        for route in moved.routes[:_ROUTES]
    )
    left = len(moved.routes) - _ROUTES
    more = f"<p class='quiet'>And {left} more.</p>" if left > 0 else ""
    head = "<tr><th>prefill rank</th><th>decode rank</th><th>bytes a token</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>{more}"
