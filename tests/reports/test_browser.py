"""Pages at the width of a phone and on paper, laid out by a real browser (a comparison's: tests/compare)."""

import dataclasses
from pathlib import Path

from runtime.deployment.plan import Plan
from runtime.reports import plan as plan_page
from runtime.reports import serving
from runtime.serving import Uniform, closed_loop
from runtime.training import metrics
from tests.reports.browser import PAPER, PHONE, check, laid_out, needs_browser
from tests.reports.test_plan_page import CFG, full  # noqa: F401 (a fixture)
from tests.reports.test_serving_page import result_of, run

pytestmark = needs_browser


def test_a_plan(full: Plan, tmp_path: Path) -> None:  # noqa: F811
    html = plan_page.page(full, CFG)
    check(html, tmp_path)
    assert laid_out(html, PAPER, tmp_path, paper=True)["folds"] > 2


def test_a_plan_of_long_names(full: Plan, tmp_path: Path) -> None:  # noqa: F811
    rejected = tuple(dataclasses.replace(one, name="x" * 90, reason="y" * 300) for one in full.rejected)
    check(plan_page.page(dataclasses.replace(full, rejected=rejected), CFG), tmp_path)


def test_paper_has_the_first_rejected_candidates_and_a_count(full: Plan, tmp_path: Path) -> None:  # noqa: F811
    few, many = (
        laid_out(plan_page.page(dataclasses.replace(full, rejected=full.rejected[:1] * n), CFG), PAPER, tmp_path, True)
        for n in (20, 400)
    )
    assert full.rejected and few["height"] == many["height"]


def test_a_simulation(tmp_path: Path) -> None:
    report = run(closed_loop(4, 40, Uniform(500), Uniform(50)))
    check(serving.page(result_of(report), report), tmp_path)


def test_a_training_run(tmp_path: Path) -> None:
    for step in range(0, 500, 100):
        losses = dict.fromkeys(metrics.TASKS, 1.0 + step)
        metrics.append(tmp_path, {"step": step, "loss": 2.0, "task_loss": losses, "logit_max": 3.0, "load_ratio": 1.5})
    metrics.page(tmp_path, "A training run", [(0, "dense"), (300, "sparse")])
    check((tmp_path / metrics.PAGE).read_text(encoding="utf-8"), tmp_path)


def test_it_would_be_seen(tmp_path: Path) -> None:
    table = "<table><tr>" + "<td style='white-space:nowrap'>a long cell of many words</td>" * 9 + "</tr></table>"
    page = f"<!doctype html><body>{table}<details><summary>more</summary><p>text</p></details>"
    page += f"<pre style='overflow:auto'>{'word ' * 99}</pre>"
    found = laid_out(page, PHONE, tmp_path, paper=True)
    assert found["page"] > found["width"] and "table." in found["run_off"]
    assert found["folded"] == ["p."] and found["cut"] == ["pre."] and found["split"] == []
    narrow = "<table style='width:20px;overflow-wrap:anywhere'><tr><td>simulated<td>1,234.5 ms</table>"
    assert laid_out(narrow, PAPER, tmp_path)["split"] == ["simulated", "1,234.5", "ms"]
