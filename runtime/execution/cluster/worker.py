"""One server's part of the work: the simulator's plan of a step as batches for its devices, and tokens back.

The simulator counts pages; here they are numbered. A sequence holds pages of one rank of one server, from its
first chunk (or the arrival of its cache) until the simulator no longer has it in service there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from backends.spmd.cluster import Pages
from foundation.errors import CapacityError
from model.graph import Batch, Mode
from runtime.execution.local.pool import PagePool
from runtime.execution.local.programs import gear
from runtime.execution.local.request import OnToken, Sequence
from runtime.serving import Request
from runtime.serving.rank import Rank, StepPlan
from runtime.serving.sampling import choose

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


@dataclasses.dataclass
class Live:
    """A request in the emulation: its tokens, where its pages are, and its cache while it is between servers."""

    sequence: Sequence
    home: tuple[Worker, int] | None = None
    moving: Pages | None = None


@dataclasses.dataclass(frozen=True)
class WorkRow:
    """A sequence's tokens in a launch, the first of them at position `start`."""

    live: Live
    tokens: list[int]
    start: int


class Worker:
    """Runs steps on a server of `ranks` ranks. `live` finds a request's sequence."""

    def __init__(self, server: StepServer, ranks: int, live: dict[Request, Live], on_token: OnToken):
        self.server, self.live, self.on_token = server, live, on_token
        self.pools = [PagePool(server.pages, server.page_size) for _ in range(ranks)]
        self._shapes: set[tuple[Mode, int, int, int]] = set()

    def run(self, plans: list[StepPlan], ranks: list[Rank]) -> None:
        """Carries out one step of every rank, and shortens answers that stop."""
        self._reclaim(ranks)
        chunks: list[list[tuple[Request, WorkRow]]] = []
        decodes: list[list[tuple[Request, WorkRow]]] = []
        for number, (plan, rank) in enumerate(zip(plans, ranks, strict=True)):
            found = [self._chunk(number, *chunk) for chunk in plan.chunks]
            chunks.append([(request, row) for (request, *_), row in zip(plan.chunks, found, strict=True)])
            running = rank.running if plan.decode else []
            decodes.append([(request, self._next(number, request)) for request in running])
        for mode, work in (("expanded", chunks), ("absorbed", decodes)):
            self._launch(mode, work, ranks)

    # --- rows and pages

    def _reclaim(self, ranks: list[Rank]) -> None:
        """Frees the pages of sequences that the simulator has preempted."""
        here = {id(self.live[r]) for rank in ranks for r in (*rank.prefilling, *rank.running, *rank.handed_off)}
        for live in self.live.values():
            if live.home and live.home[0] is self and id(live) not in here:
                self.free(live)

    def _grow(self, rank: int, live: Live, tokens: int) -> None:
        assert live.home in (None, (self, rank)), "a sequence is on two ranks"
        live.home = (self, rank)
        if not self.pools[rank].grow(live.sequence.pages, tokens):
            raise CapacityError("the emulation ran out of pages that the simulator counted; this is a bug")

    def free(self, live: Live) -> None:
        """Gives back a sequence's pages."""
        if live.home:
            worker, rank = live.home
            worker.pools[rank].release(live.sequence.pages)
            live.home, live.sequence.done = None, 0

    def send(self, live: Live) -> None:
        """Takes a sequence's cache off this server, to go to another."""
        assert live.home and live.home[0] is self
        live.moving, done = self.server.read(live.home[1], live.sequence.pages), live.sequence.done
        self.free(live)
        live.sequence.done = done

    def _chunk(self, rank: int, request: Request, new: int, before: int) -> WorkRow:
        live = self.live[request]
        if before == 0:
            live.moving = None
            self.free(live)
        self._grow(rank, live, before + new)
        return WorkRow(live, live.sequence.tokens[before : before + new], before)

    def _next(self, rank: int, request: Request) -> WorkRow:
        live = self.live[request]
        start = len(live.sequence.tokens) - 1
        if live.moving is not None:
            self._grow(rank, live, start)
            self.server.write(rank, live.sequence.pages, live.moving)
            live.moving = None
        self._grow(rank, live, start + 1)
        return WorkRow(live, live.sequence.tokens[-1:], start)

    # --- launches

    def _launch(self, attention: str, work: list[list[tuple[Request, WorkRow]]], ranks: list[Rank]) -> None:
        most = max((len(row.tokens) for rows in work for _, row in rows), default=0)
        if not most:
            return
        size = max(1, _LAUNCH_TOKENS // most)
        for first in range(0, max(map(len, work)), size):
            part = [rows[first : first + size] for rows in work]
            keep = any(row.live.sequence.request.keep_logits for rows in part for _, row in rows)
            mode = Mode("expanded" if attention == "expanded" else "absorbed", "all" if keep else "last")
            logits = self._step(mode, [[row for _, row in rows] for rows in part])
            ended = []
            for number, rows in enumerate(part):
                for place, (request, row) in enumerate(rows):
                    self._take(request, row, logits[number][place], keep, ranks[number])
                    sequence = row.live.sequence
                    if sequence.finish and sequence.request.keep_logits:
                        ended.append((number, row.live))
            if ended:
                self._last_logits(ended, len(ranks))

    def _take(self, request: Request, row: WorkRow, logits: np.ndarray, keep: bool, rank: Rank) -> None:
        """The outcome of a row: its next token where its known tokens end, and the logits that are asked for."""
        sequence = row.live.sequence
        sequence.done = row.start + len(row.tokens)
        if sequence.request.keep_logits:
            for offset in range(len(row.tokens)):
                sequence.logits.setdefault(row.start + offset, np.array(logits[offset]))
        if sequence.done < len(sequence.tokens):
            return
        last = logits[len(row.tokens) - 1] if keep else logits
        token = choose(last, sequence.request.sampling, sequence.rng)
        sequence.accept(token, 0.0)
        self.on_token(sequence.index, token)
        if sequence.finish == "stop":
            rank.shorten(request, sequence.generated)

    def _last_logits(self, ended: Iterable[tuple[int, Live]], ranks: int) -> None:
        """The logits after a last token: nobody serves them, so they cost no virtual time."""
        rows: list[list[WorkRow]] = [[] for _ in range(ranks)]
        for number, live in ended:
            start = len(live.sequence.tokens) - 1
            self._grow(number, live, start + 1)
            rows[number].append(WorkRow(live, live.sequence.tokens[-1:], start))
        logits = self._step(Mode("absorbed", "all"), rows)
        for number, found in enumerate(rows):
            for place, row in enumerate(found):
                row.live.sequence.logits[row.start] = np.array(logits[number][place][0])

    def _step(self, mode: Mode, work: list[list[WorkRow]]) -> np.ndarray:
        """Logits [ranks, rows, (t,) vocab] of ragged rows."""
        page = self.server.page_size
        context = max(row.start + len(row.tokens) for rows in work for row in rows)
        width = max(len(row.tokens) for rows in work for row in rows)
        least_pages = max(1, _LEAST_CONTEXT // page)
        size, width, pages = self._shape(
            mode,
            gear(max(map(len, work))),
            1 if width == 1 else gear(width, 16),
            gear(-(-context // page), least_pages),
        )
        tokens = np.zeros((len(work), size, width), np.int32)
        table = np.zeros((len(work), size, pages), np.int32)
        start, length = np.zeros((len(work), size), np.int32), np.zeros((len(work), size), np.int32)
        for number, rows in enumerate(work):
            for place, row in enumerate(rows):
                tokens[number, place, : len(row.tokens)] = row.tokens
                start[number, place], length[number, place] = row.start, len(row.tokens)
                held = row.live.sequence.pages[:pages]
                table[number, place, : len(held)] = held
        flat = [part.reshape(-1, *part.shape[2:]) for part in (tokens, start, length, table)]
        logits = self.server.step(Batch(*flat), mode)
        return logits.reshape(len(work), size, *logits.shape[1:])

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
