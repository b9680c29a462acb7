"""Rounding to integer formats inside a program that learns: quantisation-aware training.

The arithmetic is `model.quantised`'s, which `glm5 quantize` writes checkpoints with, so what a run is trained with is
what is written, to the bit. Gradients go straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from foundation.errors import UsageError
from model.formats import BF16, F16, F32, MatrixFormat
from model.quantised import Arithmetic, integer_formats, integer_rounded
from model.weights import Weight, as_matrix, from_matrix

_MANTISSA = {F32: (8, 23), BF16: (8, 7), F16: (5, 10)}


def _divided(x: Array, by: Array | float) -> Array:
    """XLA makes a division by a constant, or by what is the same for many, a product with its inverse. It does not know
    that 0 x is 0."""
    return x / (x * jnp.float32(0.0) + jnp.asarray(by, jnp.float32))


def _kept(x: Array, dtype: np.dtype) -> Array:
    """XLA leaves out a conversion to a narrower type and back, but not this."""
    return lax.reduce_precision(x, *_MANTISSA[dtype])


TRACED = Arithmetic(jnp, _divided, _kept)

Rounding = Callable[[Weight, Array], Array]
"""What a forward pass sees of a weight."""


def rounding(name: str) -> Rounding:
    """Of what `model.quantised.integer_formats` knows by that name. Raises `UsageError`."""
    format_of = integer_formats(name)

    def seen(weight: Weight, array: Array) -> Array:
        fmt = format_of(weight)
        return straight_through(fmt, weight, array) if fmt.narrow else array

    return seen


def straight_through(fmt: MatrixFormat, weight: Weight, array: Array) -> Array:
    """A weight in the graph's layout, float32, rounded; its gradient is that of the weight. Raises `UsageError` where
    the format's groups do not divide it."""
    matrix = as_matrix(weight, array)
    held = lax.stop_gradient(matrix)
    try:
        rounded = integer_rounded(TRACED, fmt, held)
    except ValueError as error:
        raise UsageError(f"{weight.name} in {fmt.name}: {error}") from None
    return from_matrix(weight, rounded + (matrix - held))  # what is added is 0
