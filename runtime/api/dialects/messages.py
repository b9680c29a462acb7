"""/v1/messages: Anthropic's form, which coding agents speak."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncGenerator
from typing import Any, Literal

from pydantic import Field

from foundation.reading import Unreadable, parse_json
from runtime.api.answer import Answering, OneAnswer
from runtime.api.ask import Ask, Drawn
from runtime.api.dialects.forms import EFFORTS, Items, RequestBody, checked_model, format_of, new_id, read, stops
from runtime.api.endpoint import Endpoint
from runtime.api.events import CallBegun, CallEnded, CallGrown, Event, Said, Thought
from runtime.api.refusal import wrong
from runtime.api.tools import Tool, ToolChoice, checked


class _Message(RequestBody):
    role: str
    content: str | Items[dict[str, Any]]


class _Tool(RequestBody):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class _Choice(RequestBody):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Thinking(RequestBody):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1)


class _Output(RequestBody):
    effort: str | None = None
    format: dict[str, Any] | None = None


class CountBody(RequestBody):
    """What is counted: all of a request but how it is answered."""

    messages: Items[_Message] = Field(min_length=1)
    model: str | None = None
    system: str | Items[dict[str, Any]] | None = None
    tools: Items[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None


class MessagesBody(CountBody):
    """As Anthropic has it, with what load tests need beside it: vLLM's `ignore_eos` and `min_tokens`, and a seed."""

    max_tokens: int = Field(ge=1)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    stop_sequences: Items[str] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    output_config: _Output | None = None


class MessagesRequest:
    """A request to it; counting: to count its tokens alone."""

    def __init__(self, endpoint: Endpoint, raw: Any, counting: bool = False):
        """Raises `ApiRefusal`."""
        body = read(CountBody if counting else MessagesBody, raw)
        self.model = checked_model(endpoint.names, body.model)
        drawn, output = Drawn(), _Output()
        self.streams = False
        if isinstance(body, MessagesBody):
            self.streams = bool(body.stream)
            drawn = Drawn(
                max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k,
                stops=stops(body.stop_sequences, "stop_sequences"), seed=body.seed,
                min_tokens=body.min_tokens or 0, ignore_eos=bool(body.ignore_eos),
            )  # fmt: skip
            output = body.output_config or output
            if output.effort is not None and output.effort not in EFFORTS:
                raise wrong(f"output_config.effort is one of {', '.join(EFFORTS)}", "output_config.effort")
        for at, tool in enumerate(body.tools or ()):
            if tool.type not in (None, "custom"):
                raise wrong(f"tools[{at}].type: {tool.type[:40]!r} is not run here", f"tools[{at}].type")
        tools = [Tool(t.name, t.input_schema or {}, t.description, bool(t.strict)) for t in body.tools or ()]
        thinks = body.thinking is not None and body.thinking.type != "disabled"
        self.ask = Ask(
            drawn=drawn,
            messages=_chat(body),
            tools=checked(tools),
            choice=_choice(body.tool_choice),
            format=format_of(output.format, "output_config.format", nested=False),
            thinking=thinks,
            effort=output.effort,
            budget=body.thinking.budget_tokens if body.thinking is not None and thinks else None,
        )
        self._id = new_id("msg_")

    def whole(self, answering: Answering) -> dict[str, Any]:
        (turn,) = answering.turns
        content: list[dict[str, Any]] = []
        for event in turn.events:
            match event:
                case Thought(text):
                    content.append({"type": "thinking", "thinking": text, "signature": _signature(text)})
                case Said(text):
                    content.append({"type": "text", "text": text})
                case CallBegun(name):
                    content.append({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}})
                case CallGrown(json):
                    content[-1]["input"] = _input(json)
        return {**self._message(content), **_ended(turn), "usage": _usage(turn)}

    async def stream(self, answering: Answering) -> AsyncGenerator[dict[str, Any] | str, None]:
        """Events; `type` names each."""
        (turn,) = answering.turns
        blocks = _Blocks()
        begun = False
        async for step in answering.steps():
            if not begun:
                begun = True
                start = {**self._message([]), "stop_reason": None, "stop_sequence": None, "usage": _usage(turn, 0)}
                yield {"type": "message_start", "message": start}
            for event in step.events:
                for told in blocks.put(event):
                    yield told
        for told in blocks.close():
            yield told
        if turn.refusal is not None:
            yield turn.refusal.anthropic()
            return
        yield {"type": "message_delta", "delta": _ended(turn), "usage": _usage(turn)}
        yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self.model, "content": content}


