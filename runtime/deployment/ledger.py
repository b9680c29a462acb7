"""Where a device's memory goes: weights by component, cache, activations, communication, runtime.

Every byte of weights and cache is computed from the model's own list of weights and cache rows and the
layout's split of them. Free of JAX.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Protocol

from foundation.errors import CapacityError
from model.cache import cache_rows, row_bytes
from model.config import Gqa, LayerType, Mla, ModelConfig
from model.formats import CacheFormats, Formats
from model.split import Layout, share_bytes
from model.weights import layer_weights, outer_weights, stage_outer
from runtime.deployment.engines import Engine
from runtime.deployment.engines.reserve import reserve

RUNTIME_BYTES, COMMUNICATION_BYTES = 2.0e9, 0.5e9
"""Where a profile has no figure for what the driver and runtime keep back, and for collective buffers."""


class ChipFigures(Protocol):
    """What is asked of a chip's profile here."""

    @property
    def name(self) -> str: ...

    def number(self, path: str, /) -> float | None: ...

    def value(self, path: str, /) -> float: ...


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """A device's memory, as an application finds it, and what driver, runtime and collectives keep of it."""

    capacity_bytes: float
    usable_bytes: float
    runtime_bytes: float
    communication_bytes: float

    @classmethod
    def of(cls, profile: ChipFigures, devices: int, communicators: int = 1) -> DeviceMemory:
        """devices: those that talk to each other; one has no buffers for it. communicators: groups of them that a
        device is in."""
        capacity = profile.value("chip.memory.capacity_bytes")
        of_groups = communicators * (profile.number("overhead.communicator_buffer_bytes") or 0.0)
        buffers = profile.number("overhead.collective_buffer_bytes") or of_groups or COMMUNICATION_BYTES
        return cls(
            capacity,
            profile.number("chip.memory.usable_bytes") or capacity,
            profile.number("overhead.runtime_reserved_bytes") or RUNTIME_BYTES,
            buffers if devices > 1 else 0.0,
        )


def stage_weight_bytes(
    cfg: ModelConfig, layout: Layout, formats: Formats, stage: int, mtp: bool, redundant_slots: int = 0
) -> dict[str, float]:
    """Bytes of weights on each device of a pipeline stage, by component.

    The first stage holds the embedding, the last one the final norm, the head and, with `mtp`, the MTP layers. The last
    one holds the embedding too where the head is tied to it or the MTP layers, which embed their own tokens, are there.
    redundant_slots: copies of experts that each device holds beside its own, in every MoE layer, the MTP's too.
    """
    held: dict[str, float] = {}
    spread = dataclasses.replace(layout, pp=1)

    def add(sizes: Mapping[str, float], count: int, component: str | None = None) -> None:
        for name, size in sizes.items():
            held[component or name] = held.get(component or name, 0.0) + count * size

    here = Counter(cfg.layers[layer] for layer in layout.stage_layers(cfg.num_layers)[stage])
    for kind, count in here.items():
        add(_kind_weight_bytes(cfg, spread, formats, kind), count)
    outer = {weight.component for weight in stage_outer(cfg, layout.stage_layers(cfg.num_layers)[stage])}
    if mtp and cfg.mtp_layers and stage == layout.pp - 1:
        outer.add("embedding")
        add(_kind_weight_bytes(cfg, spread, formats, cfg.mtp_type), cfg.mtp_layers, "mtp")
        here[cfg.mtp_type] = cfg.mtp_layers
    if redundant_slots:
        copies = sum(count * expert_bytes(cfg, formats, kind, spread) for kind, count in here.items())
        held["redundant_experts"] = redundant_slots * copies
    ends = _kind_weight_bytes(cfg, spread, formats, None)
    add({component: size for component, size in ends.items() if component in outer}, 1)
    return held


@lru_cache(maxsize=4096)
def _kind_weight_bytes(cfg: ModelConfig, layout: Layout, formats: Formats, kind: LayerType | None) -> dict[str, float]:
    """Bytes of one layer's weights on a device by component; None: the weights outside layers."""
    held: dict[str, float] = {}
    for weight in layer_weights(cfg, kind) if kind else outer_weights(cfg):
        fmt = formats.held(weight, mtp=kind is not None and kind.mtp)
        size = share_bytes(weight, fmt, layout.local_shape(weight), *layout.scales_cut(weight))
        held[weight.component] = held.get(weight.component, 0.0) + size
    return held


