"""Which weight, op and cache gets which format: the published recipes, the profiles' units, and nothing left out."""

from __future__ import annotations

import pytest

import hw_profiles
from backends.emulation import schemes
from backends.emulation.number_formats import formats_of
from backends.errors import Unsupported
from hw_profiles.fields import WEIGHT_SCHEMES
from model.config import load_config
from model.ops import OPS
from model.quantised import FORMATS, LAYOUTS
from model.weights import layer_weights, outer_weights
from runtime import layout

GLM5 = load_config("glm-5")


def held(scheme: str, mtp: bool = False) -> dict[str, str | None]:
    """Weight name -> format, over every layer type of GLM-5."""
    chosen = schemes.SCHEMES[scheme]
    weights = [w for kind in GLM5.layer_counts if kind.mtp == mtp for w in layer_weights(GLM5, kind)]
    return {w.name: chosen.format_of(w, mtp) for w in (*weights, *outer_weights(GLM5))}


def test_every_op_has_a_rule() -> None:
    assert schemes.OPS.keys() == OPS.keys()


def test_every_format_is_described() -> None:
    assert schemes.ACTIVATIONS.keys() == {*FORMATS, "f32", "bf16"}
    assert LAYOUTS.keys() == FORMATS.keys()
    assert {fmt for s in schemes.SCHEMES.values() for fmt in s.formats} <= schemes.ACTIVATIONS.keys()
    assert set(WEIGHT_SCHEMES) - {"fp16"} <= schemes.ACTIVATIONS.keys()


def test_the_planner_means_the_same() -> None:
    for name, (dense, experts) in layout.SCHEMES.items():
        scheme = schemes.SCHEMES[name]
        assert (scheme.dense, scheme.experts) == (dense, experts)


def test_what_no_release_quantises() -> None:
    never = {"embed", "head", "router", "router_bias", "final_norm", "index_w", "q_a_norm", "index_k_norm"}
    for name in schemes.SCHEMES:
        found = held(name)
        assert all(found[weight] is None for weight in never), name
        assert held(name, mtp=True)["embed_hidden"] is None


def test_msmodelslims_recipes() -> None:
    """lab_practice/glm_5: `*self_attn*` but kv_b_proj, wk and weights_proj; `*mlp*` but the gate; layer 78 left."""
    w4a8 = held("w4a8")
    assert {name for name, fmt in w4a8.items() if fmt == "w4a8"} == {"experts_gate_up", "experts_down"}
    int8 = {"q_a", "q_b", "kv_a", "o", "index_q", "gate_up", "down", "shared_gate_up", "shared_down"}
    assert {name for name, fmt in w4a8.items() if fmt == "w8a8-int8"} == int8
    assert {name for name, fmt in held("w8a8").items() if fmt} == int8 | {"experts_gate_up", "experts_down"}
    assert not any(held("w8a8", mtp=True).values()) and not any(held("w4a8", mtp=True).values())
    mx = held("mxfp4")
    assert (mx["experts_down"], mx["o"], mx["shared_down"], mx["index_k"]) == ("mxfp4", "mxfp8", "mxfp8", None)


def test_the_fp8_release() -> None:
    """GLM-5-FP8: all matrices but embedding, head, router, weights_proj and eh_proj, in the MTP layer too."""
    fp8 = held("fp8")
    assert {fp8[name] for name in ("k_up", "v_up", "index_k", "index_q", "experts_down", "o")} == {"fp8-block"}
    assert held("fp8", mtp=True)["experts_down"] == "fp8-block"


def test_every_profile_has_formats_of_its_own() -> None:
    for name in hw_profiles.names():
        profile = hw_profiles.load(name)
        own = schemes.of_profile(profile)
        assert set(own.formats) <= {*profile.formats.weights, "f32"}
        for scheme in schemes.offered(profile):
            formats_of(GLM5, profile, scheme)


@pytest.mark.parametrize(
    ("profile", "own"),
    [
        ("h200-sxm", "fp8"),
        ("ascend-910c", "w8a8"),
        ("ascend-950dt", "mxfp8"),
        ("b200-sxm", "fp8"),
        ("cpu-host", "bf16"),
    ],
)
def test_a_profiles_own_formats(profile: str, own: str) -> None:
    assert schemes.of_profile(hw_profiles.load(profile)).name == own


@pytest.mark.parametrize(
    ("profile", "formats", "kv", "mentions"),
    [
        ("ascend-910c", "fp8", None, ("ascend-910c", "fp8-block", "w4a8")),
        ("h200-sxm", "nvfp4", None, ("h200-sxm", "nvfp4", "w4a16")),
        ("h200-sxm", "int3", None, ("int3", "fp8")),
        ("h200-sxm", None, "int8", ("h200-sxm", "int8", "fp8")),
        ("ascend-910c", "w4a8", "fp8", ("fp8", "int8")),
        ("ascend-910c", "f32", "int8", ("f32", "int8")),
        ("ascend-910c", "w4a8", "int3", ("int3",)),
    ],
)
def test_units_a_chip_does_not_have(
    profile: str, formats: str | None, kv: str | None, mentions: tuple[str, ...]
) -> None:
    with pytest.raises(Unsupported) as caught:
        formats_of(GLM5, hw_profiles.load(profile), formats, kv)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in mentions)


def test_the_index_cache_goes_with_the_chip() -> None:
    found = {
        (profile, kv): (formats.cache, formats.index)
        for profile, kv in (("h200-sxm", None), ("h200-sxm", "fp8"), ("ascend-910c", None), ("ascend-910c", "int8"))
        for formats in [formats_of(GLM5, hw_profiles.load(profile), None, kv)]
    }
    assert found == {
        ("h200-sxm", None): ("bf16", "fp8"),
        ("h200-sxm", "fp8"): ("fp8", "fp8"),
        ("ascend-910c", None): ("bf16", "bf16"),
        ("ascend-910c", "int8"): ("int8", "int8"),
    }


@pytest.mark.parametrize("model", ["glm-5", "glm-4.7", "glm-4.7-flash"])
@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_the_table_holds_every_matrix_once(model: str, scheme: str) -> None:
    cfg = load_config(model)
    rows = schemes.table(cfg, schemes.SCHEMES[scheme], "bf16", "bf16")
    named = [name for row in rows for name in row.weights]
    matrices = {
        w.name for kind in cfg.layer_counts if not kind.mtp for w in layer_weights(cfg, kind) if len(w.shape) > 1
    }
    assert sorted(named) == sorted({*matrices, "head"})
    assert {row.op for row in rows} <= schemes.OPS.keys()
    assert any(row.op == "glm.index_scores" for row in rows) == (cfg.indexer is not None)
