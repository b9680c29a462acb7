"""How a model is spread over devices: one rule for weights, caches, experts and layers. Free of JAX.

    Layout   degrees of parallelism: which mesh axes a weight's or a cache row's dim is cut over, and a device's share
    Slots    which expert is in which slot of a stage
    Grid     one replica: a layout, the layers of each stage, and the slots

A `Layout` is tp x dp x pp devices, in the order stage, dp rank, tp rank: `tp` splits heads, dense width and
vocabulary; `dp` splits sequences (attention data parallelism); `pp` splits the layers into stages. Routed experts are
spread over the tp x dp devices of a stage in ep groups of neighbours: a group holds 1/ep of the experts, and each of
its tp x dp / ep devices a share of their width. So ep = 1 is by tensor alone, ep = tp x dp by expert alone (slots).
With more tp ranks than KV heads each head is on as many neighbours, and so are its keys and values.
`dcp` neighbours of a tp group deal out the tokens of a cache that each would else hold whole (decode context
parallelism); it adds no devices.
`pcp` tp groups compute a prompt's tokens together, each its share of them (prefill context parallelism); each has the
weights of attention and a whole cache, and all decode the same sequences. Weights and experts see them as they see dp
ranks, which they go with nowhere.
Whoever holds bytes or shapes asks here: the tracer, the ledger, emulated and real clusters, export units and weight
files, KV tiers. `model.parallel` has the collectives that go with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from foundation.errors import UsageError
from foundation.limits import within
from model.cache import CacheRow
from model.config import Gqa, ModelConfig
from model.formats import BITS, FP8_BLOCK, MatrixFormat
from model.weights import Weight

Axes = tuple[str, ...]
"""Mesh axes that a dim is cut over, outermost first: ("tp",), ("dp", "tp") or none."""


MOST_DEVICES = 100_000
"""Of a deployment: each is gone through, and simulated or described; the largest that was announced have as many."""


class Place(NamedTuple):
    """A device of a replica: its number, its stage and its ranks there. ep: its expert group, 0 where there is one.
    pcp: the share of a prompt that it computes."""

    index: int
    stage: int
    dp: int
    tp: int
    ep: int
    pcp: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Raises `UsageError` for degrees that do not go together."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    dcp: int = 1
    pcp: int = 1

    def __post_init__(self) -> None:
        for name, degree in vars(self).items():
            if degree < 1:
                raise UsageError(f"{name} must be at least 1, not {degree}")
        if self.pcp > 1 and (self.dp > 1 or self.dcp > 1):
            other, degree = ("dp", self.dp) if self.dp > 1 else ("dcp", self.dcp)
            raise UsageError(f"prompts that are cut over pcp {self.pcp} ranks go with {other} 1, not {degree}")
        within("tp x dp x pp =", self.devices, MOST_DEVICES)
        if self.stage_devices % self.ep:
            groups = f"pcp = {self.tp} x {self.pcp}" if self.pcp > 1 else f"dp = {self.tp} x {self.dp}"
            raise UsageError(
                f"ep must divide tp x {groups} = {self.stage_devices} (1: experts split by tensor, "
                f"{self.stage_devices}: by expert, between: both), not {self.ep}"
            )

        if self.tp % self.dcp:
            raise UsageError(f"dcp must divide tp = {self.tp}, whose ranks share a cache, not {self.dcp}")

    @property
    def groups(self) -> int:
        """tp groups of a stage, each with all weights of attention: dp ranks, or those that cut prompts."""
        return self.dp * self.pcp

    @property
    def by_groups(self) -> Layout:
        """The same devices, each tp group a dp rank: what holds and computes as much, for tokens of its own."""
        return dataclasses.replace(self, dp=self.groups, pcp=1)

    @property
    def devices(self) -> int:
        return self.tp * self.groups * self.pp

    @property
    def communicators(self) -> int:
        """Groups of devices in which a device talks to others: of heads, of sequences, of parts of prompts, of stages,
        of experts."""
        return sum(size > 1 for size in (self.tp, self.dp, self.pcp, self.pp, self.ep))

    @property
    def stage_devices(self) -> int:
        """Devices that hold one pipeline stage."""
        return self.tp * self.groups

    @property
    def by_expert(self) -> bool:
        """Whether experts have slots: a device holds some of them, whole or a share of their width."""
        return self.ep > 1

    @property
    def grouped(self) -> bool:
        """Whether experts are cut both ways: over groups, and in a group by width."""
        return 1 < self.ep < self.stage_devices

    @property
    def dispatches(self) -> bool:
        """Whether tokens are sent to the tp groups of their experts, and not gathered from all of them."""
        return self.by_expert and not self.grouped and self.groups > 1

    @property
    def expert_tensor_parts(self) -> int:
        """Devices that an expert's width is cut over."""
        return self.stage_devices // self.ep

    @property
    def name(self) -> str:
        more = (f" {name}{degree}" for name, degree in (("dcp", self.dcp), ("pcp", self.pcp)) if degree > 1)
        return f"tp{self.tp} dp{self.dp} ep{self.ep} pp{self.pp}" + "".join(more)

    @property
    def axes(self) -> dict[str, int]:
        """Mesh axes of a stage with more than one device, outermost first."""
        return {name: size for name, size in (("dp", self.groups), ("tp", self.tp)) if size > 1}

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UsageError` with the equation where the model does not divide."""
        divisions = [("attention heads", cfg.heads, "tp", self.tp)]
        if isinstance(cfg.attention, Gqa) and self.tp % cfg.attention.kv_heads:  # else each is on as many ranks
            divisions.append(("KV heads", cfg.attention.kv_heads, "tp", self.tp))
        divisions.append(("vocabulary", cfg.vocab_size, "tp", self.tp))
        divisions.append(("dense width", cfg.dense_intermediate, "tp", self.tp))
        if cfg.moe:
            if cfg.moe.shared_experts:
                divisions.append(("shared expert width", cfg.moe.shared_experts * cfg.moe.intermediate, "tp", self.tp))
            if self.by_expert:
                divisions.append(("experts", cfg.moe.experts, "ep", self.ep))
            if self.expert_tensor_parts > 1:
                degree = "tp x dp / ep" if self.by_expert else "tp x dp"
                divisions.append(("expert width", cfg.moe.intermediate, degree, self.expert_tensor_parts))
        for what, size, degree, parts in divisions:
            if size % parts:
                raise UsageError(f"{cfg.name}: {what} / {degree} = {size} / {parts} = {size / parts:.3f}: not whole")
        if (copies := self.cache_copies(cfg)) % self.dcp:
            where = (
                "one tp rank alone, nothing to deal out" if copies == 1 else f"{copies} tp ranks, which dcp must divide"
            )
            raise UsageError(f"{cfg.name}: dcp {self.dcp}: each KV head lies on {where}")
        if self.pp > cfg.num_layers:
            raise UsageError(f"{cfg.name}: {cfg.num_layers} layers cannot be cut into pp = {self.pp} stages")

    def cache_copies(self, cfg: ModelConfig) -> int:
        """tp ranks that would each hold a row of a sequence whole, were it not dealt out."""
        return max(1, self.tp // cfg.attention.kv_heads) if isinstance(cfg.attention, Gqa) else self.tp

    # --- dims over mesh axes

    def parts(self, axes: Axes) -> int:
        """How many shares a dim that is cut over `axes` has."""
        degrees = {"dp": self.groups, "tp": self.tp}
        return math.prod(degrees[axis] for axis in axes)

    def cuts(self, weight: Weight) -> tuple[tuple[int, int], ...]:
        """The dims of a weight that are cut, outermost first, and into how many parts."""
        if weight.expert_count and self.grouped:
            over = {"expert": self.ep, "ffn": self.expert_tensor_parts}
            return tuple((dim, over[axis]) for dim, axis in enumerate(weight.axes) if axis in over)
        if self._repeats(weight):
            return ((weight.axes.index("kv_heads"), weight.heads),) if weight.heads > 1 else ()
        dim, axes = self.split(weight)
        return ((dim, self.parts(axes)),) if axes else ()

    def _repeats(self, weight: Weight) -> bool:
        """Whether several tp ranks hold the same KV heads of it."""
        return "kv_heads" in weight.axes and self.tp > weight.heads

    def scales_cut(self, weight: Weight) -> tuple[int, int]:
        """The innermost cut, the one that may go through what a scale covers, as `scale_shape` takes it."""
        return ((0, 1), *self.cuts(weight))[-1]

    def split(self, weight: Weight) -> tuple[int, Axes]:
        """The dim of a weight that is cut, and the mesh axes it is cut over; (0, ()) for one held whole.

        Raises `UsageError` for experts that are cut in two dims, and KV heads that several ranks hold, which no one
        array over the mesh says.
        """
        if weight.expert_count and self.grouped:
            raise UsageError(self._no_mesh)
        if self._repeats(weight):
            raise UsageError(self._no_mesh_of_heads)
        stage, tp = tuple(self.axes), tuple(axis for axis in self.axes if axis == "tp")
        over: dict[str, Axes] = {name: tp for name in ("heads", "kv_heads", "vocab", "ffn")} | {"expert": ()}
        if weight.expert_count:
            over |= {"expert": stage, "ffn": ()} if self.by_expert else {"expert": (), "ffn": stage}
        cut = [(dim, over[axis]) for dim, axis in enumerate(weight.axes) if axis and over[axis]]
        assert len(cut) <= 1, f"{weight.name}: more than one dim is cut"
        return cut[0] if cut else (0, ())

    def local_shape(self, weight: Weight) -> tuple[int, ...]:
        """The share of a weight that one device holds, without redundant experts."""
        shape = list(weight.shape)
        for dim, parts in self.cuts(weight):
            shape[dim] //= parts
        return tuple(shape)

    def require_mesh(self, cfg: ModelConfig | None = None) -> None:
        """Raises `UsageError` where a device's share is none of one array over the mesh: what holds arrays (emulated
        devices, processes, exports) cannot be laid out so. cfg: of the model, whose KV heads may be fewer than tp."""
        if self.grouped or self.dcp > 1 or self.pcp > 1:
            raise UsageError(self._no_mesh)
        if cfg is not None and isinstance(cfg.attention, Gqa) and self.tp > cfg.attention.kv_heads:
            raise UsageError(self._no_mesh_of_heads)

    @property
    def _no_mesh(self) -> str:
        what, instead = "ep between 1 and tp x dp is", f"ep 1 or {self.stage_devices}"
        if self.pcp > 1:
            what, instead = "pcp above 1 is", "prompts that each tp group computes whole: pcp 1"
        elif not self.grouped:
            what, instead = "dcp above 1 is", "caches that each tp rank holds whole: dcp 1"
        return (
            f"{self.name}: {what} planned and simulated alone; emulated devices, processes and exports take {instead}"
        )

    @property
    def _no_mesh_of_heads(self) -> str:
        return (
            f"{self.name}: KV heads that several tp ranks hold are planned and simulated alone; emulated devices, "
            "processes and exports take tp up to the KV heads"
        )

    def row_split(self, row: CacheRow) -> tuple[int, Axes]:
        """The dim of a cache row that is cut, and over what: KV heads over tp; latents and index keys are held whole
        by every tp rank. Raises `UsageError` for KV heads that several ranks hold."""
        if len(row.shape) == 2 and self.tp > row.shape[0]:
            raise UsageError(self._no_mesh_of_heads)
        return (0, ("tp",)) if len(row.shape) == 2 and self.tp > 1 else (0, ())

    def _row_parts(self, row: CacheRow) -> int:
        """Into how many parts a row is cut: by its KV heads."""
        return min(self.tp, row.shape[0]) if len(row.shape) == 2 else 1

    def local_row(self, row: CacheRow) -> tuple[int, ...]:
        """A device's share of a token's row of a cache."""
        first, *rest = row.shape
        return (first // self._row_parts(row), *rest)

    def row_copies(self, row: CacheRow) -> int:
        """Devices of a stage that hold the same row of a sequence."""
        return self.tp * self.pcp // self.dcp // self._row_parts(row)

    # --- devices and layers

    def places(self) -> Iterator[Place]:
        """The devices of a replica, in their order."""
        for index in range(self.devices):
            stage, rank = divmod(index, self.stage_devices)
            group, tp = divmod(rank, self.tp)
            dp, pcp = divmod(group, self.pcp)
            yield Place(index, stage, dp, tp, rank // self.expert_tensor_parts, pcp)

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of each stage: contiguous, as even as whole layers allow, the longer stages first."""
        least, longer = divmod(num_layers, self.pp)
        sizes = [least + 1] * longer + [least] * (self.pp - longer)
        ends = [sum(sizes[: i + 1]) for i in range(self.pp)]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


# --- bytes of a share -----------------------------------------------------------------------------------


def scale_shape(
    weight: Weight, fmt: MatrixFormat, shape: tuple[int, ...], dim: int = 0, cut: int = 1
) -> tuple[int, ...]:
    """Shape of the scales that go with a share of a weight in a format.

    shape: of the share's values; dim, cut: the dim that was cut to get it, and into how many parts. Where a cut would
    go through a block or group, its scale is repeated for as many elements as block and share have in common; one that
    covers the whole dim serves every share.
    """
    contracted, out = (1 if weight.expert_count else 0), len(shape) - 1
    per_scale = {contracted: 1, out: 1}
    match fmt.shared:
        case "block":
            per_scale = {contracted: FP8_BLOCK, out: FP8_BLOCK}
        case "tensor":
            per_scale = {contracted: shape[contracted], out: shape[out]}
        case "row":
            per_scale = {contracted: shape[contracted], out: 1}
        case int(group):
            per_scale = {contracted: group, out: 1}
    entries = list(shape)
    for axis, size in per_scale.items():
        through = cut > 1 and axis == dim and shape[axis] % size and shape[axis] * cut > size
        each = math.gcd(size, shape[axis]) if through else size
        entries[axis] = -(-shape[axis] // each)
    return tuple(entries)


def share_bytes(weight: Weight, fmt: MatrixFormat, shape: tuple[int, ...], dim: int = 0, cut: int = 1) -> float:
    """Bytes of a share of a weight as a chip stores it in a format: values, scales (see `scale_shape`), zero points
    and factors."""
    values = math.prod(shape) * fmt.bits / 8
    if not fmt.narrow:
        return values
    assert fmt.scale is not None
    scales = math.prod(scale_shape(weight, fmt, shape, dim, cut)) * fmt.scale_bits / 8
    contracted, out = (1 if weight.expert_count else 0), len(shape) - 1
    matrices = math.prod(size for axis, size in enumerate(shape) if axis not in (contracted, out))
    return values + scales + (matrices * BITS[fmt.factor] / 8 if fmt.factor else 0.0)


# --- one replica ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which expert is in which slot, a row a MoE layer of the model; slot s is on the devices of expert group
    s // per_device of its stage."""

    per_device: int
    experts: tuple[tuple[int, ...], ...]

    def table(self, row: int, count: int) -> np.ndarray:
        """int32 [count, m]: the slots of each expert of a layer, repeated in turn up to the most replicas."""
        held: list[list[int]] = [[] for _ in range(count)]
        for slot, expert in enumerate(self.experts[row]):
            held[expert].append(slot)
        if empty := [expert for expert, found in enumerate(held) if not found]:
            raise UsageError(f"expert {empty[0]} of MoE layer {row} is in no slot; make the plan anew")
        most = max(map(len, held))
        return np.array([[found[i % len(found)] for i in range(most)] for found in held], np.int32)


def moe_layers(cfg: ModelConfig) -> list[int]:
    """The layers with routed experts."""
    return [number for number, kind in enumerate(cfg.layers) if kind.ffn == "moe"]


def slots_in_order(cfg: ModelConfig, layout: Layout) -> Slots | None:
    """Expert e in slot e of every MoE layer; None where experts are split by tensor or there are none."""
    if not layout.by_expert or cfg.moe is None:
        return None
    row = tuple(range(cfg.moe.experts))
    return Slots(cfg.moe.experts // layout.ep, (row,) * len(moe_layers(cfg)))


@dataclasses.dataclass(frozen=True)
class Grid:
    """The devices of one replica that hold arrays. stages: the layers of each. slots: where experts have them.

    Raises `UsageError` for a layout that has none, see `Layout.require_mesh`.
    """

    layout: Layout
    stages: tuple[range, ...]
    slots: Slots | None = None

    def __post_init__(self) -> None:
        self.layout.require_mesh()

    @classmethod
    def of(cls, cfg: ModelConfig, layout: Layout, slots: Slots | None = None) -> Grid:
        """A layout with even stages, and experts in order unless `slots` says otherwise. Raises `UsageError` for one
        that holds no arrays of the model."""
        layout.require_mesh(cfg)
        return cls(layout, tuple(layout.stage_layers(cfg.num_layers)), slots or slots_in_order(cfg, layout))

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def dp(self) -> int:
        return self.layout.dp

    @property
    def stage_devices(self) -> int:
        return self.layout.stage_devices

    @property
    def devices(self) -> int:
        return self.stage_devices * len(self.stages)

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UsageError` where the stages are not the model's layers, the slots not its experts, or its KV heads
        fewer than tp."""
        self.layout.require_mesh(cfg)
        layers = [layer for stage in self.stages for layer in stage]
        if layers != list(range(cfg.num_layers)) or not all(self.stages):
            raise UsageError(f"the plan's stages hold layers {layers}, {cfg.name} has {cfg.num_layers}; plan it anew")
        moe = moe_layers(cfg)
        if self.slots and (
            len(self.slots.experts) != len(moe)
            or any(len(row) != self.slots.per_device * self.stage_devices for row in self.slots.experts)
        ):
            raise UsageError(
                f"the plan places {len(self.slots.experts)} MoE layers in {self.slots.per_device} slots a device; "
                f"{cfg.name} has {len(moe)} on {self.stage_devices} devices a stage; plan it anew"
            )

    def whole_shape(self, weight: Weight) -> tuple[int, ...]:
        """A weight over all devices of a stage: experts in their slots, copies included."""
        if weight.expert_count and self.slots:
            return (self.slots.per_device * self.stage_devices, *weight.shape[1:])
        return weight.shape

    def local_shape(self, weight: Weight) -> tuple[int, ...]:
        """One device's share of a weight, redundant expert slots included."""
        return self.layout.local_shape(dataclasses.replace(weight, shape=self.whole_shape(weight)))

    def bytes(self, weight: Weight, fmt: MatrixFormat) -> float:
        """Bytes of one device's share of a weight in a format."""
        return share_bytes(weight, fmt, self.local_shape(weight), *self.layout.scales_cut(weight))

    def placement(self, cfg: ModelConfig, layer: int | None) -> tuple[np.ndarray, np.ndarray] | None:
        """(the expert in each slot [s], the slots of each expert [e, m]) of a layer; None where slot e is expert e.

        layer None: the MTP layer, which no plan places: its experts are in order, and where a device has spare slots,
        in turn.
        """
        kind = cfg.mtp_type if layer is None else cfg.layers[layer]
        if self.slots is None or cfg.moe is None or kind.ffn != "moe":
            return None
        if layer is None:
            row = tuple(slot % cfg.moe.experts for slot in range(self.slots.per_device * self.stage_devices))
        else:
            row = self.slots.experts[moe_layers(cfg).index(layer)]
        if row == tuple(range(cfg.moe.experts)):
            return None
        return np.array(row, np.int64), Slots(self.slots.per_device, (row,)).table(0, cfg.moe.experts)
