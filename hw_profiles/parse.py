"""A TOML document into a `Profile`, with one line for each thing that is wrong with it."""

import datetime
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from foundation.paths import Outside, spelt_inside
from hw_profiles.errors import InvalidProfile
from hw_profiles.fields import (
    CURVES,
    FIELDS,
    FORMAT_OF_SCHEME,
    KV_FORMATS,
    LABELS,
    ROOTS,
    WEIGHT_SCHEMES,
    ChipKind,
    asked_as,
    show,
    suggest,
    wrong_value,
)
from hw_profiles.schema import GRADES, ChipFormats, Curve, Figure, Profile

SCHEMA = 1
_TEXTS = ("name", "vendor", "family", "kind", "description")
_TOP = ("schema", *_TEXTS, "package_devices", "prices", "prices_sha256", "sources", "formats", *ROOTS)
_DATE = re.compile(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?")
_ORIGIN = ("source", "date", "grade", "note")
_KINDS = get_args(ChipKind)


def parse(document: Mapping[str, Any], where: str, path: Path | None = None) -> Profile:
    """Build the profile in `document`; `where` names it in errors. Raises InvalidProfile."""
    return _Parser(where).profile(document, path)


class _Parser:
    """Collects problems while it reads, so that a person sees them all at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []
        self.sources: dict[str, dict[str, str]] = {}

    def wrong(self, field: str, what: str) -> None:
        self.problems.append(f"{self.where}: {field}: {what}")

    def profile(self, document: Mapping[str, Any], path: Path | None) -> Profile:
        if document.get("schema") != SCHEMA or isinstance(document.get("schema"), bool):
            self.wrong("schema", f"must be {SCHEMA}, got {show(document.get('schema'))}")
        for key in document:
            if key not in _TOP:
                self.wrong(show(key), f"unknown key{suggest(key, _TOP)}")
        texts = {key: self.text(document, key) for key in _TEXTS}
        if texts["name"] and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", texts["name"]):
            self.wrong("name", f"use lower-case letters, digits, '-' and '.', got {show(texts['name'])}")
        if texts["kind"] and texts["kind"] not in _KINDS:
            self.wrong("kind", f"must be one of {', '.join(_KINDS)}, got {show(texts['kind'])}")
        devices = document.get("package_devices", 1)
        if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= 16:
            self.wrong("package_devices", f"must be a whole number from 1 to 16, got {show(devices)}")
        prices = self.text(document, "prices") if "prices" in document else None
        if prices:
            try:
                spelt_inside(prices)
            except Outside:
                self.wrong("prices", f"must be relative to the TOML, a path below its folder, got {show(prices)}")
        digest = self.text(document, "prices_sha256") if "prices_sha256" in document else None
        if digest and not prices:
            self.wrong("prices_sha256", "is of the file that `prices` names, and there is none")

        self.read_sources(document.get("sources", {}))
        figures: dict[str, Figure] = {}
        curves: dict[str, Curve] = {}
        labels: dict[str, str] = {}
        for field, value in self.leaves(document):
            if field in FIELDS:
                figures |= self.figure(field, value)
            elif field in CURVES:
                curves |= self.curve(field, value)
            else:
                labels |= self.label(field, value)
        formats = self.formats(document.get("formats"))
        if self.problems or formats is None:
            raise InvalidProfile(self.problems)
        return Profile(
            **texts,  # pyright: ignore[reportArgumentType]
            formats=formats,
            figures={key: figures[key] for key in FIELDS if key in figures},
            curves={key: curves[key] for key in CURVES if key in curves},
            labels={key: labels[key] for key in LABELS if key in labels},
            package_devices=devices,
            prices=prices,
            prices_sha256=digest,
            path=path,
        )

    def text(self, table: Mapping[str, Any], key: str, field: str = "") -> str:
        value = table.get(key)
        if isinstance(value, str) and value.strip() and value.isprintable():
            return value
        got = show(value) if key in table else "nothing"
        self.wrong(field or key, f"must be one line of text, got {got}")
        return ""

    def read_sources(self, table: Any) -> None:
        if not isinstance(table, dict):
            return self.wrong("sources", f"must be a table of sources, got {show(table)}")
        for key, entry in table.items():
            field = f"sources.{show(key)}"
            if not isinstance(entry, dict):
                self.wrong(field, "must be a table with title, date and grade")
                # Known all the same, so that citing it is not a second fault.
                self.sources[key] = {"source": "", "date": "", "grade": ""}
                continue
            for extra in entry.keys() - {"title", "date", "grade"}:
                self.wrong(f"{field}.{show(extra)}", "unknown key; a source has title, date and grade")
            self.sources[key] = {
                "source": self.text(entry, "title", f"{field}.title"),
                "date": self.date(entry.get("date"), field),
                "grade": self.grade(entry.get("grade"), field),
            }

    def leaves(self, document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Every known field in the document; what is not known becomes a problem."""
        known = (*FIELDS, *CURVES, *LABELS)
        todo = [(root, document[root]) for root in ROOTS if root in document]
        while todo:
            field, value = todo.pop(0)
            if field in known:
                yield field, value
            elif not any(k.startswith(field + ".") for k in known):
                self.wrong(field, f"unknown field{suggest(field)}")
            elif not isinstance(value, dict):
                self.wrong(field, f"must be a table, got {show(value)}")
            else:
                todo += [(f"{field}.{show(key)}", inner) for key, inner in value.items()]

    def figure(self, field: str, entry: Any) -> dict[str, Figure]:
        if not isinstance(entry, dict):
            self.wrong(field, f'needs a source: write {{ value = {show(entry)}, source = "…" }}')
            return {}
        self.only(field, entry, ("value", "range", *_ORIGIN))
        before = len(self.problems)
        value: Any = entry.get("value")
        span: Any = entry.get("range")
        if "value" not in entry:
            self.wrong(field, "has no value; leave the whole field out if it is unknown")
        elif what := wrong_value(field, value):
            self.wrong(field, what)
        if span is not None:
            if not isinstance(span, list) or len(span) != 2 or any(wrong_value(field, v) for v in span):
                self.wrong(f"{field}.range", f"must be [low, high] in {FIELDS[field].unit}, got {show(span)}")
            elif len(self.problems) == before and not span[0] <= value <= span[1]:
                self.wrong(f"{field}.range", f"must hold the value {value:g}, got {show(span)}")
        origin = self.origin(field, entry)
        if len(self.problems) > before:
            return {}
        bounds = (float(span[0]), float(span[1])) if span else None
        return {field: Figure(float(value), FIELDS[field].unit, range=bounds, **origin)}

    def curve(self, field: str, entry: Any) -> dict[str, Curve]:
        if not isinstance(entry, dict):
            self.wrong(field, f"must be a table with size_unit, knots and source, got {show(entry)}")
            return {}
        self.only(field, entry, ("size_unit", "knots", *_ORIGIN))
        before = len(self.problems)
        if entry.get("size_unit") != CURVES[field]:
            self.wrong(f"{field}.size_unit", f'must be "{CURVES[field]}", got {show(entry.get("size_unit"))}')
        if what := wrong_knots(entry.get("knots")):
            self.wrong(f"{field}.knots", what)
        origin = self.origin(field, entry)
        if len(self.problems) > before:
            return {}
        knots = tuple((float(size), float(share)) for size, share in entry["knots"])
        return {field: Curve(knots, CURVES[field], **origin)}

    def label(self, field: str, value: Any) -> dict[str, str]:
        allowed = LABELS[field]
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            self.wrong(field, f"must be one line of text, got {show(value)}")
        elif allowed and value not in allowed:
            self.wrong(field, f"must be one of {', '.join(allowed)}, got {show(value)}")
        else:
            return {field: value}
        return {}

    def formats(self, entry: Any) -> ChipFormats | None:
        if not isinstance(entry, dict):
            self.wrong("formats", "needs a [formats] table with weights, kv and source")
            return None
        self.only("formats", entry, ("weights", "kv", *_ORIGIN))
        before = len(self.problems)
        lists: dict[str, tuple[str, ...]] = {}
        for key, allowed, aliases in (("weights", WEIGHT_SCHEMES, FORMAT_OF_SCHEME), ("kv", KV_FORMATS, {})):
            value = entry.get(key)
            listed = value if isinstance(value, list) else []
            named = [aliases.get(v, v) if isinstance(v, str) else v for v in listed]
            if named and all(isinstance(v, str) and v in allowed for v in named):
                lists[key] = tuple(dict.fromkeys(named))
            else:
                known = ", ".join(asked_as(each) for each in allowed)
                self.wrong(f"formats.{key}", f"must list some of {known}, got {show(value)}")
        origin = self.origin("formats", entry)
        return ChipFormats(**lists, **origin) if len(self.problems) == before else None

    def origin(self, field: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """source, date, grade and note: from the figure itself, else from the source it names."""
        source = self.text(entry, "source", f"{field}.source")
        if not source:
            return {}
        cited = self.sources.get(source)
        if cited is None:
            cited = {"source": source} | ({"date": ""} if entry.get("grade") == "user" else {})
        origin = {"note": self.text(entry, "note", f"{field}.note") if "note" in entry else "", **cited}
        if "date" in entry:
            origin["date"] = self.date(entry["date"], field)
        if "grade" in entry:
            origin["grade"] = self.grade(entry["grade"], field)
        if not {"date", "grade"} <= origin.keys():
            self.wrong(f"{field}.source", f"no [sources.{source}]; add it, or give date and grade here")
        return origin

    def date(self, value: Any, field: str) -> str:
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            return value.isoformat()
        if isinstance(value, str) and _DATE.fullmatch(value):
            return value
        self.wrong(f"{field}.date", f'must be "YYYY", "YYYY-MM" or "YYYY-MM-DD", got {show(value)}')
        return ""

    def grade(self, value: Any, field: str) -> str:
        if isinstance(value, str) and value in GRADES:
            return value
        self.wrong(f"{field}.grade", f"must be one of {', '.join(GRADES)}, got {show(value)}")
        return ""

    def only(self, field: str, entry: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        for key in entry:
            if key not in allowed:
                self.wrong(f"{field}.{show(key)}", f"unknown key; allowed here: {', '.join(allowed)}")


def wrong_knots(knots: Any) -> str | None:
    """What is wrong with a list of [size, efficiency] pairs, or None."""
    if not isinstance(knots, list | tuple) or not knots:
        return f"must be a list of [size, efficiency] pairs, got {show(knots)}"
    last = 0.0
    for knot in knots:
        if not isinstance(knot, list | tuple) or len(knot) != 2 or not all(map(_is_number, knot)):
            return f"each knot must be [size, efficiency], got {show(knot)}"
        size, share = knot
        if not last < size <= 1e30:
            return f"sizes must be positive and increase, got {show(knot)}"
        if not 0 < share <= 1:
            return f"an efficiency must be above 0 and at most 1, got {show(knot)}"
        last = size
    return None


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
