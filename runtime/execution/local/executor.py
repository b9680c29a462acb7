"""Programs on one device as the scheduler's executor.

Where the device works apart from the host, a step is launched before the host has seen the one before: behind a launch
of answers goes, at once, the one that comes next if nothing changes: of the same rows, each a token further, which it
takes from what the first chooses on the device (`feed.LAST`). The host then reads the first one's ids, tells clients,
plans, and finds the next step under way. What a step asks otherwise (an answer has ended, a prompt has come) is
launched as ever; rows that are as they were guessed are taken from the guess, and the rest of it is lost. It has
written nothing that another reads: a row's own token in a page of its own, before all that was launched later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from foundation.errors import UsageError
from model.graph import Mode
from runtime.execution.batches import (
    Following,
    Kind,
    Launched,
    asks,
    context,
    drafted,
    gear,
    named,
    padded,
    parts,
    unpadded,
    widest,
)
from runtime.execution.local.feed import LAST
from runtime.execution.local.programs import Programs, StepMade
from runtime.serving.executor import Abilities, ByRank, ChosenIds, FedRow, Logits
from runtime.serving.service import MOST_LOGPROBS

_GAP = FedRow([], 0, [])
_NONE = np.zeros((0, 0), np.float32)


@dataclasses.dataclass
class _Made:
    """A launch, its rows in their places, and weights that it was of. ids: what it chose, once they have been read."""

    rows: list[FedRow]
    size: int
    launch: StepMade
    weights: Any
    ids: np.ndarray | None = None


@dataclasses.dataclass
class _Guess:
    """What may be the next step's answers, each a token behind `after`."""

    made: _Made
    after: _Made


