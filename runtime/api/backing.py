"""From what a command names to the service behind an endpoint: a checkpoint on a backend, an exported package, or a
deployment's pace."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foundation.errors import Failure, UsageError
from runtime.api.settings import Emulated
from runtime.api.synthetic import Inventor
from runtime.api.vocabulary import Vocabulary, sampling_defaults
from runtime.serving.live import ModelLimits
from runtime.serving.sampling import Sampling
from runtime.serving.service import Job, Service, Update

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.config import ModelConfig
    from runtime.deployment.plan import Plan
    from runtime.deployment.pool import Pool
    from runtime.execution.cluster.options import SimOptions
    from runtime.simulation.planned import Deployed

Tokens = Literal["model", "synthetic"]
_Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Backing:
    """What is to be served, as a command names it.

    checkpoint: a directory; by default the embedded one. model: whose pace is kept, with synthetic tokens and no plan.
    sim: the devices, for a backend that emulates; None for another. mtp to kv: of a local engine. artifact:
    an exported package in the place of a checkpoint. warm: how many requests at once the programs are compiled for
    ahead.
    """

    backend: str
    checkpoint: Path | None = None
    model: str | None = None
    sim: SimOptions | None = None
    mtp: int = 0
    dtype: str | None = None
    keep_fp8: bool = False
    pool_tokens: int | None = None
    prefill_chunk: int = 256
    kv: str | None = None
    artifact: Path | None = None
    trust_package: bool = False
    tokens: Tokens = "model"
    time_scale: float = 1.0
    max_queue: int = 256
    warm: int = 8


@dataclasses.dataclass(frozen=True)
class Opened:
    """What was found of it, before anything large is loaded. config, checkpoint: None where no such model is run."""

    name: str
    limits: ModelLimits
    vocabulary: Vocabulary
    recommended: dict[str, Any]
    config: ModelConfig | None = None
    checkpoint: Checkpoint | None = None
    plan: Plan | None = None
    priced: Deployed | None = None
    emulated: Emulated | None = None
    notes: tuple[str, ...] = ()


def opened(backing: Backing) -> Opened:
    """Raises a `Failure` for whatever cannot be served."""
    from model.checkpoint import Checkpoint
    from runtime.execution.local.load import embedded_checkpoint

    if not 0 < backing.time_scale < float("inf"):
        raise UsageError(f"--time-scale must be above 0, not {backing.time_scale:g}")
    if backing.artifact is not None:
        return _package(backing.artifact, backing.backend)
    path = backing.checkpoint or embedded_checkpoint()
    if backing.tokens == "synthetic":
        return _synthetic(backing, path)
    checkpoint = Checkpoint(path)
    found = _opened(path, checkpoint.config, checkpoint=checkpoint, notes=tuple(checkpoint.notes))
    return found if backing.sim is None else _emulated(backing, backing.sim, found)


def _opened(path: Path, config: ModelConfig, **more: Any) -> Opened:
    vocabulary = Vocabulary.load(path, config.vocab_size, config.eos_token_ids)
    limits = ModelLimits(config.vocab_size, config.max_positions)
    return Opened(path.resolve().name, limits, vocabulary, sampling_defaults(path), config=config, **more)


def _package(folder: Path, backend: str) -> Opened:
    from runtime.deployment.manifest import Manifest
    from runtime.execution.package.executor import runnable
    from runtime.execution.package.steps import largest_context

    manifest = Manifest.read(folder)
    runnable(backend, manifest.format)
    model = manifest.model
    if manifest.tokenizer is None:
        raise UsageError(f"{folder}: holds no tokenizer, which text needs; export it from a checkpoint that has one")
    limits = ModelLimits(model.vocab_size, min(model.max_positions, largest_context(manifest)))
    vocabulary = Vocabulary.load((folder / manifest.tokenizer).parent, model.vocab_size, model.stop_token_ids)
    return Opened(model.name, limits, vocabulary, sampling_defaults(folder))


def _synthetic(backing: Backing, path: Path) -> Opened:
    from model.hf_config import load_config
    from runtime.deployment.plan import Plan

    if backing.sim is None:
        raise UsageError("--tokens synthetic stands in for a model that is emulated: --backend sim")
    if backing.sim.plan is not None and backing.model is None:
        config = Plan.read(backing.sim.plan).config(file=backing.sim.plan)
    elif backing.model is not None:
        config = load_config(backing.model)
    else:
        raise UsageError("--tokens synthetic keeps a model's pace: name it with --model, or give --plan")
    found = dataclasses.replace(_opened(path, config), name=config.name)
    if found.vocabulary.tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"{path}: its tokenizer has more tokens than {config.name}; --checkpoint another")
    return _emulated(backing, backing.sim, found)


def _emulated(backing: Backing, options: SimOptions, found: Opened) -> Opened:
    from backends import registry
    from backends.emulation.backend import SimBackend
    from runtime.execution.cluster.deploy import clock_of
    from runtime.execution.cluster.session import prepare
    from runtime.execution.services import pages_here

    assert found.config is not None
    plan = prepare(found.config, options, computed=backing.tokens == "model")
    if backing.tokens == "model":  # before pricing, which traces: JAX is told its devices before it starts
        adapter = registry.get(backing.backend)
        assert isinstance(adapter, SimBackend)
        adapter.start(max(pool.layout.devices for pool in plan.pools))
    priced = clock_of(found.config, plan)
    evidence, band = trusted(priced)
    profile = " + ".join(dict.fromkeys(pool.profile for pool in plan.pools))
    names = ", ".join(pool.name for pool in plan.pools)
    share, notes = 1.0, found.notes
    if backing.tokens == "model":
        held = list(zip(pages_here(found.config, plan), plan.pools, strict=True))
        share = min(pages / pool.kv_pages for pages, pool in held)
        notes += tuple(_few(pages, pool) for pages, pool in held if pages < pool.kv_pages)
    emulated = Emulated(profile, len(plan.devices), names, evidence, band, backing.tokens, backing.time_scale, share)
    return dataclasses.replace(found, plan=plan, priced=priced, emulated=emulated, notes=notes)


def _few(pages: int, pool: Pool) -> str:
    return (
        f"pool {pool.name}: this host holds {pages * pool.page_tokens:,} of the {pool.kv_pages * pool.page_tokens:,} "
        "tokens that the plan caches a rank; requests beyond them wait here, and would not there (--tokens synthetic "
        "holds none, and waits as the plan does)"
    )


def trusted(priced: Deployed) -> tuple[str, str]:
    """How far to trust a deployment's pace: the weakest evidence behind a step, and a band of TPOT in words."""
    import numpy as np

    from runtime.pricing.bands import band
    from runtime.pricing.pricer import relative_error
    from runtime.serving.pricing import BatchShape
    from runtime.simulation.trust import kind_of

    built = priced.serving
    rows, _ = built.deployment.engine.decode_rows(min(8, built.deployment.engine.max_running_requests))
    price = built.pricer.price(BatchShape(np.full(rows, 4096), decode_rows=rows, graphed=True))
    found = band("tpot", kind_of(built), relative_error(price), float(price.extrapolated))
    evidence = "assumed" if built.deployment.assumed else price.evidence
    low, high = (100 * (math.exp(each) - 1) for each in (found.low, found.high))
    return evidence, f"TPOT {low:+.0f} to {high:+.0f} %"


