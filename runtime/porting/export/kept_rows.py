"""Rows of caches as a package keeps them in int8, in NumPy: to compare them with the graph's own.

`model.formats.ROWS` says what a row holds: int8_packed the latent's integers, its rotary part as it is and a float32
for each 128 integers; int8_scaled an index key's integers, beside which a cache of its own has a float16. (Index keys
are rotated before: see `backends.emulation.rounding`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from model.config import Mla, ModelConfig
from model.formats import ROWS

Buffers = Callable[[str], np.ndarray]


def stored(value: np.ndarray, name: str, rows: Mapping[str, str], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """A cache "latent" or "index", [pages,s,..], as the buffers of a package. rows: formats by cache."""
    if name not in rows:
        return {f"cache.{name}": value}
    fmt, rope = ROWS[rows[name]], _rope(cfg) if name == "latent" else 0
    plain = value.shape[-1] - rope
    scale, integers = _rounded(value[..., :plain], fmt.shared or plain)
    if name == "index":
        return {"cache.index": integers, "cache.index_scale": scale.astype(fmt.scale)}
    parts = (integers, _bytes(value[..., plain:]), _bytes(scale.astype(fmt.scale)))
    return {"cache.latent": np.concatenate(parts, axis=-1)}


def read(held: Buffers, name: str, rows: Mapping[str, str], cfg: ModelConfig, dtype: np.dtype) -> np.ndarray:
    """What such buffers stand for, in `dtype`, which the rotary part is kept in."""
    value = held(f"cache.{name}")
    if name not in rows:
        return value
    if name == "index":
        return (value * held("cache.index_scale").astype(np.float32)).astype(dtype)
    fmt, attention, rope = ROWS[rows[name]], cfg.attention, _rope(cfg)
    assert isinstance(attention, Mla) and fmt.shared and fmt.scale
    lora = attention.kv_lora_rank
    parts = np.split(value, [lora, lora + rope * dtype.itemsize], axis=-1)
    scale = np.repeat(np.ascontiguousarray(parts[2]).view(fmt.scale), fmt.shared, axis=-1)[..., :lora]
    return np.concatenate([(parts[0] * scale).astype(dtype), np.ascontiguousarray(parts[1]).view(dtype)], axis=-1)


def _rope(cfg: ModelConfig) -> int:
    assert isinstance(cfg.attention, Mla)
    return cfg.attention.rope_dim


def _rounded(value: np.ndarray, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 scales [.., groups], and int8 of value's shape."""
    width = value.shape[-1]
    wide = np.pad(value.astype(np.float32), [(0, 0)] * (value.ndim - 1) + [(0, -width % shared)])
    groups = wide.reshape(*value.shape[:-1], -1, shared)
    scale = np.maximum(np.abs(groups).max(-1), np.float32(1e-10)) / np.float32(127)
    return scale, np.rint(groups / scale[..., None]).astype(np.int8).reshape(wide.shape)[..., :width]


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.int8)
