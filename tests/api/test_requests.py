"""What a request says, and what a service is asked for it; each wrong field is one line that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from model.errors import TokenizerError
from runtime.api.app import DetokenizeBody
from runtime.api.dialects.chat import ChatBody
from runtime.api.dialects.forms import RequestBody
from runtime.api.dialects.messages import MessagesBody
from runtime.api.dialects.responses import ResponsesBody
from runtime.serving.service import Job
from tests.api.client import MODEL, Api
from tests.api.words import MARKUP, TOKENIZER, USER, VOCABULARY, call, ids

LATER = {"type": "function", "function": {"name": "later"}}
USERS = [{"role": "user", "content": "x"}]
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "later", "parameters": {"type": "object", "properties": {}}}}


def tool(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **more}}


def last(api: Api) -> Job:
    return api.service.jobs[max(api.service.jobs)]


def prompt(api: Api) -> str:
    return TOKENIZER.decode(last(api).prompt_ids)


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"model": 3}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [3]}, 400, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages[0].tool_calls[0].function.name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, 400,
         "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]}, 400,
         "messages[0].tool_calls[0].function.arguments"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_p": 1.1}, 400, "top_p"),
        ({"top_k": -2}, 400, "top_k"),
        ({"min_p": 2}, 400, "min_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"seed": 1.5}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": 3}, 400, "stop"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, 400, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, 400, "tools[1].name"),
        ({"tools": [tool(parameters={"type": "string"})]}, 400, "tools[0].parameters.type"),
        ({"tools": [tool(strict=True, parameters={"properties": {"a": {"type": "x"}}})]}, 400, "tools[0]"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": "sometimes"}, 400, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
        ({"response_format": "json"}, 400, "response_format"),
        ({"reasoning_effort": "huge"}, 400, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": ["x"]}}, 400, "chat_template_kwargs"),
        ({"logit_bias": {"5": None}}, 400, "logit_bias"),
        ({"logit_bias": {str(at): 1 for at in range(1025)}}, 400, "logit_bias"),
        ({"messages": [{"role": "user", "content": "hi"}] * 2049}, 400, "messages"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, 400, "chat_template_kwargs.enable_thinking"),
        ({"thinking_token_budget": -1}, 400, "thinking_token_budget"),
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(api: Api, given: dict[str, Any], status: int, param: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **given}
    for stream in (False, True):
        response = api.post("/v1/chat/completions", {**body, "stream": stream} if "stream" not in given else body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), error
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {}, "prompt is missing"),
        ("/v1/completions", {"prompt": ""}, "no tokens"),
        ("/v1/completions", {"prompt": []}, "prompt is empty"),
        ("/v1/completions", {"prompt": [[]]}, "no tokens"),
        ("/v1/completions", {"prompt": [5000]}, "no token has the id 5000"),
        ("/v1/completions", {"prompt": [-1]}, "no token has the id -1"),
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, "echo with logprobs"),
        ("/v1/completions", {"prompt": "x", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": ["x"] * 200}, "answers to one request"),
        ("/v1/completions", {"prompt": ["x", None]}, "prompt[1] is a text or token ids"),
        ("/v1/completions", {"prompt": [5, True]}, "prompt[0] is a text or token ids"),
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt is a text"),
        ("/v1/responses", {"input": [{"type": "reasoning", "content": True}]}, "input[0].content is parts"),
        ("/v1/responses", {"input": [{"role": ["user"], "content": "x"}]}, "input[0].role is one of"),
        ("/v1/responses", {}, "input is missing"),
        ("/v1/responses", {"input": []}, "no messages"),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, "nothing is kept here"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "is not taken"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search_preview"}]}, "not run here"),
        ("/v1/messages", {"messages": USERS}, "max_tokens is missing"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}, "reads"),
        ("/v1/messages", {"messages": USERS, "max_tokens": 1, "model": "claude"}, "does not exist here"),
        ("/tokenize", {}, "give one of"),
        ("/tokenize", {"prompt": 3}, "prompt:"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "no token has the id"),
    ],
)  # fmt: skip
def test_other_forms_name_what_is_wrong_too(api: Api, path: str, body: dict[str, Any], said: str) -> None:
    response = api.post(path, body)
    assert response.status_code in (400, 404) and said in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    ("form", "field"), [(ChatBody, "messages"), (ChatBody, "tools"), (ChatBody, "stop"), (ResponsesBody, "input"),
                        (MessagesBody, "messages"), (DetokenizeBody, "tokens")]
)  # fmt: skip
def test_a_list_is_looked_at_up_to_what_is_wrong(form: type[RequestBody], field: str) -> None:
    """Each error takes a kilobyte, and a body may have millions of them."""
    with pytest.raises(ValidationError) as found:
        form.model_validate({field: [None] * 1000})
    assert sum(field in each["loc"] for each in found.value.errors()) <= 2  # a text, or a list of something


def test_no_file_of_the_servers_is_named(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = api.endpoint.vocabulary.tokenizer

    def fails(*given: Any) -> Any:
        raise TokenizerError(f"{tokenizer.where}: cannot encode the text")

    monkeypatch.setattr(tokenizer, "encode_each", fails)
    for path in ("/tokenize", "/v1/completions"):
        assert api.post(path, {"prompt": "x"}).json()["error"]["message"] == "cannot encode the text"


def test_unknown_fields_are_let_be_and_the_model_may_be_left_out(api: Api) -> None:
    api.says("x")
    assert api.chat(user="me", store=True, metadata={}, service_tier="auto", frequency_penalty=0, **OFF).content == "x"
    assert api.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}).json()["model"] == MODEL
    assert api.chat(model="alias", **OFF).raw["model"] == "alias"


def test_sampling_reaches_the_service(api: Api) -> None:
    api.says("x")
    api.chat(
        temperature=0.3, top_p=0.9, top_k=7, min_p=0.1, seed=11, logit_bias={"5": 2, "6": -100.0}, min_tokens=2,
        max_completion_tokens=30, stop_token_ids=[77], logprobs=True, top_logprobs=3, **OFF,
    )  # fmt: skip
    job = last(api)
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (
        0.3,
        0.9,
        7,
        0.1,
        11,
    )
    assert sampling.bias == ((5, 2.0), (6, -100.0)) and (job.min_tokens, job.max_tokens, job.logprobs) == (2, 30, 3)
    assert job.stop_ids == VOCABULARY.stop_ids | {77} and job.constraint is None
    api.choices(n=3, seed=5, top_k=-1, ignore_eos=True, stop_token_ids=[77], **OFF)
    jobs = list(api.service.jobs.values())[-3:]
    assert [job.sampling.seed for job in jobs] == [5, 6, 7] and {job.sampling.top_k for job in jobs} == {0}
    assert {job.stop_ids for job in jobs} == {frozenset({77})}
    assert last(api).max_tokens == 2048 - len(last(api).prompt_ids)
    api.chat(max_tokens=100_000, **OFF)  # as much as there is room for
    assert last(api).max_tokens == 2048 - len(last(api).prompt_ids)


def test_ends_that_are_ignored_are_not_shown(api: Api) -> None:
    api.says("one<|user|>two<|endoftext|>", end="")
    answer = api.chat(ignore_eos=True, **OFF)
    assert answer.content == "onetwo"
    api.says("one<|user|>two<|endoftext|>", end="")
    body = {"messages": USERS, "max_tokens": 9, "ignore_eos": True, "min_tokens": 4, "seed": 3}
    assert api.post("/v1/messages", body).json()["content"] == [{"type": "text", "text": "onetwo"}]
    assert (last(api).min_tokens, last(api).sampling.seed) == (4, 3)


def test_thinking_is_switched_as_the_template_has_it(api: Api) -> None:
    api.says("x")
    for given, thinks in [
        ({}, True), (OFF, False), ({"reasoning_effort": "none"}, False), ({"reasoning_effort": "high"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ]:  # fmt: skip
        api.chat(**given)
        assert prompt(api).endswith("<think>") is thinks
        assert ("Reasoning Effort: High" in prompt(api)) is ("high" in str(given))
    body = {"messages": USERS, "max_tokens": 9}
    for thinking in (None, {"type": "disabled"}, {"type": "enabled", "budget_tokens": 3}):
        thinks = thinking is not None and "budget_tokens" in thinking
        api.post("/v1/messages", {**body, **({"thinking": thinking} if thinking else {})})
        assert prompt(api).endswith("<think>") is thinks
    assert last(api).constraint is not None  # the budget


def test_a_budget_of_thoughts_is_kept(api: Api) -> None:
    api.says("a b c</think>d")
    assert api.chat(thinking_token_budget=5).reasoning == "a b c"
    status, error = api.refused(thinking_token_budget=2)
    assert status == 500 and "not allowed" in error["message"]


def test_calls_are_had_as_they_were_asked_for(api: Api) -> None:
    now, later = call("now"), call("later")
    for choice, text, good in [
        ("auto", now + later, True), ("auto", "text", True), ("required", now, True), ("required", "text", False),
        ("none", "text", True), ("none", now, False), (LATER, later, True),
        (LATER, now, False), (None, now, True),
    ]:  # fmt: skip
        api.says(text)
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL, OTHER], "tool_choice": choice, **OFF}
        assert (api.post("/v1/chat/completions", body).status_code == 200) is good, (choice, text)
        assert "<tools>" in prompt(api)
    api.says(now + now)
    assert api.refused(tools=[TOOL], parallel_tool_calls=False, **OFF)[0] == 500
    tools = [{"name": "now", "input_schema": {"type": "object"}}, {"name": "later"}]
    for choice, text, good in [
        ({"type": "any"}, now, True), ({"type": "any"}, "text", False),
        ({"type": "tool", "name": "later"}, later, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, now + later, False), ({"type": "none"}, now, False),
    ]:  # fmt: skip
        api.says(text)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 90, "tools": tools, "tool_choice": choice}
        assert (api.post("/v1/messages", body).status_code == 200) is good, (choice, text)


def test_a_chat_reaches_the_template(api: Api) -> None:
    api.says("x")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    api.chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}], **OFF)
    assert prompt(api) == "[gMASK]<sop><|system|>be brief<|user|>ab<|assistant|></think>"
    agent = {
        "system": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief", "cache_control": {}}],
        "max_tokens": 5,
        "messages": [
            {"role": "weird-agent", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "see"},
                {"type": "tool_use", "id": "t", "name": "now", "input": {"zone": "UTC"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "12"}]},
                {"type": "text", "text": "go on"},
            ]},
        ],
    }  # fmt: skip
    assert api.post("/v1/messages", agent).status_code == 200
    assert prompt(api) == (
        "[gMASK]<sop><|system|>be brief<|user|>hi<|assistant|></think>see<tool_call>now<arg_key>zone</arg_key>"
        "<arg_value>UTC</arg_value></tool_call><|observation|><tool_response>12</tool_response><|user|>go on"
        "<|assistant|></think>"
    )
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": '{"zone": "UTC"}'},
        {"type": "function_call_output", "call_id": "c", "output": "12"},
    ]
    assert api.post("/v1/responses", {"input": items, "instructions": "be brief"}).status_code == 200
    assert prompt(api) == (
        "[gMASK]<sop><|system|>be brief<|user|>hi<|assistant|><think>hm</think><tool_call>now<arg_key>zone</arg_key>"
        "<arg_value>UTC</arg_value></tool_call><|observation|><tool_response>12</tool_response><|assistant|><think>"
    )


def test_completions_echo_and_take_several_prompts(api: Api) -> None:
    api.says(" one", " two", " three", " four")
    body = {"prompt": ["a", "b"], "n": 2, "echo": True}
    choices = api.post("/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["a one", "a two", "b three", "b four"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    api.says(" one", " two", " three", " four")
    texts = [""] * 4
    for chunk in api.chunks("/v1/completions", {**body, "stream_options": {"include_usage": True}})[:-2]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["a one", "a two", "b three", "b four"]
    api.says("</think> <tool_call>x")
    assert api.post("/v1/completions", {"prompt": ids("a")}).json()["choices"][0]["text"] == "</think> <tool_call>x"
    assert last(api).max_tokens == 16


def test_usage_counts_what_was_generated(api: Api) -> None:
    api.says("one two</think>three STOP four", burst=1)
    for stream in (False, True):
        answer = api.chat(stream, stop="STOP")
        tokens = ids("one two</think>three STOP")
        assert answer.usage["completion_tokens"] == len(tokens)
        assert answer.usage["completion_tokens_details"]["reasoning_tokens"] == tokens.index(MARKUP.think_end)
        assert answer.usage["prompt_tokens"] == len(last(api).prompt_ids)
    assert USER not in tokens


def test_tokens_of_a_text_and_back(api: Api) -> None:
    tokens = api.post("/tokenize", {"prompt": "Hello 🦖", "return_token_strs": True}).json()
    assert tokens["tokens"] == ids("Hello 🦖") and tokens["count"] == len(tokens["token_strs"])
    assert api.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hello 🦖"}
    chat = api.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}).json()
    api.says("x")
    api.chat(tools=[TOOL])
    assert tuple(chat["tokens"]) == last(api).prompt_ids


def test_models_are_listed(api: Api) -> None:
    listed = api.http.get("/v1/models").json()["data"]
    assert [each["id"] for each in listed] == [MODEL, "alias"] and listed[0]["max_model_len"] == 2048
    assert api.http.get("/v1/models/alias").json()["id"] == "alias"
    assert api.http.get("/v1/models/gpt-4").status_code == 404
    assert json.loads(api.http.get("/v1/nowhere").text)["error"]["type"] == "not_found_error"
