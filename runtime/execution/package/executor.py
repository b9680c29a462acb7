"""What a runtime is asked to do with a package's graphs, and which runtimes there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.errors import BackendUnavailable
from foundation.errors import UsageError
from runtime.deployment.manifest import GearUnits, Manifest, Step


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

    def load(self, path: Path, step: Step) -> Loaded: ...

    def load_step(self, folder: Path, manifest: Manifest, program: GearUnits) -> Loaded | None:
        """All graphs of a one-device package as one, with inputs and outputs as `link.py` names them; None where the
        runtime has no use for that."""
        ...

    def put(self, array: np.ndarray) -> Any: ...

    def get(self, buffer: Any) -> np.ndarray: ...


# executor -> (module, class, the package it needs, the formats it runs)
_KNOWN = {
    # of ascend packages ort runs what has no CANN operators; the ascend executor says itself what is missing
    "ort": ("runtime.execution.package.ort", "OrtExecutor", "onnxruntime", ("onnx", "ascend")),
    "ascend": ("runtime.execution.package.ascend", "AscendExecutor", "numpy", ("ascend",)),
    "torch": ("runtime.execution.package.torch", "TorchExecutor", "torch", ("torch",)),
    "xla": ("runtime.execution.package.xla", "XlaExecutor", "jax", ("stablehlo",)),
}


def executor(name: str, fmt: str) -> Executor:
    """The executor of that name for a package of format `fmt`.

    Raises `UsageError` where it does not run that format, `BackendUnavailable` where its package is not installed.
    """
    if name not in _KNOWN:
        raise UsageError(f"--backend {name} does not run exported packages; with --artifact: {', '.join(_KNOWN)}")
    module, made, needs, formats = _KNOWN[name]
    if fmt not in formats:
        able = ", ".join(each for each, known in _KNOWN.items() if fmt in known[3])
        hint = f"use --backend {able}" if able else "it needs its own toolchain (see the package's README)"
        raise UsageError(f"--backend {name} runs {', '.join(formats)}, and this package is {fmt}; {hint}")
    if find_spec(needs) is None:
        raise BackendUnavailable(f"--backend {name} needs {needs}: pip install 'glm5-runtime[export]'")
    return getattr(import_module(module), made)()


def executor_of(fmt: str) -> str | None:
    """The executor that runs a format here, or None."""
    return next((name for name, (*_, formats) in _KNOWN.items() if fmt in formats), None)
