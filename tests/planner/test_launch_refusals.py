"""What an engine cannot be told is said or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.engines import load
from runtime.deployment.engines.flags import format_facts, layout_facts, table, unsupported
from runtime.deployment.errors import LaunchError
from runtime.deployment.plan import ModelRef, Plan, config_hash
from runtime.planning.launch import LAUNCHED_ENGINES, launch
from tests.planner.launching import PRODUCT, RELEASES, made, pairs, pool, says
from tests.plans import formats, pool_of


@pytest.mark.parametrize(
    ("engine", "profile", "scheme", "kv", "why"),
    [
        ("vllm", "ascend-910c-die", "w8a8", "bf16", "does not run on ascend-910c-die.*--engine sglang or vllm-ascend"),
        ("vllm-ascend", "h200-sxm", "fp8", "bf16", "vllm-ascend does not run on h200-sxm.*--engine sglang or vllm$"),
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
    release, facts = load(engine).release, format_facts(load_config("glm-5-fp8"), chip, scheme, kv)
    if chip.vendor not in table(engine, release).runs_on:
        return
    why = unsupported(engine, release, facts)
    given_ = pool("glm-5-fp8", profile, Layout(16, 4, 64), scheme, kv, engine=engine)
    if why is None:
        assert made("glm-5-fp8", given_, model="m").commands
    else:
        with pytest.raises(LaunchError, match=re.escape(why)):
            made("glm-5-fp8", given_, model="m")
    assert unsupported("trtllm", "1.0", facts) is None


def test_groups_of_experts_that_an_engine_does_not_have_are_refused() -> None:
    given_ = pool("glm-4.7-flash", "h200-sxm", Layout(4, 2, 4), "bf16", engine="sglang")
    assert made("glm-4.7-flash", given_).commands
    with pytest.raises(LaunchError, match="--ep 8 or --ep 1, not 4"):
        made("glm-4.7-flash", given_, engine="vllm")


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


# --- pools apart -------------------------------------------------------------------------------------------


def apart(engine: str, prefill: tuple[Layout, str], decode: tuple[Layout, str], drafts: int = 0, chip: str = "") -> str:
    """Why two pools are not launched, each given by layout and cache format; "" where they are."""
    profile, scheme = PRODUCT[engine]
    options: Any = {"engine": engine, "drafts": drafts}
    before = pool("glm-5-fp8", profile, prefill[0], scheme, prefill[1], role="prefill", **options)
    nodes = 1 + max(device.node for device in before.devices)
    more: Any = {"first_device": len(before.devices), "first_node": nodes, **options}
    after = pool("glm-5-fp8", chip or profile, decode[0], scheme, decode[1], role="decode", **more)
    for release in [each for kind, each in RELEASES if kind == engine]:
        try:
            made("glm-5-fp8", before, after, model="m", release=release)
        except LaunchError as error:
            assert "\n" not in str(error)
            return str(error)
    return ""


@pytest.mark.parametrize("engine", LAUNCHED_ENGINES)
def test_decode_pools_have_one_stage(engine: str) -> None:
    whole, staged = (Layout(16), Layout(16, pp=2))
    for layout in (staged, Layout(8, 2, 16, 2)):
        assert "pp 1" in apart(engine, (whole, "bf16"), (layout, "bf16"))
    refused = apart(engine, (staged, "bf16"), (whole, "bf16"))
    assert ("one pipeline stage; plan both with pp 1" in refused) if engine == "vllm" else refused == ""


@pytest.mark.parametrize(
    ("engine", "kept"),
    [
        ("sglang", ("bf16", "fp8")),
        ("sglang", ("fp8", "bf16")),
        ("vllm", ("fp8", "bf16")),
        ("vllm-ascend", ("int8", "bf16")),
    ],
)
def test_both_pools_keep_one_cache_format(engine: str, kept: tuple[str, str]) -> None:
    layout = Layout(16, 2, 32)
    for drafts in (0, 2):
        assert "plan with one --kv" in apart(engine, (layout, kept[0]), (layout, kept[1]), drafts)
        assert apart(engine, (layout, kept[0]), (layout, kept[0]), drafts) == ""


def test_one_name_of_a_cache_can_mean_two_rows() -> None:
    """FP8 is FlashMLA's record on Hopper and plain FP8 on Blackwell; 16 bits are the same on both."""
    for engine in ("sglang", "vllm"):
        layout = Layout(8)
        assert "chips that store it alike" in apart(engine, (layout, "fp8"), (layout, "fp8"), chip="b200-sxm")
        assert apart(engine, (layout, "bf16"), (layout, "bf16"), chip="b200-sxm") == ""


@pytest.mark.parametrize(("before", "after", "fits"), [(4, 8, False), (8, 16, False), (8, 8, True), (16, 4, True)])
def test_mooncake_wants_prefill_tp_to_hold_decodes(before: int, after: int, fits: bool) -> None:
    prefill, decode = ((Layout(tp, 32 // tp, 32), "bf16") for tp in (before, after))
    why = apart("vllm-ascend", prefill, decode)
    assert (why == "") == fits and (fits or "multiple of decode's" in why)


@pytest.mark.parametrize(("drafts", "role", "fits"), [(2, "serve", False), (1, "decode", False), (0, "serve", True)])
def test_drafts_over_stages(drafts: int, role: str, fits: bool) -> None:
    given_ = pool("glm-5-fp8", "ascend-910c-die", Layout(16, pp=2), "w8a8", engine="vllm-ascend", drafts=drafts)
    facts = layout_facts(given_.layout, drafts, role)
    assert (unsupported("vllm-ascend", "0.23", facts) is None) == fits
    if role == "serve" and not fits:
        with pytest.raises(LaunchError, match="drafts over pipeline stages in prefill pools alone"):
            made("glm-5-fp8", given_, model="m")
    staged = pool("glm-5-fp8", "h200-sxm", Layout(8, pp=2), "fp8", drafts=2)
    assert made("glm-5-fp8", staged, release="0.5.23").commands
    with pytest.raises(LaunchError, match="SGLang 0.5.9 has no speculative decoding over pipeline stages"):
        made("glm-5-fp8", staged, release="0.5.9")


def test_async_scheduling_is_not_asked_for_over_stages() -> None:
    for layout, asked in ((Layout(16, 2, 32), True), (Layout(16, pp=2), False)):
        given_ = pool("glm-5-fp8", "ascend-910c-die", layout, "w8a8", engine="vllm-ascend")
        for command in made("glm-5-fp8", given_, model="m").commands:
            assert ("--async-scheduling" in command.argv) == asked


@pytest.mark.parametrize("model", ["glm-5-fp8", "deepseek-r1", "glm-4.6", "deepseek-v3.2"])
def test_vllm_is_told_16_bits_by_name(model: str) -> None:
    """`auto` is FP8 where a chip, a model or a checkpoint says so."""
    for release in ("0.16", "0.23", "0.33"):
        given_ = pool(model, "b200-sxm", Layout(8), "fp8" if model != "glm-4.6" else "bf16", engine="vllm")
        (command,) = made(model, given_, model="m", release=release).commands
        assert pairs(command)["--kv-cache-dtype"] == ("bfloat16",)
