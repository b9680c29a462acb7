"""The anthropic SDK, as coding agents use it."""

from __future__ import annotations

import json
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic")

GIVEN: dict[str, Any] = {
    "model": "tiny-glm5", "max_tokens": 80, "messages": [{"role": "user", "content": "Is it raining in Paris?"}],
    "extra_body": {"temperature": 0},
}  # fmt: skip
TOOL = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server: str) -> Any:
    with anthropic.Anthropic(base_url=server, api_key="secret", max_retries=0) as made:
        yield made


def test_text_and_thoughts(client: Any) -> None:
    for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}):
        given = {**GIVEN, "max_tokens": 1500, "thinking": thinking}
        whole = client.messages.create(**given)
        with client.messages.stream(**given) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_message()
        assert [block.type for block in whole.content] == [block.type for block in streamed.content]
        assert [getattr(b, "text", getattr(b, "thinking", None)) for b in whole.content] == [
            getattr(b, "text", getattr(b, "thinking", None)) for b in streamed.content
        ]
        assert whole.usage.output_tokens == streamed.usage.output_tokens > 0


def test_json_of_a_schema(client: Any) -> None:
    format = {"type": "json_schema", "schema": TOOL["input_schema"]}
    (block,) = client.messages.create(**GIVEN, output_config={"format": format}).content
    assert json.loads(block.text)["city"] in ("Paris", "Rome")


def test_tools_and_their_results(client: Any) -> None:
    given = {**GIVEN, "tools": [TOOL], "tool_choice": {"type": "any"}}
    whole = client.messages.create(**given)
    with client.messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        used = message.content[-1]
        assert (used.type, used.name, message.stop_reason) == ("tool_use", "get_weather", "tool_use")
        assert used.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": whole.content[-1].id, "content": "rain"}
    turns = [
        *GIVEN["messages"], {"role": "assistant", "content": [block.model_dump() for block in whole.content]},
        {"role": "user", "content": [result]},
    ]  # fmt: skip
    assert client.messages.create(**{**GIVEN, "messages": turns, "tools": [TOOL]}).stop_reason
    assert client.messages.count_tokens(model="tiny-glm5", messages=turns, tools=[TOOL]).input_tokens > 10


def test_errors_are_the_sdks_own(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**GIVEN, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="positions"):
        client.messages.create(**{**GIVEN, "messages": [{"role": "user", "content": "x " * 5000}]})
