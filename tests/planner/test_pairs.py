"""Prefill and decode options are paired as the engine's connector takes them, and experts placed where it reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.errors import LaunchError, NoPlanError
from runtime.planning.contender import Part, plan_of
from runtime.planning.launch import launch
from runtime.planning.options import Option, Question, make_option
from runtime.planning.pairs import matched
from runtime.planning.redundancy import _spend
from runtime.planning.search import SIMULATED, Chips, _Search
from runtime.simulation.apart import joint_refused, role_refused
from runtime.simulation.build import PriceTables
from tests.planner.launching import PRODUCT

LIGHT = Demand(isl=2048, osl=128, concurrency=8)


def asked(engine: str = "sglang", model: str = "glm-4.7-flash", **more: Any) -> Question:
    return Question(load_config(model), LIGHT, engine, **more)


def option(question: Question, layout: Layout, kv: str = "bf16", chip: str = "", scheme: str = "bf16") -> Option:
    profile = hw_profiles.load(chip or PRODUCT.get(question.engine, ("h200-sxm",))[0])
    return make_option(question, profile, layout, scheme, kv, {})


@pytest.mark.parametrize(
    ("engine", "layout", "drafts", "roles"),
    [
        ("sglang", Layout(2), 1, ["serve", "prefill", "decode"]),
        ("sglang", Layout(2, pp=2), 0, ["serve", "prefill"]),
        ("sglang", Layout(2, pp=2), 1, []),  # 0.5.9 drafts on one stage alone
        ("vllm", Layout(1, pp=2), 0, ["serve"]),
        ("vllm", Layout(1, 2, 2, 2), 1, ["serve"]),
        ("vllm-ascend", Layout(4, pp=2), 0, ["serve", "prefill"]),
        ("vllm-ascend", Layout(4, pp=2), 2, ["prefill"]),
        ("trtllm", Layout(2, pp=2), 1, ["serve", "prefill", "decode"]),  # nothing is known of its launch
    ],
)
def test_an_option_gets_the_roles_that_its_engine_gives_it(
    engine: str, layout: Layout, drafts: int, roles: list[Any]
) -> None:
    question = asked(engine, drafts=drafts)
    every: list[Any] = ["serve", "prefill", "decode"]
    given = option(question, layout)
    assert [role for role in every if role_refused(given.spec, role) is None] == roles


@pytest.mark.parametrize(
    ("engine", "before", "after", "fits"),
    [
        ("sglang", (Layout(1), "bf16"), (Layout(4), "bf16"), True),
        ("sglang", (Layout(4), "fp8"), (Layout(4), "bf16"), False),
        ("vllm", (Layout(2), "bf16"), (Layout(2), "fp8"), False),
        ("vllm-ascend", (Layout(2), "bf16"), (Layout(4), "bf16"), False),
        ("vllm-ascend", (Layout(4), "bf16"), (Layout(2, 4, 8), "bf16"), True),
        ("trtllm", (Layout(2), "fp8"), (Layout(4), "bf16"), True),
    ],
)
def test_two_options_are_paired_as_the_connector_takes_them(engine: str, before: Any, after: Any, fits: bool) -> None:
    question = asked(engine)
    refused = joint_refused(option(question, *before).spec, option(question, *after).spec)
    assert (refused is None) == fits


def test_chips_of_two_vendors_have_no_connector_to_obey() -> None:
    question = asked()
    ends = option(question, Layout(4)), option(question, Layout(4), chip="ascend-910c-die")
    first, second = (each.spec for each in ends)
    assert first.formats.cache != second.formats.cache and joint_refused(first, second) is None


def test_each_decode_option_meets_the_best_prefill_options_that_fit_it() -> None:
    """Not the best overall: those might keep another cache, or have too little tp."""
    question = asked("vllm-ascend")

    def priced(layout: Layout, kv: str = "bf16") -> Any:
        return SimpleNamespace(option=option(question, layout, kv))

    narrow, wide, other = priced(Layout(2)), priced(Layout(4)), priced(Layout(4, 2, 8))
    assert matched([narrow, wide, other], [wide], 1) == [(wide, wide)]
    assert matched([narrow, wide, other], [wide, narrow, other], 2) == [
        (wide, wide), (other, wide), (narrow, narrow), (wide, narrow),
    ]  # fmt: skip
    assert matched([narrow], [wide], 4) == []
    question = asked("sglang")
    bf16, fp8 = (SimpleNamespace(option=option(question, Layout(2), kv)) for kv in ("bf16", "fp8"))
    mixed: Any = [bf16, bf16, fp8]
    assert matched(mixed, mixed, 1) == [(bf16, bf16), (fp8, fp8)]
    # on devices that both share, a partner leaves room: without that a small cluster had no pairs at all
    assert wide.option.devices > narrow.option.devices
    for devices in range(2, 2 * wide.option.devices + 2):
        found = matched([wide, narrow], [wide, narrow], 1, devices)
        assert all(a.option.devices + b.option.devices <= devices for a, b in found)
        assert bool(found) == (devices >= 2 * narrow.option.devices)


def test_either_pool_is_held_to_its_own_degrees() -> None:
    question = asked("sglang", held={"tp": 1, "dp": 4, "ep": 4, "pp": 1}, prefill_held={"tp": 4, "pp": 1})
    search = _Search(question, [Chips(hw_profiles.load("h200-sxm"), 8)], None, "", lambda _: None, SIMULATED)
    found = search.contenders()
    assert found and all([part.role for part in each.parts] == ["prefill", "decode"] for each in found)
    first, second = ({each.parts[end].option.layout for each in found} for end in (0, 1))
    assert Layout(4) in first and {(each.tp, each.dp, each.pp) for each in first} == {(4, 1, 1)}
    assert second == {Layout(1, 4, 4)}
    held = asked("sglang", prefill_held={"tp": 3})
    with pytest.raises(NoPlanError, match="no prefill pool on 4 devices has tp 3: none on 4 devices has tp 3"):
        _Search(held, [Chips(hw_profiles.load("h200-sxm"), 4)], None, "", lambda _: None, SIMULATED).contenders()
    assert all(each.transfer and {r.target for r in each.transfer.routes} == {0} for each in found)


@pytest.mark.parametrize(("engine", "placed"), [("vllm-ascend", False), ("sglang", True)])
def test_experts_are_placed_over_stages_where_the_engine_reads_it(engine: str, placed: bool) -> None:
    question = asked(engine)
    part = Part("serve", option(question, Layout(2, 2, 4, 2)), 1)
    load = np.random.default_rng(0).gamma(1.0, size=(46, 64))
    found, lost = _spend(question, part, load, "measured", PriceTables(coarse=True))
    assert (found.experts is not None) == placed
    assert placed or ["from 0 on each pipeline stage" in each.reason for each in lost] == [True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "model", "chip", "count", "more"),
    [
        ("vllm", "glm-4.7-flash", "h200-sxm", 8, {}),
        ("sglang", "glm-5-fp8", "h200-sxm", 32, {}),
        ("vllm-ascend", "glm-5", "ascend-910c-die", 128, {"scheme": "w8a8", "drafts": 1}),
    ],
)
def test_every_contender_of_two_pools_can_be_launched(
    engine: str, model: str, chip: str, count: int, more: dict[str, Any]
) -> None:
    question = asked(engine, model, **more)
    search = _Search(question, [Chips(hw_profiles.load(chip), count)], None, "", lambda _: None, SIMULATED)
    two = [each for each in search.contenders() if each.transfer]
    assert two
    for contender in two:
        try:
            launch(plan_of(contender, question, count), question.cfg, model="m")
        except LaunchError as error:
            assert "devices over nodes" in str(error) or "devices, over nodes" in str(error), error
