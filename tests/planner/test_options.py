"""The options of a search: what fits, in which formats, and that every option gives a sound plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import UsageError
from model.formats import matrix_format
from model.hf_config import load_config, preset_names
from runtime.deployment.plan import Plan
from runtime.planning.assign import plan_for
from runtime.planning.check import check
from runtime.planning.contender import Contender, Part, plan_of
from runtime.planning.estimate import Estimate
from runtime.planning.options import Question, options, schemes
from runtime.planning.smallest import counts
from runtime.simulation.build import memories
from tests.planner.test_search import FP8, LIGHT, question, sound


def any_option(model: str, chip: str, count: int, draw: Any) -> Contender | str:
    asked = question(model)
    try:
        found, refused, rejected = options(asked, hw_profiles.load(chip), count)
    except UsageError as error:
        return str(error)
    if not found:
        return refused[0].error if refused else rejected[0].reason
    option = draw(found)
    return Contender((Part("serve", option, count // option.devices),), Estimate(8, 1.0, 1.0, 1.0, 1.0))


# --- every preset on every chip in every number ------------------------------------------------------


questions = given(
    model=st.sampled_from(preset_names()),
    chip=st.sampled_from(hw_profiles.names()),
    count=st.integers(1, 384),
    data=st.data(),
)


@settings(max_examples=2)
@questions
def test_any_model_on_any_number_of_any_chip_fits_and_adds_up_or_says_why(
    model: str, chip: str, count: int, data: st.DataObject
) -> None:
    check_any(model, chip, count, data)


@pytest.mark.slow
@settings(max_examples=9)
@questions
def test_many_models_on_chips(model: str, chip: str, count: int, data: st.DataObject) -> None:
    check_any(model, chip, count, data)


def check_any(model: str, chip: str, count: int, data: st.DataObject) -> None:
    found = any_option(model, chip, count, lambda each: data.draw(st.sampled_from(each)))
    if isinstance(found, str):
        assert found.strip() and len(found.splitlines()[0]) > 20
        return
    plan = plan_of(found, question(model), count)
    assert len(plan.devices) + plan.idle_devices == count
    assert [device.index for device in plan.devices] == list(range(len(plan.devices)))
    sound(plan)
    assert Plan.parse(plan.text) == plan


# --- what fits and what does not --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "chip", "scheme", "fits", "refused"),
    [
        (FP8, "h200-sxm", None, 8, 4),
        pytest.param("glm-5", "h200-sxm", None, 16, 8, marks=pytest.mark.slow),
        pytest.param(FP8, "ascend-910c-die", "w4a8", 16, 4, marks=pytest.mark.slow),
        pytest.param("glm-5", "ascend-910c-die", None, 32, 16, marks=pytest.mark.slow),
        (FP8, "ascend-910b3", "w4a8", 8, 4),
    ],
)
def test_the_published_minima(model: str, chip: str, scheme: str | None, fits: int, refused: int) -> None:
    """H200: one node for FP8, two for BF16 (recipes: 893 and 1,786 GB). W4A8 fits one Atlas 800 A3 (16 dies), BF16
    needs two; W4A8 runs on one Atlas 800 A2 (8 x 64 GB)."""
    profile, asked = hw_profiles.load(chip), question(model, scheme=scheme)
    assert options(asked, profile, fits)[0]
    assert not options(asked, profile, refused)[0]


def test_devices_come_in_parts_of_a_node_or_whole_ones() -> None:
    assert counts(hw_profiles.load("h200-sxm"), 32) == [1, 2, 4, 8, 16, 24, 32]


# --- formats -----------------------------------------------------------------------------------------


def test_formats_narrower_than_the_checkpoint_are_not_taken_unasked() -> None:
    kept, left_out = schemes(question(), hw_profiles.load("ascend-910c-die"))
    assert [scheme.name for scheme in kept] == ["w8a8"]
    assert any("narrower than the checkpoint's fp8" in each.reason for each in left_out)
    kept, _ = schemes(question(scheme="w4a8"), hw_profiles.load("ascend-910c-die"))
    assert [scheme.name for scheme in kept] == ["w4a8"]


@pytest.mark.parametrize(
    ("stored", "chip", "first"),
    [
        ("nvfp4", "b200-sxm", "nvfp4"),
        ("nvfp4", "h200-sxm", "nvfp4a16"),  # the same matrices, with 16-bit activations
        ("nvfp4/nvfp4", "h200-sxm", "nvfp4a16/nvfp4a16"),
        ("w4a16", "h200-sxm", "w4a16"),
        ("w4a16-g64", "h200-sxm", "w4a16-g64"),
        ("fp8-block", "h200-sxm", "fp8"),
        ("fp8-channel", "h200-sxm", "fp8-channel"),
    ],
)
def test_what_is_stored_is_run_and_not_quantised_anew(stored: str, chip: str, first: str) -> None:
    asked = Question(dataclasses.replace(load_config(FP8), weight_format=stored), LIGHT)
    kept, _ = schemes(asked, hw_profiles.load(chip))
    own = asked.cfg.stored_scheme
    assert kept[0].name == first and all(scheme.bits > own.bits for scheme in kept[1:])
    for part in ("dense", "experts"):
        runs, wanted = (matrix_format(getattr(scheme, part)) for scheme in (kept[0], own))
        assert runs.stored_as(wanted)


def test_wider_experts_do_not_pay_for_narrower_attention() -> None:
    """What is stored with dense matrices in 16 bits is not planned with them in 8, however many bits experts get."""
    for stored in ("w4a16", "nvfp4"):
        asked = Question(dataclasses.replace(load_config("kimi-k2"), weight_format=stored), LIGHT)
        for chip in ("h200-sxm", "b200-sxm", "ascend-910c-die"):
            kept, left_out = schemes(asked, hw_profiles.load(chip))
            assert {matrix_format(scheme.dense).bits for scheme in kept} == {16}
            assert any("narrower than the checkpoint's" in each.reason for each in left_out)


def test_a_format_the_chip_does_not_compute_in_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ascend-910c-die does not compute in fp8; it runs bf16, w8a8, w4a8"):
        schemes(question(scheme="fp8"), hw_profiles.load("ascend-910c-die"))


# --- what is held ------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [{"tp": 4}, {"dp": 2, "ep": 8}, {"pp": 2}, {"tp": 2, "pp": 4}, {"tp": 8, "ep": 4}])
def test_a_layout_is_held_to_what_is_given(held: dict[str, int]) -> None:
    found, _, _ = options(Question(load_config("glm-4.5-air"), LIGHT, held=held), hw_profiles.load("h200-sxm"), 8)
    assert found and all(getattr(option.layout, axis) == degree for option in found for axis, degree in held.items())


def test_expert_groups_are_offered_where_the_engine_has_them() -> None:
    """SGLang and TensorRT-LLM cut experts both ways, vLLM over all devices or none; their plans add up."""
    cfg, chip = load_config("glm-4.5-air"), hw_profiles.load("h200-sxm")
    for engine, ways in (("sglang", {1, 2, 4, 8}), ("trtllm", {1, 2, 4, 8}), ("vllm", {1, 8})):
        found, _, _ = options(Question(cfg, LIGHT, engine, held={"tp": 8, "pp": 1}), chip, 8)
        assert {option.layout.ep for option in found} == ways, engine
        weights = {option.layout.ep: memories(option.spec)[0].weights_total_bytes for option in found}
        assert max(weights.values()) == pytest.approx(min(weights.values()), rel=1e-3)  # each expert once
        plan = plan_for(next(option.spec for option in found if option.layout.ep == max(ways - {8})))
        assert check(plan, cfg) == []
    _, _, rejected = options(Question(cfg, LIGHT, "vllm", held={"tp": 8, "ep": 4}), chip, 8)
    assert any("splits experts over all of tp x dp = 8 devices or over none" in each.reason for each in rejected)


def test_stages_at_most() -> None:
    found, _, _ = options(Question(load_config("glm-4.5-air"), LIGHT, most_pp=2), hw_profiles.load("h200-sxm"), 8)
    assert {option.layout.pp for option in found} == {1, 2}
