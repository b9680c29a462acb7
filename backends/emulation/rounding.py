"""Activations and cache rows to narrow types, as the chips' kernels do: find the scale, divide, round, saturate.

Everything is computed in float32 and gives float32 back: `Rounded.values` hold exactly what the narrow type holds
(an integer of 127 or an e4m3 number is a float32), so that a product can be taken at once or cast first. The last
dim is the one that is contracted; groups divide it, and the last group may be shorter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from model.formats import E2M1, E2M1_MAX, E4M3, E4M3_MAX, INT8, RowFormat

LEAST = 1e-10  # of a group's largest magnitude: vLLM's `per_token_group_quant_fp8`
LARGEST = {INT8: 127.0, E4M3: E4M3_MAX}
"""What the largest magnitude of a token, or of its groups, is scaled to."""
_POWER_OF_TWO_EMAX = {E4M3: 8, E2M1: 2}


class Rounded(NamedTuple):
    """values [.., k] as float32 numbers of the narrow type, and the scale [.., groups] of each group of them."""

    values: Array
    scale: Array


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def divide(x: Array, by: float) -> Array:
    """x / by, correctly rounded. XLA turns a division by a constant into a product with its reciprocal, which is one
    bit off for half of the operands; so the divisor depends on x (and is NaN where x is)."""
    return x / jnp.where(x == x, jnp.float32(by), jnp.float32(jnp.nan))


def to_type(x: Array, dtype: np.dtype) -> Array:
    """float32 to the nearest number of a narrow type, ties to even, saturating; returned as float32."""
    if dtype == INT8:
        return jnp.clip(jnp.round(x), -128.0, 127.0)
    if dtype == E2M1:  # by hand: one of XLA's code generators rounds twice, by way of bfloat16
        clipped = jnp.clip(x, -E2M1_MAX, E2M1_MAX)
        size = jnp.abs(clipped)
        step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0)).astype(jnp.float32)
        return jnp.round(clipped / step) * step
    return _f32(jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(dtype))


def grouped(x: Array, group: int) -> Array:
    """[.., k] as [.., groups, group], padded with zeros."""
    short = -x.shape[-1] % group
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x
    return padded.reshape(*x.shape[:-1], -1, group)


def _ungrouped(x: Array, width: int) -> Array:
    return x.reshape(*x.shape[:-2], -1)[..., :width]


def power_of_two(largest: Array, emax: int, up: bool = False) -> Array:
    """2^(floor(log2 largest) - emax), exactly (OCP Microscaling 1.0, 6.3). With `up` the exponent is rounded up and
    `emax` already in `largest`: the least power of two that is no smaller."""
    mantissa, exponent = jnp.frexp(largest)
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent) if up else exponent - 1 - emax
    exponent = jnp.clip(jnp.where(largest > 0, exponent, -127), -127, 127)
    return jnp.ldexp(jnp.ones_like(largest), exponent)


def per_group(x: Array, group: int | None, dtype: np.dtype, bound: float) -> Rounded:
    """A float32 scale for each `group` elements (None: for each row), so that the largest becomes `bound`."""
    width = x.shape[-1]
    parts = grouped(_f32(x), group or width)
    largest = jnp.max(jnp.abs(parts), axis=-1)
    scale = divide(jnp.maximum(largest, jnp.float32(LEAST)), bound)
    return Rounded(_ungrouped(to_type(parts / scale[..., None], dtype), width), scale)


def microscaled(x: Array, dtype: np.dtype, group: int = 32) -> Rounded:
    """OCP MX: a power-of-two scale for each 32 elements."""
    width = x.shape[-1]
    parts = grouped(_f32(x), group)
    scale = power_of_two(jnp.max(jnp.abs(parts), axis=-1), _POWER_OF_TWO_EMAX[dtype])
    return Rounded(_ungrouped(to_type(parts / scale[..., None], dtype), width), scale)


def nvfp4(x: Array) -> Rounded:
    """e2m1 with an e4m3 scale for each 16 elements, in units of a float32 scale a row.

    A released checkpoint has a calibrated constant (`input_scale`) in place of the row's own largest magnitude.
    """
    width = x.shape[-1]
    parts = grouped(_f32(x), 16)
    largest = jnp.max(jnp.abs(parts), axis=-1)
    whole = jnp.max(largest, axis=-1, keepdims=True)
    inverse = jnp.float32(E4M3_MAX * E2M1_MAX) / jnp.where(whole > 0, whole, 1.0)
    scale = to_type(inverse * divide(largest, E2M1_MAX), E4M3)
    scale = jnp.where(scale == 0, jnp.float32(0.125), scale)
    held = scale / inverse
    return Rounded(_ungrouped(to_type(parts / held[..., None], E2M1), width), held)


def restored(rounded: Rounded, group: int | None = None) -> Array:
    """float32 [.., k]: values times their scales."""
    width = rounded.values.shape[-1]
    parts = grouped(rounded.values, group or width)
    return _ungrouped(parts * _f32(rounded.scale)[..., None], width)


# --- cache rows ------------------------------------------------------------------------------------------


def latent_row(row: Array, lora: int, fmt: RowFormat) -> Array:
    """An MLA row [.., lora + rope] as read back from the cache, in the row's own type.

    With scales (FlashMLA's FP8 record, vllm-ascend's packed INT8 one): a float32 for each 128 latents, found as the
    program runs; the rotary key in 16 bits; kernels widen to bfloat16 before multiplying. Plain FP8: all of the row,
    scale 1.
    """
    if fmt.scale is None:
        return head_row(row, fmt)
    latent, rope = row[..., :lora], row[..., lora:]
    kept = restored(per_group(latent, fmt.shared, fmt.values, LARGEST[fmt.values]), fmt.shared)
    return jnp.concatenate([kept.astype(row.dtype), rope], axis=-1)


def head_row(row: Array, fmt: RowFormat) -> Array:
    """A key or value row [.., heads, width] as read back. FP8: e4m3 with scale 1, vLLM's default where a checkpoint
    brings no calibrated scales. INT8, whose scales are calibrated a channel: a scale for each token and head stands in.
    """
    kept = to_type(_f32(row), E4M3) if fmt.values == E4M3 else restored(per_group(row, None, INT8, 127.0))
    return kept.astype(row.dtype)


def index_row(row: Array, fmt: RowFormat) -> Array:
    """An index query or key [.., width]: rotated, then rounded with a scale for each `fmt.shared` elements, or one a
    row.

    Native kernels multiply both by a Hadamard matrix first, which spreads outliers and leaves their product as it
    is. FP8: the scale is the least power of two that suffices (DeepSeek-V3.2's `scale_fmt` "ue8m0"). INT8: amax / 127,
    in the scale's own type.
    """
    assert fmt.scale is not None
    rotated = _f32(row)
    width = row.shape[-1]
    if width & (width - 1) == 0:
        rotated = jnp.einsum("...i,ij->...j", rotated, jnp.asarray(hadamard(width)))
    rotated = _f32(rotated.astype(row.dtype))
    if fmt.values == INT8:
        rounded = per_group(rotated, fmt.shared, INT8, 127.0)
    else:
        parts = grouped(rotated, fmt.shared or width)
        largest = jnp.maximum(jnp.max(jnp.abs(parts), axis=-1), jnp.float32(LEAST))
        scale = power_of_two(divide(largest, E4M3_MAX), 0, up=True)
        rounded = Rounded(_ungrouped(to_type(parts / scale[..., None], E4M3), width), scale)
    kept = Rounded(rounded.values, rounded.scale.astype(fmt.scale))
    return restored(kept, fmt.shared).astype(row.dtype)


def hadamard(width: int) -> Any:
    """The orthonormal Hadamard matrix of a power of two, Sylvester's: float32 [width, width]."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(width**-0.5)
