"""The handful of chip figures a price needs, with the unit in every name.

Deliberately independent of the profile loader (only the names of formats and their rates are shared):
`Chip.from_fields` takes a look-up by dotted name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from foundation.errors import UsageError
from hw_profiles.fields import RATE_OF_SCHEME
from model.formats import matrix_format
from runtime.pricing.price import PriceError

Knots = tuple[tuple[float, float], ...]
RATES = ("fp32", "bf16", "fp16", "fp8", "int8", "fp4")
"""The peak rates that prices are made of."""
DEFAULTS: Mapping[str, tuple[float, str]] = {
    "link.scale_up.latency_s": (1e-6, "1 us"),
    "link.scale_up.domain_devices": (8, "8"),
    "link.scale_out.latency_s": (5e-6, "5 us"),
    "link.scale_out.collective_latency_s": (44e-6, "44 us"),
    "overhead.collective_launch_s": (10e-6, "10 us"),
    "overhead.p2p_latency_s": (10e-6, "10 us"),
    "efficiency.network": (0.65, "0.65"),
}
"""What stands in for a figure that a profile does not have, and how it is written. 0.65 is the median of NCCL above
200 MB on five measured NVLink chips (10th to 90th percentile 0.49 to 0.75); 44 us is NCCL's over InfiniBand."""


def rate_of(weight_format: str) -> str:
    """Which of `RATES` a weight format computes at. Raises `PriceError`."""
    try:
        base = matrix_format(weight_format).base
    except UsageError as error:
        raise PriceError(str(error)) from None
    return "fp32" if base == "f32" else RATE_OF_SCHEME[base]


_KERNELS = ("efficiency.compute", "efficiency.memory", "overhead.kernel_launch_s", "overhead.vector_launch_s")


