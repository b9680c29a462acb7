"""Moving a prompt's cache from a prefill to a decode pool: who sends what to whom, over which link, for how long.

The devices that hold a sequence are the tp ranks of its dp rank in every stage, on either side. Each that will decode
it takes what it is to hold, whole, from one of those that have it: connectors read a latent once for every tp rank,
each from a rank of its own as far as there are any (SGLang `disaggregation/common/conn.py`, where further ranks are
"dummies" for MLA; vLLM's NixlConnector, whose ranks read from rank // ratio). KV heads that are split come from as many
ranks as hold a part of them. A transfer takes as long as the busiest port, of those that send and those that receive.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from foundation.errors import UsageError
from model.cache import cache_rows, row_bytes
from runtime.deployment.ledger import stage_kv_bytes_per_token
from runtime.deployment.plan import Route, Transfer
from runtime.pricing.chip import DEFAULTS
from runtime.pricing.placement import second_pool
from runtime.simulation.build import Spec, node_devices


def sequence_kv_bytes_per_token(spec: Spec) -> float:
    """Bytes of a token's cache over all layers, each held once."""
    kinds = Counter(spec.cfg.layers)
    if spec.drafts:
        kinds[spec.cfg.mtp_type] += spec.cfg.mtp_layers
    return float(
        sum(
            count * row_bytes(spec.cfg, row, spec.formats.cache)
            for kind, count in kinds.items()
            for row in cache_rows(spec.cfg, kind)
        )
    )


def routes_between(prefill: Spec, decode: Spec) -> tuple[Route, ...]:
    """Who sends what of each token to whom; in the prefill pool's format."""
    cfg, given, taken = prefill.cfg, prefill.layout, decode.layout
    sent: defaultdict[tuple[int, int], float] = defaultdict(float)
    for here, before in enumerate(given.stage_layers(cfg.num_layers)):
        for there, after in enumerate(taken.stage_layers(cfg.num_layers)):
            kinds = Counter(cfg.layers[layer] for layer in before if layer in after)
            if prefill.drafts and here == given.pp - 1 and there == taken.pp - 1:
                kinds[cfg.mtp_type] += cfg.mtp_layers
            for kind, count in kinds.items():
                for row in cache_rows(cfg, kind):
                    size = count * row_bytes(cfg, row, prefill.formats.cache)
                    copies = given.row_copies(row), taken.row_copies(row)
                    for source, target, share in _shares(given.tp, taken.tp, *copies):
                        sent[here * given.tp + source, there * taken.tp + target] += size * share
    return tuple(Route(*ends, size) for ends, size in sorted(sent.items()))


def _shares(given: int, taken: int, copies: int, kept: int) -> list[tuple[int, int, float]]:
    """(source, target, share of a row): which tp ranks of `given` send to those of `taken`. copies, kept: ranks on
    either side that hold the same part of it."""
    own, parts = given // copies, taken // kept
    found = []
    for target in range(taken):
        part = target // kept  # neighbours have the same ones
        for had in range(own):
            share = max(0.0, min((part + 1) / parts, (had + 1) / own) - max(part / parts, had / own))
            if share > 1e-12:
                # of those that have it: one of its own, as far as there are any
                mine = target * given // taken
                source = mine if mine // copies == had else had * copies + target % copies
                found.append((source, target, share))
    return found


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

    A decode pool with another cache format rewrites what it took: read and written once, on every device.
    """
    routes = routes_between(prefill, decode)
    link = link_between(prefill, decode)
    field = f"{link}.bandwidth_bytes_per_s"
    busiest = 0.0
    for spec, end in ((prefill, "source"), (decode, "target")):
        rate = spec.profile.number(field)
        if rate is None:
            raise UsageError(
                f"{spec.profile.name} has no {field}, which the cache takes from prefill to decode: supply it with "
                f"--set {field}=… in bytes/s"
            )
        load: defaultdict[int, float] = defaultdict(float)
        for route in routes:
            load[getattr(route, end)] += route.bytes_per_token
        busiest = max(busiest, max(load.values()) / rate)
    default = DEFAULTS[f"{link}.latency_s"][0]
    latency = max(spec.profile.number(f"{link}.latency_s") or default for spec in (prefill, decode))
    convert = 0.0
    if prefill.formats.cache != decode.formats.cache:
        moved = (
            sum(
                stage_kv_bytes_per_token(decode.cfg, decode.layout, formats, stage, prefill.drafts > 0)
                for formats in (prefill.formats, decode.formats)
            )
            for stage in range(decode.layout.pp)
        )
        convert = max(moved) / decode.profile.value("chip.memory.bandwidth_bytes_per_s")
    copy = sequence_kv_bytes_per_token(prefill)
    crossing = sum(route.bytes_per_token for route in routes)
    return Transfer(
        copy, copy / busiest, latency, convert, crossing * tokens, latency + (busiest + convert) * tokens, routes
    )
