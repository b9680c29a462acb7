"""Every field a profile may have: its unit, the values that are not absurd, and what it means.

This table is the one place where a field is named. The loader validates against it, the errors quote it,
and README.md repeats it in prose (a test compares the two).
"""

import difflib
import math
from dataclasses import dataclass
from typing import Literal

from foundation.errors import shortened

ChipKind = Literal["accelerator", "host"]
RATE_FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4", "int4")
WEIGHT_SCHEMES = (
    "bf16", "fp16", "fp8-block", "fp8-tensor", "fp8-channel", "mxfp8", "mxfp4", "nvfp4", "nvfp4a16", "w8a8-int8",
    "w4a8", "w4a16", "w4afp8",
)  # fmt: skip
FORMAT_OF_SCHEME = {"fp8": "fp8-block", "w8a8": "w8a8-int8"}
"""Formats that a person asks for by another name (`--formats fp8`); a profile may list them by either."""
KV_FORMATS = ("bf16", "fp8", "int8")
TOPOLOGIES = ("switch", "full-mesh", "clos", "bridge", "pcie")

# Which peak rate a weight/activation scheme computes at (the activations decide).
RATE_OF_SCHEME = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8-block": "fp8",
    "fp8-tensor": "fp8",
    "fp8-channel": "fp8",
    "mxfp8": "fp8",
    "mxfp4": "fp4",
    "nvfp4": "fp4",
    "nvfp4a16": "bf16",
    "w8a8-int8": "int8",
    "w4a8": "int8",
    "w4a16": "bf16",
    "w4afp8": "fp8",
}


@dataclass(frozen=True)
class Field:
    """One numeric field: `unit`, the closed interval [`low`, `high`] that is not absurd, `meaning`.

    answers: plans and simulations depend on it; otherwise it is there for people to compare.
    """

    unit: str
    low: float
    high: float
    meaning: str
    whole: bool = False
    answers: bool = True


def _fields() -> dict[str, Field]:
    table: dict[str, Field] = {}
    for name in RATE_FORMATS:
        table[f"chip.peak.{name}_flops_per_s"] = Field(
            "FLOP/s", 1e6, 1e17, f"dense {name} rate of the matmul unit alone", answers=name not in ("tf32", "int4")
        )
    for name in ("fp32", "fp16", "bf16", "int8"):
        table[f"chip.vector.{name}_flops_per_s"] = Field(
            "FLOP/s", 1e6, 1e16, f"{name} rate of the vector (non-matmul) unit", answers=False
        )
    bandwidth, latency = ("bytes/s", 1e3, 1e14), ("s", 1e-9, 1.0)
    table |= {
        "chip.memory.capacity_bytes": Field("bytes", 1e6, 1e13, "device memory as built"),
        "chip.memory.usable_bytes": Field("bytes", 1e6, 1e13, "device memory an application sees in all"),
        "chip.memory.bandwidth_bytes_per_s": Field(*bandwidth, "peak bandwidth, reads plus writes"),
        "chip.memory.cache_bytes": Field("bytes", 1, 1e12, "what the last cache before the memory holds"),
        "chip.memory.cache_bandwidth_bytes_per_s": Field(*bandwidth, "reads of small matrices that this cache holds"),
        "chip.sustained_clock_fraction": Field(
            "share",
            0.3,
            1.0,
            "share of the clock of short measurements that long matrix products keep under the power limit",
        ),
        "chip.board_power_w": Field("W", 1, 1e5, "most that a device draws, its memory included", answers=False),
        "node.devices": Field("devices", 1, 1024, "devices in one server", whole=True),
        "link.die.bandwidth_bytes_per_s": Field(
            *bandwidth, "between two dies of one package, per direction", answers=False
        ),
        "link.die.latency_s": Field(*latency, "between two dies of one package", answers=False),
        "link.scale_up.bandwidth_bytes_per_s": Field(*bandwidth, "per device and direction, all links"),
        "link.scale_up.latency_s": Field(*latency, "one hop inside the domain, same server"),
        "link.scale_up.cross_node_latency_s": Field(*latency, "one hop inside the domain, between servers"),
        "link.scale_up.domain_devices": Field("devices", 2, 1e6, "devices sharing the fabric", whole=True),
        "link.scale_up.links": Field("links", 1, 1024, "links the bandwidth is spread over", whole=True, answers=False),
        "link.scale_out.bandwidth_bytes_per_s": Field(*bandwidth, "per device and direction"),
        "link.scale_out.latency_s": Field(*latency, "one message between domains"),
        "link.scale_out.collective_latency_s": Field(*latency, "smallest all-reduce over two domains"),
        "link.host.bandwidth_bytes_per_s": Field(*bandwidth, "device to host memory, per direction"),
        "link.host.latency_s": Field(*latency, "device to host memory"),
        "overhead.kernel_launch_s": Field(*latency, "fixed time of a matmul kernel, however small"),
        "overhead.vector_launch_s": Field(*latency, "fixed time of an element-wise kernel, however small"),
        "overhead.collective_launch_s": Field(*latency, "time of the smallest collective in one server"),
        "overhead.p2p_latency_s": Field(*latency, "time of the smallest send between two devices"),
        "overhead.serving_front_s": Field(*latency, "a request's way to the queue, where engine glm5 serves"),
        "overhead.serving_request_s": Field(*latency, "the host's work on a request after that"),
        "overhead.serving_step_s": Field(*latency, "the host's work on a step there, beside the device's"),
        "overhead.serving_row_s": Field(*latency, "what each sequence of the step adds to that"),
        "overhead.serving_ahead_s": Field(*latency, "the least a step of answers takes there, launched ahead"),
        "overhead.serving_idle_s": Field(*latency, "what a step takes longer that finds the host at rest"),
        "overhead.serving_warming_s": Field(*latency, "what the step after that takes longer; later ones ever less"),
        "overhead.collective_buffer_bytes": Field("bytes", 1, 1e12, "memory the collective library takes"),
        "overhead.communicator_buffer_bytes": Field("bytes", 1, 1e12, "the same, for each group of devices"),
        "overhead.runtime_reserved_bytes": Field("bytes", 1, 1e12, "memory driver context and runtime take"),
    }
    return table


