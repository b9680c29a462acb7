"""The cache's tiers: bytes that add up under every layout, and a break-even that means what it says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hw_profiles
from foundation.errors import CapacityError, UsageError
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.engines import engine_for as make_engine
from runtime.deployment.errors import LaunchError
from runtime.deployment.kv import Offload, PoolKv, Tier
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool
from runtime.execution.cluster.session import runnable
from runtime.planning import assign
from runtime.planning.check import check
from runtime.planning.kv_tiers import (
    break_even,
    check_kv,
    device_bytes_per_token,
    plan_kv,
    pool_kv,
    prefill_seconds,
    resident_requests,
)
from runtime.planning.launch import launch
from runtime.planning.predict import predicted, simulate_plan
from runtime.simulation.build import PriceTables, pricer_of, spec_for
from runtime.simulation.planned import spec_of
from tests.plans import formats, plan_for, pool_of
from tests.serving.pricers import LinearPricer

H200 = "h200-sxm"


def pool(
    model: str = "glm-5-fp8", layout: Layout = Layout(8), kv: str = "fp8", profile: str = H200, **more: Any
) -> Pool:
    scheme = more.pop("scheme", "fp8")
    return pool_of(load_config(model), layout, hw_profiles.load(profile), formats(scheme, kv), **more)


def kv_of(given_: Pool, model: str = "glm-5-fp8", demand: Demand = Demand(), **more: Any) -> PoolKv:
    return pool_kv(load_config(model), given_, hw_profiles.load(given_.profile), demand, **more)


def linear(per_token: float, fixed: float = 0.0) -> LinearPricer:
    """A step takes `fixed + per_token x new tokens`, whatever came before."""
    return LinearPricer(fixed=fixed, per_decode=0.0, per_prompt=per_token, per_context=0.0)


# --- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kv", "latent", "index"),
    [
        # 656 bytes a latent and 132 an index key (vLLM fp8_ds_mla), 78 layers, 78 or 21 indexers
        ("glm-5-fp8", "fp8", 78 * 656, 78 * 132),
        ("glm-5.3-fp8", "fp8", 78 * 656, 21 * 132),  # 53,940 together: vllm-project/recipes PR 893
        ("deepseek-v3.2", "fp8", 61 * 656, 61 * 132),  # 48,068 together, logged: sglang PR 11309
        ("glm-5-fp8", "bf16", 78 * 1152, 78 * 132),
    ],
)
def test_a_copy_takes_the_bytes_that_engines_log(model: str, kv: str, latent: int, index: int) -> None:
    shares = {share.cache: share for share in kv_of(pool(model, kv=kv), model).shares}
    assert {name: share.bytes_per_token for name, share in shares.items()} == {"latent": latent, "index": index}
    assert {share.copies for share in shares.values()} == {8}


LAYOUTS = st.builds(
    lambda tp, dp, pp, ep: Layout(tp, dp, tp * dp if ep else 1, pp),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 4]), st.booleans(),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(LAYOUTS, st.sampled_from(["glm-5-fp8", "glm-5.2-fp8", "glm-4.6", "deepseek-v3"]), st.integers(0, 2),
       st.sampled_from(["serve", "prefill", "decode"]))  # fmt: skip
def test_who_holds_what_adds_up(layout: Layout, model: str, drafts: int, role: Any) -> None:
    scheme = "bf16" if model == "glm-4.6" else "fp8"
    try:
        given_ = pool(model, layout, "bf16", "b300-sxm", scheme=scheme, drafts=drafts, role=role)
    except (CapacityError, UsageError):
        return
    found = kv_of(given_, model)
    devices = given_.devices[: layout.devices]
    one_token = sum(share.bytes_per_token * share.copies for share in found.shares)
    everywhere = sum(device.ledger.kv_bytes for device in devices)
    device, host = found.tiers
    # the copies of a token, times the distinct tokens of a replica, are all of its KV bytes
    assert one_token * device.replica_tokens == pytest.approx(everywhere)
    assert device.replica_tokens == device.tokens * layout.dp == device.pages * given_.page_tokens * layout.dp
    assert device.bytes_per_device == pytest.approx(max(each.ledger.kv_bytes for each in devices))
    assert (
        host.bytes_per_device == pytest.approx(2 * device.bytes_per_device, rel=1e-3) and host.pages == 2 * device.pages
    )
    for each in found.sharding:
        # dealing pages out moves no bytes: fewer copies of more tokens
        assert each.degree * each.copies == found.sharding[0].copies
        assert each.replica_tokens == each.degree * device.replica_tokens == each.rank_tokens * layout.dp
        assert each.resident_requests >= found.sharding[0].resident_requests
    split = model == "glm-4.6"
    assert [each.degree for each in found.sharding] == [1] if split else found.sharding[-1].degree == layout.tp


def test_resident_requests_are_whole_pages_within_the_limit() -> None:
    given_ = pool(layout=Layout(1, 8, 8), profile="b300-sxm")
    small = dataclasses.replace(
        given_, devices=tuple(dataclasses.replace(device, kv_pages=100) for device in given_.devices)
    )
    assert resident_requests(small, 640, 1000) == 8 * 10  # ten pages each
    assert resident_requests(small, 641, 1000) == 8 * 9  # an eleventh page
    assert resident_requests(small, 641, 3) == 8 * 3
    assert resident_requests(small, 6401, 1000) == 0
    assert resident_requests(small, 6401, 1000, degree=2) == 8


def test_a_request_takes_its_longest_lengths() -> None:
    demand = Demand(isl=1000, osl=200)
    assert kv_of(pool(drafts=3), demand=demand).request_tokens == 1203
    assert kv_of(pool(role="prefill"), demand=demand).request_tokens == 1001
    assert kv_of(pool(role="decode"), demand=demand).request_tokens == 1200


def test_without_a_host_link_there_is_one_tier() -> None:
    bare = pool(profile="ascend-910c-die", layout=Layout(16, 2, 32), scheme="w8a8", kv="int8")
    found = kv_of(bare)
    assert [tier.name for tier in found.tiers] == ["device"] and found.curve == () and found.break_even_tokens is None
    profile = hw_profiles.load(
        "ascend-910c-die", {"link.host.bandwidth_bytes_per_s": 32e9, "link.host.latency_s": 1e-4}
    )
    device, host = pool_kv(load_config("glm-5-fp8"), bare, profile, Demand()).tiers
    assert (host.bandwidth_bytes_per_s, host.latency_seconds, host.evidence) == (32e9, 1e-4, "assumed")
    assert device.bandwidth_bytes_per_s == profile.value("chip.memory.bandwidth_bytes_per_s")
    none = pool_kv(load_config("glm-5-fp8"), bare, profile, Demand(), host_ratio=0.0)
    assert len(none.tiers) == 1


# --- break-even ------------------------------------------------------------------------------------------


def quiet_engine(given_: Pool, **settings_: Any) -> Any:
    """The pool's engine without host time, in chunks larger than any prompt unless given."""
    own = {
        "eager_step_host_seconds": 0.0, "piecewise_step_tokens": 0, "chunked_prefill_tokens": 10**9, **settings_
    }  # fmt: skip
    return make_engine(given_.engine, load_config("glm-5-fp8"), hw_profiles.load(H200), given_.layout, own)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-8, 1e-3), st.floats(1e-6, 1.0), st.floats(1e9, 1e12))
