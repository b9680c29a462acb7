"""Kernels that an engine's release chooses by model, chip and layout."""

from __future__ import annotations

import numpy as np
import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.pricing import DEEPSEEK_V3, GLM5, Chip, attention, open_book
from runtime.pricing.load import uniform, with_shared
from runtime.serving.pricing import BatchShape, StepPrice
from runtime.simulation.build import PriceTables, build, pricer_of, spec_for
from tests.cost.chips import CHIPS


def step(
    shape: BatchShape,
    model: str,
    engine: str,
    chip: str = "h200-sxm",
    scheme: str = "fp8",
    layout: Layout = Layout(tp=8),
) -> StepPrice:
    spec = spec_for(load_config(model), hw_profiles.load(chip), layout, scheme, "bf16", engine, pool_tokens=10**6)
    return build(spec).pricer.price(shape)


DECODE = BatchShape(np.full(4, 2000), 1, decode_rows=4, graphed=True)
PROMPTS = BatchShape(prefill_chunks=[(2048, 0)] * 4)


@pytest.mark.parametrize(
    ("model", "engine", "chip", "scheme", "layout", "fused"), [
        ("deepseek-v3", "sglang@0.5.9", "h200-sxm", "fp8", Layout(tp=8), True),
        ("glm-4.6", "sglang@0.5.9", "h200-sxm", "bf16", Layout(tp=8), True),
        ("glm-5-fp8", "sglang@0.5.14", "h200-sxm", "fp8", Layout(tp=8), True),
        ("deepseek-v3", "sglang@0.5.9", "b200-sxm", "fp8", Layout(tp=8), False),
        ("deepseek-v3", "sglang@0.5.9", "h200-sxm", "fp8", Layout(tp=8, ep=8), False),
        ("deepseek-v3", "sglang@0.5.9", "h200-sxm", "w4afp8", Layout(tp=8), False),
        ("deepseek-v3", "vllm@0.13", "h200-sxm", "fp8", Layout(tp=8), False),
        ("kimi-k2", "sglang@0.5.9", "h200-sxm", "w4a16", Layout(tp=8), False),
        ("deepseek-v3.2", "sglang@0.5.9", "h200-sxm", "fp8", Layout(tp=8), False),
    ],
)  # fmt: skip
def test_where_sglang_runs_the_shared_expert_with_the_routed_ones(
    model: str, engine: str, chip: str, scheme: str, layout: Layout, fused: bool
) -> None:
    """By the conditions of its determine_num_fused_shared_experts (256 experts at most, one shared, no EP, no W4AFP8),
    and of flashinfer_trtllm, which turns it off."""
    assert ("shared_experts" not in step(DECODE, model, engine, chip, scheme, layout).by_op) == fused


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_fused_shared_expert_is_one_more_row_a_token_and_one_more_expert(tokens: int) -> None:
    load = uniform(256)
    rows, active = load.busiest_rank(tokens, 8, 1)
    more_rows, more_active = with_shared(load, 1).busiest_rank(tokens, 8, 1)
    assert more_rows - rows == pytest.approx(tokens) and more_active - active == pytest.approx(1)
    assert with_shared(load, 1) is with_shared(load, 1), "one object, so that tables are shared"


def test_experts_that_old_vllm_had_not_tuned_run_at_the_old_defaults() -> None:
    """Its defaults gained up to 2x at large batches with PR 34846; SGLang's table holds the old ones."""
    old, new = (step(PROMPTS, "glm-4.6", f"vllm@{r}", scheme="bf16").by_op["experts"] for r in ("0.11", "0.28"))
    assert 1.2 < old / new < 2.0
    tuned = [step(PROMPTS, "glm-4.6", f"vllm@{r}").by_op["experts"] for r in ("0.11", "0.28")]
    assert tuned[0] < 1.2 * tuned[1], "a file for FP8 came with its release"


@pytest.mark.parametrize(("chip", "absorbs"), [("h200-sxm", True), ("b200-sxm", False)])
def test_sglang_keeps_short_prefixes_of_dense_mla_in_the_latent_on_hopper(chip: str, absorbs: bool) -> None:
    def seconds(*before: int) -> float:
        chunks = [(2000, b) for b in before]
        return step(BatchShape(prefill_chunks=chunks), "deepseek-v3", "sglang@0.5.9", chip).by_op["attention"]

    fresh, touched = seconds(0, 0, 0, 0), seconds(4, 0, 0, 0)
    assert (touched > 1.1 * fresh) == absorbs
    if absorbs:  # at the threshold the heads are expanded again
        assert seconds(2047, 2047, 2047, 2047) > seconds(2048, 2048, 2048, 2048)


