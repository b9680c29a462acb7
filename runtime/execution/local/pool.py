"""The page pool: which sequence holds which cache pages. Page 0 belongs to nobody."""

from __future__ import annotations

from foundation.errors import CapacityError


class PagePool:
    """`pages` usable pages of `page_size` tokens. A page is free or held by exactly one owner."""

    def __init__(self, pages: int, page_size: int):
        self.page_size = page_size
        self.pages = pages
        self._free = list(range(pages, 0, -1))  # popped from the end: lowest first

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extends `held` in place until it covers `tokens`; False (and nothing taken) where pages run out."""
        missing = self.pages_for(tokens) - len(held)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            held.append(self._free.pop())
        return True

    def release(self, held: list[int]) -> None:
        """Returns all of `held` and empties it."""
        if set(held) & set(self._free):
            raise CapacityError("a page was released twice; this is a bug in the engine")
        self._free.extend(reversed(held))
        held.clear()
