"""/v1/completions: text or token ids, continued as they are."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import Field

from runtime.api.answer import Answering, Shown
from runtime.api.ask import MOST_CHOICES, Ask
from runtime.api.dialects.chat import FINISH
from runtime.api.dialects.forms import (
    RequestBody,
    Sampled,
    checked_model,
    format_of,
    new_id,
    read,
    usage,
)
from runtime.api.endpoint import Endpoint
from runtime.api.events import Event, Said
from runtime.api.refusal import wrong
from runtime.serving.service import MOST_LOGPROBS

_DEFAULT_TOKENS = 16  # OpenAI's


class _Options(RequestBody):
    include_usage: bool | None = None


class CompletionBody(Sampled):
    """As OpenAI had it, with vLLM's additions."""

    prompt: Any  # `_prompts`
    model: str | None = None
    stream: bool | None = None
    stream_options: _Options | None = None
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    response_format: dict[str, Any] | None = None


class CompletionRequest:
    """A request to it."""

    def __init__(self, endpoint: Endpoint, raw: Any):
        """Raises `ApiRefusal`."""
        body = read(CompletionBody, raw)
        self._endpoint, self._body = endpoint, body
        self.model = checked_model(endpoint.names, body.model)
        self.streams = bool(body.stream)
        prompts = _prompts(body.prompt)
        for name in ("prompt_logprobs", "suffix"):
            if getattr(body, name):
                raise wrong(f"{name} is not supported: leave it out", name, "unsupported_parameter")
        if body.echo and body.logprobs is not None:
            raise wrong("echo with logprobs needs the prompt's, which are not kept", "echo", "unsupported_parameter")
        if (body.best_of or 1) > (body.n or 1):
            raise wrong("best_of beyond n is not supported", "best_of", "unsupported_parameter")
        self.ask = Ask(
            drawn=body.drawn(max_tokens=body.max_tokens or _DEFAULT_TOKENS, logprobs=body.logprobs),
            prompts=prompts,
            format=format_of(body.response_format, "response_format", nested=True),
            param="prompt",
        )
        self._id, self._created = new_id("cmpl-"), int(time.time())

    def whole(self, answering: Answering) -> dict[str, Any]:
        offsets = [0] * len(answering.turns)
        choices = [
            {
                "index": turn.index, "text": self._echo(answering, turn.index) + _text(turn.events),
                "finish_reason": FINISH[turn.end or "stop"],
                "logprobs": self._logprobs(turn.index, turn.shown, offsets),
            }
            for turn in answering.turns
        ]  # fmt: skip
        return {**self._head(), "choices": choices, "usage": usage(answering)}

    async def stream(self, answering: Answering) -> AsyncGenerator[dict[str, Any] | str, None]:
        """Chunks, the last of them `[DONE]`."""
        begun: set[int] = set()
        offsets = [0] * len(answering.turns)
        wants_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        more = {"usage": None} if wants_usage else {}
        async for step in answering.steps():
            if (refusal := answering.turns[step.index].refusal) is not None:
                yield refusal.openai()
                break
            text = _text(step.events)
            if step.index not in begun:
                text = self._echo(answering, step.index) + text
                begun.add(step.index)
            choice = {
                "index": step.index, "text": text, "finish_reason": FINISH[step.end] if step.end else None,
                "logprobs": self._logprobs(step.index, step.shown, offsets),
            }  # fmt: skip
            yield {**self._head(), "choices": [choice], **more}
        if wants_usage:
            yield {**self._head(), "choices": [], "usage": usage(answering)}
        yield "[DONE]"

    def _echo(self, answering: Answering, index: int) -> str:
        if not self._body.echo:
            return ""
        at = index // (len(answering.turns) // len(answering.prepared.prompts))
        given = (self.ask.prompts or [])[at]
        return given if isinstance(given, str) else self._endpoint.vocabulary.tokenizer.decode(given)

    def _logprobs(self, index: int, shown: list[Shown], offsets: list[int]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        pieces = self._endpoint.vocabulary.pieces
        tokens, starts = [pieces[each.token].decode(errors="replace") for each in shown], []
        for token in tokens:
            starts.append(offsets[index])
            offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(each.logprob.logprob, -9999.0) for each in shown],
            "top_logprobs": [
                {pieces[token].decode(errors="replace"): max(value, -9999.0) for token, value in each.logprob.top}
                for each in shown
            ],
            "text_offset": starts,
        }

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self.model}


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Said))


def _prompts(given: Any) -> list[str | list[int]]:
    """A text, token ids, or several of either. Raises `ApiRefusal`."""
    if isinstance(given, str) or _are_ids(given):
        return [given]
    if not isinstance(given, list):
        raise wrong("prompt is a text, token ids, or a list of either", "prompt")
    if not given:
        raise wrong("prompt is empty: give at least one", "prompt")
    if len(given) > MOST_CHOICES:
        raise wrong(f"{len(given):,} answers to one request are more than {MOST_CHOICES}", "prompt")
    for at, each in enumerate(given):
        if not isinstance(each, str) and each != [] and not _are_ids(each):
            raise wrong(f"prompt[{at}] is a text or token ids, and the prompt itself a list of either", f"prompt[{at}]")
    return given


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(each) is int for each in given)
