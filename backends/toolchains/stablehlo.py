"""StableHLO through `jax.export`: one artifact a platform, composites kept by name.

A composite whose body holds a matrix product cannot be exported for several platforms at once, hence a file each.
Two files a graph: the portable bytecode that other toolchains read (its compatibility guarantee: docs/export.md),
and `jax.export`'s own serialization of the same module, which JAX loads without the model's code.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
from jax import export
from jax.extend import core as jex

from backends.toolchains.walker import Graph

PLATFORMS = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class StableHlo:
    """Of one platform: portable StableHLO bytecode, and the same as `jax.export` serializes it."""

    bytecode: bytes
    serialized: bytes


def write(graph: Graph, platform: str) -> StableHlo:
    """The artifact of a graph; positional arguments and results in the graph's order."""
    exported = _export(graph, platform)
    return StableHlo(bytes(exported.mlir_module_serialized), bytes(exported.serialize()))


def text(graph: Graph, platform: str) -> str:
    """The module as MLIR text."""
    return _export(graph, platform).mlir_module()


def _export(graph: Graph, platform: str) -> export.Exported:
    paths = jax.config.jax_hlo_source_file_canonicalization_regex  # type: ignore[attr-defined]
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")  # file names, without this machine's paths
    try:
        return _lower(graph, platform)
    finally:
        jax.config.update("jax_hlo_source_file_canonicalization_regex", paths)


def _lower(graph: Graph, platform: str) -> export.Exported:
    run: Any = jex.jaxpr_as_fun(graph.jaxpr)
    specs = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in graph.inputs]
    return export.export(jax.jit(run), platforms=[platform])(*specs)


def ops(graph: Graph) -> Counter[str]:
    """The ops of the contract in a graph: each stays a `stablehlo.composite` of its name."""
    return _count(graph.jaxpr.jaxpr)


def _count(jaxpr: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "composite" and eqn.params["name"].startswith("glm."):
            found[eqn.params["name"]] += 1
        elif eqn.primitive.name in ("jit", "pjit"):
            found += _count(eqn.params["jaxpr"].jaxpr)
    return found
