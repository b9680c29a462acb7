"""The walker: evaluates a traced graph, equation by equation, in a target's own values.

A target (`Target`) is a table from primitive names to rules, and what to do with an op of the contract. Values are
whatever the target makes of them: names of an ONNX graph, torch tensors. Dead equations are skipped.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from backends.errors import Unsupported
from model.ops import attributes_of

T = TypeVar("T")

_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True)
class Port:
    """A named input or output of a graph; dtype in numpy's spelling."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """A piece of a traced program with named inputs and outputs: all that a writer is given.

    `aliases`: output name -> the input whose buffer it may take over (caches).
    """

    name: str
    jaxpr: jex.ClosedJaxpr
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OpCall(Generic[T]):
    """A `glm.*` op as the walker meets it: operands in the target's values, and what the trace knows of them."""

    name: str
    attributes: Mapping[str, Any]
    operands: tuple[T, ...]
    inputs: tuple[Any, ...]  # abstract values: .shape, .dtype
    outputs: tuple[Any, ...]
    body: jex.ClosedJaxpr


Rule = Callable[..., Any]  # (target, eqn, *values) -> a value, or a list for several results


class Target(ABC, Generic[T]):
    """What a writer tells the walker."""

    name: str
    rules: Mapping[str, Rule]
    calls: Mapping[str, Rule] = MappingProxyType({})
    """Rules for jitted functions, JAX's own and `narrow.py`'s, by name: one operator for a dozen equations."""

    @abstractmethod
    def constant(self, value: np.ndarray) -> T:
        """A constant of the graph."""

    def op(self, call: OpCall[T]) -> Sequence[T]:
        """An op of the contract; the default decomposes it."""
        return walk(self, call.body.jaxpr, call.body.consts, call.operands)


def port(name: str, aval: Any) -> Port:
    return Port(name, tuple(aval.shape), jnp.dtype(aval.dtype).name)


def walk(
    target: Target[T],
    jaxpr: jex.Jaxpr,
    consts: Sequence[Any],
    values: Sequence[T],
    known: Mapping[Any, T] = MappingProxyType({}),
) -> list[T]:
    """The results of a jaxpr in the target's values. known: values of variables that need not be made.

    Raises `Unsupported` for a primitive that the target's table lacks.
    """
    env: dict[Any, T] = {}
    used = live(jaxpr, known.keys())
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        if var in used:
            env[var] = target.constant(np.asarray(const))
    env.update(zip(jaxpr.invars, values, strict=True))
    env.update(known)

    def read(atom: Any) -> T:
        if isinstance(atom, jex.Literal):
            return target.constant(np.asarray(atom.val, atom.aval.dtype))  # type: ignore[attr-defined]
        return env[atom]

    for eqn in jaxpr.eqns:
        if not any(var in used and var not in known for var in eqn.outvars):
            continue
        given, name = [read(v) for v in eqn.invars], eqn.primitive.name
        if name == "composite" and eqn.params["name"].startswith("glm."):
            call = OpCall(
                eqn.params["name"],
                attributes_of(eqn),
                tuple(given),
                tuple(v.aval for v in eqn.invars),
                tuple(v.aval for v in eqn.outvars),
                eqn.params["jaxpr"],
            )
            out = list(target.op(call))
        elif name in ("jit", "pjit") and eqn.params["name"] in target.calls:
            result = target.calls[eqn.params["name"]](target, eqn, *given)
            out = list(result) if len(eqn.outvars) > 1 else [result]
        elif name in _INLINED or name == "composite":
            body = eqn.params[_INLINED.get(name, "jaxpr")]
            out = walk(target, body.jaxpr, body.consts, given)
        elif name in target.rules:
            result = target.rules[name](target, eqn, *given)
            out = list(result) if eqn.primitive.multiple_results else [result]
        else:
            raise Unsupported(
                f"{target.name} has no rule for the primitive `{name}`; "
                f"add one to the rules in backends/toolchains/ or export stablehlo"
            )
        env.update((var, value) for var, value in zip(eqn.outvars, out, strict=True) if var not in known)
    return [read(v) for v in jaxpr.outvars]


def live(jaxpr: jex.Jaxpr, known: Set[Any] = frozenset()) -> set[Any]:
    """The variables that the results of a jaxpr depend on, where those that are known need nothing."""
    used = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if any(var in used and var not in known for var in eqn.outvars):
            used.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return used
