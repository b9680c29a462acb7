"""Answers and events are of the SDKs' own types, whose clients take what comes without looking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "Is it raining in Paris?"}]
GREEDY = {"model": "tiny-glm5", "temperature": 0}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
FLAT_TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
NAMED_TOOL = {"name": "weather", "input_schema": SCHEMA}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}

ASKED: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": HELLO, "max_tokens": 40}),
    ("chat/completions", {"messages": HELLO, "max_tokens": 40, "n": 2, "logprobs": True, "top_logprobs": 2, **OFF}),
    ("chat/completions", {"messages": HELLO, "max_tokens": 60, "tools": [CHAT_TOOL], "tool_choice": "required"}),
    ("completions", {"prompt": "The quick fox", "max_tokens": 8, "logprobs": 2}),
    ("responses", {"input": "Is it raining?", "max_output_tokens": 60}),
    ("responses", {"input": "Is it raining?", "max_output_tokens": 60, "reasoning": {"effort": "none"}}),
    (
        "responses",
        {"input": "Is it raining?", "max_output_tokens": 60, "tools": [FLAT_TOOL], "tool_choice": "required"},
    ),
    (
        "responses",
        {
            "input": "Is it raining?",
            "max_output_tokens": 60,
            "reasoning": {"effort": "none"},
            "text": {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}},
        },
    ),
    ("messages", {"messages": HELLO, "max_tokens": 40}),
    ("messages", {"messages": HELLO, "max_tokens": 1100, "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("messages", {"messages": HELLO, "max_tokens": 60, "tools": [NAMED_TOOL], "tool_choice": {"type": "any"}}),
]


@pytest.mark.parametrize(("route", "body"), ASKED)
def test_a_whole_answer_and_each_event_are_of_the_sdks_types(server: str, route: str, body: dict[str, Any]) -> None:
    whole, event = _types(route)
    with httpx.Client(base_url=f"{server}/v1", headers={"x-api-key": "secret"}, timeout=120) as client:
        answered = client.post(f"/{route}", json={**GREEDY, **body})
        assert answered.status_code == 200, answered.text
        whole.validate_python(answered.json())
        more = {"stream_options": {"include_usage": True}} if "completions" in route else {}
        with client.stream("POST", f"/{route}", json={**GREEDY, **body, **more, "stream": True}) as response:
            found = list(_events(response))
    assert found
    for each in found:
        event.validate_python(each)


def _types(route: str) -> tuple[Any, Any]:
    """Of whole answers, and of events. Discriminated unions say what is missing in the one that is meant."""
    pydantic = pytest.importorskip("pydantic")
    if route == "messages":
        types = pytest.importorskip("anthropic").types
        pair = types.Message, types.RawMessageStreamEvent
    else:
        types = pytest.importorskip("openai").types
        pair = {
            "chat/completions": (types.chat.ChatCompletion, types.chat.ChatCompletionChunk),
            "completions": (types.Completion, types.Completion),
            "responses": (types.responses.Response, types.responses.ResponseStreamEvent),
        }[route]
    return pydantic.TypeAdapter(pair[0]), pydantic.TypeAdapter(pair[1])


def _events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line[6:])
            for choice in event.get("choices", ()) if event.get("object") == "text_completion" else ():
                choice["finish_reason"] = choice["finish_reason"] or "stop"  # the type is of whole answers
            if event.get("type") != "ping":  # of Anthropic's form, and no type of the SDK's
                yield event
