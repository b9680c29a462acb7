"""Graphs that call every recorded operator, and their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from backends.ascend.target import NpuOptions
from backends.ascend.writer import NpuGraph, write
from backends.toolchains import narrow
from model import ops
from model.formats import scheme
from tests.npu import graphs as g

_BF16 = ml_dtypes.bfloat16
_INT8 = narrow.lowerings(scheme("w8a8"), "torch")


def _sparse() -> NpuGraph:
    return write(g.graph(g.sparse(8), g.attention_inputs(_BF16), g.SPARSE_OUTPUTS))


def _int8_caches() -> NpuGraph:
    graph = g.graph(g.sparse(8, keys=True), g.attention_inputs(_BF16), [*g.SPARSE_OUTPUTS, "cache.index.out"])
    return write(graph, NpuOptions(int8_rope=64))


def _projections(int8: bool, kv: bool = False) -> NpuGraph:
    call = _INT8["glm.linear"] if int8 else ops.linear
    graph = g.graph(g.projections(call), g.projection_inputs(_BF16, int8=int8), g.PROJECTED)
    return write(graph, NpuOptions(int8_rope=64 if kv else None))


def _route() -> NpuGraph:
    return write(g.graph(g.route(4, 2), g.route_inputs(), ["experts", "weights"]))


def _experts() -> NpuGraph:
    return write(g.graph(g.experts, g.expert_inputs(0, _BF16), ["out"]))


def _norm() -> NpuGraph:
    def norm(**x: Any) -> tuple[Any, ...]:
        return (ops.swiglu(ops.rms_norm(x["x"], x["weight"], eps=1e-5).reshape(3, 2, 32)),)

    return write(g.graph(norm, {"x": g.normal(3, 64, dtype=_BF16), "weight": g.normal(64, dtype=_BF16)}, ["out"]))


def _int8() -> NpuGraph:
    inputs = g.expert_inputs(0, _BF16)
    for name in ("gate_up", "down"):
        inputs[name] = inputs[name].astype(np.int8)
    inputs |= {"gate_up_scale": g.normal(6, 1, 2, 16), "down_scale": g.normal(6, 1, 32)}
    inputs |= {"matrix": np.ones((32, 24), np.int8), "scale": g.normal(1, 24)}

    def layer(**x: Any) -> tuple[Any, ...]:
        matrices = (x["gate_up"], x["gate_up_scale"], x["down"], x["down_scale"])
        out = _INT8["glm.expert_ffn"](x["x"], x["experts"], x["weights"], *matrices)
        return (_INT8["glm.linear"](out, x["matrix"], x["scale"]),)

    return write(g.graph(layer, inputs, ["out"]))


def _int4(name: str) -> NpuGraph:
    lowerings = narrow.lowerings(scheme(f"{name}/{name}"), "ascend")
    inputs = g.narrow_experts(name, _BF16)
    if name == "w4a16":
        inputs |= {"matrix.values": g.int4(64, 24), "matrix.scale": g.normal(2, 24)}

    def layer(**x: Any) -> tuple[Any, ...]:
        matrices = (x["gate_up.values"], x["gate_up.scale"], x["down.values"], x["down.scale"])
        out = lowerings["glm.expert_ffn"](x["x"], x["experts"], x["weights"], *matrices)
        return (lowerings["glm.linear"](out, x["matrix.values"], x["matrix.scale"]) if name == "w4a16" else out,)

    return write(g.graph(layer, inputs, ["out"]))


def _exchange(name: str = "") -> NpuGraph:
    call = narrow.lowerings(scheme(name), "ascend")["glm.expert_ffn"] if name else ops.expert_ffn
    _, shares = g.exchange_inputs(name, _BF16)
    return write(g.graph(g.exchange(call), shares[0], ["out"], g.EXCHANGE))


GRAPHS: dict[str, Callable[[], NpuGraph]] = {
    "sparse": _sparse, "int8-caches": _int8_caches, "route": _route, "experts": _experts, "norm": _norm, "int8": _int8,
    "projections-int8-cache": lambda: _projections(True, True), "projections-int8": lambda: _projections(True),
    "projections": lambda: _projections(False),
    "w4a8": lambda: _int4("w4a8"), "w4a16": lambda: _int4("w4a16"),
    "rope": lambda: write(g.graph(g.rope(), g.rope_inputs(_BF16), ["out"])),
    "exchange-int8": lambda: _exchange("w8a8"), "exchange": _exchange,
}  # fmt: skip


def calls_of(made: NpuGraph) -> list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]:
    """(operator, arguments, attributes, results) of a graph's nodes, as tensors without data."""

    def value(x: Any) -> Any:
        return x.meta["val"] if isinstance(x, torch.fx.Node) else x

    found = []
    for node in g.program(made).graph.nodes:
        name = str(node.target)
        if name.startswith("npu."):
            args, attributes = torch.fx.node.map_arg((node.args, node.kwargs), value)
            found.append((name.split(".")[1], tuple(args), dict(attributes), node.meta["val"]))
    return found
