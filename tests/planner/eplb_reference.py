"""EPLB, the greedy expert balancer of DeepSeek, written anew from its description: a yardstick, kept plain.

1. Pack groups of experts to nodes, the heaviest first, each to the least loaded node that has room.
2. Inside a node, give replicas one at a time to the expert with the largest load per replica.
3. Pack replicas to devices like groups to nodes.

Where the groups do not divide among the nodes, everything counts as one group on one node.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def eplb(load: NDArray, slots: int, groups: int, nodes: int, devices: int) -> NDArray[np.int64]:
    """The expert in each slot [layers, slots] for `load` [layers, experts]."""
    if groups % nodes:
        groups, nodes = 1, 1
    return np.array([_layer(row, slots, groups, nodes, devices) for row in load.tolist()])


def _layer(load: list[float], slots: int, groups: int, nodes: int, devices: int) -> list[int]:
    size = len(load) // groups
    weight = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    row: list[int] = []
    for node in _pack(weight, nodes):
        experts = [g * size + i for g in node for i in range(size)]
        copies = _replicate([load[e] for e in experts], slots // nodes)
        shares = [load[experts[i]] / copies.count(i) for i in copies]
        for device in _pack(shares, devices // nodes):
            row += [experts[copies[slot]] for slot in device]
    return row


def _replicate(load: list[float], slots: int) -> list[int]:
    """The expert of each replica: one of each, then one more of whichever has the largest share."""
    copies, count = list(range(len(load))), [1] * len(load)
    for _ in range(slots - len(load)):
        e = max(range(len(load)), key=lambda i: load[i] / count[i])
        copies.append(e)
        count[e] += 1
    return copies


def _pack(weight: list[float], packs: int) -> list[list[int]]:
    """Items into packs of equal number: the heaviest first, to the least loaded pack with room."""
    room = len(weight) // packs
    content: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weight)), key=lambda i: -weight[i]):
        pack = min((p for p in range(packs) if len(content[p]) < room), key=lambda p: total[p])
        content[pack].append(item)
        total[pack] += weight[item]
    return content


def longest_first(load: NDArray, slots: int, devices: int) -> NDArray[np.int64]:
    """The plain greedy rule [layers, slots]: at most a replica a device, the heaviest first to the least loaded
    device that has room and no copy yet; where there is none, to one that has room."""
    return np.array([sum(_longest_first(row, slots, devices), []) for row in load.tolist()])


def _longest_first(load: list[float], slots: int, devices: int) -> list[list[int]]:
    count = [1] * len(load)
    for _ in range(slots - len(load)):
        count[max(range(len(load)), key=lambda i: load[i] / count[i] if count[i] < devices else -1.0)] += 1
    items = sorted((e for e, c in enumerate(count) for _ in range(c)), key=lambda e: -load[e] / count[e])
    content: list[list[int]] = [[] for _ in range(devices)]
    total = [0.0] * devices
    for e in items:
        room = [d for d in range(devices) if len(content[d]) < slots // devices]
        device = min([d for d in room if e not in content[d]] or room, key=lambda d: total[d])
        content[device].append(e)
        total[device] += load[e] / count[e]
    return content


def twice(slot_expert: NDArray, devices: int) -> NDArray[np.bool_]:
    """[layers] whether some device has an expert twice."""
    ordered = np.sort(slot_expert.reshape(len(slot_expert), devices, -1), axis=2)
    return (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))


def power_law_suite(alpha: float, seed: int, layers: int = 75, experts: int = 256) -> NDArray[np.float64]:
    """[layers, experts] loads: a power law with log-normal noise, shuffled."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        w = np.arange(1, experts + 1) ** -alpha * rng.lognormal(0, 0.3, experts)
        rng.shuffle(w)
        rows.append(w)
    return np.array(rows)


def max_over_mean(slot_expert: NDArray, load: NDArray, devices: int) -> NDArray[np.float64]:
    """[layers] largest device load over the mean one, each expert split evenly over its replicas."""
    result = []
    for slots, w in zip(slot_expert, load, strict=True):
        share = w / np.bincount(slots, minlength=len(w))
        device = share[slots].reshape(devices, -1).sum(axis=1)
        result.append(device.max() / device.mean())
    return np.array(result)
