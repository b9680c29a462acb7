"""Calibration of a device that takes as long over a call as over gigabytes: one that is made up, with its
clock.

Its rates are those that were measured on an H200 (bandwidth 4.3e12 bytes/s, 7.9e14 FLOP/s in bfloat16, 157 us a call).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import types
from typing import Any

import jax
import numpy as np
import pytest

from backends.interface import Backend, Capabilities, DeviceInfo, Order, Program
from runtime.porting import calibrate, calibrate_cache, calibrate_ops, calibrate_sizes
from runtime.porting.calibrate import Calibration, measure
from runtime.porting.calibrate_sizes import QUICK, Effort


@dataclasses.dataclass(frozen=True)
class Chip:
    """launch_s: of one op. A product is as fast as its FLOP or its bytes; bytes that the cache holds count a third."""

    dispatch_s: float = 157e-6
    launch_s: float = 2e-6
    bytes_per_s: float = 4.3e12
    flops_per_s: float = 7.9e14
    cache_bytes: float = 60e6
    memory_bytes: int = int(141e9)


class Buffer:
    _made = itertools.count()

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.place = next(self._made)  # an `id` is given again to another
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize


class MadeUp(Backend):
    """Runs nothing; its clock goes on by what a program would take."""

    name, summary = "made-up", "a device that is made up"

    def __init__(self, chip: Chip):
        self.chip, self.now = chip, 0.0
        self._cache: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._noise = np.random.default_rng(0)

    def unavailable(self) -> None:
        return None

    def capabilities(self) -> Capabilities:
        device = DeviceInfo(0, "made up", self.chip.memory_bytes)
        return Capabilities("made-up", (device,), frozenset({"bfloat16"}), "bfloat16", False, True, False)

    def export(self, program: Program) -> Any:
        return program

    def load(self, artifact: Any, devices: Any = ()) -> Any:
        traced, shapes = jax.make_jaxpr(artifact.fn, return_shape=True)(*artifact.args)

        def run(*args: Any) -> Any:
            self.now += self.chip.dispatch_s * self._noise.uniform(0.97, 1.03) + self._seconds(traced.jaxpr, args)
            return jax.tree.map(lambda each: Buffer(each.shape, each.dtype), shapes)

        return run

    def put(self, array: Any, order: Order | None = None) -> Buffer:
        return Buffer(array.shape, array.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return Buffer(shape, dtype)

    def get(self, buffer: Buffer) -> None:
        self.now += buffer.nbytes / 50e9  # to the host

    def from_dlpack(self, tensor: Any) -> Any:
        raise NotImplementedError

    def _seconds(self, jaxpr: Any, args: tuple[Any, ...]) -> float:
        held = dict(zip(jaxpr.invars, jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, Buffer)), strict=True))
        total = 0.0
        for eqn in jaxpr.eqns:
            out = eqn.outvars[0].aval
            if eqn.primitive.name == "dot_general":
                w = eqn.invars[1]
                moved = self._read(held[w]) + (math.prod(eqn.invars[0].aval.shape) + out.size) * out.dtype.itemsize
                flops = 2.0 * out.size * w.aval.shape[0]
                total += self.chip.launch_s + max(moved / self.chip.bytes_per_s, flops / self.chip.flops_per_s)
            elif eqn.primitive.name == "rsqrt":
                total += self.chip.launch_s
            elif eqn.primitive.name == "mul" and out.size > 1 << 18:
                total += self.chip.launch_s + 2 * out.size * out.dtype.itemsize / self.chip.bytes_per_s
        return total

    def _read(self, buffer: Buffer) -> float:
        """Bytes, as memory counts them; least recently used buffers go."""
        inside = self._cache.pop(buffer.place, None) is not None
        self._cache[buffer.place] = buffer.nbytes
        while sum(self._cache.values()) > self.chip.cache_bytes:
            self._cache.popitem(last=False)
        return buffer.nbytes / (3.0 if inside else 1.0)


def calibrated(chip: Chip, effort: Effort, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    backend = MadeUp(chip)
    clock = types.SimpleNamespace(perf_counter=lambda: backend.now)
    for module in (calibrate, calibrate_cache, calibrate_sizes, calibrate_ops):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(calibrate, "measure_kernels", lambda *_: {})
    return measure(backend, effort)


@pytest.mark.parametrize("effort", [pytest.param(Effort(), id="whole", marks=pytest.mark.slow), QUICK])
def test_the_rates_of_a_fast_device_are_found(effort: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip()
    found = calibrated(chip, effort, monkeypatch)
    assert found.dispatch_s == pytest.approx(chip.dispatch_s, rel=0.03)
    assert found.bandwidth_bytes_per_s == pytest.approx(chip.bytes_per_s, rel=0.1)
    assert found.peak_flops_per_s("bfloat16") == pytest.approx(chip.flops_per_s, rel=0.1)
    assert found.kernel_launch_s == pytest.approx(chip.launch_s, rel=0.3)
    assert found.cache and found.cache.bytes <= chip.cache_bytes < 2 * found.cache.bytes
    assert found.cache.bytes_per_s == pytest.approx(3 * chip.bytes_per_s, rel=0.1)


def test_a_cache_no_faster_than_memory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrated(Chip(cache_bytes=0.0), QUICK, monkeypatch).cache is None


def test_a_slow_device_keeps_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's: nothing grows beyond what it took before."""
    chip = Chip(dispatch_s=3e-5, launch_s=3e-6, bytes_per_s=2e10, flops_per_s=1e11, cache_bytes=32e6,
                memory_bytes=int(16e9))  # fmt: skip
    found = calibrated(chip, Effort(), monkeypatch)
    assert {g.k for g in found.gemms} == set(Effort().widths) and {g.m for g in found.gemms} == set(Effort().rows)
    assert max(s.bytes for s in found.streams) == pytest.approx(Effort().cold_bytes, rel=0.01)
    assert found.bandwidth_bytes_per_s == pytest.approx(chip.bytes_per_s, rel=0.1)
    assert found.peak_flops_per_s("bfloat16") == pytest.approx(chip.flops_per_s, rel=0.1)


def test_an_op_is_timed_without_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose result would take as long to fetch: products of a known time, as many in a program as the chip asks for."""
    chip = Chip()
    backend, clock = MadeUp(chip), calibrate_ops.OpClock(9, chip.dispatch_s, chip.launch_s)
    monkeypatch.setattr(calibrate_ops, "time", types.SimpleNamespace(perf_counter=lambda: backend.now))
    assert clock.layers == 20 and calibrate_ops.OpClock(9, 3e-5, 3e-6).layers == 4

    def chain(x: Any, weights: Any) -> Any:
        for w in weights:
            x = x @ w
        return x

    given = backend.zeros((4096, 2048), "bfloat16"), tuple(backend.zeros((2048, 2048), "bfloat16") for _ in range(20))
    (seconds,) = calibrate_ops.timed(backend, "products", [chain], [given], clock)
    assert seconds / 20 == pytest.approx(chip.launch_s + 2.0 * 4096 * 2048**2 / chip.flops_per_s, rel=0.02)
