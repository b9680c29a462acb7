"""How safetensors spells the types of numbers."""

from __future__ import annotations

from collections.abc import Mapping

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
