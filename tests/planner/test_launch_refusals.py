"""What an engine cannot be told is said or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.engines.flags import table, unsupported
from runtime.deployment.errors import LaunchError
from runtime.deployment.plan import Demand, ModelRef, Plan, config_hash
from runtime.planning.launch import LAUNCHED_ENGINES, launch
from tests.planner.launching import made, pool, says
from tests.plans import formats, pool_of


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