def test_break_even_of_a_linear_price_is_where_the_lines_cross(per_token: float, latency: float, rate: float) -> None:
    """latency + b L <= a L from L = latency / (a - b) on; never where the link is slower than the chip."""
    given_ = pool()
    host = Tier("host", 0.0, 1, 64, 64, rate, latency, "assumed")
    points, found = break_even(given_, quiet_engine(given_), linear(per_token), host, 200_000)
    b = device_bytes_per_token(given_) / rate
    crossing = latency / (per_token - b) if per_token > b else math.inf
    longest = points[-1].tokens
    if found is None:
        assert crossing > longest * (1 - 1e-6)
    else:
        assert found - 64 <= crossing * (1 + 1e-6) or found == 64
        assert crossing * (1 - 1e-6) <= found <= longest and found % 64 == 0
        assert found in [point.tokens for point in points]
    assert [p.tokens for p in points] == sorted({p.tokens for p in points})
    for point in points:
        assert point.fetch_seconds == pytest.approx(latency + b * point.tokens)
        assert point.recompute_seconds == pytest.approx(per_token * point.tokens, abs=1e-9)


def test_a_prefix_that_adds_no_step_is_free_to_compute_again() -> None:
    """Steps of a fixed 10 ms in chunks of 1,024: the prefix costs nothing until it needs another step."""
    given_ = pool()
    host = Tier("host", 0.0, 1, 64, 64, 64e9, 1e-5, "datasheet")
    engine = quiet_engine(given_, chunked_prefill_tokens=1024)
    points, found = break_even(given_, engine, linear(0.0, fixed=0.01), host, 100_000)
    assert found == 1024  # with the page behind it, the first prefix that needs a second step
    costs = {point.tokens: point.recompute_seconds for point in points}
    assert costs[960] == 0 and costs[1024] == pytest.approx(0.01)


def test_steps_are_chunks_with_host_time() -> None:
    given_ = pool()
    slow_host = quiet_engine(given_, chunked_prefill_tokens=1000, eager_step_host_seconds=0.5)
    assert slow_host.overlap_scheduling
    assert prefill_seconds(slow_host, linear(1e-3), 2300) == pytest.approx(1.0 + 1.0 + 0.5)
    waiting = dataclasses.replace(slow_host, overlap_scheduling=False)
    assert prefill_seconds(waiting, linear(1e-3), 2300) == pytest.approx(2.3 + 3 * 0.5)


def test_a_pool_that_only_decodes_has_no_break_even() -> None:
    found = kv_of(pool(role="decode"), pricer=linear(1e-5))
    assert found.curve == () and found.break_even_tokens is None and len(found.tiers) == 2


