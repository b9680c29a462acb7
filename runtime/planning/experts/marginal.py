"""How much balance redundant slots buy, so that they can be weighed against the KV pages they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from numpy.typing import ArrayLike

from runtime.planning.experts.placement import place_experts


@dataclass(frozen=True)
class SlotOption:
    """Balance with `slots` expert slots a layer over all devices: max over mean, >= 1."""

    slots: int
    mean_max_over_mean: float
    worst_max_over_mean: float


def marginal_slots(load: ArrayLike, devices: int, nodes: int, slot_options: Iterable[int]) -> list[SlotOption]:
    """The balance found for each number of slots, in the order given; mean and worst are over layers.

    Args: load [layers, experts]; slot_options: each a multiple of `devices` and at least `experts`.
    Raises: LoadError, SlotsError.
    """
    found = []
    for slots in slot_options:
        even = place_experts(load, devices, nodes, slots).max_over_mean
        found.append(SlotOption(slots, float(even.mean()), float(even.max())))
    return found
