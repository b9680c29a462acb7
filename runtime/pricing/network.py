"""Collectives: measured curves where a group size was measured, a latency-bandwidth formula elsewhere.

`total_bytes` is the full vector: what an all-reduce reduces, what an all-gather has produced, what a
reduce-scatter starts from, what one rank sends in an all-to-all (its own share included).

A curve was measured on links of certain figures (`Network.reference`). Where the chip's are others it is scaled by what
the formula makes of the difference: curve x formula(chip) / formula(reference).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from runtime.pricing.chip import DEFAULTS, Chip, Link
from runtime.pricing.eras import OLDER_ERROR, Chosen
from runtime.pricing.grid import Array, Polyline
from runtime.pricing.placement import Hops, Span
from runtime.pricing.price import Price, PriceError, PriceEvidence, total, weakest

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
VOLUME: Mapping[str, float] = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""Times (group - 1) / group * total_bytes: what each device sends."""
FORMULA_ERROR = 0.5
"""90th percentile of the formula against NCCL on five measured NVLink chips, 2 to 8 devices (median 0.21)."""
RING_S_PER_BYTE, RING_LIMIT_S = 0.15e-6 / 1e3, 32e-6
"""What an all-reduce between domains takes beside start and bandwidth: the small packets of NCCL's low-latency
protocol, until it changes to another. Fitted to replayed NCCL on 2 x 8 A100 (44, 48, 55.5, 66.6 and 83 us at 2, 16, 64,
128 and 256 KiB; microsoft/mscclpp issue 531); 88 us at 1 MB on 2 x 8 H100 comes out at 86."""
FREE = Price(0.0, "network", "measured", 0.0)
_SAYS = {"all_reduce": "an all-reduce", "all_gather": "an all-gather", "reduce_scatter": "a reduce-scatter",
         "all_to_all": "an all-to-all"}  # fmt: skip


@dataclass(frozen=True)
class MeasuredCurve:
    sizes: Array
    curve: Polyline
    relative_error: float
    evidence: PriceEvidence = "fitted"
    assumed: frozenset[str] = frozenset()
    source: str = ""

    @classmethod
    def of(cls, key: str, chosen: Chosen) -> MeasuredCurve:
        body = chosen.body
        sizes = np.asarray(body["bytes"], float)
        curve, error = Polyline(sizes, np.asarray(body["seconds"], float)), float(body["error"]["left_out"][1])
        source = f"{key}: {body.get('source', '')}"
        if not chosen.later:
            return cls(sizes, curve, error, source=source)
        return cls(sizes, curve, math.hypot(error, OLDER_ERROR), "assumed", frozenset({chosen.later}), source)

    def scaled(self, ratios: Array) -> MeasuredCurve:
        """On other links. ratios: by which each size takes longer."""
        if np.allclose(ratios, 1.0, rtol=1e-9):
            return self
        curve = Polyline(self.sizes, self.curve.many(self.sizes) * ratios)
        source = f"{self.source}, scaled to this chip's links"
        return replace(self, curve=curve, evidence=weakest(("transferred", self.evidence)), source=source)

    def price(self, size: float) -> Price:
        beyond = not self.sizes[0] <= size <= self.sizes[-1]
        sources = frozenset({self.source})
        return Price(self.curve(size), "network", self.evidence, self.relative_error, beyond, self.assumed, sources)


