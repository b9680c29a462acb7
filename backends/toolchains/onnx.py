"""ONNX, opset 18 (IR 8), static shapes: no Loop, Scan, Sort or Einsum, so that ATC and ONNX Runtime both take it.

Each op of the contract becomes a model-local function of domain "glm" (`rms_norm_1`, `rms_norm_2`, .. where shapes or
attributes differ), which any runtime can inline; or, by the `custom` table, nodes of an accelerator's own operators;
or its decomposition in place (`functions=False`). Weights are graph inputs.

`onnx_target.py` makes nodes; `onnx_rules.py` has a rule for each primitive (products and indexing in files of their
own), `onnx_ops.py` shorter bodies of some ops. To write a new primitive, add a rule.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.toolchains import onnx_narrow, onnx_ops, onnx_rules
from backends.toolchains.onnx_target import OPSET, CustomOp, OnnxModel, OnnxTarget, RuleTables
from backends.toolchains.walker import Graph, walk


def tables() -> RuleTables:
    """How primitives, calls and the bodies of ops are written."""
    return RuleTables(onnx_rules.RULES, {**onnx_rules.CALLS, **onnx_narrow.CALLS}, onnx_ops.BODIES)


def write(
    graph: Graph,
    custom: Mapping[str, CustomOp] = {},
    functions: bool = True,
    narrow_products: bool = False,
    opset: int = OPSET,
) -> OnnxModel:
    """The ONNX model of a graph.

    custom: op name ("glm.route") -> how to emit it; an op that is absent, or declined, is a model-local function,
    or with `functions=False` decomposed in place. narrow_products: a bfloat16 product that accumulates in float32 is
    one bfloat16 MatMul (as accelerators compute it) instead of a float32 MatMul of widened operands.
    opset: `OPSET`, or `NARROW_OPSET` for graphs with matrices in narrow formats.
    Raises `Unsupported` for a number format that the opset lacks, or a primitive without a rule.
    """
    target = OnnxTarget(tables(), custom, functions, narrow_products, opset)
    values = [target.input(port) for port in graph.inputs]
    consts = graph.jaxpr.consts
    results = [target.whole(ref) for ref in walk(target, graph.jaxpr.jaxpr, consts, values)]
    return target.finish(graph, results)
