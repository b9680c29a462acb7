"""Text that would do something, in every string of what a page shows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from html.parser import HTMLParser
from typing import Any

MARK = """"'><script src=x onload="y()"></b>&lt;"""


def hostile(value: Any, kept: Collection[str] = (), keys: Collection[str] = ()) -> Any:
    """A copy of dataclasses, mappings and sequences with `MARK` behind each string, and behind the keys of mappings in
    the fields `keys`; but not in the fields `kept`, which are looked up somewhere."""
    if isinstance(value, str):
        return value + MARK
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **_fields(fields, kept, keys))
    if isinstance(value, Mapping):
        return _fields(value, kept, keys)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(hostile(each, kept, keys) for each in value)
    return [hostile(each, kept, keys) for each in value] if isinstance(value, list) else value


def _fields(fields: Mapping[str, Any], kept: Collection[str], keys: Collection[str]) -> dict[str, Any]:
    made = {name: each if name in kept else hostile(each, kept, keys) for name, each in fields.items()}
    for name in made.keys() & set(keys):
        made[name] = {key + MARK: each for key, each in made[name].items()}
    return made


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def shown(html: str) -> int:
    """How often a page shows `MARK`; fails where it has become something else than text anywhere."""
    seen = _Seen()
    seen.feed(html)
    seen.close()
    assert "script" not in seen.tags and seen.attributes.isdisjoint(("src", "onload"))
    assert all(re.fullmatch("[a-z][a-z0-9-]*", name) for name in seen.attributes), seen.attributes
    return html.count("&lt;script src=x")
