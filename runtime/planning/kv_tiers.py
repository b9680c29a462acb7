"""Where the KV cache lives and who holds what: device and host tiers, tp, dp and context parallelism.

Sharing. Under tp every rank keeps the whole latent and index key of its sequences (MLA has one of each a token,
not one a head), so a replica holds tp copies; KV heads of GQA are split over tp, one copy. Ranks under dp hold
different sequences. Context parallelism over a tp group deals its pages out instead of copying them: c ranks hold
c times the tokens, and attention gathers what the others hold.

Tiers. Each device fetches its own pages over its own host link, all at once, as engines do (every tp rank keeps its
own host pool): seconds = latency + tokens x bytes a token on that device / link. No copy is shared, and the link is
taken at its full rate.

Break-even. A prompt of L cached tokens and one page of new ones is either computed whole, or its L tokens are
fetched and the page is computed behind them:

    recompute(L) = prefill(L + page) - prefill(page behind L)       fetch(L) as above

in steps of the engine's chunk, each as long as the pricer and the engine's host time make it. The break-even length
is the shortest prefix from which on fetching is no slower. It is short where a step has a floor (launches, reading
all weights) that a short prefix hides under. Free of JAX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hw_profiles import Profile
from model.cache import cache_rows
from model.config import ModelConfig
from runtime.deployment.engines import engine_for
from runtime.deployment.kv import Point, PoolKv, Sharding, Share, Tier
from runtime.serving.pricing import EVIDENCE_GRADES, NO_CONTEXTS, BatchShape, StepPricer, step_seconds, step_shape
from runtime.simulation.offload import HOST_LINK, host_tier, lower_tiers

if TYPE_CHECKING:
    from runtime.deployment.demand import Demand
    from runtime.deployment.engines import Engine
    from runtime.deployment.plan import Plan
    from runtime.deployment.pool import Pool
    from runtime.simulation.build import PriceTables

HOST_RATIO = 2.0
"""Host pool over device pool where nobody says: SGLang's --hicache-ratio default (docs, server_arguments.md)."""


def plan_kv(
    plan: Plan, cfg: ModelConfig, tables: PriceTables | None = None, profiles: Sequence[Profile] | None = None
) -> tuple[PoolKv, ...]:
    """The tiers of each pool of a plan. tables: with these each pool's steps are priced for its break-even length.
    profiles: of the pools, where they are loaded already.

    Raises `ProfileError` or `PriceError`.
    """
    from runtime.deployment.pool import profile_of
    from runtime.simulation.build import pricer_of
    from runtime.simulation.planned import spec_of

    found = []
    for number, pool in enumerate(plan.pools):
        profile = profiles[number] if profiles else profile_of(pool)
        pricer = None
        if tables is not None and pool.role != "decode" and profile.get(HOST_LINK) is not None:
            pricer = pricer_of(spec_of(cfg, pool, profile), tables)
        found.append(pool_kv(cfg, pool, profile, plan.demand, pricer))
    return tuple(found)


def check_kv(plan: Plan, cfg: ModelConfig) -> list[str]:
    """What of a plan's `kv` does not follow from its devices, a line each; what was priced is not recomputed."""
    if not plan.kv:
        return []
    if [kv.role for kv in plan.kv] != [pool.role for pool in plan.pools]:
        return [f"kv: {len(plan.kv)} entries for {len(plan.pools)} pools; one each, in their order"]
    wrong = []
    for number, (stated, found) in enumerate(zip(plan.kv, plan_kv(plan, cfg), strict=True)):
        for name in ("page_tokens", "request_tokens", "shares", "tiers", "sharding"):
            if getattr(stated, name) != getattr(found, name):
                wrong.append(f"kv[{number}].{name}: {getattr(stated, name)}, recomputed {getattr(found, name)}")
        end = stated.break_even_tokens
        if end is not None and end not in [point.tokens for point in stated.curve]:
            wrong.append(f"kv[{number}].break_even_tokens: {end} is not on its curve")
    return wrong


def pool_kv(
    cfg: ModelConfig,
    pool: Pool,
    profile: Profile,
    demand: Demand,
    pricer: StepPricer | None = None,
    host_ratio: float = HOST_RATIO,
) -> PoolKv:
    """The tiers of a pool, and with a pricer of one of its ranks the break-even length.

    host_ratio: host pool over device pool. A pool that only decodes has no break-even: it computes no prompts.
    """
    engine = engine_for(pool.engine, cfg, profile, pool.layout, dict(pool.settings), pool.drafts)
    wanted = request_tokens(pool, demand)
    tiers = _tiers(pool, profile, host_ratio)
    points: list[Point] = []
    evidence = tiers[-1].evidence
    found = None
    host = next((tier for tier in tiers if tier.name == "host"), None)
    if pricer and host and pool.role != "decode":
        points, found = break_even(pool, engine, pricer, host, min(cfg.max_positions, pool.pool_tokens))
        priced = pricer.price(BatchShape(prefill_chunks=[(pool.page_tokens, 0)]))
        evidence = max(evidence, priced.evidence, key=EVIDENCE_GRADES.index)
    return PoolKv(
        role=pool.role,
        page_tokens=pool.page_tokens,
        request_tokens=wanted,
        shares=_shares(cfg, pool),
        tiers=tiers,
        sharding=_shardings(cfg, pool, engine, wanted),
        break_even_tokens=found,
        curve=tuple(points),
        evidence=evidence,
    )


