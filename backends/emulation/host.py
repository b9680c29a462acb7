"""A chip's number formats on the host CPU: a checkpoint and an adapter for the serving engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.cpu import CpuBackend
from backends.emulation.number_formats import NumberFormats
from model.checkpoint import Checkpoint, Group, groups
from model.weights import Quantized, Weight


class Converted(Checkpoint):
    """A checkpoint whose weights are loaded as a chip with these formats holds them."""

    def __init__(self, path: str | Path, formats: NumberFormats):
        super().__init__(path)
        self._formats = formats

    def read(
        self, group: Group, weight: Weight, dtype: str = "float32", keep_fp8: bool = False
    ) -> np.ndarray | Quantized:
        value = super().read(group, weight, "float32", self._formats.dtype != "float32")
        return self._formats.weight(weight, value, mtp=group in groups(self.config, self.has_mtp)["mtp"])


class EmulatedCpu(CpuBackend):
    """The host CPU, computing in the formats of another chip."""

    def __init__(self, formats: NumberFormats):
        self._formats = formats

    def lowerings(self) -> Mapping[str, Callable[..., Any]]:
        return self._formats.lowerings(super().lowerings())
