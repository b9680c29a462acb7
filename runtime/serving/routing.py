"""Which replica and rank a request goes to.

    round-robin    one rank after another, over all replicas
    least-loaded   the rank with the fewest requests
    cache-aware    the replica that has the longest beginning of the prompt, and in it one rank after another

Cache-aware is the default of the routers before SGLang's and vLLM's servers (sgl-model-gateway, vllm-router): the
replica whose past requests share the longest prefix, where that is over 0.3 of the prompt, else the one that has seen
least; but the one with the fewest requests, once the busiest has over 64 more and over 1.5 times as many. A router
knows what it sent, not what has been evicted since. Turns of a conversation go where the first went, whatever the
router.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.serving.rank import Rank
from runtime.serving.replica import Replica
from runtime.serving.request import Request

_SHARED, _MORE, _TIMES = 0.3, 64, 1.5
_REMEMBERED = 1_000_000
"""Blocks of past prompts that a router keeps of a replica; it begins anew beyond."""


class ReplicaRouter:
    """Of one role's replicas. block_tokens: that a prefix hash stands for."""

    def __init__(self, policy: str, replicas: Sequence[Replica], block_tokens: int):
        self.policy, self.replicas, self.block_tokens = policy, replicas, block_tokens
        self._places = [(replica, rank) for replica in replicas for rank in replica.ranks]
        self._turn = 0
        self._turns = [0] * len(replicas)
        self._seen: list[set[int]] = [set() for _ in replicas]
        self._homes: dict[int, tuple[Replica, Rank]] = {}

    def place(self, request: Request) -> tuple[Replica, Rank]:
        if request.session is None:
            return self._next(request)
        if request.session not in self._homes:
            self._homes[request.session] = self._next(request)
        return self._homes[request.session]

    def _next(self, request: Request) -> tuple[Replica, Rank]:
        if self.policy == "least-loaded":
            return min(self._places, key=lambda place: place[1].load)
        if self.policy == "cache-aware" and request.prefix_hashes and len(self.replicas) > 1:
            return self._nearest(request)
        self._turn += 1
        return self._places[(self._turn - 1) % len(self._places)]

    def _nearest(self, request: Request) -> tuple[Replica, Rank]:
        loads = [sum(rank.load for rank in replica.ranks) for replica in self.replicas]
        most, least = max(loads), min(loads)
        every = range(len(loads))
        if most - least > _MORE and most > _TIMES * least:
            number = loads.index(least)
        else:
            shared = [self._shared(request, seen) for seen in self._seen]
            number = max(every, key=lambda n: shared[n])
            if shared[number] <= _SHARED * request.prompt_tokens:
                number = min(every, key=lambda n: len(self._seen[n]))
        if len(self._seen[number]) > _REMEMBERED:
            self._seen[number].clear()
        self._seen[number].update(request.prefix_hashes)
        ranks = self.replicas[number].ranks
        self._turns[number] += 1
        return self.replicas[number], ranks[(self._turns[number] - 1) % len(ranks)]

    def _shared(self, request: Request, seen: set[int]) -> int:
        """Tokens of the prompt that a replica was sent before."""
        count = 0
        for block in request.prefix_hashes:
            if block not in seen:
                break
            count += 1
        return count * self.block_tokens
