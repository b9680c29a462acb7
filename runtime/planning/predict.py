"""What the serving simulator expects of a plan.

Equal replicas see equal shares of the load, so one is simulated (of two pools: as many of each as their ratio
takes) under its share, and throughputs are scaled up. Both `glm5 plan` and `glm5 simulate --plan` go through
`simulate_plan`, so that they give the same figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from foundation.errors import UsageError
from hw_profiles import Profile
from model.config import ModelConfig
from runtime.deployment.plan import Demand, Plan, Pool, Predicted, profile_of
from runtime.pricing.bands import band
from runtime.pricing.load import ExpertLoad
from runtime.serving import Deployment, Disaggregated, Report, Uniform, Workload, closed_loop, open_loop, simulate
from runtime.simulation.build import Built, PriceTables, Spec, make_engine, pricer_of, speculation
from runtime.simulation.validation import report_half_widths

DEFAULT_CONCURRENCY = 16


def spec_of(cfg: ModelConfig, pool: Pool, profile: Profile) -> Spec:
    """The deployment of one replica of a pool."""
    load = ExpertLoad(pool.expert_load, np.array(pool.slot_load)) if pool.slot_load else pool.expert_load
    engine = make_engine(pool.engine, cfg, profile, pool.layout, pool.settings)
    return Spec(
        cfg,
        profile,
        pool.layout,
        pool.formats,
        engine,
        load,
        pool.drafts,
        pool_tokens=pool.pool_tokens,
        redundant_slots=pool.redundant_slots,
    )


@dataclasses.dataclass(frozen=True)
class Share:
    """A deployment that stands for a plan: `parts` like it make up the whole."""

    built: Built
    deployment: Deployment | Disaggregated
    parts: int


def share_of(plan: Plan, cfg: ModelConfig, tables: PriceTables | None = None, profiles: Any = None) -> Share:
    """The least deployment with the plan's layouts and pool ratio. Raises `ProfileError` or `PriceError`."""
    tables = tables or PriceTables()
    parts = math.gcd(*(pool.replicas for pool in plan.pools))
    built = []
    for number, pool in enumerate(plan.pools):
        profile = profiles[number] if profiles else profile_of(pool)
        spec = spec_of(cfg, pool, profile)
        replicas = pool.replicas // parts
        deployment = Deployment(
            spec.engine,
            pricer_of(spec, tables),
            pool_tokens=pool.pool_tokens,
            devices=replicas * pool.layout.devices,
            replicas=replicas,
            ranks=pool.layout.dp,
            speculation=speculation(pool.drafts) if pool.role != "prefill" else None,
        )
        built.append(Built(spec, pool.devices[0].ledger, deployment.pricer, deployment))  # pyright: ignore
    if plan.transfer is None:
        return Share(built[0], built[0].deployment, parts)
    moved = plan.transfer.kv_bytes_per_token
    per_token = moved / plan.transfer.link_bandwidth_bytes_per_s + plan.transfer.conversion_seconds_per_token
    prefill, decode = (each.deployment for each in built)
    both = Disaggregated(prefill, decode, moved, moved / per_token, plan.transfer.link_latency_seconds)
    return Share(built[1], both, parts)


def workload(demand: Demand, parts: int, seed: int = 0, requests: int | None = None) -> tuple[Workload, float]:
    """The load on one of `parts` equal shares, and how many such shares the whole load is."""
    prompt, output = Uniform(demand.isl, demand.length_ratio), Uniform(demand.osl, demand.length_ratio)
    if demand.rate is not None:
        return open_loop(demand.rate / parts, requests or 500, prompt, output, seed=seed), float(parts)
    whole = DEFAULT_CONCURRENCY if demand.concurrency is None else demand.concurrency
    if whole < 1:
        raise UsageError(f"concurrency is {whole}: give a whole number of at least 1")
    here = math.ceil(whole / parts)
    return closed_loop(here, requests or closed_loop_requests(here), prompt, output, seed=seed), whole / here


def closed_loop_requests(concurrency: int) -> int:
    """Requests of a closed loop: ten a client, as benchmarks take, fewer where that would be many."""
    return max(min(10 * concurrency, 320), 2 * concurrency)


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
) -> tuple[Report, Share, float]:
    """(report of one share, the share, how many such shares the whole load is).

    Raises `CapacityError` for a request that the plan could never serve.
    """
    if plan.demand.concurrency is not None and plan.demand.rate is not None:
        raise UsageError("a plan's demand has a concurrency or a rate, not both")
    share = share_of(plan, cfg, tables, profiles)
    load, shares = workload(plan.demand, share.parts, seed, requests)
    report = simulate(load, share.deployment, seed=seed, trace=trace, progress=progress)
    return report, share, shares


def whole(report: Report, shares: float, plan: Plan) -> Report:
    """A share's report as the whole plan's: throughputs times the shares, over all its devices, idle ones too."""
    devices = len(plan.devices) + plan.idle_devices
    return dataclasses.replace(
        report,
        requests_per_s=report.requests_per_s * shares,
        input_tokens_per_s=report.input_tokens_per_s * shares,
        output_tokens_per_s=report.output_tokens_per_s * shares,
        output_tokens_per_s_per_device=report.output_tokens_per_s * shares / devices,
        mean_in_system=report.mean_in_system * shares,
    )


def predicted(plan: Plan, report: Report, share: Share, shares: float) -> Predicted:
    """The plan's figures from a share's report."""
    of_all = whole(report, shares, plan)
    halves = report_half_widths(share.built, report, share.built.deployment.replicas)
    figures = {name: getattr(report, name).in_ms() for name in ("ttft", "tpot", "e2e")}
    demand = plan.demand
    met = report.saturated_by != "arrivals"
    for target, name in ((demand.ttft_ms, "ttft"), (demand.tpot_ms, "tpot")):
        met = met and (target is None or (figures[name]["mean"] or 0.0) <= target)
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
            for low, high in [band(mean, halves[name])]
        },
        evidence=report.evidence,
        extrapolated=report.extrapolated,
        kv_peak_fraction=report.kv.peak_fraction,
        requests_simulated=report.measured_requests,
        saturated_by=report.saturated_by,
        bottleneck=report.bottleneck,
        meets_targets=met,
    )
