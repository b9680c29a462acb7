"""Graphs of torch_npu's operators mean what the JAX ops mean, by the operators' documentation (`references.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
from backends.ascend.target import NpuOptions
from backends.ascend.writer import write
from backends.emulation.number_formats import NumberFormats
from backends.errors import Unsupported
from backends.toolchains import narrow
from model import ops
from model.formats import CacheFormats, Formats, scheme
from model.hf_config import load_config
from tests.marks import slow_but
from tests.npu import graphs as g


@pytest.mark.parametrize("k", slow_but([8], [8, 56]))
def test_a_sparse_layer_selects_and_attends_as_the_graph_does(k: int):
    """With 56 the second sequence sees less than is selected."""
    inputs, fn = g.attention_inputs(), g.sparse(k)
    made = write(g.graph(fn, inputs, g.SPARSE_OUTPUTS), g.F32)
    assert g.operators(made) == {"npu_lightning_indexer", "npu_sparse_flash_attention", "npu_scatter_nd_update_"}
    assert made.aliases == {f"cache.latent_{half}.out": f"cache.latent_{half}" for half in ("nope", "rope")}
    out, cache, selected = (np.asarray(x) for x in fn(**inputs))
    got = g.run(made, inputs)
    for mine, theirs, last in zip(got["selected.out"].reshape(-1, k), selected.reshape(-1, k),
                                  inputs["positions"].reshape(-1), strict=True):  # fmt: skip
        assert set(mine) - {-1} == set(theirs[theirs <= last])
    np.testing.assert_allclose(got["out"], out, atol=1e-5)
    np.testing.assert_array_equal(got["cache.latent_nope.out"], cache[..., :512])
    np.testing.assert_array_equal(got["cache.latent_rope.out"], cache[..., 512:])


@pytest.mark.parametrize(("k", "fused"), slow_but([(8, True)], [(8, True), (56, True), (8, False)]))
def test_caches_in_int8_mean_what_their_emulation_does(k: int, fused: bool):
    """A sparse layer that writes latents and index keys, against the ops as an emulated chip has them: what is written,
    what is selected, what comes out."""
    plain, fn = {**g.attention_inputs()}, g.sparse(k, keys=True)
    inputs = g.int8_caches(plain)
    made = write(g.graph(fn, plain, [*g.SPARSE_OUTPUTS, "cache.index.out"]), dataclasses.replace(g.C8, fused=fused))
    assert g.operators(made) == (
        {"npu_dynamic_quant", "npu_scatter_nd_update_", "npu_quant_lightning_indexer",
         "npu_kv_quant_sparse_flash_attention"} if fused else set()
    )  # fmt: skip
    names = ("cache.latent", "cache.index", "cache.index_scale")
    assert made.aliases == {f"{name}.out": name for name in names}
    kept_in = Formats("f32", "f32", cache=CacheFormats("int8_packed", "int8_scaled"))
    lowerings = NumberFormats(load_config("glm-5"), kept_in).lowerings()
    emulated = jax.jit(ops.substitute(lambda *args: fn(**dict(zip(plain, args, strict=True))), lowerings))
    out, latent, selected, index = (np.asarray(x) for x in emulated(*{**plain, **g.widened(inputs)}.values()))
    got = g.run(made, inputs)
    kept = g.widened(got, ".out")
    np.testing.assert_allclose(kept["cache.latent"], latent, atol=1e-6)
    np.testing.assert_allclose(kept["cache.index"], index, atol=2e-3)  # a value on the edge may round the other way
    for mine, theirs, last in zip(got["selected.out"].reshape(-1, k), selected.reshape(-1, k),
                                  inputs["positions"].reshape(-1), strict=True):  # fmt: skip
        assert set(mine[mine <= last]) - {-1} == set(theirs[theirs <= last])
    np.testing.assert_allclose(got["out"], out, atol=1e-5)


@pytest.mark.parametrize("expanded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dense_attention_reads_latents_in_int8(expanded: bool):
    inputs, layer = g.dense_inputs(expanded), g.dense(expanded)
    narrow = g.int8_caches({**g.attention_inputs(), **inputs})
    made = write(g.graph(layer, inputs, ["out"]), g.C8)
    assert g.operators(made) == (set() if expanded else {"npu_kv_quant_sparse_flash_attention"})
    want = layer(**{**inputs, "cache.latent": g.widened(narrow)["cache.latent"]})[0]
    np.testing.assert_allclose(g.run(made, narrow)["out"], np.asarray(want), atol=1e-5)


@pytest.mark.parametrize(
    ("formats", "kv"), slow_but([("", "")], [("", ""), ("w8a8", ""), ("w8a8", "int8"), ("", "int8")])
)
def test_projections_before_attention_are_one_operator(formats: str, kv: str):
    """Queries, the latent that an indexer reads and the cache's rows; with a cache in int8 but matrices that are not,
    operator by operator."""
    linear = narrow.lowerings(scheme(formats), "ascend")["glm.linear"] if formats else ops.linear
    inputs, fn = g.projection_inputs(int8=bool(formats)), g.projections(linear)
    made = write(g.graph(fn, inputs, g.PROJECTED), g.C8 if kv else g.F32)
    taken = bool(formats) or not kv
    assert ("npu_mla_prolog_v3" in g.operators(made)) == taken == (not made.declined)
    assert set(made.nz) == ({f"w.{name}.values" for name in ("q_a", "q_b", "kv_a")} if formats else set())
    query, q_latent, pages = (np.asarray(x) for x in jax.jit(lambda x: fn(**x))(inputs))
    held = g.int8_caches(g.attention_inputs())
    got = g.run(made, {**inputs, "cache.latent": held["cache.latent"]} if kv else inputs)
    off = 0.02 if formats else 1e-5
    assert np.abs(got["query"] - query).max() <= off * np.abs(query).max()
    assert np.abs(got["q_latent"] - q_latent).max() <= off * np.abs(q_latent).max()
    at = inputs["slots"].reshape(-1)
    if kv:
        rows = g.widened({**g.int8_caches(g.attention_inputs()), "cache.latent": got["cache.latent.out"]})[
            "cache.latent"
        ]
    else:
        rows = np.concatenate([got["cache.latent_nope.out"], got["cache.latent_rope.out"]], axis=-1)
        others = np.delete(rows.reshape(-1, 576), at, axis=0)
        np.testing.assert_array_equal(others, np.delete(inputs["cache.latent"].reshape(-1, 576), at, axis=0))
    written, want = rows.reshape(-1, 576)[at], pages.reshape(-1, 576)[at]
    assert np.abs(written - want).max() <= (0.02 if formats or kv else 1e-5) * np.abs(want).max()


def test_projections_of_other_sizes_are_operators_of_their_own():
    made = write(g.graph(g.projections(), g.projection_inputs(hidden=96), g.PROJECTED), g.F32)
    assert g.operators(made) == {"npu_rms_norm", "npu_interleave_rope", "npu_scatter_nd_update_"}
    assert made.declined["projections before attention", "MlaProlog takes no hidden size of 96"] == 1


def test_a_selection_from_another_graph_that_sees_less_than_it_holds():
    inputs = {k: v for k, v in g.attention_inputs().items() if k in ("query", "cache.latent", "page_table")}
    at = inputs["positions"] = g.attention_inputs()["positions"]
    order = np.broadcast_to(np.arange(g.PAGE * g.PAGES), (g.B, g.T, g.PAGE * g.PAGES))
    inputs["selected"] = np.argsort(order > at[..., None], axis=-1, kind="stable")[..., :32].astype(np.int32)

    def layer(**x: Any) -> tuple[Any, ...]:
        return (ops.sparse_attention(x["query"], x["cache.latent"], x["page_table"], x["selected"], x["positions"],
                                     scale=0.06, value_dim=512),)  # fmt: skip

    made = write(g.graph(layer, inputs, ["out"]), g.F32)
    assert g.operators(made) == {"npu_sparse_flash_attention"}
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(layer(**inputs)[0]), atol=1e-5)


@pytest.mark.parametrize("expanded", slow_but([True], [False, True]))
def test_dense_attention_reads_the_two_caches(expanded: bool):
    inputs, layer = g.dense_inputs(expanded), g.dense(expanded)
    made = write(g.graph(layer, inputs, ["out"]), g.F32)
    assert g.operators(made) == (set() if expanded else {"npu_sparse_flash_attention"})
    assert "cache.latent" not in {each.name for each in made.inputs}
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(layer(**inputs)[0]), atol=1e-5)


def test_what_the_kernels_do_not_take_is_decomposed_and_said():
    """6 heads: attention is refused; the selection that the indexer made, -1 included, still works."""
    inputs, fn = g.attention_inputs(heads=6), g.sparse(56)
    made = write(g.graph(fn, inputs, g.SPARSE_OUTPUTS), g.F32)
    assert g.operators(made) == {"npu_lightning_indexer", "npu_scatter_nd_update_"}
    assert made.declined["glm.sparse_attention", "SparseFlashAttention takes no 6 heads on Atlas A3"] == 1
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(fn(**inputs)[0]), atol=1e-5)


@pytest.mark.parametrize("options", [NpuOptions(fused=False), NpuOptions()])
def test_without_operators_or_with_a_type_that_they_lack_the_cache_is_one(options: NpuOptions):
    inputs, fn = g.attention_inputs(), g.sparse(8)
    made = write(g.graph(fn, inputs, g.SPARSE_OUTPUTS), options)
    assert g.operators(made) == ({"npu_scatter_nd_update_"} if options.fused else set())
    got, want = g.run(made, inputs), [np.asarray(x) for x in fn(**inputs)]
    for name, value in zip(g.SPARSE_OUTPUTS, want, strict=True):
        np.testing.assert_allclose(got[name], value, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_a_norm_has_its_epsilon(eps: float):
    inputs = {"x": g.normal(3, 64, scale=1e-3), "weight": g.normal(64)}

    def norm(**x: Any) -> tuple[Any, ...]:
        return (ops.rms_norm(x["x"], x["weight"], eps=eps),)

    made = write(g.graph(norm, inputs, ["out"]))
    assert g.operators(made) == {"npu_rms_norm"}
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(norm(**inputs)[0]), rtol=1e-5)


@pytest.mark.parametrize("width", [64, 128])
def test_neighbours_are_rotated_and_the_rest_of_a_head_is_left(width: int):
    inputs = g.rope_inputs(width=width)
    made = write(g.graph(g.rope(), inputs, ["out"]), g.F32)
    assert g.operators(made) == {"npu_interleave_rope"}
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(g.rope()(**inputs)[0]), atol=1e-5)


def test_rotated_halves_and_other_widths_are_decomposed():
    halves, wide = g.rope_inputs(), g.rope_inputs(width=128)
    wide["inv_freq"] = np.repeat(wide["inv_freq"], 2)
    for inputs, interleaved in ((halves, False), (wide, True)):
        made = write(g.graph(g.rope(interleaved), inputs, ["out"]), g.F32)
        assert not g.operators(made) and sum(made.declined.values()) == 1
        np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(g.rope(interleaved)(**inputs)[0]), atol=1e-5)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2)])
def test_routing_chooses_the_same_experts_with_the_same_weights(groups: int, kept: int):
    inputs, fn = g.route_inputs(), g.route(groups, kept)
    made = write(g.graph(fn, inputs, ["experts", "weights"]))
    assert g.operators(made) == {"npu_moe_gating_top_k"}
    got, (experts, weights) = g.run(made, inputs), fn(**inputs)
    np.testing.assert_array_equal(got["experts"], np.asarray(experts))
    np.testing.assert_allclose(got["weights"], np.asarray(weights), rtol=1e-5)


def test_routing_that_does_not_normalise_is_decomposed():
    inputs, fn = g.route_inputs(), g.route(1, 1, normalise=False)
    made = write(g.graph(fn, inputs, ["experts", "weights"]))
    assert not g.operators(made) and sum(made.declined.values()) == 1
    np.testing.assert_array_equal(g.run(made, inputs)["experts"], np.asarray(fn(**inputs)[0]))


@pytest.mark.parametrize("first", [0, 6])
def test_experts_are_grouped_products_and_absent_ones_count_as_nothing(first: int):
    """From 6 on none lives here: every row is what the memory held before, and none of it may come through."""
    inputs = g.expert_inputs(first)
    made = write(g.graph(g.experts, inputs, ["out"]))
    assert g.operators(made) == {
        "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_moe_finalize_routing",
    }  # fmt: skip
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(g.experts(**inputs)[0]), atol=1e-4)


def test_int8_products_mean_what_the_narrow_op_means():
    values = np.random.default_rng(1).integers(-127, 128, (64, 2, 24)).astype(np.int8)
    inputs = {"x": g.normal(2, 3, 64), "values": values, "scale": np.abs(g.normal(1, 2, 24)) / 127}
    call = narrow.lowerings(scheme("w8a8"), "torch")["glm.linear"]

    def product(**x: Any) -> tuple[Any, ...]:
        return (call(x["x"], x["values"], x["scale"]),)

    made = write(g.graph(product, inputs, ["out"]), g.F32)
    assert g.operators(made) == {"npu_dynamic_quant", "npu_quant_matmul"}
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(product(**inputs)[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 6])
def test_int8_experts_mean_what_the_narrow_op_means(first: int):
    inputs, rng = g.expert_inputs(first), np.random.default_rng(1)
    for name in ("gate_up", "down"):
        inputs[name] = rng.integers(-127, 128, inputs[name].shape).astype(np.int8)
    inputs["gate_up_scale"] = np.abs(g.normal(6, 1, 2, 16)) / 127
    inputs["down_scale"] = np.abs(g.normal(6, 1, 32)) / 127
    call = narrow.lowerings(scheme("w8a8"), "torch")["glm.expert_ffn"]

    def layer(**x: Any) -> tuple[Any, ...]:
        return (call(x["x"], x["experts"], x["weights"], x["gate_up"], x["gate_up_scale"], x["down"], x["down_scale"]),)

    made = write(g.graph(layer, inputs, ["out"]), g.F32)
    assert {"npu_dynamic_quant", "npu_grouped_matmul"} <= g.operators(made)
    want = np.asarray(layer(**inputs)[0])
    error = np.abs(g.run(made, inputs)["out"] - want).max()
    assert error <= 0.01 * max(np.abs(want).max(), 1e-6)  # a value on the edge may round the other way


@pytest.mark.parametrize("name", ["w4a8", "w4a16"])
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_4_bit_experts_mean_what_the_narrow_op_means(name: str, fused: bool):
    """Packed eight to an int32, whatever runs them; with int8 rows the kernel's halves, and the sums it is given."""
    inputs, call = g.narrow_experts(name), narrow.lowerings(scheme(name), "ascend")["glm.expert_ffn"]

    def layer(**x: Any) -> tuple[Any, ...]:
        return (call(x["x"], x["experts"], x["weights"], x["gate_up.values"], x["gate_up.scale"], x["down.values"],
                     x["down.scale"]),)  # fmt: skip

    made = write(g.graph(layer, inputs, ["out"]), NpuOptions(dtypes=g.F32.dtypes, fused=fused))
    assert {port.dtype for port in made.inputs if port.name.endswith(".values")} == {"int32"}
    assert ("npu_grouped_matmul" in g.operators(made)) == fused
    assert ("gate_up.bias" in {port.name for port in made.inputs}) == (fused and name == "w4a8")
    want = np.asarray(layer(**inputs)[0])
    error = np.abs(g.run(made, inputs)["out"] - want).max()
    assert error <= 0.01 * np.abs(want).max()  # a value on the edge may round the other way


