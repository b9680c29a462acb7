"""The search: what fits and what does not, what it prefers, and that a plan promises what the simulator gives."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import UsageError
from model.hf_config import load_config, preset_names
from model.split import Layout, moe_layers
from runtime.deployment.demand import Demand
from runtime.deployment.errors import LoadError, NoPlanError
from runtime.deployment.plan import Alternative, Plan
from runtime.planning.check import check
from runtime.planning.contender import Contender, Part, mark_front, plan_of
from runtime.planning.estimate import Estimate, OptionPrices
from runtime.planning.options import Question, make_option
from runtime.planning.predict import predicted, simulate_plan
from runtime.planning.search import Chips, search
from runtime.planning.smallest import smallest
from runtime.simulation.build import PriceTables

pytestmark = pytest.mark.usefixtures("coarse")
FP8 = "glm-5-fp8"
LIGHT = Demand(isl=2048, osl=128, concurrency=8)


def question(model: str = FP8, demand: Demand = LIGHT, **more: Any) -> Question:
    return Question(load_config(model), demand, **more)


def chips(*named: tuple[str, int]) -> list[Chips]:
    return [Chips(hw_profiles.load(name), count) for name, count in named]


@cache
def planned(**more: Any) -> Plan:
    return search(question(most_pp=1, **more), chips(("h200-sxm", 8)))


def sound(plan: Plan) -> None:
    """Every ledger adds up and fits, and the plan is what its parts give."""
    assert check(plan, load_config(plan.model.name)) == []
    for device in plan.devices:
        held = device.ledger
        used = held.weights_total_bytes + held.kv_bytes + held.activation_bytes
        used += held.communication_bytes + held.runtime_bytes
        assert used + held.free_bytes == pytest.approx(held.usable_bytes, rel=1e-12)
        assert held.free_bytes >= 0 and device.kv_pages > 0


@pytest.mark.slow
@settings(max_examples=3)
@given(model=st.sampled_from(preset_names()), chip=st.sampled_from(hw_profiles.names()), count=st.integers(1, 384))
def test_any_search_ends_in_a_sound_plan_or_a_reason(model: str, chip: str, count: int) -> None:
    try:
        plan = search(question(model), chips((chip, count)))
    except (NoPlanError, UsageError) as error:
        assert str(error).strip()
        return
    sound(plan)
    assert plan.predicted and plan.predicted.output_tokens_per_s > 0


# --- published facts about GLM-5 ---------------------------------------------------------------------


def test_one_h200_node_holds_glm5_fp8_with_room_for_the_cache() -> None:
    """A real 8 x H200 server leaves 25.94 GiB a rank beside 94.46 GiB of weights (vllm-project/recipes PR 893)."""
    from tests.plans import plan_for

    plan = plan_for(load_config(FP8), Layout(tp=8), hw_profiles.load("h200-sxm"), question_formats("fp8"), drafts=3)
    held = plan.devices[0].ledger
    assert held.kv_bytes / 2**30 >= 20
    assert held.weights_total_bytes / 2**30 == pytest.approx(94.46, rel=0.06)
    sound(planned())
    assert planned().predicted


def question_formats(scheme: str) -> Any:
    from tests.plans import formats

    return formats(scheme)


def test_h100_is_refused_with_the_ledger() -> None:
    with pytest.raises(NoPlanError, match=r"no plan on 8 x h100-sxm.*does not fit 8 devices") as refused:
        search(question(), chips(("h100-sxm", 8)))
    assert "weights: experts" in str(refused.value) and "= free" in str(refused.value)


def test_the_fewest_h200_for_glm5_fp8_is_a_node() -> None:
    asked = question(demand=dataclasses.replace(LIGHT, concurrency=1, objective="min-devices"))
    plan = smallest(asked, hw_profiles.load("h200-sxm"), 384)
    assert len(plan.devices) == 8
    assert [each.name for each in plan.rejected[:3]] == ["1 x h200-sxm", "2 x h200-sxm", "4 x h200-sxm"]


def test_a_chip_without_a_link_says_which_figure_it_needs() -> None:
    with pytest.raises(NoPlanError, match=r"fits 16 x hygon-bw1000, but cannot be priced there: .*no link\.scale_up\."):
        search(question("glm-4.7-flash"), chips(("hygon-bw1000", 16)))


def test_a_target_nobody_meets_is_said_to_be_missed() -> None:
    demand = dataclasses.replace(LIGHT, concurrency=1, tpot_ms=0.5, objective="min-devices")
    nearest = smallest(question("glm-4.5-air", demand=demand), hw_profiles.load("h200-sxm"), 2)
    soonest = question("glm-4.5-air", demand=dataclasses.replace(LIGHT, tpot_ms=0.5), most_pp=1)
    for plan in (nearest, search(soonest, chips(("h200-sxm", 2)))):
        assert plan.predicted and not plan.predicted.meets_targets
        assert [each.endswith("ms, 0.5 asked") for each in plan.predicted.missed(plan.demand)] == [True]


# --- the same question, the same plan; the plan, the same figures ------------------------------------


def test_the_same_question_gets_the_same_plan() -> None:
    one, two = (search(question("glm-4.7-flash"), chips(("h200-sxm", 1))) for _ in range(2))
    assert one.text == two.text


def test_a_plan_simulated_again_gives_its_own_figures() -> None:
    plan = Plan.parse(planned().text)
    report, share, shares = simulate_plan(plan, plan.config())
    assert predicted(plan, report, share, shares) == plan.predicted


def test_replicas_share_the_load() -> None:
    """Two nodes of one layout serve twice what one does, each request as fast."""
    one = planned()
    assert one.predicted
    pool = one.serving
    asked = question(demand=dataclasses.replace(LIGHT, concurrency=16))
    option = make_option(
        asked, hw_profiles.load("h200-sxm"), pool.layout, pool.scheme, pool.formats.kv, dict(pool.settings)
    )
    twice = Contender((Part("serve", option, 2 * pool.replicas),), Estimate(16, 1.0, 1.0, 1.0, 1.0))
    plan = plan_of(twice, asked, 16)
    report, share, shares = simulate_plan(plan, asked.cfg)
    two = predicted(plan, report, share, shares)
    assert two.output_tokens_per_s == pytest.approx(2 * one.predicted.output_tokens_per_s)
    assert two.tpot_ms == one.predicted.tpot_ms


def test_the_estimate_is_near_the_simulation() -> None:
    """What ranks the candidates, against what confirms them: TPOT within a fifth, TTFT, with the burst that a closed
    loop begins with, within a quarter."""
    asked = question(demand=Demand(concurrency=16))
    for layout in (Layout(tp=8), Layout(tp=8, ep=8), Layout(tp=4, dp=2, ep=8), Layout(tp=4, pp=2)):
        option = make_option(asked, hw_profiles.load("h200-sxm"), layout, "fp8", "bf16", {})
        estimate = OptionPrices(option, asked.demand, PriceTables(coarse=True)).serving(16.0, 1)
        plan = plan_of(Contender((Part("serve", option, 1),), estimate), asked, 8)
        report, _, _ = simulate_plan(plan, asked.cfg)
        assert estimate.tpot_seconds == pytest.approx(report.tpot.mean, rel=0.2)
        assert estimate.ttft_seconds == pytest.approx(report.ttft.mean, rel=0.25)


@pytest.mark.parametrize("costly", ["row_host_seconds", "request_host_seconds", "prompt_row_tokens"])
def test_the_estimate_has_the_host_work_and_padding_that_the_simulation_has(costly: str) -> None:
    """Each is a good part of a step here: with it both slow down alike."""
    alone = {"row_host_seconds": 0.0, "request_host_seconds": 0.0, "prompt_row_tokens": 0}
    made = {"row_host_seconds": 0.01, "request_host_seconds": 0.5, "prompt_row_tokens": 1024}[costly]
    found = []
    for told in (alone, alone | {costly: made}):
        asked = question(demand=Demand(isl=1000, osl=100, concurrency=16), engine="glm5", settings=told)
        option = make_option(asked, hw_profiles.load("h200-sxm"), Layout(tp=8), "fp8", "bf16", {})
        estimate = OptionPrices(option, asked.demand, PriceTables(coarse=True)).serving(16.0, 1)
        report, _, _ = simulate_plan(plan_of(Contender((Part("serve", option, 1),), estimate), asked, 8), asked.cfg)
        assert estimate.tpot_seconds == pytest.approx(report.tpot.mean, rel=0.2)
        assert estimate.requests_per_s == pytest.approx(report.requests_per_s, rel=0.2)
        found.append(report.tpot.mean)
    assert found[1] > 1.2 * found[0]


def test_the_chosen_plan_is_the_best_simulated_one() -> None:
    plan = planned()
    played = [each for each in plan.alternatives if each.simulated]
    (chosen,) = [each for each in played if each.chosen]
    assert chosen.output_tokens_per_s_per_device == max(each.output_tokens_per_s_per_device for each in played)
    assert plan.predicted and plan.predicted.band["tpot_ms"][0] < plan.predicted.tpot_ms["mean"]  # pyright: ignore
    assert plan.rejected and all(each.reason for each in plan.rejected)


@given(
    rates=st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=1, max_size=12, unique=True),
)
def test_the_front_is_what_nothing_beats(rates: list[tuple[float, float]]) -> None:
    rows = [Alternative("", 8, 1, False, False, False, x, y, 0.0, 0.0, True, "assumed") for x, y in rates]
    marked = {(r.output_tokens_per_s_per_device, r.output_tokens_per_s_per_user): r.front for r in mark_front(rows)}
    for x, y in rates:
        assert marked[x, y] == (not any((a >= x and b >= y) and (a, b) != (x, y) for a, b in rates))


# --- prefill and decode apart ------------------------------------------------------------------------


@pytest.mark.slow
def test_two_chips_prefill_on_one_and_decode_on_the_other() -> None:
    demand = Demand(isl=4096, osl=256, concurrency=16, tpot_ms=60)
    plan = search(question(demand=demand), chips(("h200-sxm", 8), ("ascend-910c-die", 16)))
    sound(plan)
    assert [pool.role for pool in plan.pools] == ["prefill", "decode"]
    assert {pool.profile for pool in plan.pools} == {"h200-sxm", "ascend-910c-die"}
    assert plan.transfer and plan.transfer.seconds > 0 and len(plan.devices) == 24
    nodes = [{device.node for device in pool.devices} for pool in plan.pools]
    assert not nodes[0] & nodes[1]
    report, share, shares = simulate_plan(Plan.parse(plan.text), plan.config())
    assert predicted(plan, report, share, shares) == plan.predicted


# --- experts -----------------------------------------------------------------------------------------


def skewed(alpha: float) -> np.ndarray:
    cfg = load_config(FP8)
    assert cfg.moe
    rng = np.random.default_rng(7)
    load = np.arange(1, cfg.moe.experts + 1) ** -alpha * np.ones((len(moe_layers(cfg)), 1))
    return rng.permuted(load, axis=1)


def test_a_measured_load_places_the_experts_and_weighs_slots_against_pages() -> None:
    asked = question(demand=Demand(isl=2048, osl=128, concurrency=32), most_pp=1)
    matrix = skewed(1.0)
    plan = search(asked, chips(("h200-sxm", 8)), matrix, "load.npy")
    sound(plan)
    said = [each for each in plan.rejected if "redundant expert slots" in each.name]
    assert any("max over mean load" in each.reason and "KV pages" in each.reason for each in said)
    pool = plan.serving
    if pool.experts is not None and pool.layout.by_expert:
        assert pool.experts.max_over_mean is not None and pool.experts.bound is not None
        assert pool.experts.max_over_mean >= pool.experts.bound - 1e-9
    report, share, shares = simulate_plan(Plan.parse(plan.text), plan.config())
    assert predicted(plan, report, share, shares) == plan.predicted


def test_a_load_of_another_shape_is_refused() -> None:
    with pytest.raises(LoadError, match=r"\[75, 256\]"):
        search(question(), chips(("h200-sxm", 8)), np.ones((75, 128)))


# --- check can fail ----------------------------------------------------------------------------------


def test_check_finds_what_does_not_add_up() -> None:
    plan, cfg = planned(), load_config(FP8)
    pool = plan.serving
    device = pool.devices[3]

    def with_device(**changes: Any) -> Plan:
        devices = (*pool.devices[:3], dataclasses.replace(device, **changes), *pool.devices[4:])
        return dataclasses.replace(plan, pools=(dataclasses.replace(pool, devices=devices),))

    ledger = device.ledger
    fewer = {**ledger.weights_bytes, "experts": ledger.weights_bytes["experts"] - 1e6}
    wrong = {
        "weights_bytes.experts": with_device(ledger=dataclasses.replace(ledger, weights_bytes=fewer)),
        "kv_pages": with_device(kv_pages=device.kv_pages + 1),
        "layers": with_device(layers=(0, 77)),
        "more than": with_device(ledger=dataclasses.replace(ledger, activation_bytes=2e11)),
        "ranks": with_device(ranks={**device.ranks, "tp": 99}),
    }
    for word, each in wrong.items():
        assert any(word in line for line in check(each, cfg)), word
    missing = dataclasses.replace(plan, pools=(dataclasses.replace(pool, devices=pool.devices[:-1]),))
    assert any("devices, the layout has" in line for line in check(missing, cfg))


def test_check_finds_an_expert_that_nobody_holds() -> None:
    from tests.plans import formats, plan_for

    cfg = load_config(FP8)
    plan = plan_for(cfg, Layout(tp=8, ep=8), hw_profiles.load("h200-sxm"), formats("fp8"))
    experts = plan.serving.experts
    assert experts
    rows = (tuple([0, *experts.slot_expert[0][1:-1], 0]), *experts.slot_expert[1:])
    pool = dataclasses.replace(plan.serving, experts=dataclasses.replace(experts, slot_expert=rows))
    assert check(plan, cfg) == []
    assert any("expert 255" in line for line in check(dataclasses.replace(plan, pools=(pool,)), cfg))


def test_the_json_of_a_search_is_valid_for_the_schema() -> None:
    import jsonschema

    from runtime.deployment.schema import plan_schema

    jsonschema.validate(json.loads(planned().text), plan_schema())


# --- what is held and asked ----------------------------------------------------------------------------


def test_no_layout_is_as_held() -> None:
    with pytest.raises(NoPlanError, match=r"none on 8 devices has tp 3"):
        search(Question(load_config("glm-4.5-air"), LIGHT, held={"tp": 3}), chips(("h200-sxm", 8)))


def test_targets_bound_a_percentile() -> None:
    """A target between the mean and the 90th percentile is met by the mean alone."""
    demand = Demand(isl=2048, osl=128, concurrency=16)
    figures = search(Question(load_config("glm-4.5-air"), demand, most_pp=1), chips(("h200-sxm", 2))).predicted
    assert figures is not None
    mean, tail = figures.ttft_ms["mean"], figures.ttft_ms["p90"]
    assert mean is not None and tail is not None and mean < tail
    asked = dataclasses.replace(demand, ttft_ms=(mean + tail) / 2)
    assert not figures.missed(asked)
    (missed,) = figures.missed(dataclasses.replace(asked, percentile=90))
    assert missed.startswith("p90 TTFT ") and dataclasses.replace(asked, percentile=50).wants()[0].startswith(
        "p50 TTFT"
    )
