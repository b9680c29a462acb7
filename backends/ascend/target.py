"""A traced graph in ATen and torch_npu's operators.

A lowering returns its results, or declines: the op is then decomposed, as the torch target has it. What kernels take is
`constraints.py`; each refusal is counted with its reason.

Caches. The attention operators read the latent and its rope part from two caches (512 and 64 wide), where the graph has
one of 576. A graph whose cache they can read is given two; or one of int8, and index keys as int8 with their scales
(`caches.py`). An op without a kernel is given the context's rows as the graph has them.

Matrices. A quantised weight, and the experts', are inputs of the two or three dims that their operators take; 4-bit
integers, which torch lacks, eight to an int32.

In place. Caches are written in place (`npu_scatter_nd_update_`): the output of a cache is its input.

Padding. Queries of a chunk see keys up to their own position, which the operators count back from the last key: the
chunk's last token, padding included. A step's start plus its tokens must therefore not exceed its gear's context.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ascend import caches, constraints
from backends.ascend.caches import CacheForm, Halves, Packed, Scaled
from backends.ascend.check import refusal, type_name
from backends.ascend.declare import declare
from backends.errors import Unsupported
from backends.toolchains.torch import RULES, TorchTarget
from backends.toolchains.walker import OpCall, Port, walk


@dataclasses.dataclass(frozen=True)
class NpuOptions:
    """fused: torch_npu's operators where they take a call, or ATen alone. dtypes: of activations and caches that
    attention and quantisation take; a check of what graphs mean may add float32, which no kernel has. int8_rope: keep
    latents and index keys in int8, where a latent's rotary part has so many elements; None: as wide as activations.
    prolog: the projections before attention are one operator, where it takes them. series: of the chip, one that
    operators' documents tell apart."""

    fused: bool = True
    dtypes: frozenset[str] = constraints.ACTIVATIONS
    int8_rope: int | None = None
    prolog: bool = True
    series: str = constraints.DEFAULT_SERIES

    def form(self, port: Port) -> CacheForm | None:
        """What a cache is kept as, the same for all graphs of a package; None: as the graph has it."""
        cache, width = port.name.removesuffix(".out"), port.shape[-1] if port.shape else 0
        if cache == "cache.latent" and self.int8_rope is not None:
            return caches.packed(width, self.int8_rope, port.dtype)
        if cache == "cache.index" and self.int8_rope is not None:
            return caches.scaled(width, port.dtype)
        two = cache == "cache.latent" and port.shape[2:] == (constraints.LATENT + constraints.ROPE,)
        if self.fused and two and constraints.page_fits(port.shape[1]) and port.dtype in self.dtypes:
            return caches.halves(port.dtype)
        return None

    def takes(self, x: Tensor) -> bool:
        return self.fused and type_name(x) in self.dtypes


@dataclasses.dataclass(frozen=True)
class KernelMatrix:
    """A weight as its operator takes it: `tensor` [rows, columns], or [experts, rows, columns]; `shape` is the graph's.
    A kernel may then have it in a layout of its own (FRACTAL_NZ), of which there are no views. packed: `tensor` is
    int32, each of which holds eight 4-bit integers of a row, the first in its lowest bits."""

    tensor: Tensor
    shape: tuple[int, ...]
    packed: bool = False
    bias: Tensor | None = None  # float32 [experts, columns]: see `sums.bias_of`

    @property
    def whole(self) -> Tensor:
        """As the graph has it, 4-bit integers as int8."""
        if not self.packed:
            return self.tensor.reshape(self.shape)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        low = torch.bitwise_and(torch.bitwise_right_shift(self.tensor.unsqueeze(-1), shifts), 15)
        return torch.where(low > 7, low - 16, low).to(torch.int8).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class RoundedRows:
    """Rows [.., i] in int8 that an operator gave back, `scale` float32 [n, 1] or [n]; wide: what they were in."""

    values: Tensor
    scale: Tensor
    wide: torch.dtype

    @property
    def whole(self) -> Tensor:
        scale = self.scale.reshape(*self.values.shape[:-1], 1)
        return (self.values.to(torch.float32) * scale).to(self.wide)


@dataclasses.dataclass(frozen=True)
class Unscored:
    """An indexer's scores that nobody has to make, as long as only a selection reads them. make: makes them."""

    call: OpCall[Any]
    make: Callable[[], Tensor]


class NotTaken(Exception):
    """Why a call is decomposed."""


NpuLowering = Callable[["NpuTarget", OpCall[Any]], Sequence[Any]]


class NpuTarget(TorchTarget):
    """`declined` counts (op, reason); `used` counts (op, operators). bodies: of ops whose decompositions are not the
    graph's own, for caches may be kept in other ways than the graph has them."""

    name = "torch_npu"

    def __init__(
        self, options: NpuOptions, lowerings: Mapping[str, NpuLowering], bodies: Mapping[str, NpuLowering] = {}
    ):
        super().__init__()
        declare()
        self.options = options
        self.lowerings = lowerings if options.fused else {}
        self.bodies = bodies
        self.rules = {name: self._of_tensors(rule) for name, rule in RULES.items()}
        self.declined: Counter[tuple[str, str]] = Counter()
        self.used: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.called: list[str] = []
        self.selections: list[Tensor] = []  # made by the indexer: -1, last, where a query sees less than is selected

    def npu(self, operator: str, *args: Any, **attributes: Any) -> Any:
        """Calls an operator of torch_npu. Raises `NotTaken` where the chip's series has it not, and `Unsupported` for a
        call that its documentation does not have."""
        accept(constraints.undocumented(operator, self.options.series))
        if (why := refusal(operator, args, attributes, self.options.dtypes)) is not None:
            raise Unsupported(f"{why}; export without torch_npu's operators")
        self.called.append(operator)
        return getattr(torch.ops.npu, operator).default(*args, **attributes)

    def op(self, call: OpCall[Any]) -> Sequence[Any]:
        start = len(self.called)
        if call.name in self.lowerings:
            try:
                results = self.lowerings[call.name](self, call)
            except NotTaken as reason:
                self.declined[call.name, str(reason)] += 1
            else:
                self.used[call.name, tuple(self.called[start:])] += 1
                return results
        self.used[call.name, ()] += 1
        body = self.bodies.get(call.name)
        return body(self, call) if body else self.decomposed(call, call.operands)

    def decomposed(self, call: OpCall[Any], operands: Sequence[Any]) -> Sequence[Any]:
        return walk(self, call.body.jaxpr, call.body.consts, [self.whole(value) for value in operands])

    def whole(self, value: Any) -> Any:
        """A value as the tensor that it stands for."""
        if isinstance(value, Unscored):
            return value.make()
        kinds = Halves | Packed | Scaled | KernelMatrix | RoundedRows
        return value.whole if isinstance(value, kinds) else value

    def _of_tensors(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        return lambda target, eqn, *values: rule(target, eqn, *(self.whole(value) for value in values))


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise NotTaken(reason)


def accept(refusal: str | None) -> None:
    """Raises `NotTaken` with what a constraint says."""
    if refusal:
        raise NotTaken(refusal)
