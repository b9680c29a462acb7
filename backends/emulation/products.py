"""Matrix products in each format: x [n, k] times a quantised [k, o], in float32 [n, o].

Integers are multiplied and summed exactly, then scaled; narrow floats are multiplied exactly and summed in float32
(a tensor core may keep fewer bits: Hopper about 14 inside a block of 128, which is not emulated). Scales are applied
where the kernels apply them: after the sum over the elements that share them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from backends.emulation import rounding
from model.formats import E8M0, FP8_BLOCK, MatrixFormat
from model.ops import full_scale
from model.quantised import shared_size

_EXACT = 1024  # products of int8 numbers whose sum float32 holds: 1024 * 128 * 128 = 2^24


def dot(x: Array, w: Array) -> Array:
    """float32 [n,k] x [k,o], summed in float32."""
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def integer_dot(x: Array, w: Array) -> Array:
    """int32 [n,o] of integers up to 128 held as float32: exact, in chunks that float32 sums exactly (XLA has no fast
    integer product on a CPU)."""
    parts = rounding.grouped(x, min(_EXACT, x.shape[1]))
    n, chunks, size = parts.shape
    rows = jnp.pad(w, [(0, chunks * size - w.shape[0]), (0, 0)]).reshape(chunks, size, -1)
    sums = jnp.einsum("nck,cko->cno", parts, rows, preferred_element_type=jnp.float32)
    return jnp.sum(sums.astype(jnp.int32), axis=0)


def product(x: Array, values: Array, scale: Array, fmt: MatrixFormat) -> Array:
    """x [n,k], values [k,o] and scale [k or its groups or 1, o or its blocks or 1] -> float32 [n,o].

    x is rounded to what `fmt.activations` says.
    """
    shape = (values.shape[0], values.shape[1])
    wide, act = values.astype(jnp.float32), fmt.activations
    if act.scale is None:  # the matrix is widened to the activations' type before the product
        return dot(x.astype(jnp.float32), (wide * _full(scale, shape)).astype(x.dtype).astype(jnp.float32))
    if fmt.scale == E8M0:  # scales are powers of two: to multiply by them first changes nothing
        rounded = rounding.restored(rounding.microscaled(x, act.values, act.shared or 1), act.shared)
        return dot(rounded, wide * _full(scale, shape))
    if fmt.factor is not None:
        return dot(rounding.restored(rounding.nvfp4(x), act.shared), wide * _full(scale, shape))
    token = rounding.per_group(x, act.shared, act.values, rounding.LARGEST[act.values])
    if fmt.shared == "block":
        return _blockwise(token, wide, scale, fmt)
    if isinstance(fmt.shared, int):
        return _groupwise(token.values, wide, scale) * token.scale
    summed = integer_dot if fmt.accumulate == "int32" else dot
    return summed(token.values, wide).astype(jnp.float32) * _row(scale, shape) * token.scale


def _full(scale: Array, shape: tuple[int, int]) -> Array:
    wide = scale.astype(jnp.float32)
    return full_scale(full_scale(wide, shape, 0), shape, 1)


def _row(scale: Array, shape: tuple[int, int]) -> Array:
    """[1, o] of scales that the contracted dim shares."""
    return full_scale(scale[:1].astype(jnp.float32), (1, shape[1]), 1)


def _blockwise(act: rounding.Rounded, values: Array, scale: Array, fmt: MatrixFormat) -> Array:
    """DeepSeek's FP8: activations in groups of 128, a float32 sum in each block, then both scales."""
    parts = rounding.grouped(act.values, FP8_BLOCK)
    blocks, size = parts.shape[1], values.shape[0]
    scale = full_scale(scale, (size, values.shape[1]), 1)
    if scale.shape[0] != blocks:  # a split cut the blocks: the scales of their parts come one an element
        values, scale = values * full_scale(scale, values.shape, 0), jnp.ones((blocks, 1), jnp.float32)
    return _sum_groups(parts, values, FP8_BLOCK, act.scale[:, :, None] * scale[None])


def _groupwise(act: Array, values: Array, scale: Array) -> Array:
    """A float32 sum in each group of the contracted dim, then the group's scales."""
    each = shared_size(values.shape[0], scale.shape[0])
    scale = full_scale(scale.astype(jnp.float32), (scale.shape[0], values.shape[1]), 1)
    return _sum_groups(rounding.grouped(act, each), values, each, scale[None])


def _sum_groups(parts: Array, values: Array, each: int, scale: Array) -> Array:
    """parts [n, groups, each] times values [k, o], scale [n or 1, groups, o or 1] -> [n, o]."""
    groups, size = parts.shape[1], values.shape[0]
    rows = jnp.pad(values, [(0, groups * each - size), (0, 0)]).reshape(groups, each, -1)
    sums = jnp.einsum("nbk,bko->nbo", parts, rows, preferred_element_type=jnp.float32)
    return jnp.sum(sums * scale, axis=1)
