"""Layouts: what goes together, what divides, and that the shares of a weight make the whole."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import UsageError
from model.config import load_config, preset_names
from model.weights import layer_weights, outer_weights
from runtime.layout import Formats, Layout, checkpoint_scheme, formats, is_sparse

POWERS = st.sampled_from((1, 2, 4, 8))


@given(model=st.sampled_from(preset_names()), tp=POWERS, dp=POWERS, pp=st.integers(1, 6), split=st.booleans())
def test_shares_make_the_whole(model: str, tp: int, dp: int, pp: int, split: bool) -> None:
    """Over a stage's devices: a routed weight is held once, any other tp-split weight dp times, the rest everywhere."""
    cfg, layout = load_config(model), Layout(tp, dp, tp * dp if split else 1, pp)
    try:
        layout.check(cfg)
    except UsageError:
        return
    for weight in (w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)):
        local, full = math.prod(layout.local_shape(weight)), weight.size
        if weight.expert_count:
            copies = 1
        elif any(axis in ("heads", "kv_heads", "vocab", "ffn") for axis in weight.axes):
            copies = dp
        else:
            copies = tp * dp
        assert local * layout.stage_devices == full * copies, weight.name
    for weight in outer_weights(cfg):
        assert math.prod(layout.local_shape(weight)) * tp in (weight.size, weight.size * tp)


@given(layers=st.integers(1, 100), pp=st.integers(1, 100))
def test_stages_partition_the_layers(layers: int, pp: int) -> None:
    if pp > layers:
        return
    stages = Layout(pp=pp).stage_layers(layers)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    sizes = [len(stage) for stage in stages]
    assert len(stages) == pp and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tp": 0}, "tp must be at least 1"),
        ({"dp": -1}, "dp must be at least 1"),
        ({"tp": 4, "dp": 2, "ep": 4}, "tp x dp = 4 x 2 = 8"),
        ({"ep": 2}, "tp x dp = 1 x 1 = 1"),
    ],
)
def test_degrees_that_do_not_go_together(degrees: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        Layout(**degrees)


@pytest.mark.parametrize(
    ("model", "layout", "equation"),
    [
        ("glm-5", Layout(tp=7), "attention heads / tp = 64 / 7 = 9.143"),
        ("glm-4.7-flash", Layout(tp=8), "attention heads / tp = 20 / 8 = 2.500"),
        ("glm-4.5", Layout(tp=16), "KV heads / tp = 8 / 16 = 0.500"),
        ("glm-4.5", Layout(dp=3, ep=3), "experts / ep = 160 / 3 = 53.333"),
        ("glm-5", Layout(dp=3), "expert width / tp x dp = 2048 / 3 = 682.667"),
        ("glm-5", Layout(pp=79), "78 layers cannot be cut into pp = 79"),
    ],
)
def test_the_equation_is_printed(model: str, layout: Layout, equation: str) -> None:
    with pytest.raises(UsageError) as refused:
        layout.check(load_config(model))
    assert equation in str(refused.value) and "\n" not in str(refused.value)


def test_schemes() -> None:
    assert formats("w4a8") == Formats("w8a8-int8", "w4a8", "bf16")
    assert formats("fp8", "fp8").cache == "fp8" and formats("bf16").cache == "bf16_kv_fp8_index"
    assert [checkpoint_scheme(load_config(m)) for m in ("glm-5", "glm-5-fp8", "kimi-k2.5")] == ["bf16", "fp8", "w4a16"]
    assert [is_sparse(load_config(m)) for m in ("glm-5", "deepseek-v3", "glm-4.5")] == [True, False, False]
    for unknown in (("int3", "bf16"), ("fp8", "fp5")):
        with pytest.raises(UsageError, match="unknown"):
            formats(*unknown)


def test_what_stays_wide_whatever_the_scheme() -> None:
    """Router, norms, biases, embedding and head in 16 bits or more; the halves of kv_b_proj too, once loaded."""
    cfg, narrow = load_config("glm-5-fp8"), formats("w4a8")
    wide = {w.name for kind in cfg.layer_counts for w in layer_weights(cfg, kind) if narrow.weight_bytes(w) >= 2}
    assert {"router", "router_bias", "k_up", "v_up", "input_norm", "index_w"} <= wide
    assert not wide & {"experts_gate_up", "experts_down", "q_a", "q_b", "kv_a", "o", "index_q", "index_k"}
