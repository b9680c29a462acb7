"""What reaches a server beside requests that are right: thousands of tools, browsers of other origins, bodies that are
packed, addresses with a slash too many."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from runtime.api.grammar import Grammars
from runtime.api.tools import MOST_TOOLS, Tool
from tests.api.client import MODEL, Api, of_chunks, serving
from tests.api.words import VOCABULARY

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}


def schema(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"a{number}": {"type": "integer"}}, "required": [f"a{number}"]}


def asking(path: str, count: int) -> dict[str, Any]:
    """A request in the form of a path with so many tools."""
    named = [{"name": f"tool_{number}", "description": "Does it."} for number in range(count)]
    match path:
        case "/v1/chat/completions" | "/tokenize":
            tools = [
                {"type": "function", "function": {**each, "parameters": schema(at)}} for at, each in enumerate(named)
            ]
            return {**CHAT, "tools": tools}
        case "/v1/responses":
            tools = [{"type": "function", **each, "parameters": schema(at)} for at, each in enumerate(named)]
            return {"model": MODEL, "input": "x", "tools": tools}
    tools = [{**each, "input_schema": schema(at)} for at, each in enumerate(named)]
    return {**CHAT, "max_tokens": 5, "tools": tools}


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("/v1/chat/completions", 10_000),
        *(
            (path, MOST_TOOLS + 1)
            for path in ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize")
        ),
    ],
)
def test_ten_thousand_tools_are_refused_before_any_work_on_them(api: Api, path: str, count: int) -> None:
    """Nothing is rendered and no grammar made; as many tools as are taken, but more than there is room for, are refused
    by their prompt, before a grammar is made."""
    asked, held = len(api.service.jobs), api.endpoint.grammars.held
    answer = api.post(path, asking(path, count))
    assert answer.status_code == 400
    assert f"{count:,} tools are more than the {MOST_TOOLS:,} that are taken" in answer.json()["error"]["message"]
    if path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        many = api.post(path, asking(path, 300))
        assert many.status_code == 400 and "shorten it" in many.json()["error"]["message"]
    assert (len(api.service.jobs), api.endpoint.grammars.held) == (asked, held)


def test_tools_that_come_with_every_turn_are_compiled_once() -> None:
    """Also more of them than there is room for beside others."""
    tools = {f"t{at}": Tool(f"t{at}", schema(at)) for at in range(40)}
    grammars = Grammars(VOCABULARY, most=len(tools) + 1)
    first, again = grammars.calls(tools), grammars.calls(tools)
    assert again.names is first.names
    assert all(again.arguments[name] is first.arguments[name] for name in tools)


def preflight(api: Api, path: str, origin: str) -> Any:
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return api.http.options(path, headers={"origin": origin, **wanted})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/models"])
def test_a_page_of_an_origin_that_is_let_in_may_ask(path: str) -> None:
    """The browser asks first, without the key; the key is wanted all the same, and a refusal can be read there."""
    with serving(keys=("k",), origins=("http://here:3000",)) as api:
        allowed = preflight(api, path, "http://here:3000")
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://here:3000"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = api.http.get("/v1/models", headers={"origin": "http://here:3000"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "http://here:3000"
        assert "access-control-allow-origin" not in preflight(api, path, "http://there").headers


def test_other_pages_may_not(api: Api) -> None:
    """Without origins nobody is told that he may."""
    answer = preflight(api, "/v1/chat/completions", "http://there")
    assert answer.status_code == 405 and not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_packed_body_is_a_415_in_the_forms_shape(api: Api, path: str) -> None:
    body = gzip.compress(json.dumps({**CHAT, "max_tokens": 5}).encode())
    answer = api.http.post(path, content=body, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and "send it as it is" in error["message"]
    plain = api.http.post(path, json={**CHAT, "max_tokens": 5}, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_a_slash_too_many_names_no_model(api: Api) -> None:
    with_slash, without = api.http.get("/v1/models/"), api.http.get("/v1/models")
    assert with_slash.status_code == without.status_code == 200 and with_slash.json() == without.json()


def test_anthropics_sdk_finds_the_request_id(api: Api) -> None:
    answer = api.http.post("/v1/messages", json={**CHAT, "max_tokens": 5}, headers={"x-request-id": "mine"})
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("kind", ["bogus", "", None, 3])
def test_thinking_of_no_known_type_is_a_400(api: Api, kind: Any) -> None:
    answer = api.http.post("/v1/messages", json={**CHAT, "max_tokens": 5, "thinking": {"type": kind}})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("thinking.type")


def test_why_a_schema_is_not_held_to_is_said_of_the_schema(api: Api) -> None:
    """And not of the grammar that would be made of it."""
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}
    status, error = api.refused(response_format=format)
    assert status == 400 and error["message"] == 'the schema cannot be held to: Unimplemented keys: ["not"]'


@pytest.mark.parametrize(
    ("path", "more", "sign"),
    [
        ("/v1/chat/completions", {}, [": ping"]),
        ("/v1/completions", {"prompt": "x"}, [": ping"]),
        ("/v1/responses", {"input": "x"}, [": ping"]),
        ("/v1/messages", {"max_tokens": 5}, ["event: ping", 'data: {"type":"ping"}']),
    ],
)
def test_a_sign_of_life_is_one_that_the_forms_clients_let_be(path: str, more: dict[str, Any], sign: list[str]) -> None:
    """OpenAI's SDK ends a stream of responses whose first event is not `response.created`."""
    with serving(ping_s=0.05) as api:
        api.says("hi")
        api.service.gate.clear()
        with api.http.stream("POST", path, json={**CHAT, **more, "stream": True}) as response:
            lines = (line for line in response.iter_lines() if line)
            assert [next(lines) for _ in sign] == sign
            api.service.gate.set()
            assert any("hi" in line for line in lines)


def test_what_some_clients_take_for_the_end_of_a_line_is_written_out(api: Api) -> None:
    """httpx, as others do, cuts a stream's text where Unicode ends lines, and not only where streams do."""
    text = "one\u2028two\u2029three\x85four"
    api.says(text)
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"enable_thinking": False}}
    assert of_chunks(api.chunks("/v1/chat/completions", body))[0].content == text
