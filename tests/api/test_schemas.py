"""Schemas of every kind: answers are valid, or cut, or the schema is refused before the first token; none runs on.

The oracle is jsonschema. Answers are made up (`synthetic`), and drawn from what the guide allows.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.api.events import CallGrown
from runtime.api.grammar import Grammars
from runtime.api.guide import Guide
from runtime.api.reader import Reader
from runtime.api.refusal import ApiRefusal
from runtime.api.schemas import Walk, kinds, overlapping, type_of
from runtime.api.synthetic import Invented
from runtime.api.tools import Tool
from runtime.serving.service import ConstraintBroken
from tests.api.test_guide import ENDS, rules
from tests.api.test_synthetic import INVENTOR, made
from tests.api.words import VOCABULARY

names = st.sampled_from(["a", "b", "name", "with space", 'quo"te', "ü"])
values = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from(["x", "", 'a"b', "ü", "null", "12"]))
leaves = st.one_of(
    st.just({}),
    st.just(True),
    st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"]).map(lambda t: {"type": t}),
    st.lists(values, min_size=1, max_size=3).map(lambda found: {"enum": found}),
    values.map(lambda value: {"const": value}),
    st.tuples(st.integers(0, 3), st.integers(3, 6)).map(
        lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}
    ),
    st.sampled_from(["^[a-z]{2,4}$", "^x|y$", "[0-9]", "^(ab)+/$", "a{1,3}"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.sampled_from(["date", "date-time", "uuid", "ipv4", "email"]).map(lambda f: {"type": "string", "format": f}),
    st.tuples(st.integers(-5, 5), st.integers(5, 9)).map(
        lambda n: {"type": "integer", "minimum": n[0], "maximum": n[1]}
    ),
    st.sampled_from([["string", "null"], ["integer", "string"], ["object", "null"]]).map(lambda t: {"type": t}),
    st.sampled_from(
        [
            {"type": "integer", "exclusiveMinimum": 0},
            {"type": "integer", "multipleOf": 5},
            {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.5},
            {"type": "string", "contentEncoding": "base64", "deprecated": True},
            {"type": "string", "pattern": r"^v\d+\.\d+\.\d+$"},
            {"type": "string", "pattern": r"^(?:[a-z0-9]+-)*[a-z0-9]+$", "maxLength": 12},
            {"const": {"a": [1, None]}},
        ]
    ),
    st.sampled_from(
        [{"not": {}}, {"uniqueItems": True, "type": "array"}, {"if": {}}, {"type": "string", "pattern": "(?=x)"}]
    ),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        st.tuples(properties, st.booleans(), st.booleans()).map(
            lambda p: {
                "type": "object",
                "properties": p[0],
                "required": list(p[0])[: 1 + p[1]],
                "additionalProperties": p[2],
            }  # fmt: skip
        ),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[1] + 2}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
        st.lists(inner, min_size=1, max_size=2).map(lambda found: {"oneOf": found}),
        st.tuples(properties, inner).map(
            lambda p: {"allOf": [{"type": "object", "properties": p[0]}, {"properties": {"z": p[1]}}]}
        ),
        st.tuples(inner, inner).map(lambda p: {"type": "array", "prefixItems": list(p), "items": False}),
        st.tuples(properties, inner).map(
            lambda p: {"type": "object", "properties": p[0], "patternProperties": {"^x-": p[1]}}
        ),
        st.tuples(properties, st.sampled_from([{"minProperties": 1}, {"maxProperties": 2}])).map(
            lambda p: {"type": "object", "properties": p[0], **p[1]}
        ),
        properties.map(
            lambda each: {
                "type": "object",
                "properties": {**each, "next": {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}]}},
                "$defs": {"x": {"type": "object", "properties": {"v": {"type": "integer"}}, "required": ["v"]}},
            }
        ),
    )


plain = st.recursive(leaves, larger, max_leaves=5)
schemas = plain | plain.map(lambda each: {"$ref": "#/$defs/x", "$defs": {"x": each}})


def drawn(guide: Guide, seed: int, most: int = 60) -> list[int]:
    rng, found = np.random.default_rng(seed), []
    while len(found) < most and found[-1:] != [*ENDS]:
        allowed = guide.allowed()
        assert allowed is not None
        if not allowed.any():
            break
        found.append(int(rng.choice(np.flatnonzero(allowed))))
        guide.accept(found[-1])
    return found


few, many = settings(max_examples=10), settings(max_examples=500)
some_properties = st.dictionaries(names, plain, max_size=3)


@few
@given(schemas, st.integers(0, 1000))
def test_answers_are_valid_or_cut_or_refused(schema: Any, seed: int) -> None:
    check_answers(schema, seed)


@pytest.mark.slow
@many
@given(schemas, st.integers(0, 1000))
def test_answers_of_many_schemas(schema: Any, seed: int) -> None:
    check_answers(schema, seed)


@few
@given(some_properties, st.booleans(), st.integers(0, 1000))
def test_arguments_are_valid_or_cut_or_refused(properties: dict[str, Any], strict: bool, seed: int) -> None:
    check_arguments(properties, strict, seed)


@pytest.mark.slow
@many
@given(some_properties, st.booleans(), st.integers(0, 1000))
def test_arguments_of_many_schemas(properties: dict[str, Any], strict: bool, seed: int) -> None:
    check_arguments(properties, strict, seed)


spelt = st.sampled_from(["a", "/", "\n", "\b", "\x7f", "\x01", '"', "\\", "ü", "\u2028", "😀", "name"])


@settings(max_examples=30)
@given(spelt, st.sampled_from(["properties", "patternProperties"]))
def test_a_property_is_the_same_in_any_spelling(name: str, declared: str) -> None:
    """What JSON may write in several ways is not a property of the schema's in one, and anything in another."""
    key = name if declared == "properties" else f"^{re.escape(name)}$"
    schema = {"type": "object", declared: {key: {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    try:
        matcher = Grammars(VOCABULARY).answer(schema, "schema")
    except ApiRefusal as refusal:
        assert refusal.status == 400
        return
    units = [int.from_bytes(name.encode("utf-16-be")[at : at + 2], "big") for at in range(0, 2 * _units(name), 2)]
    spellings = {json.dumps(name), json.dumps(name, ensure_ascii=False), name.replace("/", "\\/").join('""')}
    spellings |= {"".join(f"\\u{unit:{form}}" for unit in units).join('""') for form in ("04x", "04X")}
    for text in spellings:
        for value in ("1", '"x"'):
            answer = f"{{{text}:{value}}}"
            tokens = VOCABULARY.tokenizer.encode(answer)
            follower = matcher.deep_copy()
            if follower.try_consume_tokens(tokens) == len(tokens) and follower.is_accepting():
                jsonschema.validate(json.loads(answer), schema)
    plain = VOCABULARY.tokenizer.encode('{"other":"x"}')
    assert matcher.deep_copy().try_consume_tokens(plain) == len(plain)


def _units(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


def check_answers(schema: Any, seed: int) -> None:
    try:
        held = rules(schema)
    except ApiRefusal as refusal:
        assert refusal.status == 400
        return
    for tokens in (made(Invented(INVENTOR, Guide(held, False), 150, ENDS), 150), drawn(Guide(held, False), seed)):
        if tokens[-1:] == [*ENDS]:
            text = VOCABULARY.tokenizer.decode(tokens[:-1])
            jsonschema.validate(json.loads(text), schema)


def check_arguments(properties: dict[str, Any], strict: bool, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties)[:2],
        "additionalProperties": False,
    }
    tool = Tool("f", schema, strict=strict)
    try:
        held = rules(tools={"f": tool}, required=True, parallel=False)
    except ApiRefusal as refusal:
        assert refusal.status == 400 and strict
        return
    exact = held.calls is not None and not held.calls.inexact
    for make in (
        lambda: made(Invented(INVENTOR, Guide(held, False), 200, ENDS), 200),
        lambda: drawn(Guide(held, False), seed),
    ):
        try:
            tokens = make()
        except ConstraintBroken:
            continue
        reader = Reader(VOCABULARY, False, {"f": Tool("f", schema, exact=exact)}, ends=ENDS)
        events = [event for token in tokens for event in reader.put(token)]
        if tokens[-1:] == [*ENDS]:
            arguments = json.loads("".join(event.json for event in events if isinstance(event, CallGrown)))
            if exact:
                jsonschema.validate(arguments, schema)


@given(schemas, values)
def test_no_value_of_a_schema_is_of_a_type_that_it_has_not(schema: Any, value: Any) -> None:
    """What decides whether a text is a string or JSON."""
    if isinstance(schema, dict) and jsonschema.Draft202012Validator(schema).is_valid(value):
        assert type_of(value) & kinds(schema, schema)


@pytest.mark.parametrize("word", ["anyOf", "allOf", "oneOf"])
def test_a_schema_that_goes_round_and_round_ends(word: str) -> None:
    schema = {"$defs": {"x": {word: [{"$ref": "#/$defs/x"}] * 50}}, "$ref": "#/$defs/x"}
    assert kinds(schema, schema)
    with pytest.raises(ApiRefusal):
        rules(
            tools={
                "f": Tool("f", {"properties": {"a": {"$ref": "#/$defs/x"}}, **schema, "type": "object"}, strict=True)
            }
        )


@pytest.mark.parametrize(
    ("schema", "both"),
    [
        ({"oneOf": [{}, {}]}, True),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, True),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}, {"type": "string"}]}, True),
        ({"anyOf": [{"type": "null"}, {"oneOf": [{"$ref": "#/$defs/s"}, {"const": "a"}]}]}, True),
        ({"oneOf": [{"const": "a"}, {"const": "a"}]}, True),
        ({"oneOf": [{"const": "a"}, {"enum": ["b", 3]}]}, False),
        ({"oneOf": [{"type": "string"}, {"type": "null"}, {"type": ["integer", "array"]}]}, False),
        ({"anyOf": [{"type": "string"}, {"type": "string"}]}, False),
    ],
)
def test_a_choice_of_exactly_one_is_no_choice_of_any(schema: Any, both: bool) -> None:
    """A strict tool is refused where two choices may both hold; where they cannot, any of them is exactly one."""
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": {"s": {"type": "string"}}}
    tool = {"f": Tool("f", parameters, strict=True)}
    if not both:
        assert not rules(tools=tool).calls.inexact  # type: ignore[union-attr]
        return
    with pytest.raises(ApiRefusal, match="oneOf"):
        rules(tools=tool)


