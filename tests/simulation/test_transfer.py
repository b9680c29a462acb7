"""A cache on its way from a prefill to a decode pool: who sends what to whom, and how long that takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment.ledger import stage_kv_bytes_per_token
from runtime.simulation.build import Spec, spec_for
from runtime.simulation.transfer import routes_between, sequence_kv_bytes_per_token, transfer_of

H200 = hw_profiles.load("h200-sxm")


def spec(layout: Layout, model: str = "glm-5-fp8", kv: str = "bf16", **more: Any) -> Spec:
    cfg = load_config(model)
    return spec_for(cfg, H200, layout, cfg.stored_scheme, kv, **more)


LAYOUTS = st.builds(
    lambda tp, dp, pp: Layout(tp, dp, 1, pp), *(st.sampled_from(range_) for range_ in ((1, 2, 4, 8), (1, 2), (1, 2, 3)))
)


@given(LAYOUTS, LAYOUTS, st.sampled_from(["glm-5-fp8", "glm-4.6", "glm-4.7-flash"]), st.integers(0, 1))
def test_each_device_takes_what_it_is_to_hold(given_: Layout, taken: Layout, model: str, drafts: int) -> None:
    """Against the ledger's bytes of a device, worked out another way. GQA's heads split, MLA's latents do not."""
    cfg = load_config(model)
    if cfg.name == "glm-4.7-flash" and 8 in (given_.tp, taken.tp):  # 20 heads
        return
    first, second = (spec(layout, model, drafts=drafts) for layout in (given_, taken))
    into: defaultdict[int, float] = defaultdict(float)
    for route in routes_between(first, second):
        into[route.target] += route.bytes_per_token
    for stage in range(taken.pp):
        held = stage_kv_bytes_per_token(cfg, taken, first.formats, stage, drafts > 0)
        assert [into[stage * taken.tp + tp] for tp in range(taken.tp)] == pytest.approx([held] * taken.tp)
    copies = sum(into.values()) / sequence_kv_bytes_per_token(first)
    assert copies == pytest.approx(1 if cfg.name == "glm-4.6" else taken.tp)
    if given_.tp == taken.tp and given_.pp == taken.pp:
        assert {(route.source, route.target) for route in routes_between(first, second)} == {
            (rank, rank) for rank in range(taken.tp * taken.pp)
        }


@pytest.mark.parametrize(
    ("before", "after", "ends", "busiest"),
    [
        (Layout(8), Layout(1, 8, 8), [(0, 0)], 1),  # TP8 to DP8 EP8: one copy, from one rank
        (Layout(8), Layout(2, 8, 16), [(0, 0), (4, 1)], 1),
        (Layout(2), Layout(4), [(0, 0), (0, 1), (1, 2), (1, 3)], 2),  # a rank feeds two
        (Layout(4, pp=2), Layout(1), [(0, 0), (4, 0)], 1),  # both stages into one port
        (Layout(1), Layout(1, pp=2), [(0, 0), (0, 1)], 1),
    ],
)
def test_who_sends_to_whom(before: Layout, after: Layout, ends: list[tuple[int, int]], busiest: int) -> None:
    """Source of the rule: see the module. busiest: copies that pass the busiest port, 100,152 bytes a token each
    (16 bits with 8-bit index keys, vllm-project/recipes PR 893), over H200's 50 GB/s."""
    sides = spec(before, replicas=8), spec(after, replicas=8)  # on servers of their own
    assert [(route.source, route.target) for route in routes_between(*sides)] == ends
    moved = transfer_of(*sides, 1000)
    assert moved.kv_bytes_per_token == 100_152 and moved.conversion_seconds_per_token == 0
    assert moved.seconds - moved.link_latency_seconds == pytest.approx(1000 * busiest * 100_152 / 50e9)
    assert moved.bytes == pytest.approx(1000 * after.tp * 100_152)


def test_heads_come_from_as_many_ranks_as_have_a_part_of_them() -> None:
    """GLM-4.6 has 8 KV heads: rank 1 of 2 takes heads 4 to 7, which ranks 4 to 7 of 8 have."""
    sides = spec(Layout(8), "glm-4.6"), spec(Layout(2), "glm-4.6")
    found = routes_between(*sides)
    assert [(route.source, route.target) for route in found] == [(rank, rank // 4) for rank in range(8)]
    assert len({route.bytes_per_token for route in found}) == 1


def test_another_cache_format_is_rewritten_on_each_device() -> None:
    """61,464 bytes a token of FP8 cache, of whose layers either of two stages has half."""
    wide, narrow = spec(Layout(8)), spec(Layout(4, pp=2), kv="fp8")
    assert sequence_kv_bytes_per_token(narrow) == 61_464
    assert transfer_of(wide, narrow, 1).conversion_seconds_per_token == pytest.approx((100_152 + 61_464) / 2 / 4.8e12)


def test_pools_of_one_domain_send_over_its_links() -> None:
    small = dataclasses.replace(spec(Layout(2)), replicas=1)
    assert transfer_of(small, small, 1).link_bandwidth_bytes_per_s == 450e9
