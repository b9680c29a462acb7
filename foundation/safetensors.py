"""The safetensors format, as far as its files begin: an 8-byte length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from foundation.reading import MOST_BYTES, Unreadable, open_regular, parse_json

NAMES: Mapping[str, str] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}
"""Its spelling of a type -> the name in numpy or ml_dtypes."""
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}
SPELLING: Mapping[str, str] = {name: spelling for spelling, name in NAMES.items()}


def header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """How a file of these tensors begins, and the bytes of it that each takes, one behind another.

    tensors: the name of the type, the shape, and how many bytes, by the tensor's name. metadata: beside what
    transformers asks for.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    places, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        begin, end = end, end + size
        entries[name] = {"dtype": SPELLING[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = (begin, end)
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    start = 8 + len(encoded)
    found = {name: (start + begin, start + end) for name, (begin, end) in places.items()}
    return len(encoded).to_bytes(8, "little") + encoded, found


class StoredEntry(NamedTuple):
    """A tensor of a file: its type as the format spells it, its shape, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | Path) -> tuple[dict[str, StoredEntry], dict[str, str]]:
    """The tensors of a file, and its metadata. Raises `Unreadable`, for what lies outside the file or is another size
    than its shape too; a type that is not in `NAMES` is left to whoever wants its tensor."""
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if size > min(MOST_BYTES, length - 8):
            raise Unreadable("syntax", f"its header of {size:,} bytes is more than it holds, or than {MOST_BYTES:,}")
        try:
            text = file.read(size).decode("utf-8")
        except UnicodeDecodeError:
            raise Unreadable("encoding", "its header is not UTF-8 text") from None
    document = parse_json(text)
    if not isinstance(document, dict):
        raise Unreadable("syntax", "its header is no object")
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Unreadable("syntax", "its metadata are not texts by name")
    return {name: _entry(name, entry, 8 + size, length) for name, entry in document.items()}, metadata


def _entry(name: str, entry: object, start: int, length: int) -> StoredEntry:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(each) is int and each >= 0 for each in (*shape, begin, end)
        ):
            found = StoredEntry(dtype, tuple(shape), start + begin, start + end)
        case _:
            raise Unreadable("syntax", f"tensor {name[:60]!r} has no dtype, shape and data_offsets")
    if not start <= found.begin <= found.end <= length:
        raise Unreadable("syntax", f"tensor {name[:60]!r} ends at byte {found.end:,} of {length:,}")
    needed = math.prod(shape) * _SIZES.get(dtype, 0)
    if dtype in _SIZES and needed != end - begin:
        raise Unreadable("syntax", f"tensor {name[:60]!r} holds {end - begin:,} bytes, its shape needs {needed:,}")
    return found