def test_the_residual_costs_what_it_moves() -> None:
    """Two passes over [tokens, hidden] for each of two sums a layer, and one where shared and routed experts meet."""
    book = open_book(CHIPS["h200-sxm"], "vllm")
    once = book.memory(2 * 8192 * 5120 * 2.0).seconds
    cfg = load_config("glm-4.6")
    elementwise = step(PROMPTS, "glm-4.6", "vllm@0.28", scheme="bf16").by_op["elementwise"]
    assert elementwise > cfg.num_layers * 4 * 0.9 * once, "two norms and two sums at least"


@pytest.mark.parametrize(
    ("engine", "chip", "dense"), [
        ("sglang@0.5.3", "h200-sxm", False),
        ("sglang@0.5.6", "b200-sxm", True),
        pytest.param("sglang@0.5.14", "h200-sxm", True, marks=pytest.mark.slow),
        pytest.param("vllm@0.13", "h200-sxm", False, marks=pytest.mark.slow),
        ("vllm@0.23", "b200-sxm", False),
        ("vllm@0.28", "h200-sxm", True),
        ("trtllm", "h200-sxm", False),
        ("glm5", "h200-sxm", True),
    ],
)  # fmt: skip
def test_who_attends_densely_to_short_prompts_of_sparse_attention(engine: str, chip: str, dense: bool) -> None:
    """SGLang from 0.5.5 (0.5.6 on SM100) and vLLM from PR 47327 expand heads where the selection would take all. A
    longer prompt is selected from everywhere, so a token more a sequence makes a leap only there."""
    chunks = [BatchShape(prefill_chunks=[(tokens, 0)] * 4) for tokens in (2048, 2049)]
    short, longer = (step(each, "deepseek-v3.2", engine, chip).by_op["attention"] for each in chunks)
    assert (longer > 1.3 * short) == dense


def seconds_over_context(chip: str, engine: str, prompts: list[tuple[int, int]]) -> float:
    """What 64 answers of GLM-4.5-Air take longer over 4,096 keys than over 64."""
    near, far = (
        step(
            BatchShape(np.full(64, keys), 1, prompts, 64, not prompts),
            "glm-4.5-air",
            engine,
            chip,
            "bf16",
            Layout(tp=4),
        )
        for keys in (64, 4096)
    )
    return far.by_op["attention"] - near.by_op["attention"]


@pytest.mark.parametrize(
    ("chip", "engine", "apart"),
    [
        ("a100-sxm-80gb", "vllm@0.11", True),
        ("a100-sxm-80gb", "sglang@0.5.9", False),  # prompts and answers never meet in a call
        ("h200-sxm", "vllm@0.11", False),  # FlashAttention 3 packs paged calls
    ],
)
def test_flash_attention_2_computes_a_tile_of_each_head_for_answers_beside_prompts(
    chip: str, engine: str, apart: bool
) -> None:
    """By mha_varlen_fwd, query heads of a key head are packed only where max_seqlen_q is 1; 64 queries are a block."""
    beside, alone = (seconds_over_context(chip, engine, prompts) for prompts in ([(1024, 0)], []))
    if apart:  # 64 x 24 heads x 64 queries over 4,032 keys at 312 TFLOP/s, 46 times
        assert beside > 46 * 4 * 128 * 64 * 24 * 64 * 4032 / 312e12 > 2 * alone
    else:
        assert beside == pytest.approx(alone)


