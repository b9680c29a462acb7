"""The handful of chip figures a price needs, with the unit in every name.

Deliberately independent of the profile loader (only the names of formats and their rates are shared):
`Chip.from_fields` takes a look-up by dotted name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from foundation.errors import UsageError
from hw_profiles.fields import RATE_OF_SCHEME
from model.formats import matrix_format
from runtime.pricing.price import PriceError, PriceEvidence

Knots = tuple[tuple[float, float], ...]


def rate_of(weight_format: str) -> str:
    """Which peak rate a weight format computes at: "fp32", "bf16", "fp8", "int8" or "fp4". Raises `PriceError`."""
    try:
        base = matrix_format(weight_format).base
    except UsageError as error:
        raise PriceError(str(error)) from None
    return "fp32" if base == "f32" else RATE_OF_SCHEME[base].replace("fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Link:
    """One level of the network. Bandwidth is per device and per direction."""

    bandwidth_bytes_per_s: float
    latency_s: float = 1e-6
    domain_devices: int = 8
    efficiency: float = 0.65
    """Share of the bandwidth that large collectives reach; 0.65 is the median of NCCL above 200 MB on five
    measured NVLink chips (10th to 90th percentile 0.49 to 0.75)."""


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak rates are dense FLOP/s by number format ('fp32', 'bf16', 'fp8', 'int8', 'fp4').

    compute_curve, memory_curve: (size, share of the peak) knots by FLOP and by bytes, where the profile's own
    machine was measured; they then say more than the single factors.
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
    evidence: PriceEvidence = "datasheet"
    sources: Mapping[str, str] = field(default_factory=dict)

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
        peaks = {
            key: rate for key in ("fp32", "bf16", "fp8", "int8", "fp4") if (rate := get(f"chip.peak.{key}_flops_per_s"))
        }
        if "bf16" not in peaks and (half := get("chip.peak.fp16_flops_per_s")):
            peaks["bf16"] = half
        bandwidth = get("chip.memory.bandwidth_bytes_per_s")
        if not bandwidth:
            raise PriceError(f"{name}: --set chip.memory.bandwidth_bytes_per_s=… is needed to price anything")
        if "bf16" not in peaks:
            raise PriceError(f"{name}: --set chip.peak.bf16_flops_per_s=… is needed to price anything")

        def link(prefix: str) -> Link | None:
            rate = get(f"{prefix}.bandwidth_bytes_per_s")
            if not rate:
                return None
            near = prefix == "link.scale_up"
            latency = get(f"{prefix}.latency_s") or (1e-6 if near else 5e-6)
            domain = int(get("link.scale_up.domain_devices") or 8) if near else 1 << 20
            return Link(rate, latency, domain, get("efficiency.network") or 0.65)

        return cls(
            name,
            peaks,
            bandwidth,
            link("link.scale_up"),
            link("link.scale_out"),
            get("overhead.kernel_launch_s"),
            get("overhead.vector_launch_s"),
            get("overhead.collective_launch_s"),
            get("overhead.p2p_latency_s"),
            get("efficiency.compute"),
            get("efficiency.memory"),
            (measured or {}).get("efficiency.compute"),
            (measured or {}).get("efficiency.memory"),
        )
