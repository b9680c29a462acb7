"""The ONNX graph in the making: values, nodes, constants, functions. `onnx.py` has what it stands for and its tables.

Broadcasts are lazy: a value knows the shape it stands for and the one it is held in, since ONNX's elementwise
operators broadcast by themselves; what needs the whole shape asks for `whole`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from backends.errors import Unsupported
from backends.toolchains.walker import Graph, OpCall, Port, Target, walk
from model.ops import OPS

OPSET, DOMAIN = 18, "glm"
NARROW_OPSET = 21
"""Of graphs with matrices in narrow formats: the first that has int4, and scales of blocks."""
IR_VERSIONS = {OPSET: 8, NARROW_OPSET: 10}
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "int4": TensorProto.INT4,
}
"""The number formats that opset 18 has, and int4, of `NARROW_OPSET`; FP8 came with opset 19."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value of the ONNX graph: it stands for `shape`; the tensor `name` has the shape `held`, with 1 in dims that
    are broadcast, or `real`, which is `held` without some of its leading 1s."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    held: tuple[int, ...]
    real: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class OpForm:
    """How an op of the contract came out: form "function" or "decomposed"."""

    name: str
    form: str
    target: str = ""


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """A model, its inputs and outputs in order, and its ops."""

    model: onnx.ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ops: Counter[OpForm]


class RuleTables(NamedTuple):
    """How a primitive, a call by name and the body of an op are written: `onnx_rules.py`, `onnx_ops.py`."""

    rules: Mapping[str, Callable[..., Any]]
    calls: Mapping[str, Callable[..., Any]]
    bodies: Mapping[str, Callable[..., Any]]


@dataclasses.dataclass
class _Scope:
    """The nodes of the graph, or of one function."""

    prefix: str
    initialisers: list[onnx.TensorProto] | None  # None in a function, whose constants are nodes
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    constants: dict[Any, str] = dataclasses.field(default_factory=dict)
    count: int = 0

    def fresh(self) -> str:
        self.count += 1
        return f"{self.prefix}{self.count}"


