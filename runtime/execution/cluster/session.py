"""A run on emulated devices from start to end: the plan, its memory, its devices, the prompts."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import UsageError
from model.cache import bytes_per_token, cache_rows, held_row, narrow_formats
from model.config import ModelConfig
from model.formats import CacheFormats, Formats
from runtime.deployment.choice import check_kv, chosen_scheme
from runtime.deployment.plan import Plan
from runtime.deployment.pool import Pool, profile_of
from runtime.execution.cluster import deploy
from runtime.execution.cluster.options import SimOptions
from runtime.serving import Deployment, Disaggregated
from runtime.simulation.build import spec_for
from runtime.simulation.planned import Deployed

if TYPE_CHECKING:
    import numpy as np

    from backends.emulation.backend import SimBackend
    from backends.emulation.number_formats import NumberFormats
    from backends.interface import Backend
    from backends.spmd.cluster import Cluster
    from backends.spmd.processes import Processes
    from model.checkpoint import Checkpoint, Group
    from model.weights import Quantized, Weight
    from runtime.execution.cluster.live import Outcome
    from runtime.execution.cluster.timeline import Timeline
    from runtime.execution.local.request import Completion, OnToken, Prompt
    from runtime.serving.executor import StepExecutor

_KEPT = "fp8-block"


def prepare(cfg: ModelConfig, options: SimOptions, computed: bool = True) -> Plan:
    """The plan to run, with room on every device for what it puts there. Nothing has been loaded yet. computed: as of
    `runnable`.

    Raises `UsageError`, `PlanFileError`, `Unsupported` or `OutOfMemory`.
    """
    if options.trace and not options.trace.absolute().parent.is_dir():
        raise UsageError(f"--trace {options.trace}: there is no directory {options.trace.parent}")
    if not 0 < options.scale_memory < float("inf"):
        raise UsageError(f"--scale-memory must be above 0, not {options.scale_memory:g}")
    if options.plan is None:
        plan, factor = _on_the_spot(cfg, options), 1.0
    else:
        plan, factor = _planned(cfg, options), options.scale_memory
    runnable(cfg, plan, computed)
    if computed:
        deploy.check_memory(cfg, plan, factor)
    else:
        deploy.check_ledgers(plan, factor)
    return plan


def runnable(cfg: ModelConfig, plan: Plan, computed: bool = True) -> None:
    """Raises `UsageError` for a plan whose steps cannot be emulated. computed: on devices; otherwise nobody computes
    them, and they only take their time."""
    for pool in plan.pools:
        if pool.offload.asked:
            raise UsageError(
                "the plan keeps prompts in memory below the devices', which is not emulated: plan it without "
                "--kv-host-gb and --kv-disk-gb"
            )
        if computed:
            deploy.grid_of(cfg, pool).check(cfg)
    drafts = sorted({pool.drafts for pool in plan.pools})
    if drafts[-1] and not cfg.mtp_layers:
        raise UsageError(f"{cfg.name} has no MTP layer to draft with: leave out --mtp")
    if not computed:
        return
    if len(drafts) > 1:
        raise UsageError(
            f"the plan's pools draft {drafts[0]} and {drafts[-1]} tokens a step, and the MTP layer's rows move with a "
            "cache: plan both with one --mtp"
        )
    sizes = sorted({pool.page_tokens for pool in plan.pools})
    if len(sizes) > 1:
        raise UsageError(
            f"the plan's pools keep pages of {sizes[0]} and {sizes[-1]} tokens: caches move between pools of one page "
            "size only; plan both with one engine"
        )


def _planned(cfg: ModelConfig, options: SimOptions) -> Plan:
    assert options.plan is not None
    plan = Plan.read(options.plan, cfg)
    if options.devices is not None and options.devices != len(plan.devices):
        raise UsageError(f"--devices {options.devices}: {options.plan} is a plan for {len(plan.devices)} devices")
    return plan


def _on_the_spot(cfg: ModelConfig, options: SimOptions) -> Plan:
    if options.profile is None:
        raise UsageError("--backend sim emulates a chip: name it with --profile (`glm5 profiles list`), or give --plan")
    profile = deploy.scaled(options.profile, options.scale_memory)
    chosen = chosen_scheme(profile, options.formats)
    check_kv(profile, options.kv)
    engine = options.engine or "sglang"
    layout, replicas = deploy.lay_out(cfg, options.devices or 1, options.tp, options.dp, options.ep, options.pp)
    settings = deploy.unscaled_settings(engine, cfg, options.profile, layout, profile, options.mtp)
    made = spec_for(cfg, profile, layout, chosen, options.kv, engine, settings, drafts=options.mtp)
    return deploy.spot_plan(made, replicas)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out, and the wall-clock seconds it took here. wall: the completions, their times on the wall clock
    without what compiling took."""

    outcome: Outcome
    wall: list[Completion]
    clock: Deployed
    load_s: float
    compile_s: float
    run_s: float


