"""`ExpertPlacement`, the answer, and `place_experts`, the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foundation.limits import within
from model.config import MOST_EXPERTS, MOST_LAYERS
from model.split import MOST_DEVICES
from runtime.deployment.errors import LoadError, SlotsError
from runtime.planning.experts.nodes import solve_by_groups, spread_over_nodes
from runtime.planning.experts.packing import Floats, Ints, Packing
from runtime.planning.experts.solve import solve


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """Which expert sits in which slot of which device, per layer, and how even that is.

    Loads are in the unit of the load matrix, an expert's load split evenly over its replicas.

    slot_expert [L, S]: the expert in each slot; device 0 owns the first device_slots[0] slots, and so on.
    replicas [L, E]: copies of each expert. device_load [L, D]. device_slots [D].
    bound [L]: no placement in these slots, with even splitting, has a smaller max over mean.
    """

    slot_expert: Ints
    replicas: Ints
    device_load: Floats
    device_slots: Ints
    nodes: int
    groups: int
    bound: Floats

    @property
    def max_over_mean(self) -> Floats:
        """[L] the most loaded device's load over the mean device's: 1 is even, larger is worse."""
        return _max_over_mean(self.device_load)

    @property
    def node_max_over_mean(self) -> Floats:
        """[L] the same over nodes."""
        return _max_over_mean(self.device_load.reshape(len(self.device_load), self.nodes, -1).sum(axis=2))

    @property
    def gap(self) -> Floats:
        """[L] max_over_mean / bound - 1: how far above the best possible this can be at most."""
        return np.maximum(self.max_over_mean / self.bound - 1.0, 0.0)

    @property
    def slot_device(self) -> Ints:
        """[S] the device that owns each slot."""
        return np.repeat(np.arange(len(self.device_slots)), self.device_slots)

    def as_lists(self) -> list[list[list[int]]]:
        """Expert numbers as [layers][devices][slots], for JSON."""
        cuts = np.cumsum(self.device_slots)[:-1]
        return [[part.tolist() for part in np.split(row, cuts)] for row in self.slot_expert]


def place_experts(
    load: ArrayLike,
    devices: int,
    nodes: int = 1,
    slots: int | None = None,
    *,
    groups: int = 1,
    device_slots: Sequence[int] | None = None,
) -> ExpertPlacement:
    """Choose replicas and a device for every expert of every layer, so that devices carry alike.

    Args:
        load: [layers, experts] >= 0, any unit: tokens, or a share of them.
        devices: in `nodes` nodes of equal size; consecutive devices share a node.
        slots: experts held by all devices together, per layer; as many as there are experts by default.
        groups: with more than one, experts come in that many consecutive groups, and a group stays on one
            node. With one, replicas of an expert are spread over nodes.
        device_slots: [devices], instead of `slots`, where devices do not all hold the same number.
    Raises: LoadError, SlotsError.
    """
    # step 1: check
    matrix = checked_load(load)
    experts = matrix.shape[1]
    room = checked_slots(experts, devices, nodes, slots, device_slots)
    if groups > 1:
        _check_groups(experts, groups, nodes, room)

    # step 2: solve
    even = bool((room == room[0]).all())
    if groups > 1 and nodes > 1:
        packing, bound = solve_by_groups(matrix, room, nodes, groups)
    else:
        packing, bound = solve(matrix, room)
        if nodes > 1 and even:
            packing = spread_over_nodes(packing, nodes)

    # step 3: experts in order within a device
    packing.expert.sort(axis=2)
    return placement_of(packing, room, nodes, groups, bound)


def placement_of(packing: Packing, room: Ints, nodes: int, groups: int, bound: Floats) -> ExpertPlacement:
    """The answer held by `packing`; `bound` [L] is on the peak load."""
    real = np.arange(packing.expert.shape[2]) < room[:, None]
    mean = packing.load.sum(axis=1) / len(room)
    packing.weigh(np.arange(len(mean)))
    return ExpertPlacement(
        slot_expert=packing.expert[:, real],
        replicas=packing.replicas[:, :-1].copy(),
        device_load=packing.device_load.copy(),
        device_slots=room,
        nodes=nodes,
        groups=groups,
        bound=np.divide(bound, mean, out=np.ones_like(bound), where=mean > 0).clip(min=1.0),
    )


def checked_load(load: ArrayLike) -> Floats:
    """`load` as float64 [layers, experts]. Raises LoadError."""
    array: NDArray[Any] = np.asarray(load)
    if array.ndim != 2 or 0 in array.shape:
        raise LoadError(f"load must be [layers, experts], at least 1 of each; it has shape {array.shape}")
    if array.dtype.kind not in "fiu":
        raise LoadError(f"load must hold numbers; it holds {array.dtype}")
    within("layers of a load:", array.shape[0], MOST_LAYERS, LoadError)
    within("experts of a load:", array.shape[1], MOST_EXPERTS, LoadError)
    matrix = array.astype(np.float64)
    for bad, what in ((~np.isfinite(matrix), "not finite"), (matrix < 0, "negative")):
        if bad.any():
            layer, expert = np.argwhere(bad)[0]
            value, more = array[layer, expert], int(bad.sum()) - 1
            raise LoadError(f"load[{layer}, {expert}] = {value} is {what}, and so are {more} more entries")
    with np.errstate(over="ignore"):
        total = matrix.sum()
    if not np.isfinite(total):
        raise LoadError(f"load adds up to more than a number can be; divide it, by {matrix.max():.3g} for instance")
    return matrix


def checked_slots(
    experts: int, devices: int, nodes: int, slots: int | None, device_slots: Sequence[int] | None
) -> Ints:
    """Slots of each device [D]. Raises SlotsError with the equation that does not hold."""
    if devices < 1 or nodes < 1:
        raise SlotsError(f"devices = {devices} and nodes = {nodes} must be at least 1")
    within("devices:", devices, MOST_DEVICES, SlotsError)
    within("slots:", slots or 0, MOST_DEVICES * MOST_EXPERTS, SlotsError)
    if devices < nodes:
        raise SlotsError(f"devices {devices} < nodes {nodes}: every node needs at least one device")
    if devices % nodes:
        raise SlotsError(f"devices {devices} % nodes {nodes} = {devices % nodes}, must be 0")
    if device_slots is not None:
        room = np.asarray(device_slots, np.int64)
        if room.shape != (devices,) or (room < 1).any():
            raise SlotsError(f"device_slots must be {devices} numbers of at least 1, one a device")
        if slots is not None and slots != room.sum():
            raise SlotsError(f"slots {slots} != {room.sum()}, the sum of device_slots")
    else:
        slots = experts if slots is None else slots
        if slots % devices:
            raise SlotsError(f"slots {slots} % devices {devices} = {slots % devices}, must be 0")
        room = np.full(devices, slots // devices)
    if room.sum() < experts:
        raise SlotsError(f"slots {room.sum()} < experts {experts}: every expert needs a slot")
    if room.max() > experts:
        raise SlotsError(
            f"{room.max()} slots on a device > experts {experts}: a second copy on one device is of no use"
        )
    return room


def _check_groups(experts: int, groups: int, nodes: int, room: Ints) -> None:
    if experts % groups or groups % nodes:
        raise SlotsError(
            f"experts {experts} % groups {groups} = {experts % groups} and "
            f"groups {groups} % nodes {nodes} = {groups % nodes}, both must be 0"
        )
    per_node = room.reshape(nodes, -1)
    if (per_node != per_node[0]).any():
        raise SlotsError("groups on nodes need the same slots on every node")
    if per_node[0].sum() < experts // nodes or per_node.max() > experts // nodes:
        raise SlotsError(
            f"{per_node[0].sum()} slots a node and {per_node.max()} a device must be at least and at most "
            f"experts {experts} / nodes {nodes} = {experts // nodes}"
        )


def _max_over_mean(load: Floats) -> Floats:
    mean = load.mean(axis=1)
    return np.divide(load.max(axis=1), mean, out=np.ones(len(load)), where=mean > 0)