@pytest.mark.parametrize(
    ("release", "chip", "key", "table"),
    [
        ("0.14", "b200-sxm", "moe/fp8-block/vllm", "0.22.0"),
        ("0.15", "b200-sxm", "moe/fp8-block/vllm", "0.24.0"),
        ("0.23", "b200-sxm", "moe/fp8-block/vllm", "0.24.0"),
        ("0.14", "h200-sxm", "moe/fp8-block/vllm", "0.19.0"),
        ("0.16", "h200-sxm", "moe/fp8-block/vllm/tp", "0.24.0"),
        ("0.17", "h200-sxm", "moe/fp8-block/vllm", "0.24.0"),
        ("0.17", "h200-sxm", "moe/fp8-block/vllm/tp", "0.19.0"),
        ("0.28", "h200-sxm", "moe/fp8-block/vllm/tp", "0.24.0"),
    ],
)
def test_fp8_experts_of_vllm_are_priced_by_a_table_of_the_kernel_that_a_release_chooses(
    release: str, chip: str, key: str, table: str
) -> None:
    """FlashInfer's TensorRT-LLM kernel on Blackwell from 0.15; on Hopper its CUTLASS kernel, and Triton for tensor
    parallelism from 0.17 on (oracle/fp8.py of the wheels); tables up to 0.22 are of Triton."""
    profile = hw_profiles.load(chip)
    book = open_book(Chip.from_fields(chip, profile.number), "vllm", release=release, family=profile.family)
    kernel = book.named(key)
    assert kernel is not None and f"/{table}/" in kernel.source
    assert bool(kernel.assumed) == (table > f"{release}.0")


@pytest.mark.parametrize("chip", ["h200-sxm", "b200-sxm"])
def test_int4_experts_of_vllm_are_marlins_in_every_release(chip: str) -> None:
    """Tables up to 0.22 are of the Triton kernel, though named otherwise. SGLang runs Marlin too."""

    def seconds(engine: str) -> float:
        return step(DECODE, "kimi-k2.5", engine, chip, "w4a16").by_op["experts"]

    assert seconds("vllm@0.13") == pytest.approx(seconds("vllm@0.28"), rel=0.01)
    assert seconds("vllm@0.13") == pytest.approx(seconds("sglang@0.5.14"), rel=0.35)


def shared_seconds(engine: str, tokens: int, layout: Layout = Layout(tp=8), chip: str = "b200-sxm") -> float:
    shape = BatchShape(np.full(tokens, 2000), 1, decode_rows=tokens, graphed=True)
    return step(shape, "deepseek-v3", engine, chip, layout=layout).by_op["shared_experts"]


def test_a_shared_expert_beside_the_routed_ones_costs_what_its_weights_take_through_the_memory() -> None:
    alone, beside = (shared_seconds(f"vllm@{release}", 32) for release in ("0.11", "0.13"))
    weights = 58 * 3 * 7168 * 2048 / 8  # bytes of FP8 on a device
    assert beside == pytest.approx(weights / 8e12, rel=0.1) and beside < 0.5 * alone
    assert shared_seconds("vllm@0.13", 320) == pytest.approx(shared_seconds("vllm@0.11", 320), rel=0.01), "256 at most"
    assert shared_seconds("sglang@0.5.14", 320) < 0.5 * shared_seconds("vllm@0.11", 320), "1,024 at most"


def test_vllm_fuses_all_reduces_up_to_so_many_bytes_by_chip_and_devices() -> None:
    book = open_book(CHIPS["h200-sxm"], "vllm", release="0.17", family="hopper")
    fused = book.fused_reduce("deepseek_v3")
    assert fused is not None and book.family == "hopper"
    assert [fused.takes(0, size * MIB, "hopper", 8) for size in (0.5, 0.6)] == [True, False]
    assert fused.takes(0, 30 * MIB, "blackwell", 4) and not fused.takes(0, 1, "ampere", 8)
    assert open_book(CHIPS["h200-sxm"], "vllm", release="0.16", family="hopper").fused_reduce("deepseek_v3") is None


@pytest.mark.parametrize("chip", ["b300-sxm", "gb300-nvl72"])
def test_layers_without_an_indexer_are_shorter_than_those_with_one_where_each_was_measured(chip: str) -> None:
    """The blocks of GLM-5.2's NVFP4 checkpoint; for FP8 weights they stand in, and the price says so."""
    profile = hw_profiles.load(chip)
    book = open_book(Chip.from_fields(chip, profile.number), "sglang", release="0.5.14", family=profile.family)
    skip, index = (attention.MlaLayer(GLM5, 8, mode, "fp8", "fp8-block") for mode in ("skip", "index"))
    for each in (attention.prefill_block(book, skip), attention.decode_block(book, skip)):
        assert each is not None and each.price(8192, 4096).assumed == {attention.WIDE_PROJECTIONS}
    whole, less = (attention.prefill_block(book, layer) for layer in (index, skip))
    assert whole and less and less.price(8192, 4096).seconds < whole.price(8192, 4096).seconds


