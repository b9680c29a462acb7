"""Options that were given on the command line, at their default or not, and the refusal of one that nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Collection

import typer

from foundation.errors import UsageError


def given(context: typer.Context) -> dict[str, str]:
    """The options on the command line, in the order of the command's table: name of the parameter -> as it is typed."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            found[parameter.name or ""] = parameter.opts[0]
    return found


def refuse_unread(context: typer.Context, read: Collection[str], why: Callable[[str], str]) -> None:
    """Raises `UsageError` for the first option given that is not in `read`: as it is typed, and `why(name)`."""
    for name, typed in given(context).items():
        if name not in read:
            raise UsageError(f"{typed} {why(name)}")


def refuse_decided(context: typer.Context, decided: Collection[str]) -> None:
    """Raises `UsageError` for the first option given that a plan decides, also where it says what the plan does."""
    for name, typed in given(context).items():
        if name in decided:
            raise UsageError(f"{typed} does not go with --plan, which decides it: leave it out, or leave out --plan")


def refuse_before(context: typer.Context) -> None:
    """Raises `UsageError` for an option that stands before a subcommand, which does not read it."""
    verb = context.invoked_subcommand
    behind = f"stands before `{verb}`, which does not read it: leave it out, or give `{verb}` an option of its own"
    refuse_unread(context, (), lambda _: behind)
