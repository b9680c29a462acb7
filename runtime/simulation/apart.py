"""Two pools, one that prefills and one that decodes: whether the engine joins them, and what both are together."""

from __future__ import annotations

from runtime.deployment.engines.flags import layout_facts, pair_facts, unsupported
from runtime.deployment.plan import Transfer
from runtime.deployment.pool import PoolRole
from runtime.serving import Deployment, Disaggregated
from runtime.simulation.build import Spec
from runtime.simulation.transfer import link_assumed


def joint_refused(prefill: Spec, decode: Spec) -> str | None:
    """Why the engine's connector does not hand the cache of one on to the other. There is none between chips of two
    vendors, and so none to obey."""
    if prefill.profile.vendor != decode.profile.vendor:
        return None
    ends = [(each.layout, each.formats) for each in (prefill, decode)]
    return unsupported(prefill.engine.kind, prefill.engine.release, pair_facts(prefill.cfg, ends[0], ends[1]))


def role_refused(spec: Spec, role: PoolRole, placement: bool = False) -> str | None:
    """Why the engine does not give a deployment this role, by its layout. placement: with experts that are placed."""
    if role != "serve" and spec.layout.dcp > 1:
        return "no connector described here hands on a cache that is dealt out to tp ranks: dcp 1"
    if role != "serve" and spec.layout.pcp > 1:
        return "no connector described here joins a pool whose prompts are cut over tp groups: pcp 1"
    facts = layout_facts(spec.layout, spec.drafts, role, placement)
    return unsupported(spec.engine.kind, spec.engine.release, facts)


def apart_refused(prefill: Spec, decode: Spec) -> str | None:
    """Why an engine cannot be two such pools, whichever of them it is for."""
    found = role_refused(prefill, "prefill") or role_refused(decode, "decode")
    return found or joint_refused(prefill, decode)


def apart(prefill: Deployment, decode: Deployment, moved: Transfer, ends: tuple[Spec, Spec]) -> Disaggregated:
    """Both pools, joined by a transfer. ends: what they were made from."""
    per_token = moved.kv_bytes_per_token / moved.link_bandwidth_bytes_per_s + moved.conversion_seconds_per_token
    return Disaggregated(
        prefill,
        decode,
        moved.kv_bytes_per_token,
        moved.kv_bytes_per_token / per_token,
        moved.link_latency_seconds,
        link_assumed(*ends),
    )