@dataclass(frozen=True, slots=True)
class Link:
    """One level of the network. Bandwidth is per device and per direction.

    efficiency: share of the bandwidth that large collectives reach. cross_node_latency_s: of a hop between two servers
    of one domain; None: as `latency_s`. collective_latency_s: of the smallest all-reduce over two domains.
    """

    bandwidth_bytes_per_s: float
    latency_s: float = DEFAULTS["link.scale_up.latency_s"][0]
    domain_devices: int = 8
    efficiency: float = DEFAULTS["efficiency.network"][0]
    cross_node_latency_s: float | None = None
    collective_latency_s: float = DEFAULTS["link.scale_out.collective_latency_s"][0]


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak rates are dense FLOP/s by number format (see `RATES`).

    node_devices: devices in one server; None: as many as share the scale-up link. sustained_clock_fraction: of the
    clock at which kernels were measured, what long matrix products keep under the power limit. absent: figures that
    the profile does not have, by dotted field. vector_flops_per_s: of its cores beside matrix products; 0 if unknown.

    compute_curve, memory_curve: (size, share of the peak) knots by FLOP and by bytes, where the profile's own
    machine was measured; they then say more than the single factors.

    cache_bytes, cache_bandwidth_bytes_per_s: what its last cache holds, and how fast weights are read that stay
    there; 0 if unknown. kept: the share of a step's weights that do.
    """

    name: str
    peak_flops_per_s: Mapping[str, float]
    memory_bandwidth_bytes_per_s: float
    scale_up: Link | None = None
    scale_out: Link | None = None
    kernel_launch_s: float | None = None
    vector_launch_s: float | None = None
    collective_launch_s: float | None = None
    p2p_latency_s: float | None = None
    compute_efficiency: float | None = None
    memory_efficiency: float | None = None
    compute_curve: Knots | None = None
    memory_curve: Knots | None = None
    node_devices: int | None = None
    sustained_clock_fraction: float = 1.0
    cache_bytes: float = 0.0
    absent: frozenset[str] = frozenset()
    vector_flops_per_s: float = 0.0
    cache_bandwidth_bytes_per_s: float = 0.0
    kept: float = 0.0

    def keeping(self, kept: float) -> Chip:
        """This chip, with steps that find such a share of their weights in its cache: rates that were measured from
        memory (`memory_curve`) are in that part the cache's."""
        rate, curve = self.cache_bandwidth_bytes_per_s, self.memory_curve
        if not (kept and rate and curve):
            return self

        def faster(share: float) -> float:
            cold = self.memory_bandwidth_bytes_per_s * share
            return share / (1.0 - kept + kept * min(1.0, cold / rate))

        return replace(self, memory_curve=tuple((size, faster(share)) for size, share in curve), kept=kept)

    @property
    def domain(self) -> int:
        """Devices that share the scale-up link; where there is none, those of one server."""
        return self.scale_up.domain_devices if self.scale_up else self.node_devices or 8

    @property
    def node(self) -> int:
        """Devices in one server."""
        return self.node_devices or self.domain

    def assumed(self, *fields: str) -> frozenset[str]:
        """What stands in for those of the fields that the profile does not have, in words."""
        return frozenset(f"{path} {DEFAULTS[path][1]}" for path in fields if path in self.absent)

    def filled(self, other: Chip) -> Chip:
        """This chip, with the other's figures of links where it has none of its own."""

        def link(name: str) -> Link | None:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None or theirs is None:
                return mine
            taken = {
                field: getattr(theirs, field)
                for field, path in (
                    *((field, f"link.{name}.{field}") for field in ("latency_s", "collective_latency_s")),
                    ("efficiency", "efficiency.network"),
                )
                if path in self.absent
            }
            return replace(mine, **taken)

        launch = other.collective_launch_s if self.collective_launch_s is None else self.collective_launch_s
        return replace(self, scale_up=link("scale_up"), scale_out=link("scale_out"), collective_launch_s=launch)

    def peak(self, weight_format: str) -> float:
        """Dense FLOP/s for a weight format.

        A format the chip lacks runs at the 16-bit rate after widening, as real kernels do (weight-only);
        float32 does not: the tensor cores' rate says nothing about it.
        Raises PriceError when no usable rate is known.
        """
        own = rate_of(weight_format)
        for name in (own,) if own == "fp32" else (own, "bf16"):
            rate = self.peak_flops_per_s.get(name)
            if rate:
                return rate
        field = "fp32" if own == "fp32" else "bf16"
        raise PriceError(f"{self.name}: no peak rate for {weight_format}; --set chip.peak.{field}_flops_per_s=…")

    @classmethod
    def from_fields(
        cls, name: str, get: Callable[[str], float | None], measured: Mapping[str, Knots] | None = None
    ) -> Chip:
        """Builds a chip from `get(dotted_field) -> number or None`: `Chip.from_fields(p.name, p.number)`.

        measured: knots of the efficiency curves that were measured on the machine itself, by dotted field.
        Raises PriceError naming the field when the memory bandwidth or the 16-bit peak is absent.
        """
        peaks = {key: rate for key in RATES if (rate := get(f"chip.peak.{key}_flops_per_s"))}
        if "bf16" not in peaks and "fp16" in peaks:
            peaks["bf16"] = peaks["fp16"]
        bandwidth = get("chip.memory.bandwidth_bytes_per_s")
        if not bandwidth:
            raise PriceError(f"{name}: --set chip.memory.bandwidth_bytes_per_s=… is needed to price anything")
        if "bf16" not in peaks:
            raise PriceError(f"{name}: --set chip.peak.bf16_flops_per_s=… is needed to price anything")

        def figure(path: str) -> float:
            return get(path) or DEFAULTS[path][0]

        node = get("node.devices")
        domain = get("link.scale_up.domain_devices") or node or DEFAULTS["link.scale_up.domain_devices"][0]
        absent = {path for path in (*DEFAULTS, *_KERNELS) if get(path) is None}
        if node:
            absent.discard("link.scale_up.domain_devices")
        shares = figure("efficiency.network")
        scale_up = scale_out = None
        if rate := get("link.scale_up.bandwidth_bytes_per_s"):
            cross = get("link.scale_up.cross_node_latency_s")
            scale_up = Link(rate, figure("link.scale_up.latency_s"), int(domain), shares, cross)
        if rate := get("link.scale_out.bandwidth_bytes_per_s"):
            start = figure("link.scale_out.collective_latency_s")
            scale_out = Link(rate, figure("link.scale_out.latency_s"), 1 << 20, shares, None, start)
        return cls(
            name,
            peaks,
            bandwidth,
            scale_up,
            scale_out,
            get("overhead.kernel_launch_s"),
            get("overhead.vector_launch_s"),
            get("overhead.collective_launch_s"),
            get("overhead.p2p_latency_s"),
            get("efficiency.compute"),
            get("efficiency.memory"),
            (measured or {}).get("efficiency.compute"),
            (measured or {}).get("efficiency.memory"),
            int(node or domain),
            get("chip.sustained_clock_fraction") or 1.0,
            get("chip.memory.cache_bytes") or 0.0,
            frozenset(absent),
            get("chip.vector.fp32_flops_per_s") or 0.0,
            get("chip.memory.cache_bandwidth_bytes_per_s") or 0.0,
        )


def kept_share(cache_bytes: float, touched_bytes: ArrayLike) -> Any:
    """Of what is touched in turn, the share that a cache still holds when its turn comes again: all of it up to the
    cache's size, nothing from twice that size on."""
    return np.clip(2.0 * cache_bytes / np.maximum(touched_bytes, 1.0) - 1.0, 0.0, 1.0)
