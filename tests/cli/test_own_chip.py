"""A person's own chip, of which little is known: what is refused by name, what is assumed and said, and how a profile
begins."""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
import model
from hw_profiles.fields import CURVES, FIELDS, FORMAT_OF_SCHEME
from model.formats import SCHEMES
from model.hf_config import load_config
from tests.cli.cli import glm5, refused

pytestmark = pytest.mark.usefixtures("coarse")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
AIR = ("--model", "glm-4.5-air")
FLASH = ("--model", "glm-4.7-flash")
LOAD = ("--isl", 256, "--osl", 16, "--concurrency", 2, "--requests", 4)
UP, OUT = (f"link.{level}.bandwidth_bytes_per_s" for level in ("scale_up", "scale_out"))
THREE = {
    "chip.peak.bf16_flops_per_s": 256e12,
    "chip.memory.capacity_bytes": 96e9,
    "chip.memory.bandwidth_bytes_per_s": 1.2e12,
}


def chip(folder: Path, figures: Mapping[str, float] = {}, grade: str = "A") -> Path:
    path = folder / "npu.toml"
    path.write_text(hw_profiles.new_profile("npu", "Startup", {**THREE, **figures}, ["bf16"], ["bf16"], "spec", grade))
    return path


@pytest.fixture
def npu(tmp_path: Path) -> Path:
    """Servers of eight with a full mesh, and nothing said about the network between them."""
    return chip(tmp_path, {"node.devices": 8, "link.scale_up.domain_devices": 8, UP: 200e9})


# --- the link of a hop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--devices", 16, "--tp", 4, "--pp", 4), "a hop between pipeline stages"),
        slow(("--devices", 16, "--tp", 8, "--dp", 2), "all-"),
        (("--devices", 16, "--tp", 2, "--dp", 8, "--ep", 16), "an all-to-all"),
        (("--devices", 8, "--tp", 8, "--prefill-devices", 8), "which the cache takes from prefill to decode"),
    ],
)
def test_a_layout_that_crosses_servers_needs_the_link_between_them(
    npu: Path, words: tuple[object, ...], what: str
) -> None:
    line = refused("simulate", *AIR, "--profile", npu, *words, *LOAD)
    assert f"npu has no {OUT}" in line and what in line and f"--set {OUT}=" in line
    times = []
    for rate in (1e9, 1e11):
        run = glm5("simulate", *AIR, "--profile", npu, *words, *LOAD, "--set", f"{OUT}={rate}", "--json").json
        times.append(run["e2e_ms"]["mean"])
    assert times[0] > times[1]


@pytest.mark.parametrize(
    "words", [("--tp", 4, "--pp", 2), slow(("--tp", 8)), ("--tp", 4, "--prefill-devices", 4, "--devices", 4)]
)
def test_a_layout_inside_a_server_does_not_ask_for_it(npu: Path, words: tuple[object, ...]) -> None:
    slow, fast = (
        glm5("simulate", *AIR, "--profile", npu, *words, *LOAD, "--set", f"{UP}={rate}", "--json").json
        for rate in (20e9, 200e9)
    )
    assert slow["e2e_ms"]["mean"] > fast["e2e_ms"]["mean"]
    assert not any("scale_out" in line for line in fast["assumed"])