class LocalExecutor:
    """Runs steps with `programs`. A step with prompts and answers takes two launches.

    The `least_` sizes are the smallest gears: shapes are padded up to them, then to powers of two. launch_tokens: of
    one launch at most, padding between its rows included; a step with more is run in several. guessed, taken: rows that
    were launched ahead of their step, and those of them that it then asked for.
    """

    def __init__(
        self, programs: Programs, least_batch: int, least_chunk: int, least_context: int, launch_tokens: int = 4096
    ):
        self.programs, self._least_batch, self._least_chunk = programs, least_batch, least_chunk
        self._least_pages = max(1, least_context // programs.page_size)
        self._launch_tokens = launch_tokens
        self.name = f"a device of backend {programs.backend.name}"
        self._launched: list[Launched] = []
        self._guess: _Guess | None = None
        self.guessed = self.taken = 0

    @property
    def can(self) -> Abilities:
        programs, drafts = self.programs, self.programs.drafts
        return Abilities(
            programs.pages,
            programs.page_size,
            drafts=drafts,
            beyond=drafts - 1 if drafts else int(programs.apart),
            chooses="drawn" if programs.apart else "greedy",
            logprobs=MOST_LOGPROBS if programs.apart else None,
        )

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        self._launched = []
        drafts = self.programs.drafts
        guess, self._guess = self._guess, None  # of the next step alone: later, pages may be others'
        of_prompts = self._launch("prompts", Mode("expanded", "all" if every else "last"), prompts, self._least_chunk)
        known = self._known(guess, answers[0]) if guess else {}
        mode = Mode("absorbed", "all" if drafts else "last")
        rest = [row for place, row in enumerate(answers[0]) if place not in known]
        of_answers = self._launch("answers", mode, [rest], 1 + drafts)
        if self.programs.apart and not drafts:
            self._go_on(answers[0], guess, known, of_answers)
        said_of_prompts = [each for made in of_prompts for each in self._read(made)]
        others = (each for made in of_answers for each in self._read(made))
        guessed = self._read(guess.made) if guess and known else []
        said = [guessed[known[place]] if place in known else next(others) for place in range(len(answers[0]))]
        return [said_of_prompts], [said]

    def draft(self, prompts: Following, answers: Following) -> tuple[Any, Any]:
        return drafted(self._launched, prompts, answers, self.programs.draft)

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        raise UsageError(f"{self.name} cannot send caches")

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None:
        raise UsageError(f"{self.name} cannot send caches")

    def reset(self) -> None:
        self._guess = None
        self.programs.clear()

    def _launch(self, kind: Kind, mode: Mode, rows: ByRank, least_tokens: int) -> list[_Made]:
        return [
            self._launched_one(kind, mode, part, gear(len(part[0]), self._least_batch), least_tokens)
            for part in parts(rows, self._launch_tokens)
        ]

    def _launched_one(
        self, kind: Kind, mode: Mode, part: ByRank, size: int, least_tokens: int, previous: Any = None
    ) -> _Made:
        (rows,) = part
        pages = -(-(context(part) + self.programs.drafts) // self.programs.page_size)
        batch = padded(part, size, gear(widest(part), least_tokens), gear(pages, self._least_pages))
        choices = [row.choice for row in rows]
        drawn, logprobs = asks(choices)
        launch = self.programs.launch(batch, mode, choices if drawn else None, previous, logprobs)
        if self.programs.drafts:
            self._launched.append(Launched(kind, part, batch, launch.hidden))
        return _Made(rows, size, launch, self.programs.weights)

    def _read(self, made: _Made) -> list[np.ndarray | ChosenIds]:
        """What a launch says of its rows; waits for it."""
        programs, launch = self.programs, made.launch
        asked = [row for row in made.rows if row.tokens]
        logits = told = None
        if any(row.choice is None for row in asked):
            logits = unpadded([made.rows], programs.fetch(launch.logits))[0]
        if any(row.choice is not None for row in asked):
            found = programs.fetch(launch.ids)[..., None] if launch.told is None else programs.fetch(launch.told)
            made.ids = found[..., 0]
            told = unpadded([made.rows], found)[0]

        def fetched(place: int) -> np.ndarray:
            row = programs.fetch(launch.logits[place])
            return row[None] if row.ndim == 1 else row[: len(made.rows[place].tokens)]

        def said(place: int, row: FedRow) -> np.ndarray | ChosenIds:
            if row.choice is not None and told is not None:
                best = row.choice.logprobs
                logprobs = () if best is None else named(told[place], best)
                return ChosenIds(told[place][:, 0], partial(fetched, place), logprobs)
            return _NONE if logits is None else logits[place]

        return [said(place, row) for place, row in enumerate(made.rows)]

    # --- ahead of the host

    def _go_on(self, rows: list[FedRow], guess: _Guess | None, known: dict[int, int], made: list[_Made]) -> None:
        """Launches what comes behind a step's answers, where all of them are of one launch."""
        if guess and known and not made:
            after, places = guess.made, known
        elif len(made) == 1 and not known:
            after, places = made[0], {place: place for place in range(len(rows))}
        else:
            return
        page = self.programs.page_size
        following = [_GAP] * len(after.rows)
        for place, row in enumerate(rows):
            if row.following is not None and row.start + 1 < len(row.pages) * page:
                following[places[place]] = FedRow([LAST], row.start + 1, list(row.pages), row.following)
        count = sum(row is not _GAP for row in following)
        if not count or gear(count, self._least_batch) < after.size:
            return
        launched = self._launched_one("answers", Mode(), [following], after.size, 1, after.launch.ids)
        self._guess = _Guess(launched, after)
        self.guessed += count

    def _known(self, guess: _Guess, rows: list[FedRow]) -> dict[int, int]:
        """Which rows of a step are computed already: their places, and those in the guess."""
        if guess.made.weights is not self.programs.weights or guess.after.ids is None:
            return {}
        page = self.programs.page_size
        held = {row.pages[row.start // page]: place for place, row in enumerate(guess.made.rows) if row.tokens}
        found = {}
        for at, row in enumerate(rows):
            place = held.get(row.pages[row.start // page])
            if place is None:
                continue
            guessed = guess.made.rows[place]
            if (
                list(row.tokens) == [guess.after.ids[place]]
                and row.start == guessed.start
                and row.choice == guessed.choice
                and list(row.pages[: len(guessed.pages)]) == guessed.pages
            ):
                found[at] = place
        self.taken += len(found)
        return found
