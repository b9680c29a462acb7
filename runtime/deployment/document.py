"""Frozen dataclasses as JSON and back, and the JSON Schema of what is written.

The classes are plain: pydantic reads their annotations, and is imported with the first document. They may hold
dataclasses, `tuple[T, ...]`, `Mapping[str, T]`, `Literal`, unions with None and plain values. A class may name
properties in `DERIVED`: they are written behind its fields, must be there, and are not read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, cast

from foundation.errors import Failure, first_line, shortened

_PLAIN = (str, int, float, type(None))

T = TypeVar("T")
Keys = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a document, first of all.

    path: keys and indices that lead there. wrong: "must be a number", and `value` is what stands there; choices: where
    it must be one of them. Or fields of the object at `path` are missing, or unknown, and these are `known`.
    """

    path: Keys
    wrong: str = ""
    value: Any = None
    choices: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The value, on one line and cut to a readable length."""
        return shortened(repr(self.value))


def place(path: Keys) -> str:
    """`pools[0].devices[3].ledger`."""
    keys = (key if isinstance(key, int) else shortened(key if key.isprintable() else repr(key)) for key in path)
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def plain(where: str, fault: Fault) -> str:
    """A fault in one line: `plan.json: pools[0].layout.tp: must be int, not 'x'`."""
    if fault.missing:
        what = f"{place((*fault.path, fault.missing[0]))}: missing field"
    elif fault.unknown:
        what = f"{place((*fault.path, fault.unknown[0]))}: unknown field"
    else:
        what = f"{place(fault.path)}: {fault.wrong}, not {fault.shown}".removeprefix(": ")
    return f"{where}: {what}"


def validated(
    kind: type[T],
    document: Any,
    error: type[Failure],
    where: str,
    *,
    complete: bool = False,
    say: Callable[[str, Fault], str] = plain,
) -> T:
    """The value of type `kind` in a parsed JSON or TOML document named `where`.

    Strict: nothing is converted but lists to tuples and ints to floats; NaN, infinity and fields that a class does not
    have are refused. complete: fields with a default must be there as well.
    Raises `error` with the one line that `say` makes of the first fault, or with what a class itself refuses.
    """
    from pydantic import ValidationError

    made, fault = None, _unknown(kind, document)
    if fault is None:
        try:
            # Through text, where a tuple is a list and TOML's dates are texts.
            (made,) = _adapter(kind).validate_json(json.dumps([document], default=str))
            fault = _difference(document, to_json(made), complete)
        except ValidationError as refused:
            fault = _first(refused.errors(include_url=False))
        except RecursionError:
            fault = _TOO_DEEP
        except Failure as refused:
            raise refused if isinstance(refused, error) else error(f"{where}: {refused}") from None
    if fault is _TOO_DEEP:
        raise error(f"{where}: nested too deep, or not all of it Unicode")
    if fault is not None:
        raise error(say(where, fault))
    return cast(T, made)


@cache
def _adapter(kind: Any) -> Any:
    """Validates a list of one `kind`: its settings reach the plain dataclasses inside."""
    from pydantic import ConfigDict, TypeAdapter

    alone = tuple[kind]  # pyright: ignore[reportInvalidTypeForm]
    return TypeAdapter(alone, config=ConfigDict(strict=True, allow_inf_nan=False))


def _names(kind: Any) -> tuple[str, ...]:
    """What is written of a dataclass."""
    return (*(field.name for field in dataclasses.fields(kind)), *getattr(kind, "DERIVED", ()))


def _unknown(kind: Any, document: Any) -> Fault | None:
    """Unknown fields at the top: a person's misspelling, looked for before the right spelling is called missing."""
    if not (dataclasses.is_dataclass(kind) and isinstance(document, dict)):
        return None
    known = _names(kind)
    unknown = tuple(key for key in document if key not in known)
    return Fault((), unknown=unknown, known=known) if unknown else None


_TOO_DEEP = Fault(())  # for pydantic, whose limit is about 200; it takes no lone surrogates either
_WANTED = {
    "int_type": "int",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
}


def _first(errors: Sequence[Any]) -> Fault:
    """The first of pydantic's errors; of fields that are missing, all of the same object."""
    kind, value, context = errors[0]["type"], errors[0]["input"], errors[0].get("ctx", {})
    path: Keys = errors[0]["loc"][1:]
    match kind:
        case "json_invalid":
            return _TOO_DEEP
        case "missing":
            alike = [each["loc"][1:] for each in errors if each["type"] == kind]
            names = tuple(found[-1] for found in alike if found[:-1] == path[:-1])
            if isinstance(path[-1], str):
                return Fault(path[:-1], missing=names)
            return Fault(path[:-1], f"must hold {len(value) + len(names)} values", value)
        case "too_long":
            return Fault(path, f"must hold {context['max_length']} values", value)
        case "literal_error":
            choices = tuple(re.findall(r"'([^']*)'", context["expected"]))
            return Fault(path, f"must be one of {', '.join(choices)}", value, choices)
    wanted = _WANTED.get(kind) or first_line(errors[0]["msg"]).removeprefix("Input should be ")
    return Fault(path, f"must be {wanted}", value)


def _difference(document: Any, written: Any, complete: bool, path: Keys = ()) -> Fault | None:
    """The first field that is in a document and would not be written, or with `complete` the other way round."""
    if document == written:
        return None
    if isinstance(document, dict) and isinstance(written, dict):
        if unknown := tuple(key for key in document if key not in written):
            return Fault(path, unknown=unknown, known=tuple(written))
        if complete and (missing := tuple(key for key in written if key not in document)):
            return Fault(path, missing=missing)
        below = [(key, item, written[key]) for key, item in document.items()]
    elif isinstance(document, list) and isinstance(written, list):
        below = [(i, *pair) for i, pair in enumerate(zip(document, written, strict=True))]
    else:
        return None
    return next(filter(None, (_difference(a, b, complete, (*path, key)) for key, a, b in below)), None)


def document_text(fields: Mapping[str, Any]) -> str:
    """JSON, a top-level field a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_json(value: Any) -> Any:
    """A value as what `json.dumps` takes. Derived properties are written behind the fields."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {name: to_json(getattr(value, name)) for name in _names(value)}
    return value


def schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `to_json` of a value of type `kind`; classes are in `$defs`."""
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Written(GenerateJsonSchema):
        """Of a class: nothing but its fields and derived values, all of them, and how its docstring begins."""

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            made = schema["cls"]
            properties = super().dataclass_schema(schema)["properties"]
            properties |= dict.fromkeys(getattr(made, "DERIVED", ()), {"type": "number"})
            return {
                "type": "object",
                "description": " ".join((made.__doc__ or "").split("\n\n")[0].split()),
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }

        def dict_schema(self, schema: Any) -> dict[str, Any]:
            found = super().dict_schema(schema)
            return {key: value for key, value in found.items() if value is not True}  # said by some releases only

        def default_schema(self, schema: Any) -> dict[str, Any]:
            return self.generate_inner(schema["schema"])

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    several = tuple[kind, ...]  # pyright: ignore[reportInvalidTypeForm]
    found = TypeAdapter(several).json_schema(schema_generator=Written)
    return {"$schema": Written.schema_dialect, **found["items"], "$defs": found["$defs"]}
