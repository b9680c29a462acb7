"""Every op of the contract, and the primitives around them, mean the same in ONNX and torch as in JAX."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from jax import lax

from backends.errors import Unsupported
from backends.toolchains import onnx as onnx_writer
from backends.toolchains import onnx_target, stablehlo
from backends.toolchains import torch as torch_target
from backends.toolchains.forms_table import TORCH, forms
from backends.toolchains.onnx_ops import BODIES
from backends.toolchains.walker import Graph, port
from model.ops import OPS
from runtime.execution.package.torch_archive import checked
from tests.model.test_op_contract import EXAMPLES, call, values

BANNED = {"Loop", "Scan", "If", "Einsum", "Sort", "Unique", "NonZero"}


def graph_of(fn: Callable[..., Any], *operands: Any) -> Graph:
    closed = jax.make_jaxpr(fn)(*operands)
    inputs = tuple(port(f"in{i}", v.aval) for i, v in enumerate(closed.jaxpr.invars))
    outputs = tuple(port(f"out{i}", v.aval) for i, v in enumerate(closed.jaxpr.outvars))
    return Graph("g", closed, inputs, outputs)


def in_onnx(graph: Graph, operands: Any, **options: Any) -> list[np.ndarray]:
    model = onnx_writer.write(graph, **options).model
    onnx.checker.check_model(model, full_check=True)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert not BANNED & {node.op_type for node in nodes}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    read = {given.name for given in session.get_inputs()}
    feeds = {p.name: np.asarray(x) for p, x in zip(graph.inputs, operands, strict=True) if p.name in read}
    return session.run(None, feeds)


def in_torch(graph: Graph, operands: Any) -> list[np.ndarray]:
    """As a package opens it: an archive that holds data alone."""
    with warnings.catch_warnings(), tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        warnings.simplefilter("ignore")
        file.write(torch_target.write(graph))
        file.flush()
        module = torch.export.load(checked(Path(file.name))).module()
        return [x.numpy() for x in module(*[torch.from_numpy(np.array(x)) for x in operands])]


def same(found: list[np.ndarray], fn: Callable[..., Any], operands: Any) -> None:
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(fn)(*operands))]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("functions", [True, False], ids=["function", "decomposed"])
def test_an_op_in_onnx(name: str, functions: bool) -> None:
    operands = values(name)
    graph = graph_of(call(name), *operands)
    same(in_onnx(graph, operands, functions=functions), call(name), operands)
    written = onnx_writer.write(graph, functions=functions)
    assert [(node.domain, node.op_type.rsplit("_", 1)[0]) for node in written.model.graph.node] == [
        ("glm", name.removeprefix("glm."))
    ] or not functions
    assert {(f.name, f.form) for f in written.ops} == {(name, "function" if functions else "decomposed")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_in_torch(name: str) -> None:
    operands = values(name)
    same(in_torch(graph_of(call(name), *operands), operands), call(name), operands)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_in_stablehlo_keeps_its_name(name: str) -> None:
    graph = graph_of(call(name), *values(name))
    assert stablehlo.text(graph, "cpu").count(f'stablehlo.composite "{name}"') == 1
    assert stablehlo.ops(graph) == {name: 1}


F = np.float32
X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(F)
ROWS = np.array([[2, -9], [0, 7]], np.int32)
IDS = np.array([[5], [0], [9], [-1]], np.int32)
# name -> (function, operands): what the model's graphs use, and indices in and out of bounds
PRIMITIVES: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    "floor_divide": (lambda x, y: x // y, (np.arange(-9, 9, dtype=np.int32), np.full(18, 4, np.int32))),
    "remainder": (lambda x, y: x % y, (np.arange(-9, 9, dtype=np.int32), np.full(18, 4, np.int32))),
    "float_floor_divide": (lambda x: x // F(0.7), (X,)),
    "rem": (lax.rem, (np.arange(-9, 9, dtype=np.int32), np.full(18, 4, np.int32))),
    "ties": (lambda x: lax.top_k(x, 3), (np.array([[1, 3, 3, 3, 0, 3], [2, 2, 2, 2, 2, 2]], F),)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), (X,)),
    "softmax_first": (lambda x: jax.nn.softmax(x, axis=0), (X,)),
    "fill": (lambda x, i: x.at[i].get(mode="fill", fill_value=7.0), (X, ROWS)),
    "clip": (lambda x, i: x.at[i].get(mode="clip"), (X, np.abs(ROWS))),
    "take_middle": (lambda x, i: jnp.take(x, i, axis=1, mode="clip"), (X, np.abs(ROWS))),
    "take_along": (lambda x, i: jnp.take_along_axis(x, i, axis=1), (X, np.array([[[1], [3]]] * 3, np.int32))),
    "pick": (lambda x, i, j: x.at[i, j].get(mode="promise_in_bounds"), (X, ROWS[:, :1] % 3, ROWS[:, 1:] % 4)),
    "drop": (lambda x, i: x.at[i].set(jnp.ones((4, 4, 5), F), mode="drop"), (X, IDS[:, 0])),
    "add_at": (lambda x, i: x.at[i].add(jnp.ones((3, 4, 5), F), mode="drop"), (X, np.array([1, 1, 5], np.int32))),
    "reductions": (
        lambda x: (jnp.max(x, (0, 2)), jnp.min(x, 1), jnp.any(x > 1, 1), jnp.all(x > -1, (0, 1)), jnp.argmax(x, 2)),
        (X,),
    ),
    "cumsum": (lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True)), (X,)),
    "dynamic_slice": (
        lambda x, i: lax.dynamic_slice(x, (i[0], jnp.int32(0), i[1]), (2, 4, 3)),
        (X, np.array([9, 1], np.int32)),
    ),
    "slices": (lambda x: (x[:, 1:4:2], x[1], x[..., 2:3], jnp.split(x, [1, 3], axis=1)[1]), (X,)),
    "broadcasts": (
        lambda x: jnp.broadcast_to(x[:, :, :1], x.shape).reshape(12, 5) + jnp.arange(5, dtype=F)[None],
        (X,),
    ),
    "logic": (lambda x: ~((x > 0) & (x < 1)) | (x == 0) | (x != x), (X,)),
    "pieces": (lambda x: (jnp.clip(x, -1, 1), x**3, lax.integer_pow(x, -1), jnp.sign(x), jnp.abs(x)), (X,)),
    "passed_through": (lambda x, i: (x, i, x + 1), (X, ROWS)),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive_in_onnx(name: str) -> None:
    fn, operands = PRIMITIVES[name]
    same(in_onnx(graph_of(fn, *operands), operands), fn, operands)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive_in_torch(name: str) -> None:
    fn, operands = PRIMITIVES[name]
    same(in_torch(graph_of(fn, *operands), operands), fn, operands)


@pytest.mark.parametrize("seed", range(12))
def test_products_of_any_layout(seed: int) -> None:
    """dot_general with batch, contracted and free dims in any order, as one MatMul without Einsum."""
    rng = np.random.default_rng(seed)
    sizes = dict(zip("bcijkl", rng.integers(1, 5, 6), strict=True))
    batch, contracted = "bc"[: rng.integers(0, 3)], "ij"[: rng.integers(1, 3)]
    left, right = [*batch, *contracted, *"k"[: rng.integers(0, 2)]], [*batch, *contracted, *"lm"[: rng.integers(0, 3)]]
    sizes["m"] = 3
    rng.shuffle(left), rng.shuffle(right)
    numbers = tuple(
        (tuple(left.index(name) for name in names), tuple(right.index(name) for name in names))
        for names in (contracted, batch)
    )
    operands = [rng.normal(size=[sizes[name] for name in side]).astype(F) for side in (left, right)]

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.dot_general(x, y, numbers)

    graph = graph_of(product, *operands)
    same(in_onnx(graph, operands), product, operands)
    same(in_torch(graph, operands), product, operands)


def test_bfloat16_graphs_pass_the_checker() -> None:
    wide = {"inv_freq", "bias", "weights", "scores"}  # float32 in a 16-bit graph, too
    for name, (operands, _) in EXAMPLES.items():
        names = onnx_target.parameter_names(name, len(operands))
        narrow = [
            jax.ShapeDtypeStruct(s.shape, jnp.bfloat16) if s.dtype == jnp.float32 and known not in wide else s
            for s, known in zip(operands, names, strict=True)
        ]
        for options in ({}, {"functions": False}):
            onnx.checker.check_model(onnx_writer.write(graph_of(call(name), *narrow), **options).model, full_check=True)


def test_what_a_format_cannot_hold_is_one_line() -> None:
    graph = graph_of(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float8_e4m3fn))
    with pytest.raises(Unsupported, match="ONNX opset 18 has no float8_e4m3fn; choose formats bf16 or f32"):
        onnx_writer.write(graph)
    for write in (onnx_writer.write, torch_target.write):
        with pytest.raises(
            Unsupported, match="no rule for the primitive `erf_inv`; add one to the rules in backends/toolchains/"
        ):
            write(graph_of(lax.erf_inv, X))


def test_the_table_has_a_row_for_every_op() -> None:
    assert set(TORCH) == set(OPS) and set(BODIES) <= set(OPS)
    for name in OPS:
        row = forms(name)
        assert all((row.stablehlo, row.onnx, row.torch, row.npu)), name
    with pytest.raises(AssertionError):
        forms("glm.unheard_of")
