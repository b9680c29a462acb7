"""From a checkpoint directory and a backend to a ready engine."""

from __future__ import annotations

import dataclasses
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from backends.interface import Backend
from foundation.errors import CapacityError, UsageError
from model.cache import cache_rows, held_row, narrow_formats
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.formats import CacheFormats
from model.weights import Weight
from runtime.deployment.engines import Circumstances, Engine
from runtime.execution.local.engine import EngineConfig, LocalEngine
from runtime.execution.local.programs import Programs

MEMORY_FRACTION = 0.85  # of a device's memory, for weights and pages; the rest is for activations


def embedded_checkpoint() -> Path:
    """The tiny checkpoint that ships with the project."""
    return Path(str(resources.files("runtime") / "data" / "tiny-glm5"))


def load_engine(
    checkpoint: Checkpoint,
    backend: Backend,
    config: EngineConfig = EngineConfig(),
    dtype: str | None = None,
    keep_fp8: bool = False,
    pool_tokens: int | None = None,
) -> LocalEngine:
    """Loads the weights onto the backend's device and sizes the page pool.

    dtype: what to compute in; the backend's preference by default. keep_fp8: matrices stored in FP8 stay
    so. pool_tokens: overrides the pool size, which otherwise fills what the device has left, or is the
    config's where the device does not tell its memory.
    """
    offered = backend.capabilities()
    dtype = dtype or offered.preferred_dtype
    if dtype not in offered.dtypes:
        raise UsageError(f"backend {backend.name} computes in {', '.join(sorted(offered.dtypes))}, not in {dtype}")
    if keep_fp8 and not offered.fp8_weights:
        raise UsageError(f"backend {backend.name} has no FP8 here; drop --keep-fp8 to dequantise the weights")
    rows = rows_for(checkpoint.config, backend, config.described, dtype, config.kv)
    if config.drafts:
        require_mtp(checkpoint)
    if pool_tokens is not None:
        memory = offered.devices[0].memory_bytes
        _require_room(checkpoint.config, pool_tokens, dtype, config.drafts > 0, memory, rows)
    weight_bytes = 0

    def put(weight: Weight, array: Any) -> Any:
        nonlocal weight_bytes
        weight_bytes += array.nbytes
        return backend.put(array, offered.order(weight))

    weights = checkpoint.load(dtype, keep_fp8, put, mtp=config.drafts > 0)
    if pool_tokens is None and offered.devices[0].memory_bytes:
        spare = int(offered.devices[0].memory_bytes * MEMORY_FRACTION) - weight_bytes
        row = token_bytes(checkpoint.config, dtype, config.drafts > 0, rows)
        engine = config.described
        pool_tokens = min(spare // row, engine.max_running_requests * checkpoint.config.max_positions)
        if pool_tokens < engine.page_tokens:
            raise CapacityError(
                f"the weights take {weight_bytes / 1e9:.1f} GB of the device's "
                f"{offered.devices[0].memory_bytes / 1e9:.1f} GB, which leaves no room for the cache"
            )
    if pool_tokens is not None:
        config = dataclasses.replace(config, pool_tokens=pool_tokens)
    page_tokens = config.described.page_tokens
    programs = Programs(
        backend, checkpoint.config, weights, config.pages, page_tokens, dtype, drafts=config.drafts, rows=rows
    )
    return LocalEngine(checkpoint.config, programs, config)


def rows_for(cfg: ModelConfig, backend: Backend, engine: Engine, dtype: str, kv: str | None) -> CacheFormats:
    """What a backend keeps a model's cache rows in. kv: "fp8", whose rows are the engine's (its section `cache`), or
    "bf16", which is as they are computed. Raises `UsageError` for what is neither, or what the backend has not."""
    if kv in (None, "bf16"):
        if kv and dtype != "bfloat16":
            raise UsageError(f"--kv bf16 is of a model that computes in bfloat16, not in {dtype}; leave it out")
        return CacheFormats()
    if kv != "fp8":
        raise UsageError(f"--kv {kv}: backend {backend.name} keeps a cache in bf16 or fp8")
    at = Circumstances(sparse=cfg.sparse, kv=kv)
    rules = engine.cache
    found = CacheFormats(rules.latent.under(at), rules.index.under(at), rules.heads.under(at))
    if missing := sorted(narrow_formats(cfg, found) - backend.capabilities().cache_rows):
        raise UsageError(f"--kv {kv}: backend {backend.name} keeps no rows of {', '.join(missing)} here; leave it out")
    return found


def require_mtp(checkpoint: Checkpoint) -> None:
    """Raises `UsageError` where a checkpoint has nothing to draft with."""
    if checkpoint.has_mtp:
        return
    why = "holds no MTP layer"
    if checkpoint.undeclared_mtp:
        why = "holds an MTP layer that its config.json does not declare (num_nextn_predict_layers)"
    raise UsageError(f"{checkpoint.path} {why}: --mtp needs one")


def _require_room(
    cfg: ModelConfig, pool_tokens: int, dtype: str, mtp: bool, memory_bytes: int | None, rows: CacheFormats
) -> None:
    """Raises `CapacityError` for a pool larger than a device's memory, or this host's where that is not told."""
    held = memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = pool_tokens * token_bytes(cfg, dtype, mtp, rows)
    if needed > held:
        raise CapacityError(
            f"--pool-tokens {pool_tokens:,} takes {needed / 1e9:,.1f} GB of cache, and there are {held / 1e9:,.1f} GB "
            "of memory; ask for fewer"
        )


def token_bytes(cfg: ModelConfig, dtype: str, mtp: bool, rows: CacheFormats = CacheFormats()) -> int:
    """Bytes of cache that one token takes over all layers, computed in `dtype` and kept in `rows`."""
    kinds = list(cfg.layers) + [cfg.mtp_type] * (cfg.mtp_layers if mtp else 0)
    held = [held_row(cfg, row, rows, dtype) for kind in kinds for row in cache_rows(cfg, kind)]
    return sum(jnp.dtype(kept).itemsize * math.prod(shape) for shape, kept in held)
