"""Cuts a traced program at its collectives: a chain of graphs, each of one device, and the exchanges between them.

A collective inside a graph would need each toolchain's own operators and a runtime that has them; between graphs it
is the host's, or HCCL's or NCCL's, and every graph is one that any runtime loads. The device's place on a mesh axis
(`axis_index`) becomes an int32 input, so that the graphs are the same on all devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core as jex

from backends.toolchains.walker import Graph, Port, live, port

_COLLECTIVES = {
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective over `axis` between two graphs; kinds as in `runtime.deployment.manifest.Step`."""

    kind: str
    axis: str
    dim: int
    value: Port
    result: Port


def cut(
    name: str, closed: jex.ClosedJaxpr, inputs: Sequence[str], outputs: Sequence[str], aliases: Mapping[str, str] = {}
) -> list[Graph | Exchange]:
    """The chain of a traced program. `inputs` and `outputs` name its variables in order; `aliases` as in `Graph`.

    Outputs that only hand an input through are left out, and so are inputs that a graph does not read. Values that
    one graph hands to a later one are named "mid.N".
    """
    jaxpr = closed.jaxpr
    wanted = {
        var: out
        for var, out in zip(jaxpr.outvars, outputs, strict=True)
        if not isinstance(var, jex.Literal) and var not in jaxpr.invars
    }
    names: dict[Any, str] = dict(zip(jaxpr.invars, inputs, strict=True))
    used, consts = live(jaxpr), dict(zip(jaxpr.constvars, closed.consts, strict=True))
    groups: list[list[jex.JaxprEqn] | jex.JaxprEqn] = []
    ranks: dict[str, Any] = {}
    same: dict[Any, Any] = {}  # a rank asked for twice is one input
    for eqn in jaxpr.eqns:
        if not any(var in used for var in eqn.outvars):
            continue
        if eqn.primitive.name == "axis_index":
            place = ranks.setdefault(f"rank.{_axis(eqn)}", eqn.outvars[0])
            same[eqn.outvars[0]] = place
            names[place] = f"rank.{_axis(eqn)}"
            continue
        eqn = eqn.replace(invars=[v if isinstance(v, jex.Literal) else same.get(v, v) for v in eqn.invars])
        if eqn.primitive.name in _COLLECTIVES:
            groups.append(eqn)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(eqn)
        else:
            groups.append([eqn])

    reads = [_reads(group) for group in groups]
    for var, out in wanted.items():
        names.setdefault(var, out)

    def named(var: Any) -> str:
        if var not in names:
            names[var] = f"mid.{sum(name.startswith('mid.') for name in names.values())}"
        return names[var]

    chain: list[Graph | Exchange] = []
    graphs = sum(isinstance(group, list) for group in groups)
    for place, group in enumerate(groups):
        if not isinstance(group, list):
            chain += _exchanges(group, named)
            continue
        made = {var for eqn in group for var in eqn.outvars}
        later = set().union(*reads[place + 1 :], wanted)
        given = [v for v in names if v in reads[place] and v not in made and v not in consts]
        results = [var for eqn in group for var in eqn.outvars if var in later]
        own = [var for var in consts if var in reads[place]]
        # its variables keep their own names: those of the whole would be too many or too few
        piece = jex.Jaxpr(own, given, results, group, debug_info=jaxpr.debug_info.with_unknown_names())
        number = sum(isinstance(link, Graph) for link in chain)
        ports = tuple(port(named(var), var.aval) for var in given), tuple(port(named(var), var.aval) for var in results)
        produced = {p.name for p in ports[1]}
        chain.append(
            Graph(
                name if graphs == 1 else f"{name}.{number}",
                jex.ClosedJaxpr(piece, [consts[var] for var in own]),
                *ports,
                {out: given for out, given in aliases.items() if out in produced},
            )
        )
    return chain


def _reads(group: list[jex.JaxprEqn] | jex.JaxprEqn) -> set[Any]:
    eqns = group if isinstance(group, list) else [group]
    return {v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal)}


def _axis(eqn: jex.JaxprEqn) -> str:
    found = eqn.params.get("axes", eqn.params.get("axis_name"))
    axes = tuple(found) if isinstance(found, tuple | list) else (found,)
    assert len(axes) == 1, f"a collective over several axes at once: {axes}"
    return str(axes[0])


def _exchanges(eqn: jex.JaxprEqn, named: Any) -> list[Graph | Exchange]:
    params, kind = eqn.params, _COLLECTIVES[eqn.primitive.name]
    assert params.get("axis_index_groups") is None and params.get("tiled", True), f"an untiled or grouped {kind}"
    dim = params.get("all_gather_dimension", params.get("scatter_dimension", params.get("split_axis", 0)))
    assert params.get("concat_axis", dim) == dim, "an all_to_all that moves a dim"
    return [
        Exchange(kind, _axis(eqn), dim, port(named(v), v.aval), port(named(out), out.aval))
        for v, out in zip(eqn.invars, eqn.outvars, strict=True)
    ]
