"""What a model under a layout is cut into: a chain of graphs for each layer type and end, traced without weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from backends.ascend import constraints
from backends.toolchains.cut import Exchange, cut
from backends.toolchains.walker import Graph
from model import abstract, graph, ops
from model.cache import CacheRow, cache_rows
from model.config import LayerType, ModelConfig
from model.formats import MatrixFormat, Scheme
from model.parallel import Parallel
from model.split import Grid, scale_shape
from model.weights import Quantized, Weight, layer_weights, outer_weights
from runtime.deployment.manifest import OUT, Gear, Phase, Value, WeightRef

Chain = list[Graph | Exchange]
_ARGUMENT = re.compile(r"^(\w+)(?:\['(\w+)'\])?(?:\.(\w+))?$")
_BATCH = ("tokens", "start", "length", "page_table")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is exported: a model on a grid of devices, in a number format, with caches of `pool_pages` pages.

    dtype: of activations, caches and whatever the scheme leaves wide. lowerings: ops that the number format replaces
    (`backends.toolchains.narrow`). mtp: with the MTP layer, where the model has one. exchange: experts on other devices
    are reached by collectives between graphs, or by Ascend's operators for it where those take a step.
    """

    cfg: ModelConfig
    grid: Grid
    dtype: str
    scheme: Scheme
    page_size: int
    pool_pages: int
    mtp: bool = True
    lowerings: ops.Lowerings = dataclasses.field(default_factory=dict)
    exchange: Literal["collectives", "operators"] = "collectives"

    @property
    def axes(self) -> dict[str, int]:
        """Mesh axes of more than one device."""
        return self.grid.layout.axes

    @property
    def unit_types(self) -> dict[str, LayerType]:
        """The layer types, MTP's included, by the name of their unit."""
        return {kind.name: kind for kind in self.cfg.layer_counts if self.mtp or not kind.mtp}

    @property
    def exchanges(self) -> bool:
        """Whether tokens are sent to experts on other devices, each to those of its own alone."""
        par = Parallel.of(self.grid.layout)
        return self.cfg.moe is not None and bool(par.dp) and (par.moe, par.exchange) == ("expert", "all_to_all")

    def sent(self, gear: Gear) -> constraints.Sent:
        """What a device gives the operators of an exchange, where there is one."""
        moe, layout = self.cfg.moe, self.grid.layout
        assert moe is not None
        moe_types = [kind for kind in self.unit_types.values() if kind.ffn != "dense"]
        (matrix,) = (w for w in layer_weights(self.cfg, moe_types[0]) if w.name == "experts_gate_up")
        return constraints.Sent(
            tokens=-(-gear.sequences * gear.tokens // layout.tp),
            width=self.cfg.hidden_size,
            choices=moe.top_k,
            experts=self.local(matrix)[0],
            ranks=layout.dp * layout.tp,
        )

    def not_sent(self, phase: Phase, gear: Gear) -> str | None:
        """Why an exchange is made of collectives between graphs; None where it is operators', or there is none."""
        if not self.exchanges or self.exchange == "collectives":
            return None
        if phase == "prefill":
            return "chunks go by collectives: the operators' buffers hold all that every device could send"
        return constraints.moe_distribute(self.sent(gear))

    def sends(self, phase: Phase, gear: Gear) -> bool:
        """Whether an exchange is operators'."""
        return self.exchanges and self.exchange == "operators" and self.not_sent(phase, gear) is None

    def parallel(self, phase: Phase, gear: Gear) -> Parallel:
        """The collectives of a step's program."""
        found = Parallel.of(self.grid.layout)
        return dataclasses.replace(found, exchange="operators") if self.sends(phase, gear) else found

    def table_width(self, kind: LayerType) -> int:
        """Columns of the table of expert slots that layers of a type are given; 0 where slot e is expert e."""
        layers = [None] if kind.mtp else [i for i, other in enumerate(self.cfg.layers) if other == kind]
        placed = [self.grid.placement(self.cfg, layer) for layer in layers]
        return max((each[1].shape[1] for each in placed if each is not None), default=0)

    def local(self, described: Weight | CacheRow) -> tuple[int, ...]:
        """One device's share of a weight or of a cache's row."""
        if isinstance(described, Weight):
            return self.grid.local_shape(described)
        return self.grid.layout.local_row(described)

    def held(self, weight: Weight, kind: LayerType | None) -> MatrixFormat:
        """What a device holds a weight of a layer type, or with None of the ends, in."""
        return self.scheme.held(weight, mtp=kind is not None and kind.mtp)

    def local_scale(self, weight: Weight, fmt: MatrixFormat) -> tuple[int, ...]:
        """One device's scales of a weight, with those repeated that belong to blocks a cut goes through."""
        dim, axes = self.grid.layout.split(weight)
        return scale_shape(weight, fmt, self.local(weight), dim, self.grid.layout.parts(axes))

    def weights(self, kind: LayerType | None) -> dict[str, Any]:
        """Abstract weights of a layer type, or with None the outer ones."""
        found = abstract.abstract_weights(self.cfg, kind, self.dtype, local=self.local)
        for weight in outer_weights(self.cfg) if kind is None else layer_weights(self.cfg, kind):
            if (fmt := self.held(weight, kind)).narrow:
                found[weight.name] = Quantized(
                    jax.ShapeDtypeStruct(self.local(weight), fmt.values),
                    jax.ShapeDtypeStruct(self.local_scale(weight, fmt), fmt.scale),
                )
        if kind is not None and self.cfg.moe and (width := self.table_width(kind)):
            found["expert_slots"] = jax.ShapeDtypeStruct((self.cfg.moe.experts, width), jnp.int32)
        return found

    def cache(self, kind: LayerType) -> graph.LayerCache:
        return abstract.abstract_cache(self.cfg, kind, self.pool_pages, self.page_size, self.dtype, self.local)

    def shape(self, gear: Gear) -> abstract.StepShape:
        return abstract.StepShape(gear.sequences, gear.tokens, gear.context_pages, self.page_size, self.pool_pages)


def caches(what: Cut) -> dict[str, tuple[Value, ...]]:
    """The caches of each unit, as its graphs name them."""
    return {
        name: tuple(
            Value(f"cache.{row.name}", (what.pool_pages, what.page_size, *what.local(row)), what.dtype)
            for row in cache_rows(what.cfg, kind)
        )
        for name, kind in what.unit_types.items()
    }


def weight_refs(what: Cut, kind: LayerType | None) -> tuple[WeightRef, ...]:
    """How the weights of a layer type, or with None of the ends, are made of a checkpoint's tensors."""
    abstracts = what.weights(kind)
    prefix = "" if kind is None else "model.layers.{layer}."
    owner = "outer" if kind is None else "w"
    refs = []
    for weight in outer_weights(what.cfg) if kind is None else layer_weights(what.cfg, kind):
        dim, axes = what.grid.layout.split(weight)
        fmt = what.held(weight, kind)
        for suffix, leaf, whole in _leaves(weight, fmt, abstracts[weight.name]):
            if suffix == ".scale" and weight.axes[dim] != "expert" and whole[dim] > 1:  # repeated where blocks are cut
                whole = (*whole[:dim], leaf.shape[dim] * what.grid.layout.parts(axes), *whole[dim + 1 :])
            serves_all = suffix == ".scale" and whole[dim] == 1
            split = tuple(axes if d == dim and not serves_all else () for d in range(len(whole)))
            spelt = "_scale_inv" if suffix == ".scale" and fmt.shared == "block" else ""
            refs.append(
                WeightRef(
                    name=f"{owner}.{weight.name}{suffix}",
                    shape=tuple(leaf.shape),
                    dtype=np.dtype(leaf.dtype).name,
                    whole=whole,
                    split=split,
                    sources=tuple(prefix + s + spelt for s in weight.sources),
                    layout=weight.arrangement.name,
                    format=fmt.name if suffix else "",
                )
            )
    if "expert_slots" in abstracts:  # made of the placement, not of the checkpoint
        table = tuple(abstracts["expert_slots"].shape)
        refs.append(WeightRef("w.expert_slots", table, "int32", table, ((), ()), (), "SLOTS"))
    return tuple(refs)


def _leaves(weight: Weight, fmt: MatrixFormat, value: Any) -> list[tuple[str, Any, tuple[int, ...]]]:
    if isinstance(value, Quantized):
        return [
            (".values", value.values, weight.shape),
            (".scale", value.scale, scale_shape(weight, fmt, weight.shape)),
        ]
    return [("", value, weight.shape)]


def units(what: Cut, phase: Phase, gear: Gear) -> dict[str, Chain]:
    """Every unit's chain at a gear, by name: "view", "embed", the layer types, "head", and MTP's where there is one."""
    cfg, shape, par, axes = what.cfg, what.shape(gear), what.parallel(phase, gear), what.axes
    mode = graph.Mode("expanded" if phase == "prefill" else "absorbed")
    out: dict[str, Chain] = {"view": _view(what, shape), "embed": _end(what, shape, "embed")}
    for name, kind in what.unit_types.items():
        weights, cache = what.weights(kind), what.cache(kind)
        if kind.mtp:
            closed = abstract.trace_mtp(
                cfg, shape, what.dtype, mode, what.weights(None), weights, cache, par=par, axes=axes
            )
            outputs = ["logits", "hidden", *(f"cache.{key}" for key in sorted(cache))]
        else:
            closed = abstract.trace_layer(cfg, kind, shape, what.dtype, mode, weights, cache, par=par, axes=axes)
            outputs = ["x", *(f"cache.{key}" for key in sorted(cache)), "selected"]
        out[name] = _chain(what, name, closed, outputs[: len(closed.jaxpr.outvars)])
    out["head"] = _end(what, shape, "head")
    return out


def _chain(what: Cut, name: str, closed: ClosedJaxpr, outputs: Sequence[str]) -> Chain:
    inputs = [_name(argument) for argument in closed.jaxpr.debug_info.arg_names]
    if what.lowerings:
        replaced = ops.substitute(jaxpr_as_fun(closed), what.lowerings)
        closed = _trace(replaced, what, *closed.in_avals)
    aliases = {output + OUT: output for output in outputs if output.startswith("cache.")}
    return cut(name, closed, inputs, [output + OUT for output in outputs], aliases)


def _name(argument: str) -> str:
    """ "w['q_a'].values" -> "w.q_a.values"; "view.positions" and "batch.tokens" lose the owner."""
    found = _ARGUMENT.match(argument)
    assert found, argument
    owner, key, field = found.groups()
    if owner in ("view", "batch"):
        return field
    return ".".join(part for part in (owner, key, field) if part)


def _trace(fn: Callable[..., Any], what: Cut, *args: Any) -> ClosedJaxpr:
    return jax.make_jaxpr(fn, axis_env=list(what.axes.items()) or None)(*args)


def _view(what: Cut, shape: abstract.StepShape) -> Chain:
    closed = _trace(lambda batch: graph.view_of(batch, what.page_size)[:2], what, abstract.abstract_batch(shape))
    return cut("view", closed, _BATCH, ["positions" + OUT, "slots" + OUT])


def _end(what: Cut, shape: abstract.StepShape, end: Literal["embed", "head"]) -> Chain:
    cfg, par, outer = what.cfg, Parallel.of(what.grid.layout), what.weights(None)
    batch = abstract.abstract_batch(shape)

    def embed(outer: Any, tokens: Any) -> Any:
        return par.embed(tokens, outer["embed"])

    def head(outer: Any, x: Any, length: Any) -> Any:
        hidden = ops.rms_norm(x, outer["final_norm"], eps=cfg.norm_eps)
        return graph.head(cfg, outer, graph.last_token(hidden, length)[:, 0, :], par), hidden

    if end == "embed":
        return _chain(what, "embed", _trace(embed, what, outer, batch.tokens), ["x"])
    x = jax.ShapeDtypeStruct((shape.sequences, shape.tokens, cfg.hidden_size), what.dtype)
    return _chain(what, "head", _trace(head, what, outer, x, batch.length), ["logits", "hidden"])
