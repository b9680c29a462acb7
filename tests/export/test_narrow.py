"""Products of narrow matrices in every format: against NumPy's integers, and in the operators that compilers take."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from jax import export
from onnx.inliner import inline_local_functions

from backends.errors import Unsupported
from backends.toolchains import narrow, stablehlo
from backends.toolchains import onnx as onnx_writer
from backends.toolchains.onnx_target import NARROW_OPSET
from backends.toolchains.walker import Graph
from model.formats import INT4, matrix_format, scheme_of
from model.ops import OPS
from runtime.deployment.tensors import packed, unpacked
from runtime.execution.package.ort import OrtExecutor
from tests.export.test_targets import graph_of, in_torch
from tests.marks import slow_but

RNG = np.random.default_rng(0)
FORMATS = ("w8a8-int8", "w4a8", "w4a16", "w4a16-g16")
F = np.float32


def rounded(x: np.ndarray, name: str) -> np.ndarray:
    """float64 [.., k]: what the format's activations are, by docs/number_formats.md: max / 127 a token."""
    if name.startswith("w4a16"):
        return x.astype(np.float64)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), F(1e-10)) / F(127)
    return np.rint(x / scale).astype(np.int8).astype(np.float64) * scale.astype(np.float64)


def matrix(name: str, shape: tuple[int, ...], axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random values and scales of a matrix that is contracted along `axis`, and what they stand for, in float64."""
    fmt = matrix_format(name)
    size = int(fmt.shared) if isinstance(fmt.shared, int) else shape[axis]
    low, high = (-8, 8) if fmt.values == INT4 else (-128, 128)
    values = RNG.integers(low, high, shape).astype(fmt.values)
    parts = -(-shape[axis] // size)
    scale = (0.01 + 0.01 * RNG.random((*shape[:axis], parts, *shape[axis + 1 :]))).astype(fmt.scale)
    full = np.repeat(scale.astype(np.float64), size, axis).take(range(shape[axis]), axis)
    return values, scale, values.astype(np.float64) * full


def linear(
    name: str, columns: tuple[int, ...], width: int = 80, lead: tuple[int, ...] = (2, 3)
) -> tuple[Any, list[np.ndarray], np.ndarray]:
    """The op, its operands, and its result in NumPy."""
    x = RNG.normal(size=(*lead, width)).astype(F)
    if len(lead) == 2:
        x[0, 0] = 0.0  # a row of zeros has a scale too
    values, scale, meant = matrix(name, (width, *columns), 0)
    op = narrow.lowerings(scheme_of(name, name), "stablehlo")["glm.linear"]
    return op, [x, values, scale], np.tensordot(rounded(x, name), meant, 1)


def experts(name: str, tokens: int, target: str = "stablehlo") -> tuple[Any, list[np.ndarray], np.ndarray]:
    """Four experts here and more elsewhere, two choices a token."""
    x, count, width, f = RNG.normal(size=(tokens, 32)).astype(F), 4, 32, 48
    chosen = np.array([RNG.permutation(6)[:2] for _ in range(tokens)], np.int32)
    weights = RNG.random((tokens, 2)).astype(F)
    (gate_up, *_), (down, *_) = parts = matrix(name, (count, width, 2, f), 1), matrix(name, (count, f, width), 1)
    expected = np.zeros((tokens, width))
    for n, k in np.ndindex(tokens, 2):
        if (e := chosen[n, k]) < count:
            gate, up = np.tensordot(rounded(x[n], name), parts[0][2][e], 1)
            hidden = (gate / (1 + np.exp(-gate)) * up).astype(F)
            expected[n] += weights[n, k] * (rounded(hidden, name) @ parts[1][2][e])
    op = narrow.lowerings(scheme_of(name, name), target)["glm.expert_ffn"]
    return op, [x, chosen, weights, gate_up, parts[0][1], down, parts[1][1]], expected


CASES = {
    "matrix": lambda name, target: linear(name, (24,)),
    "gate_up": lambda name, target: linear(name, (2, 20)),
    "short_group": lambda name, target: linear(name, (8,), 72),
    "one_row": lambda name, target: linear(name, (24,), lead=(1,)),
    "few_tokens": lambda name, target: experts(name, 2, target),
    "many_tokens": lambda name, target: experts(name, 7, target),
}


def in_stablehlo(graph: Graph, operands: list[np.ndarray]) -> np.ndarray:
    """The neutral file, compiled by XLA: a `jax.export` artifact has its program replaced by it."""
    written = stablehlo.write(graph)
    artifact = export.deserialize(bytearray(written.serialized["cpu"]))
    exported = dataclasses.replace(artifact, mlir_module_serialized=written.portable)
    (found,), (same,) = (jax.jit(each.call)(*operands) for each in (exported, artifact))
    np.testing.assert_array_equal(found, same)
    return np.asarray(found)


def in_ort(
    graph: Graph, operands: list[np.ndarray], inlined: bool = False, **options: str
) -> tuple[np.ndarray, onnx.ModelProto]:
    """The result, and the model without functions."""
    model = onnx_writer.write(graph, opset=NARROW_OPSET).model
    onnx.checker.check_model(model, full_check=True)
    flat = inline_local_functions(model)
    chosen = ort.SessionOptions()
    for name, value in options.items():
        chosen.add_session_config_entry(f"session.{name}", value)
    session = ort.InferenceSession((flat if inlined else model).SerializeToString(), chosen)
    binding, executor = session.io_binding(), OrtExecutor()
    read = {given.name for given in session.get_inputs()}
    for port, operand in zip(graph.inputs, operands, strict=True):
        if port.name in read:
            binding.bind_ortvalue_input(port.name, executor.put(operand))
    binding.bind_output("out0")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0], flat


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == F
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_in_onnx(name: str, case: str) -> None:
    op, operands, expected = CASES[case](name, "onnx")
    graph = graph_of(op, *operands)
    found, flat = in_ort(graph, operands)
    close(found, expected)
    close(in_ort(graph, operands, inlined=True)[0], expected)
    close(in_ort(graph, operands, qdqisint8allowed="1")[0], expected)  # the default on ARM
    nodes = Counter(node.op_type for node in flat.graph.node)
    assert {node.domain for node in flat.graph.node} == {""}
    products = 2 if "tokens" in case else 1
    assert nodes["MatMul"] == products
    rounds = 0 if name.startswith("w4a16") else products
    assert (nodes["QuantizeLinear"], nodes["DequantizeLinear"]) == (rounds, rounds + products)
    types = {given.name: given.type.tensor_type.elem_type for given in flat.graph.input}
    values = [
        port.name for port, operand in zip(graph.inputs, operands, strict=True) if operand.dtype in (INT4, np.int8)
    ]
    kind = onnx.TensorProto.INT8 if name == "w8a8-int8" else onnx.TensorProto.INT4
    assert values and all(types[each] == kind for each in values)
    if kind == onnx.TensorProto.INT4:  # nothing but DequantizeLinear reads it: any compiler's pattern for int4 weights
        readers = {node.op_type for node in flat.graph.node if set(values) & set(node.input)}
        assert readers == {"DequantizeLinear"}
    blocks = {a.i for n in flat.graph.node for a in n.attribute if a.name == "block_size"}
    if name.startswith("w4a16"):
        assert blocks == {matrix_format(name).shared}


@pytest.mark.parametrize(
    ("name", "case"),
    slow_but(
        [("w8a8-int8", "few_tokens"), ("w8a8-int8", "short_group"), ("w4a16-g16", "gate_up"), ("w4a8", "many_tokens")],
        [*product(("w8a8-int8", "w4a16-g16"), CASES), ("w4a8", "many_tokens")],
    ),
)
def test_in_stablehlo(name: str, case: str) -> None:
    op, operands, expected = CASES[case](name, "stablehlo")
    graph = graph_of(op, *operands)
    close(in_stablehlo(graph, operands), expected)
    text = stablehlo.neutral(graph)
    assert "custom_call" not in text and 'composite "glm.' in text and f'format = "{name}"' in text
    products = [line.rpartition(" : ")[2] for line in text.splitlines() if "dot_general" in line]
    for types in products:
        left, right = (each.rpartition("x")[2].rstrip("> ") for each in types.partition(" -> ")[0].split(", tensor"))
        assert (left, right.rstrip(")>")) == (("i8", "i8") if "a8" in name else ("f32", "f32"))
    assert len(products) == (2 if "tokens" in case else 1)
    assert ("xi4>" in text) == (name != "w8a8-int8")


@pytest.mark.parametrize("case", slow_but(["few_tokens"], ["gate_up", "few_tokens", "many_tokens"]))
def test_in_torch(case: str) -> None:
    op, operands, expected = CASES[case]("w8a8-int8", "torch")
    (found,) = in_torch(graph_of(op, *operands), operands)
    close(found, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_the_emulation_computes_the_same(name: str) -> None:
    """Bit for bit where a product is an integer's: the same scales, the same rounding, the same order of scales."""
    from backends.emulation import products

    op, (x, values, scale), _ = linear(name, (24,))
    flat = x.reshape(-1, x.shape[-1])
    emulated = products.product(
        jnp.asarray(flat), jnp.asarray(values.astype(np.int8)), jnp.asarray(scale), matrix_format(name)
    )
    found = np.asarray(jax.jit(op)(flat, values, scale))
    np.testing.assert_allclose(found, emulated, rtol=1e-6, atol=1e-6)
    if not name.startswith("w4a16"):
        assert (found == np.asarray(emulated)).mean() > 0.9


def test_ties_and_the_largest_number_go_to_even_and_127() -> None:
    x = np.array([[127.0, 0.5, 1.5, -2.5, -127.0]], F)
    values, scale = narrow.quantised_rows(x)
    assert np.asarray(values).tolist() == [[127, 0, 2, -2, -127]] and np.asarray(scale).tolist() == [[1.0]]
    graph = graph_of(lambda x: narrow.quantised_rows(x)[0], x)
    assert in_ort(graph, [x])[0].tolist() == [[127, 0, 2, -2, -127]]


def test_a_matrix_that_stays_wide_is_the_op_as_it_was() -> None:
    op = narrow.lowerings(scheme_of("w8a8-int8", "w8a8-int8"), "onnx")["glm.linear"]
    x, w = np.ones((2, 8), F), np.ones((8, 3), F)
    traced = str(jax.make_jaxpr(op)(x, w))
    assert traced == str(jax.make_jaxpr(OPS["glm.linear"].call)(x, w))


def test_neutral_stablehlo_has_nothing_of_a_platform() -> None:
    graph = graph_of(lambda x: jax.numpy.linalg.cholesky(x), np.eye(4, dtype=F))
    with pytest.raises(Unsupported, match=r'no operation of its own for stablehlo\.custom_call "lapack_spotrf_ffi"'):
        stablehlo.neutral(graph)
    text = stablehlo.neutral(graph_of(lambda x: jax.lax.top_k(x, 2), np.eye(4, dtype=F)))
    assert text.startswith("module @g {") and "mhlo." not in text and "jax." not in text
    assert tuple(int(part) for part in stablehlo.version().split(".")) >= (1, 0, 0)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (1,), (3, 1, 7), (0, 4)])
