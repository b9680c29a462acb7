"""Against EPLB and the plain greedy rule: never worse, better where there is room, and the bound is a bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.planning.experts import place_experts
from tests.planner.eplb_reference import eplb, longest_first, max_over_mean, power_law_suite, twice

slow = pytest.mark.slow

# EPLB with one group, seed 7, 75 layers: alpha, devices, nodes, slots, mean and worst max over mean.
PUBLISHED = [
    (0.5, 8, 1, 256, 1.0183, 1.0650),
    (0.5, 32, 4, 288, 1.0060, 1.0090),
    (0.5, 64, 8, 320, 1.0163, 1.0258),
    (0.5, 144, 18, 288, 1.1795, 1.2824),
    (0.5, 320, 40, 320, 1.6372, 1.7273),
    (1.01, 8, 1, 256, 1.5274, 2.3767),
    (1.01, 32, 4, 288, 1.0066, 1.0195),
    (1.01, 64, 8, 320, 1.0233, 1.0638),
    (1.01, 144, 18, 288, 2.0535, 2.3361),
    (1.01, 320, 40, 320, 2.6310, 2.8766),
    (1.2, 8, 1, 256, 2.1673, 3.2691),
    (1.2, 32, 4, 288, 1.0273, 1.1614),
    (1.2, 64, 8, 320, 1.1039, 1.1978),
    (1.2, 144, 18, 288, 2.4764, 2.7708),
    (1.2, 320, 40, 320, 3.1035, 3.3120),
]


@pytest.mark.parametrize(
    ("alpha", "devices", "nodes", "slots", "mean", "worst"),
    [pytest.param(*row, marks=() if row[:2] in ((0.5, 8), (1.01, 32), (1.2, 64)) else slow) for row in PUBLISHED],
)
def test_seed_seven(alpha: float, devices: int, nodes: int, slots: int, mean: float, worst: float) -> None:
    load = power_law_suite(alpha, 7)
    theirs = max_over_mean(eplb(load, slots, 1, nodes, devices), load, devices)
    assert (theirs.mean(), theirs.max()) == pytest.approx((mean, worst), abs=6e-5)
    _compare(load, devices, nodes, slots, theirs)


OTHERS = [
    (4, 1, 256),
    (8, 1, 264),
    (16, 2, 256),
    (16, 2, 272),
    (72, 9, 288),
    (96, 12, 288),
    (96, 4, 384),
    (192, 24, 384),
]


@pytest.mark.parametrize(
    ("alpha", "seed", "devices", "nodes", "slots"),
    [
        pytest.param(*load, *shape, marks=() if i % 5 == j and shape[0] < 96 else slow)
        for i, shape in enumerate(OTHERS)
        for j, load in enumerate([(0.5, 0), (0.8, 1), (1.01, 2), (1.2, 3), (1.5, 4)])
    ],
)
def test_other_seeds_and_shapes(alpha: float, seed: int, devices: int, nodes: int, slots: int) -> None:
    load = power_law_suite(alpha, seed, layers=10)
    _compare(load, devices, nodes, slots, max_over_mean(eplb(load, slots, 1, nodes, devices), load, devices))


def _compare(load: np.ndarray, devices: int, nodes: int, slots: int, theirs: np.ndarray) -> None:
    placement = place_experts(load, devices, nodes, slots)
    ours = max_over_mean(placement.slot_expert, load, devices)
    np.testing.assert_allclose(ours, placement.max_over_mean)
    assert (ours <= theirs + 1e-9).all()
    assert not twice(placement.slot_expert, devices).any()
    assert ours.mean() <= theirs.mean() + 1e-9
    assert (placement.bound <= ours + 1e-9).all() and (placement.bound <= theirs + 1e-9).all()
    if np.mean(theirs / placement.bound - 1) > 0.02:
        assert ours.mean() < theirs.mean() - 1e-4


FOUR = [[28, 15, 22, 28]]
SIXTEEN = [[118, 509, 4, 14, 30, 48, 900, 1, 6, 3, 2, 3, 1, 3, 2, 1]]
ONE_HEAVY = [[1776, 690, 141, 78, 56, 39, 29, 28, 19, 17, 17, 16, 10, 9, 9, 8, 6, 5, 5, 4, 4, 4, 4, 3, 3, 3] + [2] * 16]
ONE_HEAVY = [ONE_HEAVY[0] + [1] * (64 - len(ONE_HEAVY[0]))]


@pytest.mark.parametrize(
    ("load", "devices", "slots", "at_most"),
    [
        (FOUR, 2, 6, 1.0),  # 0, 1, 2 | 3, 1, 2
        ([[9, 5, 7, 9, 3, 3]], 2, 8, 1.0),  # 0, 1, 2, 4 | 3, 1, 2, 5
        ([[10, 10, 10, 4, 5, 6]], 3, 9, 1.0),  # 0, 1, 2 apart, the others everywhere
        (SIXTEEN, 8, 24, 1.0716),  # 900 / 5 + 118 / 3 + 1; greedy rules reach 1.31
        (ONE_HEAVY, 8, 72, 1.005),  # 1776 in five pieces, not in seven
    ],
)
def test_spare_slots_are_not_all_for_the_heavy(load: list, devices: int, slots: int, at_most: float) -> None:
    placement = place_experts(load, devices, 1, slots)
    assert placement.max_over_mean[0] <= at_most + 1e-9
    assert not twice(placement.slot_expert, devices).any()


@st.composite
def shapes(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, int]:
    """A load with few or many heavy experts, and devices, nodes, groups and slots that it fits."""
    nodes = draw(st.sampled_from([1, 1, 2, 4]))
    devices = nodes * draw(st.sampled_from([1, 2, 4]))
    groups = nodes * draw(st.sampled_from([1, 2])) if draw(st.booleans()) else 1
    experts = groups * nodes * draw(st.sampled_from([2, 4, 8, 12]))
    width = -(-experts // devices) + draw(st.integers(0, 3))
    if width > experts // (nodes if groups > 1 else 1):
        width = -(-experts // devices)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    load = draw(st.sampled_from([rng.lognormal(0, 2, (2, experts)), np.ceil(9 * rng.pareto(0.8, (2, experts))) + 1]))
    return load, devices, nodes, groups, devices * width


@settings(max_examples=25)
@given(shapes())
def test_never_worse_than_the_greedy_rules(shape: tuple[np.ndarray, int, int, int, int]) -> None:
    load, devices, nodes, groups, slots = shape
    placement = place_experts(load, devices, nodes, slots, groups=groups)
    ours = max_over_mean(placement.slot_expert, load, devices)
    assert not twice(placement.slot_expert, devices).any()
    assert (placement.bound <= ours + 1e-9).all()
    rivals = [eplb(load, slots, groups, nodes, devices)]
    rivals += [longest_first(load, slots, devices)] if groups == 1 else []
    for rival in rivals:
        # one that puts an expert twice on a device shifts the even split, which no other may do
        fair = ~twice(rival, devices)
        assert (ours <= max_over_mean(rival, load, devices) + 1e-9)[fair].all()
