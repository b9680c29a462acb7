"""Matrices and cache rows that a plan has in FP8 are kept so on the devices of several processes, where the backend
has them: here devices of one process stand in, which hold and compute the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hw_profiles
from backends import registry
from backends.cpu import CpuBackend
from backends.interface import Capabilities
from backends.spmd.cluster import Cluster, Plain
from backends.spmd.processes import Processes
from backends.spmd.stages import Mapped
from foundation.errors import UsageError
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.config import ModelConfig
from model.formats import CacheFormats
from model.hf_config import from_hf
from model.split import Grid, Layout
from runtime.deployment.demand import Demand
from runtime.deployment.plan import ModelRef, Plan, config_hash
from runtime.deployment.pool import Pool
from runtime.execution.cluster.session import check_moves, clusters_of, executor_of, pages_there, serve
from runtime.execution.local.engine import EngineConfig
from runtime.execution.local.load import load_engine
from runtime.execution.local.request import Completion, Prompt
from runtime.execution.serve_all import serve_all
from runtime.serving import Deployment
from tests.engine.conftest import CONFIGS, random_weights
from tests.plans import formats, pool_of
from tests.sim.servers import CHIP, ticking


class Here(Processes):
    """Stands in for the devices of several processes."""

    def __init__(self, backend: CpuBackend, dtype: str = "float32"):
        super().__init__(backend, (), dtype)

    def cluster(
        self,
        cfg: ModelConfig,
        grid: Grid,
        weights: Mapping[str, Any],
        first: int,
        drafts: int = 0,
        rows: CacheFormats = CacheFormats(),
    ) -> Cluster:
        stages = [Mapped(grid, self.backend) for _ in grid.stages]
        return Cluster(cfg, grid, weights, self.backend, stages, Plain(self.dtype), drafts, rows)


class Wide(CpuBackend):
    """A backend that has nothing in FP8."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), fp8_weights=False, cache_rows=frozenset())


def made(folder: Path, family: str) -> Checkpoint:
    raw = CONFIGS[family]
    save(folder / family, raw, random_weights(from_hf(raw)), fp8=True)
    return Checkpoint(folder / family)


def pool_for(cfg: ModelConfig, layout: Layout, kv: str = "fp8", **more: Any) -> Pool:
    return pool_of(cfg, layout, hw_profiles.load(CHIP), formats("fp8", kv), **{"engine": "glm5", **more})


def answers(checkpoint: Checkpoint, pool: Pool, asked: list[Prompt]) -> tuple[list[Completion], set[str]]:
    """What a server of a pool answers, and the types of its caches."""
    cfg = checkpoint.config
    (cluster,) = clusters_of(checkpoint, Here(CpuBackend()), pool)
    assert "float8_e4m3fn" in types([stage["layers"] for stage in cluster.weights])
    executor: Any = executor_of(cluster, 33, pool)
    plan = Plan(ModelRef(cfg.name, config_hash(cfg)), Demand(), (pool,))
    deployment = ticking(cfg, plan).deployment
    assert isinstance(deployment, Deployment)
    found, *_ = serve_all(asked, deployment, executor, lambda: 0.0)
    return found, types((executor.server.caches, executor.server.mtp_caches))


def types(held: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(held)}


