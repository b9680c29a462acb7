"""A traced program as plain data: named ops with symbolic local shapes. Free of JAX.

Every dimension in the graph is a monomial in the step's sizes: b sequences, t tokens each, p pages each.
A trace at a few sizes therefore gives the op list at all sizes (`runtime.pricing.trace` fits the monomials and
checks them at a further point), and evaluating it takes microseconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A step's sizes on one device: sequences, tokens of each, cache pages of each."""

    b: int
    t: int
    p: int


@dataclasses.dataclass(frozen=True)
class Dim:
    """coefficient * b^i * t^j * p^k."""

    coefficient: int
    b: int = 0
    t: int = 0
    p: int = 0

    def at(self, sizes: Sizes) -> int:
        return self.coefficient * sizes.b**self.b * sizes.t**self.t * sizes.p**self.p


@dataclasses.dataclass(frozen=True)
class TensorUse:
    """An operand or result: symbolic shape, bytes an element, and the weight it is, if it is one."""

    shape: tuple[Dim, ...]
    element_bytes: int
    weight: str | None = None

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(dim.at(sizes) for dim in self.shape)

    def elements(self, sizes: Sizes) -> int:
        return math.prod(self.at(sizes))


@dataclasses.dataclass(frozen=True)
class TracedOp:
    """One equation: an op of the contract (`glm.*`), a collective (`psum`, `all_gather`, ...) or a plain
    primitive. `stage` is the part of the layer it stands in ("qkv", "indexer", "attention", "route",
    "experts", ""). `axes` are the mesh axes of a collective."""

    name: str
    stage: str
    inputs: tuple[TensorUse, ...]
    outputs: tuple[TensorUse, ...]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axes: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(tensor.weight for tensor in self.inputs if tensor.weight)

    def flops(self, sizes: Sizes) -> int:
        """Floating-point operations of matrix products, as a kernel does them (0 for elementwise ops)."""
        count = FLOPS.get(self.name)
        if count is None:
            return 0
        return count(self, [x.at(sizes) for x in self.inputs], [x.at(sizes) for x in self.outputs])

    def moved_bytes(self, sizes: Sizes) -> int:
        """Bytes read and written once each, in the traced types."""
        return sum(x.elements(sizes) * x.element_bytes for x in (*self.inputs, *self.outputs))


Shapes = list[tuple[int, ...]]


def _linear(_: TracedOp, ins: Shapes, outs: Shapes) -> int:
    return 2 * math.prod(ins[0]) * math.prod(ins[1][1:])


def _head_linear(_: TracedOp, ins: Shapes, outs: Shapes) -> int:
    return 2 * math.prod(ins[0]) * ins[1][2]


def _index_scores(_: TracedOp, ins: Shapes, outs: Shapes) -> int:
    heads, width = ins[0][2:]
    return 2 * math.prod(outs[0]) * heads * (width + 1)


def _sparse(op: TracedOp, ins: Shapes, outs: Shapes) -> int:
    b, t, h, width = ins[0]
    return 2 * b * t * h * ins[3][2] * (width + op.attributes["value_dim"])


def _latent(op: TracedOp, ins: Shapes, outs: Shapes) -> int:
    b, t, h, width = ins[0]
    return 2 * b * t * h * ins[2][1] * ins[1][1] * (width + op.attributes["value_dim"])


def _expanded(_: TracedOp, ins: Shapes, outs: Shapes) -> int:
    b, t, h, width = ins[0]
    context, k_up, v_up = ins[2][1] * ins[1][1], ins[3], ins[4]
    expand = 2 * b * context * (math.prod(k_up) + math.prod(v_up))
    return expand + 2 * b * t * h * context * (width + v_up[2])


def _paged(_: TracedOp, ins: Shapes, outs: Shapes) -> int:
    b, t, h, width = ins[0]
    return 4 * b * t * h * width * ins[3][1] * ins[1][1]


def _route(_: TracedOp, ins: Shapes, outs: Shapes) -> int:
    return 2 * math.prod(ins[0]) * ins[1][1]


def _experts(op: TracedOp, ins: Shapes, outs: Shapes) -> int:
    tokens, top_k = ins[1]
    matrices = ins[3], ins[3 + (len(ins) - 3) // 2]
    return 2 * tokens * top_k * sum(math.prod(m[1:]) for m in matrices)


FLOPS: dict[str, Callable[[TracedOp, Shapes, Shapes], int]] = {
    "glm.linear": _linear,
    "glm.head_linear": _head_linear,
    "glm.index_scores": _index_scores,
    "glm.sparse_attention": _sparse,
    "glm.latent_attention": _latent,
    "glm.expanded_attention": _expanded,
    "glm.paged_attention": _paged,
    "glm.route": _route,
    "glm.expert_ffn": _experts,
}
"""Matrix work by op name; routed experts count every choice (those of other devices included)."""


@dataclasses.dataclass(frozen=True)
class OpList:
    """The op list of one layer type, of the embedding, of the head, or of an MTP step."""

    name: str
    ops: tuple[TracedOp, ...]

    def named(self, prefix: str = "glm.") -> Iterator[TracedOp]:
        return (op for op in self.ops if op.name.startswith(prefix))

    def collectives(self) -> Iterator[TracedOp]:
        return (op for op in self.ops if op.axes)

    def flops(self, sizes: Sizes) -> int:
        return sum(op.flops(sizes) for op in self.ops)
