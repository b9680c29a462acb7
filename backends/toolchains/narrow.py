"""Products with matrices in narrow formats as plain operators: what an export computes for them.

The op contract widens a quantised matrix before its product (`model/ops.py`). An export in a scheme that does otherwise
replaces the op, before a target sees it, by a composite of the same name. Its attribute `format` names the matrix
format, and its body is what that means, made of three functions:

    w8a8-int8, w4a8   `quantised_rows` of x: int8, each over a 127th of its largest magnitude; `integer_product`:
                      int8 times int8 summed in int32, then the scales of rows and of output channels
    w4a16             `widened`: the matrix times the scales of its groups, in x's type; then a plain product

A target that has operators for these functions writes them (ONNX: QuantizeLinear and DequantizeLinear,
`onnx_narrow.py`); elsewhere their bodies are the graph. FP8 blocks are left as the contract has them. What is computed
is what an emulated chip computes (`backends/emulation/products.py`), up to the order of float32 sums: that is what
`glm5 export --verify` compares it with.

Values keep their own type, int4 included: how a file packs them is the file's matter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from backends.emulation.rounding import LARGEST, LEAST
from model.formats import E2M1, E4M3, INT4, INT8, MatrixFormat, Scheme, matrix_format
from model.ops import FORMAT, OPS, Across, Lowerings, full_scale, spread, swiglu_body

BOUND = LARGEST[INT8]
_NAMES = {E4M3: "8-bit floats", E2M1: "4-bit floats", INT8: "8-bit integers", INT4: "4-bit integers"}


@dataclasses.dataclass(frozen=True)
class Holds:
    """What the graphs of a target can hold. types: of narrow values. taken: those of which parts can be taken by
    index."""

    types: frozenset[np.dtype]
    taken: frozenset[np.dtype]


HOLDS: Mapping[str, Holds] = {
    "stablehlo": Holds(frozenset({E4M3, INT8, INT4}), frozenset({E4M3, INT8, INT4})),
    "onnx": Holds(frozenset({INT8, INT4}), frozenset({INT8})),  # ONNX's Gather takes no 4-bit types
    "torch": Holds(frozenset({E4M3, INT8}), frozenset({E4M3, INT8})),
    "ascend": Holds(frozenset({INT8, INT4}), frozenset({INT8})),  # torch has no 4-bit types: packed in int32
}
"""By the name of the package format."""


def refusal(scheme: Scheme, target: str) -> str | None:
    """Why a target has no graphs in a scheme, or None."""
    narrow = [fmt for fmt in map(matrix_format, scheme.formats) if fmt.narrow]
    for fmt in narrow:
        if fmt.values not in HOLDS[target].types:
            return f"the graphs of {target} have no {_NAMES[fmt.values]}"
        if fmt.zero is not None:
            return "graphs have no zero points"
        if _widened_by_contract(fmt) and len(narrow) == len(scheme.formats) == 1:
            continue
        if fmt.activations.scale is not None and not rounds_activations(fmt):
            return f"graphs do not round activations to {fmt.activations.text}"
    return None


def rounds_activations(fmt: MatrixFormat) -> bool:
    """Whether a product's activations become int8 in an export."""
    return fmt.activations.values == INT8


def _widened_by_contract(fmt: MatrixFormat) -> bool:
    return fmt.shared == "block"


def lowerings(scheme: Scheme, target: str) -> Lowerings:
    """The ops that an export in a scheme replaces (see `model.ops.substitute`); none where all are as the contract has
    them."""
    dense, experts = matrix_format(scheme.dense), matrix_format(scheme.experts)
    bodies = {
        "glm.linear": (dense, 3, linear),
        "glm.expert_ffn": (experts, 7, functools.partial(expert_ffn, taken=experts.values in HOLDS[target].taken)),
    }
    return {
        name: _replaced(name, fmt, operands, body)
        for name, (fmt, operands, body) in bodies.items()
        if fmt.narrow and not _widened_by_contract(fmt)
    }


def _replaced(name: str, fmt: MatrixFormat, operands: int, body: Callable[..., Any]) -> Callable[..., Any]:
    composite = lax.composite(body, name=name)

    def call(*given: Array, **attributes: Any) -> Any:
        if len(given) != operands:  # a matrix that the scheme leaves wide
            return OPS[name].call(*given, **attributes)
        return composite(*given, **{FORMAT: fmt.name}, **attributes)

    return call


# --- the ops -------------------------------------------------------------------------------------


def linear(x: Array, values: Array, scale: Array, *, format: str) -> Array:
    """x [.., k] times values [k, ..] with scale [k's groups or 1, ..]."""
    return _product(x, values, scale, (((x.ndim - 1,), (0,)), ((), ())), matrix_format(format))


