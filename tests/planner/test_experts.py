"""Expert placement: what holds for every load, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runtime.deployment.errors import LoadError, PlanError, SlotsError
from runtime.planning.experts import ExpertPlacement, marginal_slots, place_experts
from tests.planner.eplb_reference import eplb, max_over_mean, power_law_suite

# The example in the README of deepseek-ai/EPLB: 16 replicas, 4 groups, 2 nodes, 8 devices.
README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
README_SLOTS = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int, list[int]]:
    """A load [layers, experts], devices, nodes and the slots of each device."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    nodes = draw(st.integers(1, 3))
    devices = nodes * draw(st.integers(1, 4))
    least = -(-experts // devices)
    same = draw(st.booleans())
    width = st.integers(least, min(experts, least + 3))
    room = [draw(width)] * devices if same else [draw(width) for _ in range(devices)]
    values = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.integers(1, 5).map(float))
    return draw(arrays(np.float64, (layers, experts), elements=values)), devices, nodes, room


def check(placement: ExpertPlacement, load: np.ndarray, room: list[int]) -> None:
    """Everything a placement says about itself, recomputed slowly."""
    layers, experts = load.shape
    assert placement.slot_expert.shape == (layers, sum(room))
    assert placement.device_slots.tolist() == room
    for layer in range(layers):
        slots = placement.slot_expert[layer]
        count = np.bincount(slots, minlength=experts)
        assert len(count) == experts and count.min() >= 1
        assert count.tolist() == placement.replicas[layer].tolist()
        held = [slots[placement.slot_device == d] for d in range(len(room))]
        assert [h.tolist() for h in held] == placement.as_lists()[layer]
        carried = [sum(load[layer, e] / count[e] for e in h) for h in held]
        np.testing.assert_allclose(placement.device_load[layer], carried, rtol=1e-9, atol=1e-12)
        assert all(len(set(h.tolist())) == len(h) for h in held), "an expert twice on a device"
    np.testing.assert_allclose(placement.device_load.sum(axis=1), load.sum(axis=1), rtol=1e-9)
    assert (placement.max_over_mean >= 1 - 1e-9).all()
    assert (placement.bound <= placement.max_over_mean * (1 + 1e-9)).all()
    assert (placement.node_max_over_mean <= placement.max_over_mean * (1 + 1e-9)).all()


@settings(max_examples=20)
@given(problems())
def test_every_placement_is_whole(problem: tuple[np.ndarray, int, int, list[int]]) -> None:
    load, devices, nodes, room = problem
    placement = place_experts(load, devices, nodes, device_slots=room)
    check(placement, load, room)
    if len(set(room)) == 1:
        again = place_experts(load.copy(), devices, nodes, sum(room))
        assert (again.slot_expert == placement.slot_expert).all()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2, 4), (2, 4, 8), (4, 4, 4), (3, 6, 6)]), st.integers(1, 3))
def test_groups_stay_on_their_node(seed: int, shape: tuple[int, int, int], size: int) -> None:
    nodes, groups, devices = shape
    experts, per_node = groups * size, groups * size // nodes
    load = np.random.default_rng(seed).lognormal(0, 1, (3, experts))
    width = -(-experts // devices)
    placement = place_experts(load, devices, nodes, width * devices, groups=groups)
    check(placement, load, [width] * devices)
    for row in placement.slot_expert:
        homes = [set((part // size).tolist()) for part in np.split(row, nodes)]
        assert sum(len(home) for home in homes) == groups and set().union(*homes) == set(range(groups))
        assert all(len(home) * size == per_node for home in homes)


def test_readme_example_of_eplb() -> None:
    published = max_over_mean(README_SLOTS, README_LOAD, 8)
    np.testing.assert_allclose(published, max_over_mean(eplb(README_LOAD, 16, 4, 2, 8), README_LOAD, 8))
    for groups in (4, 1):
        placement = place_experts(README_LOAD, 8, 2, 16, groups=groups)
        assert (placement.max_over_mean <= published + 1e-12).all()


def test_one_slot_a_device_is_optimal() -> None:
    placement = place_experts(power_law_suite(1.01, 7), 320, 40, 320)
    assert placement.gap.max() < 1e-12
    assert placement.max_over_mean.mean() == pytest.approx(2.6310, abs=5e-5)


def test_replicas_are_spread_over_nodes() -> None:
    load = power_law_suite(1.01, 7, layers=10)
    placement = place_experts(load, 64, 8, 320)
    node = placement.slot_device // 8
    met = alone = 0
    for row, count in zip(placement.slot_expert, placement.replicas, strict=True):
        for e in np.flatnonzero(count > 1):
            met += min(count[e], 8)
            alone += len(set(node[row == e].tolist()))
    assert alone > 0.9 * met
    assert placement.node_max_over_mean.max() < 1.02


def test_unequal_devices_hold_what_they_can() -> None:
    load = power_law_suite(0.5, 3, layers=5, experts=64)
    room = [6, 6, 6, 6, 12, 12, 12, 12]
    placement = place_experts(load, 8, 2, device_slots=room)
    check(placement, load, room)
    assert placement.max_over_mean.max() < 1.05


def test_more_slots_balance_better() -> None:
    found = marginal_slots(power_law_suite(1.2, 1, layers=8), 32, 4, [256, 288, 320, 384])
    assert [option.slots for option in found] == [256, 288, 320, 384]
    means = [option.mean_max_over_mean for option in found]
    assert means[0] > 1.5 > 1.05 > means[1] and max(means[1:]) < 1.01
    assert all(option.worst_max_over_mean >= option.mean_max_over_mean for option in found)


def test_no_load_is_even() -> None:
    placement = place_experts(np.zeros((2, 8)), 4, 2, 8)
    assert placement.max_over_mean.tolist() == placement.bound.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("load", "shape", "words"),
    [
        (np.ones(8), (4, 1, 8), "shape (8,)"),
        (np.ones((0, 8)), (4, 1, 8), "shape (0, 8)"),
        (np.array([["a"]]), (1, 1, 1), "numbers"),
        (np.full((1, 8), np.nan), (4, 1, 8), "load[0, 0] = nan is not finite"),
        (-np.ones((1, 8)), (4, 1, 8), "negative"),
        (np.ones((1, 8)), (3, 1, 8), "slots 8 % devices 3 = 2"),
        (np.ones((1, 8)), (2, 1, 6), "slots 6 < experts 8"),
        (np.ones((1, 8)), (2, 4, 8), "devices 2 < nodes 4"),
        (np.ones((1, 8)), (4, 3, 8), "devices 4 % nodes 3 = 1"),
        (np.ones((1, 8)), (0, 1, 8), "at least 1"),
        (np.ones((1, 8)), (2, 1, 18), "9 slots on a device > experts 8"),
    ],
)
def test_refusals_print_the_numbers(load: np.ndarray, shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(PlanError) as error:
        place_experts(load, *shape)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, LoadError | SlotsError)


def test_refusals_of_groups_and_device_slots() -> None:
    load = np.ones((1, 12))
    for groups, text in ((5, "experts 12 % groups 5"), (3, "groups 3 % nodes 2")):
        with pytest.raises(SlotsError, match=text):
            place_experts(load, 4, 2, 12, groups=groups)
    with pytest.raises(SlotsError, match="one a device"):
        place_experts(load, 4, 1, device_slots=[12])
    with pytest.raises(SlotsError, match="sum of device_slots"):
        place_experts(load, 2, 1, 14, device_slots=[6, 6])
    with pytest.raises(SlotsError, match="same slots on every node"):
        place_experts(load, 2, 2, groups=2, device_slots=[6, 7])