@pytest.mark.parametrize(
    ("family", "layout", "drafts"),
    [
        ("gqa", Layout(tp=2), 0),
        pytest.param("dsa", Layout(tp=2, dp=2, ep=4), 0, marks=pytest.mark.slow),
        pytest.param("gqa", Layout(tp=2, pp=2), 0, marks=pytest.mark.slow),
        pytest.param("mla", Layout(tp=4), 0, marks=pytest.mark.slow),
        pytest.param("dsa", Layout(pp=2), 2, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_one_device_that_keeps_the_same(
    tmp_path: Path, family: str, layout: Layout, drafts: int
) -> None:
    checkpoint = made(tmp_path, family)
    asked = [Prompt(tuple(range(9, 9 + length)), 6, keep_logits=True) for length in (37, 5, 21)]
    found, kept = answers(checkpoint, pool_for(checkpoint.config, layout, drafts=drafts), asked)
    assert kept == {"float8_e4m3fn" if family == "gqa" else "uint8"}
    config = EngineConfig(page_size=16, least_batch=4, least_chunk=64, least_context=256, kv="fp8", drafts=drafts)
    alone = load_engine(checkpoint, registry.usable("cpu"), config, "float32", keep_fp8=True).generate(asked)
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logits is not None and theirs.logits is not None
        apart = np.abs(ours.logits - theirs.logits).max(axis=1)  # a row may round to the other side
        assert np.median(apart) < 1e-4 and apart.max() < 0.2 * np.abs(theirs.logits).max()


@pytest.mark.slow
def test_index_keys_alone_may_be_records(tmp_path: Path) -> None:
    """As most engines keep them beside latents in bfloat16, on Hopper."""
    checkpoint = made(tmp_path, "dsa")
    asked = [Prompt(tuple(range(9, 9 + length)), 6) for length in (37, 5, 21)]
    found = [
        answers(checkpoint, pool_for(checkpoint.config, layout, "bf16", engine="sglang"), asked)
        for layout in (Layout(), Layout(tp=4))
    ]
    assert [kept for _, kept in found] == [{"float32", "uint8"}] * 2
    assert [each.token_ids for each in found[0][0]] == [each.token_ids for each in found[1][0]]


@pytest.mark.slow
def test_fewer_pages_are_shared_out_as_they_are(tmp_path: Path) -> None:
    """Rows in float32 of a plan that has bfloat16: half the pages, and the tokens of one device."""
    checkpoint = made(tmp_path, "gqa")
    pool = pool_for(checkpoint.config, Layout(), "bf16", settings={"max_running_requests": 6})
    pool = dataclasses.replace(pool, devices=tuple(dataclasses.replace(each, kv_pages=20) for each in pool.devices))
    plan = Plan(ModelRef(checkpoint.config.name, config_hash(checkpoint.config)), Demand(), (pool,))
    assert pages_there(checkpoint.config, Here(CpuBackend()), pool) == 10
    asked = [Prompt(tuple(range(9 + at, 49 + at)), 8) for at in range(6)]  # three pages each
    served = serve(checkpoint, Here(CpuBackend()), plan, asked, clock=ticking(checkpoint.config, plan))
    alone = load_engine(checkpoint, registry.usable("cpu"), EngineConfig(), "float32", keep_fp8=True).generate(asked)
    assert [each.token_ids for each in served.outcome.completions] == [each.token_ids for each in alone]


@pytest.mark.parametrize(("backend", "dtype"), [(CpuBackend(), "bfloat16"), (Wide(), "bfloat16"), (Wide(), "float32")])
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_caches_take_no_more_than_the_plan_has_for_them(
    tmp_path: Path, backend: CpuBackend, dtype: str, kv: str
) -> None:
    """Where rows are kept wider than planned there are fewer pages; weights are then plain, too."""
    checkpoint = made(tmp_path, "dsa")
    pool = pool_for(checkpoint.config, Layout(), kv)
    pool = dataclasses.replace(pool, devices=tuple(dataclasses.replace(each, kv_pages=60) for each in pool.devices))
    there = Here(backend, dtype)
    (cluster,) = clusters_of(checkpoint, there, pool)
    pages = pages_there(checkpoint.config, there, pool)
    executor: Any = executor_of(cluster, pages, pool)
    each = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.server.caches)) / (pages + 1)
    planned = sum(pool.devices[0].kv_page_bytes.values())
    assert pages <= 60 and (pages == 60 or isinstance(backend, Wide)) and each * pages <= planned * 60
    assert each * (pages + 1) > planned * 60 or pages == 60  # none is left out
    assert ("float8_e4m3fn" in types(cluster.weights)) == (not isinstance(backend, Wide))


def test_rows_that_move_are_kept_alike() -> None:
    """Those that the model has, in what they are kept in there, whatever they are called."""
    cfg = from_hf(CONFIGS["dsa"])
    ref = ModelRef(cfg.name, config_hash(cfg))
    plan = Plan(ref, Demand(), (pool_for(cfg, Layout(), "bf16"), pool_for(cfg, Layout(), "fp8")))
    check_moves(cfg, Here(Wide()), plan)  # which keeps both as they are computed
    with pytest.raises(UsageError, match="keep latent rows as bf16 and fp8_ds_mla, .* one --kv"):
        check_moves(cfg, Here(CpuBackend()), plan)
    heads = from_hf(CONFIGS["gqa"])
    of = [
        pool_of(heads, Layout(), hw_profiles.load(chip), formats("bf16"), engine="vllm")
        for chip in (CHIP, "a100-sxm-80gb")
    ]
    assert of[0].formats.cache != of[1].formats.cache  # in index keys, which it has not
    check_moves(heads, Here(CpuBackend()), Plan(ModelRef(heads.name, config_hash(heads)), Demand(), tuple(of)))
