"""The text of a call's arguments, `<arg_key>key</arg_key><arg_value>value</arg_value>…`, as JSON while it comes.

The form writes strings as they are and everything else as JSON, so which of them a value is follows from its schema:
a value that can only be a string is one; one that can be none is JSON; of what may be both, a text that is JSON of one
of the other types is that, and every other a string. What is settled is passed on at once, so that a long string
streams; the pieces, joined, do not depend on how the text was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from foundation.reading import Unreadable, parse_json
from runtime.api.schemas import kinds, type_of

_NUMBER_BEGUN = re.compile(r"-?\d*(?:\.\d*)?(?:[eE][+-]?\d*)?")
_WORDS = {"null": ("null",), "boolean": ("true", "false")}
_OPENS = {"object": "{", "array": "["}


class ArgumentWriter:
    """The arguments of one call. Each method returns the JSON that it settles.

    schema: of the arguments, an object. exact: whether values of the model are held to it, so that JSON in them can be
    passed on as it comes.
    """

    def __init__(self, schema: Mapping[str, Any], exact: bool):
        self._schema, self._exact = schema, exact
        properties = schema.get("properties")
        self._properties: dict[str, Any] = properties if isinstance(properties, dict) else {}
        self._written: set[str] = set()
        self._value: _Value | None = None

    def begin(self, key: str) -> str:
        """A value of this name begins. One that was there before is left out."""
        if key in self._written:
            self._value = None
            return ""
        lead = ", " if self._written else "{"
        self._written.add(key)
        types = kinds(self._properties.get(key, {}), self._schema)
        if types == {"string"}:
            self._value = _String()
        elif "string" in types:
            self._value = _Either(types - {"string"})
        else:
            self._value = _Passed() if self._exact and key in self._properties else _Held(types)
        return f"{lead}{_dumped(key)}: {self._value.begin()}"

    def put(self, text: str) -> str:
        """More of the value's text."""
        return self._value.put(text) if self._value else ""

    def end(self) -> str:
        """The value is whole."""
        value, self._value = self._value, None
        return value.end() if value else ""

    def close(self) -> str:
        """The call is whole."""
        return self.end() + ("}" if self._written else "{}")


class _Value(Protocol):
    def begin(self) -> str: ...
    def put(self, text: str) -> str: ...
    def end(self) -> str: ...


class _String:
    def begin(self) -> str:
        return '"'

    def put(self, text: str) -> str:
        return _dumped(text)[1:-1]

    def end(self) -> str:
        return '"'


class _Passed:
    """JSON as it comes."""

    def begin(self) -> str:
        return ""

    def put(self, text: str) -> str:
        return text

    def end(self) -> str:
        return ""


class _Held:
    """JSON if it is some, when it is whole; else a string."""

    def __init__(self, types: frozenset[str]):
        self._text, self._types = "", types

    def begin(self) -> str:
        return ""

    def put(self, text: str) -> str:
        self._text += text
        return ""

    def end(self) -> str:
        try:
            value = parse_json(self._text)
        except Unreadable:
            return _dumped(self._text)
        return _dumped(value)


class _Either(_Held):
    """A string as soon as the text can be nothing else."""

    _said = False

    def put(self, text: str) -> str:
        if self._said:
            return _dumped(text)[1:-1]
        self._text += text
        if any(_begins(self._text, kind) for kind in self._types):
            return ""
        self._said = True
        return _dumped(self._text)[:-1]

    def end(self) -> str:
        if self._said:
            return '"'
        try:
            value = parse_json(self._text)
        except Unreadable:
            return _dumped(self._text)
        return _dumped(value) if type_of(value) & self._types else _dumped(self._text)


def _begins(text: str, kind: str) -> bool:
    """Whether a text may be the beginning of JSON of a type."""
    if kind in _WORDS:
        return any(word.startswith(text) for word in _WORDS[kind])
    if kind in _OPENS:
        return text[:1] in ("", _OPENS[kind])
    return _NUMBER_BEGUN.fullmatch(text) is not None


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
