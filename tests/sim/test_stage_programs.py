"""What runs on a stage's devices is what its backend exported, with the backend's own kernels in it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

from backends.cpu import CpuBackend
from backends.emulation.backend import SimBackend
from backends.emulation.number_formats import NumberFormats
from backends.interface import Artifact, Capabilities, Program
from backends.spmd.cluster import Cluster
from backends.spmd.processes import Processes
from backends.xla import XlaBackend
from model import graph
from model.cache import cache_rows
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.graph import Batch, Mode
from model.split import Grid, Layout
from tests.plans import formats

Checkpoints = dict[str, Checkpoint]
PAGE, LENGTH = 16, 40
EXPANDED = Mode("expanded")


class Plainly(CpuBackend):
    """Without kernels of its own."""

    def lowerings(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Artifact]:
    """The artifacts that are made in a test."""
    found: list[Artifact] = []
    plain = XlaBackend.export

    def kept(self: XlaBackend, program: Program) -> Artifact:
        found.append(plain(self, program))
        return found[-1]

    monkeypatch.setattr(XlaBackend, "export", kept)
    return found


def composites(artifact: Artifact) -> set[str]:
    """The ops that are left to their decompositions."""
    text = export.deserialize(bytearray(artifact.payload)).mlir_module()
    return set(re.findall(r'stablehlo\.composite "(glm\.\w+)"', text))


def on_processes(checkpoint: Checkpoint, backend: XlaBackend, layout: Layout = Layout()) -> Cluster:
    """All of the layout's devices are this process's one."""
    grid = Grid.of(checkpoint.config, layout)
    devices = jax.devices("cpu")[:1] * grid.devices
    return Processes(backend, devices, "float32").cluster(
        checkpoint.config, grid, checkpoint.load("float32", mtp=False), 0
    )


def prompt(cfg: ModelConfig) -> Batch:
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, LENGTH), dtype=np.int32)
    pages = -(-LENGTH // PAGE)
    table = np.arange(1, pages + 1, dtype=np.int32)[None]
    return Batch(tokens, np.zeros(1, np.int32), np.full(1, LENGTH, np.int32), table)


def logits_of(cluster: Cluster) -> np.ndarray:
    batch = prompt(cluster.cfg)
    return cluster.server(batch.page_table.shape[1], PAGE).step(batch, EXPANDED)[0]


def meant(checkpoint: Checkpoint) -> np.ndarray:
    """The logits of the graph's own ops."""
    cfg, batch = checkpoint.config, prompt(checkpoint.config)
    size = (batch.page_table.shape[1] + 1, PAGE)
    caches = [
        {row.name: np.zeros((*size, *row.shape), np.float32) for row in cache_rows(cfg, kind)} for kind in cfg.layers
    ]
    weights = checkpoint.load("float32", mtp=False)

    def step(weights: Any, caches: Any, batch: Batch) -> Any:
        return graph.step(cfg, weights, caches, batch, EXPANDED).logits

    quick = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(step, compiler_options=quick)(weights, caches, batch))


def test_kernels_of_the_backend_are_in_the_program(checkpoints: Checkpoints, exported: list[Artifact]) -> None:
    """And where it has none, the ops are."""
    checkpoint = checkpoints["dsa"]
    found, plain = (logits_of(on_processes(checkpoint, backend)) for backend in (CpuBackend(), Plainly()))
    own, meanings = map(composites, exported)
    kernels = set(CpuBackend().lowerings())
    assert kernels <= meanings and own == meanings - kernels
    assert all(artifact.mesh == {"dp": 1, "tp": 1} for artifact in exported)
    np.testing.assert_allclose(found, plain, atol=1e-4)


def test_processes_hold_weights_as_their_backend_asks(checkpoints: Checkpoints, exported: list[Artifact]) -> None:
    """And their program takes them so."""

    class Turned(CpuBackend):
        def capabilities(self) -> Capabilities:
            return dataclasses.replace(super().capabilities(), out_in=frozenset({"glm.linear", "glm.expert_ffn"}))

    plain, turned = (on_processes(checkpoints["gqa"], backend) for backend in (CpuBackend(), Turned()))
    layer = turned.weights[0]["layers"][-1]
    orders = {name: layer[name].format.layout.major_to_minor for name in ("o", "router", "experts_gate_up")}
    assert orders == {"o": (1, 0), "router": (0, 1), "experts_gate_up": (0, 2, 3, 1)}
    np.testing.assert_allclose(logits_of(turned), logits_of(plain), atol=1e-4)
    assert [set(artifact.orders) > {None} for artifact in exported] == [True, False]


def test_a_replaced_kernel_is_what_runs(checkpoints: Checkpoints) -> None:
    class Silent(CpuBackend):
        def lowerings(self) -> dict[str, Any]:
            return {**super().lowerings(), "glm.rms_norm": lambda x, weight, *, eps: x * 0.0}

    assert not logits_of(on_processes(checkpoints["gqa"], Silent())).any()


def test_a_selection_crosses_stages_as_the_contract_has_it(checkpoints: Checkpoints, exported: list[Artifact]) -> None:
    """Within a program the CPU's kernels pass it on as a mask."""
    checkpoint = checkpoints["dsa"]
    found = logits_of(on_processes(checkpoint, CpuBackend(), Layout(pp=3)))
    second = export.deserialize(bytearray(exported[1].payload))
    *_, carried = jax.tree.unflatten(second.in_tree, second.in_avals)[0]
    assert checkpoint.config.indexer is not None
    assert carried.selected.shape == (1, LENGTH, checkpoint.config.indexer.topk)
    assert carried.selected.dtype == np.int32
    np.testing.assert_allclose(found, meant(checkpoint), atol=1e-4)


@pytest.mark.slow
def test_number_formats_come_in_by_the_same_door(checkpoints: Checkpoints, exported: list[Artifact]) -> None:
    """What emulated devices run rounds where their chip does, and all of it was exported."""
    cfg = checkpoints["gqa"].config
    grid, clusters = Grid.of(cfg, Layout(tp=2)), []
    for numbers in (None, NumberFormats(cfg, formats("w8a8"))):
        weights = checkpoints["gqa"].load("float32", keep_fp8=numbers is not None, mtp=False)
        clusters.append(SimBackend(mapped=True).cluster(cfg, grid, weights, numbers))
        logits_of(clusters[-1])
    assert [len(cluster._programs) for cluster in clusters] == [1, 1] and len(exported) == 2
    texts = [export.deserialize(bytearray(artifact.payload)).mlir_module() for artifact in exported]
    assert ["stablehlo.round_nearest_even" in text for text in texts] == [False, True]
    assert not any(map(composites, exported))  # they have no batching rule