def serve(
    checkpoint: Checkpoint,
    backend: Backend | Processes,
    plan: Plan,
    prompts: Sequence[Prompt],
    on_token: OnToken = lambda index, token: None,
    trace: Path | None = None,
    clock: Deployed | None = None,
) -> Result:
    """Runs the prompts on the plan's devices: emulated ones, or those of several processes.

    trace: the file to write the devices' timelines to. clock: what prices the steps; by default as the plan's
    profiles do. Raises `UsageError` for a prompt that the model cannot serve.
    """
    from backends.emulation.backend import SimBackend
    from backends.spmd.processes import Processes
    from runtime.execution.cluster.live import emulate
    from runtime.execution.cluster.timeline import write
    from runtime.execution.local.request import check_request

    assert isinstance(backend, SimBackend | Processes)
    for prompt in prompts:
        check_request(prompt, checkpoint.config)
    began = time.perf_counter()
    if isinstance(backend, SimBackend):
        backend.start(max(pool.layout.devices for pool in plan.pools))
    clock = clock or deploy.clock_of(checkpoint.config, plan)
    clusters = [clusters_of(checkpoint, backend, pool) for pool in plan.pools]
    each = [itertools.cycle(found) for found in clusters]
    drafts = max(pool.drafts for pool in plan.pools)
    there = backend if isinstance(backend, Processes) else None
    if there:
        check_moves(checkpoint.config, there, plan)
    held = [pages_there(checkpoint.config, there, pool) if there else pool.kv_pages for pool in plan.pools]
    pages = [_pages(pool, most, prompts) for pool, most in zip(plan.pools, held, strict=True)]
    timelines = _timelines(checkpoint.config, plan, clock) if trace else []
    times: dict[int, list[float]] = {}

    def compiled() -> float:
        return sum(cluster.compile_s for found in clusters for cluster in found)

    def token(index: int, token: int) -> None:
        times.setdefault(index, []).append(time.perf_counter() - loaded - compiled())
        on_token(index, token)

    def executor(role: int) -> StepExecutor:
        pool = plan.pools[role]
        return executor_of(next(each[role]), pages[role], pool)

    loaded = time.perf_counter()
    rooms = [count * pool.page_tokens for count, pool in zip(held, plan.pools, strict=True)]
    outcome = emulate(
        prompts,
        within(clock.deployment, rooms) if there else clock.deployment,
        executor,
        token,
        timelines,
        drafts,
    )
    if trace:
        write(trace, timelines)
    wall = [
        dataclasses.replace(found, ttft_s=times[index][0], decode_s=times[index][-1] - times[index][0])
        for index, found in enumerate(outcome.completions)
    ]
    compile_s = compiled()
    return Result(outcome, wall, clock, loaded - began, compile_s, time.perf_counter() - loaded - compile_s)


def clusters_of(checkpoint: Checkpoint, backend: SimBackend | Processes, pool: Pool) -> list[Cluster]:
    """The devices of a pool's servers in turn: emulated ones are the same for all, those of processes are not."""
    from backends.emulation.backend import SimBackend
    from runtime.execution.local.load import require_mtp

    cfg, drafts = checkpoint.config, pool.drafts
    if drafts:
        require_mtp(checkpoint)
    grid = deploy.grid_of(cfg, pool)
    if isinstance(backend, SimBackend):
        numbers = number_formats(cfg, pool)
        weights = checkpoint.load("float32", keep_fp8=numbers is not None, mtp=drafts > 0)
        return [backend.cluster(cfg, grid, weights, numbers, drafts)]
    firsts = [pool.devices[number * pool.layout.devices].index for number in range(pool.replicas)]
    rows = kept_rows(cfg, backend.backend, pool)
    narrow = pool.formats if backend.backend.capabilities().fp8_weights else None
    return [
        backend.cluster(cfg, grid, _unread(checkpoint, backend.dtype, narrow), first, drafts, rows) for first in firsts
    ]


def kept_rows(cfg: ModelConfig, backend: Backend, pool: Pool) -> CacheFormats:
    """What a backend keeps the rows of a pool's caches in: the plan's formats where it has those that are narrow, else
    as they are computed."""
    asked = pool.formats.cache
    return asked if narrow_formats(cfg, asked) <= backend.capabilities().cache_rows else CacheFormats()


def check_moves(cfg: ModelConfig, machines: Processes, plan: Plan) -> None:
    """Raises `UsageError` where pools of a plan keep the rows that move between them in unlike forms."""
    kept = [kept_rows(cfg, machines.backend, pool) for pool in plan.pools]
    for row in dict.fromkeys(row for kind in cfg.layers for row in cache_rows(cfg, kind)):
        if len({held_row(cfg, row, each, machines.dtype) for each in kept}) > 1:
            names = " and ".join(each.of(row.name).name for each in kept)
            raise UsageError(
                f"the plan's pools keep {row.name} rows as {names}, and rows move as they are: plan both for one kind "
                "of chip, one engine and one --kv"
            )


