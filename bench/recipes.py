"""The recipes people publish for GLM-5, priced beside the planner's choice by the same simulator.

    python -m bench.recipes [FILE]      [default: the table between the markers of docs/planning.md]

Each case is a machine and a load; its recipes are layouts given by hand, simulated as `glm5 simulate --plan` would,
and one search with everything free. Recipes and plans see the same load: its concurrency is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.plan import Plan, Predicted
from runtime.planning.contender import Contender, Part, plan_of
from runtime.planning.estimate import Estimate
from runtime.planning.options import Question, make_option
from runtime.planning.predict import predicted, simulate_plan
from runtime.planning.search import Chips, search
from runtime.simulation.transfer import transfer_of

DOCS = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- begin: made by `python -m bench.recipes` -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Pools of (layout, replicas): one that serves, or one that prefills and one that decodes. kv: its caches."""

    name: str
    source: str
    pools: tuple[tuple[Layout, int], ...]
    kv: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    chip: str
    devices: int
    scheme: str
    engine: str
    demand: Demand
    recipes: tuple[Recipe, ...]


VLLM, COOKBOOK = "vllm-project/recipes GLM/GLM5.md", "sgl-cookbook GLM-5.md"
ASCEND = "vllm-ascend tutorials/models/GLM5.md"
PD = f"{ASCEND}, PD 2P2D"
# vllm-ascend's common flags: --max-num-batched-tokens 4096 --gpu-memory-utilization 0.95
NPU = {"max_step_tokens": 4096, "memory_fraction": 0.95}
CASES = (
    Case(
        "8 x H200, GLM-5-FP8, 8,192 + 1,024 tokens, 64 in flight",
        "h200-sxm",
        8,
        "fp8",
        "sglang",
        Demand(concurrency=64),
        (
            Recipe("TP8", f"{COOKBOOK}, {VLLM}", ((Layout(tp=8), 1),), "bf16"),
            Recipe("TP8, FP8 cache", VLLM, ((Layout(tp=8), 1),), "fp8"),
            Recipe("DP8 attention + EP8", COOKBOOK, ((Layout(dp=8, ep=8), 1),), "bf16"),
        ),
    ),
    Case(
        "8 x H200, GLM-5-FP8, one request at a time",
        "h200-sxm",
        8,
        "fp8",
        "sglang",
        Demand(concurrency=1, objective="latency"),
        (Recipe("TP8", f"{COOKBOOK}, {VLLM}", ((Layout(tp=8), 1),), "bf16"),),
    ),
    Case(
        "One Atlas 800 A3 (16 dies), W4A8, 3,500 + 1,500 tokens, 16 in flight",
        "ascend-910c-die",
        16,
        "w4a8",
        "vllm-ascend",
        Demand(isl=3500, osl=1500, concurrency=16),
        (
            Recipe("TP16 + EP16", ASCEND, ((Layout(tp=16, ep=16), 1),), "bf16", NPU),
            Recipe("DP2 TP8 + EP16", ASCEND, ((Layout(tp=8, dp=2, ep=16), 1),), "bf16", NPU),
        ),
    ),
    Case(
        "One Atlas 800 A3 (16 dies), W4A8, 3,500 + 1,500 tokens, 64 in flight, TPOT at most 100 ms",
        "ascend-910c-die",
        16,
        "w4a8",
        "vllm-ascend",
        Demand(isl=3500, osl=1500, concurrency=64, tpot_ms=100),
        (
            Recipe("TP16 + EP16", ASCEND, ((Layout(tp=16, ep=16), 1),), "bf16", NPU),
            Recipe("DP2 TP8 + EP16", ASCEND, ((Layout(tp=8, dp=2, ep=16), 1),), "bf16", NPU),
        ),
    ),
    Case(
        "Four Atlas 800 A3 (64 dies), W4A8, 16,384 + 1,024 tokens, 128 in flight",
        "ascend-910c-die",
        64,
        "w4a8",
        "vllm-ascend",
        Demand(isl=16384, osl=1024, concurrency=128),
        (
            Recipe(
                "P DP4 TP8, D DP32 TP1", PD, ((Layout(8, 4, 32), 1), (Layout(1, 32, 32), 1)), "int8", NPU
            ),
            Recipe(
                "P DP4 TP8, D DP8 TP4", PD, ((Layout(8, 4, 32), 1), (Layout(4, 8, 32), 1)), "int8", NPU
            ),
        ),
    ),
)  # fmt: skip


