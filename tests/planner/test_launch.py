"""A plan as command lines: what published recipes say, read back by a shell, and nothing that has no source."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import CapacityError, UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.engines.flags import holds, table, unsupported
from runtime.deployment.errors import LaunchError
from runtime.deployment.plan import Demand, ModelRef, Plan, Pool, config_hash
from runtime.planning.assign import in_order
from runtime.planning.launch import LAUNCHED_ENGINES, Command, Launch, launch
from tests.cli.cli import glm5, refused
from tests.plans import formats, pool_of

PRODUCT = {"sglang": ("h200-sxm", "fp8"), "vllm": ("h200-sxm", "fp8"), "vllm-ascend": ("ascend-910c-die", "w8a8")}


def pool(model: str, profile: str, layout: Layout, scheme: str, kv: str = "bf16", **options: Any) -> Pool:
    return pool_of(load_config(model), layout, hw_profiles.load(profile), formats(scheme, kv), **options)


def plan_of(model: str, *pools: Pool) -> Plan:
    cfg = load_config(model)
    return Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), pools)


def made(name: str, /, *pools: Pool, **options: Any) -> Launch:
    return launch(plan_of(name, *pools), load_config(name), **options)


def pairs(command: Command) -> dict[str, tuple[str, ...]]:
    """Flag -> its values. `--a=b` is `--a` with the value b."""
    found: dict[str, tuple[str, ...]] = {}
    flag = ""
    for word in command.argv:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            assert flag not in found, f"{flag} twice"
            found[flag] = (value,) if value else ()
        elif flag:
            found[flag] += (word,)
    return found


def says(command: Command, recipe: str, *, but: tuple[str, ...] = ()) -> None:
    """The command says all that a published one does, with the same values; JSON compares as JSON.

    but: what a recipe sets that is no part of a plan (its own name for the model, say).
    """
    import shlex

    words = shlex.split(recipe)
    wanted = pairs(Command("", 0, {}, ("x", *words)))
    got = pairs(command)
    for flag, values in wanted.items():
        if flag in but:
            continue
        assert flag in got, f"{flag} is missing from {command.argv}"
        if values and values[0].startswith("{"):
            assert json.loads(got[flag][0]) == json.loads(values[0]), flag
        else:
            assert got[flag] == values, flag


# --- published recipes -----------------------------------------------------------------------------------


def test_vllm_glm_5_1_on_one_h200_node() -> None:
    """vllm-project/recipes GLM/GLM5.md, "Serving FP8 Model on 8xH200", and models/zai-org/GLM-5.1.yaml."""
    found = made("glm-5.1-fp8", pool("glm-5.1-fp8", "h200-sxm", Layout(8), "fp8", engine="vllm", drafts=3))
    (command,) = found.commands
    assert command.argv[:3] == ["vllm", "serve", "zai-org/GLM-5.1-FP8"] and not command.environment
    says(
        command,
        "--tensor-parallel-size 8 --speculative-config.method mtp --speculative-config.num_speculative_tokens 3 "
        "--tool-call-parser glm47 --reasoning-parser glm45 --enable-auto-tool-choice "
        "--chat-template-content-format=string",
    )
    assert "--enable-expert-parallel" not in command.argv and "--data-parallel-size" not in command.argv


@pytest.mark.parametrize(("profile", "kv"), [("h200-sxm", "fp8"), ("b200-sxm", "fp8_e4m3")])
def test_vllm_glm_5_2_with_an_fp8_cache(profile: str, kv: str) -> None:
    """models/zai-org/GLM-5.2.yaml: Hopper `--kv-cache-dtype fp8`, Blackwell `fp8_e4m3`, MTP 5."""
    given_ = pool("glm-5.2-fp8", profile, Layout(8), "fp8", "fp8", engine="vllm", drafts=5)
    (command,) = made("glm-5.2-fp8", given_).commands
    assert command.argv[2] == "zai-org/GLM-5.2-FP8"
    says(
        command,
        f"--kv-cache-dtype {kv} --tensor-parallel-size 8 --speculative-config.method mtp "
        "--speculative-config.num_speculative_tokens 5 --tool-call-parser glm47 --reasoning-parser glm45 "
        "--enable-auto-tool-choice",
    )


def test_sglang_glm_5_on_one_h200_node() -> None:
    """sgl-cookbook docs/autoregressive/GLM/GLM-5.md, section 4 (where `--tp` is short)."""
    given_ = pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", settings={"memory_fraction": 0.85}, drafts=3)
    (command,) = made("glm-5-fp8", given_).commands
    assert command.argv[:3] == ["python3", "-m", "sglang.launch_server"]
    says(
        command,
        "--model-path zai-org/GLM-5-FP8 --tp-size 8 --tool-call-parser glm47 --reasoning-parser glm45 "
        "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4 --mem-fraction-static 0.85 --host 0.0.0.0 --port 30000",
    )


def test_sglang_glm_5_on_b200() -> None:
    """The same, "B200 (FP8)"."""
    (command,) = made("glm-5-fp8", pool("glm-5-fp8", "b200-sxm", Layout(8), "fp8", "fp8")).commands
    says(
        command,
        "--attention-backend nsa --nsa-decode-backend trtllm --nsa-prefill-backend trtllm "
        "--moe-runner-backend flashinfer_trtllm --enable-flashinfer-allreduce-fusion --kv-cache-dtype fp8_e4m3 "
        "--quantization fp8",
    )


def test_sglang_on_one_atlas_800_a3() -> None:
    """SGLang docs, ascend_npu_glm5_examples.mdx, single node."""
    chosen = {"memory_fraction": 0.7, "chunked_prefill_tokens": 16384, "max_step_tokens": 280000}
    given_ = pool("glm-5", "ascend-910c-die", Layout(16), "w4a8", settings=chosen)
    (command,) = made("glm-5", given_, model="weights/GLM5").commands
    says(
        command,
        "--model-path weights/GLM5 --attention-backend ascend --device npu --tp-size 16 --chunked-prefill-size 16384 "
        "--max-prefill-tokens 280000 --trust-remote-code --mem-fraction-static 0.7",
    )
    assert "--page-size" not in command.argv and any("keeps pages of 128" in remark for remark in command.remarks)
    published = {"STREAMS_PER_DEVICE": "32", "HCCL_BUFFSIZE": "1000", "HCCL_OP_EXPANSION_MODE": "AIV"}
    assert published.items() <= dict(command.environment).items()


ASCEND = (
    "--trust-remote-code --gpu-memory-utilization 0.95 --quantization ascend --enable-chunked-prefill "
    "--enable-prefix-caching --async-scheduling --seed 1024 --enable-expert-parallel --max-num-batched-tokens 4096 "
    """--compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}' """
    """--additional-config '{"fuse_muls_add": true, "multistream_overlap_shared_expert": true, """
    """"ascend_compilation_config": {"enable_npugraph_ex": true}}' """
    """--speculative-config '{"num_speculative_tokens": 3, "method": "deepseek_mtp"}' """
)
ASCEND_SETTINGS = {"memory_fraction": 0.95, "max_step_tokens": 4096, "chunked_prefill_tokens": 4096}
ASCEND_ENVIRONMENT = {
    "HCCL_OP_EXPANSION_MODE": "AIV", "OMP_PROC_BIND": "false", "OMP_NUM_THREADS": "1", "HCCL_BUFFSIZE": "200",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "VLLM_ASCEND_BALANCE_SCHEDULING": "1",
}  # fmt: skip


