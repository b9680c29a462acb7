"""The state machine: what an answer's tokens tell, and that bursts and borders cannot matter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.events import CallBegun, CallEnded, CallGrown, Event, Said, Thought, merged
from runtime.api.reader import Reader
from runtime.api.stops import StopText
from runtime.api.tools import Tool
from tests.api.words import MARKUP, USER, VOCABULARY, call, ids

ANY = {"anyOf": [{"type": "string"}, {"type": "null"}]}
WEATHER = Tool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "unit": ANY,
            "where": {"type": "object"}, "mixed": {}, "list": {"type": ["string", "array"]},
        },
    },
)  # fmt: skip
TOOLS = {"weather": WEATHER, "now": Tool("now", {})}


def told(text: str | list[int], thinking: bool = False, cut: bool = False, **given: Any) -> list[Event]:
    tokens = ids(text) if isinstance(text, str) else text
    reader = Reader(VOCABULARY, thinking, given.pop("tools", TOOLS), ends=frozenset({USER}), **given)
    found = [event for token in tokens for event in reader.put(token)]
    return merged(found + reader.end(cut))


def called(name: str, arguments: str, whole: bool = True) -> list[Event]:
    return [CallBegun(name), CallGrown(arguments)] + [CallEnded()] * whole


marks = [token for token in vars(MARKUP).values() if token is not None]
words = ids('weather city days unit 12 null " { } [ true a\n\n -1e5 STOP 🦖 🦖')
any_tokens = st.lists(st.sampled_from([*marks * 2, *words, *range(0, 1024, 37), USER]), max_size=40)


def test_thoughts_text_and_calls_are_told_apart() -> None:
    text = "because</think>Let me see. " + call("weather", city='Pa"ris', days="3") + call("now") + "<|user|>"
    assert told(text, thinking=True) == [
        Thought("because"), Said("Let me see. "),
        *called("weather", '{"city": "Pa\\"ris", "days": 3}'), *called("now", "{}"),
    ]  # fmt: skip


def test_a_call_without_arguments_is_one_call_with_an_empty_object() -> None:
    assert told(call("now")) == called("now", "{}")


def test_a_name_is_told_whole() -> None:
    reader = Reader(VOCABULARY, tools=TOOLS)
    name = "weather_in_town"
    begun = [event for token in ids(call(name, city="x")) for event in reader.put(token) if "Begun" in str(event)]
    assert begun == [CallBegun(name)] and len(ids(name)) > 1


def test_a_call_in_unclosed_thoughts_is_a_call() -> None:
    assert told(f"hm{call('now')}", thinking=True) == [Thought("hm"), *called("now", "{}")]


def test_a_long_string_streams_as_it_comes() -> None:
    """Nothing of it is held back but half a character."""
    reader, value = Reader(VOCABULARY, tools=TOOLS), "long text " * 400
    grown, fed = "", ""
    for token in ids(f"<tool_call>weather<arg_key>city</arg_key><arg_value>{value}"):
        grown += "".join(event.json for event in reader.put(token) if isinstance(event, CallGrown))
        if grown:
            fed = grown
            assert value.startswith(fed.removeprefix('{"city": "'))
    assert grown == f'{{"city": "{value}'


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("unit", "null", None), ("unit", "nul", "nul"), ("unit", "nullable", "nullable"), ("unit", "12", "12"),
        ("unit", "", ""), ("unit", "celsius", "celsius"), ("unit", '"celsius"', '"celsius"'), ("days", "3", 3),
        ("days", "three", "three"), ("where", '{"a": [1, 2]}', {"a": [1, 2]}), ("mixed", "1.5e3", 1500.0),
        ("mixed", "1.5.3", "1.5.3"), ("mixed", "true", True), ("mixed", "{not json", "{not json"),
        ("list", "[1]", [1]), ("list", "{}", "{}"), ("list", "[", "["), ("unknown", "[1]", [1]), ("city", "12", "12"),
        ("city", "a</tool_ca", "a</tool_ca"), ("city", "<think>x</think><arg_key>", "<think>x</think><arg_key>"),
    ],
)  # fmt: skip
def test_a_value_is_what_its_schema_says(key: str, text: str, value: Any) -> None:
    for exact in (False, True) if key not in ("days",) else (False,):
        tools = {"weather": Tool("weather", WEATHER.parameters, exact=exact)}
        _, grown, ended = told(call("weather", **{key: text}), tools=tools)
        assert isinstance(grown, CallGrown) and ended == CallEnded()
        assert json.loads(grown.json) == {key: value}


def test_a_key_twice_is_there_once() -> None:
    text = "<tool_call>weather" + "<arg_key>city</arg_key><arg_value>a</arg_value>" * 2 + "</tool_call>"
    assert told(text) == called("weather", '{"city": "a"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>wea", []),
        ("<tool_call>", []),
        ("<tool_call>weather<arg_key>ci", [CallBegun("weather")]),
        ("<tool_call>weather<arg_key>city</arg_key><arg_value>Par", called("weather", '{"city": "Par', whole=False)),
        ("<tool_call>weather<arg_key>city</arg_key><arg_value>P</arg_value>", called("weather", '{"city": "P"', False)),
    ],
)
def test_a_cut_call_shows_no_markup(text: str, expected: list[Event]) -> None:
    assert told(text, cut=True) == expected


def test_the_models_own_end_ends_a_call() -> None:
    text = "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris<|user|>"
    assert told(text) == called("weather", '{"city": "Paris"}')


def test_without_tools_the_marks_of_calls_are_text() -> None:
    text = f"a{call('weather', city='Paris')}b"
    assert told(text, tools=None) == [Said(text)]


def test_unclosed_thoughts_are_thoughts() -> None:
    assert told("all of it", thinking=True) == [Thought("all of it")]


def test_white_space_alone_is_nothing_in_front_of_a_call() -> None:
    assert told(f"\n</think>\n\n{call('now')}\n{call('now')}", thinking=True) == called("now", "{}") * 2
    assert told("\n</think>\n\n", thinking=True) == [Said("\n\n")]
    assert told("\n\ntext") == [Said("\n\ntext")]


def test_text_between_thoughts_and_a_call_survives() -> None:
    assert told(f"x</think>see: {call('now')} and more", thinking=True) == [
        Thought("x"), Said("see: "), *called("now", "{}")
    ]  # fmt: skip


def test_a_stop_string_is_looked_for_in_the_text_alone() -> None:
    found = told("a STOP b</think>c STOP d", thinking=True, stops=["STOP"])
    assert found == [Thought("a STOP b"), Said("c ")]
    assert told(call("weather", city="STOP"), stops=["STOP"]) == called("weather", '{"city": "STOP"}')


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_never_leaks(text: str, stops: list[str], data: st.DataObject) -> None:
    """The oracle cuts the whole text where the first stop string is complete."""
    ends = [(at, -len(stop)) for at in range(1, len(text) + 1) for stop in stops if text[:at].endswith(stop)]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    found, at = "", 0
    stream = StopText(stops)
    while at < len(text):
        step = data.draw(st.integers(1, 5))
        found += stream.put(text[at : at + step])
        at += step
        assert expected.startswith(found)
    assert found + stream.flush() == expected and (stream.found in stops) == bool(ends)


def test_split_characters_come_out_whole() -> None:
    tokens = ids("🦖🦕")
    assert len(tokens) > 2
    reader = Reader(VOCABULARY)
    shown = [event.text for token in tokens for event in reader.put(token) if isinstance(event, Said)]
    assert shown == ["🦖", "🦕"]


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<|user|>a</think>b<|assistant|><think>", True),
        ("<|user|><think><|assistant|></think>", False),
        ("<|user|><think><|assistant|>", False),
        ("<|assistant|><think>\n", True),
        ("plain", False),
    ],
)
def test_marks_of_earlier_turns_are_ignored(prompt: str, thinking: bool) -> None:
    assert VOCABULARY.thinking_after(ids(prompt)) is thinking


def well_formed(events: list[Event]) -> None:
    """Calls are begun, grown, and ended in that order; nothing is empty; no mark is in the text or thoughts."""
    open_call = False
    for event in events:
        match event:
            case CallBegun(name):
                assert not open_call and name.strip() == name != ""
                open_call = True
            case CallGrown(piece):
                assert open_call and piece
            case CallEnded():
                assert open_call
                open_call = False
            case Thought(text) | Said(text):
                assert not open_call and text and "tool_call>" not in text and "think>" not in text


@given(any_tokens, st.booleans(), st.booleans(), st.data())
def test_any_burst_of_any_tokens_tells_the_same(
    tokens: list[int], thinking: bool, cut: bool, data: st.DataObject
) -> None:
    """Whole, a token at a time and in bursts; and what is whole is JSON."""
    whole = told(tokens, thinking, cut, stops=["STOP"])
    well_formed(whole)
    reader, events, at = Reader(VOCABULARY, thinking, TOOLS, ["STOP"], frozenset({USER})), [], 0
    while at < len(tokens):
        step = data.draw(st.integers(1, 6))
        for token in tokens[at : at + step]:
            events += reader.put(token)
        at += step
    assert merged(events + reader.end(cut)) == whole
    assert reader.put(5) == [] and reader.end(cut) == []
    for event in whole if not cut else ():
        if isinstance(event, CallGrown):
            json.loads(event.json)


@given(any_tokens)
def test_plain_tokens_are_text(tokens: list[int]) -> None:
    """A completion shows what the tokenizer decodes."""
    found = told([t for t in tokens if t != USER], plain=True, cut=True)
    expected = VOCABULARY.tokenizer.decode([t for t in tokens if t != USER], skip_special_tokens=True)
    assert found == ([Said(expected)] if expected else [])
