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
from backends.spmd.shard import divisible
from backends.spmd.stages import Stage
from model import graph
from model.cache import CacheRow, cache_rows
from model.config import ModelConfig
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
        """Of activations, caches and unquantised weights: "float32" or "bfloat16"."""
        ...

    def weight(self, weight: Weight, value: Any) -> Any:
        """One whole weight on the host, before it is split: as the checkpoint was asked for it (an array, or
        `Quantized` FP8 blocks) to what the graph is given. An unquantised one is then cast to `dtype`.

        Of a `Quantized(values, scale)`, values have the weight's shape, and each dim of scale is the weight's, 1, or
        the number of its 128-blocks (ceil). The scale is split along with the values; blocks that a cut would go
        through are repeated to full first, so that a kernel may see a full dim where there were blocks.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """Everything in one type; the checkpoint is to be loaded so, FP8 blocks dequantised."""

    dtype: str = "float32"

    def weight(self, weight: Weight, value: Any) -> Any:
        return value


class Cluster:
    """The weights of a server on its devices, and its programs.

    weights: whole, on the host, as `model.checkpoint.Checkpoint.load` returns them; emptied as they are placed.
    backend: exports and loads every program; the kernels are its own. stages: the devices of each stage.
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
    ):
        grid.check(cfg)
        self.cfg, self.grid, self.backend, self.stages, self.formats = cfg, grid, backend, stages, formats
        outer = weights["outer"]
        self.weights = [self._place(number, outer, weights["layers"]) for number in range(len(grid.stages))]
        outer.clear()
        self._programs: dict[Any, Executable] = {}
        self.compile_s = 0.0  # spent on exporting and loading programs so far

    def server(self, pages: int, page_size: int) -> Server:
        """Empty caches of `pages` pages a rank and layer."""
        return Server(self, pages, page_size)

    # --- weights

    def _place(self, number: int, outer: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
        cfg, span, stage = self.cfg, self.grid.stages[number], self.stages[number]
        if not stage.here:
            return {}
        placed = {"outer": {w.name: self._share(stage, w, outer[w.name]) for w in stage_outer(cfg, span)}, "layers": []}
        for layer in span:
            slots = self.grid.placement(cfg, layer)
            shares: dict[str, Any] = {}
            for weight in layer_weights(cfg, cfg.layers[layer]):
                chosen = slots[0] if slots and weight.expert_count else None
                shares[weight.name] = self._share(stage, weight, layers[layer].pop(weight.name), chosen)
            if slots:
                shares["expert_slots"] = stage.place(slots[1], 0, ())
            placed["layers"].append(shares)
        return placed

    def _share(self, stage: Stage, weight: Weight, value: Any, slots: np.ndarray | None = None) -> Any:
        value = self.formats.weight(weight, value)
        dim, axes = self.grid.layout.split(weight)
        value = divisible(value, weight, dim, self.grid.layout.parts(axes))
        dtype = np.dtype("float32") if weight.float32 else jax.numpy.dtype(self.formats.dtype)

        def place(leaf: np.ndarray, dtype: Any) -> Any:
            leaf = np.asarray(leaf) if slots is None else np.asarray(leaf)[slots]
            return stage.place(leaf.astype(dtype, copy=False), dim, axes)

        if isinstance(value, Quantized):
            return Quantized(*(place(leaf, leaf.dtype) for leaf in value))
        return place(value, dtype)

    # --- programs

    def body(self, number: int, mode: Mode) -> Callable[..., Any]:
        """One device's program of a stage: (weights, caches, batch[, carried]) -> ((carried, logits), caches)."""

        def body(weights: Any, caches: Any, batch: Batch, carried: Any = None) -> Any:
            out = graph.stage(
                self.cfg, self.grid.stages[number], weights, caches, batch, carried, mode, Parallel.of(self.grid.layout)
            )
            return (out.carried, out.logits), out.caches

        return body

    def program(self, number: int, mode: Mode, *args: Any) -> Executable:
        """The loaded program of a stage for the shapes of its arguments."""
        batch, (first, *_) = args[2], args[1]
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves((batch, first)))
        key = (self._same_as(number), mode, shapes)
        if key not in self._programs:
            begin = time.perf_counter()
            self._programs[key] = self.stages[number].compile(self.backend, self._program(number, mode, args))
            self.compile_s += time.perf_counter() - begin
        return self._programs[key]

    def _program(self, number: int, mode: Mode, args: tuple[Any, ...]) -> Program:
        """One device's, of arguments as the stage has placed them."""
        weights = jax.tree.leaves(args[0], is_leaf=_is_quantised)
        return Program(
            name=f"stage {number} of {len(self.stages)}, {mode.attention}",
            fn=self.body(number, mode),
            args=args,
            donate=(1,),  # the caches
            needs=frozenset({self.formats.dtype} | ({"fp8_weights"} if any(map(_is_quantised, weights)) else set())),
            optimise=sum(leaf.nbytes for leaf in jax.tree.leaves(args[0])) > _SMALL_BYTES,
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
        self.caches = [
            [self._empty(number, layer) for layer in span] for number, span in enumerate(self.cluster.grid.stages)
        ]

    def _empty(self, number: int, layer: int) -> dict[str, Any]:
        cfg, dp = self.cluster.cfg, self.cluster.grid.dp
        dtype = jax.numpy.dtype(self.cluster.formats.dtype)
        size = (dp * (self.pages + 1), self.page_size)
        return {
            row.name: self._stage(number).cache(np.zeros((*size, *row.shape), dtype), self._by_head(row.shape))
            for row in cache_rows(cfg, cfg.layers[layer])
        }

    def _stage(self, number: int) -> Stage:
        return self.cluster.stages[number]

    def _by_head(self, shape: tuple[int, ...]) -> bool:
        return bool(self.cluster.grid.layout.row_split(CacheRow("", shape))[1])

    def step(self, batch: Batch, mode: Mode = Mode()) -> np.ndarray:
        """Feeds a batch (numpy, [dp x rows, ..]) through all stages: logits float32 [dp x rows, (t,) vocab]."""
        carried: tuple[Any, ...] = ()
        passed = logits = None
        for number, stage in enumerate(self.cluster.stages):
            if number:
                carried = (self._stage(number - 1).hand_on(passed),)
            args = (self.cluster.weights[number], self.caches[number], stage.batch(batch), *map(stage.batch, carried))
            (passed, logits), self.caches[number] = self.cluster.program(number, mode, *args)(*args)
        return self._stage(-1).fetch(logits)

    # --- sequences that move between servers

    def read(self, rank: int, pages: Sequence[int]) -> Pages:
        """The contents of some pages of a rank."""
        at = rank * (self.pages + 1) + np.asarray(pages, np.int64)
        return [
            {name: self._stage(number).fetch(cache[name])[at] for name in sorted(cache)}  # alike in every process
            for number, layers in enumerate(self.caches)
            for cache in layers
        ]

    def write(self, rank: int, pages: Sequence[int], contents: Pages) -> None:
        """Puts what another server `read` into some pages of a rank. Both have the same page size."""
        at = rank * (self.pages + 1) + np.asarray(pages, np.int64)
        rest = iter(contents)
        for number, layers in enumerate(self.caches):
            stage = self._stage(number)
            for cache in layers:
                for name, rows in next(rest).items():
                    whole = stage.fetch(cache[name]).copy()
                    whole[at] = rows.astype(whole.dtype)
                    cache[name] = stage.cache(whole, self._by_head(whole.shape[2:]))
