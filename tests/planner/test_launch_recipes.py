"""A plan as command lines: what published recipes say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.split import Layout
from runtime.planning.launch import Command
from tests.planner.launching import made, pairs, pool, says


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


@pytest.mark.parametrize(
    ("release", "spelt"),
    [
        (
            "0.5.9",
            "--attention-backend nsa --nsa-decode-backend trtllm --nsa-prefill-backend trtllm "
            "--enable-flashinfer-allreduce-fusion",
        ),
        (
            "0.5.23",
            "--attention-backend dsa --dsa-decode-backend trtllm --dsa-prefill-backend trtllm "
            "--flashinfer-allreduce-fusion-backend auto",
        ),
    ],
)
def test_sglang_glm_5_on_b200(release: str, spelt: str) -> None:
    """The same, "B200 (FP8)", as each release spells it."""
    given_ = pool("glm-5-fp8", "b200-sxm", Layout(8), "fp8", "fp8")
    (command,) = made("glm-5-fp8", given_, release=release).commands
    says(command, f"{spelt} --moe-runner-backend flashinfer_trtllm --kv-cache-dtype fp8_e4m3 --quantization fp8")


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
    """--speculative-config '{"num_speculative_tokens": 3, "method": "mtp", "enforce_eager": true}' """
)
ASCEND_SETTINGS = {
    "graph_mode": "full",
    "memory_fraction": 0.95,
    "max_step_tokens": 4096,
    "chunked_prefill_tokens": 4096,
}
ASCEND_ENVIRONMENT = {
    "HCCL_OP_EXPANSION_MODE": "AIV", "OMP_PROC_BIND": "false", "OMP_NUM_THREADS": "1", "HCCL_BUFFSIZE": "200",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}  # fmt: skip
ASCEND_OPTIONS = {
    "multistream_overlap_shared_expert": True,
    "ascend_compilation_config": {"enable_npugraph_ex": True, "fuse_muls_add": True},
    "enable_balance_scheduling": True,
}
"""The tutorial's, as 0.23 reads them: fuse_muls_add inside, VLLM_ASCEND_* variables that are deprecated as keys."""


def additional(command: Command) -> dict[str, Any]:
    return json.loads(pairs(command)["--additional-config"][0])


def test_vllm_ascend_w4a8_on_one_atlas_800_a3() -> None:
    """vllm-ascend docs, tutorials/models/GLM5.md, A3, glm-5-w4a8: tp16 with experts by device, seqs 8."""
    given_ = pool(
        "glm-5", "ascend-910c-die", Layout(16, ep=16), "w4a8", engine="vllm-ascend", drafts=3,
        settings=ASCEND_SETTINGS | {"max_running_requests": 8},
    )  # fmt: skip
    (command,) = made("glm-5", given_).commands
    assert command.argv[:3] == ["vllm", "serve", "Eco-Tech/GLM-5-w4a8"]
    assert command.environment == ASCEND_ENVIRONMENT and additional(command) == ASCEND_OPTIONS
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
        assert {*ASCEND_ENVIRONMENT, "HCCL_IF_IP", "GLOO_SOCKET_IFNAME"} <= set(command.environment)
        assert additional(command) == ASCEND_OPTIONS | {"enable_mlapo": True}


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
        """--speculative-config '{"num_speculative_tokens": 3, "method": "mtp", "enforce_eager": true}' """
    )
    connector = {
        "kv_connector": "MooncakeConnectorV1",
        "kv_connector_extra_config": {
            "prefill": {"dp_size": 4, "tp_size": 8}, "decode": {"dp_size": 16, "tp_size": 4}
        },
    }  # fmt: skip
    after = ASCEND_OPTIONS | {"enable_mlapo": True}
    del after["enable_balance_scheduling"]  # refused beside a KV connector
    sides: list[tuple[str, list[int], str, dict[str, str], dict[str, Any]]] = [
        (
            "prefill",
            [0, 0, 1, 1],
            "--data-parallel-size 4 --tensor-parallel-size 8 --max-num-batched-tokens 4096 --max-num-seqs 64 "
            "--gpu-memory-utilization 0.95 --enforce-eager",
            {"kv_role": "kv_producer", "kv_port": "30000", "engine_id": "0"},
            {"multistream_overlap_shared_expert": True, "enable_flashcomm1": True},
        ),
        (
            "decode",
            [2 + rank // 4 for rank in range(16)],
            "--data-parallel-size 16 --tensor-parallel-size 4 --max-num-batched-tokens 32 --max-num-seqs 8 "
            "--gpu-memory-utilization 0.92 --async-scheduling",
            {"kv_role": "kv_consumer", "kv_port": "30100", "engine_id": "1"},
            after,
        ),
    ]
    for side, nodes, flags, role, wanted in sides:
        commands = [command for command in found.commands if command.title.startswith(side)]
        assert [command.node for command in commands] == nodes
        width = {"prefill": 8, "decode": 4}[side]
        for rank, command in enumerate(commands):
            says(command, f"{both}{flags} --data-parallel-rank {rank}")
            assert json.loads(pairs(command)["--kv-transfer-config"][0]) == connector | role
            assert additional(command) == wanted
            first = width * rank % 16
            visible = ",".join(map(str, range(first, first + width)))
            assert command.environment["ASCEND_RT_VISIBLE_DEVICES"] == visible
            assert "VLLM_ASCEND_ENABLE_FUSED_MC2" not in command.environment
            assert ("TASK_QUEUE_ENABLE" in command.environment) or side == "prefill"
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
