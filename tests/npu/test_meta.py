"""What our lowerings call is accepted by torch_npu's own Meta kernels, and returns what `declare.py` says it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch.utils import _pytree as pytree

from backends.ascend.catalog import npu_release
from backends.ascend.npu import declare
from backends.ascend.npu.target import NpuOptions
from backends.ascend.npu.writer import NpuGraph, write
from backends.toolchains import narrow
from backends.toolchains.walker import Graph
from model import ops
from model.formats import scheme
from model.split import Layout
from runtime.deployment.manifest import Gear
from runtime.porting.export.units import units
from tests.npu import graphs as g
from tests.npu.packages import request

_BF16 = ml_dtypes.bfloat16
_INT8 = narrow.lowerings(scheme("w8a8"), "torch")


def _sparse() -> NpuGraph:
    return write(g.graph(g.sparse(8), g.attention_inputs(_BF16), g.SPARSE_OUTPUTS))


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


GRAPHS: dict[str, Callable[[], NpuGraph]] = {
    "sparse": _sparse, "route": _route, "experts": _experts, "norm": _norm, "int8": _int8,
}  # fmt: skip


def _calls(made: NpuGraph) -> list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]:
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


def _kinds(values: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(x.shape), x.dtype) for x in pytree.tree_leaves(values)]


@pytest.mark.npu
@pytest.mark.parametrize("name", GRAPHS)
def test_the_vendors_kernels_accept_a_call_and_return_what_is_declared(name: str):
    """Written with torch_npu imported: the results in the graph are those of its Meta kernels."""
    calls = _calls(GRAPHS[name]())
    assert calls
    for operator, args, attributes, results in calls:
        assert _kinds(declare.SHAPES[operator](*args, **attributes)) == _kinds(results), operator


@pytest.mark.npu
def test_every_recorded_operator_is_called_by_one_of_these_graphs():
    called = {operator for make in GRAPHS.values() for operator, *_ in _calls(make())}
    assert called == set(npu_release().operators)


@pytest.mark.npu
@pytest.mark.parametrize(
    ("formats", "layout"),
    [("bf16", Layout(tp=16)), ("w8a8", Layout(tp=4, dp=4, ep=16)), ("w8a8", Layout(tp=16))],
    ids=["bf16-tp16", "w8a8-ep16", "w8a8-tp16"],
)
def test_glm_5_is_accepted_whole(formats: str, layout: Layout):
    """Chunks and tokens, every layer type: nothing that has an operator is decomposed, and no call is refused."""
    gears = {"prefill": [Gear(1, 2048, 64)], "decode": [Gear(16, 1, 64)]}
    job, used = request("glm-5", formats, gears, layout, page_size=128), Counter[str]()  # type: ignore[arg-type]
    for phase, (gear,) in job.gears.items():
        for chain in units(job.cut, phase, gear).values():
            for graph in (link for link in chain if isinstance(link, Graph)):
                made = write(graph)
                assert not made.declined
                used.update(operator for _, operators in made.used for operator in operators)
    int8 = {"npu_dynamic_quant", "npu_quant_matmul"}
    assert set(used) == set(npu_release().operators) - (int8 if formats == "bf16" else set())


def test_without_operators_a_graph_is_aten_alone():
    made = write(g.graph(g.experts, g.expert_inputs(0), ["out"]), NpuOptions(fused=False))
    assert not g.operators(made) and set(made.used) == {("glm.expert_ffn", ())}
