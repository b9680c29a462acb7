"""A traced graph as the ONNX that ATC is given: CANN operators where they fit, caches as CANN reads them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import onnx

from backends.ascend import lowerings_attention as attention
from backends.ascend import lowerings_dense as dense
from backends.ascend import lowerings_moe as moe
from backends.ascend.lowerings import CannLowerings, CannOptions, CannRule, is_latent, split_port
from backends.errors import Unsupported
from backends.toolchains.onnx import tables
from backends.toolchains.onnx_target import OnnxModel, OnnxTarget, OpForm, onnx_type
from backends.toolchains.walker import Graph, walk

RULES: Mapping[str, CannRule] = {
    "glm.rms_norm": dense.rms_norm,
    "glm.linear": dense.linear,
    "glm.cache_write": attention.cache_write,
    "glm.index_scores": attention.index_scores,
    "glm.select_topk": attention.select_topk,
    "glm.sparse_attention": attention.sparse_attention,
    "glm.latent_attention": attention.latent_attention,
    "glm.expanded_attention": attention.expanded_attention,
    "glm.route": moe.route,
    "glm.expert_ffn": moe.expert_ffn,
}
"""The op of the contract -> its CANN operators."""


@dataclasses.dataclass(frozen=True)
class AscendGraph:
    """An ONNX model for ATC. `written.inputs` and `.outputs` may differ from the graph's: a latent cache is two, an
    int8 weight is its values and its scale. `aliases`: output -> the input whose buffer it may take over. `declined`:
    (op, reason) of what no CANN operator took, and how often."""

    written: OnnxModel
    aliases: Mapping[str, str]
    declined: Counter[tuple[str, str]]


def write(graph: Graph, options: CannOptions = CannOptions()) -> AscendGraph:
    """Raises `Unsupported` for a number format that ONNX opset 18 lacks, or a primitive without a rule."""
    lower = CannLowerings(options, RULES)
    target = OnnxTarget(tables(), lower.table, functions=False, narrow_products=True)
    values = [lower.split_cache(target, port) for port in graph.inputs]
    results = walk(target, graph.jaxpr.jaxpr, graph.jaxpr.consts, values)
    outputs, refs = [], []
    for port, ref in zip(graph.outputs, results, strict=True):
        if ref.name in lower.halves:
            outputs += split_port(port)
            refs += lower.halves[ref.name]
        else:
            outputs.append(port)
            refs.append(target.whole(ref))
    aliases = dict(graph.aliases)
    for out, given in graph.aliases.items():
        if is_latent(given) and out not in {port.name for port in outputs}:
            aliases.pop(out)
            aliases |= {f"{given}_{part}.out": f"{given}_{part}" for part in ("nope", "rope")}
    written = target.finish(dataclasses.replace(graph, outputs=tuple(outputs), aliases=aliases), refs)
    missing = _undefined(written, lower)
    if missing:
        raise Unsupported(f"{graph.name}: {', '.join(sorted(missing))} cannot be exported with CANN's operators; "
                          "export without them (--cann-ops none)")  # fmt: skip
    _describe(written.model.graph, lower)
    return AscendGraph(dataclasses.replace(written, ops=_named(written.ops)), aliases, lower.declined)


def _describe(graph: onnx.GraphProto, lower: CannLowerings) -> None:
    """Shapes and types of what CANN's nodes read and return, for checkers and readers of the file."""
    known = {info.name for infos in (graph.input, graph.output, graph.value_info) for info in infos}
    made = {name for node in graph.node for name in node.output}
    for name, ref in lower.beside.items():
        if name in made and name not in known:
            graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx_type(ref.dtype), list(ref.held)))


def _undefined(written: OnnxModel, lower: CannLowerings) -> set[str]:
    """Values that stand for something no node makes: a latent cache as one, scores without a selection."""
    graph = written.model.graph
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    made |= {port.name for port in written.inputs} - set(lower.halves)
    return {name for node in graph.node for name in node.input if name and name not in made}


def _named(ops: Counter[OpForm]) -> Counter[OpForm]:
    """The scores of an indexer are part of what selects by them."""
    named: Counter[OpForm] = Counter()
    for form, count in ops.items():
        if form.name == "glm.index_scores" and form.form == "custom" and not form.target:
            form = dataclasses.replace(form, target="cann::LightningIndexer")
        elif form.form == "custom" and not form.target:
            form = dataclasses.replace(form, form="decomposed")
        named[form] += count
    return named
