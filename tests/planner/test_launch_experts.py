"""Expert placements in the engines' own files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.errors import LaunchError
from runtime.deployment.pool import Pool
from runtime.planning.assign import in_order
from runtime.planning.launch import LAUNCHED_ENGINES
from tests.planner.launching import PRODUCT, made, pairs, pool, says


def placed(engine: str, layout: Layout, profile: str, scheme: str) -> Pool:
    """Every row turned by its number, with one redundant slot a device."""
    bare = pool("glm-5-fp8", profile, layout, scheme, engine=engine)
    experts = in_order(load_config("glm-5-fp8"), layout)
    assert experts
    rows = tuple(
        tuple((e + n) % 256 for e in row) + tuple((n + d) % 256 for d in range(layout.ep))
        for n, row in enumerate(experts.slot_expert)
    )
    assert len(rows[0]) == 256 + layout.ep
    placement = dataclasses.replace(experts, slots_per_device=256 // layout.ep + 1, slot_expert=rows)
    return dataclasses.replace(bare, experts=placement)


def test_sglang_reads_the_placement_from_a_file() -> None:
    given_ = placed("sglang", Layout(2, 8, 16), "h200-sxm", "fp8")
    found = made("glm-5-fp8", given_)
    says(found.commands[0], "--init-expert-location experts-serve.json --ep-num-redundant-experts 16 --ep-size 16")
    rows = found.files["experts-serve.json"]["physical_to_logical_map"]
    cfg = load_config("glm-5-fp8")
    assert (
        given_.experts
        and len(rows) == cfg.num_layers
        and list(found.files["experts-serve.json"]) == ["physical_to_logical_map"]
    )
    assert [tuple(row) for row in rows[3:]] == list(given_.experts.slot_expert)
    for row in rows:
        assert set(row) == set(range(256)) and len(row) == 272


def test_vllm_ascend_reads_the_placement_from_a_file() -> None:
    """The form of vllm-ascend's tests/ut/ops/expert_map.json: layers of devices of experts."""
    given_ = placed("vllm-ascend", Layout(16, 2, 32), "ascend-910c-die", "w8a8")
    found = made("glm-5-fp8", given_, model="m")
    config = json.loads(pairs(found.commands[0])["--additional-config"][0])
    assert config["eplb_config"] == {"expert_map_path": "experts-serve.json"}
    body = found.files["experts-serve.json"]
    assert body["moe_layer_count"] == 75 == len(body["layer_list"]) and given_.experts
    for layer, row in zip(body["layer_list"], given_.experts.slot_expert, strict=True):
        assert layer["device_count"] == 32
        flat = [e for device in layer["device_list"] for e in device["device_expert"]]
        assert tuple(flat) == row and {len(d["device_expert"]) for d in layer["device_list"]} == {9}


def test_vllm_cannot_be_told_a_placement_and_says_so() -> None:
    found = made("glm-5-fp8", placed("vllm", Layout(2, 8, 16), "h200-sxm", "fp8"))
    says(found.commands[0], "--enable-eplb --eplb-config.num_redundant_experts 16")
    assert any("reads no expert placement" in remark for remark in found.commands[0].remarks) and not found.files


@pytest.mark.parametrize("engine", LAUNCHED_ENGINES)
def test_experts_in_order_need_no_file(engine: str) -> None:
    profile, scheme = PRODUCT[engine]
    found = made("glm-5-fp8", pool("glm-5-fp8", profile, Layout(8, 4, 32), scheme, engine=engine), model="m")
    assert not found.files and not any("expert_map" in word or "location" in word for word in found.commands[0].argv)


def test_a_placement_over_stages_is_refused_where_layers_are_counted_anew() -> None:
    given_ = placed("vllm-ascend", Layout(16, 1, 16, 2), "ascend-910c-die", "w8a8")
    with pytest.raises(LaunchError, match="from 0 on each pipeline stage; plan with pp 1"):
        made("glm-5-fp8", given_, model="m")
    assert made("glm-5-fp8", placed("sglang", Layout(8, 1, 8, 2), "h200-sxm", "fp8")).files
