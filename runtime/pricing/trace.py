"""From a model and a layout to per-device op lists, read off the traced graph. The one place of planning
and simulation that imports JAX.

Nothing is allocated: weights and caches are abstract, with one device's shapes. Every dimension is a monomial
in the step's sizes (sequences, tokens, pages) and in the layout's degrees (tp, dp and, of expert groups, ep, to the
power -1, 0 or 1). Layouts of one family (tp > 1 or not, dp > 1 or not, experts by tensor, by expert or both) have the
same program, so a family is traced at two to four points, its monomials are fitted, and the list of any layout of it is
a substitution. A list belongs to one regime: the attention mode, and whether the context exceeds the indexer's
selection.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import jax.numpy as jnp
from jax.extend import core as jex

from foundation.errors import UsageError
from model import abstract
from model.cache import CacheRow
from model.config import Gqa, LayerType, ModelConfig
from model.graph import Mode
from model.ops import attributes_of
from model.parallel import Parallel
from model.split import Layout
from model.weights import Weight, layer_weights
from runtime.deployment.manifest import Phase
from runtime.pricing.oplist import Dim, OpList, Sizes, TensorUse, TracedOp

PAGE_SIZE = 64
_POOL_PAGES = 1021  # a fixed pool, so that its size is no function of the step's
_STAGES = ("qkv", "indexer", "attention", "route", "dispatch", "experts", "combine")
_COLLECTIVES = {
    "psum": "psum",
    "psum_invariant": "psum",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model's programs on one device of a layout, in one regime."""

    cfg: ModelConfig
    layout: Layout
    phase: Phase
    sparse: bool
    layers: dict[LayerType, OpList]
    embed: OpList
    head: OpList
    mtp: OpList | None


def trace(cfg: ModelConfig, layout: Layout, phase: Phase, sparse: bool = False, mtp: bool = True) -> Traced:
    """The op lists of every layer type, of the ends and, with `mtp`, of the MTP step.

    sparse: the regime in which the context exceeds `index_topk` (only for models with an indexer).
    Raises `UsageError` where the model does not divide by the layout.
    """
    layout.check(cfg)
    sparse = sparse and cfg.indexer is not None

    def under(what: What, name: str) -> OpList:
        points = _degrees(cfg, layout, routed=_routed(cfg, what))
        return OpList(name, tuple(op.under(layout) for op in _family(cfg, what, phase, sparse, points)))

    layers = {kind: under(kind, kind.name) for kind in cfg.layer_counts if not kind.mtp}
    drafts = under("mtp", cfg.mtp_type.name) if mtp and cfg.mtp_layers else None
    return Traced(cfg, layout, phase, sparse, layers, under("embed", "embed"), under("head", "head"), drafts)


What = LayerType | Literal["embed", "head", "mtp"]
"""What is traced by itself."""


def _routed(cfg: ModelConfig, what: What) -> bool:
    """Whether a program has routed experts: only those see dp."""
    kind = cfg.mtp_type if what == "mtp" else what
    return isinstance(kind, LayerType) and any(weight.expert_count for weight in layer_weights(cfg, kind))


def _degrees(cfg: ModelConfig, layout: Layout, routed: bool) -> tuple[Layout, ...]:
    """Layouts of one family to trace at: a base, one with another tp and one with another dp where they are split.

    Where the model is too small for those, or its KV heads too few to be cut as often as tp, the layout alone: then its
    degrees stay numbers.
    """
    alone = (dataclasses.replace(layout, pp=1, dcp=1),)
    if isinstance(cfg.attention, Gqa) and max(layout.tp, 4 if layout.tp > 1 else 1) > cfg.attention.kv_heads:
        return alone
    by_expert = layout.by_expert and routed
    dp = min(layout.dp, 2) if routed else 1
    tp = min(layout.tp, 2)
    if layout.grouped and routed:
        first = (4, 1) if layout.dp == 1 else (1, 4) if layout.tp == 1 else (2, 2)
        wide = {(4, 1): [(8, 1)], (1, 4): [(1, 8)], (2, 2): [(4, 2), (2, 4)]}[first]
        points = (*(Layout(t, d, 2) for t, d in (first, *wide)), Layout(*wide[-1], ep=4))
    else:
        pairs = [(tp, dp), *([(4, dp)] if tp > 1 else []), *([(tp, 4)] if dp > 1 else [])]
        points = tuple(Layout(tp=t, dp=d, ep=t * d if by_expert else 1) for t, d in pairs)
    try:
        for point in points:
            point.check(cfg)
    except UsageError:
        return alone
    return points


@dataclasses.dataclass(frozen=True)
class _Symbol:
    """A dimension over all layouts of a family: dim * tp^i * dp^j * ep^k, k only in families with expert groups."""

    dim: Dim
    tp: int
    dp: int
    ep: int = 0

    def under(self, layout: Layout) -> Dim:
        if not (self.tp or self.dp or self.ep):
            return self.dim
        over, under = _scale((layout.tp, layout.dp, layout.ep), (self.tp, self.dp, self.ep))
        found, rest = divmod(self.dim.coefficient * over, under)
        assert not rest, f"{self} under {layout.name}"
        return dataclasses.replace(self.dim, coefficient=found)