@pytest.fixture(scope="module")
def h200_plan() -> Plan:
    plan = plan_for(load_config("glm-5-fp8"), Layout(8), hw_profiles.load(H200), formats("fp8", "bf16"))
    return dataclasses.replace(plan, kv=plan_kv(plan, load_config("glm-5-fp8"), PriceTables(coarse=True)))


def test_the_curve_is_the_pricers(h200_plan: Plan) -> None:
    """GLM-5-FP8 on 8 H200: each point by the definition, from steps priced apart."""
    cfg, profile = load_config("glm-5-fp8"), hw_profiles.load(H200)
    (kv,), (given_,) = h200_plan.kv, h200_plan.pools
    spec = spec_of(cfg, given_, profile)
    pricer = pricer_of(spec, PriceTables(coarse=True))
    assert 64 < (kv.break_even_tokens or 0) <= 8192 and kv.evidence in ("datasheet", "assumed")
    for point in kv.curve[::4]:
        assert point.fetch_seconds == pytest.approx(1e-5 + point.tokens * 100_152 / 64e9)
        whole = prefill_seconds(spec.engine, pricer, point.tokens + 64)
        behind = prefill_seconds(spec.engine, pricer, 64, point.tokens)
        assert point.recompute_seconds == pytest.approx(max(0.0, whole - behind))
    assert kv.curve[-1].tokens <= cfg.max_positions and kv.curve[-1].recompute_seconds > 5.0


# --- in the plan -----------------------------------------------------------------------------------------


def test_the_plan_file_keeps_it(h200_plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    h200_plan.write(path)
    assert Plan.read(path).kv == h200_plan.kv
    assert check_kv(h200_plan, load_config("glm-5-fp8")) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda kv: dataclasses.replace(kv, page_tokens=32), "kv[0].page_tokens: 32, recomputed 64"),
        (lambda kv: dataclasses.replace(kv, shares=kv.shares[:1]), "kv[0].shares: "),
        (lambda kv: dataclasses.replace(kv, tiers=kv.tiers[:1]), "kv[0].tiers: "),
        (lambda kv: dataclasses.replace(kv, request_tokens=1), "kv[0].request_tokens: 1, recomputed 9216"),
        (lambda kv: dataclasses.replace(kv, break_even_tokens=63), "kv[0].break_even_tokens: 63 is not on its curve"),
        (lambda kv: dataclasses.replace(kv, role="decode"), "kv: 1 entries for 1 pools"),
    ],
)
def test_a_wrong_entry_is_named(h200_plan: Plan, change: Any, found: str) -> None:
    wrong = dataclasses.replace(h200_plan, kv=tuple(change(kv) for kv in h200_plan.kv))
    (line,) = check_kv(wrong, load_config("glm-5-fp8"))
    assert line.startswith(found)


# --- asked for ------------------------------------------------------------------------------------------


def test_tiers_that_are_asked_for_are_planned_played_checked_and_launched() -> None:
    """Four GB of host memory and eight of disk a device: whole pages of them in the plan's map, hits by tier in its
    figures, and in SGLang's command line."""
    cfg, chip = load_config("glm-4.7-flash"), hw_profiles.load("h200-sxm")
    demand = Demand(isl=20_000, osl=8, concurrency=4, shared_prefix=0.8, prefix_groups=40)
    small = {"memory_fraction": 0.45}
    made = spec_for(
        cfg, chip, Layout(2), "bf16", "bf16", "sglang", small, offload=Offload(4e9, 8e9, 2e9), replicas=1
    )  # fmt: skip
    plan = assign.plan_for(made, 1, demand)
    plan = dataclasses.replace(plan, kv=plan_kv(plan, cfg))
    device, host, disk = plan.kv[0].tiers
    size = device_bytes_per_token(plan.pools[0])
    assert host.bytes_per_device <= 4e9 < host.bytes_per_device + plan.pools[0].page_tokens * size
    assert disk.bytes_per_device <= 8e9 and disk.bandwidth_bytes_per_s == 2e9 and disk.evidence == "assumed"
    assert host.tokens == host.pages * plan.pools[0].page_tokens and device.name == "device"
    again = Plan.parse(plan.text)
    assert check(again, cfg) == []
    report, share, shares = simulate_plan(again, cfg, requests=60)
    found = predicted(again, report, share, shares).prefix_hits
    assert set(found) == {"device", "host", "disk"} and sum(found.values()) == pytest.approx(report.prefix_hit_rate)
    line = " ".join(str(word) for word in launch(again, cfg, model="m").commands[0].words)
    assert "--enable-hierarchical-cache" in line and "--hicache-size 4" in line
    assert "--hicache-storage-backend file" in line
    with pytest.raises(LaunchError, match="vllm has no flag for a cache on disk"):
        launch(again, cfg, model="m", engine="vllm")
    with pytest.raises(UsageError, match="not emulated"):
        runnable(cfg, again)
