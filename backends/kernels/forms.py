"""Ops in forms that XLA compiles better for GPUs than their decompositions: a step of a single row.

A product of one row XLA takes apart into a multiplication and a sum, and in some sizes writes what it multiplied to
memory in float32, twice the matrix in bfloat16, before it adds it up; of two rows it is a product. A scatter of one row
XLA turns into reading the row that is there, finding out whether the index is in bounds, and choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from model.ops import OPS, stored_rows

_WIDE = 512
"""Columns of a matrix below which one pass multiplies and adds up."""


def linear(x: Array, *weight: Array) -> Array:
    """The row above one of zeros, of which nothing is kept. Of FP8 and narrow matrices, the decomposition."""
    meaning, (matrix, *scales) = OPS["glm.linear"].meaning, weight
    if scales or x.size != matrix.shape[0] or matrix.size < _WIDE * matrix.shape[0]:
        return meaning(x, *weight)
    made = meaning(jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0))), matrix)
    return made[0].reshape(*x.shape[:-1], *matrix.shape[1:])


def cache_write(pages: Array, rows: Array, slots: Array, *, cache: str = "", plain: int = 0) -> Array:
    """The row put where it belongs, which is in bounds."""
    if slots.size > 1:
        return OPS["glm.cache_write"].meaning(pages, rows, slots, cache=cache, plain=plain)
    flat = pages.reshape(-1, *pages.shape[2:])
    made = lax.dynamic_update_slice_in_dim(flat, stored_rows(pages, rows, plain)[0], slots.reshape(()), 0)
    return made.reshape(pages.shape)


FORMS: Mapping[str, Callable[..., Any]] = MappingProxyType({"glm.linear": linear, "glm.cache_write": cache_write})