WIDE = {f"k{at}": 0 for at in range(20_000)}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, -(2**63)]}}}, "SIGSEGV"),
        ({"type": "integer", "multipleOf": 2**31}, "remainders"),
        ({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}, "remainders"),
        ({"oneOf": [{"const": str(at)} for at in range(5000)]}, None),
        ({"oneOf": [{}] * 100_000}, "oneOf"),
        ({"anyOf": [{}] * 60_000, **WIDE}, "lead too far"),
        ({"anyOf": [{"$ref": "#/$defs/wide"}] * 5000}, "lead too far"),
    ],
)  # fmt: skip
def test_a_schema_that_would_take_the_server_along_is_refused(schema: Any, said: str | None) -> None:
    """By its end, by hours, or by all memory."""
    wide = {"$defs": {"wide": WIDE}} if "wide" in str(schema) else {}
    parameters = {"type": "object", "properties": {"a": schema}, **wide}
    if said is None:
        assert not rules(tools={"f": Tool("f", parameters, strict=True)}).calls.inexact  # type: ignore[union-attr]
        return
    with pytest.raises(ApiRefusal, match=said):
        rules(tools={"f": Tool("f", parameters, strict=True)})
    assert rules(tools={"f": Tool("f", parameters)}).calls.inexact == {"f"}  # type: ignore[union-attr]


