"""StableHLO: one neutral file for any compiler, and for JAX an artifact a platform; composites kept by name.

A graph is written three times. The portable bytecode is for other toolchains: operations of the StableHLO and func
dialects alone, no custom calls, nothing of a platform, in the version of the dialect that `version` says (what that
guarantees: docs/export.md). `jax.export`'s own serialization of the same program is for JAX, which loads it without the
model's code; it names its platform, holds the adapter's own kernels where those are plain calls, and a composite whose
body holds a matrix product cannot be exported for several at once, hence a file each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax import export
from jax.extend import core as jex
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.extend.mlir.dialects import stablehlo as dialect

from backends import registry
from backends.errors import Unsupported
from backends.toolchains.walker import Graph
from model.ops import substitute

PLATFORMS = ("cpu", "cuda")
_WITH_KERNELS = frozenset({"cuda"})
"""Where JAX's file holds the adapter's kernels. The CPU's are loops, which runners of packages refuse."""
_DIALECTS = ("builtin", "func", "stablehlo")


@dataclasses.dataclass(frozen=True)
class StableHlo:
    """portable: neutral StableHLO bytecode. serialized: by platform, what `jax.export` makes of the graph."""

    portable: bytes
    serialized: Mapping[str, bytes]


def version() -> str:
    """The StableHLO version of the portable bytecode: one that compilers of the last 12 weeks, and later, read."""
    return dialect.get_version_from_compatibility_requirement(dialect.StablehloCompatibilityRequirement.WEEK_12)


def write(graph: Graph) -> StableHlo:
    """The artifacts of a graph; positional arguments and results in the graph's order.

    Raises `Unsupported` for a graph that needs an operation of XLA's own.
    """
    portable = dialect.serialize_portable_artifact_str(neutral(graph), version())
    return StableHlo(portable, {name: bytes(_export(graph, name).serialize()) for name in PLATFORMS})


def neutral(graph: Graph) -> str:
    """The module as MLIR text, of StableHLO and func alone. Raises `Unsupported` where that does not do."""
    context = ir.Context()
    dialect.register_dialect(context)
    sdy.register_dialect(context)  # of shardings, which JAX may annotate with
    module = dialect.deserialize_portable_artifact(context, bytes(_export(graph, PLATFORMS[0]).mlir_module_serialized))
    foreign: set[str] = set()

    def look(op: Any) -> Any:
        name = op.name
        if name.partition(".")[0] not in _DIALECTS or name == "stablehlo.custom_call":
            foreign.add(f"{name} {op.attributes['call_target_name']}" if "call_target_name" in op.attributes else name)
        for key in list(op.attributes):
            if key.startswith(("mhlo.", "jax.")) or key in ("arg_attrs", "res_attrs"):  # notes of JAX to itself
                del op.attributes[key]
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    module.operation.attributes["sym_name"] = ir.StringAttr.get(graph.name, context)
    if foreign:
        raise Unsupported(f"{graph.name}: StableHLO has no operation of its own for {', '.join(sorted(foreign))}")
    return str(module.operation.get_asm(enable_debug_info=False))


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
    allowed = []
    if platform in _WITH_KERNELS:
        backend = registry.get(platform)
        run = substitute(run, backend.lowerings())
        allowed = [export.DisabledSafetyCheck.custom_call(name) for name in backend.custom_calls]
    specs = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in graph.inputs]
    return export.export(jax.jit(run), platforms=[platform], disabled_checks=allowed)(*specs)


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
