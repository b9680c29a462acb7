"""ONNX, opset 18 (IR 8), static shapes: no Loop, Scan, Sort or Einsum, which compilers of ONNX often lack.

Each op of the contract becomes a model-local function of domain "glm" (`rms_norm_1`, `rms_norm_2`, .. where shapes or
attributes differ), which any runtime can inline, or its decomposition in place (`functions=False`). Weights are graph
inputs.

`onnx_target.py` makes nodes; `onnx_rules.py` has a rule for each primitive (products and indexing in files of their
own), `onnx_ops.py` shorter bodies of some ops. To write a new primitive, add a rule.
"""

from __future__ import annotations

from backends.toolchains import onnx_narrow, onnx_ops, onnx_rules
from backends.toolchains.onnx_target import OPSET, OnnxModel, OnnxTarget, RuleTables
from backends.toolchains.walker import Graph, walk


def tables() -> RuleTables:
    """How primitives, calls and the bodies of ops are written."""
    return RuleTables(onnx_rules.RULES, {**onnx_rules.CALLS, **onnx_narrow.CALLS}, onnx_ops.BODIES)


def write(graph: Graph, functions: bool = True, opset: int = OPSET) -> OnnxModel:
    """The ONNX model of a graph.

    functions: an op is a model-local function, or else decomposed in place.
    opset: `OPSET`, or `NARROW_OPSET` for graphs with matrices in narrow formats.
    Raises `Unsupported` for a number format that the opset lacks, or a primitive without a rule.
    """
    target = OnnxTarget(tables(), functions, opset)
    values = [target.input(port) for port in graph.inputs]
    consts = graph.jaxpr.consts
    results = [target.whole(ref) for ref in walk(target, graph.jaxpr.jaxpr, consts, values)]
    return target.finish(graph, results)
