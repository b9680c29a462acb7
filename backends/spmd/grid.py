"""Which devices a server has, and what each holds: the plain data that the emulation is built from. Free of JAX."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from backends.errors import Unsupported
from model.config import ModelConfig

if TYPE_CHECKING:
    from model.parallel import Parallel

MOST_HOSTS = 64
"""Devices that are XLA host devices of their own; with more, rendezvous of all threads gets slow, then hangs."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which expert is in which slot, a row a MoE layer of the model; slot s is on device s // per_device of its
    stage, in the order dp rank, tp rank."""

    per_device: int
    experts: tuple[tuple[int, ...], ...]

    def table(self, row: int, count: int) -> np.ndarray:
        """int32 [count, m]: the slots of each expert of a layer, repeated in turn up to the most replicas."""
        held: list[list[int]] = [[] for _ in range(count)]
        for slot, expert in enumerate(self.experts[row]):
            held[expert].append(slot)
        if empty := [expert for expert, found in enumerate(held) if not found]:
            raise Unsupported(f"expert {empty[0]} of MoE layer {row} is in no slot; make the plan anew")
        most = max(map(len, held))
        return np.array([[found[i % len(found)] for i in range(most)] for found in held], np.int32)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The devices of one server: `tp` x `dp` for each stage, in the order stage, dp rank, tp rank.

    stages: the layers of each. slots: where experts are split by expert; None where they are split by tensor.
    """

    tp: int
    dp: int
    stages: tuple[range, ...]
    slots: Slots | None = None

    @property
    def stage_devices(self) -> int:
        return self.tp * self.dp

    @property
    def devices(self) -> int:
        return self.stage_devices * len(self.stages)

    @property
    def parallel(self) -> Parallel:
        """The collectives of a device's program, as `runtime.pricing.trace` has them priced."""
        from model.parallel import Parallel

        return Parallel(
            tp="tp" if self.tp > 1 else None,
            dp="dp" if self.dp > 1 else None,
            moe="expert" if self.slots else "tensor",
            exchange="all_to_all",
        )

    def check(self, cfg: ModelConfig) -> None:
        """Raises `Unsupported` where the stages are not the model's layers, or the slots not its experts."""
        layers = [layer for stage in self.stages for layer in stage]
        if layers != list(range(cfg.num_layers)) or not all(self.stages):
            raise Unsupported(f"the plan's stages hold layers {layers}, {cfg.name} has {cfg.num_layers}; plan it anew")
        moe = [kind for kind in cfg.layers if kind.ffn == "moe"]
        if self.slots and (
            len(self.slots.experts) != len(moe)
            or any(len(row) != self.slots.per_device * self.stage_devices for row in self.slots.experts)
        ):
            raise Unsupported(
                f"the plan places {len(self.slots.experts)} MoE layers in {self.slots.per_device} slots a device; "
                f"{cfg.name} has {len(moe)} on {self.stage_devices} devices a stage; plan it anew"
            )


def slot_layout(cfg: ModelConfig, grid: Grid, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(the expert in each slot [s], the slots of each expert [e, m]) of a layer; None where slot e is expert e."""
    if grid.slots is None or cfg.moe is None or cfg.layers[layer].ffn != "moe":
        return None
    row = sum(kind.ffn == "moe" for kind in cfg.layers[:layer])
    chosen = np.array(grid.slots.experts[row], np.int64)
    if np.array_equal(chosen, np.arange(cfg.moe.experts)):
        return None
    return chosen, grid.slots.table(row, cfg.moe.experts)
