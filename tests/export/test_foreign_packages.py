"""Packages from a stranger, whose manifest agrees with their files: nothing outside is read, nothing runs, no crash."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from jax import export
from jax.extend.mlir.dialects import stablehlo as dialect
from onnx import TensorProto, helper

from backends.errors import ArtifactError
from foundation.errors import Failure
from runtime.deployment.manifest import FILE, Manifest, Step, Value, check_files, hash_file
from runtime.execution.local.request import Prompt
from runtime.execution.package import stablehlo_check
from runtime.execution.package.generate import Package
from runtime.execution.package.ort import OrtExecutor
from runtime.execution.package.xla import XlaExecutor
from tests.cli.cli import glm5, make_checkpoint, refused
from tests.export.damage import damaged
from tests.export.test_targets import graph_of as graph_of_function

RUN = ("--prompt-ids", "1,2,3", "--max-tokens", 2, "--ignore-eos")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX package of a model of two layers; not to be changed."""
    folder = tmp_path_factory.mktemp("foreign")
    make_checkpoint(folder / "small")
    sizes = ("--phase", "decode", "--context", 32, "--page-size", 16)
    words = ("--checkpoint", folder / "small", "--format", "onnx", *sizes, "--out", folder / "package")
    assert glm5("export", *words).code == 0
    return folder / "package"


