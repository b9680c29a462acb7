"""Which replica a request goes to: where the beginning of its prompt is, as long as the load is even."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any

import pytest

from runtime.deployment.demand import Demand
from runtime.planning.predict import workload
from runtime.serving import Deployment, Fixed, Sharing, closed_loop, simulate
from runtime.serving.request import Request
from runtime.serving.simulation import Simulation
from tests.serving.helpers import plain_engine
from tests.serving.pricers import LinearPricer

PAGE = 16


def served(replicas: int, router: Any, pool_tokens: int = 12_000, ranks: int = 1) -> Deployment:
    engine = plain_engine("sglang", page_tokens=PAGE)
    return Deployment(
        engine, LinearPricer(), pool_tokens, devices=replicas, replicas=replicas, ranks=ranks, router=router
    )


def load(groups: int, clients: int = 8, share: float = 0.8) -> Any:
    return closed_loop(clients, 160, Fixed(1000), Fixed(5), sharing=Sharing(share, groups, PAGE))


def where(simulation: Simulation) -> dict[int, Counter[int]]:
    """Of each group of prompts (by its first block), how many went to each replica."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for router in simulation.loop._routers:
        original = router.place

        def place(request: Request, original: Any = original) -> Any:
            replica, rank = original(request)
            found[next(iter(request.prefix_hashes))][replica.number] += 1
            return replica, rank

        router.place = place  # type: ignore[method-assign]
    simulation.run()
    return found


def test_a_group_stays_where_its_beginning_is() -> None:
    found = where(Simulation(load(16), served(4, "cache-aware")))
    assert len(found) == 16 and all(len(replicas) == 1 for replicas in found.values())
    of_replica = Counter(next(iter(replicas)) for replicas in found.values())
    assert all(1 <= count <= 8 for count in of_replica.values()) and len(of_replica) == 4
    spread = where(Simulation(load(16), served(4, "round-robin")))
    assert all(len(replicas) > 1 for replicas in spread.values())


def test_what_one_replica_cannot_hold_four_do_together() -> None:
    """Forty beginnings of 800 tokens, and pools of fifteen: each replica has ten of them to itself."""
    affine, even = (simulate(load(40), served(4, router)).prefix_hit_rate for router in ("cache-aware", "round-robin"))
    assert affine > 0.5 > even


def test_one_hot_beginning_is_spread_once_the_load_is_uneven() -> None:
    """160 clients and one group: the idlest helps out when the busiest has over 64 requests more, and 1.5 times as
    many."""
    found = where(Simulation(load(1, clients=160), served(2, "cache-aware", 400_000)))
    (replicas,) = found.values()
    assert min(replicas.values()) >= 30


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_without_much_in_common_all_replicas_get_as_much(share: float) -> None:
    simulation = Simulation(load(4, share=share), served(4, "cache-aware"))
    if share:
        totals: Counter[int] = sum(where(simulation).values(), Counter())
        assert max(totals.values()) - min(totals.values()) <= 2
    else:
        again = simulate(load(4, share=share), served(4, "round-robin"))
        assert simulation.run().to_json() == again.to_json()


def test_one_replica_is_what_it_was() -> None:
    one, other = (simulate(load(5), served(1, router, ranks=2)) for router in ("cache-aware", "round-robin"))
    assert one.to_json() == other.to_json()


def test_a_share_of_a_plan_has_groups_of_its_own() -> None:
    """Four replicas of which one is played: sixteen groups are four for each, behind a router that keeps them apart."""
    demand = Demand(isl=1000, osl=5, length_ratio=1.0, concurrency=32, shared_prefix=0.8, prefix_groups=16)
    for router, groups in (("cache-aware", 4), ("round-robin", 16)):
        made, shares = workload(demand, 4, requests=200, page_tokens=[PAGE], router=router)
        assert shares == 4 and len({next(iter(each.prefix_hashes)) for each in made.requests}) == groups
    few = dataclasses.replace(demand, prefix_groups=1)
    made, _ = workload(few, 4, requests=50, page_tokens=[PAGE], router="cache-aware")
    assert len({next(iter(each.prefix_hashes)) for each in made.requests}) == 1
