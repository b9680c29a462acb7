"""From a plan to a deployment: its pools priced, sized and joined. The one way, for all who simulate, emulate or price
a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from hw_profiles import Profile
from model.config import ModelConfig
from model.formats import Formats
from runtime.deployment.engines import with_pool
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool, profile_of
from runtime.pricing.load import ExpertLoad, named
from runtime.pricing.price import PriceError
from runtime.serving import Deployment, Disaggregated, Speculation
from runtime.simulation.apart import apart
from runtime.simulation.build import Built, PriceTables, Spec, assumed, pricer_of, spec_for, speculation, tiers_of


def spec_of(cfg: ModelConfig, pool: Pool, profile: Profile) -> Spec:
    """The deployment of one replica of a pool, by name. Raises `PriceError` for a load whose shares it does not hold:
    the file that it was read from is not looked for."""
    if not pool.slot_load and named(pool.expert_load, cfg.moe.experts if cfg.moe else 1) is None:
        raise PriceError(
            f"expert load {pool.expert_load[:60]!r} of the plan was measured, and its slot_load is missing"
        )
    load = ExpertLoad(pool.expert_load, np.array(pool.slot_load)) if pool.slot_load else pool.expert_load
    made = spec_for(
        cfg, profile, pool.layout, pool.formats.scheme, pool.formats.kv, pool.engine, pool.settings,
        expert_load=load, drafts=pool.drafts, acceptance=pool.acceptance,
        acceptance_ranges=pool.acceptance_ranges,
        pool_tokens=pool.pool_tokens, redundant_slots=pool.redundant_slots,
        replicas=pool.replicas, offload=pool.offload,
    )  # fmt: skip
    engine = with_pool(made.engine, cfg, pool.pool_tokens, pool.settings)
    return dataclasses.replace(made, formats=pool.formats, engine=engine)


def _speculation(pool: Pool) -> Speculation | None:
    return speculation(pool.drafts, acceptance=pool.acceptance, ranges=pool.acceptance_ranges)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A plan's pools, ready to simulate: `parts` deployments like this one make up the whole plan.

    pools: one that serves, or the one that prefills and then the one that decodes.
    """

    pools: tuple[Built, ...]
    deployment: Deployment | Disaggregated
    parts: int

    @property
    def serving(self) -> Built:
        """The pool that makes the answers."""
        return self.pools[-1]


def deployed(
    plan: Plan,
    cfg: ModelConfig,
    tables: PriceTables | None = None,
    profiles: Sequence[Profile] | None = None,
    whole: bool = False,
    stand_in: bool = False,
) -> Deployed:
    """A plan as a deployment.

    The least with the plan's layouts and pool ratio, since equal replicas see equal shares of a load; all of it with
    `whole`. profiles: of the pools, where they are loaded already. stand_in: float32, the reference that any chip can
    be asked for, is priced in bf16 where a chip has no rate for it. Raises `ProfileError` or `PriceError`.
    """
    tables = tables or PriceTables()
    parts = 1 if whole else math.gcd(*(pool.replicas for pool in plan.pools))
    built = []
    for number, pool in enumerate(plan.pools):
        spec = spec_of(cfg, pool, profiles[number] if profiles else profile_of(pool))
        if stand_in and spec.formats.wide == "f32" and spec.profile.number("chip.peak.fp32_flops_per_s") is None:
            spec = dataclasses.replace(spec, formats=Formats())
        replicas, pricer = pool.replicas // parts, pricer_of(spec, tables)
        made = Deployment(
            spec.engine,
            pricer,
            pool_tokens=pool.pool_tokens,
            devices=replicas * pool.layout.devices,
            replicas=replicas,
            ranks=pool.layout.dp,
            speculation=_speculation(pool) if pool.role != "prefill" else None,
            assumed=assumed(spec, drafting=pool.role != "prefill"),
            router=spec.engine.router if pool.role != "decode" else "round-robin",
            tiers=tiers_of(spec) if pool.role != "decode" else (),
        )
        built.append(Built(spec, pool.devices[0].ledger, pricer, made))
    if plan.transfer is None:
        return Deployed(tuple(built), built[0].deployment, parts)
    prefill, decode = built
    both = apart(prefill.deployment, decode.deployment, plan.transfer, (prefill.spec, decode.spec))
    return Deployed(tuple(built), both, parts)
