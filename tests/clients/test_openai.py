"""The openai SDK: what it assembles of streams is what it gets whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

openai = pytest.importorskip("openai")

MODEL = "tiny-glm5"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 60}
HELLO = [{"role": "user", "content": "Is it raining in Paris?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": True}}]


@pytest.fixture
def client(server: str) -> Any:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_a_chat(client: Any) -> None:
    whole = client.chat.completions.create(messages=HELLO, **GREEDY)
    content = reasoning = ""
    usage = None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(messages=HELLO, stream=True, stream_options=options, **GREEDY):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    message = whole.choices[0].message
    assert content == (message.content or "") and reasoning == (getattr(message, "reasoning_content", None) or "")
    assert usage.completion_tokens == whole.usage.completion_tokens > 0
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_calls(client: Any) -> None:
    given: dict[str, Any] = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", **GREEDY}
    whole = client.chat.completions.create(**given).choices[0]
    with client.chat.completions.stream(**given) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    for choice in (whole, streamed):
        arguments = json.loads(choice.message.tool_calls[0].function.arguments)
        assert arguments["city"] in ("Paris", "Rome") and arguments["days"] <= 9
    call = whole.message.tool_calls[0]
    turn = [
        *HELLO,
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert client.chat.completions.create(messages=turn, tools=TOOLS, **GREEDY).choices[0].finish_reason


def test_json_of_a_schema(client: Any) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    answer = client.chat.completions.create(
        messages=HELLO, response_format=format, extra_body={"thinking_token_budget": 20}, **GREEDY
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "days"}


def test_responses(client: Any) -> None:
    flat = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}]
    given = {"model": MODEL, "input": "Is it raining?", "tools": flat, "tool_choice": "required", "temperature": 0}
    whole = client.responses.create(max_output_tokens=60, **given)
    with client.responses.stream(max_output_tokens=60, **given) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        assert response.status == "completed" and response.usage.output_tokens > 0
        (call,) = [item for item in response.output if item.type == "function_call"]
        assert set(json.loads(call.arguments)) == {"city", "days"}
    text = client.responses.create(model=MODEL, input="Hello", max_output_tokens=5)
    assert text.status in ("completed", "incomplete")


def test_completions_and_models(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt="The quick fox", max_tokens=5, temperature=0, logprobs=2)
    assert answer.choices[0].finish_reason == "length" and len(answer.choices[0].logprobs.tokens) == 5
    assert [model.id for model in client.models.list()] == [MODEL]


def test_errors_are_the_sdks_own(client: Any, server: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(messages=HELLO, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="positions") as refused:
        client.chat.completions.create(messages=[{"role": "user", "content": "x " * 5000}], model=MODEL, stream=True)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server}/v1", api_key="wrong", max_retries=0).models.list()
