"""Moving from a placement in use to a better one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.deployment.errors import PreviousError
from runtime.planning.experts import moves, place_experts, rebalance
from tests.planner.eplb_reference import power_law_suite
from tests.planner.test_experts import check

BEFORE = power_law_suite(1.01, 1, layers=6, experts=64)
DRIFT = BEFORE * np.random.default_rng(5).lognormal(0, 0.5, BEFORE.shape)
OTHER = power_law_suite(1.2, 9, layers=6, experts=64)


@pytest.mark.parametrize("load", [DRIFT, OTHER])
@pytest.mark.parametrize(
    ("devices", "slots", "groups"),
    [(8, 64, 1), (8, 80, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 80, 1), (32, 96, 1)))],
)
def test_more_budget_is_never_worse(load: np.ndarray, devices: int, slots: int, groups: int) -> None:
    previous = place_experts(BEFORE, devices, 2, slots, groups=groups)
    last = np.inf
    for budget in (0, 1, 3, 8, 40, slots):
        placement = rebalance(previous, load, budget)
        check(placement, load, placement.device_slots.tolist())
        assert moves(previous, placement).max() <= budget
        assert (placement.max_over_mean <= last + 1e-12).all()
        last = placement.max_over_mean
        if budget == 0:
            assert (placement.slot_expert == previous.slot_expert).all()
        if groups > 1:
            home = [set((part // 16).tolist()) for part in np.split(placement.slot_expert[0], 2)]
            assert not home[0] & home[1]
    if groups == 1:
        assert (last <= place_experts(load, devices, 2, slots).max_over_mean + 1e-12).all()


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_unequal_devices(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    room = [3, 4, 5, 6]
    previous = place_experts(rng.lognormal(0, 1, (2, 12)), 4, 2, device_slots=room)
    load = rng.lognormal(0, 1, (2, 12))
    placement = rebalance(previous, load, budget)
    check(placement, load, room)
    assert moves(previous, placement).max() <= budget
    assert (placement.max_over_mean <= rebalance(previous, load, 0).max_over_mean + 1e-12).all()


def test_refusals() -> None:
    previous = place_experts(BEFORE, 8, 2, 64)
    with pytest.raises(PreviousError, match="6, 63"):
        rebalance(previous, BEFORE[:, 1:], 3)
    with pytest.raises(PreviousError, match="max_moves = -1"):
        rebalance(previous, BEFORE, -1)
