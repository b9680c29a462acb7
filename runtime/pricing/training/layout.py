"""How a training step is spread over devices.

Devices are numbered stage by stage, then dp rank, cp rank, tp rank (Megatron-LM's order, tp-cp-dp-pp), from the first
of a server on. Sequences are split over dp; the tokens of one sequence over cp; heads, dense width and vocabulary over
tp. Routed experts lie on groups of `ep` neighbours of a stage, whole where ep is a multiple of tp. So a stage holds its
dense weights dp x cp times and its experts tp x cp x dp / max(ep, tp) times, and `shard` is the `model.split.Layout` of
one such group, by which weights are cut and the graph is traced.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Literal

from foundation.errors import UsageError
from foundation.limits import within
from model.config import Mla, ModelConfig
from model.split import MOST_DEVICES, Layout
from runtime.pricing.chip import Chip
from runtime.pricing.placement import Span

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclasses.dataclass(frozen=True)
class TrainLayout:
    """Degrees of parallelism of a training step, and what it keeps and hides.

    micro_batch_tokens: the most tokens of one micro-batch of a dp rank, over all its cp ranks; whole sequences are
    packed into them. recompute: what the backward pass computes again instead of keeping it: nothing, what is cheap
    ("selective", see `backward.repeated`), or each layer from its input. zero: optimizer state is sharded over the
    ranks that hold the same weights (ZeRO-1, Megatron's distributed optimizer). interleave: runs of layers that each
    device has in turn (virtual pipeline stages). overlap_exchange: dispatch and combine of experts run beside another
    micro-batch's products (DualPipe). overlap_gradients: gradients are reduced while the last micro-batch goes
    backward, and weights gathered while the next step's first goes forward. Raises `UsageError` for degrees that do not
    go together.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    micro_batch_tokens: int = 8192
    recompute: Recompute = "full"
    zero: bool = True
    interleave: int = 1
    overlap_exchange: bool = False
    overlap_gradients: bool = True

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep", "cp", "micro_batch_tokens", "interleave"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.recompute not in RECOMPUTES:
            raise UsageError(f"recompute must be one of {', '.join(RECOMPUTES)}, not {self.recompute!r}")
        within("tp x cp x dp x pp =", self.devices, MOST_DEVICES)
        if self.stage_devices % self.ep:
            sizes = f"{self.tp} x {self.cp} x {self.dp} = {self.stage_devices}"
            raise UsageError(f"ep must divide tp x cp x dp = {sizes}, not {self.ep}")
        if max(self.tp, self.ep) % min(self.tp, self.ep):
            raise UsageError(f"ep must be a multiple of tp = {self.tp}, or divide it, not {self.ep}")

    @property
    def devices(self) -> int:
        return self.stage_devices * self.pp

    @property
    def stage_devices(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def shard(self) -> Layout:
        """The devices that hold the experts of all stages once; its dp counts ranks of dp and cp alike."""
        return Layout(tp=self.tp, dp=max(1, self.ep // self.tp), ep=self.ep, pp=self.pp)

    @property
    def dense_copies(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.dp * self.cp

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts."""
        return self.stage_devices // self.shard.stage_devices

    @property
    def rank_tokens(self) -> float:
        """Tokens of a full micro-batch on one device."""
        return self.micro_batch_tokens / self.cp

    @property
    def name(self) -> str:
        cp = f" cp{self.cp}" if self.cp > 1 else ""
        runs = f"x{self.interleave}" if self.interleave > 1 else ""
        return f"tp{self.tp}{cp} pp{self.pp}{runs} dp{self.dp} ep{self.ep}"

    def check(self, cfg: ModelConfig) -> None:
        """Raises `UsageError` with the equation where the model does not divide."""
        self.shard.check(cfg)
        if self.pp * self.interleave > cfg.num_layers or (self.interleave > 1 and self.pp == 1):
            runs = f"pp x interleave = {self.pp} x {self.interleave}"
            raise UsageError(f"{cfg.name}: {cfg.num_layers} layers cannot be cut into {runs} runs of a pipeline")
        if not isinstance(cfg.attention, Mla) and self.tp > cfg.attention.kv_heads:
            heads = cfg.attention.kv_heads
            raise UsageError(
                f"{cfg.name}: tp = {self.tp} is more than its {heads} KV heads, each of which one rank trains"
            )


@dataclasses.dataclass(frozen=True)
class Spans:
    """The worst placed groups of a layout: of tp and cp ranks, of those that hold the same dense weights and the same
    experts; and the link between stages."""

    tp: Span
    cp: Span
    dense: Span
    experts: Span
    stages_across_domains: bool
    stages_across_nodes: bool


@lru_cache(maxsize=4096)
def spans(layout: TrainLayout, domain: int, node: int) -> Spans:
    """Where a layout's groups lie on servers of `node` devices in scale-up domains of `domain`."""
    size, group = layout.stage_devices, layout.shard.stage_devices
    starts = range(0, layout.devices, size)

    def worst(span: int, step: int) -> Span:
        """Of groups of every `step`-th of `span` devices, which follow one another in a stage; the ranks between them
        lie alike."""
        found = (
            Span.of(range(first, first + span, step), domain, node)
            for start in starts
            for first in range(start, start + size, span)
        )
        return max(found, key=lambda s: (s.domains, -s.together, s.nodes))

    def apart(each: int) -> bool:
        return any(a // each != (a + size) // each for a in range(layout.devices - size))

    return Spans(
        worst(layout.tp, 1),
        worst(layout.tp * layout.cp, layout.tp),
        worst(size, layout.tp),
        worst(size, group),
        apart(domain),
        apart(node),
    )


def spans_on(layout: TrainLayout, chip: Chip) -> Spans:
    """On a chip whose scale-up domains hold groups of experts whole: a domain of 72 has 64 devices for groups of 64 or
    32, as schedulers allot racks in segments."""
    block = layout.shard.stage_devices
    domain = chip.domain // block * block or chip.domain
    return spans(layout, domain, chip.node)
