"""The step pricer: one answer both ways, never cheaper for more work, and never slower for more chip."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.pricing.oplist import Sizes
from runtime.pricing.price import PriceError, total
from runtime.pricing.pricer import relative_error, token_grid
from runtime.pricing.prices import label, outside_attention, price
from runtime.serving.pricing import BOUNDS, EVIDENCE_GRADES, BatchShape, StepPrice
from runtime.simulation.build import Built, PriceTables, build, spec_for

H200, NPU = "h200-sxm", "ascend-910c-die"
BANDWIDTH = "chip.memory.bandwidth_bytes_per_s"


@cache
def built(
    model: str = "glm-5-fp8",
    chip: str = H200,
    layout: Layout = Layout(tp=8),
    scheme: str = "fp8",
    overrides: tuple[tuple[str, float], ...] = (),
    engine: str = "sglang",
    load: str | None = None,
    drafts: int = 0,
    kv: str = "bf16",
    release: str | None = None,
    coarse: bool = False,
) -> Built:
    cfg, profile = load_config(model), hw_profiles.load(chip, dict(overrides))
    spec = spec_for(cfg, profile, layout, scheme, kv, engine, expert_load=load, drafts=drafts, pool_tokens=10**6)
    if release is not None:
        spec = dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, release=release))
    return build(spec, PriceTables(coarse=coarse))


def decode(rows: int, context: float, queries: int = 1) -> BatchShape:
    return BatchShape(np.full(rows, context), queries, decode_rows=rows, graphed=True)


CASES: dict[str, Any] = {
    "dsa": {},
    "shared-indexers": {"model": "glm-5.2-fp8"},
    "mla": {"model": "deepseek-v3", "kv": "fp8", "engine": "trtllm"},
    "gqa": {"model": "glm-4.5"},
    "other-mla": {"model": "glm-4.7-flash", "layout": Layout(tp=4)},
    "npu": {"chip": NPU, "layout": Layout(tp=16), "scheme": "w4a8", "engine": "vllm-ascend"},
    "dp-ep": {"layout": Layout(dp=8, ep=8)},
    "ep": {"layout": Layout(tp=8, ep=8)},
    "pp": {"layout": Layout(tp=8, pp=2)},
}
SHAPES = st.builds(
    lambda rows, context, queries, chunks: BatchShape(np.full(rows, context), queries, chunks, rows),
    st.integers(0, 300),
    st.integers(1, 150_000),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 60_000)), max_size=3),
).filter(lambda shape: shape.tokens > 0)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25)
@given(shape=SHAPES)
def test_the_quick_answer_is_the_full_one(case: str, shape: BatchShape) -> None:
    pricer = built(**CASES[case], coarse=True).pricer
    full = pricer.price(shape)
    assert pricer.seconds(shape) == pytest.approx(full.seconds, rel=1e-9)
    assert sum(full.by_op.values()) == pytest.approx(full.seconds)
    assert sum(full.by_bound.values()) == pytest.approx(full.seconds)
    assert set(full.by_bound) <= set(BOUNDS) and full.evidence in EVIDENCE_GRADES
    assert len(full.errors) == len(full.by_op) and 0 <= relative_error(full) < 1.5


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15)
@given(rows=st.integers(1, 200), context=st.integers(16, 60_000), more=st.floats(1.0, 4.0))
def test_more_work_is_never_cheaper(case: str, rows: int, context: int, more: float) -> None:
    seconds = built(**CASES[case], coarse=True).pricer.seconds
    least = seconds(decode(rows, context)) * (1 - 1e-9)
    assert seconds(decode(int(rows * more), context)) >= least
    assert seconds(decode(rows, int(context * more))) >= least
    assert seconds(decode(rows, context, 3)) >= least
    tokens = 16 * rows
    prompt = seconds(BatchShape(prefill_chunks=[(tokens, 4096)])) * (1 - 1e-9)
    assert seconds(BatchShape(prefill_chunks=[(int(tokens * more), 4096)])) >= prompt
    assert seconds(BatchShape(prefill_chunks=[(tokens, int(4096 * more))])) >= prompt


BETTER: dict[str, tuple[str, float]] = {
    "bandwidth": (BANDWIDTH, 3.2e12),
    "bf16": ("chip.peak.bf16_flops_per_s", 8e14),
    "int8": ("chip.peak.int8_flops_per_s", 2e15),
    "scale-up": ("link.scale_up.bandwidth_bytes_per_s", 4e11),
    "scale-out": ("link.scale_out.bandwidth_bytes_per_s", 1e11),
}


@pytest.mark.parametrize("what", BETTER)
@settings(max_examples=8)
@given(rows=st.integers(1, 200), context=st.integers(64, 60_000), tokens=st.integers(1, 8192))
def test_a_better_chip_is_never_slower(what: str, rows: int, context: int, tokens: int) -> None:
    field, figure = BETTER[what]
    assert figure > hw_profiles.load(NPU).require(field).value
    case = {"chip": NPU, "scheme": "w4a8", "layout": Layout(tp=16), "engine": "vllm-ascend", "coarse": True}
    plain, better = built(**case).pricer, built(**case, overrides=((field, figure),)).pricer
    for shape in (decode(rows, context), BatchShape(prefill_chunks=[(tokens, context)])):
        assert better.seconds(shape) <= plain.seconds(shape) * (1 + 1e-9)


@pytest.mark.parametrize("case", ["dsa", "gqa", "npu", "dp-ep"])
@settings(max_examples=25)
@example(tokens=2049)  # one past the steps whose all-reduces an engine fuses
@given(tokens=st.integers(1, 65536))
def test_interpolated_tokens_are_near_direct_prices(case: str, tokens: int) -> None:
    pricer = built(**CASES[case]).pricer
    found, context = pricer.cfg, pricer._context
    from runtime.simulation.build import _programs  # the lists that the pricer was made from

    lists = _programs(found, pricer.layout)
    direct = []
    for program, n in [*((lists.layers[kind], n) for kind, n in pricer._kinds), (lists.embed, 1)]:
        for op in program.ops:
            if outside_attention(op, found) and (made := price(op, Sizes(tokens, 1, 1), context)):
                assert label(op, context) in pricer._layers.labels
                direct.append(made.times(n))
    assert pricer._layers.seconds(tokens) == pytest.approx(total(direct).seconds, rel=0.02)


def test_the_grid_holds_small_batches_exactly() -> None:
    grid = token_grid()
    assert list(grid[:16]) == list(range(1, 17)) and grid[-1] == 131072
    assert np.all(np.diff(grid) > 0) and np.all(grid[17:] / grid[16:-1] < 1.12)


@pytest.mark.parametrize(
    ("chip", "engine", "measured", "old"), [
        (H200, "vllm", "0.24.0", "0.11"), ("b200-sxm", "sglang", "0.5.14", "0.5.6.post1"),
        ("h100-sxm", "trtllm", "1.3.0rc20", "1.0"),
    ],
)  # fmt: skip
def test_a_release_older_than_its_tables_says_so_and_widens_the_band(
    chip: str, engine: str, measured: str, old: str
) -> None:
    new, before = (
        built(model="deepseek-v3", chip=chip, engine=engine, release=r).pricer.price(decode(8, 4096))
        for r in (measured, old)
    )
    assert not any(engine in line for line in new.assumed)
    assert before.evidence == "assumed" and any(f"kernels of {engine} {old} as fast" in line for line in before.assumed)
    assert relative_error(before) > 1.3 * relative_error(new)


def test_engines_that_borrow_tables_have_releases_of_their_own() -> None:
    """A release orders the tables of the engine that they are of, not those of one that is priced like it."""
    borrowed = built(engine="glm5", release="0.1").pricer.price(decode(8, 4096))
    assert not any("as fast as" in line for line in borrowed.assumed)


def test_evidence_is_that_of_the_weakest_part() -> None:
    """What SGLang runs around sparse attention is assumed; elementwise kernels are transferred on every chip."""
    assert built().pricer.price(decode(8, 4096)).evidence == "assumed"
    deepseek = built(model="deepseek-v3", release="0.5.14").pricer.price(decode(8, 4096))
    assert deepseek.evidence == "datasheet" and not deepseek.assumed
    npu = built(**CASES["npu"]).pricer
    assert npu.price(decode(8, 4096)).evidence == "datasheet"
    assert not npu.book.measured and built().pricer.book.measured
    errors = [relative_error(pricer.price(decode(8, 4096))) for pricer in (built(release="0.5.14").pricer, npu)]
    assert errors[0] < 0.15 < errors[1]


def test_far_outside_the_tables_is_flagged() -> None:
    pricer = built().pricer
    assert not pricer.price(decode(16, 8192)).extrapolated
    assert pricer.price(BatchShape(prefill_chunks=[(131072, 0)])).extrapolated


def test_a_chip_without_a_figure_says_which() -> None:
    with pytest.raises(PriceError, match=r"--set chip\.peak\.bf16_flops_per_s="):
        built(chip="enflame-l600", layout=Layout(tp=16))


def steps(found: Built, rows: int = 32) -> StepPrice:
    return found.pricer.price(decode(rows, 4096))


def test_drafting_costs_less_than_its_tokens() -> None:
    """A step of three drafts verifies four tokens a sequence and runs the draft layer three times."""
    pricer = built(drafts=3).pricer
    one, four = (pricer.price(decode(16, 8192, queries)) for queries in (1, 4))
    assert "mtp" in four.by_op and "mtp" not in one.by_op
    assert one.seconds < four.seconds < 3 * one.seconds
    assert four.by_op["mtp"] < 0.15 * four.seconds
    each = [pricer.price(decode(16, 8192, queries)).by_op["mtp"] for queries in (3, 4, 5)]
    assert each[0] < each[1] < each[2]


def test_drafts_of_a_prompt_step_are_its_own_layer_and_no_more() -> None:
    """The draft layer reads the prompt once, its head the last tokens alone: about a layer's share of the step."""
    pricer = built(drafts=3).pricer
    plain, drafting = (pricer.price(BatchShape(query_tokens=q, prefill_chunks=[(8192, 0)])) for q in (1, 4))
    share = drafting.seconds / plain.seconds - 1
    assert 0.5 / 78 < share < 2.5 / 78


