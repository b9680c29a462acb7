"""The lower bounds, against every placement there is, on cases small enough to list them."""

from itertools import combinations_with_replacement

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from runtime.planning.experts import place_experts, split_unevenly
from runtime.planning.experts.bound import filler_bound, simple_bound
from runtime.planning.experts.counts import folded, replica_counts
from runtime.planning.experts.packing import longest_first
from tests.planner.eplb_reference import power_law_suite


def best_peak(load: np.ndarray, devices: int, width: int, apart: bool = False) -> float:
    """The smallest peak over all placements of one layer; copies of an expert on one device are one way, unless
    they have to be `apart`."""
    experts = len(load)
    best = np.inf
    for spare in combinations_with_replacement(range(experts), devices * width - experts):
        copies = list(range(experts)) + list(spare)
        share = load / np.bincount(copies, minlength=experts)
        items = sorted(((share[e], e) for e in copies), reverse=True)
        best = min(best, _pack_best(items, devices, width, best, apart))
    return best


def _pack_best(items: list[tuple[float, int]], devices: int, width: int, best: float, apart: bool) -> float:
    total, content = [0.0] * devices, [[] for _ in range(devices)]

    def place(i: int, best: float) -> float:
        if i == len(items):
            return min(best, max(total))
        (share, e), tried = items[i], set()
        for d in range(devices):
            key = (total[d], tuple(content[d]) if apart else len(content[d]))
            if len(content[d]) == width or key in tried or total[d] + share >= best or (apart and e in content[d]):
                continue
            tried.add(key)
            total[d] += share
            content[d].append(e)
            best = place(i + 1, best)
            total[d] -= share
            content[d].pop()
        return best

    return place(0, best)


SMALL = st.sampled_from([(3, 4, 1), (4, 2, 2), (3, 2, 2), (4, 3, 2), (5, 3, 2), (6, 2, 3), (5, 2, 3), (7, 4, 2)])


@given(SMALL, st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]))
def test_nothing_beats_the_bound(shape: tuple[int, int, int], seed: int, spread: float) -> None:
    experts, devices, width = shape
    load = np.random.default_rng(seed).lognormal(0, spread, (1, experts))
    peak = best_peak(load[0], devices, width)
    room = np.full(devices, width)
    low = simple_bound(load, room)
    assert low[0] <= peak * (1 + 1e-9)
    assert filler_bound(load, room, low, np.array([3 * peak]))[0] <= peak * (1 + 1e-9)
    placement = place_experts(load, devices, 1, devices * width)
    assert placement.bound[0] * load.sum() / devices <= peak * (1 + 1e-9)
    if width == 1:
        assert abs(placement.device_load.max() - peak) <= 1e-9 * peak


@settings(max_examples=40)
@given(
    st.sampled_from([(4, 2, 3), (4, 3, 2), (5, 2, 4), (6, 2, 4), (6, 4, 2), (6, 3, 3), (8, 4, 2), (7, 3, 3)]),
    st.integers(0, 10**6),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_small_problems_are_solved_as_well_as_can_be(shape: tuple[int, int, int], seed: int, spread: float) -> None:
    experts, devices, width = shape
    load = np.random.default_rng(seed).lognormal(0, spread, (1, experts))
    best = best_peak(load[0], devices, width, apart=True)
    assert place_experts(load, devices, 1, devices * width).device_load.max() <= best * 1.002


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 10**6))
def test_greedy_replicas_have_the_smallest_share(experts: int, spare: int, seed: int) -> None:
    load = np.random.default_rng(seed).lognormal(0, 1, experts)
    least = min(
        (load / np.bincount(list(range(experts)) + list(more), minlength=experts)).max()
        for more in combinations_with_replacement(range(experts), spare)
    )
    counts = replica_counts(load[None], experts + spare, experts + spare)[0]
    assert counts.sum() == experts + spare and np.isclose((load / counts).max(), least)


def test_folding_is_what_greedy_packing_finds() -> None:
    load = power_law_suite(0.8, 5, layers=6, experts=40)
    counts = replica_counts(load, 60, 30)
    np.testing.assert_allclose(longest_first(load, counts, np.full(30, 2)).peak, folded(load, counts))


def test_uneven_split_against_a_linear_program() -> None:
    load = power_law_suite(1.01, 4, layers=4, experts=64)
    placement = place_experts(load, 24, 1, 96)
    found = split_unevenly(placement, load)
    assert (found.max_over_mean <= placement.max_over_mean + 1e-12).all()
    for layer, (row, slots) in enumerate(zip(load, placement.slot_expert, strict=True)):
        sent = np.bincount(slots, found.slot_load[layer], minlength=64)
        np.testing.assert_allclose(sent, row, rtol=1e-9)
        on_expert = (slots == np.arange(64)[:, None]).astype(float)
        on_device = (placement.slot_device == np.arange(24)[:, None]).astype(float)
        answer = linprog(
            np.append(np.zeros(96), 1.0),
            A_ub=np.column_stack([on_device, -np.ones(24)]),
            b_ub=np.zeros(24),
            A_eq=np.column_stack([on_expert, np.zeros(64)]),
            b_eq=row,
        )
        optimum = answer.fun / (row.sum() / 24)
        assert optimum - 1e-9 <= found.max_over_mean[layer] <= optimum * 1.002
