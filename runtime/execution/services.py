"""Services, ready to be asked: a checkpoint on a device of this host, a package, or a plan's deployment: at its own
pace, or on the devices of several processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from foundation.errors import CapacityError, UsageError
from model.cache import cache_rows
from model.config import ModelConfig
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool
from runtime.execution.cluster import deploy
from runtime.execution.cluster.led import Leader, LedExecutor
from runtime.execution.cluster.session import check_moves, clusters_of, executor_of, pages_there, runnable, within
from runtime.serving import Disaggregated
from runtime.serving.clock import Clock, Paced, Wall
from runtime.serving.executor import StepExecutor, refuse
from runtime.serving.live import LiveService, ModelLimits
from runtime.serving.worker import ModelWorker, SyntheticWorker, Worker
from runtime.simulation.planned import Deployed

if TYPE_CHECKING:
    from backends.emulation.backend import SimBackend
    from backends.interface import Backend
    from backends.spmd.processes import Processes
    from model.checkpoint import Checkpoint
    from runtime.execution.local.engine import EngineConfig, LocalEngine
    from runtime.execution.package.generate import Package

HOST_CACHE_BYTES = 2.5e8
"""For the caches of an emulated server at most: a chip's would not fit this host. Made-up tokens need none."""

NextToken = Callable[[int, int], int]
"""The token id of an answer: number of the job, place in the answer from 0 on."""


def local_service(
    checkpoint: Checkpoint,
    backend: Backend,
    config: EngineConfig | None = None,
    dtype: str | None = None,
    keep_fp8: bool = False,
    pool_tokens: int | None = None,
    max_queue: int = 1024,
) -> LiveService:
    """A checkpoint on a device of a backend, as fast as it goes. config and the rest: as of `load_engine`, whose errors
    are raised."""
    from runtime.execution.local.engine import EngineConfig
    from runtime.execution.local.load import load_engine

    return engine_service(
        load_engine(checkpoint, backend, config or EngineConfig(), dtype, keep_fp8, pool_tokens), max_queue
    )


def engine_service(engine: LocalEngine, max_queue: int = 1024, clock: Clock | None = None) -> LiveService:
    """An engine that is loaded already. It must not be asked otherwise while the service is open."""

    def hire(role: int, answers: Any, moving: Any) -> Worker:
        return ModelWorker(engine.executor, answers, moving, engine.config.drafts)

    return LiveService(engine.deployment, hire, clock or Wall(), _limits(engine.cfg), max_queue)


def package_service(package: Package, max_queue: int = 1024, clock: Clock | None = None) -> LiveService:
    """An exported package that is loaded already, by its gears. It must not be asked otherwise while the service is
    open. A request that no gear holds is refused."""
    executor, model = package.executor, package.manifest.model
    deployment = executor.deployment()
    refuse(deployment, executor)

    def hire(role: int, answers: Any, moving: Any) -> Worker:
        return ModelWorker(executor, answers, moving)

    limits = ModelLimits(model.vocab_size, min(model.max_positions, executor.largest_context))
    return LiveService(deployment, hire, clock or Wall(), limits, max_queue)


def emulated_service(
    cfg: ModelConfig,
    plan: Plan,
    *,
    checkpoint: Checkpoint | None = None,
    backend: SimBackend | None = None,
    next_token: NextToken | None = None,
    time_scale: float = 1.0,
    max_queue: int = 1024,
    clock: Clock | None = None,
    priced: Deployed | None = None,
) -> LiveService:
    """A plan's deployment, at the pace that it is priced at: with the tokens of a checkpoint on emulated devices, or
    with those of `next_token`, where no model is run.

    time_scale: seconds of the wall for each of the clock's, which stands still while programs are compiled. clock:
    paced by default. priced: the plan's deployment, by default as its profiles price it. Raises `UsageError` for a plan
    that cannot be run, and what loading one raises.
    """
    if (checkpoint is None) == (next_token is None):
        raise UsageError("give a checkpoint whose tokens are real, or a function that makes them up")
    Paced(time_scale)  # refuses what is no scale before anything is loaded
    priced = priced or deploy.clock_of(cfg, plan)
    if next_token is not None:
        made_up = next_token

        def invent(role: int, answers: Any, moving: Any) -> Worker:
            return SyntheticWorker(made_up, cfg.vocab_size, answers, moving)

        return LiveService(priced.deployment, invent, clock or Paced(time_scale), _limits(cfg), max_queue)
    assert checkpoint is not None and backend is not None
    runnable(cfg, plan)
    backend.start(max(pool.layout.devices for pool in plan.pools))
    pages = pages_here(cfg, plan)
    clusters = [clusters_of(checkpoint, backend, pool) for pool in plan.pools]
    each = [itertools.cycle(found) for found in clusters]

    def made(role: int) -> StepExecutor:
        return executor_of(next(each[role]), pages[role] + 1, plan.pools[role])

    def compiling_s() -> float:
        return sum(cluster.compile_s for found in clusters for cluster in found)

    return _planned(cfg, plan, priced, pages, made, clock or Paced(time_scale, compiling_s), max_queue)


