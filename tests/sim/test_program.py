"""The program that runs on a device is the program that is priced: the same ops and collectives on the same local
shapes, in the same order, for every stage of every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backends.emulation.backend import SimBackend
from backends.emulation.memory import Limits, account
from backends.spmd.cluster import Cluster
from backends.spmd.stages import Held
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.graph import Batch, Carried, Mode
from model.split import Layout
from runtime.deployment.ledger import stage_kv_bytes_per_token, stage_weight_bytes
from runtime.execution.cluster.deploy import check_memory, grid_of
from runtime.pricing.oplist import OpList, Sizes
from runtime.pricing.trace import _COLLECTIVES, _POOL_PAGES, PAGE_SIZE, trace
from tests.plans import formats
from tests.sim.servers import plan_of

Shapes = list[tuple[int, ...]]
Seen = list[tuple[str, Shapes, Shapes, tuple[str, ...]]]
LAYOUTS = (Layout(tp=2, dp=2), Layout(tp=2, dp=4, ep=8, pp=3))
MORE = (Layout(tp=8, ep=8, pp=2), Layout(), Layout(tp=4), Layout(dp=8, ep=8), Layout(dp=4, pp=6))


def executed(cfg: ModelConfig, cluster: Cluster, number: int, mode: Mode, sizes: Sizes) -> Seen:
    """What one device of a stage runs, on the shares that were placed there."""
    server = cluster.server(_POOL_PAGES - 1, PAGE_SIZE)

    def local(held: Held) -> Any:
        return jax.ShapeDtypeStruct(held.array.shape[len(held.axes) :], held.array.dtype)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    shares = jax.tree.map(
        local, (cluster.weights[number], server.caches[number]), is_leaf=lambda x: isinstance(x, Held)
    )
    batch = Batch(ints(sizes.b, sizes.t), ints(sizes.b), ints(sizes.b), ints(sizes.b, sizes.p))
    before: tuple[Any, ...] = ()
    span = cluster.grid.stages[number]
    if span.start:
        x = jax.ShapeDtypeStruct((sizes.b, sizes.t, cfg.hidden_size), jnp.float32)
        sparse = cfg.indexer is not None and sizes.p * PAGE_SIZE > cfg.indexer.topk
        shared = sparse and cfg.layers[span.start].indexer == "shared"
        before = (Carried(x, ints(sizes.b, sizes.t, cfg.indexer.topk) if shared and cfg.indexer else None),)
    axes = [(axis, size) for axis, size in (("dp", cluster.grid.dp), ("tp", cluster.grid.tp)) if size > 1]
    jaxpr = jax.make_jaxpr(cluster.body(number, mode), axis_env=axes)(*shares, batch, *before)
    return list(_walk(jaxpr.jaxpr))


def _walk(jaxpr: Any) -> Iterator[tuple[str, Shapes, Shapes, tuple[str, ...]]]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("jit", "pjit"):
            yield from _walk(eqn.params["jaxpr"].jaxpr)
        elif name == "composite" or name in _COLLECTIVES:
            found = eqn.params.get("axes", eqn.params.get("axis_name", ()))
            axes = tuple(found) if isinstance(found, tuple | list) else (found,)
            name = eqn.params["name"] if name == "composite" else _COLLECTIVES[name]
            yield name, [v.aval.shape for v in eqn.invars], [v.aval.shape for v in eqn.outvars], axes


def priced(programs: list[OpList], sizes: Sizes) -> Seen:
    return [
        (op.name, [x.at(sizes) for x in op.inputs], [x.at(sizes) for x in op.outputs], op.axes)
        for program in programs
        for op in program.ops
        if op.name.startswith("glm.") or op.axes
    ]


PHASES = {"prefill": Sizes(3, 5, 1), "decode": Sizes(7, 1, 3)}
FAST = (("prefill", LAYOUTS[0]), ("decode", LAYOUTS[1]))


@pytest.mark.parametrize(
    ("phase", "layout"),
    [
        pytest.param(phase, each, id=f"{phase}-{each.name}", marks=() if (phase, each) in FAST else pytest.mark.slow)
        for phase in PHASES
        for each in (*LAYOUTS, *MORE)
    ],
)
def test_what_runs_is_what_is_priced(tiny: Checkpoint, phase: Any, layout: Layout) -> None:
    cfg, sizes = tiny.config, PHASES[phase]
    assert cfg.indexer is not None
    sparse = sizes.p * PAGE_SIZE > cfg.indexer.topk
    traced = trace(cfg, layout, phase, sparse, mtp=False)
    (pool,) = plan_of(cfg, layout).pools
    cluster = SimBackend(mapped=True).cluster(cfg, grid_of(cfg, pool), tiny.load("float32", mtp=False))
    mode = Mode("expanded" if phase == "prefill" else "absorbed", "all")
    for number, span in enumerate(layout.stage_layers(cfg.num_layers)):
        expected = [traced.embed] if number == 0 else []
        expected += [traced.layers[cfg.layers[layer]] for layer in span]
        expected += [traced.head] if number == layout.pp - 1 else []
        found, wanted = executed(cfg, cluster, number, mode, sizes), priced(expected, sizes)
        assert [op[0] for op in found] == [op[0] for op in wanted]
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours == theirs


@pytest.mark.parametrize("scheme", ["f32", "bf16", "fp8", "w4a8"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE], ids=lambda layout: layout.name)
def test_bytes_counted_are_the_ledgers(tiny: Checkpoint, layout: Layout, scheme: str) -> None:
    """Weights placed one by one add up to what the planner's ledger has for the stage, copies of experts included."""
    cfg, held = tiny.config, formats(scheme)
    redundant = 1 if layout.by_expert else 0
    (pool,) = plan_of(cfg, layout, redundant).pools
    limits = Limits("chip", 1e12, {}, held, 11, 16)
    for stage, memory in enumerate(account(cfg, grid_of(cfg, pool), limits)):
        ledger = stage_weight_bytes(cfg, layout, held, stage, False, redundant)
        assert memory.held["weights"] == pytest.approx(sum(ledger.values()))
        pages = stage_kv_bytes_per_token(cfg, layout, held, stage, False) * 16 * 11
        assert memory.held["KV pages"] == pages
        assert memory.free_bytes == 1e12 - sum(memory.held.values())


