"""`glm5 quantize`: what is written is what the ecosystem reads, and what we read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import hw_profiles
from model.checkpoint import Checkpoint, groups, stored_shape
from model.formats import BF16, E4M3, FORMATS, INT4, SCHEMES, CheckpointLayout, matrix_format, scheme
from model.quantised import Matrix, dequantise, quantise
from model.safetensors_file import write
from model.spelling import spell
from model.weights import Quantized
from runtime.porting.quantize import compressed_tensors_config, layout_of
from tests.cli.cli import glm5, make_checkpoint, refused


def layouts(name: str) -> list[str]:
    """Those that can hold both formats of a scheme."""
    formats = [fmt for fmt in map(matrix_format, scheme(name).formats) if fmt.narrow]
    return [
        layout for layout in get_args(CheckpointLayout) if formats and all(layout in fmt.layouts for fmt in formats)
    ]


slow = pytest.mark.slow
WRITTEN = [(name, layout) for name in [*SCHEMES, "w4a16-g16"] for layout in layouts(name)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "source"
    make_checkpoint(path, hidden_size=128, moe_intermediate_size=128)  # the largest group that a format has
    return path


def quantize(source: Path, out: Path, formats: str, layout: str) -> dict[str, Any]:
    return glm5(
        "quantize", "--checkpoint", source, "--formats", formats, "--layout", layout, "--out", out, "--json"
    ).json


@pytest.mark.parametrize(("formats", "layout"), WRITTEN)
def test_round_trip(source: Path, tmp_path: Path, formats: str, layout: str) -> None:
    """Every matrix is what rounding the source's gives, every other tensor the source's own; twice changes nothing."""
    result = quantize(source, tmp_path / "out", formats, layout)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    counted: dict[str, int] = {}
    for place, found in groups(before.config, True).items():
        for group in found:
            for weight in group.weights:
                fmt = scheme(formats).stored(weight, place == "mtp")
                for name in group.tensors(weight):
                    held = after.spelling(name, stored_shape(after.config, weight))
                    assert held.format.stored_as(fmt) if held else not fmt.narrow, name
                    wanted = dequantise(quantise(fmt, before.plain(name))) if fmt.narrow else before.plain(name)
                    np.testing.assert_array_equal(after.plain(name), wanted)
                    if fmt.narrow and weight.name != "v_up":  # kv_b_proj makes two weights
                        counted[fmt.name] = counted.get(fmt.name, 0) + 1
    assert (result["matrices"], result["kept_from_source"]) == (counted, 0)
    assert result["bytes"] < result["source_bytes"]
    assert all((tmp_path / "out" / name).exists() for name in ("tokenizer.json", "chat_template.jinja"))
    again = quantize(tmp_path / "out", tmp_path / "again", formats, layout)
    assert again["kept_from_source"] == sum(counted.values())
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    twice = Checkpoint(tmp_path / "again")
    for name in after.tensor_names:
        np.testing.assert_array_equal(twice.array(name).view(np.uint8), after.array(name).view(np.uint8))


@pytest.mark.parametrize(
    ("formats", "layout"),
    [pytest.param(*each, marks=() if each == ("w4a8", "msmodelslim") else slow) for each in WRITTEN],
)
def test_it_can_be_planned(source: Path, tmp_path: Path, formats: str, layout: str) -> None:
    """In a format that the chip computes in and that is none narrower than what is stored."""
    quantize(source, tmp_path / "out", formats, layout)
    load = ("--isl", 64, "--osl", 16, "--concurrency", 2, "--devices", 1)
    for profile in ("h200-sxm", "ascend-910c-die"):
        plan = glm5("plan", "--model", tmp_path / "out", "--profile", profile, *load, "--json").json
        planned, stored = plan["formats"]["experts"], Checkpoint(tmp_path / "out").config.stored_scheme.experts
        assert matrix_format(planned).base in hw_profiles.load(profile).formats.weights
        assert matrix_format(planned).bits >= matrix_format(stored).bits


def test_kept_quantised(source: Path, tmp_path: Path) -> None:
    """Loaded as stored, experts stacked, gate and up side by side, 4-bit values in bytes."""
    quantize(source, tmp_path / "out", "w4a8", "msmodelslim")
    opened = Checkpoint(tmp_path / "out")
    assert opened.config.weight_format == "w4a8"
    held, plain = opened.load(keep_fp8=True)["layers"][1], opened.load()["layers"][1]
    experts = held["experts_gate_up"]
    assert isinstance(experts, Quantized)
    assert (experts.values.shape, experts.scale.shape) == ((4, 128, 2, 128), (4, 1, 2, 128))
    assert experts.values.dtype == np.int8 and np.abs(experts.values).max() <= 8
    np.testing.assert_array_equal(experts.values.astype(np.float32) * experts.scale, plain["experts_gate_up"])


@pytest.mark.parametrize(
    "formats", ["fp8", "fp8-channel", "w8a8", "w4a8", "w4a16", "w4a16-g16", "w4afp8", "mxfp8", "mxfp4", "nvfp4"]
)
def test_compressed_tensors_reads_it(source: Path, tmp_path: Path, formats: str) -> None:
    """The library's own decompressors give the weights that we read; its own schema takes the config."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantize(source, tmp_path / "out", formats, "compressed-tensors")
    opened = Checkpoint(tmp_path / "out")
    config = opened.raw_config["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    layout, scheme = next((g["format"], parsed.config_groups[k]) for k, g in config["config_groups"].items() if any(
        t == "Linear" or t.startswith("re:.*mlp") for t in g["targets"]))  # fmt: skip
    state = {}
    for suffix in ("", "_packed", "_scale", "_shape", "_global_scale"):
        if name + suffix in opened.tensor_names:
            array = opened.array(name + suffix)
            narrow = {E4M3: torch.float8_e4m3fn, BF16: torch.bfloat16}.get(array.dtype)
            tensor = torch.from_numpy(np.array(array.view(np.uint8) if narrow == torch.float8_e4m3fn else
                                               array.view(np.uint16) if narrow else array))  # fmt: skip
            state["weight" + suffix] = tensor.view(narrow) if narrow else tensor
    found = BaseCompressor.get_value_from_registry(layout).decompress(state, scheme)["weight"]
    # the library multiplies in the scale's own type: bfloat16 for the MX and the grouped formats
    np.testing.assert_allclose(found.float().numpy(), opened.plain(name), rtol=2**-7, atol=1e-7)