def test_vllm_ascend_w4a8_on_one_atlas_800_a3() -> None:
    """vllm-ascend docs, tutorials/models/GLM5.md, A3, glm-5-w4a8: tp16 with experts by device, seqs 8."""
    given_ = pool(
        "glm-5", "ascend-910c-die", Layout(16, ep=16), "w4a8", engine="vllm-ascend", drafts=3,
        settings=ASCEND_SETTINGS | {"max_running_requests": 8},
    )  # fmt: skip
    (command,) = made("glm-5", given_).commands
    assert command.argv[:3] == ["vllm", "serve", "Eco-Tech/GLM-5-w4a8"]
    assert command.environment == ASCEND_ENVIRONMENT
    says(command, ASCEND + "--tensor-parallel-size 16 --max-num-seqs 8 --port 8077 --host 0.0.0.0")


def test_vllm_ascend_w8a8_on_two_nodes() -> None:
    """The same tutorial, multi-node: glm-5-w8a8 dp2 tp16, one command a node; the second is headless."""
    given_ = pool(
        "glm-5", "ascend-910c-die", Layout(16, 2, 32), "w8a8", engine="vllm-ascend", drafts=3,
        settings=ASCEND_SETTINGS | {"max_running_requests": 16},
    )  # fmt: skip
    first, second = made("glm-5", given_, hosts=["10.0.0.1", "10.0.0.2"]).commands
    both = ASCEND + "--data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-address 10.0.0.1 "
    says(first, both + "--tensor-parallel-size 16 --max-num-seqs 16 --host 0.0.0.0 --port 8077")
    says(second, both + "--tensor-parallel-size 16 --max-num-seqs 16 --headless --data-parallel-start-rank 1")
    assert "--headless" not in first.argv and "--port" not in second.argv
    assert (first.node, second.node) == (0, 1)
    for command in (first, second):
        assert {*ASCEND_ENVIRONMENT, "VLLM_ASCEND_ENABLE_MLAPO", "HCCL_IF_IP", "GLOO_SOCKET_IFNAME"} <= set(
            command.environment
        )


