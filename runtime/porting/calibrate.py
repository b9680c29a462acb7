"""Measures the machine at hand through a backend and describes it as a profile.

Every figure is a median over rounds of programs that were exported and loaded as the engine's are. Matrices
are read from memory, not from a cache: a chain of products goes over more of them than caches hold, and the
rounds go over several such sets. The time of one op inside a compiled step is then

    seconds = launch + ((FLOP / (peak c))^3 + (bytes / (bandwidth e))^3)^(1/3)

with `c` and `e` the shares of the best rates seen, by FLOP and by bytes of the op: the profile's efficiency
curves, and the formula that the cost model reads them by.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hw_profiles
from backends.interface import Backend
from hw_profiles import ChipFormats, Curve, Figure, Profile
from runtime.porting.calibrate_cache import Cache, measure_cache
from runtime.porting.calibrate_calls import ModelRank
from runtime.porting.calibrate_model import NOT_MEASURED, measure_model
from runtime.porting.calibrate_network import MeasuredNetwork, local_devices, measure_network
from runtime.porting.calibrate_ops import KernelPoints, OpClock, measure_kernels
from runtime.porting.calibrate_sizes import (
    DTYPES,
    SOURCE,
    Effort,
    Probe,
    host_bytes,
    loaded,
    matrices,
    median,
    pass_rows,
    pass_s,
    product_chain,
    sized,
    times,
)
from runtime.pricing.adjust import stated

_PEAK = {"float32": "chip.peak.fp32_flops_per_s", "bfloat16": "chip.peak.bf16_flops_per_s"}
_MOST_MATRICES = 512
_OP_ROUNDS = 3  # of ops for each of products: of a size each, whose neighbours do not make up for a bad minute
_MOST_OF_A_SIZE_S = 1.0  # seconds that a size of a model's op is timed for, and no further round
_CACHE_ROWS = 1 << 14  # of the donated cache: 64 MB of float32 rows, 1024 wide


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Seconds of one [m, k] x [k, k] product inside a compiled program, matrix read from memory.

    spread: half the distance of the rounds' quartiles, as a share of the median.
    """

    dtype: str
    m: int
    k: int
    element_bytes: int
    seconds: float
    spread: float

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.k * self.k

    @property
    def bytes(self) -> float:
        return float(self.element_bytes * (self.k * self.k + 2 * self.m * self.k))


@dataclasses.dataclass(frozen=True)
class Stream:
    """Seconds of one element-wise pass over an array: `bytes` are those read plus those written."""

    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class ServingCost:
    """What the host works beside the device, where this project's server serves: seconds that a client on the same host
    waits longer for a request before it is queued (front_s: one after the other) and then, for a step, and for a row of
    a step (a sequence's next token, or a piece of a prompt); for a step that nothing ran before for a while, and for
    those after that one, less and less over `WARM_S` (warming_s). ahead_s: what a step of answers takes at least where
    it is launched before the one before it was read, rows beside; None: where none is."""

    front_s: float
    request_s: float
    step_s: float
    row_s: float
    idle_s: float
    warming_s: float
    ahead_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured. Seconds.

    kernels: ops of the graph measured whole, as a coefficients file (`runtime.porting.calibrate_ops`).

    dispatch_s: a call of an empty program, until its result is on the host. donated_s: the same with a
    64 MB cache that is donated and one row of which is written. kernel_launch_s, vector_launch_s: the smallest
    product and the smallest norm inside a program. cache: where one is told apart from memory. serving: of this
    project's server, where that was measured. network: between devices, where there are several. rank: whose ops are
    among the kernels, in words. steps: whole ones of it (`runtime.porting.calibrate_steps`).
    """

    dtype: str
    dispatch_s: float
    donated_s: float
    kernel_launch_s: float
    vector_launch_s: float
    gemms: tuple[Gemm, ...]
    streams: tuple[Stream, ...]
    kernels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: Cache | None = None
    serving: ServingCost | None = None
    network: MeasuredNetwork | None = None
    rank: str = ""
    steps: Mapping[str, Any] | None = None

    @property
    def main(self) -> list[Gemm]:
        """The products in the type that the backend computes in."""
        return [g for g in self.gemms if g.dtype == self.dtype]

    @property
    def spread(self) -> float:
        """Median over the products of their rounds' spread."""
        return statistics.median(g.spread for g in self.gemms)

    def peak_flops_per_s(self, dtype: str) -> float:
        """The best rate of any product."""
        return max(g.flops / max(g.seconds - self.kernel_launch_s, 1e-9) for g in self.gemms if g.dtype == dtype)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """The best rate of any product of one row, or of an element-wise pass."""
        reads = [g.bytes / max(g.seconds - self.kernel_launch_s, 1e-9) for g in self.main if g.m == 1]
        largest = max(self.streams, key=lambda s: s.bytes)
        return max(*reads, largest.bytes / largest.seconds)

    def memory_knots(self) -> tuple[tuple[float, float], ...]:
        """(bytes, share of the bandwidth) of products of one row."""
        best = self.bandwidth_bytes_per_s
        knots = {}
        for g in self.main:
            if g.m == 1:
                knots[g.bytes] = min(1.0, g.bytes / max(g.seconds - self.kernel_launch_s, 1e-9) / best)
        return tuple(sorted(knots.items()))

    def compute_knots(self) -> tuple[tuple[float, float], ...]:
        """(FLOP, share of the peak) of products of 32 rows and more, by octaves, what memory takes taken out."""
        peak, best = self.peak_flops_per_s(self.dtype), self.bandwidth_bytes_per_s
        sizes, shares = zip(*self.memory_knots(), strict=True)
        found: dict[int, list[tuple[float, float]]] = {}
        for g in self.main:
            busy = g.seconds - self.kernel_launch_s
            memory = g.bytes / (best * float(np.interp(math.log(g.bytes), np.log(sizes), shares)))
            compute = max(busy, 1e-9) ** 3 - memory**3
            if g.m < 32 or compute < 0.2 * busy**3:  # bound by memory: says little of the rate of computing
                continue
            octave = round(math.log2(g.flops))
            found.setdefault(octave, []).append((g.flops, g.flops / compute ** (1 / 3) / peak))
        knots = []
        for _, points in sorted(found.items()):
            size = math.exp(statistics.fmean(math.log(flops) for flops, _ in points))
            knots.append((size, min(1.0, statistics.median(share for _, share in points))))
        return tuple(knots) or ((1.0, 1.0),)


