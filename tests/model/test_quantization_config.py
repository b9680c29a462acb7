"""What a config says of its number formats: a scheme where there is one, words where the weights can be read and no
scheme has their activations, or one line."""

from __future__ import annotations

from typing import Any

import pytest

from foundation.errors import UsageError
from model.errors import ConfigError
from model.hf_config import from_hf
from tests.model.test_config import raw_preset


def args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def quantization(*held: tuple[dict[str, Any], Any], ignore: Any = ("lm_head",), targets: Any = ("Linear",)) -> Any:
    made = {
        f"group_{i}": {"targets": list(targets), "weights": one, "input_activations": acts}
        for i, (one, acts) in enumerate(held)
    }
    return {"quant_method": "compressed-tensors", "config_groups": made, "ignore": list(ignore)}


def fine_grained(*left: str) -> Any:
    return {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": list(left)}


INT4, FP8_ROW, INT8_ROW = (
    args(4, "int", "group", group_size=128), args(8, "float", "channel"), args(8, "int", "channel"),
)  # fmt: skip
FP8_ACTS, INT8_ACTS = (args(8, kind, "token", dynamic=True) for kind in ("float", "int"))
BLOCKS, MXFP4 = args(8, "float", "block", block_structure=[128, 128]), args(4, "float", "group", group_size=32)
NVFP4 = args(4, "float", "tensor_group", group_size=16)
ATTENTION = "re:.*self_attn.*"


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (quantization((FP8_ROW, FP8_ACTS)), "fp8-channel"),
        (quantization((FP8_ROW, None)), "fp8-channel with 16-bit activations"),
        (quantization((INT8_ROW, INT8_ACTS)), "w8a8"),
        (quantization((INT8_ROW, None)), "w8a8-int8 with 16-bit activations"),
        (quantization((BLOCKS, None)), "fp8-block with 16-bit activations"),
        (quantization((MXFP4, None)), "mxfp4 with 16-bit activations"),
        (quantization((MXFP4, MXFP4)), "mxfp4/mxfp4"),
        (quantization((MXFP4, FP8_ACTS)), "mxfp4 with 8-bit float activations"),
        (quantization((NVFP4, NVFP4), ignore=[ATTENTION]), "nvfp4"),
        (quantization((NVFP4, None), ignore=[ATTENTION]), "nvfp4a16"),
        (quantization((NVFP4, FP8_ACTS)), "nvfp4 with 8-bit float activations"),
        (quantization((args(4, "int", "channel"), None)), "w4a8 with 16-bit activations"),
        (quantization((args(4, "int", "channel") | {"symmetric": False}, None)), "w4a8 with zero points"),
        (quantization((INT4, INT8_ACTS)), "w4a16-g128 with 8-bit int activations"),
        # what is left wide, by role or name by name
        (quantization((INT4, None), ignore=[ATTENTION, "lm_head"]), "w4a16-g128"),
        (quantization((FP8_ROW, FP8_ACTS), ignore=["re:.*mlp.experts.*"]), "fp8-channel/bf16"),
        (quantization((FP8_ROW, FP8_ACTS), ignore=[f"model.layers.{i}.self_attn.o_proj" for i in range(78)]),
         "bf16/fp8-channel"),
        (quantization((INT4, None), ignore=[ATTENTION, "re:model.layers.(0|3|77)[.]"]), "w4a16-g128"),
        (quantization((INT4, None), targets=["re:.*mlp.experts.*"]), "w4a16-g128"),
        (fine_grained("self_attn.o_proj"), "bf16/fp8-block"),
        (fine_grained("model.*mlp.experts"), "fp8-block/bf16"),
        (fine_grained("lm_head", "model.layers.3", "model.layers.7.self_attn"), "fp8-block"),
        # zero points of 4 bits, and an order that calibration alone saw, are read
        (quantization((INT4 | {"symmetric": False}, None), ignore=[ATTENTION]), "w4a16-g128-zp"),
        (quantization((INT4 | {"symmetric": False, "group_size": 32}, None), ignore=[ATTENTION]), "w4a16-g32-zp"),
        (quantization((INT4 | {"symmetric": None}, None), ignore=[ATTENTION]), "w4a16-g128"),
        (quantization((INT4 | {"actorder": "weight"}, None), ignore=[ATTENTION]), "w4a16-g128"),
        (quantization((INT4 | {"strategy": None}, None), ignore=[ATTENTION]), "w4a16-g128"),
    ],
)  # fmt: skip
def test_the_formats_that_a_config_describes(quant: Any, name: str) -> None:
    cfg = from_hf({**raw_preset("glm-5"), "quantization_config": quant})
    assert cfg.weight_format == name
    if " " in name:
        with pytest.raises(UsageError, match="no scheme") as error:
            cfg.stored_scheme  # noqa: B018
        assert "\n" not in str(error.value) and "--formats" in str(error.value)
    else:
        assert cfg.stored_scheme.name in (name, "fp8")


