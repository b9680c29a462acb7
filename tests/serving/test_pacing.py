"""Groups begin and are trained on under any order of finishing: none twice, none lost, none staler than allowed."""

from __future__ import annotations

from collections.abc import Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serving.pacing import Pacer, RolloutAdmission

PICKS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


def played(pacer: Pacer, picks: list[int], lost: Set[int] = frozenset()) -> tuple[list[int], list[int], int]:
    """Groups trained on and how stale each was, where which group finishes next is drawn; the most under way."""
    trained: list[int] = []
    staleness: list[int] = []
    waiting: list[int] = []
    most = turn = 0
    while not pacer.done:
        waiting += pacer.begin()
        most = max(most, pacer.under_way)
        if (taken := pacer.take()) is not None:
            trained += taken.groups
            staleness += [pacer.version - 1 - version for version in taken.versions]
            continue
        assert waiting, "a step waits for groups, and none is under way"
        if turn in lost:
            assert sorted(pacer.again()) == sorted(waiting)
        pacer.finish(waiting.pop(picks[turn % len(picks)] % len(waiting)))
        turn += 1
    return trained, staleness, most


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), PICKS, st.sets(st.integers(0, 20), max_size=3))
def test_paced_trains_on_every_group_once_and_none_too_stale(
    batch: int, steps: int, staleness: int, picks: list[int], lost: set[int]
) -> None:
    pacer = Pacer(batch, batch * steps, staleness)
    trained, behind, most = played(pacer, picks, lost)
    assert sorted(trained) == list(range(batch * steps))
    assert max(behind) <= staleness
    assert most <= batch * (1 + staleness)
    assert pacer.thrown_away == 0


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), PICKS)
def test_discarding_is_never_too_stale_either_and_counts_what_it_throws_away(
    batch: int, steps: int, staleness: int, picks: list[int]
) -> None:
    pacer = Pacer(batch, batch * steps, staleness, "discard")
    trained, behind, _ = played(pacer, picks)
    assert len(trained) == len(set(trained)) == batch * steps
    assert max(behind) <= staleness
    assert pacer.thrown_away >= 0


def test_no_staleness_is_in_step() -> None:
    pacer = Pacer(2, 6)
    assert list(pacer.begin()) == [0, 1]
    pacer.finish(1)
    assert not pacer.begin() and pacer.take() is None
    pacer.finish(0)
    taken = pacer.take()
    assert taken and (taken.groups, taken.versions) == ((1, 0), (0, 0))
    assert list(pacer.begin()) == [2, 3]


def test_a_slow_group_is_waited_for_before_it_is_too_stale() -> None:
    pacer = Pacer(1, 4, staleness=1)
    assert list(pacer.begin()) == [0, 1]
    pacer.finish(1)
    assert pacer.take() is not None and list(pacer.begin()) == [2]
    pacer.finish(2)
    assert pacer.take() is None, "group 0 began with version 0 and would be two behind"
    pacer.finish(0)
    taken = pacer.take()
    assert taken and taken.groups == (0,)


def test_discarding_throws_the_slow_one_away() -> None:
    pacer = Pacer(1, 3, staleness=1, admission="discard")
    waiting = list(pacer.begin())
    assert len(waiting) == 2
    for _ in range(2):
        pacer.finish(waiting.pop())
        assert pacer.take() is not None
        waiting += pacer.begin()
    pacer.finish(0)
    assert pacer.take() is None and pacer.thrown_away == 1


@pytest.mark.parametrize("admission", ["paced", "discard"])
def test_what_is_not_under_way_cannot_finish(admission: RolloutAdmission) -> None:
    pacer = Pacer(1, 2, admission=admission)
    pacer.begin()
    pacer.finish(0)
    with pytest.raises(KeyError):
        pacer.finish(0)


@pytest.mark.parametrize("given", [(0, 2, 0), (2, 3, 0), (1, 1, -1)])
def test_what_cannot_be_meant(given: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        Pacer(*given)
