"""The ledger: every byte accounted for, the engines' pools, and what does not fit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import CapacityError
from model.config import ModelConfig
from model.formats import SCHEMES, Formats
from model.hf_config import load_config
from model.split import Grid, Layout
from model.weights import layer_weights, outer_weights
from runtime.deployment.engines import Engine
from runtime.deployment.engines import load as load_engine
from runtime.deployment.ledger import (
    Ledger,
    activation_bytes,
    fullest,
    stage_kv_bytes_per_token,
    stage_ledgers,
    stage_weight_bytes,
)
from runtime.pricing.oplist import Sizes
from runtime.pricing.trace import trace
from runtime.simulation.build import Spec, memory, spec_for
from tests.plans import formats

MODELS = ("glm-5-fp8", "glm-5.2", "deepseek-v3.2", "glm-4.5", "glm-4.7-flash", "kimi-k2")


@settings(max_examples=25)
@given(
    model=st.sampled_from(MODELS),
    tp=st.sampled_from((1, 2, 4)),
    dp=st.sampled_from((1, 2, 4)),
    pp=st.integers(1, 5),
    split=st.booleans(),
    scheme=st.sampled_from(sorted(SCHEMES)),
    mtp=st.booleans(),
)
def test_stages_hold_the_model_once(model: str, tp: int, dp: int, pp: int, split: bool, scheme: str, mtp: bool) -> None:
    """Stage by stage and part by part, the bytes of a model without pipeline; each weight at its format's size."""
    cfg, narrow = load_config(model), formats(scheme)
    layout, single = Layout(tp, dp, tp * dp if split else 1, pp), Layout(tp, dp, tp * dp if split else 1)
    stages = [stage_weight_bytes(cfg, layout, narrow, stage, mtp) for stage in range(pp)]
    whole = stage_weight_bytes(cfg, single, narrow, 0, mtp)
    for part, size in whole.items():
        twice = part == "embedding" and "mtp" in whole and pp > 1  # the last stage embeds what the MTP layer is given
        assert sum(stage.get(part, 0.0) for stage in stages) == pytest.approx(size * (1 + twice), rel=1e-12), part
    layers = [w for kind in cfg.layers for w in layer_weights(cfg, kind)] + list(outer_weights(cfg))
    drafting = layer_weights(cfg, cfg.mtp_type) * cfg.mtp_layers if mtp else ()
    expected = sum(Grid.of(cfg, single).bytes(w, narrow.held(w)) for w in layers)
    expected += sum(Grid.of(cfg, single).bytes(w, narrow.held(w, mtp=True)) for w in drafting)
    assert sum(whole.values()) == pytest.approx(expected, rel=1e-12)
    tokens = [stage_kv_bytes_per_token(cfg, layout, narrow, stage, mtp) for stage in range(pp)]
    assert sum(tokens) == pytest.approx(stage_kv_bytes_per_token(cfg, single, narrow, 0, mtp))


@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_the_traced_weights(model: str) -> None:
    """The shapes the trace gives one device, times bytes a weight: the ledger, with nothing else known."""
    cfg, layout, narrow = load_config(model), Layout(tp=2, dp=2, ep=4), formats("fp8")
    found = trace(cfg, layout, "decode", cfg.indexer is not None)
    grid = Grid.of(cfg, layout)
    described = [w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)] + list(outer_weights(cfg))
    size = {w.name: grid.bytes(w, narrow.held(w)) / math.prod(grid.local_shape(w)) for w in described}

    def held(program: object) -> float:
        tensors = {x.weight: x for op in program.ops for x in op.inputs if x.weight}  # type: ignore[attr-defined]
        return sum(x.elements(Sizes(1, 1, 1)) * size[name] for name, x in tensors.items())

    bytes_traced = sum(n * held(found.layers[kind]) for kind, n in cfg.layer_counts.items() if not kind.mtp)
    bytes_traced += held(found.embed) + held(found.head)
    assert sum(stage_weight_bytes(cfg, layout, narrow, 0, False).values()) == pytest.approx(bytes_traced, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "kv", "mtp", "expected"),
    [
        ("glm-5", "bf16", False, 78 * (1152 + 132)),
        ("glm-5", "fp8", False, 61464),
        ("glm-5", "int8", False, 78 * (656 + 130)),
        ("glm-5", "fp8", True, 62252),
        ("glm-5.3-fp8", "fp8", False, 78 * 656 + 21 * 132),
        ("deepseek-v3.2", "fp8", False, 48068),
        ("deepseek-v3", "bf16", False, 61 * 1152),
        ("glm-4.5", "bf16", False, 92 * 2 * 8 * 128 * 2),
    ],
)
def test_cache_bytes_a_token(model: str, kv: str, mtp: bool, expected: int) -> None:
    cfg = load_config(model)
    assert stage_kv_bytes_per_token(cfg, Layout(), formats("fp8", kv), 0, mtp) == expected


def test_latents_are_whole_on_every_rank_and_kv_heads_are_split() -> None:
    glm, gqa = load_config("glm-5"), load_config("glm-4.5")
    fp8 = formats("fp8", "bf16")
    assert stage_kv_bytes_per_token(glm, Layout(tp=8), fp8, 0, False) == 100152
    assert stage_kv_bytes_per_token(gqa, Layout(tp=8), fp8, 0, False) == 92 * 2 * 128 * 2


