"""`Packing`: which expert sits in which slot, for many layers at once, and what every device then carries.

Dims used in this folder: L layers, E experts, D devices, M slots of the largest device, S slots in all.
The load of an expert is split evenly over its replicas. A device with fewer than M slots is padded with
the expert number E, which has no load and counts as held everywhere, so that no move ever touches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Packing:
    """Mutable working state of the solver; every array has the layers first.

    load [L, E+1]: load of each expert. replicas [L, E+1]: its copies.
    expert [L, D, M]: who sits in each slot. share [L, D, M]: the load that brings.
    held [L, D, E+1]: whether a device has a copy. device_load [L, D]: sum of its shares.
    """

    load: Floats
    replicas: Ints
    expert: Ints
    share: Floats
    held: NDArray[np.bool_]
    device_load: Floats

    @classmethod
    def of(cls, load: Floats, expert: Ints) -> Packing:
        """The state of `expert` [L, D, M] (padding: E) under `load` [L, E]."""
        layers, experts = load.shape
        devices = expert.shape[1]
        row = np.arange(layers)[:, None]
        replicas = np.zeros((layers, experts + 1), np.int64)
        np.add.at(replicas, (row, expert.reshape(layers, -1)), 1)
        replicas[:, experts] = 1
        held = np.zeros((layers, devices, experts + 1), bool)
        held[row[:, :, None], np.arange(devices)[:, None], expert] = True
        held[:, :, experts] = True
        padded = np.pad(load, ((0, 0), (0, 1)))
        packing = cls(padded, replicas, expert.copy(), np.empty(expert.shape), held, np.empty(expert.shape[:2]))
        packing.weigh(np.arange(layers))
        return packing

    @property
    def peak(self) -> Floats:
        """[L] load of the most loaded device."""
        return self.device_load.max(axis=1)

    @property
    def twice(self) -> NDArray[np.bool_]:
        """[L, D] whether a device has some expert twice."""
        ordered = np.sort(self.expert, axis=2)
        return ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] < self.load.shape[1] - 1)).any(axis=2)

    def part(self, layers: Ints) -> Packing:
        """A copy of some layers, in this order."""
        return Packing(**{name: whole[layers] for name, whole in vars(self).items()})

    def joined(self, other: Packing) -> Packing:
        """These layers, then those of `other`."""
        return Packing(**{name: np.concatenate([own, getattr(other, name)]) for name, own in vars(self).items()})

    def best(self, each: int, kept: int) -> Packing:
        """The `kept` layers of the lowest peak out of every `each`, the best first."""
        order = np.argsort(self.peak.reshape(-1, each), axis=1, kind="stable")[:, :kept]
        return self.part((order + np.arange(len(order))[:, None] * each).ravel())

    def take_better(self, layers: Ints, other: Packing) -> None:
        """Put the layers of `other`, which stand for `layers` here, where their peak is lower."""
        better = other.peak < self.peak[layers]
        for name, whole in vars(self).items():
            whole[layers[better]] = getattr(other, name)[better]

    def weigh(self, layers: Ints) -> None:
        """Recompute shares and device loads of `layers` from who sits where."""
        each = self.load[layers] / np.maximum(self.replicas[layers], 1)
        expert = self.expert[layers]
        self.share[layers] = each[np.arange(len(layers))[:, None, None], expert]
        self.device_load[layers] = self.share[layers].sum(axis=2)

    def swap(self, layer: Ints, device: Ints, slot: Ints, other: Ints, other_slot: Ints) -> None:
        """Exchange two slots, one exchange per entry; a (layer, device) may occur once only."""
        a, b = self.expert[layer, device, slot], self.expert[layer, other, other_slot]
        change = self.share[layer, device, slot] - self.share[layer, other, other_slot]
        self.expert[layer, device, slot], self.expert[layer, other, other_slot] = b, a
        self.share[layer, device, slot] -= change
        self.share[layer, other, other_slot] += change
        self.held[layer, device, a] = self.held[layer, other, b] = False
        self.held[layer, device, b] = self.held[layer, other, a] = True
        self.device_load[layer, device] -= change
        self.device_load[layer, other] += change

    def replace(self, layer: Ints, device: Ints, slot: Ints, expert: Ints) -> None:
        """Let `expert` take the slot of another expert's spare copy; a layer may occur once only."""
        out = self.expert[layer, device, slot]
        self.expert[layer, device, slot] = expert
        self.replicas[layer, out] -= 1
        self.replicas[layer, expert] += 1
        self.held[layer, device, out] = False
        self.held[layer, device, expert] = True
        self.weigh(layer)


