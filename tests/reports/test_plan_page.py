"""The page of a plan: whole, self-contained HTML that says what the plan says, for small plans and large."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hw_profiles
from foundation.errors import UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.kv import Point
from runtime.deployment.plan import Alternative, ModelRef, Plan, Predicted, Rejected, Route, Transfer, config_hash
from runtime.deployment.pool import Experts
from runtime.planning.kv_tiers import plan_kv
from runtime.planning.launch import launch
from runtime.pricing.load import ExpertLoad
from runtime.reports.plan import page, write_page
from runtime.reports.plan_devices import ranges
from tests.plans import formats, plan_for, pool_of
from tests.reports.hostile import MARK, hostile, shown
from tests.reports.test_serving_page import checked

CFG = load_config("glm-5-fp8")


def alternative(name: str, device: float, user: float, **more: Any) -> Alternative:
    fields: dict[str, Any] = {
        "name": name, "devices": 32, "concurrency": 64, "simulated": False, "chosen": False, "front": False,
        "output_tokens_per_s_per_device": device, "output_tokens_per_s_per_user": user, "ttft_ms": 800.0,
        "tpot_ms": 1e3 / user, "meets_targets": True, "evidence": "assumed",
    }  # fmt: skip
    return Alternative(**fields | more)


PREDICTED = Predicted(
    concurrency=64, rate=None, requests_per_s=3.5, output_tokens_per_s=3200.0, output_tokens_per_s_per_device=100.0,
    output_tokens_per_s_per_user=41.5, ttft_ms={"mean": 812.0, "p50": 790.0, "p90": 1100.0, "p99": 1500.0},
    tpot_ms={"mean": 24.1, "p50": 24.0, "p90": 25.5, "p99": 27.0},
    e2e_ms={"mean": 25_500.0, "p50": 25_000.0, "p90": 27_000.0, "p99": 29_000.0},
    band={"ttft_ms": (600.0, 1090.0), "tpot_ms": (20.3, 28.6)}, evidence="fitted", extrapolated=0.25,
    kv_peak_fraction=0.42, requests_simulated=640, saturated_by="", bottleneck="memory", meets_targets=True,
)  # fmt: skip


def placement() -> tuple[Experts, ExpertLoad]:
    """Experts over 32 devices, one redundant slot each, and the load of every slot, busiest device first."""
    rows = tuple(
        tuple([(e + n) % 256 for e in range(256)] + [(7 * n + d // 2) % 256 for d in range(32)]) for n in range(75)
    )
    share = [2.0 - device / 31 for device in range(32) for _ in range(9)]
    return Experts(9, rows, 1.3311, 1.91, 1.25), ExpertLoad("measured", np.array(share) / sum(share))


@pytest.fixture(scope="module")
def full() -> Plan:
    """Everything that a plan can have: two pools on two chips, placed experts, a prediction, what was left out."""
    prefill = pool_of(CFG, Layout(8), hw_profiles.load("h200-sxm"), formats("fp8"), role="prefill", engine="vllm")
    experts, loads = placement()
    decode = pool_of(
        CFG, Layout(2, 16, 32), hw_profiles.load("ascend-910c-die"), formats("w8a8", "int8"), role="decode",
        engine="vllm-ascend", experts=experts, redundant_slots=1, expert_load=loads, drafts=2,
        first_device=8, first_node=1,
    )  # fmt: skip
    plan = Plan(
        ModelRef(CFG.name, config_hash(CFG)), Demand(concurrency=64, ttft_ms=1000.0, tpot_ms=30.0), (prefill, decode),
        transfer=Transfer(100_152.0, 50e9, 5e-6, 1e-7, 8192 * 100_152.0, 0.0173, (Route(0, 0, 100_152.0),)),
        predicted=PREDICTED,
        alternatives=(
            alternative("the <chosen> one", 100.0, 41.5, chosen=True, simulated=True, front=True),
            alternative("another, simulated", 90.0, 40.0, simulated=True),
            *(alternative(f"estimate {n}", 130.0 - n, 10.0 + 2 * n, front=n % 2 == 0) for n in range(20)),
        ),
        rejected=tuple(Rejected(f"layout {n}", f"reason & {n}: too large") for n in range(30)),
    )  # fmt: skip
    (kv, other) = plan_kv(plan, CFG)
    curve = tuple(Point(64 * 2**n, 1e-3 * 2**n, 5e-4 + 5e-4 * 2**n) for n in range(10))
    kv = dataclasses.replace(kv, curve=curve, break_even_tokens=64, evidence="fitted")
    return dataclasses.replace(plan, kv=(kv, other))


@pytest.fixture(scope="module")
def html(full: Plan) -> str:
    return page(full, CFG)


def words(html: str) -> str:
    """The page's text, a space between its pieces and none before a stop."""
    return re.sub(r" ([:,.])", r"\1", " ".join(" ".join(checked(html).text).split()))


