"""Norms and products with one weight as CANN operators. See `lowerings.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from backends.ascend.catalog import SHIPPED, cann_operators
from backends.ascend.lowerings import CannLowerings, Declined, require
from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import OpCall, Port

GE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 27}  # ge::DataType, graph/types.h
_SHIPPED_EPSILON = 1e-6  # CANN's own NPURmsNorm has it built in


def rms_norm(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    x, weight = call.operands
    epsilon = float(call.attributes["eps"])
    results = [(x.shape, x.dtype), ((*x.shape[:-1], 1), "float32")]
    operator, attributes = cann_operators()["RmsNorm"], {"epsilon": epsilon}
    if lower.options.fused != "none" and math.isclose(epsilon, _SHIPPED_EPSILON, rel_tol=1e-5):
        require(x.dtype in operator.dtypes, f"RmsNorm does not take {x.dtype}")
        operator, attributes = dataclasses.replace(operator, node=f"{SHIPPED}::NPURmsNorm", attributes={}), {}
    else:
        lower.operator("RmsNorm", x.dtype)
    return lower.emit(t, operator, {"x": x, "gamma": t.cast(weight, x.dtype)}, results, **attributes)[:1]


def linear(lower: CannLowerings, t: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref]:
    """x [.., i] times an int8 weight [i, ..]; a weight in 16 or 32 bits is the decomposition's MatMul."""
    if len(call.operands) != 2 or call.operands[1].name not in lower.options.int8:
        raise Declined
    x, weight = call.operands
    width, out_dims = weight.shape[0], weight.shape[1:]
    columns, rows = math.prod(out_dims), math.prod(x.shape[:-1])
    values, scale = int8_inputs(t, weight, out_dims)
    flat, values = t.reshape(x, (rows, width)), t.reshape(values, (width, columns))
    scale = t.reshape(scale, (columns,))
    out = _quantised(lower, t, flat, values, scale)
    return [t.reshape(out, tuple(call.outputs[0].shape))]


def int8_inputs(t: OnnxTarget, weight: Ref, scale_shape: Sequence[int]) -> tuple[Ref, Ref]:
    """The inputs that take a weight's place: "NAME.values" int8 and "NAME.scale" float32, one an output channel."""
    found = {port.name: port for port in t.inputs}
    ports = (
        Port(f"{weight.name}.values", weight.shape, "int8"),
        Port(f"{weight.name}.scale", tuple(scale_shape), "float32"),
    )
    return tuple(Ref(p.name, p.shape, p.dtype, p.shape) if p.name in found else t.input(p) for p in ports)  # type: ignore[return-value]


def quantise_rows(lower: CannLowerings, t: OnnxTarget, x: Ref) -> tuple[Ref, Ref]:
    """x [n, i] as int8 with one float32 scale a row."""
    operator = lower.operator("DynamicQuant", x.dtype)
    values, scale = lower.emit(t, operator, {"x": x}, [(x.shape, "int8"), (x.shape[:-1], "float32")])
    return values, scale


def _quantised(lower: CannLowerings, t: OnnxTarget, x: Ref, values: Ref, scale: Ref) -> Ref:
    shape = (x.shape[0], values.shape[1])
    product = cann_operators()["QuantBatchMatmulV3"]
    if lower.options.offers(product) and x.dtype in cann_operators()["DynamicQuant"].dtypes:
        rows, row_scale = quantise_rows(lower, t, x)
        given = {"x1": rows, "x2": values, "scale": scale, "pertoken_scale": row_scale}
        attributes = {"dtype": GE_TYPES[x.dtype], "transpose_x1": 0, "transpose_x2": 0}
        return lower.emit(t, product, given, [(shape, x.dtype)], **attributes)[0]
    half = cann_operators()["WeightQuantBatchMatmulV2"]
    if lower.options.offers(half) and x.dtype in half.dtypes:
        given = {"x": x, "weight": values, "antiquant_scale": t.cast(scale, x.dtype)}
        return lower.emit(t, half, given, [(shape, x.dtype)], antiquant_group_size=0, dtype=-1)[0]
    wide = t.elementwise("Mul", t.cast(values, x.dtype), t.reshape(t.cast(scale, x.dtype), (1, shape[1])))
    return t.node("MatMul", x, wide, shape=shape, dtype=x.dtype)
