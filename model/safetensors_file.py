"""One `.safetensors` file as a set of memory-mapped numpy arrays, FP8 and bfloat16 included.

The `safetensors` library validates the file (header, coverage); its numpy reader has no FP8, so the
bytes are mapped here. Nothing is read until an array is touched. Writing goes through a temporary file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from foundation.safetensors import NAMES, header
from model.errors import CheckpointError

_DTYPES = {spelling: np.dtype(getattr(ml_dtypes, name, name)) for spelling, name in NAMES.items()}


class SafetensorsFile:
    """`names`, and `array(name)`: a read-only view into the mapped file.

    Raises `CheckpointError` for a missing, truncated or corrupt file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safetensors.safe_open(str(path), framework="numpy"):
                pass
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: shard is missing") from None
        except (safetensors.SafetensorError, OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: truncated or corrupt shard ({error})") from None
        self._data_start = 8 + size
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._map = np.memmap(path, mode="r", dtype=np.uint8)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype_name(self, name: str) -> str:
        """As the header spells it: "BF16", "F8_E4M3", .."""
        return self._entries[name]["dtype"]

    def dtype(self, name: str) -> np.dtype:
        stored = self.dtype_name(name)
        if stored not in _DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name} has the unsupported dtype {stored}")
        return _DTYPES[stored]

    def array(self, name: str) -> np.ndarray:
        begin, end = self._entries[name]["data_offsets"]
        raw = self._map[self._data_start + begin : self._data_start + end]
        return raw.view(self.dtype(name)).reshape(self.shape(name))


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one shard, readable by transformers, through a temporary file: what is in the place may be mapped.

    The library's own writer is not used, since what the system refuses is no `OSError` there.
    """
    temporary = path.with_name(path.name + ".tmp")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # each type begins on its own size
    begin, _ = header({name: (tensors[name].shape, str(tensors[name].dtype), tensors[name].nbytes) for name in order})
    with temporary.open("wb") as file:
        file.write(begin)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    os.replace(temporary, path)
