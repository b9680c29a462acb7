"""Per-device weight files: safetensors, written and read one tensor at a time.

The file's layout is the safetensors format's own (an 8-byte length, a JSON header, the tensors' bytes), so that
every safetensors reader takes it; FP8 and bfloat16 included.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path

import ml_dtypes
import numpy as np

from backends.errors import ArtifactError
from foundation.safetensors import NAMES, header


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by numpy's spelling, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


class TensorWriter:
    """A safetensors file of known shapes, filled tensor by tensor: `put(name, array)`; as a context, closed at its end.

    Its bytes are asked for at once, and written, not stored through a memory map: where the disk is full that is an
    `OSError`, and there a signal that ends the process.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Sequence[int], str]]):
        self._kinds = {name: (tuple(shape), numpy_dtype(dtype)) for name, (shape, dtype) in tensors.items()}
        sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in self._kinds.items()}
        begin, self._places = header({name: (*tensors[name], sizes[name]) for name in tensors})
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
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
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
