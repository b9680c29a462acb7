"""`glm5 export check DIR`: what is wrong with an exported package, line by line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A package of `glm5 export`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a package: files, weights, graphs, calls of torch_npu's operators. Exits with 2 where one is refused."""
    from runtime.porting.export.check import check as run

    report = run(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        for refusal in report.refusals:
            print(refusal.line())
        calls = f", {report.calls} calls of torch_npu's operators" if report.calls else ""
        print(f"{folder}: {report.graphs} graphs{calls}: {len(report.refusals) or 'no'} refusals")
        print(f"checked: {'; '.join(report.checked)}")
        if report.unchecked:
            print(f"not checked: {'; '.join(report.unchecked)}")
    if report.refusals:
        raise typer.Exit(2)