def test_the_page_is_whole_and_needs_no_network(html: str) -> None:
    checker = checked(html)
    assert checker.links == []
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|<iframe", html)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL))
    assert len(html) < 200_000


def test_the_answer_comes_first(html: str) -> None:
    text = words(html)
    assert "glm-5-fp8 on 8 x h200-sxm + 32 x ascend-910c-die" in text
    order = [
        "Prefill with 1 replica of 8 devices (tp8 dp1 ep1 pp1): attention heads over 8 devices, each expert cut over 8",
        "Decode with 1 replica of 32 devices (tp2 dp16 ep32 pp1): attention heads over 2 devices, requests over 16",
        "Meets what was asked: TTFT up to 1,000 ms and TPOT up to 30 ms",
        "Time to first token",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert re.findall("<h2>(.*?)</h2>", html) == [
        "Predicted", "Memory of the devices", "Which device holds what", "Experts", "KV cache",
        "What else was looked at", "Left out, and why", "Start it",
    ]  # fmt: skip


def test_it_says_what_is_promised_and_how_sure(html: str) -> None:
    text = words(html)
    for expected in (
        "812 ms expected 600 ms to 1,090 ms", "24.1 ms expected 20.3 ms to 28.6 ms", "3,200 tok/s", "100 tok/s",
        "41.5 tok/s", "42% of it in use at the peak", "640 requests", "Evidence: fitted",
        "25% of the steps lie outside", "1,500 ms",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"meets_targets": False}, "Misses what was asked: TTFT up to 1,000 ms and TPOT up to 30 ms"),
        ({"saturated_by": "kv-pool"}, "Saturated: the KV pool is full"),
    ],
)
def test_bad_news_stands_above_the_figures(full: Plan, change: dict[str, Any], expected: str) -> None:
    text = words(page(dataclasses.replace(full, predicted=dataclasses.replace(PREDICTED, **change)), CFG))
    assert text.index(expected) < text.index("Time to first token")


def test_memory_bars_are_to_scale(full: Plan, html: str) -> None:
    """Each bar is a device's capacity long; its parts are the ledger's."""
    bars = re.findall(r'<div class="stack">(.*?)</div>', html)
    ledgers = [pool.devices[0].ledger for pool in full.pools]
    assert len(bars) == 2
    for bar, ledger in zip(bars, ledgers, strict=True):
        parts = {
            unescape(title).partition(":")[0] if "weights" not in title else unescape(title): float(width)
            for width, title in re.findall(r'width:([\d.]+)%" title="([^"]*)"', bar)
        }
        assert sum(parts.values()) == pytest.approx(100, abs=0.02)
        for name, size in (("KV cache", ledger.kv_bytes), ("left free", ledger.free_bytes)):
            assert parts[name] == pytest.approx(100 * size / ledger.capacity_bytes, abs=0.01)
        held = sum(width for name, width in parts.items() if name.startswith("weights"))
        assert held == pytest.approx(100 * ledger.weights_total_bytes / ledger.capacity_bytes, abs=0.02)
    text = words(html)
    for ledger in ledgers:
        assert f"{ledger.usable_bytes / 1e9:.2f} GB usable of {ledger.capacity_bytes / 1e9:.2f} GB" in text
        assert "redundant experts" in text