@pytest.mark.parametrize(
    ("quant", "mention"),
    [
        (quantization((INT4 | {"actorder": "group"}, None)), "actorder"),
        (quantization((INT4 | {"actorder": True}, None)), "actorder"),
        (quantization((INT8_ROW | {"symmetric": False}, INT8_ACTS)), "symmetric"),
        (quantization((args(3, "int", "group", group_size=128), None)), "3-bit int"),
        (quantization((INT4 | {"group_size": None}, None)), "groups of None"),
        ({**fine_grained(), "modules_to_not_convert": "all"}, "not a list"),
        ({**fine_grained(), "weight_block_size": "a\nb\x1b[31m"}, "a\\nb\\x1b[31m"),
        (quantization((INT4 | {"num_bits": "4\r\n"}, None)), "4\\r\\n-bit"),
    ],
)
def test_formats_that_cannot_be_read_are_named(quant: Any, mention: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf({**raw_preset("glm-5"), "quantization_config": quant})
    assert mention in str(error.value) and "\n" not in str(error.value)


def test_named_targets_come_before_linear() -> None:
    """In whatever order the groups stand, as compressed-tensors and vLLM match them."""
    quant = quantization((INT8_ROW, INT8_ACTS), (INT4, None))
    quant["config_groups"]["group_1"]["targets"] = ["re:.*mlp.experts.*"]
    assert from_hf({**raw_preset("glm-5"), "quantization_config": quant}).weight_format == "w8a8-int8/w4a16-g128"


# --- AWQ and GPTQ ----------------------------------------------------------------------------------

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False, "lm_head": False}


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (AWQ | {"modules_to_not_convert": ["self_attn", "shared_experts"]}, "w4a16-g128-zp"),
        (AWQ, "w4a16-g128-zp/w4a16-g128-zp"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "modules_to_not_convert": ["attn"]}, "w4a16-g32-zp"),
        (AWQ | {"group_size": -1}, "w4a8 with zero points"),
        (GPTQ | {"dynamic": {"-:.*self_attn.*": {}}}, "w4a16-g64"),
        (GPTQ | {"sym": False, "modules_in_block_to_quantize": [["experts"], ["lm"]]}, "w4a16-g64-zp"),
        (GPTQ | {"group_size": -1, "checkpoint_format": "gptq"}, "w4a8 with 16-bit activations"),
    ],
)
def test_awq_and_gptq(quant: Any, name: str) -> None:
    assert from_hf({**raw_preset("glm-5"), "quantization_config": quant}).weight_format == name


