"""How safetensors spells the types of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

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
"""Safetensors' spelling -> the name in numpy or ml_dtypes."""


def header(tensors: Mapping[str, tuple[Sequence[int], str, int]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """How a file of these tensors (shape, type in numpy's spelling, bytes) begins, and where in it the bytes of each
    begin and end, one behind another: an 8-byte length, a JSON header, the tensors' bytes."""
    spelling = {name: spelt for spelt, name in NAMES.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, (shape, dtype, size) in tensors.items():
        places[name] = (end, end + size)
        entries[name] = {"dtype": spelling[dtype], "shape": list(shape), "data_offsets": list(places[name])}
        end += size
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    start = 8 + len(encoded)
    found = {name: (start + begin, start + end) for name, (begin, end) in places.items()}
    return len(encoded).to_bytes(8, "little") + encoded, found
