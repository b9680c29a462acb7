"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import Field

from runtime.api.answer import Answering, End, OneAnswer, Told
from runtime.api.ask import Ask
from runtime.api.dialects.forms import (
    EFFORTS,
    FunctionTool,
    Items,
    RequestBody,
    Sampled,
    arguments_of,
    checked_model,
    choice_of,
    format_of,
    logprobs,
    new_id,
    read,
    usage,
)  # fmt: skip
from runtime.api.endpoint import Endpoint
from runtime.api.events import CallBegun, CallGrown, Event, Said, Thought
from runtime.api.refusal import wrong
from runtime.api.tools import checked
from runtime.serving.service import MOST_LOGPROBS

FINISH: dict[End, str] = {
    "stop": "stop", "string": "stop", "length": "length", "calls": "tool_calls", "failed": "error", "closed": "abort"
}  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


class _Tool(RequestBody):
    type: str
    function: FunctionTool


class _Options(RequestBody):
    include_usage: bool | None = None


class _Message(RequestBody):
    role: str
    content: str | Items[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Items[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ChatBody(Sampled):
    """A chat as OpenAI has it, with vLLM's additions."""

    messages: Items[_Message] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: _Options | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Items[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = Field(None, ge=0)


class ChatRequest:
    """A request to it."""

    def __init__(self, endpoint: Endpoint, raw: Any):
        """Raises `ApiRefusal`."""
        body = read(ChatBody, raw)
        self._endpoint, self._body = endpoint, body
        self.model = checked_model(endpoint.names, body.model)
        self.streams = bool(body.stream)
        self.ask = self._asked(body)
        self._id, self._created = new_id("chatcmpl-"), int(time.time())
        self._logprobs = bool(body.logprobs)

    def _asked(self, body: ChatBody) -> Ask:
        if body.top_logprobs is not None and not body.logprobs:
            raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
        if body.prompt_logprobs is not None:
            raise wrong("prompt_logprobs is not supported: leave it out", "prompt_logprobs", "unsupported_parameter")
        for at, tool in enumerate(body.tools or ()):
            if tool.type != "function":
                raise wrong(f"tools[{at}].type is function, not {tool.type[:40]!r}", f"tools[{at}].type")
        if body.reasoning_effort is not None and body.reasoning_effort not in EFFORTS:
            raise wrong(f"reasoning_effort is one of {', '.join(EFFORTS)}", "reasoning_effort")
        variables = dict(body.chat_template_kwargs or {})
        thinking = variables.pop("enable_thinking", None)
        if thinking is not None and not isinstance(thinking, bool):
            raise wrong("enable_thinking is true or false", "chat_template_kwargs.enable_thinking")
        if thinking is None and body.reasoning_effort == "none":
            thinking = False
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return Ask(
            drawn=body.drawn(max_tokens=most, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
            messages=[_message(each, f"messages[{at}]") for at, each in enumerate(body.messages)],
            tools=checked([tool.function.tool() for tool in body.tools or ()]),
            choice=choice_of(body.tool_choice, body.parallel_tool_calls),
            format=format_of(body.response_format, "response_format", nested=True),
            thinking=thinking,
            effort=None if body.reasoning_effort == "none" else body.reasoning_effort,
            budget=body.thinking_token_budget,
            variables=variables,
        )

    # --- answers ---

    def whole(self, answering: Answering) -> dict[str, Any]:
        choices = [self._choice(turn) for turn in answering.turns]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(answering)}

    def _choice(self, turn: OneAnswer) -> dict[str, Any]:
        thoughts = "".join(event.text for event in turn.events if isinstance(event, Thought))
        text = "".join(event.text for event in turn.events if isinstance(event, Said))
        calls = _calls(turn.events)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        if not text and (thoughts or calls):
            message["content"] = None
        return {
            "index": turn.index, "message": message, "finish_reason": FINISH[turn.end or "stop"],
            "logprobs": logprobs(self._endpoint.vocabulary, turn.shown) if self._logprobs else None,
        }  # fmt: skip

    async def stream(self, answering: Answering) -> AsyncGenerator[dict[str, Any] | str, None]:
        """Chunks, the last of them `[DONE]`."""
        begun: set[int] = set()
        calls = dict.fromkeys(range(len(answering.turns)), -1)
        wants_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        more = {"usage": None} if wants_usage else {}
        async for step in answering.steps():
            for choice in self._deltas(step, begun, calls):
                yield {**self._head("chat.completion.chunk"), "choices": [choice], **more}
            if (refusal := answering.turns[step.index].refusal) is not None:
                yield refusal.openai()
                break
        if wants_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answering)}
        yield "[DONE]"

    def _deltas(self, step: Told, begun: set[int], calls: dict[int, int]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for event in step.events:
            match event:
                case Thought(text):
                    deltas.append({"reasoning_content": text})
                case Said(text):
                    deltas.append({"content": text})
                case CallBegun(name):
                    calls[step.index] += 1
                    function = {"name": name, "arguments": ""}
                    call = {"index": calls[step.index], "id": new_id("call_"), "type": "function", "function": function}
                    deltas.append({"tool_calls": [call]})
                case CallGrown(json):
                    deltas.append({"tool_calls": [{"index": calls[step.index], "function": {"arguments": json}}]})
        failed = step.end in ("failed", "closed")
        if step.end and not failed or step.shown and not deltas:
            deltas.append({})
        found = [{"index": step.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if found and step.index not in begun:
            begun.add(step.index)
            found[0]["delta"] = {"role": "assistant", **({"content": ""} if not deltas[0] else {}), **deltas[0]}
        if found and self._logprobs and step.shown:
            at = next((i for i, each in enumerate(found) if "content" in each["delta"]), 0)
            found[at]["logprobs"] = logprobs(self._endpoint.vocabulary, step.shown)
        if step.end and not failed:
            found[-1]["finish_reason"] = FINISH[step.end]
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


def _calls(events: list[Event]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for event in events:
        match event:
            case CallBegun(name):
                function = {"name": name, "arguments": ""}
                found.append({"id": new_id("call_"), "type": "function", "function": function})
            case CallGrown(json):
                found[-1]["function"]["arguments"] += json
    return found


def _message(given: _Message, param: str) -> dict[str, Any]:
    """A message as templates have it. Raises `ApiRefusal`."""
    role = _ROLES.get(given.role)
    if role is None:
        raise wrong(f"{param}.role is one of {', '.join(_ROLES)}, not {given.role[:40]!r}", f"{param}.role")
    message: dict[str, Any] = {"role": role, "content": text_of(given.content, f"{param}.content")}
    if role != "assistant":
        return {**message, **({"tool_call_id": given.tool_call_id} if role == "tool" and given.tool_call_id else {})}
    thoughts = given.reasoning_content if given.reasoning_content is not None else given.reasoning
    if thoughts is not None:
        message["reasoning_content"] = thoughts
    calls = []
    for at, call in enumerate(given.tool_calls or ()):
        where = f"{param}.tool_calls[{at}].function"
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"{where}.name is missing", f"{where}.name")
        arguments = arguments_of(function.get("arguments"), f"{where}.arguments")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else message


def text_of(content: str | list[dict[str, Any]] | None, param: str) -> str:
    """The text of a message's parts. Raises `ApiRefusal` for parts that are none."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for at, part in enumerate(content):
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            kind = str(part.get("type"))[:40]
            raise wrong(f"{param}[{at}]: parts are text, not {kind!r}: this model has no other input", f"{param}[{at}]")
        texts.append(part["text"])
    return "".join(texts)
