"""What broke in other servers, by the number of the report it was gathered from; streamed and whole, in any bursts.

Each test's oracle is what was asked for, told by the test itself: the service says a script (`double.Scripted`).
"""

from __future__ import annotations

import functools
import json
import threading
import time
from typing import Any

import httpx
import pytest

from tests.api.client import MODEL, Answer, Api, of_chunks, serving, wait_for
from tests.api.double import Scripted
from tests.api.words import TOKENIZER, call, ids

both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
bursts = pytest.mark.parametrize("burst", [1, 3, 10_000])


def tool(name: str = "weather", strict: bool = False, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TEXT, EITHER = {"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}
WEATHER = tool(city=TEXT, days={"type": "integer"}, unit=EITHER)
NOW = tool("now")
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@both
@bursts
def test_01_a_call_without_arguments_is_one_call_with_an_empty_object(api: Api, stream: bool, burst: int) -> None:
    api.says(call("now"), burst=burst)
    answer = api.chat(stream, tools=[NOW], **OFF)
    assert (answer.calls, answer.finish, answer.content) == ([("now", "{}")], "tool_calls", None)


@both
@bursts
def test_02_a_name_is_never_sent_as_a_prefix(api: Api, stream: bool, burst: int) -> None:
    name = "get_the_weather_of_a_town"
    api.says(call(name, city="x"), burst=burst)
    answer = api.chat(stream, tools=[tool(name, city=TEXT)], **OFF)
    assert answer.calls == [(name, '{"city": "x"}')]  # `of_chunks` takes a name from the first delta alone


@both
@bursts
def test_03_a_call_in_unclosed_thoughts_is_a_call(api: Api, stream: bool, burst: int) -> None:
    api.says("I should ask." + call("weather", city="Paris"), burst=burst)
    answer = api.chat(stream, tools=[WEATHER])
    assert answer.reasoning == "I should ask." and answer.content is None
    assert (answer.calls, answer.finish) == ([("weather", '{"city": "Paris"}')], "tool_calls")


@pytest.mark.parametrize(
    "text",
    [
        "thoughts</think>Hello 🦖 there" + call("weather", city="Zürich", days="3") + call("now"),
        "only thoughts",
        "</think>\n\n" + call("now") + "\n" + call("now"),
        "a</think>text STOP more",
        "a</think>unit" + call("weather", unit="null") + call("weather", unit="12"),
    ],
)
def test_04_the_same_answer_in_any_bursts_streamed_or_not(api: Api, text: str) -> None:
    found: list[Answer] = []
    for stream in (False, True):
        for burst in (1, 2, 5, 10_000):
            api.says(text, burst=burst)
            found.append(api.chat(stream, tools=[WEATHER, NOW], stop="STOP"))
    assert all(answer == found[0] for answer in found)


def test_05_a_long_argument_streams_as_it_comes_and_silence_has_pings() -> None:
    value = "word " * 800
    with serving(positions=8192, ping_s=0.05) as api:
        api.says(call("weather", city=value))
        api.service.gate.clear()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER], "stream": True}
        with api.http.stream("POST", "/v1/chat/completions", json={**body, **OFF}) as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line) == ": ping"  # before anything else: not even a role
            api.service.gate.set()
            deltas = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        pieces = [
            call["function"]["arguments"]
            for chunk in deltas
            for choice in chunk["choices"]
            for call in choice["delta"].get("tool_calls", [])
        ]
        assert len(pieces) > 700 and max(map(len, pieces)) < 40
        assert json.loads("".join(pieces)) == {"city": value}
        message = {"max_tokens": 5, "messages": body["messages"], "stream": True}
        api.service.gate.clear()
        with api.http.stream("POST", "/v1/messages", json=message) as response:
            lines = (line for line in response.iter_lines() if line)
            assert [next(lines), next(lines)] == ["event: ping", 'data: {"type":"ping"}']
            api.service.gate.set()


@both
@bursts
@pytest.mark.parametrize(
    ("text", "value"), [("12", "12"), ("null", None), ("celsius", "celsius"), ("nullify", "nullify")]
)
def test_06_a_string_or_null_keeps_its_quotes(api: Api, stream: bool, burst: int, text: str, value: Any) -> None:
    api.says(call("weather", unit=text), burst=burst)
    ((_, arguments),) = api.chat(stream, tools=[WEATHER], **OFF).calls
    assert json.loads(arguments) == {"unit": value}


