"""Schemas and tools as grammars over tokens (llguidance), compiled off the event loop and kept in a bounded cache.

An answer in JSON has no white space between its parts, so that it cannot go on for ever in them. A call's arguments are
written in the order of the schema's properties; strings as they are, everything else as JSON
(`<arg_key>k</arg_key><arg_value>v</arg_value>`). What llguidance cannot hold to it refuses, and so does the API; only a
tool that does not ask for `strict` is then held to the form of a call alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
import numpy as np

from foundation.child import Child, ChildFailure
from runtime.api.refusal import ApiRefusal, wrong
from runtime.api.schemas import (
    Endless,
    Walk,
    beyond_counting,
    branches,
    definitions,
    divisor,
    kinds,
    overlapping,
    type_of,
)
from runtime.api.tools import MOST_TOOLS, Tool
from runtime.api.vocabulary import Vocabulary

MOST_HELD = MOST_TOOLS + 256  # compiled grammars, those asked for last: an agent brings its tools with every turn
MOST_SCHEMA_BYTES = 1 << 20  # of a request's schemas, one by one
MOST_GRAMMAR_BYTES = 1 << 24  # of what a schema becomes: each part has its definitions beside it
MOST_REMAINDERS = 10_000  # of numbers held to `multipleOf`: llguidance goes through all of them, however many
_MOST_WORK = 200_000  # of following a tool's references and choices
_TRIALS = Child("runtime.api.grammar_trial")
# One spelling of each text: else a declared property would be taken for another one by its name in escapes.
_COMPACT = {
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrtbf\\"',
    "json_allow_general_unicode_escapes": False,
}
# Of what a grammar leaves no choice in, any tokens that spell it: else only those are allowed that a tokenizer would
# write, which would have to be asked for them here.
_FREE = '%llguidance {"no_forcing": true}'
_ANY = r"/(?s:.*)/"
_WHERE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")  # in the grammar that is made of a schema


class NoGrammar(Exception):
    """A schema that no answer can be held to: why, in a line."""


class _Tokens:
    """A vocabulary as llguidance reads one. No mark is text: a grammar names it by its id."""

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id = min(vocabulary.stop_ids, default=0)
        self.bos_token_id = None
        self.tokens = [b"\xff" + p if i in vocabulary.apart else p for i, p in enumerate(vocabulary.pieces)]
        self.special_token_ids = sorted(token for token in vocabulary.apart if token < vocabulary.size)

    def __call__(self, text: bytes | str) -> list[int]:
        """Not asked for, since no grammar forces anything (`_FREE`)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A grammar at its beginning, to be copied by who follows it. first: which marks it may begin with."""

    matcher: llguidance.LLMatcher
    first: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Calls:
    """Grammars of calls: of a call's name and the mark behind it, and of each tool's arguments from that mark to the
    call's end. inexact: tools that are held to the form alone."""

    names: llguidance.LLMatcher
    arguments: Mapping[str, llguidance.LLMatcher]
    inexact: frozenset[str] = frozenset()


