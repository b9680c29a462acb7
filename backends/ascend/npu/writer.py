"""A traced graph as an `ExportedProgram` of ATen and torch_npu's operators."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from backends.ascend.constraints import LATENT, ROPE
from backends.ascend.npu.lowerings import LOWERINGS
from backends.ascend.npu.target import Halves, NpuOptions, NpuTarget
from backends.toolchains.torch import archive
from backends.toolchains.walker import Graph, Port, walk


@dataclasses.dataclass(frozen=True)
class NpuGraph:
    """A `.pt2` file's bytes, and its inputs and outputs in order: a latent cache may be two. `aliases`: output -> the
    input that it is. `used` counts (op, operators, none where decomposed), `declined` (op, reason)."""

    archive: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: Mapping[str, str]
    used: Counter[tuple[str, tuple[str, ...]]]
    declined: Counter[tuple[str, str]]


def write(graph: Graph, options: NpuOptions = NpuOptions()) -> NpuGraph:
    """Needs no torch_npu. Raises `Unsupported` for a primitive without a rule."""

    def parts(port: Port) -> Sequence[Port]:
        return halves(port) if options.splits(port) else (port,)

    inputs, outputs = (tuple(part for port in ports for part in parts(port)) for ports in (graph.inputs, graph.outputs))
    target = NpuTarget(options, LOWERINGS)

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = iter(given)
        values: list[Any] = [
            Halves(next(left), next(left)) if options.splits(port) else next(left) for port in graph.inputs
        ]
        results: list[torch.Tensor] = []
        for value in walk(target, graph.jaxpr.jaxpr, graph.jaxpr.consts, values):
            results += [value.nope, value.rope] if isinstance(value, Halves) else [target.whole(value)]
        return tuple(result.contiguous() for result in results)

    data = archive(run, inputs)
    aliases: dict[str, str] = {}
    of = {port.name: port for port in graph.inputs}
    for out, given in graph.aliases.items():
        names = [part.name for part in parts(of[given])]
        aliases |= {f"{name}.out": name for name in names} if len(names) > 1 else {out: given}
    return NpuGraph(data, inputs, outputs, aliases, target.used, target.declined)


def halves(port: Port) -> Sequence[Port]:
    """The two ports of a latent cache: "cache.latent_nope" and "cache.latent_rope" (".out" stays last)."""
    stem, dot, out = port.name.partition(".out")
    widths = {"nope": LATENT, "rope": ROPE}
    return tuple(Port(f"{stem}_{part}{dot}{out}", (*port.shape[:2], w), port.dtype) for part, w in widths.items())
