"""What a calibration measures, and how large: so that what is timed is clear of what a call takes, and is no cache's.

A host's sizes are `Effort`'s own. An accelerator that takes as long over a call as over gigabytes needs larger ones:
`sized` finds out, by passes and products that are doubled until they take several calls' time.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from backends.interface import Backend, Order, Program
from foundation.errors import UsageError

SOURCE = "glm5 calibrate"
PAGE = 16
"""Tokens of a page: the engine's own."""
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_CLEAR = 4.0
"""Calls' times that a program takes at least: a call's own differs by some per cent from one to the next."""
_MOST_WIDTH = 16384
_MOST_OPS = 512  # of a program, which somebody has to compile
_SHARE = 16  # of a device's memory that a size may take: one of so many parts


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is measured, and how long.

    widths: k = n of the products [m, k] x [k, n]. rows: m, from one decoding sequence to a prompt's chunk. tokens: of a
    step, and chunks: of a prompt's piece, for the ops that are measured whole. rounds: of each program. cold_bytes:
    what the matrices of one width take together, more than any cache. program_flops: at most so much in one program,
    where a call's time does not ask for more. messages: bytes that several devices exchange.
    """

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    rows: tuple[int, ...] = (1, 8, 32, 128, 256, 1024)
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    chunks: tuple[int, ...] = (16, 32, 64, 128, 256)
    rounds: int = 9
    cold_bytes: float = 128e6
    program_flops: float = 2e9
    messages: tuple[float, ...] = tuple(2.0 ** (10 + 2 * i) for i in range(9))  # to 64 MiB

    def __post_init__(self) -> None:
        for name in ("widths", "rows", "tokens", "chunks"):
            if not getattr(self, name) or any(size < 1 for size in getattr(self, name)):
                raise UsageError(f"{name} of a calibration must be whole numbers of one or more")
        if 1 not in self.rows or max(self.rows) < 32:
            raise UsageError("rows of a calibration must hold 1 (memory) and at least 32 (compute)")
        if self.rounds < 1:
            raise UsageError(f"rounds must be at least 1, not {self.rounds}")


QUICK = Effort(
    widths=(256, 512, 1024), rows=(1, 32, 256), tokens=(1, 8, 64), chunks=(16, 64, 256), rounds=5, cold_bytes=64e6,
    program_flops=5e8, messages=tuple(2.0 ** (10 + 4 * i) for i in range(5)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Probe:
    """Rough rates, from which sizes follow. dispatch_s, launch_s: as of `Calibration`."""

    dispatch_s: float
    launch_s: float
    bytes_per_s: float
    flops_per_s: float

    @property
    def clear_s(self) -> float:
        """What a program has to take."""
        return _CLEAR * self.dispatch_s

    def repeats(self, count: int, m: int, k: int, element_bytes: int) -> int:
        """How often a program goes over `count` products [m, k] x [k, k]."""
        each = max(self.launch_s, k * k * element_bytes / self.bytes_per_s, 2.0 * m * k * k / self.flops_per_s)
        return max(1, min(math.ceil(self.clear_s / (count * each)), _MOST_OPS // count))


def sized(backend: Backend, effort: Effort, dtype: str, dispatch_s: float, launch_s: float) -> tuple[Effort, Probe]:
    """An effort that is enough for the device: wider products until one is long beside its launch, more bytes and
    FLOP until a program is long beside its call."""
    device, size = backend.capabilities().devices[0], DTYPES[dtype].itemsize
    most = (device.memory_bytes or host_bytes()) / _SHARE
    probe = Probe(dispatch_s, launch_s, 1.0, 1.0)
    moved = 8e6
    while (seconds := pass_s(backend, moved, dtype, dispatch_s, 3)) < probe.clear_s and 2 * moved <= most:
        moved *= 2
    bytes_per_s, k = moved / seconds, 256
    while (seconds := _product_s(backend, k, dtype, dispatch_s)) < probe.clear_s and k < _MOST_WIDTH:
        k *= 2
    probe = Probe(dispatch_s, launch_s, bytes_per_s, 2.0 * _PROBE_ROWS * k * k / seconds)
    factor, top = 1, max(effort.widths)
    while (factor * top) ** 2 * size / bytes_per_s < 2 * _CLEAR * launch_s and factor * top < _MOST_WIDTH:
        factor *= 2
    made = dataclasses.replace(
        effort,
        widths=tuple(factor * width for width in effort.widths),
        rows=tuple(sorted({*effort.rows, max(effort.rows) * factor})),
        cold_bytes=min(most, max(effort.cold_bytes, probe.clear_s * bytes_per_s)),
        program_flops=max(effort.program_flops, probe.clear_s * probe.flops_per_s),
    )
    return made, probe


_PROBE_ROWS = 1024


def pass_s(backend: Backend, size: float, dtype: str, dispatch_s: float, rounds: int) -> float:
    """Seconds of one pass that reads and writes an array, `size` bytes in all."""
    x = backend.zeros((pass_rows(size, dtype), 1024), dtype)
    run = loaded(backend, "calibrate stream", lambda x: (x * 2, x[0, 0]), (x,))
    return max(median(times(lambda: backend.get(run(x)[1]), rounds)) - dispatch_s, 1e-9)


def pass_rows(size: float, dtype: str) -> int:
    """Rows of 1,024 that a pass of so many bytes reads and writes."""
    return max(1, int(size / 2 / 1024 / DTYPES[dtype].itemsize))


def _product_s(backend: Backend, k: int, dtype: str, dispatch_s: float) -> float:
    x, (w,) = backend.zeros((_PROBE_ROWS, k), dtype), matrices(backend, k, 1, dtype)

    def product(x: Any, w: Any) -> tuple[Any, Any]:
        made = jnp.dot(x, w)
        return made, made[0, 0]

    run = loaded(backend, f"calibrate product {k}", product, (x, w))
    return max(median(times(lambda: backend.get(run(x, w)[1]), 3)) - dispatch_s, 1e-9)


def matrices(backend: Backend, k: int, count: int, dtype: str) -> list[Any]:
    """Random [k, k] on the device, standard normal over the root of k, so that chains neither grow nor vanish."""
    return random_buffers(backend, (k, k), dtype, count, k**-0.5)


def random_buffers(
    backend: Backend, shape: tuple[int, ...], dtype: str, count: int, scale: float = 1.0, order: Order | None = None
) -> list[Any]:
    """Random arrays that are made on the device, standard normal times `scale`; FP8 are near one. order: how they
    lie."""
    seed = jax.ShapeDtypeStruct((), jnp.int32)

    def made(seed: Any) -> Any:
        key = jax.random.key(seed)
        if dtype == "float8_e4m3fn":
            return jax.lax.bitcast_convert_type(jax.random.randint(key, shape, 0x30, 0x3F, jnp.uint8), jnp.dtype(dtype))
        return (jax.random.normal(key, shape) * jnp.float32(scale)).astype(jnp.dtype(dtype))

    run = loaded(backend, f"calibrate random {shape}", made, (seed,))
    buffers = (run(backend.put(np.int32(number))) for number in range(count))
    return [each if order is None else backend.put(each, order) for each in buffers]


def product_chain(repeats: int, x: Any, factors: tuple[Any, ...]) -> tuple[Any, Any]:
    """One row or more through all factors, so many times."""
    for w in factors * repeats:
        x = jnp.dot(x, w)
    return x, x[0, 0]  # all of it is made, and one number fetched


# --- timing


def loaded(backend: Backend, name: str, fn: Any, args: tuple[Any, ...], donate: tuple[int, ...] = ()) -> Any:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    orders = tuple(map(backend.order_of, jax.tree.leaves(args)))
    return backend.load(backend.export(Program(name, fn, shapes, donate, orders=orders)))


def times(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each call, after two to warm up; `call` waits for its result."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