class Grammars:
    """Compiles grammars for one vocabulary. Its methods take a while: not for the event loop. most: that are kept."""

    def __init__(self, vocabulary: Vocabulary, most: int = MOST_HELD):
        self._vocabulary, self._most = vocabulary, most
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._held: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """How many compiled ones are kept."""
        return len(self._held)

    def answer(self, schema: Any, param: str) -> llguidance.LLMatcher:
        """Of an answer that is JSON of a schema. Raises `ApiRefusal`."""
        try:
            return self._compiled("json", schema, lambda: _json(schema)).matcher
        except NoGrammar as error:
            raise wrong(f"the schema cannot be held to: {error}", param, "invalid_schema") from None

    def calls(self, tools: Mapping[str, Tool], param: str = "tools") -> Calls:
        """Of calls of these tools. Raises `ApiRefusal` for a strict one that its schema cannot be held to."""
        made = {name: self.arguments(tool, f"{param}[{at}]") for at, (name, tool) in enumerate(tools.items())}
        markup, ways, terms = self._vocabulary.markup, [], {}
        for mark in (markup.key, markup.call_end):
            may = [name for name, (form, _) in made.items() if mark in form.first]
            if may:
                terms[f"NAME{mark}"] = " | ".join(map(_literal, may))
                ways.append(f"NAME{mark} NL? <[{mark}]>")
        names = self._compiled("names", terms, lambda: _lark(f"start: {' | '.join(ways)}", **terms))
        inexact = frozenset(name for name, (_, exact) in made.items() if not exact)
        return Calls(names.matcher, {name: form.matcher for name, (form, _) in made.items()}, inexact)

    def arguments(self, tool: Tool, param: str) -> tuple[_Compiled, bool]:
        """Of a call's arguments, from the first mark behind its name to the mark that ends it, and whether it holds to
        the whole of the tool's schema. Raises `ApiRefusal` for a strict tool that it cannot be held to."""
        schema = dict(tool.parameters)
        try:
            return self._compiled("arguments", schema, lambda: self._arguments(schema)), True
        except NoGrammar as error:
            if tool.strict:
                message = f"the schema cannot be held to: {error}"
                raise wrong(message, param, "invalid_schema") from None
        except ApiRefusal as refusal:
            refusal.param = param
            raise
        return self._compiled("arguments", {}, lambda: self._arguments({})), False

    def _compiled(self, kind: str, given: Any, write: Callable[[], str]) -> _Compiled:
        """Raises `NoGrammar`."""
        name = f"{kind} {json.dumps(given, ensure_ascii=False)}"
        if len(name) > MOST_SCHEMA_BYTES:
            raise NoGrammar(f"it is larger than {MOST_SCHEMA_BYTES:,} bytes")
        with self._lock:
            if (found := self._held.get(name)) is not None:
                self._held.move_to_end(name)
                return found
            if self._tokenizer is None:
                ends = sorted(self._vocabulary.stop_ids) or [0]
                tokens = llguidance.TokenizerWrapper(_Tokens(self._vocabulary))
                self._tokenizer = llguidance.LLTokenizer(tokens, self._vocabulary.size, ends)
        text = write()
        self._try(text)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise NoGrammar(_first_line(matcher.get_error()))
        markup = self._vocabulary.markup
        marks = [token for token in (markup.key, markup.call_end) if token is not None]
        allowed = np.unpackbits(np.frombuffer(matcher.deep_copy().compute_bitmask(), np.uint8), bitorder="little")
        made = _Compiled(matcher, frozenset(token for token in marks if allowed[token]))
        with self._lock:
            self._held[name] = made
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return made

    def _try(self, grammar: str) -> None:
        """Compiles it where that does no harm. Raises `NoGrammar`."""
        vocabulary = self._vocabulary
        marks = [token for token in dataclasses.astuple(vocabulary.markup) if token is not None]
        end = min(vocabulary.stop_ids, default=0)
        try:
            error = _TRIALS.ask({"grammar": grammar, "marks": [*(mark for mark in marks if mark != end), end]})["error"]
        except ChildFailure as failure:
            raise NoGrammar(f"compiling it {failure}") from None
        if error is not None:
            raise NoGrammar(_first_line(error))

    def _arguments(self, schema: Mapping[str, Any]) -> str:
        """Raises `NoGrammar`."""
        markup = self._vocabulary.markup
        key, between = f"<[{markup.key}]>", f"<[{markup.key_end}]> NL? <[{markup.value}]>"
        declared = schema.get("properties", {})
        needed = schema.get("required", [])
        if (
            not isinstance(declared, dict)
            or not isinstance(needed, list)
            or not all(isinstance(n, str) for n in needed)
        ):
            raise NoGrammar("`properties` is an object and `required` a list of names")
        needed = dict.fromkeys(needed)
        for word in ("$ref", "anyOf", "oneOf", "allOf", "not", "if", "patternProperties", "dependentRequired",
                     "dependentSchemas", "minProperties", "maxProperties", "propertyNames"):  # fmt: skip
            if word in schema:
                raise NoGrammar(f"{word} at the top of a tool's arguments")
        _refuse_numbers(schema)
        extra = schema.get("additionalProperties", not declared)
        named = {**declared, **{name: {} for name in needed if name not in declared}}
        rules, terms, walk, size = [], {}, Walk(_MOST_WORK), 0
        parts = []
        for at, (name, part) in enumerate(named.items()):
            rules.append(f"value{at}: {_value(part, schema, at, terms, walk)}")
            if (size := size + len(rules[-1])) > MOST_GRAMMAR_BYTES:
                raise NoGrammar(f"as a grammar it is larger than {MOST_GRAMMAR_BYTES:,} bytes")
            pair = f"{key} {_literal(name)} {between} value{at} <[{markup.value_end}]> NL?"
            parts.append(pair if name in needed else f"({pair})?")
        if extra is not False:
            other = extra if isinstance(extra, dict) else {}
            rules.append(f"other: {_value(other, schema, len(named), terms, walk)}")
            terms["KEY"] = _ANY
            parts.append(f"({key} KEY {between} other <[{markup.value_end}]> NL?)*")
        return _lark("\n".join([f"start: {' '.join([*parts, f'<[{markup.call_end}]>'])}", *rules]), **terms)


