"""What the serving simulator expects of a plan.

Equal replicas see equal shares of the load, so one is simulated (of two pools: as many of each as their ratio
takes) under its share, and throughputs are scaled up (`runtime.simulation.planned`). Both `glm5 plan` and
`glm5 simulate --plan` go through `simulate_plan`, so that they give the same figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from foundation.errors import UsageError
from hw_profiles import Profile
from model.config import ModelConfig
from runtime.deployment.demand import Demand
from runtime.deployment.engines.engine import RouterPolicy
from runtime.deployment.plan import Plan, Predicted
from runtime.serving import (
    Histogram,
    Lengths,
    Lognormal,
    Report,
    Sharing,
    Uniform,
    Workload,
    block_of,
    closed_loop,
    conversations,
    open_conversations,
    open_loop,
    simulate,
)
from runtime.simulation.build import PriceTables, require_positions
from runtime.simulation.planned import Deployed, deployed
from runtime.simulation.trust import report_bands

DEFAULT_CONCURRENCY = 16
OPEN_LOOP = 500
"""Requests that are measured of an open loop, where nobody says how many."""
CONVERSATIONS = 2
"""That each client holds, where nobody says how many requests."""


def workload(
    demand: Demand,
    parts: int,
    seed: int = 0,
    requests: int | None = None,
    *,
    page_tokens: Sequence[int] = (),
    burstiness: float = 1.0,
    router: RouterPolicy = "round-robin",
) -> tuple[Workload, float]:
    """The load on one of `parts` equal shares, and how many such shares the whole load is.

    page_tokens: of the pools, whose pages prefixes are found by. burstiness: of an open loop. router: before the
    shares; a cache-aware one sends each the requests of groups of its own.
    """
    prompt, output = lengths_of(demand)
    sharing = None
    if demand.shares:
        block = block_of(demand.prompt_means[0], *page_tokens)
        sharing = Sharing(demand.shared_prefix, demand.groups_each(parts, router), block)
    if demand.rate is not None:
        more = {"cv": burstiness, "seed": seed, "sharing": sharing}
        rate, count = demand.rate / parts, requests or OPEN_LOOP
        if demand.turns > 1:
            load = open_conversations(rate, count, demand.turns, demand.think_s, prompt, output, **more)
        else:
            load = open_loop(rate, count, prompt, output, **more)
        return load, float(parts)
    whole = DEFAULT_CONCURRENCY if demand.concurrency is None else demand.concurrency
    if whole < 1:
        raise UsageError(f"concurrency is {whole}: give a whole number of at least 1")
    here = math.ceil(whole / parts)
    count = requests or closed_loop_requests(demand, here)
    if demand.turns > 1:
        return conversations(
            here, count, demand.turns, demand.think_s, prompt, output, seed=seed, sharing=sharing
        ), whole / here
    return closed_loop(here, count, prompt, output, seed=seed, sharing=sharing), whole / here


def lengths_of(demand: Demand) -> tuple[Lengths | Histogram, Lengths | None]:
    """The distributions of new input tokens and of output tokens; the second None where the first is of both."""
    if demand.histogram:
        return Histogram(demand.histogram), None
    if demand.length_cv is not None:
        (_, most_in), (_, most_out) = demand.spans
        return Lognormal(demand.isl, demand.length_cv, most_in), Lognormal(demand.osl, demand.length_cv, most_out)
    return Uniform(demand.isl, demand.length_ratio), Uniform(demand.osl, demand.length_ratio)


def closed_loop_requests(demand: Demand, concurrency: int) -> int:
    """Requests of a closed loop: ten a client, as benchmarks take, fewer where that would be many; of conversations at
    least `CONVERSATIONS` a client."""
    count = max(min(10 * concurrency, 320), 3 * concurrency)
    return max(count, CONVERSATIONS * concurrency * demand.turns) if demand.turns > 1 else count


def requests_played(demand: Demand, concurrency: int) -> int:
    """About how many requests a simulation takes with so many in flight; of an open loop, its ramp, and until it is
    plain whether it is kept up with (see `runtime.serving.steady`), which goes by what arrives: requests, or
    conversations."""
    if demand.rate is None:
        return closed_loop_requests(demand, concurrency)
    return OPEN_LOOP + demand.turns * (3 * concurrency + round(50 * concurrency ** (2 / 3)))


def simulate_plan(
    plan: Plan,
    cfg: ModelConfig,
    *,
    seed: int = 0,
    requests: int | None = None,
    tables: PriceTables | None = None,
    profiles: list[Profile] | None = None,
    trace: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Report, Deployed, float]:
    """(report of one share, the share, how many such shares the whole load is).

    Raises `CapacityError` for a request that the plan could never serve.
    """
    if plan.demand.concurrency is not None and plan.demand.rate is not None:
        raise UsageError("a plan's demand has a concurrency or a rate, not both")
    require_positions(cfg, *plan.demand.longest)
    share = deployed(plan, cfg, tables, profiles)
    pages = [built.spec.engine.page_tokens for built in share.pools]
    router = share.pools[0].spec.engine.router
    load, shares = workload(plan.demand, share.parts, seed, requests, page_tokens=pages, router=router)
    report = simulate(load, share.deployment, seed=seed, trace=trace, progress=progress)
    return report, share, shares


def whole(report: Report, shares: float, plan: Plan) -> Report:
    """A share's report as the whole plan's: throughputs times the shares, over the devices that it uses."""
    devices = len(plan.devices)
    return dataclasses.replace(
        report,
        requests_per_s=report.requests_per_s * shares,
        input_tokens_per_s=report.input_tokens_per_s * shares,
        output_tokens_per_s=report.output_tokens_per_s * shares,
        output_tokens_per_s_per_device=report.output_tokens_per_s * shares / devices,
        sent_per_s=None if report.sent_per_s is None else report.sent_per_s * shares,
        mean_in_system=report.mean_in_system * shares,
    )


def predicted(plan: Plan, report: Report, share: Deployed, shares: float) -> Predicted:
    """The plan's figures from a share's report."""
    of_all = whole(report, shares, plan)
    bands = report_bands(share.serving, report, share.serving.deployment.replicas)
    figures = {name: getattr(report, name).in_ms() for name in ("ttft", "tpot", "e2e")}
    demand = plan.demand
    per_user = of_all.output_tokens_per_s_per_user
    return Predicted(
        concurrency=demand.concurrency,
        rate=demand.rate,
        requests_per_s=of_all.requests_per_s,
        output_tokens_per_s=of_all.output_tokens_per_s,
        output_tokens_per_s_per_device=of_all.output_tokens_per_s_per_device,
        output_tokens_per_s_per_user=None if math.isnan(per_user) else per_user,
        ttft_ms=figures["ttft"],
        tpot_ms=figures["tpot"],
        e2e_ms=figures["e2e"],
        band={
            f"{name}_ms": (low, high)
            for name in ("ttft", "tpot")
            if (mean := figures[name]["mean"]) is not None
            for low, high in [bands[name].around(mean)]
        },
        band_basis=bands["tpot"].basis,
        evidence=report.evidence,
        extrapolated=report.extrapolated,
        kv_peak_fraction=report.kv.peak_fraction,
        requests_simulated=report.measured_requests,
        saturated_by=report.saturated_by,
        bottleneck=report.bottleneck,
        meets_targets=not missed(plan.demand, of_all),
        assumed=report.assumed,
        prefix_hit_rate=report.prefix_hit_rate,
        prefix_hits=report.prefix_hits,
    )


def missed(demand: Demand, of_all: Report) -> list[str]:
    """What a report of a whole plan misses of its demand, in words."""
    kept_up = not of_all.saturated
    return demand.missed(of_all.ttft.in_ms(), of_all.tpot.in_ms(), of_all.requests_per_s, kept_up)