def expert_ffn(
    x: Array, experts: Array, weights: Array, *matrices: Array, format: str, taken: bool, across: Across = ()
) -> Array:
    """See `model.ops.expert_ffn`. An expert's result is in x's type before the sum over the choices."""
    gate_up, gate_up_scale, down, down_scale = matrices
    fmt, count = matrix_format(format), gate_up.shape[0]
    if across:
        here = functools.partial(expert_ffn, format=format, taken=taken)
        return spread(lambda *given: here(*given, *matrices), x, experts, weights, count, across)
    if taken and experts.size <= count:  # few choices: the chosen experts' matrices alone
        here = experts < count
        local = jnp.where(here, experts, 0)
        gate_up, gate_up_scale, down, down_scale = (m.at[local].get(mode="promise_in_bounds") for m in matrices)
        hidden = _product(x, gate_up, gate_up_scale, (((1,), (2,)), ((0,), (0,))), fmt)  # [n, k, 2, f]
        out = _product(swiglu_body(hidden), down, down_scale, (((2,), (2,)), ((0, 1), (0, 1))), fmt)
        share = jnp.where(here, weights, 0.0)[:, :, None]
        return jnp.sum(out.astype(jnp.float32) * share, axis=1).astype(x.dtype)
    ids = jnp.arange(count, dtype=experts.dtype)
    share = jnp.sum(jnp.where(experts[:, :, None] == ids[None, None, :], weights[:, :, None], 0.0), axis=1)
    hidden = _product(x, gate_up, gate_up_scale, (((1,), (1,)), ((), ())), fmt)  # [n, e, 2, f]
    out = _product(swiglu_body(hidden), down, down_scale, (((2,), (1,)), ((1,), (0,))), fmt)  # [e, n, d]
    total = jnp.sum(out.astype(jnp.float32) * jnp.transpose(share)[:, :, None], axis=0)
    return total.astype(x.dtype)


Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]  # of a dot_general


def _product(x: Array, values: Array, scale: Array, numbers: Numbers, fmt: MatrixFormat) -> Array:
    """scale is of values' shape, but for the contracted dim, which has its groups or 1; the result is in x's type.

    Values are used in the shape they have: ONNX Runtime's Reshape takes no 4-bit types.
    """
    if not rounds_activations(fmt):
        wide = widened(values, scale, x.dtype.name, numbers[0][1][0])
        return lax.dot_general(x, wide, numbers, preferred_element_type=jnp.float32).astype(x.dtype)
    rows, row_scale = quantised_rows(x)
    return integer_product(rows, row_scale, values, scale, numbers).astype(x.dtype)


# --- the functions that a target may have operators for ------------------------------------------


@jax.jit
def quantised_rows(x: Array) -> tuple[Array, Array]:
    """x [.., k] as int8 and a float32 scale [.., 1]: nearest, ties to even."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = lax.max(largest, jnp.full_like(largest, LEAST)) / jnp.float32(BOUND)
    nearest = lax.round(wide / scale, lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.clamp(jnp.float32(-128.0), nearest, jnp.float32(127.0)).astype(jnp.int8), scale


@functools.partial(jax.jit, static_argnames="numbers")
def integer_product(rows: Array, row_scale: Array, values: Array, scale: Array, numbers: Numbers) -> Array:
    """rows times values summed in int32, then in float32 times the scales of values, which have 1 for the contracted
    dim, and those of rows."""
    sums = lax.dot_general(rows, values.astype(jnp.int8), numbers, preferred_element_type=jnp.int32)
    (left, right), (left_batch, right_batch) = numbers
    row_free, free = _free(rows, left, left_batch), _free(values, right, right_batch)
    of_rows = jnp.transpose(row_scale, (*left_batch, *row_free, *left))
    of_rows = of_rows.reshape(*of_rows.shape[:-1], *(1,) * len(free))
    of_values = jnp.transpose(scale.astype(jnp.float32), (*right_batch, *right, *free))
    lead = len(right_batch)
    of_values = of_values.reshape(*of_values.shape[:lead], *(1,) * len(row_free), *of_values.shape[lead + 1 :])
    return sums.astype(jnp.float32) * of_values * of_rows


def _free(operand: Array, contracted: tuple[int, ...], batch: tuple[int, ...]) -> list[int]:
    return [d for d in range(operand.ndim) if d not in (*contracted, *batch)]


@functools.partial(jax.jit, static_argnames=("dtype", "axis"))
def widened(values: Array, scale: Array, dtype: str, axis: int) -> Array:
    """values times scale, which has values' shape but for `axis`, where it has that dim's groups or 1; in `dtype`."""
    full = full_scale(scale.astype(jnp.float32), values.shape, axis)
    return (values.astype(jnp.float32) * full).astype(dtype)