FIELDS: dict[str, Field] = _fields()
_ANY = Field("", 0, 0, "")

# Efficiency curves: path -> unit of the size axis.
CURVES = {"efficiency.compute": "FLOP", "efficiency.memory": "bytes", "efficiency.network": "bytes"}

# Text fields: path -> allowed values, or None for free text.
LABELS: dict[str, tuple[str, ...] | None] = {
    "chip.series": None,
    "chip.memory.kind": None,
    "link.scale_up.topology": TOPOLOGIES,
    "link.scale_out.topology": TOPOLOGIES,
}

_UNITS = ("_flops_per_s", "_bytes_per_s", "_bytes", "_s", "_w")
ROOTS = ("chip", "node", "link", "overhead", "efficiency")


def is_profile_path(path: str) -> bool:
    """True if `--set path=…` is meant for a profile (and not, say, for `model.index_topk`)."""
    return path.split(".", 1)[0] in ROOTS


def asked_as(scheme: str) -> str:
    """The name that `--formats` has for a weight format."""
    return next((name for name, known in FORMAT_OF_SCHEME.items() if known == scheme), scheme)


def refused(path: str) -> str | None:
    """Why setting a known field would change no plan and no simulation, or None where it does change some."""
    if path in LABELS or not FIELDS.get(path, _ANY).answers:
        return "no plan and no simulation depends on it; it is there for people to compare"
    return None


def suggest(path: str, known: tuple[str, ...] | None = None) -> str:
    """`'; did you mean X?'` for a misspelt dotted path, or an empty string.

    The nearest, with its unit or without: who writes `bandwith` means `bandwidth_bytes_per_s`.
    """
    known = known or (*FIELDS, *CURVES, *LABELS)

    def likeness(name: str) -> float:
        without = next((name.removesuffix(unit) for unit in _UNITS if name.endswith(unit)), name)
        return max(difflib.SequenceMatcher(None, path, each).ratio() for each in (name, without))

    nearest = max(known, key=likeness, default="")
    return f"; did you mean {nearest}?" if nearest and likeness(nearest) >= 0.75 else ""


def wrong_value(path: str, value: object) -> str | None:
    """What is wrong with `value` for the numeric field `path`, or None if nothing is."""
    field = FIELDS[path]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"must be a number in {field.unit}, got {show(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number in {field.unit}, got {value}"
    if value <= 0:
        return f"must be greater than 0 {field.unit}, got {show(value)}; leave out what is unknown"
    if not field.low <= value <= field.high:
        span = f"{field.low:g} and {field.high:g} {field.unit}"
        return f"must lie between {span}, got {show(value)}; check the unit"
    if field.whole and value != int(value):
        return f"must be a whole number of {field.unit}, got {show(value)}"
    return None


def show(value: object) -> str:
    """`value` on one line, cut to a readable length."""
    try:
        text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or tables nested as deep
        return "a value too large to print"
    return shortened(text)