def request_tokens(pool: Pool, demand: Demand) -> int:
    """Cache that a request of the longest lengths takes at its end, tokens; a prefill pool makes one token."""
    prompt, answer = demand.longest
    return prompt + (1 if pool.role == "prefill" else answer + pool.drafts)


def resident_requests(pool: Pool, tokens: int, max_running: int, degree: int = 1) -> int:
    """Requests of `tokens` that a replica holds at once: whole pages of each dp rank, up to the engine's limit."""
    pages = math.ceil(tokens / pool.page_tokens)
    return pool.layout.dp * min(max_running, pool.kv_pages * degree // pages)


def device_bytes_per_token(pool: Pool) -> float:
    """Cache of one token on the device that holds most of it."""
    return max(sum(device.kv_page_bytes.values()) for device in _replica(pool)) / pool.page_tokens


def _replica(pool: Pool) -> Sequence:
    return pool.devices[: pool.layout.devices]


def _shares(cfg: ModelConfig, pool: Pool) -> tuple[Share, ...]:
    stages = {device.stage: device.kv_page_bytes for device in _replica(pool)}
    rows = {row.name: row for kind in cfg.layer_counts for row in cache_rows(cfg, kind)}
    names = dict.fromkeys(name for held in stages.values() for name in held)
    copies = {name: pool.layout.row_copies(rows[name]) for name in names}
    return tuple(
        Share(
            name,
            sum(held.get(name, 0.0) for held in stages.values())
            * (pool.layout.tp * pool.layout.pcp / copies[name])
            / pool.page_tokens,
            copies[name],
        )
        for name in names
    )


def _tiers(pool: Pool, profile: Profile, host_ratio: float) -> tuple[Tier, ...]:
    ranks = pool.layout.dp
    held = pool.pool_tokens * device_bytes_per_token(pool)
    memory = profile.get("chip.memory.bandwidth_bytes_per_s")
    device = Tier(
        "device", held, pool.kv_pages, pool.pool_tokens, pool.pool_tokens * ranks,
        memory.value if memory else 0.0, 0.0, memory.evidence if memory else "assumed",
    )  # fmt: skip
    size = device_bytes_per_token(pool)
    if pool.offload.asked:
        return device, *lower_tiers(pool.offload, profile, pool.page_tokens, size, ranks)
    might = host_tier(profile, int(pool.kv_pages * host_ratio) * pool.page_tokens * size, pool.page_tokens, size, ranks)
    return (device, might) if might else (device,)


def _shardings(cfg: ModelConfig, pool: Pool, engine: Engine, wanted: int) -> tuple[Sharding, ...]:
    """Every degree that divides the copies: with one copy there is nothing to deal out."""
    copies = min(share.copies for share in _shares(cfg, pool))
    return tuple(
        Sharding(
            degree,
            copies // degree,
            pool.pool_tokens * degree,
            pool.pool_tokens * degree * pool.layout.dp,
            resident_requests(pool, wanted, engine.max_running_requests, degree),
        )
        for degree in range(1, copies + 1)
        if copies % degree == 0
    )


def prefill_seconds(engine: Engine, pricer: StepPricer, tokens: int, before: int = 0) -> float:
    """Steps that compute `tokens` of a prompt behind `before` cached ones, in chunks, with host time."""
    chunk = engine.chunked_prefill_tokens or tokens
    total = 0.0
    for start in range(0, tokens, chunk):
        new = min(chunk, tokens - start)
        shape = step_shape(engine, NO_CONTEXTS, chunks=[(new, before + start)], begun=int(not start))
        total += step_seconds(engine, pricer.seconds(shape), shape)
    return total


def break_even(
    pool: Pool, engine: Engine, pricer: StepPricer, host: Tier, longest: int
) -> tuple[list[Point], int | None]:
    """Prefixes from a page to `longest` tokens, doubling, with those around the break-even; and the shortest
    whole-page prefix from which on fetching is no slower (see the module's text), None where computing again wins to
    the end."""
    page, per_token = pool.page_tokens, device_bytes_per_token(pool)

    def at(pages: int) -> Point:
        tokens = pages * page
        again = prefill_seconds(engine, pricer, tokens + page) - prefill_seconds(engine, pricer, page, tokens)
        return Point(tokens, max(0.0, again), host.latency_seconds + tokens * per_token / host.bandwidth_bytes_per_s)

    def fetching(point: Point) -> bool:
        return point.fetch_seconds <= point.recompute_seconds

    most = max(1, longest // page - 1)
    counts = [2**k for k in range(most.bit_length()) if 2**k < most] + [most]
    points = [at(count) for count in counts]
    slower = [i for i, point in enumerate(points) if not fetching(point)]
    if not slower:
        return points, page
    if slower[-1] == len(points) - 1:
        return points, None
    low, high = counts[slower[-1]], counts[slower[-1] + 1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fetching(at(middle)) else (middle, high)
    seen = {point.tokens: point for point in (*points, at(low), at(high))}
    return [seen[tokens] for tokens in sorted(seen)], high * page
