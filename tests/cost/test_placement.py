"""Where ranks sit, and that links go by it: against a brute-force account of every device, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_profiles
from model.split import Layout
from runtime.pricing import Chip, Link, PriceError
from runtime.pricing.network import Network
from runtime.pricing.placement import Hops, Span, place, second_pool

NPU = Chip("npu", {"bf16": 256e12}, 1.2e12, Link(200e9, 1e-6, 8), Link(10e9, 5e-6, 1 << 20), node_devices=8)
NPU_FIELDS = replace(NPU, absent=frozenset({"link.scale_out.collective_latency_s"}))
ALONE = replace(NPU, scale_out=None)


def by_hand(layout: Layout, domain: int, replicas: int) -> dict[str, int]:
    """The most domains that a group of each kind touches, and the most stage hops of a replica that leave a domain."""
    found = {"tp": 0, "dp": 0, "stage": 0, "hops": 0}
    for replica in range(replicas):
        groups: dict[tuple[object, ...], set[int]] = {}
        where: dict[tuple[int, int], int] = {}
        for place_ in layout.places():
            home = (replica * layout.devices + place_.index) // domain
            groups.setdefault(("tp", place_.stage, place_.dp), set()).add(home)
            groups.setdefault(("dp", place_.stage, place_.tp), set()).add(home)
            groups.setdefault(("stage", place_.stage), set()).add(home)
            where[place_.stage, place_.index % layout.stage_devices] = home
        for key, homes in groups.items():
            found[str(key[0])] = max(found[str(key[0])], len(homes))
        ranks = range(layout.stage_devices)
        crossed = sum(
            any(where[stage, rank] != where[stage + 1, rank] for rank in ranks) for stage in range(layout.pp - 1)
        )
        found["hops"] = max(found["hops"], crossed)
    return found


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 4, 6, 8, 16]), st.integers(1, 5))
def test_spans_and_hops_are_those_of_the_devices(tp: int, dp: int, pp: int, domain: int, replicas: int) -> None:
    layout = Layout(tp, dp, 1, pp)
    placed, expected = place(layout, domain, domain, replicas), by_hand(layout, domain, replicas)
    for name in ("tp", "dp", "stage"):
        span: Span = getattr(placed, name)
        assert span.domains == expected[name]
        assert 1 <= span.together <= span.devices and (span.domains > 1 or span.together == span.devices)
    assert (placed.tp.devices, placed.dp.devices, placed.stage.devices) == (tp, dp, tp * dp)
    assert placed.hops.across_domains == expected["hops"]
    assert sum(vars_of(placed.hops)) == pp - 1


def vars_of(hops: Hops) -> tuple[int, int, int]:
    return hops.inside, hops.across_nodes, hops.across_domains


@pytest.mark.parametrize(
    ("layout", "hops"),
    [
        (Layout(4, pp=4), (2, 0, 1)),  # stages of 4 on servers of 8: the second and third sit apart
        (Layout(8, pp=2), (0, 0, 1)),
        (Layout(2, pp=4), (3, 0, 0)),
        (Layout(1, pp=16), (14, 0, 1)),
        (Layout(3, pp=4), (1, 0, 2)),  # 0-2, 3-5 | 6-8 straddles, 9-11
    ],
)
def test_hops_by_hand(layout: Layout, hops: tuple[int, int, int]) -> None:
    assert vars_of(place(layout, 8, 8).hops) == hops


def test_servers_of_a_supernode_count_apart() -> None:
    placed = place(Layout(8, pp=2), 72, 4)
    assert (placed.tp.domains, placed.tp.nodes) == (1, 2)
    assert vars_of(placed.hops) == (0, 1, 0)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_a_group_of_few_that_sit_apart_takes_the_network(op: str) -> None:
    """tp8 dp2: the two ranks of a dp group are on two servers, however small the group."""
    placed = place(Layout(8, 2), 8, 8)
    together, apart = Network(NPU, {}, "sglang"), placed.span(("dp",))
    assert (apart.devices, apart.domains, apart.together) == (2, 2, 1)
    slow = together.collective(op, 1e8, apart).seconds  # type: ignore[arg-type]
    sent = 1e8 * (2.0 if op == "all_reduce" else 1.0) / 2
    assert slow > sent / (10e9 * 0.65) > together.collective(op, 1e8, 2).seconds  # type: ignore[arg-type]
    with pytest.raises(PriceError, match=r"npu has no link.scale_out.bandwidth_bytes_per_s, which an? .* over 2 dev"):
        Network(ALONE, {}, "sglang").collective(op, 1e8, apart)  # type: ignore[arg-type]


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]),
    st.integers(1, 8), st.integers(1, 4), st.floats(1e2, 1e9), st.floats(1.0, 100.0), st.booleans(),
)  # fmt: skip
def test_a_faster_link_is_never_slower(op: str, tp: int, dp: int, size: float, factor: float, out: bool) -> None:
    level = "scale_out" if out else "scale_up"
    link: Link = getattr(NPU, level)
    fast = replace(NPU, **{level: replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)})
    span = place(Layout(tp, dp), 8, 8).stage
    slow_s, fast_s = (Network(chip, {}, "sglang").collective(op, size, span).seconds for chip in (NPU, fast))  # type: ignore[arg-type]
    assert fast_s <= slow_s


@pytest.mark.parametrize(
    ("chip", "nic", "size", "micros"),
    [
        ("a100-sxm-80gb", 12.5e9, 2 * 1024, 44), ("a100-sxm-80gb", 12.5e9, 16 * 1024, 48),
        ("a100-sxm-80gb", 12.5e9, 64 * 1024, 55.5), ("a100-sxm-80gb", 12.5e9, 128 * 1024, 66.6),
        ("a100-sxm-80gb", 12.5e9, 256 * 1024, 83), ("h100-sxm", 50e9, 1e6, 88),
    ],
)  # fmt: skip
def test_all_reduces_between_servers_take_what_nccl_takes(chip: str, nic: float, size: float, micros: float) -> None:
    """2 x 8 A100 with four 200 Gb/s NICs a server (microsoft/mscclpp issue 531), and 2 x 8 H100 over InfiniBand."""
    here = Chip.from_fields(chip, hw_profiles.load(chip, {"link.scale_out.bandwidth_bytes_per_s": nic}).number)
    seconds = Network(here, {}, "sglang").collective("all_reduce", size, 16).seconds
    assert seconds * 1e6 == pytest.approx(micros, rel=0.06)


def test_another_fabric_adds_its_own_latency() -> None:
    chips = [
        Chip.from_fields("h100", hw_profiles.load("h100-sxm", {"link.scale_out.collective_latency_s": s}).number)
        for s in (44e-6, 100e-6)
    ]
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        infiniband, tcpx = (Network(chip, {}, "sglang").collective(op, 1e6, 16).seconds for chip in chips)
        assert tcpx - infiniband == pytest.approx(56e-6 if op == "all_reduce" else 28e-6)
        assert Network(chips[0], {}, "sglang").collective(op, 1e6, 32).seconds > infiniband
    assert (
        "link.scale_out.collective_latency_s 44 us"
        in Network(NPU_FIELDS, {}, "sglang").collective("all_reduce", 1e6, 16).assumed
    )


def test_hops_are_priced_one_by_one() -> None:
    network = Network(NPU, {}, "sglang")
    near, far = network.point_to_point(1e6), network.point_to_point(1e6, across_domains=True)
    assert far.seconds > near.seconds
    assert network.hops(1e6, Hops(2, 0, 1)).seconds == pytest.approx(2 * near.seconds + far.seconds)
    with pytest.raises(PriceError, match=r"a hop between pipeline stages in two scale-up domains needs"):
        Network(ALONE, {}, "sglang").hops(1e6, Hops(2, 0, 1))
    assert Network(ALONE, {}, "sglang").hops(1e6, Hops(2)).seconds == pytest.approx(2 * near.seconds)


@pytest.mark.parametrize(
    ("first", "second", "start"), [(4, 4, 4), (4, 8, 8), (8, 4, 8), (2, 6, 2), (10, 6, 10), (10, 7, 16), (16, 8, 16)]
)
def test_a_second_pool_shares_a_server_only_where_it_fits(first: int, second: int, start: int) -> None:
    assert second_pool(first, second, 8) == start
