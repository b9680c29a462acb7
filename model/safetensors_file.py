"""One `.safetensors` file as a set of memory-mapped numpy arrays, FP8 and bfloat16 included.

The `safetensors` library validates the file (header, coverage); its numpy reader has no FP8, so the
bytes are mapped here. Nothing is read until an array is touched. Writing goes through a temporary file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from foundation.reading import Unreadable
from foundation.safetensors import NAMES, header, read_header
from model.errors import CheckpointError

_DTYPES = {spelling: np.dtype(getattr(ml_dtypes, name, name)) for spelling, name in NAMES.items()}


class SafetensorsFile:
    """`names`, and `array(name)`: a read-only view into the mapped file.

    Raises `CheckpointError` for a missing, truncated or corrupt file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._entries, _ = read_header(path)
            with safetensors.safe_open(str(path), framework="numpy"):
                pass
        except Unreadable as error:
            why = "shard is missing" if error.reason == "absent" else f"truncated or corrupt shard ({error})"
            raise CheckpointError(f"{path}: {why}") from None
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: truncated or corrupt shard ({error})") from None
        self._map = np.memmap(path, mode="r", dtype=np.uint8)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype_name(self, name: str) -> str:
        """As the header spells it: "BF16", "F8_E4M3", .."""
        return self._entries[name].dtype

    def dtype(self, name: str) -> np.dtype:
        stored = self.dtype_name(name)
        if stored not in _DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name} has the unsupported dtype {stored}")
        return _DTYPES[stored]

    def array(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        return self._map[entry.begin : entry.end].view(self.dtype(name)).reshape(entry.shape)


def raw_bytes(array: np.ndarray) -> memoryview:
    """An array's bytes, those of ml_dtypes included, to be written."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one shard, readable by transformers, through a temporary file: what is in the place may be mapped.

    The library's own writer is not used, since what the system refuses is no `OSError` there.
    """
    temporary = path.with_name(path.name + ".tmp")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # each type begins on its own size
    begin, _ = header({name: (str(tensors[name].dtype), tensors[name].shape, tensors[name].nbytes) for name in order})
    with temporary.open("wb") as file:
        file.write(begin)
        for name in order:
            file.write(raw_bytes(tensors[name]))
    os.replace(temporary, path)