@pytest.mark.parametrize("needed", [[[]], [{"a": 1}], [5], "a", None])
def test_what_is_required_is_a_list_of_names(needed: Any) -> None:
    with pytest.raises(ApiRefusal, match="`required` a list of names"):
        rules(tools={"f": Tool("f", {"type": "object", "required": needed}, strict=True)})


@pytest.mark.parametrize(
    ("one", "other", "both"), [(1, 1.0, True), (1, True, False), ([1], [1.0], True), ({"a": [1]}, {"a": [True]}, False)]
)
def test_values_that_are_listed_twice_are_equal_as_json(one: Any, other: Any, both: bool) -> None:
    assert overlapping({"oneOf": [{"const": one}, {"enum": ["x", other]}]}, {}, Walk()) == both


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": []},
        {"type": "string", "enum": [1, 2]},
        {"if": {"type": "string"}, "then": {"maxLength": 2}},
        {"minLength": 5},
        {"minimum": 5},
        {"properties": {"b": {"type": "integer"}}},
        {"type": "integer", "minimum": 10**30},
        {"type": "array", "items": {"type": "number", "exclusiveMaximum": -1e30}},
        {"type": "object", "minProperties": 3, "additionalProperties": {"type": "integer"}},
        {"type": "object", "minProperties": 2, "patternProperties": {"^x": {}}, "additionalProperties": False},
    ],
)
def test_what_would_be_held_to_in_form_alone_is_refused(schema: Any) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "additionalProperties": False}
    with pytest.raises(ApiRefusal):
        rules(tools={"f": Tool("f", parameters, strict=True)})
    assert rules(tools={"f": Tool("f", parameters)}).calls.inexact == {"f"}  # type: ignore[union-attr]
    if "type" in schema:  # others are any value, or one that jsonschema tells, as JSON
        with pytest.raises(ApiRefusal):
            rules(schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "enum": ["aaa", "b"], "maxLength": 1}, "b"),
        ({"type": "string", "enum": ["xa", "yb"], "pattern": "^y"}, "yb"),
        ({"enum": ["a", "b"], "const": "b"}, "b"),
        ({"type": "string", "enum": [1, "one"]}, "one"),
        ({"type": "integer", "maximum": 2**64 - 1, "minimum": 2**63 - 1}, str(2**63 - 1)),
        ({"type": "object", "required": ["k"], "properties": {"k": {"const": 1}}, "additionalProperties": False,
          "minProperties": 1}, '{"k":1}'),
    ],
)  # fmt: skip
def test_of_listed_values_only_those_are_left_that_the_rest_allows(schema: Any, text: str) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    held = rules(tools={"f": Tool("f", parameters, strict=True)}, required=True, parallel=False)
    for seed in range(3):
        tokens = drawn(Guide(held, False), seed)
        reader = Reader(VOCABULARY, False, {"f": Tool("f", parameters)}, ends=ENDS)
        events = [event for token in tokens for event in reader.put(token)]
        arguments = json.loads("".join(event.json for event in events if isinstance(event, CallGrown)))
        assert arguments == {"a": text if schema.get("type") not in ("integer", "object") else json.loads(text)}
