"""A server's devices, emulated or of several processes, as the scheduler's executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from backends.loaded import StepMade
from backends.spmd.cluster import Pages
from model.choosing import Draws
from model.graph import Batch, Mode
from runtime.execution.batches import (
    Following,
    Kind,
    Launched,
    asks,
    context,
    drafted,
    draws_of,
    gear,
    named,
    padded,
    parts,
    unpadded,
    widest,
)
from runtime.serving.executor import Abilities, ByRank, ChosenIds, Logits, TokenChoice
from runtime.serving.service import MOST_LOGPROBS

_LAUNCH_TOKENS = 2048  # tokens of a rank in one launch; a step with more is run in several, with the same result
_LEAST_CONTEXT = 128  # tokens; shorter contexts share one program
_SLACK = 8  # an existing program is used for up to this many times the work


class StepServer(Protocol):
    """What runs batches: `backends.spmd.cluster.Server`."""

    pages: int
    page_size: int

    @property
    def far(self) -> bool: ...

    def launch(self, batch: Batch, mode: Mode, draws: Draws | None, logprobs: int | None) -> StepMade: ...

    def fetch(self, made: Any) -> np.ndarray: ...

    def draft(self, batch: Batch, hidden: Any) -> np.ndarray: ...

    def read(self, rank: int, pages: list[int]) -> Pages: ...

    def write(self, rank: int, pages: list[int], contents: Pages) -> None: ...

    def clear(self) -> None: ...


class ClusterExecutor:
    """Runs steps of `ranks` ranks on a server. A step with prompts and answers takes two launches. drafts: that the
    server guesses a step."""

    name = "the emulation"

    def __init__(self, server: StepServer, ranks: int, drafts: int = 0):
        self.server, self._ranks, self._drafts = server, ranks, drafts
        self._shapes: set[tuple[Mode, int, int, int]] = set()
        self._launched: list[Launched] = []

    @property
    def can(self) -> Abilities:
        return Abilities(
            self.server.pages - 1,
            self.server.page_size,
            self._ranks,
            drafts=self._drafts,
            beyond=max(0, self._drafts - 1),
            moves=True,
            chooses="drawn" if self.server.far else "greedy",
            logprobs=MOST_LOGPROBS if self.server.far else None,
        )

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        self._launched = []
        of_prompts = self._launch("prompts", Mode("expanded", "all" if every else "last"), prompts)
        # with drafts always as many tokens: answers that have none left to check share the others' program
        every_answer = self._drafts > 0 or widest(answers) > 1
        return of_prompts, self._launch("answers", Mode("absorbed", "all" if every_answer else "last"), answers)

    def draft(self, prompts: Following, answers: Following) -> tuple[Any, Any]:
        return drafted(self._launched, prompts, answers, self.server.draft)

    def read(self, rank: int, pages: Sequence[int]) -> Pages:
        return self.server.read(rank, list(pages))

    def write(self, rank: int, pages: Sequence[int], contents: Pages) -> None:
        self.server.write(rank, list(pages), contents)

    def reset(self) -> None:
        self.server.clear()

    def _launch(self, kind: Kind, mode: Mode, rows: ByRank) -> Logits:
        found: Logits = [[] for _ in rows]
        for part in parts(rows, _LAUNCH_TOKENS):
            page, width = self.server.page_size, widest(part)
            shape = self._shape(
                mode,
                gear(max(map(len, part))),
                self._width(kind, width),
                gear(-(-(context(part) + self._drafts) // page), max(1, _LEAST_CONTEXT // page)),
            )
            batch, choices = padded(part, *shape), [[row.choice for row in rank] for rank in part]
            drawn, logprobs = asks([each for rank in choices for each in rank])
            made = self.server.launch(batch, mode, draws_of(choices, shape[0]) if drawn else None, logprobs)
            for rank, each in zip(found, self._said(part, made), strict=True):
                rank += each
            if self._drafts:
                self._launched.append(Launched(kind, part, batch, made.hidden))
        return found

    def _said(self, part: ByRank, made: StepMade) -> Logits:
        """What a launch says of its rows. The processes of a server fetch together, so what is fetched goes by what all
        of them know: what rows ask, and which ids their devices left open."""
        open_ids = [row.choice is None for rank in part for row in rank]
        rows = logits = None
        if not all(open_ids):
            found = self.server.fetch(made.ids)[..., None] if made.told is None else self.server.fetch(made.told)
            rows = unpadded(part, found)
            open_ids += [bool((row[:, 0] < 0).any()) for rank in rows for row in rank]
        if any(open_ids):
            logits = unpadded(part, self.server.fetch(made.logits))

        def said(number: int, place: int, choice: TokenChoice | None) -> np.ndarray | ChosenIds:
            own = logits[number][place] if logits else None
            if choice is None or rows is None:
                assert own is not None
                return own
            told = rows[number][place]
            logprobs = () if choice.logprobs is None else named(told, choice.logprobs)
            return ChosenIds(told[:, 0], None if own is None else lambda: own, logprobs)

        return [[said(number, place, row.choice) for place, row in enumerate(rank)] for number, rank in enumerate(part)]

    def _width(self, kind: Kind, width: int) -> int:
        """Tokens a row to run."""
        if kind == "answers" and self._drafts:
            return gear(width, 1 + self._drafts)
        return 1 if width == 1 else gear(width, 16)

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
