"""A rank's KV pages: who holds how many, and which prompt blocks are kept for reuse.

Pages are counted; where steps are carried out they are numbered, too (`pages.py`). Each page is in one of three places:

    free       nobody's
    private    held by one request (the pool keeps the sum; `Request.pages` keeps the share)
    blocks     part of a prefix block, held by any number of requests, or by none and evictable
    left       computed by a request that was preempted, and evictable until it comes back

so `free + private + block pages + pages left == total` at all times; `check` proves it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence

from foundation.errors import CapacityError
from runtime.serving.pages import PageNumbers
from runtime.serving.request import Request
from runtime.serving.tiers import LowerTiers


class KvPool:
    """Pages of one rank, with an optional prefix cache evicted in least-recently-used order.

    tokens: capacity; only whole pages count. page_tokens: tokens per page. block_tokens: prompt tokens one
    prefix hash stands for. keeps_left: what a preempted request computed stays until it is evicted, as cached prompts
    do. numbered: say which pages, too. below: where blocks are found that are here no
    more. Raises CapacityError when not even one page fits.
    """

    def __init__(
        self,
        tokens: int,
        page_tokens: int,
        *,
        prefix_cache: bool = False,
        block_tokens: int = 512,
        keeps_left: bool = False,
        numbered: bool = False,
        below: LowerTiers | None = None,
    ):
        self.page_tokens = page_tokens
        self.total = int(tokens) // page_tokens
        if self.total < 1:
            raise CapacityError(f"a KV pool of {tokens} tokens holds no page of {page_tokens}: give it more memory")
        if prefix_cache and block_tokens % page_tokens:
            raise CapacityError(
                f"prefix blocks of {block_tokens} tokens are not whole pages of {page_tokens}: turn prefix_cache off"
            )
        self.prefix_cache = prefix_cache
        self.block_tokens = block_tokens
        self.block_pages = -(-block_tokens // page_tokens)
        self.keeps_left = keeps_left
        self.free = self.total
        self.private = 0
        self._holders: dict[int, int] = {}  # prefix hash -> requests that hold it
        self._idle: OrderedDict[int | Request, int] = OrderedDict()  # blocks nobody holds, and what preempted ones left
        self._idle_pages = 0
        self._behind: dict[Request, int] = {}  # of preempted requests: the blocks that what they left follows on
        self.numbers = PageNumbers(self.total, self.block_pages) if numbered else None
        self.below = below if prefix_cache else None

    @property
    def tokens(self) -> int:
        """Capacity in tokens."""
        return self.total * self.page_tokens

    @property
    def available(self) -> int:
        """Pages that can be taken now: free ones and those of idle blocks."""
        return self.free + self._idle_pages

    @property
    def used(self) -> int:
        """Pages that running requests hold."""
        return self.total - self.available

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return -(-tokens // self.page_tokens)

    def cached_tokens(self, request: Request) -> int:
        """Prompt tokens that the prefix cache holds, here or below, at most all but one (one must be computed)."""
        matched = self._match(request)
        if left := self._left(request, matched):
            return self._reused(request, matched, left)
        return self._reused(request, matched + len(self._found_below(request, matched)))

    def missing_pages(self, request: Request, new_tokens: int | None = None) -> int:
        """Pages to be found, by taking or evicting, to hold what is cached and `new_tokens` behind it; by default the
        whole `request.target`."""
        matched = request.prefix_hashes[: self._match(request)]
        revived = sum(block in self._idle for block in matched) * self.block_pages
        held = None if new_tokens is None else self.cached_tokens(request) + new_tokens
        return self._private_pages(request, len(matched), held) + revived

    def admit(self, request: Request, new_tokens: int | None = None) -> int:
        """Holds pages for what is cached of a request and `new_tokens` behind it, by default for its whole
        `request.target`; the tokens found in the cache, of which `request.fetching` have to come from below.

        Raises CapacityError when the pages are not there (callers ask `missing_pages` first).
        """
        matched = self._match(request)
        left = self._left(request, matched)
        below = [] if left else self._found_below(request, matched)
        cached = self._reused(request, matched + len(below), left)
        if self.below:
            request.fetching = self._by_tier(below, cached - self._reused(request, matched))
        for block in request.prefix_hashes[:matched]:
            self._hold(block)
        request.shared = matched
        private = self._private_pages(request, matched, None if new_tokens is None else cached + new_tokens)
        if self.numbers:
            self.numbers.share(request, request.prefix_hashes[:matched])
        if left:
            self._come_back(request)
        else:
            self.forget(request)  # what it left follows on blocks that it does not find as they were
        self.take(private - left)
        request.pages = matched * self.block_pages + private
        if self.numbers:
            self.numbers.extend(request, request.pages)
        return cached

    def extend(self, request: Request, tokens: int) -> bool:
        """Holds pages for so many tokens of an admitted request; False, and nothing taken, where they are not there."""
        more = self.pages_for(tokens) - request.pages
        if more > self.available:
            return False
        if more > 0:
            self.take(more)
            request.pages += more
            if self.numbers:
                self.numbers.extend(request, request.pages)
        return True

    def publish(self, request: Request, tokens: int | None = None) -> None:
        """Makes the whole blocks of a computed prompt available to later requests; of `tokens` tokens, where the cache
        holds those.

        A block that another request published meanwhile stays private here, and so do the blocks after it.
        """
        if not self.prefix_cache:
            return
        whole = (request.prompt_tokens if tokens is None else tokens) // self.block_tokens
        for block in request.prefix_hashes[request.shared : whole]:
            if block in self._holders or block in self._idle:
                break
            if self.numbers:
                self.numbers.publish(request, request.shared, block)
            self.private -= self.block_pages
            self._holders[block] = 1
            request.shared += 1
        if self.below:
            self.below.put(request.prefix_hashes[:whole])

    def release(self, request: Request, left_tokens: int = 0) -> None:
        """Gives back everything the request holds; its prefix blocks stay cached until evicted, and so do the whole
        pages of its first `left_tokens`, where it will come back for them."""
        private = request.pages - request.shared * self.block_pages
        left = left_tokens // self.page_tokens - request.shared * self.block_pages if self.keeps_left else 0
        left = min(max(left, 0), private)
        self.give(private - left)
        if self.numbers:
            self.numbers.release(request, request.shared, left)
        if left:  # evicted before the blocks that it follows on, and those before the blocks that they follow on
            self.private -= left
            self._behind[request] = request.shared
            self._rest(request, left)
        for block in reversed(request.prefix_hashes[: request.shared]):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._rest(block, self.block_pages)
        request.pages = request.shared = 0

    def take(self, pages: int) -> None:
        """Moves pages to private use, evicting idle blocks as needed."""
        if pages > self.available:
            raise CapacityError(f"{pages} KV pages are needed, {self.available} of {self.total} are available")
        while self.free < pages:
            self._evict(pages - self.free)
        self.free -= pages
        self.private += pages

    def flush(self) -> None:
        """Forgets what is kept for reuse and held by nobody."""
        while self._idle:
            self._evict(self.total)

    def forget(self, request: Request) -> None:
        """A preempted request will not come back for what it left, if it left anything."""
        if request in self._behind:
            self._lose(request, self._idle[request])

    def _evict(self, pages: int) -> None:
        """Frees pages of the oldest at rest: a whole block, or at most so many from the end of what a request left."""
        oldest = next(iter(self._idle))
        if isinstance(oldest, Request):
            self._lose(oldest, min(pages, self._idle[oldest]))
            return
        self._wake(oldest)
        self.free += self.block_pages
        if self.numbers:
            self.numbers.evict(oldest)

    def _lose(self, request: Request, pages: int) -> None:
        """The last pages of what a preempted request left are free."""
        self._idle[request] -= pages
        self._idle_pages -= pages
        self.free += pages
        if self.numbers:
            self.numbers.lose(request, pages)
        if not self._idle[request]:
            del self._idle[request], self._behind[request]

    def _come_back(self, request: Request) -> None:
        """A request that is admitted again holds what it left."""
        del self._behind[request]
        self.private += self._wake(request)
        if self.numbers:
            self.numbers.come_back(request)

    def _rest(self, key: int | Request, pages: int) -> None:
        self._idle[key] = pages
        self._idle_pages += pages

    def _wake(self, key: int | Request) -> int:
        pages = self._idle.pop(key)
        self._idle_pages -= pages
        return pages

    def give(self, pages: int) -> None:
        """Moves pages from private use back to free."""
        self.free += pages
        self.private -= pages

    def check(self, holders: Iterable[Request]) -> None:
        """Asserts that each page is in exactly one place, given everyone who holds some. For tests."""
        requests = list(holders)
        assert self.free >= 0 and self.private >= 0 and self._idle_pages == sum(self._idle.values())
        held_pages = self.private + len(self._holders) * self.block_pages
        assert self.free + held_pages + self._idle_pages == self.total, "a page leaked or is held twice"
        assert self._behind.keys() == {key for key in self._idle if isinstance(key, Request)}
        assert self.private == sum(r.pages - r.shared * self.block_pages for r in requests)
        held: dict[int, int] = {}
        for request in requests:
            for block in request.prefix_hashes[: request.shared]:
                held[block] = held.get(block, 0) + 1
        assert held == self._holders, "a prefix block is held by requests that do not exist"
        assert not self._holders.keys() & self._idle.keys()
        if self.below:
            self.below.check()
        if self.numbers:
            self.numbers.check()
            for request in requests:
                assert len(self.numbers.table(request)) == request.pages, "a table is not what was counted"

    def _match(self, request: Request) -> int:
        """Leading blocks of the prompt that are cached."""
        if not self.prefix_cache:
            return 0
        return _leading(request.prefix_hashes, request.prompt_tokens // self.block_tokens, self._holders, self._idle)

    def _reused(self, request: Request, blocks: int, left: int = 0) -> int:
        """Tokens of so many leading blocks, and pages left behind them, that need not be computed: not the last one."""
        return min(blocks * self.block_tokens + left * self.page_tokens, request.target - 1)

    def _left(self, request: Request, matched: int) -> int:
        """Pages that a preempted request left and finds again behind its first `matched` blocks."""
        return self._idle.get(request, 0) if self._behind.get(request) == matched else 0

    def _found_below(self, request: Request, matched: int) -> list[int]:
        """The tier below of each block that follows on those here."""
        if self.below is None:
            return []
        return self.below.found(request.prefix_hashes[matched : request.prompt_tokens // self.block_tokens])

    def _by_tier(self, found: list[int], tokens: int) -> tuple[int, ...]:
        """`tokens` tokens in blocks found in those tiers, by tier."""
        assert self.below is not None
        counts = [0] * len(self.below.tiers)
        for tier in found:
            taken = min(self.block_tokens, tokens)
            counts[tier] += taken
            tokens -= taken
        return tuple(counts)

    def _private_pages(self, request: Request, matched: int, tokens: int | None) -> int:
        held = request.target if tokens is None else min(tokens, request.target)
        return max(0, self.pages_for(held) - matched * self.block_pages)

    def _hold(self, block: int) -> None:
        if block in self._idle:
            self._wake(block)
        self._holders[block] = self._holders.get(block, 0) + 1


def _leading(blocks: Sequence[int], most: int, *caches: Container[int | Request]) -> int:
    """How many of the first `most` blocks, from the start on, some cache holds."""
    count = 0
    for block in blocks[:most]:
        if not any(block in cache for cache in caches):
            break
        count += 1
    return count
