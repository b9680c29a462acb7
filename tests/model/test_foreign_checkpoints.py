"""Checkpoints as other tools leave them: what is stored is used, and where config.json is at odds with it a line says
so. The oracle is the same checkpoint saved the usual way, or transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.errors import CheckpointError
from model.formats import FORMATS, Formats
from model.hf_config import from_hf, load_config
from model.quantised import quantise
from model.safetensors_file import SafetensorsFile, write
from model.spelling import spell, tensor_name
from model.split import Layout
from model.weights import Quantized
from runtime.deployment.ledger import stage_weight_bytes
from tests.cli.cli import glm5, make_checkpoint, refused
from tests.model.oracle import CASES, FAMILIES, Oracle, random_weights, torch_logits
from tests.model.test_checkpoint import assert_same
from tests.model.test_spelling import turned

Oracles = Callable[[str], Oracle]
Tensors = dict[str, np.ndarray]
RAW = {"model_type": "glm_moe_dsa", **CASES["glm_moe_dsa"].fields, "num_nextn_predict_layers": 1}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    save(tmp_path / "made", RAW, random_weights(from_hf(RAW)))
    return tmp_path / "made"


def tensors_of(path: Path) -> Tensors:
    shard = SafetensorsFile(path / SINGLE)
    return {name: np.array(shard.array(name)) for name in shard.names}


def copy(path: Path, to: str, tensors: Tensors, **changed: Any) -> Path:
    """A checkpoint beside `path` of these tensors, and its config with fields changed."""
    out = path.with_name(to)
    out.mkdir()
    raw = {**json.loads((path / "config.json").read_text()), **changed}
    (out / "config.json").write_text(json.dumps(raw))
    write(out / SINGLE, tensors)
    return out


# --- experts in one tensor ------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_experts(oracles: Oracles, tmp_path: Path, name: str, shards: str) -> None:
    """As `save_pretrained(save_original_format=False)` leaves them, gate and up one after the other."""
    oracle = oracles(name)
    size = {"one": "5GB", "many": "60KB"}[shards]
    oracle.torch_model.save_pretrained(tmp_path / "fused", save_original_format=False, max_shard_size=size)
    assert (tmp_path / "fused" / INDEX).exists() == (shards == "many")
    opened = Checkpoint(tmp_path / "fused")
    assert_same(opened.load(), Checkpoint(oracle.path).load())
    assert set(opened.tensor_names) == set(Checkpoint(oracle.path).tensor_names)


def fuse(tensors: Tensors, suffix: str = "") -> Tensors:
    """Experts and their scales under transformers' names for whole layers."""
    out = dict(tensors)
    for layer in range(1, 6):
        prefix = f"model.layers.{layer}.mlp.experts."
        down = [out.pop(f"{prefix}{e}.down_proj.weight{suffix}") for e in range(8)]
        halves = [[out.pop(f"{prefix}{e}.{half}_proj.weight{suffix}") for half in ("gate", "up")] for e in range(8)]
        out[f"{prefix}down_proj{suffix}"] = np.stack(down)
        out[f"{prefix}gate_up_proj{suffix}"] = np.stack([np.concatenate(pair) for pair in halves])
    return out


def test_fused_experts_in_fp8_and_an_mtp_layers(made: Path, tmp_path: Path) -> None:
    weights = random_weights(from_hf(RAW))
    save(tmp_path / "fp8", RAW, weights, fp8=True)
    for source in (made, tmp_path / "fp8"):
        tensors = fuse(tensors_of(source))
        if source != made:
            tensors = fuse(tensors, "_scale_inv")
        opened = Checkpoint(copy(source, f"fused-{source.name}", tensors))
        assert opened.has_mtp
        assert_same(opened.load(keep_fp8=True), Checkpoint(source).load(keep_fp8=True))


def test_experts_stored_twice(made: Path) -> None:
    tensors = tensors_of(made)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    with pytest.raises(CheckpointError, match="twice"):
        Checkpoint(copy(made, "twice", {**fuse(tensors), name: tensors[name]}))


def test_fused_experts_of_another_layout(made: Path) -> None:
    tensors = fuse(tensors_of(made))
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = np.ascontiguousarray(tensors[name].transpose(0, 2, 1))
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.weight has shape"):
        Checkpoint(copy(made, "turned", tensors))


# --- AWQ and GPTQ ---------------------------------------------------------------------------------

SAID = {"awq": {"version": "gemm", "zero_point": True}, "gptq": {"sym": False, "desc_act": False}}


