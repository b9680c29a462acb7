"""What nodes add: groups of experts kept on one node, or replicas spread over nodes."""

from __future__ import annotations

import numpy as np

from runtime.planning.experts.bound import sharpen, simple_bound
from runtime.planning.experts.counts import replica_counts
from runtime.planning.experts.packing import Floats, Ints, Packing, longest_first
from runtime.planning.experts.search import even_out
from runtime.planning.experts.solve import CLOSE, solve


def solve_by_groups(load: Floats, device_slots: Ints, nodes: int, groups: int) -> tuple[Packing, Floats]:
    """Give every node groups / nodes groups of experts, then solve every node by itself.

    A token whose experts lie in few groups then crosses few links. Group g holds the experts
    g E/groups ... (g + 1) E/groups - 1.

    Args:
        load: [L, E]. device_slots: [D], the same on every node.
        nodes, groups: nodes divides groups, groups divides E.
    Returns: the packing, and a lower bound [L] on its peak.
    """
    # step 1: groups to nodes: greedy, and greedy evened out
    layers, experts = load.shape
    devices, per_node = len(device_slots), len(device_slots) // nodes
    weight = load.reshape(layers, groups, -1).sum(axis=2)
    ones, room = np.ones(weight.shape, np.int64), np.full(nodes, groups // nodes)
    greedy, even = longest_first(weight, ones, room), longest_first(weight, ones, room)
    even_out(even, np.zeros(layers), sweeps=20)

    # step 2: solve every node of every layer at once, and keep the better choice layer by layer
    choices, node_bound = [], np.zeros(layers)
    size, room_of_node = experts // groups, device_slots[:per_node]
    for choice in (greedy, even):
        member = (choice.expert[:, :, :, None] * size + np.arange(size)).reshape(layers * nodes, -1)
        own = np.take_along_axis(np.repeat(load, nodes, axis=0), member, axis=1)
        enough = simple_bound(own, room_of_node).reshape(layers, nodes).max(axis=1)
        packing, own_bound = solve(own, room_of_node, np.repeat(enough, nodes))
        node_bound = own_bound.reshape(layers, nodes).max(axis=1)
        member = np.pad(member, ((0, 0), (0, 1)), constant_values=experts)
        expert = np.take_along_axis(member, packing.expert.reshape(layers * nodes, -1), axis=1)
        choices.append(Packing.of(load, expert.reshape(layers, devices, -1)))
        if (greedy.expert == even.expert).all():
            break
    better = np.stack([packing.peak for packing in choices]).argmin(axis=0)
    expert = np.stack([packing.expert for packing in choices])[better, np.arange(layers)]
    best = Packing.of(load, expert)

    # step 3: the bounds of any placement, of groups on nodes, and of a group on one node
    bound = np.maximum(simple_bound(load, device_slots), simple_bound(weight, room) / per_node)
    if groups == nodes:  # which group is where is all the same
        return best, np.maximum(bound, node_bound)
    own = load.reshape(layers * groups, size)
    slots = min(int(room_of_node.sum()) - experts // nodes + size, size * per_node)
    share = (own / replica_counts(own, slots, per_node)).max(axis=1)
    bound = np.maximum(bound, share.reshape(layers, groups).max(axis=1))
    return best, sharpen(load, device_slots, bound, best.peak, CLOSE)


def spread_over_nodes(packing: Packing, nodes: int) -> Packing:
    """Renumber devices, all of one size, so that replicas meet on few nodes and nodes carry alike.

    Devices are dealt in order of load; each goes to the node with room that already has the fewest of
    its replicated experts, and among those to the least loaded one.
    """
    layers, devices, _ = packing.expert.shape
    per_node = devices // nodes
    row = np.arange(layers)
    order = np.argsort(-packing.device_load, axis=1, kind="stable")
    if packing.expert.shape[2] == 1:  # copies are neighbours in that order: deal round, starting further each time
        start = np.arange(per_node)[:, None] * max(1, nodes // per_node)
        turn = np.argsort(((start + np.arange(nodes)) % nodes).ravel(), kind="stable")
        return Packing.of(packing.load[:, :-1], packing.expert[row[:, None], order[:, turn]])

    # step 1: deal
    met = np.zeros((layers, nodes, packing.load.shape[1]), bool)
    carried, filled = np.zeros((layers, nodes)), np.zeros((layers, nodes), np.int64)
    place = np.empty((layers, devices), np.int64)
    scale = packing.device_load.sum(axis=1, keepdims=True) + 1.0
    for i in range(devices):
        device = order[:, i]
        experts = packing.expert[row, device]
        copied = packing.replicas[row[:, None], experts] > 1
        there = met[row[:, None, None], np.arange(nodes)[:, None], experts[:, None]]
        meets = (there & copied[:, None]).sum(axis=2)
        cost = np.where(filled < per_node, meets * scale + carried, np.inf)
        node = cost.argmin(axis=1)
        met[row[:, None], node[:, None], experts] = True
        carried[row, node] += packing.device_load[row, device]
        place[row, node * per_node + filled[row, node]] = device
        filled[row, node] += 1

    # step 2: renumber
    return Packing.of(packing.load[:, :-1], packing.expert[row[:, None], place])
