"""Exported programs (`.pt2`) on a device of torch's, and arrays to and from it. Imports torch when called."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backends.toolchains.packing import INT4, packed


@dataclasses.dataclass(frozen=True)
class TorchDevice:
    """A device of torch's by name."""

    name: str = "cpu"

    def put(self, array: np.ndarray) -> Any:
        return host_tensor(array).to(self.name)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.name)

    def get(self, tensor: Any) -> np.ndarray:
        return host_array(tensor.cpu())

    def load(self, archive: Path | io.BytesIO) -> Callable[..., Any]:
        """A program (`.pt2`) as a function of tensors. Raises what torch does where it does not read it."""
        import torch
        from torch.export.passes import move_to_device_pass

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(archive)  # type: ignore[arg-type]
            if self.name != "cpu":
                program = move_to_device_pass(program, self.name)
            module = program.module()

        def run(*arguments: Any) -> Any:
            with torch.inference_mode():
                return module(*arguments)

        return run


def host_tensor(array: np.ndarray) -> Any:
    """A host array as a tensor; numpy has some of the types by way of ml_dtypes. 4-bit integers come in a vector
    of int32."""
    import torch

    array = np.asarray(array, order="C")
    if array.dtype == INT4:  # eight to an int32, the first in its lowest bits
        array = packed(array).view(np.int32)
    if array.dtype.name in ("bfloat16", "float8_e4m3fn"):
        raw = {1: np.uint8, 2: np.uint16}[array.dtype.itemsize]
        return torch.from_numpy(array.view(raw).copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def host_array(tensor: Any) -> np.ndarray:
    """A tensor of the host as an array."""
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
