"""Per-device weight files: safetensors, written and read through a memory map, one tensor in memory at a time.

The file's layout is the safetensors format's own (an 8-byte length, a JSON header, the tensors' bytes), so that
every safetensors reader takes it; FP8 and bfloat16 included. It has no 4-bit integers: an int4 tensor is a vector of
bytes (U8), two numbers to each in the tensor's order, the first in the low half, as ONNX and XLA pack them; the
header's metadata `int4` has the shapes by name, as JSON.
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

INT4 = np.dtype(ml_dtypes.int4)
_SPELLING = {name: spelling for spelling, name in NAMES.items()}


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by numpy's spelling, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def packed(values: np.ndarray) -> np.ndarray:
    """int4 of any shape as bytes, two numbers to each, the first in the low half."""
    halves = np.asarray(values, order="C").reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    halves = np.pad(halves, (0, halves.size % 2))
    return halves[0::2] | (halves[1::2] << 4)


def unpacked(raw: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """`packed`, undone."""
    halves = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
    return ((halves ^ 8).astype(np.int8) - 8).astype(INT4).reshape(shape)


class TensorWriter:
    """A safetensors file of known shapes, filled tensor by tensor: `put(name, array)`."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Sequence[int], str]]):
        int4 = {name: list(shape) for name, (shape, dtype) in tensors.items() if dtype == INT4.name}
        header: dict[str, object] = {
            "__metadata__": {"format": "pt"} | ({"int4": json.dumps(int4)} if int4 else {}),
        }
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            kind = numpy_dtype(dtype)
            size = -(-math.prod(shape) // 2) if kind == INT4 else math.prod(shape) * kind.itemsize
            spelt = ("U8", [size]) if kind == INT4 else (_SPELLING[dtype], list(shape))
            header[name] = {"dtype": spelt[0], "shape": spelt[1], "data_offsets": [end, end + size]}
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
            raw = packed(array) if kind == INT4 else np.ascontiguousarray(array).reshape(-1).view(np.uint8)
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
            self._int4 = json.loads(header.pop("__metadata__", {}).get("int4", "{}"))
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
        raw = self._map[self._start + begin : self._start + end]
        if name in self._int4:
            return unpacked(raw, self._int4[name])
        return raw.view(kind).reshape(shape)
