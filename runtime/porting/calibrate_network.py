"""Measures what the devices of one host take to talk to one another, through the backend's own way to run one program
on several of them (`Program.mesh`).

Every collective of the graph, and a send from each device to the next, is timed by the size of its vector, as
`runtime.pricing.network` counts it. A time is the difference of two programs, one with a few collectives more than the
other, each waiting for the one before: what a call takes is in both. Groups are the first 2, 4, 8, .. devices, and all.

    all_reduce/N/any, ..    curves of a price file, for groups of N
    link.scale_up.*, overhead.collective_launch_s, overhead.p2p_latency_s, efficiency.network
                            what the formula makes of other groups, from the smallest and the largest vectors
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from backends.interface import Backend, Program
from runtime.porting.calibrate_sizes import DTYPES, SOURCE, host_bytes
from runtime.porting.kernel_fit import curve
from runtime.pricing.network import VOLUME

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
_AXIS, _SHARE = "device", 64
_MORE, _MORE_OF_LARGE, _LARGE_BYTES = 16, 4, 2.0**20
_LEAST_S = 1e-7

MessageTimes = Mapping[tuple[str, int], Sequence[tuple[float, float]]]
"""By op and devices of the group: (bytes of the vector, seconds)."""


@dataclasses.dataclass(frozen=True)
class MeasuredNetwork:
    """What was measured between the `devices` of one host."""

    devices: int
    sent: MessageTimes

    def collectives(self) -> dict[str, Any]:
        """The `collectives` of a price file."""
        return {f"{op}/{group}/any": curve(points, SOURCE) for (op, group), points in self.sent.items() if op in VOLUME}

    def figures(self) -> dict[str, tuple[float, str]]:
        """Fields of a profile, with notes."""
        everyone = {op: sorted(self.sent[op, self.devices]) for op in OPS}
        smallest = {op: points[0][1] for op, points in everyone.items()}
        steps = math.ceil(math.log2(self.devices))
        # an all-reduce goes there and back where an all-gather goes once
        hop_s = max((smallest["all_reduce"] - smallest["all_gather"]) / steps, _LEAST_S)
        launch_s = max(smallest["all_gather"] - steps * hop_s, _LEAST_S)
        size, seconds = everyone["send"][-1]
        sends, reduces = size / max(seconds - smallest["send"], _LEAST_S), self._reduced_bytes_per_s()
        rate, all_of_them = max(sends, reduces), f"All {self.devices} devices of this host at once."
        return {
            "node.devices": (float(self.devices), "As the backend reports them."),
            "link.scale_up.domain_devices": (float(self.devices), "Those of this host; others were not measured."),
            "link.scale_up.bandwidth_bytes_per_s": (
                rate,
                f"Best of a send to the next and an all-reduce. {all_of_them}",
            ),
            "link.scale_up.latency_s": (hop_s, "From the smallest all-reduce and the smallest all-gather."),
            "overhead.collective_launch_s": (launch_s, "The smallest all-gather, without its hops."),
            "overhead.p2p_latency_s": (smallest["send"], f"The smallest send to the next. {all_of_them}"),
        }

    def shares(self) -> tuple[tuple[float, float], ...]:
        """(bytes, share of the bandwidth) of the largest all-reduce, as `efficiency.network`."""
        size, _ = max(self.sent["all_reduce", self.devices])
        rate = self.figures()["link.scale_up.bandwidth_bytes_per_s"][0]
        return ((size, min(1.0, self._reduced_bytes_per_s() / rate)),)

    def _reduced_bytes_per_s(self) -> float:
        points = sorted(self.sent["all_reduce", self.devices])
        size, seconds = points[-1]
        moved = VOLUME["all_reduce"] * (self.devices - 1) / self.devices * size
        return moved / max(seconds - points[0][1], _LEAST_S)


def local_devices(backend: Backend) -> list[Any]:
    """The runtime's own devices of this host, where the backend runs programs of several; else none."""
    offered = backend.capabilities()
    if not backend.spreads or len(offered.devices) < 2:
        return []
    return list(jax.local_devices(backend=offered.platform))


