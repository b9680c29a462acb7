"""What carries steps out, as the scheduler sees it: rows of tokens in, logits out, or the tokens chosen from them.

The scheduler decides which tokens of which requests a step computes and in which pages they lie; how many launches that
takes, of what shapes and on how many devices, is the executor's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from foundation.errors import UsageError
from runtime.serving.service import TokenLogprob

if TYPE_CHECKING:
    from runtime.serving.deployment import Deployment


@dataclasses.dataclass(frozen=True, slots=True)
class TokenChoice:
    """How an executor may choose the token behind another, so that logits need not leave the device: as `Sampling` has
    these, greedy by default. uniform: in [0,1), drawn by the request's own generator. logprobs: how many of the
    likeliest to name with log-probabilities, beside the chosen token's; None: none is asked for."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    uniform: float = 0.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


GREEDY = TokenChoice()


@dataclasses.dataclass(frozen=True, slots=True)
class FedRow:
    """Tokens of one request that a step computes. start: the position of the first. pages: the request's page table,
    which reaches at least as far as the tokens do.

    choice: of what follows each of the tokens that logits are asked of; None where the logits are wanted. following:
    of the token behind that, where the next step surely wants it, and the same way.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    choice: TokenChoice | None = None
    following: TokenChoice | None = None


@dataclasses.dataclass(frozen=True)
class ChosenIds:
    """What a step says of a row whose tokens the executor chose. ids: one for each row of logits, -1 where it could not
    tell what a draw comes to; `logits` then fetches those. logprobs: of each id, where the choice asked."""

    ids: np.ndarray
    logits: Callable[[], np.ndarray] | None = None
    logprobs: Sequence[TokenLogprob] = ()

    @property
    def last(self) -> ChosenIds:
        """Of the last row of logits alone."""
        logits = self.logits
        return ChosenIds(self.ids[-1:], logits and (lambda: logits()[-1:]), self.logprobs[-1:])


ByRank = list[list[FedRow]]
"""The rows of each rank."""
Logits = list[list[np.ndarray | ChosenIds]]
"""float32, by rank and row: [tokens, vocab], or [1, vocab] of the last token where no others are asked for; or what was
chosen from them."""


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What an executor can do. The rest is refused where a deployment is set up (`refuse`).

    pages, page_tokens: of each rank's caches, from page 1 on; page 0 is nobody's, and there is a spare one behind them.
    ranks: that step together. rows, chunk_tokens: of a step at most; None: any number.
    drafts: most that it guesses a step. beyond: tokens behind those of a step that it may write to.
    reuse: pages of one request may be read by another. mixed: a step may hold prompts and answers.
    moves: caches can be read and written (`read`, `write`). chooses: what tokens it can choose: none, the best, or all
    that a `TokenChoice` says. logprobs: how many tokens it can name beside one that it chose; None: it tells no
    log-probabilities.
    """

    pages: int
    page_tokens: int
    ranks: int = 1
    rows: int | None = None
    chunk_tokens: int | None = None
    drafts: int = 0
    beyond: int = 0
    reuse: bool = True
    mixed: bool = True
    moves: bool = False
    chooses: Literal["none", "greedy", "drawn"] = "none"
    logprobs: int | None = None


class StepExecutor(Protocol):
    """Carries out the steps of one server."""

    name: str
    """As messages call it."""

    @property
    def can(self) -> Abilities: ...

    def step(self, prompts: ByRank, answers: ByRank, every: bool) -> tuple[Logits, Logits]:
        """Computes pieces of prompts and the next tokens of answers, with their drafts. every: the logits of all tokens
        of prompts are asked for, not only of each last; of answers they always are. Rows with a choice may come back
        as `ChosenIds`."""
        ...

    def draft(self, prompts: list[list[list[int]]], answers: list[list[list[int]]]) -> tuple[Any, Any]:
        """Guesses, for every row of the step that has just been computed, the tokens that come then:
        [ranks][rows][drafts]. Given are the tokens known to follow the row's own, one behind the other: fewer than the
        row had where drafts were wrong."""
        ...

    def read(self, rank: int, pages: Sequence[int]) -> Any:
        """The contents of pages, as another server's `write` takes them."""
        ...

    def write(self, rank: int, pages: Sequence[int], contents: Any) -> None: ...

    def reset(self) -> None:
        """Makes the caches anew, after a step that failed."""
        ...


def refuse(deployment: Deployment, executor: StepExecutor, moves: bool = False) -> None:
    """Raises `UsageError` for what a deployment asks of an executor that it cannot do. moves: caches are sent."""
    engine, can, name = deployment.engine, executor.can, executor.name
    drafts = deployment.speculation.query_tokens - 1 if deployment.speculation else 0
    if engine.page_tokens != can.page_tokens:
        raise UsageError(f"{engine.name} keeps pages of {engine.page_tokens} tokens, and {name} of {can.page_tokens}")
    if deployment.ranks > can.ranks:
        raise UsageError(f"{deployment.ranks} ranks step together, and {name} has {can.ranks}")
    if drafts > can.drafts:
        most = f"drafts {can.drafts} tokens a step at most" if can.drafts else "has no drafts"
        raise UsageError(f"{drafts} drafts a step are asked for, and {name} {most}")
    if engine.policy == "mixed" and not can.mixed:
        raise UsageError(
            f"{engine.name} puts prompts and answers into one step, and {name} cannot: take an engine that computes "
            "prompts first (glm5, sglang)"
        )
    if moves and not can.moves:
        raise UsageError(f"{name} cannot send caches from a prefill server to a decode server: give one pool")
    if can.rows is not None and engine.max_running_requests > can.rows:
        raise UsageError(f"{engine.name} runs {engine.max_running_requests} requests at once, and {name} {can.rows}")
    chunk = engine.chunked_prefill_tokens or engine.max_step_tokens
    if can.chunk_tokens is not None and chunk > can.chunk_tokens:
        raise UsageError(f"{engine.name} computes {chunk} tokens of a prompt at once, and {name} {can.chunk_tokens}")
