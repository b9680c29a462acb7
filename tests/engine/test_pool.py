"""No page is held twice, none leaks, and page 0 is never given out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import CapacityError
from runtime.execution.local.pool import PagePool


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 90)), max_size=60))
def test_pages_are_conserved(actions: list[tuple[int, int]]) -> None:
    """Random growth and release (0 tokens releases) of five owners."""
    pool = PagePool(20, 8)
    held: dict[int, list[int]] = {i: [] for i in range(5)}
    for owner, tokens in actions:
        before = list(held[owner])
        if tokens == 0:
            pool.release(held[owner])
            assert held[owner] == []
        elif pool.grow(held[owner], tokens):
            assert len(held[owner]) * 8 >= tokens
        else:
            assert held[owner] == before and pool.pages_for(tokens) - len(before) > pool.free_pages
        pages = [page for pages in held.values() for page in pages]
        assert len(set(pages)) == len(pages) == 20 - pool.free_pages
        assert 0 not in pages


def test_releasing_twice_is_caught() -> None:
    pool, held = PagePool(4, 8), []
    pool.grow(held, 16)
    copy = list(held)
    pool.release(held)
    with pytest.raises(CapacityError):
        pool.release(copy)
