"""XLA on the host CPU: the StableHLO of a package, loaded through `jax.export` and compiled with donated caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from backends.errors import ArtifactError
from runtime.deployment.manifest import GearUnits, Manifest, Step
from runtime.deployment.tensors import INT4
from runtime.execution.package.executor import TRUST, Function, graphs, refusing
from runtime.execution.package.stablehlo_check import refusals


class XlaExecutor:
    """See `runtime.execution.package.executor.Executor`."""

    name = "xla"
    platform = "cpu"

    def __init__(self, trusted: bool = False) -> None:
        self.trusted = trusted
        self._admitted: set[Path] = set()

    def admit(self, folder: Path, manifest: Manifest) -> None:
        self._admit(list(graphs(folder, manifest, self.platform)))

    def _admit(self, paths: list[Path]) -> None:
        if self.trusted:
            return
        for path, why in refusals(paths).items():
            raise ArtifactError(f"{path}: {why}; {TRUST}")
        self._admitted.update(paths)

    def load(self, path: Path, step: Step) -> Function:
        if path not in self._admitted:
            self._admit([path])
        with refusing(path, "JAX"):
            exported = export.deserialize(bytearray(path.read_bytes()))
            names = [value.name for value in step.inputs]
            donate = tuple(names.index(source) for source in step.aliases.values())
            run = jax.jit(exported.call, donate_argnums=donate)
            specs = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in step.inputs]
            return Function(run.lower(*specs).compile(), step)

    def load_step(self, folder: Path, manifest: Manifest, program: GearUnits) -> None:
        return None

    def put(self, array: np.ndarray) -> Any:
        cpu = jax.devices("cpu")[0]
        if array.dtype == INT4:  # placed on a device by name it is refused: as if its two numbers a byte were not known
            with jax.default_device(cpu):
                return jax.numpy.asarray(array)
        return jax.device_put(array, cpu)

    def get(self, buffer: Any) -> np.ndarray:
        return np.asarray(buffer)
