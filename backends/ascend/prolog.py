"""The projections before attention as one operator, `npu_mla_prolog_v3`: from a token's hidden state to its queries,
absorbed and rotated, its latent, normalised, rotated and written to the cache, and the latent of the queries, which an
indexer reads.

A trace has nine ops for that, with slices and reshapes between them. `find` knows them by the weights that they read;
the operator computes the four values that leave them, and the walk is given those: what nothing else reads is not
walked. Where the operator does not take a layer, the ops are lowered one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jax.extend import core as jex

from backends.ascend import caches, constraints
from backends.ascend.caches import Halves, Packed
from backends.ascend.dense import INT8, as_matrix, quantised_rows, rotations
from backends.ascend.target import NotTaken, NpuTarget, RoundedRows, accept, require
from backends.toolchains.walker import Graph, walk
from model.ops import FORMAT, attributes_of

NAME = "npu_mla_prolog_v3"
_BOTH_INT8, _BY_TILE, _IN_ONE_ROW = 2, 3, 1  # weight_quant_mode; kv_cache_quant_mode; of latents and of scales
_MOVED = {"slice", "reshape", "squeeze", "broadcast_in_dim", "expand_dims"}


@dataclasses.dataclass(frozen=True)
class Prolog:
    """The equations of a trace that make queries and latents of a hidden state."""

    q_a: jex.JaxprEqn
    q_norm: jex.JaxprEqn
    q_b: jex.JaxprEqn
    q_rope: jex.JaxprEqn
    absorb: jex.JaxprEqn
    kv_a: jex.JaxprEqn
    kv_norm: jex.JaxprEqn
    kv_rope: jex.JaxprEqn
    write: jex.JaxprEqn

    @property
    def equations(self) -> tuple[jex.JaxprEqn, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def weights(self) -> tuple[Any, ...]:
        """The variables of the three matrices that the kernel takes in FRACTAL_NZ."""
        return tuple(eqn.invars[1] for eqn in (self.q_a, self.q_b, self.kv_a))

    @property
    def factor(self) -> float:
        """That cosines and sines are multiplied by."""
        return float(attributes_of(self.q_rope)["factor"])

    @property
    def format(self) -> str | None:
        """Of the three matrices; "mixed" where they differ."""
        found = {attributes_of(eqn).get(FORMAT) for eqn in (self.q_a, self.q_b, self.kv_a)}
        return found.pop() if len(found) == 1 else "mixed"


def find(graph: Graph) -> Prolog | None:
    """None where a graph has no such layer: other attention, or queries that are not absorbed."""
    jaxpr = graph.jaxpr.jaxpr
    names = {port.name.removesuffix(".values"): var for port, var in zip(graph.inputs, jaxpr.invars, strict=True)}
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def read_by(op: str, name: str, place: int = 1) -> jex.JaxprEqn | None:
        found = [
            eqn
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "composite"
            and eqn.params["name"] == op
            and len(eqn.invars) > place
            and eqn.invars[place] is names.get(name, eqn)
        ]
        return found[0] if len(found) == 1 else None

    def origin(var: Any) -> Any:
        """Of what a value is a part, or another shape."""
        while var in made and made[var].primitive.name in _MOVED:
            var = made[var].invars[0]
        return var

    def rotated(of: Any) -> jex.JaxprEqn | None:
        found = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "glm.rope" and origin(eqn.invars[0]) is of]
        return found[0] if len(found) == 1 else None

    q_a, q_b, kv_a = (read_by("glm.linear", f"w.{name}") for name in ("q_a", "q_b", "kv_a"))
    q_norm, kv_norm = (read_by("glm.rms_norm", f"w.{name}_norm") for name in ("q_a", "kv_a"))
    absorb, write = read_by("glm.head_linear", "w.k_up"), read_by("glm.cache_write", "cache.latent", 0)
    if not (q_a and q_b and kv_a and q_norm and kv_norm and absorb and write):
        return None
    q_rope, kv_rope = rotated(q_b.outvars[0]), rotated(kv_a.outvars[0])
    joined = made.get(write.invars[1])
    if not (q_rope and kv_rope and joined):
        return None
    right = (
        q_a.invars[0] is kv_a.invars[0]
        and q_norm.invars[0] is q_a.outvars[0]
        and q_b.invars[0] is q_norm.outvars[0]
        and origin(absorb.invars[0]) is q_b.outvars[0]
        and origin(kv_norm.invars[0]) is kv_a.outvars[0]
        and joined.primitive.name == "concatenate"
        and [origin(var) for var in joined.invars] == [kv_norm.outvars[0], kv_rope.outvars[0]]
    )
    return Prolog(q_a, q_norm, q_b, q_rope, absorb, kv_a, kv_norm, kv_rope, write) if right else None


def lower(t: NpuTarget, found: Prolog, graph: Graph, values: Sequence[Any]) -> Mapping[Any, Any]:
    """The values, by variable, that a walk of the graph need not make: none where the operator does not take them."""
    jaxpr = graph.jaxpr.jaxpr
    given = dict(zip(jaxpr.invars, values, strict=True))
    try:
        _check(t, found, given)
    except NotTaken as reason:
        t.declined["projections before attention", str(reason)] += 1
        return {}
    outer = [found.q_a.invars[0], *found.q_rope.invars[1:], found.write.invars[2]]
    before = jaxpr.replace(outvars=outer, debug_info=jaxpr.debug_info.with_unknown_names())
    made = dict(zip(outer, walk(t, before, graph.jaxpr.consts, values), strict=True))
    for eqn in found.equations:
        t.used[eqn.params["name"], (NAME,)] += 1
    return {outer[0]: made[outer[0]], **_call(t, found, {**given, **made})}


def _check(t: NpuTarget, found: Prolog, given: Mapping[Any, Any]) -> None:
    """Raises `NotTaken`."""
    require(t.options.prolog, f"{NAME} takes matrices in FRACTAL_NZ, and chunks read the same ones in plain products")
    x, cache = _aval(found.q_a.invars[0]), given[found.write.invars[0]]
    dtype = x.dtype.name
    require(dtype in t.options.dtypes and dtype != "float16", f"{NAME} takes no {dtype}")
    require(found.format in (None, INT8), f"{NAME} is not mapped for matrices in {found.format}")
    require(bool(attributes_of(found.q_rope)["interleaved"]), f"{NAME} rotates neighbours, not halves")
    heads, nope, lora = _aval(found.absorb.invars[1]).shape
    hidden, q_lora = x.shape[-1], _aval(found.q_norm.invars[1]).shape[0]
    require(isinstance(cache, Halves | Packed), f"{NAME} writes no such cache")
    rope = _aval(found.kv_a.outvars[0]).shape[-1] - lora
    accept(constraints.mla_prolog(hidden, q_lora, heads, (nope, rope, lora), cache.page_size, t.options.series))
    if isinstance(cache, Packed):
        require(found.format == INT8, f"{NAME} writes caches in int8 only beside matrices in int8")


def _aval(var: Any) -> Any:
    """The shape and type of a variable."""
    return var.aval


def _call(t: NpuTarget, found: Prolog, held: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The operator's results by the variables that they are."""
    x, slots, cache = (held[eqn.invars[place]] for eqn, place in ((found.q_a, 0), (found.write, 2), (found.write, 0)))
    matrices = [as_matrix(held[var], 1) for var in found.weights]
    gammas = [held[eqn.invars[1]].to(x.dtype) for eqn in (found.q_norm, found.kv_norm)]
    flat = x.reshape(-1, x.shape[-1])
    attributes: dict[str, Any] = {
        "cache_index": slots.reshape(-1).to(torch.int64),
        "rmsnorm_epsilon_cq": float(attributes_of(found.q_norm)["eps"]),
        "rmsnorm_epsilon_ckv": float(attributes_of(found.kv_norm)["eps"]),
        "query_norm_flag": True,
    }
    if found.format == INT8:
        flat, scale = quantised_rows(t, flat)
        names = ("dequant_scale_w_dq", "dequant_scale_w_uq_qr", "dequant_scale_w_dkv_kr")
        of = zip(names, (found.q_a, found.q_b, found.kv_a), strict=True)
        attributes |= {name: held[eqn.invars[2]].reshape(1, -1).to(torch.float32) for name, eqn in of}
        attributes |= {"dequant_scale_x": scale.unsqueeze(-1), "weight_quant_mode": _BOTH_INT8}
    if isinstance(cache, Packed):
        into = cache.rows.unsqueeze(2), torch.zeros((0,), dtype=x.dtype)
        attributes |= {"kv_cache_quant_mode": _BY_TILE, "ckvkr_repo_mode": _IN_ONE_ROW}
        attributes |= {"quant_scale_repo_mode": _IN_ONE_ROW, "tile_size": caches.TILE}
        attributes["k_nope_clip_alpha"] = torch.full((1,), 1.0, dtype=torch.float32)  # nothing is cut off
    else:
        into = cache.nope.unsqueeze(2), cache.rope.unsqueeze(2)
    cos, sin = rotations(held[found.q_rope.invars[1]], held[found.q_rope.invars[2]], found.factor, x.dtype)
    q_a, q_b, kv_a = matrices
    query, q_rope, _, q_latent, q_scale = t.npu(
        NAME, flat, q_a, q_b, held[found.absorb.invars[1]], kv_a, *gammas, sin, cos, *into, **attributes
    )
    lead = x.shape[:-1]
    q_latent = q_latent.reshape(*lead, -1)
    return {
        found.absorb.outvars[0]: query.reshape(*lead, *query.shape[1:]),
        found.q_rope.outvars[0]: q_rope.reshape(*lead, *q_rope.shape[1:]),
        found.write.outvars[0]: cache,
        found.q_norm.outvars[0]: RoundedRows(q_latent, q_scale, x.dtype) if found.format == INT8 else q_latent,
    }
