"""No command writes a file that it also reads, or writes two into one: what was there would be gone for nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import typer.core

from foundation.errors import UsageError

WRITTEN = ("out", "html", "trace", "dump_logits", "sglang")  # options that name what is written
_BEGUN_FROM = {"calibrate"}  # a profile is added to, in its place


def kept_apart(command: typer.core.TyperCommand | typer.core.TyperGroup) -> None:
    """Has a command, and those in it, look at its paths before it begins."""
    spelt = {each.name or "": each.opts[0] for each in command.params}
    if command.callback is not None and command.name not in _BEGUN_FROM and not spelt.keys().isdisjoint(WRITTEN):
        command.callback = _looking_first(command.callback, spelt)
    for inner in getattr(command, "commands", {}).values():
        kept_apart(inner)


def _looking_first(work: Callable[..., Any], spelt: dict[str, str]) -> Callable[..., Any]:
    @functools.wraps(work)
    def looked(**given: Any) -> Any:
        require_apart(given, spelt)
        return work(**given)

    return looked


def require_apart(given: dict[str, Any], spelt: dict[str, str]) -> None:
    """given: the parameters of a command by name, spelt: how they stand on the command line. Raises `UsageError`
    where one that is written is one file with another."""
    for name in WRITTEN:
        if name not in spelt or given.get(name) is None:
            continue
        place = os.path.realpath(given[name])
        for other, path in _paths(given):
            there = other in WRITTEN or os.path.isfile(path)
            if there and other != name and os.path.realpath(path) == place:
                raise UsageError(f"{spelt[name]} {given[name]} is the file of {spelt[other]} too; name another")


def _paths(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters that may be paths: text of any kind, for some that name files have names of ours too."""
    for name, value in given.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | os.PathLike) and "\0" not in os.fspath(each):
                yield name, os.fspath(each)