def one_each(load: Floats, replicas: Ints) -> Packing:
    """One replica a device, the heaviest first; copies of an expert are neighbours. Args: [L, E] each."""
    layers, experts = load.shape
    order = np.argsort(-load / replicas, axis=1, kind="stable")
    item = np.repeat(order.ravel(), np.take_along_axis(replicas, order, axis=1).ravel())
    return Packing.of(load, item.reshape(layers, -1, 1))


def longest_first(load: Floats, replicas: Ints, device_slots: Ints, apart: bool = True) -> Packing:
    """Put replicas, the heaviest first, on the least loaded device that has room and no copy yet.

    Args:
        load: [L, E]. replicas: [L, E], each row summing to `device_slots.sum()`.
        device_slots: [D] slots of each device.
        apart: keep copies of an expert on different devices; without, only load decides.
    """
    layers, experts = load.shape
    devices, width, slots = len(device_slots), int(device_slots.max()), int(device_slots.sum())

    # step 1: one item per replica, heaviest first
    item = np.repeat(np.tile(np.arange(experts), layers), replicas.ravel()).reshape(layers, slots)
    share = np.take_along_axis(load / replicas, item, axis=1)
    order = np.argsort(-share, axis=1, kind="stable")
    item, share = np.take_along_axis(item, order, axis=1), np.take_along_axis(share, order, axis=1)
    copied = np.any(np.take_along_axis(replicas, item, axis=1) > 1, axis=0)

    # step 2: place them one by one, all layers at once; `key` is the load, infinite once a device is full
    row = np.arange(layers)
    key, carried = np.zeros((layers, devices)), np.zeros((layers, devices))
    filled = np.zeros((layers, devices), np.int64)
    key[:, device_slots == 0] = np.inf
    expert = np.full((layers, devices, width), experts)
    held = np.zeros((layers, devices, experts), bool)
    never = 4.0 * load.sum(axis=1, keepdims=True) + 1.0
    for i in range(slots):
        e = item[:, i]
        d = (np.where(held[row, :, e], key + never, key) if apart and copied[i] else key).argmin(axis=1)
        expert[row, d, filled[row, d]] = e
        held[row, d, e] = True
        filled[row, d] += 1
        carried[row, d] += share[:, i]
        key[row, d] = np.where(filled[row, d] == device_slots[d], np.inf, carried[row, d])

    # step 3: what could not be kept apart above is pulled apart by exchanges
    packing = Packing.of(load, expert)
    if apart:
        pull_apart(packing)
    return packing


def pull_apart(packing: Packing) -> None:
    """Leave no device with an expert twice: by an exchange of two slots, or else another expert's copy.

    There is always another expert to take the slot, since no device has more slots than there are experts.
    """
    experts = packing.load.shape[1] - 1
    for layer, device in np.argwhere(packing.twice):
        seen: set[int] = set()
        for slot in range(packing.expert.shape[2]):
            e = int(packing.expert[layer, device, slot])
            if e in seen and e < experts and not _exchange(packing, layer, device, slot):
                _give_to_another(packing, layer, device, slot)
            seen.add(int(packing.expert[layer, device, slot]))


def _exchange(packing: Packing, layer: int, device: int, slot: int) -> bool:
    """Exchange one duplicate for the slot elsewhere that keeps the two devices the most even, if there is one."""
    e = packing.expert[layer, device, slot]
    theirs, held = packing.expert[layer], packing.held[layer]
    change = packing.share[layer, device, slot] - packing.share[layer]
    after = np.maximum(packing.device_load[layer, device] - change, packing.device_load[layer][:, None] + change)
    after[held[:, e][:, None] | held[device][theirs]] = np.inf
    other, other_slot = np.unravel_index(after.argmin(), after.shape)
    if not np.isfinite(after[other, other_slot]):
        return False
    packing.swap(*(np.array([i]) for i in (layer, device, slot, other, other_slot)))
    packing.held[layer, device, e] = True  # the first copy stays
    return True


def _give_to_another(packing: Packing, layer: int, device: int, slot: int) -> None:
    """Let the expert that leaves the lowest peak have the slot of one duplicate."""
    e = packing.expert[layer, device, slot]
    load, replicas = packing.load[layer], packing.replicas[layer].copy()
    copies = np.zeros(packing.held[layer].shape)
    np.add.at(copies, (np.arange(len(copies))[:, None], packing.expert[layer]), 1)
    copies[device, e] -= 1
    replicas[e] -= 1
    smaller = load / (replicas + 1)
    after = (copies @ (load / replicas))[:, None] + copies * (smaller - load / replicas)  # [D, E+1]
    after[device] += smaller
    peak = np.where(packing.held[layer, device], np.inf, after.max(axis=0))
    packing.replace(*(np.array([i]) for i in (layer, device, slot, int(peak.argmin()))))
    packing.held[layer, device, e] = True  # the first copy stays
