"""A plan's expert placement in the files that engines read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from model.config import ModelConfig
from runtime.deployment.pool import Experts


def in_order(experts: Experts) -> bool:
    """Whether expert e is in slot e everywhere: what every engine does by itself."""
    first = tuple(range(len(experts.slot_expert[0])))
    return all(row == first for row in experts.slot_expert)


def sglang(experts: Experts, cfg: ModelConfig) -> dict[str, Any]:
    """`--init-expert-location`: the expert in each slot, a row a layer of the model, those without experts too.

    SGLang passes every key of the file on as an argument (srt/eplb/expert_location.py), so there is this one only.
    """
    assert cfg.moe
    slots = len(experts.slot_expert[0])
    filler = [slot % cfg.moe.experts for slot in range(slots)]
    rows = iter(experts.slot_expert)
    return {"physical_to_logical_map": [list(next(rows)) if kind.ffn == "moe" else filler for kind in cfg.layers]}


def vllm_ascend(experts: Experts, cfg: ModelConfig) -> dict[str, Any]:
    """`expert_map_path` of `eplb_config`: the experts of each device, a layer an entry, MoE layers alone.

    The form is vllm-ascend's vllm_ascend/eplb (its tests/ut/ops/expert_map.json).
    """
    share = experts.slots_per_device
    layers = []
    for number, row in enumerate(experts.slot_expert):
        devices = [list(row[first : first + share]) for first in range(0, len(row), share)]
        listed = [{"device_id": device, "device_expert": held} for device, held in enumerate(devices)]
        layers.append({"layer_id": number, "device_count": len(devices), "device_list": listed})
    return {"moe_layer_count": len(layers), "layer_list": layers}


FILES: Mapping[str, Callable[[Experts, ModelConfig], dict[str, Any]]] = {"sglang": sglang, "vllm-ascend": vllm_ascend}
"""By the kind of engine that reads one."""
