"""What a guide allows: answers of its schema or form and no others, whatever tokens are drawn from its masks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.api.events import CallBegun, CallGrown, Said, merged
from runtime.api.grammar import Grammars
from runtime.api.guide import Guide, Rules
from runtime.api.reader import Reader
from runtime.api.refusal import ApiRefusal
from runtime.api.tools import Tool
from runtime.serving.service import ConstraintBroken
from tests.api.words import MARKUP, USER, VOCABULARY, call, ids

GRAMMARS = Grammars(VOCABULARY)
ENDS = frozenset({USER})


def rules(schema: Any = None, tools: dict[str, Tool] | None = None, **more: Any) -> Rules:
    text = None if schema is None else GRAMMARS.answer(schema, "response_format")
    if tools is None:
        return Rules(VOCABULARY, ENDS, text, **more)
    return Rules(VOCABULARY, ENDS, text, GRAMMARS.calls(tools), **more)


def takes(guide: Guide, text: str) -> bool:
    """Whether an answer is allowed, token by token, and may end behind it."""
    for token in [*ids(text), USER]:
        mask = guide.allowed()
        if mask is not None and not mask[token]:
            return False
        guide.accept(token)
    return True


def drawn(guide: Guide, seed: int, most: int = 60, likely: str = "") -> list[int]:
    """An answer of tokens drawn from what is allowed; `likely` ones more often, so that it gets somewhere."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < most:
        mask = guide.allowed()
        choices = np.arange(VOCABULARY.size) if mask is None else np.flatnonzero(mask)
        if not len(choices):
            break
        better = [token for token in {*ids(likely), *ENDS, *marks} if mask is None or mask[token]]
        token = int(rng.choice(better if better and rng.random() < 0.8 else choices))
        found.append(token)
        if token in ENDS:
            break
        guide.accept(token)
    return found


marks = [token for token in vars(MARKUP).values() if token is not None]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip


def test_json_of_a_schema_and_no_other() -> None:
    for text, good in [
        ('{"name":"x","age":3}', True),
        ('{"name":"x","age":3,"tags":["a","b"]}', True),
        ('{"name":"x"}', False),
        ('{"name":"x","age":-3}', False),
        (' {"name":"x","age":3}', False),  # no white space: it could be had for ever
        ('{"name":"x","age":3}\n', False),
        ("hello", False),
        (call("now"), False),
    ]:
        assert takes(Guide(rules(PERSON), False), text) is good, text


def test_thoughts_are_free_in_front_of_json() -> None:
    assert takes(Guide(rules(PERSON), True), 'any { thing </think>{"name":"x","age":3}')
    assert not takes(Guide(rules(PERSON), True), "no end of it")
    guide = Guide(rules(PERSON), True)
    assert guide.allowed() is not None and not guide.allowed()[[USER, MARKUP.call]].any()


def test_a_budget_of_thoughts_ends_them() -> None:
    guide = Guide(rules(PERSON, budget=3), True)
    for token in ids(" a b c")[:3]:
        guide.accept(token)
    assert np.flatnonzero(guide.allowed()).tolist() == [MARKUP.think_end]
    assert np.flatnonzero(Guide(rules(budget=0), True).allowed()).tolist() == [MARKUP.think_end]


TOOLS = {
    "weather": Tool(
        "weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1}, "days": {"$ref": "#/$defs/days"},
                "unit": {"type": ["string", "null"], "enum": ["C", "F", None]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}/$"},
                "kind": {"anyOf": [{"const": "x y"}, {"type": "boolean"}]},
                "any": {}, "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            },
            "required": ["city"],
            "$defs": {"days": {"type": "integer", "maximum": 14}},
        },
    ),
    "now": Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}),
    "free": Tool("free", {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("text " + call("now"), True),
        ("text alone", True),
        (call("now") + call("weather", city="Paris", days="3"), True),
        (call("nowhere"), False),
        (call("now", city="x"), False),
        (call("weather"), False),
        (call("weather", city=""), False),
        (call("weather", city='{"not json\n'), True),
        (call("weather", days="3", city="x"), False),  # in the order of the schema
        (call("weather", city="x", days="15"), False),
        (call("weather", city="x", days="three"), False),
        (call("weather", city="x", unit="C"), True),
        (call("weather", city="x", unit="null"), True),
        (call("weather", city="x", unit='"C"'), False),
        (call("weather", city="x", unit="K"), False),
        (call("weather", city="x", code="AB/"), True),
        (call("weather", city="x", code="ab/"), False),
        (call("weather", city="x", kind="x y"), True),
        (call("weather", city="x", kind="true"), True),
        (call("weather", city="x", kind="y"), False),
        (call("weather", city="x", any="anything [ at all"), True),
        (call("weather", city="x", where='{"lat":1.5}'), True),
        (call("weather", city="x", where='{"lat":"no"}'), False),
        (call("weather", city="x", other="y"), False),
        (call("free", a="1", b="[2]"), True),
        (call("free"), True),
        ("<tool_call>now\n<arg_key>", False),
        ("<tool_call>free\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n</tool_call>", True),  # as of GLM-4.5
        (call("now") + " and more", False),
    ],
)
def test_calls_of_the_tools_there_are(text: str, good: bool) -> None:
    assert takes(Guide(rules(tools=TOOLS), False), text) is good


def test_a_call_in_thoughts_is_held_to_its_schema() -> None:
    assert takes(Guide(rules(tools=TOOLS), True), "hm " + call("now"))
    assert not takes(Guide(rules(tools=TOOLS), True), "hm " + call("nowhere"))


