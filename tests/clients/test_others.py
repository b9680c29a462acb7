"""litellm, LangChain, and an MCP server's tools through the openai SDK."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

HELLO = [{"role": "user", "content": "Is it raining in Paris?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


def test_litellm(server: str) -> None:
    litellm = pytest.importorskip("litellm")
    given = {"model": "openai/tiny-glm5", "api_base": f"{server}/v1", "api_key": "secret", "messages": HELLO, **GREEDY}
    whole = litellm.completion(**given).choices[0].message
    chunks = list(litellm.completion(**given, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=HELLO).choices[0].message
    assert (whole.content or "") == (built.content or "")
    assert getattr(whole, "reasoning_content", None) == getattr(built, "reasoning_content", None)


def test_langchain(server: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    from pydantic import BaseModel

    class Weather(BaseModel):
        """The weather."""

        city: str
        rainy: bool

    chat = langchain_openai.ChatOpenAI(
        model="tiny-glm5", base_url=f"{server}/v1", api_key="secret", temperature=0, max_tokens=150, max_retries=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    assert "".join(chunk.text for chunk in chat.stream("Hello")) == chat.invoke("Hello").text
    called = chat.bind_tools([Weather], tool_choice="required").invoke("Is it raining in Paris?")
    assert called.tool_calls[0]["name"] == "Weather" and isinstance(called.tool_calls[0]["args"]["rainy"], bool)


def test_the_tools_of_an_mcp_server(server: str) -> None:
    """The agent's loop of docs/serving.md."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("mcp")
    asyncio.run(_loop(openai, server))


async def _loop(openai: Any, server: str) -> None:
    import mcp

    made = _weather_server()
    async with mcp.Client(made) as session, openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="secret") as client:
        offered = (await session.list_tools()).tools
        tools = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description or "", "parameters": t.input_schema},
            }
            for t in offered
        ]
        messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
        for choice in ("required", "none"):
            answer = await client.chat.completions.create(
                model="tiny-glm5", messages=messages, tools=tools, tool_choice=choice, **GREEDY
            )
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or ():
                result = await session.call_tool(call.function.name, json.loads(call.function.arguments))
                text = "".join(part.text for part in result.content if part.type == "text")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
        assert messages[2]["content"].startswith("It rains in ")


def _weather_server() -> Any:
    from mcp.server import MCPServer

    made = MCPServer("weather")

    @made.tool()
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"It rains in {city}."

    return made