def test_every_device_has_a_tile_with_its_ranks(full: Plan, html: str) -> None:
    found = re.findall(
        r'class="tile s(\d)" title="device (\d+), node (\d+), replica (\d+), stage (\d+), ([^"]*)"', html
    )
    assert len(found) == len(full.devices) == 40
    for device, (colour, index, node, replica, stage, rest) in zip(full.devices, found, strict=True):
        assert [int(n) for n in (index, node, replica, stage)] == [
            device.index, device.node, device.replica, device.stage
        ]  # fmt: skip
        assert f"tp {device.ranks['tp']}, dp {device.ranks['dp']}, ep {device.ranks['ep']}" in rest
        assert f"{device.kv_pages:,} KV pages" in rest
        assert int(colour) == device.ranks["dp"] % 8
    assert html.count('<div class="node">') == 3


def test_experts_show_heat_bound_and_copies(full: Plan, html: str) -> None:
    text = words(html)
    for expected in ("256 experts in 288 slots a layer, 9 a device", "1.3311", "1.9100", "1.2500", "6.49%"):
        assert expected in text
    heights = [float(h) for h in re.findall(r'<i style="height:([\d.]+)%', html)]
    assert len(heights) == 32 and heights == sorted(heights, reverse=True) and heights[0] == 100
    mean = float(re.findall(r'<s style="bottom:([\d.]+)%', html)[0])
    assert mean == pytest.approx(sum(heights) / 32, abs=0.1)
    experts = full.pools[1].experts
    assert experts
    copied = sum(count > 1 for row in experts.slot_expert for count in Counter(row).values())
    cells = "".join(re.findall(r'class="copies" style="[^"]*" d="([^"]*)"', html))
    assert cells.count("M") == copied > 0
    redundant = full.pools[1].devices[0].ledger.weights_bytes["redundant_experts"]
    assert f"they take {redundant / 1e9:.2f} GB" in text


def test_without_a_load_nothing_is_claimed_of_balance() -> None:
    plan = plan_for(CFG, Layout(8, ep=8), hw_profiles.load("h200-sxm"), formats("fp8"))
    text = words(page(plan, CFG))
    assert "No load of the experts was given" in text and "gap to that" not in text


def test_the_cache_section(full: Plan, html: str) -> None:
    text = words(html)
    prefill, decode = full.kv
    assert f"a replica holds {prefill.sharding[0].resident_requests:,} such requests at once" in text
    assert "8-way context parallel 1" in text and "whole on each of 8 tp ranks" in text
    assert "Fetching a prefix from host memory is no slower than computing it again, from one page on" in text
    assert "No host tier: the profile has no link.host.bandwidth_bytes_per_s" in text and len(decode.tiers) == 1
    assert "A prompt of 8,192 tokens moves 820 MB in 17.3 ms: 100,152 bytes a copy and token at 50 GB/s" in text
    later = dataclasses.replace(prefill, break_even_tokens=4096)
    never = dataclasses.replace(prefill, break_even_tokens=None)
    for kv, expected in ((later, "From a prefix of 4,096 tokens on"), (never, "faster than fetching it, up to 32,768")):
        assert expected in words(page(dataclasses.replace(full, kv=(kv, decode)), CFG))


def test_alternatives_are_drawn_and_listed(full: Plan, html: str) -> None:
    circles = re.findall(r"<circle [^>]*>", html)
    assert len(circles) == len(full.alternatives)
    assert sum('r="7"' in circle for circle in circles) == 1
    text = words(html)
    for row in full.alternatives:
        assert row.name in text
    assert "the <chosen> one (this plan)" in text and "10 more alternatives" in text