class _Blocks:
    """The blocks of a message, and the events that tell of them: one open at a time, each begun once."""

    def __init__(self) -> None:
        self._index, self._kind, self._thoughts = -1, "", ""

    def put(self, event: Event) -> list[dict[str, Any]]:
        match event:
            case Thought(text):
                found = self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._thoughts += text
                return [*found, self._delta({"type": "thinking_delta", "thinking": text})]
            case Said(text):
                found = self._enter("text", {"type": "text", "text": ""})
                return [*found, self._delta({"type": "text_delta", "text": text})]
            case CallBegun(name):
                block = {"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}}
                return self.close() + self._enter("tool_use", block)
            case CallGrown(json):
                return [self._delta({"type": "input_json_delta", "partial_json": json})]
            case CallEnded():
                return self.close()

    def close(self) -> list[dict[str, Any]]:
        if not self._kind:
            return []
        found = []
        if self._kind == "thinking":
            found.append(self._delta({"type": "signature_delta", "signature": _signature(self._thoughts)}))
        self._kind, self._thoughts = "", ""
        return [*found, {"type": "content_block_stop", "index": self._index}]

    def _enter(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        if self._kind == kind:
            return []
        found = self.close()
        self._index, self._kind = self._index + 1, kind
        return [*found, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _ended(turn: OneAnswer) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "calls": "tool_use", "string": "stop_sequence"}
    return {"stop_reason": reasons.get(turn.end or "", "end_turn"), "stop_sequence": turn.reader.stopped_by}


def _usage(turn: OneAnswer, output_tokens: int | None = None) -> dict[str, Any]:
    """Input tokens are those that were not found in the cache."""
    return {
        "input_tokens": turn.prompt_tokens - turn.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": turn.cached_tokens,
        "output_tokens": turn.completion_tokens if output_tokens is None else output_tokens,
    }


def _signature(thoughts: str) -> str:
    """Clients send thoughts back only with one: a hash of them, which nobody checks."""
    return base64.b64encode(hashlib.sha256(thoughts.encode()).digest()).decode()


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; none where it was cut."""
    try:
        found = parse_json(arguments or "{}")
    except Unreadable:
        return {}
    return found if isinstance(found, dict) else {}


def _choice(given: _Choice | None) -> ToolChoice:
    if given is None:
        return ToolChoice()
    parallel = not given.disable_parallel_tool_use
    match given.type:
        case "auto":
            return ToolChoice("auto", None, parallel)
        case "any":
            return ToolChoice("required", None, parallel)
        case "none":
            return ToolChoice("none")
        case "tool" if given.name:
            return ToolChoice("required", given.name, parallel=False)
    raise wrong("tool_choice.type is auto, any, none, or tool with a name", "tool_choice")


def _chat(body: CountBody) -> list[dict[str, Any]]:
    """The messages as templates have them. Raises `ApiRefusal`."""
    found: list[dict[str, Any]] = []
    if body.system:
        found.append({"role": "system", "content": _text(body.system, "system")})
    for at, message in enumerate(body.messages):
        param = f"messages[{at}].content"
        if message.role == "assistant":
            found.append(_assistant(message.content, param))
        elif message.role == "system":
            found.append({"role": "system", "content": _text(message.content, param)})
        else:  # whatever an agent calls itself
            found += _user(message.content, param)
    return found


def _assistant(content: str | list[dict[str, Any]], param: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = [], [], []
    for at, block in enumerate(content):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "name": str(name), "input": dict(given)}:
                calls.append({"type": "function", "function": {"name": name, "arguments": given}})
            case _:
                raise wrong(f"{param}[{at}]: an assistant's block is text, thinking or tool_use", f"{param}[{at}]")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return {**message, "tool_calls": calls} if calls else message


def _user(content: str | list[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    found: list[dict[str, Any]] = []
    for at, block in enumerate(content):
        match block:
            case {"type": "text", "text": str(text)}:
                if found and found[-1]["role"] == "user":
                    found[-1]["content"] += text
                else:
                    found.append({"role": "user", "content": text})
            case {"type": "tool_result"}:
                given = block.get("content") or ""
                found.append({"role": "tool", "content": _text(given, f"{param}[{at}].content")})
            case _:
                kind = str(block.get("type"))[:40]
                raise wrong(f"{param}[{at}]: {kind!r} is not taken: this model reads text", f"{param}[{at}]")
    return found or [{"role": "user", "content": ""}]


def _text(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for at, block in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise wrong(f"{param}[{at}]: blocks here are text: this model reads nothing else", f"{param}[{at}]")
        texts.append(block["text"])
    return "".join(texts)
