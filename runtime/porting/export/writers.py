"""The formats that any toolchain reads: StableHLO, ONNX and torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from backends.errors import ArtifactError, Unsupported
from backends.toolchains.walker import Graph
from foundation.errors import first_line
from runtime.deployment.manifest import Manifest, Step
from runtime.porting.export.job import ExportJob, op_uses, values
from runtime.porting.export.readme import readme


def graph_step(graph: Graph, files: dict[str, str], uses: Counter[tuple[str, str, str]]) -> Step:
    """A graph's link in a chain, where the file has the graph's own inputs and outputs."""
    return Step(
        kind="graph",
        name=graph.name,
        inputs=values(graph.inputs),
        outputs=values(graph.outputs),
        files=files,
        aliases=dict(graph.aliases),
        ops=op_uses(uses),
    )


def _described(folder: Path, manifest: Manifest) -> Manifest:
    """A package with its README."""
    (folder / "README.md").write_text(readme(manifest), encoding="utf-8")
    return manifest


class StableHloWriter:
    """A bytecode file for any compiler, and a `jax.export` form for each platform; ops stay composites."""

    packages: tuple[str, ...] = ()

    def write(self, graph: Graph, folder: Path, stem: str) -> Step:
        from backends.toolchains import stablehlo

        written, files = stablehlo.write(graph), {"any": f"{stem}.mlirbc"}
        (folder / files["any"]).write_bytes(written.portable)
        for platform, serialized in written.serialized.items():
            files[platform] = f"{stem}.{platform}.jax_export"
            (folder / files[platform]).write_bytes(serialized)
        found = Counter({(name, "composite", name): n for name, n in stablehlo.ops(graph).items()})
        return graph_step(graph, files, found)

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        from backends.toolchains import stablehlo

        manifest.extra["stablehlo"] = {"version": stablehlo.version(), "dialects": ["stablehlo", "func"]}
        return _described(folder, manifest)


class OnnxWriter:
    """A model a graph, each op a model-local function; checked, shapes and types inferred, before it is stored."""

    packages: tuple[str, ...] = ("onnx",)

    def __init__(self, request: ExportJob):
        from backends.toolchains.onnx_target import NARROW_OPSET, OPSET

        self.opset = NARROW_OPSET if request.cut.lowerings else OPSET  # of all graphs, so that they can be linked

    def write(self, graph: Graph, folder: Path, stem: str) -> Step:
        import onnx

        from backends.toolchains import onnx as target

        written = target.write(graph, opset=self.opset)
        try:
            onnx.checker.check_model(written.model, full_check=True)
        except Exception as error:  # of the checker, or of its shape inference
            raise Unsupported(f"{stem}: the ONNX checker refuses it: {first_line(error)}") from None
        (folder / f"{stem}.onnx").write_bytes(written.model.SerializeToString(deterministic=True))
        found = Counter({(form.name, form.form, form.target): n for form, n in written.ops.items()})
        return graph_step(graph, {"any": f"{stem}.onnx"}, found)

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        manifest.extra["onnx"] = {"opset": self.opset}
        return _described(folder, manifest)


class TorchWriter:
    """An `ExportedProgram` a graph; ops are decomposed into ATen. Each is one that opens without trust."""

    packages: tuple[str, ...] = ("torch",)

    def write(self, graph: Graph, folder: Path, stem: str) -> Step:
        from backends.toolchains import stablehlo
        from backends.toolchains import torch as target
        from runtime.execution.package.torch_archive import checked

        (folder / f"{stem}.pt2").write_bytes(target.write(graph))
        try:
            checked(folder / f"{stem}.pt2")
        except ArtifactError as error:
            raise Unsupported(f"what torch makes of {stem} holds more than a package may: {error}") from None
        found = Counter({(name, "decomposed", "aten"): n for name, n in stablehlo.ops(graph).items()})
        return graph_step(graph, {"any": f"{stem}.pt2"}, found)

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        return _described(folder, manifest)
