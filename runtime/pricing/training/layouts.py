"""Layouts that a training step can have on so many devices: they divide the model, fill whole servers, and fit.

What is tried: any pp that divides the devices (stages of unequal numbers of layers are usual); tp within a scale-up
domain, cp where sequences are long, and ep over powers of two that divide; of each the least recompute that fits, for
more only costs time. `best_layouts` prices what fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from foundation.errors import CapacityError, UsageError
from model.config import ModelConfig
from runtime.deployment.ledger import ChipFigures, DeviceMemory
from runtime.pricing.book import PriceBook
from runtime.pricing.price import PriceError
from runtime.pricing.training.layout import RECOMPUTES, TrainLayout
from runtime.pricing.training.memory import resident_bytes, training_memory
from runtime.pricing.training.sequences import Sequences
from runtime.pricing.training.step import TrainingStep, training_step

_LEAST_MICRO_BATCH = 4096
"""Tokens on a device below which products are too small to be worth while."""
MARGIN = 0.05
"""Of a device's memory left free, for what an allocator loses between its blocks."""


def train_layouts(
    cfg: ModelConfig, profile: ChipFigures, devices: int, longest: int = 8192, formats: str = "bf16", zero: bool = True
) -> list[TrainLayout]:
    """Layouts on exactly `devices` devices of a chip that hold sequences of up to `longest` tokens, each with the least
    recompute that fits; the fewest pipeline stages and tp ranks first.

    Raises `UsageError` where the devices fill no whole servers, `CapacityError` where none fits, with the ledger of the
    one with the fewest bytes of weights and their gradients and moments.
    """
    node = int(profile.number("node.devices") or profile.number("link.scale_up.domain_devices") or 8)
    if devices < 1 or (devices > node and devices % node):
        raise UsageError(f"{devices} devices are no whole servers of {node}: use {max(1, devices // node) * node}")
    device = DeviceMemory.of(profile, devices)
    room = (1 - MARGIN) * device.usable_bytes
    found: list[TrainLayout] = []
    smallest: tuple[float, TrainLayout] | None = None
    for shape in _shapes(cfg, devices, int(profile.number("link.scale_up.domain_devices") or node), longest):
        shape = dataclasses.replace(shape, zero=zero)
        resident = resident_bytes(cfg, shape)
        if smallest is None or resident < smallest[0]:
            smallest = resident, shape
        if resident > room:
            continue  # whatever it keeps beside
        for recompute in RECOMPUTES:
            layout = dataclasses.replace(shape, recompute=recompute)
            if training_memory(cfg, layout, device, formats).total_bytes <= room:
                found.append(layout)
                break
    if smallest is None:
        raise UsageError(f"{cfg.name} divides by no layout of {devices} devices: use another number")
    if not found:
        held = training_memory(cfg, dataclasses.replace(smallest[1], recompute="full"), device, formats)
        raise CapacityError(held.refusal)
    return found


def _shapes(cfg: ModelConfig, devices: int, domain: int, longest: int) -> Iterator[TrainLayout]:
    for pp in (pp for pp in range(1, min(devices, cfg.num_layers) + 1) if devices % pp == 0):
        for tp in (tp for tp in _divisors(devices // pp) if tp <= domain):
            for cp in (cp for cp in _divisors(devices // pp // tp) if cp == 1 or longest // cp >= _LEAST_MICRO_BATCH):
                dp = devices // pp // tp // cp
                for ep in _divisors(tp * cp * dp) if cfg.moe else (1,):
                    if ep < tp and ep > 1:
                        continue
                    tokens = max(longest, _LEAST_MICRO_BATCH * cp)
                    try:
                        layout = TrainLayout(tp, pp, dp, ep, cp, tokens)
                        layout.check(cfg)
                    except UsageError:
                        continue
                    yield layout


def _divisors(number: int) -> list[int]:
    """Powers of two that divide it, and the number left when they are taken out of it."""
    twos = number & -number
    return sorted({1 << power for power in range(int(math.log2(twos)) + 1)} | {number})


def best_layouts(
    cfg: ModelConfig,
    profile: ChipFigures,
    book: PriceBook,
    devices: int,
    sequences: Sequences,
    formats: str = "bf16",
    count: int = 4,
    longest: int | None = None,
    scored: int = 0,
) -> list[tuple[TrainLayout, TrainingStep]]:
    """The layouts of `train_layouts` that take the fewest seconds for a step, fastest first. longest: tokens of a
    sequence that must fit; by default of `sequences`. scored: as of `training_step`. Raises as `train_layouts` does,
    and `PriceError` where none can be priced."""
    priced: list[tuple[TrainLayout, TrainingStep]] = []
    why: PriceError | None = None
    for layout in train_layouts(cfg, profile, devices, longest or sequences.longest, formats):
        try:
            priced.append((layout, training_step(cfg, book, layout, sequences, formats, scored)))
        except PriceError as error:
            why = error
    if not priced and why:
        raise why
    return sorted(priced, key=lambda each: (each[1].seconds, each[0].name))[:count]