class Network:
    """Collectives of one chip under one engine. reference: the chip that the tables were measured on, None: this one.

    A group is a `Span`, or a number of neighbours from the first of a domain on.
    """

    def __init__(self, chip: Chip, tables: Mapping[str, Chosen], engine: str, reference: Chip | None = None) -> None:
        self._chip = chip
        self._engine = engine
        self._reference = reference or chip
        self._curves = {key: MeasuredCurve.of(key, chosen) for key, chosen in tables.items()}
        self._scaled: dict[tuple[str, Span], MeasuredCurve] = {}

    def collective(
        self, op: Collective, total_bytes: float, group: int | Span, *, captured: bool = True, tables: str = ""
    ) -> Price:
        """One collective over the devices of `group`.

        tables: the engine whose all-reduce it is, where that is another's. captured: its kernel as replayed from a
        graph; otherwise as launched from the host. Raises PriceError when the chip has no figure of a link it goes
        over.
        """
        span = self._span(group)
        if span.devices <= 1 or total_bytes <= 0:
            return FREE
        names = [f"{op}/{span.devices}/nccl"]
        if (measured_here := f"{op}/{span.devices}/any") in self._curves:  # on the machine itself
            names = [measured_here]
        elif op == "all_reduce":
            wanted = tables or self._engine
            own = f"{op}/{span.devices}/{wanted}"
            engine = wanted if f"{own}-graph" in self._curves else "sglang"
            names = [f"{op}/{span.devices}/{engine}-graph", *names]
        for name in names:
            if name in self._curves and self._lies_as_measured(span, span.devices):
                found = self._measured(name, op, span, span.devices).price(total_bytes)
                launched = f"{name.removesuffix('-graph')}-eager"
                if captured or launched not in self._curves:
                    return found
                # buffers are registered in graphs alone; where eager is no slower, that is noise
                apart = self._measured(launched, op, span, span.devices).price(total_bytes)
                return max(found, apart, key=lambda price: price.seconds)
        return self._formula(op, total_bytes, span)

    def deepep(self, phase: Literal["dispatch", "combine"], mode: Literal["ll", "normal"],
               tokens: float, hidden: int, top_k: int, group: int | Span) -> Price:  # fmt: skip
        """DeepEP all-to-all of `tokens` tokens per rank: dispatch in 8 bits, combine in 16.

        Measured at 8, 16, 32 and 64 ranks; in between the next larger one is taken, beyond the largest it
        is marked extrapolated. Where none was measured on links of the kind that the ranks talk over (within a domain,
        or across), it is an all-to-all by formula.
        """
        span = self._span(group)
        if span.devices <= 1 or tokens <= 0:
            return FREE
        size = tokens * top_k * hidden * (1.0 if phase == "dispatch" else 2.0)
        prefix = f"deepep_{mode}_{phase}/"
        tables = sorted(int(k.split("/")[1]) for k in self._curves if k.startswith(prefix))
        measured = [ranks for ranks in tables if self._lies_as_measured(span, ranks)]
        if not measured and f"all_to_all/{span.devices}/any" in self._curves:
            return self.collective("all_to_all", size, span)
        if not measured:
            return self._formula("all_to_all", size, span)
        fitting = next((ranks for ranks in measured if ranks >= span.devices), measured[-1])
        price = self._measured(f"{prefix}{fitting}/any", "all_to_all", span, fitting).price(size)
        far = price.extrapolated or span.devices > measured[-1]
        return replace(price, extrapolated=far)

    def hops(self, size_bytes: float, hops: Hops) -> Price:
        """A message handed on from stage to stage of a pipeline."""
        return total(
            self.point_to_point(size_bytes, across_domains=out, across_nodes=between).times(count)
            for count, between, out in (
                (hops.inside, False, False), (hops.across_nodes, True, False), (hops.across_domains, True, True)
            )
            if count
        )  # fmt: skip

    def point_to_point(self, size_bytes: float, *, across_domains: bool = False, across_nodes: bool = False) -> Price:
        """One message between two devices, e.g. activations between pipeline stages."""
        if size_bytes <= 0:
            return FREE
        where = "two scale-up domains" if across_domains else "one scale-up domain"
        link = _link(self._chip, across_domains, f"a hop between pipeline stages in {where}")
        used = ["overhead.p2p_latency_s", "efficiency.network"]
        start = _figure(self._chip.p2p_latency_s, "overhead.p2p_latency_s")
        if across_domains:
            start += link.latency_s
            used.append("link.scale_out.latency_s")
        elif across_nodes and link.cross_node_latency_s is not None:
            start += max(0.0, link.cross_node_latency_s - link.latency_s)
        seconds = start + size_bytes / (link.bandwidth_bytes_per_s * link.efficiency)
        return self._by_formula(seconds, used)

    # ---- measured -----------------------------------------------------------------------------------

    def _span(self, group: int | Span) -> Span:
        return group if isinstance(group, Span) else _neighbours(group, self._chip)

    def _lies_as_measured(self, span: Span, ranks: int) -> bool:
        """Whether the devices talk over links of the same kind as `ranks` neighbours of the chip that was measured."""
        return (span.domains > 1) == (_neighbours(ranks, self._reference).domains > 1)

    def _measured(self, name: str, op: Collective, span: Span, ranks: int) -> MeasuredCurve:
        """A table's curve, scaled to this chip's links. ranks: those it was measured over."""
        if (name, span) not in self._scaled:
            found, here = self._curves[name], _neighbours(ranks, self._chip) if ranks != span.devices else span
            there = _neighbours(ranks, self._reference)
            if self._reference is not self._chip and _known(self._chip, here) and _known(self._reference, there):
                mine, theirs = (
                    np.array([_seconds(chip, op, size, at)[0] for size in found.sizes])
                    for chip, at in ((self._chip.filled(self._reference), here), (self._reference, there))
                )
                found = found.scaled(mine / theirs)
            self._scaled[name, span] = found
        return self._scaled[name, span]

    # ---- by formula ---------------------------------------------------------------------------------

    def _formula(self, op: Collective, total_bytes: float, span: Span) -> Price:
        seconds, used = _seconds(self._chip, op, total_bytes, span)
        return self._by_formula(seconds, used, span.domains > 1)

    def _by_formula(self, seconds: float, used: list[str], far: bool = False) -> Price:
        assumed = self._chip.assumed("link.scale_up.domain_devices", *used)
        evidence: PriceEvidence = "assumed" if assumed else "transferred"
        sources = frozenset({f"latency and bandwidth of the profile of {self._chip.name}"})
        return Price(seconds, "network", evidence, FORMULA_ERROR, far, assumed, sources)


