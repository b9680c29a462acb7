"""The `glm5` command line.

Expected failures print one line on stderr and exit with 2; a bug prints a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from foundation.errors import Failure
from runtime.cli import backends, calibrate, export, model, plan, profiles, run, simulate, validate
from runtime.cli.compare import compare
from runtime.cli.eval import evaluate
from runtime.cli.quantize import quantize
from runtime.cli.terminal import for_its_reader
from runtime.cli.train import train
from runtime.cli.version import version

app = typer.Typer(
    help="GLM-5-class models on any backend: run, describe, plan, simulate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("model")(model.model)
app.command("backends")(backends.backends)
app.command("simulate")(simulate.simulate)
app.command("validate")(validate.validate)
app.command("calibrate")(calibrate.calibrate)
app.command("quantize")(quantize)
app.command("compare")(compare)
app.command("train")(train)
app.command("eval")(evaluate)
app.add_typer(profiles.app, name="profiles")
app.add_typer(plan.app, name="plan")
app.add_typer(export.app, name="export")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"glm5 {version()}")
        raise typer.Exit


@app.callback()
def glm5(
    show: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version, and exit.")
    ] = False,
) -> None:
    """What goes before a verb."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `glm5` command; `arguments` are the process's own by default. Raises SystemExit."""
    try:
        with for_its_reader():
            sys.exit(app(arguments, prog_name="glm5", standalone_mode=False))
    except Failure as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # A wrong command line. Its exception is public only as an interface: click's, or typer's own copy.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # whose message is the help
            print(message(), file=sys.stderr)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        _fail(f"{' '.join(message().split()).rstrip('.')} (see `{context.command_path if context else 'glm5'} --help`)")


def _fail(message: str) -> NoReturn:
    print(f"glm5: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
