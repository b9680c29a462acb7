"""Ascend packages on a chip: graphs compiled by `build.sh`, or here by ATC, and run by pyACL. Never run on a chip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from backends.ascend import compiler, om
from backends.ascend.plugin import LIBRARY, VENDOR
from backends.errors import ArtifactError
from runtime.deployment.manifest import Manifest, Step
from runtime.execution.package.executor import TRUST, graphs


class AscendExecutor:
    """See `runtime.execution.package.executor.Executor`. Raises `BackendUnavailable` without CANN."""

    name = "ascend"
    platform = "any"

    def __init__(self, session: om.Session | None = None, trusted: bool = False) -> None:
        self.session, self.trusted = session or om.Session(), trusted

    def admit(self, folder: Path, manifest: Manifest) -> None:
        """Compiled graphs and the plugin's library are machine code, and no manifest lists them."""
        for path in graphs(folder, manifest, self.platform):
            _, compiled = _compiled(path)
            for code in (compiled, _library(folder)):
                if code.is_file() and not self.trusted:
                    raise ArtifactError(f"{code}: is compiled code, which may do anything; {TRUST}, or else remove it")

    def load(self, path: Path, step: Step) -> AscendLoaded:
        """`path` is FOLDER/GEAR/GRAPH.onnx; the compiled graph is FOLDER/om/GEAR/GRAPH.om."""
        folder, compiled = _compiled(path)
        if not compiled.is_file():
            plugin = folder / VENDOR
            brought = _library(folder).is_file()
            environment = {"ASCEND_CUSTOM_OPP_PATH": str(plugin.absolute())} if brought else {}
            soc = self.session.acl.get_soc_name()
            compiled = compiler.compile_graph(path, compiled.with_suffix(""), soc, environment)
        return AscendLoaded(self.session, self.session.load(compiled), step)

    def put(self, array: np.ndarray) -> om.OmTensor:
        return self.session.put(array)

    def get(self, buffer: om.OmTensor) -> np.ndarray:
        return self.session.get(buffer)


class AscendLoaded:
    def __init__(self, session: om.Session, model: om.OmModel, step: Step):
        self.session, self.model, self.step = session, model, step

    def bind(self, fixed: Mapping[str, Any]) -> AscendBound:
        return AscendBound(self.model, self.step, fixed)


class AscendBound:
    def __init__(self, model: om.OmModel, step: Step, fixed: Mapping[str, Any]):
        self.model, self.fixed, self.aliases = model, fixed, step.aliases
        self.outputs = {value.name: (value.shape, _dtype(value.dtype)) for value in step.outputs}
        self.inputs = [value.name for value in step.inputs]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: self.fixed[name] if name in self.fixed else values[name] for name in self.inputs}
        return self.model.run(given, self.outputs, self.aliases)


def _compiled(path: Path) -> tuple[Path, Path]:
    """The package's folder, and where the compiled form of its graph at `path` is."""
    folder = path.parent.parent
    return folder, folder / "om" / path.parent.name / f"{path.stem}.om"


def _library(folder: Path) -> Path:
    return folder / VENDOR / "framework" / "onnx" / LIBRARY


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)
