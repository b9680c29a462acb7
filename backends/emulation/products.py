"""Matrix products in each format: x [n, k] times a quantised [k, o], in float32 [n, o].

Integers are multiplied and summed exactly, then scaled; narrow floats are multiplied exactly and summed in float32
(a tensor core may keep fewer bits: Hopper about 14 inside a block of 128, which is not emulated). Scales are applied
where the kernels apply them: after the sum over the elements that share them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from backends.emulation import rounding
from model.ops import full_scale
from model.quantised import BF16, CARRIER, E2M1, E4M3, E4M3_MAX, E8M0, INT8

_EXACT = 1024  # products of int8 numbers whose sum float32 holds: 1024 * 128 * 128 = 2^24
_BLOCK = 128


def format_name(values: Array, scale: Array, fp8: str) -> str:
    """The format of a quantised matrix, from its types; `fp8` says what e4m3 with float32 scales means.

    int8 and int4 (held in int8) with float32 scales are multiplied alike.
    """
    if values.dtype == INT8:
        return "w4a16" if scale.dtype == BF16 else "w8a8-int8"
    if values.dtype == E4M3:
        return "mxfp8" if scale.dtype == E8M0 else fp8
    assert values.dtype == CARRIER[E2M1], values.dtype
    return "mxfp4" if scale.dtype == E8M0 else "nvfp4"


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


def product(x: Array, values: Array, scale: Array, fp8: str = "fp8-block") -> Array:
    """x [n,k], values [k,o] and scale [k or its groups or 1, o or its blocks or 1] -> float32 [n,o].

    x is rounded to the activations' format that goes with the matrix's (see `schemes.ACTIVATIONS`).
    """
    name = format_name(values, scale, fp8)
    shape = (values.shape[0], values.shape[1])
    wide = values.astype(jnp.float32)
    match name:
        case "w8a8-int8":
            act = rounding.per_group(x, None, INT8, 127.0)
            return integer_dot(act.values, wide).astype(jnp.float32) * _row(scale, shape) * act.scale
        case "fp8-tensor":
            act = rounding.per_group(x, None, E4M3, E4M3_MAX)
            return dot(act.values, wide) * _row(scale, shape) * act.scale
        case "fp8-block":
            return _blockwise(x, wide, scale)
        case "mxfp8" | "mxfp4":
            # scales are powers of two: to multiply by them first changes nothing
            act = rounding.restored(rounding.microscaled(x, E4M3 if name == "mxfp8" else E2M1), 32)
            return dot(act, wide * _full(scale, shape))
        case "nvfp4":
            return dot(rounding.restored(rounding.nvfp4(x), 16), wide * _full(scale, shape))
        case _:  # w4a16: the matrix is widened to the activations' type before the product
            return dot(x.astype(jnp.float32), (wide * _full(scale, shape)).astype(x.dtype).astype(jnp.float32))


def _full(scale: Array, shape: tuple[int, int]) -> Array:
    wide = scale.astype(jnp.float32)
    return full_scale(full_scale(wide, shape, 0), shape, 1)


def _row(scale: Array, shape: tuple[int, int]) -> Array:
    """[1, o] of scales that the contracted dim shares."""
    return full_scale(scale[:1].astype(jnp.float32), (1, shape[1]), 1)


def _blockwise(x: Array, values: Array, scale: Array) -> Array:
    """DeepSeek's FP8: activations in groups of 128, a float32 sum in each block, then both scales."""
    act = rounding.per_group(x, _BLOCK, E4M3, E4M3_MAX)
    parts = rounding.grouped(act.values, _BLOCK)
    blocks, size = parts.shape[1], values.shape[0]
    scale = full_scale(scale, (size, values.shape[1]), 1)
    if scale.shape[0] == size and size > 1:  # a split cut the blocks: their scales come one an element
        scale, values = jnp.ones((blocks, 1), jnp.float32), values * scale
    rows = jnp.pad(values, [(0, blocks * _BLOCK - size), (0, 0)]).reshape(blocks, _BLOCK, -1)
    sums = jnp.einsum("nbk,bko->nbo", parts, rows, preferred_element_type=jnp.float32)
    return jnp.sum(sums * (act.scale[:, :, None] * scale[None]), axis=1)
