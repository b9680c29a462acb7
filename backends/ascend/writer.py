"""A traced graph as an `ExportedProgram` of ATen and torch_npu's operators."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jax.extend import core as jex

from backends.ascend import prolog
from backends.ascend.caches import Halves, Packed, Scaled
from backends.ascend.check import argument_names
from backends.ascend.lowerings import BODIES, LOWERINGS
from backends.ascend.operators import npu_release
from backends.ascend.sums import bias_name
from backends.ascend.target import KernelMatrix, NpuOptions, NpuTarget
from backends.errors import Unsupported
from backends.toolchains.narrow import rounds_activations
from backends.toolchains.torch import exported, saved
from backends.toolchains.walker import Graph, Port, walk
from model.formats import matrix_format
from model.ops import FORMAT, attributes_of

_IN_INT32 = 8
_NZ = {
    "npu_grouped_matmul": (("weight",), ("int8", "bfloat16", "int32")),
    "npu_quant_matmul": (("x2",), ("int8",)),
    "npu_mla_prolog_v3": (("weight_dq", "weight_uq_qr", "weight_dkv_kr"), ("int8", "bfloat16")),
}
"""Operators that take FRACTAL_NZ: for which arguments, and of which types: their documentation, torch_npu 2.13.0."""


@dataclasses.dataclass(frozen=True)
class NpuGraph:
    """A `.pt2` file's bytes, and its inputs and outputs in order: a cache may be two, a matrix may have fewer
    dims than the graph's. `aliases`: output -> the input that it is. `nz`: the inputs that only operators read which
    take FRACTAL_NZ. `used` counts (op, operators, none where decomposed), `declined` (op, reason)."""

    archive: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: Mapping[str, str]
    nz: tuple[str, ...]
    used: Counter[tuple[str, tuple[str, ...]]]
    declined: Counter[tuple[str, str]]


def write(graph: Graph, options: NpuOptions = NpuOptions()) -> NpuGraph:
    """Needs no torch_npu. Raises `Unsupported` for a primitive without a rule."""
    matrices = _matrices(graph, options.fused)
    variables = graph.jaxpr.jaxpr.invars

    def parts(port: Port) -> Sequence[Port]:
        form = options.form(port)
        return form.ports(port) if form else (port,)

    def given_as(port: Port, var: jex.Var) -> Sequence[Port]:
        return matrices[var].ports(port) if var in matrices else parts(port)

    inputs = tuple(p for port, var in zip(graph.inputs, variables, strict=True) for p in given_as(port, var))
    outputs = tuple(part for port in graph.outputs for part in parts(port))
    target = NpuTarget(options, LOWERINGS, BODIES)
    layer = prolog.find(graph) if options.fused else None

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = iter(given)
        values: list[Any] = []
        for port, var in zip(graph.inputs, variables, strict=True):
            if (form := matrices.get(var)) is not None:
                values.append(KernelMatrix(next(left), port.shape, form.packed, next(left) if form.summed else None))
            elif (cache := options.form(port)) is not None:
                values.append(cache.of(*(next(left) for _ in cache.tensors)))
            else:
                values.append(next(left))
        results: list[torch.Tensor] = []
        known = prolog.lower(target, layer, graph, values) if layer else {}
        for value in walk(target, graph.jaxpr.jaxpr, graph.jaxpr.consts, values, known):
            results += value.parts if isinstance(value, Halves | Packed | Scaled) else [target.whole(value)]
        return tuple(result.contiguous() for result in results)

    program = exported(run, inputs)
    aliases: dict[str, str] = {}
    of = {port.name: port for port in graph.inputs}
    for out, given in graph.aliases.items():
        names = [part.name for part in parts(of[given])]
        aliases |= {f"{name}.out": name for name in names} if len(names) > 1 else {out: given}
    return NpuGraph(
        saved(program), inputs, outputs, aliases, _nz(program, inputs, options.series), target.used, target.declined
    )


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a weight is an input: with its first `lead` dims and the others as one; packed: eight 4-bit integers in an
    int32; summed: with a second input, `sums.bias_of` its own."""

    lead: int
    packed: bool
    summed: bool

    def ports(self, port: Port) -> Sequence[Port]:
        columns, lead = math.prod(port.shape[self.lead :]), port.shape[: self.lead]
        if not self.packed:
            return [dataclasses.replace(port, shape=(*lead, columns))]
        if columns % _IN_INT32:
            raise Unsupported(
                f"{port.name} has rows of {columns} 4-bit integers, which do not fill int32; see --formats"
            )
        packed = Port(port.name, (*lead, columns // _IN_INT32), "int32")
        if not self.summed:
            return [packed]
        return [packed, Port(bias_name(port.name), (port.shape[0], columns), "float32")]


def _matrices(graph: Graph, fused: bool) -> dict[Any, _Form]:
    """The inputs that are weights of products with operators of their own, and those of 4-bit integers."""
    found: dict[Any, _Form] = {}
    inputs = dict(zip(graph.jaxpr.jaxpr.invars, graph.inputs, strict=True))
    for eqn in graph.jaxpr.jaxpr.eqns:
        name = eqn.params.get("name") if eqn.primitive.name == "composite" else None
        fmt = attributes_of(eqn).get(FORMAT) if name is not None else None
        places = {"glm.linear": (1,) if fmt else (), "glm.expert_ffn": (3, 5) if fmt else (3, 4)}
        for var in (eqn.invars[place] for place in places.get(str(name), ())):
            if isinstance(var, jex.Literal) or var not in inputs:
                continue
            experts, packed = name == "glm.expert_ffn", inputs[var].dtype == "int4"
            summed = fused and experts and packed and rounds_activations(matrix_format(str(fmt)))
            if fused or packed:
                found[var] = _Form(2 if experts else 1, packed, summed)
    return found


def _nz(program: torch.export.ExportedProgram, inputs: Sequence[Port], series: str) -> tuple[str, ...]:
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"][-len(inputs) or None :]
    found = []
    for node, port in zip(placeholders, inputs, strict=True):
        readers = list(node.users)
        if readers and all(_takes_nz(reader, node, port.dtype, series) for reader in readers):
            found.append(port.name)
    return tuple(found)


def _takes_nz(reader: torch.fx.Node, weight: torch.fx.Node, dtype: str, series: str) -> bool:
    name = str(reader.target).removeprefix("npu.").removesuffix(".default")
    places, types = _NZ.get(name, ((), ()))
    if dtype not in types or series in npu_release().operators[name].nd_only:
        return False
    given = dict(zip(argument_names(name), reader.args, strict=False)) | reader.kwargs
    held = [given[place] for place in places]
    return any(each is weight or (isinstance(each, (list, tuple)) and list(each) == [weight]) for each in held)