def test_a_plans_devices_are_counted_as_planned(tiny: Checkpoint) -> None:
    """What the emulation counts on a device is what the plan's ledger has: nothing is left over but its free bytes."""
    plan = plan_of(tiny.config, Layout(tp=2, dp=4, ep=8, pp=3), 1, scheme="fp8")
    (pool,) = plan.pools
    (stages,) = check_memory(tiny.config, plan)
    for device in pool.devices:
        memory = stages[device.stage]
        pages = sum(device.kv_page_bytes.values()) * device.kv_pages
        assert memory.held["KV pages"] == pytest.approx(pages) == pytest.approx(device.ledger.kv_bytes)
        assert memory.free_bytes == pytest.approx(device.ledger.free_bytes, rel=1e-6)


def test_placed_weights_are_all_there(tiny: Checkpoint) -> None:
    """Every share of every weight, put together again, is the weight."""
    cfg, layout = tiny.config, Layout(tp=2, dp=2, ep=4, pp=2)
    (pool,) = plan_of(cfg, layout).pools
    cluster = SimBackend(mapped=True).cluster(cfg, grid_of(cfg, pool), tiny.load("float32", mtp=False))
    whole = tiny.load("float32", mtp=False)
    for number, span in enumerate(cluster.grid.stages):
        for layer, shares in zip(span, cluster.weights[number]["layers"], strict=True):
            for name, value in whole["layers"][layer].items():
                held = shares[name]
                assert np.prod(held.array.shape) == value.size, name
                total = np.sum(np.asarray(held.array), dtype=np.float64)
                np.testing.assert_allclose(total, np.sum(value, dtype=np.float64), rtol=1e-6, atol=1e-6)
