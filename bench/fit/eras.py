"""Price entries of several releases of an engine: kept apart where they differ, run together where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SAME = 0.04
"""Mean |ln ratio| up to which two tables count as one: repeats of one table differ by as much."""


def add_era(
    entries: dict[str, Any],
    key: str,
    release: str,
    body: dict[str, Any],
    difference: Callable[[dict[str, Any], dict[str, Any]], float],
) -> None:
    """Adds an entry of an older release than those of its key that are there; releases come newest first.

    difference: (older, newer) -> mean |ln ratio| of what they predict.
    """
    eras = [name for name in entries if name.partition("@")[0] == key]
    body = {"release": release, **body}
    if not eras:
        entries[key] = body
    elif difference(body, newer := entries[eras[-1]]) > SAME:
        entries[f"{key}@{release}"] = body
    else:
        newer["release"] = release  # its figures hold from here on
