"""The page pool and its prefix cache."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import CapacityError
from runtime.serving import Request
from runtime.serving.kv_pool import KvPool


def held(pool: KvPool, prompt: int, hashes: tuple[int, ...] = ()) -> Request:
    request = Request(0, prompt, 10, hashes)
    request.computed = pool.admit(request)
    pool.publish(request)
    return request


def test_pages_are_whole_and_come_back() -> None:
    pool = KvPool(1000, 64)
    assert (pool.total, pool.tokens) == (15, 960)
    request = held(pool, 65)
    assert (request.pages, pool.used, pool.available) == (2, 2, 13)
    pool.check([request])
    pool.release(request)
    assert pool.available == 15
    with pytest.raises(CapacityError, match="16 KV pages are needed, 15 of 15"):
        pool.take(16)


def test_blocks_are_shared_while_held_and_kept_until_evicted() -> None:
    pool = KvPool(20 * 64, 64, prefix_cache=True, block_tokens=128)
    first = held(pool, 300, (1, 2, 3))  # two whole blocks of 2 pages, and 44 tokens on a page
    second = held(pool, 300, (1, 2, 9))
    assert (second.computed, second.pages, pool.used) == (256, 5, 6)
    pool.check([first, second])
    pool.release(first)
    pool.release(second)
    assert pool.used == 0 and pool.free == 16
    third = held(pool, 300, (1, 2, 3))
    assert third.computed == 256
    pool.release(third)
    big = held(pool, 18 * 64)  # needs the leaf block's pages: the older end of the chain goes last
    pool.check([big])
    assert pool.cached_tokens(Request(0, 300, 1, (1, 2, 3))) == 128


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    pool = KvPool(1280, 64, prefix_cache=True, block_tokens=128)
    pool.release(held(pool, 256, (1, 2)))
    assert held(pool, 256, (1, 2)).computed == 255


def test_a_block_published_twice_is_held_once() -> None:
    pool = KvPool(1280, 64, prefix_cache=True, block_tokens=128)
    one, two = Request(0, 128, 1, (7,)), Request(1, 128, 1, (7,))
    for request in (one, two):
        pool.admit(request)
    for request in (one, two):
        pool.publish(request)
    assert (one.shared, two.shared) == (1, 0)
    pool.check([one, two])
    pool.release(one)
    pool.release(two)
    pool.check([])


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(CapacityError, match="holds no page of 64"):
        KvPool(63, 64)
    with pytest.raises(CapacityError, match="not whole pages of 100"):
        KvPool(1000, 100, prefix_cache=True)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90), st.integers(0, 2), st.booleans()), max_size=60))
def test_numbered_pages_are_where_the_counts_say(actions: list[tuple[int, int, int, bool]]) -> None:
    """Random requests of three families of prompts come, are preempted and come back or do not; what they find cached,
    in shared blocks or in what they left, is theirs."""
    pool = KvPool(20 * 8, 8, prefix_cache=True, block_tokens=8, keeps_left=True, numbered=True)
    numbers = pool.numbers
    assert numbers is not None
    held: dict[int, Request] = {}
    out: dict[int, Request] = {}
    contents: dict[int, tuple[int, int]] = {}  # of pages of whole blocks: family and place
    for owner, tokens, family, back in actions:
        request = held.pop(owner, None)
        if request is not None:
            pool.release(request, tokens)  # preempted, having computed some
            out[owner] = request
            pool.check(held.values())
            continue
        request = out.pop(owner, None)
        if request is not None and not back:
            pool.forget(request)
        if request is None or not back:
            request = Request(owner, tokens, 5, tuple(1000 * family + place for place in range(tokens // 8)))
        if pool.missing_pages(request) > pool.available:
            out[owner] = request
            continue
        expected = pool.cached_tokens(request)
        cached = pool.admit(request)
        table = numbers.table(request)
        assert cached == expected >= min(request.shared * 8, request.prompt_tokens - 1)
        family = request.prefix_hashes[0] // 1000 if request.prefix_hashes else -1
        for place in range(cached // 8):
            assert contents[table[place]] == (family, place)
        others = {page for other in held.values() for page in numbers.table(other)}
        assert not others & set(table[request.shared :]) and 0 not in table
        for place in range(request.shared, request.prompt_tokens // 8):
            contents[table[place]] = (family, place)
        pool.publish(request)
        held[owner] = request
        pool.check(held.values())


def test_what_was_left_behind_other_blocks_is_given_up_when_its_request_comes_back() -> None:
    pool = KvPool(6 * 8, 8, prefix_cache=True, block_tokens=8, keeps_left=True, numbered=True)
    request, other = Request(0, 30, 5, (1, 2)), Request(1, 8, 5, (1,))
    pool.admit(request)
    pool.release(request, 30)  # preempted behind no block
    pool.admit(other)
    pool.publish(other)  # somebody publishes its first
    pool.release(other)
    assert pool.admit(request) == 8
    pool.check([request])
    pool.release(request, 30)
    pool.check([])
    assert pool.available == pool.total
    pool.admit(big := Request(2, 6 * 8, 1))  # every page can be had
    pool.check([big])