def test_a_plan_has_no_layout_over_links_that_are_unknown(tmp_path: Path) -> None:
    two = chip(tmp_path, {"node.devices": 2, "link.scale_up.domain_devices": 2, UP: 200e9})
    glm5("plan", *FLASH, "--profile", two, "--devices", 4, *LOAD[:6], "--out", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    for pool in plan["pools"]:
        for replica in range(pool["replicas"]):
            assert len({device["node"] for device in pool["devices"] if device["replica"] == replica}) == 1
    assert any(f"has no {OUT}" in each["reason"] for each in plan["rejected"])
    assert glm5("plan", "check", tmp_path / "plan.json", "--json").json["wrong"] == []


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_both_verbs_ask_for_the_figure_that_the_layout_needs(tmp_path: Path, verb: str) -> None:
    three = chip(tmp_path)
    line = refused(verb, *AIR, "--profile", three, "--devices", 8)
    assert f"npu has no {UP}" in line and "scale_out" not in line
    known = glm5("simulate", *AIR, "--profile", three, "--set", f"{UP}=200e9", *LOAD, "--json").json
    assert any("link.scale_up.domain_devices 8" in line for line in known["assumed"])


# --- what is assumed ---------------------------------------------------------------------------------------

EVERYWHERE = ("efficiency.compute", "efficiency.memory", "overhead.kernel_launch_s", "overhead.runtime_reserved_bytes")


def test_what_nobody_said_is_listed_and_graded(npu: Path, tmp_path: Path) -> None:
    words = (*AIR, "--profile", npu, "--tp", 8, *LOAD, "--mtp", 1)
    result = glm5("simulate", *words, "--html", tmp_path / "page.html", "--json").json
    text, page = glm5("simulate", *words).out, (tmp_path / "page.html").read_text()
    said = " ".join(result["assumed"])
    for what in (*EVERYWHERE, "efficiency.network 0.65", "host times of sglang", "MTP acceptance 0.65"):
        assert what in said
    assert result["evidence"] == "assumed" and "evidence: assumed" in text
    assert "assumed for you" in text and "Assumed for you" in page
    for line in result["assumed"]:
        assert line in text and line in page


def test_a_plan_says_what_it_assumes(npu: Path, tmp_path: Path) -> None:
    words = (*FLASH, "--profile", npu, "--devices", 2, *LOAD[:6], "--mtp", 1)
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    text = glm5("plan", *words, "--out", out, "--html", page).out
    found = json.loads(out.read_text())["predicted"]
    assert found["evidence"] == "assumed"
    for what in (*EVERYWHERE, "host times of sglang", "MTP acceptance 0.65"):
        assert any(what in line for line in found["assumed"])
    for line in found["assumed"]:
        assert line in text and line in page.read_text()
    assert glm5("simulate", "--plan", out, "--json").json["assumed"] == found["assumed"]


def test_what_is_said_is_not_assumed(tmp_path: Path) -> None:
    """Each figure given takes its line away; with all of them, and host times and acceptance, none is left."""
    values = {"efficiency.compute": 0.6, "efficiency.memory": 0.7, "efficiency.network": 0.5,
              "link.scale_up.latency_s": 2e-6, "link.scale_up.domain_devices": 8, "overhead.kernel_launch_s": 5e-6,
              "overhead.vector_launch_s": 4e-6, "overhead.collective_launch_s": 12e-6, "overhead.p2p_latency_s": 8e-6,
              "overhead.collective_buffer_bytes": 4e8, "overhead.runtime_reserved_bytes": 2e9,
              "chip.memory.usable_bytes": 95e9, UP: 200e9, "node.devices": 8}  # fmt: skip
    full = chip(tmp_path, values)
    hosts = ("--set", "engine.graph_step_host_seconds=0.004", "--set", "engine.eager_step_host_seconds=0.05")
    words = (*AIR, "--profile", full, "--tp", 4, "--pp", 2, *LOAD, "--mtp", 1, "--accept", 1.5, *hosts)
    result = glm5("simulate", *words, "--json").json
    assert result["assumed"] == [] and result["evidence"] == "datasheet"
    assert "assumed for you" not in glm5("simulate", *words).out
    without = glm5("simulate", *words[:-4], "--json").json["assumed"]
    assert [line.split(":")[0] for line in without] == ["host times of sglang as beside NVIDIA chips"]


def test_a_measured_chip_assumes_only_what_its_answer_uses() -> None:
    one = glm5("simulate", *AIR, *LOAD, "--tp", 8, "--json").json
    assert one["assumed"] == [] and one["evidence"] != "assumed"
    two = glm5("simulate", *AIR, *LOAD, "--tp", 8, "--pp", 2, "--devices", 16, "--json").json
    assert two["assumed"] == ["link.scale_out.latency_s 5 us"] and two["evidence"] == "assumed"


# --- a profile to begin with ---------------------------------------------------------------------------


def begin(path: Path, *words: object) -> Any:
    return glm5("profiles", "new", path, *words)


NEEDED = ("--bf16", "400e12", "--memory", "96e9", "--bandwidth", "2e12")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--formats", "bf16,w8a8", "--set", "chip.peak.int8_flops_per_s=800e12", "--kv", "bf16,int8"),
        ("--set", f"{UP}=200e9", "--set", "efficiency.memory=0.8", "--set", "link.scale_up.topology=full-mesh"),
    ],
)
def test_new_writes_what_check_accepts_and_simulate_reads(tmp_path: Path, more: tuple[str, ...]) -> None:
    path = tmp_path / "my-chip.toml"
    assert "wrote" in begin(path, *NEEDED, *more).out
    assert glm5("profiles", "check", path).out == f"OK {path}\n"
    made = hw_profiles.load(path)
    assert made.name == "my-chip" and made.value("chip.memory.capacity_bytes") == 96e9
    given = {word.partition("=")[0] for word in more if "=" in word}
    assert made.figures.keys() | made.curves.keys() | made.labels.keys() == {*THREE, *given}  # and nothing invented
    for field in (*FIELDS, *CURVES):
        assert field in made.figures or field in made.curves or field.rpartition(".")[2] in path.read_text()
    small = ("--model", "glm-4.5-air", "--devices", 8, "--tp", 1, "--pp", 8, *LOAD)
    if UP in given:
        assert glm5("simulate", "--profile", path, *small, "--json").json["profile"] == "my-chip"
        assert "KV pages" in glm5("plan", "--profile", path, *FLASH, "--devices", 2, *LOAD[:6]).out
    else:
        assert UP in refused("simulate", "--profile", path, *small)


