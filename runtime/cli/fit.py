"""`glm5 fit`: a few measurements of one deployment bend what is predicted for it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import UsageError
from foundation.writing import require_writable
from model.config import MOST_DRAFTS
from model.formats import SCHEMES_HELP
from model.split import MOST_DEVICES
from runtime.cli import completion
from runtime.cli.given import given

if TYPE_CHECKING:
    from runtime.simulation.load_tests import MeasuredServer


def fit(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="A CSV of measurements of one deployment (columns: docs/validation.md), or what `vllm bench serve "
            "--save-result`, sglang.bench_serving, aiperf or guidellm wrote, with the options below.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Write the engine here, for --engine; a name that ends in .toml.")],
    model: Annotated[
        str | None,
        typer.Option(autocompletion=completion.models, help="Of load tests: the model, a preset or a config.json."),
    ] = None,
    profile: Annotated[str | None, typer.Option(autocompletion=completion.chips, help="The chip.")] = None,
    engine: Annotated[
        str, typer.Option(autocompletion=completion.engines, help="The engine, with its release as in vllm@0.28.")
    ] = "sglang",
    tp: Annotated[int, typer.Option(min=1, max=MOST_DEVICES, help="Tensor parallelism.")] = 1,
    dp: Annotated[int, typer.Option(min=1, max=MOST_DEVICES, help="Attention data parallelism.")] = 1,
    ep: Annotated[int, typer.Option(min=1, max=MOST_DEVICES, help="Expert parallelism.")] = 1,
    pp: Annotated[int, typer.Option(min=1, max=MOST_DEVICES, help="Pipeline stages.")] = 1,
    formats: Annotated[
        str | None,
        typer.Option(autocompletion=completion.schemes, help=f"{SCHEMES_HELP} [default: the checkpoint's own]."),
    ] = None,
    kv: Annotated[
        str, typer.Option(autocompletion=completion.caches, help="KV cache [default: the engine's choice].")
    ] = "",
    mtp: Annotated[int, typer.Option(min=0, max=MOST_DRAFTS, help="Drafts a step.")] = 0,
    accept: Annotated[
        float | None, typer.Option(help="Mean tokens a step with --mtp, where the file has none.")
    ] = None,
    server_flags: Annotated[str, typer.Option(help="The server's command line, whose settings are read.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit an engine's constants to measurements of one deployment; five rows are enough.

    Says what moved, and the error of rows that a fit to the others had not seen. Where that is no better than before,
    nothing is written, and the exit code is 1.
    """
    from runtime.cli.simulated import progress_bar
    from runtime.simulation.fitting import fit as run_fit
    from runtime.simulation.fitting import write_engine

    if out.suffix != ".toml":
        raise UsageError(f"--out {out}: an engine is known by its name's end: call it {out.name or 'my'}.toml")
    require_writable(out)
    server = _server(context, files)
    with progress_bar(not as_json, "simulations") as progress:
        found = run_fit(files, progress or (lambda done, total: None), server)
    if found.helps:
        write_engine(out, found, ", ".join(file.name for file in files))
    before, after = found.errors
    result = {
        "engine": found.engine,
        "rows": found.rows,
        "skipped": list(found.skipped),
        "constants": {
            name: {"described": found.described[name], "fitted": value} for name, value in found.values.items()
        },
        "before": {name: _scores(rows) for name, rows in found.before.items()},
        "left_out": {name: _scores(rows) for name, rows in found.left_out.items()},
        "error_before": before,
        "error_left_out": after,
        "written": str(out) if found.helps else None,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)
    if not found.helps:
        raise typer.Exit(1)


def _server(context: typer.Context, files: list[Path]) -> MeasuredServer | None:
    """What load tests were of; None for a CSV, which says it. Raises `UsageError`."""
    from model.hf_config import load_config
    from runtime.simulation.load_tests import MeasuredServer

    params, said = context.params, given(context)
    tables = [file for file in files if file.suffix.lower() == ".csv"]
    if tables:
        if len(files) > 1:
            raise UsageError(f"{tables[0]}: a CSV has all rows of a fit: give it alone")
        for name in (*_OF_SERVER, "kv", "formats"):
            if name in said:
                raise UsageError(f"{said[name]} is of load tests; the rows of {tables[0]} say it: leave it out")
        return None
    for name, option in (("model", "--model"), ("profile", "--profile")):
        if params[name] is None:
            raise UsageError(f"{files[0]}: a load test does not say what served it: give {option}")
    scheme = params["formats"] or load_config(params["model"]).stored_scheme
    named = scheme if isinstance(scheme, str) else scheme.name
    own = {name: params[name] for name in _OF_SERVER if name not in ("profile",)}
    return MeasuredServer(chip=params["profile"], formats=named, kv_dtype=params["kv"], **own)


_OF_SERVER = ("model", "profile", "engine", "tp", "dp", "ep", "pp", "mtp", "accept", "server_flags")


def _scores(rows: tuple[float, ...]) -> dict[str, float]:
    return {
        "rows": len(rows),
        "error": statistics.fmean(map(abs, rows)),
        "signed": statistics.fmean(rows),
        "worst": max(map(abs, rows)),
    }


def _show(result: dict) -> None:
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    console = Terminal(highlight=False)
    for line in result["skipped"]:
        console.print(f"[yellow]skipped[/] {line}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("constant")
    for heading in ("described", "fitted"):
        table.add_column(heading, justify="right")
    for name, each in result["constants"].items():
        table.add_row(f"engine.{name}", f"{each['described']:g}", f"{each['fitted']:g}")
    console.print(f"{result['rows']} rows, {result['engine']}")
    console.print(table)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("|ln(measured / predicted)|")
    for heading in ("rows", "as described", "signed", "each left out", "signed", "worst"):
        table.add_column(heading, justify="right")
    for name, was in result["before"].items():
        now = result["left_out"][name]
        cells = (was["error"], was["signed"], now["error"], now["signed"], now["worst"])
        shown = (f"{value:+.1%}" if place in (1, 3) else f"{value:.1%}" for place, value in enumerate(cells))
        table.add_row(name, str(was["rows"]), *shown)
    console.print(table)
    if result["written"]:
        console.print(f"written: {result['written']}; use it as --engine {result['written']}")
        return
    console.print(
        f"[bold red]nothing written[/]: rows that a fit had not seen are predicted no better "
        f"({result['error_left_out']:.1%}, {result['error_before']:.1%} as described)"
    )