@both
@pytest.mark.parametrize(("kept", "calls"), [(2, []), (8, [("weather", '{"city": "P')]), (4, [("weather", "")])])
def test_07_a_cut_call_is_length_without_markup(api: Api, stream: bool, kept: int, calls: list[Any]) -> None:
    tokens = ids(call("weather", city="Pale blue"))
    api.says(call("weather", city="Pale blue"))
    answer = api.chat(stream, tools=[WEATHER], max_tokens=kept, **OFF)
    assert len(tokens) > kept and answer.finish == "length" and answer.usage["completion_tokens"] == kept
    assert answer.content is None or answer.content == "" and not answer.calls
    assert [(name, arguments[: len(calls[0][1])]) for name, arguments in answer.calls] == calls
    assert all("<" not in arguments for _, arguments in answer.calls)


def test_08_flat_tools_of_responses_reach_completed(api: Api) -> None:
    flat = {"type": "function", **WEATHER["function"]}
    body = {"model": MODEL, "input": "hi", "tools": [flat], "tool_choice": {"type": "function", "name": "weather"}}
    for burst in (1, 4, 1000):
        api.says("hm</think>" + call("weather", city="Paris", days="2"), burst=burst)
        chunks = api.chunks("/v1/responses", body)
        assert [each["sequence_number"] for each in chunks] == list(range(len(chunks)))
        assert [each["type"] for each in (chunks[0], chunks[-1])] == ["response.created", "response.completed"]
        whole = api.post("/v1/responses", body).json()
        for response in (whole, chunks[-1]["response"]):
            assert [item["type"] for item in response["output"]] == ["reasoning", "function_call"]
            called = response["output"][1]
            assert (called["name"], json.loads(called["arguments"])) == ("weather", {"city": "Paris", "days": 2})
            assert (response["status"], called["status"]) == ("completed", "completed")
        pieces = [each["delta"] for each in chunks if each["type"] == "response.function_call_arguments.delta"]
        (done,) = [each for each in chunks if each["type"] == "response.function_call_arguments.done"]
        assert "".join(pieces) == done["arguments"] == called["arguments"]


@both
@bursts
def test_09_without_tools_the_parser_is_bypassed(api: Api, stream: bool, burst: int) -> None:
    text = "see " + call("weather", city="Paris") + " there"
    api.says(text, burst=burst)
    answer = api.chat(stream, **OFF)
    assert (answer.content, answer.calls, answer.finish) == (text, [], "stop")


@both
@bursts
def test_10_an_end_in_thoughts_is_thoughts(api: Api, stream: bool, burst: int) -> None:
    api.says("it never closes", burst=burst)
    answer = api.chat(stream)
    assert (answer.reasoning, answer.content, answer.finish) == ("it never closes", None, "stop")
    api.says("it is cut here", burst=burst, end="")
    answer = api.chat(stream, max_tokens=2)
    assert answer.content is None and answer.finish == "length" and answer.usage["completion_tokens"] == 2


PERSON = {"type": "object", "properties": {"name": TEXT}, "required": ["name"], "additionalProperties": False}


@both
@bursts
def test_11_thoughts_are_free_in_front_of_json(api: Api, stream: bool, burst: int) -> None:
    """On chats and on responses; the double ends a job with an error where its constraint does not allow a token."""
    api.says('some { thoughts</think>{"name":"x"}', burst=burst)
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = api.chat(stream, response_format=format)
    assert (answer.reasoning, answer.content) == ("some { thoughts", '{"name":"x"}')
    body = {"input": "hi", "text": {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}}
    api.says('some { thoughts</think>{"name":"x"}', burst=burst)
    response = api.chunks("/v1/responses", body)[-1]["response"] if stream else api.post("/v1/responses", body).json()
    reasoning, message = response["output"]
    assert reasoning["content"][0]["text"] == "some { thoughts" and message["content"][0]["text"] == '{"name":"x"}'
    form = {"type": "json_schema", "schema": PERSON}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 90, "output_config": {"format": form}}
    api.says('{"name":"x"}', burst=burst)
    assert api.post("/v1/messages", body).json()["content"] == [{"type": "text", "text": '{"name":"x"}'}]


