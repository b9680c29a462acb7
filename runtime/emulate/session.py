"""A run on emulated devices from start to end: the plan, its memory, its devices, the prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ModelConfig
from runtime.emulate import deploy
from runtime.emulate.options import Options
from runtime.errors import UsageError
from runtime.layout import Formats
from runtime.planner.plan import Plan, Pool, profile_of

if TYPE_CHECKING:
    from backends.interface import Backend
    from backends.sim.backend import SimBackend
    from backends.sim.cluster import Cluster, NumberFormats
    from model.checkpoint import Checkpoint
    from runtime.emulate.live import Outcome
    from runtime.emulate.timeline import Timeline
    from runtime.emulate.worker import OnToken
    from runtime.engine.request import Request


def prepare(cfg: ModelConfig, options: Options) -> Plan:
    """The plan to run, with room on every device for what it puts there. Nothing has been loaded yet.

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
    for pool in plan.pools:
        if pool.drafts:
            raise UsageError(
                f"the plan drafts {pool.drafts} tokens a step, which is not emulated: plan it without --mtp"
            )
        deploy.grid_of(cfg, pool).check(cfg)
    sizes = sorted({pool.page_tokens for pool in plan.pools})
    if len(sizes) > 1:
        raise UsageError(
            f"the plan's pools keep pages of {sizes[0]} and {sizes[-1]} tokens: caches move between pools of one page "
            "size only; plan both with one engine"
        )
    deploy.check_memory(cfg, plan, factor)
    return plan


def _planned(cfg: ModelConfig, options: Options) -> Plan:
    assert options.plan is not None
    decided = [name for name in options.given if name not in ("--plan", "--devices", "--scale-memory", "--trace")]
    if decided:
        raise UsageError(f"{', '.join(decided)}: the plan decides that; leave it out, or leave out --plan")
    plan = Plan.read(options.plan, cfg)
    if options.devices is not None and options.devices != len(plan.devices):
        raise UsageError(f"--devices {options.devices}: {options.plan} is a plan for {len(plan.devices)} devices")
    return plan


def _on_the_spot(cfg: ModelConfig, options: Options) -> Plan:
    from backends.number_formats.schemes import cache_of_profile, of_profile
    from runtime.deploy import default_kv

    if options.profile is None:
        raise UsageError("--backend sim emulates a chip: name it with --profile (`glm5 profiles list`), or give --plan")
    profile = deploy.scaled(options.profile, options.scale_memory)
    chosen = of_profile(profile, options.formats)
    engine = options.engine or "sglang"
    kv = options.kv or (None if chosen.wide == "f32" else default_kv(cfg, profile, engine))
    cache_of_profile(profile, kv, chosen)
    layout, replicas = deploy.lay_out(cfg, options.devices or 1, options.tp, options.dp, options.ep, options.pp)
    settings = deploy.unscaled_settings(engine, cfg, options.profile, layout, profile, {})
    held = Formats(chosen.dense, chosen.experts, kv or chosen.wide)
    return deploy.spot_plan(cfg, profile, layout, held, replicas, engine, settings)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out, and the wall-clock seconds it took here."""

    outcome: Outcome
    clock: deploy.Clock
    load_s: float
    compile_s: float
    run_s: float


def serve(
    checkpoint: Checkpoint,
    backend: Backend,
    plan: Plan,
    prompts: Sequence[Request],
    on_token: OnToken = lambda index, token: None,
    trace: Path | None = None,
    clock: deploy.Clock | None = None,
) -> Result:
    """Runs the prompts on the plan's devices.

    trace: the file to write the devices' timelines to. clock: what prices the steps; by default as the plan's
    profiles do. Raises `UsageError` for a prompt that the model cannot serve.
    """
    from backends.sim.backend import SimBackend
    from runtime.emulate.live import emulate
    from runtime.emulate.timeline import write
    from runtime.engine.request import check_request

    assert isinstance(backend, SimBackend)
    for prompt in prompts:
        check_request(prompt, checkpoint.config)
    began = time.perf_counter()
    backend.start(max(pool.layout.devices for pool in plan.pools))
    clock = clock or deploy.clock_of(checkpoint.config, plan)
    clusters = [_cluster(checkpoint, backend, pool) for pool in plan.pools]
    pages = [_pages(pool, prompts) for pool in plan.pools]
    timelines = _timelines(checkpoint.config, plan, clock) if trace else []
    loaded = time.perf_counter()
    outcome = emulate(
        prompts,
        clock.deployment,
        lambda role: clusters[role].server(pages[role], plan.pools[role].page_tokens),
        on_token,
        timelines,
    )
    if trace:
        write(trace, timelines)
    compiled = sum(cluster.compile_s for cluster in clusters)
    return Result(outcome, clock, loaded - began, compiled, time.perf_counter() - loaded - compiled)


def _cluster(checkpoint: Checkpoint, backend: SimBackend, pool: Pool) -> Cluster:
    cfg = checkpoint.config
    numbers = number_formats(cfg, pool)
    weights = checkpoint.load("float32", keep_fp8=numbers is not None, mtp=False)
    return backend.cluster(cfg, deploy.grid_of(cfg, pool), weights, numbers)


def number_formats(cfg: ModelConfig, pool: Pool) -> NumberFormats | None:
    """What the pool's chip rounds; None where everything is float32. Raises `Unsupported`."""
    if pool.formats.wide == "f32":
        return None
    from backends.number_formats.emulation import formats_of
    from backends.number_formats.schemes import SCHEMES

    wanted = (pool.formats.weights, pool.formats.experts)
    name = next((name for name, each in SCHEMES.items() if (each.dense, each.experts) == wanted), "/".join(wanted))
    return formats_of(cfg, profile_of(pool), name, pool.formats.kv)


def _pages(pool: Pool, prompts: Sequence[Request]) -> int:
    """Pages a rank to have: the plan's, or what all prompts take together where that is less."""
    each = [-(-(len(p.prompt_ids) + p.max_tokens) // pool.page_tokens) for p in prompts]
    return min(pool.kv_pages, sum(each)) + any(p.keep_logits for p in prompts)


def _timelines(cfg: ModelConfig, plan: Plan, clock: deploy.Clock) -> list[Timeline]:
    from runtime.emulate.timeline import Timeline, segments
    from runtime.pricer import GraphPricer, Programs
    from runtime.trace import trace

    found, process = [], 0
    for pool, deployment in zip(plan.pools, clock.pools, strict=True):
        pricer = deployment.pricer
        assert isinstance(pricer, GraphPricer)
        traced = trace(cfg, pool.layout, "decode")
        programs = Programs(traced.layers, traced.embed, traced.head, None)
        ops = segments(cfg, pool.layout, programs, pricer)
        found.append(Timeline(pool.layout, pricer, ops, pool.role, pool.devices[0].index, process))
        process += pool.replicas
    return found