@pytest.mark.parametrize("method", SAID)
def test_awq_and_gptq(made: Path, method: str) -> None:
    """Experts of layers so stored load as what they stand for; kept narrow, they are the same numbers."""
    tensors = tensors_of(made)
    plain, packed = dict(tensors), dict(tensors)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        out, width = tensors[name].shape
        held, plain[name] = turned(method, width, 16, out)
        del packed[name]
        packed |= {tensor_name(name, part.removeprefix("layer")): array for part, array in held.items()}
    quant = {
        "quant_method": method,
        "bits": 4,
        "group_size": 16,
        "modules_to_not_convert": ["self_attn"],
        **SAID[method],
    }
    opened = Checkpoint(copy(made, method, packed, quantization_config=quant))
    expected = Checkpoint(copy(made, "plain", plain)).load()
    assert_same(opened.load(), expected)
    for layer, same in zip(opened.load(keep_fp8=True)["layers"], expected["layers"], strict=True):
        narrow = {name: value for name, value in layer.items() if isinstance(value, Quantized)}
        assert narrow or not any("expert" in name for name in layer)
        for name, value in narrow.items():
            scale = np.repeat(value.scale.astype(np.float32), 16, axis=1)
            np.testing.assert_array_equal(value.values * scale, same[name])


# --- the head -------------------------------------------------------------------------------------


def test_a_head_of_its_own_in_a_tied_config(oracles: Oracles, tmp_path: Path) -> None:
    """transformers takes the stored head, and so do we; one that equals the embedding stays tied."""
    oracle = oracles("glm4_moe")
    out = tmp_path / "tied"
    oracle.torch_model.save_pretrained(out)
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    opened = Checkpoint(out)
    assert not opened.config.tie_embeddings and opened.raw_config["tie_word_embeddings"] is False
    assert len(opened.notes) == 1 and "head" in opened.notes[0] and "\n" not in opened.notes[0]
    theirs = type(oracle.torch_model).from_pretrained(out, dtype="float32").eval()
    np.testing.assert_array_equal(torch_logits(theirs, oracle.tokens), oracle.logits)
    assert_same(opened.load(), Checkpoint(oracle.path).load())


@pytest.mark.parametrize("change", ["equal", "last row", "dtype"])
def test_a_head_is_compared_to_its_last_row(made: Path, change: str) -> None:
    tensors = tensors_of(made)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    if change == "last row":
        tensors["lm_head.weight"][-1, -1] += 1
    if change == "dtype":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16)
    opened = Checkpoint(copy(made, "tied", tensors, tie_word_embeddings=True))
    assert opened.config.tie_embeddings == (change == "equal") == (not opened.notes)
    planned = load_config(opened.path)  # what plans and simulations know of it
    assert planned == opened.config
    head = stage_weight_bytes(planned, Layout(), Formats("f32", "f32", "f32"), 0, mtp=False).get("head", 0.0)
    assert head == (0 if change == "equal" else 4 * planned.vocab_size * planned.hidden_size)
    (opened.path / "model.safetensors").unlink()  # a config alone
    assert load_config(opened.path).tie_embeddings


def test_quantize_keeps_the_head_and_says_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "made")
    config = tmp_path / "made" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    found = glm5("quantize", "--checkpoint", tmp_path / "made", "--formats", "fp8", "--out", tmp_path / "out")
    assert found.code == 0 and found.err.count("\n") == 1 and "ties the head" in found.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    opened = Checkpoint(tmp_path / "out")
    assert not opened.notes
    np.testing.assert_array_equal(opened.array("lm_head.weight"), Checkpoint(tmp_path / "made").array("lm_head.weight"))


