"""The ONNX table: a rule a primitive. Elementwise operators broadcast lazily; see `onnx.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.lax import RoundingMethod

from backends.errors import Unsupported
from backends.toolchains.forms import dtype_of, shape_of
from backends.toolchains.onnx_indexing import dynamic_slice, gather, scatter
from backends.toolchains.onnx_products import dot_general
from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import Rule

# --- elementwise ---------------------------------------------------------------------------------


def _elementwise(op_type: str, **attributes: Any) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, *values: Ref) -> Ref:
        return t.elementwise(op_type, *values, dtype=dtype_of(eqn), **attributes)

    return rule


def _mul(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    for x, factor in ((a, b), (b, a)):
        if t.scalars.get(factor.name) == 1.0 and factor.real in (None, ()):
            return x
    return t.elementwise("Mul", a, b, dtype=dtype_of(eqn))


def _logical(op_type: str) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, *values: Ref) -> Ref:
        if values[0].dtype != "bool":
            raise Unsupported(f"onnx has no rule for a bitwise {op_type} of {values[0].dtype}")
        return t.elementwise(op_type, *values)

    return rule


def _compare(op_type: str, negate: bool = False) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, *values: Ref) -> Ref:
        out = t.elementwise(op_type, *values, dtype="bool")
        return t.elementwise("Not", out) if negate else out

    return rule


def _select(t: OnnxTarget, eqn: Any, which: Ref, *cases: Ref) -> Ref:
    first, second = cases
    return t.elementwise("Where", which, second, first, dtype=dtype_of(eqn))


def _div(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    """The quotient that ends a softmax over the last dim is the softmax; of integers it rounds towards zero."""
    last = f"({len(a.shape) - 1},)"
    raised, total = t.made.get(a.name), t.made.get(b.name)
    if raised and total and (raised[0], total[0]) == ("Exp", f"ReduceSum {last}") and total[1][0].name == a.name:
        shifted = t.made.get(raised[1][0].name)
        if shifted and shifted[0] == "Sub":
            x, most = shifted[1]
            top = t.made.get(most.name)
            if top and top[0] == f"ReduceMax {last}" and top[1][0].name == x.name and x.held == x.shape:
                return t.node("Softmax", x, shape=x.shape, dtype=x.dtype, axis=len(x.shape) - 1)
    return t.elementwise("Div", a, b, dtype=dtype_of(eqn))


def _floor_divide(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    if a.dtype not in ("int32", "int64"):
        return t.elementwise("Floor", t.elementwise("Div", a, b))
    return t.elementwise("Div", t.elementwise("Sub", a, t.elementwise("Mod", a, b)), b)


def _remainder(t: OnnxTarget, eqn: Any, a: Ref, b: Ref) -> Ref:
    """Of the divisor's sign, as ONNX's Mod of integers is."""
    if a.dtype in ("int32", "int64"):
        return t.elementwise("Mod", a, b)
    return t.elementwise("Sub", a, t.elementwise("Mul", b, t.elementwise("Floor", t.elementwise("Div", a, b))))


def _integer_pow(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    power = eqn.params["y"]
    out = x
    for _ in range(abs(power) - 1):
        out = t.elementwise("Mul", out, x)
    return t.elementwise("Reciprocal", out) if power < 0 else out


def _rsqrt(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    return t.elementwise("Reciprocal", t.elementwise("Sqrt", x))


def _round(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    """ONNX rounds ties to even."""
    if eqn.params["rounding_method"] is not RoundingMethod.TO_NEAREST_EVEN:
        raise Unsupported("onnx has no rounding of ties away from zero")
    return t.elementwise("Round", x)


def _clamp(t: OnnxTarget, eqn: Any, low: Ref, x: Ref, high: Ref) -> Ref:
    return t.elementwise("Min", t.elementwise("Max", x, low), high)


def _convert(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    return t.cast(x, dtype_of(eqn))


# --- shapes --------------------------------------------------------------------------------------


def _broadcast_in_dim(t: OnnxTarget, eqn: Any, x: Ref, *_: Ref) -> Ref:
    shape, places = tuple(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
    held = [1] * len(shape)
    for place, n in zip(places, x.held, strict=True):
        held[place] = n
    kept = t.base(x)
    if kept is not None and kept.shape == tuple(held):  # a reduction that kept its dims
        return dataclasses.replace(kept, shape=shape)
    real = x.held if x.real is None else x.real
    lead = len(shape) - len(real)
    if all(n == 1 for n in held[:lead]) and tuple(held[lead:]) == real:  # leading dims: broadcasting does it
        return dataclasses.replace(x, shape=shape, held=tuple(held), real=real)
    flat = dataclasses.replace(x, shape=x.held)  # reshape the tensor as it is held
    return dataclasses.replace(t.reshape(flat, held), shape=shape)


def _reshape(t: OnnxTarget, eqn: Any, x: Ref, *_: Ref) -> Ref:
    shape = shape_of(eqn)
    real = [(n, h) for n, h in zip(x.shape, x.held, strict=True) if n != 1]
    if x.held != x.shape and [n for n in shape if n != 1] == [n for n, _ in real]:  # only dims of 1 come or go
        remaining = iter(h for _, h in real)
        held = [1 if n == 1 else next(remaining) for n in shape]
        return dataclasses.replace(t.reshape(dataclasses.replace(x, shape=x.held), held), shape=shape)
    return t.reshape(x, shape)


def _transpose(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    order = eqn.params["permutation"]
    out = t.transpose(dataclasses.replace(x, shape=x.held), order)
    return dataclasses.replace(out, shape=shape_of(eqn))


def _slice(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    cut = [
        d
        for d, (n, h) in enumerate(zip(x.shape, x.held, strict=True))
        if (starts[d], limits[d], steps[d]) != (0, n, 1) and not h == 1 != n
    ]
    shape = shape_of(eqn)
    if not cut:
        return dataclasses.replace(x, shape=shape, held=tuple(min(h, n) for h, n in zip(x.held, shape, strict=True)))
    if len(cut) == 1 and shape[cut[0]] == 1:  # one entry: without the dim, which is mostly dropped next
        (axis,) = cut
        kept = [n for d, n in enumerate(x.held) if d != axis]
        index = t.constant(np.asarray(starts[axis], np.int64))
        out = t.node("Gather", x, index, shape=kept, dtype=x.dtype, axis=axis)
        held = [1 if d == axis else n for d, n in enumerate(x.held)]
        return dataclasses.replace(t.reshape(out, held), shape=shape)
    held = tuple(n if d in cut else h for d, (n, h) in enumerate(zip(shape, x.held, strict=True)))
    pick = [[each[d] for d in cut] for each in (starts, limits)]
    vectors = [t.ints(pick[0]), t.ints(pick[1]), t.ints(cut)]
    if any(steps[d] != 1 for d in cut):
        vectors.append(t.ints([steps[d] for d in cut]))
    return dataclasses.replace(t.node("Slice", x, *vectors, shape=held, dtype=x.dtype), shape=shape)


def _concatenate(t: OnnxTarget, eqn: Any, *parts: Ref) -> Ref:
    values = [t.whole(part) for part in parts if 0 not in part.shape]
    if len(values) == 1:
        return values[0]
    return t.node("Concat", *values, shape=shape_of(eqn), dtype=dtype_of(eqn), axis=eqn.params["dimension"])


def _split(t: OnnxTarget, eqn: Any, x: Ref) -> list[Ref]:
    results = [(shape_of(eqn, i), x.dtype) for i in range(len(eqn.outvars))]
    return t.nodes("Split", t.whole(x), t.ints(eqn.params["sizes"]), results=results, axis=eqn.params["axis"])


def _iota(t: OnnxTarget, eqn: Any, *_: Ref) -> Ref:
    shape, dim = tuple(eqn.params["shape"]), eqn.params["dimension"]
    held = tuple(n if d == dim else 1 for d, n in enumerate(shape))
    values = np.arange(shape[dim]).astype(dtype_of(eqn)).reshape(held)
    return dataclasses.replace(t.constant(values), shape=shape)


# --- reductions ----------------------------------------------------------------------------------


def _reduce(op_type: str) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
        axes = eqn.params["axes"]
        if any(x.held[d] != x.shape[d] for d in axes):
            x = t.whole(x)
        flag = x.dtype == "bool"  # ONNX does not reduce booleans
        x = t.cast(x, "int32") if flag else x
        kept = tuple(1 if d in axes else n for d, n in enumerate(x.held))
        out = t.node(op_type, x, t.ints(axes), shape=kept, dtype=x.dtype, keepdims=1)
        t.made[out.name] = (f"{op_type} {tuple(axes)}", (x,))
        out = t.reshape(out, [n for d, n in enumerate(x.held) if d not in axes])
        return t.cast(dataclasses.replace(out, shape=shape_of(eqn)), "bool" if flag else x.dtype)

    return rule


def _argmax(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    (axis,) = eqn.params["axes"]
    out = t.node("ArgMax", t.whole(x), shape=shape_of(eqn), dtype="int64", axis=axis, keepdims=0)
    return t.cast(out, dtype_of(eqn))


def _top_k(t: OnnxTarget, eqn: Any, x: Ref) -> list[Ref]:
    """ONNX takes the lowest index among equals, as XLA does."""
    axis = eqn.params.get("axis", -1) % len(x.shape)
    shape = shape_of(eqn)
    values, indices = t.nodes(
        "TopK", t.whole(x), t.ints([eqn.params["k"]]), results=[(shape, x.dtype), (shape, "int64")], axis=axis
    )
    return [values, t.cast(indices, dtype_of(eqn, 1))]


def _cumsum(t: OnnxTarget, eqn: Any, x: Ref) -> Ref:
    axis = t.constant(np.asarray(eqn.params["axis"], np.int64))
    return t.node("CumSum", t.whole(x), axis, shape=x.shape, dtype=x.dtype, reverse=int(eqn.params["reverse"]))


CALLS: Mapping[str, Rule] = {"floor_divide": _floor_divide, "remainder": _remainder}

RULES: Mapping[str, Rule] = {
    "add": _elementwise("Add"),
    "add_any": _elementwise("Add"),
    "sub": _elementwise("Sub"),
    "mul": _mul,
    "div": _div,
    "rem": _elementwise("Mod", fmod=1),
    "max": _elementwise("Max"),
    "min": _elementwise("Min"),
    "pow": _elementwise("Pow"),
    "neg": _elementwise("Neg"),
    "abs": _elementwise("Abs"),
    "sign": _elementwise("Sign"),
    "exp": _elementwise("Exp"),
    "log": _elementwise("Log"),
    "sqrt": _elementwise("Sqrt"),
    "tanh": _elementwise("Tanh"),
    "logistic": _elementwise("Sigmoid"),
    "sin": _elementwise("Sin"),
    "cos": _elementwise("Cos"),
    "floor": _elementwise("Floor"),
    "ceil": _elementwise("Ceil"),
    "round": _round,
    "copy": lambda t, eqn, x: x,
    "copy_p": lambda t, eqn, x: x,
    "stop_gradient": lambda t, eqn, x: x,
    "optimization_barrier": lambda t, eqn, *x: list(x),
    "square": lambda t, eqn, x: t.elementwise("Mul", x, x),
    "rsqrt": _rsqrt,
    "integer_pow": _integer_pow,
    "clamp": _clamp,
    "and": _logical("And"),
    "or": _logical("Or"),
    "not": _logical("Not"),
    "eq": _compare("Equal"),
    "ne": _compare("Equal", negate=True),
    "lt": _compare("Less"),
    "le": _compare("LessOrEqual"),
    "gt": _compare("Greater"),
    "ge": _compare("GreaterOrEqual"),
    "select_n": _select,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "iota": _iota,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "reduce_and": _reduce("ReduceMin"),
    "argmax": _argmax,
    "top_k": _top_k,
    "cumsum": _cumsum,
    "gather": gather,
    "scatter": scatter("none"),
    "scatter-add": scatter("add"),
    "dynamic_slice": dynamic_slice,
    "dot_general": dot_general,
}
