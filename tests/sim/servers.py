"""Plans for small models, and what the emulation makes of them beside the CPU backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import hw_profiles
from backends import registry
from backends.emulation.backend import SimBackend
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.config import ModelConfig
from model.hf_config import from_hf
from model.split import Layout
from runtime.deployment.demand import Demand
from runtime.deployment.plan import ModelRef, Plan, config_hash
from runtime.deployment.pool import Experts, profile_of
from runtime.execution.cluster.session import Result, serve
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Completion, Prompt
from runtime.serving import Deployment, Disaggregated
from runtime.simulation.build import Built, speculation
from runtime.simulation.planned import Deployed, spec_of
from tests.engine.conftest import CONFIGS, random_weights
from tests.plans import formats, pool_of
from tests.serving.pricers import LinearPricer

CHIP = "h200-sxm"
ATOL = 1e-4
# A dense layer and one of experts; of the sparse model two, of which one has no indexer: a selection crosses a stage.
RANDOM = Path(__file__).parents[1] / "data" / "random-glm5"
SMALL: dict[str, dict[str, Any]] = {
    "dsa": {**CONFIGS["dsa"], "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
    "mla": CONFIGS["mla"],
    "gqa": CONFIGS["gqa"],
}


def make_checkpoint(folder: Path, family: str) -> Checkpoint:
    """A random checkpoint of a small model."""
    cfg = from_hf(SMALL[family])
    save(folder / family, SMALL[family], random_weights(cfg))
    return Checkpoint(folder / family)


def placement(cfg: ModelConfig, layout: Layout, redundant: int, seed: int) -> Experts | None:
    """Experts in shuffled slots, with copies of some of them in `redundant` more slots a device."""
    if not layout.by_expert or cfg.moe is None:
        return None
    rng, count = np.random.default_rng(seed), cfg.moe.experts
    per_device = count // layout.ep + redundant

    def row() -> tuple[int, ...]:
        extra = rng.integers(0, count, redundant * layout.ep)
        return tuple(int(e) for e in rng.permutation(np.concatenate([np.arange(count), extra])))

    return Experts(per_device, tuple(row() for kind in cfg.layers if kind.ffn == "moe"))


def plan_of(
    cfg: ModelConfig,
    layout: Layout,
    redundant: int = 0,
    seed: int = 0,
    scheme: str = "f32",
    pages: int | None = None,
    replicas: int = 1,
    drafts: int = 0,
    **settings: Any,
) -> Plan:
    """A plan for a layout. pages: of each rank, if fewer than fit. drafts: guessed a step. settings: of the
    engine."""
    engine = settings.pop("engine", "sglang")
    pool = pool_of(
        cfg, layout, hw_profiles.load(CHIP), formats(scheme), engine=engine, replicas=replicas, settings=settings,
        experts=placement(cfg, layout, redundant, seed), redundant_slots=redundant, drafts=drafts,
    )  # fmt: skip
    if pages is not None:
        pool = dataclasses.replace(pool, devices=tuple(dataclasses.replace(d, kv_pages=pages) for d in pool.devices))
    return Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), (pool,))


def prompts_of(cfg: ModelConfig, lengths: Sequence[int], max_tokens: Sequence[int], seed: int = 0) -> list[Prompt]:
    """Random prompts of those lengths whose logits are kept."""
    rng = np.random.default_rng(seed)
    return [
        Prompt(tuple(int(t) for t in rng.integers(0, cfg.vocab_size, length)), most, keep_logits=True)
        for length, most in zip(lengths, max_tokens, strict=True)
    ]


@cache
def _engine(path: Path) -> Any:
    shapes = EngineConfig(page_size=16, least_batch=4, least_chunk=64, least_context=256)
    return load_engine(Checkpoint(path), registry.usable("cpu"), shapes, "float32")


def reference(checkpoint: Checkpoint, requests: list[Prompt]) -> list[Completion]:
    """What the CPU backend makes of the requests, on one device."""
    return _engine(checkpoint.path).generate(requests)


def emulated(checkpoint: Checkpoint, plan: Plan, requests: list[Prompt], mapped: bool | None = True) -> Result:
    """What the plan's devices make of them, by default as axes on one, which needs no XLA host devices. Steps take
    what a made-up pricer says: here tokens are tested, not prices."""
    return serve(checkpoint, SimBackend(mapped), plan, requests, clock=ticking(checkpoint.config, plan))


def ticking(cfg: ModelConfig, plan: Plan) -> Deployed:
    """A clock that needs no tables."""
    specs = [spec_of(cfg, pool, profile_of(pool)) for pool in plan.pools]
    pools = [
        Deployment(
            spec.engine,
            LinearPricer(),
            pool_tokens=pool.pool_tokens,
            devices=len(pool.devices),
            replicas=pool.replicas,
            ranks=pool.layout.dp,
            speculation=speculation(pool.drafts) if pool.role != "prefill" else None,
        )
        for spec, pool in zip(specs, plan.pools, strict=True)
    ]
    whole = pools[0] if len(pools) == 1 else Disaggregated(pools[0], pools[1], 1.0, 1e9)
    built = (Built(spec, None, LinearPricer(), pool) for spec, pool in zip(specs, pools, strict=True))  # type: ignore[arg-type]
    return Deployed(tuple(built), whole, 1)


def logit_error(ours: Completion, theirs: Completion) -> float:
    """The largest difference of two answers' logits."""
    assert ours.logits is not None and theirs.logits is not None and ours.logits.shape == theirs.logits.shape
    return float(np.abs(ours.logits - theirs.logits).max())


def assert_same(found: list[Completion], expected: list[Completion]) -> float:
    """Equal tokens, logits within `ATOL`; the largest difference."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
        if theirs.logits is not None:
            worst = max(worst, logit_error(ours, theirs))
    assert worst <= ATOL, worst
    return worst