def measure_network(
    backend: Backend,
    devices: Sequence[Any],
    dtype: str,
    rounds: int,
    sizes: Sequence[float],
) -> MeasuredNetwork:
    """rounds: of each program. sizes: of vectors, in bytes, as far as a device's memory has room."""
    held = backend.capabilities().devices[0].memory_bytes or host_bytes() / len(devices)
    sizes = [size for size in sizes if size <= held / _SHARE] or [min(sizes)]
    groups = sorted({*(2**i for i in range(1, len(devices).bit_length()) if 2**i <= len(devices)), len(devices)})
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for group in groups:
        for op in OPS:
            found[op, group] = _timed(backend, devices[:group], op, dtype, rounds, sizes)
    return MeasuredNetwork(len(devices), found)


def _timed(
    backend: Backend, devices: Sequence[Any], op: str, dtype: str, rounds: int, sizes: Sequence[float]
) -> list[tuple[float, float]]:
    """(bytes, seconds) of one op over a group; rounds go over all sizes, so that a slow spell hits each."""
    group, each = len(devices), DTYPES[dtype].itemsize
    runs = []
    for size in sizes:
        count = max(1, round(size / each / group)) * group  # elements of the vector
        local = count // group if op == "all_gather" else count
        more = _MORE if size <= _LARGE_BYTES else _MORE_OF_LARGE
        few, many = (_loaded(backend, devices, op, repeats, local, dtype) for repeats in (1, 1 + more))
        runs.append((float(count * each), few, many, more, _zeros(devices, local, dtype)))
    kept: list[tuple[list[float], list[float]]] = [([], []) for _ in runs]
    for turn in range(rounds + 1):
        for (_, few, many, _, x), times in zip(runs, kept, strict=True):
            for run, taken in zip((few, many), times, strict=True):
                begin = time.perf_counter()
                backend.get(run(x)[1])
                if turn:  # the first one warms up
                    taken.append(time.perf_counter() - begin)
    found = []
    for (size, *_, more, _), (few, many) in zip(runs, kept, strict=True):
        found.append((size, max(_LEAST_S, (statistics.median(many) - statistics.median(few)) / more)))
    return found


def _loaded(backend: Backend, devices: Sequence[Any], op: str, repeats: int, local: int, dtype: str) -> Any:
    group = len(devices)
    mesh, spec = AbstractMesh((group,), (_AXIS,)), PartitionSpec(_AXIS)
    given = jax.ShapeDtypeStruct((group * local,), DTYPES[dtype], sharding=NamedSharding(mesh, spec))

    def fn(x: Any) -> tuple[Any, Any]:
        for _ in range(repeats):
            x = _once(op, x, group)
        return x, lax.slice(x, (0,), (1,))  # all of it is made, and one number fetched

    def spread(fn: Any) -> Any:
        return jax.shard_map(fn, mesh=mesh, in_specs=(spec,), out_specs=(spec, spec), check_vma=False)

    name = f"calibrate {op} of {local} x {repeats} over {group}"
    program = Program(name, fn, (given,), spread=spread, mesh={_AXIS: group})
    return backend.load(backend.export(program), devices)


def _once(op: str, x: Any, group: int) -> Any:
    """One device's x [n], zeros, through the op and back to [n], so that nothing of it can be left out: what all have
    alike is not reduced by adding, so one element says which device it is."""
    if op == "send":
        return lax.ppermute(x, _AXIS, [(i, (i + 1) % group) for i in range(group)])
    if op == "all_to_all":
        return lax.all_to_all(x, _AXIS, 0, 0, tiled=True)
    if op == "all_gather":
        begin = x.shape[0] // 2  # of two devices: no one's own
        return lax.slice(lax.all_gather(x, _AXIS, tiled=True), (begin,), (begin + x.shape[0],))
    zero = (np.int32(0),)
    if op == "reduce_scatter":
        return lax.dynamic_update_slice(x, lax.psum_scatter(x, _AXIS, tiled=True), zero)
    mine = lax.axis_index(_AXIS).astype(x.dtype).reshape(1)
    return lax.psum(lax.dynamic_update_slice(x, mine, zero), _AXIS)


def _zeros(devices: Sequence[Any], local: int, dtype: str) -> Any:
    mesh = Mesh(np.array(devices, dtype=object), (_AXIS,))
    whole = np.zeros((len(devices) * local,), DTYPES[dtype])
    return jax.device_put(whole, NamedSharding(mesh, PartitionSpec(_AXIS)))
