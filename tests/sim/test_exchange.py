"""An all-to-all over hundreds of devices, each with one copy of one expert."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from backends.emulation.backend import SimBackend
from model import graph
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.graph import Batch
from model.split import Grid, Layout, Slots, moe_layers

STEPS = 3


def one_device(cfg: ModelConfig, weights: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [sequences, vocab] after the last of tokens [sequences, steps], fed one by one."""
    count = len(tokens)
    caches = [
        {row.name: np.zeros((count + 1, 16, *row.shape), np.float32) for row in cache_rows(cfg, kind)}
        for kind in cfg.layers
    ]
    quick = {"xla_backend_optimization_level": 0}
    step = jax.jit(lambda caches, batch: graph.step(cfg, weights, caches, batch), compiler_options=quick)
    table = np.arange(1, count + 1, dtype=np.int32)[:, None]
    logits: Any = None
    for at in range(STEPS):
        batch = Batch(tokens[:, at : at + 1], np.full(count, at, np.int32), np.ones(count, np.int32), table)
        logits, _, caches = step(caches, batch)
    return np.asarray(logits)


@pytest.mark.parametrize("dp", [16, pytest.param(384, marks=pytest.mark.slow)])
def test_every_device_sends_to_every_other(tiny: Checkpoint, checkpoints: dict[str, Checkpoint], dp: int) -> None:
    """A sequence on each, which any of them may serve: the copies of an expert share its tokens."""
    checkpoint = tiny if dp == 384 else checkpoints["gqa"]
    cfg = checkpoint.config
    assert cfg.moe is not None
    rng = np.random.default_rng(0)
    row = tuple(int(e) for e in rng.permutation(np.arange(dp) % cfg.moe.experts))
    grid = Grid.of(cfg, Layout(dp=dp, ep=dp), Slots(1, (row,) * len(moe_layers(cfg))))
    server = SimBackend(mapped=True).cluster(cfg, grid, checkpoint.load("float32", mtp=False)).server(1, 16)
    tokens = rng.integers(0, cfg.vocab_size, (dp, STEPS)).astype(np.int32)
    logits: Any = None
    for at in range(STEPS):
        length, table = np.ones(dp, np.int32), np.ones((dp, 1), np.int32)
        logits, _ = server.step(Batch(tokens[:, at : at + 1], np.full(dp, at, np.int32), length, table))
    expected = one_device(cfg, checkpoint.load("float32", mtp=False), tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)
