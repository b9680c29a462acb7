"""What a runtime is asked to do with a package's graphs, and which runtimes there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.errors import ArtifactError, BackendUnavailable
from foundation.errors import Failure, UsageError
from runtime.deployment.manifest import FILE, GearUnits, Manifest, Step


class BoundGraph(Protocol):
    """A graph with some inputs fixed: the others in, all outputs out, by name."""

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]: ...


class Loaded(Protocol):
    """A graph in memory."""

    def bind(self, fixed: Mapping[str, Any]) -> BoundGraph:
        """With weights (and the device's rank) in place. An input that an output may take over (`Step.aliases`)
        must not be used again after a call."""
        ...


class Function:
    """A `Loaded` graph that a callable computes: inputs in the order of the step's, outputs too."""

    def __init__(self, run: Callable[..., Any], step: Step):
        self._run = run
        self._inputs = [value.name for value in step.inputs]
        self._outputs = [value.name for value in step.outputs]

    def bind(self, fixed: Mapping[str, Any]) -> BoundGraph:
        held = dict(fixed)

        def call(values: Mapping[str, Any]) -> dict[str, Any]:
            given = [held[name] if name in held else values[name] for name in self._inputs]
            return dict(zip(self._outputs, self._run(*given), strict=True))

        return call


class Executor(Protocol):
    """A runtime. Buffers are its own kind of array."""

    name: str
    platform: str

    def admit(self, folder: Path, manifest: Manifest) -> None:
        """Looks at a package from anywhere before the first graph is loaded, without running what it says. Raises
        `ArtifactError` for one that is not opened without trust."""
        ...

    def load(self, path: Path, step: Step) -> Loaded: ...

    def load_step(self, folder: Path, manifest: Manifest, program: GearUnits) -> Loaded | None:
        """All graphs of a one-device package as one, with inputs and outputs as `link.py` names them; None where the
        runtime has no use for that."""
        ...

    def put(self, array: np.ndarray) -> Any: ...

    def get(self, buffer: Any) -> np.ndarray: ...


def graphs(folder: Path, manifest: Manifest, platform: str) -> dict[Path, Step]:
    """The files of a package that a runtime of `platform` loads, and what each is."""
    steps = (step for program in manifest.programs for chain in program.units.values() for step in chain)
    return {folder / graph_file(step, platform): step for step in steps if step.kind == "graph"}


def graph_file(step: Step, platform: str) -> str:
    """The file of a graph that a runtime of `platform` loads. Raises `ArtifactError`."""
    file = step.files.get(platform) or step.files.get("any")
    if file is None:
        raise ArtifactError(f"{FILE}: graph {step.name} has no file for {platform}; export the package for it")
    return file


# executor -> (module, class, the package it needs, the formats it runs)
_KNOWN = {
    "ort": ("runtime.execution.package.ort", "OrtExecutor", "onnxruntime", ("onnx",)),
    # of ascend packages torch runs what has no operators of torch_npu; the ascend executor says itself what is missing
    "torch": ("runtime.execution.package.torch", "TorchExecutor", "torch", ("torch", "ascend")),
    "ascend": ("runtime.execution.package.ascend", "AscendExecutor", "torch", ("ascend",)),
    "xla": ("runtime.execution.package.xla", "XlaExecutor", "jax", ("stablehlo",)),
}


TRUST = "to open it all the same, if you trust where it comes from: --trust-package"


@contextmanager
def refusing(what: object, who: str) -> Iterator[None]:
    """What a runtime raises at a graph, as one line: no runtime's exceptions have a base of their own."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        why = lines[0] if lines[0] and not isinstance(error, LookupError) else f"{type(error).__name__} {lines[0]}"
        raise ArtifactError(f"{what}: {who} refuses it: {why[:300]}") from None


def executor(name: str, fmt: str, trusted: bool = False) -> Executor:
    """The executor of that name for a package of format `fmt`. trusted: it opens graphs that may run code. Raises what
    `runnable` does."""
    runnable(name, fmt)
    module, made, *_ = _KNOWN[name]
    return getattr(import_module(module), made)(trusted=trusted)


def runnable(name: str, fmt: str) -> None:
    """Raises `UsageError` where the executor of that name does not run a package of format `fmt`, `BackendUnavailable`
    where its package is not installed."""
    if name not in _KNOWN:
        raise UsageError(f"--backend {name} does not run exported packages; with --artifact: {', '.join(_KNOWN)}")
    *_, needs, formats = _KNOWN[name]
    if fmt not in formats:
        able = ", ".join(each for each, known in _KNOWN.items() if fmt in known[3])
        hint = f"use --backend {able}" if able else "it needs its own toolchain (see the package's README)"
        raise UsageError(f"--backend {name} runs {', '.join(formats)}, and this package is {fmt}; {hint}")
    if find_spec(needs) is None:
        raise BackendUnavailable(f"--backend {name} needs {needs}: pip install 'glm5-runtime[export]'")


def executor_of(fmt: str) -> str | None:
    """The executor that runs a format here, or None."""
    return next((name for name, (*_, formats) in _KNOWN.items() if fmt in formats), None)