def test_msmodelslims_packing_by_hand() -> None:
    """`w4a8_pack_int4`: rows 2i and 2i+1 of a column in a byte, the even row low; scale_bias: 8 x row sums."""
    values = np.array([[1, -1], [-8, 7], [2, 3], [0, -2]]).astype(np.int8).astype(INT4)
    scale = np.array([[0.5], [1.0], [2.0], [4.0]], np.float32)
    stored = spell("mlp.experts.0.up_proj.weight", FORMATS["w4a8"], "msmodelslim", Matrix(values, scale))
    assert stored["mlp.experts.0.up_proj.weight"].view(np.uint8).tolist() == [[0x81, 0x7F], [0x02, 0xE3]]
    assert stored["mlp.experts.0.up_proj.scale_bias"].tolist() == [[0.0], [-8.0], [80.0], [-64.0]]
    assert not stored["mlp.experts.0.up_proj.weight_offset"].any()


def test_the_description_names_every_tensor(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "w4a8", "msmodelslim")
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert described.keys() - {"version", "model_quant_type", "group_size", "metadata", "optional"} == set(
        Checkpoint(tmp_path / "out").tensor_names
    )
    assert described["model.layers.1.mlp.experts.0.up_proj.weight"] == "W4A8_DYNAMIC"
    assert described["model.layers.1.self_attn.o_proj.weight_scale"] == "W8A8_DYNAMIC"
    assert described["model.layers.1.self_attn.kv_b_proj.weight"] == "FLOAT"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_pattern_is_for_experts_and_linear_for_the_rest() -> None:
    """A pattern comes first where both match; one for all the rest would match norms and the embedding too."""
    import re

    config = compressed_tensors_config(SCHEMES["w4a8"], ["lm_head"])
    (experts,), dense = (group["targets"] for group in config["config_groups"].values())
    pattern = re.compile(experts.removeprefix("re:"))
    assert pattern.match("model.layers.3.mlp.experts.1.up_proj")
    assert not any(map(pattern.match, ("model.layers.3.mlp.shared_experts.up_proj", "model.layers.3.self_attn.o_proj")))
    assert dense == ["Linear"] and config["format"] == "mixed-precision" and config["ignore"] == ["lm_head"]


