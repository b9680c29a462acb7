"""Graphs with CANN's operators mean what the JAX ops mean, by the operators' documentation (`cann_reference.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from backends.ascend.lowerings import CannOptions
from backends.ascend.writer import AscendGraph, write
from backends.toolchains.walker import Graph, port
from model import ops
from tests.backends.cann_reference import OPERATORS
from tests.npu.graphs import sparse

RNG = np.random.default_rng(5)


def _normal(*shape: int, dtype: Any = np.float16, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(dtype)


def _graph(fn: Callable[..., tuple[Any, ...]], inputs: dict[str, Any], outputs: list[str]) -> Graph:
    closed = jax.make_jaxpr(lambda *args: fn(**dict(zip(inputs, args, strict=True))))(*inputs.values())
    names = [port(name, var.aval) for name, var in zip(inputs, closed.jaxpr.invars, strict=True)]
    results = [port(name, aval) for name, aval in zip(outputs, closed.out_avals, strict=True)]
    return Graph("test", closed, tuple(names), tuple(results))


def _run(made: AscendGraph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ReferenceEvaluator(made.written.model, new_ops=OPERATORS)
    feeds = {p.name: inputs[p.name] for p in made.written.inputs}
    results: list[Any] = list(session.run(None, feeds))  # type: ignore[arg-type]
    return dict(zip([p.name for p in made.written.outputs], results, strict=True))


def _customs(made: AscendGraph) -> set[str]:
    return {node.op_type for node in made.written.model.graph.node if node.domain}


def _halved(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    latent = inputs["cache.latent"]
    return {**inputs, "cache.latent_nope": latent[..., :512], "cache.latent_rope": latent[..., 512:]}


B, T, HEADS, PAGE, PAGES = 2, 3, 4, 16, 4
CONTEXT = PAGE * PAGES


def _attention_inputs() -> dict[str, np.ndarray]:
    """Two sequences of different length, a chunk of 3 tokens each, pages out of order."""
    pool = 2 * PAGES + 1
    start = np.array([40, 11], np.int32)
    return {
        "query": _normal(B, T, HEADS, 576, scale=0.3),
        "index_query": _normal(B, T, 8, 128),
        "index_weights": _normal(B, T, 8),
        "rows": _normal(B, T, 576),
        "slots": np.array([[17, 18, 19], [33, 34, 35]], np.int32),
        "cache.latent": _normal(pool, PAGE, 576),
        "cache.index": _normal(pool, PAGE, 128),
        "page_table": RNG.permutation(np.arange(1, pool)).astype(np.int32).reshape(B, PAGES),
        "positions": (start[:, None] + np.arange(T, dtype=np.int32)[None, :]).astype(np.int32),
    }


def test_a_sparse_layer_selects_and_attends_as_the_graph_does():
    inputs = _attention_inputs()
    fn = sparse(8)
    made = write(_graph(fn, inputs, ["out", "cache.latent.out", "selected.out"]))
    assert _customs(made) == {"LightningIndexer", "SparseFlashAttention", "ScatterNdUpdate"}
    want_out, want_cache, want_selected = (np.asarray(x) for x in fn(**inputs))
    got = _run(made, _halved(inputs))
    np.testing.assert_array_equal(got["selected.out"], want_selected)
    np.testing.assert_allclose(got["out"], want_out, atol=2e-3)
    np.testing.assert_array_equal(got["cache.latent_nope.out"], want_cache[..., :512])
    np.testing.assert_array_equal(got["cache.latent_rope.out"], want_cache[..., 512:])


def test_the_latent_cache_is_two_inputs_and_two_outputs():
    inputs = _attention_inputs()
    made = write(_graph(sparse(8), inputs, ["out", "cache.latent.out", "selected.out"]))
    names = [p.name for p in made.written.inputs]
    assert "cache.latent" not in names
    assert {"cache.latent_nope", "cache.latent_rope"} <= set(names)
    shapes = {p.name: p.shape for p in made.written.inputs}
    assert shapes["cache.latent_nope"][2] == 512 and shapes["cache.latent_rope"][2] == 64


def test_a_selection_from_another_graph_that_sees_less_than_it_holds():
    """A sharing layer is handed the selection: entries of the future, of our top-k, must not reach CANN's kernel."""
    inputs = _attention_inputs()
    visible = inputs["positions"][..., None]
    order = np.broadcast_to(np.arange(CONTEXT), (B, T, CONTEXT))
    seen_first = np.argsort(order > visible, axis=-1, kind="stable")[..., :32].astype(np.int32)
    inputs["selected"] = seen_first

    def layer(**x: Any) -> tuple[Any, ...]:
        return (ops.sparse_attention(x["query"], x["cache.latent"], x["page_table"], x["selected"], x["positions"],
                                     scale=0.06, value_dim=512),)  # fmt: skip

    kept = {k: inputs[k] for k in ("query", "cache.latent", "page_table", "selected", "positions")}
    made = write(_graph(layer, kept, ["out"]))
    assert _customs(made) == {"SparseFlashAttention"}
    np.testing.assert_allclose(_run(made, _halved(kept))["out"], np.asarray(layer(**kept)[0]), atol=2e-3)


