"""Programs on one device as the scheduler's executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foundation.errors import UsageError
from model.graph import Mode
from runtime.execution.batches import (
    Following,
    Kind,
    Launched,
    context,
    drafted,
    gear,
    padded,
    parts,
    unpadded,
    widest,
)
from runtime.execution.local.programs import Programs
from runtime.serving.executor import Abilities, ByRank, Logits


class LocalExecutor:
    """Runs steps with `programs`. A step with prompts and answers takes two launches.

    The `least_` sizes are the smallest gears: shapes are padded up to them, then to powers of two. launch_tokens: of
    one launch at most, padding between its rows included; a step with more is run in several.
    """

    def __init__(
        self, programs: Programs, least_batch: int, least_chunk: int, least_context: int, launch_tokens: int = 4096
    ):
        self.programs, self._least_batch, self._least_chunk = programs, least_batch, least_chunk
        self._least_pages = max(1, least_context // programs.page_size)
        self._launch_tokens = launch_tokens
        self.name = f"a device of backend {programs.backend.name}"
        self._launched: list[Launched] = []

    @property
    def can(self) -> Abilities:
        drafts = self.programs.drafts
        return Abilities(self.programs.pages, self.programs.page_size, drafts=drafts, beyond=max(0, drafts - 1))

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        self._launched = []
        drafts = self.programs.drafts
        of_prompts = self._launch("prompts", Mode("expanded", "all" if every else "last"), prompts, self._least_chunk)
        mode = Mode("absorbed", "all" if drafts else "last")
        return of_prompts, self._launch("answers", mode, answers, 1 + drafts)

    def draft(self, prompts: Following, answers: Following) -> tuple[Any, Any]:
        return drafted(self._launched, prompts, answers, self.programs.draft)

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        raise UsageError(f"{self.name} cannot send caches")

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None:
        raise UsageError(f"{self.name} cannot send caches")

    def reset(self) -> None:
        self.programs.clear()

    def _launch(self, kind: Kind, mode: Mode, rows: ByRank, least_tokens: int) -> Logits:
        found: Logits = [[]]
        for part in parts(rows, self._launch_tokens):
            pages = -(-(context(part) + self.programs.drafts) // self.programs.page_size)
            batch = padded(
                part,
                gear(len(part[0]), self._least_batch),
                gear(widest(part), least_tokens),
                gear(pages, self._least_pages),
            )
            logits, hidden = self.programs.step(batch, mode)
            found[0] += unpadded(part, logits)[0]
            if self.programs.drafts:
                self._launched.append(Launched(kind, part, batch, hidden))
        return found
