"""The bytes of each emulated device, against what its chip has. Nothing is allocated here: a deployment is counted
before its first weight is read.

All devices of a stage hold the same amounts, so one account stands for each of them. Sizes are those of the
chip's own formats; what this machine needs to emulate them is another matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from backends.errors import BackendError
from model.cache import cache_rows, row_bytes
from model.config import ModelConfig
from model.formats import Formats
from model.split import Grid
from model.weights import Weight, layer_weights, stage_outer


class OutOfMemory(BackendError):
    """A tensor does not fit a device; the message names it, and what else the device holds."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """A device's memory, as the runtime's ledger has it.

    usable_bytes: what the chip offers. reserved: taken before the first tensor, by name (activations, collective
    buffers, runtime). formats: what it holds weights and cache rows in. pages: of each layer's caches, of page_tokens.
    """

    chip: str
    usable_bytes: float
    reserved: Mapping[str, float]
    formats: Formats
    pages: int
    page_tokens: int


class Memory:
    """What one device of a stage holds so far. `where` names its devices in messages."""

    def __init__(self, limits: Limits, where: str):
        self.limits, self.where = limits, where
        self.held: dict[str, float] = {}
        for name, size in limits.reserved.items():
            self.take(name, name, size)

    @property
    def free_bytes(self) -> float:
        return self.limits.usable_bytes - sum(self.held.values())

    def take(self, kind: str, tensor: str, size: float) -> None:
        """Counts a tensor under `kind`. Raises `OutOfMemory`."""
        if size > self.free_bytes:
            ledger = ", ".join(f"{name} {_size(taken)}" for name, taken in self.held.items() if taken) or "nothing"
            raise OutOfMemory(
                f"out of memory on {self.limits.chip}, {self.where}: {tensor} takes {_size(size)}, "
                f"{_size(max(self.free_bytes, 0.0))} of {_size(self.limits.usable_bytes)} is free ({ledger}); "
                "use more devices or narrower formats"
            )
        self.held[kind] = self.held.get(kind, 0.0) + size


def account(cfg: ModelConfig, grid: Grid, limits: Limits, first_device: int = 0, mtp: bool = False) -> list[Memory]:
    """What a device of each stage holds: weights in the order of loading, then the pages of each layer's caches. mtp:
    the MTP layers' too, on the last.

    Raises `OutOfMemory` for the first tensor that does not fit.
    """
    found = []
    for number, layers in enumerate(grid.stages):
        first = first_device + number * grid.stage_devices
        last = first + grid.stage_devices - 1
        memory = Memory(limits, f"stage {number} (devices {first} to {last})" if last > first else f"device {first}")
        for weight in stage_outer(cfg, layers, mtp):
            _take_weight(memory, weight, weight.name, grid)
        held = [(layer, cfg.layers[layer]) for layer in layers]
        if mtp and number == len(grid.stages) - 1:
            held += [(cfg.num_layers + each, cfg.mtp_type) for each in range(cfg.mtp_layers)]
        for layer, kind in held:
            for weight in layer_weights(cfg, kind):
                _take_weight(memory, weight, f"layers.{layer}.{weight.name}", grid, kind.mtp)
        for layer, kind in held:
            for row in cache_rows(cfg, kind):
                name = f"layers.{layer}.{row.name} ({limits.pages} pages)"
                local = dataclasses.replace(row, shape=grid.layout.local_row(row))
                size = row_bytes(cfg, local, limits.formats.cache) * limits.page_tokens
                memory.take("KV pages", name, size * limits.pages)
        found.append(memory)
    return found


def _take_weight(memory: Memory, weight: Weight, name: str, grid: Grid, mtp: bool = False) -> None:
    memory.take("weights", name, grid.bytes(weight, memory.limits.formats.held(weight, mtp)))


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