def expert_bytes(cfg: ModelConfig, formats: Formats, kind: LayerType, layout: Layout = Layout()) -> float:
    """Bytes of one routed expert of a layer on each device of its group; 0 for a dense layer."""
    alone = Layout(tp=layout.expert_tensor_parts) if layout.grouped else None
    size = 0.0
    for weight in (weight for weight in layer_weights(cfg, kind) if weight.expert_count):
        one = (1, *(alone or Layout()).local_shape(weight)[1:])
        cut = alone.scales_cut(weight) if alone else (0, weight.expert_count)
        size += share_bytes(weight, formats.held(weight, kind.mtp), one, *cut)
    return size


def stage_kv_bytes_per_token(cfg: ModelConfig, layout: Layout, formats: Formats, stage: int, mtp: bool) -> float:
    """Bytes of cache a token takes on each device of a stage that holds its sequence.

    MLA latents and index keys are whole on every tp rank, or with dcp every dcp-th token's; KV heads of GQA are split
    over tp.
    """
    return sum(stage_kv_bytes_by_cache(cfg, layout, formats.cache, stage, mtp).values())


def stage_kv_bytes_by_cache(
    cfg: ModelConfig, layout: Layout, cache: CacheFormats, stage: int, mtp: bool
) -> dict[str, float]:
    """`stage_kv_bytes_per_token` by cache: "latent" and "index", or "key" and "value"."""
    kinds = Counter(cfg.layers[layer] for layer in layout.stage_layers(cfg.num_layers)[stage])
    if mtp and stage == layout.pp - 1:
        kinds[cfg.mtp_type] += cfg.mtp_layers
    held: dict[str, float] = {}
    for kind, count in kinds.items():
        for row in cache_rows(cfg, kind):
            local = dataclasses.replace(row, shape=layout.local_row(row))
            size = row_bytes(cfg, local, cache)
            held[row.name] = held.get(row.name, 0.0) + count * (size / layout.dcp if layout.dcp > 1 else size)
    return held


