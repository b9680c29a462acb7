"""Releases of engines, by their number and their day."""

from __future__ import annotations

import re
from collections.abc import Mapping

MOST_CHARACTERS = 200
"""Of a text that names a release, or says of it: what stands behind them is not read."""


def number(release: str) -> tuple[int, ...]:
    """The digits of a release that order it: "0.5.14" is above "0.5.9"; trailing zeros and what follows the digits
    ("0.5.6.post1", "1.3.0rc4") say nothing. () for a text that begins with none.

    >>> number("0.23.0")
    (0, 23)
    """
    found = re.match(r"v?(\d+(?:\.\d+)*)", release.strip()[:MOST_CHARACTERS])
    digits = [int(each) for each in found[1].split(".")] if found else []
    while digits and not digits[-1]:
        digits.pop()
    return tuple(digits)


def same_release(release: str, other: str) -> bool:
    """Whether two texts name one release: 0.23 is 0.23.0."""
    if max(len(release), len(other)) > MOST_CHARACTERS:
        return release == other
    return re.sub(r"(\.0)+$", "", release) == re.sub(r"(\.0)+$", "", other)


def older_than_all(version: str, known: Mapping[str, str]) -> bool:
    """Whether a version is told, by its number or its day, and older than each of the known releases."""
    if dotted := re.search(r"\d+(\.\d+)+", version[:MOST_CHARACTERS]):
        return all(number(each) > number(dotted[0]) for each in known)
    day = re.search(r"\d{4}-\d{2}(-\d{2})?", version[:MOST_CHARACTERS])
    return day is not None and all(known[each] and known[each][: len(day[0])] > day[0] for each in known)


def latest_not_newer(version: str, known: Mapping[str, str]) -> str:
    """Of known releases (each with its day, newest first) the newest that is not newer than a version, by the number in
    the text or else by the day in it; the oldest where all are newer, the newest where the text tells neither."""
    releases = list(known)
    if dotted := re.search(r"\d+(\.\d+)+", version[:MOST_CHARACTERS]):
        asked = number(dotted[0])
        return next((each for each in releases if number(each) <= asked), releases[-1])
    if day := re.search(r"\d{4}-\d{2}(-\d{2})?", version[:MOST_CHARACTERS]):
        last = day[0] if day[1] else f"{day[0]}-31"
        return next((each for each in releases if known[each] and known[each] <= last), releases[-1])
    return releases[0]
