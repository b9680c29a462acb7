"""Made-up answers: of the length that was asked for, valid, and ended in time."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from runtime.api.events import CallGrown, Said, Thought, merged
from runtime.api.guide import Guide
from runtime.api.reader import Reader
from runtime.api.synthetic import Invented, Inventor
from runtime.api.tools import Tool
from tests.api.test_guide import ENDS, PERSON, TOOLS, rules
from tests.api.words import VOCABULARY

INVENTOR = Inventor(VOCABULARY)
DEEP = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "minItems": 2, "items": {
            "type": "object", "properties": {"what": {"type": "string"}, "cost": {"type": "number"}},
            "required": ["what", "cost"], "additionalProperties": False,
        }},
        "kind": {"enum": ["alpha", "beta"]}, "when": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["steps", "kind", "when", "more"], "additionalProperties": False,
}  # fmt: skip


def made(constraint: Invented, most: int) -> list[int]:
    """What a service draws that keeps to a constraint."""
    found: list[int] = []
    while len(found) < most:
        allowed = constraint.allowed()
        if not allowed.any():
            break
        assert np.count_nonzero(allowed) == 1
        constraint.copy().accept(int(np.argmax(allowed)))
        found.append(int(np.argmax(allowed)))
        if found[-1] in ENDS:
            break
        constraint.accept(found[-1])
    return found


def answer(
    most: int, thinking: bool = False, tools: dict[str, Tool] | None = None, **given: Any
) -> tuple[Any, list[int]]:
    tokens = made(Invented(INVENTOR, Guide(rules(tools=tools, **given), thinking), most, ENDS, most), most)
    reader = Reader(VOCABULARY, thinking, tools, ends=ENDS)
    events = [event for token in tokens for event in reader.put(token)]
    return merged(events + reader.end(cut=tokens[-1:] != [*ENDS])), tokens


@pytest.mark.parametrize("most", [1, 2, 7, 100])
@pytest.mark.parametrize("thinking", [False, True])
def test_text_is_as_long_as_was_asked_for(most: int, thinking: bool) -> None:
    events, tokens = answer(most, thinking)
    assert len(tokens) == most and not ENDS & set(tokens)
    if thinking and most >= 7:
        thought, said = events
        assert isinstance(thought, Thought) and isinstance(said, Said) and len(said.text.split()) >= most // 2


@pytest.mark.parametrize(
    "schema", [PERSON, DEEP, {"type": "integer"}, {"type": "string"}, {"type": "object"}, {"type": "array"}]
)
@pytest.mark.parametrize("thinking", [False, True])
def test_json_is_valid_and_ends_in_time(schema: Any, thinking: bool) -> None:
    for most in (130, 200, 400):
        events, tokens = answer(most, thinking, schema=schema)
        assert tokens[-1] in ENDS and len(tokens) <= most
        jsonschema.validate(json.loads(events[-1].text), schema)
        if schema is PERSON or schema is DEEP:
            assert len(tokens) >= most - 3  # its strings are as long as there is room for


@pytest.mark.parametrize("name", list(TOOLS))
def test_a_call_that_is_asked_for_is_valid(name: str) -> None:
    events, tokens = answer(150, True, {name: TOOLS[name]}, required=True, parallel=False)
    assert tokens[-1] in ENDS
    (grown,) = [event.json for event in events if isinstance(event, CallGrown)]
    jsonschema.validate(json.loads(grown), TOOLS[name].parameters)


def test_what_does_not_fit_is_cut() -> None:
    assert len(answer(5, schema=DEEP)[1]) == 5
