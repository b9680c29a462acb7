"""A cache dealt out to the ranks of a tp group: who holds what, and what attention over it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import UsageError
from model.cache import cache_rows
from model.hf_config import load_config
from model.split import Grid, Layout
from model.weights import layer_weights
from runtime.deployment.engines.flags import releases
from runtime.deployment.errors import LaunchError
from runtime.deployment.ledger import stage_kv_bytes_per_token
from runtime.planning.assign import plan_for
from runtime.planning.check import check
from runtime.planning.launch import launch
from runtime.pricing import attention, context_parallel, open_book
from runtime.pricing.attention import GqaLayer, MlaLayer
from runtime.pricing.placement import Span, place
from runtime.pricing.work import MEASURED_BLOCKS
from runtime.simulation.build import Spec, memories, spec_for
from tests.cost.chips import CHIPS
from tests.plans import formats

DEGREES = st.sampled_from((1, 2, 4, 8))
DENSE = {name: shape for shape, name in MEASURED_BLOCKS.items()}["dsv3"]


def spec(
    dcp: int,
    model: str = "kimi-k2",
    scheme: str = "w4a16",
    engine: str = "vllm",
    tp: int = 8,
    kv: str = "bf16",
    chip: str = "h200-sxm",
) -> Spec:
    settings = {"memory_fraction": 0.9}
    return spec_for(load_config(model), hw_profiles.load(chip), Layout(tp, dcp=dcp), scheme, kv, engine, settings)


def test_kimi_k2_with_eight_ranks_holds_5_72_million_tokens() -> None:
    """vllm-project/recipes, moonshotai/Kimi-K2-Think.md: 715,072 tokens with TP8 on H200 and 5.72 M with DCP8, by a
    nightly of 2025-11-06 with its 0.9 of the memory."""
    found = memories(spec(8, engine="vllm@0.11"))[0]
    assert found.pool_tokens == pytest.approx(5.72e6, rel=0.03)
    assert found.pool_tokens / memories(spec(1, engine="vllm@0.11"))[0].pool_tokens == pytest.approx(8, rel=1e-5)


@given(model=st.sampled_from(("glm-5", "glm-5.3-fp8", "deepseek-v3", "kimi-k2")), tp=DEGREES, dcp=DEGREES)
def test_a_row_is_held_once_in_each_group(model: str, tp: int, dcp: int) -> None:
    """A token's bytes over a group's ranks are those of one rank that holds all; copies are what other groups hold."""
    if tp % dcp:
        with pytest.raises(UsageError, match=f"dcp must divide tp = {tp}"):
            Layout(tp, dcp=dcp)
        return
    cfg, dealt, whole = load_config(model), Layout(tp, dcp=dcp), Layout(tp)
    for kv in ("bf16", "fp8"):
        mine, all_ = (stage_kv_bytes_per_token(cfg, each, formats("fp8", kv), 0, True) for each in (dealt, whole))
        assert mine * dcp == pytest.approx(all_, rel=1e-12) and (dcp > 1 or mine == all_)
    for row in (row for kind in cfg.layer_counts for row in cache_rows(cfg, kind)):
        assert dealt.row_copies(row) * dcp == whole.row_copies(row) == tp


def test_more_ranks_never_hold_fewer_tokens_and_the_plan_adds_up() -> None:
    pools = [memories(spec(dcp))[0].pool_tokens for dcp in (1, 2, 4, 8)]
    assert pools == sorted(pools)
    found = spec(4)
    plan = plan_for(found)
    assert check(plan, found.cfg) == []
    assert plan.pools[0].pool_tokens == pytest.approx(pools[2], rel=1e-3)


def test_kv_heads_on_several_ranks_are_dealt_out() -> None:
    """GLM-4.6: 92 layers and 8 KV heads of 128, two numbers of 2 bytes each. With 16 ranks each head is on two of them;
    dealt out, all ranks together hold a token once."""
    cfg, held = load_config("glm-4.6"), formats("bf16", "bf16")
    token = 92 * 8 * 128 * 2 * 2
    for tp, dcp, copies in ((8, 1, 1), (16, 1, 2), (16, 2, 1), (32, 2, 2), (32, 4, 1)):
        layout = Layout(tp, dcp=dcp)
        layout.check(cfg)
        assert stage_kv_bytes_per_token(cfg, layout, held, 0, False) * tp == token * copies
        assert {layout.row_copies(row) for kind in cfg.layer_counts for row in cache_rows(cfg, kind)} == {copies}
    pools = [spec(dcp, "glm-4.6", "bf16", tp=16) for dcp in (1, 2)]
    one, two = (memories(each)[0].pool_tokens for each in pools)
    assert two == pytest.approx(2 * one, rel=1e-5)
    assert check(plan_for(pools[1]), cfg) == []


def test_weights_of_kv_heads_on_several_ranks() -> None:
    """A rank has its head's columns of the projections to keys and values, and their biases; scales of blocks too."""
    cfg = load_config("glm-4.6")
    kind = next(iter(cfg.layer_counts))
    shapes = {weight.name: Layout(32).local_shape(weight) for weight in layer_weights(cfg, kind)}
    for name in ("k", "v"):
        assert (shapes[name], shapes[f"{name}_bias"]) == ((5120, 128), (128,))
    assert shapes["q"] == (5120, 96 // 32 * 128)


@given(sequences=st.sampled_from((1, 8, 64)), context=st.sampled_from((512, 8192, 65536)))
def test_grouped_queries_over_shares(sequences: int, context: int) -> None:
    """Where reading the cache takes the time, half of it to read is faster; never by more than that. A prompt's chunk
    reads nothing less than its own tokens."""
    book, layer = open_book(CHIPS["h200-sxm"], "vllm"), GqaLayer(6, 1)
    alone = attention.gqa(book, "decode", layer, sequences, context).seconds
    assert context_parallel.gqa_decode(book, layer, sequences, context, Span(1, 1, 1, 1)).seconds == alone
    dealt = context_parallel.gqa_decode(book, layer, sequences, context, Span(2, 1, 1, 2)).seconds
    assert dealt > alone / 2
    if sequences >= 64 and context >= 65536:
        assert dealt < alone
    chunk = context_parallel.gqa_prefill(book, layer, 4096, context, 1, Span(2, 1, 1, 2)).seconds
    assert chunk > context_parallel.gqa_prefill(book, layer, 4096, 0, 1, Span(2, 1, 1, 2)).seconds


@given(sequences=st.sampled_from((1, 8, 64, 256)), context=st.sampled_from((512, 8192, 65536)))
def test_attention_over_shares(sequences: int, context: int) -> None:
    """One rank is the block itself. Several cost what the share costs, with all heads of the group, and exchange; where
    reading the cache takes the time they are faster, and never by more than there are ranks."""
    book, layer = open_book(CHIPS["h200-sxm"], "vllm"), MlaLayer(DENSE, 16, "dense")
    alone = attention.decode(book, layer, sequences, context).seconds
    assert context_parallel.decode(book, layer, sequences, context, Span(1, 1, 1, 1)).seconds == alone
    dealt = context_parallel.decode(book, layer, sequences, context, Span(8, 1, 1, 8)).seconds
    assert dealt > alone / 8
    if sequences >= 64 and context >= 65536:
        assert dealt < alone
    across = context_parallel.decode(book, layer, sequences, context, Span(8, 2, 2, 4)).seconds
    assert across > dealt


def test_neighbours_deal_out() -> None:
    assert place(Layout(16, dcp=8), 8, 8).dcp == Span(8, 1, 1, 8)
    assert place(Layout(16, dcp=16), 8, 8).dcp == Span(16, 2, 2, 8)


@pytest.mark.parametrize(
    ("model", "engine", "why"),
    [
        ("glm-5-fp8", "vllm", "vllm 0.28 has no decode context parallelism for sparse attention"),
        ("deepseek-v3", "sglang", "sglang 0.5.14 has no decode context parallelism: --dcp 1, not 8"),
    ],
)
def test_what_an_engine_cannot_is_refused(model: str, engine: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        spec(8, model, "fp8", engine)
    with pytest.raises(UsageError, match="each KV head lies on one tp rank alone"):
        Layout(8, dcp=8).check(load_config("glm-4.5"))
    with pytest.raises(UsageError, match="each KV head lies on 2 tp ranks, which dcp must divide"):
        Layout(16, dcp=4).check(load_config("glm-4.5"))
    with pytest.raises(UsageError, match="KV heads / tp = 8 / 12"):
        Layout(12).check(load_config("glm-4.5"))
    with pytest.raises(UsageError, match="dcp above 1 is planned and simulated alone"):
        Layout(8, dcp=8).require_mesh()
    with pytest.raises(UsageError, match="KV heads that several tp ranks hold are planned and simulated alone"):
        Grid.of(load_config("glm-4.5"), Layout(16))
    with pytest.raises(UsageError, match="vllm 0.11 has no decode context parallelism for KV heads: --dcp 1, not 2"):
        spec(2, "glm-4.6", "bf16", "vllm@0.11", tp=16)


@pytest.mark.parametrize("release", ["0.11", "0.13", "0.23", "0.28"])
def test_which_vllm_deals_out_eight_bits(release: str) -> None:
    """Its mla_attention.py asserts against it up to 0.24; PR 44044 took that out. Wherever there are launch lines they
    refuse the same, of a plan that is for another release too."""
    name = f"vllm@{release}"
    assert spec(1, engine=name, kv="fp8").layout.dcp == 1
    fits = release == "0.28"
    if release in releases("vllm"):
        cfg, dealt = load_config("kimi-k2"), plan_for(spec(8, engine="vllm@0.28", kv="fp8"))
        if fits:
            assert "--decode-context-parallel-size 8" in launch(dealt, cfg, release=release).script(0)
        else:
            with pytest.raises(LaunchError, match=f"vllm {release} deals no fp8 cache out"):
                launch(dealt, cfg, release=release)
    if fits:
        assert memories(spec(8, engine=name, kv="fp8"))[0].pool_tokens > 1.5 * memories(spec(8))[0].pool_tokens
        return
    with pytest.raises(UsageError, match=rf"vllm {release} deals no fp8 cache out to tp ranks: --kv bf16 or --dcp 1"):
        spec(8, engine=name, kv="fp8")


def test_sparse_attention_is_dealt_out_where_its_backend_merges_ranks() -> None:
    """FlashInfer's on SM100, from 0.28 on; not FlashMLA's on SM90."""
    assert spec(8, "glm-5-fp8", "fp8", "vllm", chip="b200-sxm").layout.dcp == 8
    for engine, chip in (("vllm", "h200-sxm"), ("vllm@0.23", "b200-sxm")):
        with pytest.raises(UsageError, match="no decode context parallelism for sparse attention"):
            spec(8, "glm-5-fp8", "fp8", engine, chip=chip)