class OnnxTarget(Target[Ref]):
    """The graph that is being written: `node`, `constant`, `whole`, `input`, and the shape helpers."""

    name = "onnx"

    def __init__(
        self,
        tables: RuleTables,
        functions: bool,
        opset: int = OPSET,
    ):
        self.rules, self.calls, self.bodies = tables.rules, tables.calls, tables.bodies
        self.functions, self.opset = functions, opset
        self.scope = _Scope("v", [])
        self.inputs: list[Port] = []
        self.domains: set[str] = set()
        self.values: dict[str, Ref] = {}  # results of ops, for value_info
        self.ops: Counter[OpForm] = Counter()
        self._functions: dict[Any, onnx.FunctionProto] = {}
        self._per_op: Counter[str] = Counter()
        self._bases: dict[str, Ref] = {}  # what a reshaped value was made of
        self.scalars: dict[str, Any] = {}  # values of scalar constants
        self.made: dict[str, tuple[str, tuple[Ref, ...]]] = {}  # elementwise results: operator and inputs

    # --- making nodes

    def input(self, port: Port) -> Ref:
        """A new graph input."""
        if port.dtype == "int4" and self.opset < NARROW_OPSET:
            raise Unsupported(f"{port.name}: ONNX opset {self.opset} has no int4")
        onnx_type(port.dtype)
        self.inputs.append(port)
        return Ref(port.name, port.shape, port.dtype, port.shape)

    def node(
        self, op_type: str, *inputs: Ref | None, shape: Sequence[int], dtype: str, domain: str = "", **attributes: Any
    ) -> Ref:
        """A node with one result; a None among the inputs is one left out."""
        (ref,) = self.nodes(op_type, *inputs, results=[(shape, dtype)], domain=domain, **attributes)
        return ref

    def nodes(
        self,
        op_type: str,
        *inputs: Ref | None,
        results: Sequence[tuple[Sequence[int], str]],
        domain: str = "",
        **attributes: Any,
    ) -> list[Ref]:
        """A node; `results` are the shape and dtype of each."""
        return self._emit(op_type, [ref and self._settled(ref) for ref in inputs], results, domain, attributes)

    def _emit(
        self, op_type: str, inputs: Sequence[Ref | None], results: Sequence[Any], domain: str, attributes: Any
    ) -> list[Ref]:
        refs = [Ref(self.scope.fresh(), tuple(s), dtype, tuple(s)) for s, dtype in results]
        names = [ref.name if ref else "" for ref in inputs]
        self.scope.nodes.append(
            helper.make_node(op_type, names, [ref.name for ref in refs], domain=domain or None, **attributes)
        )
        if domain:
            self.domains.add(domain)
        return refs

    def constant(self, value: np.ndarray) -> Ref:
        onnx_type(value.dtype.name)
        key = (value.dtype.name, value.shape, value.tobytes())
        name = self.scope.constants.get(key)
        if name is None:
            name = self.scope.fresh()
            self.scope.constants[key] = name
            tensor = _tensor(value, name)
            if self.scope.initialisers is None:
                self.scope.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            else:
                self.scope.initialisers.append(tensor)
            if value.ndim == 0:
                self.scalars[name] = value.item()
        return Ref(name, value.shape, value.dtype.name, value.shape)

    def ints(self, values: Sequence[int]) -> Ref:
        """An int64 vector: shapes, axes, starts."""
        return self.constant(np.asarray(values, np.int64))

    def _settled(self, ref: Ref) -> Ref:
        """The value with its tensor in the shape that it is held in."""
        if ref.real is None or ref.real == ref.held:
            return ref
        base = Ref(ref.name, ref.real, ref.dtype, ref.real)
        return dataclasses.replace(self.reshape(base, ref.held), shape=ref.shape)

    def whole(self, ref: Ref) -> Ref:
        """The value in its full shape."""
        ref = self._settled(ref)
        if ref.held == ref.shape:
            return ref
        return self.node("Expand", ref, self.ints(ref.shape), shape=ref.shape, dtype=ref.dtype)

    def reshape(self, ref: Ref, shape: Sequence[int]) -> Ref:
        """A reshaped value; of a value that is one itself, from what that was made of."""
        ref = self.whole(ref)
        ref = self._bases.get(ref.name, ref)
        if ref.shape == tuple(shape):
            return ref
        out = self.node("Reshape", ref, self.ints(shape), shape=shape, dtype=ref.dtype)
        self._bases[out.name] = ref
        return out

    def base(self, ref: Ref) -> Ref | None:
        """What a value was reshaped from."""
        return self._bases.get(ref.name)

    def transpose(self, ref: Ref, order: Sequence[int]) -> Ref:
        ref = self.whole(ref)
        shape = tuple(ref.shape[d] for d in order)
        if tuple(order) == tuple(range(len(shape))):
            return ref
        moved = [d for d in order if ref.shape[d] != 1]
        if moved == sorted(moved):  # only dims of 1 move: the same bytes
            return self.reshape(ref, shape)
        return self.node("Transpose", ref, shape=shape, dtype=ref.dtype, perm=list(order))

    def cast(self, ref: Ref, dtype: str) -> Ref:
        if ref.dtype == dtype:
            return ref
        real = ref.held if ref.real is None else ref.real
        (out,) = self._emit("Cast", [ref], [(real, dtype)], "", {"to": onnx_type(dtype)})
        return dataclasses.replace(out, shape=ref.shape, held=ref.held, real=real)

    def elementwise(self, op_type: str, *inputs: Ref, dtype: str | None = None, **attributes: Any) -> Ref:
        """An operator that broadcasts; inputs have one rank, or are scalars."""
        shape, held = _broadcast([x.shape for x in inputs]), _broadcast([x.held for x in inputs])
        real = _broadcast([x.held if x.real is None else x.real for x in inputs])
        (out,) = self._emit(op_type, inputs, [(real, dtype or inputs[0].dtype)], "", attributes)
        self.made[out.name] = (op_type, inputs)
        return dataclasses.replace(out, shape=shape, held=held, real=real)

    # --- ops of the contract

    def op(self, call: OpCall[Ref]) -> Sequence[Ref]:
        if not self.functions:
            self.ops[OpForm(call.name, "decomposed")] += 1
            return super().op(call)
        self.ops[OpForm(call.name, "function", f"{DOMAIN}::{call.name.removeprefix('glm.')}")] += 1
        function = self._function(call)
        operands = [self.whole(ref) for ref in call.operands]
        attributes = {name: _attribute(value) for name, value in call.attributes.items()}
        results = self.nodes(
            function.name,
            *operands,
            results=[(tuple(a.shape), np.dtype(a.dtype).name) for a in call.outputs],
            domain=DOMAIN,
            **attributes,
        )
        if self.scope.initialisers is not None:
            self.values.update({ref.name: ref for ref in results})
        return results

    def _function(self, call: OpCall[Ref]) -> onnx.FunctionProto:
        """The function of an op at these shapes and attributes, written when first met."""
        signature = tuple((tuple(a.shape), np.dtype(a.dtype).name) for a in call.inputs)
        key = (call.name, tuple(sorted(call.attributes.items())), signature)
        if key in self._functions:
            return self._functions[key]
        short = call.name.removeprefix("glm.")
        self._per_op[short] += 1
        names = parameter_names(call.name, len(call.inputs))
        outer, self.scope = self.scope, _Scope("t", None)
        known = self._bases, self.scalars, self.made
        self._bases, self.scalars, self.made = {}, {}, {}
        given = [Ref(name, shape, dtype, shape) for name, (shape, dtype) in zip(names, signature, strict=True)]
        # an op inside an op does not occur; were there one, it would be decomposed here
        body = self.bodies.get(call.name)
        made = body(self, call, given) if body else None
        made = walk(self, call.body.jaxpr, call.body.consts, given) if made is None else made
        results = [self.whole(ref) for ref in made]
        results = [_distinct(self, ref, names) for ref in results]
        function = helper.make_function(
            DOMAIN,
            f"{short}_{self._per_op[short]}",
            names,
            [ref.name for ref in results],
            _live(self.scope.nodes, {ref.name for ref in results}),
            [helper.make_opsetid("", self.opset)],
            list(call.attributes),
        )
        function.doc_string = f"{call.name}: {(inspect.getdoc(OPS[call.name].meaning) or '').splitlines()[0]}"
        self.scope, (self._bases, self.scalars, self.made) = outer, known
        self._functions[key] = function
        return function

    # --- the model

    def finish(self, graph: Graph, results: Sequence[Ref]) -> OnnxModel:
        nodes, renamed = self.scope.nodes, {}
        made = {name for node in nodes for name in node.output}
        for port, ref in zip(graph.outputs, results, strict=True):
            if ref.name in made and ref.name not in renamed:
                renamed[ref.name] = port.name
            else:  # an input or constant handed through, or one result under two names
                nodes.append(helper.make_node("Identity", [ref.name], [port.name]))
        nodes = _live(nodes, {renamed.get(r.name, p.name) for p, r in zip(graph.outputs, results, strict=True)}
                      | set(renamed) | {p.name for p in graph.outputs})  # fmt: skip
        for node in nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        read = {name for node in nodes for name in node.input}
        inputs = tuple(port for port in self.inputs if port.name in read)
        used = {node.op_type for node in nodes if node.domain == DOMAIN}
        values = [ref for name, ref in self.values.items() if name in read and name not in renamed]
        model = helper.make_model(
            helper.make_graph(
                nodes,
                graph.name,
                [_info(port.name, port.shape, port.dtype) for port in inputs],
                [_info(port.name, port.shape, port.dtype) for port in graph.outputs],
                [tensor for tensor in self.scope.initialisers or () if tensor.name in read],
                value_info=[_info(ref.name, ref.shape, ref.dtype) for ref in values],
            ),
            functions=[function for function in self._functions.values() if function.name in used],
            opset_imports=[
                helper.make_opsetid("", self.opset),
                *(helper.make_opsetid(d, 1) for d in sorted(self.domains)),
            ],
            ir_version=IR_VERSIONS[self.opset],
            producer_name="glm5-runtime",
        )
        return OnnxModel(model, inputs, graph.outputs, self.ops)


