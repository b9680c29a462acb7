"""Plan files: what is read is what was written, and a file that cannot be trusted is refused with the reason."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import CapacityError, UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.errors import PlanFileError
from runtime.deployment.plan import Plan
from runtime.deployment.schema import plan_schema
from tests.plans import formats, plan_for

SCHEMA = Path(__file__).parents[2] / "docs" / "plan.schema.json"


@cache
def plan() -> Plan:
    """GLM-5-FP8 on two H200 nodes, by expert, in two stages, drafting."""
    layout = Layout(tp=2, dp=4, ep=8, pp=2)
    profile = hw_profiles.load("h200-sxm", {"link.scale_out.bandwidth_bytes_per_s": 4e10})
    return plan_for(load_config("glm-5-fp8"), layout, profile, formats("fp8", "fp8"), drafts=3)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json", load_config("glm-5-fp8"))
    assert read == plan()
    assert read.hash == plan().hash and len(read.hash) == 64


def test_figures_set_by_hand_are_kept() -> None:
    assert plan().serving.profile_settings == {"link.scale_out.bandwidth_bytes_per_s": 4e10}


def test_a_plan_is_plain_json_with_what_is_promised() -> None:
    document = json.loads(plan().text)
    assert document["schema_version"] == 6 and document["model"]["name"] == "glm-5-fp8"
    cache = {"latent": "fp8_ds_mla", "index": "fp8_scaled", "heads": "fp8"}
    assert document["formats"] == {"weights": "fp8-block", "experts": "fp8-block", "kv": "fp8", "cache": cache}
    device = document["pools"][0]["devices"][9]
    assert device["index"] == 9 and device["node"] == 1 and device["stage"] == 1
    ledger = device["ledger"]
    used = sum(ledger["weights_bytes"].values()) + sum(
        ledger[f"{name}_bytes"] for name in ("kv", "activation", "communication", "runtime", "free")
    )
    assert used == pytest.approx(ledger["usable_bytes"], rel=1e-12)


@given(data=st.data())
def test_an_edited_byte_is_refused(data: st.DataObject) -> None:
    text = plan().text
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.characters(min_codepoint=9, max_codepoint=126).filter(lambda c: c != text[at]))
    with pytest.raises(PlanFileError, match=r"edited|damaged|no plan|schema version|cut short"):
        Plan.parse(text[:at] + new + text[at + 1 :])


@settings(max_examples=50)
@given(kept=st.integers(0, len(plan().text) - 2))
def test_a_file_cut_short_is_refused(kept: int) -> None:
    with pytest.raises(PlanFileError, match=r"cut short"):
        Plan.parse(plan().text[:kept])


def rehashed(old: str, new: str) -> str:
    """The plan's text with a passage replaced, and its hash put right, as whoever sends it can."""
    assert plan().text.count(old) == 1
    blank = plan().text.replace(old, new).replace(plan().hash, "0" * 64)
    return blank.replace("0" * 64, hashlib.sha256(blank.encode()).hexdigest(), 1)


def test_formats_that_stand_twice_must_agree() -> None:
    assert Plan.parse(rehashed('"scheme": "fp8"', '"scheme": "fp8"')) == plan()
    with pytest.raises(PlanFileError, match=r"^plan: pools\[0\]\.scheme is 'w8a8', its formats are fp8's$"):
        Plan.parse(rehashed('"scheme": "fp8"', '"scheme": "w8a8"'))
    top = '"formats": {"weights": "fp8-block", "experts": "fp8-block",'
    with pytest.raises(PlanFileError, match=r"^plan: formats: not those of pools\[0\]$"):
        Plan.parse(rehashed(f"\n{top}", f"\n{top.replace('fp8-block', 'bf16')}"))


@pytest.mark.parametrize(
    ("field", "new", "said"),
    [
        ("pools", "[]", "pools: their number is 0, which must lie between 1 and 2"),
        ("demand.isl", "0", "demand.isl is 0, which must lie between 1 and 100,000,000"),
        ("demand.osl", "1000000000000", "demand.osl is 1,000,000,000,000, which"),
        ("demand.length_ratio", "-1.5", "demand.length_ratio is -1.5, which must be above 0"),
        ("pools.0.devices", "[]", "devices of all pools: their number is 0"),
        ("pools.0.drafts", "1000000000", "pools[0].drafts is 1,000,000,000, which must lie between 0 and 16"),
        ("pools.0.page_tokens", "0", "pools[0].page_tokens is 0"),
        ("pools.0.replicas", "-1", "pools[0].replicas is -1"),
        ("pools.0.devices.0.layers", "[5, 5]", "pools[0].devices[0].layers are [5, 5]"),
        ("pools.0.devices.1.ranks", '{"tp": 1}', "pools[0].devices[1].ranks lack dp"),
        ("pools.0.devices.0.kv_pages", "1" + "0" * 30, "pools[0].devices[0].kv_pages is 1e+30"),
        ("pools.0.experts.slot_expert", "[[]]", "pools[0].experts.slot_expert[0]: its slots is 0"),
        ("pools.0.experts.slot_expert.0.3", "-7", "pools[0].experts.slot_expert[0]: its least expert is -7"),
        ("pools.0.layout.tp", "1000000000", "tp x dp x pp = 8,000,000,000 is more than the 100,000"),
    ],
)
def test_a_plan_that_does_not_hold_what_it_names_is_refused(field: str, new: str, said: str) -> None:
    """Sent by someone who put its hash right; whoever reads it goes through pools, devices and slots."""
    document = json.loads(plan().text)
    *path, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    holder = document
    for key in path:
        holder = holder[key]
    holder[last] = json.loads(new)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (document | {"hash": "0" * 64}).items()]
    blank = "{\n" + ",\n".join(lines) + "\n}\n"
    with pytest.raises(PlanFileError) as caught:
        Plan.parse(blank.replace("0" * 64, hashlib.sha256(blank.encode()).hexdigest(), 1))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(PlanFileError, match="schema version 5, this program reads 6"):
        Plan.parse(plan().text.replace('"schema_version": 6', '"schema_version": 5'))


def test_another_model_is_refused(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=r"a plan for glm-5-fp8 .* not for glm-5\.2-fp8 .*: make|; make"):
        Plan.read(tmp_path / "plan.json", load_config("glm-5.2-fp8"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema_version": 1}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanFileError, match=r"no plan|cut short"):
        Plan.parse(text)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot be read"):
        Plan.read(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="not UTF-8"):
        Plan.read(tmp_path / "binary.json")


def test_a_layout_that_does_not_fit_or_divide_has_no_plan() -> None:
    cfg, h200 = load_config("glm-5-fp8"), hw_profiles.load("h200-sxm")
    with pytest.raises(CapacityError, match="does not fit 4 devices"):
        plan_for(cfg, Layout(tp=4), h200, formats("fp8"))
    with pytest.raises(UsageError, match="64 / 3"):
        plan_for(cfg, Layout(tp=3), h200, formats("fp8"))


def test_the_published_schema_is_the_code_s_and_accepts_a_plan() -> None:
    published = json.loads(SCHEMA.read_text())
    assert published == plan_schema(), "run `python -m runtime.deployment.schema > docs/plan.schema.json`"
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(json.loads(plan().text), published)


def test_the_schema_can_refuse() -> None:
    document = json.loads(plan().text)
    del document["pools"][0]["devices"][0]["ledger"]["kv_bytes"]
    with pytest.raises(jsonschema.ValidationError, match="kv_bytes"):
        jsonschema.validate(document, json.loads(SCHEMA.read_text()))
