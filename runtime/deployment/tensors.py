"""Per-device weight files: safetensors, written and read one tensor at a time.

The file's layout is the safetensors format's own (an 8-byte length, a JSON header, the tensors' bytes), so that
every safetensors reader takes it; FP8 and bfloat16 included. It has no 4-bit integers: an int4 tensor is a vector of
bytes (U8), two numbers to each in the tensor's order, the first in the low half, as ONNX and XLA pack them; the
header's metadata `int4` has the shapes by name, as JSON.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from operator import index
from pathlib import Path

import ml_dtypes
import numpy as np

from backends.errors import ArtifactError
from backends.toolchains.packing import INT4, packed, unpacked
from foundation.reading import Unreadable, parse_json
from foundation.safetensors import NAMES, header, read_header


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by numpy's spelling, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _stored(shape: tuple[int, ...], kind: np.dtype) -> tuple[str, Sequence[int], int]:
    """A tensor's type, shape and bytes in a file."""
    if kind == INT4:
        size = -(-math.prod(shape) // 2)
        return "uint8", [size], size
    return kind.name, shape, math.prod(shape) * kind.itemsize


class TensorWriter:
    """A safetensors file of known shapes, filled tensor by tensor: `put(name, array)`; as a context, closed at its end.

    Its bytes are asked for at once, and written, not stored through a memory map: where the disk is full that is an
    `OSError`, and there a signal that ends the process.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Sequence[int], str]]):
        self._kinds = {name: (tuple(shape), numpy_dtype(dtype)) for name, (shape, dtype) in tensors.items()}
        int4 = {name: list(shape) for name, (shape, kind) in self._kinds.items() if kind == INT4}
        begin, self._places = header(
            {name: _stored(*each) for name, each in self._kinds.items()}, {"int4": json.dumps(int4)} if int4 else None
        )
        self.missing = set(self._places)
        self._file = path.open("wb")
        try:
            self._file.write(begin)
            _allocate(self._file, max((end for _, end in self._places.values()), default=0))
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or not self.missing, f"tensors never written: {sorted(self.missing)[:3]}"

    def put(self, name: str, array: np.ndarray) -> None:
        shape, kind = self._kinds[name]
        assert array.shape == shape and array.dtype == kind, (name, array.shape, shape, array.dtype, kind)
        self._file.seek(self._places[name][0])
        raw = packed(array) if kind == INT4 else np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._file.write(raw.data)
        self.missing.discard(name)


def _allocate(file: BufferedWriter, size: int) -> None:
    """Has the system set `size` bytes aside for a file, where its kind of disk can. Raises `OSError`."""
    file.flush()
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


class TensorReader:
    """A safetensors file as memory-mapped arrays. Raises `ArtifactError` for a damaged one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._entries, metadata = read_header(path)
            self._int4: dict[str, tuple[int, ...]] = {}
            for name, shape in parse_json(metadata.get("int4", "{}")).items():
                size = -(-math.prod(map(index, shape)) // 2)
                if self._entries[name][:2] != ("U8", (size,)) or min(shape, default=0) < 0:
                    raise ValueError(f"the int4 shape of {name[:60]!r} is another size than the tensor")
                self._int4[name] = tuple(shape)
            for name, entry in self._entries.items():
                if entry.dtype not in NAMES:
                    raise ValueError(f"tensor {name[:60]!r} has the unknown type {entry.dtype[:60]!r}")
            self._map = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
        except (Unreadable, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path}: not a weight file, or it is damaged ({error}); export the package again"
            ) from None

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def array(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise ArtifactError(f"{self.path}: holds no weight {name}; export the package again")
        entry = self._entries[name]
        raw = self._map[entry.begin : entry.end]
        if name in self._int4:
            return unpacked(raw, self._int4[name])
        return raw.view(numpy_dtype(NAMES[entry.dtype])).reshape(entry.shape)
