"""`glm5 export check`: what ATC would refuse is said, in a line with its source; what it takes is not."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from model.split import Layout
from runtime.deployment.manifest import FILE, Manifest
from runtime.porting.export.check import check
from tests.cli.cli import glm5 as run
from tests.export.ascend_packages import edit, export, graph_file, save
from tests.export.ascend_runtimes import copy_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("ascend") / "tiny")


@pytest.fixture(scope="module")
def glm5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-5's own widths, one device of eight: every fused operator is in it."""
    folder = tmp_path_factory.mktemp("ascend") / "glm5"
    from runtime.deployment.manifest import Gear

    gears = {"decode": [Gear(4, 1, 256)]}
    return export(folder, model="glm-5", scheme="bf16", layout=Layout(tp=8), gears=gears, profile="ascend-910b3")


def _lines(folder: Path, **arguments: Any) -> list[str]:
    return [refusal.line() for refusal in check(folder, **arguments).refusals]


@pytest.mark.parametrize("package", ["tiny", "glm5"])
def test_what_we_write_is_taken(package: str, request: pytest.FixtureRequest):
    report = check(request.getfixturevalue(package))
    assert not report.refusals
    assert report.graphs >= 7 and report.nodes > 300


def test_glm5_has_every_fused_operator_that_its_shapes_allow(glm5: Path):
    report = check(glm5)
    assert set(report.plugin) == {
        "GroupedMatmul", "LightningIndexer", "MoeGatingTopK", "MoeInitRoutingV3", "RmsNorm", "ScatterNdUpdate",
        "SparseFlashAttention",
    }  # fmt: skip
    assert report.family == "ascend910b"


def _node(type_: str, **attributes: Any) -> Callable[[onnx.ModelProto], Any]:
    def change(model: onnx.ModelProto) -> None:
        given = [model.graph.input[0].name, model.graph.input[0].name, model.graph.input[0].name]
        model.graph.node.append(helper.make_node(type_, given, ["extra"], **attributes))

    return change


def _opset(version: int) -> Callable[[onnx.ModelProto], Any]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _duplicate_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node[:2]:
        node.name = "same"


def _open_dim(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _no_import(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "elsewhere"


def _fp8(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_node("Sort"), "1 x ai.onnx::18::Sort: no registered operator (E16002)"),
        (_node("Loop"), "1 x ai.onnx::18::Loop: no registered operator (E16002)"),
        (_node("Scan"), "1 x ai.onnx::18::Scan: no registered operator (E16002)"),
        (_node("ReduceL2"), "1 x ai.onnx::18::ReduceL2: registered up to opset 17 only (E16002)"),
        (_node("ScatterND", reduction="mul"), "reduction other than none, add, max or min"),
        (_node("Transpose"), "no perm"),
        (_node("Cast", to=TensorProto.FLOAT8E4M3FN), "type FLOAT8E4M3FN"),
        (_opset(19), "opset 19: ATC takes 9 to 18"),
        (_opset(8), "opset 8: ATC takes 9 to 18"),
        (lambda model: setattr(model, "ir_version", 10), "IR version 10"),
        (_duplicate_names, "node name same: 2 nodes have it"),
        (_open_dim, "dim 0 is open and no gears are given for it (E10040)"),
        (_no_import, "the model imports no opset of elsewhere"),
        (_fp8, "type FLOAT8E4M3FN"),
        (lambda model: model.graph.ClearField("output"), "no outputs: a graph needs some"),
    ],
)
def test_a_graph_that_atc_refuses(tiny: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], Any], says: str):
    folder = copy_of(tiny, tmp_path / "package")
    file = graph_file(folder, "view")
    lines = _lines(edit(folder, file, change))
    assert any(says in line and line.startswith(f"refused  {file}: ") for line in lines), lines
    assert all(re.search(r" \[.+\]$", line) for line in lines), "a line without its source"


def _query_heads(model: onnx.ModelProto) -> None:
    """An index query of another width, as far as the file says."""
    node = next(n for n in model.graph.node if n.op_type == "LightningIndexer")
    info = next(i for i in (*model.graph.value_info, *model.graph.input) if i.name == node.input[0])
    info.type.tensor_type.shape.dim[3].dim_value = 64