@pytest.mark.parametrize(
    ("quant", "mention"),
    [
        (AWQ | {"bits": 8}, "8 bits"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (AWQ | {"group_size": "a\n"}, "groups of a\\n"),
        (GPTQ | {"desc_act": True}, "desc_act True"),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2'"),
        (GPTQ | {"dynamic": {"+:.*experts.*": {"bits": 8}}}, "dynamic"),
        (GPTQ | {"dynamic": 5}, "not an object"),
        (GPTQ | {"modules_in_block_to_quantize": "all"}, "not a list"),
    ],
)
def test_awq_and_gptq_that_cannot_be_read(quant: Any, mention: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf({**raw_preset("glm-5"), "quantization_config": quant})
    assert mention in str(error.value) and "\n" not in str(error.value)


# --- modelopt --------------------------------------------------------------------------------------


def modelopt(algorithm: str | None, *ignore: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": list(ignore), **more}


MIXED = {
    f"model.layers.{layer}.{module}": {"quant_algo": algorithm}
    for layer in range(78)
    for module, algorithm in (("self_attn.o_proj", "FP8"), ("mlp.experts", "nvfp4"))
}


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (modelopt("NVFP4", "lm_head", "model.layers.*.self_attn*"), "nvfp4"),
        (modelopt("NVFP4", "lm_head"), "nvfp4/nvfp4"),
        (modelopt("W4A16_NVFP4", "self_attn"), "nvfp4a16"),
        (modelopt("FP8"), "fp8-tensor"),
        (modelopt("fp8_pb_wo"), "fp8-block"),
        (modelopt("FP8_PER_CHANNEL_PER_TOKEN", "*.mlp.experts.*"), "fp8-channel/bf16"),
        (modelopt("MXFP8"), "mxfp8"),
        (modelopt("MIXED_PRECISION", quantized_layers=MIXED), "fp8-tensor/nvfp4"),
        # as hf_quant_config.json has it
        ({"quant_method": "modelopt", "producer": {"name": "modelopt"}, "quantization":
            {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["model.layers.*.self_attn*"]}}, "nvfp4"),
    ],
)  # fmt: skip
def test_modelopt(quant: dict[str, Any], name: str) -> None:
    assert from_hf({**raw_preset("glm-5"), "quantization_config": quant}).weight_format == name


@pytest.mark.parametrize(
    ("quant", "mentions"),
    [
        (modelopt("NVFP4_AWQ"), "quant_algo 'NVFP4_AWQ'"),
        (modelopt(None), "quant_algo None"),
        (modelopt("MIXED_PRECISION"), "quantized_layers"),
        (modelopt("MIXED_PRECISION", quantized_layers={"model": {}}), "quant_algo None"),
        ({"quant_method": "modelopt", "quantization": "NVFP4"}, "not an object"),
        (modelopt("FP8") | {"ignore": "lm_head"}, "not a list"),
    ],
)
def test_what_modelopt_says_and_is_not_read(quant: dict[str, Any], mentions: str) -> None:
    with pytest.raises(ConfigError, match=mentions):
        from_hf({**raw_preset("glm-5"), "quantization_config": quant})


WORDS = "(\\w+\\.?)+x$"


@pytest.mark.parametrize(
    "quant",
    [
        quantization((INT4, None), ignore=[f"re:{WORDS}"]),
        quantization((INT4, None), targets=[f"re:{WORDS}"]),
        quantization((INT4, None), ignore=["re:" + 12 * ".*a" + "$"]),
        quantization((INT4, None), ignore=["re:(?!(.*a|.*b|.*c){20}x)"]),
        quantization((INT4, None), ignore=[f"re:.*{i}.*.*.*x" for i in range(99)]),
        quantization((INT4, None), ignore=["re:a{1,9}" * 40_000]),
        fine_grained("(\\w+\\.?)+x"),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"-:{WORDS}": {}}},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": [f"*{i:099}*" for i in range(9_999)]},
    ],
)
def test_patterns_that_would_take_long_are_refused(quant: Any) -> None:
    """Python's matcher goes all ways through a name, and cannot be stopped."""
    with pytest.raises(ConfigError, match="with the pattern .*(too many ways|beyond the)"):
        from_hf({**raw_preset("glm-5"), "quantization_config": quant})


def test_patterns_of_real_checkpoints_are_taken() -> None:
    ignore = [
        "re:.*lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:model\\.layers\\.(\\d|[1-5]\\d)\\.self_attn.*",
        "re:.*layers\\.(3|4)\\..*experts\\.(\\d+)\\.(gate|up|gate_up|down)_proj.*", "re:^(?!.*experts).*$",
    ]  # fmt: skip
    quant = quantization((INT4, None), ignore=ignore)
    assert from_hf({**raw_preset("glm-5"), "quantization_config": quant}).weight_format == "w4a16-g128"