@dataclasses.dataclass(frozen=True)
class _FamilyOp:
    """An op whose shapes are symbols; `op` has those of the base layout."""

    op: TracedOp
    shapes: tuple[tuple[_Symbol, ...], ...]

    def under(self, layout: Layout) -> TracedOp:
        tensors = [
            TensorUse(tuple([symbol.under(layout) for symbol in shape]), tensor.element_bytes, tensor.weight)
            for tensor, shape in zip(_tensors(self.op), self.shapes, strict=True)
        ]
        split = len(self.op.inputs)
        return dataclasses.replace(self.op, inputs=tuple(tensors[:split]), outputs=tuple(tensors[split:]))


@lru_cache(maxsize=512)
def _family(
    cfg: ModelConfig, what: What, phase: Phase, sparse: bool, layouts: tuple[Layout, ...]
) -> tuple[_FamilyOp, ...]:
    """The program of every layout of a family, from traces at the points of `_degrees`."""
    tracers = [_Tracer(cfg, layout, phase, sparse) for layout in layouts]
    base, far, other = tracers[0].points()
    rest = tracers[1:]
    if not rest or far.p == 2 * base.p:  # pages doubled could be mistaken for degrees doubled: apart from them
        at = [(tracers[0], base), (tracers[0], far), *((tracer, other) for tracer in rest)]
    else:
        at = [(tracers[0], base), (rest[0], far), *((tracer, other) for tracer in rest[1:])]
    rows = [list(_flatten(tracer.program(what)(sizes))) for tracer, sizes in at]
    points = tuple(_Point.of(sizes, tracer.layout) for tracer, sizes in at)
    name = what.name if isinstance(what, LayerType) else what
    if len({len(row) for row in rows}) != 1:
        raise AssertionError(f"{name}: the traced program changes with the step's size inside one regime")
    ops = []
    for eqns in zip(*rows, strict=True):
        columns = [_tensors(eqn) for eqn in eqns]
        if any(_form(eqn) != _form(eqns[0]) for eqn in eqns):
            raise AssertionError(f"{name}: {eqns[0].name} changes with the step's size or the layout's degrees")
        shapes = tuple(
            tuple(_fit(tuple(x.shape[axis] for x in column), points) for axis in range(len(column[0].shape)))
            for column in zip(*columns, strict=True)
        )
        ops.append(_FamilyOp(eqns[0], shapes))
    return tuple(ops)


def _form(op: TracedOp) -> tuple[Any, ...]:
    """What an op has beside its sizes."""
    tensors = [(len(x.shape), x.element_bytes, x.weight) for x in _tensors(op)]
    return op.name, op.stage, op.axes, dict(op.attributes), tensors


TraceAt = Callable[[Sizes], jex.ClosedJaxpr]