@pytest.mark.parametrize("text", ['{"name":"x" }', ' {"name":"x"}', '{"name":"x"}\n', '{ "name":"x"}', '{"name": "x"}'])
def test_12_json_has_no_room_for_white_space(api: Api, text: str) -> None:
    api.says(text)
    status, error = api.refused(response_format={"type": "json_object"}, **OFF)
    assert status == 500 and "not allowed" in error["message"]


@both
@bursts
def test_13_a_stop_string_never_leaks(api: Api, stream: bool, burst: int) -> None:
    stop = "the end of it"
    assert len(ids(stop)) > 2
    api.says(f"a {stop} b</think>before {stop} after", burst=burst)
    answer = api.chat(stream, stop=[stop, "never"])
    assert (answer.reasoning, answer.content, answer.finish) == (f"a {stop} b", "before ", "stop")
    api.says("before the end of", burst=burst)
    assert api.chat(stream, stop=stop, **OFF).content == "before the end of"
    body = {"max_tokens": 90, "messages": [{"role": "user", "content": "hi"}], "stop_sequences": [stop]}
    api.says(f"before {stop} after", burst=burst)
    message = api.post("/v1/messages", body).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert [block["text"] for block in message["content"]] == ["before "]


@both
@bursts
def test_14_split_characters_come_out_whole(api: Api, stream: bool, burst: int) -> None:
    api.says("a 🦖🏴‍☠️ b", burst=burst)
    if stream:
        chunks = api.chunks("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **OFF})
        assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)
        assert of_chunks(chunks)[0].content == "a 🦖🏴‍☠️ b"
    else:
        assert api.chat(**OFF).content == "a 🦖🏴‍☠️ b"


def test_14_a_prompt_that_ends_in_half_a_character_is_not_echoed(api: Api) -> None:
    half = ids("secret 🦖")[:-1]
    assert TOKENIZER.decode(half).endswith("\ufffd")
    api.service.script = lambda job: ids("🦖")[-1:] + ids(" tail<|user|>")
    for stream in (False, True):
        body = {"prompt": half, "max_tokens": 20}
        if stream:
            text = "".join(chunk["choices"][0]["text"] for chunk in api.chunks("/v1/completions", body)[:-1])
        else:
            text = api.post("/v1/completions", body).json()["choices"][0]["text"]
        assert text.endswith(" tail") and "secret" not in text and text.count("\ufffd") == 1


@both
def test_15_a_client_that_goes_away_frees_its_jobs(api: Api, stream: bool) -> None:
    service: Scripted = api.service
    api.says("on and on " * 2000, end="")
    service.pace_s = 0.002
    before = len(service.jobs)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "n": 2, **OFF}
    with httpx.Client(base_url=api.http.base_url, timeout=httpx.Timeout(60, read=0.5)) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body)
    wait_for(lambda: {before, before + 1} <= set(service.aborted))
    assert service.counts().running == 0
    service.pace_s = 0
    api.says("intact")
    assert api.chat(**OFF).content == "intact"


@bursts
def test_16_usage_of_messages_leaves_out_what_was_cached_and_each_block_begins_once(api: Api, burst: int) -> None:
    api.service.cached = 4
    body = {
        "max_tokens": 90, "messages": [{"role": "user", "content": "hi"}],
        "thinking": {"type": "enabled", "budget_tokens": 50},
        "tools": [{"name": "weather", "input_schema": WEATHER["function"]["parameters"]}],
    }  # fmt: skip
    api.says("thoughts</think>text" + call("weather", city="Paris"), burst=burst)
    whole = api.post("/v1/messages", body).json()
    prompt = api.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    api.says("thoughts</think>text" + call("weather", city="Paris"), burst=burst)
    chunks = api.chunks("/v1/messages", body)
    start, delta = chunks[0]["message"], chunks[-2]
    assert [each["type"] for each in (chunks[0], delta, chunks[-1])] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    for usage in (whole["usage"], start["usage"], delta["usage"]):
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (prompt - 4, 4)
    assert whole["usage"]["output_tokens"] == delta["usage"]["output_tokens"] > 0
    assert whole["stop_reason"] == delta["delta"]["stop_reason"] == "tool_use"
    starts = [each for each in chunks if each["type"] == "content_block_start"]
    stops = [each["index"] for each in chunks if each["type"] == "content_block_stop"]
    assert [each["index"] for each in starts] == stops == [0, 1, 2]
    assert [each["content_block"]["type"] for each in starts] == ["thinking", "text", "tool_use"]
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    joined = "".join(each["delta"].get("partial_json", "") for each in chunks if each["type"] == "content_block_delta")
    assert json.loads(joined) == whole["content"][2]["input"] == {"city": "Paris"}
    signed = [each["delta"]["signature"] for each in chunks if each.get("delta", {}).get("type") == "signature_delta"]
    assert signed == [whole["content"][0]["signature"]]


