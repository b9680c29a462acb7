"""A server's devices at work: weights split over them once, programs compiled by shape, caches by server.

`Cluster` is what equal servers (replicas) share: one device's program of each stage, which the stage has a backend
compile for all its devices. A `Server` has its own caches. A step feeds all ranks at once: `Batch` rows are `dp` equal
blocks, one a rank, and page numbers count within the rank, whose page 0 is nobody's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from backends.interface import Backend, Executable, Program
from backends.loaded import LoadedPrograms, StepMade
from backends.spmd.shard import divisible
from backends.spmd.stages import Stage
from model import choosing, graph
from model.cache import CacheRow, cache_rows, held_row
from model.choosing import Draws
from model.config import LayerType, ModelConfig
from model.formats import CacheFormats
from model.graph import Batch, Mode
from model.parallel import Parallel
from model.split import Grid
from model.weights import Quantized, Weight, layer_weights, stage_outer

Pages = list[dict[str, np.ndarray]]
"""A sequence's pages, by layer and cache name: [pages, page_size, ..]."""
_SMALL_BYTES = 256e6
"""Weights of a stage up to here keep a program busy for milliseconds: optimising it takes longer than that saves."""


class Numerics(Protocol):
    """What a server's devices hold weights and activations in."""

    @property
    def dtype(self) -> str:
        """Of activations, unquantised weights, and caches that nothing else is said of: "float32" or "bfloat16"."""
        ...

    def weight(self, weight: Weight, value: Any, mtp: bool = False) -> Any:
        """One whole weight on the host, of the MTP layer or not, before it is split: as the checkpoint was asked for it
        (an array, or `Quantized` FP8 blocks) to what the graph is given. An unquantised one is then cast to `dtype`.

        Of a `Quantized(values, scale)`, values have the weight's shape, and each dim of scale is the weight's, 1, or
        the number of its 128-blocks (ceil). The scale is split along with the values; blocks that a cut would go
        through are repeated to full first, so that a kernel may see a full dim where there were blocks.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """Everything as the checkpoint was loaded: in one type, but for matrices that were left in FP8 blocks."""

    dtype: str = "float32"

    def weight(self, weight: Weight, value: Any, mtp: bool = False) -> Any:
        return value


class Cluster:
    """The weights of a server on its devices, and its programs.

    weights: whole, on the host, as `model.checkpoint.Checkpoint.load` returns them; emptied as they are placed.
    backend: exports and loads every program; the kernels are its own. stages: the devices of each stage. drafts: the
    tokens that the MTP layer, on the last of them, guesses a step. rows: what caches are kept in, as they are computed
    by default.
    Raises `Unsupported` where the grid does not fit the model, or the backend lacks what a program needs.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        grid: Grid,
        weights: Mapping[str, Any],
        backend: Backend,
        stages: Sequence[Stage],
        formats: Numerics,
        drafts: int = 0,
        rows: CacheFormats = CacheFormats(),
    ):
        grid.check(cfg)
        self.cfg, self.grid, self.backend, self.stages, self.formats = cfg, grid, backend, stages, formats
        self.drafts, self.rows = drafts, rows
        outer = weights["outer"]
        self.weights = [self._place(number, outer, weights["layers"]) for number in range(len(grid.stages))]
        self.mtp_weights = self._place_mtp(weights["mtp"][0]) if drafts else {}
        outer.clear()
        self._programs = LoadedPrograms(backend.capabilities().programs * len(stages))
        self.compile_s = 0.0  # spent on exporting and loading programs so far

    def server(self, pages: int, page_size: int) -> Server:
        """Empty caches of `pages` pages a rank and layer."""
        return Server(self, pages, page_size)

    # --- weights

    def _place(self, number: int, outer: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
        cfg, span, stage = self.cfg, self.grid.stages[number], self.stages[number]
        if not stage.here:
            return {}
        needed = stage_outer(cfg, span, self.drafts > 0)
        return {
            "outer": {weight.name: self._share(stage, weight, outer[weight.name]) for weight in needed},
            "layers": [self._place_layer(stage, layer, layers[layer]) for layer in span],
        }

    def _place_mtp(self, layer: dict[str, Any]) -> dict[str, Any]:
        stage = self.stages[-1]
        if not stage.here:
            return {}
        return {"outer": self.weights[-1]["outer"], "mtp": [self._place_layer(stage, None, layer)]}

    def _place_layer(self, stage: Stage, layer: int | None, whole: dict[str, Any]) -> dict[str, Any]:
        """The shares of a layer; None: of the MTP layer."""
        cfg, slots, shares = self.cfg, self.grid.placement(self.cfg, layer), {}
        for weight in layer_weights(cfg, cfg.mtp_type if layer is None else cfg.layers[layer]):
            chosen = slots[0] if slots and weight.expert_count else None
            shares[weight.name] = self._share(stage, weight, whole.pop(weight.name), chosen, layer is None)
        if slots:
            shares["expert_slots"] = stage.place(slots[1], 0, ())
        return shares

    def _share(
        self, stage: Stage, weight: Weight, value: Any, slots: np.ndarray | None = None, mtp: bool = False
    ) -> Any:
        value = self.formats.weight(weight, value, mtp)
        dim, axes = self.grid.layout.split(weight)
        value = divisible(value, weight, dim, self.grid.layout.parts(axes))
        dtype = np.dtype("float32") if weight.float32 else jax.numpy.dtype(self.formats.dtype)
        order = self.backend.capabilities().order(weight)

        def place(leaf: np.ndarray, dtype: Any) -> Any:
            leaf = np.asarray(leaf) if slots is None else np.asarray(leaf)[slots]
            return stage.place(leaf.astype(dtype, copy=False), dim, axes, order)

        if isinstance(value, Quantized):
            return Quantized(*(place(leaf, leaf.dtype) for leaf in value))
        return place(value, dtype)

    # --- programs

    def body(self, number: int, mode: Mode, drawn: bool = False, logprobs: int | None = None) -> Callable[..., Any]:
        """One device's program of a stage: (weights, caches, batch[, carried][, draws]) -> ((carried, logits, ids,
        hidden, told), caches). carried: what the stage before put out. draws: how the last one's ids are chosen, where
        tokens are drawn. hidden: what drafts are made from, where there are any. logprobs, told: as of
        `choosing.chosen`."""

        def body(weights: Any, caches: Any, batch: Batch, *rest: Any) -> Any:
            carried, draws = rest[0] if number else None, rest[-1] if drawn else None
            out = graph.stage(
                self.cfg, self.grid.stages[number], weights, caches, batch, carried, mode, Parallel.of(self.grid.layout)
            )
            ids, told = (None, None) if out.logits is None else choosing.chosen(out.logits, draws, logprobs)
            return (out.carried, out.logits, ids, out.hidden if self.drafts else None, told), out.caches

        return body

    def draft_body(self) -> Callable[..., Any]:
        """One device's program of the MTP layer: (weights, caches, batch, hidden) -> (ids [rows, drafts], caches)."""

        def body(weights: Any, caches: Any, batch: Batch, hidden: Any) -> Any:
            par = Parallel.of(self.grid.layout)
            drafts, cache = graph.draft(self.cfg, weights, caches[0], batch, hidden, self.drafts, Mode(), par)
            return drafts, [cache]

        return body

    def program(
        self, number: int, mode: Mode, *args: Any, drawn: bool = False, logprobs: int | None = None
    ) -> Executable:
        """The loaded program of a stage for the shapes of its arguments."""
        name = f"stage {number} of {len(self.stages)}, {mode.attention}"
        which = self._same_as(number), mode, drawn, logprobs
        return self._compiled(which, number, name, self.body(number, mode, drawn, logprobs), args)

    def draft_program(self, *args: Any) -> Executable:
        """The loaded program of the MTP layer for the shapes of its arguments."""
        return self._compiled("drafts", len(self.stages) - 1, "drafts", self.draft_body(), args)

    def _compiled(self, which: Any, number: int, name: str, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        batch, (first, *_) = args[2], args[1]
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves((batch, first)))

        def loaded() -> Executable:
            begin = time.perf_counter()
            made = self.stages[number].compile(self.backend, self._program(name, body, args))
            self.compile_s += time.perf_counter() - begin
            return made

        return self._programs.get((which, shapes), loaded)

    def _program(self, name: str, body: Callable[..., Any], args: tuple[Any, ...]) -> Program:
        """One device's, of arguments as the stage has placed them."""
        weights = jax.tree.leaves(args[0], is_leaf=_is_quantised)
        return Program(
            name=name,
            fn=body,
            args=args,
            donate=(1,),  # the caches
            needs=frozenset({self.formats.dtype} | ({"fp8_weights"} if any(map(_is_quantised, weights)) else set())),
            optimise=sum(leaf.nbytes for leaf in jax.tree.leaves(args[0])) > _SMALL_BYTES,
            orders=tuple(map(self.backend.order_of, jax.tree.leaves(args))),
        )

    def _same_as(self, number: int) -> Any:
        """What makes two stages' programs one: their layers' types and slots, where they run on the same devices."""
        if self.stages[number].alone:
            return number
        span, last = self.grid.stages[number], self.cfg.num_layers
        tables = tuple(w["expert_slots"].array.shape for w in self.weights[number]["layers"] if "expert_slots" in w)
        following = self.cfg.layers[span.stop].indexer if span.stop < last else None
        return self.cfg.layers[span.start : span.stop], span.start == 0, following, tables


def _is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


class Server:
    """One server: its caches, and steps that read and write them."""

    def __init__(self, cluster: Cluster, pages: int, page_size: int):
        self.cluster, self.pages, self.page_size = cluster, pages, page_size
        self.clear()

    def clear(self) -> None:
        """Makes all caches anew, empty."""
        cfg = self.cluster.cfg
        self.caches = [
            [self._empty(number, cfg.layers[layer]) for layer in span]
            for number, span in enumerate(self.cluster.grid.stages)
        ]
        self.mtp_caches = [self._empty(-1, cfg.mtp_type)] if self.cluster.drafts else []

    def _empty(self, number: int, kind: LayerType) -> dict[str, Any]:
        cluster = self.cluster
        size = (cluster.grid.dp * (self.pages + 1), self.page_size)
        held = {
            row.name: held_row(cluster.cfg, row, cluster.rows, cluster.formats.dtype)
            for row in cache_rows(cluster.cfg, kind)
        }
        return {
            name: self._stage(number).cache(np.zeros((*size, *shape), jax.numpy.dtype(dtype)), self._by_head(shape))
            for name, (shape, dtype) in held.items()
        }

    def _stage(self, number: int) -> Stage:
        return self.cluster.stages[number]

    def _by_head(self, shape: tuple[int, ...]) -> bool:
        return bool(self.cluster.grid.layout.row_split(CacheRow("", shape))[1])

    @property
    def far(self) -> bool:
        """As of its last stage."""
        return self._stage(-1).far

    def launch(
        self, batch: Batch, mode: Mode = Mode(), draws: Draws | None = None, logprobs: int | None = None
    ) -> StepMade:
        """Feeds a batch (numpy, [dp x rows, ..]) through all stages; what it makes is the last one's. draws, logprobs:
        as of `choosing.chosen`."""
        passed = logits = ids = hidden = told = None
        last = len(self.cluster.stages) - 1
        for number, stage in enumerate(self.cluster.stages):
            drawn, best = (draws is not None, logprobs) if number == last else (False, None)
            carried = [self._stage(number - 1).hand_on(passed)] if number else []
            rows = [batch, *carried, *([draws] if drawn else [])]
            args = (self.cluster.weights[number], self.caches[number], *map(stage.batch, rows))
            made, self.caches[number] = self.cluster.program(number, mode, *args, drawn=drawn, logprobs=best)(*args)
            # nothing, where the stage is another process's
            passed, logits, ids, hidden, told = made or (None,) * 5
        return StepMade(logits, ids, hidden, told)

    def fetch(self, made: Any) -> np.ndarray:
        """Logits or ids of a launch, on the host: of every process, which all have to ask."""
        return self._stage(-1).fetch(made)

    def step(self, batch: Batch, mode: Mode = Mode()) -> tuple[np.ndarray, Any]:
        """Feeds a batch through all stages: its logits on the host, and what `draft` makes drafts from."""
        made = self.launch(batch, mode)
        return self.fetch(made.logits), made.hidden

    def draft(self, batch: Batch, hidden: Any) -> np.ndarray:
        """Guesses what follows: ids [dp x rows, drafts]. hidden: of a `step`; the batch is that step's, with the tokens
        that follow each of its own."""
        stage = self._stage(-1)
        args = (self.cluster.mtp_weights, self.mtp_caches, stage.batch(batch), hidden)
        drafts, self.mtp_caches = self.cluster.draft_program(*args)(*args)
        return stage.fetch(drafts)

    # --- sequences that move between servers

    def read(self, rank: int, pages: Sequence[int]) -> Pages:
        """The contents of some pages of a rank."""
        at = rank * (self.pages + 1) + np.asarray(pages, np.int64)
        return [
            {name: stage.fetch(cache[name])[at] for name in sorted(cache)}  # alike in every process
            for stage, layers in self._kept()
            for cache in layers
        ]

    def _kept(self) -> list[tuple[Stage, list[dict[str, Any]]]]:
        return list(zip((*self.cluster.stages, self._stage(-1)), (*self.caches, self.mtp_caches), strict=True))

    def write(self, rank: int, pages: Sequence[int], contents: Pages) -> None:
        """Puts what another server `read` into some pages of a rank. Both have the same page size."""
        at = rank * (self.pages + 1) + np.asarray(pages, np.int64)
        rest = iter(contents)
        for stage, layers in self._kept():
            for cache in layers:
                for name, rows in next(rest).items():
                    whole = stage.fetch(cache[name]).copy()
                    whole[at] = rows.astype(whole.dtype)
                    cache[name] = stage.cache(whole, self._by_head(whole.shape[2:]))
