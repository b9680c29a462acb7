"""Ops of the contract as CANN operators, in ONNX nodes: what `backends/toolchains/onnx.py` calls for each op it meets.

A lowering returns its results, or declines: the op is then decomposed into operators that ATC has registered. What a
kernel takes is in `cann_operators.toml`; each refusal is recorded with its reason, and the package's README lists them.

Latents. CANN's attention reads the latent and its rope part from two caches (512 and 64 wide), where the graph has one
of 576. A package with fused attention therefore keeps two: the one tensor exists only in `CannLowerings.halves`, as the
pair of its parts. An op that CANN has no kernel for is given the context's rows put together again.

Padding. Queries of a chunk see keys up to their own position, which CANN counts back from the last key: the chunk's
last token, padding included. A step's start plus its tokens must therefore not exceed its gear's context.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from backends.ascend import constraints
from backends.ascend.catalog import CannOperator, cann_operators
from backends.toolchains.onnx_target import CustomOp, OnnxTarget, Ref
from backends.toolchains.walker import OpCall, Port

Fused = Literal["all", "shipped", "none"]
FUSED: tuple[Fused, ...] = ("all", "shipped", "none")


@dataclasses.dataclass(frozen=True)
class CannOptions:
    """fused: "all" of CANN's operators (the package brings a plugin), those that CANN itself maps from ONNX
    ("shipped"), or "none". family: the chip family ("ascend910b"), None where unknown. int8: the weights ("w.q_a")
    that are kept in int8 with a scale an output channel."""

    fused: Fused = "all"
    family: str | None = None
    int8: frozenset[str] = frozenset()

    def offers(self, operator: CannOperator) -> bool:
        listed = self.family is None or self.family in operator.chips
        return listed and (self.fused == "all" or (self.fused == "shipped" and operator.shipped))


class Declined(Exception):
    """Why a call is decomposed; without a message where nobody asked for anything else."""


CannRule = Callable[["CannLowerings", OnnxTarget, OpCall[Ref]], Sequence[Ref]]


class CannLowerings:
    """The lowerings of one graph, by `rules` (see `writer.py`). `declined` counts (op, reason)."""

    def __init__(self, options: CannOptions, rules: Mapping[str, CannRule]):
        self.options = options
        self.declined: Counter[tuple[str, str]] = Counter()
        self.halves: dict[str, tuple[Ref, Ref]] = {}
        self.beside: dict[str, Ref] = {}  # inputs and results of CANN's nodes, whose shapes ONNX cannot infer
        self.scores: dict[str, OpCall[Ref]] = {}  # calls whose scores only a selection has to see
        self.selections: set[str] = set()  # what LightningIndexer chose: -1 where there is nothing to choose
        self.table: Mapping[str, CustomOp] = {name: self._guarded(name, rule) for name, rule in rules.items()}

    def _guarded(self, name: str, rule: CannRule) -> CustomOp:
        def lower(target: OnnxTarget, call: OpCall[Ref]) -> Sequence[Ref] | None:
            try:
                return rule(self, target, call)
            except Declined as reason:
                if str(reason):
                    self.declined[name, str(reason)] += 1
            return None

        return lower

    def operator(self, name: str, dtype: str) -> CannOperator:
        """The operator, if it is offered and takes the type; else raises `Declined`."""
        operator = cann_operators()[name]
        if self.options.fused == "none":
            raise Declined
        if not self.options.offers(operator):
            where = f"on {self.options.family}" if self.options.fused == "all" else "without the plugin"
            raise Declined(f"{name} is not offered {where}")
        if dtype not in operator.dtypes:
            raise Declined(f"{name} takes {', '.join(operator.dtypes)}, not {dtype}")
        return operator

    def emit(
        self, target: OnnxTarget, operator: CannOperator, given: Mapping[str, Ref], results: Any, **attributes: Any
    ) -> list[Ref]:
        """The operator's node; `given` by input name, those left out being absent."""
        assert set(given) <= set(operator.inputs) and set(attributes) <= set(operator.attributes), operator.name
        last = max(i for i, name in enumerate(operator.inputs) if name in given)
        inputs = [target.whole(given[name]) if name in given else None for name in operator.inputs[: last + 1]]
        made = target.nodes(operator.type, *inputs, results=results, domain=operator.domain, **attributes)
        self.beside.update({ref.name: ref for ref in (*inputs, *made) if ref is not None})
        return made

    def split_cache(self, target: OnnxTarget, port: Port) -> Ref:
        """The graph input of a latent cache: two inputs, or one where CANN's attention cannot read it."""
        if not self.splits(port):
            return target.input(port)
        nope, rope = (target.input(part) for part in split_port(port))
        self.halves[port.name] = nope, rope
        return Ref(port.name, port.shape, port.dtype, port.shape)

    def splits(self, port: Port) -> bool:
        """Whether a cache is kept as two: the same for all graphs of a package."""
        attention = cann_operators()["SparseFlashAttention"]
        fits = (
            port.shape[2:] == (constraints.LATENT + constraints.ROPE,)
            and constraints.page_fits(port.shape[1])
            and port.dtype in attention.dtypes
        )
        return is_latent(port.name) and fits and self.options.offers(attention)


def is_latent(name: str) -> bool:
    return name in ("cache.latent", "cache.latent.out")


def split_port(port: Port) -> tuple[Port, Port]:
    """The two ports of a latent cache: "cache.latent_nope" and "cache.latent_rope" (".out" stays last)."""
    stem, dot, out = port.name.partition(".out")
    return tuple(
        Port(f"{stem}_{part}{dot}{out}", (*port.shape[:2], width), port.dtype)
        for part, width in (("nope", constraints.LATENT), ("rope", constraints.ROPE))
    )  # type: ignore[return-value]


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise Declined(reason)


def accept(refusal: str | None) -> None:
    """Raises `Declined` with what a constraint says."""
    if refusal:
        raise Declined(refusal)