def pages_there(cfg: ModelConfig, machines: Processes, pool: Pool) -> int:
    """Pages that a rank of a pool has: the plan's, or fewer where its devices keep a token's rows in more bytes than
    those that it plans with."""
    from runtime.execution.local.load import token_bytes

    mtp = pool.drafts > 0
    kept = token_bytes(cfg, machines.dtype, mtp, kept_rows(cfg, machines.backend, pool))
    planned = sum(sum(bytes_per_token(cfg, pool.formats.cache, mtp=each).values()) for each in {False, mtp})
    return max(1, int(pool.kv_pages * min(1.0, planned / kept)))


def within(deployment: Deployment | Disaggregated, tokens: list[int]) -> Deployment | Disaggregated:
    """The deployment with pools of so many tokens a rank."""
    if isinstance(deployment, Disaggregated):
        prefill, decode = deployment.prefill, deployment.decode
        return dataclasses.replace(
            deployment,
            prefill=dataclasses.replace(prefill, pool_tokens=min(prefill.pool_tokens, tokens[0])),
            decode=dataclasses.replace(decode, pool_tokens=min(decode.pool_tokens, tokens[1])),
        )
    return dataclasses.replace(deployment, pool_tokens=min(deployment.pool_tokens, tokens[0]))


def executor_of(cluster: Cluster, pages: int, pool: Pool) -> StepExecutor:
    """What carries out the steps of a server of a pool, with so many pages a rank, one of them nobody's."""
    from runtime.execution.cluster.executor import ClusterExecutor

    return ClusterExecutor(cluster.server(pages, pool.page_tokens), pool.layout.dp, pool.drafts)


def _unread(checkpoint: Checkpoint, dtype: str, narrow: Formats | None) -> dict[str, Any]:
    """The weights as `Checkpoint.load` has them, each read when it is asked for, and not kept. narrow: matrices stay in
    block-FP8 that the checkpoint and these formats both hold so."""
    from model.checkpoint import groups

    found = groups(checkpoint.config, mtp=checkpoint.has_mtp)
    return {
        "outer": _Unread(checkpoint, found["outer"][0], dtype, narrow),
        "layers": [_Unread(checkpoint, group, dtype, narrow) for group in found["layers"]],
        "mtp": [_Unread(checkpoint, group, dtype, narrow, mtp=True) for group in found["mtp"]],
    }


class _Unread:
    def __init__(self, checkpoint: Checkpoint, group: Group, dtype: str, narrow: Formats | None, mtp: bool = False):
        self._checkpoint, self._group, self._dtype, self._narrow, self._mtp = checkpoint, group, dtype, narrow, mtp
        self._weights: dict[str, Weight] = {weight.name: weight for weight in group.weights}

    def __getitem__(self, name: str) -> np.ndarray | Quantized:
        weight = self._weights[name]
        keep = self._narrow is not None and self._narrow.held(weight, self._mtp).name == _KEPT
        if keep:
            kept = self._checkpoint.kept(self._group, weight)
            keep = kept is not None and kept.name == _KEPT
        return self._checkpoint.read(self._group, weight, self._dtype, keep)

    pop = __getitem__

    def clear(self) -> None:
        self._weights = {}


def number_formats(cfg: ModelConfig, pool: Pool) -> NumberFormats | None:
    """What the pool's chip rounds; None where everything is float32. Raises `UsageError`."""
    if pool.formats.wide == "f32":
        return None
    from backends.emulation.number_formats import NumberFormats

    profile = profile_of(pool)
    chosen_scheme(profile, pool.formats.scheme.name)
    check_kv(profile, pool.formats.kv)
    return NumberFormats(cfg, pool.formats)


def _pages(pool: Pool, most: int, prompts: Sequence[Prompt]) -> int:
    """Pages a rank to have: so many at most, or what all prompts take together where that is less; and a spare one."""
    beyond = max(0, 2 * pool.drafts - 1)  # that a step may write behind an answer
    each = [-(-(len(p.prompt_ids) + p.max_tokens + beyond) // pool.page_tokens) for p in prompts]
    return min(most, sum(each)) + 1


def _timelines(cfg: ModelConfig, plan: Plan, clock: Deployed) -> list[Timeline]:
    from runtime.execution.cluster.timeline import Timeline, segments
    from runtime.pricing.pricer import OpLists
    from runtime.pricing.trace import trace

    found, process = [], 0
    for pool, built in zip(plan.pools, clock.pools, strict=True):
        pricer = built.pricer
        traced = trace(cfg, pool.layout, "decode", mtp=pool.drafts > 0)
        programs = OpLists(traced.layers, traced.embed, traced.head, traced.mtp)
        ops = segments(cfg, pool.layout, programs, pricer)
        found.append(Timeline(pool.layout, pricer, ops, pool.role, pool.devices[0].index, process))
        process += pool.replicas
    return found
