"""What a person asks of the engine, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from foundation.errors import UsageError
from model.config import ModelConfig
from runtime.serving.sampling import Sampling

FinishReason = Literal["stop", "length"]
OnToken = Callable[[int, int], None]
"""Told of each new token: index of the prompt, token id."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to continue: at most `max_tokens` new tokens, ending early at one of `stop_ids`.

    keep_logits: return the logits after every token.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int = 64
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    keep_logits: bool = False


def check_request(request: Prompt, cfg: ModelConfig) -> None:
    """Raises `UsageError` for a request that the model can never serve."""
    ids = request.prompt_ids
    if not ids:
        raise UsageError("the prompt has no tokens; give at least one")
    if request.max_tokens < 1:
        raise UsageError(f"max-tokens must be at least 1, not {request.max_tokens}")
    if bad := [i for i in ids if not 0 <= i < cfg.vocab_size]:
        raise UsageError(f"token id {bad[0]} is out of range: the vocabulary has {cfg.vocab_size} entries")
    total = len(ids) + request.max_tokens
    if total > cfg.max_positions:
        raise UsageError(
            f"prompt ({len(ids)} tokens) + max-tokens ({request.max_tokens}) = {total} exceeds the model's "
            f"{cfg.max_positions} positions; shorten one of them"
        )


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request.

    token_ids: generated tokens, the stop token included. logits: float32 `[prompt + generated, vocab]`, row i
    after token i, where asked for. ttft_s: from submission to the first token. decode_s: from the first token
    to the last. Neither counts the compilation of programs. accept_length: mean tokens a verification step
    gave (None without drafts).
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    ttft_s: float
    decode_s: float
    accept_length: float | None = None
    logits: np.ndarray | None = None


@dataclasses.dataclass
class Sequence:
    """A request in flight. `done` tokens of `tokens` are in the cache; `pages` are held for them."""

    request: Prompt
    index: int
    tokens: list[int]
    rng: np.random.Generator
    submitted_s: float
    pages: list[int] = dataclasses.field(default_factory=list)
    done: int = 0
    drafts: list[int] = dataclasses.field(default_factory=list)
    finish: FinishReason | None = None
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    verify_steps: int = 0
    verified_tokens: int = 0
    logits: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def prefilling(self) -> bool:
        """More than one known token is not in the cache yet."""
        return len(self.tokens) - self.done > 1 or self.generated == 0

    @property
    def finished(self) -> bool:
        """Nothing is left to compute. Kept logits want the last token fed too."""
        return self.finish is not None and (not self.request.keep_logits or self.done == len(self.tokens))

    def accept(self, token: int, now_s: float) -> None:
        """Appends a sampled token, and finishes the sequence where it ends."""
        if self.generated == 0:
            self.first_token_s = now_s
        self.tokens.append(token)
        self.last_token_s = now_s
        if token in self.request.stop_ids:
            self.finish = "stop"
        elif self.generated >= self.request.max_tokens:
            self.finish = "length"

    def completion(self) -> Completion:
        prompt = len(self.request.prompt_ids)
        logits = None
        if self.request.keep_logits:
            logits = np.stack([self.logits[i] for i in range(len(self.tokens))])
        return Completion(
            prompt_ids=self.request.prompt_ids,
            token_ids=tuple(self.tokens[prompt:]),
            finish_reason=self.finish or "length",
            ttft_s=self.first_token_s - self.submitted_s,
            decode_s=self.last_token_s - self.first_token_s,
            accept_length=self.verified_tokens / self.verify_steps if self.verify_steps else None,
            logits=logits,
        )
