"""Against EPLB, on the power-law suite: never worse, better where there is room, and the bound is a bound."""

import numpy as np
import pytest

from runtime.planning.experts import place_experts
from tests.planner.eplb_reference import eplb, max_over_mean, power_law_suite

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


@pytest.mark.parametrize(("alpha", "devices", "nodes", "slots", "mean", "worst"), PUBLISHED)
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


@pytest.mark.parametrize(("devices", "nodes", "slots"), OTHERS)
@pytest.mark.parametrize(("alpha", "seed"), [(0.5, 0), (0.8, 1), (1.01, 2), (1.2, 3), (1.5, 4)])
def test_other_seeds_and_shapes(alpha: float, seed: int, devices: int, nodes: int, slots: int) -> None:
    load = power_law_suite(alpha, seed, layers=10)
    _compare(load, devices, nodes, slots, max_over_mean(eplb(load, slots, 1, nodes, devices), load, devices))


def _compare(load: np.ndarray, devices: int, nodes: int, slots: int, theirs: np.ndarray) -> None:
    placement = place_experts(load, devices, nodes, slots)
    ours = max_over_mean(placement.slot_expert, load, devices)
    np.testing.assert_allclose(ours, placement.max_over_mean)
    assert (ours <= theirs + 1e-4).all()
    assert ours.mean() <= theirs.mean() + 1e-9
    assert (placement.bound <= ours + 1e-9).all() and (placement.bound <= theirs + 1e-9).all()
    if np.mean(theirs / placement.bound - 1) > 0.02:
        assert ours.mean() < theirs.mean() - 1e-4