def test_a_model_without_a_draft_layer_cannot_draft() -> None:
    with pytest.raises(UsageError, match="no MTP layer"):
        built(model="kimi-k2", layout=Layout(tp=16), drafts=2)


def test_experts_by_expert_or_by_tensor() -> None:
    """Split by expert over the same devices: the same weights are read, and a busier rank can only cost more."""
    tensor, expert = built(), built(layout=Layout(tp=8, ep=8))
    assert steps(expert).by_op["experts"] == pytest.approx(steps(tensor).by_op["experts"], rel=0.4)
    even, skewed = (built(layout=Layout(tp=8, ep=8), load=load) for load in ("balanced", "power_law:1.2"))
    chunk = BatchShape(prefill_chunks=[(8192, 0)])
    assert even.pricer.seconds(chunk) < skewed.pricer.seconds(chunk)


def test_attention_by_sequence_trades_attention_for_dispatch() -> None:
    """dp 8 holds whole heads: the same batch over eight ranks, dispatch and combine in place of two sums."""
    dp, tp = built(layout=Layout(dp=8, ep=8)), built()
    spread, together = steps(dp, 32), steps(tp, 32 * 8)
    assert "psum" not in spread.by_op and {"dispatch", "combine"} <= set(spread.by_op)
    assert spread.by_op["attention"] < together.by_op["attention"]