def test_every_comment_of_a_new_profile_can_be_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    begin(path, *NEEDED)
    text = path.read_text()
    filled = re.sub(r"(?m)^# (\w+ = \{ value = )…", lambda m: f"{m[1]}2", text)
    assert len(tomllib.loads(filled)) == len(tomllib.loads(text)) and filled.count("value = 2,") == len(FIELDS) - 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --bf16 FLOP/s and --memory bytes and --bandwidth bytes/s"),
        (NEEDED[:4], "give --bandwidth bytes/s"),
        ((*NEEDED, "--formats", "w8a8"), "there is no chip.peak.int8_flops_per_s"),
        ((*NEEDED, "--formats", "int7"), "must list some of bf16, fp16, fp8, "),
        ((*NEEDED, "--set", "chip.memory.speed=3"), "no such field"),
        ((*NEEDED, "--set", f"{UP}=-1"), "must be greater than 0"),
        ((*NEEDED, "--set", f"{UP}=fast"), "must be a number in bytes/s, got fast"),
        ((*NEEDED, "--set", "efficiency.memory=high"), "each knot must be [size, efficiency]"),
        ((*NEEDED, "--grade", "good"), "must be one of measured, A, B, C, user"),
        (("--bf16", "4e14", "--memory", "96", "--bandwidth", "2e12"), "check the unit"),
    ],
)
def test_new_refuses_in_a_line_and_writes_nothing(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused("profiles", "new", tmp_path / "x.toml", *words)
    assert not list(tmp_path.iterdir())


def test_new_does_not_write_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    begin(path, *NEEDED)
    before = path.read_text()
    assert "is there already" in refused("profiles", "new", path, *NEEDED)
    assert path.read_text() == before
    assert "ends in .toml" in refused("profiles", "new", tmp_path / "x", *NEEDED)


# --- names -------------------------------------------------------------------------------------------------


def test_a_profile_lists_formats_by_the_names_of_the_command(tmp_path: Path) -> None:
    for name, known in FORMAT_OF_SCHEME.items():
        assert SCHEMES[name].formats == (known,)
    begin(tmp_path / "x.toml", *NEEDED, "--formats", "bf16,fp8,w8a8", "--set", "chip.peak.int8_flops_per_s=8e14",
          "--set", "chip.peak.fp8_flops_per_s=8e14")  # fmt: skip
    assert hw_profiles.load(tmp_path / "x.toml").formats.weights == ("bf16", "fp8-block", "w8a8-int8")
    assert '"fp8", "w8a8"' in (tmp_path / "x.toml").read_text()
    for name in ("fp8", "w8a8", "w8a8-int8", "fp8-block"):
        made = glm5("simulate", *AIR, "--profile", tmp_path / "x.toml", "--set", f"{UP}=2e11", *LOAD, "--formats", name)
        assert made.code == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("chip.memory.bandwith", "chip.memory.bandwidth_bytes_per_s"),
        ("chip.memory.capcity", "chip.memory.capacity_bytes"),
        ("link.scaleup.bandwidth", "link.scale_up.bandwidth_bytes_per_s"),
        ("chip.peak.bf16", "chip.peak.bf16_flops_per_s"),
        ("overhead.kernel_lanch", "overhead.kernel_launch_s"),
        ("link.scale_out.latency", "link.scale_out.latency_s"),
    ],
)
def test_a_misspelt_field_gets_the_nearest(typed: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refused("simulate", "--set", f"{typed}=1e12")


# --- formats of checkpoints ----------------------------------------------------------------------------------


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}


