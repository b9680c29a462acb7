"""Continuous batching over the page pool.

Life of a request: it waits; it is admitted when a running slot and pages for its prompt are free; its
prompt is fed in chunks (several sequences a step); from then on every decode step gives it a token (or,
with drafts, a few); it ends at a stop token or its limit, and its pages return to the pool. Prefill goes
before decode, as in SGLang. Where decoding runs out of pages, the youngest sequence gives its pages back
and is computed again later (recompute preemption); the tokens come out the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence as Many

import numpy as np

from foundation.errors import CapacityError
from model.config import ModelConfig
from model.graph import Batch, Mode
from runtime.execution.local.pool import PagePool
from runtime.execution.local.programs import Programs, gear
from runtime.execution.local.request import Completion, OnToken, Prompt, Sequence, check_request
from runtime.serving.sampling import choose, verify


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine. Sizes in tokens; `drafts` is the number of speculative tokens a step.

    The `least_` sizes are the smallest gears: shapes are padded up to them, then to powers of two. Larger
    ones mean fewer programs to compile and more padding to compute.
    """

    page_size: int = 16
    pool_tokens: int = 8192
    max_running: int = 16
    prefill_chunk: int = 256
    drafts: int = 0
    least_batch: int = 1
    least_chunk: int = 16
    least_context: int = 128

    @property
    def pages(self) -> int:
        return -(-self.pool_tokens // self.page_size)


class LocalEngine:
    """Serves requests with `programs`; single-threaded, one `generate` call at a time."""

    def __init__(self, cfg: ModelConfig, programs: Programs, config: EngineConfig):
        self.cfg, self.programs, self.config = cfg, programs, config
        self.pool = PagePool(config.pages, config.page_size)
        self.preemptions = 0
        self.steps = 0

    def validate(self, request: Prompt) -> None:
        """Raises `UsageError` or `CapacityError` for a request that can never be served."""
        check_request(request, self.cfg)
        prompt = len(request.prompt_ids)
        if prompt + request.max_tokens + self._reach > self.pool.tokens:
            raise CapacityError(
                f"prompt ({prompt} tokens) + max-tokens ({request.max_tokens}) + {self._reach} exceeds the page "
                f"pool's {self.pool.tokens} tokens; shorten one or raise --pool-tokens"
            )

    def _now_s(self) -> float:
        """Seconds on a clock that stands still while programs are compiled."""
        return time.perf_counter() - self.programs.compile_s

    def generate(self, requests: Many[Prompt], on_token: OnToken = lambda i, t: None) -> list[Completion]:
        """Serves all requests; completions in the order of the requests."""
        for request in requests:
            self.validate(request)
        now = self._now_s()
        waiting = deque(
            Sequence(r, i, list(r.prompt_ids), np.random.default_rng([r.sampling.seed, i]), now)
            for i, r in enumerate(requests)
        )
        running: list[Sequence] = []
        completions: dict[int, Completion] = {}
        try:
            while waiting or running:
                self._admit(waiting, running)
                prefilling = [s for s in running if s.prefilling]
                if prefilling:
                    self._prefill(prefilling, waiting, running, on_token)
                else:
                    self._decode(waiting, running, on_token)
                for sequence in [s for s in running if s.finished]:
                    running.remove(sequence)
                    self.pool.release(sequence.pages)
                    completions[sequence.index] = sequence.completion()
        finally:
            for sequence in running:
                self.pool.release(sequence.pages)
        return [completions[i] for i in range(len(requests))]

    @property
    def _reach(self) -> int:
        """Tokens beyond the cached ones that a step may write: the next, its drafts, and the drafts after those."""
        return 1 + 2 * self.config.drafts

    # --- scheduling

    def _admit(self, waiting: deque[Sequence], running: list[Sequence]) -> None:
        while waiting and len(running) < self.config.max_running:
            # room for the whole prompt and the first token, beside what running sequences may still take
            if not self.pool.grow(waiting[0].pages, len(waiting[0].tokens) + self._reach):
                return
            running.append(waiting.popleft())

    def _preempt(self, waiting: deque[Sequence], running: list[Sequence]) -> None:
        """Sends the youngest running sequence back to wait; it keeps its tokens and loses its cache."""
        youngest = max(running, key=lambda s: s.index)
        running.remove(youngest)
        self.pool.release(youngest.pages)
        youngest.done = 0
        youngest.drafts = []
        waiting.appendleft(youngest)
        self.preemptions += 1

    # --- steps

    def _prefill(
        self, sequences: list[Sequence], waiting: deque[Sequence], running: list[Sequence], on_token: OnToken
    ) -> None:
        """One chunk of each of as many prompts as a step's token budget holds."""
        budget, chunks = self.config.prefill_chunk, []
        for sequence in sequences:
            size = min(len(sequence.tokens) - sequence.done, budget)
            if size == 0:
                break
            chunks.append((sequence, sequence.tokens[sequence.done : sequence.done + size]))
            budget -= size
        keep = any(s.request.keep_logits for s, _ in chunks)
        batch = self._batch(chunks, self.config.least_chunk)
        logits, hidden = self.programs.step(batch, Mode("expanded", "all" if keep else "last"))
        self.steps += 1
        now = self._now_s()
        for row, (sequence, chunk) in enumerate(chunks):
            last = logits[row, len(chunk) - 1] if keep else logits[row]
            if sequence.request.keep_logits:
                self._keep(sequence, logits[row, : len(chunk)])
            sequence.done += len(chunk)
            if sequence.done == len(sequence.tokens) and sequence.finish is None:
                self._emit(sequence, [choose(last, sequence.request.sampling, sequence.rng)], now, on_token)
        if self.config.drafts:
            self._draft([(s, s.tokens[s.done - len(c) + 1 : s.done + 1]) for s, c in chunks], batch, hidden)

    def _decode(self, waiting: deque[Sequence], running: list[Sequence], on_token: OnToken) -> None:
        """One token a sequence, with its drafts to verify."""
        for sequence in list(running):
            while sequence in running and not self.pool.grow(sequence.pages, sequence.done + self._reach):
                self._preempt(waiting, running)
        drafts = self.config.drafts
        chunks = [(s, [s.tokens[-1], *s.drafts[: self._room(s)]]) for s in running]
        batch = self._batch(chunks, 1 + drafts)
        logits, hidden = self.programs.step(batch, Mode("absorbed", "all" if drafts else "last"))
        self.steps += 1
        logits = logits if drafts else logits[:, None, :]
        now = self._now_s()
        confirmed = []
        for row, (sequence, chunk) in enumerate(chunks):
            rows = logits[row, : len(chunk)]
            if sequence.finish is not None:  # only fed for its logits
                self._keep(sequence, rows[:1])
                sequence.done += 1
                confirmed.append((sequence, []))
                continue
            new = verify(rows, chunk[1:], sequence.request.sampling, sequence.rng)
            if sequence.request.keep_logits:
                self._keep(sequence, rows[: len(new)])
            emitted = self._emit(sequence, new, now, on_token)
            sequence.done += emitted
            if drafts:
                sequence.verify_steps += 1
                sequence.verified_tokens += emitted
            confirmed.append((sequence, new[:emitted]))
        if drafts:
            self._draft(confirmed, batch, hidden)

    def _room(self, sequence: Sequence) -> int:
        """Drafts that may still be useful: not past the token limit or the model's positions."""
        left = sequence.request.max_tokens - sequence.generated - 1
        return max(0, min(left, self.cfg.max_positions - sequence.done - 1))

    def _emit(self, sequence: Sequence, tokens: list[int], now_s: float, on_token: OnToken) -> int:
        """Appends tokens until the sequence ends; how many were taken."""
        for count, token in enumerate(tokens, 1):
            sequence.accept(token, now_s)
            on_token(sequence.index, token)
            if sequence.finish is not None:
                return count
        return len(tokens)

    def _draft(self, confirmed: list[tuple[Sequence, list[int]]], batch: Batch, hidden: object) -> None:
        """Feeds the MTP layer the tokens that follow the step's confirmed positions, and keeps its drafts."""
        tokens, lengths = np.zeros_like(batch.tokens), np.zeros_like(batch.length)
        for row, (_, following) in enumerate(confirmed):
            tokens[row, : len(following)] = following
            lengths[row] = len(following)
        drafts = self.programs.draft(batch._replace(tokens=tokens, length=lengths), hidden)
        for row, (sequence, _) in enumerate(confirmed):
            sequence.drafts = [] if sequence.prefilling else [int(t) for t in drafts[row]]

    def _keep(self, sequence: Sequence, rows: np.ndarray) -> None:
        for offset, row in enumerate(rows):
            sequence.logits[sequence.done + offset] = np.array(row)

    def _batch(self, chunks: list[tuple[Sequence, list[int]]], least_tokens: int) -> Batch:
        """A step's inputs, padded up to the gears; padding rows have length 0 and hold no pages."""
        size = gear(len(chunks), self.config.least_batch)
        width = gear(max(len(chunk) for _, chunk in chunks), least_tokens)
        page = self.config.page_size
        context = max(s.done + len(chunk) for s, chunk in chunks) + self.config.drafts
        pages = gear(-(-context // page), max(1, self.config.least_context // page))
        tokens, table = np.zeros((size, width), np.int32), np.zeros((size, pages), np.int32)
        start, length = np.zeros(size, np.int32), np.zeros(size, np.int32)
        for row, (sequence, chunk) in enumerate(chunks):
            tokens[row, : len(chunk)] = chunk
            start[row], length[row] = sequence.done, len(chunk)
            held = sequence.pages[:pages]
            table[row, : len(held)] = held
        return Batch(tokens, start, length, table)
