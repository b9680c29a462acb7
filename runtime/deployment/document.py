"""Frozen dataclasses as JSON and back, and the JSON Schema of what is written: one description, three uses.

Knows dataclasses, `tuple[T, ...]`, `Mapping[str, T]`, `Literal`, unions with None and plain values. A class may
have a derived value written beside its fields: name the property in `DERIVED`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from runtime.deployment.errors import PlanFileError
from runtime.deployment.ledger import Ledger

DERIVED: Mapping[type, tuple[str, ...]] = {Ledger: ("free_bytes",)}
_PLAIN: Mapping[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}


def to_json(value: Any) -> Any:
    """A value as what `json.dumps` takes. Derived properties are written behind the fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)] + list(DERIVED.get(type(value), ()))
        return {name: to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """The value of type `kind` in a JSON document. Raises `PlanFileError` naming the place that is wrong."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return None if value is None else from_json(next(a for a in arguments if a is not types.NoneType), value, where)
    if origin is Literal:
        if value not in arguments:
            raise PlanFileError(f"{where}: must be one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise PlanFileError(f"{where}: must be a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise PlanFileError(f"{where}: must hold {len(arguments)} values, not {len(value)}")
        kinds = arguments if arguments[-1] is not Ellipsis else (arguments[0],) * len(value)
        if arguments[0] is int and all(type(item) is int for item in value):
            return tuple(value)
        return tuple(from_json(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise PlanFileError(f"{where}: must be an object")
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise PlanFileError(f"{where}: must be {kind.__name__}, not {value!r}")
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(value, dict):
        raise PlanFileError(f"{where or kind.__name__}: must be an object")
    expected = {*names, *DERIVED.get(kind, ())}
    if value.keys() != expected:
        wrong = sorted(value.keys() ^ expected)[0]
        raise PlanFileError(f"{f'{where}.{wrong}'.lstrip('.')}: {'unknown' if wrong in value else 'missing'} field")
    return kind(**{name: from_json(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names})


def schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `to_json` of a value of type `kind`; classes are in `$defs`."""
    definitions: dict[str, Any] = {}
    top = _schema(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        name = kind.__name__  # pyright: ignore[reportAttributeAccessIssue]
        if name not in definitions:
            definitions[name] = {}
            hints = typing.get_type_hints(kind)
            properties = {f.name: _schema(hints[f.name], definitions) for f in dataclasses.fields(kind)}
            properties |= dict.fromkeys(DERIVED.get(typing.cast(type, kind), ()), {"type": "number"})
            definitions[name] = {
                "type": "object",
                "description": " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if a is types.NoneType else _schema(a, definitions) for a in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": _schema(arguments[0], definitions)}
        items = [_schema(a, definitions) for a in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    return {"type": _PLAIN[kind]}
