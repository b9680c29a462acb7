"""The ONNX table: gathers, scatters and dynamic slices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from backends.toolchains.forms import Along, Bounds, Pick, Take, gather_form, scatter_form, shape_of
from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import Rule


def _unwrapped(t: OnnxTarget, indices: Ref, size: int) -> Ref:
    """Indices without JAX's own step of counting negative ones from the end: ONNX does that itself."""
    match t.made.get(indices.name):
        case ("Where", (which, moved, plain)) if plain.shape == indices.shape:
            below, added = t.made.get(which.name), t.made.get(moved.name)
            if (
                below and added
                and (below[0], below[1][0].name, t.scalars.get(below[1][1].name)) == ("Less", plain.name, 0)
                and (added[0], added[1][0].name, t.scalars.get(added[1][1].name)) == ("Add", plain.name, size)
            ):  # fmt: skip
                return plain
    return indices


def _outside(t: OnnxTarget, indices: Ref, size: int) -> Ref:
    zero, last = (t.constant(np.asarray(n, indices.dtype)) for n in (0, size - 1))
    return t.elementwise(
        "Or", t.elementwise("Less", indices, zero, dtype="bool"), t.elementwise("Greater", indices, last, dtype="bool")
    )


def _in_bounds(t: OnnxTarget, indices: Ref, bounds: Bounds) -> Ref:
    if bounds.mode == "promised":
        return indices
    zero, last = (t.constant(np.asarray(n, indices.dtype)) for n in (0, bounds.size - 1))
    return t.elementwise("Min", t.elementwise("Max", indices, zero), last)


def gather(t: OnnxTarget, eqn: Any, operand: Ref, indices: Ref) -> Ref:
    form, bounds = gather_form(eqn)
    operand = t.whole(operand)
    if isinstance(form, Pick):
        index = t.cast(t.whole(indices), "int64")
        return t.node("GatherND", operand, index, shape=shape_of(eqn), dtype=operand.dtype)
    indices = t.reshape(indices, indices.shape[:-1])
    if bounds.mode == "promised":
        indices = _unwrapped(t, indices, bounds.size)
    index = _in_bounds(t, indices, bounds)
    if isinstance(form, Take):
        at = form.axis
        shape = (*operand.shape[:at], *index.shape, *operand.shape[at + 1 :])
        out = t.node("Gather", operand, index, shape=shape, dtype=operand.dtype, axis=at)
        missing = indices.shape if bounds.mode == "drop" else None
        lead, trail = at, len(operand.shape) - at - 1
    else:
        out, missing = _along(t, operand, index, form), None
        lead, trail = 0, len(operand.shape) - form.batch - 1
        if bounds.mode == "drop":
            indices = t.transpose(indices, form.index_order)
            missing = indices.shape
    if missing is not None and bounds.mode == "drop":
        outside = t.reshape(_outside(t, indices, bounds.size), (1,) * lead + missing + (1,) * trail)
        fill = np.asarray(bounds.fill, operand.dtype).reshape((1,) * len(out.shape))
        out = t.elementwise("Where", outside, t.constant(fill), out, dtype=operand.dtype)
        out = t.whole(dataclasses.replace(out, shape=out.held))
    return t.transpose(out, form.order)


def _along(t: OnnxTarget, operand: Ref, index: Ref, form: Along) -> Ref:
    """GatherElements over [batch.., indexed, window..] with indices [batch.., rest.., 1..]."""
    operand, index = t.transpose(operand, form.operand_order), t.transpose(index, form.index_order)
    nb = form.batch
    lead, rest, window = operand.shape[:nb], index.shape[nb:], operand.shape[nb + 1 :]
    flat = (*lead, math.prod(rest), *(1,) * len(window))
    wide = (*lead, math.prod(rest), *window)
    index = t.whole(dataclasses.replace(t.reshape(index, flat), shape=wide))
    out = t.node("GatherElements", operand, index, shape=wide, dtype=operand.dtype, axis=nb)
    return t.reshape(out, (*lead, *rest, *window))


def scatter(reduction: str) -> Rule:
    def rule(t: OnnxTarget, eqn: Any, operand: Ref, indices: Ref, updates: Ref) -> Ref:
        bounds = scatter_form(eqn)
        operand, indices, updates = t.whole(operand), t.whole(indices), t.whole(updates)
        shape = operand.shape
        if bounds.mode == "promised":
            indices = t.reshape(_unwrapped(t, t.reshape(indices, indices.shape[:1]), bounds.size), indices.shape)
        if bounds.mode == "clip":
            indices = _in_bounds(t, indices, bounds)
        elif bounds.mode == "drop":  # what is outside goes to one more row, cut off afterwards
            spare = t.constant(np.zeros((1, *shape[1:]), operand.dtype))
            operand = t.node("Concat", operand, spare, shape=(shape[0] + 1, *shape[1:]), dtype=operand.dtype, axis=0)
            last = t.constant(np.full((1,) * len(indices.shape), shape[0], indices.dtype))
            indices = t.elementwise("Where", _outside(t, indices, bounds.size), last, indices, dtype=indices.dtype)
        attributes = {"reduction": reduction} if reduction != "none" else {}
        index = t.cast(indices, "int64")
        out = t.node("ScatterND", operand, index, updates, shape=operand.shape, dtype=operand.dtype, **attributes)
        if bounds.mode == "drop":
            out = t.node("Slice", out, t.ints([0]), t.ints([shape[0]]), t.ints([0]), shape=shape, dtype=out.dtype)
        return out

    return rule


def dynamic_slice(t: OnnxTarget, eqn: Any, x: Ref, *starts: Ref) -> Ref:
    sizes = eqn.params["slice_sizes"]
    cut = [d for d, (n, k) in enumerate(zip(x.shape, sizes, strict=True)) if n != k]
    if not cut:
        return x
    begin = [t.reshape(t.cast(starts[d], "int64"), (1,)) for d in cut]
    vector = begin[0] if len(cut) == 1 else t.node("Concat", *begin, shape=(len(cut),), dtype="int64", axis=0)
    room = t.ints([x.shape[d] - sizes[d] for d in cut])  # XLA moves a slice that does not fit inside
    vector = t.elementwise("Min", t.elementwise("Max", vector, t.ints([0] * len(cut))), room)
    end = t.elementwise("Add", vector, t.ints([sizes[d] for d in cut]))
    return t.node("Slice", t.whole(x), vector, end, t.ints(cut), shape=shape_of(eqn), dtype=x.dtype)
