"""`glm5 validate`: the simulator scored against measured deployments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import completion


def validate(
    file: Annotated[Path, typer.Argument(help="CSV of end-to-end rows or of step times; see docs/validation.md.")],
    without: Annotated[
        str | None,
        typer.Option(autocompletion=completion.mechanisms, help="Switch this cause off."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict every row of a CSV of measurements, and score the predictions."""
    from runtime.simulation.mechanisms import mechanism
    from runtime.simulation.scores import by_group, over_groups, summary
    from runtime.simulation.validation import score

    rows = score(file, without=mechanism(without) if without is not None else None)
    whole, groups = summary(rows), by_group(rows)
    result = {
        "rows_detail": [
            {
                "name": row.name,
                "measured": dict(row.measured),
                "predicted": dict(row.predicted),
                "band": dict(row.bands),
                "saturated": row.saturated,
                "evidence": row.evidence,
                "skipped": row.skipped,
                "group": row.group,
                "apart": row.apart,
            }
            for row in rows
        ],
        **whole,
        "groups": groups,
        "over_groups": over_groups(groups),
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    console = Terminal()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("row", "quantity", "measured", "predicted", "error", "band"):
        table.add_column(heading, justify="left" if heading in ("row", "quantity") else "right", overflow="fold")
    for row in rows:
        for quantity in row.predicted:
            measured, predicted = row.measured[quantity], row.predicted[quantity]
            low, high = row.bands[quantity]
            mark = "" if row.inside(quantity) else " [red]outside[/]"
            note = " saturated" if row.saturated else ""
            table.add_row(
                row.name + note,
                quantity,
                f"{measured:.4g}",
                f"{predicted:.4g}",
                f"{predicted / measured - 1:+.0%}",
                f"{low:.4g} to {high:.4g}{mark}",
            )
    console.print(table)
    for row in rows:
        if row.skipped:
            console.print(f"[yellow]skipped[/] {row.name}: {row.skipped}", soft_wrap=True)
    for key, value in whole.items():
        console.print(f"{key}: {value:.1%}" if isinstance(value, float) else f"{key}: {value}")
    for name, group in groups.items():
        keys = [key for key in group if key.endswith(("_mape", "_residual"))]
        shown = [f"{key} {group[key]:{'+.1%' if key.endswith('residual') else '.1%'}}" for key in keys]
        apart = f" (apart: {group['apart']})" if group.get("apart") else ""
        console.print(f"{name}, {group['rows']} rows: {', '.join(shown)}{apart}")
    for key, value in result["over_groups"].items():
        console.print(f"{key}: {value:.1%}" if isinstance(value, float) else f"{key}: {value}")
