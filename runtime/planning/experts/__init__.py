"""Which expert sits on which device: replicas, packing, lower bounds, and moving from one to the next.

Owns everything between a load matrix [layers, experts] and a slot map; numpy only, no model, no profile.
Must not import JAX.

    place_experts  load, devices, nodes, slots -> ExpertPlacement   (placement.py)
    rebalance      the same from a placement in use, few moves      (rebalance.py)
    split_unevenly what uneven token splitting gains on top         (uneven.py)
    marginal_slots balance against the number of slots              (marginal.py)

Behind them: counts.py hands out replicas, packing.py packs them, starts.py does both in many ways, search.py
improves, bound.py proves how much is left, solve.py puts these in order, nodes.py adds nodes, files.py reads
and writes.
"""

from runtime.planning.experts.files import read_load, read_placement, sglang_init_expert_location, write_json
from runtime.planning.experts.marginal import SlotOption, marginal_slots
from runtime.planning.experts.placement import ExpertPlacement, place_experts
from runtime.planning.experts.rebalance import moves, rebalance
from runtime.planning.experts.uneven import UnevenSplit, split_unevenly

__all__ = [
    "ExpertPlacement",
    "SlotOption",
    "UnevenSplit",
    "marginal_slots",
    "moves",
    "place_experts",
    "read_load",
    "read_placement",
    "rebalance",
    "sglang_init_expert_location",
    "split_unevenly",
    "write_json",
]
