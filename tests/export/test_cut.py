"""What a model is cut into, and that the pieces put together are the whole."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import lax

from backends.toolchains.cut import Exchange, cut
from backends.toolchains.walker import Graph
from model.formats import SCHEMES
from model.hf_config import load_config
from model.split import Grid, Layout
from runtime.deployment.manifest import Gear
from runtime.execution.package.executor import executor
from runtime.execution.package.runner import collective
from runtime.porting.export import options as cutting
from runtime.porting.export import units


def what(name: str, layout: Layout = Layout(), dtype: str = "bfloat16") -> units.Cut:
    cfg = load_config(name)
    return units.Cut(cfg, cutting.from_layout(cfg, layout).grid, dtype, SCHEMES["bf16"], 64, 65)


def names(chain: units.Chain) -> list[str]:
    return [link.name if isinstance(link, Graph) else f"{link.kind} {link.axis}" for link in chain]


def test_one_device_has_one_graph_a_unit() -> None:
    found = units.units(what("glm-5.2"), "decode", Gear(1, 1, 64))
    assert set(found) == {
        "view",
        "embed",
        "mla-full-indexer-dense",
        "mla-full-indexer-moe",
        "mla-shared-indexer-moe",
        "mtp-mla-full-indexer-moe",
        "head",
    }
    assert all(names(chain) == [unit] for unit, chain in found.items())
    (shared,), (full,) = found["mla-shared-indexer-moe"], found["mla-full-indexer-moe"]
    assert isinstance(shared, Graph) and isinstance(full, Graph)
    assert "selected" in {p.name for p in shared.inputs} and "cache.index" not in {p.name for p in shared.inputs}
    assert "selected.out" in {p.name for p in full.outputs} and full.aliases["cache.index.out"] == "cache.index"


def test_where_devices_must_talk() -> None:
    found = units.units(what("glm-5", Layout(tp=8)), "decode", Gear(1, 1, 64))
    layer = [
        "mla-full-indexer-moe.0",
        "all_reduce tp",
        "mla-full-indexer-moe.1",
        "all_reduce tp",
        "mla-full-indexer-moe.2",
    ]
    assert names(found["mla-full-indexer-moe"]) == layer
    assert names(found["embed"]) == ["embed", "all_reduce tp"] and names(found["head"])[-1] == "all_gather tp"
    across = names(
        units.units(what("glm-5", Layout(tp=2, dp=4, ep=8)), "decode", Gear(4, 1, 64))["mla-full-indexer-moe"]
    )
    assert across.count("all_to_all dp") == 4, "tokens, slots and weights out, results back"


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, dp=2, ep=4)], ids=lambda layout: layout.name)
def test_every_value_is_made_before_it_is_read(layout: Layout) -> None:
    """The wiring by names: a chain reads the unit's inputs and what an earlier link made; outputs are made once."""
    for unit, chain in units.units(what("glm-5.2", layout), "prefill", Gear(2, 64, 64)).items():
        made: set[str] = set()
        for link in chain:
            reads = link.inputs if isinstance(link, Graph) else [link.value]
            writes = link.outputs if isinstance(link, Graph) else [link.result]
            assert all(p.name in made for p in reads if p.name.startswith("mid.") or p.name.endswith(".out")), unit
            assert not made & {p.name for p in writes}, unit
            made |= {p.name for p in writes}
        assert any(name.endswith(".out") for name in made), unit


def test_weights_are_those_of_the_checkpoint() -> None:
    """Every weight input has a reference, and a device's parts make up the whole."""
    for layout in (Layout(), Layout(tp=4, dp=2, ep=8), Layout(tp=4, dp=2)):
        cut_ = what("glm-5", layout)
        for unit, chain in units.units(cut_, "decode", Gear(1, 1, 64)).items():
            refs = {r.name: r for owner in (None, cut_.unit_types.get(unit)) for r in units.weight_refs(cut_, owner)}
            for link in chain:
                for p in link.inputs if isinstance(link, Graph) else ():
                    if p.name.startswith(("w.", "outer.")):
                        assert (refs[p.name].shape, refs[p.name].dtype) == (p.shape, p.dtype)
            for ref in refs.values():
                ways = [int(np.prod([cut_.axes.get(a, 1) for a in axes], dtype=int)) for axes in ref.split]
                assert tuple(n // k for n, k in zip(ref.whole, ways, strict=True)) == ref.shape, ref


def test_cut_collectives_mean_what_xla_means() -> None:
    """A small program with each collective: its cut pieces on 4 ranks against `vmap` with the axis."""

    def program(x: jax.Array) -> jax.Array:
        rank = lax.axis_index("tp")
        x = lax.psum(x * (rank + 1).astype(x.dtype), "tp")
        x = lax.all_to_all(x + rank.astype(x.dtype), "tp", 0, 0, tiled=True)
        x = lax.all_gather(x, "tp", axis=1, tiled=True)
        return lax.psum_scatter(x * 2, "tp", scatter_dimension=0, tiled=True) + lax.axis_index("tp").astype(x.dtype)

    x = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    closed = jax.make_jaxpr(program, axis_env=[("tp", 4)])(x[0])
    chain = cut("p", closed, ["x"], ["y"])
    assert [link.kind for link in chain if isinstance(link, Exchange)] == [
        "all_reduce",
        "all_to_all",
        "all_gather",
        "reduce_scatter",
    ]
    envs = [{"x": x[rank], "rank.tp": np.int32(rank)} for rank in range(4)]
    for link in chain:
        if isinstance(link, Exchange):
            results = collective(link.kind, [env[link.value.name] for env in envs], link.dim)
            for env, result in zip(envs, results, strict=True):
                env[link.result.name] = result
            continue
        assert [p.name for p in link.inputs].count("rank.tp") <= 1
        run = jax.extend.core.jaxpr_as_fun(link.jaxpr)
        for env in envs:
            env.update(
                {
                    p.name: np.asarray(v)
                    for p, v in zip(link.outputs, run(*(env[p.name] for p in link.inputs)), strict=True)
                }
            )
    expected = jax.vmap(program, axis_name="tp")(x)
    np.testing.assert_allclose(np.stack([env["y"] for env in envs]), expected, rtol=1e-6)


def test_a_grid_of_stages() -> None:
    cfg = load_config("glm-5")
    grid = cutting.from_layout(cfg, Layout(tp=2, pp=4)).grid
    assert isinstance(grid, Grid) and [len(stage) for stage in grid.stages] == [20, 20, 19, 19]


@pytest.mark.parametrize("name", ["ort", "torch", "xla"])
def test_executors_keep_shapes(name: str) -> None:
    """A device's rank is a scalar, not a vector of one."""
    formats = {"ort": "onnx", "torch": "torch", "xla": "stablehlo"}
    runtime = executor(name, formats[name])
    for array in (np.asarray(3, np.int32), np.arange(6, dtype=np.float32).reshape(2, 3).T):
        found = runtime.get(runtime.put(array))
        assert found.shape == array.shape and found.dtype == array.dtype and (found == array).all()