@pytest.mark.parametrize(("groups", "fused"), [(2, True), (1, True), (2, False)])
def test_4_bit_products_mean_what_the_narrow_op_means(groups: int, fused: bool):
    inputs = {"x": g.normal(2, 3, 64), "matrix.values": g.int4(64, 2, 24),
              "matrix.scale": np.abs(g.normal(groups, 2, 24)) / 8}  # fmt: skip
    call = narrow.lowerings(scheme("w4a16/w4a16"), "ascend")["glm.linear"]

    def product(**x: Any) -> tuple[Any, ...]:
        return (call(x["x"], x["matrix.values"], x["matrix.scale"]),)

    made = write(g.graph(product, inputs, ["out"]), NpuOptions(dtypes=g.F32.dtypes, fused=fused))
    assert g.operators(made) == ({"npu_weight_quant_batchmatmul"} if fused else set())
    np.testing.assert_allclose(g.run(made, inputs)["out"], np.asarray(product(**inputs)[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["", "w8a8", "w4a8", "w4a16"])
def test_experts_across_devices_are_one_devices_experts(name: str):
    """Four ranks exchange rows, as int8 where the products round them; each gets back what one device computes."""
    call = narrow.lowerings(scheme(name), "ascend")["glm.expert_ffn"] if name else ops.expert_ffn
    whole, shares = g.exchange_inputs(name)
    made = write(g.graph(g.exchange(call), shares[0], ["out"], g.EXCHANGE), g.F32)
    assert {"npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"} <= g.operators(made)
    assert not {"npu_moe_init_routing_v2", "npu_moe_finalize_routing"} & g.operators(made)
    want = np.asarray(g.exchange(call, ())(**whole)[0])
    got = np.concatenate([each["out"] for each in g.run_ranks(made, shares)])
    assert np.abs(want).max() > 0.1
    assert np.abs(got - want).max() <= (0.01 * np.abs(want).max() if name else 1e-4)  # as above, for int8


def test_an_exchange_that_the_operators_do_not_take_is_refused_before_it_is_a_graph():
    whole, shares = g.exchange_inputs()
    narrow_rows = {**shares[0], "x": shares[0]["x"][:, :512], "gate_up": shares[0]["gate_up"][:, :512],
                   "down": shares[0]["down"][:, :, :512]}  # fmt: skip
    with pytest.raises(Unsupported, match="takes rows of 1024 to 8192, not 512; export with --npu-ops local"):
        write(g.graph(g.exchange(), narrow_rows, ["out"], g.EXCHANGE), g.F32)


def test_rows_that_do_not_fill_int32_are_refused():
    call = narrow.lowerings(scheme("w4a16/w4a16"), "ascend")["glm.linear"]
    inputs = {"x": g.normal(3, 64), "w.values": g.int4(64, 12), "w.scale": np.abs(g.normal(2, 12))}
    graph = g.graph(lambda **x: (call(x["x"], x["w.values"], x["w.scale"]),), inputs, ["out"])
    with pytest.raises(Unsupported, match="w.values has rows of 12 4-bit integers"):
        write(graph)


def test_bfloat16_activations_come_out_close():
    inputs = {name: (jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 and name != "weights" else x)
              for name, x in g.expert_inputs(0).items()}  # fmt: skip
    made = write(g.graph(g.experts, inputs, ["out"]))
    want = np.asarray(g.experts(**inputs)[0]).astype(np.float32)
    got = g.run(made, {name: np.asarray(x) for name, x in inputs.items()})["out"]
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()
