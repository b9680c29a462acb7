"""How a model is spread: what goes together, what divides, and that the shares of a weight, a cache row and the experts
make the whole."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import UsageError
from model.cache import cache_rows
from model.formats import FORMATS, FP8_BLOCK
from model.hf_config import load_config, preset_names
from model.split import Grid, Layout, Slots, scale_shape, share_bytes
from model.weights import Arrangement, Weight, layer_weights, outer_weights

POWERS = st.sampled_from((1, 2, 4, 8))


def spread(tp: int, dp: int, part: int, pp: int = 1) -> Layout:
    """Expert groups from 1 to tp x dp: by tensor, by expert, and between."""
    return Layout(tp, dp, min(part, tp * dp), pp)


PARTS = st.sampled_from((1, 2, 4, 8, 16, 64))


@given(model=st.sampled_from(preset_names()), tp=POWERS, dp=POWERS, pp=st.integers(1, 6), part=PARTS)
def test_shares_make_the_whole(model: str, tp: int, dp: int, pp: int, part: int) -> None:
    """Over a stage's devices: a routed weight is held once, any other tp-split weight dp times, the rest everywhere."""
    cfg, layout = load_config(model), spread(tp, dp, part, pp)
    try:
        layout.check(cfg)
    except UsageError:
        return
    for weight in (w for kind in cfg.layer_counts for w in layer_weights(cfg, kind)):
        local, full = math.prod(layout.local_shape(weight)), weight.size
        if weight.expert_count:
            copies = 1
            if layout.by_expert:  # a group holds its experts, whole over its devices
                assert layout.local_shape(weight)[0] == weight.expert_count // layout.ep
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
        ({"tp": 4, "dp": 2, "ep": 3}, "ep must divide tp x dp = 4 x 2 = 8"),
        ({"tp": 4, "ep": 8}, "ep must divide tp x dp = 4 x 1 = 4"),
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
        ("glm-4.5", Layout(tp=12), "KV heads / tp = 8 / 12 = 0.667"),
        ("glm-4.5", Layout(dp=3, ep=3), "experts / ep = 160 / 3 = 53.333"),
        ("glm-5", Layout(dp=3), "expert width / tp x dp = 2048 / 3 = 682.667"),
        ("glm-5", Layout(dp=6, ep=2), "expert width / tp x dp / ep = 2048 / 3 = 682.667"),
        ("glm-5", Layout(pp=79), "78 layers cannot be cut into pp = 79"),
    ],
)
def test_the_equation_is_printed(model: str, layout: Layout, equation: str) -> None:
    with pytest.raises(UsageError) as refused:
        layout.check(load_config(model))
    assert equation in str(refused.value) and "\n" not in str(refused.value)


@given(model=st.sampled_from(preset_names()), tp=POWERS, dp=POWERS)
def test_cache_rows_are_whole_or_split_by_heads(model: str, tp: int, dp: int) -> None:
    """Latents and index keys lie whole on every tp rank, KV heads once over all of them."""
    cfg, layout = load_config(model), Layout(tp, dp)
    try:
        layout.check(cfg)
    except UsageError:
        return
    for row in (row for kind in cfg.layer_counts for row in cache_rows(cfg, kind)):
        copies = tp if row.name in ("latent", "index") else 1
        assert math.prod(layout.local_row(row)) * tp == row.width * copies
        assert layout.row_copies(row) == copies


@given(tp=POWERS, dp=POWERS, pp=st.integers(1, 4), part=PARTS)
def test_places_are_all_devices_in_order(tp: int, dp: int, pp: int, part: int) -> None:
    layout = spread(tp, dp, part, pp)
    places = list(layout.places())
    assert [place.index for place in places] == list(range(layout.devices))
    assert [(p.stage * dp + p.dp) * tp + p.tp for p in places] == list(range(layout.devices))
    for p in places:  # neighbours are a group
        assert p.ep == (p.dp * tp + p.tp) * layout.ep // (tp * dp)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].narrow])
@given(parts=st.sampled_from((1, 2, 3, 4, 8, 16)), width=st.integers(1, 40), out=st.integers(1, 300), dim=st.booleans())
def test_scales_of_shares(name: str, parts: int, width: int, out: int, dim: bool) -> None:
    """Shares of a cut matrix have the scales that their own elements need: as many in all as the whole has where no
    block is cut, and never fewer."""
    fmt = FORMATS[name]
    whole = (width * 48, out) if dim else (width, out * 48)
    weight = Weight("w", whole, (None, None), (), Arrangement.MATRIX, "attention", quantised=True)
    at = 0 if dim else 1
    local = tuple(size // parts if axis == at else size for axis, size in enumerate(whole))
    full = scale_shape(weight, fmt, whole)
    found = scale_shape(weight, fmt, local, at, parts)
    assert found[1 - at] == full[1 - at]
    per_scale = {"block": FP8_BLOCK, "tensor": whole[at], "row": whole[0] if dim else 1}.get(str(fmt.shared))
    per_scale = per_scale or (int(fmt.shared or 1) if dim else 1)
    if per_scale >= whole[at]:
        assert found[at] == 1
    elif local[at] % per_scale == 0:
        assert found[at] * parts == full[at]
    elif parts > 1:
        assert local[at] % found[at] == 0 and per_scale % (local[at] // found[at]) == 0
    assert share_bytes(weight, fmt, local, at, parts) * parts >= share_bytes(weight, fmt, whole) * 0.999


def test_experts_in_groups_are_no_array_of_a_mesh() -> None:
    """What holds arrays (emulated devices, processes, exports) refuses them in one line."""
    with pytest.raises(UsageError, match=r"tp8 dp1 ep4 pp1: .*simulated alone.*take ep 1 or 8") as refused:
        Grid.of(load_config("glm-5"), Layout(tp=8, ep=4))
    assert "\n" not in str(refused.value)


def test_a_plan_that_leaves_an_expert_out_is_refused() -> None:
    with pytest.raises(UsageError, match="expert 1 of MoE layer 0 is in no slot"):
        Slots(2, ((0, 0),)).table(0, 2)
