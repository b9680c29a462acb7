"""Packages in narrow formats: whose bytes they hold, that their graphs are the emulation's, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.emulation.host import Converted, EmulatedCpu
from backends.emulation.number_formats import NumberFormats
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.formats import Formats, scheme
from model.hf_config import from_hf
from runtime.deployment.manifest import Manifest
from runtime.deployment.tensors import TensorReader
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Prompt
from runtime.execution.package.ort import OrtExecutor
from tests.cli.cli import glm5, make_checkpoint, refused
from tests.engine.conftest import GQA, random_weights
from tests.marks import slow_but

SIZES = ("--context", 32, "--page-size", 16)
PLAIN = {**GQA, "num_nextn_predict_layers": 0}
RUNTIME = {"onnx": "ort", "torch": "torch", "stablehlo": "xla"}


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer and one of experts, without MTP; not to be changed."""
    folder = tmp_path_factory.mktemp("narrow") / "gqa"
    save(folder, PLAIN, random_weights(from_hf(PLAIN)))
    return folder


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5's architecture in two layers and an MTP layer, with a tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("narrow") / "mla"
    make_checkpoint(folder)
    return folder


def exported(out: Path, *words: object) -> Manifest:
    code, _, err = glm5("export", *words, *SIZES, "--out", out)
    assert (code, err) == (0, ""), err
    return Manifest.read(out)


def stored(folder: Path) -> TensorReader:
    return TensorReader(folder / "weights" / "device-0.safetensors")


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", slow_but(["w4a8"], ["w8a8", "w4a16-g16", "w4a8"]))
def test_weights_are_the_quantisers(mla: Path, tmp_path: Path, formats: str) -> None:
    """The same bytes from a checkpoint and from what `glm5 quantize` makes of it; both are what that wrote."""
    assert glm5("quantize", "--checkpoint", mla, "--formats", formats, "--out", tmp_path / "q").code == 0
    words = ("--format", "onnx", "--formats", formats, "--dtype", "bfloat16")
    first = exported(tmp_path / "a", "--checkpoint", mla, *words)
    exported(tmp_path / "b", "--checkpoint", tmp_path / "q", *words)
    ours, theirs = stored(tmp_path / "a"), stored(tmp_path / "b")
    narrow = [name for name in ours.names if name.endswith((".values", ".scale"))]
    assert narrow and set(ours.names) == set(theirs.names)
    for name in narrow:
        assert ours.array(name).dtype == theirs.array(name).dtype
        np.testing.assert_array_equal(ours.array(name), theirs.array(name))
    held = Checkpoint(tmp_path / "q").load(keep_fp8=True)
    for layer, name in ((0, "o"), (1, "experts_gate_up"), (1, "experts_down")):
        if f"layers.{layer}.{name}.values" in narrow:
            value = held["layers"][layer][name]
            np.testing.assert_array_equal(ours.array(f"layers.{layer}.{name}.values").astype(np.int8), value.values)
            np.testing.assert_array_equal(ours.array(f"layers.{layer}.{name}.scale"), value.scale)
    refs = {ref.name: ref for refs in first.weights.values() for ref in refs}
    routed = refs["w.experts_down.values"]
    assert (routed.dtype, routed.format) == {
        "w8a8": ("int8", "w8a8-int8"), "w4a8": ("int4", "w4a8"), "w4a16-g16": ("int4", "w4a16-g16"),
    }[formats]  # fmt: skip
    assert routed.sources == ("model.layers.{layer}.mlp.experts.{e}.down_proj.weight",)
    assert refs["w.k_up"].format == "" and "w.index_k" in refs  # what recipes leave in 16 bits


