"""Prompts that are cut over tp groups: who holds what, what a step costs, and who is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import UsageError
from model.cache import cache_rows
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.errors import LaunchError
from runtime.deployment.ledger import stage_kv_bytes_per_token
from runtime.planning.assign import plan_for
from runtime.planning.check import check
from runtime.planning.launch import launch
from runtime.pricing import DEEPSEEK_V3, GLM5, attention, context_parallel, open_book
from runtime.pricing.attention import MlaLayer
from runtime.pricing.placement import Span
from runtime.serving.pricing import BatchShape
from runtime.simulation.apart import role_refused
from runtime.simulation.build import PriceTables, Spec, memories, pricer_of, spec_for
from tests.cost.chips import CHIPS
from tests.plans import formats

BOOK = open_book(CHIPS["h200-sxm"], "vllm")
TABLES = PriceTables(coarse=True)


def spec(layout: Layout, model: str = "glm-5-fp8", engine: str = "vllm", chip: str = "h200-sxm") -> Spec:
    settings = {"memory_fraction": 0.9}
    return spec_for(load_config(model), hw_profiles.load(chip), layout, "fp8", "bf16", engine, settings)


@given(model=st.sampled_from(("glm-5", "deepseek-v3")), tp=st.sampled_from((1, 2, 4)), pcp=st.sampled_from((1, 2, 4)))
def test_groups_hold_weights_as_dp_ranks_do_and_each_the_whole_cache(model: str, tp: int, pcp: int) -> None:
    cfg, cut, alone = load_config(model), Layout(tp, pcp=pcp), Layout(tp)
    assert cut.devices == tp * pcp == Layout(tp, dp=pcp).devices
    token = [stage_kv_bytes_per_token(cfg, each, formats("fp8", "fp8"), 0, True) for each in (cut, alone)]
    assert token[0] == token[1]
    assert {cut.row_copies(row) for kind in cfg.layer_counts for row in cache_rows(cfg, kind)} == {tp * pcp}
    places = list(cut.places())
    assert {(each.pcp, each.tp) for each in places} == {(g, t) for g in range(pcp) for t in range(tp)}
    assert all(each.dp == 0 for each in places)


def test_a_plan_of_cut_prompts_adds_up() -> None:
    cut, groups = spec(Layout(4, ep=8, pcp=2)), spec(Layout(4, dp=2, ep=8))
    mine, theirs = (memories(each)[0] for each in (cut, groups))
    assert mine.weights_bytes == theirs.weights_bytes
    assert mine.kv_bytes_per_token == theirs.kv_bytes_per_token
    plan = plan_for(cut)
    assert check(plan, cut.cfg) == []
    assert [(each.ranks["pcp"], each.ranks["tp"]) for each in plan.devices] == [
        (g, t) for g in (0, 1) for t in range(4)
    ]


@given(st.sampled_from((1, 2, 4, 8)), st.sampled_from((512, 8192, 32768)), st.sampled_from((0, 20_000)),
       st.sampled_from(("index", "skip", "dense")))  # fmt: skip
def test_a_share_of_a_prompt_costs_a_share_of_its_attention_and_what_is_gathered(
    groups: int, tokens: int, prefix: int, mode: str
) -> None:
    """A rank has 1/n of the queries over as many keys each: 1/n of the whole, as well as a table's sizes agree."""
    layer = MlaLayer(DEEPSEEK_V3 if mode == "dense" else GLM5, 8, mode)  # type: ignore[arg-type]
    whole = attention.prefill(BOOK, layer, tokens, prefix, host_launched=False).seconds
    span = Span(groups, 1, 1, groups)
    cut = context_parallel.cut_prefill(BOOK, layer, tokens, prefix, 1, -(-tokens // groups), span).seconds
    rows = layer.kv_bytes + (layer.index_kv_bytes if mode == "index" else 0)
    gathered = BOOK.network.collective("all_gather", float(rows * tokens), span).seconds
    if groups == 1:
        assert cut == whole
    assert cut - gathered >= whole / groups * 0.55  # seen: 0.60 of 1,024 queries in 8,192
    if tokens >= 32768 and groups > 1:
        assert cut < whole
    far = context_parallel.cut_prefill(BOOK, layer, tokens, prefix, 1, -(-tokens // groups), Span(groups, 2, 2, 1))
    assert groups == 1 or far.seconds > cut


def test_long_prompts_are_quicker_and_answers_no_quicker_than_alone() -> None:
    """On 8 devices: 4 groups of tp 2 against 2 of tp 4. Without groups nothing changes, to the last digit."""
    prompt = BatchShape(prefill_chunks=[(32768, 0)])
    answers = BatchShape(np.full(16, 8000), 1, decode_rows=16, graphed=True)
    prices = {layout: pricer_of(spec(layout), TABLES) for layout in (
        Layout(4), Layout(4, pcp=2), Layout(2, pcp=4), Layout(4, ep=8, pcp=2))}  # fmt: skip
    alone, two, four, by_expert = prices.values()
    assert two.seconds(prompt) < alone.seconds(prompt) and by_expert.seconds(prompt) < alone.seconds(prompt)
    assert four.seconds(answers) > two.seconds(answers), "each group computes all heads of all answers"
    for each in prices.values():
        for shape in (prompt, answers, BatchShape(np.full(4, 900), 1, [(500, 0)], 4)):
            assert each.seconds(shape) == pytest.approx(each.price(shape).seconds, rel=1e-6)
        assert each.seconds(prompt) < each.seconds(BatchShape(prefill_chunks=[(32769, 0)])) * (1 + 1e-9)
    again = pricer_of(spec(Layout(4, pcp=1)), TABLES)
    assert again.seconds(prompt) == alone.seconds(prompt)


@pytest.mark.parametrize(("layout", "model", "engine", "why"), [
    (Layout(4, pcp=2), "glm-5-fp8", "vllm@0.23", "vllm 0.23 has no prefill context parallelism: --pcp 1, not 2"),
    (Layout(4, pcp=2), "glm-4.6", "vllm", "has no prefill context parallelism for KV heads"),
    (Layout(4, pcp=2), "glm-5-fp8", "sglang", "over devices that have all heads: --tp 1 with --pcp 2, not 4"),
    (Layout(1, pcp=8), "glm-5-fp8", "sglang@0.5.9", "sglang 0.5.9 has no prefill context parallelism"),
    (Layout(1, pcp=8), "glm-5-fp8", "trtllm", "has no prefill context parallelism"),
])  # fmt: skip
def test_what_an_engine_cannot_is_refused(layout: Layout, model: str, engine: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        spec(layout, model, engine)


def test_what_goes_with_nothing_is_refused() -> None:
    for other, degree in (("dp", 2), ("dcp", 2)):
        with pytest.raises(UsageError, match=f"cut over pcp 2 ranks go with {other} 1, not 2"):
            Layout(2, pcp=2, **{other: degree})
    with pytest.raises(UsageError, match="ep must divide tp x pcp = 2 x 2 = 4"):
        Layout(2, pcp=2, ep=3)
    with pytest.raises(UsageError, match="pcp above 1 is planned and simulated alone"):
        Layout(2, pcp=2).require_mesh()
    assert "pcp 1" in (role_refused(spec(Layout(4, pcp=2)), "prefill") or "")


def test_launch_lines() -> None:
    """Flags are checked against what each release's own parser took (tests/planner/flags)."""
    cfg = load_config("glm-5-fp8")
    line = launch(plan_for(spec(Layout(4, pcp=2))), cfg).script(0)
    assert "--tensor-parallel-size 4" in line and "--prefill-context-parallel-size 2" in line
    assert "VLLM_USE_V2_MODEL_RUNNER=1" in line
    with pytest.raises(LaunchError, match=r"from 0.28 on; plan with --engine vllm@0.28 or --pcp 1"):
        launch(plan_for(spec(Layout(4, pcp=2))), cfg, release="0.23")
    for layout, pieces in ((Layout(1, pcp=8, ep=8), "zigzag"), (Layout(1, pcp=8), "interleave")):
        line = launch(plan_for(spec(layout, engine="sglang")), cfg).script(0)
        for flag in ("--tp-size 8", "--enable-prefill-cp", "--attn-cp-size 8", f"--cp-strategy {pieces}"):
            assert flag in line
