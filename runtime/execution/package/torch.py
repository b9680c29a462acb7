"""torch on the CPU: the `.pt2` programs, run as they are."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from runtime.deployment.manifest import GearUnits, Manifest, Step
from runtime.execution.package.executor import Function, graphs, refusing
from runtime.execution.package.torch_archive import checked

_VIEWS = {  # numpy has no such types of its own
    np.dtype(ml_dtypes.bfloat16): (np.uint16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
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
    """See `runtime.execution.package.executor.Executor`."""

    name = "torch"
    platform = "any"

    def __init__(self, trusted: bool = False) -> None:
        self.trusted, self._checked = trusted, dict[Path, io.BytesIO]()

    def admit(self, folder: Path, manifest: Manifest) -> None:
        if not self.trusted:
            self._checked = {path: checked(path) for path in graphs(folder, manifest, self.platform)}

    def load(self, path: Path, step: Step) -> Function:
        archive = path if self.trusted else self._checked.pop(path, None) or checked(path)
        with refusing(path, "torch"), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            module = torch.export.load(archive).module()

        def run(*arguments: Any) -> Any:
            with torch.inference_mode():
                return module(*arguments)

        return Function(run, step)

    def load_step(self, folder: Path, manifest: Manifest, program: GearUnits) -> None:
        return None

    def put(self, array: np.ndarray) -> Any:
        array = np.asarray(array, order="C")
        if array.dtype in _VIEWS:
            raw, dtype = _VIEWS[array.dtype]
            return torch.from_numpy(array.view(raw).copy()).view(dtype)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def get(self, buffer: Any) -> np.ndarray:
        if buffer.dtype == torch.bfloat16:
            return buffer.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return buffer.numpy()
