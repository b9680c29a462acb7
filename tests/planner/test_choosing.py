"""`glm5 choose`: of each chip the fewest whole nodes found, as ranges, what is out and why."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

import hw_profiles
from model.hf_config import load_config
from runtime.cli.choose import show
from runtime.deployment.demand import Demand
from runtime.planning.choosing import ChipChoice, choose, engine_beside, row_of
from runtime.planning.options import Question
from runtime.reports.choose import choices_page
from tests.cli.cli import glm5, refused
from tests.reports.test_choose_page import row

CFG = load_config("glm-4.7-flash")
LOAD = Demand(512, 16, 1.0, 8, None, 2000.0, 60.0, "min-devices", 90)


def chosen(demand: Demand = LOAD, chip: str = "h200-sxm", most: int = 8, **overrides: Any) -> ChipChoice:
    profile = hw_profiles.load(chip, overrides.pop("set", {}))
    (found,) = choose([(Question(CFG, demand, engine_beside(profile), **overrides), profile)], most, processes=1)
    return found


@pytest.fixture(scope="module")
def found() -> ChipChoice:
    return chosen()


@pytest.mark.slow
def test_whole_nodes_that_meet_the_targets(found: ChipChoice) -> None:
    assert found.met and found.plan and found.engine == "sglang"
    assert found.devices % found.node_devices == 0 and found.devices == 8
    assert (found.figures.tpot_ms["p90"] or 99) <= 60 and found.plan.demand.percentile == 90
    assert found.devices_if_slow >= found.devices


@pytest.mark.slow
def test_every_figure_has_its_range(found: ChipChoice) -> None:
    row = row_of(found, 2.0)
    for name in ("ttft_ms", "tpot_ms", "output_tokens_per_s_per_device", "cost_per_million_output_tokens"):
        low, high = row[f"{name}_range"]
        assert low < row[name] < high or name == "output_tokens_per_s_per_device" and low < high
    tokens = found.figures.output_tokens_per_s
    assert row["cost_per_million_output_tokens"] == pytest.approx(2.0 * 8 / 3600 / tokens * 1e6)
    cheap, dear = row["cost_per_million_output_tokens_range"]
    slow, fast = row["output_tokens_per_s_per_device_range"]
    assert (cheap * fast, dear * slow) == pytest.approx((2.0 / 3600 * 1e6,) * 2)
    assert row["power_w"] == 8 * 700 and row["power_evidence"] == "datasheet"  # NVIDIA's data sheet: 700 W each
    assert row["joules_per_output_token"] == pytest.approx(5600 / tokens)
    least, most = row["joules_per_output_token_range"]
    assert (least * fast, most * slow) == pytest.approx((700, 700))
    assert row_of(dataclasses.replace(found, board_power=None), 2.0)["joules_per_output_token"] is None
    assert row["band_basis"].keys() == {"tpot", "ttft", "throughput"} and row["evidence"]
    assert row_of(found, None)["cost_per_million_output_tokens"] is None
    slow_tpot = row["tpot_ms_range"][1]
    assert found.met_if_slow == (slow_tpot <= 60 and row["ttft_ms_range"][1] <= 2000)


@pytest.mark.slow
def test_the_slow_end_is_of_the_band(found: ChipChoice) -> None:
    bands = {name: dataclasses.replace(band, low=-math.log(2.5), high=0.1) for name, band in found.bands.items()}
    assert dataclasses.replace(found, bands=bands).devices_if_slow == 24
    sure = {name: dataclasses.replace(band, low=0.0, high=1e-6) for name, band in found.bands.items()}
    assert dataclasses.replace(found, bands=sure).devices_if_slow == found.devices
    assert dataclasses.replace(found, bands=sure).met_if_slow


@pytest.mark.slow
def test_targets_out_of_reach_give_the_nearest_plan() -> None:
    near = chosen(dataclasses.replace(LOAD, tpot_ms=0.1))
    assert near.plan is not None and not near.met
    row = row_of(near, None)
    assert "p90 TPOT" in row["reason"] and "0.1 asked" in row["reason"] and row["devices"] == 8
    assert row["reason"].endswith("; 8 devices are all that --max-devices allows")
    page = choices_page({"model": "m", "load": "l", "targets": [], "currency": "", "choices": [row]})
    assert "missed: p90 TPOT" in page and "h200-sxm" in page and page.count("<table") == 1


def test_what_does_not_fit_says_so() -> None:
    out = chosen(set={"chip.memory.capacity_bytes": 4e9, "chip.memory.usable_bytes": 4e9}, most=8)
    assert out.plan is None and "does not fit 8 devices" in out.reason
    assert row_of(out, 1.0) == {
        "profile": "h200-sxm", "engine": "sglang", "meets_targets": False, "reason": out.reason,
    }  # fmt: skip


def test_the_engine_beside_a_chip() -> None:
    named = {chip: engine_beside(hw_profiles.load(chip)) for chip in ("h200-sxm", "ascend-910c-die", "mtt-s4000")}
    assert named == {"h200-sxm": "sglang", "ascend-910c-die": "vllm-ascend", "mtt-s4000": "sglang"}


def test_what_was_assumed_of_a_chip_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("own", assumed=["overhead.kernel_launch_s 3.2 us"]), row("h200-sxm")]
    show({"model": "m", "load": "l", "targets": [], "currency": "", "choices": rows})
    said = capsys.readouterr().out
    assert "own, sglang: assumed for you, since nothing says it:\n  overhead.kernel_launch_s 3.2 us\n" in said
    assert "h200-sxm, sglang: assumed" not in said


PRICES = 'currency = "EUR"\n[per_device_hour]\nh200-sxm = 2.5\n'
ASKED = ("choose", "--model", "glm-4.7-flash", "--isl", 512, "--osl", 16, "--concurrency", 8, "--max-devices", 8)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    prices, page = tmp_path / "prices.toml", tmp_path / "page.html"
    prices.write_text(PRICES)
    said = glm5(*ASKED, "--profiles", "h200-sxm", "--tpot-ms", 60, "--prices", prices, "--html", page)
    assert said.code == 0 and "EUR/M out" in said.out and "h200-sxm" in said.out and "bands of h200-sxm" in said.out
    assert "p90 TPOT up to 60 ms" in said.out and "EUR a million output tokens" in page.read_text()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = 1", "no table [per_device_hour]"),
        ("[per_device_hour]\nh200-sxm = -1", "h200-sxm = -1: a price is a number above zero"),
        ("[per_device_hour]\nh200-sxm = nan", "a price is a number above zero"),
        ("rate = 1\n[per_device_hour]\nh200-sxm = 1", "rate: a file of prices holds currency"),
        ("[per_device_hour]\nh200 = 2.5", "h200 is no chip of --profiles nor of `glm5 profiles list`"),
        ("[", "prices.toml:"),
    ],
)
def test_bad_prices(tmp_path: Path, body: str, words: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(body)
    assert words in refused(*ASKED, "--profiles", "h200-sxm", "--prices", path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--profiles", "h200-sxm"), "give --rate or --concurrency"),
        (("--profiles", "h200-sxm", "--rate", 1, "--concurrency", 1), "give one of"),
        (("--profiles", ",", "--rate", 1), "names no chip"),
        (("--profiles", "abacus", "--rate", 1), "no profile named abacus"),
        (("--profiles", "h200-sxm", "--rate", 1, "--engine", "nosuch"), "unknown engine 'nosuch'"),
        (("--profiles", "h200-sxm", "--rate", 1, "--engine", "sglang,vllm@9"), "vllm: release '9' is not described"),
        (("--profiles", "h200-sxm", "--rate", 1, "--engine", ","), "--engine names none"),
        (("--profiles", "h200-sxm", "--rate", 1, "--formats", "w1a1"), "w1a1"),
        (("--profiles", "h200-sxm", "--rate", 1, "--kv", "fp4"), "unknown KV format 'fp4'"),
        (("--profiles", "h200-sxm", "--rate", -1), "--rate -1: give a number above zero"),
        (("--profiles", "h200-sxm", "--rate", 1, "--model", "glm-4.5-air", "--isl", 10**6), "positions"),
    ],
)
def test_refusals(words: tuple[object, ...], said: str) -> None:
    assert said in refused("choose", *words)
