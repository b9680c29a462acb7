"""`glm5 export check DIR`: what ATC would refuse of an exported package, line by line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A package of `glm5 export` (--format onnx or ascend).")
    ],
    soc_version: Annotated[
        str | None, typer.Option(help="Check for this chip, as in Ascend910B3 [default: the package's own, or any].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check an ONNX package against ATC's operators and limits. Exits with 2 where ATC would refuse something."""
    from runtime.porting.export.check import check as run

    report = run(folder, soc_version)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        for refusal in report.refusals:
            print(refusal.line())
        gears = ", ".join(f"{count} {phase}" for phase, count in report.gears.items())
        needs = f"; needs the package's plugin for {', '.join(report.plugin)}" if report.plugin else ""
        verdict = f"{len(report.refusals)} refusals" if report.refusals else "nothing that ATC would refuse"
        print(
            f"{folder}: {report.graphs} graphs, {report.nodes} nodes, {gears} gears, "
            f"for {report.family or 'any chip'}: {verdict}{needs}"
        )
    if report.refusals:
        raise typer.Exit(2)
