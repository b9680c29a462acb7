"""What a JSON Schema says of the types a value may have, before a grammar is made of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_MOST_LEVELS = 64  # of choices in choices, through references
_MOST_WORK = 20_000


class Endless(Exception):
    """A schema whose references and choices lead further than they are followed."""


class Walk:
    """How far references and choices are followed: so many keywords, listed values and choices are looked at."""

    def __init__(self, most: int = _MOST_WORK):
        self._left = most

    def take(self, count: int) -> None:
        """Raises `Endless` where it is too far."""
        self._left -= count
        if self._left < 0:
            raise Endless


def kinds(schema: Any, root: Mapping[str, Any], walk: Walk | None = None) -> frozenset[str]:
    """The types that a value of `schema` may have; all of them where it does not say. root: where its `$ref` point.
    Raises `Endless` on a walk of others; without one it then does not say."""
    if walk is not None:
        return _kinds(schema, root, walk, 0)
    try:
        return _kinds(schema, root, Walk(), 0)
    except Endless:
        return TYPES


def _kinds(schema: Any, root: Mapping[str, Any], walk: Walk, level: int) -> frozenset[str]:
    walk.take(1)
    if not isinstance(schema, Mapping) or level > _MOST_LEVELS:
        return TYPES
    schema = resolved(schema, root, walk)
    found = TYPES
    match schema.get("type"):
        case str() as name if name in TYPES:
            found = frozenset({name})
        case list() as names:
            found = frozenset(name for name in names if isinstance(name, str)) & TYPES or TYPES
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list) and values:
            walk.take(len(values))
            found = found & frozenset().union(*map(type_of, values)) or found
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list) and schema[word]:
            each = [_kinds(branch, root, walk, level + 1) for branch in schema[word]]
            found = found & frozenset().union(*each) or found
    for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found = found & _kinds(branch, root, walk, level + 1) or found
    return found


def type_of(value: Any) -> frozenset[str]:
    """JSON Schema's names of what a JSON value is."""
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"integer", "number"} if value.is_integer() else {"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any], walk: Walk) -> Mapping[str, Any]:
    """What a schema's `$ref` into its own document points to, with what stands beside it; the schema itself where it
    points nowhere that is known, or to itself."""
    seen: set[str] = set()
    while isinstance(where := schema.get("$ref"), str) and where.startswith("#") and where not in seen:
        seen.add(where)
        found: Any = root
        for step in where[1:].split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            return schema
        walk.take(len(where) + len(found) + len(schema))
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a schema needs beside it for its references to be found."""
    return {word: root[word] for word in ("$defs", "definitions", "components") if word in root}


def branches(schema: Any, root: Mapping[str, Any], walk: Walk) -> list[Mapping[str, Any]]:
    """The choices at the top of a schema, one type each where it names its types: any of them is a value of it. Raises
    `Endless`."""
    found, left = [], deque([schema])
    while left:
        each = left.popleft()
        walk.take(1)
        if not isinstance(each, Mapping):
            continue
        each = resolved(each, root, walk)
        choice = next((word for word in ("anyOf", "oneOf") if isinstance(each.get(word), list) and each[word]), None)
        if choice is not None:
            options = [branch for branch in each[choice] if isinstance(branch, Mapping)]
            walk.take(len(each[choice]) * len(each) + sum(map(len, options)))
            rest = {key: value for key, value in each.items() if key != choice}
            left += [{**rest, **branch} for branch in options]
        elif isinstance(each.get("type"), list):
            walk.take(len(each["type"]) * len(each))
            left += [{**each, "type": name} for name in each["type"]]
        else:
            found.append(each)
    return found


def overlapping(schema: Any, root: Mapping[str, Any], walk: Walk) -> bool:
    """Whether a value may be one of two choices of a `oneOf` among the choices at the top of a schema, as far as types
    and listed values tell: `branches` take it for an `anyOf`, which it then is not. Raises `Endless`."""
    left = deque([schema])
    while left:
        each = left.popleft()
        walk.take(1)
        if not isinstance(each, Mapping):
            continue
        each = resolved(each, root, walk)
        for word in ("anyOf", "oneOf"):
            options = each[word] if isinstance(each.get(word), list) else []
            if word == "oneOf" and _share(options, root, walk):
                return True
            left += options
    return False


def _share(options: list[Any], root: Mapping[str, Any], walk: Walk) -> bool:
    """Whether two of the options have a value in common."""
    values: set[Any] = set()  # of options that list theirs
    listed: set[str] = set()  # and their types
    typed: set[str] = set()  # types of the other options
    for option in options:
        mine = {"number" if kind == "integer" else kind for kind in kinds(option, root, walk)}
        held = _listed(option, root, walk)
        if mine & typed or held is None and mine & listed:
            return True
        if held is None:
            typed |= mine
        else:
            walk.take(len(held))
            new = set(map(_comparable, held))
            if new & values:
                return True
            values |= new
            listed |= mine
    return False


def _comparable(value: Any) -> Any:
    """Equal for equal JSON values, and can be in a set: 1 is 1.0, and is not true."""
    match value:
        case bool():
            return "bool", value
        case list():
            return "list", *map(_comparable, value)
        case dict():
            return "dict", frozenset((key, _comparable(inner)) for key, inner in value.items())
    return value


def _listed(schema: Any, root: Mapping[str, Any], walk: Walk) -> list[Any] | None:
    """All values that a schema may have, where it lists them."""
    schema = resolved(schema, root, walk) if isinstance(schema, Mapping) else {}
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def beyond_counting(schema: Any) -> str | None:
    """A bound in a schema that a grammar is made for and does not keep, or None. Keys may come twice in an object, so
    that it has fewer than were counted, and numbers are counted in 64 bits."""
    left = [schema]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            least, needed = each.get("minProperties"), each.get("required")
            if type(least) is int and least > 1 + (len(needed) if isinstance(needed, list) else 0):
                return "minProperties above the properties that are required"
            for word, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1)):
                bound = each.get(word)
                if isinstance(bound, int | float) and sign * bound >= 1 << 63:
                    return f"{word} beyond 64 bits"
        left += each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
    return None


def divisor(schema: Any) -> int:
    """The least common multiple of all `multipleOf` in a schema, their powers of ten left out: how many remainders an
    automaton tells apart that holds numbers to them at once."""
    found, left = 1, [schema]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            value = each.get("multipleOf")
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found = math.lcm(found, int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits))) or 1)
        left += each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
    return found
