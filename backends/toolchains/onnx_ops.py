"""Bodies of a few ops in ONNX's own terms, where their decomposition would be many more operators.

Each takes the op's operands and returns its results, or None to have the decomposition instead. What they compute is
the op's meaning (`model/ops.py`), to rounding: `--verify` and the tests compare them with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from backends.toolchains.onnx_target import OnnxTarget, Ref
from backends.toolchains.walker import OpCall

Body = Callable[["OnnxTarget", OpCall[Any], "Sequence[Ref]"], "Sequence[Ref] | None"]


def _rms_norm(t: OnnxTarget, call: OpCall[Any], given: Sequence[Ref]) -> Sequence[Ref]:
    """In the shape that ONNX Runtime knows as one kernel."""
    x, weight = given
    wide = t.cast(x, "float32")
    squares = t.elementwise("Pow", wide, t.constant(np.asarray(2, np.float32)))
    mean = t.node("ReduceMean", squares, t.ints([-1]), shape=(*x.shape[:-1], 1), dtype="float32", keepdims=1)
    root = t.elementwise("Sqrt", t.elementwise("Add", mean, t.constant(np.asarray(call.attributes["eps"], np.float32))))
    root = dataclasses.replace(root, shape=x.shape)
    scale = dataclasses.replace(t.cast(weight, x.dtype), shape=x.shape, held=_trailing(weight, x), real=weight.shape)
    return [t.elementwise("Mul", t.cast(t.elementwise("Div", wide, root), x.dtype), scale)]


def _trailing(vector: Ref, x: Ref) -> tuple[int, ...]:
    return (1,) * (len(x.shape) - 1) + vector.shape


def _layer_norm(t: OnnxTarget, call: OpCall[Any], given: Sequence[Ref]) -> Sequence[Ref] | None:
    x, weight, bias = given
    if {ref.dtype for ref in given} != {"float32"}:
        return None
    eps = call.attributes["eps"]
    return [t.node("LayerNormalization", x, weight, bias, shape=x.shape, dtype=x.dtype, axis=-1, epsilon=float(eps))]


def _rope(t: OnnxTarget, call: OpCall[Any], given: Sequence[Ref]) -> Sequence[Ref]:
    """out = x[order] cos + x[swapped] sin, over all dims at once: those that do not rotate have frequency 0."""
    x, positions, inv_freq = given
    half, width = inv_freq.shape[0], x.shape[-1]
    rest = np.arange(2 * half, width)
    first, second = (
        (np.arange(0, 2 * half, 2), np.arange(1, 2 * half, 2))
        if call.attributes["interleaved"]
        else (np.arange(half), np.arange(half, 2 * half))
    )
    zeros = t.constant(np.zeros(width - 2 * half, np.float32))
    tail = [zeros] if len(rest) else []
    parts = [inv_freq, inv_freq, *tail], [t.elementwise("Neg", inv_freq), inv_freq, *tail]
    at = t.reshape(t.cast(positions, "float32"), (*positions.shape, 1, 1))
    turned = []
    for function, frequencies in zip(("Cos", "Sin"), parts, strict=True):
        wave = t.node("Concat", *frequencies, shape=(width,), dtype="float32", axis=0)
        wave = dataclasses.replace(wave, shape=(1, 1, 1, width), held=(1, 1, 1, width), real=(width,))
        angle = t.elementwise(function, t.elementwise("Mul", at, wave))
        if call.attributes["factor"] != 1.0:
            angle = t.elementwise("Mul", angle, _factor(t, call.attributes["factor"], half, rest))
        turned.append(dataclasses.replace(angle, shape=x.shape))
    wide = t.cast(x, "float32")
    orders = np.concatenate([first, second, rest]), np.concatenate([second, first, rest])
    moved = [wide if np.array_equal(order, np.arange(width)) else _permuted(t, wide, order) for order in orders]
    terms = [t.elementwise("Mul", part, wave) for part, wave in zip(moved, turned, strict=True)]
    return [t.cast(t.elementwise("Add", *terms), x.dtype)]


def _factor(t: OnnxTarget, factor: float, half: int, rest: np.ndarray) -> Ref:
    values = np.concatenate([np.full(2 * half, factor), np.ones(len(rest))]).astype(np.float32)
    return t.constant(values.reshape(1, 1, 1, -1))


def _permuted(t: OnnxTarget, x: Ref, order: np.ndarray) -> Ref:
    return t.node("Gather", x, t.ints(order.tolist()), shape=x.shape, dtype=x.dtype, axis=len(x.shape) - 1)


def _cache_write(t: OnnxTarget, call: OpCall[Any], given: Sequence[Ref]) -> Sequence[Ref]:
    """ScatterND by (page, offset): pages that were reshaped would be copied once more for the output."""
    pages, rows, slots = given
    count, size = int(np.prod(slots.shape)), t.constant(np.asarray(pages.shape[1], np.int64))
    flat = t.cast(t.reshape(slots, (count, 1)), "int64")
    parts = t.elementwise("Div", flat, size), t.elementwise("Mod", flat, size)
    index = t.node("Concat", *parts, shape=(count, 2), dtype="int64", axis=1)
    updates = t.cast(t.reshape(rows, (count, *rows.shape[2:])), pages.dtype)
    return [t.node("ScatterND", pages, index, updates, shape=pages.shape, dtype=pages.dtype)]


BODIES: Mapping[str, Body] = {
    "glm.rms_norm": _rms_norm,
    "glm.layer_norm": _layer_norm,
    "glm.rope": _rope,
    "glm.cache_write": _cache_write,
}
