"""Writes docs/cli.md from the commands themselves: what `--help` says, in tables.

    python -m tools.docs_cli [FILE]      [default: docs/cli.md]

The tables are made from the commands' parameters and not from the text of `--help`, whose layout is that of
whichever typer is installed.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from runtime.cli.app import app
from tools import page

DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """# Commands

<!-- made by `python -m tools.docs_cli`; do not edit -->

What `glm5 COMMAND --help` says; `glm5 --version` prints the version. A command that cannot do what it was asked, or
would not read an option that it was given, exits with 2 and one line on stderr that says what to change (`profiles
check`: a line a problem); a traceback is a bug.
"""


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands below `command` that do something, with what is typed to call them."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path, command
        return
    if command.invoke_without_command:
        yield path, command
    for name, child in below.items():
        yield from commands(child, f"{path} {name}")


def value_name(hint: Any) -> str:
    """What an option takes, from its annotation: "int", "text", "path"; "" for a flag."""
    if typing.get_origin(hint) in (typing.Annotated, list):
        return value_name(typing.get_args(hint)[0])
    for kind in typing.get_args(hint):  # of an optional one
        if kind is not type(None):
            return value_name(kind)
    return {bool: "", str: "text", Path: "path"}.get(hint, getattr(hint, "__name__", str(hint)))


def rows(command: Any) -> Iterator[str]:
    """A table row for each argument and option."""
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    for parameter in command.params:
        if parameter.name not in hints:  # --help
            continue
        value = value_name(hints[parameter.name])
        if parameter.param_type_name == "argument":
            typed = parameter.name.upper()
        else:
            typed = f"{parameter.opts[0]} {value.upper()}".rstrip()
        default = "required" if parameter.required else parameter.default
        shown = "" if default is None or default is False else str(default)
        meaning = " ".join((parameter.help or "").split()).replace("|", "\\|")
        yield f"| `{typed}` | {shown} | {meaning} |"


def render() -> str:
    """The page."""
    parts = [HEAD]
    for path, command in commands(typer.main.get_command(app), "glm5"):
        table = ["| option | default | meaning |", "|---|---|---|", *rows(command)]
        parts += [f"## {path}\n", inspect.cleandoc(command.help or "") + "\n", "\n".join(table) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    page.write(__doc__, DEFAULT, render)
