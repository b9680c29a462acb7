"""/v1/responses, without what would have to be kept: each request brings its whole history."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import Field

from runtime.api.answer import Answering, OneAnswer, Told
from runtime.api.ask import Ask
from runtime.api.dialects.chat import text_of
from runtime.api.dialects.forms import (
    EFFORTS,
    FunctionTool,
    Items,
    Sampled,
    arguments_of,
    checked_model,
    choice_of,
    format_of,
    logprobs,
    new_id,
    read,
)  # fmt: skip
from runtime.api.endpoint import Endpoint
from runtime.api.events import CallBegun, CallEnded, CallGrown, Said, Thought
from runtime.api.refusal import wrong
from runtime.api.tools import Tool, checked
from runtime.serving.service import MOST_LOGPROBS

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _FlatTool(FunctionTool):
    type: str
    name: str | None = None  # type: ignore[assignment]


class ResponsesBody(Sampled):
    """As OpenAI has it."""

    input: str | Items[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: Items[_FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: Items[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = Field(None, ge=0)


class ResponsesRequest:
    """A request to it."""

    def __init__(self, endpoint: Endpoint, raw: Any):
        """Raises `ApiRefusal`."""
        body = read(ResponsesBody, raw)
        self._endpoint, self._body = endpoint, body
        self.model = checked_model(endpoint.names, body.model)
        self.streams = bool(body.stream)
        self._logprobs = "message.output_text.logprobs" in (body.include or ()) or body.top_logprobs is not None
        self.ask = self._asked(body)
        self._id, self._created = new_id("resp_"), int(time.time())

    def _asked(self, body: ResponsesBody) -> Ask:
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(body, name):
                raise wrong(f"{name}: nothing is kept here; send the whole input", name, "unsupported_parameter")
        if body.n not in (None, 1):
            raise wrong("a response is one answer: leave n out", "n")
        tools = []
        for at, tool in enumerate(body.tools or ()):
            if tool.type != "function" or not tool.name:
                raise wrong(f"tools[{at}]: a function with a name; other tools are not run here", f"tools[{at}].type")
            tools.append(Tool(tool.name, tool.parameters or {}, tool.description, bool(tool.strict)))
        variables = dict(body.chat_template_kwargs or {})
        effort = (body.reasoning or {}).get("effort")
        if effort is not None and effort not in EFFORTS:
            raise wrong(f"reasoning.effort is one of {', '.join(EFFORTS)}", "reasoning.effort")
        thinking = variables.pop("enable_thinking", False if effort == "none" else None)
        if thinking is not None and not isinstance(thinking, bool):
            raise wrong("enable_thinking is true or false", "chat_template_kwargs.enable_thinking")
        format = (body.text or {}).get("format")
        if format is not None and not isinstance(format, dict):
            raise wrong("text.format is an object", "text.format")
        return Ask(
            drawn=body.drawn(
                max_tokens=body.max_output_tokens, logprobs=(body.top_logprobs or 0) if self._logprobs else None
            ),
            messages=_messages(body),
            tools=checked(tools),
            choice=choice_of(body.tool_choice, body.parallel_tool_calls),
            format=format_of(format, "text.format", nested=False),
            thinking=thinking,
            effort=None if effort == "none" else effort,
            budget=body.thinking_token_budget,
            variables=variables,
            param="input",
        )

    # --- answers ---

    def whole(self, answering: Answering) -> dict[str, Any]:
        (turn,) = answering.turns
        items = _Items(self._endpoint, self._logprobs)
        items.put(Told(0, turn.events, turn.shown))
        items.close(turn.end == "length")
        return self._response(turn, answering, items.done)

    async def stream(self, answering: Answering) -> AsyncGenerator[dict[str, Any] | str, None]:
        """Events, numbered; `type` names each."""
        numbers = itertools.count()
        items = _Items(self._endpoint, self._logprobs)
        (turn,) = answering.turns

        def event(kind: str, **more: Any) -> dict[str, Any]:
            return {"type": kind, "sequence_number": next(numbers), **more}

        begun = False
        async for step in answering.steps():
            if not begun:
                begun, empty = True, self._response(None, answering, [])
                yield event("response.created", response=empty)
                yield event("response.in_progress", response=empty)
            for kind, more in items.put(step):
                yield event(kind, **more)
        for kind, more in items.close(turn.end == "length"):
            yield event(kind, **more)
        if turn.refusal is not None:
            yield event("response.failed", response=self._response(turn, answering, items.done))
        else:
            kind = "response.incomplete" if turn.end == "length" else "response.completed"
            yield event(kind, response=self._response(turn, answering, items.done))

    def _response(self, turn: OneAnswer | None, answering: Answering, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, asked = self._body, self.ask
        status, error, why = "in_progress", None, None
        if turn is not None and turn.refusal is not None:
            code = "invalid_prompt" if turn.refusal.status == 400 else "server_error"
            status, error = "failed", {"code": code, "message": turn.refusal.message}
        elif turn is not None:
            status = "incomplete" if turn.end == "length" else "completed"
            why = {"reason": "max_output_tokens"} if turn.end == "length" else None
        usage = None if turn is None else {
            "input_tokens": answering.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answering.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answering.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": answering.reasoning_tokens},
            "total_tokens": answering.prompt_tokens + answering.completion_tokens,
        }  # fmt: skip
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": error,
            "incomplete_details": why, "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "model": self.model, "output": output, "parallel_tool_calls": asked.choice.parallel,
            "previous_response_id": None, "reasoning": {"effort": asked.effort, "summary": None}, "store": False,
            "temperature": body.temperature, "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [
                {
                    "type": "function", "name": tool.name, "description": tool.description,
                    "parameters": dict(tool.parameters), "strict": tool.strict,
                }
                for tool in asked.tools.values()
            ],
            "top_p": body.top_p, "truncation": "disabled", "usage": usage, "metadata": body.metadata or {},
        }  # fmt: skip


class _Items:
    """The items of an output, and the events that tell of them: one open at a time."""

    def __init__(self, endpoint: Endpoint, logprobs: bool):
        self._endpoint, self._logprobs = endpoint, logprobs
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._shown: list[Any] = []

    def put(self, step: Told) -> list[tuple[str, dict[str, Any]]]:
        found: list[tuple[str, dict[str, Any]]] = []
        shown = list(step.shown)
        for event in step.events:
            match event:
                case Thought(text):
                    found += self._enter("reasoning")
                    found.append(self._delta("response.reasoning_text.delta", text, content_index=0))
                case Said(text):
                    found += self._enter("message")
                    more, shown = self._logprobs_of(shown), []
                    found.append(self._delta("response.output_text.delta", text, content_index=0, logprobs=more))
                case CallBegun(name):
                    found += self._enter("function_call", name)
                case CallGrown(json_text):
                    found.append(self._delta("response.function_call_arguments.delta", json_text))
                case CallEnded():
                    found += self.close(False)
        return found

    def _enter(self, kind: str, name: str = "") -> list[tuple[str, dict[str, Any]]]:
        if self._open is not None and self._open["type"] == kind and kind != "function_call":
            return []
        found = self.close(False)
        self._text, self._shown = "", []
        match kind:
            case "reasoning":
                item: dict[str, Any] = {"id": new_id("rs_"), "type": kind, "summary": [], "content": []}
            case "message":
                item = {"id": new_id("msg_"), "type": kind, "role": "assistant", "content": []}
            case _:
                item = {"id": new_id("fc_"), "type": kind, "call_id": new_id("call_"), "name": name, "arguments": ""}
        self._open = {**item, "status": "in_progress"}
        found.append(("response.output_item.added", {"output_index": len(self.done), "item": self._open}))
        if kind != "function_call":
            found.append(("response.content_part.added", {**self._where(), "content_index": 0, "part": self._part("")}))
        return found

    def close(self, cut: bool) -> list[tuple[str, dict[str, Any]]]:
        """The open item ends."""
        if self._open is None:
            return []
        item, where = self._open, self._where()
        found: list[tuple[str, dict[str, Any]]] = []
        item = {**item, "status": "incomplete" if cut else "completed"}
        if item["type"] == "function_call":
            item["arguments"] = self._text
            more = {"name": item["name"], "arguments": self._text}
            found.append(("response.function_call_arguments.done", {**where, **more}))
        else:
            part = self._part(self._text)
            item["content"] = [part]
            kind = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            found.append((kind, {**where, "content_index": 0, "text": self._text, **more}))
            found.append(("response.content_part.done", {**where, "content_index": 0, "part": part}))
        found.append(("response.output_item.done", {"output_index": len(self.done), "item": item}))
        self.done.append(item)
        self._open = None
        return found

    def _delta(self, kind: str, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
        self._text += text
        return kind, {**self._where(), **more, "delta": text}

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._shown)}

    def _logprobs_of(self, shown: list[Any]) -> list[dict[str, Any]]:
        if not self._logprobs or not shown:
            return []
        found = logprobs(self._endpoint.vocabulary, shown)["content"]
        self._shown += found
        return found


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """The input as a chat. Raises `ApiRefusal`."""
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for at, item in enumerate(body.input):
        param = f"input[{at}]"
        match item.get("type", "message"):
            case "message":
                found.append(_spoken(item, param))
            case "reasoning":
                content = item.get("content") or []
                if not isinstance(content, list):
                    raise wrong(f"{param}.content is parts of text", f"{param}.content")
                texts = [part.get("text") for part in content if isinstance(part, dict)]
                _last_turn(found)["reasoning_content"] = "".join(text for text in texts if isinstance(text, str))
            case "function_call":
                if not isinstance(item.get("name"), str):
                    raise wrong(f"{param}.name is missing", f"{param}.name")
                arguments = arguments_of(item.get("arguments"), f"{param}.arguments")
                call = {"type": "function", "function": {"name": item["name"], "arguments": arguments}}
                _last_turn(found).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item.get("output")
                if not isinstance(output, str | list):
                    raise wrong(f"{param}.output is text", f"{param}.output")
                text = text_of(output, f"{param}.output") if _parts(output) else json.dumps(output)
                found.append({"role": "tool", "content": text})
            case other:
                raise wrong(f"{param}.type: {str(other)[:40]!r} is not taken", f"{param}.type")
    return found


def _parts(output: Any) -> bool:
    return isinstance(output, str) or all(isinstance(part, dict) for part in output)


def _spoken(item: dict[str, Any], param: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{param}.role is one of {', '.join(_ROLES)}", f"{param}.role")
    if not isinstance(content, str) and not (isinstance(content, list) and _parts(content)):
        raise wrong(f"{param}.content is text, or parts of it", f"{param}.content")
    return {"role": _ROLES[role], "content": text_of(content, f"{param}.content")}


def _last_turn(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that an item belongs to: the last, or a new one."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]
