"""Virtual time: what a client of the emulated devices sees is what the simulation of the same plan and requests says,
and the timeline of the devices adds up to it."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hw_profiles
from backends.emulation.backend import SimBackend
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.plan import ModelRef, Plan, Route, Transfer, config_hash
from runtime.execution.cluster.session import serve
from runtime.execution.local.request import Prompt
from runtime.planning.predict import simulate_plan
from tests.plans import formats, pool_of
from tests.sim.servers import CHIP, assert_same, emulated, plan_of, prompts_of, reference

PROMPT, OUTPUT, COUNT = 40, 6, 5


def demanded(plan: Plan) -> Plan:
    """A plan whose load is `COUNT` requests of equal lengths, all at once."""
    return dataclasses.replace(plan, demand=Demand(PROMPT, OUTPUT, 1.0, concurrency=COUNT))


def split_plan(cfg: ModelConfig, prefill: Layout, decode: Layout, scheme: str = "f32") -> Plan:
    """One pool that prefills, one that decodes."""
    chip, held = hw_profiles.load(CHIP), formats(scheme)
    first = pool_of(cfg, prefill, chip, held, role="prefill")
    second = pool_of(cfg, decode, chip, held, role="decode", first_device=prefill.devices, first_node=1)
    moved = Transfer(9e3, 50e9, 5e-6, 1e-8, 9e3 * PROMPT, 5e-6 + 2e-7 * PROMPT, (Route(0, 0, 9e3),))
    return Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), (first, second), moved)


def same_lengths(cfg: ModelConfig) -> list[Prompt]:
    prompts = prompts_of(cfg, [PROMPT] * COUNT, [OUTPUT] * COUNT)
    return [dataclasses.replace(prompt, keep_logits=False) for prompt in prompts]


@pytest.mark.parametrize(
    "case", ["ranks", *(pytest.param(case, marks=pytest.mark.slow) for case in ("stages", "two pools"))]
)
def test_times_are_the_simulations(checkpoints: dict[str, Checkpoint], tmp_path: Path, case: str) -> None:
    checkpoint = checkpoints["mla"]
    cfg = checkpoint.config
    plan = demanded(
        {
            "ranks": lambda: plan_of(cfg, Layout(dp=2, ep=2), scheme="bf16"),
            "stages": lambda: plan_of(cfg, Layout(tp=2, pp=2), scheme="bf16", engine="vllm"),
            "two pools": lambda: split_plan(cfg, Layout(tp=2), Layout(dp=2, ep=2), "bf16"),
        }[case]()
    )
    expected, *_ = simulate_plan(plan, cfg, requests=COUNT)
    trace = tmp_path / "trace.json"
    found = serve(checkpoint, SimBackend(mapped=True), plan, same_lengths(cfg), trace=trace).outcome
    ttft = np.mean([each.ttft_s for each in found.completions])
    tpot = np.mean([each.decode_s / (OUTPUT - 1) for each in found.completions])
    assert ttft == pytest.approx(expected.ttft.mean, rel=1e-9) and tpot == pytest.approx(expected.tpot.mean, rel=1e-6)
    assert ttft > 0 and tpot > 0
    check_timeline(
        json.loads(trace.read_text())["traceEvents"], plan, max(c.ttft_s + c.decode_s for c in found.completions)
    )


def check_timeline(events: list[dict[str, Any]], plan: Plan, last_s: float) -> None:
    """A named row a device, whose slices follow one another, with collectives where the layout has some."""
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(rows) == {device.index for device in plan.devices}
    slices: dict[int, list[tuple[float, float]]] = defaultdict(list)
    kinds: dict[int, set[str]] = defaultdict(set)
    for event in events:
        if event["ph"] == "X":
            slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            kinds[event["tid"]].add(event["cat"])
    assert set(slices) == set(rows)
    for device, found in slices.items():
        found.sort()
        assert all(begin >= end - 1e-6 * max(end, 1) for (_, end), (begin, _) in zip(found, found[1:], strict=False))
        assert found[-1][1] <= last_s * 1e6 * (1 + 1e-9) and {"op", "collective"} <= kinds[device]


def test_two_pools_give_the_same_tokens(checkpoints: dict[str, Checkpoint]) -> None:
    """Prompts are prefilled on one layout, their caches moved, and their answers made on another."""
    checkpoint = checkpoints["gqa"]
    cfg = checkpoint.config
    plan = split_plan(cfg, Layout(tp=2), Layout(dp=2, ep=2))
    requests = prompts_of(cfg, [33, 4, 18], [4, 1, 6])
    found = emulated(checkpoint, plan, requests)
    assert_same(found.outcome.completions, reference(checkpoint, requests))


@pytest.mark.slow
def test_replicas_share_the_requests(checkpoints: dict[str, Checkpoint]) -> None:
    """Two servers of a plan: each serves its part, and together they take no longer than one with half of them."""
    checkpoint = checkpoints["gqa"]
    cfg = checkpoint.config
    requests = prompts_of(cfg, [9, 12, 7, 15], [5, 5, 5, 5])
    found = emulated(checkpoint, plan_of(cfg, Layout(tp=2), replicas=2), requests)
    assert_same(found.outcome.completions, reference(checkpoint, requests))
    alone = emulated(checkpoint, plan_of(cfg, Layout(tp=2)), requests)
    last = [max(c.ttft_s + c.decode_s for c in each.outcome.completions) for each in (found, alone)]
    assert last[0] < last[1]