def onnx_type(dtype: str) -> int:
    """The ONNX element type. Raises `Unsupported` for one that opset 18 lacks."""
    if dtype not in TYPES:
        raise Unsupported(
            f"ONNX opset {OPSET} has no {dtype}; choose formats bf16 or f32, or export stablehlo or torch"
        )
    return TYPES[dtype]


def parameter_names(op: str, count: int) -> list[str]:
    """Names of an op's operands, those of a starred parameter numbered."""
    names: list[str] = []
    for parameter in inspect.signature(OPS[op].meaning).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[:count]


def _attribute(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, bool | int | np.integer) else float(value)


def _tensor(value: np.ndarray, name: str) -> onnx.TensorProto:
    if value.dtype.name == "bfloat16":
        return helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, value.tobytes(), raw=True)
    return numpy_helper.from_array(np.asarray(value, order="C"), name)


def _info(name: str, shape: Sequence[int], dtype: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_type(dtype), list(shape))


def _distinct(target: OnnxTarget, ref: Ref, inputs: Sequence[str]) -> Ref:
    """A function's result must not be one of its inputs."""
    return target.node("Identity", ref, shape=ref.shape, dtype=ref.dtype) if ref.name in inputs else ref


def _live(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted names depend on, in order."""
    kept, wanted = [], set(wanted)
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(max(dims) if 0 not in dims else 0 for dims in zip(*padded, strict=True))


def size(shape: Sequence[int]) -> int:
    return math.prod(shape)
