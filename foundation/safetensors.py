"""The safetensors format, as far as its files begin: an 8-byte length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format)."""

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
"""Its spelling of a type -> the name in numpy or ml_dtypes."""
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