def _value(schema: Any, root: Mapping[str, Any], at: int, terms: dict[str, str], walk: Walk) -> str:
    """The right side of a rule for a value. terms: where the terminals go that it needs. Raises `NoGrammar`."""
    try:
        return " | ".join(_choices(schema, root, at, terms, walk))
    except Endless:
        raise NoGrammar("its references and choices lead too far") from None


def _choices(schema: Any, root: Mapping[str, Any], at: int, terms: dict[str, str], walk: Walk) -> list[str]:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise NoGrammar("the schema of a property is an object")
    types = kinds(schema, root, walk)
    if "string" not in types:
        return [f"%json {_inlined(schema, root)}"]
    if overlapping(schema, root, walk):
        raise NoGrammar("oneOf whose choices may both hold")
    found = []
    for number, branch in enumerate(branches(schema, root, walk)):
        own = kinds(branch, root, walk)
        if "$ref" in branch:
            raise NoGrammar(f"{str(branch['$ref'])[:80]!r} is not in the schema")
        if own == {"string"} or "type" not in branch and "string" in own:
            terms[f"TEXT{at}_{number}"] = _text(branch, own)
            found.append(f"TEXT{at}_{number}")
        elif "string" not in own:
            found.append(f"%json {_inlined(branch, root)}")
    if not found:
        raise NoGrammar("a property whose types are not clear")
    return found


_COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "$dynamicRef", "$recursiveRef")
_OF_ONE_TYPE = (
    "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "properties", "patternProperties",
    "additionalProperties", "propertyNames", "required", "minProperties", "maxProperties", "dependentRequired",
    "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip


def _text(schema: Mapping[str, Any], types: frozenset[str]) -> str:
    """The terminal of a string as it stands in a call. Formats are notes, as JSON Schema has them."""
    if word := next((word for word in _COMBINING if word in schema), None):
        raise NoGrammar(f"{word} of a string")
    if types != {"string"} and (word := next((word for word in _OF_ONE_TYPE if word in schema), None)):
        raise NoGrammar(f"{word} of what has no type")
    parts = []
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list):
            fitting = [value for value in values if type_of(value) & types]
            if not fitting:
                raise NoGrammar("no value that is listed has the type that is asked for")
            written = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in fitting]
            parts.append(f"({' | '.join(map(_literal, written))})")
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if types == {"string"} and (low or high is not None):
        if not all(type(bound) is int and bound >= 0 for bound in (low, 0 if high is None else high)):
            raise NoGrammar("minLength and maxLength are whole numbers")
        parts.append(f"/(?s:.{{{low},{'' if high is None else high}}})/")
    if types == {"string"} and "pattern" in schema:
        parts.append(_pattern(schema["pattern"]))
    return " & ".join(parts) or _ANY


def _pattern(pattern: Any) -> str:
    """A pattern of JSON Schema, which may match anywhere, as a terminal, which matches all of the text."""
    if not isinstance(pattern, str):
        raise NoGrammar("a pattern is a string")
    before, after = not pattern.startswith("^"), not re.search(r"(?<!\\)(?:\\\\)*\$$", pattern)
    inner = pattern[0 if before else 1 : None if after else -1]
    whole = f"{'(?s:.*)' if before else ''}(?:{inner}){'(?s:.*)' if after else ''}"
    escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", whole).replace("\n", "\\n")
    return f"/{escaped}/"


def _inlined(schema: Any, root: Mapping[str, Any]) -> str:
    """A schema within a grammar. Raises `NoGrammar` for what is none."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise NoGrammar("a schema is an object")
    written = json.dumps({**schema, "x-guidance": _COMPACT})
    if '"$ref"' not in written:
        return written
    return json.dumps({**definitions(root), **schema, "x-guidance": _COMPACT})


def _refuse_numbers(schema: Any) -> None:
    """Raises `NoGrammar`."""
    if said := beyond_counting(schema):
        raise NoGrammar(said)
    if divisor(schema) > MOST_REMAINDERS:
        raise NoGrammar(f"multipleOf of numbers that leave more than {MOST_REMAINDERS:,} remainders")


def _json(schema: Any) -> str:
    _refuse_numbers(schema)
    return _lark(f"start: %json {_inlined(schema, {})}")


def _lark(rules: str, **terms: str) -> str:
    lines = [rules, *(f"{name}: {term}" for name, term in terms.items()), r"NL: /\n/"]
    return llguidance.LLMatcher.grammar_from_lark("\n".join([_FREE, *lines]) + "\n")


def _literal(text: str) -> str:
    if not text:
        return "/()/"
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    found = _WHERE.sub("", " ".join(text.strip().split("\n")[0].split()))
    return (found[:200] or "no grammar").rstrip(".")
