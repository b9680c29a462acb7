"""The verbs of the `glm5` command, put together; `main` calls it."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import typer.core
import typer.main

from runtime.cli import backends, calibrate, export, model, plan, profiles, run, serve, simulate, validate
from runtime.cli.choose import choose
from runtime.cli.compare import compare
from runtime.cli.eval import evaluate
from runtime.cli.fit import fit
from runtime.cli.outputs import kept_apart
from runtime.cli.quantize import quantize
from runtime.cli.rl import rl
from runtime.cli.train import train
from runtime.cli.version import version

app = typer.Typer(
    help="GLM-5-class models on any backend: run, describe, plan, simulate.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("model")(model.model)
app.command("backends")(backends.backends)
app.command("simulate")(simulate.simulate)
app.command("validate")(validate.validate)
app.command("choose")(choose)
app.command("fit")(fit)
app.command("calibrate")(calibrate.calibrate)
app.command("quantize")(quantize)
app.command("compare")(compare)
app.command("train")(train)
app.command("rl")(rl)
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


@cache
def command() -> typer.core.TyperGroup:
    """The whole command, put together once a process: it takes longer than what many a mistake is refused in."""
    made = typer.main.get_command(app)
    assert isinstance(made, typer.core.TyperGroup)
    kept_apart(made)
    return made
