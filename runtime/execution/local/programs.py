"""The compiled programs of a model on a backend, by shape.

Shapes are rounded up to a few gears (powers of two in sequences, tokens and pages), so that a run
compiles a handful of programs; of those of a long one as many are kept as the backend says. Every program
passes through an artifact: what is loaded is what was exported.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from backends import compiled
from backends.interface import Backend, Executable, Program
from backends.loaded import LoadedPrograms, StepMade
from foundation.errors import CapacityError, first_line
from model import choosing, graph
from model.cache import cache_rows, held_row
from model.config import LayerType, ModelConfig
from model.formats import CacheFormats
from model.graph import Batch, Mode
from model.weights import Quantized
from runtime.execution.local import feed
from runtime.serving.executor import TokenChoice


@dataclasses.dataclass(frozen=True)
class ProgramShape:
    """A program's static shape: sequences, tokens each, pages each, and the graph's mode. drawn: tokens need not be the
    likeliest. logprobs: how many of the likeliest it names beside each; None: it tells no log-probabilities."""

    batch: int
    tokens: int
    pages: int
    mode: Mode
    drawn: bool = False
    logprobs: int | None = None


class Programs:
    """Runs the graph's steps on a backend, keeping weights and caches there.

    `weights` are the backend's buffers in the graph's layout; caches have `pages` pages a layer, and two more: page 0,
    which is nobody's, and a spare one. apart: the device works while the host does, so that it pays to launch ahead and
    to leave logits there. rows: what caches are kept in, as they are computed by default.
    """

    def __init__(
        self,
        backend: Backend,
        cfg: ModelConfig,
        weights: dict[str, Any],
        pages: int,
        page_size: int,
        dtype: str,
        drafts: int = 0,
        rows: CacheFormats | None = None,
    ):
        self.backend, self.cfg, self.weights = backend, cfg, weights
        self.page_size, self.dtype, self.drafts = page_size, dtype, drafts
        self.pages = pages
        self.rows = rows or CacheFormats()
        self.clear()
        offered = backend.capabilities()
        self._loaded = LoadedPrograms(offered.programs)
        self.apart = offered.apart
        self.compile_s = 0.0  # spent on exporting and loading programs so far
        self._nothing: dict[int, Any] = {}

    @property
    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        return self._loaded.made

    @property
    def held(self) -> int:
        """How many are loaded."""
        return len(self._loaded)

    def clear(self) -> None:
        """Makes all caches anew, empty."""
        self.caches = [self._cache(kind) for kind in self.cfg.layers]
        self.mtp_cache = self._cache(self.cfg.mtp_type) if self.drafts else None

    def _cache(self, kind: LayerType) -> graph.LayerCache:
        held = {row.name: held_row(self.cfg, row, self.rows, self.dtype) for row in cache_rows(self.cfg, kind)}
        return {
            name: self.backend.zeros((self.pages + 2, self.page_size, *shape), dtype)
            for name, (shape, dtype) in held.items()
        }

    def launch(
        self,
        batch: Batch,
        mode: Mode,
        choices: Sequence[TokenChoice | None] | None = None,
        previous: Any = None,
        logprobs: int | None = None,
    ) -> StepMade:
        """Has the main stack run, and does not wait: the programs of a device run in their order. choices: of the rows,
        where not all are greedy. previous: ids of the launch before, where the batch has `feed.LAST`. logprobs: as of
        `ProgramShape`. Raises `CapacityError` where the device has no memory for it."""
        rows = len(batch.start)
        if previous is None:
            if rows not in self._nothing:
                self._nothing[rows] = self.backend.zeros((rows,), "int32")
            previous = self._nothing[rows]
        with self._room():
            fed = feed.packed(batch, choices)
            given = self.weights, self.caches, fed, previous
            drawn = choices is not None
            out, ids, told = self._run("step", self._step, batch, mode, *given, drawn=drawn, logprobs=logprobs)
            self.caches = out.caches
            return StepMade(out.logits, ids, out.hidden, told)

    def fetch(self, buffer: Any) -> np.ndarray:
        """What a launch made, on the host. Raises as `launch`."""
        with self._room():
            return self.backend.get(buffer)

    def step(self, batch: Batch, mode: Mode) -> tuple[np.ndarray, Any]:
        """Runs the main stack: (logits on the host, hidden states on the device). Raises as `launch`."""
        made = self.launch(batch, mode)
        return self.fetch(made.logits), made.hidden

    def draft(self, batch: Batch, hidden: Any) -> np.ndarray:
        """Runs the MTP layer over confirmed tokens and then on its own drafts: ids [b, drafts]. Raises as `launch`."""
        with self._room():
            out = self._run("draft", self._draft, batch, Mode(), self.weights, self.mtp_cache, batch, hidden)
            drafts, self.mtp_cache = out
            return self.backend.get(drafts)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if explained := self.backend.explain(error):
                raise explained from error
            if not self.backend.exhausted(error):
                raise
            raise CapacityError(f"{self.backend.name} has no memory left for a step ({first_line(error)})") from error

    def _run(
        self,
        name: str,
        fn: Any,
        batch: Batch,
        mode: Mode,
        *args: Any,
        drawn: bool = False,
        logprobs: int | None = None,
    ) -> Any:
        sequences, tokens = batch.tokens.shape
        shape = ProgramShape(sequences, tokens, batch.page_table.shape[1], mode, drawn, logprobs)

        def loaded() -> Executable:
            begin = time.perf_counter()
            quantised = any(isinstance(w, Quantized) for w in self._all_weights())
            program = Program(
                name=f"{name}[{shape.batch}x{shape.tokens}, {shape.pages} pages, {mode.attention}]",
                fn=partial(fn, shape),
                args=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args),
                donate=(1,),  # the caches
                needs=frozenset({self.dtype} | ({"fp8_weights"} if quantised else set())),
                orders=tuple(map(self.backend.order_of, jax.tree.leaves(args))),
            )
            source = "".join(inspect.getsource(of) for of in (*type(self).__mro__[:-1], feed))
            decides = f"{self.cfg!r} {shape!r} {self.drafts} {source}"
            executable = self.backend.load(compiled.exported(self.backend, program, decides))
            self.compile_s += time.perf_counter() - begin
            return executable

        return self._loaded.get((name, shape), loaded)(*args)

    def _all_weights(self) -> list[Any]:
        layers = self.weights["layers"] + self.weights["mtp"]
        return [w for layer in layers for w in layer.values()]

    def _step(
        self, shape: ProgramShape, weights: Any, caches: Any, fed: Any, previous: Any
    ) -> tuple[graph.StepOutput, Any, Any]:
        batch, draws = feed.unpacked(fed, previous, shape.tokens, shape.pages)
        out = graph.step(self.cfg, weights, caches, batch, shape.mode)
        return out, *choosing.chosen(out.logits, draws, shape.logprobs)

    def _draft(self, shape: ProgramShape, weights: Any, cache: Any, batch: Batch, hidden: Any) -> tuple[Any, Any]:
        return graph.draft(self.cfg, weights, cache, batch, hidden, self.drafts, shape.mode)
