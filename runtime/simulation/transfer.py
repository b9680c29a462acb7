"""Moving a prompt's cache from a prefill to a decode pool: over which link, and how long it takes."""

from __future__ import annotations

import dataclasses

from foundation.errors import UsageError
from model.cache import cache_rows
from runtime.deployment.ledger import stage_kv_bytes_per_token
from runtime.deployment.plan import Transfer
from runtime.pricing.chip import DEFAULTS
from runtime.pricing.placement import second_pool
from runtime.simulation.build import Spec, node_devices


def sequence_kv_bytes_per_token(spec: Spec) -> float:
    """Bytes of a token's cache over all layers, each held once: what has to be sent."""
    whole = dataclasses.replace(spec.layout, tp=1, dp=1, ep=1)
    stages = (
        stage_kv_bytes_per_token(spec.cfg, whole, spec.formats, stage, spec.drafts > 0) for stage in range(whole.pp)
    )
    return sum(stages)


def link_between(prefill: Spec, decode: Spec) -> str:
    """The link that two pools have in common: "link.scale_up" where one domain of one chip holds all of their
    replicas, else "link.scale_out"."""
    profile = prefill.profile
    if profile.name != decode.profile.name:
        return "link.scale_out"
    first, second = (spec.replicas * spec.layout.devices for spec in (prefill, decode))
    node = node_devices(profile)
    end = second_pool(first, second, node) + second
    return "link.scale_up" if end <= (profile.number("link.scale_up.domain_devices") or node) else "link.scale_out"


def link_assumed(prefill: Spec, decode: Spec) -> frozenset[str]:
    """What is taken for figures of that link that a chip does not have."""
    path = f"{link_between(prefill, decode)}.latency_s"
    missing = any(spec.profile.number(path) is None for spec in (prefill, decode))
    return frozenset({f"{path} {DEFAULTS[path][1]}"}) if missing else frozenset()


def transfer_of(prefill: Spec, decode: Spec, tokens: int) -> Transfer:
    """What moving the cache of `tokens` takes. Raises `UsageError` where a chip's links are not known.

    The devices that hold a sequence send it over their own ports (every tp rank its share of the latents, every
    stage its layers) into those that will; see `link_between`. Where tp ranks each need all of a latent, the shares are
    exchanged within the decode replica. A decode pool with another cache format rewrites it: read and written once.
    """
    sent, kept = sequence_kv_bytes_per_token(prefill), sequence_kv_bytes_per_token(decode)
    link = link_between(prefill, decode)
    field = f"{link}.bandwidth_bytes_per_s"
    ways = []
    for spec in (prefill, decode):
        rate = spec.profile.number(field)
        if rate is None:
            raise UsageError(
                f"{spec.profile.name} has no {field}, which the cache takes from prefill to decode: supply it with "
                f"--set {field}=… in bytes/s"
            )
        ways.append(rate * spec.layout.tp * spec.layout.pp)
    default = DEFAULTS[f"{link}.latency_s"][0]
    latency = max(spec.profile.number(f"{link}.latency_s") or default for spec in (prefill, decode))
    inside = decode.profile.number("link.scale_up.bandwidth_bytes_per_s")
    cfg = decode.cfg
    copied = any(decode.layout.row_copies(row) > 1 for kind in cfg.layer_counts for row in cache_rows(cfg, kind))
    exchange = kept / inside if inside and copied else 0.0
    convert = 0.0
    if prefill.formats.cache != decode.formats.cache:
        convert = (sent + kept) / decode.layout.pp / decode.profile.value("chip.memory.bandwidth_bytes_per_s")
    per_token = sent / min(ways) + exchange + convert
    return Transfer(sent, min(ways), latency, exchange + convert, sent * tokens, latency + per_token * tokens)