def _neighbours(count: int, chip: Chip) -> Span:
    return Span.of(range(count), chip.domain, chip.node)


def _known(chip: Chip, span: Span) -> bool:
    """Whether a chip has the bandwidths that a collective over the span goes over."""
    return (span.together == 1 or chip.scale_up is not None) and (span.domains == 1 or chip.scale_out is not None)


def _link(chip: Chip, out: bool, what: str) -> Link:
    link = chip.scale_out if out else chip.scale_up
    if link is None:
        field = f"link.{'scale_out' if out else 'scale_up'}.bandwidth_bytes_per_s"
        raise PriceError(f"{chip.name} has no {field}, which {what} needs: supply it with --set {field}=… in bytes/s")
    return link


def _figure(value: float | None, path: str) -> float:
    return DEFAULTS[path][0] if value is None else value


def _seconds(chip: Chip, op: Collective, total_bytes: float, span: Span) -> tuple[float, list[str]]:
    """(seconds of a collective, the figures that it is made of besides bandwidths).

    Inside a domain first, by the fewest devices that share one, then across domains; an all-to-all does both at once.
    """
    group, inside, domains = span.devices, span.together, span.domains
    what = f"{_SAYS[op]} over {span.text}"
    ways = 2.0 if op == "all_reduce" else 1.0
    used = ["overhead.collective_launch_s", "efficiency.network"]
    start = latency = _figure(chip.collective_launch_s, "overhead.collective_launch_s")
    local = remote = steps_s = 0.0
    if inside > 1:
        near = _link(chip, False, what)
        rate = near.bandwidth_bytes_per_s * near.efficiency
        steps = np.ceil(np.log2(inside))
        between = min(np.ceil(np.log2(-(-span.nodes // domains))), steps)  # of them between servers
        cross = near.latency_s if near.cross_node_latency_s is None else near.cross_node_latency_s
        steps_s = (steps - between) * near.latency_s + between * cross
        latency += ways * steps_s
        share = (inside - 1) / (group if op == "all_to_all" else inside)
        local = VOLUME[op] * share * total_bytes / rate
        used.append("link.scale_up.latency_s")
    if domains > 1:
        far = _link(chip, True, what)
        rate = far.bandwidth_bytes_per_s * far.efficiency
        # of the smallest all-reduce over two domains, what is not spent inside them, by the two ways it goes
        first = max((far.collective_latency_s - start - 2.0 * steps_s) / 2.0, far.latency_s)
        latency += ways * (first + (np.ceil(np.log2(domains)) - 1) * far.latency_s)
        if op != "all_to_all":
            latency += ways / 2.0 * min(RING_S_PER_BYTE * total_bytes, RING_LIMIT_S)
        if op == "all_to_all":
            remote = total_bytes * (group - inside) / group / rate
        else:
            remote = VOLUME[op] * (domains - 1) / domains * total_bytes / inside / rate
        used += ["link.scale_out.collective_latency_s", *(["link.scale_out.latency_s"] if domains > 2 else [])]
    busy = max(local, remote) if op == "all_to_all" else local + remote
    return float(latency + busy), used
