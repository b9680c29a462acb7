"""What TPOT and TTFT are made of adds up to them, whatever the engine, the layout and the load."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.deployment.engines import load
from runtime.serving import (
    Deployment,
    Disaggregated,
    Fixed,
    Speculation,
    StepLog,
    Uniform,
    Workload,
    closed_loop,
    explain,
    open_loop,
    simulate,
)
from runtime.serving.explain import SIMULATED, TERMS
from tests.serving.pricers import LinearPricer

PRICER = LinearPricer()


def explained(workload: Workload, deployment: Deployment | Disaggregated) -> dict:
    log = StepLog()
    report = simulate(workload, deployment, trace=log)
    assert report.to_json() == simulate(workload, deployment).to_json()  # looking changes nothing
    found = explain(log, report, deployment)
    for name, mean in (("ttft_ms", report.ttft.mean), ("tpot_ms", report.tpot.mean)):
        if name in found:
            assert found[name].seconds == mean
            assert math.fsum(part.seconds for part in found[name].parts) == pytest.approx(mean, rel=1e-9)
            assert math.fsum(found[name].terms().values()) == pytest.approx(mean, rel=1e-9)
            assert {part.term for part in found[name].parts} <= set(TERMS)
            assert all(part.seconds > -1e-12 for part in found[name].parts)
            assert all(part.sources for part in found[name].parts if part.term == "host")
            assert all((part.evidence == SIMULATED) == (part.term == "waiting") for part in found[name].parts)
    return found


@settings(max_examples=25)
@given(
    st.sampled_from(("sglang", "vllm", "trtllm")), st.integers(1, 24), st.sampled_from((8_000, 300_000)),
    st.sampled_from((1, 3)), st.sampled_from((1, 2)), st.sampled_from((None, Speculation((0.7, 0.5)))),
    st.sampled_from((1, 40)),
)  # fmt: skip
def test_the_parts_add_up(
    engine: str, clients: int, pool: int, ranks: int, replicas: int, drafts: Speculation | None, answers: int
) -> None:
    held = Deployment(load(engine), PRICER, pool, ranks * replicas, replicas, ranks, speculation=drafts)
    found = explained(closed_loop(clients, 2 * clients, Uniform(3000, 0.3), Fixed(answers)), held)
    assert ("tpot_ms" in found) == (answers > 1)
    assert all(part.part != "between steps" for figure in found.values() for part in figure.parts)  # all is accounted


def test_an_open_load_and_pools_apart_add_up() -> None:
    one = Deployment(load("sglang"), PRICER, 200_000, 1)
    explained(open_loop(1.0, 30, Uniform(3000, 0.5), Uniform(60, 0.5)), one)
    apart = Disaggregated(one, dataclasses.replace(one, replicas=2, devices=2), 1e5, 1e9, 1e-3)
    found = explained(closed_loop(6, 24, Fixed(3000), Fixed(60)), apart)
    moved = next(part for part in found["ttft_ms"].parts if part.part.startswith("cache sent"))
    assert moved.seconds >= 3000 * 1e5 / 1e9


def test_a_lone_request_waits_for_nobody() -> None:
    """By hand: a decode step is the pricer's, a prompt one chunk, and the rest is the front end's."""
    engine = load("vllm", {"prefix_cache": False})
    found = explained(closed_loop(1, 4, Fixed(2000), Fixed(11)), Deployment(engine, PRICER, 100_000))
    tpot, ttft = found["tpot_ms"], found["ttft_ms"]
    step = PRICER.fixed + PRICER.per_decode + PRICER.per_context * (2000 + 5.5)
    assert tpot.terms()["waiting"] == pytest.approx(0, abs=1e-9) and tpot.seconds == pytest.approx(step, rel=1e-4)
    assert ttft.terms()["compute"] == pytest.approx(2000 * PRICER.per_prompt)
    front = engine.front_seconds(2000) + engine.response_seconds + engine.request_delay_seconds
    launches = engine.step_seconds(0, False, engine.in_pieces(0, 2000, 2000))
    device = PRICER.fixed + 2000 * PRICER.per_prompt
    assert ttft.terms()["host"] == pytest.approx(front + max(launches - device, 0.0))
    assert ttft.terms()["waiting"] == pytest.approx(0, abs=1e-9)


def test_prompts_of_others_are_waited_for() -> None:
    """More clients lengthen the waiting of a token; what decoding it takes by itself only grows with the batch."""
    held = Deployment(load("sglang"), PRICER, 300_000)
    few, many = (explained(closed_loop(n, 4 * n, Fixed(4000), Fixed(40)), held)["tpot_ms"].terms() for n in (1, 16))
    assert few["waiting"] == pytest.approx(0, abs=1e-9) and many["waiting"] > many["memory"] > few["memory"] * 0.99
