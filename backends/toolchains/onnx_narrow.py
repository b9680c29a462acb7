"""The ONNX table: the functions of `narrow.py` as QuantizeLinear and DequantizeLinear of the standard domain.

A product in int8 is QDQ: activations quantised a row and dequantised, the matrix dequantised a column, one MatMul of
both. A compiler with integer units takes the three for one integer product; any other computes what they say. Scales of
rows are found as the graph runs, so they are values, not initialisers. Matrices in groups, and stacks of them, use
`block_size`, which came with opset 21.

Rows are dequantised in two dims and multiplied in another shape. Where DequantizeLinear and MatMul follow one another,
ONNX Runtime fuses them to a product that sums pairs in 16 bits on x86 without VNNI, and so overflows, and that fails
for scales of rows where it keeps int8 (ARM's default); the Reshape between keeps it to what the graph says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from backends.emulation.rounding import LEAST
from backends.toolchains.forms import dtype_of, product_form, shape_of
from backends.toolchains.narrow import BOUND
from backends.toolchains.onnx_products import product
from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import Rule
from model.quantised import shared_size


def _quantised_rows(t: OnnxTarget, eqn: Any, x: Ref) -> list[Ref]:
    """Values and scales; QuantizeLinear along axis 0 of the rows, all in one dim."""
    wide = t.cast(t.whole(x), "float32")
    size = t.elementwise("Abs", wide)
    most = t.node("ReduceMax", size, t.ints([-1]), shape=(*x.shape[:-1], 1), dtype="float32", keepdims=1)
    least, bound = (t.constant(np.asarray(n, np.float32)) for n in (LEAST, BOUND))
    scale = t.elementwise("Div", t.elementwise("Max", most, least), bound)
    rows = math.prod(x.shape[:-1])
    flat, each = t.reshape(wide, (rows, x.shape[-1])), t.reshape(scale, (rows,))
    zero = t.constant(np.zeros(rows, np.int8))
    values = t.node("QuantizeLinear", flat, each, zero, shape=flat.shape, dtype="int8", axis=0)
    return [t.reshape(values, x.shape), scale]


def _integer_product(t: OnnxTarget, eqn: Any, rows: Ref, row_scale: Ref, values: Ref, scale: Ref) -> Ref:
    (inner,) = (each for each in eqn.params["jaxpr"].jaxpr.eqns if each.primitive.name == "dot_general")
    form, shape, held = product_form(inner), shape_of(eqn), rows.shape
    count = math.prod(held[:-1])
    flat, each = t.reshape(rows, (count, held[-1])), t.reshape(row_scale, (count,))
    left = t.node("DequantizeLinear", flat, each, shape=flat.shape, dtype="float32", axis=0)
    right = _dequantised(t, values, scale)
    if len(held) == 2 and not form.left_batch:  # one dim more, so that there is a Reshape
        form = dataclasses.replace(form, left_contract=(2,), left_free=(0, 1))
        out = product(t, form, (1, *shape), "float32", t.reshape(left, (1, *held)), right)
        return t.reshape(out, shape)
    return product(t, form, shape, "float32", t.reshape(left, held), right)


def _widened(t: OnnxTarget, eqn: Any, values: Ref, scale: Ref) -> Ref:
    return t.cast(_dequantised(t, values, scale), dtype_of(eqn))


def _dequantised(t: OnnxTarget, values: Ref, scale: Ref) -> Ref:
    """float32 of values' shape: by columns where an int8 matrix has one scale each, else in blocks of the contracted
    dim, the one where the shapes differ."""
    shape, scale = values.shape, t.cast(t.whole(scale), "float32")
    values = t.whole(values)
    axis = next((d for d, (n, parts) in enumerate(zip(shape, scale.shape, strict=True)) if n != parts), 0)
    if axis == 0 and scale.shape[0] == 1 and values.dtype == "int8":
        columns = math.prod(shape[1:])
        flat, each = t.reshape(values, (shape[0], columns)), t.reshape(scale, (columns,))
        wide = t.node("DequantizeLinear", flat, each, shape=flat.shape, dtype="float32", axis=1)
        return t.reshape(wide, shape)
    size = shared_size(shape[axis], scale.shape[axis])
    return t.node("DequantizeLinear", values, scale, shape=shape, dtype="float32", axis=axis, block_size=size)


CALLS: Mapping[str, Rule] = {
    "quantised_rows": _quantised_rows,
    "integer_product": _integer_product,
    "widened": _widened,
}
