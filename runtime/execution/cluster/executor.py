"""A server's devices, emulated or of several processes, as the scheduler's executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from backends.spmd.cluster import Pages
from foundation.errors import UsageError
from model.graph import Batch, Mode
from runtime.execution.batches import context, gear, padded, parts, unpadded, widest
from runtime.serving.executor import Abilities, ByRank, Logits

_LAUNCH_TOKENS = 2048  # tokens of a rank in one launch; a step with more is run in several, with the same result
_LEAST_CONTEXT = 128  # tokens; shorter contexts share one program
_SLACK = 8  # an existing program is used for up to this many times the work


class StepServer(Protocol):
    """What runs batches: `backends.spmd.cluster.Server`."""

    pages: int
    page_size: int

    def step(self, batch: Batch, mode: Mode) -> np.ndarray: ...

    def read(self, rank: int, pages: list[int]) -> Pages: ...

    def write(self, rank: int, pages: list[int], contents: Pages) -> None: ...

    def clear(self) -> None: ...


class ClusterExecutor:
    """Runs steps of `ranks` ranks on a server. A step with prompts and answers takes two launches."""

    name = "the emulation"

    def __init__(self, server: StepServer, ranks: int):
        self.server, self._ranks = server, ranks
        self._shapes: set[tuple[Mode, int, int, int]] = set()

    @property
    def can(self) -> Abilities:
        return Abilities(self.server.pages - 1, self.server.page_size, self._ranks, moves=True)

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        of_prompts = self._launch(Mode("expanded", "all" if every else "last"), prompts)
        return of_prompts, self._launch(Mode("absorbed", "all" if widest(answers) > 1 else "last"), answers)

    def draft(self, prompts: Any, answers: Any) -> tuple[Any, Any]:
        raise UsageError(f"{self.name} has no drafts")

    def read(self, rank: int, pages: Sequence[int]) -> Pages:
        return self.server.read(rank, list(pages))

    def write(self, rank: int, pages: Sequence[int], contents: Pages) -> None:
        self.server.write(rank, list(pages), contents)

    def reset(self) -> None:
        self.server.clear()

    def _launch(self, mode: Mode, rows: ByRank) -> Logits:
        found: Logits = [[] for _ in rows]
        for part in parts(rows, _LAUNCH_TOKENS):
            page, width = self.server.page_size, widest(part)
            shape = self._shape(
                mode,
                gear(max(map(len, part))),
                1 if width == 1 else gear(width, 16),
                gear(-(-context(part) // page), max(1, _LEAST_CONTEXT // page)),
            )
            logits = unpadded(part, self.server.step(padded(part, *shape), mode))
            for rank, each in zip(found, logits, strict=True):
                rank += each
        return found

    def _shape(self, mode: Mode, size: int, width: int, pages: int) -> tuple[int, int, int]:
        """The padded shape (rows a rank, tokens, pages) to run: one that is compiled already, if it is not far
        too large."""
        work = size * width * pages
        fitting = [
            (s * w * p, s, w, p)
            for m, s, w, p in self._shapes
            if m == mode and s >= size and (w >= width > 1 or w == width) and p >= pages and s * w * p <= _SLACK * work
        ]
        if fitting:
            return min(fitting)[1:]
        self._shapes.add((mode, size, width, pages))
        return size, width, pages