def led_service(
    checkpoint: Checkpoint, machines: Processes, plan: Plan, max_queue: int = 1024
) -> tuple[LiveService, Leader]:
    """Process 0's service of a plan's deployment on the devices of several processes, as fast as they go, and its
    leader, to be ended behind it. The others `follow` on `executors_of` the same. Raises what loading raises."""
    from backends.spmd.processes import send

    found, numbers = executors_of(checkpoint, machines, plan), itertools.count()
    leader = Leader(send)
    led = [[LedExecutor(leader, next(numbers), executor) for executor in pool] for pool in found]
    each = [itertools.cycle(pool) for pool in led]
    pages = [pool[0].can.pages for pool in led]
    priced = deploy.clock_of(checkpoint.config, plan)
    service = _planned(checkpoint.config, plan, priced, pages, lambda role: next(each[role]), Wall(), max_queue)
    return service, leader


def executors_of(checkpoint: Checkpoint, machines: Processes, plan: Plan) -> list[list[StepExecutor]]:
    """What carries out the steps of each pool's servers, on the devices of several processes; the same in all."""
    runnable(checkpoint.config, plan)
    told = machines.backend.capabilities().devices[0].memory_bytes is not None
    cfg = checkpoint.config
    check_moves(cfg, machines, plan)
    pages = [pages_there(cfg, machines, pool) for pool in plan.pools] if told else pages_here(cfg, plan)
    return [
        [executor_of(cluster, count + 1, pool) for cluster in clusters_of(checkpoint, machines, pool)]
        for count, pool in zip(pages, plan.pools, strict=True)
    ]


def _planned(
    cfg: ModelConfig,
    plan: Plan,
    priced: Deployed,
    pages: list[int],
    make_executor: Callable[[int], StepExecutor],
    clock: Clock,
    max_queue: int,
) -> LiveService:
    """A plan's deployment, its steps carried out. pages: of a rank of each pool. make_executor: of a role's next
    server."""
    deployment = within(priced.deployment, [n * pool.page_tokens for n, pool in zip(pages, plan.pools, strict=True)])
    roles = [deployment.prefill, deployment.decode] if isinstance(deployment, Disaggregated) else [deployment]

    def hire(role: int, answers: Any, moving: Any) -> Worker:
        executor = make_executor(role)
        refuse(roles[role], executor, moves=len(roles) > 1)
        return ModelWorker(executor, answers, moving, plan.pools[role].drafts)

    return LiveService(deployment, hire, clock, _limits(cfg), max_queue)


def _limits(cfg: ModelConfig) -> ModelLimits:
    return ModelLimits(cfg.vocab_size, cfg.max_positions)


def pages_here(cfg: ModelConfig, plan: Plan) -> list[int]:
    """Pages that a rank of each pool has where caches are held on this host: the plan's, or as many as there is room
    for. Raises `CapacityError` where that is none."""
    return [_pages(cfg, pool) for pool in plan.pools]


def _pages(cfg: ModelConfig, pool: Pool) -> int:
    kinds = [*cfg.layers, *[cfg.mtp_type] * (pool.drafts > 0)]
    row_bytes = 4 * sum(row.width for kind in kinds for row in cache_rows(cfg, kind))
    room = int(HOST_CACHE_BYTES // (row_bytes * pool.page_tokens * pool.layout.dp * pool.replicas))
    if room < 1:
        raise CapacityError(f"{cfg.name}: this host has no room for a page of its cache; give a smaller model")
    return min(pool.kv_pages, room)