@pytest.mark.parametrize("expanded", [False, True])
def test_dense_attention_reads_the_two_caches(expanded: bool):
    inputs = {
        k: v for k, v in _attention_inputs().items() if not k.startswith(("index", "cache.index", "rows", "slots"))
    }
    if expanded:
        inputs |= {"k_up": _normal(HEADS, 48, 512, scale=0.05), "v_up": _normal(HEADS, 512, 32, scale=0.05)}
        inputs["query"] = inputs["query"][..., : 48 + 64]

    def layer(**x: Any) -> tuple[Any, ...]:
        pages, table, at = x["cache.latent"], x["page_table"], x["positions"]
        if expanded:
            return (ops.expanded_attention(x["query"], pages, table, x["k_up"], x["v_up"], at, scale=0.06),)
        return (ops.latent_attention(x["query"], pages, table, at, scale=0.06, value_dim=512),)

    made = write(_graph(layer, inputs, ["out"]))
    assert _customs(made) == (set() if expanded else {"SparseFlashAttention"})
    assert "cache.latent" not in {p.name for p in made.written.inputs}
    np.testing.assert_allclose(_run(made, _halved(inputs))["out"], np.asarray(layer(**inputs)[0]), atol=2e-3)


def test_what_the_kernels_do_not_take_is_decomposed_and_said():
    """6 heads: SparseFlashAttention declines; the selection that LightningIndexer made, -1 included, still works."""
    inputs = _attention_inputs()
    inputs["query"] = _normal(B, T, 6, 576, scale=0.3)
    fn = sparse(56)  # more than the second sequence can see
    made = write(_graph(fn, inputs, ["out", "cache.latent.out", "selected.out"]))
    assert "SparseFlashAttention" not in _customs(made) and "LightningIndexer" in _customs(made)
    assert made.declined[("glm.sparse_attention", "SparseFlashAttention takes no 6 heads")] == 1
    np.testing.assert_allclose(_run(made, _halved(inputs))["out"], np.asarray(fn(**inputs)[0]), atol=2e-3)


@pytest.mark.parametrize("fused", ["shipped", "none"])
def test_without_the_plugin_the_cache_is_one_and_attention_is_decomposed(fused: Any):
    inputs, fn = _attention_inputs(), sparse(8)
    made = write(_graph(fn, inputs, ["out", "cache.latent.out", "selected.out"]), CannOptions(fused=fused))
    assert not _customs(made)
    got = _run(made, inputs)
    np.testing.assert_allclose(got["out"], np.asarray(fn(**inputs)[0]), atol=2e-3)


