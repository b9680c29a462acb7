"""Damaged requests to the HTTP API, and the application that answers them: with the real tokenizer, template, grammars
and scheduler, and a model that says anything."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
import os
import re
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np

from foundation.errors import Failure
from tests.fuzz.kind import CHECKPOINT, Kind
from tests.fuzz.mutations import Raw, encoded, mutated_bytes, mutated_json, nested, text_of

MODEL, VOCAB = "tiny-glm5", 1024
POSITIONS = 1 << 16  # so that large schemas get as far as a grammar
_MOST_TOKENS = 256  # of an answer
_PAGE, _SLOTS = 16, 8
_MOST_SAID = 2000  # characters of a refusal
_WORDS = (
    "city",
    "days",
    "a",
    "",
    "x/y",
    "Ünï",
    "\U0001f996",
    "a b",
    "__proto__",
    "$ref",
    "</arg_key>",
    "<|user|>",
    "\n",
)
_PATTERNS = (
    "^[a-z]+$", "(a+)+$", "(a|aa)*b", "[", "(?<=x)y", "^\\d{4}-\\d{2}$", "\\p{L}+", "(?i)x", "a{1000000}",
    "(.{1,999}){1,99}",
    "\\1(a)", "$^", "/", "\\", "^(?!x)", "\u0000", "[^\\u0000-\\uffff]",
)  # fmt: skip
_BOUNDS = (0, 1, 3, 100, 10**6, 2**31, 2**63, 10**30, -1, 0.5, 1e308, "1", None)


def schema(rng: Random, depth: int = 3) -> Any:
    """A JSON Schema, or what somebody takes for one."""
    inner = functools.partial(schema, rng, depth - 1)
    names = [rng.choice(_WORDS) for _ in range(rng.choice((0, 1, 2, 3, 12)))]
    match rng.randrange(14 if depth > 0 else 6):
        case 0:
            return {"type": "string", rng.choice(("minLength", "maxLength")): rng.choice(_BOUNDS)}
        case 1:
            return {"type": rng.choice(("string", ["string", "null"])), "pattern": rng.choice(_PATTERNS)}
        case 2:
            bound = rng.choice(("minimum", "maximum", "exclusiveMinimum", "multipleOf"))
            return {"type": rng.choice(("integer", "number")), bound: rng.choice(_BOUNDS)}
        case 3:
            return {rng.choice(("enum", "const")): [*names, 1, None, 0.1, {"a": [1]}, 10**20, True]}
        case 4:
            return {"$ref": rng.choice(("#", "#/$defs/a", "#/$defs/~0~1", "http://x/y", "", "#/properties/a", 5, "#a"))}
        case 5:
            return rng.choice(
                (True, False, None, {}, [], "string", 5, {"type": "any"}, {"type": []}, {"type": {}}, {"not": {}},
                 {"format": "date-time", "type": "string"}, {"type": "string", "format": ["x"]},
                 {"x-guidance": {"a": 1}},
                 {"type": "string", "enum": []}, {"enum": {}}, {"type": ["integer", 5, None]})
            )  # fmt: skip
        case 6 | 7 | 8 | 9:
            made: dict[str, Any] = {"type": "object", "properties": {name: inner() for name in names}}
            if rng.random() < 0.5:
                made["required"] = rng.choice((names, names * 2, [5], "a", ["not there"], [[]], None))
            if rng.random() < 0.4:
                made["additionalProperties"] = rng.choice((False, True, inner()))
            return made
        case 10:
            word = rng.choice(("minItems", "maxItems", "uniqueItems", "prefixItems", "contains"))
            return {"type": "array", "items": inner(), word: rng.choice((*_BOUNDS, [inner()]))}
        case 11:
            return {rng.choice(("anyOf", "oneOf", "allOf")): [inner() for _ in range(rng.choice((0, 1, 2, 3, 40)))]}
        case 12:
            return {"$defs": {"a": inner(), "~/": inner()}, **_object(inner()), "$ref": "#/$defs/a"}
        case _:
            word = rng.choice(("if", "not", "patternProperties", "propertyNames", "dependentRequired", "minProperties"))
            return {"type": "object", word: rng.choice((inner(), {"a": inner()}, 2))}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _deep(rng: Random, levels: int) -> Any:
    """A schema in a schema in a schema."""
    made: Any = {"type": "string"}
    for _ in range(levels):
        made = rng.choice(
            ({"type": "array", "items": made}, {"anyOf": [made, {"type": "null"}]}, {"allOf": [made]},
             {"type": "object", "properties": {"a": made}, "required": ["a"]})
        )  # fmt: skip
    return made


def _any_schema(rng: Random) -> Any:
    return _deep(rng, rng.choice((5, 20, 40, 90))) if rng.random() < 0.1 else schema(rng)


def _parameters(rng: Random) -> Any:
    made = _any_schema(rng)
    if rng.random() < 0.6:  # such as get beyond the form
        return {"type": "object", "properties": {rng.choice(_WORDS): made, "b": schema(rng)}}
    return made


def _names(rng: Random, count: int) -> list[str]:
    odd = rng.choice(("a b", "ä", "", "x" * 200, "f0", "-", "f\n", "a/b", "\u202ef"))
    return [odd if rng.random() < 0.04 else f"f{at}" for at in range(count)]


def _functions(rng: Random) -> list[dict[str, Any]]:
    names = _names(rng, rng.choice((0, 1, 1, 2, 3, 30)))
    return [
        {"name": name, "description": rng.choice((None, "what it does", "<|user|>")), "parameters": _parameters(rng),
         "strict": rng.random() < 0.2}
        for name in names
    ]  # fmt: skip


def _sampled(rng: Random) -> dict[str, Any]:
    every: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "stop": ["STOP", "\n\n"],
        "stop_token_ids": [5, 900], "logit_bias": {"5": 1.5, "900": -100}, "min_tokens": 2, "ignore_eos": False, "n": 2,
        "presence_penalty": 0, "repetition_penalty": 1.0, "model": MODEL, "stream": rng.random() < 0.3,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return _some(rng, every)


def _some(rng: Random, fields: dict[str, Any]) -> dict[str, Any]:
    share = rng.choice((0.1, 0.3, 0.8))
    return {name: value for name, value in fields.items() if rng.random() < share}


def _format(rng: Random) -> dict[str, Any]:
    named = {"name": "x", "schema": _any_schema(rng), "strict": True}
    return rng.choice(({"type": "json_schema", "json_schema": named}, {"type": "json_object"}, {"type": "text"}))


def _chat(rng: Random) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "f0", "arguments": '{"a": [1, {"b": null}]}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short.", "name": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " there \U0001f996"}]},
        {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "21 °C"},
        {"role": "user", "content": "and <think> now?"},
    ]
    tools = [{"type": "function", "function": each} for each in _functions(rng)]
    choice = rng.choice(("auto", "none", "required", {"type": "function", "function": {"name": "f0"}}))
    every = {
        "tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "response_format": _format(rng),
        "logprobs": True, "top_logprobs": 3, "reasoning_effort": "low", "thinking_token_budget": 4,
        "chat_template_kwargs": {"enable_thinking": False, "clear_thinking": True, "reasoning_effort": "high"},
        "max_completion_tokens": 20,
    }  # fmt: skip
    held = messages if rng.random() < 0.5 else [messages[4]]
    return {"messages": held, "max_tokens": 24, **_sampled(rng), **_some(rng, every)}


def _completion(rng: Random) -> dict[str, Any]:
    prompt = rng.choice(("hello <|user|>", ["a", "b \U0001f996"], [5, 6, 7], [[5], [900, 8]]))
    every = {"logprobs": 3, "echo": True, "best_of": 1, "suffix": "", "response_format": _format(rng)}
    return {"prompt": prompt, "max_tokens": 24, **_sampled(rng), **_some(rng, every)}


def _responses(rng: Random) -> dict[str, Any]:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be short."}]},
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "function_call", "call_id": "c1", "name": "f0", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "21"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is."}]},
    ]
    tools = [{"type": "function", **each} for each in _functions(rng)]
    form: dict[str, Any] = {"type": "json_schema", "name": "x", "schema": _any_schema(rng)}
    every = {
        "instructions": "Be kind.", "tools": tools, "parallel_tool_calls": True, "top_logprobs": 2,
        "tool_choice": rng.choice(("auto", {"type": "function", "name": "f0"})),
        "text": {"format": form, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"}, "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"}, "previous_response_id": None, "background": False, "thinking_token_budget": 4,
        "chat_template_kwargs": {"enable_thinking": True}, "n": 1,
    }  # fmt: skip
    given = items if rng.random() < 0.6 else rng.choice(("hi", [items[1]]))
    return {"max_output_tokens": 24, **_sampled(rng), "input": given, "n": 1, **_some(rng, every)}


def _messages(rng: Random) -> dict[str, Any]:
    blocks = [
        {"type": "thinking", "thinking": "so", "signature": "x"}, {"type": "text", "text": "I ask."},
        {"type": "tool_use", "id": "t1", "name": "f0", "input": {"a": [1, {"b": None}]}},
    ]  # fmt: skip
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21"}]}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}}]},
    ]
    tools = [
        {"name": each["name"], "input_schema": each["parameters"], "description": "x", "strict": each["strict"]}
        for each in _functions(rng)
    ]
    every = {
        "system": [{"type": "text", "text": "Be short."}], "tools": tools, "stop_sequences": ["STOP"],
        "tool_choice": {"type": rng.choice(("auto", "any", "tool", "none")), "name": "f0"}, "temperature": 0.5,
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "top_p": 0.9, "top_k": 5, "stream": rng.random() < 0.4,
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": _any_schema(rng)}},
        "model": MODEL, "metadata": {"user_id": "u"},
    }  # fmt: skip
    return {"messages": messages, "max_tokens": 24, **_some(rng, every)}


def _tokenize(rng: Random) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": [], "chat_template_kwargs": {"a": 1}}
    given = rng.choice(({"prompt": "hello <|user|>", "add_special_tokens": False}, chat))
    return {**given, "model": MODEL, "return_token_strs": True}


def _detokenize(rng: Random) -> dict[str, Any]:
    return {"model": MODEL, "tokens": [5, 900, 1023, 0]}


_ROUTES = {
    "/v1/chat/completions": (_chat, 4), "/v1/completions": (_completion, 2), "/v1/responses": (_responses, 4),
    "/v1/messages": (_messages, 4), "/v1/messages/count_tokens": (_messages, 1), "/tokenize": (_tokenize, 1),
    "/detokenize": (_detokenize, 1),
}  # fmt: skip
_VARIABLES = (
    "chat_template", "tools", "messages", "self", "context", "caller", "loop", "range", "documents", "template", "0",
    "", "add_generation_prompt", "contexts", "enable_thinking", "raise_exception", "tokenizer", "chats", "variables",
)  # fmt: skip


def _swollen(rng: Random, body: Any) -> Any:
    """With one list of very many."""
    lists = [name for name, value in body.items() if isinstance(value, list)]
    if lists:
        each = rng.choice(
            (Raw("{}"), Raw("null"), Raw("5"), Raw('""'), Raw("[5]"), Raw('{"role":"user","content":"a"}'))
        )
        body[rng.choice(lists)] = Raw("[" + ",".join([each] * rng.choice((1000, 200_000))) + "]")
    return body


def _request(rng: Random) -> bytes:
    """The route on a line, and the body behind it."""
    (path,) = rng.choices(list(_ROUTES), [weight for _, weight in _ROUTES.values()])
    body: Any = _ROUTES[path][0](rng)
    if rng.random() < 0.1:
        value = rng.choice(("default", 5, [], {}, None, ["a"], "x" * 1000, Raw('"\\ud800"'), nested(90)))
        body["chat_template_kwargs"] = {rng.choice(_VARIABLES): value}
    if rng.random() < 0.02:
        body = _swollen(rng, body)
    kind = rng.random()
    if kind < 0.15:
        return encoded(path) + b"\n" + mutated_bytes(rng, encoded(text_of(body)))
    return encoded(path) + b"\n" + encoded(text_of(body if kind < 0.4 else mutated_json(rng, body)))


# --- who answers


class _Model:
    """Says anything, and soon that it has ended."""

    name = "a model that says anything"

    def __init__(self, ends: int) -> None:
        from runtime.serving.executor import Abilities

        self.can = Abilities(_SLOTS * POSITIONS // _PAGE, _PAGE)
        self._rng, self._ends = np.random.default_rng(0), ends

    def step(self, prompts: Any, answers: Any, every: bool) -> Any:
        return [[[self._logits() for _ in row] for row in each] for each in (prompts, answers)]

    def _logits(self) -> np.ndarray:
        found = self._rng.standard_normal((1, VOCAB)).astype(np.float32) * 2
        found[0, self._ends] += 5
        return found

    def reset(self) -> None: ...


def _service(model: _Model) -> Any:
    """Ends each answer soon, whatever a request asks for."""
    from runtime.serving.clock import Virtual
    from runtime.serving.deployment import Deployment
    from runtime.serving.live import LiveService, ModelLimits
    from runtime.serving.worker import ModelWorker
    from tests.serving.helpers import plain_engine
    from tests.serving.pricers import LinearPricer

    class Short(LiveService):
        def submit(self, jobs: Any, deliver: Any, asked_s: float = 0.0) -> list[int]:
            short = [dataclasses.replace(job, max_tokens=min(job.max_tokens, _MOST_TOKENS)) for job in jobs]
            return super().submit(short, deliver, asked_s)

    engine = plain_engine(page_tokens=_PAGE, max_running_requests=_SLOTS)
    deployment = Deployment(engine, LinearPricer(), _SLOTS * POSITIONS)
    return Short(deployment, lambda role, *held: ModelWorker(model, *held), Virtual(), ModelLimits(VOCAB, POSITIONS))


class _Log(logging.Handler):
    """What is logged with a traceback, wherever it happened: a fault that no client sees."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.error = record.exc_info[1]