def activation_bytes(cfg: ModelConfig, layout: Layout, step_tokens: int) -> float:
    """Peak of a step's temporaries on one device: a bound from the shapes, for 16-bit activations.

    The widest moment of a layer (hidden state, queries and outputs of its heads, permuted expert inputs and
    their gate/up width, the indexer's queries), and the logits of a batch of `max(256)` rows in float32.
    """
    d = cfg.hidden_size
    width = cfg.attention.qk_dim + cfg.attention.latent_dim if isinstance(cfg.attention, Mla) else 0
    width = width or (3 * cfg.attention.head_dim if isinstance(cfg.attention, Gqa) else 0)
    attention = 4 * d + 2 * (cfg.heads // layout.tp) * width
    ffn = 4 * d + 3 * cfg.dense_intermediate // layout.tp
    if cfg.moe:
        parts = layout.expert_tensor_parts
        tokens = layout.groups if parts > 1 else 1  # tokens of all groups meet in experts whose width is split
        inner = cfg.moe.intermediate / parts
        ffn = max(ffn, 2 * d + cfg.moe.top_k * tokens * (d + 3 * inner))
    index = 2 * cfg.indexer.heads * cfg.indexer.head_dim if cfg.indexer else 0
    logits = 4.0 * min(step_tokens, 256) * cfg.vocab_size
    return 2.0 * step_tokens * max(attention + index, ffn) + logits


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A device's memory, bytes. `free_bytes` is what the engine's fraction leaves unused; workspace_bytes: what the
    engine allocates beside weights as it starts."""

    DERIVED: ClassVar = ("free_bytes",)  # written beside the fields

    capacity_bytes: float
    usable_bytes: float
    weights_bytes: Mapping[str, float]
    kv_bytes: float
    activation_bytes: float
    communication_bytes: float
    runtime_bytes: float
    kv_bytes_per_token: float
    workspace_bytes: float = 0.0

    @property
    def weights_total_bytes(self) -> float:
        return sum(self.weights_bytes.values())

    @property
    def free_bytes(self) -> float:
        used = self.weights_total_bytes + self.kv_bytes + self.activation_bytes + self.workspace_bytes
        return self.usable_bytes - used - self.communication_bytes - self.runtime_bytes

    @property
    def pool_tokens(self) -> int:
        return int(self.kv_bytes // self.kv_bytes_per_token)

    def lines(self) -> list[str]:
        """The ledger for a terminal, GB."""
        rows = [("usable", self.usable_bytes)]
        rows += [(f"- weights: {k}", -v) for k, v in sorted(self.weights_bytes.items(), key=lambda kv: -kv[1])]
        rows += [
            *([("- engine's workspaces", -self.workspace_bytes)] if self.workspace_bytes else []),
            ("- activations", -self.activation_bytes),
            ("- communication buffers", -self.communication_bytes),
            ("- runtime", -self.runtime_bytes),
            ("- KV pool", -self.kv_bytes),
            ("= free", self.free_bytes),
        ]
        return [f"{name:28}{size / 1e9:10.2f} GB" for name, size in rows]


def stage_ledgers(
    cfg: ModelConfig,
    layout: Layout,
    formats: Formats,
    engine: Engine,
    usable_bytes: float,
    capacity_bytes: float,
    communication_bytes: float = 0.0,
    runtime_bytes: float = 0.0,
    mtp: bool = False,
    redundant_slots: int = 0,
    sized: CacheFormats | None = None,
) -> list[Ledger]:
    """The ledger of each stage's devices, with what `Engine.kv_bytes` gives the KV pool there (0 where the model
    does not fit).

    sized: the row formats that the engine divides the pool by, where those are not what it stores: the pool then takes
    more or fewer bytes than it was given.
    """
    step_tokens = engine.chunked_prefill_tokens or engine.max_step_tokens
    stages = []
    for stage in range(layout.pp):
        weights = stage_weight_bytes(cfg, layout, formats, stage, mtp, redundant_slots)
        here = len(layout.stage_layers(cfg.num_layers)[stage]) + (
            cfg.mtp_layers if mtp and stage == layout.pp - 1 else 0
        )
        kept = reserve(engine, cfg, layout, formats.cache, here, activation_bytes(cfg, layout, step_tokens))
        overhead = communication_bytes + runtime_bytes
        kv = engine.kv_bytes(
            device_bytes=usable_bytes,
            weight_bytes=sum(weights.values()) + kept.workspaces,
            activation_bytes=kept.peak,
            runtime_bytes=overhead,
        )
        per_token = stage_kv_bytes_per_token(cfg, layout, formats, stage, mtp)
        if sized is not None and sized != formats.cache:
            kv *= per_token / sum(stage_kv_bytes_by_cache(cfg, layout, sized, stage, mtp).values())
        stages.append(
            Ledger(
                capacity_bytes,
                usable_bytes,
                weights,
                max(kv, 0.0),
                kept.peak,
                communication_bytes,
                runtime_bytes,
                per_token,
                kept.workspaces,
            )
        )
    return stages


def fullest(
    stages: Sequence[Ledger], cfg: ModelConfig, layout: Layout, page_tokens: int, fraction: float | None = None
) -> Ledger:
    """The ledger of the stage whose pool holds the fewest tokens: what a replica can hold.

    fraction: the engine's share of the memory, for the message. Raises `CapacityError` with the ledger where the model
    does not fit or leaves no room for one page.
    """
    found = min(stages, key=lambda stage: stage.kv_bytes / stage.kv_bytes_per_token)
    if found.pool_tokens < page_tokens:
        unused = fraction is not None and found.free_bytes > 0.1 * found.usable_bytes
        more = f", or give the engine more than its {fraction:g} of it: --set engine.memory_fraction" if unused else ""
        raise CapacityError(
            f"{cfg.name} does not fit {layout.devices} devices ({layout.name}): "
            f"{found.weights_total_bytes / 1e9:.1f} GB of weights a device of {found.usable_bytes / 1e9:.1f} GB "
            f"usable; use more devices or narrower formats{more}\n" + "\n".join(found.lines())
        )
    return found
