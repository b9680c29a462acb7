"""What a JSON Schema says of the types a value may have, before a grammar is made of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_MOST_STEPS = 256  # from reference to reference, and from choice to choice


def kinds(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a value of `schema` may have; all of them where it does not say. root: where its `$ref` point."""
    return _kinds(schema, root, iter(range(_MOST_STEPS)))


def _kinds(schema: Any, root: Mapping[str, Any], steps: Iterator[int]) -> frozenset[str]:
    if not isinstance(schema, Mapping) or next(steps, None) is None:
        return TYPES
    schema = resolved(schema, root)
    found = TYPES
    match schema.get("type"):
        case str() as name if name in TYPES:
            found = frozenset({name})
        case list() as names:
            found = frozenset(name for name in names if isinstance(name, str)) & TYPES or TYPES
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list) and values:
            found = found & frozenset().union(*map(type_of, values)) or found
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list) and schema[word]:
            each = (_kinds(branch, root, steps) for branch in schema[word])
            found = found & frozenset().union(*each) or found
    for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found = found & _kinds(branch, root, steps) or found
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


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """What a schema's `$ref` into its own document points to, with what stands beside it; the schema itself where it
    points nowhere that is known."""
    for _ in range(_MOST_STEPS):
        where = schema.get("$ref")
        if not isinstance(where, str) or not where.startswith("#"):
            return schema
        found: Any = root
        for step in where[1:].split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            return schema
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a schema needs beside it for its references to be found."""
    return {word: root[word] for word in ("$defs", "definitions", "components") if word in root}


def branches(schema: Any, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The choices at the top of a schema, one type each where it names its types: any of them is a value of it."""
    found, left = [], [schema]
    for _ in range(_MOST_STEPS):
        if not left:
            break
        each = left.pop(0)
        if not isinstance(each, Mapping):
            continue
        each = resolved(each, root)
        choice = next((word for word in ("anyOf", "oneOf") if isinstance(each.get(word), list) and each[word]), None)
        if choice is not None:
            rest = {key: value for key, value in each.items() if key != choice}
            left += [{**rest, **branch} for branch in each[choice] if isinstance(branch, Mapping)]
        elif isinstance(each.get("type"), list):
            left += [{**each, "type": name} for name in each["type"]]
        else:
            found.append(each)
    return found


def overlapping(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a value may be one of two choices of a `oneOf` among the choices at the top of a schema, as far as types
    and listed values tell: `branches` take it for an `anyOf`, which it then is not."""
    left = [schema]
    for _ in range(_MOST_STEPS):
        if not left:
            return False
        each = left.pop(0)
        if not isinstance(each, Mapping):
            continue
        each = resolved(each, root)
        for word in ("anyOf", "oneOf"):
            options = each[word] if isinstance(each.get(word), list) else []
            if word == "oneOf" and any(_share(*pair, root) for pair in itertools.combinations(options, 2)):
                return True
            left += options
    return True


def _share(one: Any, other: Any, root: Mapping[str, Any]) -> bool:
    listed = _listed(one, root), _listed(other, root)
    if listed[0] is not None and listed[1] is not None:
        return any(a == b for a in listed[0] for b in listed[1])
    found = [{"number" if kind == "integer" else kind for kind in kinds(each, root)} for each in (one, other)]
    return bool(found[0] & found[1])


def _listed(schema: Any, root: Mapping[str, Any]) -> list[Any] | None:
    """All values that a schema may have, where it lists them."""
    schema = resolved(schema, root) if isinstance(schema, Mapping) else {}
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None