@functools.cache
def _application(process: int) -> tuple[Any, asyncio.Runner, _Log]:
    """One a process: threads do not go along with a fork. And one event loop, as a server has it."""
    from runtime.api.app import made
    from runtime.api.endpoint import Endpoint
    from runtime.api.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(CHECKPOINT, VOCAB)
    endpoint = Endpoint((MODEL, "alias"), vocabulary, POSITIONS)
    endpoint.serve(_service(_Model(min(vocabulary.stop_ids))))
    log, loop = _Log(), asyncio.Runner()
    logging.getLogger().addHandler(log)
    loop.get_loop().set_exception_handler(_lost)
    return made(endpoint), loop, log


def _asked(folder: Path) -> None:
    """Answered, or refused in the form that the route's clients know."""
    path, _, body = (folder / "request.txt").read_bytes().partition(b"\n")
    app, loop, log = _application(os.getpid())
    log.error = None
    status, headers, answer = loop.run(_post(app, path.decode(), body))
    if log.error is not None:
        raise log.error
    assert status < 500, f"status {status}: {answer[:300]!r}"
    if status != 200:
        _refused(path.startswith(b"/v1/messages"), _json(answer))
    if headers["content-type"].startswith("text/event-stream"):
        for line in re.split("\r\n|\r|\n", answer.decode()):
            if line.startswith("data: ") and line != "data: [DONE]":
                _no_fault(_json(line[6:]))
    else:
        _json(answer)