def test_calls_as_they_were_asked_for() -> None:
    required = rules(tools=TOOLS, required=True)
    assert np.flatnonzero(Guide(required, False).allowed()).tolist() == [MARKUP.call]
    assert takes(Guide(required, True), "hm</think>" + call("now") * 2)
    assert not takes(Guide(required, True), "hm</think>text" + call("now"))
    assert not takes(Guide(required, True), "hm")
    one = rules(tools=TOOLS, required=True, parallel=False)
    assert takes(Guide(one, False), call("now")) and not takes(Guide(one, False), call("now") * 2)
    none = rules(forbid=True)
    assert takes(Guide(none, False), "text") and not takes(Guide(none, False), call("now"))
    either = rules(PERSON, TOOLS)
    assert takes(Guide(either, False), '{"name":"x","age":3}') and takes(Guide(either, False), call("now"))
    assert not takes(Guide(either, False), '{"name":"x"' + call("now"))


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.booleans())
def test_what_is_drawn_is_valid_or_cut(seed: int, thinking: bool) -> None:
    tokens = drawn(Guide(rules(PERSON), thinking), seed, likely='</think>{"name":"x","age":3,"tags":["a","b"]}')
    reader = Reader(VOCABULARY, thinking, ends=ENDS)
    events = merged([event for token in tokens for event in reader.put(token)])
    if tokens[-1:] == [USER]:
        (said,) = [event.text for event in events if isinstance(event, Said)]
        jsonschema.validate(json.loads(said), PERSON)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.booleans())
def test_what_is_drawn_calls_what_there_is(seed: int, required: bool) -> None:
    """Its arguments are JSON of the tool's schema; streamed pieces, as ever, make the whole."""
    guide = Guide(rules(tools=TOOLS, required=required), False)
    tokens = drawn(guide, seed, 120, likely='weather now free city days unit C null {"lat":1.5} 3 true AB/ x y')
    reader = Reader(VOCABULARY, False, TOOLS, ends=ENDS)
    events = merged([event for token in tokens for event in reader.put(token)])
    begun = [event.name for event in events if isinstance(event, CallBegun)]
    grown = [event.json for event in events if isinstance(event, CallGrown)]
    assert set(begun) <= set(TOOLS)
    if tokens[-1:] == [USER]:
        assert begun or not required
        for name, text in zip(begun, grown, strict=True):
            jsonschema.validate(json.loads(text), TOOLS[name].parameters)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 30))
def test_a_copy_goes_its_own_way(seed: int, at: int) -> None:
    """As drafts are looked ahead over: what a copy is told does not change what the guide allows."""
    guide = Guide(rules(PERSON, TOOLS), True)
    tokens = drawn(guide.copy(), seed, likely='</think>{"name":"x","age":3}now weather')[: at + 1]
    for token in tokens[:-1]:
        copy, before = guide.copy(), guide.allowed()
        drawn(copy, seed + 1, 10)
        after = guide.allowed()
        assert (before is None) == (after is None) and (before is None or bool((before == after).all()))
        guide.accept(token)


@pytest.mark.parametrize(
    "schema",
    [{"type": "obect"}, {"type": "string", "pattern": "("}, {"not": {}}, {"type": "string", "pattern": "(?=x)"},
     {"$ref": "http://example.com/x"}, {"$ref": "#/nowhere"}, 3, {"minimum": "x", "type": "integer"}, False],
)  # fmt: skip
def test_a_bad_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ApiRefusal, match="cannot be held to") as refused:
        GRAMMARS.answer(schema, "response_format")
    assert (refused.value.status, refused.value.param) == (400, "response_format")
    tool = Tool("t", {"type": "object", "properties": {"a": schema}, "required": ["a"]}, strict=True)
    with pytest.raises(ApiRefusal):
        GRAMMARS.arguments(tool, "tools[0]")
    form, exact = GRAMMARS.arguments(dataclasses.replace(tool, strict=False), "tools[0]")
    assert not exact and not form.matcher.is_error()


def test_the_cache_is_bounded() -> None:
    grammars = Grammars(VOCABULARY, most=20)
    for at in range(30):
        grammars.answer({"const": at}, "x")
    assert grammars.held == 20
    with pytest.raises(ApiRefusal, match="larger than"):
        grammars.answer({"enum": ["x" * (1 << 20)]}, "x")


def test_a_pattern_that_cannot_be_followed_ends_its_answer_alone() -> None:
    """It compiles; what decoding it takes grows beyond any limit."""
    pattern = "^((((a{1,1000}b?){1,1000}c?){1,1000}d?){1,1000})$"
    try:
        guide = Guide(rules({"type": "string", "pattern": pattern}), False)
    except ApiRefusal:
        pytest.skip("this release refuses the pattern")
    other = Guide(rules(PERSON), False)
    with pytest.raises(ConstraintBroken, match="cannot be held"):
        for token in ids('"' + "abcd" * 4000):
            guide.allowed()
            guide.accept(token)
    assert takes(other, '{"name":"x","age":3}')


def test_a_thousand_tools_compile() -> None:
    tools = {f"tool_{at}": dataclasses.replace(TOOLS["now"], name=f"tool_{at}") for at in range(1024)}
    many = rules(tools=tools)
    assert takes(Guide(many, False), call("tool_1023")) and not takes(Guide(many, False), call("tool_1024"))