@both
def test_17_what_was_cached_is_said(api: Api, stream: bool) -> None:
    """That a header in front of a prompt breaks its cache from the page on that it is in is the service's; what was
    found is told to the client."""
    api.service.cached = 5
    api.says("x")
    answer = api.chat(stream, **OFF)
    assert answer.usage["prompt_tokens_details"] == {"cached_tokens": 5}


def test_18_thoughts_go_out_and_come_back(api: Api) -> None:
    """`reasoning_content` and `reasoning`, kept behind the last user turn, dropped before it: the template's rule."""
    api.says("x")
    for name in ("reasoning_content", "reasoning"):
        calls = [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
        turn = {"role": "assistant", "content": "", name: "my thoughts", "tool_calls": calls}
        history = [{"role": "user", "content": "hi"}, turn, {"role": "tool", "content": "noon", "tool_call_id": "c"}]
        for messages, kept in ((history, True), ([*history, {"role": "user", "content": "ok"}], False)):
            api.chat(messages=messages, tools=[NOW])
            prompt = TOKENIZER.decode(api.service.jobs[max(api.service.jobs)].prompt_ids)
            assert ("<think>my thoughts</think>" in prompt) is kept
            assert "<tool_call>now</tool_call><|observation|><tool_response>noon</tool_response>" in prompt


@both
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
def test_19_an_overlong_prompt_is_a_400_before_the_stream_opens(api: Api, stream: bool, path: str) -> None:
    text = "word " * 4000
    body = {"messages": [{"role": "user", "content": text}], "prompt": text, "input": text, "max_tokens": 5}
    before = len(api.service.jobs)
    response = api.post(path, {**body, "stream": stream})
    assert response.status_code == 400 and response.headers["content-type"] == "application/json"
    assert "2,048 positions" in response.json()["error"]["message"] and len(api.service.jobs) == before
    api.service.most_prompt = 3  # what a service has no room for is refused alike
    body = {name: "hi" if name != "messages" else [{"role": "user", "content": "hi there"}] for name in body}
    response = api.post(path, {**body, "prompt": "hi there", "max_tokens": 5, "stream": stream})
    assert response.status_code in (200, 400)
    if path == "/v1/chat/completions":
        assert response.json()["error"]["code"] == "context_length_exceeded"


@both
@pytest.mark.parametrize(
    "format",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "obect"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(["}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "regex"},
    ],
)
def test_20_a_bad_schema_is_a_400_and_nothing_dies(api: Api, stream: bool, format: dict[str, Any]) -> None:
    status, error = api.refused(response_format=format, stream=stream)
    assert (status, error["type"]) == (400, "invalid_request_error") and error["param"].startswith("response_format")
    api.says("intact")
    assert api.chat(stream, **OFF).content == "intact"


def test_20_a_huge_enum_compiles_off_the_event_loop(api: Api) -> None:
    schema = {"enum": [f"value {at}" for at in range(20_000)]}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    api.says('"value 7"')
    took: list[float] = []
    looking, over = threading.Event(), threading.Event()

    def look() -> None:
        with httpx.Client(base_url=api.http.base_url) as client:
            while not over.is_set():
                began = time.monotonic()
                client.get("/health")
                took.append(time.monotonic() - began)
                looking.set()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert looking.wait(60)
        assert api.chat(response_format=format, **OFF).content == '"value 7"'
    finally:
        over.set()
        thread.join()
    assert len(took) > 3  # it was answered meanwhile


def test_21_nothing_comes_before_the_first_token_and_thoughts_are_the_first() -> None:
    with serving(ping_s=0.05) as api:
        api.says("thoughts</think>text")
        api.service.gate.clear()
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            assert [next(lines) for _ in range(3)] == [": ping"] * 3
            api.service.gate.set()
            first = json.loads(next(line for line in lines if line.startswith("data"))[6:])
        assert first["choices"][0]["delta"]["role"] == "assistant" and first["choices"][0]["delta"]["reasoning_content"]
        said = api.http.get("/metrics").text
        assert 'vllm:time_to_first_token_seconds_count{model_name="tiny-glm5"} 1.0' in said


@both
@bursts
def test_22_logprobs_and_indices(api: Api, stream: bool, burst: int) -> None:
    api.says("thoughts</think>one", "thoughts</think>two and", burst=burst)
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True}
    found: dict[int, list[Any]] = {0: [], 1: []}
    if stream:
        chunks = api.chunks("/v1/chat/completions", body)
        answers = of_chunks(chunks)
        for chunk in chunks[:-1]:
            for choice in chunk["choices"]:
                found[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    else:
        answers = api.choices(**body)
        for choice in answers[0].raw["choices"]:
            found[choice["index"]] = choice["logprobs"]["content"]
    assert [answer.content for answer in answers] == ["one", "two and"]
    for at, answer in enumerate(answers):
        assert b"".join(bytes(each["bytes"]) for each in found[at]).decode() == answer.content
        assert all(each["top_logprobs"] == [] and each["logprob"] == -0.5 for each in found[at])
    api.says("one", burst=burst)
    answer = api.choices(logprobs=True, top_logprobs=2, **OFF)[0]
    assert {len(each["top_logprobs"]) for each in answer.raw["choices"][0]["logprobs"]["content"]} == {2}


@both
def test_23_a_full_queue_refuses_before_the_prompt_is_rendered(stream: bool) -> None:
    with serving(max_queue=1) as api:
        service: Scripted = api.service
        service.gate.clear()
        api.says("x")
        post = functools.partial(httpx.post, f"{api.http.base_url}/v1/completions", json={"prompt": "x"}, timeout=60)
        waiting = threading.Thread(target=post)
        waiting.start()
        try:
            wait_for(lambda: service.counts().waiting == 1)
            for path, status in (("/v1/chat/completions", 429), ("/v1/messages", 529)):
                body = {"messages": [{"role": "user", "content": 3}], "stream": stream}  # wrong, and not looked at
                response = api.post(path, body)
                assert response.status_code == status and response.headers["retry-after"] == "1"
                assert "wait" in response.json()["error"]["message"]
        finally:
            service.gate.set()
            waiting.join()


def test_24_the_key_covers_every_route() -> None:
    routes = [
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"), ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", "/tokenize"),
        ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/nowhere"), ("GET", "/health"),
    ]  # fmt: skip
    for open_health in (False, True):
        with serving(keys=("first", "sécond"), open_health=open_health) as api:
            for method, path in routes:
                covered = not (open_health and path == "/health")
                for headers in (
                    {},
                    {"authorization": "Bearer wrong"},
                    {"x-api-key": "firs"},
                    {"authorization": "first"},
                ):
                    response = api.http.request(method, path, headers=headers)
                    assert (response.status_code == 401) is covered, (path, headers)
                for headers in ({"authorization": "bearer first"}, {"x-api-key": "first"}):
                    assert api.http.request(method, path, headers=headers).status_code != 401
            shape = api.post("/v1/messages", {}).json()
            assert shape["type"] == "error" and shape["error"]["type"] == "authentication_error"


@both
@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": 3}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": -1}, "logprobs"),
        ("/v1/responses", {"input": "x", "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_25_logprobs_out_of_range_are_a_400(
    api: Api, stream: bool, path: str, given: dict[str, Any], param: str
) -> None:
    status, error = api.refused(path, **given, stream=stream)
    assert (status, error["param"]) == (400, param)
