"""torch: the `.pt2` programs of a package, run as they are on a device of torch's."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from backends.ascend.operators import npu_release
from backends.errors import BackendUnavailable
from backends.toolchains.torch_device import TorchDevice
from runtime.deployment.manifest import GearUnits, Manifest, Step
from runtime.execution.package.executor import Function, graphs, refusing
from runtime.execution.package.torch_archive import checked


def _operators(manifest: Manifest, platform: str) -> set[str]:
    """Of torch_npu, that the graphs call."""
    return {
        name
        for step in graphs(Path(), manifest, platform).values()
        for use in step.ops
        if use.form == "custom"
        for name in use.target.split(", ")
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's account, on stderr, of what it then raises."""
    log = logging.getLogger("torch.export")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class TorchExecutor:
    """See `runtime.execution.package.executor.Executor`. On the CPU, where a device is not given."""

    name = "torch"
    platform = "any"

    def __init__(self, trusted: bool = False, device: TorchDevice | None = None) -> None:
        self.trusted, self._checked = trusted, dict[Path, io.BytesIO]()
        self.device = device or TorchDevice()

    def admit(self, folder: Path, manifest: Manifest) -> None:
        """Raises `BackendUnavailable` for graphs of torch_npu's operators where those have no kernels, and for graphs
        that talk to other devices themselves: here ranks run one after another."""
        called = _operators(manifest, self.platform)
        exchanging = {name for name, operator in npu_release().operators.items() if operator.exchange}
        if sending := sorted(called & exchanging):
            raise BackendUnavailable(
                f"{folder}: its graphs talk to other devices themselves ({sending[0]}): start it with its run.py, or "
                "export it with --npu-ops local"
            )
        if lacking := self._lacking(called):
            raise BackendUnavailable(
                f"{folder}: its graphs call {', '.join(lacking[:3])}{' ..' if len(lacking) > 3 else ''} of torch_npu, "
                f"which have no kernels on {self.device.name}; use --backend ascend on a host with an NPU, or export "
                "with --npu-ops none"
            )
        if not self.trusted:
            self._checked = {path: checked(path) for path in graphs(folder, manifest, self.platform)}

    def _lacking(self, called: set[str]) -> list[str]:
        if not called:
            return []
        import torch

        from backends.ascend.declare import declare

        declare()
        key, found = (
            ("CPU" if self.device.name == "cpu" else "PrivateUse1"),
            torch._C._dispatch_has_kernel_for_dispatch_key,
        )
        return sorted(n for n in called if not found(f"npu::{n}", key))

    def load(self, path: Path, step: Step) -> Function:
        archive = path if self.trusted else self._checked.pop(path, None) or checked(path)
        with refusing(path, "torch"), _quiet():
            run = self.device.load(archive)
        shapes = [value.shape for value in step.inputs]

        def shaped(*arguments: Any) -> Any:
            """A weight is given in the shape of the graph's input, its elements in the file's order."""
            return run(*(x.reshape(shape) for x, shape in zip(arguments, shapes, strict=True)))

        return Function(shaped, step)

    def load_step(self, folder: Path, manifest: Manifest, program: GearUnits) -> None:
        return None

    def put(self, array: np.ndarray) -> Any:
        return self.device.put(array)

    def get(self, buffer: Any) -> np.ndarray:
        return self.device.get(buffer)