async def _post(app: Any, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """As a server calls it. (An HTTP client takes longer to import than these cases take.)"""
    asked, ended = iter([{"type": "http.request", "body": body, "more_body": False}]), asyncio.Event()
    status, headers, answer = 0, {}, bytearray()

    async def receive() -> dict[str, Any]:
        if (message := next(asked, None)) is not None:
            return message
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update({name.decode(): value.decode() for name, value in message["headers"]})
        else:
            answer.extend(message.get("body", b""))
            if not message.get("more_body", False):
                ended.set()

    given = {"host": "here", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "server": ("here", 80),
        "client": ("127.0.0.1", 1), "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    return status, headers, bytes(answer)


def _lost(loop: Any, context: dict[str, Any]) -> None:
    """An exception that nobody awaited."""
    logging.getLogger().error(
        context["message"], exc_info=context.get("exception") or AssertionError(context["message"])
    )


def _json(text: bytes | str) -> Any:
    """Of a text that every client can parse."""

    def none(name: str) -> NoReturn:
        raise AssertionError(f"{name} in an answer")

    return json.loads(text, parse_constant=none)


def _refused(anthropic: bool, body: Any) -> NoReturn:
    error = body["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str), body
    if anthropic:
        assert body["type"] == "error" and error.keys() == {"type", "message"}, body
    else:
        assert error.keys() == {"message", "type", "param", "code"}, body
    assert len(error["message"]) <= _MOST_SAID, f"{len(error['message'])} characters of refusal"
    raise Failure(error["message"])


def _no_fault(event: dict[str, Any]) -> None:
    """Errors within a stream are the request's own."""
    error = event.get("error") or event.get("response", {}).get("error")
    if error:
        assert error.get("code") != "server_error" and error.get("type") not in ("server_error", "api_error"), event


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    return {"request": Kind("request.txt", _request, _asked, named=False)}