def test_a_profile_chooses(source: Path, tmp_path: Path) -> None:
    result = glm5(
        "quantize", "--checkpoint", source, "--profile", "ascend-910c", "--out", tmp_path / "out", "--json"
    ).json
    assert (result["formats"], result["layout"]) == ("w8a8", "compressed-tensors")
    plain = glm5("quantize", "--checkpoint", tmp_path / "out", "--formats", "bf16", "--out", tmp_path / "wide").out
    assert "plain" in plain and Checkpoint(tmp_path / "wide").config.weight_format == "plain"


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        ((), ("--formats", "--profile")),
        (("--formats", "int3"), ("int3", "w8a8")),
        (("--formats", "f32"), ("f32",)),
        (("--formats", "fp8", "--profile", "ascend-910c"), ("ascend-910c", "fp8-block", "w8a8")),
        (("--formats", "fp8", "--layout", "msmodelslim"), ("deepseek", "msmodelslim")),
        (("--formats", "bf16", "--layout", "msmodelslim"), ("--layout",)),
        (("--formats", "w8a8", "--profile", "no-such"), ("no-such",)),
        (("--formats", "w8a8", "--checkpoint", "/nowhere"), ("/nowhere",)),
    ],
)
def test_refusals(source: Path, tmp_path: Path, options: tuple[str, ...], mentions: tuple[str, ...]) -> None:
    words = options if "--checkpoint" in options else ("--checkpoint", str(source), *options)
    line = refused("quantize", *words, "--out", tmp_path / "out")
    assert all(word in line for word in mentions), line
    assert not list(tmp_path.iterdir())


SOURCES = ("fp8", "fp8-channel", "w4a16-g128", "w8a8", "mxfp4", "nvfp4")


def held_of(path: Path) -> dict[str, np.ndarray]:
    opened = Checkpoint(path)
    return {
        name: opened.plain(name)
        for group in sum(groups(opened.config, True).values(), [])
        for weight in group.weights
        for name in group.tensors(weight)
    }


@pytest.mark.parametrize(
    ("stored", "formats"),
    [
        pytest.param(*pair, marks=() if pair in (("fp8-channel", "fp8-tensor"), ("w4a16-g128", "w4a16")) else slow)
        for pair in [
            (a, b) for a in SOURCES for b in ("fp8", "fp8-tensor", "w8a8", "w4a16", "w4a8", "mxfp8", "nvfp4a16", "bf16")
        ]
    ],
)
def test_requantised(source: Path, tmp_path: Path, stored: str, formats: str) -> None:
    """What is written is what rounding the dequantised source gives, and its config describes it: compressed-tensors'
    schema takes it, and reading it back gives the scheme that was asked for."""
    quantize(source, tmp_path / "a", stored, "compressed-tensors")
    words = ("quantize", "--checkpoint", tmp_path / "a", "--formats", formats, "--out", tmp_path / "b")
    result = glm5(*words, *(() if formats == "bf16" else ("--layout", "compressed-tensors")), "--json").json
    opened, before = Checkpoint(tmp_path / "b"), held_of(tmp_path / "a")
    assert opened.config.stored_scheme.name == formats
    after = held_of(tmp_path / "b")
    for place, found in groups(opened.config, True).items():
        for group in found:
            for weight in group.weights:
                fmt = scheme(formats).stored(weight, place == "mtp")
                for name in group.tensors(weight):
                    if fmt.narrow and not result["kept_from_source"]:
                        np.testing.assert_array_equal(after[name], dequantise(quantise(fmt, before[name])))
                    elif not fmt.narrow:  # what was quantised is bfloat16 now
                        np.testing.assert_array_equal(after[name], before[name].astype(after[name].dtype))
    if formats != "bf16":
        pytest.importorskip("compressed_tensors", exc_type=ImportError)
        from compressed_tensors.quantization import QuantizationConfig

        QuantizationConfig.model_validate(opened.raw_config["quantization_config"])


