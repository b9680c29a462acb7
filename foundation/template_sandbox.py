"""Jinja's sandbox as transformers sets it up for chat templates, which are code from whoever made a checkpoint.

It keeps a template from reaching Python's insides. What a template may use of time and memory is limited by the process
that it runs in (`text_worker`).
"""

from __future__ import annotations

import json
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_OF_DICTS = frozenset(dir(dict))
_OF_JINJA = {"_loop_vars", "_block_vars"}  # what it adds to the arguments of a call
# What changes and calls nothing, by the type that has it: where most of what templates look up need not be asked about.
_HARMLESS = {
    str: frozenset(name for name in dir(str) if not name.startswith(("_", "format"))),
    dict: frozenset(("get", "items", "keys", "values")),
    LoopContext: frozenset(name for name in dir(LoopContext) if not name.startswith("_")),
}


class Sandbox(ImmutableSandboxedEnvironment):
    """An unsafe attribute raises `SecurityError` here; Jinja's own sandbox makes it undefined, which prints as
    nothing."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]  # text at random
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As Jinja's sandbox has it, which for a key of a dict has an exception raised first, and asks of each method
        what it is."""
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind in _HARMLESS and attribute in _HARMLESS[kind]:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As Jinja's sandbox has it, which for a key that a dict lacks raises and catches two exceptions."""
        if type(obj) is dict and type(argument) is str and argument not in obj and argument not in _OF_DICTS:
            return self.undefined(obj=obj, name=argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """As Jinja's sandbox has it, which asks of a macro and of a method too whether it is safe, and what it wants of
        the context."""
        if kwargs.keys() <= _OF_JINJA:
            kind = type(__obj)
            if kind is Macro:
                return __obj(__context.eval_ctx, *args)
            if kind is BuiltinMethodType and __obj.__name__ in _HARMLESS.get(type(__obj.__self__), ()):
                return __obj(*args)
        return super().call(__context, __obj, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises `SecurityError`."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")
