"""What a person asks of the engine, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from model.config import ModelConfig
from runtime.serving import Request
from runtime.serving.answer import Answer, page_hashes
from runtime.serving.request import check_asked, check_ids, check_positions
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job
from runtime.serving.worker import OnToken as OnToken

FinishReason = Literal["stop", "length"]


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
    check_asked(len(request.prompt_ids), request.max_tokens)
    check_ids(request.prompt_ids, cfg.vocab_size)
    check_positions(len(request.prompt_ids), request.max_tokens, cfg.max_positions)


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


def job_of(prompt: Prompt) -> Job:
    return Job(prompt.prompt_ids, prompt.max_tokens, prompt.sampling, prompt.stop_ids)


def answers_of(prompts: Sequence[Prompt]) -> list[Answer]:
    """One for each prompt, drawing from a generator of its own."""
    return [
        Answer(job_of(prompt), number, [prompt.sampling.seed, number], prompt.keep_logits)
        for number, prompt in enumerate(prompts)
    ]


def requests_of(prompts: Sequence[Prompt], page_tokens: int | None) -> list[Request]:
    """As the scheduler sees them. page_tokens: of a page whose contents may be reused, None where none may; where
    logits are kept every token must be computed."""
    return [
        Request(
            number,
            len(prompt.prompt_ids),
            prompt.max_tokens,
            page_hashes(prompt.prompt_ids, page_tokens) if page_tokens and not prompt.keep_logits else (),
        )
        for number, prompt in enumerate(prompts)
    ]


def completion_of(answer: Answer, request: Request) -> Completion:
    """What a request came to, its times by the clock that it was scheduled on."""
    if answer.finish == "error":
        raise RuntimeError(answer.error)  # nobody brought along what could fail: a bug
    logits = None
    if answer.kept is not None:
        logits = np.stack([answer.kept[position] for position in range(len(answer.tokens))])
    return Completion(
        prompt_ids=answer.job.prompt_ids,
        token_ids=tuple(answer.tokens[len(answer.job.prompt_ids) :]),
        finish_reason="stop" if answer.finish == "stop" else "length",
        ttft_s=request.first_token_at - request.sent_at,
        decode_s=request.finished_at - request.first_token_at,
        accept_length=answer.verified_tokens / answer.verify_steps if answer.verify_steps else None,
        logits=logits,
    )
