"""What our lowerings call is accepted by torch_npu's own Meta kernels, and returns what `declare.py` says it does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch.utils import _pytree as pytree

from backends.ascend import declare
from backends.ascend.operators import npu_release
from backends.ascend.target import NpuOptions
from backends.ascend.writer import write
from backends.toolchains.walker import Graph
from model.split import Layout
from runtime.deployment.manifest import Gear
from runtime.porting.export.units import units
from tests.npu import graphs as g
from tests.npu.calls import GRAPHS, calls_of
from tests.npu.packages import request


def _kinds(values: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(x.shape), x.dtype) for x in pytree.tree_leaves(values)]


@pytest.mark.npu
@pytest.mark.parametrize("name", GRAPHS)
def test_the_vendors_kernels_accept_a_call_and_return_what_is_declared(name: str):
    """Written with torch_npu imported: the results in the graph are those of its Meta kernels."""
    calls = calls_of(GRAPHS[name]())
    assert calls
    for operator, args, attributes, results in calls:
        assert _kinds(declare.SHAPES[operator](*args, **attributes)) == _kinds(results), operator


def reads_mtp(graph: Graph) -> bool:
    """Whether it has the projections of the MTP layer."""
    return "mtp" in graph.name and "w.q_a" in {port.name for port in graph.inputs}


@pytest.mark.npu
def test_every_recorded_operator_is_called_by_one_of_these_graphs():
    called = {operator for make in GRAPHS.values() for operator, *_ in calls_of(make())}
    assert called == set(npu_release().operators)


@pytest.mark.npu
@pytest.mark.parametrize(
    ("formats", "layout", "kv"),
    [
        ("bf16", Layout(tp=16), ""),
        ("w8a8", Layout(tp=4, dp=4, ep=16), ""),
        ("w8a8", Layout(tp=16), "int8"),
        ("w4a8", Layout(tp=4, dp=4, ep=16), "int8"),
        ("w4a16", Layout(tp=16), ""),
    ],
    ids=lambda each: each.name if isinstance(each, Layout) else each,
)
def test_glm_5_is_accepted_whole(formats: str, layout: Layout, kv: str):
    """Chunks and tokens, every layer type: nothing that has an operator is decomposed, and no call is refused. But the
    MTP layer's matrices are in 16 bits whatever the scheme, and npu_mla_prolog_v3 has none of those for int8 rows."""
    gears = {"prefill": [Gear(1, 2048, 64)], "decode": [Gear(16, 1, 64)]}
    job, used = request("glm-5", formats, gears, layout, page_size=128), Counter[str]()  # type: ignore[arg-type]
    for phase, (gear,) in job.gears.items():
        for chain in units(job.cut, phase, gear).values():
            for graph in (link for link in chain if isinstance(link, Graph)):
                made = write(graph, NpuOptions(int8_rope=64 if kv else None))
                assert sum(made.declined.values()) == (1 if kv and reads_mtp(graph) else 0), made.declined
                used.update(operator for _, operators in made.used for operator in operators)
    int8 = {"npu_dynamic_quant", "npu_quant_matmul"}
    across = {name for name, operator in npu_release().operators.items() if operator.exchange}
    assert (across <= set(used)) == (layout.dp > 1)
    absent = {"npu_weight_quant_batchmatmul"} | (int8 if formats in ("bf16", "w4a16") else set())
    quantised = {"npu_quant_lightning_indexer", "npu_kv_quant_sparse_flash_attention"}
    absent |= {name.replace("_quant_", "_").replace("_kv_", "_") for name in quantised} if kv else quantised
    assert set(used) | across == set(npu_release().operators) - absent


def test_without_operators_a_graph_is_aten_alone():
    made = write(g.graph(g.experts, g.expert_inputs(0), ["out"]), NpuOptions(fused=False))
    assert not g.operators(made) and set(made.used) == {("glm.expert_ffn", ())}