@pytest.mark.parametrize("formats", ["w4a16", pytest.param("fp8-tensor", marks=slow), pytest.param("w4a8", marks=slow)])
def test_transformers_loads_what_was_requantised(tmp_path: Path, formats: str) -> None:
    """Its weights are ours, for the formats whose experts transformers 5.23 can read; a scheme of two formats too."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    fields = {"hidden_size": 128, "moe_intermediate_size": 128, "num_nextn_predict_layers": 0}
    make_checkpoint(tmp_path / "plain", **fields)
    quantize(tmp_path / "plain", tmp_path / "a", "w4a16-g128", "compressed-tensors")
    quantize(tmp_path / "a", tmp_path / "b", formats, "compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))  # compressed modules are unpacked when they are first used
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for name, ours in held_of(tmp_path / "b").items():
        head, expert, tail = name.rpartition(".experts.")
        if expert:
            number, part, _ = tail.split(".")
            fused = theirs[f"{head}.experts.{'down' if part == 'down_proj' else 'gate_up'}_proj"][int(number)]
            half = {"gate_proj": slice(0, len(fused) // 2), "up_proj": slice(len(fused) // 2, None)}
            found = fused[half.get(part, slice(None))]
        else:
            found = theirs[name]
        np.testing.assert_allclose(found, ours, atol=2**-7 * float(np.abs(ours).max()), err_msg=name)


def test_groups_are_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    for formats, mentions in (("w4a16-g7", ("groups of 7", "128 columns")), ("w4a16-g96", ("96", "groups of"))):
        line = refused("quantize", "--checkpoint", source, "--formats", formats, "--out", tmp_path / "out")
        assert all(word in line for word in (formats, *mentions)) and "experts.0" in line, line
    assert not list(tmp_path.iterdir())


def test_scales_in_16_bits_are_kept_in_the_formats_own(source: Path, tmp_path: Path) -> None:
    """A source's bfloat16 scales of FP8 rows stay the numbers they are."""
    quantize(source, tmp_path / "a", "fp8-channel", "compressed-tensors")
    opened = Checkpoint(tmp_path / "a")
    tensors = {name: np.array(opened.array(name)) for name in opened.tensor_names}
    tensors |= {name: a.astype(BF16) for name, a in tensors.items() if name.endswith("weight_scale")}
    for path in (tmp_path / "a").glob("*.safetensors*"):
        path.unlink()
    write(tmp_path / "a" / "model.safetensors", tensors)
    result = quantize(tmp_path / "a", tmp_path / "b", "fp8-channel", "compressed-tensors")
    assert result["kept_from_source"] == sum(result["matrices"].values())
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert Checkpoint(tmp_path / "b").array(name + "_scale").dtype == np.float32
    np.testing.assert_array_equal(Checkpoint(tmp_path / "b").plain(name), Checkpoint(tmp_path / "a").plain(name))


def test_what_does_not_divide_leaves_nothing(tmp_path: Path) -> None:
    from model.checkpoint_writer import save
    from model.hf_config import from_hf
    from tests.engine.conftest import DSA, random_weights

    save(tmp_path / "ck", DSA, random_weights(from_hf(DSA)))  # q_lora_rank is 48: no multiple of 32
    line = refused("quantize", "--checkpoint", tmp_path / "ck", "--formats", "mxfp8", "--out", tmp_path / "out")
    assert "q_b_proj" in line and "48" in line and "32" in line
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_an_existing_directory_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in refused("quantize", "--checkpoint", source, "--formats", "w8a8", "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())


def test_a_static_modelslim_checkpoint_is_named(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "w8a8", "msmodelslim")
    described = tmp_path / "out" / "quant_model_description.json"
    described.write_text(described.read_text().replace('o_proj.weight": "W8A8_DYNAMIC"', 'o_proj.weight": "W8A8"'))
    assert "W8A8 " in refused(
        "quantize", "--checkpoint", tmp_path / "out", "--formats", "bf16", "--out", tmp_path / "x"
    )


def test_the_usual_layouts() -> None:
    assert {name: layout_of(SCHEMES[name]) for name in ("fp8", "w8a8", "w4a8", "nvfp4", "bf16")} == {
        "fp8": "deepseek",
        "w8a8": "compressed-tensors",
        "w4a8": "msmodelslim",
        "nvfp4": "compressed-tensors",
        "bf16": None,
    }


@pytest.mark.slow
def test_glm5_runs_it(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "w8a8", "compressed-tensors")
    words = ("run", "--prompt", "Hello", "--max-tokens", 4, "--json", "--checkpoint")
    kept = glm5(*words, tmp_path / "out", "--keep-fp8").json
    assert kept["token_ids"] == glm5(*words, tmp_path / "out").json["token_ids"]
