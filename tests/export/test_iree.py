"""A second compiler: IREE takes the portable StableHLO of a package, and its decode steps are the graph's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.deployment.manifest import Manifest, Step
from runtime.execution.local.load import embedded_checkpoint
from tests.cli.cli import glm5

compiler = pytest.importorskip("iree.compiler", reason="needs IREE: pip install 'glm5-runtime[iree]'")
iree = pytest.importorskip("iree.runtime", reason="needs IREE: pip install 'glm5-runtime[iree]'")


class Iree:
    """An executor of the bytecode files; see `runtime.execution.package.executor.Executor`."""

    name = "iree"
    platform = "any"

    def __init__(self) -> None:
        self.config = iree.Config("local-task")
        self.compiled: list[str] = []

    def load(self, path: Path, step: Step) -> Any:
        assert path.suffix == ".mlirbc"
        binary = compiler.compile_str(
            path.read_bytes(),
            target_backends=["llvm-cpu"],
            input_type="stablehlo",
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
        module = iree.load_vm_module(iree.VmModule.copy_buffer(self.config.vm_instance, binary), self.config)
        self.compiled.append(path.name)
        return Loaded(module.main, step)

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, buffer: Any) -> np.ndarray:
        return np.asarray(buffer)


class Loaded:
    def __init__(self, run: Any, step: Step):
        self.run, self.step = run, step

    def bind(self, fixed: Mapping[str, Any]) -> Any:
        def call(values: Mapping[str, Any]) -> dict[str, Any]:
            results = self.run(*[np.asarray({**values, **fixed}[value.name], order="C") for value in self.step.inputs])
            results = results if isinstance(results, tuple | list) else [results]
            return {value.name: np.asarray(r) for value, r in zip(self.step.outputs, results, strict=True)}

        return call


@pytest.mark.slow
def test_iree_takes_the_decode_step(tmp_path: Path) -> None:
    """Every unit of the embedded checkpoint, four steps past `index_topk`, logits and caches within 1e-4 of JAX."""
    from model.checkpoint import Checkpoint
    from runtime.execution.package.runner import Runner, stored_weights
    from runtime.porting.export.verify import TOLERANCE, Reference, compare

    sizes = ("--phase", "decode", "--batch", 2, "--context", 256, "--page-size", 16)
    assert glm5("export", "--format", "stablehlo", *sizes, "--out", tmp_path / "p").code == 0
    manifest, executor = Manifest.read(tmp_path / "p"), Iree()
    weights = stored_weights(tmp_path / "p", manifest)
    assert weights is not None
    runner = Runner(tmp_path / "p", manifest, executor, weights)
    reference = Reference(Checkpoint(embedded_checkpoint()), manifest)
    found = compare(manifest, manifest.programs[0], runner, reference, np.random.default_rng(0))
    assert found.worst <= TOLERANCE and found.context > 64 and found.steps == 4
    assert len(executor.compiled) == len(manifest.programs[0].units)