def test_every_rejection_has_its_reason(full: Plan, html: str) -> None:
    text = words(html)
    for row in full.rejected:
        assert f"{row.name} {row.reason}" in text
    assert "18 more candidates" in text


def test_the_commands_are_those_of_launch(full: Plan, html: str) -> None:
    made = launch(full, CFG)
    pre = [unescape(body) for body in re.findall(r"<pre>(.*?)</pre>", html, flags=re.DOTALL)]
    assert made.script(0) in pre[0] and made.script(1) in pre[0] and "and 1 more nodes" in pre[0]
    for remark in made.remarks:
        assert remark in words(html)


def test_an_engine_without_commands_is_said() -> None:
    plan = plan_for(CFG, Layout(8), hw_profiles.load("h200-sxm"), formats("fp8"), engine="trtllm")
    text = words(page(plan, CFG))
    assert "trtllm, as planned: no launch commands for trtllm" in text
    assert "vllm serve zai-org/GLM-5-FP8" in text and "sglang.launch_server" in text


@pytest.mark.parametrize(
    ("model", "layout", "profile", "scheme"),
    [
        ("glm-4.5-air", Layout(1), "b200-sxm", "fp8"),
        ("glm-4.7", Layout(4, 2), "h200-sxm", "bf16"),
        ("glm-5.2-fp8", Layout(8, pp=3), "h100-sxm", "fp8"),
        ("deepseek-v3.2", Layout(1, 16, 16), "h20-141gb", "fp8"),
    ],
)
def test_plans_made_on_the_spot(model: str, layout: Layout, profile: str, scheme: str) -> None:
    cfg = load_config(model)
    plan = plan_for(cfg, layout, hw_profiles.load(profile), formats(scheme))
    html = page(plan, cfg)
    text = words(html)
    assert "nothing was searched, priced or simulated" in text and "Predicted" not in text
    assert html.count('class="tile s') == layout.devices
    assert len(re.findall(r'<div class="stack">', html)) == layout.pp
    if layout.pp > 1:
        assert "stage 2, layers 52–77" in text


def test_a_large_plan_is_a_small_page() -> None:
    chip = hw_profiles.load("ascend-910c-die")
    plan = plan_for(CFG, Layout(1, 128, 128), chip, formats("w8a8"), replicas=3, engine="vllm-ascend")
    html = page(plan, CFG)
    assert len(html) < 300_000
    assert "and 256 more devices in the same pattern" in words(html) and html.count('class="tile s') == 128


def test_names_are_escaped() -> None:
    chip = hw_profiles.load("h200-sxm")
    odd = dataclasses.replace(CFG, name="<script>alert(1)</script> & co")
    plan = plan_for(odd, Layout(8), chip, formats("fp8"))
    html = page(plan, odd)
    assert "<script" not in html and "<script>alert(1)</script> & co" in words(html)


def test_every_text_of_a_plan_is_shown_as_text(full: Plan) -> None:
    odd = hostile(full, ("role", "profile", "engine", "objective"), ("weights_bytes", "settings"))
    assert shown(page(odd, CFG)) > 100
    unknown = tuple(dataclasses.replace(pool, profile=MARK) for pool in full.pools)
    assert shown(page(dataclasses.replace(full, pools=unknown), CFG)) > 2  # though it cannot be launched


def test_writing_replaces_the_file_or_leaves_it(full: Plan, tmp_path: Path) -> None:
    out = tmp_path / "plan.html"
    out.write_text("before")
    write_page(out, full, CFG)
    assert out.read_text() == page(full, CFG) and [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(UsageError, match="cannot be written"):
        write_page(tmp_path / "absent" / "plan.html", full, CFG)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8" and ranges([3]) == "3" and ranges([]) == ""
