"""A fitted kernel on a chip other than the one it was fitted on, or with figures other than it was fitted beside.

Peaks and bandwidths need nothing here: a kernel's efficiencies are shares of them. What does is the fixed time of a
kernel and the shares themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from runtime.pricing.chip import RATES, Chip
from runtime.pricing.kernel import Kernel, Rates

BESIDE = (
    "node.devices",
    *(
        f"link.scale_up.{name}"
        for name in ("bandwidth_bytes_per_s", "latency_s", "cross_node_latency_s", "domain_devices")
    ),
    *(f"link.scale_out.{name}" for name in ("bandwidth_bytes_per_s", "latency_s", "collective_latency_s")),
    *(f"overhead.{name}_s" for name in ("kernel_launch", "vector_launch", "collective_launch")),
    *(f"efficiency.{name}" for name in ("compute", "memory", "network")),
)
"""Figures of a measured chip that its tables stand beside: another value scales them. `bench/fit_prices.py` writes
them into the price file, next to the rates that efficiencies are shares of."""
SINGLE_LAUNCH = ("gemm", "memory")
"""Families that are one kernel; the others are several, and their fixed time is no launch of one."""


def reference_chip(measured: Mapping[str, Any]) -> Chip | None:
    """The chip that a price file's tables were measured on, by the figures that the file states; None where it states
    none."""
    about = measured.get("relative_to")
    if about is None:
        return None
    figures: Mapping[str, float] = about.get("figures", {})
    peaks = {f"chip.peak.{name}_flops_per_s": rate for name, rate in about["peak_flops_per_s"].items()}
    rest = {"chip.memory.bandwidth_bytes_per_s": about["memory_bandwidth_bytes_per_s"], **peaks, **figures}
    return Chip.from_fields(measured["profile"], rest.get)


def stated(get: Callable[[str], float | None]) -> dict[str, Any]:
    """`relative_to` of a price file whose tables were measured on a chip of these figures, by dotted field."""
    return {
        "peak_flops_per_s": {name: rate for name in RATES if (rate := get(f"chip.peak.{name}_flops_per_s"))},
        "memory_bandwidth_bytes_per_s": get("chip.memory.bandwidth_bytes_per_s"),
        "figures": {path: number for path in BESIDE if (number := get(path)) is not None},
    }


def own_rates(chip: Chip) -> Rates | None:
    """What a machine's own calibration measured; None where nothing did."""
    return Rates.of(chip.compute_curve, chip.memory_curve) if chip.compute_curve and chip.memory_curve else None


class Changes:
    """Kernels measured on `reference`, on a chip that has other figures: scaled by the ratio of each.

    kin_vectors: of another chip of its architecture, the FLOP/s beside matrix products; 0 for itself. What a kernel
    takes beyond its products at their peak rate is work of the rest of its cores (exponentials, scales, addresses),
    which goes by their own rate:

        1 / efficiency - 1  =  (1 / efficiency of the reference - 1) x (ratio of peaks / ratio of vector rates)

    H20 has 15 % of H200's peak and 66 % of its vector rate: FlashMLA reaches 126 to 130 of its 148 TFLOP/s
    (deepseek-ai/FlashMLA issue 30), FlashAttention 3 126 (Dao-AILab/flash-attention issue 1310).
    """

    def __init__(self, chip: Chip, reference: Chip, kin_vectors: float = 0.0) -> None:
        self._launch = _ratio(chip.kernel_launch_s, reference.kernel_launch_s)
        self._vector = _ratio(chip.vector_launch_s, reference.vector_launch_s)
        self._compute = _ratio(chip.compute_efficiency, reference.compute_efficiency)
        self._memory = _ratio(chip.memory_efficiency, reference.memory_efficiency)
        known = kin_vectors and chip.vector_flops_per_s
        self._vectors = chip.vector_flops_per_s / kin_vectors if known else 0.0
        self._chips = chip, reference

    def __call__(self, kernel: Kernel) -> Kernel:
        launch = self._vector if kernel.family == "memory" else self._launch
        kept = kernel.constants
        beside = 1.0 / (kept.compute_efficiency + (1.0 - kept.compute_efficiency) * self._rest(kernel))
        return kernel.adjusted(kept.launch_s * launch, self._compute * beside, self._memory)

    def _rest(self, kernel: Kernel) -> float:
        """How much less the rest of the cores do beside the products of a kernel, at the rate that those run at."""
        if not self._vectors or kernel.family == "memory":
            return 1.0
        mine, theirs = (chip.peak(_multiplied_in(kernel.key)) for chip in self._chips)
        return mine / theirs / self._vectors


def _multiplied_in(key: str) -> str:
    """The format that a kernel of a price file multiplies in, by its key; a cache's is not it."""
    family, *parts = key.partition("@")[0].split("/")
    if family.startswith("block_"):
        return parts[3]
    if family in ("gemm", "bmm", "moe"):
        return parts[0]
    return "bf16" if family.startswith(("gqa_", "mla_")) else "fp8-block"


class OtherChip:
    """Kernels of the joint fit on a chip of which nothing was measured, or, with measured curves, only its rates.

    joint: constants of the kernel that the profile's own efficiencies are compared with.
    """

    def __init__(self, chip: Chip, joint: Mapping[str, float]) -> None:
        self._chip = chip
        self._own = own_rates(chip)
        self._compute = _ratio(chip.compute_efficiency, joint["compute_efficiency"])
        self._memory = _ratio(chip.memory_efficiency, joint["memory_efficiency"])
        self._joint = joint

    def __call__(self, kernel: Kernel) -> Kernel:
        vector = kernel.family == "memory"
        field = "overhead.vector_launch_s" if vector else "overhead.kernel_launch_s"
        launch = self._chip.vector_launch_s if vector else self._chip.kernel_launch_s
        if self._own:
            return kernel.measured_by(self._own, launch or 0.0).resting_on(self._assumed({field: "0"}))
        fitted = kernel.constants.launch_s
        if launch is None:
            launch = fitted
        elif kernel.family not in SINGLE_LAUNCH:
            launch = max(launch, fitted)
        taken = {field: f"{(fitted if vector else self._joint['launch_s']) * 1e6:.1f} us, as on NVIDIA GPUs"}
        taken["efficiency.memory"] = f"{self._joint['memory_efficiency']:.2f}, as GEMMs reach on NVIDIA GPUs"
        if not vector:
            taken["efficiency.compute"] = f"{self._joint['compute_efficiency']:.2f}, as GEMMs reach on NVIDIA GPUs"
        return kernel.adjusted(launch, self._compute, self._memory).resting_on(self._assumed(taken))

    def _assumed(self, taken: Mapping[str, str]) -> frozenset[str]:
        return frozenset(f"{field} {text}" for field, text in taken.items() if field in self._chip.absent)


def _ratio(mine: float | None, theirs: float | None) -> float:
    """Of two figures; 1 where one of them is not known."""
    return mine / theirs if mine and theirs else 1.0