@pytest.mark.parametrize(("eps", "node"), [(1e-6, "NPURmsNorm"), (1e-5, "RmsNorm")])
def test_the_epsilon_that_cann_builds_in_is_not_used_for_another(eps: float, node: str):
    inputs = {"x": _normal(3, 64, scale=1e-3), "weight": _normal(64)}

    def norm(**x: Any) -> tuple[Any, ...]:
        return (ops.rms_norm(x["x"], x["weight"], eps=eps),)

    made = write(_graph(norm, inputs, ["out"]))
    assert _customs(made) == {node}
    np.testing.assert_allclose(_run(made, inputs)["out"], np.asarray(norm(**inputs)[0]), rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_routing_chooses_the_same_experts_with_the_same_weights(groups: tuple[int, int]):
    inputs = {"x": _normal(5, 24), "router": _normal(24, 16), "bias": _normal(16, dtype=np.float32, scale=0.1)}

    def route(**x: Any) -> tuple[Any, ...]:
        return ops.route(x["x"], x["router"], x["bias"], top_k=3, n_group=groups[0], topk_group=groups[1],
                         normalise=True, scale=2.5)  # fmt: skip

    made = write(_graph(route, inputs, ["experts", "weights"]))
    assert _customs(made) == {"MoeGatingTopK"}
    got, (experts, weights) = _run(made, inputs), route(**inputs)
    np.testing.assert_array_equal(got["experts"], np.asarray(experts))
    np.testing.assert_allclose(got["weights"], np.asarray(weights), rtol=1e-5)


def test_routing_that_does_not_normalise_is_decomposed():
    inputs = {"x": _normal(5, 24), "router": _normal(24, 16), "bias": _normal(16, dtype=np.float32, scale=0.1)}

    def route(**x: Any) -> tuple[Any, ...]:
        return ops.route(x["x"], x["router"], x["bias"], top_k=3, n_group=1, topk_group=1, normalise=False, scale=1.0)

    made = write(_graph(route, inputs, ["experts", "weights"]))
    assert not _customs(made)
    np.testing.assert_array_equal(_run(made, inputs)["experts"], np.asarray(route(**inputs)[0]))


def _experts(dtype: Any = np.float16) -> tuple[Callable[..., tuple[Any, ...]], dict[str, np.ndarray]]:
    """Six local experts, ids up to 8: the last ones live elsewhere."""
    inputs = {
        "x": _normal(7, 32, dtype=dtype),
        "experts": RNG.integers(0, 9, (7, 3)).astype(np.int32),
        "weights": RNG.random((7, 3)).astype(np.float32),
        "w.gate_up": _normal(6, 32, 2, 16, dtype=dtype, scale=0.3),
        "w.down": _normal(6, 16, 32, dtype=dtype, scale=0.3),
    }

    def experts(**x: Any) -> tuple[Any, ...]:
        return (ops.expert_ffn(x["x"], x["experts"], x["weights"], x["w.gate_up"], x["w.down"]),)

    return experts, inputs


def test_experts_are_grouped_products_and_absent_ones_count_as_nothing():
    fn, inputs = _experts()
    made = write(_graph(fn, inputs, ["out"]))
    assert _customs(made) == {"MoeInitRoutingV3", "GroupedMatmul"}
    np.testing.assert_allclose(_run(made, inputs)["out"], np.asarray(fn(**inputs)[0]), atol=1e-2, rtol=1e-2)


def _int8(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(weight.astype(np.float32)).max(axis) / 127
    return np.rint(weight / np.expand_dims(scale, axis)).astype(np.int8), scale.astype(np.float32)


def test_int8_experts_take_values_and_scales_in_the_place_of_a_weight():
    fn, inputs = _experts()
    made = write(_graph(fn, inputs, ["out"]), CannOptions(int8=frozenset({"w.gate_up", "w.down"})))
    assert "NPUDynamicQuant" in _customs(made)
    for name in ("w.gate_up", "w.down"):
        inputs[f"{name}.values"], inputs[f"{name}.scale"] = _int8(inputs[name], 1)
    assert {p.name for p in made.written.inputs} >= {"w.gate_up.values", "w.gate_up.scale"}
    want = np.asarray(fn(**{k: v for k, v in inputs.items() if "." not in k or k in ("w.gate_up", "w.down")})[0])
    error = np.abs(_run(made, inputs)["out"].astype(np.float32) - want).max() / np.abs(want).max()
    assert error < 0.05


@pytest.mark.parametrize(
    ("fused", "node"), [("all", "QuantBatchMatmulV3"), ("shipped", "WeightQuantBatchMatmulV2"), ("none", None)]
)
def test_int8_products_with_each_set_of_operators(fused: Any, node: str | None):
    inputs = {"x": _normal(2, 3, 64), "w.q_a": _normal(64, 2, 24, scale=0.2)}

    def product(**x: Any) -> tuple[Any, ...]:
        return (ops.linear(x["x"], x["w.q_a"]),)

    made = write(_graph(product, inputs, ["out"]), CannOptions(fused=fused, int8=frozenset({"w.q_a"})))
    assert _customs(made) - {"NPUDynamicQuant"} == ({node} if node else set())
    values, scale = _int8(inputs["w.q_a"], 0)
    got = _run(made, {"x": inputs["x"], "w.q_a.values": values, "w.q_a.scale": scale})["out"]
    want = np.asarray(product(**inputs)[0])
    assert got.shape == want.shape == (2, 3, 2, 24)
    assert np.abs(got - want).max() / np.abs(want).max() < 0.03


def test_a_chip_without_a_kernel_gets_the_decomposition():
    inputs = {"x": _normal(3, 64), "weight": _normal(64)}

    def norm(**x: Any) -> tuple[Any, ...]:
        return (ops.rms_norm(x["x"], x["weight"], eps=1e-5),)

    made = write(_graph(norm, inputs, ["out"]), CannOptions(family="ascend310p"))
    assert not _customs(made)
    assert ("glm.rms_norm", "RmsNorm is not offered on ascend310p") in made.declined


def test_bfloat16_is_taken():
    inputs = {"x": jnp.ones((3, 64), jnp.bfloat16), "weight": jnp.ones((64,), jnp.bfloat16)}

    def norm(**x: Any) -> tuple[Any, ...]:
        return (ops.rms_norm(x["x"], x["weight"], eps=1e-5),)

    assert _customs(write(_graph(norm, inputs, ["out"]))) == {"RmsNorm"}
