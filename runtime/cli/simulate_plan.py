"""`glm5 simulate --plan`: a plan, simulated under its own demand: the run behind the plan's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.serving import Report

_FREE = frozenset({"plan", "requests", "seed", "trace", "html", "as_json"})
"""Options that go with a plan; all others are decided by it."""


def refuse_beside_plan(context: typer.Context) -> None:
    """Raises `UsageError` for an option that would change what the plan decided."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in _FREE and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')} does not go with --plan, which decides it: make another plan")


def simulated_plan(
    path: Path, requests: int | None, seed: int, trace: Any, progress: Any
) -> tuple[dict[str, Any], Report]:
    """(what `glm5 simulate --json` prints, the report): throughputs of the whole plan."""
    from runtime.cli.simulate import result_of
    from runtime.planner.plan import Plan
    from runtime.planner.predict import simulate_plan, whole

    plan = Plan.read(path)
    report, share, shares = simulate_plan(
        plan, plan.config(), seed=seed, requests=requests, trace=trace, progress=progress
    )
    of_all = whole(report, shares, plan)
    built = share.built
    result = result_of(built.spec, built, report, len(plan.devices), built.deployment.replicas)
    pools = {f"{pool.role}: {pool.name}": len(pool.devices) for pool in plan.pools}
    profile = " + ".join(dict.fromkeys(pool.profile for pool in plan.pools))
    return {**result, **of_all.to_json(), "profile": profile, "plan": plan.hash, "pools": pools}, of_all
