"""`glm5 plan rl`: a split, its document and page, closed forms against plays, and one line for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import UsageError
from runtime.deployment.document import validated
from runtime.planning.rl.answer import RlPlan
from runtime.pricing.bands import FEW
from runtime.pricing.training.band import PublishedSteps, training_band, training_coverage
from tests.cli.cli import glm5, refused

TINY = Path(__file__).parents[2] / "runtime" / "data" / "tiny-glm5" / "config.json"
LOAD = ("--groups", 4, "--group-size", 4, "--isl", 100, "--osl", 100, "--steps", 3)
SMALL = ("plan", "rl", "--model", TINY, "--devices", 2, *LOAD)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rl")
    out, html = folder / "rl.json", folder / "rl.html"
    result = glm5(*SMALL, "--delay-s", 2, "--out", out, "--html", html)
    assert result.code == 0, result.err
    assert "samples/s" in result.out and "evidence" in result.out
    return out, html


@pytest.fixture(scope="module")
def document(files: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads(files[0].read_text())


def test_the_document_is_whole_and_reads_back(document: dict[str, Any]) -> None:
    plan = validated(RlPlan, document, UsageError, "rl.json", complete=True)
    assert json.loads(plan.text) == document
    assert plan.trainer.devices + plan.rollouts.devices + plan.spare_devices == 2


def test_shares_are_of_a_whole(document: dict[str, Any]) -> None:
    figures = document["figures"]
    for shares in (figures["trainer"], figures["rollouts"], figures["behind"], figures["groups_behind"]):
        assert sum(shares.values()) == pytest.approx(1.0)
    assert max(int(versions) for versions in figures["groups_behind"]) <= 1
    low, high = figures["samples_per_s_band"]
    assert low <= figures["samples_per_s"] * 1.001 and figures["samples_per_s"] <= high * 1.001
    assert figures["samples_per_s"] == pytest.approx(16 / figures["step_seconds"])
    assert document["timeline"]["spans"][-1][2] == pytest.approx(document["timeline"]["seconds"], abs=0.01)


@pytest.mark.slow
def test_the_best_is_the_best_of_the_splits_that_were_played() -> None:
    """And closed forms, which choose what is played, are of the size of the plays, where weights are not sent for as
    long as answers are drawn."""
    load = (*LOAD, "--osl", 1000)
    document = glm5("plan", "rl", "--model", "glm-4.7-flash", "--devices", 16, *load, "--json").json
    played = document["played"]
    rates = [row["samples_per_s"] for row in played]
    assert rates == sorted(rates, reverse=True) and rates[0] == document["figures"]["samples_per_s"]
    assert all(0.5 < row["samples_per_s"] / row["estimated_samples_per_s"] < 2 for row in played)


def test_the_page_holds_the_timeline_and_nothing_from_elsewhere(files: tuple[Path, Path]) -> None:
    text = files[1].read_text()
    assert "What happens when" in text and "<svg" in text and "viewport" in text
    assert not re.search(r'(src|href)="http', text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", 1), "one device cannot both train and generate"),
        (("--mode", "sync", "--staleness", 2), "--staleness is for --mode async"),
        (("--tool-tokens", 5), "add --turns of two or more"),
        (("--delay-s", -1), "--delay-s must lie between 0 and 3600"),
        (("--longest", 10), "less than the mean"),
        (("--rollout-profile", "h200-sxm"), "say how many"),
        (("--train-devices", 2), "leave none for rollouts"),
        (("--length-cv", 0), "lognormal lengths need"),
        (("--train-formats", "int4"), "bf16, fp8"),
        (("--set", "model.index_topk=5"), "a plan is for a model as it is"),
    ],
)
def test_mistakes(words: tuple[object, ...], said: str) -> None:
    assert said in refused(*SMALL, *words)


def test_bands_follow_the_steps(document: dict[str, Any]) -> None:
    """A training step has a band, which leans to where published ones of such models lay; what the play makes of both
    sides' bands holds the figure, and is no wider than both sides together."""
    trainer, figures = document["trainer"], document["figures"]
    low, high = (end / trainer["step_seconds"] for end in trainer["step_band_seconds"])
    assert low < 1 < high and "groups" in trainer["band_basis"]
    least, most = (end / figures["samples_per_s"] for end in figures["samples_per_s_band"])
    assert 1 / (high * 2) < least <= 1 <= most < 2 / low


def test_a_training_band_widens_where_little_is_known() -> None:
    published = [PublishedSteps(str(place), False, (0.02 * place,), 0.3) for place in range(FEW)]
    sparse = [PublishedSteps("with an indexer", True, (0.5,), 0.3)]
    sure = training_band(False, 0.3, published + sparse)
    unsure = training_band(True, 0.3, published + sparse)
    assert unsure.high - unsure.low > sure.high - sure.low and "1 groups of" in unsure.basis
    dearer = training_band(False, 0.6, published + sparse)
    assert dearer.low < sure.low and sure.high < dearer.high and "less certain" in dearer.basis
    assert training_coverage(published) == (FEW, FEW)
