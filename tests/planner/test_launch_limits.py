"""Requests, chunks, memory and ports of a launched plan."""

from __future__ import annotations

import dataclasses

import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.planning.launch import LAUNCHED_ENGINES, launch
from tests.planner.launching import PRODUCT, made, pairs, plan_of, pool, says
from tests.plans import formats, pool_of


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


def test_hccls_buffers_are_those_that_the_plan_counts() -> None:
    """The profile counts twice 200 MB a group. vLLM's recipe says so too, SGLang's says 1,000; a figure set by hand is
    said to the engine."""
    vllm = pool("glm-5", "ascend-910c-die", Layout(16), "w8a8", engine="vllm-ascend")
    (command,) = made("glm-5", vllm).commands
    assert command.environment["HCCL_BUFFSIZE"] == "200" and not any("HCCL" in remark for remark in command.remarks)
    (command,) = made("glm-5", pool("glm-5", "ascend-910c-die", Layout(16), "w4a8")).commands
    (remark,) = (each for each in command.remarks if "HCCL" in each)
    field, _, wanted = remark.rpartition("--set ")[2].partition("=")
    assert command.environment["HCCL_BUFFSIZE"] == "1000" and int(wanted) == 2 * 1000 * 2**20
    profile = hw_profiles.load("ascend-910c-die", {field: float(wanted)})
    cfg = load_config("glm-5")
    given_ = pool_of(cfg, Layout(16), profile, formats("w4a8", "bf16"))
    (command,) = launch(plan_of("glm-5", given_), cfg).commands
    assert command.environment["HCCL_BUFFSIZE"] == "1000" and not any("HCCL" in remark for remark in command.remarks)


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