def measure(
    backend: Backend,
    effort: Effort = Effort(),
    progress: Callable[[int, int], Any] | None = None,
    rank: ModelRank | None = None,
    between: Callable[[], Any] | None = None,
) -> Calibration:
    """Measures with a backend that is usable here: a minute or two of CPU on a small host, less with `QUICK`. rank:
    whose ops are measured at its own shapes, too. between: is called now and then, what it measures being spread over
    as long. Raises `UsageError` where none of the ops fits."""
    offered = backend.capabilities()
    dtype = offered.preferred_dtype
    others = sorted(offered.dtypes & _PEAK.keys() - {dtype})
    total = len(effort.widths) + len(others) + 5

    def report(done: int, total: int) -> None:
        if between:
            between()
        if progress:
            progress(done, total)

    rounds = max(30, 20 * effort.rounds)
    dispatch_s = median(times(_empty(backend), rounds))
    donated_s = median(_donated_times(backend, rounds))
    report(1, total)
    kernel_s = _per_op(backend, partial(product_chain, 1), (1, 64), [(64, 64)] * 64, dtype, dispatch_s, effort.rounds)
    vector_s = _per_op(backend, _norm_chain, (1, 512), [(1, 512)] * 64, dtype, dispatch_s, effort.rounds)
    report(2, total)
    effort, probe = sized(backend, effort, dtype, dispatch_s, kernel_s)
    streams = tuple(
        Stream(
            2.0 * pass_rows(size, dtype) * 1024 * DTYPES[dtype].itemsize,
            pass_s(backend, size, dtype, dispatch_s, effort.rounds),
        )
        for size in (1e6, effort.cold_bytes)
    )
    cache = measure_cache(backend, dtype, probe, effort)
    report(3, total)
    gemms: list[Gemm] = []
    for done, k in enumerate(effort.widths):
        gemms += _gemms(backend, k, effort.rows, dtype, probe, effort)
        report(4 + done, total)
    for done, other in enumerate(others):  # only how fast it computes
        k = sorted(effort.widths)[len(effort.widths) // 2]
        gemms += _gemms(backend, k, (256 if 256 in effort.rows else max(effort.rows),), other, probe, effort)
        report(4 + len(effort.widths) + done, total)
    found = Calibration(dtype, dispatch_s, donated_s, kernel_s, vector_s, tuple(gemms), streams)
    rates = found.peak_flops_per_s(dtype), found.bandwidth_bytes_per_s
    clock = OpClock(_OP_ROUNDS * effort.rounds, dispatch_s, kernel_s, vector_s)
    network = None
    if devices := local_devices(backend):
        network = measure_network(backend, devices, dtype, effort.rounds, effort.messages)
    of_model: KernelPoints = {}
    if rank:
        steady = dataclasses.replace(clock, most_s=_MOST_OF_A_SIZE_S)
        squares = [(gemm.m, gemm.k, gemm.seconds) for gemm in found.main]
        of_model = measure_model(backend, rank, dtype, *rates, steady, effort, squares)
    report(total - 1, total)
    narrow = found.peak_flops_per_s("bfloat16") if "bfloat16" in offered.dtypes else None
    kernels = measure_kernels(backend, dtype, *rates, clock, effort.tokens, effort.chunks, of_model, narrow)
    report(total, total)
    name = f"{rank.cfg.name} under {rank.layout.name}" if rank else ""
    return dataclasses.replace(found, kernels=kernels, cache=cache, network=network, rank=name)


def profile(found: Calibration, backend: Backend, name: str, prices: str | None = None) -> Profile:
    """The machine as a profile, every figure graded "measured" today. prices: the file of `found.kernels`."""
    device = backend.capabilities().devices[0]
    today, spread = time.strftime("%Y-%m-%d"), f"Medians; the rounds of one program differ by {found.spread:.0%}."

    def figure(value: float, path: str, note: str = "") -> Figure:
        return Figure(float(f"{value:.6g}"), hw_profiles.FIELDS[path].unit, SOURCE, today, "measured", note)

    values = {
        _PEAK[dtype]: (found.peak_flops_per_s(dtype), f"Best product seen. {spread}")
        for dtype in sorted({g.dtype for g in found.gemms})
    }
    values["chip.memory.capacity_bytes"] = (float(device.memory_bytes or host_bytes()), "As the system reports it.")
    values["chip.memory.bandwidth_bytes_per_s"] = (found.bandwidth_bytes_per_s, f"Best stream seen. {spread}")
    if found.cache is not None:
        values["chip.memory.cache_bytes"] = (found.cache.bytes, "What a round of matrices may hold to be read faster.")
        values["chip.memory.cache_bandwidth_bytes_per_s"] = (found.cache.bytes_per_s, "Small matrices that stay there.")
    values["overhead.kernel_launch_s"] = (
        found.kernel_launch_s,
        f"Inside a compiled step. A step's own dispatch: {found.dispatch_s * 1e6:.0f} us, "
        f"{found.donated_s * 1e6:.0f} us with a donated cache.",
    )
    at_their_rate = f" {', '.join(NOT_MEASURED)} are priced by it and the bandwidth." if found.rank else ""
    values["overhead.vector_launch_s"] = (
        found.vector_launch_s,
        f"One small norm inside a compiled step.{at_their_rate}",
    )
    values |= found.network.figures() if found.network else {}
    if found.serving is not None:
        served = "`glm5 serve` of the embedded checkpoint, its programs left out; the client on this machine included."
        for what, seconds in dataclasses.asdict(found.serving).items():
            if seconds is not None:
                values[f"overhead.serving_{what}"] = (seconds, served)
    computed = "float32" if found.dtype == "float32" else "bfloat16"
    curves = {
        path: Curve(
            tuple((float(f"{size:.4g}"), float(f"{share:.4g}")) for size, share in knots),
            unit, SOURCE, today, "measured", f"Products in {computed}, matrices read from memory.",
        )
        for path, unit, knots in (
            ("efficiency.compute", "FLOP", found.compute_knots()),
            ("efficiency.memory", "bytes", found.memory_knots()),
        )
    }  # fmt: skip
    if found.network:
        curves["efficiency.network"] = Curve(
            found.network.shares(), "bytes", SOURCE, today, "measured", "The largest all-reduce of all devices."
        )
    host = backend.capabilities().platform == "cpu"
    return Profile(
        name,
        "generic",
        "host" if host else device.kind,
        "host" if host else "accelerator",
        f"{device.kind} through the {backend.name} backend, {os.cpu_count()} host cores"
        + (f"; ops of {found.rank} at their own shapes" if found.rank else ""),
        ChipFormats(("bf16",), ("bf16",), SOURCE, today, "measured", "What the backend computes without conversion."),
        {path: figure(value, path, note) for path, (value, note) in values.items()},
        curves,
        prices=prices,
    )


def prices(found: Calibration, described: Profile) -> dict[str, Any]:
    """The price file of `found.kernels`, with the figures that they stand beside."""
    sent = {"collectives": found.network.collectives()} if found.network else {}
    whole = {"steps": found.steps} if found.steps else {}
    return {**found.kernels, **sent, **whole, "profile": described.name, "relative_to": stated(described.number)}


# --- timing --------------------------------------------------------------------------------------------


def _random(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Standard normal over the root of the rows, so that chains neither grow nor vanish."""
    return (rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)).astype(DTYPES[dtype])


def _empty(backend: Backend) -> Callable[[], Any]:
    x = backend.put(np.ones((8,), np.float32))
    run = loaded(backend, "calibrate empty", lambda x: x + 1.0, (x,))
    return lambda: backend.get(run(x))


def _donated_times(backend: Backend, rounds: int) -> list[float]:
    held = [backend.zeros((_CACHE_ROWS, 1024), "float32")]
    row, at = backend.put(np.ones((1, 1024), np.float32)), backend.put(np.int32(5))

    def write(cache: Any, row: Any, at: Any) -> tuple[Any, Any]:
        return jax.lax.dynamic_update_slice_in_dim(cache, row, at, 0), jnp.sum(row)

    run = loaded(backend, "calibrate donated", write, (held[0], row, at), donate=(0,))

    def call() -> None:
        held[0], result = run(held[0], row, at)
        backend.get(result)

    return times(call, rounds)


def _norm_chain(x: Any, scales: tuple[Any, ...]) -> Any:
    for scale in scales:
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * (1.0 + scale)
    return x, x[0, 0]


def _per_op(
    backend: Backend,
    chain: Any,
    shape: tuple[int, int],
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    dispatch_s: float,
    rounds: int,
) -> float:
    """Seconds of one op of a chain of small ones, inside a program."""
    rng = np.random.default_rng(0)
    x = backend.put(_random(rng, shape, dtype))
    held = tuple(backend.put(_random(rng, each, dtype)) for each in shapes)
    run = loaded(backend, f"calibrate small ops {shape[1]}", chain, (x, held))
    seconds = median(times(lambda: backend.get(run(x, held)[1]), 10 * rounds))
    return max((seconds - dispatch_s) / len(held), 1e-8)


def _gemms(backend: Backend, k: int, rows: Sequence[int], dtype: str, probe: Probe, effort: Effort) -> list[Gemm]:
    """Chains of [m, k] x [k, k], rounds alternating over the rows, so that a slow spell hits all of them."""
    rng = np.random.default_rng(k)
    size = DTYPES[dtype].itemsize
    whole = min(_MOST_MATRICES, max(2, math.ceil(effort.cold_bytes / (k * k * size))))
    held = matrices(backend, k, whole, dtype)
    calls, counts, repeats, turns = [], [], [], [0] * len(rows)
    for m in rows:
        count = min(whole, 32, max(1, round(effort.program_flops / (2 * m * k * k))))
        x = backend.put(_random(rng, (m, k), dtype))
        again = probe.repeats(count, m, k, size)
        if again > 1:  # rather more matrices than the same ones, which a cache may hold
            count = min(whole, count * again, 128)
            again = probe.repeats(count, m, k, size)
        chain = partial(product_chain, again)
        run = loaded(backend, f"calibrate product {m}x{k}x{k} x {again}", chain, (x, tuple(held[:count])))
        counts.append(count)
        repeats.append(again)
        calls.append((run, x))

    def call(i: int) -> None:
        run, x = calls[i]
        first = turns[i] * counts[i] % max(1, whole - counts[i] + 1)
        turns[i] += 1
        backend.get(run(x, tuple(held[first : first + counts[i]]))[1])

    kept_s: list[list[float]] = [[] for _ in rows]
    for i in range(len(rows)):
        call(i)
    for _ in range(effort.rounds):
        for i, kept in enumerate(kept_s):
            begin = time.perf_counter()
            call(i)
            kept.append(time.perf_counter() - begin)
    found = []
    for m, count, again, kept in zip(rows, counts, repeats, kept_s, strict=True):
        low, middle, high = np.percentile(kept, (25, 50, 75))
        seconds = max(float(middle) - probe.dispatch_s, 1e-9) / (count * again)
        found.append(Gemm(dtype, m, k, size, seconds, float((high - low) / 2 / middle)))
    return found
