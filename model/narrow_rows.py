"""Rows of a cache in FP8 with their scales, as bytes: what programs keep where `model.formats.ROWS` has scales a token.

A record is e4m3 values, then a float32 scale for each 128 of them, then what is kept in bfloat16 as it is (a latent's
rotary part): "fp8_ds_mla" (DeepSeek's and FlashMLA's 656 bytes of 512 + 64 elements) and, with nothing kept as it is,
"fp8_scaled" (an index key of 128 in 132). A scale is the group's greatest magnitude over 448, found as the row is
written, so that rows need no calibration. Pages of such a cache are uint8 [pages, page size, bytes], which is what ops
tell it by.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from model.formats import E4M3, E4M3_MAX

GROUP = 128
"""Elements that share a scale (`RowFormat.shared` of both)."""
_LEAST = 1e-10  # of a group's greatest magnitude: a row of zeros has a scale too


def is_narrow(pages: Array) -> bool:
    """Whether pages, or rows of them, are records."""
    return pages.dtype == jnp.uint8


def packed(rows: Array, plain: int = 0) -> Array:
    """rows [.., width] as records, uint8 [.., bytes]; plain: the last elements, which stay bfloat16."""
    width = rows.shape[-1] - plain
    groups = _grouped(rows[..., :width].astype(jnp.float32))
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), jnp.float32(_LEAST)) / jnp.float32(E4M3_MAX)
    values = narrowed(groups / scale[..., None]).reshape(*rows.shape[:-1], -1)[..., :width]
    parts = [lax.bitcast_convert_type(values, jnp.uint8), _bytes(scale)]
    return jnp.concatenate([*parts, _bytes(rows[..., width:].astype(jnp.bfloat16))][: 3 if plain else 2], axis=-1)


def unpacked(held: Array, width: int, plain: int, dtype: jnp.dtype) -> Array:
    """Records as rows [.., width] of `dtype`, of which the last `plain` elements were kept as they are."""
    scaled = width - plain
    count = -(-scaled // GROUP)
    values = lax.bitcast_convert_type(held[..., :scaled], E4M3).astype(jnp.float32)
    scale = _of_bytes(held[..., scaled : scaled + 4 * count], jnp.float32)
    wide = (_grouped(values) * scale[..., None]).reshape(*held.shape[:-1], -1)[..., :scaled].astype(dtype)
    if not plain:
        return wide
    return jnp.concatenate([wide, _of_bytes(held[..., scaled + 4 * count :], jnp.bfloat16).astype(dtype)], axis=-1)


def narrowed(x: Array) -> Array:
    """e4m3, saturating."""
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _grouped(x: Array) -> Array:
    short = -x.shape[-1] % GROUP
    whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x
    return whole.reshape(*x.shape[:-1], -1, GROUP)


def _bytes(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _of_bytes(held: Array, dtype: jnp.dtype) -> Array:
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(held.reshape(*held.shape[:-1], -1, size), dtype)