@pytest.mark.slow
def test_run_says_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "made")
    words = ("run", "--prompt-ids", "5,6,7", "--max-tokens", 1, "--json", "--checkpoint", tmp_path / "made")
    plain = glm5(*words)
    config = tmp_path / "made" / "config.json"
    changed = {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    found = glm5(*words)
    assert found.json["token_ids"] == plain.json["token_ids"]
    assert [word in line for word, line in zip(("head", "MTP"), found.err.splitlines(), strict=True)] == [True] * 2


# --- MTP layers -----------------------------------------------------------------------------------


def with_mtp(tensors: Tensors, at: int) -> Tensors:
    """A copy of the MTP layer, layer 5, at another depth."""
    found = {name: array for name, array in tensors.items() if name.startswith("model.layers.5.")}
    return tensors | {name.replace("layers.5.", f"layers.{at}."): array for name, array in found.items()}


@pytest.mark.parametrize(("declared", "stored"), [(0, 1), (0, 2), (1, 2), (1, 3)])
def test_mtp_layers_that_the_config_does_not_declare(made: Path, declared: int, stored: int) -> None:
    tensors = tensors_of(made)
    for layer in range(6, 5 + stored):
        tensors = with_mtp(tensors, layer)
    opened = Checkpoint(copy(made, "more", tensors, num_nextn_predict_layers=declared))
    assert opened.has_mtp == bool(declared) and len(opened.notes) == stored - declared
    assert all(f"num_nextn_predict_layers {declared}" in note and "\n" not in note for note in opened.notes)
    reference = Checkpoint(made)
    assert_same(opened.load(), reference.load(mtp=bool(declared)))


def test_mtp_of_an_undeclared_layer_says_why(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "made", num_nextn_predict_layers=1)
    config = tmp_path / "made" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 0}))
    found = glm5("run", "--checkpoint", tmp_path / "made", "--prompt-ids", "5,6", "--max-tokens", 1, "--mtp", 1)
    assert found.code == 2 and "num_nextn_predict_layers" in found.err.splitlines()[-1]


@pytest.mark.parametrize("layout", ["index", "single", "experts apart"])
def test_an_mtp_layer_in_a_file_that_no_index_lists(made: Path, layout: str) -> None:
    tensors = tensors_of(made)
    mtp = {name: array for name, array in tensors.items() if ".layers.5." in name}
    main = {name: array for name, array in tensors.items() if name not in mtp}
    path = copy(made, "beside", main)
    if layout != "single":
        (path / SINGLE).rename(path / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(main, "model-00001-of-00001.safetensors")
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    apart = {name: array for name, array in mtp.items() if layout == "experts apart" and ".experts." in name}
    write(path / "mtp.safetensors", {name: array for name, array in mtp.items() if name not in apart})
    if apart:
        write(path / "mtp-experts.safetensors", apart)
    opened = Checkpoint(path)
    assert opened.has_mtp
    assert_same(opened.load(), Checkpoint(made).load())


# --- modelopt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["config.json", "hf_quant_config.json"])
def test_nvfp4_of_modelopt(made: Path, said: str) -> None:
    """Experts in NVFP4 as modelopt spells it, with its calibrated scales beside them: what is read is what the same
    numbers are in compressed-tensors' spelling."""
    fmt, tensors = FORMATS["nvfp4"], tensors_of(made)
    spelt, other = dict(tensors), dict(tensors)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        held = quantise(fmt, tensors[name].astype(np.float32))
        assert held.factor is not None
        other.pop(name)
        other.update(spell(name, fmt, "compressed-tensors", held))
        pairs = held.values.view(np.uint8)
        spelt[name] = pairs[:, 0::2] | (pairs[:, 1::2] << 4)
        spelt[f"{name}_scale"], spelt[f"{name}_scale_2"] = held.scale, np.asarray(held.factor, np.float32).reshape(())
        spelt[name.replace("weight", "input_scale")] = np.array(0.5, np.float32)
    ignore = ["lm_head", "model.layers.*.self_attn*", "model.layers.0*", "model.layers.*.mlp.shared_experts*"]
    inner = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"}
    if said == "config.json":
        path = copy(
            made, "modelopt", spelt, quantization_config={"quant_method": "modelopt", "ignore": ignore, **inner}
        )
    else:
        path = copy(made, "modelopt", spelt)
        content = {"producer": {"name": "modelopt"}, "quantization": {"exclude_modules": ignore, **inner}}
        (path / said).write_text(json.dumps(content))
    opened = Checkpoint(path)
    assert opened.config.weight_format == "nvfp4"
    assert_same(opened.load(), Checkpoint(copy(made, "other", other)).load())


# --- calibrated scales ----------------------------------------------------------------------------

CALIBRATED = ("input_scale", "input_global_scale", "output_scale", "input_zero_point", "k_scale", "v_scale", "q_scale")


@pytest.mark.parametrize("fp8", [False, True])
def test_calibrated_scales_are_not_used(tmp_path: Path, fp8: bool) -> None:
    """Beside experts, attention, a router, an MTP layer, as scalars and vectors."""
    save(tmp_path / "made", RAW, random_weights(from_hf(RAW)), fp8=fp8)
    modules = ("3.mlp.experts.2.up_proj", "0.self_attn.q_b_proj", "5.mlp.shared_experts.up_proj", "1.mlp.gate")
    extra = {
        f"model.layers.{module}.{name}": np.full(() if place % 2 else (1,), 300.0, np.float32)
        for module in (*modules, "2.self_attn")
        for place, name in enumerate(CALIBRATED)
    }
    path = copy(tmp_path / "made", "static", tensors_of(tmp_path / "made") | extra)
    assert_same(Checkpoint(path).load(keep_fp8=True), Checkpoint(tmp_path / "made").load(keep_fp8=True))
    for name in ("surprise.input_scale", "model.layers.1.mlp.gate.deq_scale", "model.layers.1.mlp.gate.weight_scale"):
        wrong = tensors_of(tmp_path / "made") | {name: np.ones(1, np.float32)}
        with pytest.raises(CheckpointError, match=f"extra tensor {name}"):
            Checkpoint(copy(tmp_path / "made", name, wrong))


# --- stacks stored in more than one way -----------------------------------------------------------

EXPERTS = "model.layers.2.mlp.experts."


@pytest.mark.parametrize("change", ["plain expert", "plain gate", "plain downs", "channel expert", "scale type"])
def test_a_mixed_stack_is_dequantised_and_the_rest_kept(tmp_path: Path, change: str) -> None:
    save(tmp_path / "fp8", RAW, random_weights(from_hf(RAW)), fp8=True)
    whole, tensors = Checkpoint(tmp_path / "fp8"), tensors_of(tmp_path / "fp8")
    parts = {"plain gate": ["3.gate_proj"], "plain downs": [f"{e}.down_proj" for e in range(whole.config.moe.experts)]}  # type: ignore[union-attr]
    for part in parts.get(change, ["3.gate_proj", "3.up_proj", "3.down_proj"]):
        name = f"{EXPERTS}{part}.weight"
        scale = tensors.pop(name + "_scale_inv")
        if change == "channel expert":
            held = quantise(FORMATS["fp8-channel"], whole.plain(name))
            tensors |= spell(name, FORMATS["fp8-channel"], "compressed-tensors", held)
        elif change == "scale type":
            tensors[name + "_scale_inv"] = scale.astype(ml_dtypes.bfloat16)
        else:
            tensors[name] = whole.plain(name).astype(ml_dtypes.bfloat16)
    opened = Checkpoint(copy(tmp_path / "fp8", "mixed", tensors))
    kept, wide, before = opened.load(keep_fp8=True), opened.load(), whole.load(keep_fp8=True)["layers"]
    for index, layer in enumerate(kept["layers"]):
        for name, value in layer.items():
            if index == 2 and name.startswith("experts"):
                np.testing.assert_array_equal(value, wide["layers"][index][name])
            else:
                assert isinstance(value, Quantized) == isinstance(before[index][name], Quantized)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["down_proj", "gate_proj"])
