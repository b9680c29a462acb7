"""An exported package as the scheduler's executor: its static gears, whatever the scheduler's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from foundation.errors import UsageError
from runtime.deployment.engines import load
from runtime.deployment.manifest import FILE, GearUnits, Manifest
from runtime.execution.package.executor import refusing
from runtime.execution.package.runner import Runner, StepBatch
from runtime.execution.serve_all import without_times
from runtime.serving import Deployment
from runtime.serving.executor import Abilities, ByRank, FedRow, Logits
from runtime.serving.pricing import UNPRICED


@dataclasses.dataclass
class _Feed:
    """A row on its way through the gears: `fed` of its tokens are in the cache."""

    rank: int
    place: int
    row: FedRow
    fed: int = 0

    @property
    def left(self) -> int:
        return len(self.row.tokens) - self.fed


def largest_context(manifest: Manifest) -> int:
    """Tokens of the longest request that a gear of a package holds."""
    return max(program.gear.context_pages * manifest.page_size for program in manifest.programs)


class PackageExecutor:
    """Runs steps with a package's programs. A row that is longer than the gear that holds its context goes through in
    several launches, and rows that take the same gear go together.

    bounded: what a launch of a gear is held to.
    """

    name = "the package"

    def __init__(
        self, runner: Runner, bounded: Callable[[GearUnits], AbstractContextManager[None]] = lambda gear: nullcontext()
    ):
        self.runner, self.manifest, self._bounded = runner, runner.manifest, bounded

    @property
    def largest_context(self) -> int:
        """Tokens of the longest request that a gear holds."""
        return largest_context(self.manifest)

    @property
    def can(self) -> Abilities:
        gears = [program.gear for program in self.manifest.programs]
        return Abilities(
            self.manifest.pool_pages - 1,
            self.manifest.page_size,
            self.runner.dp,
            rows=max(gear.sequences for gear in gears),
            mixed=False,
        )

    def deployment(self) -> Deployment:
        """What serves it: our own engine, with the package's sizes."""
        gears = [program.gear for program in self.manifest.programs]
        chunk = max(gear.sequences * gear.tokens for gear in gears)
        sizes = {
            "page_tokens": self.manifest.page_size,
            "max_running_requests": max(gear.sequences for gear in gears),
            "chunked_prefill_tokens": chunk,
            "max_step_tokens": chunk,
        }
        tokens = self.can.pages * self.can.page_tokens
        return Deployment(without_times(load("glm5", sizes)), UNPRICED, tokens, ranks=self.runner.dp)

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        if every:
            raise UsageError(f"{self.name} gives the logits of last tokens only")
        return self._feed(prompts), self._feed(answers)

    def draft(self, prompts: Any, answers: Any) -> tuple[Any, Any]:
        raise UsageError(f"{self.name} has no drafts")

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        raise UsageError(f"{self.name} cannot send caches")

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None:
        raise UsageError(f"{self.name} cannot send caches")

    def reset(self) -> None:
        self.runner.clear()

    def _feed(self, rows: ByRank) -> Logits:
        found: list[dict[int, np.ndarray]] = [{} for _ in rows]
        feeds = [_Feed(rank, place, row) for rank, each in enumerate(rows) for place, row in enumerate(each)]
        while feeds:
            program = self._program(feeds[0])
            together: list[list[_Feed]] = [[] for _ in rows]
            for feed in feeds:
                if len(together[feed.rank]) < program.gear.sequences and self._program(feed) is program:
                    together[feed.rank].append(feed)
            for rank, logits in zip(together, self._launch(program, together), strict=True):
                for feed, each in zip(rank, logits, strict=False):
                    feed.fed += min(feed.left, program.gear.tokens)
                    if not feed.left:
                        found[feed.rank][feed.place] = each[None]
            feeds = [feed for feed in feeds if feed.left]
        return [[each[place] for place in range(len(each))] for each in found]

    def _launch(self, program: GearUnits, together: list[list[_Feed]]) -> list[np.ndarray]:
        """Logits [sequences, vocab] of each dp rank."""
        gear, batches = program.gear, []
        for rank in together:
            tokens = np.zeros((gear.sequences, gear.tokens), np.int32)
            table = np.zeros((gear.sequences, gear.context_pages), np.int32)
            start, length = np.zeros(gear.sequences, np.int32), np.zeros(gear.sequences, np.int32)
            for place, feed in enumerate(rank):
                chunk = feed.row.tokens[feed.fed : feed.fed + gear.tokens]
                tokens[place, : len(chunk)] = chunk
                held = feed.row.pages[: gear.context_pages]
                table[place, : len(held)] = held
                start[place], length[place] = feed.row.start + feed.fed, len(chunk)
            batches.append(StepBatch(tokens, start, length, table))
        with self._bounded(program), refusing(self.runner.folder / FILE, "the runner"):
            results = self.runner.step(program, batches)
            return [np.asarray(self.runner.executor.get(result["logits"])) for result in results]

    def _context(self, program: GearUnits) -> int:
        return program.gear.context_pages * self.manifest.page_size

    def _program(self, feed: _Feed) -> GearUnits:
        """The gear that takes the next tokens at least waste: all of them if it can, over the least context."""
        tokens, context = feed.left, feed.row.start + feed.fed
        holds = [p for p in self.manifest.programs if self._context(p) >= context + min(tokens, p.gear.tokens)]

        def waste(program: GearUnits) -> tuple[int, ...]:
            gear = program.gear
            return (-min(tokens, gear.tokens), gear.tokens, self._context(program), gear.sequences)

        return min(holds, key=waste)
