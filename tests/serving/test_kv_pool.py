"""The page pool and its prefix cache."""

from __future__ import annotations

import pytest

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