def test_int4_in_files_is_as_onnx_packs_it(shape: tuple[int, ...]) -> None:
    values = RNG.integers(-8, 8, shape).astype(INT4)
    raw = packed(values)
    assert raw.nbytes == -(-values.size // 2)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, shape, raw.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values.astype(np.int8))
    np.testing.assert_array_equal(unpacked(raw, shape).astype(np.int8), values.astype(np.int8))


@pytest.mark.parametrize(
    ("target", "dense", "routed", "why"),
    [
        ("torch", "bf16", "w4a16", "the graphs of torch have no 4-bit integers"),
        ("torch", "w8a8-int8", "w4a8", "no 4-bit integers"),
        ("onnx", "fp8-block", "fp8-block", "the graphs of onnx have no 8-bit floats"),
        ("onnx", "bf16", "nvfp4", "no 4-bit floats"),
        ("stablehlo", "fp8-channel", "fp8-channel", "do not round activations to e4m3, a scale a token"),
        ("stablehlo", "bf16", "w4afp8", "do not round activations to e4m3"),
        ("stablehlo", "fp8-block", "w4a16", "do not round activations to e4m3"),
        *((target, "w8a8-int8", "w8a8-int8", None) for target in narrow.HOLDS),
        *((target, "bf16", "w8a8-int8", None) for target in narrow.HOLDS),
        *((target, "w4a16-g64", "w4a16-g64", None) for target in ("onnx", "stablehlo")),
        *((target, "fp8-block", "fp8-block", None) for target in ("torch", "stablehlo")),
        *((target, "bf16", "bf16", None) for target in narrow.HOLDS),
    ],
)
def test_what_a_target_cannot_hold(target: str, dense: str, routed: str, why: str | None) -> None:
    found = narrow.refusal(scheme_of(dense, routed), target)
    assert found is None if why is None else found is not None and why in found


def test_types_that_the_opset_lacks() -> None:
    graph = graph_of(
        functools.partial(narrow.widened, dtype="float32", axis=0), np.zeros((4, 2), ml_dtypes.int4), np.ones((1, 2), F)
    )
    with pytest.raises(Unsupported, match="ONNX opset 18 has no int4"):
        onnx_writer.write(graph)
