"""Small engines and runs that the serving tests share."""

from __future__ import annotations

from typing import Any

from runtime.deployment.engines import Engine, load
from runtime.serving.rank import Rank
from runtime.serving.replica import Replica
from runtime.serving.simulation import Simulation

NO_OVERHEAD = {
    "graph_step_host_seconds": 0.0,
    "eager_step_host_seconds": 0.0,
    "request_seconds": 0.0,
    "tokenize_seconds_per_token": 0.0,
    "request_delay_seconds": 0.0,
    "response_seconds": 0.0,
    "front_end_gathers": False,
}


def plain_engine(name: str = "glm5", **overrides: Any) -> Engine:
    """An engine whose steps take what the pricer says and nothing else."""
    return load(name, {**NO_OVERHEAD, "overlap_scheduling": False, **overrides})


def ranks(simulation: Simulation) -> list[Rank]:
    """Every rank of a simulation."""
    return [rank for group in simulation.groups for replica in group for rank in replica.ranks]


def run_checked(simulation: Simulation) -> Any:
    """Runs a simulation, checking the page books of every rank and the clock after every event."""

    def check() -> None:
        assert simulation.now >= clock[0]
        clock[0] = simulation.now
        for rank in ranks(simulation):
            rank.pool.check(rank.holders())
            assert len(rank.running) == len(rank.kv) == len(rank.left) == len(rank.pages)
            assert rank.in_service <= rank.engine.max_running_requests

    clock = [0.0]
    for group in simulation.groups:
        for replica in group:
            _after(replica, "begin", check)
            _after(replica, "end", check)
    return simulation.run()


def _after(replica: Replica, method: str, check: Any) -> None:
    original = getattr(replica, method)

    def wrapped(*arguments: Any) -> Any:
        result = original(*arguments)
        check()
        return result

    setattr(replica, method, wrapped)


__all__ = ["NO_OVERHEAD", "plain_engine", "ranks", "run_checked"]
