"""Rates and targets: what a plan promises is what a long run serves, and what nobody meets is said with exit code 1."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand, length_range
from runtime.deployment.errors import NoPlanError
from runtime.deployment.plan import Plan
from runtime.planning import smallest as module
from runtime.planning.options import Question
from runtime.planning.predict import simulate_plan, whole
from runtime.planning.search import Chips, search
from runtime.planning.smallest import smallest
from runtime.reports.plan import page
from runtime.serving import Fixed, Uniform, open_loop
from tests.cli.cli import glm5
from tests.plans import formats, plan_for
from tests.reports.test_plan_page import PREDICTED

pytestmark = pytest.mark.usefixtures("coarse")
SMALL = ("--model", "glm-4.7-flash", "--devices", 1, "--isl", 1024, "--osl", 64)
FLASH = load_config("glm-4.7-flash")
H200 = hw_profiles.load("h200-sxm")


def planned(*words: object) -> tuple[int, Any]:
    code, out, err = glm5("plan", *SMALL, *words, "--json")
    assert out, err
    return code, json.loads(out)


# --- rates ------------------------------------------------------------------------------------------------


def test_a_rate_that_is_met_is_met_in_a_long_run_and_one_beyond_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, missed = planned("--rate", 400, "--out", path, "--html", tmp_path / "plan.html")
    assert code == 1 and missed["predicted"]["meets_targets"] is False
    assert 5 < missed["predicted"]["requests_per_s"] < 400
    assert "400 requests/s asked" in (tmp_path / "plan.html").read_text()
    again = glm5("simulate", "--plan", path, "--json")
    assert again.code == 1 and json.loads(again.out)["meets_targets"] is False
    lighter = glm5("simulate", "--plan", path, "--rate", 5, "--requests", 50, "--json").json
    assert lighter["meets_targets"] is True and lighter["saturated_by"] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "demand",
    [
        Demand(isl=2048, osl=256, rate=20, objective="min-devices"),
        Demand(isl=4096, osl=512, rate=3, tpot_ms=60, objective="min-devices"),
    ],
)
def test_the_fewest_devices_serve_what_is_asked_in_a_long_run(demand: Demand) -> None:
    cfg = load_config("glm-5-fp8")
    plan = smallest(Question(cfg, demand), H200, 384)
    assert plan.predicted and plan.predicted.meets_targets and not plan.idle_devices and demand.rate
    report, _, shares = simulate_plan(plan, cfg, requests=1500, seed=3)
    assert report.sustained
    assert whole(report, shares, plan).requests_per_s == pytest.approx(demand.rate, rel=0.03)


# --- targets that nobody meets ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["throughput", "latency", "min-devices"])
def test_the_nearest_plan_is_written_and_says_what_binds(objective: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ("plan", *SMALL, "--concurrency", 4, "--tpot-ms", 0.1, "--objective", objective, "--out", path)
    code, out, _ = glm5(*words)
    assert code == 1 and re.search(r"misses its targets: TPOT [\d.]+ ms, 0.1 asked", out)
    assert re.search(r"limited by [^;]+; the nearest of \d simulated", out)
    plan = Plan.read(path)
    assert plan.predicted and not plan.predicted.meets_targets
    assert glm5("simulate", "--plan", path).code == 1


# --- the fewest devices -----------------------------------------------------------------------------------


def stub(monkeypatch: pytest.MonkeyPatch, uses: dict[int, int], works: set[int], thorough: set[int]) -> list[int]:
    """A search that uses so many of a count of devices, and meets the targets with those in `works`, or in `thorough`
    where it plays more plans. Returns the counts asked for."""
    asked: list[int] = []

    def made(question: Question, chips: list[Chips], load: Any, name: str, progress: Any, played: int) -> Plan:
        count = chips[0].count
        asked.append(count)
        if count < 8:
            raise NoPlanError("does not fit")
        used = uses.get(count, count)
        met = count in works or (played > 3 and count in thorough)
        figures = dataclasses.replace(
            PREDICTED, rate=6.0, concurrency=None, meets_targets=met, saturated_by="" if met else "arrivals",
            requests_per_s=6.0 if met else count / 10,
        )  # fmt: skip
        held = formats("bf16")
        plan = plan_for(FLASH, Layout(tp=4, dp=2, ep=8), H200, held, replicas=used // 8, demand=question.demand)
        return dataclasses.replace(plan, predicted=figures, idle_devices=count - used)

    monkeypatch.setattr(module, "search", made)
    return asked


SIX = Question(FLASH, Demand(rate=6.0, objective="min-devices"))


def test_idle_devices_are_none_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, {56: 48, 64: 48}, {56, 64}, set())
    plan = smallest(SIX, H200, 64)
    assert len(plan.devices) == 48 and plan.idle_devices == 0


def test_what_is_found_is_tried_again_below(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub(monkeypatch, {}, {48, 56, 64}, {32, 40})
    plan = smallest(SIX, H200, 64)
    assert len(plan.devices) == 32 and asked[-1] == 24
    assert ("24 x h200-sxm", "6 requests/s asked, 2.4 served, and the backlog grows") in [
        (each.name, each.reason) for each in plan.rejected
    ]


def test_where_no_number_works_the_closest_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, {}, set(), set())
    plan = smallest(SIX, H200, 48)
    assert len(plan.devices) == 48 and plan.predicted and not plan.predicted.meets_targets


# --- answers of one token, lengths, figures a device --------------------------------------------------------


def test_answers_of_one_token_get_the_best_plan() -> None:
    """Prompts alone: ranks side by side serve more than one over all devices."""
    plan = search(Question(FLASH, Demand(isl=2048, osl=1)), [Chips(H200, 2)])
    figures = plan.predicted
    assert figures and figures.tpot_ms["mean"] is None and figures.output_tokens_per_s_per_user is None
    assert "NaN" not in plan.text and "nan" not in re.sub("<style>.*?</style>", "", page(plan, FLASH), flags=re.S)
    assert {row.tpot_ms for row in plan.alternatives} == {None} and plan.transfer is None
    best = max(row.output_tokens_per_s_per_device for row in plan.alternatives if row.simulated)
    assert figures.output_tokens_per_s_per_device == best
    alone = plan_for(FLASH, Layout(tp=2), H200, plan.formats, demand=plan.demand)
    assert figures.requests_per_s >= simulate_plan(alone, FLASH)[0].requests_per_s


@pytest.mark.parametrize(("tokens", "ratio"), [(60000, 0.8), (8192, 1.0), (1, 0.8), (7, 0.01)])
def test_lengths_are_said_as_they_are_drawn(tokens: int, ratio: float) -> None:
    drawn = [each.prompt_tokens for each in open_loop(1.0, 1000, Uniform(tokens, ratio), Fixed(1)).requests]
    low, high = length_range(tokens, ratio)
    assert low <= min(drawn) <= low + tokens * 0.01 and high - tokens * 0.01 <= max(drawn) <= high
    assert f"{high:,} tokens in and 1 out" in Demand(tokens, 1, ratio).lengths


def test_a_rate_is_among_what_was_asked_and_a_user_is_not_a_rate() -> None:
    demand = Demand(rate=3.5)
    plan = plan_for(FLASH, Layout(tp=4), H200, formats("bf16"), demand=demand)
    plan = dataclasses.replace(plan, predicted=dataclasses.replace(PREDICTED, concurrency=None, rate=3.5))
    text = re.sub(r"(<[^>]+>|\s)+", " ", page(plan, FLASH))
    assert "Meets what was asked: 3.5 requests/s" in text
    assert re.search(r"A user 41.5 tok/s 90 in flight on average", text)  # 3.5 a second for 25.5 s


def test_a_plan_of_two_pools_is_simulated_as_one_of_both(tmp_path: Path) -> None:
    path, html = tmp_path / "plan.json", tmp_path / "page.html"
    chips = ("--profile", "h200-sxm:3", "--profile", "h20-141gb:1")
    words = ("--model", "glm-4.7-flash", *chips, "--isl", 1024, "--osl", 64, "--concurrency", 4, "--kv", "bf16")
    assert glm5("plan", *words, "--out", path).code == 0
    plan = Plan.read(path)
    result = glm5("simulate", "--plan", path, "--html", html, "--json").json
    used = len(plan.devices)
    assert result["devices"] == used == sum(result["pools"].values())
    assert result["output_tokens_per_s"] == pytest.approx(used * result["output_tokens_per_s_per_device"])
    figures = plan.predicted
    assert figures and figures.output_tokens_per_s_per_device == result["output_tokens_per_s_per_device"]
    held = [ledger["capacity_bytes"] for ledger in result["ledgers"].values()]
    assert held == [pool.devices[0].ledger.capacity_bytes for pool in plan.pools]
    shown = glm5("simulate", "--plan", path).out
    for pool in plan.pools:
        assert f"{pool.role}: {pool.name}" in " ".join(shown.split())
        assert html.read_text(encoding="utf-8").count(f"{pool.role}: {pool.name}") >= 2
    assert "prefill and decode apart" in shown
