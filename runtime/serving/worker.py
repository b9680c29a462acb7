"""A replica's hands: a planned step as rows of tokens for what carries it out, and the answers' tokens back.

What it tells the scheduler is how many tokens each answer got, and which answers end before their limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.serving.answer import Answer, page_hashes
from runtime.serving.executor import GREEDY, ByRank, ChosenIds, FedRow, StepExecutor, TokenChoice
from runtime.serving.rank import Rank, StepPlan
from runtime.serving.request import Request
from runtime.serving.service import Update

News = list[tuple[Answer, Update]]
OnToken = Callable[[int, int], None]
"""Told of each new token: number of the answer, token id."""


class Worker(ABC):
    """Carries out a replica's steps.

    drafted, accepted: tokens guessed so far, and those that were right.
    numbered: pages have numbers. beyond: tokens behind those of a step that may be written to.
    answers: those at work, by request. moving: what requests between two servers take along, shared by all workers of a
    deployment. arrivals: news of those whose cache has come in the step that is running.
    """

    numbered = True
    beyond = 0

    def __init__(
        self,
        answers: Mapping[Request, Answer],
        moving: dict[Request, Any],
        on_token: OnToken = lambda number, token: None,
    ):
        self.answers, self.moving, self._on_token = answers, moving, on_token
        self.arrivals: News = []
        self.drafted = self.accepted = 0
        self._fresh: dict[Request, Answer] = {}

    def run(self, plans: list[StepPlan], ranks: list[Rank]) -> list[np.ndarray]:
        """One step of every rank. Returns, for each, the tokens that its slots made; `Rank.shorten` is told of answers
        that end."""
        self.arrivals = []
        if self.moving:
            for number, (plan, rank) in enumerate(zip(plans, ranks, strict=True)):
                for request, *_ in plan.chunks:  # preempted before it came here
                    self.moving.pop(request, None)
                for request in rank.running:
                    if request in self.moving:
                        self._arrive(number, rank, request, self.moving.pop(request))
                        self.arrivals.append((self.answers[request], self.answers[request].news(request.cached)))
        return self._run(plans, ranks)

    def news(self, moving_on: Sequence[Request] = ()) -> News:
        """What clients have not been told yet. moving_on: requests that go to another server, and are told of there."""
        for request in moving_on:
            self._fresh.pop(request, None)
        fresh, self._fresh = self._fresh, {}
        return [(answer, answer.news(request.cached)) for request, answer in fresh.items()]

    @abstractmethod
    def _run(self, plans: list[StepPlan], ranks: list[Rank]) -> list[np.ndarray]: ...

    @abstractmethod
    def send(self, number: int, rank: Rank, request: Request) -> None:
        """Takes the cache of a request along, from pages that it is about to give back."""

    @abstractmethod
    def _arrive(self, number: int, rank: Rank, request: Request, contents: Any) -> None:
        """Puts it into those that it was given here."""

    def reset(self) -> None:
        """Makes good what a step that failed may have left."""
        self._fresh, self.arrivals = {}, []

    def _made(self, rank: Rank, request: Request, answer: Answer, count: int) -> None:
        """An answer got `count` tokens, or has come to its end."""
        for token in answer.tokens[len(answer.tokens) - count :]:
            self._on_token(answer.number, token)
        self._fresh[request] = answer
        if answer.finish is None:
            return
        if rank.pool.prefix_cache and request.prefix_hashes:  # what was answered may be asked about
            request.prefix_hashes = page_hashes(answer.tokens, rank.pool.block_tokens)
        if answer.finish != "length":
            rank.shorten(request, answer.generated)


class ModelWorker(Worker):
    """Runs steps on an executor, and chooses tokens from its logits. drafts: guessed a step."""

    def __init__(
        self,
        executor: StepExecutor,
        answers: Mapping[Request, Answer],
        moving: dict[Request, Any],
        drafts: int = 0,
        on_token: OnToken = lambda number, token: None,
    ):
        super().__init__(answers, moving, on_token)
        self.executor, self._drafts = executor, drafts
        can = executor.can
        self.beyond = can.beyond if drafts or not can.drafts else 0
        self._chooses, self._names = can.chooses, can.logprobs

    def _run(self, plans: list[StepPlan], ranks: list[Rank]) -> list[np.ndarray]:
        calm = all(rank.calm for rank in ranks)
        prompts = [
            [self._chunk(rank, *chunk) for chunk in plan.chunks] for plan, rank in zip(plans, ranks, strict=True)
        ]
        decoding = [rank.running if plan.decode else [] for plan, rank in zip(plans, ranks, strict=True)]
        answers = [
            [self._next(rank, slot, request, calm) for slot, request in enumerate(running)]
            for rank, running in zip(ranks, decoding, strict=True)
        ]
        every = any(self.answers[request].kept is not None for plan in plans for request, *_ in plan.chunks)
        of_prompts, of_answers = self.executor.step(prompts, answers, every)
        following_prompts: list[list[list[int]]] = []
        following_answers: list[list[list[int]]] = []
        made = []
        for number, (plan, rank) in enumerate(zip(plans, ranks, strict=True)):
            following_prompts.append(
                [
                    self._end_chunk(rank, chunk, logits)
                    for chunk, logits in zip(plan.chunks, of_prompts[number], strict=True)
                ]
            )
            found = [
                self._end_next(rank, request, row, logits)
                for request, row, logits in zip(decoding[number], answers[number], of_answers[number], strict=True)
            ]
            following_answers.append(found)
            made.append(np.array([len(tokens) for tokens in found], dtype=np.int64))
        if self._drafts:
            self._guess(plans, decoding, *self.executor.draft(following_prompts, following_answers))
        self._last_logits(plans, decoding, ranks)
        return made

    # --- rows

    def _chunk(self, rank: Rank, request: Request, new: int, before: int) -> FedRow:
        answer, end = self.answers[request], before + new
        choice = self._choice(answer) if end == len(answer.tokens) else self._anything(answer)
        return FedRow(answer.tokens[before:end], before, _table(rank, request), choice)

    def _next(self, rank: Rank, slot: int, request: Request, calm: bool) -> FedRow:
        """calm: the next step will likely be of the same answers."""
        answer = self.answers[request]
        drafts = answer.drafts[: min(self._drafts, int(rank.left[slot]) - 1)]
        choice = self._choice(answer, drafts=len(drafts))
        goes_on = calm and choice is not None and not self._drafts and int(rank.left[slot]) > 1
        following = self._choice(answer, 1) if goes_on else None
        return FedRow([answer.tokens[-1], *drafts], len(answer.tokens) - 1, _table(rank, request), choice, following)

    def _choice(self, answer: Answer, ahead: int = 0, drafts: int = 0) -> TokenChoice | None:
        """How the executor may choose, as far as it can. A refused draft takes more draws than one."""
        if self._chooses == "none":
            return None
        greedy = answer.job.sampling.greedy
        can = greedy or (self._chooses == "drawn" and not drafts)
        return answer.choice(ahead, self._names) if can else None

    def _anything(self, answer: Answer) -> TokenChoice | None:
        """Behind a piece of a prompt that is not its last nothing is chosen; logits are wanted where they are kept."""
        return None if self._chooses == "none" or answer.kept is not None else GREEDY

    # --- outcomes

    def _end_chunk(self, rank: Rank, chunk: tuple[Request, int, int], said: np.ndarray | ChosenIds) -> list[int]:
        """The tokens that follow the chunk's own: the last of them is new where the chunk is a prompt's last."""
        request, new, before = chunk
        answer = self.answers[request]
        _keep(answer, before, said)
        if before + new == len(answer.tokens):
            last = said.last if isinstance(said, ChosenIds) else said[-1:]
            self._made(rank, request, answer, _extended(answer, last, ()))
        return answer.tokens[before + 1 : before + new + 1]

    def _end_next(self, rank: Rank, request: Request, row: FedRow, said: np.ndarray | ChosenIds) -> list[int]:
        """The tokens made."""
        answer = self.answers[request]
        made = _extended(answer, said, row.tokens[1:])
        if self._drafts:
            answer.verify_steps += 1
            answer.verified_tokens += made
            self.drafted += len(row.tokens) - 1
            self.accepted += max(0, made - 1)
        _keep(answer, row.start, said, made)
        self._made(rank, request, answer, made)
        return answer.tokens[len(answer.tokens) - made :]

    def _guess(self, plans: list[StepPlan], decoding: list[list[Request]], prompts: Any, answers: Any) -> None:
        for number, plan in enumerate(plans):
            asked = [request for request, *_ in plan.chunks], decoding[number]
            for requests, found in zip(asked, (prompts[number], answers[number]), strict=True):
                for request, drafts in zip(requests, found, strict=True):
                    self.answers[request].drafts = [int(each) for each in drafts]

    def _last_logits(self, plans: list[StepPlan], decoding: list[list[Request]], ranks: list[Rank]) -> None:
        """The logits after a last token, where they are asked for: a step that nobody waits for. One answer at a time,
        whose token may need the page that nobody has."""
        for number, (plan, rank) in enumerate(zip(plans, ranks, strict=True)):
            for request in (*(request for request, *_ in plan.chunks), *decoding[number]):
                answer = self.answers[request]
                if answer.kept is None or answer.finish is None:
                    continue
                start = len(answer.tokens) - 1
                row = FedRow(answer.tokens[-1:], start, [*_table(rank, request), self.executor.can.pages + 1])
                empty: ByRank = [[] for _ in ranks]
                rows: ByRank = [[row] if each == number else [] for each in range(len(ranks))]
                _, logits = self.executor.step(empty, rows, True)
                _keep(answer, start, logits[number][0])

    # --- caches that move

    def send(self, number: int, rank: Rank, request: Request) -> None:
        pages = _table(rank, request)[: rank.pool.pages_for(request.prompt_tokens)]
        self.moving[request] = self.executor.read(number, pages)

    def _arrive(self, number: int, rank: Rank, request: Request, contents: Any) -> None:
        pages = _table(rank, request)[: rank.pool.pages_for(request.prompt_tokens)]
        self.executor.write(number, pages, contents)

    def reset(self) -> None:
        super().reset()
        self.executor.reset()


class SyntheticWorker(Worker):
    """Answers without a model: each token is what `next_token` says for the answer's number and its place in it, of a
    vocabulary of `vocab`. A step makes as many as its simulation would."""

    numbered = False

    def __init__(
        self,
        next_token: Callable[[int, int], int],
        vocab: int,
        answers: Mapping[Request, Answer],
        moving: dict[Request, Any],
        on_token: OnToken = lambda number, token: None,
    ):
        super().__init__(answers, moving, on_token)
        self._next_token, self._vocab = next_token, vocab

    def _run(self, plans: list[StepPlan], ranks: list[Rank]) -> list[np.ndarray]:
        made = []
        for plan, rank in zip(plans, ranks, strict=True):
            for request, new, before in plan.chunks:
                if before + new == request.target:
                    self._go_on(rank, request, 1)
            counts = rank.draw() if plan.decode else np.zeros(0, dtype=np.int64)
            running = list(rank.running) if plan.decode else []
            found = [self._go_on(rank, request, count) for request, count in zip(running, counts.tolist(), strict=True)]
            made.append(np.array(found, dtype=np.int64))
            self.drafted += len(found) * (rank.query_tokens - 1)
            self.accepted += sum(max(0, each - 1) for each in found)
        return made

    def _go_on(self, rank: Rank, request: Request, most: int) -> int:
        answer, made = self.answers[request], 0
        while made < most and answer.finish is None:
            try:
                made += answer.choose(self._next_token(answer.number, answer.generated), self._vocab)
            except Exception as error:  # others' code, and one answer's
                answer.fail(f"no token could be made up ({error})")
        self._made(rank, request, answer, made)
        return made

    def send(self, number: int, rank: Rank, request: Request) -> None:
        self.moving[request] = None

    def _arrive(self, number: int, rank: Rank, request: Request, contents: Any) -> None:
        pass


def _extended(answer: Answer, said: np.ndarray | ChosenIds, drafts: Sequence[int]) -> int:
    """How many tokens an answer got. Logits that nothing can be chosen from end it, and no other."""
    before = answer.generated
    try:
        if not isinstance(said, ChosenIds):
            answer.extend(said, drafts)
        elif said.logits and (said.ids < 0).any():
            answer.extend(said.logits(), drafts)
        else:
            answer.take(said.ids.tolist(), drafts, said.logprobs)
    except Exception as error:
        answer.fail(f"no token could be chosen ({error})")
    return answer.generated - before


def _table(rank: Rank, request: Request) -> list[int]:
    assert rank.pool.numbers is not None
    return rank.pool.numbers.table(request)


def _keep(answer: Answer, start: int, said: np.ndarray | ChosenIds, count: int | None = None) -> None:
    if answer.kept is not None:
        assert not isinstance(said, ChosenIds)  # whose logits are kept has no choice
        for offset, row in enumerate(said[:count]):
            answer.kept.setdefault(start + offset, np.array(row))
