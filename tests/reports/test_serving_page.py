"""The page of a run: whole, self-contained HTML that holds the run's figures, also where there is little to show."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import UsageError
from runtime.reports import svg
from runtime.reports.serving import page, write_page
from runtime.serving import Deployment, Report, Request, Uniform, Workload, closed_loop, simulate
from tests.reports.hostile import hostile, shown
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer

VOID = {"meta", "br", "line", "circle", "polyline", "polygon"}


class Checker(HTMLParser):
    """Fails on tags that do not close in order; collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def run(workload: Workload, **deployment: Any) -> Report:
    return simulate(workload, Deployment(plain_engine(), LinearPricer(), 20_000, **deployment))


def result_of(report: Report) -> dict[str, Any]:
    """What `glm5 simulate --json` gives, of a made-up deployment."""
    figures = report.to_json()
    ledger = {
        "capacity_bytes": 100e9,
        "usable_bytes": 96e9,
        "weights_bytes": {"experts": 60e9, "attention": 5e9, "head": 1e9, "embedding": 1e9},
        "kv_bytes": 20e9,
        "activation_bytes": 2e9,
        "communication_bytes": 0.0,
        "runtime_bytes": 2e9,
        "kv_bytes_per_token": 50_000.0,
        "free_bytes": 5e9,
    }
    band = {f"{n}_ms": [0.8 * m, 1.25 * m] for n in ("ttft", "tpot") if (m := figures[f"{n}_ms"]["mean"]) is not None}
    return {
        "model": "a <model> & more", "profile": "some-chip", "devices": 8, "engine": "glm5",
        "layout": {"tp": 8, "dp": 1, "ep": 1, "pp": 1}, "formats": {"weights": "bf16", "experts": "bf16", "kv": "bf16"},
        **figures, "band": band, "ledger": ledger,
    }  # fmt: skip


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_needs_no_network() -> None:
    report = run(closed_loop(4, 40, Uniform(500), Uniform(50)))
    html = page(result_of(report), report)
    checker = checked(html)
    assert checker.links == []
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|<iframe", html)
    assert html.count("<svg") == 8
    assert "nan" not in html.lower().replace("finance", "") and "None" not in html


def test_the_page_holds_the_figures() -> None:
    report = run(closed_loop(4, 40, Uniform(500), Uniform(50)))
    text = " ".join(checked(page(result_of(report), report)).text)
    assert "a <model> & more on 8 x some-chip" in text
    assert f"{report.ttft.mean * 1e3:,.0f} ms" in text or f"{report.ttft.mean * 1e3:.3g} ms" in text
    assert f"{report.output_tokens_per_s:,.0f} tok/s" in text or f"{report.output_tokens_per_s:.3g} tok/s" in text
    for expected in ("60.00 GB", "left free", "KV pool", "nine times in ten", f"Evidence: {report.evidence}.", "p90"):
        assert expected in text
    for name in (*report.seconds_by_bound, *report.seconds_by_op):
        if report.seconds_by_op.get(name, report.seconds_by_bound.get(name, 0)) > 0:
            assert name.replace("_", " ") in text


def test_a_saturated_run_says_so_first() -> None:
    report = dataclasses.replace(
        run(closed_loop(4, 40, Uniform(500), Uniform(50))), saturated=True, saturated_by="kv-pool"
    )
    text = "".join(checked(page(result_of(report), report)).text)
    assert text.index("Saturated (kv-pool)") < text.index("Time to first token")
    plain = dataclasses.replace(report, saturated=False)
    assert "Saturated" not in "".join(checked(page(result_of(plain), plain)).text)


@pytest.mark.parametrize("outputs", [1, 5])
def test_one_request(outputs: int) -> None:
    """With one output token there is no TPOT and no gap: a dash, not a NaN."""
    report = run(Workload([Request(0, 100, outputs)]))
    html = page(result_of(report), report)
    checked(html)
    assert ("–" in html) == (outputs == 1)
    assert not re.search(r"\bnan\b", html)


