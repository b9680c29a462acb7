"""`glm5 fit`: a few measurements of one deployment bend what is predicted for it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError
from foundation.writing import require_writable


def fit(
    file: Annotated[Path, typer.Argument(help="CSV of measurements of one deployment; columns: docs/validation.md.")],
    out: Annotated[Path, typer.Option(help="Write the engine here, for --engine; a name that ends in .toml.")],
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
    with progress_bar(not as_json, "simulations") as progress:
        found = run_fit(file, progress or (lambda done, total: None))
    if found.helps:
        write_engine(out, found, file.name)
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
