"""Per-device weight files: safetensors, written and read through a memory map, one tensor in memory at a time.

The file's layout is the safetensors format's own (an 8-byte length, a JSON header, the tensors' bytes), so that
every safetensors reader takes it; FP8 and bfloat16 included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from backends.errors import ArtifactError
from foundation.safetensors import NAMES

_SPELLING = {name: spelling for spelling, name in NAMES.items()}


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by numpy's spelling, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


class TensorWriter:
    """A safetensors file of known shapes, filled tensor by tensor: `put(name, array)`."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Sequence[int], str]]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            kind = numpy_dtype(dtype)
            size = math.prod(shape) * kind.itemsize
            header[name] = {"dtype": _SPELLING[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._places[name] = (end, tuple(shape), kind)
            end += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
        self._start = 8 + len(encoded)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(self._start + end)
        self._map = np.memmap(path, dtype=np.uint8, mode="r+") if end else None
        self.missing = set(self._places)

    def put(self, name: str, array: np.ndarray) -> None:
        begin, shape, kind = self._places[name]
        assert array.shape == shape and array.dtype == kind, (name, array.shape, shape, array.dtype, kind)
        if self._map is not None:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._map[self._start + begin : self._start + begin + raw.size] = raw
        self.missing.discard(name)

    def close(self) -> None:
        assert not self.missing, f"tensors never written: {sorted(self.missing)[:3]}"
        if self._map is not None:
            self._map.flush()
            self._map = None


class TensorReader:
    """A safetensors file as memory-mapped arrays. Raises `ArtifactError` for a damaged one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            self._entries = {
                name: (entry["data_offsets"], entry["shape"], numpy_dtype(NAMES[entry["dtype"]]))
                for name, entry in header.items()
            }
            self._map = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
            self._start = 8 + size
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(f"{path}: not a weight file, or it is damaged; export the package again") from None

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def array(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise ArtifactError(f"{self.path}: holds no weight {name}; export the package again")
        (begin, end), shape, kind = self._entries[name]
        return self._map[self._start + begin : self._start + end].view(kind).reshape(shape)