def test_vllm_ascend_disaggregated_on_six_nodes() -> None:
    """The same tutorial, "Prefill-Decode Disaggregation": P dp4 tp8 on two nodes, D dp16 tp4 on four, a process a
    dp rank, both sides' degrees in the connector's configuration, a proxy that knows every rank's port."""
    options: Any = {"engine": "vllm-ascend", "drafts": 3}
    prefill = pool(
        "glm-5", "ascend-910c-die", Layout(8, 4, 32), "w8a8", role="prefill", **options,
        settings=ASCEND_SETTINGS | {"max_running_requests": 64},
    )  # fmt: skip
    decode = pool(
        "glm-5", "ascend-910c-die", Layout(4, 16, 64), "w8a8", role="decode", first_device=32, first_node=2, **options,
        settings={"memory_fraction": 0.92, "max_step_tokens": 32, "chunked_prefill_tokens": 32,
                  "max_running_requests": 8},
    )  # fmt: skip
    found = made("glm-5", prefill, decode)
    both = (
        "--enable-expert-parallel --seed 1024 --trust-remote-code --quantization ascend --enable-auto-tool-choice "
        "--tool-call-parser glm47 --reasoning-parser glm45 "
        """--speculative-config '{"num_speculative_tokens": 3, "method":"deepseek_mtp"}' """
    )
    connector = {
        "kv_connector": "MooncakeConnectorV1",
        "kv_connector_extra_config": {
            "use_ascend_direct": True, "prefill": {"dp_size": 4, "tp_size": 8}, "decode": {"dp_size": 16, "tp_size": 4}
        },
    }  # fmt: skip
    ours = [command for command in found.commands if command.title.startswith("prefill")]
    assert [command.node for command in ours] == [0, 0, 1, 1]
    for rank, command in enumerate(ours):
        says(
            command,
            both + "--data-parallel-size 4 --tensor-parallel-size 8 --max-num-batched-tokens 4096 --max-num-seqs 64 "
            f"--gpu-memory-utilization 0.95 --enforce-eager --data-parallel-rank {rank}",
        )
        transfer = json.loads(pairs(command)["--kv-transfer-config"][0])
        assert transfer == connector | {"kv_role": "kv_producer", "kv_port": "30000", "engine_id": "0"}
        assert command.environment["VLLM_ASCEND_ENABLE_FLASHCOMM1"] == "1"
        first = 8 * (rank % 2)
        assert command.environment["ASCEND_RT_VISIBLE_DEVICES"] == ",".join(map(str, range(first, first + 8)))
    theirs = [command for command in found.commands if command.title.startswith("decode")]
    assert [command.node for command in theirs] == [2 + rank // 4 for rank in range(16)]
    for rank, command in enumerate(theirs):
        says(
            command,
            both + "--data-parallel-size 16 --tensor-parallel-size 4 --max-num-batched-tokens 32 --max-num-seqs 8 "
            f"--gpu-memory-utilization 0.92 --async-scheduling --data-parallel-rank {rank}",
        )
        transfer = json.loads(pairs(command)["--kv-transfer-config"][0])
        assert transfer == connector | {"kv_role": "kv_consumer", "kv_port": "30100", "engine_id": "1"}
        assert {"TASK_QUEUE_ENABLE", "VLLM_ASCEND_ENABLE_MLAPO"} <= set(command.environment)
    assert found.router is not None
    proxy = pairs(found.router)
    assert [len(proxy[f"--{side}-{what}"]) for side in ("prefiller", "decoder") for what in ("hosts", "ports")] == [
        4, 4, 16, 16
    ]  # fmt: skip
    ends = {(c.node, pairs(c)["--port"][0]) for c in found.commands}
    assert len(ends) == 20
    hosts = [host.removeprefix("$NODE") for host in proxy["--prefiller-hosts"] + proxy["--decoder-hosts"]]
    assert ends == set(zip(map(int, hosts), proxy["--prefiller-ports"] + proxy["--decoder-ports"], strict=True))


def test_sglang_disaggregated_with_dp_attention() -> None:
    """SGLang docs, pd_disaggregation.md, "DeepSeek Multi-Node": two nodes a role, tp-size counts all devices."""
    options: Any = {"settings": {"memory_fraction": 0.8, "max_running_requests": 16}}
    prefill = pool("glm-5-fp8", "h800-sxm", Layout(2, 8, 16), "fp8", role="prefill", **options)
    decode = pool(
        "glm-5-fp8", "h800-sxm", Layout(2, 8, 16), "fp8", role="decode", first_device=16, first_node=2, **options
    )
    found = made("glm-5-fp8", prefill, decode, hosts=["p0", "p1", "d0", "d1"])
    assert [command.node for command in found.commands] == [0, 1, 2, 3]
    for command, role, head, rank in zip(
        found.commands, ("prefill", "prefill", "decode", "decode"), ("p0", "p0", "d0", "d0"), (0, 1, 0, 1), strict=True
    ):
        says(
            command,
            f"--disaggregation-mode {role} --dist-init-addr {head}:20000 --nnodes 2 --node-rank {rank} --tp-size 16 "
            "--dp-size 8 --enable-dp-attention --moe-a2a-backend deepep --mem-fraction-static 0.8 "
            "--max-running-requests 128",
        )
    assert found.router is not None
    assert found.router.argv[:4] == ["python3", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    says(found.router, "--prefill http://p0:30000 8998 --decode http://d0:30000 --port 8000")


def test_vllm_disaggregated_over_nixl() -> None:
    """vLLM docs, features/nixl_connector_usage.md, "Multi-Instance Setup"."""
    one = pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", role="prefill", engine="vllm", replicas=2)
    two = pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", role="decode", engine="vllm", first_device=16, first_node=2)
    found = made("glm-5-fp8", one, two, hosts=["a", "b", "c"])
    for command, role, host in zip(found.commands, ("producer", "producer", "consumer"), "abc", strict=True):
        says(
            command,
            f"""--tensor-parallel-size 8 --kv-transfer-config '{{"kv_connector":"NixlConnector","""
            f""""kv_role":"kv_{role}","kv_load_failure_policy":"fail"}}'""",
        )
        assert command.environment == {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600"}
    assert found.router is not None
    says(
        found.router,
        "--prefiller-hosts a b --prefiller-ports 8000 8000 --decoder-hosts c --decoder-ports 8000 --port 8000",
    )


def test_vllm_data_parallel_over_nodes() -> None:
    """vLLM docs, expert_parallel_deployment.md, "2-Node Deployment": tp1 dp16 ep16, local 8, start rank 8."""
    given_ = pool("glm-5-fp8", "h200-sxm", Layout(1, 16, 16), "fp8", engine="vllm")
    first, second = made("glm-5-fp8", given_, hosts=["192.168.1.100", "192.168.1.101"]).commands
    both = (
        "--tensor-parallel-size 1 --enable-expert-parallel --data-parallel-size 16 --data-parallel-size-local 8 "
        "--data-parallel-address 192.168.1.100 --data-parallel-rpc-port 13345"
    )
    says(first, both)
    says(second, both + " --data-parallel-start-rank 8 --headless")


def test_pipeline_stages_over_nodes() -> None:
    """vLLM docs, parallelism_scaling.md: tp within a node, stages over nodes; the layers of each as planned."""
    given_ = pool("glm-5-fp8", "h100-sxm", Layout(8, pp=2), "fp8", engine="vllm")
    first, second = made("glm-5-fp8", given_, hosts=["x", "y"]).commands
    both = "--tensor-parallel-size 8 --pipeline-parallel-size 2 --nnodes 2 --master-addr x"
    says(first, both + " --node-rank 0")
    says(second, both + " --node-rank 1 --headless")
    assert first.environment == second.environment == {"VLLM_PP_LAYER_PARTITION": "39,39"}
    found = made("glm-5-fp8", given_, engine="sglang", hosts=["x", "y"]).commands
    says(found[1], "--tp-size 8 --pp-size 2 --nnodes 2 --node-rank 1 --dist-init-addr x:20000")
    assert found[0].environment == {"SGLANG_PP_LAYER_PARTITION": "39,39"}


# --- limits ----------------------------------------------------------------------------------------------


def test_limits_are_the_engines_per_rank_or_in_all() -> None:
    """The plan counts requests and chunks a dp rank. SGLang divides both flags by --dp-size, vLLM takes them a rank."""
    chosen = {"max_running_requests": 24, "chunked_prefill_tokens": 2048, "max_step_tokens": 4096}
    layout = Layout(1, 8, 8)
    sglang = made("glm-5-fp8", pool("glm-5-fp8", "b300-sxm", layout, "fp8", settings=chosen)).commands[0]
    says(sglang, "--max-running-requests 192 --chunked-prefill-size 16384 --max-prefill-tokens 4096")
    given_ = pool("glm-5-fp8", "b300-sxm", layout, "fp8", engine="vllm", settings=chosen)
    says(made("glm-5-fp8", given_).commands[0], "--max-num-seqs 24 --max-num-batched-tokens 4096")


@pytest.mark.parametrize("engine", LAUNCHED_ENGINES)
def test_a_request_longer_than_the_pool_is_never_admitted(engine: str) -> None:
    profile, scheme = PRODUCT[engine]
    layout = Layout(8) if engine != "vllm-ascend" else Layout(16)
    given_ = pool("glm-5-fp8", profile, layout, scheme, engine=engine)
    flag = "--context-length" if engine == "sglang" else "--max-model-len"
    longest = int(pairs(made("glm-5-fp8", given_, model="m").commands[0])[flag][0])
    assert longest == min(load_config("glm-5-fp8").max_positions, given_.pool_tokens)
    small = dataclasses.replace(
        given_, devices=tuple(dataclasses.replace(device, kv_pages=100) for device in given_.devices)
    )
    found = pairs(made("glm-5-fp8", small, model="m").commands[0])
    assert int(found[flag][0]) == 100 * given_.page_tokens
    apart = [dataclasses.replace(given_, role="prefill"), dataclasses.replace(small, role="decode")]
    for command in made("glm-5-fp8", *apart, model="m").commands:  # both pools hold every request
        assert int(pairs(command)[flag][0]) == 100 * given_.page_tokens


def test_host_tier() -> None:
    """SGLang counts GB a rank, vLLM GiB over a tp group (config/cache.py), vllm-ascend bytes."""
    given_ = pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8")
    per_device = 2 * given_.devices[0].ledger.kv_bytes
    (sglang,) = made("glm-5-fp8", given_, host_tier=True).commands
    says(sglang, f"--enable-hierarchical-cache --hicache-size {int(per_device / 1e9)}")
    (vllm,) = made("glm-5-fp8", given_, engine="vllm", host_tier=True).commands
    says(vllm, f"--kv-offloading-size {int(8 * per_device / 2**30)} --kv-offloading-backend native")
    assert "--enable-hierarchical-cache" not in made("glm-5-fp8", given_).commands[0].argv


def test_replicas_on_one_node_do_not_meet() -> None:
    """Four replicas of two devices share a node: own devices, own ports, and something in front of them."""
    given_ = pool("glm-4.7-flash", "h200-sxm", Layout(2), "bf16", replicas=4, engine="sglang")
    found = made("glm-4.7-flash", given_, hosts=["h"])
    assert [pairs(c).get("--base-gpu-id", ("0",))[0] for c in found.commands] == ["0", "2", "4", "6"]
    assert len({pairs(c)["--port"] for c in found.commands}) == 4
    assert found.router is not None
    says(found.router, "--worker-urls " + " ".join(f"http://h:{30000 + 2 * i}" for i in range(4)))
    other = made("glm-4.7-flash", dataclasses.replace(given_, engine="vllm"), hosts=["h"])
    assert [c.environment["CUDA_VISIBLE_DEVICES"] for c in other.commands] == ["0,1", "2,3", "4,5", "6,7"]
    assert other.router is None
    assert any("put a load balancer before h:8000, h:8002" in remark for remark in other.remarks)


# --- experts ---------------------------------------------------------------------------------------------


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


# --- what cannot be said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "profile", "scheme", "kv", "why"),
    [
        ("vllm", "ascend-910c-die", "w8a8", "bf16", "vllm does not run on ascend-910c-die.*--engine vllm-ascend"),
        ("vllm-ascend", "h200-sxm", "fp8", "bf16", "vllm-ascend does not run on h200-sxm.*--engine vllm "),
        ("sglang", "ascend-910c-die", "fp8", "bf16", "no FP8 block-scaled matmul on Ascend; plan with"),
        ("vllm-ascend", "ascend-910c-die", "fp8", "bf16", "no FP8 block-scaled matmul; plan with"),
        ("sglang", "ascend-910c-die", "w8a8", "int8", "SGLang keeps its cache in 16 bits or FP8; plan with"),
        ("vllm", "h200-sxm", "fp8", "int8", "vLLM keeps MLA caches in 16 bits or FP8; plan with"),
        ("vllm-ascend", "ascend-910c-die", "w8a8", "fp8", "16 bits or INT8"),
        ("vllm", "h200-sxm", "w4a8", "bf16", "vllm-ascend alone; use --engine vllm-ascend"),
        ("trtllm", "h200-sxm", "fp8", "bf16", "no launch commands for trtllm: use --engine sglang, vllm, vllm-ascend"),
    ],
)
def test_refusals_say_what_to_change(engine: str, profile: str, scheme: str, kv: str, why: str) -> None:
    given_ = pool("glm-5-fp8", profile, Layout(16, 2, 32), scheme, kv)
    with pytest.raises(LaunchError, match=why) as caught:
        made("glm-5-fp8", given_, engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", LAUNCHED_ENGINES)
@pytest.mark.parametrize("profile", ["h200-sxm", "ascend-910c-die"])
@pytest.mark.parametrize("kv", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "w8a8", "w4a8"])
def test_a_search_is_told_of_the_formats_that_launch_refuses(engine: str, profile: str, kv: str, scheme: str) -> None:
    chip = hw_profiles.load(profile)
    if chip.vendor not in table(engine).runs_on:
        return
    why = unsupported(engine, chip.vendor, scheme, kv, sparse=True)
    given_ = pool("glm-5-fp8", profile, Layout(16, 4, 64), scheme, kv, engine=engine)
    if why is None:
        assert made("glm-5-fp8", given_, model="m").commands
    else:
        with pytest.raises(LaunchError, match=re.escape(why)):
            made("glm-5-fp8", given_, model="m")
    assert unsupported("trtllm", chip.vendor, scheme, kv, sparse=True) is None


def test_uneven_nodes_are_refused() -> None:
    given_ = pool("glm-4.7-flash", "h200-sxm", Layout(1, 12), "bf16", engine="sglang")
    with pytest.raises(LaunchError, match=r"8 \+ 4 devices over nodes of 8: sglang wants as many on each node"):
        made("glm-4.7-flash", given_)


def test_wide_ranks_go_through_ray_or_are_refused() -> None:
    given_ = pool("glm-5-fp8", "h200-sxm", Layout(16, 2, 32), "fp8", engine="vllm")
    (command,) = made("glm-5-fp8", given_).commands
    says(command, "--data-parallel-size 2 --data-parallel-backend ray --distributed-executor-backend ray")
    assert command.environment["VLLM_RAY_DP_PACK_STRATEGY"] == "span"
    assert any("start a Ray cluster over nodes 0, 1, 2, 3" in remark for remark in command.remarks)
    given_ = pool("glm-5-fp8", "ascend-910c-die", Layout(32, 2, 64), "w8a8", engine="vllm-ascend")
    with pytest.raises(LaunchError, match="2 dp ranks of 32 devices, over nodes of 16"):
        made("glm-5-fp8", given_)


def test_another_engine_than_planned_and_other_chips_are_said() -> None:
    given_ = pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", settings={"eager_step_host_seconds": 0.1})
    assert any("engine.eager_step_host_seconds" in r for r in made("glm-5-fp8", given_).commands[0].remarks)
    other = made("glm-5-fp8", given_, engine="vllm").commands[0]
    assert any("planned for sglang" in remark for remark in other.remarks)
    foreign = pool("glm-5-fp8", "kunlunxin-p800", Layout(16), "w8a8", engine="vllm")
    assert any("Kunlunxin's build" in remark for remark in made("glm-5-fp8", foreign).commands[0].remarks)
    prefill = pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", role="prefill", engine="vllm")
    decode = pool(
        "glm-5-fp8", "ascend-910c-die", Layout(16), "w8a8", role="decode", engine="vllm-ascend", first_device=8,
        first_node=1,
    )  # fmt: skip
    mixed = made("glm-5-fp8", prefill, decode)
    assert any("no released KV connector joins vllm on h200-sxm and vllm-ascend" in remark for remark in mixed.remarks)
    assert [command.node for command in mixed.commands] == [0, 1] and mixed.router is None


def test_no_published_checkpoint_asks_for_one() -> None:
    found = made("glm-4.6", pool("glm-4.6", "ascend-910c-die", Layout(8), "w8a8", engine="vllm-ascend"))
    assert found.commands[0].argv[2] == "$MODEL" and any("set MODEL" in remark for remark in found.remarks)


def test_a_model_read_from_a_directory_is_loaded_from_it(tmp_path: Path) -> None:
    from importlib import resources

    folder = tmp_path / "my glm"
    folder.mkdir()
    preset = resources.files("model") / "configs" / "glm-5-fp8.json"
    (folder / "config.json").write_text(preset.read_text())
    cfg = load_config(folder)
    for scheme, expected in (("fp8", str(folder)), ("bf16", "$MODEL")):
        given_ = pool_of(cfg, Layout(8, 2), hw_profiles.load("b300-sxm"), formats(scheme))
        plan = Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), (given_,))
        assert launch(plan, cfg).commands[0].argv[4] == expected


