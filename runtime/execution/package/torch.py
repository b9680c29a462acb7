"""torch on the CPU: the `.pt2` programs, run as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from backends.errors import ArtifactError
from runtime.deployment.manifest import GearUnits, Manifest, Step
from runtime.execution.package.executor import Function

_VIEWS = {  # numpy has no such types of its own
    np.dtype(ml_dtypes.bfloat16): (np.uint16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}


class TorchExecutor:
    """See `runtime.execution.package.executor.Executor`."""

    name = "torch"
    platform = "any"

    def load(self, path: Path, step: Step) -> Function:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = torch.export.load(path).module()
        except Exception as error:
            raise ArtifactError(f"{path}: torch refuses it: {str(error).splitlines()[0]}") from None

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
