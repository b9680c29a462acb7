"""`glm5 export check` of Ascend packages, against graphs that are not as documented."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch

from runtime.deployment.manifest import FILE, Gear, Manifest, hash_file
from tests.cli.cli import glm5
from tests.npu import vendor
from tests.npu.packages import export, request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of GLM-5's widths: every operator is called."""
    from backends.ascend.target import NpuOptions
    from model.split import Layout

    out = tmp_path_factory.mktemp("check") / "package"
    job = request("glm-5", "w8a8", {"decode": [Gear(2, 1, 64)]}, Layout(tp=16), page_size=128)
    export(job, out, NpuOptions())
    return out


def _change(folder: Path, name: str, change: object) -> None:
    """A graph stored anew with one of its calls changed, and listed as that."""
    manifest = Manifest.read(folder)
    path = folder / name
    program = torch.export.load(path)
    change(program)  # type: ignore[operator]
    torch.export.save(program, path)
    files = {**manifest.files, name: hash_file(path)}
    (folder / FILE).write_text(dataclasses.replace(manifest, files=files).to_json())


@pytest.mark.slow
def test_a_package_passes_and_what_was_not_looked_at_is_said(folder: Path):
    found = glm5("export", "check", folder, "--json").json
    assert found["refusals"] == [] and found["calls"] > 60
    meta = [line for line in found["unchecked"] if "Meta kernels" in line]
    assert bool(meta) == bool(vendor.reason_absent())


@pytest.mark.slow
def test_a_call_that_is_not_as_documented_is_refused_where_it_is(folder: Path):
    graph = "decode-b2-t1-c8192/mla-full-indexer-moe.1.pt2"

    def wrong_enumeration(program: torch.export.ExportedProgram) -> None:
        node = next(n for n in program.graph.nodes if "npu_grouped_matmul" in str(n.target))
        node.kwargs = {**node.kwargs, "group_list_type": 3}

    before = {name: (folder / name).read_bytes() for name in (graph, FILE)}
    _change(folder, graph, wrong_enumeration)
    done = glm5("export", "check", folder)
    assert done.code == 2
    line = done.out.splitlines()[0]
    assert line.startswith(f"refused  {graph}: npu_grouped_matmul") and "group_list_type 0 or 1, not 3" in line
    (folder / graph).write_bytes(b"no archive")
    assert json.loads(glm5("export", "check", folder, "--json").out)["refusals"][0]["file"] == graph
    for name, content in before.items():
        (folder / name).write_bytes(content)


@pytest.mark.npu
def test_torch_npus_own_kernels_are_asked(folder: Path):
    """A result of another type than the graph has is nothing that the documentation forbids."""
    graph = "decode-b2-t1-c8192/mla-full-indexer-dense.0.pt2"

    def other_type(program: torch.export.ExportedProgram) -> None:
        node = next(n for n in program.graph.nodes if "npu_quant_matmul" in str(n.target))
        node.kwargs = {**node.kwargs, "output_dtype": 5}

    before = {name: (folder / name).read_bytes() for name in (graph, FILE)}
    _change(folder, graph, other_type)
    done = glm5("export", "check", folder)
    assert done.code == 2 and "torch_npu returns" in done.out
    for name, content in before.items():
        (folder / name).write_bytes(content)