def test_an_empty_report() -> None:
    full = run(Workload([Request(0, 100, 5)]))
    nothing = dataclasses.replace(full.ttft, mean=math.nan, p50=math.nan, p90=math.nan, p99=math.nan)
    empty = dataclasses.replace(
        full, ttft=nothing, tpot=nothing, itl=nothing, e2e=nothing, queue=nothing, requests=[], timeline=[],
        seconds_by_op={}, seconds_by_bound={}, steps={}, output_tokens_per_s=math.nan, bottleneck="",
    )  # fmt: skip
    result = result_of(empty) | {"ledger": None}
    html = page(result, empty)
    checked(html)
    assert "nothing was measured" in html and not re.search(r"\bnan\b", html)


def test_many_requests_stay_a_small_page() -> None:
    report = run(closed_loop(16, 3000, Uniform(50), Uniform(8)), replicas=2)
    assert len(page(result_of(report), report)) < 500_000


def test_writing_replaces_the_file_or_leaves_it(tmp_path: Path) -> None:
    report = run(Workload([Request(0, 100, 5)]))
    out = tmp_path / "page.html"
    out.write_text("before")
    write_page(out, result_of(report), report)
    assert out.read_text().startswith("<!doctype html>") and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(UsageError, match="cannot be written") as caught:
        write_page(tmp_path / "absent" / "page.html", result_of(report), report)
    assert "\n" not in str(caught.value)
    out.write_text("before")
    broken = {key: value for key, value in result_of(report).items() if key != "formats"}
    with pytest.raises(KeyError):
        write_page(out, broken, report)
    assert out.read_text() == "before"


def test_the_json_on_the_page_is_the_result() -> None:
    report = run(Workload([Request(0, 100, 5)]))
    result = result_of(report)
    text = "".join(checked(page(result, report)).text)
    assert json.loads(text[text.index('{\n  "model"') : text.rindex("}") + 1]) == json.loads(json.dumps(result))


def test_ticks_are_round_and_cover() -> None:
    assert svg.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(0, 0.034) == [0, 0.01, 0.02, 0.03, 0.04]
    assert svg.ticks(0, 1, 4) == [0, 0.5, 1.0]
    assert svg.ticks(5, 5) == [5] and svg.ticks(0, math.nan) == [0]
    for high in (1e-6, 3.3, 7e9):
        found = svg.ticks(0, high)
        assert found[0] == 0 and found[-1] >= high * 0.999 and len(found) <= 8


def test_points_without_a_value_are_left_out() -> None:
    drawn = svg.plot([svg.Series("a", [(0.0, math.nan), (1.0, 2.0), (math.inf, 1.0)])], "x", "y")
    assert "nan" not in drawn and "inf" not in drawn and drawn.count("<polyline") == 1
    assert "nothing was measured" in svg.plot([svg.Series("a", [])], "x", "y")


def test_every_text_of_a_run_is_shown_as_text() -> None:
    report = run(closed_loop(4, 40, Uniform(500), Uniform(50)))
    report = dataclasses.replace(report, saturated=True, saturated_by="x", assumed=("y", "z"))
    result = result_of(report) | {"missed": ["m"], "notes": ["n"], "load": LOAD_OF}
    names = ("weights_bytes", "seconds_by_op", "seconds_by_bound", "steps")
    whole = page(hostile(result, (), names), hostile(report, (), names))
    apart = {"pools": {"a": 1, "b": 2}, "ledgers": {"a": result["ledger"], "b": result["ledger"]}}
    pools = page(hostile(result | apart, (), (*names, "pools", "ledgers")), hostile(report, (), names))
    assert shown(whole) > 30 and shown(pools) > 30


LOAD_OF = {"name": "a load", "prompt_tokens": [1, 2], "output_tokens": [1, 1]}