class _Tracer:
    def __init__(self, cfg: ModelConfig, layout: Layout, phase: Phase, sparse: bool):
        self.cfg, self.layout, self.phase, self.sparse = cfg, layout, phase, sparse
        self.axes, self.par = layout.axes, Parallel.of(layout)
        self.mode = Mode("expanded" if phase == "prefill" else "absorbed")

    def points(self) -> tuple[Sizes, Sizes, Sizes]:
        """A base, and two more whose sizes stand to it in ratios of which no product of powers is 1, nor a power of
        two (but for pages, where few are allowed), so that the exponents of a monomial can be read off."""
        topk_pages = -(-self.cfg.indexer.topk // PAGE_SIZE) if self.cfg.indexer else 0
        p, more = (topk_pages + 3, 2 * topk_pages + 5) if self.sparse else (1, 2)
        if not self.sparse and (topk_pages > 4 or not topk_pages):
            p, more = 3, 5
        elif not self.sparse and topk_pages == 1:
            more = 1  # two pages would be in the other regime
        t, t2 = (7, 13) if self.phase == "prefill" else (1, 5)
        return Sizes(3, t, p), Sizes(11, t2, more), Sizes(13, t, p)

    def program(self, what: What) -> TraceAt:
        if isinstance(what, LayerType):
            return self.layer(what)
        return self.mtp if what == "mtp" else self.end(what)

    def _shape(self, sizes: Sizes) -> abstract.StepShape:
        return abstract.StepShape(sizes.b, sizes.t, sizes.p, PAGE_SIZE, _POOL_PAGES)

    def _local(self, described: Weight | CacheRow) -> tuple[int, ...]:
        if isinstance(described, Weight):
            return self.layout.local_shape(described)
        return self.layout.local_row(described)

    def layer(self, kind: LayerType) -> TraceAt:
        cfg, local = self.cfg, self._local

        def at(sizes: Sizes) -> jex.ClosedJaxpr:
            shape = self._shape(sizes)
            weights = abstract.abstract_weights(cfg, kind, local=local)
            cache = abstract.abstract_cache(cfg, kind, shape.pages, shape.page_size, local=local)
            return abstract.trace_layer(
                cfg, kind, shape, mode=self.mode, weights=weights, cache=cache, par=self.par, axes=self.axes
            )

        return at

    def mtp(self, sizes: Sizes) -> jex.ClosedJaxpr:
        cfg, local, shape = self.cfg, self._local, self._shape(sizes)
        return abstract.trace_mtp(
            cfg,
            shape,
            mode=self.mode,
            outer=abstract.abstract_weights(cfg, None, local=local),
            weights=abstract.abstract_weights(cfg, cfg.mtp_type, local=local),
            cache=abstract.abstract_cache(cfg, cfg.mtp_type, shape.pages, shape.page_size, local=local),
            par=self.par,
            axes=self.axes,
        )

    def end(self, which: Literal["embed", "head"]) -> TraceAt:
        outer = abstract.abstract_weights(self.cfg, None, local=self._local)

        def at(sizes: Sizes) -> jex.ClosedJaxpr:
            return abstract.trace_ends(self.cfg, which, self._shape(sizes), outer=outer, par=self.par, axes=self.axes)

        return at


def _tensors(op: TracedOp) -> tuple[Any, ...]:
    return (*op.inputs, *op.outputs)


@dataclasses.dataclass(frozen=True)
class _Point:
    """degrees: tp, dp, and ep where there are expert groups (elsewhere it follows from the others, and is 1 here)."""

    sizes: Sizes
    degrees: tuple[int, int, int]

    @classmethod
    def of(cls, sizes: Sizes, layout: Layout) -> _Point:
        return cls(sizes, (layout.tp, layout.dp, layout.ep if layout.grouped else 1))


_SIZE_POWERS = [Dim(1, b, t, p) for b, t, p in itertools.product(range(4), repeat=3)]
_DEGREE_POWERS = [(tp, dp, ep) for ep, tp, dp in itertools.product((0, -1, 1), repeat=3)]


def _scale(degrees: tuple[int, int, int], powers: tuple[int, int, int]) -> tuple[int, int]:
    """The product of degrees to their powers, as a fraction."""
    pairs = list(zip(degrees, powers, strict=True))
    return math.prod(d**p for d, p in pairs if p > 0), math.prod(d**-p for d, p in pairs if p < 0)


@lru_cache(maxsize=65536)
def _fit(values: tuple[int, ...], points: tuple[_Point, ...]) -> _Symbol:
    """The one monomial through a dimension's values at all points."""
    base = points[0]
    if len(set(values)) == 1:
        return _Symbol(Dim(values[0]), 0, 0)
    for unit in _SIZE_POWERS:
        at = [unit.at(point.sizes) for point in points]
        for powers in _DEGREE_POWERS:
            if any(power and degree == 1 for power, degree in zip(powers, base.degrees, strict=True)):
                continue
            scales = [_scale(point.degrees, powers) for point in points]
            coefficient, rest = divmod(values[0] * scales[0][1], at[0] * scales[0][0])
            if not rest and all(
                value * under == coefficient * size * over
                for value, size, (over, under) in zip(values, at, scales, strict=True)
            ):
                return _Symbol(dataclasses.replace(unit, coefficient=coefficient), *powers)
    raise AssertionError(f"a dimension is no monomial of sizes and degrees: {values} at {points}")


def _flatten(closed: jex.ClosedJaxpr) -> Iterator[TracedOp]:
    """The equations of a trace in order, `jit` bodies entered, with concrete shapes in place of `Dim`s."""
    names = dict(zip(closed.jaxpr.invars, closed.jaxpr.debug_info.arg_names, strict=True))
    weights = {var: name[3:-2] for var, name in names.items() if name.startswith("w[")}
    weights |= {var: name[7:-2] for var, name in names.items() if name.startswith("outer[")}
    yield from _walk(closed.jaxpr, weights, "")


def _walk(jaxpr: Any, weights: dict[Any, str], stage: str) -> Iterator[TracedOp]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        here = next((s for s in _STAGES if s in str(eqn.source_info.name_stack).split("/")), stage)
        if name in ("jit", "pjit"):
            body = eqn.params["jaxpr"].jaxpr
            inner = {
                var: weights[outer]
                for var, outer in zip(body.invars, eqn.invars, strict=True)
                if not isinstance(outer, jex.Literal) and outer in weights
            }
            yield from _walk(body, inner, here)
            continue
        axes: tuple[str, ...] = ()
        if name in _COLLECTIVES:
            found = eqn.params.get("axes", eqn.params.get("axis_name"))
            axes = tuple(found) if isinstance(found, tuple | list) else (found,)
            name = _COLLECTIVES[name]
        attributes = attributes_of(eqn) if name == "composite" else {}
        yield TracedOp(
            name=eqn.params["name"] if name == "composite" else name,
            stage=here,
            inputs=tuple(_tensor(v, weights) for v in eqn.invars),
            outputs=tuple(_tensor(v, weights) for v in eqn.outvars),
            attributes=attributes,
            axes=axes,
        )


def _tensor(var: Any, weights: dict[Any, str]) -> TensorUse:
    aval = var.aval
    weight = None if isinstance(var, jex.Literal) else weights.get(var)
    return TensorUse(tuple(aval.shape), jnp.dtype(aval.dtype).itemsize if hasattr(aval, "dtype") else 0, weight)
