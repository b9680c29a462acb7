"""What the kernel for int8 times 4-bit integers is given beside the weights. Free of torch."""

from __future__ import annotations

import numpy as np


def bias_name(values: str) -> str:
    """Of the second input of a weight: "w.down.values" -> "w.down.bias"."""
    return values.removesuffix(".values") + ".bias"


def bias_of(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values [e, i, ..] and scale [e, 1, ..] of 4-bit experts: what the kernel for int8 times int4 is given, [e, ..].

    It computes with the halves of an int8, 16 high + low, and takes low - 8 for the low one: the bias has the eight
    times the sum of the weights that this leaves out (vllm-ascend and SGLang, w4a8 for NPUs, read 2026-11).
    """
    return np.asarray(8 * np.sum(values.astype(np.float32) * scale.astype(np.float32), axis=1, dtype=np.float32))