def _attribute(type_: str, name: str, value: int) -> Callable[[onnx.ModelProto], Any]:
    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == type_)
        next(a for a in node.attribute if a.name == name).i = value

    return change


@pytest.mark.parametrize(
    ("change", "unit", "says"),
    [
        (_query_heads, "mla-full-indexer-dense", "LightningIndexer takes no 32 heads of 64"),
        (_attribute("LightningIndexer", "sparse_count", 2500), "mla-full-indexer-dense", "does not select 2500"),
        (_node("NoSuchOp", domain="cann"), "mla-full-indexer-dense", "no such operator of CANN is known"),
        (_node("MoeInitRoutingV3", domain="cann"), "view", "imports no opset of cann"),
    ],
)
def test_a_fused_operator_that_its_kernel_refuses(
    glm5: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], Any], unit: str, says: str
):
    folder = copy_of(glm5, tmp_path / "package")
    lines = _lines(edit(folder, graph_file(folder, unit), change))
    assert any(says in line for line in lines), lines


def test_fused_nodes_without_the_plugin_are_refused(glm5: Path, tmp_path: Path):
    folder = copy_of(glm5, tmp_path / "package")
    manifest = Manifest.read(folder)
    manifest.extra["ascend"]["plugin"] = ["RmsNorm"]
    lines = _lines(save(folder, manifest))
    assert any("SparseFlashAttention: the package brings no plugin" in line for line in lines)
    assert not any("::RmsNorm" in line for line in lines)


def test_a_chip_without_the_kernels_is_no_chip_of_atc(glm5: Path):
    with pytest.raises(Exception, match="Ascend310P3: CANN's fused operators are for Ascend910B"):
        check(glm5, soc_version="Ascend310P3")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "missing, the manifest lists it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "bytes where the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"), "altered"),
    ],
)
def test_files_are_those_of_the_manifest(tiny: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str):
    folder = copy_of(tiny, tmp_path / "package")
    file = graph_file(folder, "embed")
    damage(folder / file)
    lines = _lines(folder)
    assert len(lines) == 1 and says in lines[0] and file in lines[0]


def test_gears_are_counted(tiny: Path, tmp_path: Path):
    folder = copy_of(tiny, tmp_path / "package")
    manifest = Manifest.read(folder)
    twice = dataclasses.replace(manifest, programs=manifest.programs * 2)
    assert any("is there 2 times [E10039]" in line for line in _lines(save(folder, twice)))
    gear = manifest.programs[0].gear
    many = [
        dataclasses.replace(manifest.programs[0], gear=dataclasses.replace(gear, sequences=i)) for i in range(1, 102)
    ]
    save(folder, dataclasses.replace(manifest, programs=tuple(many)))
    assert any("decode gears: 101, and ATC takes at most 100 [E10036]" in line for line in _lines(folder))
    assert not _lines(folder, soc_version="Ascend950PR_9599")


def test_the_command_exits_with_2_and_its_lines(tiny: Path, tmp_path: Path):
    code, out, err = run("export", "check", str(tiny))
    assert (code, err) == (0, "") and "nothing that ATC would refuse" in out
    folder = copy_of(tiny, tmp_path / "package")
    edit(folder, graph_file(folder, "view"), _node("Loop"))
    code, out, err = run("export", "check", str(folder))
    assert code == 2 and out.startswith("refused  ") and "1 refusals" in out and not err
    code, out, _ = run("export", "check", "--json", str(folder))
    assert code == 2 and json.loads(out)["refusals"][0]["what"].endswith("Loop")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / FILE).unlink(), "no exported package"),
        (lambda folder: (folder / FILE).write_text("{"), "not a manifest, or it is truncated"),
        (
            lambda folder: save(folder, dataclasses.replace(Manifest.read(folder), schema_version=99)),
            "manifest version 99",
        ),
        (
            lambda folder: save(folder, dataclasses.replace(Manifest.read(folder), format="torch")),
            "holds torch, and ATC takes ONNX",
        ),
    ],
)
def test_what_is_no_package_for_atc_is_one_line(tiny: Path, tmp_path: Path, change: Callable[[Path], Any], says: str):
    folder = copy_of(tiny, tmp_path / "package")
    change(folder)
    code, out, err = run("export", "check", str(folder))
    assert code == 2 and not out and says in err and len(err.splitlines()) == 1