def question_of(case: Case) -> Question:
    return Question(load_config("glm-5-fp8"), case.demand, case.engine, case.scheme)


def recipe_plan(case: Case, recipe: Recipe) -> Plan:
    """The recipe as a plan: nothing searched."""
    asked, profile = question_of(case), hw_profiles.load(case.chip)
    chosen = [
        (make_option(asked, profile, layout, case.scheme, recipe.kv, recipe.settings, replicas=replicas), replicas)
        for layout, replicas in recipe.pools
    ]
    roles = ("serve",) if len(chosen) == 1 else ("prefill", "decode")
    parts = tuple(Part(role, option, n) for role, (option, n) in zip(roles, chosen, strict=True))  # type: ignore[arg-type]
    transfer = transfer_of(chosen[0][0].spec, chosen[1][0].spec, case.demand.isl) if len(chosen) > 1 else None
    nothing = Estimate(case.demand.concurrency or 1, 0.0, 0.0, 0.0, 0.0)
    return plan_of(Contender(parts, nothing, (), transfer), asked, case.devices)


def simulated(plan: Plan) -> Predicted:
    report, share, shares = simulate_plan(plan, load_config("glm-5-fp8"))
    return predicted(plan, report, share, shares)


def row(name: str, source: str, got: Predicted, best: bool) -> str:
    figures = (
        f"{got.output_tokens_per_s:,.0f}",
        f"{got.output_tokens_per_s_per_device:,.1f}",
        f"{got.ttft_ms['mean'] or 0:,.0f}",
        f"{got.tpot_ms['mean'] or 0:,.1f}",
        f"{(got.e2e_ms['mean'] or 0) / 1e3:,.1f}",
    )
    mark = "**" if best else ""
    return f"| {mark}{name}{mark} | {source} | " + " | ".join(figures) + " |"


def table(case: Case) -> list[str]:
    lines = [f"**{case.name}** ({case.engine})", ""]
    lines += [
        "| layout | from | tok/s | tok/s/device | TTFT ms | TPOT ms | request s |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in case.recipes:
        lines.append(row(recipe.name, recipe.source, simulated(recipe_plan(case, recipe)), False))
    plan, seconds = planned(case)
    print(f"{case.name}: {seconds:.1f} s to plan")
    common = case.recipes[0].kv
    if plan.formats.kv not in {recipe.kv for recipe in case.recipes}:
        lines.append(plan_row(planned(case, common)[0], f"this planner, `--kv {common}`"))
    return [*lines, plan_row(plan, "this planner"), ""]


def planned(case: Case, kv: str | None = None) -> tuple[Plan, float]:
    """(the planner's choice, seconds it took)."""
    start = time.perf_counter()
    asked = dataclasses.replace(question_of(case), kv=kv)
    return search(asked, [Chips(hw_profiles.load(case.chip), case.devices)]), time.perf_counter() - start


def plan_row(plan: Plan, source: str) -> str:
    assert plan.predicted
    settings = "".join(f", {k} {v}" for k, v in plan.serving.settings.items() if k != "memory_fraction")
    name = " + ".join(f"{pool.replicas} x {pool.layout.name} {pool.role}" for pool in plan.pools)
    return row(f"{name}, KV {plan.formats.kv}{settings}", source, plan.predicted, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=DOCS)
    path = parser.parse_args().file
    text = path.read_text()
    made = "\n".join(line for case in CASES for line in table(case))
    head, rest = text.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
