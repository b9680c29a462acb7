"""Bringing new weights from the training devices to those that generate.

    gather     the tp ranks of a stage put together the matrices that they send (16 bits, over the scale-up link)
    cast       and make of them what the rollout engine holds
    transfer   over the scale-out link, pool to pool
    load       each device writes its share into place

Two schedules. "sharded": every part leaves the training pool once, from all devices that hold it in equal shares,
enters each server of the first replica once, and goes on from there to the next replica while it comes in (a chain);
the slowest server's ports bind, and each device loads its share as it is to lie. That is the bound; no framework is
known to reach it. "broadcast": slime's and verl's way, each matrix whole from the first rank of its stage to every
device that generates, one stage after another, so that one device's port binds, and engines cut their shares out of
whole matrices (`LOADED_BYTES_PER_S`). Nothing is hidden: buckets are gathered, sent and loaded one after the other. MTP
layers are not trained and not sent.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from model.config import ModelConfig
from model.formats import Formats
from model.split import Layout
from runtime.deployment.ledger import stage_weight_bytes
from runtime.pricing.book import PriceBook
from runtime.pricing.chip import DEFAULTS, Chip, Link
from runtime.pricing.network import FORMULA_ERROR
from runtime.pricing.price import Price, PriceError, total
from runtime.pricing.training.layout import TrainLayout, spans_on

SyncSchedule = Literal["sharded", "broadcast"]
LOADED_BYTES_PER_S, _LOADED_ERROR = 66e9, 0.15
"""Bytes of a model a second at which engines take whole matrices in: checkpoint-engine's README, six updates of vLLM
from host memory, 3.5 to 16 s for 0.21 to 1.03 TB on 8 to 256 H800 and H20, 61 to 76 GB/s whatever their number."""


@dataclasses.dataclass(frozen=True)
class WeightSync:
    """Seconds from the last update to the new weights in place, by part. bytes: of one replica's weights, each once.

    device_bytes: that the fullest rollout device holds of them.
    """

    parts: Mapping[str, Price]
    bytes: float
    device_bytes: float

    @property
    def price(self) -> Price:
        return total(self.parts.values())

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())


def weight_sync(
    cfg: ModelConfig,
    train: TrainLayout,
    train_book: PriceBook,
    rollout: Layout,
    rollout_book: PriceBook,
    formats: Formats,
    replicas: int = 1,
    schedule: SyncSchedule = "sharded",
) -> WeightSync:
    """What it takes to bring a step's weights to `replicas` of a rollout layout, which holds them in `formats`.

    Raises `UsageError` where the model does not divide, `PriceError` where a chip has no scale-out bandwidth.
    """
    train.check(cfg)
    rollout.check(cfg)
    here, there = _link(train_book.chip), _link(rollout_book.chip)
    halves, narrow = (_stage_totals(cfg, train.pp, held) for held in (Formats(), formats))
    whole = sum(narrow)
    devices = train.stage_devices
    span = spans_on(train, train_book.chip).tp
    gather = max(
        (train_book.network.collective("all_gather", size * train.tp / devices, span) for size in halves),
        key=lambda price: price.seconds,
    )
    cast = train_book.memory(max(wide + new for wide, new in zip(halves, narrow, strict=True)) / devices)
    shares = [stage_weight_bytes(cfg, rollout, formats, stage, mtp=False) for stage in range(rollout.pp)]
    device = max(sum(share.values()) for share in shares)
    if schedule == "sharded":
        sent = max(narrow) / (devices * _rate(here))
        received = _entering(rollout, shares, rollout_book.chip.node) / _rate(there)
        seconds = max(sent, received)
        load = rollout_book.memory(2.0 * device)
    else:
        seconds = whole / min(_rate(here), _rate(there))
        source = frozenset({"checkpoint-engine's published updates"})
        load = Price(whole / LOADED_BYTES_PER_S, "overhead", "transferred", _LOADED_ERROR, sources=source)
    used = [
        f"link.scale_out.latency_s {DEFAULTS['link.scale_out.latency_s'][1]}"
        for chip in (train_book.chip, rollout_book.chip)
        if "link.scale_out.latency_s" in chip.absent
    ]
    seconds += max(here.latency_s, there.latency_s) * (1 + math.ceil(math.log2(max(replicas, 1))))
    grade = "assumed" if used else "transferred"
    chips = sorted({train_book.chip.name, rollout_book.chip.name})
    source = frozenset({f"scale-out bandwidth of the profile of {' and '.join(chips)}"})
    transfer = Price(seconds, "network", grade, FORMULA_ERROR, False, frozenset(used), source)
    return WeightSync({"gather": gather, "cast": cast, "transfer": transfer, "load": load}, whole, device)


def _link(chip: Chip) -> Link:
    if chip.scale_out is None:
        field = "link.scale_out.bandwidth_bytes_per_s"
        raise PriceError(
            f"{chip.name} has no {field}, which weights take from training to rollouts: supply it with "
            f"--set {field}=… in bytes/s"
        )
    return chip.scale_out


def _rate(link: Link) -> float:
    """Bytes/s that large messages reach."""
    return link.bandwidth_bytes_per_s * link.efficiency


@lru_cache(maxsize=256)
def _stage_totals(cfg: ModelConfig, pp: int, formats: Formats) -> tuple[float, ...]:
    """Bytes of each stage's weights, each once."""
    one = Layout(pp=pp)
    return tuple(sum(stage_weight_bytes(cfg, one, formats, stage, mtp=False).values()) for stage in range(pp))


def _entering(rollout: Layout, shares: list[dict[str, float]], node: int) -> float:
    """Bytes that enter the server that needs most for its ports, a port: what its devices hold, each part once."""
    worst = 0.0
    for first in range(0, rollout.devices, node):
        here = range(first, min(first + node, rollout.devices))
        needed = 0.0
        for stage, count in Counter(device // rollout.stage_devices for device in here).items():
            experts = shares[stage].get("experts", 0.0)
            dense = sum(shares[stage].values()) - experts
            needed += experts * count + dense * min(count, rollout.tp)
        worst = max(worst, needed / len(here))
    return worst