def make_service(backing: Backing, found: Opened, inventor: Inventor | None, progress: _Progress) -> Service:
    """The service, with what it needs compiled. inventor: makes up tokens, where no model does. progress: told in words
    what is being done. Raises what loading raises."""
    from backends import registry
    from backends.emulation.backend import SimBackend
    from runtime.execution.services import emulated_service, local_service, package_service

    progress("loading")
    if backing.artifact is not None:
        from runtime.execution.package.generate import Package

        package = Package(backing.artifact, backing.backend, trusted=backing.trust_package)
        service: Service = package_service(package, backing.max_queue)
        warmed(service, found, backing, progress)
        return service
    adapter = registry.usable(backing.backend)
    if found.plan is None:
        from runtime.execution.local.engine import EngineConfig

        assert found.checkpoint is not None
        config = EngineConfig(drafts=backing.mtp, prefill_chunk=backing.prefill_chunk, kv=backing.kv)
        service = local_service(
            found.checkpoint, adapter, config, backing.dtype, backing.keep_fp8, backing.pool_tokens, backing.max_queue
        )
    else:
        assert isinstance(adapter, SimBackend) and found.config is not None
        made_up = None if inventor is None else inventor.next_token
        service = emulated_service(
            found.config, found.plan, checkpoint=found.checkpoint, backend=adapter, next_token=made_up,
            time_scale=backing.time_scale, max_queue=backing.max_queue, priced=found.priced,
        )  # fmt: skip
    if inventor is None:
        warmed(service, found, backing, progress)
    return service


def warmed(service: Service, found: Opened, backing: Backing, progress: _Progress) -> None:
    """Has a service compile what requests need first: prompts up to a chunk, and 1, 2, 4, ... requests at once. Raises
    `Failure` where they are not answered."""
    began = time.monotonic()
    most_tokens = min(backing.prefill_chunk, found.limits.positions // 2)
    alone = [(1, length) for length in sorted({min(length, most_tokens) for length in (32, 128, most_tokens)})]
    together = [(count, min(64, most_tokens)) for count in (2, 4, 8, 16, 32, 64, 128, 256) if count <= backing.warm]
    shapes = [*alone, *together] if backing.warm else []
    for at, (count, length) in enumerate(shapes, start=1):
        seconds = time.monotonic() - began
        progress(f"compiling {at} of {len(shapes)} ({count} x {length} tokens), {seconds:.0f} s so far")
        _at_once(service, found, count, length)
    service.warmed_up()


def _at_once(service: Service, found: Opened, count: int, length: int) -> None:
    left, failed = [count], []
    over = threading.Event()

    def deliver(update: Update) -> None:
        if update.error is not None:
            failed.append(update.error)
        if update.finish is not None:
            left[0] -= 1
            if not left[0]:
                over.set()

    size = found.limits.vocab
    jobs = [
        Job(tuple((count * 31 + number * 17 + at) % size for at in range(length)), 4, Sampling())
        for number in range(count)
    ]
    service.submit(jobs, [deliver] * count)
    over.wait()
    if failed:
        raise Failure(f"{found.name} cannot be served: {failed[0]}")
