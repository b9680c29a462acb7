"""`glm5 plan check`: recompute a plan's bytes from the model, and say what does not add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError
from runtime.cli import completion


def plan_check(
    plan: Annotated[Path, typer.Argument(help="A plan written by `glm5 plan --out`.")],
    model: Annotated[
        str | None,
        typer.Option(autocompletion=completion.models, help="The model it must be for [default: the one it names]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recompute every byte of a plan from the model and its layout, and say what does not add up.

    Exits with 2 where something does not: a file that is cut short, edited or for another model, a ledger that
    does not add up or exceeds its device, a layer, rank or expert that nobody holds.
    """
    from runtime.deployment.plan import Plan
    from runtime.planning.check import check

    found = Plan.read(plan)
    cfg = found.config(model, plan)
    wrong = check(found, cfg)
    if as_json:
        print(json.dumps({"plan": str(plan), "hash": found.hash, "model": cfg.name, "wrong": wrong}, indent=2))
    if wrong:
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UsageError(f"{plan}: {wrong[0]}{more}")
    if not as_json:
        devices = found.devices
        print(f"{plan}: {len(devices)} devices, every byte adds up; for {cfg.name}, hash {found.hash[:12]}…")
