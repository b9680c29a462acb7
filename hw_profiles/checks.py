"""Does a well-formed profile make physical sense? Used by `glm5 profiles check` and the tests.

A rate outside its band is not always wrong (B300 really has 1/15 of its bf16 rate left in int8), so the
bands on rates and domain sizes yield to a note: a figure that explains itself passes.
"""

from collections.abc import Callable, Iterator

from hw_profiles.fields import RATE_OF_SCHEME, asked_as
from hw_profiles.schema import Profile

# Rate of a format over the bf16 rate (fp16 where bf16 is absent), matmul unit.
RATIO_TO_BF16 = {
    "fp32": (0.02, 0.6),
    "tf32": (0.2, 0.6),
    "fp16": (0.9, 1.3),
    "fp8": (1.5, 2.5),
    "int8": (1.5, 2.5),
    "fp4": (3.0, 5.0),
    "int4": (3.0, 6.0),
}
# bf16 FLOP per byte of memory traffic at which compute and memory take equally long.
BALANCE = {"accelerator": (20.0, 600.0), "host": (0.5, 100.0)}
# Seconds to read the whole memory once.
SWEEP_S = {"accelerator": (0.005, 0.2), "host": (0.05, 30.0)}
# Sources that differ by more than this factor are a dispute, and a dispute is grade C.
DISPUTE = 1.3

_Problem = tuple[str, str]


def check(profile: Profile) -> list[str]:
    """One line for each implausible figure: profile, field, what to change. Empty if all is well."""
    checks: tuple[Callable[[Profile], Iterator[_Problem]], ...]
    checks = (_rates, _balance, _memory, _links, _ranges, _formats)
    return [f"{profile.name}: {field}: {what}" for run in checks for field, what in run(profile)]


def _explained(profile: Profile, path: str) -> bool:
    figure = profile.get(path)
    return bool(figure and (figure.note or figure.grade == "user"))


def _base_rate(profile: Profile) -> float | None:
    return profile.number("chip.peak.bf16_flops_per_s") or profile.number("chip.peak.fp16_flops_per_s")


def _rates(profile: Profile) -> Iterator[_Problem]:
    base = _base_rate(profile)
    for name, (low, high) in RATIO_TO_BF16.items():
        path = f"chip.peak.{name}_flops_per_s"
        rate = profile.number(path)
        if base and rate and not low <= rate / base <= high and not _explained(profile, path):
            fix = "correct it (dense, matmul unit only) or say why in its note"
            yield path, f"is {rate / base:.3g} times the bf16 rate, expected {low:g} to {high:g}; {fix}"


def _balance(profile: Profile) -> Iterator[_Problem]:
    base, path = _base_rate(profile), "chip.memory.bandwidth_bytes_per_s"
    bandwidth = profile.number(path)
    low, high = BALANCE[profile.kind]
    if base and bandwidth and not low <= base / bandwidth <= high:
        expected = f"expected {low:g} to {high:g} for kind {profile.kind}"
        yield path, f"gives {base / bandwidth:.3g} bf16 FLOP a byte, {expected}; check the units of both"


def _memory(profile: Profile) -> Iterator[_Problem]:
    capacity = profile.number("chip.memory.capacity_bytes")
    usable = profile.number("chip.memory.usable_bytes")
    bandwidth = profile.number("chip.memory.bandwidth_bytes_per_s")
    if capacity and usable and not 0.8 * capacity <= usable <= capacity:
        expected = f"expected 80 % to 100 % of the capacity {capacity:.4g}"
        yield "chip.memory.usable_bytes", f"is {usable:.4g}, {expected}; mind GB against GiB"
    low, high = SWEEP_S[profile.kind]
    if capacity and bandwidth and not low <= capacity / bandwidth <= high:
        fix = f"expected {low:g} to {high:g}; check capacity and bandwidth"
        yield "chip.memory.capacity_bytes", f"takes {capacity / bandwidth:.3g} s to read once, {fix}"


def _links(profile: Profile) -> Iterator[_Problem]:
    rates = {x: profile.number(f"link.{x}.bandwidth_bytes_per_s") for x in ("scale_up", "scale_out", "host")}
    up, out = rates["scale_up"], rates["scale_out"]
    memory = profile.number("chip.memory.bandwidth_bytes_per_s")
    if up and out and up < out:
        yield "link.scale_up.bandwidth_bytes_per_s", f"is {up:.3g}, below scale_out's {out:.3g}; swap them?"
    for name, rate in rates.items():
        if rate and memory and rate > memory:
            fix = f"above the memory bandwidth {memory:.3g}; give bytes/s, one direction"
            yield f"link.{name}.bandwidth_bytes_per_s", f"is {rate:.3g}, {fix}"
    near, far = (profile.number(f"link.scale_up.{x}") for x in ("latency_s", "cross_node_latency_s"))
    if near and far and near > far:
        yield "link.scale_up.latency_s", f"is {near:.3g}, above cross_node_latency_s {far:.3g}; swap them?"
    node, domain = profile.number("node.devices"), profile.number("link.scale_up.domain_devices")
    if node and domain and up and domain < node and not _explained(profile, "link.scale_up.domain_devices"):
        fix = f"less than the {node:g} devices of a server; correct it or say why in its note"
        yield "link.scale_up.domain_devices", f"is {domain:g}, {fix}"


def _ranges(profile: Profile) -> Iterator[_Problem]:
    for path, figure in profile.figures.items():
        if not figure.range:
            continue
        low, high = figure.range
        if not figure.note:
            yield path, "has a range; say in its note which source gives which value"
        if high > DISPUTE * low and figure.grade in ("A", "B"):
            yield path, f"its sources differ by a factor {high / low:.2g}; a dispute is grade C"


def _formats(profile: Profile) -> Iterator[_Problem]:
    for scheme in profile.formats.weights:
        path = f"chip.peak.{RATE_OF_SCHEME[scheme]}_flops_per_s"
        if profile.get(path) is None and not profile.formats.note:
            yield "formats.weights", f"lists {asked_as(scheme)}, but there is no {path}; add it or say why in its note"