def test_a_file_says_its_int4_itself(mla: Path, tmp_path: Path) -> None:
    """safetensors' own reader: bytes, and in the metadata the shapes that they are of."""
    from safetensors import safe_open

    exported(tmp_path / "p", "--checkpoint", mla, "--format", "onnx", "--formats", "w4a16")
    with safe_open(tmp_path / "p" / "weights" / "device-0.safetensors", "np") as file:
        shapes = json.loads(file.metadata()["int4"])
        assert set(shapes) == {f"layers.1.experts_{part}.values" for part in ("gate_up", "down")}
        for name, shape in shapes.items():
            raw = file.get_tensor(name)
            assert raw.dtype == np.uint8 and raw.shape == (np.prod(shape) // 2,)
            low = (raw & 0xF).astype(np.int8)
            first = np.where(low > 7, low - 16, low)
            np.testing.assert_array_equal(first, stored(tmp_path / "p").array(name).astype(np.int8).reshape(-1)[::2])


# --- what the graphs compute ---------------------------------------------------------------------


def test_a_layer_is_what_numpy_makes_of_it(gqa: Path, tmp_path: Path) -> None:
    """A whole dense layer in W8A8 by hand, from the package's weights: each product in integers."""
    words = ("--checkpoint", gqa, "--format", "onnx", "--formats", "w8a8", "--phase", "prefill", "--chunk", 6)
    manifest = exported(tmp_path / "p", *words)
    unit, read = manifest.layers[0].unit, stored(tmp_path / "p")
    (step,) = manifest.programs[0].units[unit]
    weights = {name.removeprefix("layers.0."): read.array(name) for name in read.names if name.startswith("layers.0.")}
    x = np.random.default_rng(1).normal(size=(1, 6, 64)).astype(np.float32)
    given: dict[str, Any] = {
        "x": x, "positions": np.arange(6, dtype=np.int32)[None], "slots": 16 + np.arange(6, dtype=np.int32)[None],
        "page_table": np.array([[1, 2]], np.int32),
    }  # fmt: skip
    given |= {cache.name: np.zeros(cache.shape, np.float32) for cache in manifest.caches[unit]}
    given |= {f"w.{name}": array for name, array in weights.items()}
    executor = OrtExecutor()
    bound = executor.load(tmp_path / "p" / step.files["any"], step).bind({})
    found = bound({value.name: executor.put(given[value.name]) for value in step.inputs})["x.out"].numpy()
    np.testing.assert_allclose(found[0], numpy_layer(x[0].astype(np.float64), weights), rtol=0, atol=2e-5)


def numpy_layer(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """GLM-4.5's dense layer over the tokens [t, d] of one sequence."""

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    def product(x: np.ndarray, name: str) -> np.ndarray:
        values, scale = w[f"{name}.values"], w[f"{name}.scale"].astype(np.float64)
        assert values.dtype == np.int8 and scale.shape == (1, *values.shape[1:])
        rows = np.abs(x).max(-1, keepdims=True) / 127
        sums = np.rint(x / rows).astype(np.int32) @ values.reshape(len(values), -1).astype(np.int32)
        return (sums * rows).reshape(*x.shape[:-1], *values.shape[1:]) * scale[0]

    def rotated(x: np.ndarray) -> np.ndarray:  # the first half of 32, as two halves of 8
        angle = np.arange(len(x))[:, None, None] * 1e6 ** (-np.arange(8) / 8)
        first, second, rest = x[..., :8], x[..., 8:16], x[..., 16:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    h = norm(x, w["input_norm"])
    q, k, v = ((product(h, name) + w[f"{name}_bias"]).reshape(len(x), -1, 32) for name in "qkv")
    q, k = rotated(norm(q, w["q_norm"])), rotated(norm(k, w["k_norm"]))
    k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
    scores = np.einsum("qhi,khi->hqk", q, k) / np.sqrt(32)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    x = x + product(np.einsum("hqk,khi->qhi", share, v).reshape(len(x), -1), "o")
    gate_up = product(norm(x, w["ffn_norm"]), "gate_up")
    gate, up = gate_up[:, 0], gate_up[:, 1]
    return x + product(gate / (1 + np.exp(-gate)) * up, "down")


def verified(out: Path, *words: object) -> list[float]:
    """Exports and verifies; how far off, in the measure that was printed."""
    code, text, err = glm5("export", *words, "--verify", "--out", out)
    assert (code, err) == (0, ""), err
    lines = [line.partition("off by ")[2] for line in text.splitlines() if line.startswith("verified:")]
    return [float(part.split()[0]) for line in lines for part in line.split(" in logits, ")]


def test_a_package_is_its_emulation(gqa: Path, tmp_path: Path) -> None:
    """Through ONNX Runtime, several steps with caches; far nearer than int8 is to float32."""
    off = verified(tmp_path / "p", "--checkpoint", gqa, "--format", "onnx", "--formats", "w8a8", *SIZES)
    assert len(off) == 2 and max(off) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "formats", "words"),
    [
        ("onnx", "w8a8", ("--phase", "both", "--chunk", 16, "--batch", "1,3")),
        ("onnx", "w4a16", ("--phase", "both", "--chunk", 16, "--batch", 2)),
        ("onnx", "w4a16-g64/w4a16-g16", ()),
        ("onnx", "w4a8", ("--dp", 2, "--ep", 2)),
        ("stablehlo", "w8a8", ()),
        ("stablehlo", "w4a16", ("--batch", 2)),
        ("torch", "w8a8", ()),
    ],
    ids=str,
)
def test_packages_are_their_emulations(
    mla: Path, tmp_path: Path, format: str, formats: str, words: tuple[object, ...]
) -> None:
    """Past `index_topk`, the MTP layer too."""
    sizes = ("--context", 64, "--page-size", 16, "--dtype", "float32")
    off = verified(tmp_path / "p", "--checkpoint", mla, "--format", format, "--formats", formats, *sizes, *words)
    assert off and max(off) <= (0.02 if "a8" in formats else 1e-4)


def test_a_wrong_package_is_not_exported(gqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: activations in a coarser int7."""
    from backends.toolchains import onnx_narrow

    monkeypatch.setattr(onnx_narrow, "BOUND", 63.0)
    words = ("--checkpoint", gqa, "--format", "onnx", "--formats", "w8a8", *SIZES)
    message = refused("export", *words, "--verify", "--out", tmp_path / "p")
    assert "differs from the graph by" in message and "of their size in logits" in message and "not exported" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("format", "formats"), [("onnx", "w4a16"), ("stablehlo", "w8a8"),
                                                 ("torch", "w8a8")])  # fmt: skip
def test_tokens_are_the_emulations(tmp_path: Path, format: str, formats: str) -> None:
    """The embedded model's answer, by the package and by the engine on an emulated chip."""
    from runtime.execution.local.load import embedded_checkpoint

    opened = Checkpoint(embedded_checkpoint())
    words = ("--format", format, "--formats", formats, "--dtype", "float32", "--context", 64, "--page-size", 16)
    assert glm5("export", *words, "--out", tmp_path / "p").code == 0
    asked = ("--prompt", "A mixture of experts", "--max-tokens", 30, "--json")
    found = glm5("run", "--artifact", tmp_path / "p", "--backend", RUNTIME[format], *asked).json
    named = scheme(formats)
    numbers = NumberFormats(opened.config, Formats(named.dense, named.experts), float32=True)
    backend, limits = EmulatedCpu(numbers), EngineConfig(pool_tokens=256, max_running=1)
    engine = load_engine(Converted(opened.path, numbers), backend, limits, "float32", keep_fp8=True)
    prompt = tuple(glm5("run", *asked).json["prompt_ids"])
    (answer,) = engine.generate([Prompt(prompt, 30, stop_ids=frozenset(opened.config.eos_token_ids))])
    assert found["token_ids"] == list(answer.token_ids)


# --- what a package says, and refusals -----------------------------------------------------------


def test_a_package_says_what_to_feed(mla: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", mla, "--format", "onnx", "--formats", "w4a8", "--weights", "none")
    manifest = exported(tmp_path / "p", *words)
    assert manifest.extra["onnx"] == {"opset": 21} and manifest.dtype == "float32"
    text = (tmp_path / "p" / "README.md").read_text()
    assert "| `GEAR/UNIT.onnx` | any compiler of ONNX: opset 21" in text
    assert "`w.experts_down`, `w.experts_gate_up`: INT4, a scale an output channel (`w4a8`)" in text
    assert "rounded to int8 as the graph runs, a scale a token" in text and "int4 tensors are vectors of bytes" in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("torch", "w4a16"), "the graphs of torch have no 4-bit integers; choose f32, bf16, fp8, w8a8"),
        (("onnx", "fp8"), "the graphs of onnx have no 8-bit floats; choose f32, bf16, w8a8, w4a8, w4a16"),
        (("onnx", "w4afp8"), "onnx have no 8-bit floats"),
        (("stablehlo", "mxfp8"), "graphs do not round activations to e4m3, a power-of-two scale"),
        (("stablehlo", "fp8-tensor"), "graphs do not round activations to e4m3, a scale a token"),
        (("onnx", "w9a9"), "unknown formats 'w9a9'"),
        (("onnx", "w8a8", "--dtype", "float16"), "--dtype float16: float32 or bfloat16"),
        (("onnx", "f32", "--dtype", "bfloat16"), "--formats decides; give --formats bf16"),
        (
            ("onnx", "w8a8", "--dtype", "bfloat16", "--verify"),
            "compares what is left wide in float32: add --dtype float32",
        ),
        (("onnx", "w8a8", "--tp", "2", "--verify"), "each device rounds its own part of a token"),
        (("stablehlo", "w8a8", "--verify"), "add --dtype float32"),
        (("stablehlo", "bf16", "--verify"), "quantised ones with their emulation: use --formats f32, not bf16"),
        (("onnx", "w4a16-g7"), "do not divide into groups of 7"),
    ],
    ids=str,
)
def test_what_is_refused_in_one_line(mla: Path, tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    format, formats, *rest = words
    given = ("--checkpoint", mla, "--format", format, "--formats", formats, *SIZES, *rest)
    assert complaint in refused("export", *given, "--out", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
