"""What a package says of itself, and that damage to it is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.errors import ArtifactError
from runtime.deployment.manifest import (
    FILE,
    SCHEMA_VERSION,
    DeviceShare,
    Gear,
    GearUnits,
    Layer,
    Manifest,
    OpUse,
    PackageModel,
    Step,
    Value,
    WeightRef,
    check_files,
    hash_file,
)
from runtime.deployment.tensors import TensorReader, TensorWriter, numpy_dtype

MANIFEST = Manifest(
    format="onnx",
    model=PackageModel("m", "glm_moe_dsa", "0" * 64, 32, 8, 64, (1, 2), 4),
    dtype="float32",
    formats="f32",
    page_size=16,
    pool_pages=5,
    axes={"tp": 2},
    programs=(
        GearUnits(
            "decode",
            Gear(2, 1, 2),
            {
                "a": (
                    Step(
                        "graph",
                        (Value("x", (2, 8), "float32"),),
                        (Value("mid.0", (2, 8), "float32"),),
                        "a.0",
                        {"any": "a.onnx"},
                        {"cache.k.out": "cache.k"},
                        (OpUse("glm.linear", "function", 3, "glm::linear"),),
                    ),
                    Step(
                        "all_reduce",
                        (Value("mid.0", (2, 8), "float32"),),
                        (Value("x.out", (2, 8), "float32"),),
                        axis="tp",
                    ),
                )
            },
        ),
    ),
    layers=(Layer(0, "a"), Layer(1, "a")),
    caches={"a": (Value("cache.k", (5, 16, 4), "float32"),)},
    weights={"a": (WeightRef("w.q", (8, 4), "float32", (8, 8), ((), ("tp",)), ("model.layers.{layer}.q",), "MATRIX"),)},
    devices=(
        DeviceShare(0, 0, {"dp": 0, "tp": 0}, (0, 1)),
        DeviceShare(1, 0, {"dp": 0, "tp": 1}, (0, 1), "w.safetensors"),
    ),
    toolchain={"jax": "0.10"},
    files={},
    layout="tp2",
    extra={"anything": [1, {"a": None}]},
)


def test_a_manifest_is_what_its_file_says() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, f"manifest version {SCHEMA_VERSION + 1}, this release reads"),
        ({"schema_version": 1}, "manifest version 1, this release reads 2"),  # whose ascend packages were ONNX
        ({"format": "caffe"}, "manifest.format must be one of"),
        ({"page_size": "16"}, "manifest.page_size must be int"),
        ({"page_size": True}, "manifest.page_size must be int"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"layers": {}}, "manifest.layers must be a list"),
        ({"layers": [{"index": 0}]}, "manifest.layers[0] lacks the field `unit`"),
        ({"axes": [2]}, "manifest.axes must be an object"),
        ({"programs": [{"phase": "sleep", "gear": {}, "units": {}}]}, "manifest.programs[0].phase must be one of"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(json.dumps(json.loads(MANIFEST.to_json()) | change), "DIR/manifest.json")
    assert complaint in str(caught.value) and "DIR/manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def whole() -> dict[str, Any]:
    """A manifest that holds all that it names, as JSON."""
    document = json.loads(MANIFEST.to_json())
    document["weights"]["outer"] = []
    units = document["programs"][0]["units"]
    units |= {name: [] for name in ("view", "embed", "head")}
    return document


@pytest.mark.parametrize(
    ("field", "new", "said"),
    [
        ("layers.1.unit", "b", "caches: none of unit 'b', which a layer runs"),
        ("mtp", "b", "caches: none of unit 'b', which a layer runs"),
        ("weights", {"outer": []}, "weights: none of unit 'a', which a layer runs"),
        ("programs.0.units", {"view": [], "embed": [], "head": []}, "programs[0].units: no unit 'a'"),
        ("programs", [], "programs: their number is 0"),
        ("layers", [], "layers: their number is 0"),
        ("devices", [], "devices: their number is 0"),
        ("devices.0.layers", [], "devices[0].layers must be some of those in layers"),
        ("devices.0.layers", [0, 9], "devices[0].layers must be some of those in layers"),
        ("devices.1.ranks.tp", 7, "devices[1].ranks.tp is no rank of an axis of 2"),
        ("layers.1.index", 0, "layers: each index must be there once"),
        ("axes", {"tp": 2, "pp": 2}, "axes: 'pp' is none of dp, tp"),
        ("axes.tp", 10**9, "axes.tp is 1,000,000,000, which must lie between 1 and 100,000"),
        ("page_size", 0, "page_size is 0, which must lie between"),
        ("pool_pages", 10**12, "pool_pages is 1,000,000,000,000, which must lie between"),
        ("pool_pages", 6, "caches.a: cache.k is [5, 16, 4], not pool_pages x page_size x its widths"),
        ("caches.a.0.shape", [10**15], "caches.a: cache.k is [1000000000000000], not"),
        ("programs.0.gear.tokens", 10**9, "programs[0].gear.tokens is 1,000,000,000"),
        ("programs.0.gear.context_pages", 6, "programs[0].gear.context_pages is 6, which must lie between 1 and 5"),
        ("programs.0.units.a.0.inputs.0.dtype", "float12", "programs[0].units.a[0]: x has the unknown type 'float12'"),
        ("programs.0.units.a.0.inputs.0.shape", [-1], "programs[0].units.a[0]: x has the impossible shape [-1]"),
        ("programs.0.units.a.0.files", {}, "programs[0].units.a[0]: a graph without a file"),
        ("programs.0.units.a.1.axis", "dp", "programs[0].units.a[1]: all_reduce over 'dp', which is no axis"),
        ("programs.0.units.a.1.dim", 2, "programs[0].units.a[1]: all_reduce along dim 2 of 2"),
        ("programs.0.units.a.1.inputs", [], "programs[0].units.a[1]: all_reduce needs an input and an output"),
        ("model.vocab_size", 10**30, "model.vocab_size is 1e+30, which must lie within 2^53 of 0"),
    ],
)
def test_a_manifest_that_does_not_hold_what_it_names_is_refused(
    tmp_path: Path, field: str, new: object, said: str
) -> None:
    """Sent by someone who knows the fields; a run goes through units, caches, ranks and shapes."""
    document = whole()
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    Manifest.read(tmp_path)
    *path, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    holder: Any = document
    for key in path:
        holder = holder[key]
    holder[last] = new
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError) as caught:
        Manifest.read(tmp_path)
    assert said in str(caught.value) and "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version"'])
def test_a_truncated_manifest(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a manifest, or it is truncated"):
        Manifest.from_json(text)


def test_missing_truncated_and_altered_files(tmp_path: Path) -> None:
    for name in ("a.onnx", "w.safetensors"):
        (tmp_path / name).write_bytes(b"graph")
    files = {name: hash_file(tmp_path / name) for name in ("a.onnx", "w.safetensors")}
    manifest = dataclasses.replace(MANIFEST, files=files)
    check_files(tmp_path, manifest)
    for content, complaint in ((b"grap", "4 bytes where the manifest says 5"), (b"Graph", "altered")):
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(ArtifactError, match=complaint):
            check_files(tmp_path, manifest)
    (tmp_path / "a.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"a\.onnx: missing"):
        check_files(tmp_path, manifest)


def test_a_file_outside_the_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    manifest = dataclasses.replace(MANIFEST, files={"../secret": hash_file(tmp_path / "secret")})
    (tmp_path / "package").mkdir()
    with pytest.raises(ArtifactError, match="outside"):
        check_files(tmp_path / "package", manifest)


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"no exported package .it has no readable {FILE}"):
        Manifest.read(tmp_path)


def test_weight_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=(7,)).astype(numpy_dtype("bfloat16")),
        "c": rng.normal(size=(2, 2)).astype(numpy_dtype("float8_e4m3fn")),
        "d": np.arange(6, dtype=np.int32).reshape(2, 3),
        "e": np.zeros((0, 4), np.float32),
    }
    with TensorWriter(tmp_path / "w", {name: (a.shape, a.dtype.name) for name, a in arrays.items()}) as writer:
        for name in reversed(arrays):
            writer.put(name, arrays[name])
    reader, oracle = TensorReader(tmp_path / "w"), load_file(tmp_path / "w")
    assert set(reader.names) == set(oracle) == set(arrays)
    for name, array in arrays.items():
        found = reader.array(name)
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes()
        np.testing.assert_array_equal(oracle[name].float().numpy(), array.astype(np.float32))
    with pytest.raises(ArtifactError, match="holds no weight z"):
        reader.array("z")
    (tmp_path / "w").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(ArtifactError, match="not a weight file"):
        TensorReader(tmp_path / "w")
