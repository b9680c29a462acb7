"""`glm5 simulate --plan`: a plan, simulated under its own demand (the run behind its predictions) or another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from foundation.errors import UsageError
from runtime.cli.given import given, refuse_unread
from runtime.cli.kv_memory import OFFLOAD, offload_asked
from runtime.cli.loads import HABITS, habits_asked

if TYPE_CHECKING:
    from runtime.serving import Report

_FREE = frozenset({"plan", "model", "requests", "seed", "trace", "explain", "html", "as_json", *OFFLOAD})
"""Options that go with a plan."""

_LOAD = frozenset({"isl", "osl", "concurrency", "rate", *HABITS})
"""Options that ask how the plan does under another load; all others are decided by it."""


def load_beside_plan(context: typer.Context) -> dict[str, Any]:
    """What was said of the load. Raises `UsageError` for an option that would change what the plan decided."""
    refuse_unread(context, _FREE | _LOAD, lambda _: "does not go with --plan, which decides it: make another plan")
    load = {name: context.params[name] for name in given(context) if name in _LOAD and name not in HABITS}
    load |= habits_asked(context.params)
    if any(name in given(context) for name in OFFLOAD):
        load["offload"] = offload_asked(context.params)
    if "concurrency" in load and "rate" in load:
        raise UsageError("--concurrency and --rate: give one of them")
    return load


def simulated_plan(
    path: Path,
    load: dict[str, Any],
    requests: int | None,
    seed: int,
    trace: Any,
    progress: Any,
    model: str | None = None,
) -> tuple[dict[str, Any], Report]:
    """(what `glm5 simulate --json` prints, the report): throughputs of the whole plan.

    load: fields of its demand to change, and "offload" of its pools. model: where the plan's is, if that was said.
    """
    from runtime.cli.simulated import explained, load_of, pools_of, result_of
    from runtime.deployment.plan import Plan
    from runtime.planning.predict import simulate_plan, whole

    plan = Plan.read(path)
    made = plan.hash
    if (offload := load.pop("offload", None)) is not None:
        pools = tuple(
            pool if pool.role == "decode" else dataclasses.replace(pool, offload=offload) for pool in plan.pools
        )
        plan = dataclasses.replace(plan, pools=pools)
    if "concurrency" in load or "rate" in load:
        load = {"concurrency": None, "rate": None, **load}
    for name in ("isl", "osl"):
        if name in load and plan.demand.histogram:
            raise UsageError(f"--{name}: the plan's lengths are those of a file; make another plan")
    plan = dataclasses.replace(plan, demand=dataclasses.replace(plan.demand, **load))
    report, share, shares = simulate_plan(
        plan, plan.config(model, path), seed=seed, requests=requests, trace=trace, progress=progress
    )
    of_all = whole(report, shares, plan)
    built = share.serving
    result = result_of(built.spec, built, report, len(plan.devices), built.deployment.replicas)
    held = {
        f"{pool.role}: {pool.name}": (len(pool.devices), each.ledger)
        for pool, each in zip(plan.pools, share.pools, strict=True)
    }
    profile = " + ".join(dict.fromkeys(pool.profile for pool in plan.pools))
    of_load = load_of(plan.demand, of_all, prefix_cache=share.pools[0].spec.engine.prefix_cache)
    result |= {**of_all.to_json(), "profile": profile, "plan": made, **pools_of(held, plan.transfer), **of_load}
    return result | explained(trace, report, share.deployment), of_all