def test_pipeline_stages_work_on_their_own_micro_batches() -> None:
    """A full batch takes as long as half of it through all layers; a lone sequence gains nothing."""
    one, two = built(), built(layout=Layout(tp=8, pp=2))
    hop = steps(two).by_op["pipeline"]
    assert 0 < hop < 1e-3
    assert steps(two, 64).seconds == pytest.approx(steps(one, 32).seconds + hop, rel=0.01)
    assert steps(two, 1).seconds == pytest.approx(steps(one, 1).seconds, rel=0.01)
    prompts = BatchShape(prefill_chunks=[(4096, 0)] * 2), BatchShape(prefill_chunks=[(4096, 0)])
    assert two.pricer.seconds(prompts[0]) == pytest.approx(one.pricer.seconds(prompts[1]), rel=0.01)


def test_dense_twin_of_a_sparse_model_grows_with_its_context() -> None:
    from runtime.simulation.build import model_override

    cfg = model_override(load_config("glm-5-fp8"), "model.index_topk", "0")
    assert cfg.indexer is None and all(kind.indexer == "none" for kind in cfg.layers)
    profile, layout = hw_profiles.load(H200), Layout(tp=8)
    dense = build(spec_for(cfg, profile, layout, "fp8", "bf16", pool_tokens=10**6)).pricer
    sparse = built().pricer
    growth = [p.seconds(decode(32, 131072)) / p.seconds(decode(32, 8192)) for p in (sparse, dense)]
    assert growth[0] < 1.5 < growth[1]
    with pytest.raises(UsageError, match="only model.index_topk"):
        model_override(load_config("glm-4.5"), "model.index_topk", "0")
