"""Ascend packages on a chip, through torch_npu: all ranks of a layout on one device. Never run on a chip."""

from __future__ import annotations

from backends.ascend.device import why_not
from backends.errors import BackendUnavailable
from backends.toolchains.torch_device import TorchDevice
from runtime.execution.package.torch import TorchExecutor


class AscendExecutor(TorchExecutor):
    """Raises `BackendUnavailable` without an NPU."""

    name = "ascend"

    def __init__(self, trusted: bool = False) -> None:
        if reason := why_not():
            raise BackendUnavailable(f"--backend ascend cannot be used here: {reason}")
        super().__init__(trusted, TorchDevice("npu:0"))