def spec(model: str = "glm-5-fp8", engine: str = "sglang", kv: str = "bf16", fraction: float | None = None) -> Spec:
    cfg, profile, layout = load_config(model), hw_profiles.load("h200-sxm"), Layout(tp=8)
    settings_ = {} if fraction is None else {"memory_fraction": fraction}
    return spec_for(cfg, profile, layout, "fp8", kv, engine, settings_)


def test_bytes_of_a_measured_prompt() -> None:
    """One stored prompt of 138,496 tokens of GLM-5.3-FP8 took 59,763,793,920 bytes over 8 ranks (recipes PR 893)."""
    per_token = memory(spec("glm-5.3-fp8", "vllm", "fp8")).kv_bytes_per_token
    pool = Ledger(0, 0, {}, 59_763_793_920 / 8, 0, 0, 0, per_token)
    assert pool.pool_tokens == 138_496


def test_pools_of_sglang_on_one_h200_node() -> None:
    """About 0.35 M tokens with no flags, 0.29 M at the benchmark's --mem-fraction-static 0.85."""
    assert 0.31e6 < memory(spec()).pool_tokens < 0.36e6
    assert 0.27e6 < memory(spec(fraction=0.85)).pool_tokens < 0.30e6
    # FlashMLA's record takes 656 bytes a layer; SGLang 0.5.9 counts 576 when it sizes the pool, 0.5.14 what it stores
    for engine, counted in (("sglang@0.5.9", 576), ("sglang@0.5.14", 656)):
        wide, narrow = (memory(spec(kv=kv, fraction=0.85, engine=engine)) for kv in ("bf16", "fp8"))
        assert narrow.kv_bytes_per_token == 61464
        assert narrow.pool_tokens == pytest.approx(wide.pool_tokens * 100152 / (78 * (counted + 132)), rel=1e-4)


@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm", "glm5"])
def test_the_ledger_adds_up(engine: str) -> None:
    held = memory(spec(engine=engine))
    parts = held.weights_total_bytes + held.kv_bytes + held.activation_bytes
    parts += held.communication_bytes + held.runtime_bytes + held.workspace_bytes
    assert parts + held.free_bytes == pytest.approx(held.usable_bytes)
    assert held.free_bytes >= 0 and 94e9 < held.weights_total_bytes < 97e9
    printed = [float(line.split()[-2]) for line in held.lines()]
    assert sum(printed[:-1]) == pytest.approx(printed[-1], abs=0.1)


def ledger(cfg: ModelConfig, layout: Layout, held: Formats, engine: Engine, *sizes: float, mtp: bool = False) -> Ledger:
    """Of the fullest stage. sizes: usable and capacity bytes."""
    return fullest(stage_ledgers(cfg, layout, held, engine, *sizes, mtp=mtp), cfg, layout, engine.page_tokens)


def test_drafting_takes_memory() -> None:
    cfg, layout, narrow = load_config("glm-5-fp8"), Layout(tp=8), formats("fp8")
    engine = load_engine("sglang")
    without, drafting = (ledger(cfg, layout, narrow, engine, 150e9, 151e9, mtp=mtp) for mtp in (False, True))
    assert drafting.weights_bytes["mtp"] > 1e9 and "mtp" not in without.weights_bytes
    assert drafting.pool_tokens < without.pool_tokens


def test_the_fullest_stage_decides() -> None:
    """The last stage of an uneven cut holds fewer layers but the head; the pool is the smallest of the stages."""
    cfg, narrow, engine = load_config("glm-5-fp8"), formats("fp8"), load_engine("sglang")
    found = ledger(cfg, Layout(tp=8, pp=4), narrow, engine, 80e9, 80e9)
    pools = []
    for stage in range(4):
        weights = sum(stage_weight_bytes(cfg, Layout(tp=8, pp=4), narrow, stage, False).values())
        kv = engine.kv_bytes(device_bytes=80e9, weight_bytes=weights, activation_bytes=0, runtime_bytes=0)
        pools.append(kv / stage_kv_bytes_per_token(cfg, Layout(tp=8, pp=4), narrow, stage, False))
    assert found.pool_tokens == int(min(pools))


def test_more_tokens_a_step_need_more_room() -> None:
    cfg = load_config("glm-5")
    sizes = [activation_bytes(cfg, Layout(tp=8), tokens) for tokens in (1, 256, 4096, 32768)]
    assert sizes == sorted(sizes) and sizes[0] > 0


def test_a_model_that_does_not_fit_prints_its_ledger() -> None:
    cfg, engine = load_config("glm-5-fp8"), load_engine("sglang")
    with pytest.raises(CapacityError) as refused:
        ledger(cfg, Layout(tp=4), formats("fp8"), engine, 150e9, 151e9)
    first, *rest = str(refused.value).splitlines()
    assert "does not fit 4 devices" in first and "use more devices" in first
    assert any("weights: experts" in line for line in rest) and rest[-1].startswith("= free")


def test_a_cautious_engine_is_named_where_memory_is_left() -> None:
    """SGLang leaves a quarter of an H200 to DP attention over eight ranks by default."""
    cfg, profile = load_config("glm-5-fp8"), hw_profiles.load("h200-sxm")
    with pytest.raises(
        CapacityError, match="or give the engine more than its 0.77 of it: --set engine.memory_fraction"
    ):
        memory(spec_for(cfg, profile, Layout(1, 8, 8), "fp8"))
    assert memory(spec_for(cfg, profile, Layout(1, 8, 8), "fp8", None, "sglang", {"memory_fraction": 0.85})).pool_tokens
