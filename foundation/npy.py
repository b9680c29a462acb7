"""The .npy format as far as tables of numbers go: what numpy's writer puts there, and nothing is evaluated
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from foundation.reading import MOST_BYTES, Unreadable, read_bytes

_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<>|=]?(?:b1|[iu][1248]|f[248]))', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,18}, ?)*(?:\d{1,18})?)\), ?\} *\n?",
    re.ASCII,
)


class StoredArray(NamedTuple):
    """An array of numbers as its file has it. dtype: in numpy's spelling, "<f8"; fortran: columns stand together."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    content: bytes


def read_npy(path: str | Path, most_bytes: int = MOST_BYTES) -> StoredArray:
    """The array in a .npy file. Raises `Unreadable`, for one of objects, text or records too."""
    data = read_bytes(path, most_bytes)
    if data[: len(_MAGIC)] != _MAGIC or len(data) < 12:
        raise Unreadable("syntax", "not a .npy file")
    wide = data[6] > 1  # the format's version: from 2 on the header's length has four bytes
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    found = _HEADER.fullmatch(data[start:end].decode("latin-1")) if end <= len(data) else None
    if found is None:
        raise Unreadable("syntax", "not a .npy file of numbers")
    shape = tuple(int(size) for size in found["shape"].replace(" ", "").split(",") if size)
    held, needed = len(data) - end, math.prod(shape) * int(found["dtype"][-1])
    if held != needed:
        raise Unreadable("syntax", f"a .npy file of {held:,} bytes of numbers, whose header says {needed:,}")
    return StoredArray(found["dtype"], shape, found["fortran"] == "True", data[end:])
