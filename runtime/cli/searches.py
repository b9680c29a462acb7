"""What the planning verbs share: a chip with its number of devices, and what a search is doing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import typer

from foundation.errors import UsageError

QUIET_SECONDS = 1.0
"""Searches that take longer say on stderr what they are doing."""


def split_profile(text: str) -> tuple[str, int | None]:
    """A profile and its number of devices, from NAME or NAME:COUNT. Raises `UsageError`."""
    name, colon, count = text.rpartition(":")
    if not colon or name.endswith("/") or not re.fullmatch(r"[+-]?[0-9]{1,18}", count):
        return text, None
    if int(count) < 1:
        raise UsageError(f"--profile {text}: give at least one device")
    return name, int(count)


def progress() -> Callable[[str], None]:
    """Says on stderr what a search is doing, once it takes long."""
    start = time.monotonic()

    def say(message: str) -> None:
        seconds = time.monotonic() - start
        if seconds > QUIET_SECONDS:
            typer.echo(f"{seconds:4.0f} s  {message}", err=True)

    return say
