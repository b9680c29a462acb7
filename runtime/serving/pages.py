"""Which pages: the numbers behind a pool's counts, where its steps are carried out.

A `KvPool` decides how many pages a request holds and which blocks it shares; told of every such decision, this says
which pages those are. Page 0 is nobody's: what pads a batch is written there.
"""

from __future__ import annotations

from collections.abc import Iterable

from runtime.serving.request import Request


class PageNumbers:
    """Numbers 1 to `pages`; a page is free, in one request's table, or of one block that any number of tables share."""

    def __init__(self, pages: int, block_pages: int):
        self.pages = pages
        self._block_pages = block_pages
        self._untouched = 1  # the lowest page that nobody ever held: pools may have more pages than memory has bytes
        self._free: list[int] = []  # held before, taken from the end
        self._tables: dict[Request, list[int]] = {}
        self._blocks: dict[int, list[int]] = {}
        self._left: dict[Request, list[int]] = {}  # of preempted requests, behind their shared blocks

    def table(self, request: Request) -> list[int]:
        """The pages of a request in the order of its tokens. Not to be changed."""
        return self._tables[request]

    def share(self, request: Request, blocks: Iterable[int]) -> None:
        """A request begins with the pages of blocks."""
        self._tables[request] = [page for block in blocks for page in self._blocks[block]]

    def extend(self, request: Request, pages: int) -> None:
        """A request holds so many pages from now on."""
        table = self._tables[request]
        for _ in range(pages - len(table)):
            table.append(self._take())

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        assert self._untouched <= self.pages, "more pages are held than were counted"
        self._untouched += 1
        return self._untouched - 1

    def publish(self, request: Request, number: int, block: int) -> None:
        """The pages of a request's block of that number are everybody's."""
        first = number * self._block_pages
        self._blocks[block] = self._tables[request][first : first + self._block_pages]

    def evict(self, block: int) -> None:
        """Nobody holds the block, and nobody will."""
        self._free.extend(reversed(self._blocks.pop(block)))

    def release(self, request: Request, shared: int, left: int = 0) -> None:
        """A request holds nothing any more; its first `shared` blocks stay, and so do `left` pages behind them."""
        private = self._tables.pop(request, [])[shared * self._block_pages :]
        if left:
            self._left[request] = private[:left]
        self._free.extend(reversed(private[left:]))

    def come_back(self, request: Request) -> None:
        """A request that begins again holds what it left."""
        self._tables[request] += self._left.pop(request)

    def lose(self, request: Request, pages: int) -> None:
        """The last pages of what a request left are nobody's."""
        left = self._left[request]
        self._free.extend(reversed(left[-pages:]))
        del left[-pages:]
        if not left:
            del self._left[request]

    def check(self) -> None:
        """Asserts that every page is in one place. For tests."""
        blocks = [page for pages in self._blocks.values() for page in pages]
        known = set(blocks)
        tables = [*self._tables.values(), *self._left.values()]
        private = [page for table in tables for page in table if page not in known]
        assert sorted([*self._free, *blocks, *private]) == list(range(1, self._untouched)), "a page leaked or is twice"
