"""The records of number formats: bytes with their sources, which weight gets which, and that profiles name them."""

from __future__ import annotations

import pytest

from foundation.errors import UsageError
from hw_profiles.fields import KV_FORMATS, WEIGHT_SCHEMES
from model.formats import FORMATS, KV, ROWS, SCHEMES, Scheme, matrix_format, scheme, scheme_of
from model.hf_config import load_config
from model.weights import layer_weights, outer_weights

GLM5 = load_config("glm-5")


def stored(scheme: str, mtp: bool = False) -> dict[str, str | None]:
    """Weight name -> format, over every layer type of GLM-5."""
    chosen = SCHEMES[scheme]
    weights = [w for kind in GLM5.layer_counts if kind.mtp == mtp for w in layer_weights(GLM5, kind)]
    found = {w.name: chosen.stored(w, mtp) for w in (*weights, *outer_weights(GLM5))}
    return {name: fmt.name if fmt.narrow else None for name, fmt in found.items()}


def test_profiles_name_the_records() -> None:
    """hw_profiles stands alone and names formats by hand."""
    assert set(WEIGHT_SCHEMES) | {"f32"} == FORMATS.keys()
    assert set(KV_FORMATS) == set(KV)


def test_every_format_is_in_a_scheme_and_can_be_written() -> None:
    used = {fmt for s in SCHEMES.values() for fmt in s.formats}
    assert FORMATS.keys() - used == {"fp16"}
    assert all(bool(fmt.layouts) == fmt.narrow for fmt in FORMATS.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp8-block", 1 + 4 / 128**2),  # GLM-5-FP8's index: float32 scales [out/128, in/128]
        ("w8a8-int8", 1.0),
        ("w4a8", 0.5),  # msModelSlim glm_5_w4a8.yaml: experts per_channel, no group scales
        ("w4a16", 0.5625),  # Kimi-K2.5's config.json: int4, group_size 32, bfloat16 scales
        ("w4a16-g128", 0.515625),
        ("w4a16-g64", 0.53125),
        ("w4a16-g128-zp", 0.51953125),
        ("w4a16-g32-zp", 0.578125),
        ("w4afp8", 0.515625),  # SGLang w4afp8.py: group_size 128
        ("mxfp8", 1 + 1 / 32),  # OCP Microscaling 1.0: a byte for 32
        ("mxfp4", 0.5 + 1 / 32),
        ("nvfp4", 0.5 + 1 / 16),  # compressed-tensors: an e4m3 scale for 16
    ],
)
def test_bytes_a_weight(name: str, expected: float) -> None:
    assert matrix_format(name).bytes_per_element == expected


def test_names() -> None:
    assert scheme("w4a8") == Scheme("w4a8", "w8a8-int8", "w4a8")
    assert scheme("w4a16-g32") == SCHEMES["w4a16"] and scheme("w4a16-g64").experts == "w4a16-g64"
    assert scheme("fp8-block") == SCHEMES["fp8"] and scheme("bf16/w4a16-g64").name == "w4a16-g64"
    assert scheme("fp8-block/w4afp8-g64").name == "w4afp8-g64" and scheme("fp8-block/nvfp4").name == "fp8-block/nvfp4"
    for name in SCHEMES:
        assert scheme(name).name == name == scheme_of(*(scheme(name).dense, scheme(name).experts)).name
    for unknown in ("int3", "fp8-g64", "w4a8-g128", "w4a16-g0", "w4a16-g", "fp8/", "bf16/int3", "a/b/c", ""):
        with pytest.raises(UsageError, match="unknown"):
            scheme(unknown)


def test_a_models_own_formats() -> None:
    own = [load_config(m).stored_scheme.name for m in ("glm-5", "glm-5-fp8", "kimi-k2.5")]
    assert own == ["bf16", "fp8", "w4a16"]
    assert [load_config(m).sparse for m in ("glm-5", "deepseek-v3", "glm-4.5")] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "width", "rope", "expected"),
    [
        ("bf16", 576, 64, 1152),
        ("fp8", 576, 64, 576),  # SGLang calculate_mla_kv_cache_dim: kv_lora_rank + rope, one byte each
        ("fp8_ds_mla", 576, 64, 656),  # FlashMLA: 512 + 4 x 4 + 64 x 2
        ("int8_packed", 576, 64, 656),  # vllm-ascend sfa_v1: 528 + 2 x rope
        ("fp8_scaled", 128, 0, 132),  # an index key and its float32 scale
        ("int8_scaled", 128, 0, 130),  # and a float16 one on Ascend
        ("bf16", 128, 0, 256),
    ],
)
def test_bytes_a_row(name: str, width: int, rope: int, expected: int) -> None:
    assert ROWS[name].bytes(width, rope) == expected


def test_what_no_release_quantises() -> None:
    never = {"embed", "head", "router", "router_bias", "final_norm", "index_w", "q_a_norm", "index_k_norm"}
    for name in SCHEMES:
        found = stored(name)
        assert all(found[weight] is None for weight in never), name
        assert stored(name, mtp=True)["embed_hidden"] is None


def test_msmodelslims_recipes() -> None:
    """lab_practice/glm_5: `*self_attn*` but kv_b_proj, wk and weights_proj; `*mlp*` but the gate; layer 78 left."""
    w4a8 = stored("w4a8")
    assert {name for name, fmt in w4a8.items() if fmt == "w4a8"} == {"experts_gate_up", "experts_down"}
    int8 = {"q_a", "q_b", "kv_a", "o", "index_q", "gate_up", "down", "shared_gate_up", "shared_down"}
    assert {name for name, fmt in w4a8.items() if fmt == "w8a8-int8"} == int8
    assert {name for name, fmt in stored("w8a8").items() if fmt} == int8 | {"experts_gate_up", "experts_down"}
    assert not any(stored("w8a8", mtp=True).values()) and not any(stored("w4a8", mtp=True).values())
    mx = stored("mxfp4")
    assert (mx["experts_down"], mx["o"], mx["shared_down"], mx["index_k"]) == ("mxfp4", "mxfp8", "mxfp8", None)


def test_the_fp8_release() -> None:
    """GLM-5-FP8: all matrices but embedding, head, router, weights_proj and eh_proj, in the MTP layer too."""
    fp8 = stored("fp8")
    assert {fp8[name] for name in ("k_up", "v_up", "index_k", "index_q", "experts_down", "o")} == {"fp8-block"}
    assert stored("fp8", mtp=True)["experts_down"] == "fp8-block"


def test_what_is_wide_on_a_device_whatever_the_scheme() -> None:
    """Router, norms, biases, embedding and head in 16 bits or more; the halves of kv_b_proj too, once loaded."""
    for name, each in SCHEMES.items():
        wide = {w.name for kind in GLM5.layer_counts for w in layer_weights(GLM5, kind) if not each.held(w).narrow}
        assert {"router", "router_bias", "k_up", "v_up", "input_norm", "index_w"} <= wide, name
        assert name in ("f32", "bf16") or "experts_down" not in wide


def test_every_exception_says_who_makes_it() -> None:
    for fmt in FORMATS.values():
        assert fmt.left_wide.keys() <= {"kv_up", "index_key", "mtp"} and all(fmt.left_wide.values())
