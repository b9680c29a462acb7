"""What prompts have in common, as the prefix hashes by which a KV pool finds it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from foundation.limits import within
from runtime.serving.errors import WorkloadError

MOONCAKE_BLOCK_TOKENS = 512
MOST_GROUPS = 1_000_000
MOST_BLOCKS = 256
"""Of a prompt of the usual length: finer ones cost time, and change what is found by less than a percent."""
_OWN = 1 << 40
"""Numbers of blocks that each who has some has to itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(Sequence[int]):
    """Prefix hashes in the room of two ranges, since a load may hold a million prompts: those of a group, then one's
    own. Slices are tuples."""

    common: range
    own: range

    def __len__(self) -> int:
        return len(self.common) + len(self.own)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain(self.common, self.own)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                first = len(self.common)
                return (*self.common[start:stop], *self.own[max(0, start - first) : max(0, stop - first)])
            return tuple(self)[index]
        return tuple(self)[index]


@dataclass(frozen=True)
class Sharing:
    """The beginnings of prompts: `share` of each prompt's tokens are those that its group begins with, the rest is its
    own. A request is of one of `groups` at random, each as likely.

    block_tokens: tokens one prefix hash stands for; what is shared of a block that is not whole is not found.
    """

    share: float = 0.0
    groups: int = 1
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise WorkloadError(f"shared prefix {self.share:g}: give the share of a prompt's tokens, from 0 to 1")
        if self.groups < 1:
            raise WorkloadError(f"shared prefix in {self.groups} groups: give at least 1")
        within("groups of a shared prefix:", self.groups, MOST_GROUPS, WorkloadError)

    def groups_of(self, count: int, *seed: int) -> np.ndarray:
        """[count] the group of each."""
        return np.random.default_rng([seed[0], 2, *seed[1:]]).integers(self.groups, size=count)

    def shared_tokens(self, prompt_tokens: int) -> int:
        """Tokens of a prompt that others of its group begin with, where they are as long."""
        return int(self.share * prompt_tokens + 1e-6)  # 0.7 x 10 is 7

    def blocks(self, group: int, owner: int, shared_tokens: int, tokens: int) -> Blocks:
        """The hashes of the whole blocks of `tokens` tokens, of which the first are its group's. owner: whose the
        others are, a number of their own."""
        shared, whole = shared_tokens // self.block_tokens, tokens // self.block_tokens
        own = (self.groups + owner) * _OWN
        return Blocks(range(group * _OWN, group * _OWN + shared), range(own + shared, own + whole))


def block_of(usual_tokens: float, *page_tokens: int) -> int:
    """Tokens of a prefix block, for prompts of a usual length in pools of these pages: whole pages of each pool, and a
    page wherever that makes no more than `MOST_BLOCKS` of them."""
    page = math.lcm(*page_tokens)
    return page << max(0, math.ceil(math.log2(usual_tokens / page / MOST_BLOCKS))) if usual_tokens > page else page