def test_a_stage_that_borrows_a_selection_is_said() -> None:
    """GLM-5.2 shares indexers over four layers; layer 39 reuses layer 38's."""
    found = made("glm-5.2-fp8", pool("glm-5.2-fp8", "h100-sxm", Layout(8, pp=2), "fp8", engine="vllm"))
    assert any("stage from layer 39 on reuses the selection of layer 38" in r for r in found.commands[0].remarks)


# --- what holds of every command -------------------------------------------------------------------------

LAYOUTS = st.sampled_from(
    [Layout(tp, dp, ep, pp) for tp in (1, 2, 4, 8, 16) for dp in (1, 2, 4, 8, 16) for pp in (1, 2)
     for ep in {1, tp * dp} if tp * dp * pp <= 64]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(LAYOUTS, st.sampled_from(LAUNCHED_ENGINES), st.integers(0, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_every_flag_has_a_source_and_every_device_a_process(
    layout: Layout, engine: str, drafts: int, replicas: int, apart: bool, host_tier: bool
) -> None:
    profile, scheme = PRODUCT[engine]
    options: Any = {"engine": engine, "drafts": drafts, "replicas": replicas}
    try:
        pools = [pool("glm-5-fp8", profile, layout, scheme, role="prefill" if apart else "serve", **options)]
        if apart:
            nodes = 1 + max(device.node for device in pools[0].devices)
            more: Any = {"first_device": len(pools[0].devices), "first_node": nodes}
            pools.append(pool("glm-5-fp8", profile, layout, scheme, role="decode", **options, **more))
        found = made("glm-5-fp8", *pools, host_tier=host_tier)
    except (CapacityError, UsageError, LaunchError):
        return
    documented = table(engine).documented
    for command in found.commands:
        flags = pairs(command)
        assert flags.keys() == command.sources.keys(), "a flag without a source, or the other way round"
        assert flags.keys() <= documented.keys()
    assert covered(found, engine) == {(device.node, local) for device, local in numbered(pools, profile)}
    ends = [(c.node, pairs(c)["--port"]) for c in found.commands if "--port" in pairs(c) and serves(c, engine)]
    assert len(ends) == len(set(ends)), "two processes on one port"
    assert found.nodes == sorted({command.node for command in found.commands})
    assert json.loads(json.dumps(found.to_json()))["commands"][0]["argv"] == found.commands[0].argv


def serves(command: Command, engine: str) -> bool:
    """Whether the process answers requests: of SGLang's nodes only the first does."""
    return engine != "sglang" or pairs(command).get("--node-rank", ("0",)) == ("0",)


def numbered(pools: list[Pool], profile: str) -> list[tuple[Any, int]]:
    """Each device with its number on its node."""
    per_node = int(hw_profiles.load(profile).value("node.devices"))
    return [(device, i % per_node) for each in pools for i, device in enumerate(each.devices)]


def covered(found: Launch, engine: str) -> set[tuple[int, int]]:
    """(node, device) that the commands start processes on, each once, read off the words alone."""
    per_node = 16 if engine == "vllm-ascend" else 8
    held: list[tuple[int, int]] = []
    for command in found.commands:
        flags = {flag: values[0] if values else "" for flag, values in pairs(command).items()}
        nodes = int(flags.get("--nnodes", 1))
        if engine == "sglang":
            total = int(flags["--tp-size"]) * int(flags.get("--pp-size", 1))
            first = int(flags.get("--base-gpu-id", 0))
            held += [(command.node, first + i) for i in range(total // nodes)]
            continue
        total = int(flags["--tensor-parallel-size"]) * int(flags.get("--pipeline-parallel-size", 1))
        ranks = int(flags.get("--data-parallel-size-local", flags.get("--data-parallel-size", 1)))
        if "--data-parallel-rank" in flags:
            ranks = 1
        if flags.get("--data-parallel-backend") == "ray":
            span = range(-(-total * ranks // per_node))
            held += [(command.node + n, i) for n in span for i in range(per_node)]
            continue
        name = "ASCEND_RT_VISIBLE_DEVICES" if engine == "vllm-ascend" else "CUDA_VISIBLE_DEVICES"
        count = total * ranks // nodes
        seen = command.environment.get(name)
        chosen = [int(i) for i in str(seen).split(",")] if seen else list(range(per_node))
        assert len(chosen) == count, (command.argv, chosen)
        held += [(command.node, i) for i in chosen]
    assert len(held) == len(set(held)), "a device with two processes"
    return set(held)


def test_every_rule_of_a_table_can_be_reached_and_has_a_source() -> None:
    facts: Mapping[str, list[Any]] = {
        "vendor": ["NVIDIA", "Huawei"], "role": ["serve", "prefill", "decode"], "model": ["glm-5", "x"],
        "model_type": ["glm_moe_dsa", "deepseek_v32"], "scheme": ["bf16", "fp8", "w8a8", "w4a8", "w4a16"],
        "kv": ["bf16", "fp8", "int8", "f32"], **{k: [True, False] for k in
        ("sparse", "fp4", "by_expert", "groups", "drafts", "nodes", "pp")},
    }  # fmt: skip
    for engine in LAUNCHED_ENGINES:
        read = table(engine)
        assert set(read.documented.values()) <= set(read.sources.values())
        for rule in (*read.extra, *read.environment, *read.remark, *read.refuse):
            assert rule["when"].keys() <= facts.keys()
            chosen = {k: v[0] if isinstance(v, list) else v for k, v in rule["when"].items()}
            assert holds(rule["when"], {k: vs[0] for k, vs in facts.items()} | chosen)
            assert "why" in rule or "text" in rule or rule["source"] in read.sources


def test_a_shell_reads_the_words_back(tmp_path: Path) -> None:
    """The scripts, run by sh with engines that only write down their arguments: what arrives is what was meant."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("vllm", "python3"):
        (tools / name).write_text(
            f'#!/bin/sh\n{{ printf "%s\\0" "{name}" "$@"; }} > "$OUT/$$.argv"\nenv -0 > "$OUT/$$.env"\n'
        )
        (tools / name).chmod(0o755)
    awkward = 'it\'s a "model" $HOME `x` \\ of *mine*'
    prefill = pool("glm-5", "ascend-910c-die", Layout(8, 4, 32), "w8a8", role="prefill", engine="vllm-ascend", drafts=2)
    decode = pool(
        "glm-5", "ascend-910c-die", Layout(4, 8, 32), "w8a8", role="decode", engine="vllm-ascend", first_device=32,
        first_node=2,
    )  # fmt: skip
    found = made("glm-5", prefill, decode, model=awkward)
    folder = tmp_path / "scripts"
    folder.mkdir()
    written = found.write(folder, sources=True)
    assert {path.name for path in written} == {*(f"node{n}.sh" for n in range(4)), "router.sh"}
    hosts = {f"NODE{n}": f"10.0.0.{n}" for n in range(4)} | {"NIC": "eth0", "LOCAL_IP": "10.0.0.9"}
    for node in (*range(4), -1):
        out = tmp_path / f"out{node}"
        out.mkdir()
        script = folder / (f"node{node}.sh" if node >= 0 else "router.sh")
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out), **hosts}
        ended = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0 and not ended.stderr, ended.stderr
        wanted = [c for c in (*found.commands, found.router) if c is not None and c.node == node]
        arrived = sorted(path.read_text().split("\0")[:-1] for path in out.glob("*.argv"))
        assert arrived == sorted([filled(word, hosts) for word in c.argv] for c in wanted)
        told = [dict(line.split("=", 1) for line in p.read_text().split("\0") if line) for p in out.glob("*.env")]
        for command in wanted:
            values = {k: filled(str(getattr(v, "text", v)), hosts) for k, v in command.environment.items()}
            assert any(values.items() <= heard.items() for heard in told)


def filled(word: str, values: Mapping[str, str]) -> str:
    """The word with `$NAME` and `${NAME:?message}` filled in."""
    for name, value in values.items():
        if word.startswith("${" + name + ":?"):
            return value + word.partition("}")[2]
        if word == f"${name}" or word.startswith(f"${name}:"):
            return value + word.removeprefix(f"${name}")
    return word


def test_a_missing_address_stops_the_script(tmp_path: Path) -> None:
    found = made("glm-5-fp8", pool("glm-5-fp8", "h200-sxm", Layout(8, 2), "fp8", engine="sglang"))
    found.write(tmp_path)
    command = ["sh", str(tmp_path / "node0.sh")]
    environment = {"PATH": os.environ["PATH"]}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode and "address of node 0" in ended.stderr


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan_of("glm-5-fp8", pool("glm-5-fp8", "h200-sxm", Layout(8), "fp8", drafts=3)).write(path)
    return path


def test_the_command_prints_what_launch_makes(plan_file: Path, tmp_path: Path) -> None:
    plan = Plan.read(plan_file)
    made_here = launch(plan, plan.config(), hosts=["h"])
    assert glm5("plan", "launch", plan_file, "--hosts", "h").out == made_here.text()
    assert glm5("plan", "launch", plan_file, "--hosts", "h", "--json").json == json.loads(
        json.dumps(made_here.to_json())
    )
    shown = glm5("plan", "launch", plan_file, "--sources").out
    assert "# --tp-size: SGLang docs, advanced_features/server_arguments.md" in shown
    listed = glm5("plan", "launch", plan_file, "--engine", "vllm", "--out", tmp_path).out.split()
    assert listed == [str(tmp_path / "node0.sh")]
    assert "--tensor-parallel-size 8" in (tmp_path / "node0.sh").read_text()


def test_the_command_refuses_in_one_line(plan_file: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused("plan", "launch", tmp_path / "absent.json")
    assert "no such directory" in refused("plan", "launch", plan_file, "--out", tmp_path / "absent")
    assert "2 addresses, the plan has 1 node" in refused("plan", "launch", plan_file, "--hosts", "a,b")
    assert "an address is empty" in refused("plan", "launch", plan_file, "--hosts", ",")
    assert "does not run on h200-sxm" in refused("plan", "launch", plan_file, "--engine", "vllm-ascend")
    edited = tmp_path / "edited.json"
    edited.write_text(plan_file.read_text().replace('"kv_pages": ', '"kv_pages": 1', 1))
    assert "edited" in refused("plan", "launch", edited)
