"""A traced graph as an `ExportedProgram` of ATen and torch_npu's operators."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jax.extend import core as jex

from backends.ascend.check import argument_names
from backends.ascend.constraints import LATENT, ROPE
from backends.ascend.lowerings import LOWERINGS
from backends.ascend.target import Halves, KernelMatrix, NpuOptions, NpuTarget
from backends.toolchains.torch import exported, saved
from backends.toolchains.walker import Graph, Port, walk
from model.ops import FORMAT, attributes_of

_NZ = {"npu_grouped_matmul": ("int8", "bfloat16"), "npu_quant_matmul": ("int8",)}
"""Operators whose weight may be in FRACTAL_NZ, and in which types: their documentation, torch_npu 2.13.0."""
_WEIGHT = {"npu_grouped_matmul": "weight", "npu_quant_matmul": "x2"}


@dataclasses.dataclass(frozen=True)
class NpuGraph:
    """A `.pt2` file's bytes, and its inputs and outputs in order: a latent cache may be two, a matrix may have fewer
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
    matrices = _matrices(graph.jaxpr.jaxpr) if options.fused else {}

    def parts(port: Port) -> Sequence[Port]:
        return halves(port) if options.splits(port) else (port,)

    def given_as(port: Port, var: jex.Var) -> Sequence[Port]:
        return [dataclasses.replace(port, shape=matrices[var])] if var in matrices else parts(port)

    variables = graph.jaxpr.jaxpr.invars
    inputs = tuple(p for port, var in zip(graph.inputs, variables, strict=True) for p in given_as(port, var))
    outputs = tuple(part for port in graph.outputs for part in parts(port))
    target = NpuTarget(options, LOWERINGS)

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = iter(given)
        values: list[Any] = []
        for port, var in zip(graph.inputs, variables, strict=True):
            first = next(left)
            if var in matrices:
                values.append(KernelMatrix(first, port.shape))
            else:
                values.append(Halves(first, next(left)) if options.splits(port) else first)
        results: list[torch.Tensor] = []
        for value in walk(target, graph.jaxpr.jaxpr, graph.jaxpr.consts, values):
            results += [value.nope, value.rope] if isinstance(value, Halves) else [target.whole(value)]
        return tuple(result.contiguous() for result in results)

    program = exported(run, inputs)
    aliases: dict[str, str] = {}
    of = {port.name: port for port in graph.inputs}
    for out, given in graph.aliases.items():
        names = [part.name for part in parts(of[given])]
        aliases |= {f"{name}.out": name for name in names} if len(names) > 1 else {out: given}
    return NpuGraph(saved(program), inputs, outputs, aliases, _nz(program, inputs), target.used, target.declined)


def halves(port: Port) -> Sequence[Port]:
    """The two ports of a latent cache: "cache.latent_nope" and "cache.latent_rope" (".out" stays last)."""
    stem, dot, out = port.name.partition(".out")
    widths = {"nope": LATENT, "rope": ROPE}
    return tuple(Port(f"{stem}_{part}{dot}{out}", (*port.shape[:2], w), port.dtype) for part, w in widths.items())


def _matrices(jaxpr: jex.Jaxpr) -> dict[Any, tuple[int, ...]]:
    """The inputs that are weights of products with operators of their own, and the shapes that those take."""
    found: dict[Any, tuple[int, ...]] = {}
    inputs = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name") if eqn.primitive.name == "composite" else None
        narrow = name is not None and FORMAT in attributes_of(eqn)
        places = {"glm.linear": (1,) if narrow else (), "glm.expert_ffn": (3, 5) if narrow else (3, 4)}
        for var in (eqn.invars[place] for place in places.get(str(name), ())):
            if not isinstance(var, jex.Literal) and var in inputs:
                lead = var.aval.shape[: 2 if name == "glm.expert_ffn" else 1]  # type: ignore[attr-defined]
                found[var] = (*lead, math.prod(var.aval.shape[len(lead) :]))  # type: ignore[attr-defined]
    return found


def _nz(program: torch.export.ExportedProgram, inputs: Sequence[Port]) -> tuple[str, ...]:
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"][-len(inputs) or None :]
    found = []
    for node, port in zip(placeholders, inputs, strict=True):
        readers = list(node.users)
        if readers and all(_takes_nz(reader, node, port.dtype) for reader in readers):
            found.append(port.name)
    return tuple(found)


def _takes_nz(reader: torch.fx.Node, weight: torch.fx.Node, dtype: str) -> bool:
    name = str(reader.target).removeprefix("npu.").removesuffix(".default")
    if dtype not in _NZ.get(name, ()):
        return False
    given = dict(zip(argument_names(name), reader.args, strict=False)) | reader.kwargs
    held = given[_WEIGHT[name]]
    return held is weight or (isinstance(held, (list, tuple)) and list(held) == [weight])