@pytest.fixture
def sent(package: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed by its sender."""
    shutil.copytree(package, tmp_path / "sent")
    return tmp_path / "sent"


def resealed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda raw: None) -> None:
    """Writes the manifest anew, with the hashes of what is there now."""
    raw = json.loads((folder / FILE).read_text())
    raw["files"] = {name: dataclasses.asdict(hash_file(folder / name)) for name in raw["files"]}
    change(raw)
    (folder / FILE).write_text(json.dumps(raw))


def graph_of(raw: dict[str, Any]) -> dict[str, str]:
    return raw["programs"][0]["units"]["embed"][0]["files"]


def listed(raw: dict[str, Any], name: str, path: Path) -> None:
    raw["files"][name] = dataclasses.asdict(hash_file(path))


# --- paths ---------------------------------------------------------------------------------------


def no_files(folder: Path) -> None:
    resealed(folder, lambda raw: raw.update(files={}))


def graph_outside(folder: Path) -> None:
    name = graph_of(json.loads((folder / FILE).read_text()))["any"]
    shutil.move(folder / name, folder.parent / "outside.onnx")
    raw = json.loads((folder / FILE).read_text())
    del raw["files"][name]
    (folder / FILE).write_text(json.dumps(raw))
    resealed(folder, lambda raw: (graph_of(raw).update(any="../outside.onnx"),
                                  listed(raw, "../outside.onnx", folder.parent / "outside.onnx")))  # fmt: skip


def graph_not_listed(folder: Path) -> None:
    resealed(folder, lambda raw: raw["files"].pop(graph_of(raw)["any"]))


def weights_absolute(folder: Path) -> None:
    path = folder / "weights" / "device-0.safetensors"
    resealed(folder, lambda raw: (raw["devices"][0].update(weights=str(path)), listed(raw, str(path), path)))


def weights_link_out(folder: Path) -> None:
    path = folder / "weights" / "device-0.safetensors"
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    resealed(folder)


def folder_link_out(folder: Path) -> None:
    shutil.move(folder / "weights", folder.parent / "weights")
    (folder / "weights").symlink_to("../weights")
    resealed(folder)


def tokenizer_up_and_down(folder: Path) -> None:
    name = f"../{folder.name}/tokenizer.json"
    resealed(folder, lambda raw: (raw.update(tokenizer=name), listed(raw, name, folder / "tokenizer.json")))


def tokenizer_windows(folder: Path) -> None:
    resealed(folder, lambda raw: (raw.update(tokenizer="..\\x"), listed(raw, "..\\x", folder / "tokenizer.json")))


def tokenizer_a_pipe(folder: Path) -> None:
    resealed(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def manifest_link_out(folder: Path) -> None:
    resealed(folder)
    shutil.move(folder / FILE, folder.parent / FILE)
    (folder / FILE).symlink_to(folder.parent / FILE)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (no_files, "programs[0].units.view[0].files.any names it and the manifest's `files` do not list it"),
        (graph_outside, "outside.onnx: leads out of the folder"),
        (graph_not_listed, "embed[0].files.any names it and the manifest's `files` do not list it"),
        (weights_absolute, "no path relative to the folder"),
        (weights_link_out, "device-0.safetensors: a link that leads out of the folder"),
        (folder_link_out, "device-0.safetensors: a link that leads out of the folder"),
        (tokenizer_up_and_down, "tokenizer.json: leads out of the folder"),
        (tokenizer_windows, "no path relative to the folder"),
        (tokenizer_a_pipe, "tokenizer.json: no regular file"),
        (manifest_link_out, "no exported package"),
    ],
)
def test_a_file_that_is_not_the_packages_own(sent: Path, change: Callable[[Path], None], complaint: str) -> None:
    change(sent)
    for words in (("run", "--artifact", sent, "--backend", "ort", *RUN), ("export", "check", sent)):
        code, out, err = glm5(*words)
        assert code == 2 and complaint in (out + err).replace(": file: ", ": "), (words, out, err)


def test_links_inside_are_the_packages_own(sent: Path) -> None:
    (sent / "tokenizer.json").rename(sent / "words")
    (sent / "tokenizer.json").symlink_to("words")
    resealed(sent)
    assert glm5("run", "--artifact", sent, "--backend", "ort", *RUN).code == 0


# --- manifests that do not fit -------------------------------------------------------------------


def test_sizes_of_the_manifest(sent: Path) -> None:
    for change, complaint in (
        (lambda raw: raw["programs"][0]["gear"].update(tokens=0), "programs[0].gear.tokens is 0, which must lie"),
        (lambda raw: raw["programs"][0]["gear"].update(context_pages=2**40), "programs[0].gear.context_pages is "),
        (lambda raw: raw.update(programs=[]), "programs: their number is 0"),
        (
            lambda raw: next(iter(raw["caches"].values()))[0].update(shape=[10**12, 4]),
            "is [1000000000000, 4], not pool_pages",
        ),
        (lambda raw: next(iter(raw["caches"].values()))[0].update(shape=[-1, 4]), "is [-1, 4], not pool_pages"),
    ):
        honest = (sent / FILE).read_text()
        resealed(sent, change)
        assert complaint in refused("run", "--artifact", sent, "--backend", "ort", *RUN)
        (sent / FILE).write_text(honest)


def test_mutated_manifests(sent: Path) -> None:
    """Values changed at random, by seed: tokens or one line."""
    values = [-1, 0, 7, 2**31, 10**12, 1.5, "x", "", "object", "../x", None, True, [], {}, [1], {"a": 1}]
    honest, rng, outcomes = (sent / FILE).read_text(), np.random.default_rng(0), set()
    for _ in range(60):
        (sent / FILE).write_text(damaged(honest, values, rng, 0.05))
        try:
            Package(sent, "ort").generate([Prompt((1, 2, 3), 2)])
            outcomes.add("ran")
        except Failure as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"ran", "refused"}


# --- ONNX ----------------------------------------------------------------------------------------

X = Value("x", (4,), "float32")
STEP = Step("graph", (X,), (Value("y", (4,), "float32"),), "g")


def model_of(nodes: list[Any], functions: list[Any] = [], initializers: list[Any] = []) -> onnx.ModelProto:  # noqa: B006
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1), helper.make_opsetid("com.vendor", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


def external(location: str) -> onnx.ModelProto:
    held = onnx.TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    held.external_data.add(key="location", value=location)
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], initializers=[held])


def function(name: str, *called: tuple[str, str]) -> Any:
    domain = "own" if called[0][1].startswith("f") else ""
    nodes = [helper.make_node(op, [a], [b], domain=domain) for (a, op), b in zip(called, "bcd", strict=False)]
    return helper.make_function("own", name, ["a"], ["bcd"[len(nodes) - 1]], nodes, [helper.make_opsetid("own", 1)])


def loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Identity", ["v"], ["w"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, []),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])],
    )  # fmt: skip
    forever = helper.make_tensor("n", TensorProto.INT64, [], [2**62])
    return model_of([helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)], initializers=[forever])


def doubling() -> onnx.ModelProto:
    deep = [function(f"f{i}", ("a", f"f{i + 1}"), ("b", f"f{i + 1}")) for i in range(40)]
    call = helper.make_node("f0", ["x"], ["y"], domain="own")
    return model_of([call], [*deep, function("f40", ("a", "Sin"))])


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (b"", "refuses it"),
        (b"\x08\xff\xff\xff", "ONNX refuses it: Error parsing message"),
        (loop(), "attribute 'body' is a graph"),
        (external("../secret"), "lies in '../secret': leads out of the folder"),
        (external("/etc/passwd"), "no path relative to the folder"),
        (external("link"), "a link that leads out of the folder"),
        (external("beside"), "no file that the manifest lists"),
        (model_of([helper.make_node("Anything", ["x"], ["y"], domain="com.vendor")]), "'com.vendor.Anything'"),
        (model_of([helper.make_node("f", ["x"], ["y"], domain="own")], [function("f", ("a", "f"))]), "calls itself"),
        (doubling(), "more than 1,000,000 operations"),
        (model_of([helper.make_node("Sin", ["nothing"], ["y"])]), "ONNX Runtime refuses it"),
    ],
)
def test_an_onnx_graph_that_is_not_opened(tmp_path: Path, model: Any, complaint: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "beside").write_bytes(bytes(16))
    (tmp_path / "p" / "link").symlink_to("../secret")
    path = tmp_path / "p" / "g.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        OrtExecutor().load(path, STEP)
    assert complaint in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_data_in_a_file_that_the_manifest_lists(package: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "g.onnx").write_bytes(external("data").SerializeToString())
    runtime, manifest = OrtExecutor(), Manifest.read(package)
    runtime.admit(tmp_path, dataclasses.replace(manifest, files={"data": hash_file(tmp_path / "data")}))
    call = runtime.load(tmp_path / "g.onnx", STEP).bind({})
    found = runtime.get(call({"x": runtime.put(np.ones(4, np.float32))})["y"])
    np.testing.assert_array_equal(found, [1, 2, 3, 4])


def test_mutated_onnx_graphs(sent: Path) -> None:
    """Bytes changed at random, by seed, and hashed anew: tokens or one line."""
    rng, manifest, outcomes = np.random.default_rng(0), Manifest.read(sent), set()
    name = next(name for name in manifest.files if name.endswith("moe.onnx"))
    honest = (sent / name).read_bytes()
    for _ in range(30):
        changed = bytearray(honest)
        for place in rng.integers(len(changed), size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        (sent / name).write_bytes(changed)
        resealed(sent)
        try:
            Package(sent, "ort").generate([Prompt((1, 2, 3), 2)])
            outcomes.add("ran")
        except Failure as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


# --- StableHLO -----------------------------------------------------------------------------------


def stablehlo_file(path: Path, functions: str) -> Path:
    """A `jax.export` file of the functions; @main is of float32[4]."""
    spec = jax.ShapeDtypeStruct((4,), jnp.float32)
    exported = export.export(jax.jit(lambda x: (jnp.sin(x),)), platforms=["cpu"])(spec)
    version = dialect.get_version_from_compatibility_requirement(dialect.StablehloCompatibilityRequirement.WEEK_12)
    module = dialect.serialize_portable_artifact_str(
        f"module @m {{ {functions} }}".replace("T", "tensor<4xf32>"), version
    )
    path.write_bytes(dataclasses.replace(exported, mlir_module_serialized=module).serialize())
    return path


def hlo(name: str, body: str, result: str = "%0") -> str:
    public = "public" if name == "main" else "private"
    return f"func.func {public} @{name}(%a: T) -> T {{ {body} return {result} : T }} "


def call(name: str, given: str = "%a", result: str = "%0") -> str:
    return f"{result} = call @{name}({given}) : (T) -> T "


def test_a_file_of_ours_opens_and_computes(tmp_path: Path) -> None:
    path = stablehlo_file(tmp_path / "g", hlo("main", call("f")) + hlo("f", "%0 = stablehlo.sine %a : T"))
    x = np.arange(4, dtype=np.float32)
    found = XlaExecutor().load(path, STEP).bind({})({"x": x})["y"]
    np.testing.assert_allclose(found, np.sin(x), rtol=1e-6)


def test_files_that_are_not_opened(tmp_path: Path) -> None:
    """One child for all: the process of a run has none of it. Recursion and damage kill JAX, doubling calls hang it,
    custom calls run what they name at an address that they name."""
    custom = "%0 = stablehlo.custom_call @xla_ffi_python_cpu_callback(%a) {api_version = 4 : i32} : (T) -> T"
    deep = [hlo(f"f{i}", call(f"f{i + 1}") + call(f"f{i + 1}", "%0", "%1"), "%1") for i in range(40)]
    forever = (
        "%0 = stablehlo.while(%b = %a) : T cond { %c = stablehlo.constant dense<true> : tensor<i1> "
        "stablehlo.return %c : tensor<i1> } do { stablehlo.return %b : T }"
    )
    expected = {
        stablehlo_file(tmp_path / "custom", hlo("main", custom)): "stablehlo.custom_call",
        stablehlo_file(tmp_path / "self", hlo("main", call("f")) + hlo("f", call("f"))): "calls itself",
        stablehlo_file(
            tmp_path / "deep", hlo("main", call("f0")) + "".join(deep) + hlo("f40", "%0 = stablehlo.sine %a : T")
        ): "more than 1,000,000 operations",
        stablehlo_file(tmp_path / "while", hlo("main", forever)): "stablehlo.while",
        tmp_path / "empty": "JAX refuses it",
        tmp_path / "words": "JAX refuses it",
        ROOT / "tests" / "data" / "crashes.jax_export": "",  # SIGSEGV in one release, an error in another
    }
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "words").write_bytes(b"words" * 100)
    found = stablehlo_check.refusals(list(expected))
    assert list(found) == list(expected)
    for path, why in expected.items():
        assert why in found[path] and "\n" not in found[path]


def test_a_crash_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = stablehlo_file(tmp_path / "g", hlo("main", "%0 = stablehlo.sine %a : T"))
    with pytest.raises(ArtifactError, match=r"g: crashes JAX .SIGSEGV.; .*--trust-package"):
        XlaExecutor().load(path, STEP)
    XlaExecutor(trusted=True).load(path, STEP)


def test_a_graph_of_other_shapes_is_one_line(tmp_path: Path) -> None:
    path = stablehlo_file(tmp_path / "g", hlo("main", "%0 = stablehlo.sine %a : T"))
    with pytest.raises(ArtifactError, match="JAX refuses it"):
        XlaExecutor(trusted=True).load(path, dataclasses.replace(STEP, inputs=(dataclasses.replace(X, shape=(5,)),)))


def test_the_files_of_a_manifest(package: Path) -> None:
    """Whatever a manifest names is hashed."""
    manifest = Manifest.read(package)
    check_files(package, manifest)
    assert {name for _, name in manifest.named_files()} <= set(manifest.files)
    assert {"tokenizer", "devices[0].weights"} <= {field for field, _ in manifest.named_files()}


# --- memory --------------------------------------------------------------------------------------

GREEDY = 200_000  # squared, in float32: 160 GB


def greedy_onnx(path: Path) -> None:
    """The graph with a sum over so many numbers that nobody needs in its result."""
    model = onnx.load(path)
    tokens, result = model.graph.input[-1].name, model.graph.output[0].name
    for node in model.graph.node:
        for at, name in enumerate(node.output):
            if name == result:
                node.output[at] = "before"
    zero, axes = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]), [0]
    size = helper.make_tensor("size", TensorProto.INT64, [2], [GREEDY, GREEDY])
    model.graph.initializer.extend([zero, size, helper.make_tensor("axes", TensorProto.INT64, [1], axes)])
    model.graph.node.extend([
        helper.make_node("Cast", [tokens], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ids"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Expand", ["nothing", "size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["least"], keepdims=0),
        helper.make_node("Add", ["before", "least"], [result]),
    ])  # fmt: skip
    path.write_bytes(model.SerializeToString())


def greedy_torch(path: Path) -> None:
    import torch

    from backends.toolchains import torch as target

    inner = torch.export.load(path)
    shapes = [node.meta["val"] for node in inner.graph.nodes if node.op == "placeholder"]
    table, tokens = (np.zeros(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in shapes)

    def greedy(table: Any, tokens: Any) -> Any:
        row = jnp.arange(GREEDY, dtype=jnp.float32) * tokens.ravel()[0].astype(jnp.float32)
        return table[tokens] + jnp.max(row[:, None] + row[None, :]) * 0

    path.write_bytes(target.write(graph_of_function(greedy, table, tokens)))


def greedy_stablehlo(path: Path) -> None:
    inner = export.deserialize(bytearray(path.read_bytes()))

    def greedy(*given: Any) -> Any:
        (first, *rest) = inner.call(*given)
        many = jnp.arange(GREEDY**2 // 16, dtype=jnp.float32) * first.ravel()[0]
        return (first + jnp.sort(many)[7] * 0, *rest)

    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in inner.in_avals]
    path.write_bytes(export.export(jax.jit(greedy))(*shapes).serialize())


@pytest.mark.parametrize(
    ("fmt", "runtime", "spoil"),
    [
        ("onnx", "ort", greedy_onnx),
        pytest.param("torch", "torch", greedy_torch, marks=pytest.mark.slow),
        pytest.param("stablehlo", "xla", greedy_stablehlo, marks=pytest.mark.slow),
    ],
)
def test_operators_may_take_what_a_step_needs(
    package: Path, tmp_path: Path, fmt: str, runtime: str, spoil: Callable[[Path], None]
) -> None:
    sizes = ("--phase", "decode", "--context", 32, "--page-size", 16)
    small, sent = package.parent / "small", tmp_path / "sent"
    assert glm5("export", "--checkpoint", small, "--format", fmt, *sizes, "--out", sent).code == 0
    before = resource.getrlimit(resource.RLIMIT_DATA)
    (answer,) = Package(sent, runtime, linked=False).generate([Prompt((1, 2, 3), 2)])
    assert len(answer.token_ids) == 2 and resource.getrlimit(resource.RLIMIT_DATA) == before
    raw = json.loads((sent / FILE).read_text())
    files = graph_of(raw)
    spoil(sent / files.get("cpu", files.get("any", "")))
    resealed(sent)
    with pytest.raises(ArtifactError) as caught:
        Package(sent, runtime, linked=False).generate([Prompt((1, 2, 3), 2)])
    said = str(caught.value)
    assert "takes more than 2." in said and "GB of memory beside its weights" in said and "--trust-package" in said
    assert "\n" not in said and resource.getrlimit(resource.RLIMIT_DATA) == before