def test_experts_of_which_a_half_is_quantised_run(tmp_path: Path, part: str) -> None:
    """The op takes both halves as values and scales or neither: the same tokens and logits as dequantised."""
    make_checkpoint(tmp_path / "made")
    glm5("quantize", "--checkpoint", tmp_path / "made", "--formats", "fp8", "--out", tmp_path / "fp8")
    opened, tensors = Checkpoint(tmp_path / "fp8"), tensors_of(tmp_path / "fp8")
    for name in [name for name in tensors if f".{part}.weight" in name and ".experts." in name]:
        del tensors[name]
        if not name.endswith("_scale_inv"):
            tensors[name] = opened.plain(name)
    path, found = copy(tmp_path / "fp8", "half", tensors), []
    for options in ((), ("--keep-fp8",)):
        words = ("--prompt-ids", "5,6,7", "--max-tokens", 2, "--ignore-eos", "--dump-logits", tmp_path / "logits.npz")
        assert glm5("run", "--checkpoint", path, *words, *options).code == 0
        found.append(np.load(tmp_path / "logits.npz")["logits"])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_an_export_in_fp8_needs_all_of_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "made")
    glm5("quantize", "--checkpoint", tmp_path / "made", "--formats", "fp8", "--out", tmp_path / "fp8")
    opened = Checkpoint(tmp_path / "fp8")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = {each: opened.array(each) for each in opened.tensor_names if each != name + "_scale_inv"}
    path = copy(tmp_path / "fp8", "mixed", tensors | {name: opened.plain(name)})
    line = refused("export", "--checkpoint", path, "--format", "stablehlo", "--formats", "fp8", "--out", tmp_path / "x")
    assert "experts.0.gate_proj" in line and not (tmp_path / "x").exists()