MIB = 2**20


def test_sglang_has_nccl_reduce_in_rings() -> None:
    """Its servers start with NCCL_NVLS_ENABLE=0; PR 3502 took 1023 us for 844 with it on 8 H100. What its own kernel
    reduces, up to 8 MiB, fewer devices, and Blackwell do not change."""
    hopper = open_book(CHIPS["h200-sxm"], "sglang", release="0.5.3", family="hopper")
    assert 1.1 < hopper.reduced_by_rings(200 * MIB, 8, 1) < 1023 / 844 + 0.02
    assert hopper.reduced_by_rings(8 * MIB, 8, 1) == 1
    assert hopper.reduced_by_rings(200 * MIB, 4, 1) == hopper.reduced_by_rings(200 * MIB, 8, 2) == 1
    assert open_book(CHIPS["b200-sxm"], "sglang", family="blackwell").reduced_by_rings(200 * MIB, 8, 1) == 1
    size = 8192 * 7168 * 2
    each = hopper.network.collective("all_reduce", size, 8, captured=False).seconds
    for settings, rings in ({}, True), ({"reduces_in_switches": True}, False):
        cfg, chip = load_config("deepseek-v3"), hw_profiles.load("h200-sxm")
        spec = spec_for(cfg, chip, Layout(tp=8), "fp8", None, "sglang@0.5.3", settings)
        took = pricer_of(spec, PriceTables(coarse=True)).price(BatchShape(prefill_chunks=[(8192, 0)])).by_op["psum"]
        slower = hopper.reduced_by_rings(size, 8, 1) if rings else 1.0
        assert took == pytest.approx(122 * each * slower, rel=0.02)


def test_collectives_of_steps_beyond_the_graphs_are_launched_from_the_host() -> None:
    """aiconfigurator's eager all-reduces of 117 MB take a tenth longer on H200 than those that a graph replays."""

    def psum(tokens: int, **settings: object) -> float:
        spec = spec_for(
            load_config("deepseek-v3"), hw_profiles.load("h200-sxm"), Layout(tp=8), "fp8", "bf16", "vllm@0.13",
            settings, pool_tokens=10**6,
        )  # fmt: skip
        return pricer_of(spec, PriceTables(coarse=True)).price(BatchShape(prefill_chunks=[(tokens, 0)])).by_op["psum"]

    network = open_book(CHIPS["h200-sxm"], "vllm", release="0.13", family="hopper").network
    for tokens, captured in ((400, True), (8192, False)):
        each = network.collective("all_reduce", tokens * 7168 * 2, 8, captured=captured).seconds
        assert psum(tokens) == pytest.approx(122 * each, rel=0.02)
    assert psum(8192) > 1.07 * 122 * network.collective("all_reduce", 8192 * 7168 * 2, 8).seconds
    assert psum(400, graph_mode="eager") > psum(400)


@pytest.mark.parametrize(("engine", "chip", "slower"), [
    ("vllm@0.11", "h200-sxm", True), ("vllm@0.13", "h200-sxm", False), ("vllm@0.11", "b200-sxm", False),
    ("sglang@0.5.3", "h200-sxm", False),
])  # fmt: skip
def test_vllm_attended_in_the_latent_with_flashmla_before_0_11_1(engine: str, chip: str, slower: bool) -> None:
    """PR 27363: 13 us a call more than FlashAttention's kernel, which the tables are of, on Hopper."""
    kind, release = engine.split("@")
    family = hw_profiles.load(chip).family
    book, plain = (open_book(CHIPS[chip], kind, release=r, family=family) for r in (release, "0.13"))
    layer = attention.MlaLayer(DEEPSEEK_V3, 16, "dense")
    more = [attention.decode(book, layer, b, 1024).seconds - attention.decode(plain, layer, b, 1024).seconds
            for b in (1, 128)]  # fmt: skip
    if slower:
        assert more == pytest.approx([13e-6] * 2, rel=0.25)
    else:
        assert book.latent_decode_more_s == 0