@pytest.mark.parametrize(
    ("scheme", "chip_name", "weights", "activations"),
    [
        ("fp8-channel", "h200-sxm", {**FLOAT8, "strategy": "channel"}, {**FLOAT8, "strategy": "token"}),
        slow("fp8-tensor", "h200-sxm", {**FLOAT8, "strategy": "tensor"}, {**FLOAT8, "strategy": "tensor"}),
        ("nvfp4/nvfp4", "b200-sxm", {**FLOAT4, "strategy": "tensor_group", "group_size": 16}, FLOAT4),
        slow("nvfp4a16/nvfp4a16", "h200-sxm", {**FLOAT4, "strategy": "tensor_group", "group_size": 16}, None),
        slow("mxfp4/mxfp4", "b200-sxm", {**FLOAT4, "strategy": "group", "group_size": 32}, FLOAT4),
        slow("mxfp8", "b200-sxm", {**FLOAT8, "strategy": "group", "group_size": 32}, FLOAT8),
    ],
)
def test_checkpoints_in_narrow_floats_are_planned_and_simulated(
    scheme: str, chip_name: str, weights: Any, activations: Any, tmp_path: Path
) -> None:
    """compressed-tensors' float-quantized, nvfp4-pack-quantized and MX configs of a real model."""
    config = json.loads((Path(model.__file__).parent / "configs" / "glm-4.5-air.json").read_text())
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = ("--model", tmp_path, "--profile", chip_name, "--devices", 1)
    shown = glm5("simulate", *made, *LOAD, "--json").json
    dense, _, experts = scheme.partition("/")
    assert (shown["formats"]["weights"], shown["formats"]["experts"]) == (dense, experts or dense)
    plan = glm5("plan", *made, *LOAD[:6], "--formats", scheme, "--json").json
    assert plan["formats"]["weights"] == dense and plan["predicted"]["output_tokens_per_s"] > 0
    auto = glm5("plan", *made, *LOAD[:6], "--json").json
    assert auto["predicted"]["output_tokens_per_s"] > 0


def test_kimis_experts_are_named() -> None:
    text = glm5("simulate", "--model", "kimi-k2.5", *LOAD).out
    assert "weights bf16 and w4a16" in text
    assert load_config("kimi-k2.5").stored_scheme.name == "w4a16"
